"""torchvision's RetinaNet and FCOS: an ignored location predicts nothing and learns nothing.

Their heads are shared between the maps of the pyramid: one convolution, one fill, five maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet

from sparsenet.adapters.torchvision_detection import NEVER, ActiveLoss, Detector, active_anchors


class TorchvisionRetinaNet(Detector):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        return isinstance(model, RetinaNet)

    def fills(self, model: Any) -> dict[str, Tensor]:
        return class_fills(model)

    def methods(self, model: Any) -> list[tuple[nn.Module, str, Any]]:
        return [(model.head, "compute_loss", MatchedLoss(model))]


class TorchvisionFCOS(Detector):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        return isinstance(model, FCOS)

    def fills(self, model: Any) -> dict[str, Tensor]:
        """A class score of zero is enough: the centre-ness multiplies it."""
        return class_fills(model)

    def methods(self, model: Any) -> list[tuple[nn.Module, str, Any]]:
        """The head's loss knows positives and negatives only, so that ignored anchors must not reach it."""
        return [(model.head, "compute_loss", ActiveLoss(model, model.head))]


def class_fills(model: Any) -> dict[str, Tensor]:
    """Class logits of an ignored location, by path: sigmoids of exactly zero, which no threshold keeps."""
    conv = getattr(model.head.classification_head, "cls_logits", None)
    if not isinstance(conv, nn.Conv2d):
        return {}
    return {"head.classification_head.cls_logits": torch.full((conv.out_channels,), NEVER)}


@dataclass(eq=False)
class MatchedLoss:
    """The own `compute_loss` of RetinaNet's head, where the anchors of ignored locations count as those whose overlap
    is between the thresholds: neither the class loss nor the box loss takes these, and they are not counted."""

    model: RetinaNet

    def __call__(
        self, targets: list[Any], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        head = self.model.head
        active = active_anchors(self.model.anchor_generator, len(anchors))
        if active is not None:
            neither = self.model.proposal_matcher.BETWEEN_THRESHOLDS
            matched = [each.masked_fill(~keep, neither) for each, keep in zip(matched, active, strict=True)]
        return type(head).compute_loss(head, targets, outputs, anchors, matched)
