"""What trains the masks of a pass, as the selector meets it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparsenet.regions import Frame
from sparsenet.selector.levels import Gating, LearnedLevels
from sparsenet.sites import Pair


class Supervision:
    """Of the passes inside a `with` block of `sparsenet.train`; this one, of passes in none: the mask learns by its
    effect, wherever it is read.

    Attributes:
        gating: how the masks of a pass in training mode take gradient, or `None` where they are constants.
    """

    gating: Gating | None = Gating()

    def target(self, frame: Frame | None, batch: int) -> Callable[[Pair], Tensor] | None:
        """Masks, bool (N, H, W) by size, that are active beside the predicted ones."""
        return None

    def observe(self, levels: LearnedLevels, frame: Frame | None) -> None:
        """Called by each pass."""
