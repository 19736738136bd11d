"""How the logical dimensions of a guided map lie: channels first or last, split or merged, padded or not.

A guided map keeps one value, channels in dimension 1, whatever a network makes of its shape on the way: channels-last
for a linear layer (ConvNeXt), groups of channels for a shuffle (ShuffleNet), branches side by side (SKNet), a map that
is padded before a convolution reads it (blur pooling, TensorFlow's "same"). Its form says how the shape is meant,
and only shapes are computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from torch import Tensor
from torch.nn import functional as F

from sparsenet.sites import Pair


@dataclass(frozen=True)
class Padding:
    """Pixels around a map that nothing has read yet (taken off where negative). Padding is an offset on sites, and
    makes no resolution of its own: what reads next over space takes it into its window.

    `mode` is one of `torch.nn.Conv2d`'s; `value` is what "zeros" are, zero or not.
    """

    top: int
    bottom: int
    left: int
    right: int
    mode: str = "zeros"
    value: float = 0.0

    def around(self, grid: Pair) -> Pair:
        return grid[0] + self.top + self.bottom, grid[1] + self.left + self.right

    @property
    def crops(self) -> bool:
        return min(self.top, self.bottom, self.left, self.right) < 0

    def apply(self, dense: Tensor) -> Tensor:
        """The padded map of a map (..., H, W)."""
        sides = (self.left, self.right, self.top, self.bottom)
        if self.mode == "zeros":
            return F.pad(dense, sides, value=self.value)
        return F.pad(dense, sides, mode=self.mode)

    def then(self, other: Padding) -> Padding | None:
        """This padding and another one around it as one, or `None` where they differ in kind."""
        same = (self.mode, self.value) == (other.mode, other.value) and self.mode == "zeros"
        return (
            Padding(
                self.top + other.top,
                self.bottom + other.bottom,
                self.left + other.left,
                self.right + other.right,
                self.mode,
                self.value,
            )
            if same and not self.crops and not other.crops
            else None
        )


@dataclass(frozen=True)
class Form:
    """The meaning of a guided map's dimensions.

    Attributes:
        order: a letter for each dimension: N, H and W once each, C for any number of channel dimensions.
        channels: the length of each C, in order; in the value they are one dimension, in this order.
        padding: what lies around the map, in channels-first maps only.
    """

    order: str
    channels: tuple[int, ...]
    padding: Padding | None = None

    @staticmethod
    @lru_cache(maxsize=1024)
    def plain_of(channels: int) -> Form:
        return Form("NCHW", (channels,))

    @property
    def plain(self) -> bool:
        return self.order == "NCHW" and self.padding is None

    @property
    def description(self) -> str:
        """Why an operation that needs a plain map cannot take this one."""
        return "reads a padded map" if self.padding is not None else f"reads a map laid out as {self.order}"

    def shape(self, batch: int, grid: Pair) -> tuple[int, ...]:
        if self.plain:
            return batch, self.channels[0], *grid
        height, width = grid if self.padding is None else self.padding.around(grid)
        lengths, channels = {"N": batch, "H": height, "W": width}, iter(self.channels)
        return tuple(next(channels) if letter == "C" else lengths[letter] for letter in self.order)

    def letters(self, dims: Sequence[int]) -> str:
        """What these dimensions mean.

        Raises:
            IndexError: for a dimension that the map does not have.
        """
        return "".join(self.order[dim] for dim in dims)

    # -- between the logical shape and cells (N, *channels, H, W) ------------------------------------------------

    @property
    def _places(self) -> list[int]:
        """The logical dimension of each dimension of the cells."""
        channels = [dim for dim, letter in enumerate(self.order) if letter == "C"]
        return [self.order.index("N"), *channels, self.order.index("H"), self.order.index("W")]

    def cell_dim(self, dim: int) -> int:
        """The dimension of the cells that a logical dimension is."""
        return self._places.index(dim % len(self.order))

    def cells(self, logical: Tensor) -> Tensor:
        """(N, *channels, H, W) of a tensor of as many dimensions as this form has, each maybe of length 1."""
        return logical if self.order == "NCHW" else logical.permute(self._places)

    def present(self, dense: Tensor) -> Tensor:
        """The map of this form of an ordinary one (N, C, H, W)."""
        if self.plain:
            return dense
        if self.padding is not None:
            return self.padding.apply(dense)
        cells = dense.unflatten(1, self.channels) if self.channels else dense[:, 0]
        places = self._places
        return cells.permute([places.index(dim) for dim in range(len(places))])

    # -- other layouts -------------------------------------------------------------------------------------------

    def with_channels(self, channels: Sequence[int]) -> Form:
        return replace(self, channels=tuple(channels))

    def channel(self, dim: int) -> int:
        """Which of the channel dimensions a logical dimension is."""
        return self.order[: dim % len(self.order)].count("C")

    def without(self, dims: Sequence[int]) -> Form:
        """Without some channel dimensions."""
        gone = {dim % len(self.order) for dim in dims}
        lost = {self.channel(dim) for dim in gone}
        return Form(
            "".join(letter for dim, letter in enumerate(self.order) if dim not in gone),
            tuple(length for place, length in enumerate(self.channels) if place not in lost),
        )

    def unsqueezed(self, dim: int) -> Form:
        """With one more channel dimension, of length 1, at a place among the logical dimensions."""
        dim %= len(self.order) + 1
        place = self.order[:dim].count("C")
        return Form(self.order[:dim] + "C" + self.order[dim:], (*self.channels[:place], 1, *self.channels[place:]))

    def permuted(self, dims: Sequence[int]) -> tuple[Form, list[int]]:
        """The form after a permutation, and where each of its channel dimensions was before."""
        dims = [dim % len(self.order) for dim in dims]
        moved = [self.channel(dim) for dim in dims if self.order[dim] == "C"]
        return Form(self.letters(dims), tuple(self.channels[place] for place in moved)), moved

    def viewed(self, shape: Sequence[int], batch: int, grid: Pair) -> Form | None:
        """The form after a view as another shape, or `None` where that merges or splits images or space.

        A view keeps the order of the numbers, so that it keeps the pixels apart where the lengths between N, H and W
        multiply to what they were.
        """
        return _viewed(self, tuple(shape), batch, grid)

    def _as(self, shape: tuple[int, ...], batch: int, grid: Pair) -> Form | None:
        if self.padding is not None:
            return None
        if shape == self.shape(batch, grid):
            return self
        found = self._viewed(shape, {"N": batch, "H": grid[0], "W": grid[1]})
        if found is not None or batch != 1:
            return found
        # Of a single image N is a dimension of length 1 like any other, wherever the view has one.
        place = self.channel(self.order.index("N"))
        anonymous = Form(self.order.replace("N", "C"), (*self.channels[:place], 1, *self.channels[place:]))
        found = anonymous._viewed(shape, {"H": grid[0], "W": grid[1]})
        if found is None or 1 not in found.channels:
            return None
        named = next(dim for dim, letter in enumerate(found.order) if letter == "C" and shape[dim] == 1)
        order = found.order[:named] + "N" + found.order[named + 1 :]
        return Form(order, tuple(length for dim, length in enumerate(shape) if order[dim] == "C"))

    def _viewed(self, shape: Sequence[int], lengths: dict[str, int]) -> Form | None:
        """The same, where the letters that are no channels have these `lengths`."""
        ahead, order, channels, position = list(shape), "", [], 0
        for segment in _segments(self.order):
            letter, count = segment[-1] if segment[-1:] in ("N", "H", "W") else "", segment.count("C")
            wanted, position = prod(self.channels[position : position + count]), position + count
            got, following = 1, lengths.get(letter)
            while ahead and (got < wanted or (got == wanted and ahead[0] == 1 != following)):
                got *= ahead[0]
                channels.append(ahead.pop(0))
                order += "C"
            if got != wanted or (letter and (not ahead or ahead.pop(0) != following)):
                return None
            order += letter
        return None if ahead else Form(order, tuple(channels))


@lru_cache(maxsize=4096)
def _viewed(form: Form, shape: tuple[int, ...], batch: int, grid: Pair) -> Form | None:
    """`Form.viewed`, remembered: heads view their maps in every pass."""
    return form._as(shape, batch, grid)


def _segments(order: str) -> list[str]:
    """An order cut behind each of N, H and W: "NCHW" into "N", "CH", "W" and ""."""
    segments = [""]
    for letter in order:
        segments[-1] += letter
        if letter != "C":
            segments.append("")
    return segments
