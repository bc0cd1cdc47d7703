"""Promise: every member of an ensemble trains exactly as it would alone.

Catches averaged losses (a gradient, and a learning rate, of 1/M), one network under several names
(M times the gradient, M BatchNorm updates a step), a gradient norm clipped over all members, and
members that read each other.

The ensemble is trained for some steps, then every member by itself, from the same state and with
the same random numbers; the two trajectories are compared bit by bit.
"""
