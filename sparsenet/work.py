"""A convolution of rows that has been asked for and not computed yet, so that what follows can become part of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from sparsenet.backends.epilogue import Epilogue
from sparsenet.selection import Selection


class Layer(Protocol):
    """Packed weights, and what is known of how their results are read.

    Attributes:
        outputs: how many channels a result has.
        breaks: after how many steps of its epilogue a result is read by more than the next step, so that it must be
            computed there.
    """

    outputs: int
    breaks: set[int]

    def run(
        self, rows: Tensor, epilogue: Epilogue, table: Tensor | None, inputs: int, out: Tensor | None = None
    ) -> Tensor:
        """As `sparsenet.backends.indirect.run`."""


class Work:
    """A layer, what it reads, and its epilogue so far.

    It is computed when first read. Each step that follows (normalisation, activation, residual) makes another piece of
    work of the same sums: where a result is read both by a step and by something else, it would be computed twice, so
    that the layer remembers to stop there from the next pass on.

    Args:
        rows: (at least `inputs`, C).
        table: int32 (n_out, taps) as in `KernelMap`, or `None` where each row reads itself; of one image if there are
            several `images`, whose rows follow one another.
    """

    def __init__(
        self,
        layer: Layer,
        selection: Selection,
        rows: Tensor,
        table: Tensor | None,
        inputs: int,
        images: int,
        epilogue: Epilogue,
        steps: int = 0,
    ):
        self.layer = layer
        self.selection = selection
        self.rows = rows
        self.table = table
        self.inputs = inputs
        self.images = images
        self.epilogue = epilogue
        self.steps = steps
        self._continued = False
        self._result: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.layer.outputs

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def then(self, epilogue: Epilogue | None) -> Work | None:
        """With one step more, or `None` where that is not to be part of it."""
        if epilogue is None or self._result is not None or self.steps in self.layer.breaks:
            return None
        self._continued = True
        return Work(
            self.layer, self.selection, self.rows, self.table, self.inputs, self.images, epilogue, self.steps + 1
        )

    def result(self) -> Tensor:
        """Rows (n_out, O)."""
        if self._result is None:
            if self._continued:
                self.layer.breaks.add(self.steps)
            with ExitStack() as uncounted:  # it was counted when it was asked for
                for observer in self.selection.observers:
                    uncounted.enter_context(observer.uncounted())
                self._result = self._computed()
        return self._result

    def _computed(self) -> Tensor:
        epilogue, each = self.epilogue, self.inputs
        if self.images == 1 or self.table is None:
            return self.layer.run(self.rows, epilogue, self.table, each)
        count = len(self.table)
        out = self.rows.new_empty(self.images * count, self.outputs)
        for image in range(self.images):
            of_image = slice(image * count, (image + 1) * count)
            if epilogue.residual is not None:
                epilogue = epilogue.with_residual(self.epilogue.residual[of_image])
            rows = self.rows[image * each : (image + 1) * each]
            self.layer.run(rows, epilogue, self.table, each, out[of_image])
        return out
