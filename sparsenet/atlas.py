"""Atlases: the kernel maps of a pass, found all at once at its entry.

A pass asks for what the last one of its size has asked for. SSD300's 15 kernel maps and 7 masks, found one by one, took
0.65 ms of which kernels had 0.12; all at once it is 0.3.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparsenet.kernels import index
from sparsenet.sites import (
    TILE,
    ActiveSites,
    KernelMap,
    Pair,
    Reading,
    TileReading,
    Tiles,
    Window,
    kernel_map,
    pairs_of,
    places_of,
    tiles,
)

if TYPE_CHECKING:
    from sparsenet.selection import Selection

# Atlases that a selector keeps, of its last sizes: each holds the tables of all pixels that its own are parts of.
MOST = 8

# Pixels, or numbers of tables, up to which one thread finds them sooner than it has woken another.
ALONE = 1 << 14

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Route:
    """Which kernel map, or which tiles, whatever is active: from the active sites of one size to those of another.

    Attributes:
        full: whether it is from all pixels of `size`.
        tiles: whether 2x2 outputs are computed at once: see `sparsenet.sites.tiles`.
        spread: whether it is to all pixels of `out_size`.
    """

    size: Pair
    full: bool
    window: Reading
    out_size: Pair
    tiles: bool = False
    spread: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Found once: a program looks up its routes in every pass."""
        return hash((self.size, self.full, self.window, self.out_size, self.tiles, self.spread))

    def of_tiles(self, tiles: bool) -> Route:
        return self if tiles == self.tiles else self._other

    @cached_property
    def _other(self) -> Route:
        return replace(self, tiles=not self.tiles)

    def of(self, selection: Selection) -> KernelMap | Tiles:
        target = selection.everywhere(self.out_size) if self.spread else selection.sites(self.out_size)
        if not self.full:
            source = selection.sites(self.size)
        elif self.size == self.out_size and isinstance(self.window, Window) and self.window.pointwise:
            return KernelMap(target.index.int()[:, None], target.mask.numel())  # of all pixels each reads its own
        else:
            source = selection.everywhere(self.size)
        return (tiles if self.tiles else kernel_map)(source, self.window, target)


# The same one again, which takes less to look up than an equal one.
route = functools.lru_cache(maxsize=1024)(Route)


class Atlases:
    """Those of a selector, by the size of the entry."""

    def __init__(self) -> None:
        self._kept: dict[Pair, tuple[dict[Route, bool], Atlas | None]] = {}

    def begin(self, selection: Selection) -> None:
        """Find what the last pass of the entry's size has asked for. What this one asks for is found in the next."""
        asked, atlas = self._kept.pop(selection.size, ({}, None))
        if atlas is None or not atlas.serves(asked, selection.batch):
            routes = list(asked)  # of a pass that may go on in another thread
            atlas = Atlas(routes, selection.batch) if routes else None
        for oldest in list(self._kept)[: max(0, len(self._kept) + 1 - MOST)]:
            self._kept.pop(oldest, None)  # which another thread may have done
        self._kept[selection.size] = selection.asked, atlas
        if atlas is not None:
            selection.find(atlas)

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}


