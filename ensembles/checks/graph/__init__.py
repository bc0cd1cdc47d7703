"""Promise: the autograd graph of the model is the recorded one.

Catches a change of what is computed that no test of shapes sees: a layer that is skipped, a ReLU
that was lost, streams that run through one network, a subnet that does not read its parent's
weight, a branch that was detached.

The graph is compared as a text, which is the same in every process and on every machine. One line
is one operation; it is named after the layer whose parameter is nearest, and not by a running
number, so that the diff of two graphs shows what was changed and little else.
"""
