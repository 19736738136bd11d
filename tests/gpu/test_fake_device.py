"""What Python does for a CUDA device, on tensors that are there in name only: PyTorch's fake ones know their shapes and
devices and refuse what their numbers would tell. Kernels are not run; where the CPU stands in for a device
(`test_pretend.py`), nothing is on two devices."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsenet
from sparsenet import bench, constants, coverage, engines, frozen_layer
from sparsenet.backends.choice import Measurements
from sparsenet.cuda_graph import GraphedCall
from sparsenet.freeze import record_calls
from sparsenet.frozen_modules import FrozenConv2d
from sparsenet.kernels import triton_support
from sparsenet.timing import by_processor
from tests.models import Branches, selective_branches

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, whose tables would be kept as fakes"),
    pytest.mark.skipif(not triton_support.interpreted(), reason="launches are seen in Triton's interpreter"),
    pytest.mark.skipif(triton_support.missing() is not None, reason=str(triton_support.missing())),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


class OneDevice(TorchDispatchMode):
    """Raises for what reads the program's memory while a graph is recorded: single numbers may go along, as arguments
    of kernels, but not whole tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in (*tree_leaves((args, kwargs)), *tree_leaves(result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda" and tensor.dim():
                raise RuntimeError(f"{func} of a tensor on {tensor.device}")
        return result


class Recording:
    """A graph whose recording may neither wait nor leave the device."""

    def capture(self, call: Callable[[], Any]) -> Any:
        call()
        with OneDevice():
            return call()

    def replay(self) -> None: ...


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fake tensors on "cuda" inside; gives the kernels that would have run."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    found: list[str] = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        assert {arg.device.type for arg in args if isinstance(arg, Tensor)} == {"cuda"}
        found.append(self.fn.__name__)

    freezing: Any = importlib.import_module("sparsenet.freeze")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(frozen_layer, "clock_of", lambda device: by_processor)
    monkeypatch.setattr(freezing.choice, "of_this_machine", lambda device: Measurements(None))
    monkeypatch.setattr(constants, "_disable_current_modes", contextlib.nullcontext)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield found


def on_device(model: Any) -> Any:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cuda"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return model


def images(batch: int = 2, size: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, 3, size, size, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_recorded_network_keeps_to_its_device(launches: list[str], dtype: torch.dtype) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = selective_branches(0.3, dtype)
        for size in (20, 26):  # by which PyTorch's weights of resizing are known, from the numbers of real tensors
            model(torch.rand(1, 3, size, size, dtype=dtype))
    model = on_device(model)
    assert model(images(dtype=dtype)).device.type == "cuda"
    frozen = sparsenet.freeze(model, images(dtype=dtype))
    device = next(model.parameters()).device
    record_calls(frozen, GraphedCall(frozen, device, list, (None, "reference"), Recording))
    for backend in (None, "reference"):
        frozen._compiled_call_impl.backends = (backend,)
        for batch, size in [(2, 20), (1, 26)]:
            assert frozen(images(batch, size, dtype)).shape == (batch, 5)
        with sparsenet.use_mask(torch.zeros(2, 5, 5, dtype=torch.bool, device="cuda")):
            assert frozen(images(dtype=dtype)).shape == (2, 5)
        frozen._compiled_call_impl._captured.clear()
    assert {"product", "by_channel", "pooled", "looked_up"} <= set(launches)


def test_the_network_that_is_measured_keeps_to_its_device(launches: list[str]) -> None:
    """SSD300 in half precision, by its own rules and as masked dense convolutions."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        network, example = bench.network_of(coverage.named("ssd300_vgg16").eval(), None, 1)
        selector = sparsenet.GivenMask()
        model = sparsenet.selectify(network, "pool2", selector=selector, example_inputs=example, capacity=0.2).half()
    model, x = on_device(model), images(32, 300, torch.float16)
    mask = torch.zeros(32, 75, 75, dtype=torch.bool, device="cuda")
    with sparsenet.use_mask(mask):
        frozen = sparsenet.freeze(model, x)
        guided = {module.layer.chosen["guided"] for module in frozen.modules() if isinstance(module, FrozenConv2d)}
        assert guided <= {"triton", "rows"}  # whichever took less of no time
        record_calls(frozen, GraphedCall(frozen, x.device, list, (None,), Recording))
        assert {tensor.shape[:2] for tensor in engines.tensors(frozen(x))} == {(32, 8732)}
        record_calls(frozen, GraphedCall(frozen, x.device, list, ("reference",), Recording))
        assert {tensor.shape[:2] for tensor in engines.tensors(frozen(x))} == {(32, 8732)}


def test_what_leaves_the_device_is_seen(launches: list[str]) -> None:
    class Leaving(Branches):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * torch.ones(5).to(x.device)

    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = Leaving().eval()
    frozen = sparsenet.freeze(on_device(model), images())
    record_calls(frozen, GraphedCall(frozen, images().device, list, graph=Recording))
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph.*of a tensor on cpu"):
        frozen(images())


def test_what_waits_is_seen(launches: list[str]) -> None:
    class Waiting(Branches):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * float(x.sum())

    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = Waiting().eval()
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        sparsenet.freeze(on_device(model), images())
