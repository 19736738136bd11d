"""Activations as kernels compute them, vector by vector."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from numpy.polynomial import chebyshev

from sparsenet.kernels.machine import Kernel

Activation = Callable[[Kernel, Any, Any, Any], Any]
"""Of a kernel, a vector, and the two parameters of the job."""


def exp(kernel: Kernel, value: Any) -> Any:
    """e to the power of float32 numbers: 2^n times a Taylor polynomial of the rest, which is at most ln(2) / 2, where
    the first term left out is below 1e-8 of the result."""
    build = kernel.build
    value = kernel.clamp(value, kernel.constant(-87.0), kernel.constant(88.0))
    # Added to this, a number loses its fraction, and its lowest bits are the whole number n.
    bias = kernel.constant(1.5 * 2**23)
    moved = kernel.fma(value, kernel.constant(1 / math.log(2)), bias)
    power = build.fsub(moved, bias)
    high = 0.693359375  # of few digits, so that its products are exact
    rest = kernel.fma(power, kernel.constant(-high), value)
    rest = kernel.fma(power, kernel.constant(high - math.log(2)), rest)
    result = kernel.polynomial(rest, [1 / math.factorial(each) for each in range(8)])
    exponent = build.shl(build.bitcast(moved, kernel.bits), kernel.ir.Constant(kernel.bits, [23] * kernel.lanes))
    return build.bitcast(build.add(build.bitcast(result, kernel.bits), exponent), kernel.vector)


def _at_least(kernel: Kernel, value: Any, low: float) -> Any:
    """Numbers far below zero, where an activation is 0 to rounding and its approximation ends."""
    bound = kernel.constant(low)
    return kernel.build.select(kernel.build.fcmp_ordered("<", value, bound), bound, value)


def _clamp(kernel: Kernel, value: Any, low: Any, high: Any) -> Any:
    return kernel.clamp(value, low, high)


def _leaky_relu(kernel: Kernel, value: Any, slope: Any, _: Any) -> Any:
    build = kernel.build
    return build.select(build.fcmp_ordered("<", value, kernel.zero), build.fmul(value, slope), value)


def _sigmoid(kernel: Kernel, value: Any, *_: Any) -> Any:
    one = kernel.constant(1.0)
    return kernel.build.fdiv(one, kernel.build.fadd(one, exp(kernel, kernel.build.fneg(value))))


def _silu(kernel: Kernel, value: Any, *_: Any) -> Any:
    build = kernel.build
    below = build.fadd(kernel.constant(1.0), exp(kernel, build.fneg(value)))
    return build.fdiv(_at_least(kernel, value, -88.0), below)


def _hardswish(kernel: Kernel, value: Any, *_: Any) -> Any:
    moved = kernel.clamp(kernel.build.fadd(value, kernel.constant(3.0)), kernel.zero, kernel.constant(6.0))
    return kernel.build.fmul(kernel.build.fmul(value, moved), kernel.constant(1 / 6))


def _gelu_tanh(kernel: Kernel, value: Any, *_: Any) -> Any:
    """value · sigmoid(2 √(2/π) (value + 0.044715 value³)), which is the tanh form."""
    build, doubled = kernel.build, 2 * math.sqrt(2 / math.pi)
    square = build.fmul(value, value)
    inner = kernel.fma(square, kernel.constant(0.044715 * doubled), kernel.constant(doubled))
    below = build.fadd(kernel.constant(1.0), exp(kernel, build.fneg(build.fmul(inner, value))))
    return build.fdiv(_at_least(kernel, value, -88.0), below)


_ERF_BOUND = 3.9  # beyond, erf is 1 to half a unit in float32's last place


@functools.cache
def _erf_coefficients() -> list[float]:
    """Of erf(x) / x as a polynomial of 2 (x / bound)² - 1, which runs from -1 to 1 and so needs no large coefficients.
    Degree 15 leaves float32 rounding alone, 2e-7."""

    places = chebyshev.chebpts1(16)
    values = [_ERF_BOUND * math.sqrt((place + 1) / 2) for place in places]
    ratios = [math.erf(value) / value for value in values]
    found: list[float] = chebyshev.cheb2poly(chebyshev.chebfit(places, ratios, 15)).tolist()
    return found


def _gelu(kernel: Kernel, value: Any, *_: Any) -> Any:
    """value · (1 + erf(value / √2)) / 2."""
    build, bound = kernel.build, kernel.constant(_ERF_BOUND)
    inner = build.fmul(value, kernel.constant(math.sqrt(0.5)))
    inner = kernel.clamp(inner, kernel.constant(-_ERF_BOUND), bound)
    place = kernel.fma(build.fmul(inner, inner), kernel.constant(2 / _ERF_BOUND**2), kernel.constant(-1.0))
    erf = build.fmul(inner, kernel.polynomial(place, _erf_coefficients()))
    half = build.fmul(_at_least(kernel, value, -_ERF_BOUND * math.sqrt(2)), kernel.constant(0.5))
    return kernel.fma(half, erf, half)


ACTIVATIONS: dict[str, Activation] = {
    "clamp": _clamp,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "hardswish": _hardswish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""By name. `clamp` is also none, ReLU and ReLU6: its bounds are the parameters."""
