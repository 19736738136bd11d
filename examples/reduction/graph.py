"""A detector as Torch-Pruning reads it, and one with the widths of another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Convolutions(nn.Module):
    """SSD without anchors and post-processing: (N, 3, H, W) -> what each convolution of the heads gives.

    Torch-Pruning follows tensors from operation to operation, which the detector's loss and boxes are no part of. The
    modules are the detector's own: what is removed here is removed there.
    """

    def __init__(self, detector: Any):
        super().__init__()
        self.backbone = detector.backbone
        self.heads = nn.ModuleList(head_convolutions(detector))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = list(self.backbone(images).values())
        return [head(maps[i % len(maps)]) for i, head in enumerate(self.heads)]

    @property
    def example(self) -> Tensor:
        return next(self.parameters()).new_zeros(1, 3, 300, 300)

    @property
    def parameters_of_no_module(self) -> list[tuple[nn.Parameter, int]]:
        """And the dimension of their channels: the scale of L2 normalisation."""
        return [(self.backbone.scale_weight, 0)]


def head_convolutions(detector: Any) -> list[nn.Conv2d]:
    """Of the boxes, map by map, then of the classes; what they give is never removed."""
    head = detector.head
    return [*head.regression_head.module_list, *head.classification_head.module_list]


def with_shapes(detector: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A copy whose layers are as wide as these tensors of their state, with any numbers in those that differ."""
    detector = copy.deepcopy(detector)
    for module_name, module in detector.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in own.items():
            shape = shapes.get(f"{module_name}.{name}".lstrip("."))
            if shape is not None and tensor.shape != shape:
                tensor.data = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        elif isinstance(module, _BatchNorm):
            module.num_features = module.weight.shape[0]
    return detector
