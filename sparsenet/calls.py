"""What a function that reached a guided map is called, and whether it writes in place."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch.nn import functional as F

# Some of these functions are nameless dispatchers on a flag, such as `return_indices`.
_FUNCTIONAL = {function: f"F.{name}" for name, function in vars(F).items() if callable(function) and name[0] != "_"}


def name_of(func: Any) -> str:
    """A function's name as a reader knows it: `Tensor.view`, `torch.flatten`, `F.interpolate`."""
    if func in _FUNCTIONAL:
        return _FUNCTIONAL[func]
    name = getattr(func, "__name__", None) or str(func)
    if name in ("__get__", "__set__"):
        return f"Tensor.{getattr(func.__self__, '__name__', 'attribute')}"
    qualified = str(getattr(func, "__qualname__", "pybind11"))
    name = name if qualified.startswith("pybind11") else qualified  # as operators of other libraries call themselves
    for internal, known in (("_VariableFunctionsClass", "torch"), ("_TensorBase", "Tensor"), ("TensorBase", "Tensor")):
        name = name.replace(internal, known)
    return name


_OPERATORS = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "xor",
    "or",
)
_WRITING = {*(f"__i{name}__" for name in _OPERATORS), "__setitem__", "__set__", "__delitem__"}


def is_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
        return True
    position = _inplace_argument(func)
    return bool(kwargs.get("inplace") or (position is not None and len(args) > position and args[position]))


@cache
def _inplace_argument(func: Any) -> int | None:
    """The position of a function's argument `inplace`, if it has one. A builtin has no signature: its name tells."""
    try:
        parameters = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None
