"""The layers that `freeze` leaves in place of a model's own: convolutions and linear layers of packed weights, whose work
waits for what follows it, and normalisations and activations that become part of that work."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet import context
from sparsenet.backends import indirect
from sparsenet.backends.epilogue import Epilogue
from sparsenet.features import Departed, Features, Leaves, MaskedFeatures, SparseFeatures, as_rows
from sparsenet.rules.conv import Geometry, geometry_of, masked_conv2d, pair
from sparsenet.rules.norm import continued
from sparsenet.selection import Everything, Operation
from sparsenet.sites import Pair, dense_table
from sparsenet.work import Work

_passes: ContextVar[tuple[dict[int, Everything], ...]] = ContextVar("sparsenet.frozen", default=())


def begin_pass() -> None:
    """A frozen model is called, maybe inside another one."""
    _passes.set((*_passes.get(), {}))


def end_pass() -> None:
    _passes.set(_passes.get()[:-1])


def _everything(batch: int, device: torch.device) -> Everything | None:
    """The selection of what no mask guides in the current pass, `None` outside of one."""
    passes = _passes.get()
    if not passes:
        return None
    if batch not in passes[-1]:
        passes[-1][batch] = Everything(batch, device, context.current().observers)
    return passes[-1][batch]


class PackedLayer:
    """Packed weights, as `Work` runs them. Not changed once made, but for what is learned of its readers."""

    def __init__(self, packed: indirect.Packed):
        self.packed = packed
        self.outputs = packed.shape[0]
        self.breaks: set[int] = set()
        self._folded: dict[Any, tuple[Any, Tensor, Tensor]] = {}

    def run(
        self, rows: Tensor, epilogue: Epilogue, table: Tensor | None, inputs: int, out: Tensor | None = None
    ) -> Tensor:
        return indirect.run(rows, self.packed, epilogue, table, inputs, out)

    def folded(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Batch normalisation by running statistics as a scale and a shift. Kept for the next pass, until one of its
        tensors is written to."""
        tensors = [part for part in (mean, var, weight, bias) if part is not None]
        key = (eps, *(id(part) for part in tensors))
        versions = [0 if part.is_inference() else part._version for part in tensors]
        known = self._folded.get(key)
        if known is None or known[0][0] != versions:
            scale = torch.rsqrt(var.double() + eps)
            scale = scale if weight is None else scale * weight.double()
            shift = -mean.double() * scale if bias is None else bias.double() - mean.double() * scale
            # The tensors are kept too, so that no other can have their identity.
            known = self._folded[key] = ((versions, tensors), scale.to(mean.dtype), shift.to(mean.dtype))
        return known[1], known[2]


class _Frozen(nn.Module):
    """A layer whose `weight` is kept packed only. In its `state_dict`, and when pickled, it is as it was."""

    layer: PackedLayer
    bias: Tensor | None

    def _pack(self, weight: Tensor, groups: int) -> None:
        self.__dict__["layer"] = PackedLayer(indirect.pack(weight, groups))

    @property
    def weight(self) -> Tensor:
        """The original weight, (O, C / groups, …): a copy."""
        return self._unpacked()

    def _unpacked(self) -> Tensor:
        return indirect.unpack(self.layer.packed)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        raise RuntimeError(
            "a frozen model takes no other weights: load them into the model before sparsenet.freeze, and freeze again"
        )

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        weight = self.layer.packed.weights
        changed = function(weight)
        if (changed.dtype, changed.device) != (weight.dtype, weight.device):
            raise RuntimeError(
                f"a frozen model cannot be moved to {changed.dtype} on {changed.device}, because its weights are packed "
                f"for {weight.dtype} on {weight.device}: convert the model before sparsenet.freeze"
            )
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["layer"] = (self.weight, self.layer.packed.groups, self.layer.breaks)  # packed for the machine it is on
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight, groups, breaks = state.pop("layer")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(weight, groups)
        self.layer.breaks.update(breaks)

    def _check_gradient(self, input: Tensor) -> None:
        if torch.is_grad_enabled() and not isinstance(input, Features) and input.requires_grad:
            raise RuntimeError(
                "a frozen model computes no gradients: call it under torch.no_grad(), or train the model that it was "
                "made from"
            )


