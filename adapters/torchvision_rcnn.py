"""torchvision's Faster, Mask and Keypoint R-CNN: an ignored location proposes no region and learns nothing.

The heads behind the proposals read the pyramid's maps as ordinary tensors, zero at inactive pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from sparsenet.adapters.torchvision_detection import NEVER, Detector, active_anchors, remove_hooks


class TorchvisionRCNN(Detector):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        return isinstance(model, GeneralizedRCNN) and isinstance(model.rpn, RegionProposalNetwork)

    def fills(self, model: Any) -> dict[str, Tensor]:
        """No object, and a box without extent: torchvision proposes objects of score 0 too, but no box below its least
        size. The width and height of dx, dy, dw, dh are exponentials, so that they are exactly zero."""
        head = model.rpn.head
        if not isinstance(head, RPNHead):
            return {}
        anchors = head.cls_logits.out_channels
        return {
            "rpn.head.cls_logits": torch.full((anchors,), NEVER),
            "rpn.head.bbox_pred": torch.tensor([0.0, 0.0, NEVER, NEVER]).repeat(anchors),
        }

    def methods(self, model: Any) -> list[tuple[nn.Module, str, Any]]:
        rpn = model.rpn
        return [
            (rpn, "assign_targets_to_anchors", ActiveLabels(rpn)),
            (rpn, "compute_loss", SampledLoss(rpn)),
        ]

    def attach(self, model: Any) -> None:
        super().attach(model)
        model.roi_heads.register_forward_hook(NoRegionsHook())

    def detach(self, model: Any) -> None:
        super().detach(model)
        remove_hooks(model.roi_heads, NoRegionsHook)


@dataclass(eq=False)
class ActiveLabels:
    """The own `assign_targets_to_anchors` of a region proposal network, where the anchors of ignored locations are
    labelled neither object nor background: the sampler takes none of them."""

    rpn: RegionProposalNetwork

    def __call__(self, anchors: list[Tensor], targets: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = type(self.rpn).assign_targets_to_anchors(self.rpn, anchors, targets)
        active = active_anchors(self.rpn.anchor_generator, len(anchors))
        if active is not None:
            labels = [each.masked_fill(~keep, -1.0) for each, keep in zip(labels, active, strict=True)]
        return labels, boxes


@dataclass(eq=False)
class SampledLoss:
    """The own `compute_loss` of a region proposal network, and zero where no anchor counts: it is a mean over the
    sampled anchors, which would be NaN."""

    rpn: RegionProposalNetwork

    def __call__(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not any((each >= 0).any() for each in labels):
            return objectness[:0].sum(), deltas[:0].sum()
        return type(self.rpn).compute_loss(self.rpn, objectness, deltas, labels, targets)


class NoRegionsHook:
    """Forward hook of the heads behind the proposals: their losses are means over regions, and zero, not NaN, where an
    empty mask proposes none and no image has an object."""

    def __call__(self, module: nn.Module, args: Any, output: tuple[Any, dict[str, Tensor]]) -> Any:
        found, losses = output
        _, proposals, _, targets = args
        if losses and not any(map(len, proposals)) and not any(len(target["boxes"]) for target in targets):
            return found, {name: loss.nan_to_num() for name, loss in losses.items()}
        return None
