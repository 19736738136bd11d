"""torchvision's networks that take a batch of images and name what is in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsenet.adapters import Adapter

# Families below `torchvision.models` that take something else than a batch of images.
_OTHERS = tuple(f"torchvision.models.{family}" for family in ("detection", "optical_flow", "segmentation", "video"))


class TorchvisionClassification(Adapter):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        """Subclasses too, wherever they are defined."""
        modules = [kind.__module__ for kind in type(model).__mro__]
        known = any(module.startswith("torchvision.models.") for module in modules)
        return known and not any(module.startswith(_OTHERS) for module in modules)

    def example_inputs(self, model: nn.Module) -> Tensor:
        """torchvision's reference recipes train at 224, Inception v3 at 299; vision transformers know their size."""
        inception = any(kind.__name__ == "Inception3" for kind in type(model).__mro__)
        size = getattr(model, "image_size", 299 if inception else 224)
        parameter = next(model.parameters(), torch.empty(0))
        return torch.rand(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
