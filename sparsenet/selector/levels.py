"""Masks of every resolution as functions of the entry mask, or the predicted saliency, and the size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.regions import any_pool
from sparsenet.sites import Pair

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


class LearnedLevels:
    """Levels of predicted saliency: one learned 3x3 stride-2 convolution for each octave (SCN, arXiv 2002.01205: masks
    of smaller maps come by strided convolution, which it found better than pooling).

    All octaves are computed here, at the entry, so that none is first computed inside a recomputed region.

    Args:
        logits: (N, 1, H, W) at the entry.
        down: the convolutions, each from the probabilities of an octave to the logits of the next.
        threshold: a pixel is active where its probability is above.
        gating: how masks take gradient, or `None` where they are constants.
        target: masks that are active beside the predicted ones, by size (warm-up of direct supervision).
    """

    def __init__(
        self,
        logits: Tensor,
        down: nn.ModuleDict,
        threshold: float,
        gating: Gating | None,
        target: Callable[[Pair], Tensor] | None = None,
    ):
        self.threshold = threshold
        self.gating = gating
        self.target = target
        self.octaves = [logits]
        for convolution in down.values():
            self.octaves.append(convolution(self.octaves[-1].sigmoid()))
        self._logits: dict[Pair, Tensor] = {}
        self._drawn: dict[Pair, Tensor] = {}
        self._random: torch.Generator | None = None
        if gating is not None and gating.temperature is not None:
            # Its own, seeded here: a recomputed region must not find PyTorch's generator moved on.
            self._random = torch.Generator(logits.device)
            self._random.manual_seed(int(torch.randint(2**62, ())))

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
        logits = self._sample(size)
        if logits is None:
            last = self.octaves[-1]
            mask = any_pool(self.mask((last.shape[2], last.shape[3])), size)
        else:
            mask = logits.detach()[:, 0].sigmoid() > self.threshold
        return mask if self.target is None else mask | self.target(size)

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
