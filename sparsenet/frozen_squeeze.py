"""Squeeze-and-excitation in a frozen model as one call: the blocks of torchvision and timm, whose five small operations
take Python longer than the convolutions beside them take to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.backends import indirect
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads
from sparsenet.chains import Links, hooked
from sparsenet.features import Features
from sparsenet.kernels import queue, squeeze
from sparsenet.kernels.queue import Job
from sparsenet.rules.combine import gated
from sparsenet.rules.reduce import of_a_layer
from sparsenet.work import VECTOR, Standalone, Work

# The convolution that reads the means, its activation, and the convolution that gives the numbers, and its activation.
BLOCKS = {
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation"),
    "timm.layers.squeeze_excite.SEModule": ("fc1", "act", "fc2", "gate"),
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate"),
}

# What may be in a block beside these, if it does nothing but what the call does.
_BESIDE = {"avgpool": nn.AdaptiveAvgPool2d, "bn": nn.Identity}


def squeezes(module: nn.Module) -> bool:
    """Whether it is a block that can be one call."""
    chain = BLOCKS.get(_name(module))
    if chain is None or "forward" in vars(module) or getattr(module, "add_maxpool", False):
        return False
    return _as_made(module, chain)


def _as_made(module: nn.Module, chain: tuple[str, ...]) -> bool:
    """Whether beside the chain there is nothing that changes what it gives."""
    others = [(name, part) for name, part in module._modules.items() if name not in chain]
    return all(
        type(part) is _BESIDE.get(name) and getattr(part, "output_size", 1) in (1, (1, 1)) for name, part in others
    )


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class SqueezeForward:
    """The forward of such a block: its own, where it is not of one image's features that a frozen layer gave, or where
    someone watches."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._chain = BLOCKS[_name(module)]
        self._links = Links()

    def __call__(self, x: Any) -> Any:
        fused = self._of_features(x) if isinstance(x, Features) and x.dtype is torch.float32 else None
        return type(self.module).forward(self.module, x) if fused is None else fused

    def _of_features(self, x: Features) -> Features | None:
        selection, parts = x.selection, self.module._modules
        if not (of_a_layer(x) and x.form.plain) or selection.observers or selection.followed:
            return None
        if (
            selection.options.mean != "all"
            or any(map(hooked, parts.values()))
            or not _as_made(self.module, self._chain)
        ):
            return None
        chain: list[Any] = [parts[name] for name in self._chain]
        links = self._links.of(chain, 0)
        if [len(link) for link in links] not in ([2, 2], [2, 1]):
            return None
        if any(link.layer.kernels("guided") is None for link in links):
            return None
        if links[0].convolution.in_channels != x.form.channels[0] or links[1].layer.outputs != x.form.channels[0]:
            return None
        rows = x.computed()
        if indirect.unsupported(rows, 1) is not None:
            return None
        reads = Reads(rows, None, rows.shape[0], 1, 1, x.grid, VECTOR, False)
        numbers = Work(Mean(rows.shape[1], x.grid[0] * x.grid[1]), selection, reads, Epilogue()).result()
        for link in links:
            reads = Reads(numbers, None, 1, 1, 1, VECTOR, VECTOR, False)
            numbers = Work(link.layer, selection, reads, link.epilogue).result()
        if len(links[1]) == 1:  # the kernels have no such activation
            queue.finish()
            cells = numbers.view(1, -1, 1, 1)
            numbers = chain[3](cells)
            if type(numbers) is not Tensor or numbers.shape != cells.shape or numbers.dtype != cells.dtype:
                return None
        x.settle()
        return gated(x, rows, numbers.reshape(-1))


class Mean(Standalone):
    """The mean of each channel over an image's pixels, of which inactive ones are zero."""

    path = "mean"

    def __init__(self, outputs: int, pixels: int):
        super().__init__(outputs)
        self._pixels = pixels

    def ready(self, dtype: torch.dtype) -> Mean:
        return self

    def job(self, rows: Tensor, residual: None, table: None, inputs: int, out: Tensor) -> Job:
        return squeeze.mean(rows, self._pixels, out)
