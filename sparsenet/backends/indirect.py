"""Kernels made at run time that read rows by way of the kernel map: see `sparsenet.kernels`. Float32 and float64 on
CPU, any groups, depthwise among them; where a gradient is asked for, *rows* computes.
"""

from __future__ import annotations

import functools
import math
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.backends import rows as trainable
from sparsenet.backends import workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import convolution, machine, squeeze
from sparsenet.kernels.machine import bits
from sparsenet.kernels.queue import Job
from sparsenet.sites import KernelMap

# Multiply-accumulates of one piece of work, about: 50 µs of one thread, so that two threads end together and a
# launch's pieces are few.
PIECE = 1 << 22

# Multiply-accumulates up to which one thread takes all: 5 µs, about what it takes to begin and end with two.
ALONE = 1 << 18

# Bytes of weights that stay in a core's own cache while a piece's sites pass: up to here a piece computes all outputs
# of its sites, whose rows it so reads from memory once.
WEIGHTS = 1 << 18

# Pieces of a thread where weights are more: fewer would not end together, and with more of them each core would bring
# near the weights that another one has.
PIECES = 4

# Bytes of a panel's weights up to which two fit a core's own cache of 1 MB: the thread's next one is brought near
# (512 to 2048 channels at 106 sites: 0.97 ms without, 0.73 with). Of a larger one, one tap after the other is (3x3, 512
# channels: 1.87 ms, and 1.58).
AHEAD = 1 << 19

# Output sites that then pass together, at most: their inputs and sums stay in that cache beside a tap's weights (3x3,
# 512 channels at 180 sites: 2.26 ms, and 2.52 if all pass; 256 channels at 72: 0.245 ms, and 0.260 in halves).
PASSING = 96


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
    if torch.compiler.is_compiling():
        return "its kernels cannot be traced"
    if weight.device.type != "cpu":
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


def run(
    rows: Tensor, packed: Packed, epilogue: Epilogue, table: Tensor | None, inputs: int, out: Tensor | None = None
) -> Tensor:
    """Masked convolution of rows (at least `inputs`, C), each contiguous, to rows (n_out, O).

    Args:
        table: int32 (n_out, taps), where any number from `inputs` on is a place of zeros; `None` where each site reads
            itself alone.
        out: where to write the result, contiguous; new memory if `None`.
    """
    return Prepared(packed, epilogue).run(rows, epilogue.residual, table, inputs, out)


