"""Kernels made at run time that read rows by way of the kernel map: see `sparsenet.kernels`. Float32 and float64 on
CPU, any groups, depthwise among them; no gradient.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import convolution, machine
from sparsenet.sites import KernelMap

# Multiply-accumulates of one piece of work, about: 50 µs of one thread, so that two threads end together and a
# launch's pieces are few.
PIECE = 1 << 22

# Bytes of weights that stay in a core's own cache while a piece's sites pass: up to here a piece computes all outputs
# of its sites, so that whole rows are written at once (1x1, 16 to 96 channels at 224x224: a quarter faster).
WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Packed:
    """Weights in the order in which a kernel reads them, and how they were."""

    weights: Tensor
    shape: torch.Size
    groups: int
    vectors: int

    @property
    def depthwise(self) -> bool:
        return self.shape[1] == 1 and self.groups == self.shape[0]


def unsupported(weight: Tensor, groups: int) -> str | None:
    if weight.is_cuda or weight.device.type != "cpu":
        return "its kernels are for CPUs"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"its kernels compute no {weight.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "its kernels know no autocast"
    return machine.unsupported()


def pack(weight: Tensor, groups: int) -> Packed:
    """Weights (O, C / groups, kh, kw) in a kernel's order."""
    outputs, channels = weight.shape[:2]
    taps = weight.shape[2:].numel()
    by_tap = weight.detach().reshape(outputs, channels, taps)
    each = outputs // groups
    single = channels == 1 and each == 1
    vectors = convolution.panel_vectors(outputs if single else each, weight.dtype)
    width = vectors * machine.lanes(weight.dtype)
    if single:
        packed = weight.new_zeros(taps, -(-outputs // width) * width)
        packed[:, :outputs] = by_tap[:, 0].T
    else:
        panels = -(-each // width)
        whole = weight.new_zeros(groups, panels * width, channels, taps)
        whole[:, :each] = by_tap.view(groups, each, channels, taps)
        packed = whole.view(groups, panels, width, channels, taps).permute(0, 1, 4, 3, 2).contiguous()
    return Packed(packed, weight.shape, groups, vectors)


def unpack(packed: Packed) -> Tensor:
    """The weights as they were, (O, C / groups, kh, kw)."""
    outputs, channels, *kernel = packed.shape
    if packed.depthwise:
        return packed.weights[:, :outputs].T.reshape(packed.shape)
    weights = packed.weights.permute(0, 1, 4, 3, 2).flatten(1, 2)[:, : outputs // packed.groups]
    return weights.reshape(outputs, channels, *kernel)


def run(rows: Tensor, packed: Packed, epilogue: Epilogue, table: Tensor | None, inputs: int) -> Tensor:
    """Masked convolution of rows (at least `inputs`, C), each contiguous, to rows (n_out, O).

    Args:
        table: int32 (n_out, taps), where any number from `inputs` on is a place of zeros; `None` where each site reads
            itself alone.
    """
    outputs, channels = packed.shape[:2]
    depthwise, dtype, width = (
        packed.depthwise,
        packed.weights.dtype,
        packed.vectors * machine.lanes(packed.weights.dtype),
    )
    groups = 1 if depthwise else packed.groups
    each = outputs // groups
    panels = packed.weights.shape[1] // width if depthwise else groups * packed.weights.shape[1]
    if table is None:
        table = _itself(inputs)
    sites, taps = table.shape
    out = rows.new_empty(sites, outputs)
    if sites == 0:
        return out
    residual = epilogue.residual
    scale, shift = (
        _padded(part, fill, groups, each, panels * width, dtype)
        for part, fill in ((epilogue.scale, 1.0), (epilogue.shift, 0.0))
    )
    zeros = _constant(rows.shape[1] + width, 0.0, dtype)
    piece_panels = panels if depthwise or packed.weights.nbytes <= WEIGHTS else 1
    work = taps * (1 if depthwise else channels) * piece_panels * width
    at_once = convolution.tile(packed.vectors)
    share = min(PIECE // work, -(-sites // (2 * torch.get_num_threads())))
    piece_sites = max(1, share // at_once) * at_once
    kernel = (convolution.depthwise if depthwise else convolution.product)(
        packed.vectors, dtype, None if residual is None else epilogue.order, epilogue.activation
    )
    kernel(
        (
            rows.data_ptr(),
            table.data_ptr(),
            packed.weights.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            zeros.data_ptr(),
            sites,
            taps,
            channels,
            rows.stride(0),
            outputs,
            each,
            panels,
            panels // groups,
            piece_sites,
            piece_panels,
            inputs,
            0,
            _bits(epilogue.low),
            _bits(epilogue.high),
        )
    )
    return out


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, kernel_map: KernelMap | None) -> Tensor:
    table, inputs = (None, len(rows)) if kernel_map is None else (kernel_map.table, kernel_map.inputs)
    return run(rows.contiguous(), pack(weight, groups), Epilogue(shift=bias), table, inputs)


def _padded(part: Tensor | None, fill: float, groups: int, each: int, padded: int, dtype: torch.dtype) -> Tensor:
    """A number for each output, with room to read whole vectors."""
    if part is None:
        return _constant(padded, fill, dtype)
    if len(part) == padded:
        return part.contiguous()
    result = part.new_zeros(groups, padded // groups)
    result[:, :each] = part.view(groups, each)
    return result


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _constant(length: int, fill: float, dtype: torch.dtype) -> Tensor:
    return torch.full((length,), fill, dtype=dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _itself(sites: int) -> Tensor:
    """The kernel map of a layer whose sites read themselves."""
    return torch.arange(sites, dtype=torch.int32)[:, None]


@functools.lru_cache(maxsize=256)
def _bits(number: float) -> int:
    """A float64 as the integer of the same bits."""
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found
