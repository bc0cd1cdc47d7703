"""Classifiers that give groups of features logits of their own."""

import torch
from torch import Tensor, nn

__all__ = ["GroupedLinear"]


class GroupedLinear(nn.Module):
    """A linear classifier for each of M equal groups of features: the mean-field head.

    With x_m the m-th slice of the features, the logits of group m are z_m = W_m x_m + b_m. Group m
    sees no other features. An ordinary `torch.nn.Linear` on all features computes the SUM of
    W_m x_m (plus one bias) and not the mean of z_m: only the mean's cross-entropy is bounded by
    the groups' mean cross-entropy (see `ensembles.models.objectives.MeanField`).

    Weights and biases are drawn as those of M heads ``nn.Linear(in_features / M, out_features)``
    built one after another, so that every group starts as the head of an ordinary network does.

    Example:
        >>> head = GroupedLinear(8, 10, groups=4)
        >>> head(torch.randn(5, 8)).shape, head.weight.shape, head.bias.shape
        (torch.Size([5, 4, 10]), torch.Size([4, 10, 2]), torch.Size([4, 10]))

    Args:
        in_features: Number of features, all groups together; a multiple of ``groups``.
        out_features: Number of classes.
        groups: Number of groups M. Group m is the m-th slice of neighbouring features, which is a
            channel group of the layer before.
        bias: Whether each group has a bias of its own.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (..., features) to (..., groups, classes).

    Attributes:
        weight: (groups, classes, features / groups).
        bias: (groups, classes), or None.

    Raises:
        ValueError: If a number is less than 1, or ``in_features`` cannot be divided into groups;
            in the call, if the input has another number of features.

    Source:
        Saul, Jaakkola and Jordan 1996, "Mean field theory for sigmoid belief networks", whose idea
        is carried over to an ensemble's loss on one big network.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("groups", groups),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if in_features % groups:
            raise ValueError(
                f"{in_features} features cannot be divided into {groups} equal groups: make "
                "in_features a multiple of groups"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.groups = groups
        heads = [
            nn.Linear(in_features // groups, out_features, bias=bias, device=device, dtype=dtype)
            for _ in range(groups)
        ]
        self.weight = nn.Parameter(torch.stack([head.weight.detach() for head in heads]))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.stack([head.bias.detach() for head in heads]))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits of every group.

        Args:
            x: (..., features).

        Returns:
            (..., groups, classes).

        Raises:
            ValueError: If the last dimension of ``x`` is not the features.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input has shape {tuple(x.shape)}, and its last dimension must be the "
                f"{self.in_features} features"
            )
        slices = x.reshape(*x.shape[:-1], self.groups, self.in_features // self.groups)
        logits = torch.einsum("...gf,gcf->...gc", slices, self.weight)
        return logits if self.bias is None else logits + self.bias

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Makes the ordinary head that computes the mean of the groups' logits.

        Its softmax is the groups' geometric mean. So a network that was trained with the mean-field
        loss can be used and stored as an ordinary one.

        Example:
            >>> head, x = GroupedLinear(8, 10, groups=4), torch.randn(5, 8)
            >>> torch.allclose(head.merged()(x), head(x).mean(1), atol=1e-6)
            True

        Returns:
            A new `torch.nn.Linear` that shares no memory with this head. Nothing is drawn from
            the random number generators.
        """
        merged = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        weight = self.weight.transpose(0, 1).flatten(1) / self.groups
        merged.weight = nn.Parameter(weight)
        if self.bias is not None:
            merged.bias = nn.Parameter(self.bias.mean(dim=0))
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """Shows the numbers that the head was made with."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )
