"""Products and normalisation over the last dimension, where channels are last, in both storages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_agrees, guide, recorder, select

every_storage = pytest.mark.parametrize("storage", STORAGES)
C = 6
MASK = torch.arange(40).view(2, 4, 5) % 3 > 0

torch.manual_seed(0)
WEIGHT, BIAS, SQUARE = (
    torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, C), (4,), (C, C))
)
SCALE, SHIFT, HALF = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((C,), (C,), (2,)))
LEAVES = (WEIGHT, BIAS, SQUARE, SCALE, SHIFT, HALF)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def mlp(x: Tensor) -> Tensor:
    """As in ConvNeXt."""
    hidden = F.gelu(F.linear(F.layer_norm(last(x), (C,), SCALE, SHIFT), SQUARE))
    return x + (F.linear(hidden, SQUARE.T) * SCALE).permute(0, 3, 1, 2)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.linear": lambda x: F.linear(last(x), WEIGHT, BIAS),
    "F.linear without a bias": lambda x: F.linear(last(x), WEIGHT),
    "F.linear by name": lambda x: F.linear(input=last(x), weight=WEIGHT, bias=BIAS),
    "F.linear of groups": lambda x: F.linear(last(x).unflatten(3, (3, 2)), WEIGHT[:, :2]),
    "torch.matmul": lambda x: torch.matmul(last(x), SQUARE),
    "@": lambda x: last(x) @ WEIGHT.T,
    "F.layer_norm": lambda x: F.layer_norm(last(x), (C,), SCALE, SHIFT, 1e-4),
    "F.layer_norm without weights": lambda x: F.layer_norm(last(x), [C]),
    "F.layer_norm of groups": lambda x: F.layer_norm(last(x).unflatten(3, (3, 2)), (2,), HALF),
    "F.layer_norm of several dimensions": lambda x: F.layer_norm(last(x).unflatten(3, (3, 2)), (3, 2)),
    "F.rms_norm": lambda x: F.rms_norm(last(x), (C,), SCALE, 1e-4),
    "there and back": lambda x: F.layer_norm(last(x), (C,), SCALE).permute(0, 3, 1, 2),
    "a ConvNeXt block's MLP": mlp,
}


@every_storage
@pytest.mark.parametrize("name", FUNCTIONS)
@given(mask=strategies.masks(), full=st.booleans())
def test_equals_what_pytorch_does(storage: str, name: str, mask: Tensor, full: bool) -> None:
    x = torch.randn(len(mask), C, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    assert_agrees(FUNCTIONS[name], storage, mask, x, full=full, pointwise=True, leaves=_used(FUNCTIONS[name]))


def _used(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The leaves that a function's result depends on."""
    result = function(torch.randn(1, C, 1, 1, dtype=torch.float64, requires_grad=True))
    found = torch.autograd.grad(result.square().sum(), LEAVES, allow_unused=True)
    return [leaf for leaf, gradient in zip(LEAVES, found, strict=True) if gradient is not None]


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_products_count_their_pixels(storage: str, full: bool) -> None:
    """Of full features every pixel is computed."""
    record = recorder()
    x = guide(torch.randn(2, C, 4, 5), select(MASK, storage, record=record), full=full)
    nn.Linear(C, 4)(last(x))
    last(x).unflatten(3, (3, 2)) @ torch.randn(2, 7)
    pixels = 40 if full else int(MASK.sum())
    assert [(o.name, o.status, o.macs, o.dense_macs) for o in record.operations] == [
        ("linear", "guided", pixels * C * 4, 40 * C * 4),
        ("linear", "guided", pixels * C * 7, 40 * C * 7),
    ]


EXITS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "channels first": (
        lambda x: F.linear(x, torch.ones(2, 5)),
        "works over the last dimensions of a map laid out as NCHW",
    ),
    "norm over lines": (lambda x: F.layer_norm(x, (5,)), "works over the last dimensions of a map laid out as NCHW"),
    "norm over the map": (lambda x: F.layer_norm(x, x.shape[1:]), "laid out as NCHW"),
    "pixels with pixels": (lambda x: x @ x.mT, "multiplies pixels with one another"),
    "a stack of matrices": (lambda x: last(x) @ torch.ones(4, C, 2), "multiplies pixels with one another"),
    "a map for a weight": (lambda x: torch.ones(3, 4) @ x, "multiplies pixels with one another"),
}


@every_storage
@pytest.mark.parametrize("name", EXITS)
def test_what_is_not_over_channels_leaves(storage: str, name: str) -> None:
    (function, reason), record, x = EXITS[name], recorder(), torch.randn(2, C, 4, 5)
    features = guide(x, select(MASK, storage, record=record))
    result = function(features)
    assert type(result) is Tensor
    torch.testing.assert_close(result, function(torch.where(MASK[:, None], x, 0)))
    assert {o.status for o in record.operations} == {"exit"}
    assert reason in str(record.operations[-1].reason)


@every_storage
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: F.linear(last(x), torch.randn(3, 5)),
        lambda x: last(x) @ torch.randn(5, 3),
        lambda x: F.layer_norm(last(x), (5,)),
    ],
)
def test_what_pytorch_refuses_is_refused(storage: str, wrong: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, C, 4, 5)
    for given_map in (x, guide(x, select(MASK, storage))):
        with pytest.raises(RuntimeError):
            wrong(given_map)
