"""Masks of every resolution as functions of the entry mask, or the predicted saliency, and the size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.regions import any_pool, by_cells, covered
from sparsenet.sites import Pair

# Maps this small are always on where masks are predicted: they cost next to nothing and see the whole image.
ALWAYS_ON = 3


def active_count(capacity: float, size: Pair) -> int:
    """How many pixels of each image a capacity lets be active: max(1, round(capacity * H * W)), and all of a map so
    small that it is always on."""
    height, width = size
    return height * width if max(size) <= ALWAYS_ON else max(1, round(capacity * height * width))


def strongest(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of each image's scores (N, H, W), bool (N, H, W): of equal ones the first, and NaN last.

    A budget of so many places for the highest scores makes every shape a function of the input's alone, as in
    Mixture-of-Depths (arXiv 2404.02258), whose tokens are pixels here.
    """
    flat = scores.detach().flatten(1)
    if count == flat.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = flat.masked_fill(flat.isnan(), -math.inf)
    least = flat.topk(count, sorted=False).values.amin(1, keepdim=True)
    above, equal = flat > least, flat == least
    places = count - above.sum(1, keepdim=True)  # that are left to what equals the least
    return (above | (equal & (equal.cumsum(1) <= places))).view(scores.shape)


def octave(entry: Pair, size: Pair) -> int:
    """How many halvings lie between the entry's size and a coarser one: round(log2(H_entry / H)), at least 0."""
    return max(0, round(math.log2(entry[0] / size[0])))


def learned_octaves(entry: Pair, sizes: list[Pair]) -> int:
    """How many learned downsamplings a network needs whose maps after the entry have these sizes."""
    return max((octave(entry, size) for size in sizes if max(size) > ALWAYS_ON), default=0)


class GivenLevels:
    """Levels of a mask that the caller gives, bool (N, H, W) of any size.

    Under a capacity the mask ranks the cells, by the share of each that it covers: the best are active, as many as the
    capacity says. Where the mask covers more cells the least covered go, and where it covers fewer others join them,
    row by row.
    """

    def __init__(self, entry: Tensor, capacity: float | None = None):
        self.entry = entry
        self.capacity = capacity

    @property
    def size(self) -> Pair:
        """That of the mask as it was given."""
        return self.entry.shape[1], self.entry.shape[2]

    def mask(self, size: Pair) -> Tensor:
        if self.capacity is None:
            return any_pool(self.entry, size)
        return strongest(covered(self.entry, size), active_count(self.capacity, size))

    def count(self, size: Pair) -> int | None:
        return None if self.capacity is None else active_count(self.capacity, size)

    def gate(self, size: Pair) -> Tensor | None:
        return None

    def saliency(self, size: Pair) -> Tensor | None:
        return None


class LearnedLevels:
    """Levels of predicted saliency: one learned 3x3 stride-2 convolution for each octave (SCN, arXiv 2002.01205: masks
    of smaller maps come by strided convolution, which it found better than pooling).

    All octaves are computed here, at the entry, so that none is first computed inside a recomputed region.

    Args:
        logits: (N, 1, H, W) at the entry.
        down: the convolutions, each from the probabilities of an octave to the logits of the next.
        threshold: a pixel is active where its probability is above.
        live: whether masks take a straight-through gradient (arXiv 1308.3432), also under a capacity.
        target: masks that are active beside the predicted ones, by size (warm-up of direct supervision); under a
            capacity they go before.
        capacity: the share of each image's pixels that are active instead, those of the highest logits.
    """

    def __init__(
        self,
        logits: Tensor,
        down: nn.ModuleDict,
        threshold: float,
        live: bool,
        target: Callable[[Pair], Tensor] | None = None,
        capacity: float | None = None,
    ):
        self.threshold = threshold
        self.capacity = capacity
        self.live = live
        self.target = target
        self.octaves = [logits]
        for convolution in down.values():
            self.octaves.append(convolution(self.octaves[-1].sigmoid()))
        self._logits: dict[Pair, Tensor] = {}

    def logits(self, size: Pair) -> Tensor | None:
        """(N, 1, *size), or `None` where nothing is predicted: tiny maps and octaves without a convolution."""
        entry = (self.octaves[0].shape[2], self.octaves[0].shape[3])
        level = octave(entry, size)
        if max(size) <= ALWAYS_ON or level >= len(self.octaves):
            return None
        if size not in self._logits:
            logits = self.octaves[level]
            if logits.shape[2:] != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            self._logits[size] = logits
        return self._logits[size]

    def mask(self, size: Pair) -> Tensor:
        if self.capacity is not None:
            return strongest(self._scores(size), active_count(self.capacity, size))
        if max(size) <= ALWAYS_ON:
            return torch.ones(len(self.octaves[0]), *size, dtype=torch.bool, device=self.octaves[0].device)
        logits = self.logits(size)
        if logits is None:
            last = self.octaves[-1]
            mask = any_pool(self.mask((last.shape[2], last.shape[3])), size)
        else:
            mask = logits.detach()[:, 0].sigmoid() > self.threshold
        return mask if self.target is None else mask | self.target(size)

    def _scores(self, size: Pair) -> Tensor:
        """By what a capacity chooses: the logits, which tell apart what their sigmoid makes one. Where nothing predicts
        an octave, the maximum of the last one's under each cell, which is above a threshold where any is."""
        logits = self.logits(size)
        if logits is None:
            scores = by_cells(F.adaptive_max_pool2d, self.octaves[-1].detach()[:, 0], size)
        else:
            scores = logits.detach()[:, 0]
        return scores if self.target is None else scores.masked_fill(self.target(size), math.inf)

    def count(self, size: Pair) -> int | None:
        return None if self.capacity is None else active_count(self.capacity, size)

    def gate(self, size: Pair) -> Tensor | None:
        logits = self.logits(size) if self.live else None
        if logits is None:
            return None
        saliency = logits.sigmoid()
        return self.mask(size)[:, None].to(saliency) + (saliency - saliency.detach())

    def saliency(self, size: Pair) -> Tensor | None:
        logits = self.logits(size)
        return None if logits is None else logits[:, 0].sigmoid()
