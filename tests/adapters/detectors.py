"""Small detectors of torchvision's classes with random weights that detect, their images, and what is done by hand."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tests.models import at_size, with_lively_norms

Targets = list[dict[str, Tensor]]
SCALE = {"min_size": 128, "max_size": 160}
PYRAMID = 16  # channels


def small_body() -> nn.Module:
    """A residual network with torchvision's names of stages: layer1 … layer4 at strides 4 … 32."""
    stem = [("conv1", nn.Conv2d(3, 8, 3, 2, 1)), ("relu", nn.ReLU(inplace=True)), ("maxpool", nn.MaxPool2d(3, 2, 1))]

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, stride, None if inputs == outputs else shortcut))

    widths = [8, 8, 12, 16, 20]
    layers = [(f"layer{i}", block(widths[i - 1], widths[i], 1 if i == 1 else 2)) for i in range(1, 5)]
    return nn.Sequential(OrderedDict([*stem, *layers]))


def pyramid(first: int, extra: Any = None, channels: int = PYRAMID) -> BackboneWithFPN:
    """Maps of layer<first> … layer4, and one or two more."""
    widths, layers = [8, 12, 16, 20][first - 1 :], range(first, 5)
    names = {f"layer{layer}": str(position) for position, layer in enumerate(layers)}
    return BackboneWithFPN(small_body(), names, widths, channels, extra)


def shapes(sizes: list[int]) -> AnchorGenerator:
    return AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))


RPN = {
    "rpn_pre_nms_top_n_test": 400,
    "rpn_post_nms_top_n_test": 60,
    "rpn_post_nms_top_n_train": 40,
    "rpn_batch_size_per_image": 10**6,  # every anchor is sampled, so that the loss is no matter of chance
    "box_detections_per_img": 10,
}


def retinanet() -> RetinaNet:
    anchors = shapes([16, 32, 64, 96, 128])
    return RetinaNet(pyramid(2, LastLevelP6P7(PYRAMID, PYRAMID)), 4, anchor_generator=anchors, **SCALE)


def fcos() -> FCOS:
    channels = 64  # its head normalises 32 groups, and a group of one number on a map of one pixel has no variance
    return FCOS(pyramid(2, LastLevelP6P7(channels, channels), channels), 4, **SCALE)


def faster_rcnn() -> FasterRCNN:
    return FasterRCNN(pyramid(1), 4, rpn_anchor_generator=shapes([12, 24, 48, 96, 128]), **SCALE, **RPN)


def faster_rcnn_of_one_map() -> FasterRCNN:
    """Its backbone gives a tensor, not a pyramid."""
    body: Any = small_body()
    del body.layer4
    backbone: Any = nn.Sequential(OrderedDict(body=body))
    backbone.out_channels = 16
    anchors = AnchorGenerator(((16, 48, 96),), ((0.5, 1.0, 2.0),))
    return FasterRCNN(backbone, 4, rpn_anchor_generator=anchors, **SCALE, **RPN)


def mask_rcnn() -> MaskRCNN:
    heads = {
        "box_predictor": FastRCNNPredictor(1024, 4),
        "mask_head": MaskRCNNHeads(PYRAMID, (8,), 1),
        "mask_predictor": MaskRCNNPredictor(8, 8, 4),
    }
    return MaskRCNN(pyramid(1), rpn_anchor_generator=shapes([12, 24, 48, 96, 128]), **heads, **SCALE, **RPN)


def keypoint_rcnn() -> KeypointRCNN:
    heads = {"keypoint_head": KeypointRCNNHeads(PYRAMID, (8,)), "keypoint_predictor": KeypointRCNNPredictor(8, 3)}
    return KeypointRCNN(pyramid(1), 4, rpn_anchor_generator=shapes([12, 24, 48, 96, 128]), **heads, **SCALE, **RPN)


DENSE = {"retinanet": retinanet, "fcos": fcos}
PROPOSING = {
    "faster_rcnn": faster_rcnn,
    "faster_rcnn_of_one_map": faster_rcnn_of_one_map,
    "mask_rcnn": mask_rcnn,
    "keypoint_rcnn": keypoint_rcnn,
}
DETECTORS = {**DENSE, **PROPOSING}


def make(name: str) -> Any:
    """A detector in float64 and evaluation mode whose scores are spread and whose boxes keep near their anchors."""
    torch.manual_seed(0)
    model: Any = DETECTORS[name]()
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        if path.endswith(("bbox_reg", "bbox_pred")):
            nn.init.normal_(module.weight, std=0.01)
    return with_lively_norms(model).double()


# -- images, targets, masks ------------------------------------------------------------------------------------

