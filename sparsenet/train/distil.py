"""Distillation of saliency: a dense teacher's use of its pixels is the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.regions import Frame
from sparsenet.sites import Pair
from sparsenet.train.passes import Passes


@dataclass(frozen=True)
class Distilled:
    """The pixels that matter most to a dense teacher supervise the saliency; no boxes are needed.

    Attributes:
        density: share of each image's pixels that the target selects.
    """

    density: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"density must be between 0 and 1, not {self.density}")


def importance(teacher: nn.Module, at: str, loss: Callable[[], Tensor]) -> Tensor:
    """How much a loss of a dense network depends on each pixel at a stage: |Σ_c x · ∂L/∂x|, the first-order effect of
    zeroing the pixel (Molchanov et al., arXiv 1611.06440, there of channels).

        matters = importance(teacher, sparsenet.plan(student).stage, lambda: sum(teacher(images, targets).values()))

    Args:
        teacher: a network that is not selective, in the mode that `loss` needs; it takes no gradient.
        at: module path of the stage.
        loss: calls the teacher once, and gives a scalar.

    Returns:
        (N, H, W), at least 0, detached.

    Raises:
        ValueError: for an unknown path.
        RuntimeError: when the stage did not run exactly once, or the loss does not depend on it.
    """
    stages = dict(teacher.named_modules())
    if at not in stages:
        raise ValueError(f"the teacher has no module {at!r}: give the path in sparsenet.plan(student).stage")
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # what follows may write in place

    handle = stages[at].register_forward_hook(keep)
    try:
        with torch.enable_grad():
            total = loss()
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RuntimeError(f"the stage {at!r} ran {len(seen)} times in the teacher's pass: it must run once")
    (gradient,) = torch.autograd.grad(total, seen, allow_unused=True)
    if gradient is None:
        raise RuntimeError(f"the loss does not depend on what the stage {at!r} gives")
    return (seen[0].detach() * gradient).sum(1).abs()


class DistilledSupervision(Passes):
    """See `sparsenet.train.supervise` with `Distilled`."""

    gating = None

    def __init__(self, how: Distilled, matters: Tensor):
        super().__init__()
        flat = matters.detach().flatten(1)
        cut = flat.quantile(1 - how.density, dim=1)[:, None, None]
        # Above 0.5: among the chosen.
        self.wanted = matters / (matters + cut).clamp(min=torch.finfo(matters.dtype).tiny)

    def mask_loss(self) -> Tensor:
        """Binary cross-entropy with I / (I + quantile), which is above 0.5 in the chosen share of each image, over all
        coordinates of all saliency maps; coarser maps want the largest beneath each pixel. A scalar with gradient."""
        total, count = torch.zeros(()), 0
        for levels, _ in self.passes:
            for logits in levels.octaves:
                size: Pair = (logits.shape[2], logits.shape[3])
                logits = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
                target = F.adaptive_max_pool2d(self.wanted.to(logits)[:, None], size)[:, 0]
                total = total.to(logits) + F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
                count += target.numel()
        return total / max(1, count)

    def target(self, frame: Frame | None, batch: int) -> None:
        if len(self.wanted) != batch:
            raise ValueError(f"importance is given for {len(self.wanted)} images, but the batch has {batch}")
