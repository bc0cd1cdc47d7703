"""Every member trains exactly as it would alone, and two runs that are claimed equal are equal at
every step.

Catches averaged losses (a gradient, and a learning rate, of 1/M), one network under several names
(M times the gradient, M BatchNorm updates a step), a gradient norm that is clipped over all
members, and members that read each other. It also catches what changes a training run that should
have stayed the same: another optimizer group, statistics that are updated twice, another
construction of one network that is not quite the same.

A run is recorded as digests of all that it computes and leaves behind, so that equality is that of
bits; within a tolerance, values are compared. The ensemble is trained for some steps, then every
member by itself, from the same state and with the same random numbers. The first step and tensor
that differ are named.
"""  # noqa: D205
