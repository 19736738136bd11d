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

MOVES = "moves pixels to other places"
MERGES = "merges or splits pixels"
BATCH = "moves pixels to the batch or the channels"
ATTENDS = "lets pixels attend to one another"
TAKES = "takes pixels out of the map"
OTHER = "works over another dimension than channels"
NO_RULE = "no rule for this operation"

LEAVING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "torch.flip": (lambda x: torch.flip(x, (2,)), MOVES),
    "Tensor.flip": (lambda x: x.flip(1), MOVES),
    "torch.roll": (lambda x: torch.roll(x, 1, 3), MOVES),
    "torch.rot90": (lambda x: torch.rot90(x, 2, (2, 3)), MOVES),
    "F.pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), MOVES),
    "F.grid_sample": (
        lambda x: F.grid_sample(x, torch.zeros(len(x), 2, 2, 2, dtype=x.dtype), align_corners=False),
        MOVES,
    ),
    "F.unfold": (lambda x: F.unfold(x, 1), BATCH),
    "Tensor.view": (lambda x: x.view(len(x), -1), MERGES),
    "Tensor.reshape": (lambda x: x.reshape(-1, *x.shape[2:]), MERGES),
    "Tensor.flatten": (lambda x: x.flatten(1), MERGES),
    "lines and columns": (lambda x: x.flatten(2), MERGES),
    "torch.bmm": (lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT), MERGES),
    "torch.einsum": (lambda x: torch.einsum("nchw,ndhw->ncd", x, x), ATTENDS),
    "F.scaled_dot_product_attention": (lambda x: F.scaled_dot_product_attention(x, x, x), ATTENDS),
    "Tensor.matmul": (lambda x: x.matmul(torch.ones(x.shape[3], 2, dtype=x.dtype)), "works over the last dimensions"),
    "Tensor.sort": (lambda x: x.sort(1), TAKES),
    "torch.topk": (lambda x: torch.topk(x, 2, 1), TAKES),
    "image": (lambda x: x[0], "takes one image or one line of pixels"),
    "images": (lambda x: x[::2], "takes some of the images"),
    "line": (lambda x: x.select(-1, 0), "takes one image or one line of pixels"),
    "pixels by a tensor": (lambda x: x[torch.arange(len(x))], "takes pixels by a tensor"),
    "Tensor.chunk": (lambda x: x.chunk(2, 2), "cuts the batch or the map, not channels"),
    "Tensor.split": (lambda x: x.split(1), "cuts the batch or the map, not channels"),
    "torch.index_select": (
        lambda x: torch.index_select(x, 2, torch.tensor([0])),
        "cuts the batch or the map, not channels",
    ),
    "torch.stack": (lambda x: torch.stack([x, x]), "stacks images"),
    "Tensor.expand": (lambda x: x.expand(2, *x.shape), "repeats images or pixels"),
    "torch.softmax": (lambda x: torch.softmax(x, 2), OTHER),
    "Tensor.cumsum": (lambda x: x.cumsum(3), OTHER),
    "F.normalize": (lambda x: F.normalize(x, dim=0), OTHER),
    "F.layer_norm": (
        lambda x: F.layer_norm(x, x.shape[1:]),
        "works over the last dimensions of a map laid out as NCHW",
    ),
    "F.pad of the batch": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)), "pads a map laid out as NCHW, or its batch"),
    "a padded map": (lambda x: F.pad(x, (1, 0)).sin(), "reads a padded map"),
    "another layout": (lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 1), "reads a map laid out as NHWC"),
    "Tensor.unflatten": (lambda x: x.unflatten(2, (2, -1)), MERGES),
    "Tensor.mT": (lambda x: x.mT, NO_RULE),
    "Tensor.diff": (lambda x: x.diff(dim=1), NO_RULE),
}


