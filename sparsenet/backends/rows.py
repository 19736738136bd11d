"""Gather rows by the kernel map, then one matrix product; trainable, any groups, any device.

The gathered columns (taps times the size of the rows) are never kept: they are made chunk by chunk, and made
again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsenet.sites import KernelMap

# Elements of gathered columns at a time: 8 MiB of float32 stay in the last-level cache
# (75x75x256 at density 1 on 2 cores: 25 % faster than one product over all rows).
CHUNK = 1 << 21


def unsupported(weight: Tensor, groups: int) -> str | None:
    return None


def convolve(rows: Tensor, weight: Tensor, groups: int, kernel_map: KernelMap | None) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    outputs, inputs = weight.shape[:2]
    packed = weight.reshape(groups, outputs // groups, inputs, -1).permute(0, 3, 2, 1)
    packed = packed.reshape(groups, -1, outputs // groups)  # (groups, taps * I, O / groups)
    if kernel_map is None:
        return _merge(_split(rows[:, None], groups) @ packed)
    return _GatherProduct.apply(rows, packed, kernel_map)


def _split(columns: Tensor, groups: int) -> Tensor:
    """Columns (n, taps, C) by group: (groups, n, taps * C / groups)."""
    sites, taps, channels = columns.shape
    columns = columns.view(sites, taps, groups, channels // groups)
    return columns.permute(2, 0, 1, 3).reshape(groups, sites, taps * channels // groups)


def _merge(grouped: Tensor) -> Tensor:
    """(groups, n, O / groups) to rows (n, O)."""
    return grouped.transpose(0, 1).flatten(1)


class _GatherProduct(torch.autograd.Function):
    """rows (n_in, C), packed (groups, taps * I, O / groups) -> rows (n_out, O)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(rows, packed)
        ctx.kernel_map = kernel_map
        groups = packed.shape[0]
        out = rows.new_empty(len(kernel_map.table), groups * packed.shape[2])
        for sites, _, columns in _chunks(rows, kernel_map):
            out[sites] = _merge(_split(columns, groups) @ packed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, packed = ctx.saved_tensors
        groups = packed.shape[0]
        grad_rows = rows.new_zeros(len(rows) + 1, rows.shape[1]) if ctx.needs_input_grad[0] else None
        grad_packed = torch.zeros_like(packed)
        for sites, gather, columns in _chunks(rows, ctx.kernel_map):
            out = _split(grad[sites][:, None], groups)  # (groups, n, O / groups)
            grad_packed.baddbmm_(_split(columns, groups).transpose(1, 2), out)
            if grad_rows is not None:
                back = (out @ packed.transpose(1, 2)).view(groups, *columns.shape[:2], -1)
                grad_rows.index_add_(0, gather, back.permute(1, 2, 0, 3).reshape(-1, rows.shape[1]))
        return (None if grad_rows is None else grad_rows[:-1]), grad_packed, None


def _chunks(rows: Tensor, kernel_map: KernelMap) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Output sites chunk by chunk: which, the rows their taps read, and these rows' features (n, taps, C)."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    count, taps = kernel_map.table.shape
    step = max(1, CHUNK // (taps * rows.shape[1]))
    for start in range(0, count, step):
        sites = slice(start, min(start + step, count))
        gather = kernel_map.gather[sites.start * taps : sites.stop * taps]
        yield sites, gather, padded.index_select(0, gather).view(-1, taps, rows.shape[1])
