"""Operations without a rule: ordinary tensors go on, zero at inactive pixels, and nothing is lost in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tests import strategies
from tests.helpers import STORAGES, assert_equal, assert_guided, gradients, guide, keep, recorder, select

every_storage = pytest.mark.parametrize("storage", STORAGES)

UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "torch.flip": lambda x: torch.flip(x, (2,)),
    "torch.roll": lambda x: torch.roll(x, 1, 3),
    "Tensor.transpose": lambda x: x.transpose(2, 3),
    "Tensor.permute": lambda x: x.permute(0, 2, 3, 1),
    "Tensor.view": lambda x: x.view(len(x), -1),
    "Tensor.flatten": lambda x: x.flatten(1),
    "Tensor.__getitem__": lambda x: x[:, 1],
    "Tensor.chunk": lambda x: x.chunk(2, 1),
    "torch.stack": lambda x: torch.stack([x, x]),
    "torch.softmax": lambda x: torch.softmax(x, 1),
    "torch.where": lambda x: torch.where(x > 0, x, 1.0),
    "F.pad": lambda x: F.pad(x, (1, 1)),
    "F.interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "F.group_norm": lambda x: F.group_norm(x, 2),
    "F.conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(4, 1, 2, 2, dtype=x.dtype), stride=2),
    "Tensor.__rpow__": lambda x: 2**x,
    "Tensor.eq": lambda x: (x == 0).double(),
}


@every_storage
@pytest.mark.parametrize("name", UNKNOWN)
@given(mask=strategies.masks(), full=st.booleans())
def test_unknown_operations_see_zeros_at_inactive_pixels(storage: str, name: str, mask: Tensor, full: bool) -> None:
    record, function = recorder(), UNKNOWN[name]
    x = torch.randn(len(mask), 4, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    features = guide(x, select(mask, storage, record=record), full=full)
    found, expected = tree_leaves(function(features)), tree_leaves(function(keep(x, mask)))
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal(actual, wanted)
        if wanted.requires_grad:
            assert_equal(gradients(actual, [x])[0], gradients(wanted, [x])[0])
    assert {(operation.status, operation.size) for operation in record.operations} == {("exit", mask.shape[1:])}
    assert {operation.reason for operation in record.operations} == {"no rule for this operation"}
    assert features.full == full
    assert_guided(features, x)


@every_storage
def test_exits_are_reported_by_name(storage: str) -> None:
    record = recorder()
    features = guide(torch.randn(1, 4, 4, 4), select(torch.rand(1, 4, 4) < 0.5, storage, record=record))
    for name in ("torch.flip", "Tensor.view", "F.interpolate", "Tensor.__getitem__"):
        UNKNOWN[name](features)
        assert record.operations[-1].name == name


@every_storage
def test_strict_raises_and_names_the_operation(storage: str) -> None:
    features = guide(torch.randn(1, 4, 4, 4), select(torch.rand(1, 4, 4) < 0.5, storage, strict=True))
    with pytest.raises(RuntimeError, match=r"flip leaves the guided region \(no rule for this operation\)"):
        torch.flip(features, (2,))
    with pytest.raises(RuntimeError, match="meets features of another size"):
        features + F.avg_pool2d(features, 2)
    features.mean((2, 3))  # a reduction is no exit


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "x.zero_": lambda x: x.zero_(),
    "x.fill_": lambda x: x.fill_(1),
    "x.copy_": lambda x: x.copy_(torch.ones(x.shape)),
    "x.masked_fill_": lambda x: x.masked_fill_(torch.ones(x.shape).bool(), 1),
    "x.round_": lambda x: x.round_(),
    "x.uniform_": lambda x: x.uniform_(),
    "x.squeeze_": lambda x: x.squeeze_(),
    "x[...] =": lambda x: x.__setitem__((0, 0), 1),
    "x //=": lambda x: x.__ifloordiv__(2),
    "x.data =": lambda x: setattr(x, "data", torch.ones(x.shape)),
    "nn.init": lambda x: torch.nn.init.ones_(x),
    "F.rrelu": lambda x: F.rrelu(x, inplace=True),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True, inplace=True),
    "torch.round out": lambda x: torch.round(torch.ones(x.shape), out=x),
    "torch.add out": lambda x: torch.add(x, 1, out=x),
    "torch.mean out": lambda x: torch.mean(torch.ones(5, *x.shape), 0, out=x),
}


@every_storage
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_unknown_write_raises_and_changes_nothing(storage: str, name: str) -> None:
    mask, x = torch.rand(2, 4, 4) < 0.5, torch.randn(2, 4, 4, 4, dtype=torch.float64)
    features = guide(x.clone(), select(mask, storage))
    with pytest.raises(RuntimeError, match=r"in place|new \.data"):
        IN_PLACE[name](features)
    assert_guided(features, x)


@every_storage
@pytest.mark.parametrize("view", [lambda x: x.view(-1), lambda x: x[:, 1:], lambda x: x.chunk(2, 1)[0]])
def test_a_write_to_a_view_that_left_is_noticed(storage: str, view: Callable[[Tensor], Tensor]) -> None:
    features = guide(torch.randn(2, 4, 4, 4), select(torch.rand(2, 4, 4) < 0.5, storage))
    part = view(features)
    _ = features + 1  # reading is harmless
    part.add_(1)
    for use in (lambda: features + 1, lambda: F.relu(features), lambda: F.max_pool2d(features, 2), lambda: features[0]):
        with pytest.raises(RuntimeError, match="a view of a guided feature map was written to"):
            use()


@every_storage
def test_fill_is_what_an_exit_sees(storage: str) -> None:
    mask, fill = torch.rand(2, 4, 4) < 0.5, torch.tensor([1.0, -2.0])
    x = torch.randn(2, 2, 4, 4)
    features = guide(x, select(mask, storage))
    features.fill = fill
    torch.testing.assert_close(torch.flip(features, (1,)).flip(1), torch.where(mask[:, None], x, fill[:, None, None]))
