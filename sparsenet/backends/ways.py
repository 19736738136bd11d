"""The ways to compute a frozen layer, each with the weights packed once as it needs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet import backends
from sparsenet.backends import indirect, triton, winograd, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import queue
from sparsenet.sites import KernelMap, Pair, Tiles


class Tables(Protocol):
    """Where a layer reads, found when a way asks for it, and kept for the other layers of the pass."""

    def table(self) -> Tensor:
        """int32 (n_out, taps) as in `KernelMap`."""

    def tiles(self) -> Tiles:
        """Of a window of 3x3 taps, of stride and dilation 1."""


class Reads(NamedTuple):
    """What a layer reads, and for which sites.

    Attributes:
        rows: (at least `inputs`, C) for each of the images.
        tables: which of the rows, or `None` where each row reads itself.
        inputs: rows that the tables reach.
        outputs: how many rows come of it.
        images: 1, or how many images follow one another, each read by the same tables.
        grid, out_grid: (H, W) of the maps.
        everything: whether the rows are all pixels of all images, and so are the outputs.
        gate: (C,), what each channel is multiplied by before it is read, or `None`.
    """

    rows: Tensor
    tables: Tables | None
    inputs: int
    outputs: int
    images: int
    grid: Pair
    out_grid: Pair
    everything: bool
    gate: Tensor | None = None

    @property
    def kind(self) -> str:
        """By which the way of a layer is chosen: "everything" or "guided"."""
        return "everything" if self.everything else "guided"

    @property
    def table(self) -> Tensor | None:
        """int32 (n_out, taps) as in `KernelMap`, or `None` where each row reads itself."""
        return None if self.tables is None else self.tables.table()

    def multiplied(self) -> Reads:
        """The same, with the gate already passed."""
        if self.gate is None:
            return self
        queue.finish()
        rows = self.rows[: self.images * self.inputs]
        return self._replace(
            rows=torch.mul(rows, self.gate, out=workspace.empty(rows.shape[0], rows.shape[1], rows)), gate=None
        )

    def by_image(self, epilogue: Epilogue, out: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """The rows, the residual and the part of the results, of each image."""
        each = self.outputs // max(1, self.images)
        for image in range(self.images):
            written = slice(image * each, (image + 1) * each)
            residual = None if epilogue.residual is None else epilogue.residual[written]
            yield self.rows[image * self.inputs : (image + 1) * self.inputs], residual, out[written]


class Spec(NamedTuple):
    """A layer as `torch.nn.Conv2d` names its numbers; padding as PyTorch's functional convolution takes it."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Norm(NamedTuple):
    """Batch normalisation by running statistics, (O,) each."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Way(Protocol):
    """A way to compute a layer.

    Attributes:
        name: "indirect", "winograd", "triton", "dense", or a backend's.
        waits: whether its kernels wait in the queue of the pass, so that what they read may do so too.
    """

    name: str
    waits: bool

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        """Rows (n_out, O)."""

    def weight(self) -> Tensor:
        """The weight as it was, (O, C / groups, kh, kw)."""


# Runs of a layer without a way that stands beside another, after which it gives up its weights. To make them again
# takes some milliseconds, once for masks of all pixels that follow one another.
MOST_IDLE = 8


class _Beside:
    """A way whose own weights do not give back the layer's: these it holds too, or asks another way for them."""

    def __init__(self, weight: Tensor):
        self._weight: Tensor | Way = weight
        self._idle = 0

    def weight(self) -> Tensor:
        return self._weight if isinstance(self._weight, Tensor) else self._weight.weight()

    def stand_beside(self, other: Way) -> None:
        """Hold no weights: another way, which has them, computes the layer as a rule."""
        self._weight = other
        self.give_up()

    def give_up(self) -> None:
        """Drop what can be made of the weight."""
        raise NotImplementedError

    def count(self, ran: bool) -> None:
        """The layer was computed, by this way or another one."""
        self._idle = 0 if ran else self._idle + 1
        if self._idle == MOST_IDLE:
            self.give_up()


# Epilogues that a layer's kernel is kept for.
MOST_PREPARED = 16


