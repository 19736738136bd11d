"""What the SCN paper counts of a detector, beside plain multiply-accumulates."""

from typing import Any

import torch
from torch import Tensor, nn

from evaluation.detector import multiply_accumulates


@torch.no_grad()
def paper_like_operations(model: Any, image: Tensor) -> int:
    """Of one pass of a dense detector in evaluation mode, for an image (3, H, W) of any size.

    The paper's "FLOPs" are multiply-accumulates and what follows a convolution: three operations at each of its outputs
    (BatchNorm's scale and shift, ReLU; the extra layers, which have a bias here, count alike), or in a head one (bias),
    and three for each class logit (softmax's exponential, sum and division). So counted, SSD300 with six anchors in
    every cell takes 31.784 G for 21 classes and 35.575 G for 81, where the paper has 31.78 and 35.58. Pelee is counted
    alike (1.223 and 1.303 G), but the paper's 1.18 and 1.25 G are those of no layout that we know.

    Selective detectors are not counted. What follows a convolution is skipped where that is, and is 0.2 % of SSD300's
    count and 1.5 % of Pelee's, so that the share that a mask cuts is, nearly, that of the multiply-accumulates.
    """
    heads = dict.fromkeys(model.head.regression_head.modules(), 1)
    heads |= dict.fromkeys(model.head.classification_head.modules(), 1 + 3)
    counted: list[int] = []

    def count(conv: nn.Module, inputs: Any, output: Tensor) -> None:
        counted.append(heads.get(conv, 3) * output.numel())

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        macs = multiply_accumulates(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    return macs + sum(counted)
