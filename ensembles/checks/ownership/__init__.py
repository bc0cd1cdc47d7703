"""Every scalar weight moves the outputs of exactly the members that own it.

Catches members that mix where they are claimed apart (a layer with groups=1 in a grouped network,
a channel shuffle, a norm over all channels), subnets that read a block of another or an empty
group, a stem that is not tied, and parameters that move nothing. It is right where storage is
blind: masks, grouped and packed convolutions, low-rank factors, functional weights.

For every element of every parameter it finds the members whose output it reaches, by one backward
pass a member through a network that was made transparent: dead ReLUs, ties of a max-pool, dropout,
a saturated softmax and branches that start at zero hide nothing. `ensembles.instruments.influence`
says how. Where it ends: stop-gradients, hard routing, and weights that something outside of the
model holds at zero. Rows of an embedding that the batch does not name, and a frozen parameter whose
gradient ends somewhere, are not judged, and the result says how many those are.
"""
