"""Wall-clock time of detectors, side by side."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import sparsenet


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy with every BatchNorm that follows a convolution in an `nn.Sequential` folded into it.

    In place of the convolution's own tensors, so that a convolution of any subclass stays what it is.
    """
    model = copy.deepcopy(model).eval()
    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        layers = list(sequence.named_children())
        for (_, conv), (name, norm) in zip(layers, layers[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
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
    models: dict[str, nn.Module], images: Sequence[Tensor], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per image of each detector on single images, post-processing included: one value a repeat.

    BatchNorm is folded in all of them. Each runs in both memory formats, all of them in turns, and
    is reported in the format with the lower median.
    """
    variants = {}
    for name, model in models.items():
        folded = fold_batchnorm(model)
        variants[name, "nchw"] = folded.to(memory_format=torch.contiguous_format)
        variants[name, "nhwc"] = copy.deepcopy(folded).to(memory_format=torch.channels_last)

    def over_images(model: nn.Module):
        return lambda: [model([image]) for image in images]

    with torch.inference_mode():
        seconds = sparsenet.timing.alternate(
            {" ".join(key): over_images(model) for key, model in variants.items()}, repeats=repeats
        )
    result = {}
    for name in models:
        faster = min(
            (f"{name} nchw", f"{name} nhwc"), key=lambda key: sorted(seconds[key])[len(seconds[key]) // 2]
        )
        result[name] = [1000 * s / len(images) for s in seconds[faster]]
    return result
