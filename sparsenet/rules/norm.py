"""Normalisation by statistics: of the batch's active pixels, of each image's map, of neighbouring channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Norm
from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, as_rows, rule
from sparsenet.work import Layer


@rule(F.batch_norm)
def batch_norm(
    func: Any,
    x: Features,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: Any = None,
) -> Features:
    """`group`: the process group whose active pixels make the statistics together; this process alone if `None`."""

    def by_running_statistics() -> Features:
        channels = x.value.shape[1]
        mean = x.value.new_zeros(channels) if running_mean is None else running_mean
        var = x.value.new_ones(channels) if running_var is None else running_var
        return x.like(func(x.value, mean, var, weight, bias, False, momentum, eps))

    if not training:
        following = None
        if x._work is not None and x.form.plain:
            layer, epilogue = x._work.layer, x._work.epilogue
            following = x.then(normalised(layer, epilogue, running_mean, running_var, weight, bias, eps))
        return by_running_statistics() if following is None else following
    local = len(x.selection.sites(x.grid))
    if isinstance(x, SparseFeatures) and not x.full and group is None and local > 1:
        return x.like(func(x.value, running_mean, running_var, weight, bias, True, momentum, eps))
    value = normalised_over(active_rows(x), x.value, running_mean, running_var, weight, bias, momentum, eps, group)
    # Without a variance the running statistics stand in, and stay as they are.
    return by_running_statistics() if value is None else x.like(value)


def normalised_over(
    rows: Tensor,
    value: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor | None:
    """`value` (N, C, ...) by the statistics of `rows` (n, C), of all processes of a group, or `None` where they are
    fewer than two; the running statistics follow."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # as dense statistics of half precision are
    count = len(rows)
    if group is not None:
        counts = torch.tensor(count, device=rows.device)
        torch.distributed.all_reduce(counts, group=group)
        count = int(counts)
    if count < 2:
        return None
    mean = _total(rows.sum(0), group) / count
    var = _total((rows - mean).square().sum(0), group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    shape = (-1, *[1] * (value.dim() - 2))
    result = (value - mean.view(shape)) * scale.view(shape)
    result = result if bias is None else result + bias.view(shape)
    return result.to(value.dtype)


def normalised(
    layer: Layer,
    epilogue: Epilogue,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Epilogue | None:
    """The epilogue of a layer's work on a plain map, with normalisation by running statistics as its next step, or
    `None` where it cannot be."""
    if mean is None or var is None or mean.shape[0] != layer.outputs:
        return None
    return layer.normalised(epilogue, Norm(mean, var, weight, bias, eps))


def _total(values: Tensor, group: Any) -> Tensor:
    """The sum over the processes of a group, with gradient."""
    return values if group is None else all_reduce(values, group=group)


def active_rows(x: Features) -> Tensor:
    """The values at active sites, (n, C), in either storage."""
    value = x.restricted()
    if isinstance(x, SparseFeatures):
        return as_rows(value)
    return value.permute(0, 2, 3, 1)[x.selection.sites(x.grid).mask]


@rule(F.group_norm, torch.group_norm)
def group_norm(
    func: Any,
    input: Features,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Features:
    """Statistics of each image's whole map, zeros at inactive pixels included: exactly the dense operation's."""
    if not isinstance(input, Features):
        raise Leaves("its weight is a feature map")
    if input.shape[1] % num_groups:
        raise RuntimeError(f"{input.shape[1]} channels cannot be normalised in {num_groups} groups")
    return _by_image(input, num_groups, weight, bias, eps)


@rule(F.instance_norm, torch.instance_norm)
def instance_norm(
    func: Any,
    input: Features,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *unused: Any,
) -> Features:
    if not use_input_stats:
        return batch_norm(F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None and running_var is not None:
        raise Leaves("keeps running statistics of whole maps")
    return _by_image(input, input.shape[1], weight, bias, eps)


def _by_image(x: Features, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Features:
    if isinstance(x, MaskedFeatures):
        value = F.group_norm(x.read("group_norm"), groups, weight, bias, eps)
        return MaskedFeatures.make(value, x.selection, x.grid, full=False)
    assert isinstance(x, SparseFeatures)
    dtype = torch.promote_types(x.dtype, torch.float32)
    pixels, means, variances = x.grid[0] * x.grid[1], [], []
    for rows in x.rows.to(dtype).split(x.sites.counts):
        rows = rows.unflatten(1, (groups, -1))
        size = pixels * rows.shape[2]
        mean = rows.sum((0, 2)) / size
        missing = size - len(rows) * rows.shape[2]  # zeros, each of which deviates by the mean
        deviation = (rows - mean[:, None]).square().sum((0, 2)) + missing * mean.square()
        means.append(mean)
        variances.append(deviation / size)
    each = x.shape[1] // groups
    mean, var = (torch.stack(found).repeat_interleave(each, 1) for found in (means, variances))
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    rows = as_rows(x.restricted())
    image = x.selection.sites(x.grid).image
    scale, shift = (each if len(each) == 1 else each.index_select(0, image) for each in (scale, shift))
    return SparseFeatures.of_rows((rows * scale + shift).to(x.dtype), x.selection, x.grid)


@rule(F.local_response_norm)
def local_response_norm(func: Any, input: Features, *args: Any, **kwargs: Any) -> Features:
    """Over neighbouring channels, each pixel by itself."""
    return input.like(func(input.value, *args, **kwargs))


@rule(torch.batch_norm_stats)
def synchronised_statistics(func: Any, x: Features, eps: float) -> None:
    """What a `torch.nn.SyncBatchNorm` that surgery has not seen calls in training across processes."""
    raise RuntimeError(
        "this SyncBatchNorm would count inactive pixels of guided features in its statistics: call "
        "torch.nn.SyncBatchNorm.convert_sync_batchnorm before sparsenet.selectify"
    )