class Prepared:
    """A kernel with packed weights and an epilogue, but for the rows of its residual, ready to run."""

    def __init__(self, packed: Packed, epilogue: Epilogue):
        self.outputs, channels = packed.shape[:2]
        dtype, vectors = packed.weights.dtype, packed.vectors
        width = vectors * machine.lanes(dtype)
        self.groups = packed.groups
        groups = 1 if packed.depthwise else packed.groups
        whole = self.outputs // groups % width == 0
        order = None if epilogue.residual is None else epilogue.order
        if packed.depthwise:
            panels = together = packed.weights.shape[1] // width
            by_tap = False
            kernel = convolution.by_channel("product", vectors, whole, dtype, order, epilogue.activation)
        else:
            panels = groups * packed.weights.shape[1]
            together = panels if packed.weights.nbytes <= WEIGHTS else 1
            by_tap = packed.weights[0, 0].nbytes > AHEAD
            kernel = convolution.product(vectors, whole, dtype, order, epilogue.activation, by_tap)
        self._weights = packed.weights
        scale = padded(epilogue.scale, 1.0, groups, panels * width, dtype)
        shift = padded(epilogue.shift, 0.0, groups, panels * width, dtype)
        fixed = {
            "channels": channels,
            "out_stride": self.outputs,
            "outputs": self.outputs // groups,
            "group_panels": panels // groups,
            "piece_panels": together,
            "low": bits(epilogue.low),
            "high": bits(epilogue.high),
        }
        operands = packed.weights, scale, shift
        self._kernel = _Kernel(kernel, operands, channels * packed.groups, panels, width, fixed, by_tap=by_tap)

    def run(
        self,
        rows: Tensor,
        residual: Tensor | None,
        table: Tensor | None,
        inputs: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `run`."""
        if out is None:
            out = workspace.empty(inputs if table is None else table.shape[0], self.outputs, rows)
        self.job(rows, residual, table, inputs, out).run()
        return out

    def gated(self, gate: Tensor) -> Tensor:
        """The weights, of one group, each by the number of the channel that it reads, (C,): what a kernel that waits
        writes, until others of its queue do."""
        weights = self._weights  # (1, panels, taps, C, width)
        gated = workspace.scratch(weights.numel(), weights)[: weights.numel()].view(weights.shape)
        squeeze.gated(weights, gate, gated).wait()
        return gated

    def job(
        self,
        rows: Tensor,
        residual: Tensor | None,
        table: Tensor | None,
        inputs: int,
        out: Tensor,
        weights: Tensor | None = None,
    ) -> Job:
        """What `run` does, to be run later, once or often; `weights`, packed alike, go before those that it was made
        with."""
        return self._kernel.job(rows, residual, table, inputs, out, weights)


class Pooling:
    """The "max" or "sum" over taps, ready to run.

    Args:
        outside: what a place outside the image holds, of which "max" makes use.
    """

    def __init__(self, operation: str, channels: int, dtype: torch.dtype, outside: float):
        vectors = convolution.panel_vectors(channels, dtype)
        width = vectors * machine.lanes(dtype)
        panels = -(-channels // width)
        one, none = constant(panels * width, 1.0, dtype), constant(panels * width, 0.0, dtype)
        kernel = convolution.by_channel(operation, vectors, channels % width == 0, dtype, None, "clamp")
        fixed = {"out_stride": channels, "outputs": channels, "piece_panels": panels} | _UNBOUNDED
        self._kernel = _Kernel(kernel, (none, one, none), channels, panels, width, fixed, outside)
        self._padded: dict[int, tuple[Tensor, int, Tensor]] = {}

    def job(
        self, rows: Tensor, residual: None, table: Tensor, inputs: int, out: Tensor, inactive: Tensor | None = None
    ) -> Job:
        """Of rows (at least `inputs`, C) to `out`, rows (n_out, C), by a table as in `KernelMap`; all contiguous.

        Args:
            inactive: what an inactive pixel holds, (C,); zero if `None`.
        """
        inactive = None if inactive is None else self._whole(inactive)
        return self._kernel.job(rows, None, table, inputs, out, inactive=inactive)

    def _whole(self, inactive: Tensor) -> Tensor:
        """With room to read whole vectors; kept for the next pass, unless it was written to."""
        length, known = self._kernel.panels * self._kernel.width, self._padded.get(id(inactive))
        if inactive.is_inference():  # writes are not counted
            return padded(inactive, 0.0, 1, length, self._kernel.dtype)
        if known is None or known[1] != inactive._version:
            if len(self._padded) >= MOST_INACTIVE:
                self._padded.clear()
            # The tensor is kept too, so that no other can have its identity.
            whole = padded(inactive, 0.0, 1, length, self._kernel.dtype)
            known = self._padded[id(inactive)] = inactive, inactive._version, whole
        return known[2]


# What inactive pixels hold, of so many layers, is kept.
MOST_INACTIVE = 32

_UNBOUNDED = {"low": bits(-math.inf), "high": bits(math.inf)}

pooling = functools.lru_cache(maxsize=256)(Pooling)


def pool(operation: str, rows: Tensor, table: Tensor, inputs: int, outside: float) -> Tensor:
    """Pooling of rows (at least `inputs`, C) to rows (n_out, C): see `Pooling`."""
    channels = rows.shape[1]
    out = workspace.empty(table.shape[0], channels, rows)
    pooling(operation, channels, rows.dtype, outside).job(rows, None, table, inputs, out).run()
    return out


class _Kernel:
    """A kernel, and those numbers of its jobs that hang on the layer alone: see `sparsenet.kernels.convolution.FIELDS`.

    Args:
        operands: weights, scale and shift.
        channels: of a row that is read.
        panels, width: of the weights, and of one panel.
        fixed: numbers by field.
        outside: what a place outside the image holds.
    """

    def __init__(
        self,
        kernel: machine.Launch,
        operands: tuple[Tensor, Tensor, Tensor],
        channels: int,
        panels: int,
        width: int,
        fixed: dict[str, int],
        outside: float = 0.0,
        by_tap: bool = False,
    ):
        weights, scale, shift = operands
        self.kernel = kernel
        self.panels = panels
        self.width = width
        self.dtype = scale.dtype
        length = channels + width
        zeros, beyond = constant(length, 0.0, self.dtype), constant(length, outside, self.dtype)
        addresses = {"weights": weights, "scale": scale, "shift": shift, "zeros": zeros, "outside": beyond}
        fixed = fixed | {"panels": panels} | {name: tensor.data_ptr() for name, tensor in addresses.items()}
        self._numbers = array("q", [fixed.get(field, 0) for field in convolution.FIELDS])
        self._held = *operands, zeros, beyond
        self._together = fixed["piece_panels"]
        self._by_tap = by_tap
        self._at_once = convolution.tile(width // machine.lanes(self.dtype))
        self._panel = weights.numel() // panels

    def job(
        self,
        rows: Tensor,
        residual: Tensor | None,
        table: Tensor | None,
        inputs: int,
        out: Tensor,
        weights: Tensor | None = None,
        inactive: Tensor | None = None,
    ) -> Job:
        """On rows; `weights` go before its own, and `inactive` is what an inactive pixel holds, zeros if `None`."""
        if table is None:
            table = _itself(inputs)
        sites, taps = table.shape
        # Work per site, of which a piece has as many as keep it short, but not more than leaves each thread two.
        panel, together, panels = self._panel, self._together, self.panels
        work = max(1, panel * together)
        threads = torch.get_num_threads() if sites * work * (panels // together) > ALONE else 1
        ahead = 0
        if together == panels:
            share = min(PIECE // work, -(-sites // (2 * threads)))
        elif self._by_tap:
            share = -(-sites // max(-(-sites // PASSING), -(-2 * threads // panels))) + self._at_once - 1
            ahead = panel // taps
        else:
            share = -(-sites // max(1, min(PIECES * threads // panels, sites * work // PIECE)))
            if share >= sites:
                ahead = panel * threads
        numbers = self._numbers[:]
        numbers[_ROWS], numbers[_TABLE], numbers[_OUT] = rows.data_ptr(), table.data_ptr(), out.data_ptr()
        numbers[_SITES], numbers[_TAPS], numbers[_INPUTS], numbers[_STRIDE] = sites, taps, inputs, rows.stride(0)
        numbers[_SHARE], numbers[_AHEAD] = max(1, share // self._at_once) * self._at_once, ahead
        if residual is not None:
            numbers[_RESIDUAL] = residual.data_ptr()
        if weights is not None:
            numbers[_WEIGHTS] = weights.data_ptr()
        if inactive is not None:
            numbers[_ZEROS] = inactive.data_ptr()
        return Job(self.kernel, numbers, threads, rows, table, out, residual, weights, inactive, self._held)


_ROWS, _TABLE, _OUT, _RESIDUAL, _WEIGHTS, _ZEROS, _SITES, _TAPS, _INPUTS, _STRIDE, _SHARE, _AHEAD = map(
    convolution.FIELDS.index,
    (
        *("rows", "table", "out", "residual", "weights", "zeros"),
        *("sites", "taps", "inputs", "row_stride", "piece_sites", "ahead"),
    ),
)


def convolve(rows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, kernel_map: KernelMap | None) -> Tensor:
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (rows, weight, bias)):
        return trainable.convolve(rows, weight, bias, groups, kernel_map)
    table, inputs = (None, len(rows)) if kernel_map is None else (kernel_map.table, kernel_map.inputs)
    return run(rows.contiguous(), pack(weight, groups), Epilogue(shift=bias), table, inputs)


def padded(part: Tensor | None, fill: float, groups: int, length: int, dtype: torch.dtype) -> Tensor:
    """A number for each output, each group's with room to read whole vectors."""
    if part is None:
        return constant(length, fill, dtype)
    part = part.to(dtype)
    if len(part) == length:
        return part.contiguous()
    result = part.new_zeros(groups, length // groups)
    result[:, : len(part) // groups] = part.view(groups, -1)
    return result


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def constant(length: int, fill: float, dtype: torch.dtype) -> Tensor:
    return torch.full((length,), fill, dtype=dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _itself(sites: int) -> Tensor:
    """The kernel map of a layer whose sites read themselves."""
    return torch.arange(sites, dtype=torch.int32)[:, None]
