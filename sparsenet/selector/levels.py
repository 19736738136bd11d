"""Masks of every resolution as functions of the entry mask, or the predicted saliency, and the size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.regions import any_pool, by_cells, covered
from sparsenet.sites import ActiveSites, Pair

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


@functools.lru_cache(maxsize=256)
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


@dataclass(frozen=True)
class Gating:
    """How the masks of a pass take gradient.

    Attributes:
        soft: reads are multiplied by the probabilities themselves, instead of by the hard mask with their gradient
            (straight-through: Bengio et al., arXiv 1308.3432).
        temperature: masks are drawn with their probabilities, and take the gradient of a sample relaxed at this
            temperature (Gumbel-sigmoid: Maddison et al., arXiv 1611.00712); `None` draws nothing.
        layers: paths of the guided convolutions whose results are read through a mask that takes gradient; `None`: all
            that is guided.
    """

    soft: bool = False
    temperature: float | None = None
    layers: frozenset[str] | None = None


class Octaves(nn.ModuleDict):
    """The learned downsamplings of the saliency, one 3x3 stride-2 convolution for each octave, from its probabilities
    to the logits of the next."""

    def forward(self, logits: Tensor, threshold: float) -> tuple[list[Tensor], list[Tensor]]:
        """The logits of all octaves, (N, 1, H, W) each, the given ones first; and the masks, bool (N, H, W), of what
        has a probability above the threshold, of all or none: where they come of it by the way."""
        octaves = [logits]
        for convolution in self.values():
            octaves.append(convolution(octaves[-1].sigmoid()))
        return octaves, []


class LearnedLevels:
    """Levels of predicted saliency (SCN, arXiv 2002.01205: masks of smaller maps come by strided convolution, which it
    found better than pooling).

    All octaves are computed here, at the entry, so that none is first computed inside a recomputed region.

    Args:
        logits: (N, 1, H, W) at the entry.
        down: what gives the other octaves.
        threshold: a pixel is active where its probability is above.
        gating: how masks take gradient, also under a capacity, or `None` where they are constants.
        target: masks that are active beside the predicted ones, by size (warm-up of direct supervision); under a
            capacity they go before.
        capacity: the share of each image's pixels that are active instead, those of the highest logits.
    """

    def __init__(
        self,
        logits: Tensor,
        down: Octaves,
        threshold: float,
        gating: Gating | None,
        target: Callable[[Pair], Tensor] | None = None,
        capacity: float | None = None,
    ):
        self.threshold = threshold
        self.capacity = capacity
        self.gating = gating
        self.target = target
        self.octaves, self._masks = down(logits, threshold)
        self._logits: dict[Pair, Tensor] = {}
        self._drawn: dict[Pair, Tensor] = {}
        self._random: torch.Generator | None = None
        if gating is not None and gating.temperature is not None:
            # Its own, seeded here: a recomputed region must not find PyTorch's generator moved on.
            self._random = torch.Generator(logits.device)
            self._random.manual_seed(int(torch.randint(2**62, ())))

    def _level(self, size: Pair) -> int:
        """The octave that a size is of."""
        return octave((self.octaves[0].shape[2], self.octaves[0].shape[3]), size)

    def logits(self, size: Pair) -> Tensor | None:
        """(N, 1, *size), or `None` where nothing is predicted: tiny maps and octaves without a convolution."""
        level = self._level(size)
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
            return ActiveSites.all(len(self.octaves[0]), size, self.octaves[0].device).mask
        level = self._level(size)
        if self._random is None and level < len(self._masks) and self._masks[level].shape[1:] == size:
            mask = self._masks[level]
        elif (logits := self._sample(size)) is not None:
            mask = logits.detach()[:, 0].sigmoid() > self.threshold
        else:
            last = self.octaves[-1]
            mask = any_pool(self.mask((last.shape[2], last.shape[3])), size)
        return mask if self.target is None else mask | self.target(size)

    def _scores(self, size: Pair) -> Tensor:
        """By what a capacity chooses: the logits, which tell apart what their sigmoid makes one. Where nothing predicts
        an octave, the maximum of the last one's under each cell, which is above a threshold where any is."""
        logits = self._sample(size)
        if logits is None:
            scores = by_cells(F.adaptive_max_pool2d, self.octaves[-1].detach()[:, 0], size)
        else:
            scores = logits.detach()[:, 0]
        return scores if self.target is None else scores.masked_fill(self.target(size), math.inf)

    def count(self, size: Pair) -> int | None:
        return None if self.capacity is None else active_count(self.capacity, size)

    def gate(self, size: Pair) -> Tensor | None:
        logits = None if self.gating is None else self._sample(size)
        if logits is None or self.gating is None:
            return None
        relaxed = (logits / (self.gating.temperature or 1.0)).sigmoid()
        return relaxed if self.gating.soft else self.mask(size)[:, None].to(relaxed) + (relaxed - relaxed.detach())

    def saliency(self, size: Pair) -> Tensor | None:
        logits = self.logits(size)
        return None if logits is None else logits[:, 0].sigmoid()

    def density(self, size: Pair) -> Tensor:
        """Share of the pixels that inference would select, over the batch: a scalar with straight-through gradient."""
        saliency = self.saliency(size)
        if saliency is not None:
            return (saliency > self.threshold).to(saliency).mean() + (saliency.mean() - saliency.mean().detach())
        if max(size) <= ALWAYS_ON:
            return torch.ones((), device=self.octaves[0].device)
        last = self.octaves[-1].detach().sigmoid()[:, 0] > self.threshold
        return any_pool(last, size).float().mean()

    def _sample(self, size: Pair) -> Tensor | None:
        """The logits of a size, with the noise under which they are positive with their probability."""
        logits = self.logits(size)
        if self._random is None or logits is None:
            return logits
        if size not in self._drawn:
            uniform = torch.rand(logits.shape, generator=self._random, device=logits.device)
            self._drawn[size] = logits + uniform.clamp(1e-6, 1 - 1e-6).logit().to(logits)
        return self._drawn[size]
