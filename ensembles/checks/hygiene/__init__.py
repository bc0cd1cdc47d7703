"""State is registered, and it moves only when it should.

Catches modules and tensors in lists, dicts and closures, masks that are plain attributes, eval()
and train() that do not reach everything, and tensors that .to() leaves behind. Catches a call that
changes buffers or modes in eval mode, drops out in it, keeps something for the next call, writes
into the batch, freezes what it has used, or seeds the global generators. Catches caches that
outlive the weights that they were made of, BatchNorm statistics that move several times a step or
though their layer is frozen, weights that drift in steps whose loss does not use them or behind a
mask, averaged weights with statistics of others, and snapshots that are the live weights.

The model is called in eval mode under several seeds, and trained for a few steps. Healthy networks
stay silent: a frozen BatchNorm kept in eval mode by an own train(), a teacher that forward moves,
dropped paths, and branches that start at zero are no findings.

Limits: a cache that outlives the weights is seen in plain attributes, lists and dicts; one in
another object, or in another kind of mapping, answers both calls alike. Hidden modules and tensors
are searched for in a limited number of objects. Where there are more, and nothing was found, the
claim does not hold: the check says how far it came.
"""
