"""Every registered operation on each number by itself, out of place and in place, in both storages."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.calls import is_in_place, name_of
from sparsenet.features import RULES
from sparsenet.rules.pointwise import pointwise
from tests import strategies
from tests.helpers import STORAGES, assert_agrees, assert_equal, assert_guided, gradients, guide, keep, select

every_storage = pytest.mark.parametrize("storage", STORAGES)
FUNCTIONS = sorted((function for function, rule in RULES.items() if rule is pointwise), key=name_of)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.1, 0.5),
    "clamp": (-0.3, 0.4),
    "clamp_min": (0.1,),
    "clamp_max": (0.1,),
    "dropout": (0.5, False),
    "alpha_dropout": (0.5, False),
}
# Numbers of the whole line as numbers that a function is defined at.
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal"], lambda x: x.abs() + 0.1),
    **dict.fromkeys(["asin", "acos"], lambda x: 0.9 * x.tanh()),
    "acosh": lambda x: x.abs() + 1.1,
    "logit": lambda x: 0.1 + 0.8 * x.sigmoid(),
    **dict.fromkeys(["bitwise_not", "invert"], lambda x: x.detach() > 0),
}


def takes_inplace(function: Any) -> bool:
    try:
        return "inplace" in inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return False


def check(function: Callable[..., Any], storage: str, mask: Tensor, full: bool, in_place: bool, **kwargs: Any) -> None:
    """The function's result and gradient are the dense function's at active pixels, and zero elsewhere."""
    name = function.__name__.strip("_")
    leaf = torch.randn(len(mask), 2, *mask.shape[1:], dtype=torch.float64)
    leaf.requires_grad_(function.__name__ not in ("acosh_", "asinh_"))  # whose derivative PyTorch lacks

    def inputs() -> Tensor:
        return DOMAINS.get(name, torch.clone)(leaf)

    expected = function(inputs(), *ARGUMENTS.get(name, ()), **kwargs)
    assert not expected.isnan().any()
    features = guide(inputs(), select(mask, storage), full=full)
    before = features.dense("the test")
    result = function(features, *ARGUMENTS.get(name, ()), **kwargs)
    assert result.full == full
    assert_guided(result, expected)
    assert result.dtype == expected.dtype
    if expected.requires_grad:
        (found,), (wanted,) = gradients(result.dense("the test"), [leaf]), gradients(keep(expected, mask), [leaf])
        assert_equal(found, wanted)
    if in_place:
        assert result is features
    else:
        assert_equal(features.dense("the test"), before)


@every_storage
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_equals_the_dense_function(storage: str, function: Any, full: bool) -> None:
    check(function, storage, torch.rand(2, 4, 3) < 0.5, full, in_place=is_in_place(function, (), {}))


@every_storage
@given(mask=strategies.masks(), full=st.booleans(), functions=st.lists(st.sampled_from(FUNCTIONS), min_size=1))
def test_whatever_the_mask(storage: str, mask: Tensor, full: bool, functions: list[Any]) -> None:
    for function in functions:
        check(function, storage, mask, full, in_place=is_in_place(function, (), {}))


@every_storage
@given(mask=strategies.masks(), full=st.booleans())
def test_other_layouts(storage: str, mask: Tensor, full: bool) -> None:
    x = torch.randn(len(mask), 6, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    for layout in (
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.unflatten(1, (3, 2)),
        lambda x: x[:, 1],
        lambda x: x.transpose(2, 3),
    ):
        assert_agrees(lambda x, to=layout: F.gelu(to(x)), storage, mask, x, full=full, pointwise=True)
        assert_agrees(lambda x, to=layout: F.relu(to(x), inplace=True), storage, mask, x, full=full, pointwise=True)


@every_storage
@pytest.mark.parametrize("function", list(filter(takes_inplace, FUNCTIONS)), ids=name_of)
def test_inplace_true_changes_the_object_itself(storage: str, function: Any) -> None:
    check(function, storage, torch.rand(2, 4, 3) < 0.5, full=False, in_place=True, inplace=True)


def test_the_usual_activations_are_registered() -> None:
    names = {name_of(function) for function in FUNCTIONS}
    assert names >= {
        "F.relu",
        "F.relu6",
        "F.silu",
        "F.gelu",
        "F.hardswish",
        "F.sigmoid",
        "F.mish",
        "F.relu_",
        "Tensor.relu_",
    }
    assert sum(map(takes_inplace, FUNCTIONS)) >= 12


@every_storage
@given(mask=strategies.masks(), full=st.booleans(), weights=st.sampled_from([1, 4]))
def test_prelu(storage: str, mask: Tensor, full: bool, weights: int) -> None:
    module, x = nn.PReLU(weights).double(), torch.randn(len(mask), 4, *mask.shape[1:]).double().requires_grad_()
    nn.init.normal_(module.weight)
    result, expected = module(guide(x, select(mask, storage), full=full)), module(x)
    assert_guided(result, expected)
    leaves = [x, module.weight]
    found, wanted = gradients(result.dense("the test"), leaves), gradients(keep(expected, mask), leaves)
    for actual, right in zip(found, wanted, strict=True):
        assert_equal(actual, right)


@every_storage
def test_dropout_drops_active_pixels_and_scales_the_rest(storage: str) -> None:
    mask = torch.rand(2, 20, 20) < 0.5
    features = guide(torch.ones(2, 8, 20, 20), select(mask, storage))
    dropped = F.dropout(features, 0.75).dense("the test")
    assert set(dropped.unique().tolist()) == {0, 4}
    assert dropped.permute(0, 2, 3, 1)[mask].mean().item() == pytest.approx(1, abs=0.15)
    assert F.dropout(features, 0.75, training=False).dense("the test").sum() == 8 * mask.sum()


@every_storage
def test_arguments_by_name(storage: str) -> None:
    mask, x = torch.rand(1, 4, 4) < 0.5, torch.randn(1, 2, 4, 4).double()
    features = guide(x, select(mask, storage))
    assert_guided(torch.relu(input=features), x.relu())
    assert_guided(torch.clamp(features, min=-0.5, max=0.5), x.clamp(-0.5, 0.5))
    assert_guided(F.leaky_relu(input=features, negative_slope=0.3), F.leaky_relu(x, 0.3))
    assert_guided(F.prelu(features, weight=torch.ones(1).double()), x)


@every_storage
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_dropout_of_channels_draws_what_the_dense_one_draws(storage: str, full: bool, inplace: bool) -> None:
    mask, x = torch.rand(3, 4, 5) < 0.5, torch.randn(3, 8, 4, 5, dtype=torch.float64)
    features = guide(x.clone(), select(mask, storage), full=full)
    torch.manual_seed(1)
    expected = F.dropout2d(x, 0.4)
    assert 0 < (expected.amax((2, 3)) == 0).sum() < 24
    torch.manual_seed(1)
    result = F.dropout2d(features, 0.4, inplace=inplace)
    assert (result is features) == inplace
    assert_guided(result, expected)
    assert_guided(features, expected if inplace else x)
    assert_guided(F.dropout2d(features, 0.4, training=False), expected if inplace else x)


@every_storage
def test_what_gives_back_its_argument_writes_nothing(storage: str) -> None:
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    features = guide(x, select(torch.rand(2, 5, 5) < 0.5, storage), full=True)
    copy = features.contiguous()
    for function in (torch.positive, lambda x: F.dropout(x, training=False)):
        assert_guided(function(features), x)
    assert_guided(copy + features, 2 * x)
