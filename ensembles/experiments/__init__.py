"""Experiments: data, training, evaluation, robustness, pictures and the command line.

An extra, ``pip install "pytest-ensembles[experiments]"``: nothing above imports it, and heavy
libraries are imported only in the files that need them.

* `data`: image sets, their shifted versions, and batches of them.
* `training`: networks with named members, and training runs that survive a kill.
* `evaluation`: what members and their reductions get right, stored with what it was measured on.
* `robustness`: accuracy under distribution shift: the line, dominance, published models.
* `plots`: the pictures of experiments.
* `command_line`: the console script ``ensembles``.
* `commands`: what each of its commands takes and does, a file for each.
"""
