"""Promise: the state of a model is where PyTorch finds it, and moves only when it is claimed to.

Catches modules and tensors in lists, dicts and closures, masks that are plain attributes, eval()
and train() that do not reach everything, tensors that .to() leaves behind, a forward pass that
changes buffers or modes in eval mode, drops out in it, keeps something for the next call, or writes
into the batch, one that seeds the global generators, caches that outlive the weights that they were
made of, BatchNorm statistics that move several times a step or though their layer is frozen,
weights that drift in steps whose loss does not use them or behind a mask, averaged weights with
statistics of others, and snapshots that alias live weights.

Healthy networks stay silent: a frozen BatchNorm kept in eval mode by an own train(), a teacher
that forward moves, dropped paths, and branches that start at zero are no findings.

Limits: a cache that outlives the weights is seen in plain attributes, lists and dicts; one in
another object, or in another kind of mapping, answers both calls alike.
"""
