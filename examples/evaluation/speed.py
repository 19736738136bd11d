"""Wall-clock time of detectors, side by side."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import sparsenet


def fold_batchnorm(model: nn.Module) -> Any:
    """A copy with every BatchNorm that follows a convolution in an `nn.Sequential` folded into it.

    In place of the convolution's own tensors, so that a convolution of any subclass stays what it is.
    """
    model = copy.deepcopy(model).eval()
    sequence: Any
    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        layers: Any = list(sequence.named_children())
        for (_, conv), (name, norm) in pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None and norm.running_var is not None
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                setattr(sequence, name, nn.Identity())
    return model


def compare_speed(
    models: dict[str, nn.Module], images: Sequence[Tensor], batch: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per image of each detector, a value for each of `repeats` passes over the images.

    A detector is called with `batch` images at a time, post-processing included, BatchNorm folded. All
    take turns, each in both memory formats; the one with the lower median is reported.
    """
    variants: dict[tuple[str, str], nn.Module] = {}
    for name, model in models.items():
        folded = fold_batchnorm(model)
        variants[name, "nchw"] = folded.to(memory_format=torch.contiguous_format)
        variants[name, "nhwc"] = copy.deepcopy(folded).to(memory_format=torch.channels_last)

    def over_images(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            for start in range(0, len(images), batch):
                model(list(images[start : start + batch]))
            if images[0].is_cuda:
                torch.cuda.synchronize()

        return call

    with torch.inference_mode():
        calls = {" ".join(key): over_images(model) for key, model in variants.items()}
        seconds = sparsenet.timing.alternate(calls, repeats=repeats)
    faster = {name: min((seconds[f"{name} {layout}"] for layout in ("nchw", "nhwc")), key=median) for name in models}
    return {name: [1000 * s / len(images) for s in values] for name, values in faster.items()}
