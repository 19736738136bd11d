"""A CPU in the place of a CUDA device: Python does what it does for one, and Triton's interpreter runs the kernels.

    python tests/gpu/pretend.py -m sparsenet.cli bench timm:test_resnet --device cuda …

So that what was written for a device has run, end to end and to the right numbers, before there is one; how long it
takes says nothing. A recording of a CUDA graph is the call itself, and raises for whatever could not be recorded: what
waits for the device, takes numbers from the program's memory or would be tuned.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sparsenet import bench, cuda_graph, device_sweep, frozen_layer, sites
from sparsenet.backends import choice, spconv, ways
from sparsenet.kernels import machine
from sparsenet.selector import Selector

freezing = importlib.import_module("sparsenet.freeze")  # which the function hides

CPU = torch.device("cpu")

# What gives the program numbers of tensors, or shapes that follow from them.
WAITING = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
# What copies numbers of the program to a device, from memory that no recording could read again.
GIVEN = {"lift_fresh"}
# Methods that pass no dispatch on CPU.
TRANSFERS = ("tolist", "numpy", "cpu")


class Recorded(TorchDispatchMode):
    """Raises where a recording on a device would fail, or would repeat what it should compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple):
            masks = [each for each in args[1] if isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)]
            name = "nonzero" if masks else name
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            name = "nonzero"
        if name in WAITING | GIVEN:
            raise RuntimeError(f"{func} while a CUDA graph is recorded")
        return func(*args, **kwargs or {})


_recording = False


@contextmanager
def recording() -> Iterator[None]:
    """Inside, what could not be recorded raises RuntimeError."""
    global _recording
    with Recorded():
        _recording = True
        try:
            yield
        finally:
            _recording = False


class Graph:
    """In place of `sparsenet.cuda_graph.CudaGraph`: each replay is the call again, to the same results."""

    def capture(self, call: Callable[[], Any]) -> Any:
        for _ in range(cuda_graph.WARMUP):
            call()
        with recording():
            outputs = call()
        self.call, self.outputs = call, outputs
        with torch.inference_mode():  # of which the outputs may be
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor):
                    output.fill_(float("nan"))  # what is recorded has not run yet
        return outputs

    def replay(self) -> None:
        found = self.call()
        with torch.inference_mode():
            for old, new in zip(tree_leaves(self.outputs), tree_leaves(found), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def stand_in(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let the CPU pass for a CUDA device from here on."""
    triton_index = importlib.import_module("sparsenet.kernels.triton_index")
    patch(Tensor, "is_cuda", property(lambda self: True))
    patch(machine, "unsupported", lambda: "the CPU stands in for a device")
    patch(sites, "_on", lambda device: None if torch.compiler.is_compiling() else triton_index)
    patch(Selector, "counted", True)
    patch(frozen_layer, "Dense", ways.OnDevice)
    patch(spconv, "load", _no_spconv)
    for module in (bench, device_sweep):
        patch(module, "device_of", lambda device, dtype: CPU)
    patch(freezing, "check_graph", lambda model: CPU)
    patch(cuda_graph.CudaGraph, "__init__", lambda self: None)
    patch(cuda_graph.CudaGraph, "capture", Graph.capture)
    patch(cuda_graph.CudaGraph, "replay", Graph.replay)
    patch(device_sweep, "recordable", lambda device: True)
    for module in (choice, cuda_graph):  # of what is slow, and tells nothing
        patch(module, "alternate", _once)
    for name in TRANSFERS:
        patch(Tensor, name, _watched(getattr(Tensor, name), name))
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch(interpreter.GridExecutor, "__call__", _launch(interpreter.GridExecutor.__call__))
    tuner = importlib.import_module("triton.runtime.autotuner")
    patch(tuner.Autotuner, "run", _tuned_before(tuner.Autotuner.run))


def _no_spconv() -> None:
    raise ImportError("spconv computes on devices alone here")


def _once(functions: dict[str, Callable[[], Any]], **options: Any) -> dict[str, list[float]]:
    from sparsenet.timing import by_processor

    return {name: [by_processor(function)] for name, function in functions.items()}


def _watched(method: Any, name: str) -> Any:
    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _recording:
            raise RuntimeError(f"Tensor.{name} while a CUDA graph is recorded")
        return method(self, *args, **kwargs)

    return watched


def _launch(call: Any) -> Any:
    """The interpreter's own transfers are none of a device's."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        global _recording
        before, _recording = _recording, False
        try:
            with _disable_current_modes():
                return call(*args, **kwargs)
        finally:
            _recording = before

    return launch


def _tuned_before(run: Any) -> Any:
    """A kernel that is launched while a graph is recorded must have been tuned for its key, as Triton makes it."""
    known: set[Any] = set()

    def tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        dtypes = [str(given[name].dtype) for name in self.arg_names if hasattr(given.get(name), "dtype")]
        key = (self.base_fn.__name__, *(given[name] for name in self.keys if name in given), *dtypes)
        if _recording and key not in known:
            raise RuntimeError(f"{key} would be tuned while a CUDA graph is recorded")
        known.add(key)
        return run(self, *args, **kwargs)

    return tuned


def main(words: list[str]) -> None:
    stand_in()
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
