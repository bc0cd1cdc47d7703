"""Promise: a training step on one member moves that member only, or the others where claimed.

Catches members that are one network, packed members whose channels mix, members that read each
other's features, BatchNorm statistics that two members update, and a loss that trains one member
according to what another predicts, or to what its weights are.

One optimizer step is taken on each member alone, from the same state and with the same random
numbers, and everything of the other members is compared, bit by bit, with a control without it.
"""
