"""3x3 convolution of stride 1 in fewer multiplications: see `sparsenet.kernels.winograd`.

Twice as fast as the direct kernels, and as oneDNN, from 64 channels on (64 to 64 channels at 300x300: 28.8 ms, both
others 58), and as precise: its sums are over the channels alone. But a number that is huge beside its neighbours, or
infinite, is felt by all outputs of its tile, not only by those that read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.backends import indirect, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.indirect import constant, padded
from sparsenet.kernels import convolution, machine, winograd
from sparsenet.kernels.machine import bits
from sparsenet.kernels.queue import Job
from sparsenet.sites import Tiles

# Bytes of transformed weights, at most: there are 16 for 9, beside the weight itself. Without a limit SSD300 took
# 125 MB more, and 10 % less time, all pixels active 20 %.
MOST_BYTES = 8 << 20

# Tiles of a piece of work, at most: their inputs, transformed, stay in a core's own cache (64 to 512 channels: 24 is
# up to 7 % faster than 96).
PIECE = 24


@dataclass(frozen=True)
class Packed:
    """Transformed weights in the order in which the kernel reads them, (panels, 16, C, width)."""

    weights: Tensor
    outputs: int
    vectors: int


def unsupported(weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> str | None:
    if weight.shape[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1) or groups != 1:
        return "it computes 3x3 convolutions of stride and dilation 1 only, in one group"
    if 16 * weight.shape[0] * weight.shape[1] * weight.dtype.itemsize > MOST_BYTES:
        return "its transformed weights would take much memory"
    return indirect.unsupported(weight, groups)


def pack(weight: Tensor) -> Packed:
    """Weights (O, C, 3, 3), transformed."""
    outputs, channels = weight.shape[:2]
    vectors = convolution.panel_vectors(outputs, weight.dtype)
    width = vectors * machine.lanes(weight.dtype)
    panels = -(-outputs // width)
    whole = weight.new_zeros(16, panels * width, channels)
    whole[:, :outputs] = winograd.transformed(weight.detach())
    return Packed(whole.view(16, panels, width, channels).permute(1, 0, 3, 2).contiguous(), outputs, vectors)


class Prepared:
    """The kernel with packed weights and an epilogue, but for the rows of its residual, ready to run."""

    def __init__(self, packed: Packed, epilogue: Epilogue):
        self.panels, _, self.channels, self.width = packed.weights.shape
        self.outputs, dtype = packed.outputs, packed.weights.dtype
        lanes = machine.lanes(dtype)
        self._padded = -(-self.channels // lanes) * lanes
        self._at_once = convolution.tile(packed.vectors)
        order = None if epilogue.residual is None else epilogue.order
        whole = self.outputs % self.width == 0
        self._kernel = winograd.product(packed.vectors, whole, dtype, order, epilogue.activation)
        self._weights = packed.weights
        self._scale = padded(epilogue.scale, 1.0, 1, self.panels * self.width, dtype)
        self._shift = padded(epilogue.shift, 0.0, 1, self.panels * self.width, dtype)
        self._zeros = constant(self.channels + lanes, 0.0, dtype)
        self._bounds = bits(epilogue.low), bits(epilogue.high)

    def run(self, rows: Tensor, residual: Tensor | None, tiles: Tiles, inputs: int, out: Tensor) -> Tensor:
        """Masked convolution of rows (at least `inputs`, C) to `out`, rows (n_out, O), each contiguous."""
        self.job(rows, residual, tiles, inputs, out).run()
        return out

    def job(self, rows: Tensor, residual: Tensor | None, tiles: Tiles, inputs: int, out: Tensor) -> Job:
        """What `run` does, to be run later."""
        count = tiles.reads.shape[0]
        threads = torch.get_num_threads() if count * self._weights.numel() > indirect.ALONE else 1
        piece_tiles, piece_panels = self._piece(count, threads)
        scratch = winograd.scratch(piece_tiles, self._padded, self.width)
        memory = workspace.scratch(threads * scratch, rows)
        numbers = [
            rows.data_ptr(),
            tiles.reads.data_ptr(),
            tiles.writes.data_ptr(),
            self._weights.data_ptr(),
            self._scale.data_ptr(),
            self._shift.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            self._zeros.data_ptr(),
            memory.data_ptr(),
            count,
            self.channels,
            self._padded,
            rows.stride(0),
            self.outputs,
            self.outputs,
            self.panels,
            piece_tiles,
            piece_panels,
            inputs,
            out.shape[0],
            scratch,
            0,
            0,
            *self._bounds,
        ]
        made = self._weights, self._scale, self._shift, self._zeros
        return Job(self._kernel, numbers, threads, rows, residual, out, tiles.reads, tiles.writes, memory, *made)

    def _piece(self, count: int, threads: int) -> tuple[int, int]:
        """Tiles and panels of a piece of work, so that each thread gets two at least: of few tiles, a piece computes
        some panels only, and transforms the inputs of all for it."""
        if threads == 1 or count >= 2 * threads * PIECE:
            return PIECE, self.panels
        if self.panels >= 2 * threads:
            share = self.panels // (2 * threads)
            return PIECE, next(panels for panels in range(share, 0, -1) if self.panels % panels == 0)
        share = -(-count // (2 * threads))
        return min(PIECE, -(-share // self._at_once) * self._at_once), self.panels
