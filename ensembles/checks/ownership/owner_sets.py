"""The set of members that own each element of a parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from ensembles.instruments.recording import digest

__all__ = ["OwnerSets", "Owners"]

Owners = tuple[str, ...]
"""The members that an element reaches, in the order of all members; () where it reaches nobody."""


class OwnerSets:
    """The owners of every element of one parameter, as bits that members add.

    Each byte has the bits of eight members, and is there once one of them reaches an element; so
    the same owners are the same bytes, however many members there are.

    Args:
        parameter: Its shape and device are those of the masks.
        members: All members, in their order.

    Example:
        >>> sets = OwnerSets(torch.zeros(3), ("a", "b"))
        >>> sets.add(0, torch.tensor([True, True, False]))
        >>> sets.add(1, torch.tensor([True, False, False]))
        >>> sets.counts()
        {(): 1, ('a',): 1, ('a', 'b'): 1}
        >>> sets.mask(("a", "b"))
        tensor([ True, False, False])
    """

    def __init__(self, parameter: Tensor, members: Owners) -> None:
        self.members = members
        self.shape, self.device = parameter.shape, parameter.device
        self._bytes: dict[int, Tensor] = {}

    def add(self, position: int, reached: Tensor | None) -> None:
        """Adds the member at this position where it is reached."""
        ones = None if reached is None else reached.view(torch.uint8)  # a byte each, as they are
        if ones is None or not ones.any():
            return
        byte, bit = divmod(position, 8)
        if byte not in self._bytes:
            self._bytes[byte] = torch.zeros_like(ones)
        self._bytes[byte].add_(ones, alpha=1 << bit)

    def nobody(self) -> Tensor:
        """Where no member has been added yet."""
        return self.mask(())

    def mask(self, owners: Owners) -> Tensor:
        """Where the owners are these."""
        found = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        for byte, bits in self._bytes.items():
            eight = self.members[8 * byte : 8 * byte + 8]
            found &= torch.eq(bits, sum(1 << bit for bit, m in enumerate(eight) if m in owners))
        return found

    def counts(self) -> dict[Owners, int]:
        """How many elements have each set of owners that occurs."""
        sets: list[Owners] = [()]
        found, sizes = torch.tensor([0]), torch.tensor([self.shape.numel()])
        codes = found
        for byte, bits in sorted(self._bytes.items()):
            flat = bits.flatten()
            # The sets so far are numbered, so that codes stay small however many bytes there are.
            codes = flat if len(sets) < 2 else (torch.searchsorted(found, codes) << 8) + flat
            found, sizes = _occurring(codes)
            eight = self.members[8 * byte : 8 * byte + 8]
            sets = [
                (*sets[code >> 8], *(m for bit, m in enumerate(eight) if code >> bit & 1))
                for code in found.tolist()
            ]
        return dict(zip(sets, sizes.tolist(), strict=True))

    def digest(self) -> str:
        """Of where the elements of each set are."""
        parts = [(byte, digest(bits)) for byte, bits in sorted(self._bytes.items())]
        return digest((self.members, tuple(self.shape), parts))


def _occurring(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The codes that occur, in order, and how often."""
    if int(codes.max()) >= codes.numel():  # a table of all codes would be the larger
        found, sizes = torch.unique(codes, return_counts=True)
        return found, sizes
    sizes = torch.bincount(codes)
    found = sizes.nonzero().flatten()
    return found.to(codes.dtype), sizes[found]
