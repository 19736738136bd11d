"""The pictures: what a selective detector looks at, and what accuracy costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from storage import replacing

matplotlib.use("Agg")  # files only; no display needed
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle


@dataclass(frozen=True)
class Seen:
    """One image and what the detector made of it; all tensors on the CPU."""

    image: Tensor  # (3, H, W) in 0..1
    saliency: Tensor  # (h, w) probabilities at the embed stage
    mask: Tensor  # (h, w) bool
    boxes: Tensor  # (n, 4) xyxy in pixels of the image
    labels: list[str]
    scores: Tensor  # (n,)


def draw_seen(rows: Sequence[Seen], path: Path) -> None:
    """Write a PNG with a row per image: the image, its saliency map, what is left of it, the detections."""
    titles = ("image", "saliency", "what is computed", "detections")
    figure, axes = plt.subplots(len(rows), 4, figsize=(10, 2.55 * len(rows)), squeeze=False, layout="constrained")
    for row, seen in zip(axes, rows, strict=True):
        height, width = seen.image.shape[-2:]
        picture = seen.image.permute(1, 2, 0).clamp(0, 1)
        active = _to_pixels(seen.mask.float(), height, width, "nearest")[..., None]
        grey = 0.18 * picture.mean(-1, keepdim=True) + 0.02  # inactive: dark, but to be recognised
        row[0].imshow(picture)
        row[1].imshow(_to_pixels(seen.saliency, height, width, "bilinear"), cmap="magma", vmin=0, vmax=1)
        row[2].imshow(torch.where(active > 0, picture, grey))
        row[2].set_xlabel(f"{100 * seen.mask.float().mean():.0f} % active", fontsize=9)
        row[3].imshow(picture)
        for (x1, y1, x2, y2), label, score in zip(seen.boxes.tolist(), seen.labels, seen.scores.tolist(), strict=True):
            colour = f"C{sum(label.encode()) % 10}"
            row[3].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.6))
            row[3].text(
                x1, y1 - 2, f"{label} {score:.2f}", fontsize=6.5, color="white", va="bottom", clip_on=True,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip
        for ax in row:
            ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
            ax.spines[:].set_visible(False)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def _to_pixels(values: Tensor, height: int, width: int, mode: str) -> Tensor:
    return interpolate(values[None, None], size=(height, width), mode=mode)[0, 0]


def draw_curves(axes: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Write a PNG with a plot for each axis: mAP against a share of the dense detector's cost, in percent."""
    figure, plots = plt.subplots(1, len(axes), figsize=(6.4 * len(axes), 5.4), sharey=True, layout="constrained")
    for ax, (axis, curves) in zip(plots, axes.items(), strict=True):
        for number, (title, places) in enumerate(curves.items()):
            marker = "os^Dv<>"[number % 7]
            ax.plot(*zip(*places, strict=True), marker=marker, color=f"C{number % 10}", label=title, linewidth=1.3)
        ax.set_xlabel(f"{axis}, % of the dense detector's")
        ax.grid(alpha=0.3)
    plots[0].set_ylabel("mAP, 11-point, %")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
