"""What is done to each output of a convolution or linear layer before it is first written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "clamp": lambda rows, low, high: rows.clamp(low, high),
    "leaky_relu": lambda rows, slope, _: F.leaky_relu(rows, slope),
    "sigmoid": lambda rows, *_: rows.sigmoid(),
    "silu": lambda rows, *_: F.silu(rows),
    "hardswish": lambda rows, *_: F.hardswish(rows),
    "gelu": lambda rows, *_: F.gelu(rows),
    "gelu_tanh": lambda rows, *_: F.gelu(rows, approximate="tanh"),
}
"""The activations that an epilogue can be, of rows and two parameters. `clamp` is none, ReLU and ReLU6 too."""


class Epilogue(NamedTuple):
    """activation(sum · scale + shift), with a residual added before or after the activation.

    Attributes:
        scale, shift: (O,), or `None` for 1 and 0.
        residual: rows (n_out, O), added "before" or "after" the activation, as `order` says.
        activation: a name of `ACTIVATIONS`, and its two parameters.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    order: str = "before"
    activation: str = "clamp"
    low: float = -math.inf
    high: float = math.inf

    @property
    def activates(self) -> bool:
        return (self.activation, self.low, self.high) != ("clamp", -math.inf, math.inf)

    # -- one step more, or `None` where it cannot be part ------------------------------------------------------

    @property
    def scales(self) -> bool:
        """Whether a scale can be the next step."""
        return not self.activates and self.residual is None

    def scaled(self, scale: Tensor, shift: Tensor | None) -> Epilogue | None:
        if not self.scales:
            return None
        before = shift if self.shift is None else self.shift * scale if shift is None else self.shift * scale + shift
        return self._replace(scale=scale if self.scale is None else self.scale * scale, shift=before)

    def activated(self, activation: str, low: float, high: float) -> Epilogue | None:
        if self.activates or self.order == "after":
            return None
        return self._replace(activation=activation, low=low, high=high)

    def plus(self, residual: Tensor) -> Epilogue | None:
        if self.residual is not None:
            return None
        return self._replace(residual=residual, order="after" if self.activates else "before")

    # -- where no kernel does it -------------------------------------------------------------------------------

    def of(self, rows: Tensor) -> Tensor:
        """The outputs of sums (n_out, O), step by step, in their dtype."""
        dtype = rows.dtype
        if self.scale is not None:
            rows = rows * self.scale
        if self.shift is not None:
            rows = rows + self.shift
        if self.residual is not None and self.order == "before":
            rows = rows + self.residual
        if self.activates:
            rows = ACTIVATIONS[self.activation](rows, self.low, self.high)
        if self.residual is not None and self.order == "after":
            rows = rows + self.residual
        return rows.to(dtype)


def activation_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """(name, low, high) of a call of an activation function on a map, or `None` if it is none that can be fused.

    Args:
        args, kwargs: what it was called with beside the map.
    """
    match getattr(func, "__name__", ""):
        case "relu" | "relu_":
            return "clamp", 0.0, math.inf
        case "relu6":
            return "clamp", 0.0, 6.0
        case "hardtanh" | "hardtanh_":
            low = args[0] if args else kwargs.get("min_val", -1.0)
            return "clamp", float(low), float(args[1] if len(args) > 1 else kwargs.get("max_val", 1.0))
        case name if dtype is torch.float64:  # the kernels' exponentials are single precision
            return None
        case "leaky_relu" | "leaky_relu_":
            return "leaky_relu", float(args[0] if args else kwargs.get("negative_slope", 0.01)), 0.0
        case "gelu":
            return ("gelu" if kwargs.get("approximate", "none") == "none" else "gelu_tanh"), 0.0, 0.0
        case "silu" | "silu_" | "hardswish" | "hardswish_" | "sigmoid" | "sigmoid_" as name:
            return name.rstrip("_"), 0.0, 0.0
    return None
