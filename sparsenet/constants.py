"""Tensors that follow from sizes alone: made once, and kept for the passes that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., Any])

_holder: ContextVar[list[Any] | None] = ContextVar("sparsenet.constants", default=None)


def constant(most: int) -> Callable[[Function], Function]:
    """Decorator: keep the `most` last results of a function of hashable arguments, positional ones.

    They are made as numbers even where a tracer watches, of whose program they are constants then, and outside of
    inference mode, because they outlive the pass.
    """

    def decorate(function: Function) -> Function:
        @lru_cache(maxsize=most)
        def made(*arguments: Any) -> Any:
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                return function(*arguments)

        @wraps(function)
        def kept(*arguments: Any) -> Any:
            result = made(*arguments)
            holder = _holder.get()
            if holder is not None:
                holder.append(result)
            return result

        return kept  # type: ignore[return-value]

    return decorate


@contextmanager
def held() -> Iterator[list[Any]]:
    """Gives a list of the constants that are used inside. A CUDA graph reads them where they lie, so that whoever keeps
    the graph must keep them."""
    held: list[Any] = []
    token = _holder.set(held)
    try:
        yield held
    finally:
        _holder.reset(token)
