"""What Triton's interpreter, which computes by NumPy, needs of kernels that are compiled too."""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bound(number):
    """A number as a loop's bound, which to NumPy from 2.4 on is no array of one element."""
    if INTERPRETED:
        return number.handle.data.item()
    return number
