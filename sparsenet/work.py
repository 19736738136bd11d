"""A layer's work on rows that has been asked for and not computed yet, so that what follows can become part of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from sparsenet.atlas import Route
from sparsenet.backends import workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Norm, Reads
from sparsenet.kernels import queue
from sparsenet.selection import Selection
from sparsenet.sites import Pair, Tiles, Window, dense_table, dense_tiles


class Layer(Protocol):
    """A frozen layer.

    Attributes:
        path: of its module in the model.
        outputs: how many channels a result has.
        breaks: after how many steps of its epilogue a result is read by more than the next step, so that it must be
            computed there.
    """

    path: str
    outputs: int
    breaks: set[int]

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        """Rows (n_out, O), which kernels of the current queue may have yet to write."""

    def normalised(self, epilogue: Epilogue, norm: Norm) -> Epilogue | None:
        """An epilogue with normalisation as its next step, or `None`."""

    def scaled(self, epilogue: Epilogue, factor: Tensor, cells: Tensor) -> Epilogue | None:
        """An epilogue with a factor for each channel as its next step, or `None`; `cells` is a view of it."""


class Unfolded:
    """A `Layer` without weights that normalisations and factors could become part of."""

    def __init__(self, outputs: int):
        self.outputs = outputs
        self.breaks: set[int] = set()

    def normalised(self, epilogue: Epilogue, norm: Norm) -> Epilogue | None:
        return None

    def scaled(self, epilogue: Epilogue, factor: Tensor, cells: Tensor) -> Epilogue | None:
        return None


class Gate(Unfolded):
    """What a frozen layer gave, multiplied by a number for each channel, as squeeze-and-excitation does: a convolution
    that reads the product takes the numbers along, and it is never written."""

    path = "gate"

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        return epilogue.of(reads.multiplied().rows)


class Standalone(Unfolded):
    """An operation with a kernel of its own, which nothing becomes part of."""

    path = "operation"

    def __init__(self, outputs: int):
        super().__init__(outputs)
        self.breaks = {0}

    def ready(self, dtype: torch.dtype) -> Any:
        """Its kernel: `job(rows, residual, table, inputs, out)` is to be run later."""
        raise NotImplementedError

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        kernel, table = self.ready(reads.rows.dtype), reads.table
        out = workspace.empty(reads.outputs, self.outputs, reads.rows)
        for rows, _, part in reads.by_image(epilogue, out):
            kernel.job(rows, None, table, reads.inputs, part).wait()
        return out


class OfAllPixels(NamedTuple):
    """The tables of a layer that no mask guides, those of one image."""

    grid: Pair
    window: Window
    out_grid: Pair
    device: torch.device

    def table(self) -> Tensor:
        return dense_table(*self)

    def tiles(self) -> Tiles:
        return dense_tiles(*self)


class OfActiveSites(NamedTuple):
    """The tables of a guided layer."""

    selection: Selection
    route: Route

    def table(self) -> Tensor:
        table: Tensor = self.selection.along(self.route.of_tiles(False)).table
        return table

    def tiles(self) -> Tiles:
        found: Tiles = self.selection.along(self.route.of_tiles(True))
        return found


VECTOR: Pair = (0, 0)
"""In place of a grid, that of one row which belongs to no pixel."""


class Readers:
    """Who reads a map, or what a layer gives.

    Attributes:
        waiting: work that has yet to read it, which must be computed before it is written to.
        layers_only: whether nothing but layers has come by its memory, so that kernels which read it can wait.
    """

    __slots__ = ("layers_only", "waiting")

    def __init__(self, layers_only: bool):
        self.waiting: list[ref[Work]] = []
        self.layers_only = layers_only


class Work:
    """A layer, what it reads, and its epilogue so far.

    It is computed when first read. Each step that follows (normalisation, activation, residual) makes another piece of
    work of the same sums: where a result is read both by a step and by something else, it would be computed twice, so
    that the layer remembers to stop there from the next pass on.

    Attributes:
        read_from: the readers of each map that it reads, itself among them.
    """

    __slots__ = (
        "__weakref__",
        "_continued",
        "_result",
        "epilogue",
        "layer",
        "read_from",
        "reads",
        "selection",
        "steps",
    )

    def __init__(self, layer: Layer, selection: Selection, reads: Reads, epilogue: Epilogue, steps: int = 0):
        self.layer = layer
        self.selection = selection
        self.reads = reads
        self.epilogue = epilogue
        self.steps = steps
        self.read_from: list[Readers] = []
        self._continued = False
        self._result: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.layer.outputs

    @property
    def dtype(self) -> torch.dtype:
        return self.reads.rows.dtype

    @property
    def gate(self) -> Tensor | None:
        """(C,), where it is a gate's and nothing more."""
        return self.reads.gate if isinstance(self.layer, Gate) and self.steps == 0 and self._result is None else None

    def read_like(self, other: Work) -> None:
        """It reads what another piece of work reads."""
        for readers in other.read_from:
            readers.waiting.append(ref(self))
        self.read_from += other.read_from

    def unshared(self) -> bool:
        """Whether it can become part of other work, which it then is: as far as is known, nothing else reads it."""
        if self._result is not None or self.steps in self.layer.breaks:
            return False
        if self._continued:
            self.layer.breaks.add(self.steps)
            return False
        self._continued = True
        return True

    def then(self, epilogue: Epilogue | None) -> Work | None:
        """With one step more, or `None` where that is not to be part of it."""
        if epilogue is None or self._result is not None or self.steps in self.layer.breaks:
            return None
        if self._continued:
            self.layer.breaks.add(self.steps)
        self._continued = True
        following = Work(self.layer, self.selection, self.reads, epilogue, self.steps + 1)
        following.read_like(self)
        return following

    def result(self) -> Tensor:
        """Rows (n_out, O), which kernels that wait in the selection's queue may have yet to write."""
        if self._result is None:
            if self._continued:
                self.layer.breaks.add(self.steps)
            waits = self.selection.waits
            if not waits:
                self.selection.finish()  # what it reads
            if not self.selection.observers:
                self._result = self.layer.run(self.reads, self.epilogue)
                tape = queue.tape()
                if tape is not None:
                    tape.work.append((self, self._result))
                if not waits or not all(readers.layers_only for readers in self.read_from):
                    queue.finish()
                return self._result
            with ExitStack() as observed:
                for observer in self.selection.observers:
                    observed.enter_context(observer.computing(self))
                self._result = self.layer.run(self.reads, self.epilogue)
                queue.finish()
        return self._result
