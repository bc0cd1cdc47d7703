"""The ensemble's prediction is the claimed reduction of its members' outputs, row for row, and its
metric is computed from it.

Catches logits that are averaged where probabilities are meant, softmax that is applied twice,
geometric means that are not normalised, weights that are applied twice, rows that a reshape mixes,
one member's metric that is called the ensemble's, and a loss that takes probabilities for logits.

Members of a new network agree too well to tell reductions apart, so their outputs are changed while
the check looks: see `predictions`. A reduction is found by solving for its weights: `reductions`.

Limits: where neither the member modules nor the model's own call can be changed from outside
(`predict` calls inner parts of one module, or copies it), real outputs are compared. Those of a new
network may not tell reductions apart: that is an error then.
"""  # noqa: D205
