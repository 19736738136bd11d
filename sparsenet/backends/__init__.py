"""How a masked convolution on rows is computed, and the choice among the ways.

A backend is a module with two functions:

- `unsupported(weight, groups) -> str | None`: the reason why it cannot compute a layer, or `None`;
- `convolve(rows, weight, bias, groups, kernel_map) -> Tensor`: rows and weight (O, C / groups, kh, kw) to rows
  (n_out, O). The rows are (n_in + 2, C), the last two zero, for taps that find no row; where each site reads only
  itself they are (n_out, C) and `kernel_map` is `None`.

`"reference"` is no backend of rows: it asks for the masked dense storage, the slow and obvious meaning that
every backend is tested against.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sparsenet.backends import indirect, rows, spconv, triton
from sparsenet.sites import KernelMap

BACKENDS: dict[str, ModuleType] = {"rows": rows, "indirect": indirect, "triton": triton, "spconv": spconv}
NAMES = ("auto", "reference", *BACKENDS)


def check(name: str) -> str:
    """`name`, if it is a backend that can be used here; an error that names the way out otherwise."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(NAMES)}")
    if name == "spconv":
        spconv.load()
    if name == "triton":
        triton.load()
    return name


def choose(name: str, weight: Tensor, groups: int) -> tuple[str, str | None]:
    """The backend that computes a layer, and why it is not the one asked for, if it is not; on GPUs "auto" asks for
    "triton"."""
    unasked = "triton" if weight.is_cuda else "rows"
    asked = unasked if name in ("auto", "reference") else name
    reason = BACKENDS[asked].unsupported(weight, groups)
    return (asked, None) if reason is None else ("rows", f"{asked}: {reason}")


def convolve(
    name: str, rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, kernel_map: KernelMap | None
) -> Tensor:
    """Masked convolution of rows to rows (n_out, O) by the backend `name`, as `choose` gave it."""
    out: Tensor = BACKENDS[name].convolve(rows, weight, bias, groups, kernel_map)
    return out
