"""Index arithmetic in Triton: what `sparsenet.kernels.index` is on CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["places", "pixels"])
def placed(mask, running, index, rank, places, pixels, height, width, BLOCK: tl.constexpr):
    """index and rank of a mask, from the running count of its active pixels."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = place < places
    column, line = place % (width + 1), place // (width + 1) % (height + 1)
    inside = present & (column < width) & (line < height)
    pixel = place // ((width + 1) * (height + 1)) * (height * width) + line * width + column
    count = tl.load(running + pixel, mask=inside, other=0)
    active = tl.load(mask + pixel, mask=inside, other=0) != 0
    total = tl.load(running + pixels - 1)
    found = tl.where(active, count - 1, tl.where(inside, total, total + 1))
    tl.store(rank + place, found, mask=present)
    tl.store(index + count - 1, pixel, mask=inside & active)


@triton.jit(do_not_specialize=["reads"])
def looked_up(places, index, rank, table, reads, taps, pixels, plane, BLOCK: tl.constexpr):
    """The row that each tap of each site reads."""
    read = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = read < reads
    site = tl.load(index + read // taps, mask=present, other=0)
    place = tl.load(places + site % pixels * taps + read % taps, mask=present, other=0)
    row = tl.load(rank + site // pixels * plane + place, mask=present, other=0)
    tl.store(table + read, row, mask=present)


def sites(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The active pixels of a mask, bool (N, H, W), as `sparsenet.sites.ActiveSites` has them: `index` and `rank`. The
    processor waits for the device once, to know how many there are."""
    batch, height, width = mask.shape
    mask = mask.contiguous()
    rank = torch.empty(batch, height + 1, width + 1, dtype=torch.int32, device=mask.device)
    if mask.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=mask.device), rank.fill_(1)
    running = mask.flatten().cumsum(0, dtype=torch.int32)
    index = torch.empty(mask.numel(), dtype=torch.int64, device=mask.device)
    places = rank.numel()
    with torch.cuda.device_of(mask):
        placed[(triton.cdiv(places, BLOCK),)](
            mask.view(torch.uint8), running, index, rank, places, mask.numel(), height, width, BLOCK=BLOCK
        )
    return index[: int(running[-1])], rank


def table(places: Tensor, index: Tensor, rank: Tensor) -> Tensor:
    """The row that each tap of each site reads: int32 (n_out, taps).

    Args:
        places: int32 (H_out * W_out, taps), where in one image's flattened rank image each tap reads.
        index: int64 (n_out,), the sites.
        rank: int32 (N, H + 1, W + 1).
    """
    places, index, rank = places.contiguous(), index.contiguous(), rank.contiguous()
    pixels, taps = places.shape
    result = torch.empty(len(index), taps, dtype=torch.int32, device=index.device)
    if result.numel():
        plane = rank.shape[1] * rank.shape[2]
        with torch.cuda.device_of(index):
            looked_up[(triton.cdiv(result.numel(), BLOCK),)](
                places, index, rank, result, result.numel(), taps, pixels, plane, BLOCK=BLOCK
            )
    return result
