"""spconv's functional layer with our kernel maps.

spconv's own modules cannot take an imposed set of output sites, so its tables are made here from the kernel
map. On CPU its native algorithm runs; on CUDA implicit gemm where no gradient is asked for, the native
algorithm where one is. Whatever spconv cannot compute is named by `unsupported`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsenet.sites import KernelMap

_package: ContextVar[str] = ContextVar("sparsenet.spconv", default="spconv")


@contextmanager
def ported() -> Iterator[None]:
    """Inside, the package spconv-triton computes, spconv's port to Triton for GPUs: benchmarks compare with it."""
    token = _package.set("spconv_triton")
    try:
        yield
    finally:
        _package.reset(token)


def load() -> SimpleNamespace:
    """spconv's functional layer, imported when first asked for: the import takes seconds."""
    package = _package.get()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its use of torch.cuda.amp
            spconv: Any
            if package == "spconv":
                spconv = importlib.import_module("spconv.pytorch")
                constants = importlib.import_module("spconv.constants")
            else:
                spconv = importlib.import_module("spconv_triton.pytorch")
                constants = importlib.import_module("spconv_triton.constants")
        return SimpleNamespace(
            ops=spconv.ops,
            constants=constants,
            convolve=spconv.functional.SparseConvFunction.apply,
            native=spconv.ops.ConvAlgo.Native,
        )
    except ImportError as error:
        if package != "spconv":
            raise ImportError(
                f"the package spconv-triton could not be imported ({error}): pip install spconv-triton"
            ) from error
        raise ImportError(
            "the spconv backend needs the package spconv, which could not be imported: install spconv-cu120 "
            "(Python < 3.12) or a newer spconv-cu12x wheel, or use backend='rows'"
        ) from error


def unsupported(weight: Tensor, groups: int) -> str | None:
    if groups != 1:
        return "spconv has no grouped convolution"
    if weight.shape[2:].numel() == 1:
        return "spconv scrambles the weights of 1x1 layers; they are a plain matrix product"
    known = (torch.float16, torch.float32) if weight.is_cuda else (torch.float32, torch.float64)
    dtype = _dtype(weight)
    if dtype not in known:
        return f"spconv has no {dtype} on {'GPUs' if weight.is_cuda else 'CPU'}"
    return None


def _dtype(weight: Tensor) -> torch.dtype:
    """What a layer is computed in: as autocast has it for convolutions."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, kernel_map: KernelMap | None) -> Tensor:
    assert kernel_map is not None, "a layer of one tap is refused by `unsupported`"
    dtype = _dtype(weight)
    if max(rows.numel(), len(kernel_map.table) * weight.shape[0], 2 * kernel_map.table.numel()) >= 1 << 31:
        raise RuntimeError("spconv counts elements by 32 bits, and here are more: use backend='rows' or 'triton'")
    with torch.autocast(rows.device.type, enabled=False):  # it would cast to float16, whatever is asked for
        out = _convolve(rows[:-2].to(dtype), weight.to(dtype), kernel_map)
    return out if bias is None else out + bias.to(out.dtype)  # its CPU path refuses a bias


def _convolve(rows: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    spconv = load()
    outputs = len(kernel_map.table)
    if outputs == 0 or len(rows) == 0:
        # spconv asserts on empty tensors; the sum keeps both operands in the graph.
        return rows.new_zeros(outputs, weight.shape[0]) + (rows.sum() + weight.sum()) * 0
    # As matrix products have it.
    spconv.constants.SPCONV_ALLOW_TF32 = torch.get_float32_matmul_precision() != "highest"
    filters = weight.permute(0, 2, 3, 1).contiguous()
    rows = rows.contiguous()
    needs_grad = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    if rows.is_cuda and not needs_grad and kernel_map.table.shape[1] <= 32:
        return _implicit_gemm(spconv, rows, filters, kernel_map)
    pairs, counts = kernel_map.pairs
    result: Tensor = spconv.convolve(rows, filters, pairs, counts, outputs, spconv.native)
    return result


def _implicit_gemm(spconv: SimpleNamespace, rows: Tensor, filters: Tensor, kernel_map: KernelMap) -> Tensor:
    """The CUDA path, whose sums are of float32."""
    pairs, bits, order = kernel_map.patterns
    every_tap = [np.array([0xFFFFFFFF], dtype=np.uint32)]
    result: Tensor
    result, *_ = spconv.ops.implicit_gemm(
        rows,
        filters,
        pairs,
        [bits[:, None]],
        [order],
        len(bits),
        every_tap,
        is_train=False,
        is_subm=False,
        fp32_accum=True,
    )
    return result
