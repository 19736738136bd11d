"""A frozen model as CUDA graphs: one for each form of its inputs, recorded once and replayed.

A pass of fixed shapes is hundreds of small kernels, which Python takes longer to ask for than the device to run. A CUDA
graph asks for all of them at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from sparsenet import constants, context
from sparsenet.hooks import frame_of
from sparsenet.regions import Regions
from sparsenet.selector.selector import check_capacity
from sparsenet.timing import alternate, clock_of

# Graphs that are kept, each with memory of its own: the one used longest ago goes.
MOST_GRAPHS = 8

# Passes before a recording: caches are filled, and libraries have chosen their ways.
WARMUP = 3


class Graph(Protocol):
    """A recording of device work."""

    def capture(self, call: Callable[[], Any]) -> Any:
        """Record what a call does, after warming up; its result, which every replay writes to again."""

    def replay(self) -> None: ...


class CudaGraph:
    """`torch.cuda.CUDAGraph`, warmed up on a stream of its own, as PyTorch asks for."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, call: Callable[[], Any]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                call()
        before = torch.cuda.current_stream()
        before.wait_stream(side)
        try:
            # "thread_local", so that other threads, which load images, may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                return call()
        except RuntimeError:
            torch.cuda.set_stream(before)
            _close_recording()
            raise

    def replay(self) -> None:
        self._graph.replay()


def _close_recording() -> None:
    """After a recording that failed, PyTorch 2.11 takes the device's random numbers as still being recorded, so that
    every later draw would raise. One that succeeds ends that."""
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros((), device="cuda")


@dataclass(eq=False)
class _Captured:
    """A recording, and the memory that it reads and writes."""

    graph: Graph
    backend: str | None
    inputs: list[Tensor]
    outputs: Any
    held: Any  # whatever else lies where the recording reads it


class GraphedCall:
    """In place of a frozen model's call: replays the recording for inputs of this form, made at the first such call.

    Inputs are copied to the recording's own memory, results are copies of what it wrote. A mask of `use_mask` is an
    input too. A pass that is watched (`record`, `profile`), or that is to run in another way (`use_backend`), runs as
    the model is written. One call at a time.

    Where there are several `backends`, each form of inputs is recorded by all of them, and the fastest is kept: masked
    dense convolutions ("reference") are exact too, and what wins where a mask saves little.

    Args:
        module: the frozen model.
        device: of its weights.
        held: gives what the module's layers keep for the next pass, and may drop.
        backends: as for `use_backend`, `None` for the model's own.
        graph: makes a recording; another one than CUDA's for tests without a device.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        held: Callable[[], Any],
        backends: Sequence[str | None] = (None,),
        graph: Callable[[], Graph] = CudaGraph,
    ):
        self.module = module
        self.device = device
        self._held = held
        self.backends = backends
        self._graph = graph
        self._captured: dict[Hashable, _Captured] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        settings = context.current()
        if settings.observers or settings.backend or settings.supervision or settings.stop_at:
            return self.module._call_impl(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        self._check(leaves)
        mask = None if settings.regions is None else self._mask(settings.regions, args, kwargs)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + ([] if mask is None else [mask])
        key = (spec, mask is not None, *map(_form, leaves), *([] if mask is None else [_form(mask)]))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            captured = self._captured.pop(key, None)
            if captured is None:
                captured = self._fastest(leaves, spec, mask)
            self._captured[key] = captured  # the last used at the end
            while len(self._captured) > MOST_GRAPHS:
                del self._captured[next(iter(self._captured))]
            for own, tensor in zip(captured.inputs, given, strict=True):
                own.copy_(tensor)
            captured.graph.replay()
            return tree_map_only(Tensor, Tensor.clone, captured.outputs)

    def _check(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self.device:
                    raise ValueError(
                        f"an input is on {leaf.device}, but the frozen model's weights are on {self.device}: move it "
                        f"there, by .to({str(self.device)!r})"
                    )
                if torch.is_grad_enabled() and leaf.requires_grad:
                    raise RuntimeError(
                        "a frozen model computes no gradients: call it under torch.no_grad(), or use the model that it "
                        "was made from"
                    )
            elif not isinstance(leaf, Hashable):
                raise TypeError(
                    f"a CUDA graph is for arguments of one form, and {type(leaf).__name__} cannot be compared: call "
                    "the model with tensors and plain values, or freeze it without cuda_graph"
                )

    def _mask(self, regions: Regions, args: Any, kwargs: Any) -> Tensor:
        """The mask of the whole batch, bool (N, H, W): of boxes it has one form, however many they are."""
        frame = frame_of([*args, *kwargs.values()])
        return regions.entry_mask(frame, len(regions) if frame is None else len(frame.placed), self.device)

    def _fastest(self, leaves: list[Any], spec: Any, mask: Tensor | None) -> _Captured:
        """A recording, the fastest of those by all backends."""
        found = {str(backend): self._record(leaves, spec, mask, backend) for backend in self.backends}
        if len(found) > 1:
            replays = {name: captured.graph.replay for name, captured in found.items()}
            seconds = alternate(replays, clock=clock_of(self.device))
            return found[min(seconds, key=lambda name: median(seconds[name]))]
        return next(iter(found.values()))

    def _record(self, leaves: list[Any], spec: Any, mask: Tensor | None, backend: str | None) -> _Captured:
        own = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        own_mask = None if mask is None else mask.clone()
        regions = None if own_mask is None else Regions(masks=list(own_mask))
        args, kwargs = tree_unflatten(own, spec)

        def call() -> Any:
            with context.setting(regions=regions, backend=backend):
                return self.module._call_impl(*args, **kwargs)

        graph = self._graph()
        try:
            with constants.held() as held:
                outputs = graph.capture(call)
        except RuntimeError as error:
            raise RuntimeError(
                f"the model cannot be recorded as a CUDA graph ({error}): something in it waits for the device or has "
                "no fixed shape, as a detector's post-processing. Freeze the network before that, or without cuda_graph"
            ) from error
        inputs = [tensor for tensor in own if isinstance(tensor, Tensor)] + ([] if own_mask is None else [own_mask])
        return _Captured(graph, backend, inputs, outputs, (held, self._held()))


def _form(leaf: Any) -> Hashable:
    """What a recording is for: of a tensor its shape and how it lies, of anything else its value."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def check_graph(model: nn.Module) -> torch.device:
    """The device of a model that can be recorded.

    Raises:
        ValueError: where there is no CUDA device, where the weights are not on one, and for a selective model whose
            shapes follow from its mask.
    """
    check_capacity(model, "cuda_graph=True needs shapes that the mask does not decide")
    if not torch.cuda.is_available():
        raise ValueError("cuda_graph=True needs a CUDA device, and PyTorch finds none here: freeze without it")
    return one_device(model)


def one_device(model: nn.Module) -> torch.device:
    """The CUDA device that all parameters and buffers are on.

    Raises:
        ValueError: where they are on several, or on none.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(f"cuda_graph=True needs all weights on one CUDA device, and they are on {found}: model.cuda()")
    return next(iter(devices))
