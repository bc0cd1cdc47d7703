"""One seed gives the same bits in construction and in every training step, and another seed gives
other weights.

Catches weights that are drawn at import or before seeding, a factory that ignores the seed, a
constructor that leaves the global generators in one state for ever, seeds taken from the clock,
sets whose order is that of hashes, layers that draw from generators of their own, and operations
that do not repeat. Of data loaders it catches the random stream that every worker repeats, and the
shuffled order that every epoch repeats.

The model is built and trained twice from one seed, the second time with the clock a day ahead. It
is built once more from another seed, which must give other weights. Where the runs diverge, two
more with a log of every call name the operation. On request the same is done in two new
processes, with other hash seeds, and with generators in other states before the import.
`instruments.loader_rng` says how workers are asked.
"""  # noqa: D205
