"""Reductions: the dense operation on a map whose inactive pixels are zero, as an ordinary tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_equal, gradients, guide, keep, recorder, select

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
    "x.mean over channels": lambda x: x.mean(1),
    "torch.sum": lambda x: torch.sum(x, dim=(0, 2, 3)),
    "x.sum": lambda x: x.sum(),
    "torch.amax": lambda x: torch.amax(x, (2, 3)),
    "x.amax": lambda x: x.amax(dim=(2, 3)),
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
    "maximum and its place": lambda x: x.max(1).values,
    "standard deviation": lambda x: x.std((2, 3)),
}


@every_storage
@pytest.mark.parametrize("name", EXITS)
def test_what_is_no_plain_reduction_is_an_exit(storage: str, name: str) -> None:
    mask, record = torch.rand(2, 4, 5) < 0.5, recorder()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_equal(EXITS[name](guide(x, select(mask, storage, record=record))), EXITS[name](keep(x, mask)))
    assert [operation.status for operation in record.operations] == ["exit"]
