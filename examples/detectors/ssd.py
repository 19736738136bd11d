"""SSD300 on a VGG16 trunk, with BatchNorm or without, built on torchvision's `SSD`.

torchvision supplies the heads, the matching, the loss and the post-processing; its own
`ssd300_vgg16` has no BatchNorm and COCO's anchors only, so trunk and anchors are ours, with the
figures of the original (Liu et al., 2016).
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import ssd
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.vgg import VGG, VGG16_BN_Weights, VGG16_Weights, vgg16, vgg16_bn

import distributed
from storage import CheckpointError

# Anchor scales as fractions of 300 px: six maps, and the next larger one for the square between.
SCALES = {
    "voc": [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05],
    "coco": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
}
STEPS = [8, 16, 32, 64, 100, 300]


class SSD(ssd.SSD):
    """torchvision's SSD, whose loss is divided by the number of positives of all processes of a run.

    Of each process by itself, an image of a share with few positives would count more than one of another. The mean of
    the losses over the processes is then that of one process with the whole batch, and so is that of their gradients.
    """

    _positives = 0

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Of a batch, or, where some anchors do not count, of each image in turn."""
        self._positives += sum(int((matched >= 0).sum()) for matched in matched_idxs)
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        self._positives = 0
        found = super().forward(images, targets)
        if not (self.training and distributed.together()):
            return found
        count = torch.tensor(float(self._positives), dtype=torch.float64, device=images[0].device)
        scale = max(1, self._positives) / max(1 / distributed.world(), distributed.mean(count).item())
        return {name: loss * scale for name, loss in found.items()}


class VGG16Extractor(nn.Module):
    """VGG16 up to fc7 as convolutions, then SSD's extra layers; returns the six maps SSD reads.

    (N, 3, 300, 300) -> {"0": (N, 512, 38, 38), "1": (N, 1024, 19, 19), ... "5": (N, 256, 1, 1)},
    every channel count times `width`, rounded to a multiple of 8.

    The extra layers carry a bias instead of BatchNorm: at 1x1 and 3x3 there are too few values in
    a batch for its statistics, and a training batch of one image would fail. Without `batch_norm`
    all layers do, as in the original.
    """

    def __init__(self, width: float = 1.0, batch_norm: bool = True):
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        self.trunk = nn.Sequential(*_trunk(scaled, batch_norm))
        self.extras = nn.Sequential(*_extras(scaled))
        self.scale_weight = nn.Parameter(torch.ones(scaled(512)) * 20)
        self.out_channels = [scaled(c) for c in (512, 1024, 512, 256, 256, 256)]
        initialise(self)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = []
        for layers in (*self.trunk, *self.extras):
            x = layers(x)
            maps.append(x)
        # The activations of conv4_3 are much larger than the other maps'.
        maps[0] = self.scale_weight.view(1, -1, 1, 1) * F.normalize(maps[0])
        return OrderedDict((str(i), m) for i, m in enumerate(maps))


def initialise(extractor: nn.Module) -> None:
    """Random convolutions for what is followed by ReLU, without bias at first."""
    for module in extractor.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _trunk(scaled, batch_norm: bool) -> Iterator[nn.Sequential]:
    """VGG16's layers by name, `conv1_1`, `bn1_1`, `relu1_1`, ... `pool5`, `fc6`, ... `relu_fc7`, in two parts that
    each end in a map which SSD reads."""

    def block(suffix: str, conv_name: str, conv: nn.Conv2d) -> Iterator[tuple[str, nn.Module]]:
        yield conv_name, conv
        if batch_norm:
            yield f"bn{suffix}", nn.BatchNorm2d(conv.out_channels)
        yield f"relu{suffix}", nn.ReLU(inplace=True)

    previous = 3
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (depth, channels) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], start=1):
        for i in range(1, depth + 1):
            conv = nn.Conv2d(previous, scaled(channels), 3, padding=1, bias=not batch_norm)
            layers.update(block(f"{stage}_{i}", f"conv{stage}_{i}", conv))
            previous = scaled(channels)
        if stage == 4:
            yield nn.Sequential(layers)
            layers = OrderedDict()
        if stage < 5:
            layers[f"pool{stage}"] = nn.MaxPool2d(2, 2, ceil_mode=stage == 3)  # 75 -> 38
    layers["pool5"] = nn.MaxPool2d(3, 1, padding=1)
    fc6 = nn.Conv2d(previous, scaled(1024), 3, padding=6, dilation=6, bias=not batch_norm)
    layers.update(block("_fc6", "fc6", fc6))
    layers.update(block("_fc7", "fc7", nn.Conv2d(scaled(1024), scaled(1024), 1, bias=not batch_norm)))
    yield nn.Sequential(layers)


