"""The modules that `freeze` leaves in place of a model's own: convolutions and linear layers of packed weights, whose
work waits for what follows it, and normalisations and activations that become part of that work."""

from __future__ import annotations

import math
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet import context
from sparsenet.atlas import route
from sparsenet.backends import workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads
from sparsenet.backends.workspace import Workspace
from sparsenet.features import Departed, Features, Leaves, MaskedFeatures, SparseFeatures, ordinary
from sparsenet.form import Form
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.kernels import layout, machine, queue
from sparsenet.masked_conv import by_rule
from sparsenet.rules.conv import Geometry, geometry_of, pair
from sparsenet.rules.norm import normalised
from sparsenet.selection import Everything, Operation, Selection
from sparsenet.sites import Pair
from sparsenet.strips import in_strips
from sparsenet.work import Layer, OfActiveSites, OfAllPixels, Work


@dataclass(frozen=True)
class _Pass:
    """One call of a frozen model."""

    setting: ExitStack
    selections: dict[int, Everything]


_passes: ContextVar[tuple[_Pass, ...]] = ContextVar("sparsenet.frozen", default=())


def begin_pass(memory: Workspace) -> None:
    """A frozen model is called, maybe inside another one.

    It runs outside of inference mode, whose tensors count no writes: one to a view of what has left would be lost.
    """
    setting = ExitStack()
    if torch.is_inference_mode_enabled():
        setting.enter_context(torch.inference_mode(False))
        setting.enter_context(torch.no_grad())
    setting.enter_context(workspace.used(memory))
    setting.enter_context(queue.waiting())
    _passes.set((*_passes.get(), _Pass(setting, {})))


def end_pass() -> None:
    *outer, last = _passes.get()
    _passes.set(tuple(outer))
    last.setting.close()


def everything(batch: int, device: torch.device) -> Everything | None:
    """The selection of what no mask guides in the current pass, `None` outside of one."""
    passes = _passes.get()
    if not passes:
        return None
    selections = passes[-1].selections
    if batch not in selections:
        selections[batch] = Everything(batch, device, context.current().observers)
    return selections[batch]


def refuse_weights(module: nn.Module, *args: Any) -> None:
    """Instead of loading weights, or before a frozen root does."""
    raise RuntimeError(
        "a frozen model takes no other weights: load them into the model before sparsenet.freeze, and freeze again"
    )


class _Frozen(nn.Module):
    """A layer whose `weight` is kept packed only. In its `state_dict`, and when pickled, it is as it was."""

    frozen = True
    layer: FrozenLayer

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        refuse_weights(self)

    def takes(self, input: Tensor) -> bool:
        """Whether packed weights can multiply an ordinary tensor, as far as its kind tells.

        Raises:
            RuntimeError: where a gradient would be lost.
        """
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError(
                "a frozen model computes no gradients: call it under torch.no_grad(), or use the model that it was "
                "made from"
            )
        return input.dtype == self.layer.dtype and input.device == self.layer.device

    def _run(self, name: str, reads: Reads) -> Tensor:
        """What the layer makes of ordinary vectors, which wait for nothing."""
        bias: Any = self.bias
        observers = context.current().observers
        if not observers:
            result = self.layer.run(reads, Epilogue(shift=bias))
            queue.finish()
            return result
        with ExitStack() as uncounted:
            for observer in observers:
                uncounted.enter_context(observer.uncounted())
            result = self.layer.run(reads, Epilogue(shift=bias))
            queue.finish()
        macs = reads.outputs * prod(self.layer.shape)
        for observer in observers:
            observer.operation(Operation(name, "dense", (1, 1), macs, macs))
        return result

    def _operation(self, name: str, work: Work, out_grid: Pair) -> Operation:
        """What observers are told of the layer's work."""
        per_site, pixels = prod(self.layer.shape), work.selection.batch * out_grid[0] * out_grid[1]
        backend = self.layer.chosen.get(work.reads.kind)
        return Operation(name, "guided", out_grid, work.reads.outputs * per_site, pixels * per_site, backend)


