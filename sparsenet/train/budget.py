"""A budget: what the masks may cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from sparsenet.macs import MacCounter
from sparsenet.record import selector_of
from sparsenet.selector import Selector
from sparsenet.selector.levels import LearnedLevels
from sparsenet.sites import Pair
from sparsenet.surgery import quietly

NEAR = 0.1  # excess within which the multiplier moves


class Budget(nn.Module):
    """Drives a selective model's cost to a target while the task's loss pulls elsewhere, by an augmented Lagrangian
    (Nocedal and Wright, Numerical Optimization, chapter 17): a multiplier grows until the target holds, so that no
    weight has to be found for each task.

        budget = sparsenet.train.Budget(model, density=0.3)
        with sparsenet.train.supervise(model, sparsenet.train.Indirect(gumbel=1.0), budget=budget) as supervision:
            loss = criterion(model(images))
        (loss + supervision.loss()).backward()

    The cost is that of the masks as inference would have them, before any noise; where `torch.distributed` has several
    processes, that of all their batches, so that each must take part in every step. The multiplier is a buffer: keep
    the budget with what is saved to resume.

    Args:
        density: target of the active share of pixels at the stage, over the batch.
        macs: target of the multiply-accumulates as a share of the dense network's, the selector's included. By the
            sizes of maps in the dry run; on inputs of another size, by sizes of the same proportion.
        penalty: weight of half the squared excess.
        rate: what the multiplier grows by in a step, as a share of penalty × excess. Further from the target than 0.1
            it stays: there the penalty alone is enough, and what was added up on the way would carry beyond it.

    Raises:
        ValueError: for not exactly one target, one outside 0 … 1, and MACs that no mask reaches.
    """

    multiplier: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float | None = None,
        macs: float | None = None,
        penalty: float = 150.0,
        rate: float = 0.05,
    ):
        super().__init__()
        if (density is None) == (macs is None):
            raise ValueError("give the budget one target: density=, or macs=")
        target = density if density is not None else macs
        assert target is not None
        if not 0 < target <= 1:
            raise ValueError(f"a budget is a share above 0, of 1 at most, not {target}")
        self.target = target
        self.penalty = penalty
        self.rate = rate
        selector = selector_of(model)
        plan = selector.plan
        self.stage = plan.size
        self.shares: dict[Pair, float] = {self.stage: 1.0}  # of the cost, by the size whose density it follows
        self.fixed = 0.0  # what no mask cuts
        if macs is not None:
            self.shares = {}
            for step in plan.steps:
                share = step.operation.dense_macs / plan.total_macs
                if step.operation.status == "guided" and share:
                    self.shares[step.operation.size] = self.shares.get(step.operation.size, 0.0) + share
            selecting = plan.batch * _selector_macs(selector, plan.channels, plan.size) / plan.total_macs
            self.fixed = 1 - sum(self.shares.values()) + selecting
            if not self.fixed < target <= self.fixed + sum(self.shares.values()):
                raise ValueError(
                    f"macs={target} is out of reach: masks cut nothing of {self.fixed:.3f} of the dense network's "
                    "MACs, selector included: give a larger target, or embed earlier"
                )
        self.register_buffer("multiplier", torch.zeros(()))

    def cost(self, levels: LearnedLevels) -> Tensor:
        """What the masks of a pass cost, in the target's unit: a scalar with straight-through gradient."""
        entry = levels.octaves[0].shape[2:]
        total = torch.full((), self.fixed, device=levels.octaves[0].device)
        for size, share in self.shares.items():
            here = [max(1, round(of * now / then)) for of, now, then in zip(size, entry, self.stage, strict=True)]
            total = total + share * levels.density((here[0], here[1]))
        return total

    def forward(self, levels: LearnedLevels) -> Tensor:
        """The budget's part of the loss, a scalar; in training mode the multiplier moves."""
        excess = self.cost(levels) - self.target
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            excess = all_reduce(excess) / torch.distributed.get_world_size()
        loss = self.multiplier * excess + self.penalty / 2 * excess.square()
        if self.training:
            with torch.no_grad():  # a new tensor: the graph of the loss holds the old one
                step = self.rate * self.penalty * excess.detach()
                self.multiplier = torch.where(excess.detach().abs() < NEAR, self.multiplier + step, self.multiplier)
        return loss


def _selector_macs(selector: Selector, channels: int, size: Pair) -> int:
    """Multiply-accumulates of a selector for one image."""
    counts: list[int] = []
    parameter = next(selector.parameters(), torch.empty(()))
    features = parameter.new_zeros(1, channels, *size)
    with quietly(selector), MacCounter(lambda macs, _: counts.append(macs)):
        LearnedLevels(selector.module(features).reshape(1, 1, *size), selector.down, selector.threshold, None)
    return sum(counts)
