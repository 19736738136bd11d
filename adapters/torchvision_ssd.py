"""torchvision's SSD and whatever is built on its class: an ignored location predicts nothing and learns nothing."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from sparsenet import context
from sparsenet.adapters import Adapter
from sparsenet.features import Features
from sparsenet.regions import Frame

# Softmax of a class this far below the background is exactly zero, in float16 too.
NEVER = -1e4

# The head's input maps of the current pass.
_sources: ContextVar[list[Tensor]] = ContextVar("sparsenet.ssd_sources")


class TorchvisionSSD(Adapter):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        return isinstance(model, SSD)

    def example_inputs(self, model: Any) -> list[Tensor]:
        width, height = model.transform.fixed_size or (300, 300)
        parameter = next(model.parameters())
        return [torch.rand(3, height, width, device=parameter.device, dtype=parameter.dtype)]

    def fills(self, model: Any) -> dict[str, Tensor]:
        """Class scores of an ignored location: certainly background, which is class 0."""
        head = model.head.classification_head
        scores = torch.full((head.num_columns,), NEVER)
        scores[0] = 0.0
        return {
            f"head.classification_head.{path}": scores.repeat(conv.out_channels // head.num_columns)
            for path, conv in head.named_modules()
            if isinstance(conv, nn.Conv2d) and conv.out_channels % head.num_columns == 0 and conv.groups == 1
        }

    def attach(self, model: Any) -> None:
        model.transform.register_forward_hook(TransformHook())
        model.backbone.register_forward_hook(SourcesHook())
        model.compute_loss = ActiveLoss(model)
        model.postprocess_detections = ActiveDetections(model)

    def detach(self, model: Any) -> None:
        for module in (model.transform, model.backbone):
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, TransformHook | SourcesHook):
                    del module._forward_hooks[key]
        del model.compute_loss, model.postprocess_detections


class TransformHook:
    """Forward hook of a torchvision detector's transform: where it has put the images."""

    def __call__(self, module: nn.Module, args: Any, output: tuple[ImageList, Any]) -> None:
        images, frame = output[0], context.frame()
        if frame is not None:
            height, width = images.tensors.shape[-2:]
            context.set_frame(Frame(frame.originals, list(images.image_sizes), (height, width)))


class SourcesHook:
    """Forward hook of the backbone: keeps the maps that the head will read."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor | dict[str, Tensor]) -> None:
        _sources.set([output] if isinstance(output, Tensor) else list(output.values()))


@dataclass(eq=False)
class ActiveLoss:
    """The model's own `compute_loss` without the anchors of ignored locations: these are neither positive nor negative,
    are not mined, and do not count in the normaliser (detectors that match first and ignore then never turn a
    matched anchor into background).

    Where the mask is trained by its effect (indirect supervision) every anchor counts: dropping the ignored ones
    would reward masking everything.
    """

    model: SSD

    def __call__(
        self, targets: list[Any], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        compute = type(self.model).compute_loss
        active = active_anchors(self.model, len(anchors))
        if active is None:
            return compute(self.model, targets, outputs, anchors, matched)
        total: dict[str, Tensor] = {}
        positives = 0
        for image, keep in enumerate(active):
            kept = matched[image][keep]
            found = int((kept >= 0).sum())
            positives += found
            losses = compute(
                self.model,
                targets[image : image + 1],
                {name: output[image : image + 1, keep] for name, output in outputs.items()},
                [anchors[image][keep]],
                [kept],
            )
            for name, loss in losses.items():  # each comes divided by its own image's positives
                total[name] = total.get(name, torch.zeros_like(loss)) + loss * max(1, found)
        return {name: loss / max(1, positives) for name, loss in total.items()}


@dataclass(eq=False)
class ActiveDetections:
    """The model's own `postprocess_detections` on the anchors of active locations. The others, whose scores are zero,
    would give nothing either, but take their share of its time."""

    model: SSD

    def __call__(
        self, outputs: dict[str, Tensor], anchors: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        detect = type(self.model).postprocess_detections
        active = active_anchors(self.model, len(anchors))
        if active is None:
            return detect(self.model, outputs, anchors, sizes)
        found: list[dict[str, Tensor]] = []
        for image, keep in enumerate(active):
            kept = keep.nonzero()[:, 0]
            own = {name: output[image : image + 1].index_select(1, kept) for name, output in outputs.items()}
            found += detect(self.model, own, [anchors[image].index_select(0, kept)], [sizes[image]])
        return found


def active_anchors(model: SSD, batch: int) -> Tensor | None:
    """Bool (N, anchors): those of active locations in the current pass, or `None` where all count."""
    sources = _sources.get([])
    guided = [source for source in sources if isinstance(source, Features)]
    if not guided or any(source.gate_is_live() for source in guided):
        return None
    per_location = model.anchor_generator.num_anchors_per_location()
    parts = []
    for source, anchors in zip(sources, per_location, strict=True):
        if isinstance(source, Features):
            mask = source.selection.mask(source.grid).flatten(1)
        else:
            mask = torch.ones(batch, source.shape[2] * source.shape[3], dtype=torch.bool, device=source.device)
        parts.append(mask.repeat_interleave(anchors, 1))
    return torch.cat(parts, 1)
