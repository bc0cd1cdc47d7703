"""Members share exactly the memory that they claim to share.

Catches members that are one module under several names, "tied" weights that are copies, layers
that are shared through a default argument or a registry, and two parameters over one memory.

The comparison is by storage, not by value. It is exact for views with any offset and stride: views
that interleave without overlapping do not share. It needs no batch, and works on the meta device,
where nothing is allocated.
"""
