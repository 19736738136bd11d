"""The branch that selects: predicts which pixels matter at the embed stage and hands guided features on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsenet import context
from sparsenet.atlas import Atlases
from sparsenet.features import Features, enter, ordinary
from sparsenet.kernels import machine
from sparsenet.regions import Frame
from sparsenet.selection import Levels, Options, Selection
from sparsenet.selector.levels import GivenLevels, LearnedLevels, Octaves
from sparsenet.selector.supervision import Supervision
from sparsenet.sites import Pair

if TYPE_CHECKING:
    from sparsenet.plan import Plan

# Sizes of the entry whose following sizes are remembered.
MOST_SIZES = 64


class GivenMask(nn.Module):
    """A selector that predicts nothing: every call must give its mask by `sparsenet.use_mask`."""

    def forward(self, features: Tensor) -> Tensor:
        raise ValueError(
            "this model was made with selector=GivenMask() and was called without a mask: call it inside "
            "`with sparsenet.use_mask(mask):`"
        )


class PassEnded(Exception):
    """Ends a pass that wants nothing after the stage or after the selector: see `sparsenet.train.stage_features` and
    `selector_only`. Carries the stage's output, and where the images lie in it."""

    def __init__(self, features: Tensor, frame: Frame | None):
        super().__init__("a pass was to end here")
        self.features = features
        self.frame = frame


class Selector(nn.Module):
    """`model.selector` of a selective model.

    As a module it is the identity, because some containers run every child. The embed stage's forward hook calls
    `enter` instead.

    Args:
        module: features (N, C, H, W) to logits (N, 1, H, W), such as a `SelectiveModule`.
        octaves: how many learned downsamplings of the saliency the network needs.
        options: what `selectify` was told.

    Attributes:
        counted: see `Selection`.
        plan: what the dry run saw.
        near_heads: paths of the guided convolutions whose results a detector's heads read, and of the heads; `None`
            where the model's family does not say.
    """

    threshold = 0.5
    counted: bool | None = None
    plan: Plan
    near_heads: frozenset[str] | None = None

    def __init__(self, module: nn.Module, octaves: int, options: Options = Options()):  # noqa: B008 - frozen
        super().__init__()
        self.module = module
        self.down = Octaves({str(k): _downsampler() for k in range(1, octaves + 1)})
        self.options = options
        self._met: dict[Pair, dict[Pair, None]] = {}  # by size of the entry, the sizes that passes have met after it
        self._atlases = Atlases()

    def forward(self, x: Any) -> Any:
        return x

    def enter(self, features: Tensor) -> Tensor:
        """Guided features of an ordinary map (N, C, H, W); what is guided already stays as it is."""
        if isinstance(features, Features) and not features.selection.everything:
            return features
        settings = context.current()
        if settings.stop_at == "stage":
            raise PassEnded(ordinary(features), context.frame())
        observers = tuple(observer for observer in settings.observers if observer.selector is self)
        backend = settings.backend or self.options.backend
        full = self._full(features, backend)
        if full and not observers:
            return features  # nothing is skipped: the frozen network goes on as it came
        with ExitStack() as selecting:
            for observer in observers:
                selecting.enter_context(observer.selecting())
            levels = self._levels(features)
        gating = levels.gating if isinstance(levels, LearnedLevels) else None
        live = gating is not None
        if live and backend not in ("auto", "reference"):
            raise RuntimeError(
                f"the {backend} backend gives the mask no gradient, and this pass trains the mask by its effect: use "
                "backend='reference' or 'auto', or direct supervision (sparsenet.train.direct)"
            )
        size = (features.shape[2], features.shape[3])
        options = self.options if backend == self.options.backend else replace(self.options, backend=backend)
        batch, device, met = features.shape[0], features.device, self._sizes_after(size)
        selection = Selection(levels, batch, size, device, options, observers, self, live, self.counted, met)
        if gating is not None:
            selection.live_layers, selection.soft = gating.layers, gating.soft
        # The size of a mask that may be full.
        given = [levels.size] if full is not False and isinstance(levels, GivenLevels) else []
        if selection.counted and options.capacity is None and not selection.dense_storage:
            selection.prepare([*met, size, *given])
        if any(selection.peek(each).everywhere for each in given):
            return features
        if selection.queues and not selection.counted and machine.unsupported() is None:
            self._atlases.begin(selection)
        return enter(ordinary(features), selection)

    def _full(self, features: Tensor, backend: str) -> bool | None:
        """Whether a given mask leaves a frozen network as it is; `None` where that is not known yet."""
        regions, frozen = context.current().regions, isinstance(features, Features) and backend == "auto"
        if regions is None or not frozen or self.options.capacity is not None:
            return False
        return regions.full(context.frame(), features.shape[0])

    def _sizes_after(self, entry: Pair) -> dict[Pair, None]:
        """The sizes that follow an entry of this size, as far as the dry run and earlier passes have met them."""
        if not self._met and hasattr(self, "plan"):
            self._met[self.plan.size] = dict.fromkeys(self.plan.sizes)
        if len(self._met) >= MOST_SIZES:
            self._met = {}
        return self._met.setdefault(entry, {})

    def _levels(self, features: Tensor) -> Levels:
        settings, batch = context.current(), features.shape[0]  # `len` of features is dispatched, 20 µs
        if settings.regions is not None:
            mask = settings.regions.entry_mask(context.frame(), batch, features.device)
            return GivenLevels(mask, self.options.capacity)
        logits = ordinary(self.module(features))
        expected = (batch, 1, features.shape[2], features.shape[3])
        if logits.shape == (expected[0], *expected[2:]):
            logits = logits[:, None]
        if tuple(logits.shape) != expected:
            raise ValueError(f"the selector must give one logit per pixel, {expected}, but gave {tuple(logits.shape)}")
        supervision = settings.supervision or Supervision()
        gating = supervision.gating if self.training and torch.is_grad_enabled() and logits.requires_grad else None
        target = supervision.target(context.frame(), batch)
        levels = LearnedLevels(logits, self.down, self.threshold, gating, target, self.options.capacity)
        supervision.observe(levels, context.frame())
        if settings.stop_at == "selector":
            raise PassEnded(ordinary(features), context.frame())
        return levels


def _downsampler() -> nn.Conv2d:
    """Probabilities of one octave to the logits of the next. It starts as a smoothing that keeps open what is open and
    closed what is closed (probabilities 0.9 and 0.1 give logits 2.9 and -1.5). A steeper start, such as any-pooling,
    saturates, and its gradient drives the finest map shut before it has learned anything."""
    convolution = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    nn.init.constant_(convolution.weight, 0.6)
    nn.init.constant_(convolution.bias, -2.0)  # type: ignore[arg-type]
    return convolution


def check_capacity(model: nn.Module, why: str) -> None:
    """Raise `ValueError` for a selective model whose shapes follow from its mask."""
    selector = getattr(model, "selector", None)
    if isinstance(selector, Selector) and selector.options.capacity is None:
        raise ValueError(
            f"{why}: make the model by sparsenet.selectify(..., capacity=0.3), so that the mask has a fixed number of "
            "active pixels"
        )
