"""Interpolation against PyTorch's own on a map whose inactive pixels are zero, in both storages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_agrees, assert_guided, guide, keep, recorder, select

every_storage = pytest.mark.parametrize("storage", STORAGES)
LINEAR = ("bilinear", "bicubic")


@st.composite
def resizings(draw: DrawFn, mode: str) -> dict[str, Any]:
    """Arguments of `interpolate`: to a size or by a scale, whole or not, up or down."""
    arguments: dict[str, Any] = {"mode": mode}
    if mode in LINEAR:
        arguments["align_corners"] = draw(st.sampled_from([None, False, True]))
        arguments["antialias"] = draw(st.booleans())
    if draw(st.booleans()):
        sides = st.integers(1, 23)
        arguments["size"] = draw(st.one_of(sides, st.tuples(sides, sides)))
    else:
        scales = st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 2.7])
        arguments["scale_factor"] = draw(st.one_of(scales, st.tuples(scales, scales)))
        arguments["recompute_scale_factor"] = draw(st.sampled_from([None, True]))
    return arguments


@every_storage
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@given(data=st.data(), mask=strategies.masks(), full=st.booleans())
def test_equals_the_dense_interpolation(storage: str, mode: str, data: st.DataObject, mask: Tensor, full: bool) -> None:
    arguments = data.draw(resizings(mode))
    x = torch.randn(len(mask), 3, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    try:
        expected = F.interpolate(x, **arguments)
    except RuntimeError:  # a size of 0
        with pytest.raises(RuntimeError):
            F.interpolate(guide(x, select(mask, storage), full=full), **arguments)
        return
    assume(expected.numel())
    assume(not arguments.get("antialias") or expected.shape[3] > 1)  # where PyTorch 2.11 is wrong about lines
    assert_agrees(lambda x: F.interpolate(x, **arguments), storage, mask, x, full=full)


@every_storage
def test_a_column_that_becomes_a_line(storage: str) -> None:
    """The table of where it reads has sides of length 1, and once lay in memory in another order than it was read."""
    x = torch.randn(1, 3, 2, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    assert_agrees(lambda x: F.interpolate(x, (1, 2), mode="area"), storage, mask, x, full=False)


@every_storage
@example(size=(7, 5), scale=2.3)
@given(size=strategies.sizes, scale=st.floats(0.4, 3.0))
def test_float32_reads_the_pixels_that_pytorch_reads(storage: str, size: strategies.Pair, scale: float) -> None:
    """Which pixel is nearest may hang on a rounding."""
    x, mask = torch.randn(1, 2, *size), torch.ones(1, *size, dtype=torch.bool)
    try:
        expected = F.interpolate(x, scale_factor=scale)
    except RuntimeError:
        return
    result = F.interpolate(guide(x, select(mask, storage)), scale_factor=scale)
    assert torch.equal(result.dense("the test"), expected)


@every_storage
def test_a_fill_stays_what_it_is(storage: str) -> None:
    """Class scores of a segmentation head that are enlarged: background where nothing is computed, not a mixture."""
    x, mask, fill = torch.randn(1, 2, 4, 4).double(), torch.zeros(1, 4, 4, dtype=torch.bool), torch.tensor([0.0, -9])
    mask[:, :2] = True
    features = guide(x, select(mask, storage))
    features.fill = fill
    found = F.interpolate(features, scale_factor=2, mode="bilinear").dense("the test")
    assert torch.equal(found[0, :, 4:], fill.double()[:, None, None].expand(2, 4, 8))
    wanted = F.interpolate(keep(x, mask), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found[0, :, :4], wanted[0, :, :4])


@every_storage
def test_to_the_size_of_another_map(storage: str) -> None:
    """As feature pyramids do: the coarser map is enlarged to the finer one's exact size, and they are added."""
    mask = torch.rand(2, 7, 9) < 0.4
    x, y = torch.randn(2, 3, 7, 9).double(), torch.randn(2, 3, 4, 5).double()
    selection = select(mask, storage)
    coarse = guide(y, selection)
    total = guide(x, selection) + F.interpolate(coarse, size=(7, 9), mode="nearest")
    assert_guided(total, x + F.interpolate(keep(y, selection.mask((4, 5))), size=(7, 9), mode="nearest"))


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_what_is_no_map_leaves(storage: str, full: bool) -> None:
    x, mask, record = torch.randn(1, 4, 4, 4), torch.rand(1, 4, 4) < 0.5, recorder()
    features = guide(x, select(mask, storage, record=record), full=full)
    result = F.interpolate(F.pad(features, (1, 1)), scale_factor=2)
    torch.testing.assert_close(result, F.interpolate(F.pad(keep(x, mask), (1, 1)), scale_factor=2))
    assert record.operations[-1].reason == "reads a padded map"


@every_storage
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_single_and_half_precision(storage: str, mode: str) -> None:
    """Weights are of the precision that PyTorch computes them in, and so is the choice of pixels."""
    mask = torch.rand(2, 9, 7) < 0.6
    for dtype, wide in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        x = keep(torch.randn(2, 3, 9, 7).to(dtype), mask)
        for factor in (1.7, 0.6, 2, 1 / 3):
            result = F.interpolate(guide(x, select(mask, storage)), scale_factor=factor, mode=mode)
            expected = F.interpolate(x, scale_factor=factor, mode=mode)
            assert result.dtype == dtype
            active = result.selection.mask(result.grid)
            truth = keep(F.interpolate(x.to(wide), scale_factor=factor, mode=mode), active)
            errors = [(found.to(wide) - truth).abs().max() for found in (result.dense("test"), keep(expected, active))]
            # As precise as the dense operation, or as a number of this size can be.
            assert errors[0] <= 4 * max(errors[1], torch.finfo(dtype).eps * x.abs().max().to(wide))


@every_storage
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"size": 4, "scale_factor": 2},
        {"size": 4, "align_corners": True},
        {"size": (1, 2, 3)},
        {"size": 4, "antialias": True},
    ],
    ids=str,
)
def test_what_pytorch_refuses_is_refused(storage: str, arguments: dict[str, Any]) -> None:
    x = torch.randn(1, 2, 4, 4)
    for given_map in (x, guide(x, select(torch.rand(1, 4, 4) < 0.5, storage))):
        with pytest.raises((ValueError, RuntimeError)):
            F.interpolate(given_map, **arguments)
