"""Counting the multiply-accumulates of ordinary operations by PyTorch's own formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def _attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


# PyTorch's registry lacks the CPU's fused attention, which the Selective Module's non-local block runs.
_FORMULAS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


class MacCounter(TorchDispatchMode):
    """Inside, every operation that multiplies is told to `count(macs, convolved)`: its multiply-accumulates, which
    PyTorch counts as two, and the input of a 2-D convolution that gives a map of more than one pixel, or `None` (a
    convolution of what was pooled to 1x1, as in squeeze-and-excitation, is a linear layer)."""

    def __init__(self, count: Callable[[int, Tensor | None], None]):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:
            with self:  # inference mode hands over composite operations, such as `conv2d`, in one piece
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        over_map = "conv" in func._overloadpacket.__name__ and isinstance(result, Tensor) and result.dim() == 4
        convolved = args[0] if over_map and result.shape[2:].numel() > 1 else None
        self.count(formula(*args, **kwargs, out_val=result) // 2, convolved)
        return result
