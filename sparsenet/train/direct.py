"""Direct supervision: boxes are targets of the saliency maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.regions import Frame, Regions, box_cells
from sparsenet.sites import Pair
from sparsenet.train.passes import Passes


@dataclass(frozen=True)
class Direct:
    """Boxes supervise the saliency, and the network sees the predicted hard mask, detached (SCN, arXiv 2002.01205,
    direct supervision).

    Attributes:
        positive_weight: how much more a missed pixel counts than a wasted one. 1 is the paper's loss; w moves the
            threshold of 0.5 to where the plain loss would have 1 / (1 + w), so that fewer objects are lost.
        size_balance: how the weight of missed pixels is shared out among objects: a pixel of an object of area A gets
            a share of A ** -size_balance. 0, the paper's loss, counts every pixel alike, so that a small object may be
            lost for little; 1 counts every object alike.
    """

    positive_weight: float = 1.0
    size_balance: float = 0.0

    def __post_init__(self) -> None:
        if not (self.positive_weight > 0 and self.size_balance >= 0):
            raise ValueError(
                f"positive_weight must be > 0 and size_balance >= 0, not {self.positive_weight} and {self.size_balance}"
            )


class DirectSupervision(Passes):
    """See `sparsenet.train.supervise` with `Direct`."""

    gating = None

    def __init__(self, how: Direct, regions: Regions, warmup: bool):
        super().__init__()
        self.how = how
        self.regions = regions
        self.warmup = warmup

    def mask_loss(self) -> Tensor:
        """Binary cross-entropy averaged over all coordinates of all saliency maps (SCN's Lm), a scalar."""
        total, count = torch.zeros(()), 0
        for levels, frame in self.passes:
            assert frame is not None
            for logits in levels.octaves:
                areas = self._areas(frame, (logits.shape[2], logits.shape[3]))
                logits = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
                target, weight = (areas > 0).to(logits), self._weight(areas).to(logits)
                total = total.to(logits) + F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
                count += target.numel()
        return total / max(1, count)

    def box_mask(self, frame: Frame, size: Pair) -> Tensor:
        """1 inside the boxes grown by one stride of that size, 0 outside: bool (N, *size)."""
        return self._areas(frame, size) > 0

    def _areas(self, frame: Frame, size: Pair) -> Tensor:
        """Area of the smallest grown box over each cell, in cells, or 0: int32 (N, *size)."""
        stride = tuple(
            2 ** round(torch.tensor(of / to).log2().item()) for of, to in zip(frame.canvas, size, strict=True)
        )
        return box_cells(self.regions.placed_boxes(frame), size, stride)

    def _weight(self, areas: Tensor) -> Tensor:
        """Of each cell in the loss: 1 outside, and inside `positive_weight` on average."""
        inside = areas > 0
        share = areas.clamp(min=1).double().pow(-self.how.size_balance)
        mean = share[inside].mean() if inside.any() else share.new_ones(())
        return torch.where(inside, self.how.positive_weight * share / mean, 1.0)

    # -- for the selector --------------------------------------------------------------------------------------

    def target(self, frame: Frame | None, batch: int) -> Callable[[Pair], Tensor] | None:
        if len(self.regions) != batch:
            raise ValueError(
                f"boxes are given for {len(self.regions)} images, but the batch has {batch}: give one tensor per image"
            )
        if frame is None:
            raise ValueError("direct supervision needs the sizes of the images: call the selective model whole")
        known = frame
        return (lambda size: self.box_mask(known, size)) if self.warmup else None
