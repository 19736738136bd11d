"""Reductions over space: features are read zero at inactive pixels, and the result is an ordinary tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.features import Features, Leaves, name_of, rule
from sparsenet.selection import Operation


@rule(
    F.adaptive_avg_pool2d,
    torch._C._nn.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    torch.mean,
    Tensor.mean,
    torch.sum,
    Tensor.sum,
    torch.amax,
    Tensor.amax,
)
def reduce(func: Any, input: Features, *args: Any, **kwargs: Any) -> Any:
    """Pooling to a fixed output size is per image and makes no level, so it ends the region like a mean does."""
    if not isinstance(input, Features) or kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    name = name_of(func)
    input.selection.report(Operation(name, "reduction", input.grid))
    return func(input.dense(name), *args, **kwargs)
