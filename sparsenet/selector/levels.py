"""Masks of every resolution as functions of the entry mask, or the predicted saliency, and the size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.sites import Pair, any_pool

# Maps this small are always on where masks are predicted: they cost next to nothing and see the whole image.
ALWAYS_ON = 3


def octave(entry: Pair, size: Pair) -> int:
    """How many halvings lie between the entry's size and a coarser one: round(log2(H_entry / H)), at least 0."""
    return max(0, round(math.log2(entry[0] / size[0])))


def learned_octaves(entry: Pair, sizes: list[Pair]) -> int:
    """How many learned downsamplings a network needs whose maps after the entry have these sizes."""
    return max((octave(entry, size) for size in sizes if max(size) > ALWAYS_ON), default=0)


class GivenLevels:
    """Levels of a mask that the caller gives, bool (N, H, W) of any size."""

    def __init__(self, entry: Tensor):
        self.entry = entry

    @property
    def full(self) -> bool:
        """Whether every pixel is active, at any size."""
        return bool(self.entry.all())

    def mask(self, size: Pair) -> Tensor:
        return any_pool(self.entry, size)

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
        live: whether masks take a straight-through gradient.
        target: masks that are active beside the predicted ones, by size (warm-up of direct supervision).
    """

    def __init__(
        self,
        logits: Tensor,
        down: nn.ModuleDict,
        threshold: float,
        live: bool,
        target: Callable[[Pair], Tensor] | None = None,
    ):
        self.threshold = threshold
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
        if max(size) <= ALWAYS_ON:
            return torch.ones(len(self.octaves[0]), *size, dtype=torch.bool, device=self.octaves[0].device)
        logits = self.logits(size)
        if logits is None:
            last = self.octaves[-1]
            mask = any_pool(self.mask((last.shape[2], last.shape[3])), size)
        else:
            mask = logits.detach()[:, 0].sigmoid() > self.threshold
        return mask if self.target is None else mask | self.target(size)

    def gate(self, size: Pair) -> Tensor | None:
        logits = self.logits(size) if self.live else None
        if logits is None:
            return None
        saliency = logits.sigmoid()
        return self.mask(size)[:, None].to(saliency) + (saliency - saliency.detach())

    def saliency(self, size: Pair) -> Tensor | None:
        logits = self.logits(size)
        return None if logits is None else logits[:, 0].sigmoid()
