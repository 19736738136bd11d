"""What sparsenet knows of model families: stage names, example inputs, heads, and how they treat their images.

Installed as `sparsenet.adapters`. A model without an adapter works; an adapter adds what cannot be seen from its
operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsenet.plan import Plan

if __name__ != "sparsenet.adapters":
    raise ImportError("import sparsenet.adapters: the name 'adapters' belongs to another project")

from torch import Tensor, nn


class Adapter:
    """What a family may say of a model; this one, for models of no known family, says nothing."""

    def example_inputs(self, model: nn.Module) -> Any:
        """Inputs to try the model on, or `None` where the family does not tell."""
        return None

    def aliases(self, model: nn.Module) -> dict[str, str]:
        """The family's own names of stages, and the module paths they mean."""
        return {}

    def fills(self, model: nn.Module) -> dict[str, Tensor]:
        """By path of a convolution: what its output holds at inactive pixels, (out_channels,)."""
        return {}

    def near_heads(self, model: nn.Module, plan: Plan) -> frozenset[str] | None:
        """Paths of the guided convolutions whose results the heads read, and of the heads' own: where indirect
        supervision lets gradient reach the mask. `None` where the family does not say."""
        return None

    def attach(self, model: nn.Module) -> None:
        """Whatever the family needs beside masked convolutions, after surgery."""

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""

    def freeze(self, model: nn.Module) -> None:
        """What the family's frozen models compute once and keep, beside packed weights."""


def find(model: nn.Module) -> Adapter:
    """The adapter of a model's family."""
    from sparsenet.adapters.timm import Timm
    from sparsenet.adapters.torchvision_classification import TorchvisionClassification
    from sparsenet.adapters.torchvision_rcnn import TorchvisionRCNN
    from sparsenet.adapters.torchvision_retinanet import TorchvisionFCOS, TorchvisionRetinaNet
    from sparsenet.adapters.torchvision_segmentation import TorchvisionSegmentation
    from sparsenet.adapters.torchvision_ssd import TorchvisionSSD

    for adapter in (
        TorchvisionSSD,
        TorchvisionRetinaNet,
        TorchvisionFCOS,
        TorchvisionRCNN,
        TorchvisionSegmentation,
        Timm,
        TorchvisionClassification,
    ):
        if adapter.matches(model):
            return adapter()
    return Adapter()
