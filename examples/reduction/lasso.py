"""LASSO channel pruning (He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017).

From the front on, LASSO chooses which of a layer's channels suffice for the layers that read them, whose weights least
squares then fits to what the original network gives at sampled places.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning
from sklearn.linear_model import lars_path_gram
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from randomness import mixed
from reduction.graph import Convolutions
from reduction.least_squares import Moments


@torch.no_grad()
def without_redundant_channels(detector: Any, share: float, images: Sequence[Tensor], places: int = 100) -> nn.Module:
    """Keep in every layer but the heads' last the share of the channels that LASSO chooses; in place, in eval mode.

    Args:
        images: batches (N, 3, H, W) of what the backbone reads.
        places: how many of an image's pixels are looked at in each layer.
    """
    network = Convolutions(detector.eval())
    original = copy.deepcopy(network)
    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad():  # whose graph it reads
        graph.build_dependency(network, network.example, unwrapped_parameters=network.parameters_of_no_module)
    names = {module: name for name, module in network.named_modules()}
    producers = [module for module in network.backbone.modules() if isinstance(module, nn.Conv2d)]
    for producer in tqdm(producers, desc="LASSO", unit="layer"):

        def group(removed: list[int], producer: nn.Conv2d = producer) -> Any:
            return graph.get_pruning_group(producer, torch_pruning.prune_conv_out_channels, idxs=removed)

        of_all = group(list(range(producer.out_channels)))
        readers = [dep.layer for dep, _ in of_all if isinstance(dep.layer, nn.Conv2d) and dep.layer is not producer]
        seen = moments(original, network, [names[reader] for reader in readers], images, places)
        kept = chosen(list(zip(seen, readers, strict=True)), round(share * producer.out_channels))
        group(sorted(set(range(producer.out_channels)) - set(kept))).prune()
        # Anew, for L2 normalisation makes of the channels that are left something else.
        seen = moments(original, network, [names[reader] for reader in readers], images, places)
        for found, reader in zip(seen, readers, strict=True):
            reader.weight.copy_(found.solve(reader.weight.flatten(1)).view_as(reader.weight))
    return detector


def chosen(readers: Sequence[tuple[Moments, nn.Conv2d]], count: int) -> list[int]:
    """The first `count` channels that LASSO's path takes up as its penalty falls.

    Each reader's output is a sum over channels i of z_i, what the channel adds to it; LASSO weighs the channels so that
    Σ β_i z_i comes near to the original output with few of them. Where several layers read the channels, their errors
    are added, each in units of its output's energy. A channel that gives nothing comes last.
    """
    channels = readers[0][1].in_channels
    gram, product = (torch.zeros(size, dtype=torch.float64) for size in ((channels, channels), (channels,)))
    for found, reader in readers:
        w = reader.weight.double().flatten(2)  # (outputs, channels, taps)
        taps, unit = w.shape[2], max(found.energy, torch.finfo(torch.float64).tiny)
        both = found.gram.view(channels, taps, channels, taps) * torch.einsum("oik,ojl->ikjl", w, w)
        gram += both.sum((1, 3)).cpu() / unit
        product += torch.einsum("oik,iko->i", w, found.product.view(channels, taps, -1)).cpu() / unit
    live = gram.diagonal().nonzero()[:, 0]  # among nothings, rounding would choose
    of_live = product[live].numpy(), gram[live][:, live].numpy()
    _, _, path = lars_path_gram(*of_live, n_samples=1, method="lasso", max_iter=8 * channels)
    taken = [live[point.nonzero()[0]].tolist() for point in path.T]
    kept = next((point for point in taken if len(point) == count), taken[-1])
    by_energy = gram.diagonal().argsort(descending=True, stable=True).tolist()  # where the path ends early
    return sorted([*kept, *(channel for channel in by_energy if channel not in kept)][:count])


def moments(
    original: nn.Module, network: nn.Module, readers: list[str], images: Sequence[Tensor], places: int
) -> list[Moments]:
    """Of each of these convolutions: what it reads in `network`, (channels x taps), and what it gives in `original`,
    without its bias, at as many random places of each image (all of a map that is smaller)."""
    total: dict[str, Moments] = {}
    for number, batch in enumerate(images):
        wanted, read = _passing(original, readers, batch), _passing(network, readers, batch)
        for name in readers:
            conv: Any = network.get_submodule(name)
            result = wanted[name][1]
            at = _places(result, places, mixed(number))
            y = result.flatten(2).transpose(1, 2).gather(1, at[..., None].expand(-1, -1, result.shape[1])).flatten(0, 1)
            if conv.bias is not None:
                y = y - original.get_submodule(name).get_parameter("bias")
            found = Moments.of(_patches(conv, read[name][0], at, result.shape[3]), y)
            total[name] = total[name] + found if name in total else found
    return [total[name] for name in readers]


def _passing(network: nn.Module, names: list[str], batch: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules read and give in a pass; a copy, for what follows may write to it in place."""
    passed: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            passed[name] = inputs[0].clone(), output.clone()

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return passed


def _places(result: Tensor, count: int, seed: int) -> Tensor:
    """Indices of pixels of each image of a map, (N, min(count, H·W)): equal for equal sizes."""
    images, pixels = len(result), result.shape[2] * result.shape[3]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(images, pixels, generator=generator).argsort(1)[:, :count]
    return drawn.to(result.device)


def _patches(conv: nn.Conv2d, x: Tensor, at: Tensor, width: int) -> Tensor:
    """What the convolution reads for outputs `at` (N, P) of a map so wide: (N·P, channels x taps)."""
    padding: Any = conv.padding
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
    taps = [torch.arange(k, device=x.device) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    rows = (at // width * conv.stride[0])[..., None] + taps[0]
    columns = (at % width * conv.stride[1])[..., None] + taps[1]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return padded[image, rows[:, :, :, None], columns[:, :, None, :]].permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1)