class FrozenConv2d(_Frozen, nn.Conv2d):
    """A convolution of packed weights, guided or not. Made by `freeze`, which changes its class and drops `weight`."""

    fill: Tensor | None
    _geometries: dict[Pair, tuple[Geometry, bool]]

    @classmethod
    def make(cls, conv: nn.Conv2d, layer: FrozenLayer) -> FrozenConv2d:
        del conv.weight
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.layer, conv._geometries = layer, {}
        if not hasattr(conv, "fill"):
            conv.register_buffer("fill", None, persistent=False)
        return conv

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it was, (O, C / groups, kh, kw): a copy."""
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        x = input.reentered() if isinstance(input, Departed) else input
        if isinstance(x, Features):
            try:
                return self._guided(x)
            except Leaves:
                return self._conv_forward(x, self.weight, self.bias)  # whose functions leave for the same reason
        if not self.takes(x) or x.dim() != 4 or x.shape[1] != self.in_channels:
            return self._conv_forward(x, self.weight, self.bias)
        batch, channels, *size = x.shape
        grid = (size[0], size[1])
        if grid == (1, 1) == self.kernel_size and self.padding == (0, 0):
            reads = Reads(x.reshape(batch, channels).contiguous(), None, batch, batch, 1, grid, grid, True)
            return self._run("conv2d", reads)[:, :, None, None]
        selection = everything(batch, x.device)
        # In memory of its own: what waits to read it would not see that an ordinary map was written to.
        few = channels <= layout.MOST_CHANNELS and x.is_contiguous() and x.device.type == "cpu"
        few = few and machine.unsupported() is None
        if few:
            value = layout.channels_last(x, workspace.empty(batch * grid[0] * grid[1], channels, x))
        else:
            value = x.to(memory_format=torch.channels_last, copy=True)
        held = selection or Everything(batch, x.device)
        features = MaskedFeatures.make(value, held, grid, full=False)
        features._readers.layers_only = True
        result = self.forward(features)
        return ordinary(result).contiguous() if selection is None else result

    def _guided(self, x: Features) -> Tensor:
        selection, before = x.selection, x._work
        asked = selection.options.backend != "auto" or isinstance(x, MaskedFeatures)
        unfit = x.dtype != self.layer.dtype or x.form.channels[0] != self.in_channels
        if unfit or (asked and not selection.everything):
            return by_rule(self, x, "auto", self.fill)
        work = None if before is None else self._joined(before, x.form, x.grid, x.full)
        if work is None:
            work = self.work(self.layer, x.computed(), selection, x.form, x.grid, x.full)
            x.read_by(work)
        return type(x).deferred(work, selection, work.reads.out_grid, full=False, fill=self._buffers["fill"])

    def follows(self, before: Work) -> Work | None:
        """The layer's work on what that of another convolution gives, which nothing else reads; `None` where it cannot
        read it."""
        if before.dtype != self.layer.dtype or before.outputs != self.in_channels:
            return None
        form, grid = Form.plain_of(self.in_channels), before.reads.out_grid
        work = self._joined(before, form, grid, full=False)
        return work or self.work(self.layer, before.result(), before.selection, form, grid, full=False)

    def _joined(self, before: Work, form: Form, grid: Pair, full: bool) -> Work | None:
        """The layer's work, where it takes along what is before it: a gate, or maps that are never whole."""
        selection, rows = before.selection, before.reads.rows
        if before.gate is not None:
            work = self.work(self.layer, rows, selection, form, grid, full, before.gate)
        elif selection.everything:
            (window, _), pointwise = self.geometry(form, grid)
            strips = in_strips(before, self.layer, None if pointwise else window)
            if strips is None:
                return None
            if pointwise:
                work = Work(strips, selection, before.reads, Epilogue(shift=self._parameters["bias"]))
            else:
                work = self.work(strips, rows, selection, form, grid, full)
        else:
            return None
        work.read_like(before)
        return work

    def work(
        self,
        layer: Layer,
        rows: Tensor,
        selection: Selection,
        form: Form,
        grid: Pair,
        full: bool,
        gate: Tensor | None = None,
    ) -> Work:
        """The layer's work on rows of these sites."""
        geometry, pointwise = self.geometry(form, grid)
        window, out_grid = geometry
        if selection.everything:
            reads = self._of_all_pixels(rows, selection.batch, grid, geometry, pointwise)
            reads = reads._replace(everything=form.padding is None, gate=gate)
        else:
            inputs = rows.shape[0]
            tables, outputs = None, inputs
            if full or not pointwise:
                outputs = len(selection.sites(out_grid))
                tables = OfActiveSites(selection, route(grid, full, window, out_grid))
            reads = Reads(rows, tables, inputs, outputs, 1, grid, out_grid, False, gate)
        work = Work(layer, selection, reads, Epilogue(shift=self._parameters["bias"]))
        if selection.observers:
            selection.report(self._operation("conv2d", work, out_grid))
        return work

    def _of_all_pixels(self, rows: Tensor, batch: int, grid: Pair, geometry: Geometry, pointwise: bool) -> Reads:
        """What is read where every pixel of every image is."""
        window, out_grid = geometry
        if pointwise:
            count = rows.shape[0]  # `len` of a tensor takes longer
            return Reads(rows, None, count, count, 1, grid, out_grid, True)
        tables = OfAllPixels(grid, window, out_grid, rows.device)
        return Reads(rows, tables, grid[0] * grid[1], batch * out_grid[0] * out_grid[1], batch, grid, out_grid, True)

    def on_rows(self, rows: Tensor, batch: int, grid: Pair, epilogue: Epilogue) -> tuple[Tensor, Pair]:
        """The rows of all pixels of a map, and the grid of what it gives, whose kernels may wait."""
        geometry, pointwise = self.geometry(Form.plain_of(self.in_channels), grid)
        reads = self._of_all_pixels(rows, batch, grid, geometry, pointwise)
        return self.layer.run(reads, epilogue), geometry.out_grid

    def geometry(self, form: Form, grid: Pair) -> tuple[Geometry, bool]:
        """Where the layer reads a map, and whether each pixel reads itself alone; kept, because it takes longer to find
        than a small layer to compute."""
        if form.plain and grid in self._geometries:
            return self._geometries[grid]
        geometry, _, _ = geometry_of(
            form, grid, pair(self.kernel_size), self.stride, self.padding, self.dilation, self.padding_mode
        )
        found = geometry, geometry.window.pointwise and geometry.out_grid == grid
        if form.plain:
            self._geometries[grid] = found
        return found

    def extra_repr(self) -> str:
        ways = ", ".join(f"{kind}={name}" for kind, name in self.layer.chosen.items())
        return f"{super().extra_repr()}, frozen, {ways}"


