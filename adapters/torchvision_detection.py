"""What torchvision's detectors share: the transform of their images, and the anchors of ignored locations."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from sparsenet import context
from sparsenet.adapters import Adapter
from sparsenet.adapters.torchvision_transform import FrozenTransform
from sparsenet.constants import constant
from sparsenet.features import Features
from sparsenet.regions import Frame

# A logit whose softmax beside 0 and whose sigmoid are exactly zero, in float16 too.
NEVER = -1e4

# The maps of the current pass that the detection head reads.
_sources: ContextVar[list[Tensor]] = ContextVar("sparsenet.detection_sources")


class Detector(Adapter):
    """A detector with torchvision's transform and backbone; each family adds its heads."""

    def methods(self, model: Any) -> list[tuple[nn.Module, str, Any]]:
        """Methods that the family computes otherwise: their module, their name, and what stands in for them."""
        return []

    def example_inputs(self, model: Any) -> list[Tensor]:
        """One image of the size that the network sees: the transform's fixed size, or a square of its shorter side."""
        transform, parameter = model.transform, next(model.parameters())
        side = min(transform.min_size[-1], transform.max_size)
        width, height = transform.fixed_size or (side, side)
        return [torch.rand(3, height, width, device=parameter.device, dtype=parameter.dtype)]

    def attach(self, model: Any) -> None:
        model.transform.register_forward_hook(TransformHook())
        model.backbone.register_forward_hook(SourcesHook())
        model.register_forward_hook(ForgetHook(), always_call=True)
        for module, name, stand_in in self.methods(model):
            setattr(module, name, stand_in)

    def detach(self, model: Any) -> None:
        for module in (model.transform, model.backbone, model):
            remove_hooks(module, TransformHook, SourcesHook, ForgetHook)
        for module, name, _ in self.methods(model):
            delattr(module, name)

    def freeze(self, model: nn.Module) -> None:
        for module in model.modules():
            stand_in = FROZEN.get(type(module))
            if stand_in is not None and "forward" not in vars(module):
                module.forward = stand_in(module)


def remove_hooks(module: nn.Module, *kinds: type) -> None:
    """Take a module's forward hooks of these classes off."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, kinds):
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)


class TransformHook:
    """Forward hook of a detector's transform: where it has put the images."""

    def __call__(self, module: nn.Module, args: Any, output: tuple[ImageList, Any]) -> None:
        images, frame = output[0], context.frame()
        if frame is not None:
            height, width = images.tensors.shape[-2:]
            context.set_frame(Frame(frame.originals, list(images.image_sizes), (height, width)))


class SourcesHook:
    """Forward hook of the backbone: keeps the maps that the head will read."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor | dict[str, Tensor]) -> None:
        _sources.set([output] if isinstance(output, Tensor) else list(output.values()))


class ForgetHook:
    """Forward hook of the detector, called after an error too: its maps are not kept beyond the pass."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        _sources.set([])


def active_anchors(generator: Any, batch: int) -> Tensor | None:
    """Which anchors count in the current pass.

    Where the mask is trained by its effect (indirect supervision) every anchor counts: dropping the ignored ones
    would reward masking everything.

    Args:
        generator: the detector's anchor generator, whose anchors are in the order map, row, column, shape.
        batch: images of the pass.

    Returns:
        Bool (N, anchors), true for those of active locations, or `None` where all count.
    """
    sources = _sources.get([])
    guided = [source for source in sources if isinstance(source, Features)]
    if not guided or any(source.selection.live for source in guided):
        return None
    parts, counts = [], []
    for source, anchors in zip(sources, generator.num_anchors_per_location(), strict=True):
        if isinstance(source, Features):
            mask = source.selection.mask(source.grid).flatten(1)
        else:
            mask = torch.ones(batch, source.shape[2] * source.shape[3], dtype=torch.bool, device=source.device)
        parts.append(mask)
        counts.append((mask.shape[1], anchors))
    return torch.cat(parts, 1).index_select(1, _pixels(tuple(counts), parts[0].device))


