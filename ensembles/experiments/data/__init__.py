"""Image sets, their shifted versions, and batches of them.

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
"""
