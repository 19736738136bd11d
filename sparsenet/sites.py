"""Active sites of one resolution, and kernel maps between two: pure index arithmetic, no features.

A site is one pixel of one image in a batch. Sites are numbered row by row, image after image, and a kernel
map tells for each output site and kernel tap where the tap reads: one of the n rows, an inactive pixel (n, value 0)
or a place outside the image (n + 1, whose value is the operation's own padding). With two rows of that kind beneath
the features, a table is ready to gather by.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.constants import constant
from sparsenet.kernels import index as index_kernels
from sparsenet.kernels import machine, triton_support

Pair = tuple[int, int]


class Reading(Protocol):
    """How the pixels of one map read those of another: along each axis by itself, so many taps for every coordinate.
    Hashable, because tables are kept by it."""

    def __hash__(self) -> int: ...

    def reads(self, axis: int, length: int, out_length: int, device: torch.device) -> Tensor:
        """Input coordinate of every (output coordinate, tap) along an axis, `length` standing for outside: int64
        (out_length, taps)."""


@dataclass(frozen=True)
class Window:
    """A sliding window: the geometry that convolution and pooling share, each field as (vertical, horizontal).

    `padding` is what lies above and to the left. Whatever the output size makes a window reach below or to
    the right of the image is padding too. `padding_mode` is one of `torch.nn.Conv2d`'s.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Found once: tables are looked up a hundred times in a pass. Of numbers alone, it is that of any process."""
        return hash((self.kernel, self.stride, self.padding, self.dilation))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether each output site reads exactly the input site at its own place."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def reads(self, axis: int, length: int, out_length: int, device: torch.device) -> Tensor:
        start = torch.arange(out_length, device=device) * self.stride[axis] - self.padding[axis]
        place = start[:, None] + torch.arange(self.kernel[axis], device=device) * self.dilation[axis]
        match self.padding_mode:
            case "zeros":
                return torch.where((place < 0) | (place >= length), length, place)
            case "replicate":
                return place.clamp(0, length - 1)
            case "circular":
                return place % length
            case "reflect":
                place = place.abs()
                return torch.where(place >= length, 2 * (length - 1) - place, place)
            case mode:
                raise ValueError(f"padding_mode {mode!r} is not one of zeros, reflect, replicate, circular")


@dataclass(frozen=True)
class TransposedWindow(Window):
    """The window of a transposed convolution, seen from its output: tap k of output pixel o reads input pixel
    (o + padding - k * dilation) / stride where that is a whole number."""

    __hash__ = Window.__hash__

    def reads(self, axis: int, length: int, out_length: int, device: torch.device) -> Tensor:
        out = torch.arange(out_length, device=device)[:, None] + self.padding[axis]
        spread = out - torch.arange(self.kernel[axis], device=device) * self.dilation[axis]
        place = spread // self.stride[axis]
        return torch.where((spread % self.stride[axis] == 0) & (place >= 0) & (place < length), place, length)


@dataclass(frozen=True)
class TileReading:
    """How tiles of 2x2 pixels read what a window of 3x3, of stride and dilation 1, reads for each: 4x4 taps.

    Attributes:
        window: of one pixel.
        size: of the map that is cut into tiles. Where its last tile has one line only, the taps of the other are
            outside.
    """

    window: Reading
    size: Pair

    def reads(self, axis: int, length: int, out_length: int, device: torch.device) -> Tensor:
        by_pixel = self.window.reads(axis, length, self.size[axis], device)
        missing = by_pixel.new_full((2 * out_length - len(by_pixel), by_pixel.shape[1]), length)
        first, second = torch.cat([by_pixel, missing]).view(out_length, 2, -1).unbind(1)
        return torch.cat([first, second[:, -1:]], 1)


