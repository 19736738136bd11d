"""`freeze`: a model for inference, whose skipped pixels are skipped milliseconds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsenet import backends
from sparsenet.backends import indirect
from sparsenet.features import Features
from sparsenet.frozen import FOLLOWERS, FrozenConv2d, FrozenLinear, begin_pass, end_pass
from sparsenet.masked_conv import MaskedConv2d
from sparsenet.surgery import call, quietly


def freeze(model: nn.Module, example_inputs: Any, *, backend: str = "auto") -> nn.Module:
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for path, module in frozen.named_modules():
        if type(module) in (nn.Conv2d, MaskedConv2d) and indirect.unsupported(module.weight, module.groups) is None:
            FrozenConv2d.make(module, path)
        elif type(module) is nn.Linear and indirect.unsupported(module.weight, 1) is None:
            FrozenLinear.make(module)
        elif type(module) in FOLLOWERS:
            module.__class__ = FOLLOWERS[type(module)]
    frozen.register_forward_pre_hook(FrozenBeginHook(), prepend=True)
    frozen.register_forward_hook(FrozenEndHook(), always_call=True)
    with quietly(frozen):
        call(frozen, example_inputs)
    return frozen


@dataclass(eq=False)
class FrozenBeginHook:
    """Forward pre-hook of a frozen root."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        begin_pass()


@dataclass(eq=False)
class FrozenEndHook:
    """Forward hook of a frozen root, called after an error too: its outputs are ordinary tensors."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        end_pass()
        return tree_map_only(Features, _ordinary, output)


def _ordinary(part: Features) -> Tensor:
    return part.dense("the model's output").contiguous() if part.selection.everything else part