class FrozenConv2d(_Frozen, nn.Conv2d):
    """A convolution of packed weights, guided or not. Made by `freeze`, which changes its class and drops `weight`."""

    path: str
    fill: Tensor | None
    _geometries: dict[Pair | None, tuple[Geometry, bool]]

    @classmethod
    def make(cls, conv: nn.Conv2d, path: str) -> FrozenConv2d:
        weight = conv.weight.detach()
        del conv.weight
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.path, conv._geometries = path, {}
        if not hasattr(conv, "fill"):
            conv.register_buffer("fill", None, persistent=False)
        conv._pack(weight, conv.groups)
        return conv

    def forward(self, input: Tensor) -> Tensor:
        self._check_gradient(input)
        x = input.reentered() if isinstance(input, Departed) else input
        if isinstance(x, Features):
            try:
                return self._guided(x)
            except Leaves:
                return self._conv_forward(x, self.weight, self.bias)  # whose functions leave for the same reason
        packed = self.layer.packed
        if x.dim() != 4 or x.dtype != packed.weights.dtype or x.shape[1] != self.in_channels or x.device.type != "cpu":
            return self._conv_forward(x, self.weight, self.bias)
        if x.shape[2:] == (1, 1) and self.kernel_size == (1, 1) and self.padding == (0, 0):
            rows = indirect.run(x.reshape(len(x), -1).contiguous(), packed, Epilogue(shift=self.bias), None, len(x))
            return rows[:, :, None, None]
        selection = _everything(len(x), x.device)
        # In memory of its own: what waits to read it would not see that an ordinary map was written to.
        value = x.to(memory_format=torch.channels_last, copy=True)
        features = MaskedFeatures.make(
            value, selection or Everything(len(x), x.device), (x.shape[2], x.shape[3]), full=False
        )
        result = self._guided(features)
        return result if selection is not None else result.value.contiguous()

    def _guided(self, x: Features) -> Features:
        selection = x.selection
        if not selection.everything and (selection.options.backend != "auto" or isinstance(x, MaskedFeatures)):
            return masked_conv2d(
                x,
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                padding_mode=self.padding_mode,
                fill=self.fill,
            )
        (window, out_grid), pointwise = self._geometry(x)
        images, table = 1, None
        if selection.everything:
            value = x.value
            rows = as_rows(value.contiguous(memory_format=torch.channels_last))
            inputs = len(rows)
            if not pointwise:
                images, inputs = selection.batch, x.grid[0] * x.grid[1]
                table = dense_table(x.grid, window, out_grid, value.device)
        else:
            rows = as_rows(x.value)
            inputs = len(rows)
            if not pointwise:
                table = selection.kernel_map(x.grid, x.full, window, out_grid).table
            elif x.full:
                table = selection.sites(x.grid).table
        self._report(selection, out_grid)
        work = Work(self.layer, selection, rows, table, inputs, images, Epilogue(shift=self.bias))
        x.read_by(work)
        return type(x).deferred(work, selection, out_grid, full=False, fill=self.fill)

    def _geometry(self, x: Features) -> tuple[Geometry, bool]:
        """Where the layer reads a map, and whether each pixel reads itself alone; kept, because it takes longer to find
        than many a layer takes to compute."""
        key = x.grid if x.form.plain else None
        if key in self._geometries:
            return self._geometries[key]
        kernel = pair(self.kernel_size)
        geometry, _, _ = geometry_of(x, kernel, self.stride, self.padding, self.dilation, self.padding_mode)
        found = geometry, geometry.window.pointwise and geometry.out_grid == x.grid
        if key is not None:
            self._geometries[key] = found
        return found

    def _report(self, selection: Any, out_grid: Pair) -> None:
        if selection.observers:
            per_site = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1] * self.out_channels
            pixels = selection.batch * out_grid[0] * out_grid[1]
            active = len(selection.sites(out_grid))
            selection.report(Operation("conv2d", "guided", out_grid, active * per_site, pixels * per_site, "indirect"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen"


class FrozenLinear(_Frozen, nn.Linear):
    """A linear layer of packed weights, for maps whose channels are last; ordinary tensors are multiplied as ever."""

    @classmethod
    def make(cls, linear: nn.Linear) -> FrozenLinear:
        weight = linear.weight.detach()
        del linear.weight
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear._pack(weight[:, :, None, None], 1)
        return linear

    def _unpacked(self) -> Tensor:
        return super()._unpacked()[:, :, 0, 0]

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight, *rest = state["layer"]
        super().__setstate__(state | {"layer": (weight[:, :, None, None], *rest)})

    def forward(self, input: Tensor) -> Tensor:
        self._check_gradient(input)
        if isinstance(input, Features):
            x, form = input, input.form
            if (
                form.order[-1] == "C"
                and len(form.channels) == 1
                and form.padding is None
                and (x.selection.everything or isinstance(x, SparseFeatures))
            ):
                return self._guided(x)
            return F.linear(input, self.weight, self.bias)
        if input.dtype != self.layer.packed.weights.dtype or input.device.type != "cpu":
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features).contiguous()
        result = indirect.run(rows, self.layer.packed, Epilogue(shift=self.bias), None, len(rows))
        return result.view(*input.shape[:-1], self.out_features)

    def _guided(self, x: Features) -> Features:
        value = x.value
        rows = as_rows(value.contiguous(memory_format=torch.channels_last) if x.selection.everything else value)
        if x.selection.observers:
            per_site, pixels = self.in_features * self.out_features, x.selection.batch * x.grid[0] * x.grid[1]
            macs = len(x.sites) * per_site
            x.selection.report(Operation("linear", "guided", x.grid, macs, pixels * per_site, "indirect"))
        work = Work(self.layer, x.selection, rows, None, len(rows), 1, Epilogue(shift=self.bias))
        x.read_by(work)
        form = x.form.with_channels([self.out_features])
        return type(x).deferred(work, x.selection, x.grid, full=x.full, fill=None, form=form)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that becomes part of the work it follows. What PyTorch's dispatch takes to find the rule for
    `batch_norm` is as much as a small layer takes."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Features) and not self.training:
            following = continued(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
            if following is not None:
                return following
        return super().forward(input)


class _Activation(nn.Module):
    """An activation that becomes part of the work it follows."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Features) and input._work is not None:
            step = _step(self, input.dtype)
            following = None if step is None else input.then(lambda epilogue: epilogue.activated(*step))
            if following is not None:
                return input.becomes(following) if getattr(self, "inplace", False) else following
        return super().forward(input)  # type: ignore[no-any-return, misc]


def _step(module: nn.Module, dtype: torch.dtype) -> tuple[str, float, float] | None:
    match module:
        case nn.ReLU():
            return "clamp", 0.0, math.inf
        case nn.Hardtanh():  # ReLU6 is one
            return "clamp", module.min_val, module.max_val
        case _ if dtype is not torch.float32:
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
