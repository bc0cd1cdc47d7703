"""Row i of the output depends on row i of the input only.

Catches a view where a permute is meant, a norm over the batch in eval mode, attention that takes
the batch for the sequence, a softmax or a maximum over the whole batch, and predictions that
depend on the place in the batch or on its size.

It looks twice. By values: one row is replaced, the shape stays, and every other row of the output
must have the same bits. Kernels may follow the values (as in packed sequences), so a difference of
rounding size counts only where the gradient confirms it. By gradients: the weights are generic and
no operation hides anything, so that a branch that starts at zero does not hide what it mixes. The
gradients are those of floating tensors of the batch, and of the outputs of embeddings that read it.
Then rows change places, and one stands alone. Kernels depend on the place and on the size, so
outputs may differ there as those of a network that is recomputed, in the coarsest dtype that took
part: by 1.2e-4 of the largest in float32, and by 0.13 in bfloat16 (`ensembles.tolerance`).

Limits: of more than 8 rows, 8 are replaced and followed, evenly spread; the result says so. Integer
inputs that no `nn.Embedding` reads are looked at by values only.
"""
