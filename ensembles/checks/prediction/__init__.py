"""Promise: the ensemble's prediction is the reduction of the members' outputs that it claims to be.

Catches logits that are averaged where probabilities are meant, softmax applied twice, geometric
means that are not normalised, weights that are applied twice, rows that a reshape mixes, one
member's metric that is called the ensemble's, and a loss that takes probabilities for logits.

`predictions` says how members' outputs are made to differ meanwhile.
"""
