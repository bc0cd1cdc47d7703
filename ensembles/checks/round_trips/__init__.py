"""What is copied, saved, loaded, cast, wrapped or compiled is still the model that it was.

Catches weights that were tied and come apart, masks and indices that no state_dict holds, copies
that compute with the weights of their original, or that gradients do not reach, parameters that
are no longer listed, and optimizers that are left with parameters of before.

Each conversion gets a model that was trained a little. What comes back is compared with it: its
ties, its outputs in both modes, the weights that reach each member, its parameters, and what an
optimizer made before would still step.

Limits: some conversions break ties by PyTorch's own rules. Those are shown as such, with the way to
tie again, and break a claim only where it names them. A conversion that has nothing to convert in a
model, or that this installation cannot do, is named, and never counts as kept.
"""
