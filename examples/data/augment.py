"""Training augmentation: image and target in, image (3, size, size) float and its remaining boxes out.

SSD's augmentation is torchvision's: its crop and zoom were written after SSD's. The digits get the
same steps in a mild form, because they come in every size and place already and a short training
has no time for hard examples; they are never mirrored.
"""

import torch
from torchvision.transforms import v2

MEAN = (123, 117, 104)  # of VGG's training images, RGB


def ssd_augmentation(size: int = 300) -> v2.Compose:
    """The original's: distort, zoom out up to 4 times, crop, warp to `size`, mirror."""
    return v2.Compose([
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill=MEAN, side_range=(1, 4)),
        v2.RandomIoUCrop(),
        v2.Resize((size, size), antialias=False),
        v2.RandomHorizontalFlip(),
        *_finish(),
    ])  # fmt: skip


def digits_augmentation(size: int = 300) -> v2.Compose:
    """Distort, zoom out up to 1.5 times, crop not below 0.6 of a side, warp to `size`."""
    return v2.Compose([
        v2.RandomPhotometricDistort(hue=(-0.02, 0.02)),
        v2.RandomApply([v2.RandomZoomOut(fill=MEAN, side_range=(1, 1.5), p=1)], p=0.25),
        v2.RandomApply([v2.RandomIoUCrop(min_scale=0.6)], p=0.4),
        v2.Resize((size, size), antialias=False),
        *_finish(),
    ])  # fmt: skip


def _finish() -> list[v2.Transform]:
    # RandomIoUCrop empties the boxes whose centre it cuts off; sanitising removes them and their labels.
    return [
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=2),
        v2.ToDtype(torch.float32, scale=True),
        v2.ToPureTensor(),
    ]


def evaluation_transform() -> v2.Compose:
    """Float image, nothing else: the detector resizes, and its boxes come back in the image's pixels."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
