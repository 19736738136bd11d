"""Random masks that look like objects: what checks and benchmarks select by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.sites import Pair


def blobs(batch: int, size: Pair, density: float, seed: int = 0) -> Tensor:
    """Smooth blobs that cover the same share of each image: bool (N, H, W).

    Args:
        density: share of active pixels, between 0 and 1; met to the pixel (at least one is active if it is above 0).
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be between 0 and 1, not {density}")
    generator = torch.Generator().manual_seed(seed)
    coarse = [max(2, -(-length // 8)) for length in size]
    noise = torch.rand(batch, 1, *coarse, generator=generator)
    smooth = F.interpolate(noise, size, mode="bicubic").flatten(1)
    count = min(smooth.shape[1], max(round(density * smooth.shape[1]), int(density > 0)))
    mask = torch.zeros_like(smooth, dtype=torch.bool)
    mask.scatter_(1, smooth.topk(count, 1).indices, True)
    return mask.view(batch, *size)