@every_storage
@pytest.mark.parametrize("name", ["torch.flip", "Tensor.view", "Tensor.chunk", "a padded map", "another layout"])
@given(mask=strategies.masks(), full=st.booleans())
def test_what_leaves_sees_zeros_at_inactive_pixels(storage: str, name: str, mask: Tensor, full: bool) -> None:
    check(storage, name, mask, full)


@every_storage
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", LEAVING)
def test_everything_that_leaves_does_so_for_its_reason(storage: str, name: str, full: bool) -> None:
    check(storage, name, torch.rand(2, 4, 4) < 0.5, full)


def check(storage: str, name: str, mask: Tensor, full: bool) -> None:
    record, (function, reason) = recorder(), LEAVING[name]
    x = torch.randn(len(mask), 4, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    features = guide(x, select(mask, storage, record=record), full=full)
    found, expected = tree_leaves(function(features)), tree_leaves(function(keep(x, mask)))
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal(actual, wanted)
        if wanted.requires_grad:
            assert_equal(gradients(actual, [x])[0], gradients(wanted, [x])[0])
    assert {operation.status for operation in record.operations} == {"exit"}
    assert all(operation.reason.startswith(reason) for operation in record.operations)
    assert features.full == full
    assert_guided(features, x)


@every_storage
def test_exits_are_reported_by_name(storage: str) -> None:
    record = recorder()
    features = guide(torch.randn(1, 4, 4, 4), select(torch.rand(1, 4, 4) < 0.5, storage, record=record))
    for name in ("torch.flip", "Tensor.view", "F.layer_norm", "Tensor.mT"):
        LEAVING[name][0](features)
        assert record.operations[-1].name == name
        assert record.operations[-1].size == (4, 4)


@every_storage
def test_strict_raises_and_names_the_operation(storage: str) -> None:
    features = guide(torch.randn(1, 4, 4, 4), select(torch.rand(1, 4, 4) < 0.5, storage, strict=True))
    with pytest.raises(RuntimeError, match=r"flip leaves the guided region \(moves pixels to other places\)"):
        torch.flip(features, (2,))
    with pytest.raises(RuntimeError, match="meets features of another size"):
        features + F.avg_pool2d(features, 2)
    features.mean((2, 3))  # a reduction is no exit


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "x.zero_": lambda x: x.zero_(),
    "x.fill_": lambda x: x.fill_(1),
    "x.copy_": lambda x: x.copy_(torch.ones(x.shape)),
    "x.masked_scatter_": lambda x: x.masked_scatter_(torch.ones(x.shape).bool(), torch.ones(x.shape).double()),
    "x.index_fill_": lambda x: x.index_fill_(1, torch.tensor([0]), 1),
    "x.scatter_": lambda x: x.scatter_(1, torch.zeros(x.shape).long(), 1),
    "x.cumsum_": lambda x: x.cumsum_(1),
    "x.transpose_": lambda x: x.transpose_(2, 3),
    "x.uniform_": lambda x: x.uniform_(),
    "x.squeeze_": lambda x: x.squeeze_(),
    "x[...] =": lambda x: x.__setitem__((0, 0), 1),
    "x[:, :, 0] =": lambda x: x.__setitem__((slice(None), slice(None), 0), 1),
    "x[:, :, 1:] =": lambda x: x.__setitem__((slice(None), slice(None), slice(1, None)), 1),
    "x[:, [0, 1]] =": lambda x: x.__setitem__((slice(None), [0, 1]), 1),
    "x[mask] =": lambda x: x.__setitem__(x > 0, 1),
    "into a padded map": lambda x: F.relu_(F.pad(x, (1, 1))),
    "x.data =": lambda x: setattr(x, "data", torch.ones(x.shape)),
    "nn.init": lambda x: torch.nn.init.ones_(x),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, True, inplace=True),
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
@pytest.mark.parametrize("view", [lambda x: x.view(-1), lambda x: x[:, :, 0], lambda x: x.chunk(2, 2)[0]])
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
