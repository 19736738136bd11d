"""Operations over channels, each pixel by itself, in both storages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_agrees, guide, recorder, select

every_storage = pytest.mark.parametrize("storage", STORAGES)
C = 6

FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "torch.softmax": lambda x: torch.softmax(x, 1),
    "x.softmax by name": lambda x: x.softmax(dim=-3),
    "F.softmax of channels last": lambda x: F.softmax(x.permute(0, 2, 3, 1), -1),
    "F.softmax of branches": lambda x: F.softmax(x.unflatten(1, (2, 3)), dim=1),
    "F.log_softmax": lambda x: F.log_softmax(x, 1),
    "F.softmin": lambda x: F.softmin(x, 1),
    "F.glu": lambda x: F.glu(x, 1),
    "F.glu of channels last": lambda x: F.glu(x.permute(0, 2, 3, 1)),
    "x.cumsum": lambda x: x.cumsum(1),
    "torch.cumprod": lambda x: torch.cumprod(x, dim=1),
    "F.normalize": lambda x: F.normalize(x),
    "F.normalize of groups": lambda x: F.normalize(x.unflatten(1, (2, 3)), dim=2, p=1.0),
    "x.sum": lambda x: x.sum(1),
    "x.mean, kept": lambda x: x.mean(1, keepdim=True),
    "torch.mean by name": lambda x: torch.mean(x, dim=(1,), keepdim=True),
    "x.sum of branches": lambda x: x.unflatten(1, (2, 3)).sum(1),
    "x.mean of both": lambda x: x.unflatten(1, (2, 3)).mean((1, 2), keepdim=True),
    "x.amax of channels last": lambda x: x.permute(0, 2, 3, 1).amax(-1, keepdim=True),
    "torch.max": lambda x: torch.max(x, 1, keepdim=True).values,
    "x.std": lambda x: x.std(1, keepdim=True),
    "torch.var_mean": lambda x: torch.var_mean(x, dim=1, keepdim=True),
    "x.norm": lambda x: x.norm(p=2, dim=1, keepdim=True),
    "torch.linalg.vector_norm": lambda x: torch.linalg.vector_norm(x, 3, 1),
    "torch.logsumexp": lambda x: torch.logsumexp(x, 1),
    "spatial attention": lambda x: x * torch.cat([x.mean(1, True), x.amax(1, True)], 1).sum(1, keepdim=True).sigmoid(),
    "a norm by hand": lambda x: (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt(),
    "a squeezed map, and back": lambda x: x * x.sum(1).unsqueeze(1).tanh(),
}


@every_storage
@pytest.mark.parametrize("name", FUNCTIONS)
@given(mask=strategies.masks(), full=st.booleans())
def test_equals_what_pytorch_does(storage: str, name: str, mask: Tensor, full: bool) -> None:
    x = torch.randn(len(mask), C, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    assert_agrees(FUNCTIONS[name], storage, mask, x, full=full, pointwise=True)


@every_storage
def test_results_in_pairs_are_named(storage: str) -> None:
    x, mask = torch.randn(2, C, 3, 4), torch.rand(2, 3, 4) < 0.5
    found, wanted = guide(x, select(mask, storage)).max(1), x.max(1)
    assert type(found).__name__ == type(wanted).__name__
    assert torch.equal(found.indices.dense("the test"), torch.where(mask, wanted.indices, 0))


EXITS: dict[str, Callable[[Tensor], Tensor]] = {
    "over a line": lambda x: x.softmax(-1),
    "over images": lambda x: x.cumsum(0),
    "over space of channels last": lambda x: F.softmax(x.permute(0, 2, 3, 1), 1),
}


@every_storage
def test_a_padded_map_leaves(storage: str) -> None:
    x, mask, record = torch.randn(2, C, 3, 4), torch.rand(2, 3, 4) < 0.5, recorder()
    result = F.pad(guide(x, select(mask, storage, record=record)), (1, 1)).softmax(1)
    torch.testing.assert_close(result, F.pad(torch.where(mask[:, None], x, 0), (1, 1)).softmax(1))
    assert [o.reason for o in record.operations] == ["reads a padded map"]


@every_storage
@pytest.mark.parametrize("name", EXITS)
def test_what_is_not_over_channels_leaves(storage: str, name: str) -> None:
    x, mask, record = torch.randn(2, C, 3, 4), torch.rand(2, 3, 4) < 0.5, recorder()
    result = EXITS[name](guide(x, select(mask, storage, record=record)))
    torch.testing.assert_close(result, EXITS[name](torch.where(mask[:, None], x, 0)))
    assert [(o.status, o.reason) for o in record.operations] == [("exit", "works over another dimension than channels")]
