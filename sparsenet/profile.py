"""Where the time of a frozen model goes, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

import torch
from torch import nn

from sparsenet import context
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.frozen_modules import FrozenConv2d
from sparsenet.kernels import loader
from sparsenet.selection import Operation, Selection
from sparsenet.sites import Pair
from sparsenet.surgery import call
from sparsenet.work import Work


@dataclass(frozen=True)
class Layer:
    """One layer's work in a pass.

    Attributes:
        path: of its module.
        size: (H, W) of its output.
        density: share of the output's pixels that were computed, over the batch; 1 where no mask guides it.
        macs: multiply-accumulates, as computed.
        ms: milliseconds, the median over the passes.
        way: what computed it, and `reason`, why.
    """

    path: str
    size: Pair
    density: float
    macs: int
    ms: float
    way: str
    reason: str


@dataclass(frozen=True)
class Profile:
    """The passes of a frozen model: prints as a table.

    Attributes:
        ms: milliseconds of a whole pass, the median.
        layers: in the order in which they were computed.
        llvm: why LLVM is in the process, which takes memory; `None` where it is not.
    """

    ms: float
    layers: tuple[Layer, ...]
    llvm: str | None = None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "size", "density", "MMACs", "ms", "share", "way", "reason")]
        for layer in self.layers:
            rows.append(
                (
                    layer.path,
                    f"{layer.size[0]}x{layer.size[1]}",
                    f"{layer.density:.3f}",
                    f"{layer.macs / 1e6:.1f}",
                    f"{layer.ms:.3f}",
                    f"{layer.ms / self.ms:.1%}",
                    layer.way,
                    layer.reason,
                )
            )
        rest = self.ms - sum(layer.ms for layer in self.layers)
        rows.append(("everything else", "", "", "", f"{rest:.3f}", f"{rest / self.ms:.1%}", "", ""))
        rows.append(("whole pass", "", "", f"{sum(each.macs for each in self.layers) / 1e6:.1f}", f"{self.ms:.3f}"))
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(7)]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(width) if column in (0, 6) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
            lines.append("  ".join([*cells, *row[7:]]).rstrip())
        if self.llvm is not None:
            lines.append(f"LLVM is in this process, and takes about 94 MB: {self.llvm}")
        return "\n".join(lines)


def profile(model: nn.Module, inputs: Any, *, repeats: int = 10) -> Profile:
    """Time the layers of a frozen model, by the clock around each.

    Everything else is activations and sums that no layer took up, pooling, masks, kernel maps, what left the guided
    region, and Python's own time.

    Args:
        model: of `sparsenet.freeze`; call this inside `use_mask` where the model needs a mask.
        inputs: what the model is called with, in one of the forms of `selectify`.
        repeats: timed passes, after one that is not.

    Raises:
        ValueError: for a model that is not frozen.
    """
    if not any(isinstance(module, FrozenConv2d) for module in model.modules()):
        raise ValueError("the model is not frozen: profile sparsenet.freeze(model, example_inputs)")
    clocks = [_Clock(getattr(model, "selector", None)) for _ in range(1 + repeats)]
    for clock in clocks:
        with context.setting(observers=(clock,)), torch.no_grad():
            start = time.perf_counter()
            call(model, inputs)
            clock.total = time.perf_counter() - start
    last = clocks[-1]
    alike = [clock for clock in clocks[1:] if [path for path, _ in clock.seconds] == [path for path, _ in last.seconds]]
    layers = []
    for place, work in enumerate(last.works):
        ms = 1e3 * median(clock.seconds[place][1] for clock in alike)
        layers.append(_layer(work, ms))
    return Profile(1e3 * median(clock.total for clock in alike), tuple(layers), loader.reason())


class _Clock:
    """An observer that times the work of layers."""

    follows = False

    def __init__(self, selector: Any):
        self.selector = selector
        self.total = 0.0
        self.works: list[Work] = []
        self.seconds: list[tuple[str, float]] = []

    @contextmanager
    def computing(self, work: Work) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.append((work.layer.path, time.perf_counter() - start))
        self.works.append(work)

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def selected(self, selection: Selection) -> None: ...

    def operation(self, operation: Operation) -> None: ...

    def uncounted(self) -> AbstractContextManager[None]:
        return nullcontext()

    def selecting(self) -> AbstractContextManager[None]:
        return nullcontext()


def _layer(work: Work, ms: float) -> Layer:
    reads, layer = work.reads, work.layer
    assert isinstance(layer, FrozenLayer)
    pixels = work.selection.batch * reads.out_grid[0] * reads.out_grid[1]
    macs = reads.outputs * prod(layer.shape)
    return Layer(
        layer.path, reads.out_grid, reads.outputs / pixels, macs, ms, layer.chosen[reads.kind], layer.reason(reads.kind)
    )
