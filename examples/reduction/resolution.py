"""Resolution reduction: the same weights on smaller images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def at_side(detector: Any, side: int) -> nn.Module:
    """Let SSD300 resize its images to `side` pixels, in place. Boxes come out in the pixels of the images as before.

    Anchors are shares of the side, so they shrink along. The two deepest maps, of 3x3 and 1x1 pixels at 300, would have
    none left below 267: a convolution whose window is larger than what it reads gets a padding of one pixel and a
    stride of two, so that it reads the whole map. The anchors of these two maps divide the side evenly, as at 300.
    """
    detector.transform.fixed_size = (side, side)
    detector.transform.min_size, detector.transform.max_size = (side,), side

    def keep_a_pixel(conv: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
        if conv.padding == (0, 0) and min(inputs[0].shape[2:]) < conv.kernel_size[0]:
            conv.padding, conv.stride = (1, 1), (2, 2)

    extras = [module for module in detector.backbone.extras.modules() if isinstance(module, nn.Conv2d)]
    handles = [conv.register_forward_pre_hook(keep_a_pixel) for conv in extras]
    maps = detector.backbone(next(detector.parameters()).new_zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    steps = detector.anchor_generator.steps
    deepest = [side / found.shape[2] for found in list(maps.values())[4:]]
    detector.anchor_generator.steps = [*steps[:4], *deepest]
    return detector
