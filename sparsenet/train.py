"""Supervision of the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet import context
from sparsenet.record import selector_of
from sparsenet.regions import Frame, Regions, box_cells, check_regions
from sparsenet.selector.levels import LearnedLevels
from sparsenet.selector.selector import PassEnded
from sparsenet.sites import Pair


class DirectSupervision:
    """Boxes as targets of the saliency maps: see `direct`."""

    def __init__(self, regions: Regions, warmup: bool, positive_weight: float, size_balance: float):
        self.regions = regions
        self.warmup = warmup
        self.positive_weight = positive_weight
        self.size_balance = size_balance
        self._passes: list[tuple[LearnedLevels, Frame]] = []

    def loss(self) -> Tensor:
        """Binary cross-entropy averaged over all coordinates of all saliency maps (SCN's Lm): a scalar with gradient.

        Raises:
            RuntimeError: when no forward pass of a selective model ran inside the `with` block.
        """
        if not self._passes:
            raise RuntimeError("no selective model ran inside this `with sparsenet.train.direct(...)` block")
        total, count = torch.zeros(()), 0
        for levels, frame in self._passes:
            for logits in levels.octaves:
                areas = self._areas(frame, (logits.shape[2], logits.shape[3]))
                logits = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
                target, weight = (areas > 0).to(logits), self._weight(areas).to(logits)
                total = total.to(logits) + F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
                count += target.numel()
        return total / max(1, count)

    def target(self, frame: Frame, size: Pair) -> Tensor:
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
        share = areas.clamp(min=1).double().pow(-self.size_balance)
        mean = share[inside].mean() if inside.any() else share.new_ones(())
        return torch.where(inside, self.positive_weight * share / mean, 1.0)

    # -- for the selector --------------------------------------------------------------------------------------

    def observe(self, levels: LearnedLevels, frame: Frame | None) -> None:
        self._passes.append((levels, self._known(frame, len(levels.octaves[0]))))

    def warmup_target(self, frame: Frame | None, batch: int) -> Callable[[Pair], Tensor] | None:
        known = self._known(frame, batch)
        return (lambda size: self.target(known, size)) if self.warmup else None

    def _known(self, frame: Frame | None, batch: int) -> Frame:
        if len(self.regions) != batch:
            raise ValueError(
                f"boxes are given for {len(self.regions)} images, but the batch has {batch}: give one tensor per image"
            )
        if frame is None:
            raise ValueError("direct supervision needs the sizes of the images: call the selective model whole")
        return frame


@contextmanager
def direct(
    model: nn.Module,
    boxes: list[Tensor],
    *,
    warmup: bool = False,
    positive_weight: float = 1.0,
    size_balance: float = 0.0,
) -> Iterator[DirectSupervision]:
    """Train the mask directly: forward passes inside use the predicted hard mask, detached, and boxes supervise the
    saliency (SCN, arXiv 2002.01205, direct supervision).

        with sparsenet.train.direct(model, [t["boxes"] for t in targets], warmup=step < 100) as supervision:
            losses = model(images, targets)
        loss = sum(losses.values()) + supervision.loss()

    Args:
        boxes: for each image float (boxes, 4), x1, y1, x2, y2 in pixels of the images as the model is given them;
            a detector's own resizing is followed.
        warmup: whether the target is active beside the prediction, so that the network learns where objects are
            before the mask has learned to find them.
        positive_weight: how much more a missed pixel counts than a wasted one. 1 is the paper's loss; w moves the
            threshold of 0.5 to where the plain loss would have 1 / (1 + w), so that fewer objects are lost.
        size_balance: how the weight of missed pixels is shared out among objects: a pixel of an object of area A gets
            a share of A ** -size_balance. 0, the paper's loss, counts every pixel alike, so that a small object may be
            lost for little; 1 counts every object alike.

    Raises:
        TypeError, ValueError: for boxes of a wrong shape or with NaN, a weight that is not positive, a batch of another
            size, a model that `selectify` did not make.
    """
    selector_of(model)
    regions = check_regions(boxes)
    if regions.boxes is None:
        raise TypeError("direct supervision takes boxes (boxes, 4) for each image, not masks")
    if not (positive_weight > 0 and size_balance >= 0):
        raise ValueError(f"positive_weight must be > 0 and size_balance >= 0, not {positive_weight} and {size_balance}")
    supervision = DirectSupervision(regions, warmup, positive_weight, size_balance)
    with context.setting(supervision=supervision):
        yield supervision


@dataclass(frozen=True)
class StageFeatures:
    """What the selector sees of a batch: see `stage_features`.

    Attributes:
        map: (N, C, H, W), detached.
        frame: where the images lie in it.
    """

    map: Tensor
    frame: Frame | None

    def to(self, *args: Any, **kwargs: Any) -> StageFeatures:
        """With the map on another device or of another dtype, as `torch.Tensor.to`."""
        return StageFeatures(self.map.to(*args, **kwargs), self.frame)


@torch.no_grad()
def stage_features(model: nn.Module, *args: Any, **kwargs: Any) -> StageFeatures:
    """Call a selective model up to its stage and no further: features to train a selector on, again and again, while
    the layers before it stay as they are.

    Raises:
        RuntimeError: when the stage did not run.
    """
    selector_of(model)
    try:
        with context.setting(stop_at="stage"):
            model(*args, **kwargs)
    except PassEnded as ended:
        return StageFeatures(ended.features.detach(), ended.frame)
    raise RuntimeError("the stage did not run in this pass")


def selector_only(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call a selective model up to its selector and no further: all that its supervision needs, at the price of the
    layers before the stage, or without them on `stage_features`. Gradient reaches the selector, and the layers that
    run where their parameters take it.

        with sparsenet.train.direct(model, boxes) as supervision:
            sparsenet.train.selector_only(model, images)  # or (model, features)
        supervision.loss().backward()
    """
    selector = selector_of(model)
    with context.setting(stop_at="selector"), suppress(PassEnded):
        if args and isinstance(args[0], StageFeatures):
            context.begin_frame(args[0].frame)
            try:
                selector.enter(args[0].map)
            finally:
                context.end_frame()
        else:
            model(*args, **kwargs)
