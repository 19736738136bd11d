"""The Selective Module of a frozen model: ordinary maps from layer to layer, for what follows each is known here.

Elsewhere in a frozen model a layer's work waits for what may become part of it, which takes Python as long as a small
layer takes to compute. All of this module's are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsenet import context
from sparsenet.chains import FusedForward, Links
from sparsenet.features import Features, as_rows, ordinary
from sparsenet.frozen_modules import FrozenBatchNorm2d, FrozenConv2d, FrozenReLU
from sparsenet.kernels import queue
from sparsenet.selector import SelectiveModule


def make_direct(branch: SelectiveModule) -> None:
    """Let a Selective Module of frozen layers compute them directly, if it is one for CPUs and nothing in it was
    replaced: 1.8 ms against 2.7 (75x75 pixels at width 8, one image, two threads; 1.9 where it is not frozen)."""
    convolutions = [module for module in branch.modules() if isinstance(module, nn.Conv2d)]
    if not all(isinstance(module, FrozenConv2d) and module.layer.device.type == "cpu" for module in convolutions):
        return
    blocks = [module for module in branch.modules() if isinstance(module, nn.Sequential)]
    chains = [block for block in blocks if not any(isinstance(part, nn.Sequential) for part in block)]
    if not all(_known(part) for chain in chains for part in chain):
        return
    alone = [module for module in convolutions if not any(module in chain for chain in chains)]
    for module in [*chains, *alone]:
        module.forward = DirectForward(module)
    branch.forward = BranchForward(branch)  # type: ignore[method-assign]


def _known(part: nn.Module) -> bool:
    """Whether it is a layer, or what can be part of one."""
    by_statistics = type(part) is FrozenBatchNorm2d and part.running_mean is not None
    return by_statistics or type(part) in (FrozenConv2d, FrozenReLU)


@dataclass(eq=False)
class BranchForward:
    """The forward of the module as a whole: its own, of an ordinary map."""

    branch: SelectiveModule

    def __call__(self, features: Tensor) -> Tensor:
        return type(self.branch).forward(self.branch, ordinary(features))


class DirectForward:
    """The forward of a convolution, or of a sequence of them with normalisation and activation behind: ordinary maps
    (N, C, H, W) to such in channels-last memory.

    Where someone watches, by hooks or a record, it goes the way of the rest of a frozen model.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._links = Links()

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self.module
        parts: list[Any] = list(module) if isinstance(module, nn.Sequential) else [module]
        first: FrozenConv2d = parts[0]
        fits = not isinstance(x, Features) and x.dim() == 4 and x.shape[1] == first.in_channels and first.takes(x)
        links = self._links.of(parts, 0) if fits and not context.current().observers else []
        if not links or sum(map(len, links)) < len(parts):
            return FusedForward(module)(x) if isinstance(module, nn.Sequential) else type(module).forward(module, x)
        batch, grid = x.shape[0], (x.shape[2], x.shape[3])
        rows = as_rows(x)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        for link in links:
            rows, grid = link.convolution.on_rows(rows, batch, grid, link.epilogue)
        queue.finish()
        return rows.view(batch, *grid, rows.shape[1]).permute(0, 3, 1, 2)
