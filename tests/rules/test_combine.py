"""Arithmetic and concatenation of guided features with numbers, tensors and other guided features."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from sparsenet.features import Features
from sparsenet.selection import Selection
from tests import strategies
from tests.helpers import (
    STORAGES,
    active,
    assert_agrees,
    assert_equal,
    assert_guided,
    gradients,
    guide,
    keep,
    recorder,
    select,
)
from tests.strategies import Pair

every_storage = pytest.mark.parametrize("storage", STORAGES)
C = 3

OUT_OF_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "x + y": operator.add,
    "x - y": operator.sub,
    "x * y": operator.mul,
    "x / y": operator.truediv,
    "torch.add": torch.add,
    "torch.sub alpha": lambda x, y: torch.sub(x, y, alpha=2),
    "torch.mul": torch.mul,
    "torch.div": torch.div,
    "torch.div floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "torch.add by name": lambda x, y: torch.add(input=x, other=y),
    "x.mul by name": lambda x, y: x.mul(other=y),
}
OF_TENSORS: dict[str, Callable[[Any, Any], Any]] = {"maximum": torch.maximum, "x.minimum": lambda x, y: x.minimum(y)}
IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "x += y": operator.iadd,
    "x -= y": operator.isub,
    "x *= y": operator.imul,
    "x /= y": operator.itruediv,
    "x.add_": lambda x, y: x.add_(y),
    "x.mul_ by name": lambda x, y: x.mul_(other=y),
    "x.sub_ alpha": lambda x, y: x.sub_(y, alpha=2),
}
SHAPES: dict[str, Callable[[int, Pair], tuple[int, ...]]] = {
    "tensor of one number": lambda n, size: (),
    "vector of one number": lambda n, size: (1,),
    "each channel": lambda n, size: (C, 1, 1),
    "each channel, four dimensions": lambda n, size: (1, C, 1, 1),
    "each image": lambda n, size: (n, 1, 1, 1),
    "each image and channel": lambda n, size: (n, C, 1, 1),
    "each column": lambda n, size: (size[1],),
    "each line": lambda n, size: (size[0], 1),
    "each pixel": lambda n, size: size,
    "each pixel of each image": lambda n, size: (n, 1, *size),
    "a map": lambda n, size: (n, C, *size),
}


def numbers(*shape: int) -> Tensor:
    """Away from zero, so that division is harmless."""
    return torch.randn(shape, dtype=torch.float64).sign() * (torch.rand(shape, dtype=torch.float64) + 0.5)


def image(mask: Tensor) -> Tensor:
    return numbers(len(mask), C, *mask.shape[1:])


# -- with numbers and ordinary tensors ---------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("name", [*OUT_OF_PLACE, *OF_TENSORS])
@given(mask=strategies.masks(), shape=st.sampled_from([None, *SHAPES]), full=st.booleans(), swap=st.booleans())
def test_with_a_tensor_on_either_side(
    storage: str, name: str, mask: Tensor, shape: str | None, full: bool, swap: bool
) -> None:
    function = {**OUT_OF_PLACE, **OF_TENSORS}[name]
    x, size = image(mask).requires_grad_(), (mask.shape[1], mask.shape[2])
    if shape is None and name in OF_TENSORS:
        shape = "tensor of one number"
    other = 2.5 if shape is None else numbers(*SHAPES[shape](len(mask), size)).requires_grad_()
    if shape is None and swap and name.startswith("torch."):
        swap = False  # PyTorch itself refuses a number there
    features = guide(x, select(mask, storage), full=full)
    result = function(other, features) if swap else function(features, other)
    expected = function(other, x) if swap else function(x, other)
    assert_guided(result, expected)
    assert result.full == full
    leaves = [x] if shape is None else [x, other]
    found, wanted = gradients(result.dense("the test"), leaves), gradients(keep(expected, mask), leaves)
    for actual, right in zip(found, wanted, strict=True):
        assert_equal(actual, right)


@every_storage
@pytest.mark.parametrize("exponent", [2, 0.5, "each channel"])
@pytest.mark.parametrize("spelled", ["**", "torch.pow", "torch.pow by name"])
def test_powers(storage: str, exponent: Any, spelled: str) -> None:
    mask = torch.rand(2, 4, 3) < 0.5
    x, exponent = image(mask).abs(), numbers(C, 1, 1) if isinstance(exponent, str) else exponent
    features = guide(x, select(mask, storage))
    result = {
        "**": lambda: features**exponent,
        "torch.pow": lambda: torch.pow(features, exponent),
        "torch.pow by name": lambda: torch.pow(features, exponent=exponent),
    }[spelled]()
    assert_guided(result, x**exponent)


@every_storage
@pytest.mark.parametrize("name", IN_PLACE)
@given(mask=strategies.masks(), shape=st.sampled_from([None, *SHAPES]), full=st.booleans())
def test_in_place_forms_change_the_object_itself(
    storage: str, name: str, mask: Tensor, shape: str | None, full: bool
) -> None:
    leaf, size = image(mask).requires_grad_(), (mask.shape[1], mask.shape[2])
    other = 2.5 if shape is None else numbers(*SHAPES[shape](len(mask), size))
    features, expected = guide(leaf * 1, select(mask, storage), full=full), IN_PLACE[name](leaf * 1, other)
    features.dense("the test")  # what was read before is not what is read after
    assert IN_PLACE[name](features, other) is features
    assert_guided(features, expected)
    assert features.full == full
    assert_equal(gradients(features.dense("the test"), [leaf])[0], gradients(keep(expected, mask), [leaf])[0])


@every_storage
def test_one_channel_spreads_over_many(storage: str) -> None:
    mask, weights = torch.rand(2, 4, 5) < 0.5, numbers(1, C, 1, 1)
    x, y = numbers(2, 1, 4, 5), numbers(2, C, 4, 5)
    selection = select(mask, storage)
    assert_guided(guide(x, selection) * weights, x * weights)
    assert_guided(guide(x, selection) * guide(y, selection), x * y)
    assert_guided(guide(y, selection) * guide(x, selection), x * y)
    with pytest.raises(RuntimeError):
        x *= y
    for full in (False, True):
        with pytest.raises(RuntimeError):
            guide(x, selection, full=full).mul_(guide(y, selection))


# -- with each other ---------------------------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("name", [*OUT_OF_PLACE, *OF_TENSORS])
@given(mask=strategies.masks(), left_full=st.booleans(), right_full=st.booleans())
def test_guided_with_guided(storage: str, name: str, mask: Tensor, left_full: bool, right_full: bool) -> None:
    function, selection = {**OUT_OF_PLACE, **OF_TENSORS}[name], select(mask, storage)
    x, y = image(mask).requires_grad_(), image(mask).requires_grad_()
    result = function(guide(x, selection, full=left_full), guide(y, selection, full=right_full))
    assert result.full == (left_full and right_full)
    expected = function(x, y)
    assert_guided(result, expected)
    found, wanted = gradients(result.dense("the test"), [x, y]), gradients(keep(expected, mask), [x, y])
    for actual, right in zip(found, wanted, strict=True):
        assert_equal(actual, right)


@every_storage
@pytest.mark.parametrize("name", IN_PLACE)
@given(mask=strategies.masks(), left_full=st.booleans(), right_full=st.booleans())
def test_guided_with_guided_in_place(storage: str, name: str, mask: Tensor, left_full: bool, right_full: bool) -> None:
    selection = select(mask, storage)
    x, y = image(mask).requires_grad_(), image(mask).requires_grad_()
    left, right = guide(x * 1, selection, full=left_full), guide(y, selection, full=right_full)
    expected = IN_PLACE[name](x * 1, y)
    assert IN_PLACE[name](left, right) is left
    assert left.full == (left_full and right_full)
    assert_guided(left, expected)
    assert_guided(right, y)
    found, wanted = gradients(left.dense("the test"), [x, y]), gradients(keep(expected, mask), [x, y])
    for actual, wanting in zip(found, wanted, strict=True):
        assert_equal(actual, wanting)


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_in_place_keeps_the_dtype(storage: str, full: bool) -> None:
    mask = torch.rand(1, 4, 4) < 0.5
    selection, x, y = select(mask, storage), image(mask).float(), image(mask)
    features = guide(x, selection, full=full)
    features += guide(y, selection)
    assert features.dtype == features.dense("the test").dtype == torch.float32


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_full_features_keep_their_context_through_arithmetic(storage: str, full: bool) -> None:
    """The sum of two full maps is read whole by what reads over space, a sum with a masked map is not."""
    mask = torch.rand(1, 5, 5) < 0.4
    selection, x, y = select(mask, storage), image(mask), image(mask)
    total = guide(x, selection, full=True) + guide(y, selection, full=full)
    read = x + y if full else keep(x + y, mask)
    assert_guided(F.max_pool2d(total, 3, 1, 1), F.max_pool2d(read, 3, 1, 1))


# -- concatenation -----------------------------------------------------------------------------------------------


@every_storage
@example(mask=torch.zeros(1, 1, 1, dtype=torch.bool), kinds=["masked", "tensor"])
@given(mask=strategies.masks(), kinds=st.lists(st.sampled_from(["full", "masked", "tensor"]), min_size=1, max_size=4))
def test_concatenation_over_channels(storage: str, mask: Tensor, kinds: list[str]) -> None:
    selection, kinds = select(mask, storage), ["masked", *kinds] if set(kinds) == {"tensor"} else kinds
    parts = [numbers(len(mask), channels, *mask.shape[1:]).requires_grad_() for channels in range(1, len(kinds) + 1)]
    given = [
        part if kind == "tensor" else guide(part, selection, full=kind == "full")
        for part, kind in zip(parts, kinds, strict=True)
    ]
    result, expected = torch.cat(given, 1), torch.cat(parts, 1)
    assert result.full == ("masked" not in kinds)
    assert_guided(result, expected)
    found, wanted = gradients(result.dense("the test"), parts), gradients(keep(expected, mask), parts)
    for actual, right in zip(found, wanted, strict=True):
        assert_equal(actual, right)


@every_storage
@pytest.mark.parametrize(
    "concatenate",
    [
        lambda parts: torch.cat(parts, dim=1),
        lambda parts: torch.cat(parts, axis=1),
        lambda parts: torch.cat(parts, -3),
        lambda parts: torch.cat(tensors=parts, dim=1),
        lambda parts: torch.concat(tuple(parts), 1),
        lambda parts: torch.concatenate(parts, 1),
    ],
)
def test_spellings_of_concatenation(storage: str, concatenate: Callable[[list[Tensor]], Tensor]) -> None:
    mask = torch.rand(2, 4, 4) < 0.5
    x, y, selection = image(mask), image(mask), select(mask, storage)
    assert_guided(concatenate([guide(x, selection), guide(y, selection)]), torch.cat([x, y], 1))


# -- what leaves the region --------------------------------------------------------------------------------------


def other_selection(x: Tensor, selection: Selection) -> Tensor:
    return guide(x, select(torch.ones_like(selection.sites((4, 4)).mask), selection.options.backend))


LEAVING: dict[str, tuple[Callable[[Features], Any], str]] = {
    "another selection": (
        lambda x: x + other_selection(torch.ones(x.shape).double(), x.selection),
        "meets features of another selection",
    ),
    "another size": (
        lambda x: x * F.avg_pool2d(x, 4),
        "meets features of another size, 1x1",
    ),
    "a larger tensor": (lambda x: F.avg_pool2d(x, 4) * torch.ones(4, 4).double(), "meets a tensor of another size"),
    "another batch": (lambda x: F.avg_pool2d(x, 4) + torch.ones(5, 2, 1, 1, 1).double(), "of more dimensions"),
    "cat over the batch": (lambda x: torch.cat([x, x]), "concatenates over another dimension than channels"),
    "cat over space": (lambda x: torch.cat([x, x], 2), "concatenates over another dimension than channels"),
    "cat of two selections": (
        lambda x: torch.cat([x, other_selection(torch.ones(x.shape).double(), x.selection)], 1),
        "meets features of another selection",
    ),
    "out": (lambda x: torch.add(x, 1, out=torch.empty(x.shape).double()), "writes to an `out` tensor"),
    "cat out": (lambda x: torch.cat([x, x], 1, out=torch.empty(0).double()), "writes to an `out` tensor"),
    "into an ordinary tensor": (lambda x: torch.ones(x.shape).double().add_(x), "writes into an ordinary tensor"),
}


@every_storage
@pytest.mark.parametrize("name", LEAVING)
def test_what_cannot_stay_guided_leaves_with_its_reason(storage: str, name: str) -> None:
    mask, record = torch.rand(2, 4, 4) < 0.5, recorder()
    x, (function, reason) = image(mask), LEAVING[name]
    dense = guide(keep(x, mask), select(torch.ones_like(mask), storage))
    expected = function(dense)
    result = function(guide(x, select(mask, storage, record=record)))
    exits = [operation for operation in record.operations if operation.status == "exit"]
    assert len(exits) == 1
    assert reason in exits[0].reason
    assert_equal(result, expected)


@every_storage
def test_another_batch_leaves(storage: str) -> None:
    mask, other = torch.rand(1, 4, 4) < 0.5, numbers(5, C, 1, 1)
    x = image(mask)
    assert_equal(guide(x, select(mask, storage)) + other, keep(x, mask) + other)


@every_storage
def test_a_wrong_operand_is_an_error_that_changes_nothing(storage: str) -> None:
    mask = torch.rand(1, 4, 4) < 0.5
    x = image(mask)
    features = guide(x, select(mask, storage))
    for function in (operator.add, operator.iadd, operator.mul, operator.isub):
        with pytest.raises(TypeError):
            function(features, object())
    assert_guided(features, x)


# -- of three, comparisons, and other layouts --------------------------------------------------------------------

PLACES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "torch.where": lambda x, y, z: torch.where(x > 0, y, z),
    "torch.where, numbers": lambda x, y, z: torch.where(x > y, x * z, 1.5),
    "x.where": lambda x, y, z: x.where(y > z, z),
    "torch.addcmul": lambda x, y, z: torch.addcmul(x, y, z, value=0.5),
    "torch.addcdiv": lambda x, y, z: torch.addcdiv(x, y, z),
    "x.addcmul_": lambda x, y, z: (x * 1).addcmul_(y, z),
    "torch.lerp": lambda x, y, z: torch.lerp(x, y, 0.3) + torch.lerp(x, y, z),
    "x.masked_fill": lambda x, y, z: x.masked_fill(y > z, -2.0),
    "x.masked_fill_": lambda x, y, z: (x * 1).masked_fill_(y > z, -2.0),
    "torch.clamp": lambda x, y, z: torch.clamp(x, torch.minimum(y, z), torch.maximum(y, z)),
    "x.clamp by name": lambda x, y, z: x.clamp(min=y) + x.clamp(max=z),
    "x.clamp_min": lambda x, y, z: x.clamp_min(y) + x.clamp_max(0.3) + (x * 1).clamp_(None, 0.7),
    "comparisons": lambda x, y, z: [x == y, x != y, x < y, x >= z, torch.gt(y, x), x.le(0.1), x > 0.2],
    "truth": lambda x, y, z: [(x > 0) & (y > 0), (x > 0) | (z > 0), ~(x > 0) ^ (y > z), torch.logical_and(x, y)],
    "torch.fmax": lambda x, y, z: torch.fmax(x, y) - torch.fmin(y, z) * torch.hypot(x, z),
    "torch.atan2": lambda x, y, z: torch.atan2(x, y) + torch.copysign(x, z),
    "torch.remainder": lambda x, y, z: [torch.remainder(x, 0.7), x % 0.6, x.detach() // 0.4, torch.fmod(x, 0.3)],
    "x.pow": lambda x, y, z: x.abs() ** y + y.abs().pow(1.5),
    "torch.max": lambda x, y, z: torch.max(x, y) - torch.min(y, other=z),
    "torch.rsub": lambda x, y, z: torch.rsub(x, y) + (1 - z) + 2 / y,
    "torch.logaddexp": lambda x, y, z: torch.logaddexp(x, y) + torch.xlogy(x, z.abs()),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "apart": lambda x: x.unflatten(1, (3, 2)),
    "apart, last": lambda x: x.unflatten(1, (3, 2)).permute(0, 3, 4, 2, 1),
    "without channels": lambda x: x[:, 1],
    "turned": lambda x: x.transpose(2, 3),
}
# Lengths by letter; the channels are six, or three times two.
OPERANDS: dict[str, Callable[[int, Pair], Tensor]] = {
    "a map": lambda n, size: numbers(n, 6, *size),
    "each image and channel": lambda n, size: numbers(n, 6, 1, 1),
    "each channel": lambda n, size: numbers(1, 6, 1, 1),
    "each pixel": lambda n, size: numbers(1, 1, *size).expand(1, 6, -1, -1),
    "each column of each image": lambda n, size: numbers(n, 1, 1, size[1]).expand(-1, 6, -1, -1),
}


@every_storage
@given(
    mask=strategies.masks(),
    layout=st.sampled_from([*LAYOUTS]),
    operands=st.tuples(*[st.sampled_from(["guided", "full", *OPERANDS])] * 2),
    full=st.booleans(),
    names=st.lists(st.sampled_from([*PLACES]), min_size=1),
)
@example(torch.arange(40).view(2, 4, 5) % 3 > 0, "plain", ("guided", "a map"), False, [*PLACES])
@example(torch.arange(40).view(2, 4, 5) % 3 > 0, "apart, last", ("each image and channel", "full"), True, [*PLACES])
@example(torch.arange(40).view(2, 4, 5) % 3 > 0, "channels last", ("each channel", "each pixel"), True, [*PLACES])
def test_of_three_in_any_layout(
    storage: str, mask: Tensor, layout: str, operands: tuple[str, str], full: bool, names: list[str]
) -> None:
    """Ordinary maps, and tensors that broadcast, meet guided ones; what is not full restricts what is."""
    size, selection, to = (mask.shape[1], mask.shape[2]), select(mask, storage), LAYOUTS[layout]
    for name in names:
        dense = [numbers(len(mask), 6, *size).requires_grad_()]
        given = [guide(dense[0] * 1, selection, full=full)]
        for kind in operands:
            guided = kind in ("guided", "full")
            dense.append(numbers(len(mask), 6, *size) if guided else OPERANDS[kind](len(mask), size))
            dense[-1].requires_grad_()
            given.append(guide(dense[-1] * 1, selection, full=kind == "full") if guided else dense[-1])
        results = tree_leaves(PLACES[name](*map(to, given)))
        expected = tree_leaves(PLACES[name](*map(to, [part * 1 for part in dense])))
        for result, wanted in zip(results, expected, strict=True):
            assert isinstance(result, Features), name
            assert result.form == to(given[0]).form
            assert_guided(result, wanted)
            if wanted.requires_grad:
                kept = keep(wanted, active(result))
                for actual, right in zip(gradients(result.dense("test"), dense), gradients(kept, dense), strict=True):
                    assert_equal(actual, right)


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_weights_of_branches(storage: str, full: bool) -> None:
    """SKNet's and ResNeSt's: (N, branches, channels, 1, 1)."""
    mask, x = torch.rand(3, 4, 5) < 0.5, numbers(3, 6, 4, 5).requires_grad_()
    for weights in (numbers(3, 2, 3, 1, 1), numbers(1, 2, 3, 1, 1), numbers(3, 2, 1, 1, 1), numbers(2, 1, 4, 5)):
        weights.requires_grad_()
        assert_agrees(
            lambda x, w=weights: (x.view(len(x), 2, 3, 4, 5) * w).sum(1),
            storage, mask, x, full=full, pointwise=True, leaves=[weights],
        )  # fmt: skip


@every_storage
@pytest.mark.parametrize("layout", ["channels last", "apart", "turned"])
@pytest.mark.parametrize("full", [False, True])
def test_concatenation_in_other_layouts(storage: str, layout: str, full: bool) -> None:
    mask, x, to = torch.rand(2, 4, 5) < 0.5, numbers(2, 6, 4, 5).requires_grad_(), LAYOUTS[layout]
    other = to(numbers(2, 6, 4, 5).requires_grad_())
    for dim in {"channels last": (3, -1), "apart": (1, 2, -3), "turned": (1,)}[layout]:
        assert_agrees(
            lambda x, dim=dim: torch.cat([to(x), other, to(x) * 2], dim),
            storage, mask, x, full=full, pointwise=True, leaves=[other],
        )  # fmt: skip


@every_storage
def test_layouts_that_differ_leave(storage: str) -> None:
    mask, record, x = torch.rand(2, 4, 4) < 0.5, recorder(), numbers(2, 4, 4, 4)
    features = guide(x, select(mask, storage, record=record))
    kept = keep(x, mask)
    assert_equal(features + features.transpose(2, 3), kept + kept.transpose(2, 3))
    assert record.operations[-1].reason == "meets features laid out otherwise, NCHW and NCWH"
    assert_equal(F.pad(features, (1, 1)) * 2, F.pad(kept, (1, 1)) * 2)
    assert record.operations[-1].reason == "reads a padded map"
    assert_equal(torch.max(torch.ones(5, 1, 4, 4, 4), features), torch.max(torch.ones(5, 1, 4, 4, 4), kept))
    assert record.operations[-1].reason == "meets a tensor of more dimensions"


@every_storage
def test_places_where_a_condition_holds_leave(storage: str) -> None:
    x, mask = numbers(2, 4, 4, 4), torch.rand(2, 4, 4) < 0.5
    found = torch.where(guide(x, select(mask, storage)) > 0)
    assert all(map(torch.equal, found, torch.where(keep(x, mask) > 0)))