class _ByKernel:
    """What the ways of `sparsenet.kernels` share: kernels prepared for an epilogue, kept for the next pass, whose
    epilogue has the same scale and shift, not written to since."""

    def __init__(self, prepare: Callable[[Epilogue], Any]):
        self._prepare = prepare
        self._prepared: dict[Any, tuple[Any, Any]] = {}

    def ready(self, epilogue: Epilogue) -> Any:
        """The kernel with this epilogue, but for the rows of its residual."""
        scale, shift, residual, *rest = epilogue
        if (scale is not None and scale.is_inference()) or (shift is not None and shift.is_inference()):
            return self._prepare(epilogue)  # writes to such tensors are not counted
        versions = None if scale is None else scale._version, None if shift is None else shift._version
        key = (id(scale), id(shift), versions, residual is None, *rest)
        known = self._prepared.get(key)
        if known is None:
            if len(self._prepared) >= MOST_PREPARED:
                self._prepared.clear()
            # The tensors are kept too, so that no other can have their identity.
            known = self._prepared[key] = ((scale, shift), self._prepare(epilogue))
        return known[1]


# Weights, next to the numbers of the rows, that are rather multiplied by a gate than the rows: it is done by a kernel
# that waits, where rows that are multiplied end the waiting.
MOST_GATED = 4


class Indirect(_ByKernel):
    """The kernels of `sparsenet.kernels.convolution`."""

    name = "indirect"
    waits = True

    def __init__(self, weight: Tensor, spec: Spec):
        self.packed = indirect.pack(weight, spec.groups)
        super().__init__(functools.partial(indirect.Prepared, self.packed))

    def weight(self) -> Tensor:
        return indirect.unpack(self.packed)

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        prepared, packed = self.ready(epilogue), self.packed
        if reads.gate is not None and (packed.groups > 1 or packed.weights.numel() > MOST_GATED * reads.rows.numel()):
            reads = reads.multiplied()
        weights = None if reads.gate is None else prepared.gated(reads.gate)
        table = reads.table
        out = workspace.empty(reads.outputs, self.packed.shape[0], reads.rows)
        if table is None or reads.images == 1:
            prepared.job(reads.rows, epilogue.residual, table, reads.inputs, out, weights).wait()
        else:
            for rows, residual, part in reads.by_image(epilogue, out):
                prepared.job(rows, residual, table, reads.inputs, part, weights).wait()
        return out


class Winograd(_Beside):
    """3x3 convolution in fewer multiplications. What is made of the weight does not give it back to the last bit."""

    name = "winograd"
    waits = True

    def __init__(self, weight: Tensor, spec: Spec):
        super().__init__(weight)
        self._made: _ByKernel | None = None

    def give_up(self) -> None:
        self._made = None

    def ready(self, epilogue: Epilogue) -> winograd.Prepared:
        made = self._made  # read once, because other threads may give it up
        if made is None:
            made = self._made = _ByKernel(functools.partial(winograd.Prepared, winograd.pack(self.weight())))
        prepared: winograd.Prepared = made.ready(epilogue)
        return prepared

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        reads = reads.multiplied()
        assert reads.tables is not None, "a window of 3x3 has tables"
        tiles, prepared = reads.tables.tiles(), self.ready(epilogue)
        out = workspace.empty(reads.outputs, prepared.outputs, reads.rows)
        for rows, residual, part in reads.by_image(epilogue, out):
            prepared.job(rows, residual, tiles, reads.inputs, part).wait()
        return out


class Triton:
    """The kernels of `sparsenet.kernels.triton_convolution`, for all images at once."""

    name = "triton"
    waits = False

    def __init__(self, weight: Tensor, spec: Spec):
        self.packed = triton.pack(weight, spec.groups)

    def weight(self) -> Tensor:
        return triton.unpack(self.packed)

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        reads = reads.multiplied()
        return triton.run(reads.rows, self.packed, epilogue, reads.table, reads.inputs, reads.images)


