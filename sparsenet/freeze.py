"""`freeze`: a model for inference, whose skipped pixels are skipped milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparsenet import backends, context
from sparsenet.backends import choice, triton, winograd
from sparsenet.backends.choice import Measurements
from sparsenet.backends.ways import Spec
from sparsenet.backends.workspace import Workspace
from sparsenet.chains import FusedForward
from sparsenet.cuda_graph import GraphedCall, check_graph
from sparsenet.features import Features
from sparsenet.frozen_branch import OctavesForward, halves, make_direct
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.frozen_modules import (
    FOLLOWERS,
    FrozenConv2d,
    FrozenLinear,
    begin_pass,
    end_pass,
    refuse_weights,
)
from sparsenet.frozen_squeeze import SqueezeForward, squeezes
from sparsenet.masked_conv import MaskedConv2d
from sparsenet.masks import blobs
from sparsenet.regions import Everywhere, Frame, Regions
from sparsenet.rules.conv import pair
from sparsenet.selector import GivenMask, SelectiveModule, Selector
from sparsenet.selector.levels import Octaves
from sparsenet.surgery import call, check_model, quietly

# Of the mask that guided layers are measured under.
DENSITY = 0.25


def freeze(model: nn.Module, example_inputs: Any, *, backend: str = "auto", cuda_graph: bool = False) -> nn.Module:
    """A model for inference on this machine: the same call, the same outputs to rounding, in less time.

    Weights are packed once, in place of the originals. Convolutions and linear layers wait for what follows them, so
    that batch normalisation, bias, activation and residual become part of the kernel that computes them; each layer is
    measured, where a mask guides it and where all pixels are computed, and takes the fastest way. The layers before
    the stage, and a whole model that is not selective, run on the same kernels.

    Any input size and batch can follow. The result can be deep-copied, pickled and saved (`torch.save`), and packs its
    weights again for the machine that loads it; its `state_dict` has the original's keys and numbers, but it loads
    none. On CPU, layers of other dtypes than float32 and float64 stay as they are; on GPUs (NVIDIA, AMD) those that
    Triton's kernels do not compute.

    Args:
        model: of `selectify`, or any other; it is left as it is. Its copy is put in evaluation mode.
        example_inputs: what the model is called with, in one of the forms of `selectify`: what layers are measured on.
        backend: "auto", or what computes guided layers: "indirect", "triton", "rows" or "spconv". Any but "auto" also
            keeps 3x3 convolutions from Winograd's algorithm, in which a number that is huge beside its neighbours, or
            infinite, is felt two pixels away.
        cuda_graph: record the pass as a CUDA graph for each form of inputs, the first time that it is met, and replay
            it then (see `sparsenet.cuda_graph`); with backend "auto" by masked dense convolutions too, of which the
            faster is kept. For models on a CUDA device; a selective one must have a capacity. Copies of the result and
            what was pickled run without.

    Raises:
        ValueError: for an unknown backend, a model that is frozen already, those that `selectify` refuses (compiled,
            scripted, without numbers), and for `cuda_graph` without a CUDA device, without all weights on it, or of a
            selective model without capacity.
    """
    check_model(model, inplace=False)
    device = check_graph(model) if cuda_graph else None
    if backends.check(backend) == "reference":
        raise ValueError("the reference backend is not frozen: run the model as it is, inside use_backend('reference')")
    with torch.inference_mode(False):  # what is kept must notice writes, which tensors of that mode do not count
        frozen, layers = _frozen(copy.deepcopy(model), tree_map_only(Tensor, _counted, example_inputs), backend)
        if device is not None:
            selector = getattr(frozen, "selector", None)
            selector = selector if isinstance(selector, Selector) else None
            choices = (None,) if selector is None or backend != "auto" else (None, "reference")
            record_calls(frozen, GraphedCall(frozen, device, lambda: [layer.kept() for layer in layers], choices))
            if selector is None or not isinstance(selector.module, GivenMask) or context.current().regions is not None:
                call(frozen, example_inputs)  # which records it
        return frozen


def _counted(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that counts what is written to it."""
    return tensor.clone() if tensor.is_inference() else tensor


def record_calls(model: nn.Module, graphed: GraphedCall) -> None:
    """Let recordings stand in for a model's call, hooks and all: where `nn.Module.compile` puts what it makes of it."""
    model._compiled_call_impl = graphed


def _frozen(model: nn.Module, example_inputs: Any, backend: str) -> tuple[nn.Module, list[FrozenLayer]]:
    """The model itself, frozen, and its layers."""
    from sparsenet import adapters

    frozen = model.eval().requires_grad_(False)
    selector = getattr(frozen, "selector", None)
    if isinstance(selector, Selector):
        backend = selector.options.backend if backend == "auto" else backend
        selector.options = replace(selector.options, backend="auto")
    device = next((parameter.device for parameter in frozen.parameters()), None)
    measurements = choice.of_this_machine(device)
    layers = list(_replaced(frozen, backend, measurements))
    for module in frozen.modules():
        if type(module) is SelectiveModule:
            make_direct(module)
        elif type(module) is Octaves and all(map(halves, module.values())):
            module.forward = OctavesForward(module)  # type: ignore[method-assign]
    adapters.find(frozen).freeze(frozen)
    memory = Workspace()
    frozen.register_load_state_dict_pre_hook(refuse_weights)
    frozen._apply = Conversion(frozen, {(layer.dtype, layer.device) for layer in layers})  # type: ignore[method-assign]
    frozen.register_forward_pre_hook(FrozenBeginHook(memory), prepend=True, with_kwargs=True)
    frozen.register_forward_hook(FrozenEndHook(memory), always_call=True)
    with quietly(frozen):
        for setting in _settings(frozen):
            with setting:
                call(frozen, example_inputs)
    for layer in layers:
        layer.settle()
    measurements.save()
    return frozen, layers


