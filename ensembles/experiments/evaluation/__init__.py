"""What members and their reductions get right, stored with what it was measured on.

* `pretrained`: pretrained CIFAR-10 ResNets whose test errors are published.
* `loading`: networks to be evaluated, from what a user calls them by.
* `scores`: what members and their reductions get right on a set of images.
* `counts`: accuracy as correct of n, with its exact interval.
* `results`: results as JSON files that say what was measured, on what and with what.
"""
