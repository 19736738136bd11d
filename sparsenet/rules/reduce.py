"""Reductions: over channels every pixel keeps its own result; over space the map is read zero at inactive pixels, and
the result is an ordinary tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.calls import name_of
from sparsenet.features import Features, Leaves, SparseFeatures, UnguidedFeatures, as_rows, depart, rule
from sparsenet.rules.channels import over_channels
from sparsenet.rules.combine import arithmetic
from sparsenet.selection import Operation

# Where each function has its argument `dim`, counted from the map.
_DIMENSION = {
    1: "sum mean amax amin max min prod any all argmax argmin logsumexp var std var_mean std_mean median count_nonzero",
    2: "norm",
}
_PLACES: dict[Any, int] = {
    getattr(owner, name): place
    for place, names in _DIMENSION.items()
    for name in names.split()
    for owner in (torch, Tensor)
    if hasattr(owner, name)
} | {torch.linalg.vector_norm: 2, torch.linalg.norm: 2, torch.functional.norm: 2}


@rule(*_PLACES, any_form=True)
def reduce(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(other, Tensor) for other in (*args, kwargs.get("other"))):  # the maximum of two maps
        return arithmetic(func, input, *args, **kwargs)
    if not isinstance(input, Features) or kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    place = _PLACES[func] - 1
    dim: Any = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis"))
    if isinstance(dim, bool):  # torch.var(input, unbiased)
        dim = None
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, Sequence) and len(dim) else None
    if dims is not None and set(input.form.letters(dims)) <= {"C"} and input.form.padding is None:
        return over_channels(func, input, dim, place, args, kwargs)
    if dims is not None and func in (torch.mean, Tensor.mean) and sorted(input.form.letters(dims)) == ["H", "W"]:
        keepdim = bool(args[1] if len(args) > 1 else kwargs.get("keepdim", False))
        return _mean_over_space(func, input, dims, keepdim, kwargs.get("dtype"))
    return _of_whole_map(func, input, *args, **kwargs)


@rule(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def adaptive_avg_pool2d(func: Any, input: Features, output_size: Any) -> Tensor:
    """Pooling to a fixed output size is per image and makes no level, so it ends the region like a mean does."""
    if output_size in (1, (1, 1), [1, 1], torch.Size((1, 1))):
        return _mean_over_space(func, input, [2, 3], True, None)
    return _of_whole_map(func, input, output_size)


@rule(F.adaptive_max_pool2d)
def adaptive_max_pool2d(func: Any, input: Features, *args: Any, **kwargs: Any) -> Any:
    return _of_whole_map(func, input, *args, **kwargs)


def _of_whole_map(func: Any, x: Features, *args: Any, **kwargs: Any) -> Any:
    name = name_of(func)
    x.selection.report(Operation(name, "reduction", x.grid))
    return depart(func, x, func(x.dense(name), *args, **kwargs))


def _mean_over_space(func: Any, x: Features, dims: list[int], keepdim: bool, dtype: Any) -> Tensor:
    """The mean of each image's channels, over all pixels as the dense network takes it, or over the active ones."""
    name, selection, (height, width) = name_of(func), x.selection, x.grid
    if x.form.padding is not None:
        raise Leaves(x.form.description)
    selection.report(Operation(name, "reduction", x.grid))
    if x.dtype is torch.float32 and dtype is None and of_a_layer(x):
        # Of a frozen layer's result no more than is needed: 2 % of EfficientNet, which asks in every block.
        rows = x.computed()
        selection.finish()
        result = x.form.present((rows.sum(0) / (height * width))[None, :, None, None])
    elif isinstance(x, SparseFeatures | UnguidedFeatures):
        x.note_reading(name)
        dtype = x.dtype if dtype is None else dtype
        rows = as_rows(x.restricted()).to(torch.promote_types(dtype, torch.float32))  # where a sum has its place
        if selection.batch == 1:
            sums = rows.sum(0, keepdim=True)
        else:
            each = [height * width] * selection.batch if selection.everything else selection.sites(x.grid).counts
            sums = torch.stack([part.sum(0) for part in rows.split(each)]) if each else rows.new_empty(0, x.shape[1])
        result = x.form.present((sums / (height * width)).to(dtype)[:, :, None, None])
    else:
        result = x.dense(name).mean(dims, keepdim=True, dtype=dtype)
    if selection.options.mean == "active":
        counts = selection.sites(x.grid).mask.flatten(1).sum(1).clamp(min=1).to(result.dtype)
        result = result * (height * width / counts).view([-1 if letter == "N" else 1 for letter in x.form.order])
    result = result if keepdim else result.squeeze([dim % x.dim() for dim in dims])
    return depart(func, x, result)


def of_a_layer(x: Features) -> bool:
    """Whether its rows are what a frozen layer gives for one image, and all that a mean is of."""
    return (x._work is not None or x._rows is not None) and x.selection.batch == 1 and not x.full
