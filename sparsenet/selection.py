"""A selection: the active sites of every resolution, for one call of the embed stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsenet.sites import ActiveSites, KernelMap, Pair, Reading, kernel_map


class Levels(Protocol):
    """Where the masks of a selection come from: functions of the size alone, so that all operations of one size
    agree whatever produces it first."""

    def mask(self, size: Pair) -> Tensor:
        """Active pixels: bool (N, *size)."""

    def gate(self, size: Pair) -> Tensor | None:
        """The mask as numbers (N, 1, *size) with a straight-through gradient, or `None` where it takes none."""

    def saliency(self, size: Pair) -> Tensor | None:
        """The probabilities behind the mask, (N, *size), or `None` where none were predicted."""


@dataclass(frozen=True)
class Operation:
    """One operation as it met guided features.

    `status` is "guided", "dense" (a frozen layer that no mask guides), "reduction" (over space: the result is an
    ordinary tensor by nature), "exit" (the features became an ordinary tensor, for `reason`), "reentry" (an ordinary
    map took up its sites again) or "output" (the model gave the features to its caller, as an ordinary tensor). MACs
    are of the whole batch: `macs` as computed at active pixels, `dense_macs` as the original would compute them.
    """

    name: str
    status: str
    size: Pair
    macs: int = 0
    dense_macs: int = 0
    backend: str | None = None
    reason: str | None = None

    @property
    def convolves(self) -> bool:
        """Whether it is a guided convolution over a map of more than one pixel."""
        return self.status == "guided" and self.name in ("conv2d", "conv_transpose2d") and self.size != (1, 1)


class Observer(Protocol):
    """What watches the passes of one selector: see `sparsenet.record`."""

    selector: nn.Module
    follows: bool  # whether what comes of guided features is to be known as such even behind an exit

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def selected(self, selection: Selection) -> None: ...

    def operation(self, operation: Operation) -> None: ...

    def uncounted(self) -> AbstractContextManager[None]: ...

    def selecting(self) -> AbstractContextManager[None]: ...

    def computing(self, work: Any) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Options:
    """What `selectify` was told, for the passes of one selective model.

    Attributes:
        backend: how masked convolutions run.
        strict: raise where features leave the guided region.
        reenter: let what left, and comes to a convolution as a map of the same size, take up its sites again.
        mean: what a mean over space divides by, "all" pixels of the map or the "active" ones.
    """

    backend: str = "auto"
    strict: bool = False
    reenter: bool = False
    mean: str = "all"

    def __post_init__(self) -> None:
        if self.mean not in ("all", "active"):
            raise ValueError(f"mean must be 'all' (pixels of the map) or 'active', not {self.mean!r}")


class Selection:
    """One mask per resolution and image, and the kernel maps between them, shared by all layers of a pass.

    It travels with the features, so that recomputation in a backward pass sees the same masks.

    Attributes:
        everything: whether it is of a part of a frozen network that no mask guides: see `Everything`.
        live_layers: paths of the convolutions whose results are read through a mask that takes gradient; elsewhere it
            is a constant. `None`: it takes gradient everywhere.
        soft: whether reads are multiplied by probabilities, so that the numbers depend on the mask's gradient being on.

    Args:
        levels: where the masks come from.
        batch, size, device: of the map at the stage.
        observers: who is told of the pass.
        owner: the selector whose pass it is.
        live: whether masks take gradient, for which the dense storage is needed.
    """

    everything = False
    live_layers: frozenset[str] | None = None
    soft = False

    def __init__(
        self,
        levels: Levels,
        batch: int,
        size: Pair,
        device: torch.device,
        options: Options,
        observers: tuple[Observer, ...] = (),
        owner: nn.Module | None = None,
        live: bool = False,
    ):
        self.levels = levels
        self.batch = batch
        self.size = size
        self.device = device
        self.options = options
        self.observers = observers
        self.owner = owner
        self.live = live
        self.dense_storage = live or options.backend == "reference"
        self.followed = options.reenter or any(observer.follows for observer in observers)
        self._sites: dict[Pair, ActiveSites] = {}
        self._everywhere: dict[Pair, ActiveSites] = {}
        self._gates: dict[Pair, Tensor | None] = {}
        self._maps: dict[tuple[Pair, bool, Reading, Pair], KernelMap] = {}
        for observer in observers:
            observer.selected(self)

    @property
    def sizes(self) -> list[Pair]:
        """The entry's size and every size that the pass has met since."""
        return list(dict.fromkeys([self.size, *self._sites]))

    def sites(self, size: Pair) -> ActiveSites:
        if size not in self._sites:
            self._sites[size] = ActiveSites(self.levels.mask(size))
        return self._sites[size]

    def everywhere(self, size: Pair) -> ActiveSites:
        """All pixels of a resolution: what full features have."""
        if size not in self._everywhere:
            self._everywhere[size] = ActiveSites.all(self.batch, size, self.device)
        return self._everywhere[size]

    def mask(self, size: Pair) -> Tensor:
        """Active pixels: bool (N, 1, *size)."""
        return self.sites(size).mask[:, None]

    def live_behind(self, path: str) -> bool:
        """Whether what a convolution gives is read through a mask that takes gradient."""
        return self.live_layers is None or path in self.live_layers

    def gate(self, size: Pair) -> Tensor | None:
        """The mask as numbers with its gradient, (N, 1, *size), or `None`: see `Levels.gate`."""
        if not (torch.is_grad_enabled() or self.soft):
            return None
        if size not in self._gates:
            with torch.enable_grad(), kept_from_checkpoints():
                self._gates[size] = self.levels.gate(size)
        return self._gates[size]

    def kernel_map(self, size: Pair, full: bool, window: Reading, out_size: Pair) -> KernelMap:
        """From the features of one size (all pixels if `full`) to the active sites of another."""
        key = (size, full, window, out_size)
        if key not in self._maps:
            source = self.everywhere(size) if full else self.sites(size)
            self._maps[key] = kernel_map(source, window, self.sites(out_size))
        return self._maps[key]

    def report(self, operation: Operation) -> None:
        for observer in self.observers:
            observer.operation(operation)

    @contextmanager
    def reporting(self, operation: Callable[[], Operation]) -> Iterator[None]:
        """Around a guided operation that counts its own multiply-accumulates, which are reported after it."""
        if not self.observers:
            yield
            return
        with ExitStack() as uncounted:
            for observer in self.observers:
                uncounted.enter_context(observer.uncounted())
            yield
            found = operation()
        self.report(found)


