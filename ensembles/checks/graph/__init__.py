"""The autograd graph is the recorded one.

Catches a change of what is computed that no test of shapes sees: a layer that is skipped, a ReLU
that was lost, streams that run through one network, a subnet that does not read its parent's
weight, a branch that was detached.

The graph is compared as a text, which is the same in every process, on every machine and for every
batch size. It takes one call of the model. One line is one operation; it is named after the layer
whose parameter is nearest, and not by a running number, so that the diff of two graphs shows what
was changed and little else.

Limits: values are not part of the text, so that a mask or another constant is seen only as an
operand without gradient. What a layer does without autograd is not seen, and a compiled model is
one operation.
"""
