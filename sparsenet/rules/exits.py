"""Operations that leave the region by their nature, with the reason that the plan gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.features import Leaves, rule

_REASONS = {
    "moves pixels to other places": "flip fliplr flipud rot90 roll pixel_shuffle pixel_unshuffle grid_sample fold",
    "moves pixels to the batch or the channels": "unfold im2col col2im space_to_depth",
    "lets pixels attend to one another": "scaled_dot_product_attention multi_head_attention_forward bmm baddbmm einsum",
    "takes pixels out of the map": "masked_select nonzero topk sort argsort gather take take_along_dim scatter",
}


def _named(names: str) -> list[Any]:
    return [getattr(place, name) for name in names.split() for place in (torch, F, Tensor) if hasattr(place, name)]


def _leaving(reason: str) -> Any:
    def leave(func: Any, *args: Any, **kwargs: Any) -> Any:
        raise Leaves(reason)

    return leave


for _reason, _names in _REASONS.items():
    rule(*_named(_names), any_form=True)(_leaving(_reason))
