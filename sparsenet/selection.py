"""A selection: the active sites of every resolution, for one call of the embed stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsenet.atlas import Atlas, Route, route
from sparsenet.kernels import queue
from sparsenet.sites import ActiveSites, KernelMap, Pair, Reading, Window


class Levels(Protocol):
    """Where the masks of a selection come from: functions of the size alone, so that all operations of one size
    agree whatever produces it first."""

    def mask(self, size: Pair) -> Tensor:
        """Active pixels: bool (N, *size)."""

    def count(self, size: Pair) -> int | None:
        """How many pixels of each image are active, where that follows from the size; `None` where the mask tells."""

    def gate(self, size: Pair) -> Tensor | None:
        """The mask as numbers (N, 1, *size) with a straight-through gradient, or `None` where it takes none."""

    def saliency(self, size: Pair) -> Tensor | None:
        """The probabilities behind the mask, (N, *size), or `None` where none were predicted."""


@dataclass(frozen=True)
class Operation:
    """One operation as it met guided features.

    `status` is "guided", "dense" (a frozen layer that no mask guides), "reduction" (over space: the result is an
    ordinary tensor by nature), "exit" (the features became an ordinary tensor, for `reason`), "reentry" (an ordinary
    map took up its sites again), "wait" (for the device, to learn how many pixels of a size are active that no pass had
    met) or "output" (the model gave the features to its caller, as an ordinary tensor). MACs are of the whole batch:
    `macs` as computed at active pixels, `dense_macs` as the original would compute them.
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
        capacity: the share of the pixels of each size that is active in each image, or `None` for as many as matter.
    """

    backend: str = "auto"
    strict: bool = False
    reenter: bool = False
    mean: str = "all"
    capacity: float | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None and not 0 < self.capacity <= 1:
            raise ValueError(
                f"capacity must be a share of the pixels, above 0 and 1 at most, not {self.capacity!r}: 0.3 keeps the "
                "strongest 30 % of each image, None as many as matter"
            )
        if self.mean not in ("all", "active"):
            raise ValueError(f"mean must be 'all' (pixels of the map) or 'active', not {self.mean!r}")


ITSELF = Window((1, 1))
"""Of a pixel that reads its own place."""


class Selection:
    """One mask per resolution and image, and the kernel maps between them, shared by all layers of a pass.

    It travels with the features, so that recomputation in a backward pass sees the same masks.

    Attributes:
        everything: whether it is of a part of a frozen network that no mask guides: see `Everything`.
        live_layers: paths of the convolutions whose results are read through a mask that takes gradient; elsewhere it
            is a constant. `None`: it takes gradient everywhere.
        asked: the routes whose kernel maps the pass has asked for, and whether each had to be found then.
        soft: whether reads are multiplied by probabilities, so that the numbers depend on the mask's gradient being on.

    Args:
        levels: where the masks come from.
        batch, size, device: of the map at the stage.
        observers: who is told of the pass.
        owner: the selector whose pass it is.
        live: whether masks take gradient, for which the dense storage is needed.
        counted: whether sites are made of their number, which is known of a capacity, and is otherwise asked of the
            device for all sizes at once; by default wherever waiting for a mask costs something, which is not on CPU.
        met: the sizes that earlier passes of this size have met, counted at the entry; new ones are added.
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
        counted: bool | None = None,
        met: dict[Pair, None] | None = None,
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
        self.counted = counted if counted is not None else device.type != "cpu" or torch.compiler.is_compiling()
        self.met = {} if met is None else met
        self._known: dict[Pair, ActiveSites] = {}
        self._sites: dict[Pair, ActiveSites] = {}  # what the pass has met of them
        self._everywhere: dict[Pair, ActiveSites] = {}
        self._gates: dict[Pair, Tensor | None] = {}
        self.asked: dict[Route, bool] = {}
        self._maps: dict[Route, Any] = {}
        self._queue = queue.current()
        for observer in observers:
            observer.selected(self)

    @property
    def sizes(self) -> list[Pair]:
        """The entry's size and every size that the pass has met since."""
        return list(dict.fromkeys([self.size, *self._sites]))

    @property
    def waits(self) -> bool:
        """Whether kernels may wait in the current queue: not in a thread that the model has begun itself."""
        return self._queue is queue.current()

    @property
    def queues(self) -> bool:
        """Whether the pass is a frozen model's on CPU, which nobody watches, and kernels may wait in its queue."""
        return self._queue is not None and self.waits and not self.observers and self.device.type == "cpu"

    def finish(self) -> None:
        """Run what waits."""
        if self._queue is not None:
            self._queue.run()

    def sites(self, size: Pair) -> ActiveSites:
        found = self._sites.get(size)
        if found is None:
            waits = self.counted and size not in self._known and self.levels.count(size) is None
            if waits and not self.dense_storage:
                reason = "no pass had met the size, so that its active pixels were not counted at the entry"
                self.report(Operation("mask", "wait", size, reason=reason))
            found = self._sites[size] = self.peek(size)
            self.met[size] = None
        return found

    def peek(self, size: Pair) -> ActiveSites:
        """The sites of a size, which do not count as met by that."""
        if size not in self._known:
            self.prepare([size])
        return self._known[size]

    def prepare(self, sizes: Iterable[Pair]) -> None:
        """Find the sites of these sizes. Where they are to be counted, the device is waited for once at most."""
        masks = {size: self.levels.mask(size) for size in sizes}
        counts: dict[Pair, list[int]] = {}
        if self.counted:
            known = {size: self.levels.count(size) for size in masks}
            counts |= {size: [count] * self.batch for size, count in known.items() if count is not None}
            unknown = [size for size in masks if size not in counts]
            if unknown and not self.dense_storage:  # which has all pixels, however many are active
                each = torch.stack([masks[size].flatten(1).sum(1) for size in unknown])
                counts |= zip(unknown, each.tolist(), strict=True)  # here it waits
        self._known |= {size: ActiveSites(mask, counts.get(size)) for size, mask in masks.items()}

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

    def along(self, route: Route) -> Any:
        """The kernel map, or the tiles, of a route."""
        found = self._maps.get(route)
        if found is None:
            found = self._maps[route] = route.of(self)
            self.asked[route] = True
        elif route not in self.asked:
            self.asked[route] = False
        return found

    def kernel_map(self, size: Pair, full: bool, window: Reading, out_size: Pair) -> KernelMap:
        """From the features of one size (all pixels if `full`) to the active sites of another."""
        found: KernelMap = self.along(route(size, full, window, out_size))
        return found

    def spread(self, size: Pair) -> Tensor:
        """The row of each pixel, or their number where it is inactive: int32 (N * H * W, 1)."""
        table: Tensor = self.along(route(size, False, ITSELF, size, spread=True)).table
        return table

    def find(self, atlas: Atlas) -> None:
        """Find what is likely to be asked for: between layers it takes Python longer."""
        masks = [self._known[size].mask if size in self._known else self.levels.mask(size) for size in atlas.sizes]
        sites, maps = atlas.found(masks)
        self._known |= zip(atlas.sizes, sites, strict=True)
        self._maps |= maps

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

    def count(self, size: Pair) -> int | None:
        return size[0] * size[1]

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
