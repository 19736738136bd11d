"""What every supervision keeps of the passes that it watched."""

from __future__ import annotations

from torch import Tensor

from sparsenet.regions import Frame
from sparsenet.selector.levels import LearnedLevels
from sparsenet.selector.supervision import Supervision
from sparsenet.train.budget import Budget


class Passes(Supervision):
    """Of the forward passes inside a `with sparsenet.train.supervise(...)` block.

    Attributes:
        budget: what the masks may cost, or `None`.
    """

    budget: Budget | None = None

    def __init__(self) -> None:
        self.passes: list[tuple[LearnedLevels, Frame | None]] = []

    def observe(self, levels: LearnedLevels, frame: Frame | None) -> None:
        self.passes.append((levels, frame))

    def loss(self) -> Tensor:
        """What the mask is to be told beside the task's own loss: a scalar that every parameter of the selector has
        gradient from (zero where there is nothing to tell), so that `DistributedDataParallel` finds each in each step.

        Raises:
            RuntimeError: when no forward pass of a selective model ran inside the `with` block.
        """
        if not self.passes:
            raise RuntimeError("no selective model ran inside this `with sparsenet.train.supervise(...)` block")
        total = self.mask_loss()
        for levels, _ in self.passes:
            if self.budget is not None:
                total = total + self.budget(levels)
            for logits in levels.octaves:
                total = total + 0.0 * logits.sum()
        return total

    def mask_loss(self) -> Tensor:
        """The supervision's own part."""
        raise NotImplementedError
