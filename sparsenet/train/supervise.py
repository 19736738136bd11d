"""The one switch: how the masks of the passes inside are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from sparsenet import context
from sparsenet.record import selector_of
from sparsenet.regions import check_regions
from sparsenet.train.budget import Budget
from sparsenet.train.direct import Direct, DirectSupervision
from sparsenet.train.distil import Distilled, DistilledSupervision
from sparsenet.train.indirect import Indirect, IndirectSupervision
from sparsenet.train.passes import Passes

How = Direct | Indirect | Distilled


@contextmanager
def supervise(
    model: nn.Module,
    how: How,
    boxes: list[Tensor] | None = None,
    *,
    importance: Tensor | None = None,
    warmup: bool = False,
    budget: Budget | None = None,
) -> Iterator[Passes]:
    """Train the mask in the way that `how` says; the same call for each.

        with sparsenet.train.supervise(model, how, [t["boxes"] for t in targets]) as supervision:
            losses = model(images, targets)
        loss = sum(losses.values()) + supervision.loss()

    Args:
        how: `Direct`, `Indirect` or `Distilled`.
        boxes: for `Direct`, for each image float (boxes, 4), x1, y1, x2, y2 in pixels of the images as the model is
            given them; a detector's own resizing is followed. The others do without.
        importance: for `Distilled`, (N, H, W): what `sparsenet.train.importance` gives.
        warmup: for `Direct`, whether the target is active beside the prediction, so that the network learns where
            objects are before the mask has learned to find them.
        budget: what the masks may cost; its loss is part of `supervision.loss()`.

    Raises:
        TypeError, ValueError: for boxes of a wrong shape or with NaN, a batch of another size, what `how` needs and is
            not given, a model that `selectify` did not make.
    """
    supervision: Passes
    if isinstance(how, Direct):
        if boxes is None:
            raise ValueError("direct supervision needs boxes: give a tensor (boxes, 4) for each image")
        selector_of(model)
        regions = check_regions(boxes)
        if regions.boxes is None:
            raise TypeError("direct supervision takes boxes (boxes, 4) for each image, not masks")
        supervision = DirectSupervision(how, regions, warmup)
    elif isinstance(how, Indirect):
        supervision = IndirectSupervision(how.gating(model))
    elif isinstance(how, Distilled):
        selector_of(model)
        if importance is None:
            raise ValueError("distillation needs importance=sparsenet.train.importance(teacher, stage, loss)")
        supervision = DistilledSupervision(how, importance)
    else:
        raise TypeError(f"a supervision is Direct(...), Indirect(...) or Distilled(...), not {how!r}")
    supervision.budget = budget
    with context.setting(supervision=supervision):
        yield supervision


@contextmanager
def direct(
    model: nn.Module,
    boxes: list[Tensor],
    *,
    warmup: bool = False,
    positive_weight: float = 1.0,
    size_balance: float = 0.0,
) -> Iterator[Passes]:
    """`supervise` by `Direct(positive_weight, size_balance)`."""
    with supervise(model, Direct(positive_weight, size_balance), boxes, warmup=warmup) as supervision:
        yield supervision