class FrozenLinear(_Frozen, nn.Linear):
    """A linear layer of packed weights."""

    @classmethod
    def make(cls, linear: nn.Linear, layer: FrozenLayer) -> FrozenLinear:
        del linear.weight
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.layer = layer
        return linear

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it was, (O, C): a copy."""
        return self.layer.weight[:, :, 0, 0]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Features):
            form, kept = input.form, input.selection.everything or isinstance(input, SparseFeatures)
            fits = input.dtype == self.layer.dtype and form.channels == (self.in_features,) and form.padding is None
            if fits and kept and form.order[-1] == "C":
                return self._guided(input)
            return F.linear(input, self.weight, self.bias)
        if not self.takes(input) or input.shape[-1:] != (self.in_features,):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        reads = Reads(rows.contiguous(), None, len(rows), len(rows), 1, (1, 1), (1, 1), True)
        return self._run("linear", reads).view(*input.shape[:-1], self.out_features)

    def _guided(self, x: Features) -> Features:
        rows, selection = x.computed(), x.selection
        reads = Reads(rows, None, len(rows), len(rows), 1, x.grid, x.grid, selection.everything)
        work = Work(self.layer, selection, reads, Epilogue(shift=self.bias))
        x.read_by(work)
        if selection.observers:
            selection.report(self._operation("linear", work, x.grid))
        form = x.form.with_channels([self.out_features])
        return type(x).deferred(work, selection, x.grid, full=x.full, fill=None, form=form)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that becomes part of the work it follows. What PyTorch's dispatch takes to find the rule for
    `batch_norm` is as much as a small layer takes."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Features) and input._work is not None and input.form.plain:
            following = input.then(behind(input._work.layer, input._work.epilogue, self, input._work.dtype))
            if following is not None:
                return following
        return super().forward(input)


class _Activation(nn.Module):
    """An activation that becomes part of the work it follows."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Features) and input._work is not None:
            epilogue = behind(input._work.layer, input._work.epilogue, self, input._work.dtype)
            following = input.then(epilogue, input if getattr(self, "inplace", False) else None)
            if following is not None:
                return following
        return super().forward(input)


