"""What follows a layer, as part of its kernel: the same as step by step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import epilogue as epilogues
from sparsenet.backends import indirect
from sparsenet.backends.epilogue import ACTIVATIONS, Epilogue, activation_of

SITES, CHANNELS, OUTPUTS = 11, 5, 19

PARAMETERS = st.one_of(
    st.tuples(st.just("clamp"), st.floats(-2, 0), st.floats(0, 2) | st.just(math.inf)),
    st.tuples(st.just("leaky_relu"), st.floats(0, 1), st.just(0.0)),
    st.sampled_from([(name, 0.0, 0.0) for name in ACTIVATIONS if name not in ("clamp", "leaky_relu")]),
)
STEPS = st.one_of(
    st.tuples(st.just("scaled"), st.booleans()),
    st.tuples(st.just("activated"), PARAMETERS),
    st.tuples(st.just("plus"), st.none()),
)


@given(
    steps=st.lists(STEPS, max_size=6),
    bias=st.booleans(),
    groups=st.sampled_from([1, OUTPUTS]),
    double=st.booleans(),
)
def test_any_chain_equals_its_steps_one_by_one(
    steps: list[tuple[str, Any]], bias: bool, groups: int, double: bool
) -> None:
    """Steps that are refused change nothing; those that are taken are legal, and refused ones are not."""
    dtype = torch.float64 if double else torch.float32
    channels = CHANNELS if groups == 1 else OUTPUTS
    rows = torch.randn(SITES, channels, dtype=dtype)
    weight = torch.randn(OUTPUTS, channels // groups, 1, 1, dtype=dtype)
    shift = torch.randn(OUTPUTS, dtype=dtype) if bias else None
    epilogue = Epilogue(shift=shift)
    exact = F.conv2d(rows[:, :, None, None].double(), weight.double(), groups=groups)[:, :, 0, 0]
    absolute = F.conv2d(rows[:, :, None, None].double().abs(), weight.double().abs(), groups=groups)[:, :, 0, 0]
    plain = F.conv2d(rows[:, :, None, None], weight, groups=groups)[:, :, 0, 0]
    expected = exact if shift is None else exact + shift.double()
    plain = plain if shift is None else plain + shift
    largest = absolute + (0 if shift is None else shift.double().abs())  # as if nothing cancelled
    activated = added = False
    for step, argument in steps:
        if step == "scaled":
            scale = torch.randn(OUTPUTS, dtype=dtype)
            more = torch.randn(OUTPUTS, dtype=dtype) if argument else None
            following, legal = epilogue.scaled(scale, more), not activated and not added
            after = expected * scale.double() if more is None else expected * scale.double() + more.double()
            short = plain * scale if more is None else plain * scale + more
            reach = largest * scale.double().abs() + (0 if more is None else more.double().abs())
        elif step == "activated":
            if double and argument[0] != "clamp":
                continue  # kernels' exponentials are of single precision, and so it is not asked of them
            following, legal = epilogue.activated(*argument), not activated
            after, short = (ACTIVATIONS[argument[0]](each, *argument[1:]) for each in (expected, plain))
            reach = largest
        else:
            residual = torch.randn(SITES, OUTPUTS, dtype=dtype)
            following, legal = epilogue.plus(residual), not added
            after, short, reach = expected + residual.double(), plain + residual, largest + residual.double().abs()
        assert (following is not None) == legal, f"{step} of {epilogue}"
        if following is not None:
            epilogue, expected, plain, largest = following, after, short, reach
            activated = activated or epilogue.activates
            added = added or step == "plus"
    by_kernel = indirect.run(rows, indirect.pack(weight, groups), epilogue, None, SITES)
    by_steps = epilogue.of(exact.to(dtype))
    rounding = torch.finfo(dtype).eps * (channels // groups + len(steps) + 1) ** 0.5 * largest.max()
    allowed = 4 * torch.maximum((plain.double() - expected).abs().max(), rounding)
    for found in (by_kernel, by_steps):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= allowed


def test_a_residual_may_come_on_either_side_of_the_activation_but_once() -> None:
    residual = torch.ones(2, 3)
    before, after = Epilogue().plus(residual), Epilogue().activated("clamp", 0.0, math.inf)
    assert before is not None and after is not None
    assert before.activated("clamp", 0.0, 1.0).order == "before"  # type: ignore[union-attr]
    assert after.plus(residual).order == "after"  # type: ignore[union-attr]
    assert before.plus(residual) is None
    assert after.activated("clamp", 0.0, 1.0) is None
    assert after.plus(residual).activated("sigmoid", 0.0, 0.0) is None  # type: ignore[union-attr]
    assert before.scaled(torch.ones(3), None) is None
    assert after.scaled(torch.ones(3), None) is None


def test_steps_leave_what_they_are_made_of() -> None:
    scale, shift = torch.full((3,), 2.0), torch.full((3,), 5.0)
    first = Epilogue(shift=shift)
    second = first.scaled(scale, None)
    assert first == Epilogue(shift=shift)
    assert second is not None and second.shift is not None
    assert shift.tolist() == [5, 5, 5]
    assert second.shift.tolist() == [10, 10, 10]


# -- which calls are activations ---------------------------------------------------------------------------------

CALLS: list[tuple[Callable[[Tensor], Tensor], Any, tuple[Any, ...], dict[str, Any]]] = [
    (lambda x: F.relu(x), F.relu, (), {}),
    (lambda x: F.relu(x, True), F.relu, (True,), {}),
    (lambda x: F.relu(x), F.relu, (), {"inplace": False}),
    (lambda x: x.relu(), torch.relu, (), {}),
    (lambda x: x.relu(), Tensor.relu, (), {}),
    (lambda x: x.relu(), Tensor.relu_, (), {}),
    (lambda x: x.relu(), torch.relu_, (), {}),
    (lambda x: x.relu(), F.relu_, (), {}),
    (lambda x: F.relu6(x), F.relu6, (), {}),
    (lambda x: F.relu6(x), F.relu6, (False,), {}),
    (lambda x: F.hardtanh(x), F.hardtanh, (), {}),
    (lambda x: F.hardtanh(x, -2), F.hardtanh, (-2,), {}),
    (lambda x: F.hardtanh(x, -2, 0.5), F.hardtanh, (-2, 0.5, False), {}),
    (lambda x: F.hardtanh(x, -2, 0.5), F.hardtanh, (-2,), {"max_val": 0.5}),
    (lambda x: F.hardtanh(x, max_val=0.5), F.hardtanh, (), {"max_val": 0.5}),
    (lambda x: F.hardtanh(x, min_val=-0.5, max_val=3), F.hardtanh, (), {"min_val": -0.5, "max_val": 3}),
    (lambda x: F.hardtanh(x, -0.5, 3), F.hardtanh_, (-0.5, 3), {}),
    (lambda x: F.leaky_relu(x), F.leaky_relu, (), {}),
    (lambda x: F.leaky_relu(x, 0.3), F.leaky_relu, (0.3, True), {}),
    (lambda x: F.leaky_relu(x, 0.3), F.leaky_relu, (), {"negative_slope": 0.3}),
    (lambda x: F.leaky_relu(x, 0.3), F.leaky_relu_, (0.3,), {}),
    (lambda x: F.silu(x), F.silu, (), {}),
    (lambda x: F.silu(x), F.silu, (), {"inplace": True}),
    (lambda x: F.hardswish(x), F.hardswish, (), {}),
    (lambda x: F.hardswish(x), F.hardswish, (True,), {}),
    (lambda x: F.gelu(x), F.gelu, (), {}),
    (lambda x: F.gelu(x), F.gelu, (), {"approximate": "none"}),
    (lambda x: F.gelu(x, approximate="tanh"), F.gelu, (), {"approximate": "tanh"}),
    (lambda x: x.sigmoid(), torch.sigmoid, (), {}),
    (lambda x: x.sigmoid(), Tensor.sigmoid, (), {}),
    (lambda x: x.sigmoid(), Tensor.sigmoid_, (), {}),
    (lambda x: x.sigmoid(), F.sigmoid, (), {}),
]


@pytest.mark.parametrize(("meaning", "func", "args", "kwargs"), CALLS)
def test_an_activation_is_what_its_function_does(meaning: Any, func: Any, args: Any, kwargs: Any) -> None:
    x = torch.linspace(-9, 9, 101)
    name, low, high = activation_of(func, args, kwargs, torch.float32)
    assert torch.equal(ACTIVATIONS[name](x, low, high), meaning(x))


@pytest.mark.parametrize(("meaning", "func", "args", "kwargs"), CALLS)
def test_in_double_precision_only_clamps_are_fused(meaning: Any, func: Any, args: Any, kwargs: Any) -> None:
    found = activation_of(func, args, kwargs, torch.float64)
    assert found is None or found[0] == "clamp"
    assert (found is not None) == (activation_of(func, args, kwargs, torch.float32)[0] == "clamp")


@pytest.mark.parametrize(
    "func", [F.elu, F.selu, F.mish, torch.tanh, F.softplus, F.prelu, F.rrelu, torch.exp, F.threshold, F.dropout, abs]
)
def test_other_functions_are_none(func: Any) -> None:
    assert activation_of(func, (), {}, torch.float32) is None


def test_every_activation_can_be_called_for() -> None:
    known = {activation_of(func, args, kwargs, torch.float32)[0] for _, func, args, kwargs in CALLS}
    assert known == set(epilogues.ACTIVATIONS)