class _Sites(NamedTuple):
    """Sites that tables are between: the "active" pixels of a size, the "tiles" in which any of them is active, or
    "all" pixels."""

    kind: str
    size: Pair

    @property
    def grid(self) -> Pair:
        height, width = self.size
        return (-(-height // 2), -(-width // 2)) if self.kind == "tiles" else self.size


class _Table(NamedTuple):
    """A table, by where in the rank image of its source each tap of each pixel of its target reads: see
    `sparsenet.sites.places_of`."""

    source: _Sites
    target: _Sites
    places: Tensor

    @staticmethod
    def of(source: _Sites, target: _Sites, window: Reading) -> _Table:
        return _Table(source, target, places_of(source.size, target.grid, window, CPU))


def _tables_of(route: Route) -> list[_Table]:
    """One for a kernel map, two for tiles."""
    source = _Sites("all" if route.full else "active", route.size)
    target = _Sites("all" if route.spread else "active", route.out_size)
    if not route.tiles:
        return [_Table.of(source, target, route.window)]
    cells = _Sites("tiles", route.out_size)
    return [_Table.of(source, cells, TileReading(route.window, route.out_size)), _Table.of(target, cells, TILE)]


class Atlas:
    """The kernel maps of routes, as far as they do not hang on which pixels are active.

    Args:
        batch: how many images the masks have.

    Attributes:
        sizes: of the masks.
    """

    def __init__(self, routes: Sequence[Route], batch: int):
        self._batch = batch
        made = [(route, table) for route in routes for table in _tables_of(route)]
        made.sort(key=lambda each: -each[1].places.numel())  # so that no thread begins with a large one at last
        self._tables = [table for _, table in made]
        self._routes: list[tuple[Route, int, int | None]] = []  # each with its table, and that of where tiles write
        for route in routes:
            place, *others = (place for place, each in enumerate(made) if each[0] is route)  # tiles read 16, write 4
            self._routes.append((route, place, others[0] if others else None))
        ends = list(dict.fromkeys(end for table in self._tables for end in table[:2]))
        active, tiled, whole = ([end for end in ends if end.kind == kind] for kind in ("active", "tiles", "all"))
        self.sizes = [end.size for end in active]
        self._tiled = [(self.sizes.index(end.size), pairs_of(end.size[0]), pairs_of(end.size[1])) for end in tiled]
        self._starts: list[tuple[int, int]] = []
        self._finding, self._index, self._rank = array("q"), 0, 0
        for height, width in (end.grid for end in (*active, *tiled)):
            self._finding.extend((0, 0, 0, batch, height, width, 0))
            self._starts.append((self._index, self._rank))
            self._index += batch * height * width
            self._rank += batch * (height + 1) * (width + 1)
        self._whole = [ActiveSites.all(batch, end.size, CPU) for end in whole]
        self._of_whole = [(each.index.data_ptr(), each.rank.data_ptr(), len(each)) for each in self._whole]
        number = {end: place for place, end in enumerate((*active, *tiled, *whole))}
        self._ends = [(number[table.source], number[table.target], table.places.shape[1]) for table in self._tables]
        self._tabling = array("q")
        for source, target, places in self._tables:
            pixels, plane = target.grid[0] * target.grid[1], (source.size[0] + 1) * (source.size[1] + 1)
            self._tabling.extend((places.data_ptr(), 0, 0, 0, 0, places.shape[1], pixels, plane))

    def serves(self, asked: dict[Route, bool], batch: int) -> bool:
        """Whether a pass that had it has asked for its routes and no others."""
        return batch == self._batch and len(asked) == len(self._routes) and True not in asked.values()

    def found(self, masks: list[Tensor]) -> tuple[list[ActiveSites], dict[Route, KernelMap | Tiles]]:
        """The active sites of masks, and the kernel maps between them."""
        sites, ends = self._sites_of(masks)
        indices, ranks, counts = zip(*ends, *self._of_whole, strict=True)
        totals = [counts[target] * taps for _, target, taps in self._ends]
        memory = torch.empty(sum(totals), dtype=torch.int32)
        jobs, tables, first, start = self._tabling[:], [], memory.data_ptr(), 0
        for place, (source, target, taps) in enumerate(self._ends):
            at, count = place * len(index.TABLE), counts[target]
            jobs[at + 1], jobs[at + 2], jobs[at + 3] = indices[target], ranks[source], first + 4 * start
            jobs[at + 4] = count
            tables.append(memory.as_strided((count, taps), (taps, 1), start))
            start += totals[place]
        index.table_kernel().each(jobs, _threads(start))
        maps: dict[Route, KernelMap | Tiles] = {}
        for route, place, other in self._routes:
            if other is None:
                maps[route] = KernelMap(tables[place], counts[self._ends[place][0]])
            else:
                maps[route] = Tiles(tables[place], tables[other])
        return sites, maps

    def _sites_of(self, masks: list[Tensor]) -> tuple[list[ActiveSites], list[tuple[int, int, int]]]:
        """The active sites; and where index and rank lie of these and of tiles, and how many they are."""
        masks = [mask.contiguous() for mask in masks]
        masks += [index.any_of(masks[place], lines, columns) for place, lines, columns in self._tiled]
        indices, ranks = torch.empty(self._index, dtype=torch.int64), torch.empty(self._rank, dtype=torch.int32)
        jobs, length = self._finding[:], len(index.SITES)
        first, other = indices.data_ptr(), ranks.data_ptr()
        for place, (mask, (start, of_rank)) in enumerate(zip(masks, self._starts, strict=True)):
            at = place * length
            jobs[at], jobs[at + 1], jobs[at + 2] = mask.data_ptr(), first + 8 * start, other + 4 * of_rank
        index.sites_kernel().each(jobs, _threads(self._index))
        ends = [(jobs[at + 1], jobs[at + 2], jobs[at + length - 1]) for at in range(0, len(jobs), length)]
        known = zip(masks, ends, self._starts, strict=True)
        found: list[ActiveSites] = [_Found(mask, end[2], indices, ranks, starts) for mask, end, starts in known]
        return found[: len(self.sizes)], ends


def _threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers > ALONE else 1


class _Found(ActiveSites):
    """Sites whose index and rank lie in an atlas's memory, each from a place on."""

    def __init__(self, mask: Tensor, count: int, indices: Tensor, ranks: Tensor, starts: tuple[int, int]):
        super().__init__(mask)
        self._count = count
        self._memory = indices, ranks
        self._starts = starts

    def __len__(self) -> int:
        return self._count

    @cached_property
    def index(self) -> Tensor:
        return self._memory[0].narrow(0, self._starts[0], self._count)

    @cached_property
    def rank(self) -> Tensor:
        batch, (height, width) = len(self.mask), self.size
        strides = ((height + 1) * (width + 1), width + 1, 1)
        return self._memory[1].as_strided((batch, height + 1, width + 1), strides, self._starts[1])
