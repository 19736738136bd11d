"""Products and normalisation over the last dimension, where channels are last: each pixel by itself."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import indirect, workspace
from sparsenet.features import Features, Leaves, rule
from sparsenet.kernels import norm
from sparsenet.selection import Operation


def over_last(x: Features, dims: int, function: Callable[[Tensor], Tensor]) -> Features:
    """A function of a tensor's last dimensions, where these are channels.

    Raises:
        Leaves: where they are not.
    """
    form = x.form
    if form.padding is not None or not 1 <= dims <= x.dim() or set(form.order[-dims:]) != {"C"}:
        raise Leaves(f"works over the last dimensions of a map laid out as {form.order}")
    count = len(form.channels)
    cells = x.cells(x.value)  # (N, *channels, H, W), of which the last channels go to the end
    moved = list(range(1 + count - dims, 1 + count))
    result = function(cells.movedim(moved, list(range(-dims, 0))))
    cells = result.movedim(list(range(-dims, 0)), moved)
    return x.like(x.packed(cells), form=form.with_channels(cells.shape[1:-2]))


@rule(F.linear, any_form=True)
def linear(func: Any, input: Features, weight: Tensor, bias: Tensor | None = None) -> Features:
    if not isinstance(input, Features) or isinstance(weight, Features) or weight.dim() != 2:
        raise Leaves("its weight is a feature map")
    x, per_site = input, weight.numel() * prod(input.form.channels[:-1])
    pixels = x.selection.batch * x.grid[0] * x.grid[1]
    with x.selection.reporting(
        lambda: Operation("linear", "guided", x.grid, len(x.sites) * per_site, pixels * per_site)
    ):
        return over_last(x, 1, lambda cells: func(cells, weight, bias))


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, any_form=True)
def matmul(func: Any, input: Any, other: Any) -> Features:
    if not isinstance(input, Features) or isinstance(other, Features) or other.dim() != 2:
        raise Leaves("multiplies pixels with one another")
    return linear(F.linear, input, other.T)


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, any_form=True)
def layer_norm(func: Any, input: Features, normalized_shape: Any, *args: Any, **kwargs: Any) -> Features:
    dims = len(normalized_shape)
    if func in (F.layer_norm, torch.layer_norm) and isinstance(input, Features):
        by_kernel = _by_kernel(input, tuple(normalized_shape), *args, **kwargs)
        if by_kernel is not None:
            return by_kernel
    return over_last(input, dims, lambda cells: func(cells, normalized_shape, *args, **kwargs))


def _by_kernel(
    x: Features,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Features | None:
    """Layer normalisation of what a frozen layer gives, by a kernel that waits for the layer's, or `None`."""
    form, selection = x.form, x.selection
    if x.has_value or selection.observers or form.channels != normalized_shape or form.order[-1] != "C":
        return None
    rows = x.computed()
    if form.padding is not None or indirect.unsupported(rows, 1) is not None:
        return None
    channels = rows.shape[1]
    weight = indirect.constant(channels, 1.0, rows.dtype) if weight is None else weight
    bias = indirect.constant(channels, 0.0, rows.dtype) if bias is None else bias
    for part in (weight, bias):
        if isinstance(part, Features) or part.dtype != rows.dtype or not part.is_contiguous() or part.requires_grad:
            return None
    out = workspace.empty(rows.shape[0], channels, rows)
    norm.layer_norm(rows, weight, bias, eps, out).wait()
    x.settle()
    return type(x).of_kernel(out, selection, x.grid, full=x.full, form=form)
