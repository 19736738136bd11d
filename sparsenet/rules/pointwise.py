"""Operations on each number by itself: the same call on the value of either storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends.epilogue import activation_of
from sparsenet.calls import is_in_place
from sparsenet.features import Features, Leaves, rule

_ACTIVATIONS = """
    relu relu6 leaky_relu elu selu celu hardtanh hardswish hardsigmoid silu mish gelu sigmoid logsigmoid
    softplus softsign tanh tanhshrink hardshrink softshrink threshold rrelu
    dropout alpha_dropout
"""
_FUNCTIONS = """
    relu sigmoid tanh abs neg exp log sqrt rsqrt square sin cos tan erf erfc expm1 log1p log2
    log10 exp2 reciprocal sign selu celu hardshrink threshold positive negative absolute floor ceil round trunc frac
    asinh acosh atan sinh cosh asin acos logit nan_to_num isnan isinf isfinite logical_not
    bitwise_not dropout alpha_dropout rrelu __neg__ __pos__ __abs__ __invert__
"""


def _everywhere(names: str, *places: Any) -> list[Any]:
    """The functions of these names, in-place variants included, wherever PyTorch has them."""
    spelled = [name + ending for name in names.split() for ending in ("", "_")]
    return [getattr(place, name) for place in places for name in spelled if hasattr(place, name)]


@rule(*_everywhere(_ACTIVATIONS, F), *_everywhere(_FUNCTIONS, torch, Tensor), any_form=True)
def pointwise(func: Any, input: Features, *args: Any, **kwargs: Any) -> Features:
    if not isinstance(input, Features) or any(isinstance(other, Tensor) for other in (*args, *kwargs.values())):
        raise Leaves("an argument other than the first is a tensor")
    if input.form.padding is not None:
        raise Leaves(input.form.description)
    in_place = is_in_place(func, (input, *args), kwargs)
    activation = activation_of(func, args, kwargs, input.dtype)
    if activation is not None and input._work is not None:
        following = input.then(input._work.epilogue.activated(*activation), input if in_place else None)
        if following is not None:
            return following
    before = input.writable() if in_place else input.value
    value = func(before, *args, **kwargs)
    if value is not before:
        return input.like(value)
    # Some give back their argument where there is nothing to do: dropout in evaluation.
    return input.replace(value, input.full) if in_place else input


@rule(F.prelu, torch.prelu, Tensor.prelu)
def prelu(func: Any, input: Features, weight: Tensor) -> Features:
    if not isinstance(input, Features):
        raise Leaves("its weight is a feature map")
    return input.like(func(input.value, weight))


@rule(F.dropout2d, torch.feature_dropout)
def dropout2d(func: Any, input: Features, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Drops channels of images, so what it draws has no pixels."""
    ones = torch.ones(input.selection.batch, input.shape[1], 1, 1, dtype=input.dtype, device=input.device)
    kept = func(ones, p, training)
    return input.mul_(kept) if inplace else input * kept
