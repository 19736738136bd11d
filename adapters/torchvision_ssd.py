"""torchvision's SSD and whatever is built on its class: an ignored location predicts nothing and learns nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD, SSDScoringHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from sparsenet.adapters.torchvision_detection import NEVER, ActiveLoss, Detector
from sparsenet.features import Features
from sparsenet.frozen_heads import side_by_side
from sparsenet.kernels import queue
from sparsenet.plan import Plan
from sparsenet.selection import Selection


class TorchvisionSSD(Detector):
    """SSD and SSDlite."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return isinstance(model, SSD)

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

    def near_heads(self, model: Any, plan: Plan) -> frozenset[str]:
        """What a head's convolution reads comes of the backbone's last one of that size and number of channels (in
        SSD300: conv4_3, fc7, conv6_2 ... conv9_2). The heads' own belong to them: a pixel deep inside an ignored area
        has an effect there only, and without gradient from there could never return."""
        modules = dict(model.named_modules())
        steps = [step for step in plan.steps if isinstance(modules[step.path], nn.Conv2d)]
        heads = [step for step in steps if step.path.startswith("head.")]
        backbone = [step for step in steps if not step.path.startswith("head.")]
        made = {(step.operation.size, modules[step.path].out_channels): step.path for step in backbone}
        read = {made.get((step.operation.size, modules[step.path].in_channels)) for step in heads}
        return frozenset(step.path for step in heads) | frozenset(path for path in read if path is not None)

    def methods(self, model: Any) -> list[tuple[nn.Module, str, Any]]:
        heads = [getattr(model.head, f"{kind}_head", None) for kind in ("classification", "regression")]
        return [
            (model, "compute_loss", ActiveLoss(model, model)),
            *self._detections(model),
            *((head, "forward", Scores(head)) for head in heads if head is not None and _by_its_class(head)),
        ]

    def freeze(self, model: Any) -> None:
        super().freeze(model)
        for module, name, stand_in in self._detections(model):
            if name not in vars(module):
                setattr(module, name, stand_in)

    def _detections(self, model: Any) -> list[tuple[nn.Module, str, Any]]:
        if type(model).postprocess_detections is not SSD.postprocess_detections:
            return []
        return [(model, "postprocess_detections", Detections(model))]


def _by_its_class(head: nn.Module) -> bool:
    """Whether torchvision's own `forward` is what the head is called by."""
    own = vars(head).get("forward")
    return type(head).forward is SSDScoringHead.forward and (own is None or isinstance(own, Scores))


@dataclass(eq=False)
class Scores:
    """A head's own `forward`, whose convolutions' results leave the guided region at once, and not after they were
    viewed by anchors and put in order: three dispatches less for each of twelve maps. In a frozen model kernels write
    them where they belong."""

    head: SSDScoringHead

    def __call__(self, sources: list[Tensor]) -> Tensor:
        head, parts = self.head, []
        together = side_by_side(head.module_list, sources) if isinstance(sources[0], Features) else None
        if together is not None:
            return together.view(len(together), -1, head.num_columns)
        for place, source in enumerate(sources):
            result = head._get_result_from_module_list(source, place)
            if isinstance(result, Features) and not _watched(result.selection):
                result = result.dense("reshape", waits=True)
            parts.append(result.permute(0, 2, 3, 1).reshape(len(result), -1, head.num_columns))
        queue.finish()
        return torch.cat(parts, 1)


def _watched(selection: Selection) -> bool:
    """Whether someone is to know of features that leave the region."""
    return bool(selection.observers) or selection.followed or selection.options.strict


@dataclass(eq=False)
class Detections:
    """torchvision's own `postprocess_detections`, with the same result, on the anchors and classes that can be
    detected. A class's softmax is at most the exponential of how far its logit lies below the highest one: by that
    most anchors are background for certain, all ignored ones among them. Of the remaining pairs of an anchor and a
    class all boxes are decoded at once, where torchvision goes through the classes."""

    model: SSD

    def __call__(
        self, outputs: dict[str, Tensor], anchors: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, threshold = outputs["cls_logits"], self.model.score_thresh
        # Half the threshold makes up for rounding, in half precision too.
        least = math.log(threshold / 2) if threshold > 0 else -math.inf
        likely = logits[..., 1:].amax(-1) - logits.amax(-1) >= least
        images = zip(likely, logits, outputs["bbox_regression"], anchors, sizes, strict=True)
        return [self._of_image(*image) for image in images]

    def _of_image(
        self, likely: Tensor, logits: Tensor, regression: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        model = self.model
        likely = likely.nonzero()[:, 0]
        by_class = logits.index_select(0, likely).softmax(-1)[:, 1:].t()
        labels, places = (by_class > model.score_thresh).nonzero(as_tuple=True)
        scores = by_class[labels, places]
        order = _highest_of_each(labels, scores, model.topk_candidates)
        labels, scores, places = 1 + labels[order], scores[order], likely[places[order]]
        boxes = model.box_coder.decode_single(regression.index_select(0, places), anchors.index_select(0, places))
        boxes = clip_boxes_to_image(boxes, size)
        keep = batched_nms(boxes, scores, labels, model.nms_thresh)[: model.detections_per_img]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def _highest_of_each(labels: Tensor, scores: Tensor, most: int) -> Tensor:
    """Where each label's highest scores are, `most` at most: labels are sorted, and remain so. Of equal scores it has
    those that `topk` has of a label's alone."""
    first, parts = 0, []
    for count in labels.unique_consecutive(return_counts=True)[1].tolist():
        parts.append(first + scores[first : first + count].topk(min(count, most)).indices)
        first += count
    return torch.cat(parts) if parts else labels