def behind(layer: Layer, epilogue: Epilogue, module: Any, dtype: torch.dtype) -> Epilogue | None:
    """The epilogue of a layer's work on a plain map with a normalisation or activation as its next step, or `None`
    where it cannot be part of it."""
    if type(module) is FrozenBatchNorm2d and not module.training:
        # Not by attribute: a module looks these up in one dictionary after another.
        statistics, affine = module._buffers, module._parameters
        mean, var = statistics["running_mean"], statistics["running_var"]
        return normalised(layer, epilogue, mean, var, affine["weight"], affine["bias"], module.eps)
    step = step_of(module, dtype) if isinstance(module, _Activation) else None
    return None if step is None else epilogue.activated(*step)


def step_of(module: nn.Module, dtype: torch.dtype) -> tuple[str, float, float] | None:
    """An activation as a step of an `Epilogue`, or `None` where the kernels have none like it."""
    match module:
        case nn.ReLU():
            return "clamp", 0.0, math.inf
        case nn.Hardtanh():  # ReLU6 is one
            return "clamp", module.min_val, module.max_val
        case _ if dtype is torch.float64:
            return None
        case nn.SiLU():
            return "silu", 0.0, 0.0
        case nn.Hardswish():
            return "hardswish", 0.0, 0.0
        case nn.Sigmoid():
            return "sigmoid", 0.0, 0.0
        case nn.LeakyReLU():
            return "leaky_relu", module.negative_slope, 0.0
        case nn.GELU():
            return "gelu" if module.approximate == "none" else "gelu_tanh", 0.0, 0.0
    return None


class FrozenReLU(_Activation, nn.ReLU): ...


class FrozenReLU6(_Activation, nn.ReLU6): ...


class FrozenHardtanh(_Activation, nn.Hardtanh): ...


class FrozenSiLU(_Activation, nn.SiLU): ...


class FrozenHardswish(_Activation, nn.Hardswish): ...


class FrozenSigmoid(_Activation, nn.Sigmoid): ...


class FrozenLeakyReLU(_Activation, nn.LeakyReLU): ...


class FrozenGELU(_Activation, nn.GELU): ...


FOLLOWERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.ReLU: FrozenReLU,
    nn.ReLU6: FrozenReLU6,
    nn.Hardtanh: FrozenHardtanh,
    nn.SiLU: FrozenSiLU,
    nn.Hardswish: FrozenHardswish,
    nn.Sigmoid: FrozenSigmoid,
    nn.LeakyReLU: FrozenLeakyReLU,
    nn.GELU: FrozenGELU,
}
"""What `freeze` makes of modules without weights of their own to pack: they change their class and nothing else."""
