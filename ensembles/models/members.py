"""Ensembles of independent members, and N streams through one network.

The two look alike from outside: a list of outputs. Both are here because one was once taken for
the other.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["Ensemble", "NStreams"]


class Ensemble(nn.Module):
    """Independent members that all see the same input.

    Example:
        >>> import torch
        >>> ensemble = Ensemble.of(lambda: nn.Linear(4, 2), 3)
        >>> [tuple(output.shape) for output in ensemble(torch.randn(5, 4))]
        [(5, 2), (5, 2), (5, 2)]
        >>> network = nn.Linear(4, 2)
        >>> Ensemble([network] * 3)
        Traceback (most recent call last):
        ...
        ValueError: members 0, 1, 2 are one module: build each member anew, ...

    Args:
        members: At least one module, each another object. That members share no parts either is a
            claim that the checks verify; it is not verified here.

    Shape:
        The members' input to a list of the members' outputs.

    Attributes:
        members: The members, a `torch.nn.ModuleList`.

    Raises:
        ValueError: If there is no member, or one module is a member twice.
        TypeError: If a member is not a module, or ``members`` is itself a network.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        # A Sequential can be iterated too, and its layers would pass for members.
        if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
            raise TypeError(f"members must be a list of modules, got one {type(members).__name__}")
        listed = list(members)
        if not listed:
            raise ValueError("an ensemble has at least 1 member, got none")
        places: dict[int, list[int]] = {}
        for place, member in enumerate(listed):
            if not isinstance(member, nn.Module):
                raise TypeError(f"member {place} is not a torch.nn.Module: {type(member).__name__}")
            places.setdefault(id(member), []).append(place)
        for same in places.values():
            if len(same) > 1:
                raise ValueError(
                    f"members {', '.join(map(str, same))} are one module: build each member anew, "
                    f"or use NStreams(network, {len(same)}) where one network is to be run "
                    f"{len(same)} times"
                )
        self.members = nn.ModuleList(listed)

    @classmethod
    def of(cls, factory: Callable[[], nn.Module], count: int) -> "Ensemble":
        """Builds every member by a call of its own.

        Example:
            >>> len(Ensemble.of(lambda: nn.Linear(4, 2), 3).members)
            3

        Args:
            factory: Makes a new member at each call.
            count: Number of members, at least 1.

        Returns:
            The ensemble.

        Raises:
            ValueError: If ``count`` is less than 1, or the factory returns one module twice.
        """
        return cls([factory() for _ in range(count)])

    def forward(self, *inputs: Any) -> list[Any]:
        """Computes every member's output, in the order of the members."""
        return [member(*inputs) for member in self.members]


class NStreams(nn.Module):
    """An accidental ensemble that is one network: the input goes through it N times.

    It is kept on purpose, so that it can be measured and told from an ensemble. With loss l and
    gradient g of a single run, and all streams on the same batch:

    * the sum of the stream losses has gradient N g (in float32 bit by bit up to N = 5), their mean
      has gradient g (bit by bit for N = 2 and 4, up to rounding for 3, 5 and 8);
    * BatchNorm updates its statistics N times a step, whatever the loss: its momentum m acts as
      1 - (1 - m)^N (m = 0.1, N = 4: 0.3439), and num_batches_tracked is N times the steps.
      Evaluation differs from the single run's even where the weights are the same;
    * dropout draws for every stream anew.

    Example:
        >>> import torch
        >>> streams = NStreams(nn.BatchNorm1d(4), 3)
        >>> outputs = streams(torch.randn(5, 4))
        >>> len(outputs), len(list(streams.parameters()))
        (3, 2)
        >>> streams.network.num_batches_tracked.item()
        3

    Args:
        network: The one network.
        streams: How often the input goes through it, at least once.

    Shape:
        The network's input to a list of ``streams`` outputs.

    Raises:
        ValueError: If ``streams`` is less than 1.
    """

    def __init__(self, network: nn.Module, streams: int) -> None:
        super().__init__()
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        self.network = network
        self.streams = streams

    def forward(self, *inputs: Any) -> list[Any]:
        """Computes the network's output ``streams`` times, one after the other."""
        return [self.network(*inputs) for _ in range(self.streams)]

    def extra_repr(self) -> str:
        """Shows the number of streams."""
        return f"streams={self.streams}"
