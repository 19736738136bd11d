"""The kinds of reduction, and the detector that each leaves to be fine-tuned."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from reduction.channels import without_weak_filters
from reduction.lasso import without_redundant_channels
from reduction.resolution import at_side
from training import Schedule, batches

KINDS = {
    "channels": "each layer keeps this share of its filters, those of the largest L1 norm",
    "lasso": "each layer keeps this share of its channels, chosen by LASSO; least squares restores what reads them",
    "resolution": "the same weights on images of this side",
    "imitation": "as channels, and fine-tuning also imitates the dense detector's features inside boxes",
}


@dataclass(frozen=True)
class Reduction:
    """How a dense detector is made smaller.

    Attributes:
        kind: one of `KINDS`.
        amount: the share of the channels that is kept, or the side of the input in pixels.
    """

    kind: str
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no reduction {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.kind == "resolution":
            if self.amount != int(self.amount) or self.amount < 64:
                raise ValueError(f"a side is a whole number of pixels, 64 or more, not {self.amount}")
        elif not 0 < self.amount < 1:
            raise ValueError(f"the share of channels that is kept lies between 0 and 1, not at {self.amount}")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.amount:g}"

    @property
    def start(self) -> Reduction:
        """What makes the weights that fine-tuning begins with: a student that imitates begins as one that does not."""
        return Reduction("channels", self.amount) if self.kind == "imitation" else self


# LASSO looks at 64 training images, equal ones each time.
_SAMPLED = Schedule(iterations=4, batch_size=16, lr=0.0)


def sampled_images(detector: Any, train: Dataset) -> list[Any]:
    """Batches of training images, as the detector's backbone reads them: (N, 3, H, W) each."""
    device = next(detector.parameters()).device
    made = batches(train, _SAMPLED, seed=0, workers=0)
    return [detector.transform([image.to(device) for image in images])[0].tensors for images, _ in made]


def reduced(base: nn.Module, reduction: Reduction, train: Dataset) -> nn.Module:
    """A smaller copy of `base`, in eval mode, with all that the reduction can keep of what it has learned."""
    detector = copy.deepcopy(base).eval()
    if reduction.kind == "resolution":
        return at_side(detector, int(reduction.amount))
    if reduction.kind == "lasso":
        return without_redundant_channels(detector, reduction.amount, sampled_images(detector, train))
    return without_weak_filters(detector, reduction.amount)
