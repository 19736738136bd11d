"""What is written for a device, where the CPU stands in for one: frozen networks on Triton's kernels, recorded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sparsenet
from sparsenet import backends
from sparsenet.backends import spconv, triton
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import OnDevice, Reads, Spec
from sparsenet.cuda_graph import GraphedCall
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.frozen_modules import FrozenConv2d
from sparsenet.kernels import triton_support
from sparsenet.sites import KernelMap
from tests.gpu import pretend
from tests.models import Branches, selective_branches

pytestmark = [
    pytest.mark.skipif(not triton_support.interpreted(), reason="needs Triton's interpreter"),
    pytest.mark.skipif(triton_support.missing() is not None, reason=str(triton_support.missing())),
]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.stand_in(monkeypatch.setattr)


def images(batch: int = 2, size: int = 20) -> Tensor:
    return torch.rand(batch, 3, size, size)


def assert_exact(frozen: Any, model: Any, x: Tensor) -> None:
    """As the masked dense network in double precision has it, to the rounding of single precision."""
    with torch.no_grad():
        found = frozen(x)
        with sparsenet.use_backend("reference"):
            truth, single = copy.deepcopy(model).double()(x.double()), model(x)
    allowed = 4 * max((single.double() - truth).abs().max(), 2**-23 * truth.abs().max())
    assert (found.double() - truth).abs().max() <= allowed
    with torch.no_grad():
        assert torch.equal(found, frozen(x))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_recorded_network_waits_for_nothing_and_is_exact(backend: str) -> None:
    model = selective_branches(0.3, torch.float32)
    frozen = sparsenet.freeze(model, images(), backend=backend, cuda_graph=True)
    assert isinstance(frozen._compiled_call_impl, GraphedCall)
    layers = [module.layer for module in frozen.modules() if isinstance(module, FrozenConv2d)]
    if backend == "triton":
        assert {layer.chosen["guided"] for layer in layers} == {"triton"}
    assert all(layer._candidates["everything"][0] == "triton" for layer in layers)
    for batch, size in [(2, 20), (1, 20), (2, 31)]:
        assert_exact(frozen, model, images(batch, size))
    for mask in (torch.rand(2, 5, 5) < 0.3, torch.zeros(2, 5, 5, dtype=torch.bool)):
        with sparsenet.use_mask(mask):
            assert_exact(frozen, model, images())


def test_a_recording_holds_what_its_layers_packed() -> None:
    """A later pass may pack weights anew; what a recording reads must stay where it is."""
    weight, scale, rows = torch.rand(4, 3, 3, 3), torch.rand(4), torch.rand(12, 3)
    spec = Spec((1, 1), (1, 1), (1, 1), 1)
    layer = FrozenLayer("conv", weight, spec, {"guided": ["triton"], "everything": ["dense"]}, None)
    reads = Reads(rows, None, 12, 12, 1, (3, 4), (3, 4), True)
    found = layer.run(reads, Epilogue(scale=scale))
    wanted = torch.nn.functional.conv2d(rows.view(1, 3, 4, 3).permute(0, 3, 1, 2), weight, padding=1)
    torch.testing.assert_close(found, (wanted * scale[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2))
    (way,) = layer._chosen.values()
    assert isinstance(way, OnDevice) and way._packed is not None
    held, packed = layer.kept(), way._packed[2]
    way._packed = None
    assert any(leaf is packed for leaf in tree_leaves(held))


def test_spconv_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel map, as the arguments that its implicit gemm takes, computed from them by that one's definition."""
    signature = inspect.signature(pytest.importorskip("spconv.pytorch").ops.implicit_gemm)

    def implicit_gemm(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        rows, filters, pairs = given["features"], given["filters"], given["pair_fwd"]
        (bits,), (order,) = given["pair_mask_fwd_splits"], given["mask_argsort_fwd_splits"]
        assert not given["is_train"] and not given["is_subm"] and given["fp32_accum"]
        assert bits.shape == (given["num_activate_out"], 1) and sorted(order.tolist()) == list(range(len(bits)))
        found = (bits >> torch.arange(pairs.shape[0])) & 1 > 0  # (n_out, taps)
        read = torch.where(found[:, :, None], rows[pairs.T.clamp(min=0).long()], 0)
        return torch.einsum("stc,otc->so", read, filters.flatten(1, 2)), None, None

    library = SimpleNamespace(ops=SimpleNamespace(implicit_gemm=implicit_gemm), constants=SimpleNamespace())
    monkeypatch.setattr(spconv, "load", lambda: library)
    rows, weight, bias = torch.rand(9, 3), torch.rand(4, 3, 3, 3), torch.rand(4)
    rows[7:] = 0
    kernel_map = KernelMap(torch.randint(0, 9, (5, 9), dtype=torch.int32), 7)
    with torch.no_grad():
        found = spconv.convolve(rows, weight, bias, 1, kernel_map)
    wanted = torch.einsum("stc,oct->so", rows[kernel_map.table.long()], weight.flatten(2)) + bias
    torch.testing.assert_close(found, wanted)
    assert library.constants.SPCONV_ALLOW_TF32 is (torch.get_float32_matmul_precision() != "highest")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_spconv_cannot_compute_on_a_device_falls_back_with_a_reason(dtype: torch.dtype) -> None:
    reason = f"spconv: spconv has no {dtype} on GPUs"
    assert backends.choose("spconv", torch.empty(4, 4, 3, 3, dtype=dtype), 1) == ("rows", reason)


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x.sum()),
    "a condition": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: x * len(x.flatten().nonzero()),
    "a mask as index": lambda x: x * x[x > 0].sum(),
    "tolist": lambda x: x * x.flatten().tolist()[0],
    "cpu": lambda x: x * x.cpu().sum(),
    "numbers of the program": lambda x: x * torch.tensor([2.0]),
}


@pytest.mark.parametrize("waiting", WAITING.values(), ids=WAITING.keys())
def test_what_could_not_be_recorded_is_seen(waiting: Callable[[Tensor], Any]) -> None:
    class Waiting(Branches):
        def forward(self, x: Tensor) -> Any:
            return waiting(super().forward(x))

    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        sparsenet.freeze(Waiting().eval(), images(), cuda_graph=True)


def test_what_would_be_tuned_is_seen() -> None:
    rows, table = torch.rand(6, 23), torch.zeros(3, 2, dtype=torch.int32)  # of no other test
    weight, kernel_map = torch.rand(29, 23, 1, 2), KernelMap(table, 4)
    with torch.no_grad():
        with pretend.recording(), pytest.raises(RuntimeError, match="would be tuned while"):
            triton.convolve(rows, weight, None, 1, kernel_map)
        expected = triton.convolve(rows, weight, None, 1, kernel_map)
        with pretend.recording():
            found = triton.convolve(rows, weight, None, 1, kernel_map)
        assert torch.equal(found, expected)
