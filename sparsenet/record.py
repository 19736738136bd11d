"""What happened in a forward pass: masks, saliency, operations and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from sparsenet import context
from sparsenet.macs import MacCounter
from sparsenet.selection import Operation, Selection
from sparsenet.selector import Selector
from sparsenet.sites import Pair


class Record:
    """The last forward pass of a selective model inside `with record(model) as rec:`.

    Attributes:
        masks: bool (N, H, W) by (H, W), for the entry and every size that the pass met; copies, since some are of every
            pass.
        saliency: probabilities (N, H, W) by (H, W), where they were predicted; they carry gradient in training.
        density: active share by (H, W), over the batch.
        macs: multiply-accumulates of the whole pass as computed, Selective Module included, summed over the batch;
            a masked convolution counts its active output pixels times its taps and channels, on every backend.
        dense_macs: those of the original model.
        operations: how each operation met guided features, in order.
    """

    follows = False

    def __init__(self, selector: Selector):
        self.selector = selector
        self.begin()
        self._counting = False  # what runs beside the model before its first pass is no part of one

    def begin(self) -> None:
        """A new forward pass: forget the last one."""
        self.selections: list[Selection] = []
        self.operations: list[Operation] = []
        self.macs = 0
        self.dense_macs = 0
        self.downstream_macs = 0
        self._running = True
        self._counting = True
        self._selecting = False

    def end(self) -> None:
        """What follows the forward pass, such as its backward pass, is not part of it."""
        self._running = False

    @property
    def masks(self) -> dict[Pair, Tensor]:
        selection = self._last()
        return {size: selection.sites(size).mask.clone() for size in selection.sizes}

    @property
    def saliency(self) -> dict[Pair, Tensor]:
        selection = self._last()
        found = {size: selection.levels.saliency(size) for size in selection.sizes}
        return {size: saliency for size, saliency in found.items() if saliency is not None}

    @property
    def density(self) -> dict[Pair, float]:
        return {size: mask.float().mean().item() for size, mask in self.masks.items()}

    def _last(self) -> Selection:
        if not self.selections:
            raise RuntimeError("nothing was recorded: call the selective model inside `with sparsenet.record(model)`")
        return self.selections[-1]

    # -- as an observer of the pass ----------------------------------------------------------------------------

    def selected(self, selection: Selection) -> None:
        if self._running:
            self.selections.append(selection)

    def operation(self, operation: Operation) -> None:
        if self._running:
            self.operations.append(operation)
            self._add(operation.macs, 0 if self._selecting else operation.dense_macs)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Around a guided operation, which reports its own count."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def computing(self, work: Any) -> AbstractContextManager[None]:
        """Around the work of a frozen layer, which was counted when it was asked for."""
        return self.uncounted()

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Around the selector, which the original model does not have."""
        self._selecting = True
        try:
            yield
        finally:
            self._selecting = False

    def count(self, macs: int, convolved: Tensor | None = None) -> None:
        """Ordinary operations; see `MacCounter`."""
        if self._running and self._counting:
            self._add(macs, 0 if self._selecting else macs)

    def _add(self, macs: int, dense_macs: int) -> None:
        self.macs += macs
        self.dense_macs += dense_macs
        if self.selections:
            self.downstream_macs += dense_macs


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record the forward passes of a selective model; each one replaces the last.

    Raises:
        ValueError: for a model that `selectify` did not make.
    """
    recorded = Record(selector_of(model))
    with observing(recorded):
        yield recorded


@contextmanager
def observing(observer: Record) -> Iterator[None]:
    """Let a record watch the passes inside."""
    with context.setting(observers=(*context.current().observers, observer)), MacCounter(observer.count):
        yield


def selector_of(model: nn.Module) -> Selector:
    """The selector of a selective model, also inside a wrapper such as `DistributedDataParallel`."""
    for holder in (model, getattr(model, "module", None)):
        selector = getattr(holder, "selector", None)
        if isinstance(selector, Selector):
            return selector
    raise ValueError("this is no selective model: make one with sparsenet.selectify(model, at=...)")
