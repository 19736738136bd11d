"""Normalisation over channels, and batch normalisation with the statistics of active pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from sparsenet.features import Features, Leaves, SparseFeatures, as_rows, rule


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
        return by_running_statistics()
    local = len(x.selection.sites(x.grid))
    if isinstance(x, SparseFeatures) and not x.full and group is None and local > 1:
        return x.like(func(x.value, running_mean, running_var, weight, bias, True, momentum, eps))
    active = active_rows(x)
    active = active.to(torch.promote_types(active.dtype, torch.float32))  # as dense statistics of half precision are
    count = int(_total(active.new_tensor(local), group))
    if count < 2:  # no variance: the running statistics stand in, and stay as they are
        return by_running_statistics()
    mean = _total(active.sum(0), group) / count
    var = _total((active - mean).square().sum(0), group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    value = (x.value - mean[:, None, None]) * scale[:, None, None]
    value = value if bias is None else value + bias[:, None, None]
    return x.like(value.to(x.value.dtype))


def _total(values: Tensor, group: Any) -> Tensor:
    """The sum over the processes of a group, with gradient."""
    return values if group is None else all_reduce(values, group=group)


def active_rows(x: Features) -> Tensor:
    """The values at active sites, (n, C), in either storage."""
    value = x.restricted()
    if isinstance(x, SparseFeatures):
        return as_rows(value)
    return value.permute(0, 2, 3, 1)[x.selection.sites(x.grid).mask]


@rule(F.normalize)
def normalize(func: Any, x: Features, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Features:
    if out is not None or dim not in (1, -3):
        raise Leaves("normalises over another dimension than channels")
    return x.like(func(x.value, p, 1, eps))


@rule(torch.batch_norm_stats)
def synchronised_statistics(func: Any, x: Features, eps: float) -> None:
    """What a `torch.nn.SyncBatchNorm` that surgery has not seen calls in training across processes."""
    raise RuntimeError(
        "this SyncBatchNorm would count inactive pixels of guided features in its statistics: call "
        "torch.nn.SyncBatchNorm.convert_sync_batchnorm before sparsenet.selectify"
    )
