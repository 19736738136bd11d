"""The detector Pelee on a trunk of PeleeNet, built on torchvision's `SSD` as `detectors.ssd` is.

The figures are those of the original (Wang, Li and Ling, 2018, arXiv 1804.06882) and, where the
paper leaves something open, of its authors' Caffe definition: five prediction maps of which the
largest feeds two predictors, no fixed steps, anchors that may be larger than the image.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSDScoringHead

from detectors.peleenet import Scaled, channels_after, conv_bn, conv_bn_relu, scaling, trunk
from detectors.ssd import SCALES, SSD, initialise


class ResBlock(nn.Module):
    """What Pelee puts before its heads: (N, inputs, H, W) -> (N, outputs, H, W)."""

    def __init__(self, inputs: int, squeezed: int, outputs: int):
        super().__init__()
        self.shortcut = conv_bn(inputs, outputs, 1)
        self.residual = nn.Sequential(
            conv_bn_relu(inputs, squeezed, 1),
            conv_bn_relu(squeezed, squeezed, 3),
            conv_bn(squeezed, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


class PeleeExtractor(nn.Module):
    """PeleeNet without its classifier, Pelee's extra layers and its ResBlocks; returns the six maps
    that the heads read, the first of them twice.

    (N, 3, 304, 304) -> {"0": (N, 256, 19, 19), "1": the same, "2": (N, 256, 10, 10), ... "5":
    (N, 256, 1, 1)}, every channel count times `width`, rounded to a multiple of 8.

    As in the original the extra layers carry a bias instead of BatchNorm and the ResBlocks have
    BatchNorm at 1x1 too, so that a training batch takes two images or more.
    """

    def __init__(self, width: float = 1.0):
        super().__init__()

        scaled = scaling(width)
        self.trunk = nn.Sequential(OrderedDict(trunk(scaled)))
        *_, stage3, stage4 = channels_after(scaled)
        self.extras = nn.Sequential(OrderedDict(_extras(stage4, scaled)))
        read = [stage3, stage4, *[scaled(256)] * 3]
        self.predictors = nn.ModuleList(ResBlock(c, scaled(128), scaled(256)) for c in read)
        self.out_channels = [scaled(256)] * 6
        initialise(self)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        read = []
        for name, layer in [*self.trunk.named_children(), *self.extras.named_children()]:
            x = layer(x)
            if name in ("stage3", "stage4", "ext1", "ext2", "ext3"):
                read.append(x)
        largest, *others = [block(source) for block, source in zip(self.predictors, read, strict=True)]
        return OrderedDict((str(i), m) for i, m in enumerate([largest, largest, *others]))


def _extras(channels: int, scaled: Scaled) -> Iterator[tuple[str, nn.Module]]:
    """A 1x1 and a 3x3 convolution for each of the maps 5, 3 and 1."""
    for number, (squeezed, stride) in enumerate([(256, 2), (128, 1), (128, 1)], start=1):
        yield (
            f"ext{number}",
            nn.Sequential(
                nn.Conv2d(channels, scaled(squeezed), 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(scaled(squeezed), scaled(256), 3, stride, padding=stride - 1),
                nn.ReLU(inplace=True),
            ),
        )
        channels = scaled(256)


class PointwiseHead(nn.Module):
    """torchvision's `SSDHead` with convolutions of 1x1 for its 3x3."""

    def __init__(self, in_channels: list[int], num_anchors: list[int], num_classes: int):
        super().__init__()

        def scoring(columns: int) -> SSDScoringHead:
            convs = [nn.Conv2d(c, columns * k, 1) for c, k in zip(in_channels, num_anchors, strict=True)]
            for conv in convs:
                nn.init.xavier_uniform_(conv.weight)
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            return SSDScoringHead(nn.ModuleList(convs), columns)

        self.classification_head = scoring(num_classes)
        self.regression_head = scoring(4)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": self.regression_head(x), "cls_logits": self.classification_head(x)}


def pelee304(num_classes: int, *, width: float = 1.0, anchors: str = "voc") -> SSD:
    """Pelee at 304x304 with random weights.

    Args:
        num_classes: classes including the background (label 0); 21 for VOC.
        width: factor on every channel count, rounded to a multiple of 8.
        anchors: anchor sizes of the original, "voc" or "coco".

    5,142 anchors, six per cell. At width 1 there are 5.43 M parameters and the convolutions take
    1.205 G multiply-accumulates for 21 classes. The Selective Module belongs after stage 1, at
    "backbone.trunk.pool1" (38x38; the stem's pooling makes it the network's second, "pool2").

    Images are RGB in 0..1, as torchvision's detectors take them, where the original reads BGR in
    0..255: the mean is in RGB order. Weights of the original need the input channels of
    `backbone.trunk.stem.first.conv` reversed.
    """
    extractor = PeleeExtractor(width)
    # Centres lie at (j + 0.5) / grid, and neither centre nor extent is clipped.
    generator = DefaultBoxGenerator([[2, 3]] * 6, scales=SCALES[anchors], clip=False)
    return SSD(
        extractor,
        generator,
        size=(304, 304),
        num_classes=num_classes,
        head=PointwiseHead(extractor.out_channels, generator.num_anchors_per_location(), num_classes),
        # The original's input: 0..255 minus the mean, times 0.017.
        image_mean=[123.68 / 255, 116.78 / 255, 103.94 / 255],
        image_std=[1 / (255 * 0.017)] * 3,
    )
