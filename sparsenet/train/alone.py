"""Training a selector without the network around it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import context
from sparsenet.record import selector_of
from sparsenet.regions import Frame
from sparsenet.selector.selector import PassEnded


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
