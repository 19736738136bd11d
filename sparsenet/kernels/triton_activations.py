"""The activations of an epilogue in Triton: the names of `sparsenet.kernels.activations`."""

import triton
import triton.language as tl


@triton.jit
def activated(x, NAME: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """An activation of a block of single or double precision, by name and two parameters."""
    if NAME == "clamp":
        if float("-inf") != LOW:
            x = tl.maximum(x, tl.full(x.shape, LOW, x.dtype), propagate_nan=tl.PropagateNan.ALL)
        if float("inf") != HIGH:
            x = tl.minimum(x, tl.full(x.shape, HIGH, x.dtype), propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "leaky_relu":
        x = tl.where(x > 0, x, x * tl.full(x.shape, LOW, x.dtype))
    elif NAME == "sigmoid":
        x = logistic(x)
    elif NAME == "silu":
        x = x * logistic(x)
    elif NAME == "hardswish":
        six = tl.full(x.shape, 6.0, x.dtype)
        above = tl.maximum(x + 3.0, tl.zeros_like(x), propagate_nan=tl.PropagateNan.ALL)
        x = x * tl.minimum(above, six, propagate_nan=tl.PropagateNan.ALL) / 6.0
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        x = x * logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(False, "no such activation")
    return x


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))
