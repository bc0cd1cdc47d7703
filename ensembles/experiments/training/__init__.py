"""Networks with named members, and training runs that survive a kill.

* `networks`: networks with named members, built from options and a seed.
* `schedules`: learning-rate schedules as shares of the base rate.
* `options`: what a training run computes, and how it is executed.
* `member_training`: the Lightning module for any members and any objective.
* `trainer`: trains, and goes on where a killed run was.
* `checkpoints`: checkpoints to go on from bit by bit, and the plain networks that are in them.
* `runs`: the folder of a training run, its tables, and who writes to it.
"""
