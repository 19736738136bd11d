"""torchvision's FCN, DeepLabV3 and LRASPP: an ignored pixel is certainly background, which is class 0.

Where a map is enlarged, pixels at the border of the active region mix with zero logits, as the contract has it. A loss
should leave ignored pixels out (`ignore_index`): an object there costs 10⁴, and teaches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabV3
from torchvision.models.segmentation.fcn import FCN
from torchvision.models.segmentation.lraspp import LRASPP

from sparsenet.adapters import Adapter
from sparsenet.adapters.torchvision_detection import NEVER, remove_hooks
from sparsenet.features import Features


class TorchvisionSegmentation(Adapter):
    @staticmethod
    def matches(model: nn.Module) -> bool:
        return isinstance(model, FCN | DeepLabV3 | LRASPP)

    def example_inputs(self, model: nn.Module) -> Tensor:
        """torchvision's reference recipe trains at 520."""
        parameter = next(model.parameters())
        return torch.rand(1, 3, 520, 520, device=parameter.device, dtype=parameter.dtype)

    def fills(self, model: nn.Module) -> dict[str, Tensor]:
        """Of the convolutions that end the heads: the resizing to the images' size keeps a fill."""
        if isinstance(model, LRASPP):
            return {}
        fills = {}
        for name in ("classifier", "aux_classifier"):
            head = getattr(model, name, None)
            last = [*head.named_modules()][-1] if isinstance(head, nn.Module) else None
            if last is not None and isinstance(last[1], nn.Conv2d):
                fills[f"{name}.{last[0]}" if last[0] else name] = background(last[1].out_channels)
        return fills

    def attach(self, model: Any) -> None:
        if isinstance(model, LRASPP):
            model.classifier.register_forward_hook(BackgroundHook())

    def detach(self, model: Any) -> None:
        remove_hooks(model.classifier, BackgroundHook)


def background(classes: int) -> Tensor:
    """Logits (classes,) of certain background."""
    logits = torch.full((classes,), NEVER)
    logits[0] = 0.0
    return logits


class BackgroundHook:
    """Forward hook of LRASPP's head, whose logits are a sum of two convolutions' outputs, and a sum has no fill of its
    own."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(output, Features):
            output.fill = background(output.shape[1])
