"""Promise: training reaches every trainable parameter, and steps each of them exactly once.

Catches parameters that the optimizer never got or got twice, optimizers of a model that has
changed since, members in a Python list, tensors that forward uses and nothing registers, branches
that are cut from the loss, pairs of factors that are both zero, rates of zero, and freezes that
froze nothing.

Healthy networks stay silent: a gradient that is zero or missing at the present values is a
finding only where the parameter reaches no output by structure either, in train or in eval mode.
"""
