"""The optimizer steps every trainable parameter exactly once, and each gets a gradient.

Catches parameters that the optimizer never got or got twice, optimizers of a model that has
changed since, members in a Python list, tensors that forward uses and nothing registers, branches
that are cut from the loss, pairs of factors that are both zero, rates of zero, freezes that froze
nothing, and parameters that forward freezes after it has used them.

Gradients are those of the training loss in train mode, or of a random projection of all outputs.
Where one is missing or zero in every element, the structure decides: it is a finding only where
the parameter also reaches no output with generic weights and transparent activations
(`ensembles.instruments.influence`). So zero-initialised branches, dead ReLUs, dropped blocks and
auxiliary heads are no findings, but a detached branch is one. And before a parameter is called cut,
other weights are drawn, so that an expert to which hard routing sends no row is not taken for cut.

Limits: with many more experts than rows some stay without a row, and count as cut. Tensors behind a
re-entrant checkpoint are not in the autograd graph, so that unregistered ones are not found there.
"""
