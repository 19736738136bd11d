"""Operations on each number by itself: the same call on the value of either storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.features import Features, Leaves, rule

_ACTIVATIONS = """
    relu relu6 leaky_relu elu selu celu hardtanh hardswish hardsigmoid silu mish gelu sigmoid logsigmoid
    softplus softsign tanh tanhshrink hardshrink softshrink threshold
"""
_FUNCTIONS = """
    relu sigmoid tanh abs neg exp log sqrt rsqrt square clamp clamp_min clamp_max sin cos erf expm1 log1p
    reciprocal sign selu celu hardshrink threshold
"""


def _everywhere(names: str, *places: Any) -> list[Any]:
    """The functions of these names, in-place variants included, wherever PyTorch has them."""
    spelled = [name + ending for name in names.split() for ending in ("", "_")]
    return [getattr(place, name) for place in places for name in spelled if hasattr(place, name)]


@rule(*_everywhere(_ACTIVATIONS, F), *_everywhere(_FUNCTIONS, torch, Tensor), F.dropout, torch.dropout)
def pointwise(func: Any, input: Features, *args: Any, **kwargs: Any) -> Features:
    if not isinstance(input, Features) or any(isinstance(other, Tensor) for other in (*args, *kwargs.values())):
        raise Leaves("an argument other than the first is a tensor")
    before = input.value
    value = func(before, *args, **kwargs)
    return input.replace(value, input.full) if value is before else input.like(value)


@rule(F.prelu, torch.prelu, Tensor.prelu)
def prelu(func: Any, input: Features, weight: Tensor) -> Features:
    if not isinstance(input, Features):
        raise Leaves("its weight is a feature map")
    return input.like(func(input.value, weight))
