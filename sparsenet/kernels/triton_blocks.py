"""What several of Triton's kernels do with a block, the same compiled and in the interpreter, which NumPy computes."""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiplied(left, right, sums, PRECISION: tl.constexpr):
    """sums + left · right."""
    if INTERPRETED and left.dtype == tl.bfloat16:  # NumPy has none
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def bound(number):
    """A number as a loop's bound, which to NumPy from 2.4 on is no array of one element."""
    if INTERPRETED:
        return number.handle.data.item()
    return number
