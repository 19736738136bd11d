"""timm's and torchvision's networks that take a batch of images: their default input sizes and stage names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsenet.adapters import Adapter


class Timm(Adapter):
    """Models of timm carry their configuration."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return type(model).__module__.startswith("timm.")

    def example_inputs(self, model: nn.Module) -> Tensor | None:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        size = config.get("input_size")
        return None if size is None else _images(model, *size)


class Torchvision(Adapter):
    """torchvision's reference recipes train classification at 224 (Inception v3 at 299) and segmentation at 520."""

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return type(model).__module__.startswith(("torchvision.models.", "torchvision.models.segmentation."))

    def example_inputs(self, model: nn.Module) -> Tensor | None:
        module = type(model).__module__
        if module.startswith(
            ("torchvision.models.detection", "torchvision.models.video", "torchvision.models.optical_flow")
        ):
            return None
        if module.startswith("torchvision.models.segmentation"):
            return _images(model, 3, 520, 520)
        size = 299 if type(model).__name__ == "Inception3" else 224
        return _images(model, 3, size, size)


def _images(model: nn.Module, *size: int) -> Tensor:
    parameter = next(model.parameters(), torch.empty(0))
    return torch.rand(1, *size, device=parameter.device, dtype=parameter.dtype)
