"""Mask-guided distillation: a student's features imitate the dense teacher's inside boxes.

As in Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation" (2019), but for two things. The
mask is that of the boxes which direct supervision takes as its target. The error is relative to the teacher's features,
so that maps of other scales weigh alike: conv4_3's, normalised, are an order of magnitude larger.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reduction.least_squares import Moments
from sparsenet.regions import box_cells


class Imitation(nn.Module):
    """The loss, and what is trained with the student: a 1x1 convolution for each map that the heads read, from the
    student's channels to the teacher's.

    They begin as least squares finds them on sample images, so that the student is not pulled about while they learn.
    A student with the teacher's widths begins with the identity, and leaves it only where that is not exact.

    Args:
        teacher: a detector of the same input size; it is not trained, and no part of this module's state.
        student: dense; later maps may be those of its selective form.
        images: batches (N, 3, H, W) of what the backbones read.
    """

    def __init__(self, teacher: Any, student: Any, images: Sequence[Tensor]):
        super().__init__()
        # Not a module of this one: it is neither trained nor saved.
        self._teacher: tuple[Any] = (copy.deepcopy(teacher).eval().requires_grad_(False),)
        self.adapters = nn.ParameterList(_fitted(self.teacher.backbone, student.backbone, images))

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def forward(self, maps: Sequence[Tensor], images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """A scalar: of each map, the error's share of the teacher's energy inside boxes; the mean over the maps.

        What a selective student ignores, which is zero there, counts in neither.

        Args:
            maps: the student's, (N, channels, H, W) each.
            images, targets: as the detectors are given them.
        """
        with torch.no_grad():
            batch, placed = self.teacher.transform(images, targets)
            wanted = list(self.teacher.backbone(batch.tensors).values())
        losses = []
        for adapter, found, target in zip(self.adapters, maps, wanted, strict=True):
            found = torch.einsum("nchw->nchw", found)  # an ordinary tensor, also of guided features
            whole, size = batch.tensors.shape[2:], target.shape[2:]
            stride = tuple(2 ** round(math.log2(of / to)) for of, to in zip(whole, size, strict=True))
            inside = box_cells([boxes["boxes"] for boxes in placed], size, stride) > 0
            counts = (inside & (found != 0).any(1))[:, None]
            error = torch.where(counts, F.conv2d(found, adapter[:, :, None, None]).float() - target.float(), 0)
            energy = torch.where(counts, target.float(), 0).square().sum()
            losses.append(error.square().sum() / energy.clamp(min=torch.finfo(torch.float32).tiny))
        return torch.stack(losses).mean()


@contextmanager
def maps_of(detector: Any) -> Iterator[list[Tensor]]:
    """The maps that the heads read in the last pass inside."""
    maps: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: dict[str, Tensor]) -> None:
        maps[:] = output.values()

    handle = detector.backbone.register_forward_hook(note)
    try:
        yield maps
    finally:
        handle.remove()


@torch.no_grad()
def _fitted(teacher: nn.Module, student: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """Weights (teacher's channels, student's) for each map."""
    was_training = student.training
    total: list[Moments] = []
    student.eval()
    for batch in images:
        pairs = zip(student(batch).values(), teacher(batch).values(), strict=True)
        found = [Moments.of(*(values.transpose(0, 1).flatten(1).T for values in pair)) for pair in pairs]
        total = [before + here for before, here in zip(total, found, strict=True)] if total else found
    student.train(was_training)
    weights = []
    for moments in total:
        channels, wanted = moments.product.shape
        start = torch.eye(wanted) if channels == wanted else torch.zeros(wanted, channels)
        weights.append(moments.solve(start.to(images[0])))
    return weights
