"""Indirect supervision: the mask learns by its effect on the task's loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsenet.masked_conv import MaskedConv2d
from sparsenet.record import selector_of
from sparsenet.selector.levels import Gating
from sparsenet.train.passes import Passes


@dataclass(frozen=True)
class Indirect:
    """The mask multiplies what is read, and the task's loss alone teaches it, through the guided layers next to the
    heads; the others read through the mask as a constant (SCN, arXiv 2002.01205, indirect supervision). At an ignored
    pixel a detector's head says what it says at test, but no number below -10.

    Attributes:
        layers: "heads", as in the paper, where the model's family says which layers are next to its heads (all, where
            it does not); "all" guided layers; or paths of guided convolutions.
        soft: the forward pass multiplies by probabilities. By default it multiplies by the hard mask, as at test, with
            a straight-through gradient.
        gumbel: draw masks with their probabilities, relaxed at this temperature for the gradient (Gumbel-sigmoid:
            Maddison et al., arXiv 1611.00712), so that pixels on either side of the threshold are tried; `None`: not.
    """

    layers: str | Sequence[str] = "heads"
    soft: bool = False
    gumbel: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers not in ("heads", "all"):
            raise ValueError(f"layers must be 'heads', 'all' or a list of paths, not {self.layers!r}")
        if self.gumbel is not None and not (0 < self.gumbel < math.inf):
            raise ValueError(f"gumbel is a temperature, above 0, not {self.gumbel}")

    def gating(self, model: nn.Module) -> Gating:
        """Of one selective model.

        Raises:
            ValueError: for a path that is no guided convolution's.
        """
        layers: frozenset[str] | None = None
        if self.layers == "heads":
            layers = selector_of(model).near_heads
        elif not isinstance(self.layers, str):
            layers = frozenset(self.layers)
            guided = {module.path for module in model.modules() if isinstance(module, MaskedConv2d)}
            unknown = ", ".join(sorted(layers - guided))
            if unknown:
                raise ValueError(f"no guided convolutions: {unknown}; guided are {', '.join(sorted(guided))}")
        return Gating(self.soft, self.gumbel, layers)


class IndirectSupervision(Passes):
    """See `sparsenet.train.supervise` with `Indirect`."""

    def __init__(self, gating: Gating):
        super().__init__()
        self.gating = gating

    def mask_loss(self) -> Tensor:
        return torch.zeros(())
