"""Reductions: over space the dense operation on a map whose inactive pixels are zero, as an ordinary tensor; over
channels each pixel's own, guided."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_agrees, assert_equal, gradients, guide, keep, recorder, select

every_storage = pytest.mark.parametrize("storage", STORAGES)

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "nn.AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((2, 3)),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (1, 2)),
    "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "torch.mean": lambda x: torch.mean(x, (2, 3)),
    "torch.mean by name": lambda x: torch.mean(input=x, dim=(2, 3), keepdim=True),
    "x.mean": lambda x: x.mean([-1, -2], True),
    "x.mean of everything": lambda x: x.mean(),
    "x.mean of channels last": lambda x: x.permute(0, 2, 3, 1).mean((2, 1)),
    "x.mean of channels last, kept": lambda x: x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True),
    "x.mean of channels apart": lambda x: x.unflatten(1, (3, 1)).mean((-2, -1)),
    "x.mean without channels": lambda x: x[:, 1].mean((1, 2)),
    "x.mean of one line": lambda x: x.mean(3),
    "x.mean of an image": lambda x: x.mean((1, 2, 3)),
    "torch.sum": lambda x: torch.sum(x, dim=(0, 2, 3)),
    "x.sum": lambda x: x.sum(),
    "torch.amax": lambda x: torch.amax(x, (2, 3)),
    "x.amax": lambda x: x.amax(dim=(2, 3)),
    "x.amax of channels last": lambda x: x.permute(0, 2, 3, 1).amax((1, 2)),
    "torch.var": lambda x: torch.var(x, (2, 3), unbiased=False),
    "torch.norm": lambda x: torch.norm(x),
    "x.max": lambda x: x.max(),
    "of a padded map": lambda x: F.pad(x, (1, 0, 2, 1)).sum((2, 3)),
}


@every_storage
@pytest.mark.parametrize("name", REDUCTIONS)
@given(mask=strategies.masks(), full=st.booleans())
def test_equals_the_dense_reduction(storage: str, name: str, mask: Tensor, full: bool) -> None:
    """Full features are read masked too: a reduction leaves the region."""
    reduce, record = REDUCTIONS[name], recorder()
    x = torch.randn(len(mask), 3, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    result = reduce(guide(x, select(mask, storage, record=record), full=full))
    expected = reduce(keep(x, mask))
    assert_equal(result, expected)
    assert_equal(gradients(result, [x])[0], gradients(expected, [x])[0])
    assert [(operation.status, operation.size) for operation in record.operations] == [("reduction", mask.shape[1:])]


REPORTED: dict[str, Callable[[Tensor], Any]] = {
    "F.adaptive_avg_pool2d": lambda x: nn.AdaptiveAvgPool2d(1)(x),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 1),
    "Tensor.mean": lambda x: x.mean((2, 3)),
    "torch.sum": lambda x: torch.sum(x),
}


@every_storage
def test_reductions_are_reported_by_name(storage: str) -> None:
    record = recorder()
    features = guide(torch.randn(1, 3, 4, 4), select(torch.rand(1, 4, 4) < 0.5, storage, record=record))
    for reduce in REPORTED.values():
        reduce(features)
    assert [operation.name for operation in record.operations] == list(REPORTED)


EXITS: dict[str, Callable[[Tensor], Tensor]] = {
    "out": lambda x: torch.mean(x, (2, 3), out=torch.empty(0, dtype=x.dtype)),
    "indices": lambda x: F.adaptive_max_pool2d(x, 1, return_indices=True)[1].double(),
    "mean of a padded map": lambda x: F.pad(x, (1, 1)).mean((2, 3)),
    "pooling of another layout": lambda x: F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1),
}


@every_storage
@pytest.mark.parametrize("name", EXITS)
def test_what_is_no_plain_reduction_is_an_exit(storage: str, name: str) -> None:
    mask, record = torch.rand(2, 4, 5) < 0.5, recorder()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_equal(EXITS[name](guide(x, select(mask, storage, record=record))), EXITS[name](keep(x, mask)))
    assert [operation.status for operation in record.operations] == ["exit"]


# -- over channels -----------------------------------------------------------------------------------------------

OVER_CHANNELS: dict[str, Callable[[Tensor], Any]] = {
    "x.mean": lambda x: x.mean(1),
    "torch.mean, kept": lambda x: torch.mean(x, dim=1, keepdim=True),
    "x.mean by another name": lambda x: x.mean(axis=1),
    "x.sum": lambda x: x.sum((1,), keepdim=True),
    "torch.sum, channels last": lambda x: torch.sum(x.permute(0, 2, 3, 1), -1),
    "x.sum, channels apart": lambda x: x.unflatten(1, (3, 2)).sum(1),
    "x.sum of all of them": lambda x: x.unflatten(1, (3, 2)).sum((2, 1)),
    "x.amax": lambda x: x.amax(1),
    "x.amin, channels apart": lambda x: x.unflatten(1, (3, 2)).permute(1, 0, 3, 4, 2).amin((0, 4), keepdim=True),
    "x.max": lambda x: x.max(1),
    "torch.max, kept": lambda x: torch.max(x, 1, keepdim=True),
    "torch.min, channels last": lambda x: torch.min(x.permute(0, 2, 3, 1), dim=3),
    "x.argmax": lambda x: x.argmax(1),
    "x.median": lambda x: x.median(1),
    "x.prod": lambda x: x.prod(1),
    "x.any": lambda x: (x > 1).any(1),
    "x.all": lambda x: (x > 1).all(dim=1, keepdim=True),
    "torch.count_nonzero": lambda x: torch.count_nonzero(x > 0, 1),
    "torch.logsumexp": lambda x: torch.logsumexp(x, 1),
    "x.var": lambda x: x.var(1, unbiased=False),
    "x.std": lambda x: x.std(dim=1, keepdim=True),
    "torch.var_mean": lambda x: torch.var_mean(x, 1),
    "x.norm": lambda x: x.norm(dim=1, keepdim=True),
    "x.norm of a power": lambda x: x.norm(3, 1),
    "torch.norm": lambda x: torch.norm(x, 1, 1),
    "torch.linalg.vector_norm": lambda x: torch.linalg.vector_norm(x, 2, 1),
    "torch.linalg.norm of matrices": lambda x: torch.linalg.norm(x.unflatten(1, (3, 2)), dim=(1, 2)),
}


@every_storage
@given(mask=strategies.masks(), full=st.booleans(), names=st.lists(st.sampled_from([*OVER_CHANNELS]), min_size=1))
@example(mask=torch.arange(40).view(2, 4, 5) % 3 > 0, full=False, names=[*OVER_CHANNELS])
@example(mask=torch.arange(40).view(2, 4, 5) % 3 > 0, full=True, names=[*OVER_CHANNELS])
def test_over_channels_every_pixel_keeps_its_own(storage: str, mask: Tensor, full: bool, names: list[str]) -> None:
    x = torch.randn(len(mask), 6, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    for name in names:
        assert_agrees(OVER_CHANNELS[name], storage, mask, x, full=full, pointwise=True)


# -- the mean of active pixels -----------------------------------------------------------------------------------

MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "channels last": lambda x: x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None],
    "pooling": lambda x: F.adaptive_avg_pool2d(x, 1),
}


@every_storage
@pytest.mark.parametrize("name", MEANS)
@given(mask=strategies.masks(), full=st.booleans())
def test_the_mean_of_active_pixels_divides_by_their_number(storage: str, name: str, mask: Tensor, full: bool) -> None:
    x = torch.randn(len(mask), 3, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    result = MEANS[name](guide(x, select(mask, storage, mean="active"), full=full))
    counts = mask.sum((1, 2))[:, None, None, None]
    expected = keep(x, mask).sum((2, 3), keepdim=True) / counts.clamp(min=1)
    assert_equal(result, expected)
    assert_equal(gradients(result, [x])[0], gradients(expected, [x])[0])


@every_storage
def test_the_sum_behind_a_mean_has_its_place(storage: str) -> None:
    """65,504 is the largest number of half precision."""
    x = torch.full((1, 1, 200, 200), 2.0, dtype=torch.float16)
    result = guide(x, select(torch.ones(1, 200, 200).bool(), storage)).mean((2, 3))
    assert result.dtype == torch.float16
    assert result.item() == 2


def test_a_mean_divides_by_one_of_two_numbers() -> None:
    with pytest.raises(ValueError, match="mean must be 'all'"):
        select(torch.ones(1, 2, 2).bool(), mean="some")
