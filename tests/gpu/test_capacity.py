"""Capacity, the one wait of a threshold, CUDA graphs and compiled graphs, on the device itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsenet
from sparsenet.cuda_graph import GraphedCall
from sparsenet.engines import cudnn, cudnn_graph
from tests.models import Branches, selective_branches

pytestmark = pytest.mark.cuda


def images(batch: int = 2, size: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(batch, 3, size, size, dtype=dtype, device="cuda")


def on_device(capacity: float | None = 0.3, dtype: torch.dtype = torch.float64) -> Any:
    return selective_branches(capacity, dtype).cuda()


@pytest.mark.parametrize("capacity", [0.05, 0.3, 1.0, None])
def test_rows_equal_the_reference(capacity: float | None) -> None:
    model = on_device(capacity)
    with torch.no_grad():
        for size in (20, 33):
            x = images(size=size)
            with sparsenet.use_backend("reference"):
                expected = model(x)
            with sparsenet.use_backend("rows"):
                torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_the_masks_are_those_of_the_processor() -> None:
    mask = torch.rand(2, 7, 9) < 0.4
    found = []
    for device in ("cpu", "cuda"):
        model = selective_branches().to(device)
        with torch.no_grad(), sparsenet.use_mask(mask), sparsenet.record(model) as rec:
            model(torch.rand(2, 3, 20, 20, dtype=torch.float64, device=device))
        found.append({size: each.cpu() for size, each in rec.masks.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(each, found[1][size]) for size, each in found[0].items())


def waits(model: Any, x: Tensor) -> int:
    """How often PyTorch itself says that a pass waits for the device."""
    with torch.no_grad():
        model(x)  # caches are filled
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def test_a_capacity_never_waits_and_a_threshold_waits_once() -> None:
    assert waits(on_device(), images()) == 0
    assert waits(on_device(None), images()) == 1


def test_a_recorded_model_equals_one_that_is_not() -> None:
    model = on_device(dtype=torch.float32)
    frozen = sparsenet.freeze(model, images(dtype=torch.float32), cuda_graph=True)
    assert isinstance(frozen._compiled_call_impl, GraphedCall)
    with torch.no_grad():
        for batch, size in [(2, 20), (1, 20), (2, 31), (2, 20)]:
            x = images(batch, size, torch.float32)
            first, second = frozen(x), frozen(x)
            assert torch.equal(first, second)
            torch.testing.assert_close(first, model(x), rtol=1e-3, atol=1e-4)
        for seed in range(3):
            torch.manual_seed(seed)
            with sparsenet.use_mask(torch.rand(2, 5, 5) < 0.3):
                x = images(dtype=torch.float32)
                torch.testing.assert_close(frozen(x), model(x), rtol=1e-3, atol=1e-4)


def test_recordings_survive_what_other_passes_drop() -> None:
    """Tables that are kept for the last sizes only are held by the recordings that read them."""
    model = on_device(dtype=torch.float32)
    frozen = sparsenet.freeze(model, images(dtype=torch.float32), cuda_graph=True)
    x = images(dtype=torch.float32)
    with torch.no_grad():
        expected = frozen(x)
        for size in range(21, 60):
            model(images(1, size, torch.float32))
        torch.cuda.empty_cache()
        filler = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(64)]
        assert torch.equal(frozen(x), expected)
        del filler


def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    class Waiting(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum())

    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        sparsenet.freeze(Waiting().cuda(), images(dtype=torch.float32), cuda_graph=True)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(4, device="cuda").unique().numel() == 4  # random numbers are there as before


def test_tensors_on_two_devices() -> None:
    model = selective_branches(dtype=torch.float32)
    with pytest.raises(ValueError, match="weights on one CUDA device, and they are on cpu"):
        sparsenet.freeze(model, torch.rand(2, 3, 20, 20), cuda_graph=True)
    frozen = sparsenet.freeze(model.cuda(), images(dtype=torch.float32), cuda_graph=True)
    with torch.no_grad(), pytest.raises(ValueError, match="an input is on cpu, but the frozen model's weights are on"):
        frozen(torch.rand(2, 3, 20, 20))


def test_compiled_whole() -> None:
    model = on_device(dtype=torch.float32)
    compiled = torch.compile(sparsenet.traced(model, images(dtype=torch.float32)), fullgraph=True)
    with torch.no_grad():
        x = images(dtype=torch.float32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


def test_the_dense_engines_compute_the_network() -> None:
    network, x = Branches().eval().cuda(), images(dtype=torch.float32)
    with torch.no_grad():
        expected = network(x)
    for engine in (cudnn, cudnn_graph):
        (found,) = engine(network, x)()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
