"""What is written for a device, where the CPU stands in for one: frozen networks on Triton's kernels, recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sparsenet
from sparsenet.backends import triton
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
