"""Promise: what is copied, saved, loaded, cast or wrapped is still the model that it was.

Catches weights that were tied and come apart, masks and indices that no state_dict holds, copies
that compute with the weights of their original, or that gradients do not reach, parameters that
are no longer listed, and optimizers that are left with parameters of before.

Some conversions break ties by PyTorch's own rules. Those are shown as such, with the way to tie
again, and break a claim only where it names them.
"""
