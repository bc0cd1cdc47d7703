"""Members start different in every parameter that is drawn, and in their outputs.

Catches members that are copies of one initialised network, copies whose re-initialisation does
not reach every layer, a constructor that seeds, members built from one state dict, copies that
were scaled or moved a little, a member that is a mean of others, members that draw from one stream,
a few numbers apart, and permuted twins: other weights, but the same function.

A parameter is drawn if a second construction gives it other values. Where a constructor leaves the
generators in one state, or only a model was given, it is drawn if its elements are not all one
number. In tensors of 32 elements and more, a correlation above 0.9 of what is drawn, with another
member or with a weighted sum of others, is no accident either. Zeros, ones and what a file gives
are by design: members may have them in common, as long as their outputs differ. Outputs are
compared in float64 where the model can be converted, and otherwise as they are, within what the
dtype can tell of one function that is computed in two ways (`ensembles.tolerance`).

Limits: a block that every member draws from one private generator of a fixed seed looks as if a
file gave it, and is counted as given. Members inside the tensors of one module (packed, stacked)
are compared by their outputs, and by equal slices along any axis that divides by their number. A
tensor that is a few drawn numbers times fixed patterns is near a multiple, or a weighted sum, of
the others': claim by name that it is alike. Tensors with fewer than 20 random bits, such as a few
signs, may agree by chance and are not compared; the result says how many were. Correlations and
shifts are looked at in the first 4096 elements of a tensor. Outputs that are the same for all rows,
as behind a head that starts at zero, say nothing of the members.
"""