SIZES = [(96, 128), (128, 112)]
PLACED = [(120, 160), (146, 128)]  # the larger scale that keeps to 128 and 160
CANVAS = (160, 160)


def images_and_targets(model: Any = None) -> tuple[list[Tensor], Targets]:
    """Two images of different sizes, which are enlarged and padded; the boxes are of their pixels."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, dtype=torch.float64, generator=generator) for size in SIZES]
    boxes = [[[10.0, 12, 50, 48], [70, 40, 118, 90]], [[8.0, 20, 40, 60], [50, 60, 100, 120], [60, 8, 80, 28]]]
    labels = [[1, 3], [2, 2, 1]]
    targets = [
        {"boxes": torch.tensor(b, dtype=torch.float64), "labels": torch.tensor(k)}
        for b, k in zip(boxes, labels, strict=True)
    ]
    for target, (height, width) in zip(targets, SIZES, strict=True):
        count = len(target["boxes"])
        if isinstance(model, MaskRCNN):
            target["masks"] = torch.ones(count, height, width, dtype=torch.uint8)
        if isinstance(model, KeypointRCNN):
            middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
            visible = torch.ones(count, 1, dtype=torch.float64)
            target["keypoints"] = torch.cat([middle, visible], 1)[:, None].repeat(1, 3, 1).float()  # and no other
    return images, targets


def without_objects(targets: Targets) -> Targets:
    return [{name: part[:0] for name, part in target.items()} for target in targets]


def discs() -> list[Tensor]:
    """Of the images' own sizes: a disc on one object of each image, and no other."""
    found = []
    for (height, width), (y, x), radius in zip(SIZES, ((30, 30), (90, 75)), (18, 24), strict=True):
        lines, columns = torch.arange(height)[:, None], torch.arange(width)
        found.append((lines - y).square() + (columns - x).square() < radius**2)
    return found


def nothing() -> list[Tensor]:
    return [torch.zeros(size, dtype=torch.bool) for size in SIZES]


def canvas(found: list[Tensor]) -> Tensor:
    """Masks as the detector places its images, bool (N, 160, 160): enlarged by the nearest pixel, padding inactive."""
    placed = torch.zeros(len(found), *CANVAS, dtype=torch.bool)
    for image, mask, (height, width) in zip(placed, found, PLACED, strict=True):
        lines = torch.arange(height) * mask.shape[0] // height
        columns = torch.arange(width) * mask.shape[1] // width
        image[:height, :width] = mask[lines][:, columns]
    return placed


# -- anchors ---------------------------------------------------------------------------------------------------


def anchor_generator(model: Any) -> Any:
    return model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator


def active_anchors(model: Any, mask: Tensor, maps: list[tuple[int, int]]) -> Tensor:
    """Bool (N, anchors) by hand: an anchor counts if its cell does, and a cell does if any pixel under it is on."""
    parts = []
    for size, anchors in zip(maps, anchor_generator(model).num_anchors_per_location(), strict=True):
        cells = at_size(mask, size)[:, 0]
        parts.append(torch.stack([cells] * anchors, -1).flatten(1))
    return torch.cat(parts, 1)


class Seen:
    """What a detector's heads and anchors were in its last pass.

    Attributes:
        maps: (H, W) of the head's maps.
        anchors: (N, anchors, 4). boxes: what the head makes of them, in the pixels of the network's input.
        scores: logits (N, anchors, classes).
    """

    def __init__(self, model: Any):
        self.model = model
        head = model.rpn.head if hasattr(model, "rpn") else model.head
        generator = anchor_generator(model)
        self.handles = [head.register_forward_hook(self._head), generator.register_forward_hook(self._made)]

    def _head(self, module: nn.Module, args: Any, output: Any) -> None:
        self.maps = [tuple(source.shape[2:]) for source in args[0]]
        if isinstance(output, dict):
            self.scores, self.deltas = output["cls_logits"].detach(), output["bbox_regression"].detach()
        else:
            batch = len(args[0][0])
            scores, deltas = concat_box_prediction_layers(*output)
            self.scores, self.deltas = scores.detach().view(batch, -1, 1), deltas.detach().view(batch, -1, 4)

    def _made(self, module: nn.Module, args: Any, output: Any) -> None:
        self.anchors = torch.stack(output)

    @property
    def boxes(self) -> Tensor:
        coder = self.model.rpn.box_coder if hasattr(self.model, "rpn") else self.model.box_coder
        if isinstance(self.model, FCOS):
            return coder.decode(self.deltas, self.anchors)
        return coder.decode_single(self.deltas.flatten(0, 1), self.anchors.flatten(0, 1)).view_as(self.anchors)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
