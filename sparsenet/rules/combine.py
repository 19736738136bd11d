"""Operations on several maps of one size: arithmetic and concatenation over channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsenet.features import Features, Leaves, rule

_ARITHMETIC = "add sub mul div true_divide subtract multiply divide maximum minimum rsub pow"
_OPERATORS = "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow"


def _functions() -> list[Any]:
    spelled = [name + ending for name in _ARITHMETIC.split() for ending in ("", "_")]
    operators = [f"__{name}__" for name in _OPERATORS.split()]
    return [getattr(torch, name) for name in spelled if hasattr(torch, name)] + [
        getattr(Tensor, name) for name in spelled + operators if hasattr(Tensor, name)
    ]


def common(parts: list[Any]) -> tuple[Features, bool]:
    """A feature map that speaks for all of `parts`, and whether their combination is full.

    Raises:
        Leaves: when two belong to different selections or sizes, or a tensor is larger than the map.
    """
    guided = [part for part in parts if isinstance(part, Features)]
    first = guided[0]
    for other in guided[1:]:
        if other.selection is not first.selection:
            raise Leaves("meets features of another selection")
        if other.grid != first.grid:
            raise Leaves(f"meets features of another size, {other.grid[0]}x{other.grid[1]}")
    for part in parts:
        if isinstance(part, Tensor) and not isinstance(part, Features):
            if part.dim() > 4:
                raise Leaves("meets a tensor of more than four dimensions")
            batch, _, *size = (1,) * (4 - part.dim()) + tuple(part.shape)
            if batch not in (1, first.selection.batch):
                raise Leaves("meets a tensor of another batch size")
            if any(length not in (1, of) for length, of in zip(size, first.grid, strict=True)):
                raise Leaves("meets a tensor of another size")
    return first, all(part.full for part in guided)


def aligned(parts: list[Any]) -> tuple[Features, bool, list[Any]]:
    """As `common`, with every part as it combines with a value: full ones restricted where one is not full."""
    first, full = common(parts)
    values = []
    for part in parts:
        if isinstance(part, Features):
            values.append(part.value if full else part.restricted())
        elif isinstance(part, Tensor):
            values.append(first.operand(part, full))
        else:
            values.append(part)
    return first, full, values


@rule(*_functions())
def arithmetic(func: Any, input: Any, other: Any = None, **kwargs: Any) -> Features:
    other = kwargs.pop("exponent", other)
    if kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    in_place = _in_place(func)
    if in_place and not isinstance(input, Features):
        raise Leaves("writes into an ordinary tensor")
    first, full, (left, right) = aligned([input, other])
    if in_place and left is not input._value:
        left = left.clone()  # neither a view nor rows that others hold
    value = func(left, right, **kwargs)
    if value is NotImplemented:
        return value
    if in_place:
        return input.replace(value, full)
    return type(first).make(value, first.selection, first.grid, full=full, live=_live([input, other]))


def _in_place(func: Any) -> bool:
    name = func.__name__
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _live(parts: list[Any]) -> bool:
    return any(part._live for part in parts if isinstance(part, Features))


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Features:
    dim = kwargs.pop("axis", dim)
    if kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    if dim not in (1, -3):
        raise Leaves("concatenates over another dimension than channels")
    tensors = list(tensors)
    first, _ = common(tensors)
    if any(tuple(part.shape[2:]) != first.grid or part.shape[0] != first.selection.batch for part in tensors):
        raise Leaves("concatenates maps of different sizes")
    _, full, values = aligned(tensors)
    return type(first).make(func(values, dim=1), first.selection, first.grid, full=full, live=_live(tensors))