class ActiveSites:
    """The active pixels of one resolution: `mask`, bool (N, H, W), its `size` (H, W), and what follows from it.

    Args:
        counts: how many pixels of each image are active, if that is known. What follows is then found without waiting
            for the mask's device; otherwise the device is asked for the number.
        by_kernel: whether compiled kernels find index and rank, and tables between such sites; by default on CPU, where
            the number is not known.

    Raises:
        ValueError: for masks of 2^31 pixels and more, whose rows are numbered by 32 bits.
    """

    def __init__(self, mask: Tensor, counts: list[int] | None = None, by_kernel: bool | None = None):
        batch, height, width = mask.shape
        if batch * (height + 1) * (width + 1) >= 1 << 31:
            raise ValueError(
                f"{batch} masks of {height}x{width} have more pixels than 32 bits can number: call the model with a "
                "smaller batch"
            )
        self.mask = mask
        self.size = (height, width)
        if by_kernel is None:
            by_kernel = counts is None and mask.device.type == "cpu" and machine.unsupported() is None
        self.by_kernel = by_kernel
        if counts is not None:
            self.counts = counts

    @staticmethod
    @constant(64)
    def all(batch: int, size: Pair, device: torch.device) -> ActiveSites:
        """Every pixel active, as in features that still carry their whole context."""
        sites = _all(batch, size, device)
        _ = sites.index, sites.image, sites.pixel, sites.rank
        return sites

    def __len__(self) -> int:
        return sum(self.counts) if "counts" in self.__dict__ else self.index.shape[0]

    @property
    def everywhere(self) -> bool:
        """Whether every pixel is active."""
        if "counts" in self.__dict__:
            return len(self) == self.mask.numel()
        return bool(self.mask.all())

    @cached_property
    def index(self) -> Tensor:
        """Position of each site in the flattened (N, H, W) grid, ascending: int64 (n,)."""
        kernels = index_kernels if self.by_kernel else None if "counts" in self.__dict__ else _on(self.mask.device)
        if kernels is not None:
            index: Tensor
            index, self.rank = kernels.sites(self.mask)  # both at once
            return index
        if "counts" not in self.__dict__:
            return self.mask.flatten().nonzero()[:, 0]
        nth = torch.arange(1, len(self) + 1, dtype=torch.int32, device=self.mask.device)
        return torch.searchsorted(self._running, nth)

    @cached_property
    def _running(self) -> Tensor:
        """How many pixels are active up to each one: int32 (N * H * W,)."""
        return self.mask.flatten().cumsum(0, dtype=torch.int32)

    @cached_property
    def image(self) -> Tensor:
        """Which image of the batch each site belongs to: int64 (n,)."""
        return self.index // (self.size[0] * self.size[1])

    @cached_property
    def counts(self) -> list[int]:
        """How many sites each image has."""
        if len(self.mask) == 1:
            return [len(self)]
        counts: list[int] = self.mask.flatten(1).sum(1).tolist()
        return counts

    @cached_property
    def pixel(self) -> Tensor:
        """Position of each site in its own image, flattened (H, W): int64 (n,)."""
        return self.index if len(self.mask) == 1 else self.index % (self.size[0] * self.size[1])

    @cached_property
    def rank(self) -> Tensor:
        """The row of each pixel, or n where it is inactive; one line and one column more than the map hold n + 1, for
        what is outside: int32 (N, H + 1, W + 1)."""
        count = len(self) if not self.by_kernel else len(self.index)
        if "rank" in self.__dict__:  # a kernel has found it with the sites
            found: Tensor = self.__dict__["rank"]
            return found
        row = (self._running - 1).view(self.mask.shape)
        return F.pad(row.masked_fill(~self.mask, count), (0, 1, 0, 1), value=count + 1)

    def read_at(self, window: Reading, target: ActiveSites) -> Tensor:
        """Where in the flattened `rank` each tap of each of the target's sites reads: integers (n_out, taps)."""
        height, width = self.size
        place = places_of((height, width), target.size, window, target.mask.device).index_select(0, target.pixel)
        return place if len(self.mask) == 1 else place + (target.image * ((height + 1) * (width + 1)))[:, None]


class KernelMap:
    """Where each tap of each output site reads, and what follows from it.

    Attributes:
        table: int32 (n_out, taps): a row below `inputs`, `inputs` for an inactive pixel, `inputs + 1` for a place
            outside the image.
        inputs: how many rows there are.
    """

    def __init__(self, table: Tensor, inputs: int):
        self.table = table
        self.inputs = inputs

    @cached_property
    def products(self) -> Tensor:
        """Where each tap of each output site finds its product, were every row (and one of zeros beneath) multiplied
        by every tap's weights: int32 (n_out, taps), positions in the flattened (inputs + 1, taps)."""
        taps = self.table.shape[1]
        return self.table.clamp(max=self.inputs) * taps + torch.arange(
            taps, dtype=torch.int32, device=self.table.device
        )

    @cached_property
    def inverse(self) -> Tensor:
        """For each row and tap the output sites that it is read for, in ascending order, of which there is one at most
        unless padding repeats pixels: int32 (inputs, times * taps), first the first site of each tap, then the second
        of each ...; `len(table)` where there is none."""
        outputs, taps = self.table.shape
        found = self.table < self.inputs
        places = torch.where(found, self.table * taps + torch.arange(taps, device=found.device), self.inputs * taps)
        sites = torch.arange(outputs, dtype=torch.int32, device=found.device)[:, None].expand(-1, taps)
        parts: list[Tensor] = []
        while not parts or found.any():
            # A minimum is the same in whatever order it is taken; what found no place waits for the next part.
            part = sites.new_full((self.inputs * taps + 1,), outputs)
            waiting = torch.where(found, sites, outputs)
            part.scatter_reduce_(0, places.flatten(), waiting.flatten(), "amin")
            parts.append(part[:-1].view(self.inputs, taps))
            found = found & (part[places] != sites)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The map by taps, as spconv wants it: int32 (2, taps, most) of (input row, output row) padded with -1,
        and int32 (taps,), how many pairs each tap has."""
        found = (self.table < self.inputs).T  # (taps, n_out)
        counts = found.sum(1, dtype=torch.int32)
        tap, output = found.nonzero(as_tuple=True)
        first = torch.cumsum(counts, 0) - counts
        slot = torch.arange(len(tap), device=tap.device) - first[tap]
        pairs = torch.full((2, *found.shape), -1, dtype=torch.int32, device=tap.device)
        pairs[0, tap, slot] = self.table[output, tap]
        pairs[1, tap, slot] = output.int()
        return pairs, counts

    @cached_property
    def patterns(self) -> tuple[Tensor, Tensor, Tensor]:
        """A map of at most 32 taps as spconv's implicit gemm reads it, all int32: the input row of each (tap, output
        row), -1 for none; for each output row a bit for each tap that finds a row; and the output rows in the order of
        these bits, so that rows of like pattern share a tile."""
        found = self.table < self.inputs
        bits = (found.long() << torch.arange(found.shape[1], device=found.device)).sum(1)
        bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
        pairs = torch.where(found, self.table, -1).T.contiguous()
        return pairs, bits, bits.argsort(stable=True).int()


def _on(device: torch.device) -> ModuleType | None:
    """The kernels of a GPU, a launch in place of several of PyTorch's operations, or `None`."""
    if device.type == "cuda" and triton_support.missing() is None and not torch.compiler.is_compiling():
        return importlib.import_module("sparsenet.kernels.triton_index")
    return None


