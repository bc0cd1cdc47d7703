"""Accuracy under distribution shift.

* `line`: the line that models lie on under distribution shift, and the distance from it.
* `dominance`: which samples models get right together.
* `predictions`: predicted classes of several models, as one file.
* `reference`: what 30 published models get right on CIFAR-10 and CIFAR-10.1.
"""