def _extras(scaled) -> Iterator[nn.Sequential]:
    """SSD's layers after fc7: a 1x1 and a 3x3 convolution for each of the maps 10, 5, 3 and 1."""
    previous = scaled(1024)
    figures = [(256, 512, 2), (128, 256, 2), (128, 256, 1), (128, 256, 1)]
    for stage, (squeezed, channels, stride) in enumerate(figures, start=6):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers[f"conv{stage}_1"] = nn.Conv2d(previous, scaled(squeezed), 1)
        layers[f"relu{stage}_1"] = nn.ReLU(inplace=True)
        conv = nn.Conv2d(scaled(squeezed), scaled(channels), 3, stride=stride, padding=stride - 1)
        layers[f"conv{stage}_2"] = conv
        layers[f"relu{stage}_2"] = nn.ReLU(inplace=True)
        previous = scaled(channels)
        yield nn.Sequential(layers)


def ssd300_vgg16_bn(
    num_classes: int, *, width: float = 1.0, anchors: str = "voc", six: bool = False, batch_norm: bool = True
) -> SSD:
    """SSD300 with random weights.

    Args:
        num_classes: classes including the background (label 0); 21 for VOC.
        width: factor on every channel count of trunk and extras, rounded to a multiple of 8.
        anchors: anchor sizes of the original, "voc" or "coco".
        six: six anchors per cell on all six maps (11,640) instead of the original's 4, 6, 6, 6,
            4, 4 (8,732); the cost that the SCN paper reports fits this layout.
        batch_norm: in the trunk, as SCN has it; without, this is the original, of 26,285,486 parameters for 21 classes.

    At width 1 the convolutions take 31.37 G multiply-accumulates for 21 classes.
    """
    ratios = [[2, 3]] * 6 if six else [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    return SSD(
        VGG16Extractor(width, batch_norm),
        DefaultBoxGenerator(ratios, scales=SCALES[anchors], steps=STEPS),
        size=(300, 300),
        num_classes=num_classes,
        # The original's input: RGB 0-255 minus the mean, not divided.
        image_mean=[0.48235, 0.45882, 0.40784],
        image_std=[1 / 255] * 3,
    )


@torch.no_grad()
def load_imagenet_trunk(extractor: VGG16Extractor, vgg: VGG | None = None) -> None:
    """Copy torchvision's ImageNet VGG16, with BatchNorm for a trunk that has it, as SSD starts from.

    Its classifier becomes fc6 and fc7: every fourth output, and for fc6 every third pixel of the
    7x7 window, to which fc6's dilation corresponds. ImageNet's mean differs by 0.003 from the
    detector's; that is left to the training.

    Args:
        extractor: of width 1.
        vgg: the network to copy; by default it is downloaded (528 MB).
    """
    trunk: Any = extractor.trunk
    normalised = any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())
    if vgg is None:
        make, weights = (vgg16_bn, VGG16_BN_Weights) if normalised else (vgg16, VGG16_Weights)
        try:
            vgg = make(weights=weights.IMAGENET1K_V1)
        except (OSError, RuntimeError) as error:  # no network, or half a file
            raise CheckpointError(
                f"{weights.IMAGENET1K_V1.url} cannot be fetched ({error}). Put it into "
                f"{torch.hub.get_dir()}/checkpoints yourself, or begin at random with --no-imagenet."
            ) from error
    ours, theirs = ([m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (trunk, vgg.features))
    for mine, their in zip(ours, theirs, strict=False):  # fc6 and fc7 are left over
        mine.weight.copy_(their.weight)
        if mine.bias is not None and their.bias is not None:
            mine.bias.copy_(their.bias)
    scale = 255 * torch.tensor([0.229, 0.224, 0.225])  # ours sees 0..255, ImageNet's weights expect unit variance
    ours[0].weight.div_(scale.to(ours[0].weight.device).view(1, 3, 1, 1))

    batchnorms: Any = ([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in (trunk, vgg.features))
    for mine, norm, conv in zip(*batchnorms, theirs, strict=False):
        mine.load_state_dict(norm.state_dict())
        mine.running_mean.sub_(conv.bias.to(mine.running_mean.device))  # our convolutions have no bias

    fc6: Any = vgg.classifier[0]
    fc7: Any = vgg.classifier[3]
    last = trunk[1]
    last.fc6.weight.copy_(fc6.weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3])
    last.fc7.weight.copy_(fc7.weight[::4, ::4, None, None])
    (last.bn_fc6 if normalised else last.fc6).bias.copy_(fc6.bias[::4])
    (last.bn_fc7 if normalised else last.fc7).bias.copy_(fc7.bias[::4])
