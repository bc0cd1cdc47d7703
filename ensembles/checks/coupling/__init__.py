"""A training step on one member moves that member only, or all that are tied to it.

Catches members that are one network, packed members whose channels mix, members that read each
other's features, BatchNorm statistics that two members update, and a loss that trains one member
according to what another predicts, or to what its weights are.

One optimizer step is taken on each member alone, from the same state and with the same random
numbers, and everything of the other members is compared, bit by bit, with a control without it.

What one step from the present values cannot move is not seen. A layer that two members share behind
branches that are both initialised to zero moves at the second step only; the sharing check sees it.
A parameter has moved where any of its elements has: whether two members use different elements of
it is for the ownership check to say. One module that draws in training (dropout) is looked at in a
few draws, whose number the result says.
"""
