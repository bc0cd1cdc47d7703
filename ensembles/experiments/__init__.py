"""Experiments: data, training, evaluation, robustness, pictures and the command line.

An extra, ``pip install "pytest-ensembles[experiments]"``: nothing above imports it, and heavy
libraries are imported only in the files that need them.

Data

* `images`: labelled images in memory, checked once and immutable by intent.
* `sources`: the image sets by name, and the division of a training set.
* `cifar10`: CIFAR-10 as torchvision stores it.
* `cifar10_1`: CIFAR-10.1, version 4 and version 6.
* `containers`: CIFAR-10 in one file, as lossy JPEG or with the official pixels.
* `downloads`: files from the network, whole and checked, or not there at all.
* `corruptions`: shifted versions of a set, in five levels.
* `batches`: batches for training members, any step of any epoch, always the same.
* `draws`: random numbers that are pure functions of a key.
* `arrays`: NumPy arrays from files, checked.

Training

* `networks`: networks with named members, built from options and a seed.
* `schedules`: learning-rate schedules as shares of the base rate.
* `training_options`: what a training run computes, and how it is executed.
* `member_training`: the Lightning module for any members and any objective.
* `training`: trains, and goes on where a killed run was.
* `checkpoints`: checkpoints to go on from bit by bit, and the plain networks that are in them.
* `runs`: the folder of a training run, its tables, and who writes to it.

Evaluation

* `pretrained`: pretrained CIFAR-10 ResNets whose test errors are published.
* `loading`: networks to be evaluated, from what a user calls them by.
* `evaluation`: what members and their reductions get right on a set of images.
* `counts`: accuracy as correct of n, with its exact interval.
* `results`: results as JSON files that say what was measured, on what and with what.
* `robustness`: the line that models lie on under distribution shift, and the distance from it.
* `dominance`: which samples models get right together.
* `reference`: what 30 published models get right on CIFAR-10 and CIFAR-10.1.

Pictures and commands

* `plots`: the pictures of experiments, in one place.
* `robustness_plot`: accuracy in against out of distribution.
* `curves`: training curves of several runs.
* `heatmaps`: which models are right together, pair by pair.
* `logit_axes`: axes on which accuracies are spaced by their logit.
* `command_line`: the console script ``ensembles``.
* `commands`: what each of its commands takes and does, a file for each.
"""
