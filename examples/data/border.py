"""Boxes and the border of their image."""

import warnings
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # xyxy in pixels


@dataclass
class Border:
    """Cuts a data set's boxes at the border of their images, and counts those it had to change.

    A box that stands out by less than a pixel is rounding, and not counted.
    """

    cut: int = 0
    left_out: int = 0

    def clip(self, box: Box, width: float, height: float) -> Box | None:
        """What of `box` is in an image of this size; None where that has no area, which no detector could find."""
        x1, y1, x2, y2 = box
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            self.left_out += 1
            return None
        self.cut += max(abs(a - b) for a, b in zip(box, inside, strict=True)) >= 1
        return inside

    def warn(self, source: str) -> None:
        """One warning, if there is anything to say."""
        if self.cut or self.left_out:
            warnings.warn(
                f"{source}: cut {self.cut} boxes that reach over the border of their image, "
                f"left out {self.left_out} that have no area inside it.",
                stacklevel=3,
            )
