"""Kernels of convolution on rows: a register tile of output sites and channels, read by way of the kernel map.

No columns are gathered and nothing is copied: each tap of each site is a pointer to a row, which is the indirect
convolution algorithm (Dukhan, arXiv 1907.02129). The sums stay in registers over all taps and channels; scale, shift,
residual and activation are applied before they are first written.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from sparsenet.kernels.activations import ACTIVATIONS
from sparsenet.kernels.machine import Kernel, Launch, lanes, registers

FIELDS = (
    # Addresses. Scale and shift are padded to whole panels; of zeros and what is outside there is a number for each
    # channel, and for a vector more.
    *("rows", "table", "weights", "scale", "shift", "residual", "out", "zeros", "outside"),
    # Output sites, taps, channels that a group reads, elements from row to row of input and output, outputs of a group.
    *("sites", "taps", "channels", "row_stride", "out_stride", "outputs"),
    # Panels of all groups and of one, output sites and panels of a piece, input rows, and pieces taken so far.
    *("panels", "group_panels", "piece_sites", "piece_panels", "inputs", "taken"),
    # Elements from a panel's weights to those that are brought near meanwhile, or 0.
    "ahead",
    # The activation's parameters, float64.
    *("low", "high"),
)


def tile(vectors: int) -> int:
    """How many sites are computed together with so many vectors of output channels: as many sums as leave registers
    for a row of weights and one input number."""
    return (24 if registers() == 32 else 12) // vectors


# What a vector costs in a panel of so many, next to one in a panel of four, whose loads are fewest for its sums (1024
# to 546 channels at 139 sites: 7.2 ms in panels of four, 12.5 in panels of one).
COSTS = {4: 1.0, 2: 1.02, 3: 1.1, 1: 1.4}


def panel_vectors(outputs: int, dtype: torch.dtype) -> int:
    """Vectors of output channels in a panel: those that cost least, idle lanes included."""
    width = lanes(dtype)
    fitting = [vectors for vectors in COSTS if registers() == 32 or vectors < 4]
    return min(fitting, key=lambda vectors: -(-outputs // (vectors * width)) * vectors * COSTS[vectors])


@functools.cache
def product(
    vectors: int, whole: bool, dtype: torch.dtype, residual: str | None, activation: str, by_tap: bool = False
) -> Launch:
    """The kernel of ordinary and grouped convolution.

    Weights are packed (groups, panels, taps, channels, vectors · lanes), zero beyond the outputs.

    Args:
        whole: whether a group's outputs fill its panels, so that no lane is idle.
        residual: `None`, or whether rows are added "before" or "after" the activation.
        activation: a name of `ACTIVATIONS`.
        by_tap: let all sites of a piece pass by the weights of one tap before those of the next, with the sums so far
            in the results' memory: for panels that are more than a core's own cache holds.
    """
    order = "by_tap_" if by_tap else ""
    kernel = Kernel(f"product_{order}{vectors}_{whole}_{dtype.itemsize}_{residual}_{activation}", FIELDS, dtype)
    build, sites_at_once, width = kernel.build, tile(vectors), vectors * kernel.lanes
    rows, table, weights, zeros = (
        kernel.pointer(name, integers=name == "table") for name in ("rows", "table", "weights", "zeros")
    )
    sites, taps, channels, row_stride = map(kernel.field, ("sites", "taps", "channels", "row_stride"))
    piece_sites, piece_panels, inputs, outputs = map(kernel.field, ("piece_sites", "piece_panels", "inputs", "outputs"))
    panels, group_panels = map(kernel.field, ("panels", "group_panels"))
    finish = Finish(kernel, residual, activation)
    last = build.sub(sites, kernel.integer(1))
    unrolled = 4
    most = build.mul(build.sdiv(channels, kernel.integer(unrolled)), kernel.integer(unrolled))
    tap_size = build.mul(channels, kernel.integer(width))
    panel_size = build.mul(taps, tap_size)
    # Each step brings near three lines of the next weights, so that all are there after so many tiles: six of panels of
    # four vectors (3x3, 512 channels at 36 sites: 0.54 ms, and 0.56 with two lines, 0.60 with one, 0.57 with six).
    line, ahead = 64 // dtype.itemsize, kernel.field("ahead")
    step_ahead = 3 * line
    tiles_ahead = kernel.integer(-(-unrolled * width // step_ahead))
    taps_at_once = kernel.integer(1) if by_tap else taps
    steps = build.mul(taps_at_once, build.sdiv(most, kernel.integer(unrolled)))
    all_weights = build.mul(panels, panel_size)
    site_pieces = kernel.parts(sites, piece_sites)

    # Panels change slowest, so that one panel's weights stay in the cache while all sites pass.
    with kernel.pieces(build.mul(build.sdiv(panels, piece_panels), site_pieces)) as piece:
        first_panel = build.mul(build.sdiv(piece, site_pieces), piece_panels)
        first = build.mul(build.srem(piece, site_pieces), piece_sites)
        count = kernel.smaller(build.sub(sites, first), piece_sites)
        with (
            kernel.loop(piece_panels) as over_panels,
            kernel.loop(taps if by_tap else kernel.integer(1)) as passes,
            kernel.loop(count, step=sites_at_once) as tiles,
        ):
            panel = build.add(first_panel, over_panels.index)
            group, place = build.sdiv(panel, group_panels), build.srem(panel, group_panels)
            begin = build.add(build.mul(panel, panel_size), build.mul(passes.index, tap_size))
            offset = build.mul(group, channels)
            start = build.add(first, tiles.index)
            turn = build.sdiv(tiles.index, kernel.integer(sites_at_once))
            there = build.icmp_signed("<", build.add(begin, ahead), all_weights)
            wanted = build.and_(there, build.icmp_signed("<", turn, tiles_ahead))
            away = build.add(ahead, build.mul(build.mul(turn, steps), kernel.integer(step_ahead)))
            begin = kernel.at(weights, begin)
            coming = kernel.at(begin, build.select(wanted, away, kernel.integer(0)))
            # Beyond the last site, the last one is computed again.
            targets = [kernel.smaller(build.add(start, kernel.integer(each)), last) for each in range(sites_at_once)]
            reads = [kernel.at(table, build.mul(target, taps)) for target in targets]
            places = []
            for vector in range(vectors):
                within = build.add(build.mul(place, kernel.integer(width)), kernel.integer(vector * kernel.lanes))
                mask = None if whole else kernel.first_lanes(build.sub(outputs, within))
                padded = build.add(build.mul(panel, kernel.integer(width)), kernel.integer(vector * kernel.lanes))
                places.append((build.add(build.mul(group, outputs), within), padded, mask))
            sums = [kernel.zero] * (sites_at_once * vectors)
            if by_tap:
                anew = build.icmp_signed("==", passes.index, kernel.integer(0))
                kept = [finish.sums(target, channel, mask) for target in targets for channel, _, mask in places]
                sums = [build.select(anew, kernel.zero, each) for each in kept]
            with kernel.loop(taps_at_once, [*sums, begin, coming]) as over_taps:
                tap = build.add(passes.index, over_taps.index)
                pointers = []
                for read in reads:
                    row = build.sext(build.load(kernel.at(read, tap)), kernel.index_type)
                    there = kernel.at(rows, build.mul(row, row_stride), offset)
                    pointers.append(build.select(build.icmp_signed("<", row, inputs), there, zeros))
                with kernel.loop(most, over_taps.values, step=unrolled) as inner:
                    *sums, weight, coming = inner.values
                    for each in range(0, step_ahead, line):
                        kernel.prefetch(kernel.at(coming, each))
                    for each in range(unrolled):
                        channel = build.add(inner.index, kernel.integer(each))
                        sums = multiplied(kernel, pointers, channel, kernel.at(weight, each * width), sums)
                    inner.following = [*sums, kernel.at(weight, unrolled * width), kernel.at(coming, step_ahead)]
                with kernel.loop(build.sub(channels, most), inner.values) as rest:
                    *sums, weight, coming = rest.values
                    sums = multiplied(kernel, pointers, build.add(most, rest.index), weight, sums)
                    rest.following = [*sums, kernel.at(weight, width), coming]
                over_taps.following = rest.values
            *sums, _, _ = over_taps.values
            done = kernel.integer(1)
            if by_tap:
                done = build.zext(build.icmp_signed("==", passes.index, build.sub(taps, done)), kernel.index_type)
                with kernel.loop(build.sub(kernel.integer(1), done)):
                    for vector, (channel, _, mask) in enumerate(places):
                        finish.keep(sums[vector::vectors], targets, channel, mask)
            with kernel.loop(done):
                for vector, (channel, padded, mask) in enumerate(places):
                    finish(sums[vector::vectors], targets, channel, padded, mask)
    return kernel.compiled()


@functools.cache
def by_channel(
    operation: str, vectors: int, whole: bool, dtype: torch.dtype, residual: str | None, activation: str
) -> Launch:
    """The kernel of what keeps channels apart: depthwise convolution, one output per input channel, and pooling.

    Args:
        operation: "product" of weights, which are packed (taps, panels · vectors · lanes), zero beyond the channels;
            "max", in which NaN wins, or "sum".
        whole: whether the channels fill their panels.
    """
    name = f"{operation}_by_channel_{vectors}_{whole}_{dtype.itemsize}_{residual}_{activation}"
    kernel = Kernel(name, FIELDS, dtype)
    build, sites_at_once, width = kernel.build, max(1, tile(vectors) // 2), vectors * kernel.lanes
    rows, table, weights, zeros, outside = (
        kernel.pointer(name, integers=name == "table") for name in ("rows", "table", "weights", "zeros", "outside")
    )
    sites, taps, channels, inputs = map(kernel.field, ("sites", "taps", "outputs", "inputs"))
    panels, row_stride, piece_sites = map(kernel.field, ("panels", "row_stride", "piece_sites"))
    finish = Finish(kernel, residual, activation)
    last = build.sub(sites, kernel.integer(1))
    weight_stride = build.mul(panels, kernel.integer(width))
    start_value = kernel.constant(-math.inf) if operation == "max" else kernel.zero

    def combined(total: Any, numbers: Any, weight: Any) -> Any:
        match operation:
            case "product":
                return kernel.fma(numbers, weight, total)
            case "sum":
                return build.fadd(total, numbers)
        larger = build.fcmp_ordered(">", numbers, total)
        return build.select(build.or_(larger, build.fcmp_unordered("uno", numbers, numbers)), numbers, total)

    with kernel.pieces(kernel.parts(sites, piece_sites)) as piece:
        first = build.mul(piece, piece_sites)
        count = kernel.smaller(build.sub(sites, first), piece_sites)
        with kernel.loop(panels) as over_panels:
            begin = build.mul(over_panels.index, kernel.integer(width))
            offsets = [build.add(begin, kernel.integer(vector * kernel.lanes)) for vector in range(vectors)]
            masks = [None if whole else kernel.first_lanes(build.sub(channels, offset)) for offset in offsets]
            with kernel.loop(count, step=sites_at_once) as tiles:
                start = build.add(first, tiles.index)
                targets = [
                    kernel.smaller(build.add(start, kernel.integer(each)), last) for each in range(sites_at_once)
                ]
                reads = [kernel.at(table, build.mul(target, taps)) for target in targets]
                carried = [*[start_value] * (sites_at_once * vectors), kernel.at(weights, begin)]
                with kernel.loop(taps, carried) as over_taps:
                    *totals, weight = over_taps.values
                    loaded = [
                        kernel.load(kernel.at(weight, vector * kernel.lanes)) if operation == "product" else None
                        for vector in range(vectors)
                    ]
                    found = []
                    for place, read in enumerate(reads):
                        row = build.sext(build.load(kernel.at(read, over_taps.index)), kernel.index_type)
                        there = kernel.at(rows, build.mul(row, row_stride))
                        pointer = build.select(build.icmp_signed("<", row, inputs), there, zeros)
                        if operation == "max":
                            pointer = build.select(build.icmp_signed(">", row, inputs), outside, pointer)
                        for vector in range(vectors):
                            numbers = kernel.load(kernel.at(pointer, offsets[vector]), masks[vector])
                            found.append(combined(totals[place * vectors + vector], numbers, loaded[vector]))
                    moved = kernel.at(weight, weight_stride) if operation == "product" else weight
                    over_taps.following = [*found, moved]
                *totals, _ = over_taps.values
                for vector in range(vectors):
                    finish(totals[vector::vectors], targets, offsets[vector], offsets[vector], masks[vector])
    return kernel.compiled()


def multiplied(kernel: Kernel, pointers: list[Any], channel: Any, weight: Any, sums: list[Any]) -> list[Any]:
    """One input channel of the row at each pointer times its weights, added to the sums: as many vectors for each."""
    vectors = len(sums) // len(pointers)
    loaded = [kernel.load(kernel.at(weight, vector * kernel.lanes)) for vector in range(vectors)]
    found = []
    for place, pointer in enumerate(pointers):
        number = kernel.splat(kernel.build.load(kernel.at(pointer, channel)))
        found += [kernel.fma(number, part, sums[place * vectors + vector]) for vector, part in enumerate(loaded)]
    return found


class Finish:
    """The end of both kernels: sums to outputs."""

    def __init__(self, kernel: Kernel, residual: str | None, activation: str):
        self.kernel, self.order = kernel, residual
        self.scale, self.shift, self.residual, self.out = map(kernel.pointer, ("scale", "shift", "residual", "out"))
        self.stride = kernel.field("out_stride")
        self.activation = ACTIVATIONS[activation]
        self.parameters = kernel.number("low"), kernel.number("high")

    def sums(self, site: Any, channel: Any, mask: Any) -> Any:
        """What `keep` left there."""
        return self.kernel.load(self.kernel.at(self.out, self._place(site, channel)), mask)

    def keep(self, sums: list[Any], sites: list[Any], channel: Any, mask: Any) -> None:
        """Leave sums that are not complete in the results' memory."""
        for total, site in zip(sums, sites, strict=True):
            self.kernel.store(total, self.kernel.at(self.out, self._place(site, channel)), mask)

    def _place(self, site: Any, channel: Any) -> Any:
        """Of a site's channel among the results, and in the residual."""
        return self.kernel.build.add(self.kernel.build.mul(site, self.stride), channel)

    def __call__(self, sums: list[Any], sites: list[Any], channel: Any, padded: Any, mask: Any) -> None:
        """Write one vector of output channels of each site.

        Args:
            channel: the vector's first channel, and `padded`, its place where panels are whole.
        """
        kernel = self.kernel
        scale, shift = (kernel.load(kernel.at(each, padded)) for each in (self.scale, self.shift))
        for total, site in zip(sums, sites, strict=True):
            target = self._place(site, channel)
            value = kernel.fma(total, scale, shift)
            if self.order is not None:
                added = kernel.load(kernel.at(self.residual, target), mask)
            if self.order == "before":
                value = kernel.build.fadd(value, added)
            value = self.activation(kernel, value, *self.parameters)
            if self.order == "after":
                value = kernel.build.fadd(value, added)
            kernel.store(value, kernel.at(self.out, target), mask)
