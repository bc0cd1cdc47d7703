"""Promise: every scalar weight moves the outputs of exactly the members that are claimed to own it.

Catches members that mix where they are claimed apart (a layer with groups=1 in a grouped network,
a channel shuffle, a norm over all channels), subnets that read a block of another or an empty
group, a stem that is not tied, and parameters that move nothing. It is right where storage is
blind: masks, grouped and packed convolutions, low-rank factors, functional weights.

For every element of every parameter it finds the set of members whose output it reaches: one
backward pass a member, with the network made transparent, so that dead ReLUs, max-pool ties,
dropout, saturated softmax and branches that start at zero hide nothing. How, and the limits of it
(stop-gradients, hard routing, weights held at zero from outside), is told in
`ensembles.instruments.influence`.
"""