def kernel_map(source: ActiveSites, window: Reading, target: ActiveSites) -> KernelMap:
    """The kernel map of `window` from the sites it reads to the sites it must produce.

    There is no hash table: a tap's place is a function of the output site's coordinates, and its row a look-up in the
    rank image. Both are looked up, for a narrow network spent a tenth of its time on such small index arithmetic.
    """
    # On CPU a dozen times as fast as PyTorch's operations on small maps.
    kernels = index_kernels if source.by_kernel and target.by_kernel else _on(source.mask.device)
    if kernels is not None:
        index, places = target.index, places_of(source.size, target.size, window, source.mask.device)
        return KernelMap(kernels.table(places, index, source.rank), len(source))
    place = source.read_at(window, target)
    return KernelMap(source.rank.view(-1).index_select(0, place.view(-1)).view(place.shape), len(source))


class Tiles(NamedTuple):
    """The kernel maps of a convolution that computes 2x2 outputs at once, wherever one of them is active.

    Attributes:
        reads: int32 (n_tiles, 16), the rows of each tile's 4x4 taps, numbered as in `KernelMap`.
        writes: int32 (n_tiles, 4), the output rows of its pixels; a number from the outputs' count on is none.
    """

    reads: Tensor
    writes: Tensor


def tiles(source: ActiveSites, window: Reading, target: ActiveSites) -> Tiles:
    """As `kernel_map`, of a window of 3x3 taps, of stride and dilation 1. On CPU, where kernels are."""
    lines, columns = (pairs_of(length) for length in target.size)
    each = ActiveSites(index_kernels.any_of(target.mask, lines, columns))
    reads = kernel_map(source, TileReading(window, target.size), each).table
    return Tiles(reads, kernel_map(target, TILE, each).table)


TILE = Window((2, 2), (2, 2))
"""How a tile reads its own pixels."""


@constant(64)
def pairs_of(length: int) -> Tensor:
    """The bounds of two lines each: int32 (length / 2, 2)."""
    first = torch.arange(0, length, 2, dtype=torch.int32)
    return torch.stack([first, (first + 2).clamp(max=length)], 1)


@constant(64)
def dense_tiles(size: Pair, window: Reading, out_size: Pair, device: torch.device) -> Tiles:
    """The tiles of a convolution of all pixels of one image."""
    return tiles(_all(1, size, device), window, _all(1, out_size, device))


@constant(64)
def dense_table(size: Pair, window: Reading, out_size: Pair, device: torch.device) -> Tensor:
    """The table of the kernel map between all pixels of one image: int32 (H_out * W_out, taps)."""
    places = _made_places(size, out_size, window, device)  # as large as the table, and not needed for another one
    return _all(1, size, device).rank.view(-1).index_select(0, places.view(-1)).view(places.shape)


def _all(batch: int, size: Pair, device: torch.device) -> ActiveSites:
    """Every pixel active, not kept: those of an image of 448x448 are 4 MB."""
    mask = torch.ones(batch, *size, dtype=torch.bool, device=device)
    return ActiveSites(mask, None if device.type == "cpu" else [size[0] * size[1]] * batch)


@constant(64)
def places_of(size: Pair, out_size: Pair, window: Reading, device: torch.device) -> Tensor:
    """Where in one image's flattened rank image each tap of every output pixel reads: int32 (H_out * W_out, taps)."""
    return _made_places(size, out_size, window, device)


def _made_places(size: Pair, out_size: Pair, window: Reading, device: torch.device) -> Tensor:
    lines = window.reads(0, size[0], out_size[0], device)
    columns = window.reads(1, size[1], out_size[1], device)
    places = (lines * (size[1] + 1))[:, None, :, None] + columns[None, :, None, :]
    # Of sides of length 1 the sum may lie in another order.
    return places.reshape(out_size[0] * out_size[1], -1).int().contiguous()