class Everything(Selection):
    """All pixels of every map: in a frozen network, the selection of what runs before the stage, or behind an exit.

    Its features are in the dense storage, and ordinary maps to whatever else they meet.
    """

    everything = True

    def __init__(self, batch: int, device: torch.device, observers: tuple[Observer, ...] = ()):
        super().__init__(_AllPixels(batch, device), batch, (0, 0), device, Options("reference"))
        self.observers = observers

    def sites(self, size: Pair) -> ActiveSites:
        return self.everywhere(size)

    def report(self, operation: Operation) -> None:
        if operation.macs:
            super().report(replace(operation, status="dense"))


@dataclass(frozen=True)
class _AllPixels:
    """The levels of `Everything`."""

    batch: int
    device: torch.device

    def mask(self, size: Pair) -> Tensor:
        return ActiveSites.all(self.batch, size, self.device).mask

    def gate(self, size: Pair) -> Tensor | None:
        return None

    def saliency(self, size: Pair) -> Tensor | None:
        return None


@contextmanager
def kept_from_checkpoints() -> Iterator[None]:
    """What is computed inside and cached stays out of activation checkpointing: its saved tensors are kept as
    they are, for a recomputation that finds the cache filled would not save them a second time, which
    `torch.utils.checkpoint` takes for an error."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield
