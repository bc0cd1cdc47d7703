"""A call costs what is claimed: FLOPs, parameters, bytes kept for backward, and
multiplications by structural zeros.

Catches a masked subnet that costs as much as its parent, a tied layer that is stored twice, a mask
that is applied anew in every step and kept for the backward pass, and weights that nobody claimed.

Everything is a whole number, the same on every machine of one kind and in every run:

- FLOPs: two for a multiply-add, of matrix products and convolutions only; those of a convolution
  on its padding too. A layer that is called twice counts twice.
- Parameters and buffers: elements of memory, so that ties and overlapping views count once.
- Bytes kept: the memory that autograd holds at the end of the forward pass, each piece once, the
  batch included, parameters and buffers not. Copies of weights among them are told apart.
- Waste: a multiply-add is wasted where one of its factors is zero by structure. Which are is not
  guessed from values: the model is looked at with generic positive weights and transparent
  operations (`ensembles.instruments.influence`), and what is zero then is zero always: a mask, a
  group of channels that is padded, a gradient that is cut off. Attention is counted dense, and what
  its mask hides is waste.

  In the backward pass that includes the gradients of outputs that nobody reads: those of all
  tokens but the first, where a head reads only the first, are zeros that are multiplied.

Limits: other operations (normalisation, activations) are not counted. Where the actual pass and
the one with generic values run different kernels (attention), waste is told of the plain kernels,
and never exceeds the FLOPs of its layer. A model that predicts under no_grad is refused, because
generic values are followed by autograd; on the meta device its cost can be measured.
"""  # noqa: D205 (the promise takes two lines)
