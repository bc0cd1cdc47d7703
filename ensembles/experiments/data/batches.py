"""Batches for training members: any step of any epoch, at once and always the same.

Order and augmentation are pure functions of (seed, epoch, member, image), and of neither the global
generators nor of how many batches were read before. So a run that was killed continues with the
very batch that it would have seen, a member trained alone sees what it sees in the ensemble, and
several devices divide a batch without talking to each other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ensembles.experiments.data.draws import permutation, words
from ensembles.experiments.data.images import ImageSet, normalise

__all__ = ["MemberBatches", "evaluation_batches"]

PADDED_SHARE = 8
"""Images are padded by an eighth of their height: 4 pixels for 32x32 (He et al. 2015, sec. 4.2)."""

SHARED = ""
"""Stands for all members in the key of what they share."""


class MemberBatches:
    """The batches of every epoch, the same for all members or each member's own.

    Augmentation is that of He et al. 2015 (arXiv 1512.03385, section 4.2): black is padded on each
    side, a window of the image's size is cut out, and half of the images are mirrored, where a
    mirrored image keeps its label.

    Example:
        >>> from ensembles.experiments.data.sources import load_images
        >>> batches = MemberBatches(load_images("digits", "train"), batch_size=64, seed=0,
        ...     members=["member_0", "member_1"], order="own", augment="own")
        >>> x, labels = batches.at(epoch=3, step=15)
        >>> {name: tuple(images.shape) for name, images in x.items()}
        {'member_0': (40, 3, 8, 8), 'member_1': (40, 3, 8, 8)}
        >>> bool((labels["member_0"] == labels["member_1"]).all())
        False
        >>> sum(len(labels) for _, labels in MemberBatches(
        ...     load_images("digits", "train"), batch_size=64, seed=0).epoch(0))
        1000

    Args:
        images: The training set, on the device on which batches are made.
        batch_size: Images in a batch, over all replicas.
        seed: Seed of orders and augmentations.
        members: Names of the members; needed where something is a member's own, which follows its
            name, and not its place or the other members.
        order: "shared": one order of the images for all members. "own": each has its own.
        augment: None: images as they are. "shared": an image looks the same to all members in an
            epoch, whichever order they see it in. "own": each member sees it differently.
        padding: Black pixels on each side before the window is cut out; by default an eighth of
            the height.
        drop_last: Leaves out the images that do not fill a batch, other ones in every epoch. For
            networks whose BatchNorm cannot take a last batch of one image.
        replica: Number of this device, from 0.
        replicas: How many devices divide each batch. Devices get equally many images, so that
            up to `replicas - 1` of the last batch are left out.

    Raises:
        ValueError: If sizes, names or choices do not fit together.
        TypeError: If a number is not whole.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        members: Sequence[str] = (),
        order: Literal["shared", "own"] = "shared",
        augment: Literal["shared", "own"] | None = None,
        padding: int | None = None,
        drop_last: bool = False,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        if order not in ("shared", "own"):
            raise ValueError(f'order={order!r} is neither "shared" nor "own".')
        if augment not in ("shared", "own", None):
            raise ValueError(f'augment={augment!r} is none of "shared", "own", None.')
        if isinstance(members, str) or len(set(members)) != len(members):
            raise ValueError(f"members={members!r}: expected a list of names, each once.")
        if "own" in (order, augment) and not members:
            raise ValueError(
                f"order={order!r} and augment={augment!r} need the names of the members: "
                'members=["member_0", "member_1"].'
            )
        batch_size, self.seed = operator.index(batch_size), operator.index(seed)
        if padding is None:
            padding = images.pixels.shape[2] // PADDED_SHARE
        if padding < 0:
            raise ValueError(f"padding={padding}: images are padded by 0 pixels or more.")
        if not 0 <= replica < replicas:
            raise ValueError(f"replica={replica} of replicas={replicas}: they count from 0.")
        if batch_size < 1 or batch_size % replicas:
            raise ValueError(
                f"batch_size={batch_size} cannot be divided between {replicas} devices: it is the "
                "number of images over all of them, a multiple of their number."
            )
        self.images, self.batch_size, self.members = images, batch_size, tuple(members)
        self.order, self.augment, self.padding = order, augment, padding
        self.replica, self.replicas = replica, replicas
        count = len(images)
        self._used = count - (count % batch_size if drop_last else count % batch_size % replicas)
        if not self._used:
            raise ValueError(
                f"{len(images)} images do not fill one batch of {batch_size}"
                f"{f' on {replicas} devices' * (replicas > 1)}. Take smaller batches"
                f"{', or drop_last=False' * drop_last}."
            )
        self._epoch = -1
        self._orders: dict[str, Tensor] = {}
        self._windows: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Steps in an epoch."""
        return -(-self._used // self.batch_size)

    def at(
        self, epoch: int, step: int
    ) -> tuple[Tensor | dict[str, Tensor], Tensor | dict[str, Tensor]]:
        """The batch of one step.

        Args:
            epoch: Number of the epoch, from 0.
            step: Number of the step within it, from 0.

        Returns:
            Images, float32 (image, 3, height, width), normalised: one tensor where order and
            augmentation are shared, else one for each member, by name. Labels, int64 (image,): one
            tensor where the order is shared, else one for each member.

        Raises:
            IndexError: If there is no such epoch or step.
        """
        rows = self.rows(epoch, step)
        labels: Tensor | dict[str, Tensor]
        if isinstance(rows, dict):
            labels = {name: self.images.labels[found] for name, found in rows.items()}
        else:
            labels = self.images.labels[rows]
        if not isinstance(rows, dict) and self.augment != "own":
            return self._images(epoch, SHARED, rows), labels
        return {
            name: self._images(epoch, name, rows[name] if isinstance(rows, dict) else rows)
            for name in self.members
        }, labels

    def rows(self, epoch: int, step: int) -> Tensor | dict[str, Tensor]:
        """Rows of the set in the batch of one step; for each member where it has its own order."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step}: an epoch has the steps 0 to {len(self) - 1}.")
        if self.order == "shared":
            return self._rows(epoch, step, SHARED)
        return {name: self._rows(epoch, step, name) for name in self.members}

    def order_of(self, epoch: int, member: str = SHARED) -> Tensor:
        """Rows of the set in the order in which a member sees them, over all replicas.

        Args:
            epoch: Number of the epoch, from 0.
            member: Its name; not needed where the order is shared.

        Returns:
            int64 (image,).

        Raises:
            ValueError: If the order is each member's own, and there is no member of this name.
            IndexError: If the epoch is negative.
        """
        if self.order == "own" and member not in self.members:
            raise ValueError(f"there is no member {member!r}. There are {', '.join(self.members)}.")
        return self._order(epoch, SHARED if self.order == "shared" else member)[: self._used]

    def epoch(
        self, epoch: int, *, start: int = 0
    ) -> Iterator[tuple[Tensor | dict[str, Tensor], Tensor | dict[str, Tensor]]]:
        """The batches of an epoch, from a step on: pairs of images and labels, as `at` gives."""
        for step in range(start, len(self)):
            yield self.at(epoch, step)

    def _rows(self, epoch: int, step: int, member: str) -> Tensor:
        start, end = step * self.batch_size, min((step + 1) * self.batch_size, self._used)
        return self._order(epoch, member)[start + self.replica : end : self.replicas]

    def _order(self, epoch: int, member: str) -> Tensor:
        self._turn_to(epoch)
        if member not in self._orders:
            drawn = permutation(len(self.images), "order", self.seed, epoch, member)
            self._orders[member] = drawn.to(self.images.pixels.device)
        return self._orders[member]

    def _images(self, epoch: int, member: str, rows: Tensor) -> Tensor:
        images = self.images
        if self.augment is None:
            return images.normalised(rows)
        top, left, mirrored = (
            values[rows]
            for values in self._window(epoch, SHARED if self.augment == "shared" else member)
        )
        height, width = images.pixels.shape[2:]
        padded = F.pad(images.pixels[rows], (self.padding,) * 4)
        across = torch.arange(width, device=rows.device)
        columns = torch.where(mirrored[:, None], width - 1 - across, across) + left[:, None]
        lines = torch.arange(height, device=rows.device) + top[:, None]
        places = lines[:, :, None] * padded.shape[3] + columns[:, None, :]
        # One gather does window and mirror at once, four times as fast as indexing by three axes.
        cut = padded.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, 3, -1))
        return normalise(cut.view(-1, 3, height, width), images.mean, images.std)

    def _window(self, epoch: int, member: str) -> tuple[Tensor, Tensor, Tensor]:
        """Top and left of every image's window, and whether it is mirrored, by row of the set."""
        self._turn_to(epoch)
        if member not in self._windows:
            drawn = words(len(self.images), "augmentation", self.seed, epoch, member)
            # 31 bits each: the remainder is uniform to 1 in 10^8.
            choices = np.uint64(2 * self.padding + 1)
            top, left = (
                (drawn >> np.uint64(33)) % choices,
                (drawn >> np.uint64(2)) % (np.uint64(1 << 31)) % choices,
            )
            mirrored = (drawn & np.uint64(1)).astype(bool) & self.images.flippable
            device = self.images.pixels.device
            self._windows[member] = (
                torch.from_numpy(top.astype(np.int64)).to(device),
                torch.from_numpy(left.astype(np.int64)).to(device),
                torch.from_numpy(mirrored).to(device),
            )
        return self._windows[member]

    def _turn_to(self, epoch: int) -> None:
        """Forgets another epoch's orders: kept, they would grow with the run."""
        if operator.index(epoch) < 0:
            raise IndexError(f"epoch {epoch}: epochs count from 0.")
        if epoch != self._epoch:
            self._epoch, self._orders, self._windows = epoch, {}, {}


def evaluation_batches(images: ImageSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of a set once, in the set's order, the last batch as large as what is left.

    Sets such as CIFAR-10.1 are stored class by class: a loader that drops the last batch of 256
    leaves out every truck of v6 and every airplane of v4.

    Args:
        images: The set.
        batch_size: Images in a batch, at least 1.

    Returns:
        An iterator of pairs: images, float32 (image, 3, height, width), normalised, and labels,
        int64 (image,).

    Raises:
        ValueError: If the batch size is below 1.

    Example:
        >>> from ensembles.experiments.data.sources import load_images
        >>> [len(labels) for _, labels in evaluation_batches(load_images("digits", "test"), 256)]
        [256, 256, 256, 29]
    """
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size}: a batch has at least 1 image.")
    rows = (slice(start, start + batch_size) for start in range(0, len(images), batch_size))
    return ((images.normalised(part), images.labels[part]) for part in rows)
