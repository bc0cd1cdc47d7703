"""Promise: row i of the output depends on row i of the input, and on no other row of the batch.

Catches a view where a permute is meant, a norm over the batch in eval mode, attention that takes
the batch for the sequence, a softmax or a maximum over the whole batch, and predictions that
depend on the place in the batch or on its size.

Rows are looked at twice. Numerically: each is replaced, the shape stays, and every other row of
the output must have the same bits; differences of rounding size (kernels may follow the values,
as in packed sequences) count only where the gradient confirms them. By gradients: at generic
weights, through operations that hide nothing, so that a branch that starts at zero does not hide
what it mixes; inputs are floating tensors of the batch and the outputs of embeddings that read it.
Then rows change places, and one stands alone: within the square root of the machine's precision
(3e-4 in float32), since kernels depend on the place and on the size.

Limits: of more than 8 rows, 8 are replaced and 8 are followed by gradients, evenly spread. Integer
inputs that no `nn.Embedding` reads are looked at numerically only.
"""