class OnRows:
    """Another backend of rows, and the epilogue step by step."""

    waits = False

    def __init__(self, name: str, weight: Tensor, spec: Spec):
        self.name = name
        self.groups = spec.groups
        self._weight = weight.contiguous(memory_format=torch.channels_last)  # as both backends read it

    def weight(self) -> Tensor:
        return self._weight

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        reads = reads.multiplied()
        rows, table, each = reads.rows, reads.table, reads.inputs
        if table is None:
            parts = [self._sums(rows[:each], None)]
        else:
            kernel_map = KernelMap(table, each)
            images = [rows[image * each : (image + 1) * each] for image in range(reads.images)]
            parts = [self._sums(F.pad(image, (0, 0, 0, 2)), kernel_map) for image in images]
        sums = parts[0] if len(parts) == 1 else torch.cat([rows.new_empty(0, len(self._weight)), *parts])
        return epilogue.of(sums.contiguous())

    def _sums(self, rows: Tensor, kernel_map: KernelMap | None) -> Tensor:
        return backends.convolve(self.name, rows, self._weight, None, self.groups, kernel_map)


class Dense(_Beside):
    """oneDNN's convolution with packed weights, of maps of which every pixel is computed."""

    name = "dense"
    waits = False

    def __init__(self, weight: Tensor, spec: Spec):
        super().__init__(weight)
        self.spec = spec
        self._packed: tuple[Tensor | None, Pair, Tensor] | None = None

    def give_up(self) -> None:
        self._packed = None

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        reads = reads.multiplied()
        batch = reads.rows.shape[0] // (reads.grid[0] * reads.grid[1])
        x = reads.rows.view(batch, *reads.grid, reads.rows.shape[1]).permute(0, 3, 1, 2)
        rest = epilogue._replace(scale=None, shift=None)
        fused: tuple[str, list[float]] = ("none", [])
        if epilogue.residual is None and epilogue.activation == "clamp" and epilogue.low == 0:
            fused = ("relu", []) if epilogue.high == float("inf") else ("hardtanh", [0.0, epilogue.high])
            rest = Epilogue()
        operation: Any = torch.ops.mkldnn._convolution_pointwise
        out = operation(
            x,
            self._weights(epilogue.scale, x),
            epilogue.shift,
            self.spec.padding,
            self.spec.stride,
            self.spec.dilation,
            self.spec.groups,
            *fused,
            "",
        )
        return rest.of(out.permute(0, 2, 3, 1).flatten(0, 2))

    def _weights(self, scale: Tensor | None, x: Tensor) -> Tensor:
        """Scaled and packed for a size; that of the last pass is kept."""
        size = (x.shape[2], x.shape[3])
        kept = self._packed  # read once, because other threads may replace it
        if kept is None or kept[0] is not scale or kept[1] != size:
            weight = self.weight() if scale is None else self.weight() * scale[:, None, None, None]
            reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
            spec = self.spec
            packed = reorder(weight, spec.padding, spec.stride, spec.dilation, spec.groups, list(x.shape))
            kept = self._packed = (scale, size, packed)
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}


class OnDevice(Dense):
    """The convolution of a device's library, of maps of which every pixel is computed."""

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        reads = reads.multiplied()
        batch = reads.rows.shape[0] // (reads.grid[0] * reads.grid[1])
        x = reads.rows.view(batch, *reads.grid, reads.rows.shape[1]).permute(0, 3, 1, 2)
        weight, spec = self._weights(epilogue.scale, x), self.spec
        shift = None if epilogue.shift is None else epilogue.shift.to(x.dtype)
        out = F.conv2d(x, weight, shift, spec.stride, spec.padding, spec.dilation, spec.groups)
        rest = epilogue._replace(scale=None, shift=None)
        return rest.of(out.permute(0, 2, 3, 1).flatten(0, 2).contiguous())

    def _weights(self, scale: Tensor | None, x: Tensor) -> Tensor:
        """Scaled, in channels-last memory; those of the last scale are kept."""
        kept = self._packed  # read once, because other threads may replace it
        if kept is None or kept[0] is not scale:
            weight = self.weight() if scale is None else (self.weight() * scale[:, None, None, None]).to(x.dtype)
            kept = self._packed = (scale, (0, 0), weight.contiguous(memory_format=torch.channels_last))
        return kept[2]