def _settings(model: nn.Module) -> list[AbstractContextManager[None]]:
    """What the model is called in to meet each layer as it will run: with all pixels active, with some, and with the
    selector, if there is one."""
    selector = getattr(model, "selector", None)
    if not isinstance(selector, Selector):
        return [nullcontext()]
    masks = [Everywhere(), _Blobs(size=selector.plan.size)]
    settings: list[AbstractContextManager[None]] = [context.setting(regions=regions) for regions in masks]
    return settings if isinstance(selector.module, GivenMask) else [*settings, nullcontext()]


@dataclass(frozen=True)
class _Blobs(Regions):
    """Regions of a pass in which every image has a mask of some `DENSITY`, whatever the batch."""

    size: tuple[int, int] = (1, 1)

    def entry_mask(self, frame: Frame | None, batch: int, device: torch.device) -> Tensor:
        return blobs(batch, self.size, DENSITY).to(device)


def _replaced(model: nn.Module, backend: str, measurements: Measurements) -> Iterator[FrozenLayer]:
    """Put frozen modules in place of those that can be, and give their layers."""
    for path, module in model.named_modules():
        kind = type(module)
        if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
            module.forward = FusedForward(module)  # type: ignore[method-assign]
        elif squeezes(module):
            module.forward = SqueezeForward(module)
        elif kind in FOLLOWERS:
            module.__class__ = FOLLOWERS[kind]
        elif kind in (nn.Conv2d, MaskedConv2d, nn.Linear) and _packable(module._parameters.get("weight")):
            weight: Tensor = module.weight.detach()
            if isinstance(module, nn.Conv2d):
                candidates = _candidates(module, weight, backend)
                padding = module.padding if isinstance(module.padding, tuple) else 0
                spec = Spec(pair(module.stride), pair(padding), pair(module.dilation), module.groups)
                layer = FrozenLayer(path, weight, spec, candidates, measurements)
                FrozenConv2d.make(module, layer)
            else:
                assert isinstance(module, nn.Linear)
                ways = [*_kernels(weight, 1), "rows"]
                candidates = {"guided": ways, "everything": ways}
                spec = Spec((1, 1), (0, 0), (1, 1), 1)
                layer = FrozenLayer(path, weight[:, :, None, None], spec, candidates, measurements)
                FrozenLinear.make(module, layer)
            yield layer


def _packable(weight: Tensor | None) -> bool:
    if weight is None:
        return False
    if weight.is_cuda:
        return triton.unsupported(weight, 1) is None
    # From one channel to one, as between the octaves of the saliency, to come to a kernel takes longer than to compute:
    # four octaves from 75x75 took 1.7 ms of a forward pass of 25.
    single = weight.shape[:2] == (1, 1)
    return weight.device.type == "cpu" and not single and weight.dtype in (torch.float32, torch.float64)


def _kernels(weight: Tensor, groups: int) -> list[str]:
    """The backend whose kernels are for the weight's device, if it can compute the layer."""
    name = "triton" if weight.is_cuda else "indirect"
    return [] if backends.BACKENDS[name].unsupported(weight, groups) else [name]


def _candidates(conv: nn.Conv2d, weight: Tensor, backend: str) -> dict[str, list[str]]:
    """The ways that can compute a convolution, by kind."""
    kernels = _kernels(weight, conv.groups)
    if backend == "auto" and winograd.unsupported(weight, pair(conv.stride), pair(conv.dilation), conv.groups) is None:
        kernels.append("winograd")
    everything = list(kernels)
    dense = weight.is_cuda or weight.dtype is torch.float32  # of which oneDNN packs weights
    if dense and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        everything.append("dense")
    guided = [*kernels, "rows"]
    own = getattr(conv, "backend", "auto")
    asked = backend if own == "auto" else own
    if asked not in ("auto", "reference"):
        name, _ = backends.choose(asked, weight, conv.groups)
        guided = [name]
    return {"guided": guided, "everything": everything or ["rows"]}


@dataclass(eq=False)
class Conversion:
    """In place of a frozen root's `_apply`, by which `.half()` and `.to()` change tensors: it refuses before anything
    is changed."""

    module: nn.Module
    kinds: set[tuple[torch.dtype, torch.device]]

    def __call__(self, function: Any, recurse: bool = True) -> nn.Module:
        for dtype, device in self.kinds:
            weight = torch.empty(0, dtype=dtype, device=device)
            changed = function(weight)
            if (changed.dtype, changed.device) != (weight.dtype, weight.device):
                raise RuntimeError(
                    f"a frozen model cannot become {changed.dtype} on {changed.device}, because its weights are packed "
                    f"for {weight.dtype} on {weight.device}: convert the model before sparsenet.freeze"
                )
        return type(self.module)._apply(self.module, function, recurse)


@dataclass(eq=False)
class FrozenBeginHook:
    """Forward pre-hook of a frozen root."""

    memory: Workspace

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        begin_pass(self.memory)
        if not kwargs and all(type(arg) is Tensor for arg in args):  # to look into what holds them takes 0.1 ms
            return tuple(map(_counted, args)), kwargs
        return tree_map_only(Tensor, _counted, (args, kwargs))


@dataclass(eq=False)
class FrozenEndHook:
    """Forward hook of a frozen root, called after an error too: its outputs are ordinary tensors."""

    memory: Workspace

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            return output if type(output) is Tensor else tree_map_only(Features, _ordinary, output)
        finally:
            end_pass()
            self.memory.trim()


def _ordinary(part: Features) -> Tensor:
    return part.dense("the model's output").contiguous() if part.selection.everything else part
