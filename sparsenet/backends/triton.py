"""Kernels in Triton that read rows by way of the kernel map, on GPUs: see `sparsenet.kernels.triton_convolution`.
Float32 (TF32 where `torch.set_float32_matmul_precision` allows it), float16, bfloat16 and float64, any groups,
depthwise among them, and the gradients of training. Sums are of float32, of float64 for float64.

On CPU the same kernels run in Triton's interpreter, where `TRITON_INTERPRET=1` is set before anything imports Triton:
to test them, not to compute with.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsenet.backends import rows as product
from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import triton_support
from sparsenet.sites import KernelMap


def load() -> None:
    """Raises ImportError, which names the way out, where Triton is missing or too old."""
    reason = triton_support.missing()
    if reason is not None:
        raise ImportError(f"the triton backend cannot run: {reason}, or use backend='rows'")


def unsupported(weight: Tensor, groups: int) -> str | None:
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    if weight.numel() >= 1 << 31:
        return "its kernels count the elements of weights by 32 bits"
    return triton_support.unsupported(weight.device, dtype)


# -- packed weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Weights in the order in which kernels read them, (groups, taps, C / groups, O / groups), and how they were."""

    weights: Tensor
    shape: torch.Size


def pack(weight: Tensor, groups: int) -> Packed:
    """Weights (O, C / groups, kh, kw) in the kernels' order: a copy."""
    return Packed(_by_tap(weight.detach(), groups).clone(memory_format=torch.contiguous_format), weight.shape)


def unpack(packed: Packed) -> Tensor:
    """The weights as they were, (O, C / groups, kh, kw)."""
    return packed.weights.permute(0, 3, 2, 1).reshape(packed.shape)


def _by_tap(weight: Tensor, groups: int) -> Tensor:
    outputs, channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    return weight.reshape(groups, outputs // groups, channels, taps).permute(0, 3, 2, 1)


# -- what frozen layers run ----------------------------------------------------------------------------------------


def run(rows: Tensor, packed: Packed, epilogue: Epilogue, table: Tensor | None, inputs: int, images: int = 1) -> Tensor:
    """Masked convolution of rows (at least images * inputs, C) to rows (n_out, O), with its epilogue.

    Args:
        table: int32 (n_out / images, taps), by which each of the images that follow one another is read, and where any
            number from `inputs` on is a place of zeros; `None` where each of the `inputs` rows reads itself alone.

    Raises:
        RuntimeError: for tensors on two devices.
    """
    return _run(rows, packed.weights, epilogue, table, inputs, images)


def _run(
    rows: Tensor, weights: Tensor, epilogue: Epilogue, table: Tensor | None, inputs: int, images: int = 1
) -> Tensor:
    _check(rows, weights, table, epilogue.scale, epilogue.shift, epilogue.residual)
    kernels = importlib.import_module("sparsenet.kernels.triton_convolution")
    count = inputs if table is None else images * len(table)
    out = rows.new_empty(count, weights.shape[0] * weights.shape[3])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    table = None if table is None else table.contiguous()
    residual = None if epilogue.residual is None else epilogue.residual.contiguous()
    kernels.convolve(rows, weights, out, table, inputs, **epilogue._replace(residual=residual)._asdict())
    return out


def pool(operation: str, rows: Tensor, table: Tensor, inputs: int, outside: float, images: int = 1) -> Tensor:
    """Pooling of rows (at least images * inputs, C) to rows (n_out, C): the "max" or "sum" over taps.

    Args:
        table: int32 (n_out / images, taps) as in `KernelMap`.
        outside: what a place outside the image holds, of which "max" makes use.
    """
    _check(rows, table)
    kernels = importlib.import_module("sparsenet.kernels.triton_pooling")
    out = rows.new_empty(images * len(table), rows.shape[1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    kernels.pool(operation, rows, table.contiguous(), inputs, outside, out)
    return out


def _check(*tensors: Tensor | None) -> None:
    """Raises RuntimeError for tensors on two devices, which a kernel would read as if they were on one."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"a masked convolution reads tensors on {names}: move the model and its input to one device")


# -- training ------------------------------------------------------------------------------------------------------


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, kernel_map: KernelMap | None) -> Tensor:
    _check(rows, weight, bias)
    if kernel_map is None:  # a plain matrix product, for which the device has a library
        return product.convolve(rows, weight, bias, groups, None)
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if rows.dtype != weight.dtype:
        raise RuntimeError(f"a masked convolution of {rows.dtype} by weights of {weight.dtype}: convert one of them")
    weights = _by_tap(weight, groups).contiguous()
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (rows, weights, bias)):
        return _Convolution.apply(rows, weights, bias, kernel_map)
    return _run(rows, weights, Epilogue(shift=bias), kernel_map.table, kernel_map.inputs)


class _Convolution(torch.autograd.Function):
    """rows (n_in + 2, C), weights (groups, taps, C / groups, O / groups), bias (O,) or None -> rows (n_out, O).

    The gradient of the rows is a convolution too, by the inverse of the kernel map and the weights transposed: each row
    gathers what it was read for, where a scatter would add in whatever order comes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.kernel_map = kernel_map
        return _run(rows, weights, Epilogue(shift=bias), kernel_map.table, kernel_map.inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        grad = grad.contiguous()
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            inverse = kernel_map.inverse
            back = weights.mT.repeat(1, inverse.shape[1] // weights.shape[1], 1, 1)
            grad_rows = torch.zeros_like(rows)
            grad_rows[: kernel_map.inputs] = _run(grad, back, Epilogue(), inverse, len(grad))
        if ctx.needs_input_grad[1]:
            kernels = importlib.import_module("sparsenet.kernels.triton_gradient")
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            table = kernel_map.table.contiguous()
            grad_weights = kernels.of_weights(rows, grad, table, kernel_map.inputs, len(weights))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_rows, grad_weights, grad_bias, None