@constant(16)
def _pixels(counts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The pixel of each anchor, of maps of so many pixels and anchors for each, one behind the other."""
    first, parts = 0, []
    for pixels, anchors in counts:
        parts.append(torch.arange(first, first + pixels).repeat_interleave(anchors))
        first += pixels
    return torch.cat(parts).to(device)


# Sizes and numbers of images whose anchors are kept.
MOST_KEPT = 16


class KeptAnchors:
    """A generator's own `forward`, whose anchors are kept for images and maps of the same sizes: 1.3 ms of 25 in SSD300
    of a quarter's width. They are made again where the generator was changed, or the anchors written to."""

    def __init__(self, generator: Any):
        self.generator = generator
        self._kept: dict[Any, tuple[Any, list[Tensor], list[int]]] = {}

    def __call__(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        generator, first = self.generator, maps[0]
        if first.device.type != "cpu":
            anchors: list[Tensor] = type(generator).forward(generator, images, maps)
            return anchors
        grids = tuple(tuple(each.shape[-2:]) for each in maps)
        key = (tuple(images.tensors.shape[-2:]), len(images.image_sizes), grids, first.dtype)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == self._state() and kept[2] == [each._version for each in kept[1]]:
            return list(kept[1])
        with torch.inference_mode(False), torch.no_grad():  # where writes are counted
            anchors = type(generator).forward(generator, images, maps)
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[key] = copy.deepcopy(self._state()), anchors, [each._version for each in anchors]
        return list(anchors)

    def _state(self) -> dict[str, Any]:
        """What anchors are made from."""
        return {name: _numbers(value) for name, value in vars(self.generator).items() if name in _MADE_FROM}

    def __getstate__(self) -> dict[str, Any]:
        return {"generator": self.generator, "_kept": {}}


_MADE_FROM = ("sizes", "aspect_ratios", "cell_anchors", "steps", "clip", "_wh_pairs")


def _numbers(value: Any) -> Any:
    """A list of tensors as lists."""
    return [each.tolist() if isinstance(each, Tensor) else each for each in value] if type(value) is list else value


# What stands in for a module's forward in frozen models, by class.
FROZEN: dict[type[nn.Module], Any] = {
    AnchorGenerator: KeptAnchors,
    DefaultBoxGenerator: KeptAnchors,
    GeneralizedRCNNTransform: FrozenTransform,
}


@dataclass(eq=False)
class ActiveLoss:
    """The own `compute_loss` of a model or its head, without the anchors of ignored locations: these are neither
    positive nor negative, are not mined, and do not count in the normaliser (detectors that match first and ignore
    then never turn a matched anchor into background). For losses that are a sum over the anchors of a batch, divided
    by its positives: each image's is computed by itself, on the anchors that remain.

    Attributes:
        model: the detector.
        owner: the module whose method it stands in for.
    """

    model: Any
    owner: nn.Module

    def __call__(
        self, targets: list[Any], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        compute: Any = type(self.owner).compute_loss  # type: ignore[attr-defined]
        active = active_anchors(self.model.anchor_generator, len(anchors))
        if active is None:
            return compute(self.owner, targets, outputs, anchors, matched)
        total: dict[str, Tensor] = {}
        positives = 0
        for image, keep in enumerate(active):
            kept = matched[image][keep]
            found = int((kept >= 0).sum())
            positives += found
            losses = compute(
                self.owner,
                targets[image : image + 1],
                {name: output[image : image + 1, keep] for name, output in outputs.items()},
                [anchors[image][keep]],
                [kept],
            )
            for name, loss in losses.items():  # each comes divided by its own image's positives
                total[name] = total.get(name, torch.zeros_like(loss)) + loss * max(1, found)
        return {name: loss / max(1, positives) for name, loss in total.items()}
