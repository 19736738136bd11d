"""Where skipping pays: one masked 3×3 convolution against the dense one, by density, map size and channels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import indirect, spconv, winograd
from sparsenet.backends.epilogue import Epilogue
from sparsenet.bench import environment, gain, quartiles, using_threads
from sparsenet.engines import bench_extra
from sparsenet.masks import blobs
from sparsenet.sites import ActiveSites, Window, kernel_map, tiles
from sparsenet.timing import alternate

CHANNELS = (64, 128, 256, 512)
SIZES = (19, 38, 75)
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
# Milliseconds that a call of any convolution costs by itself: what efficiency allows for beside the active share.
CALL = 0.05


@dataclass(frozen=True)
class Point:
    """One convolution of `channels` to as many, on a square map.

    Attributes:
        size: of the map's sides; `density`, the share of its pixels that are active.
        sparse_ms: median of the masked convolution's calls, by the `way` that is faster; `dense_ms`, of oneDNN's on
            packed weights, channels last; `spconv_ms`, of spconv's, `None` where it is not installed.
        speedup: of the masked one over the dense one: the median of the rounds' ratios; `speedup_spconv`, over spconv.
    """

    channels: int
    size: int
    density: float
    way: str
    sparse_ms: float
    dense_ms: float
    spconv_ms: float | None
    speedup: float
    speedup_spconv: float | None

    @property
    def efficiency(self) -> float:
        """What the active share of the dense time and one call would take, by what it takes."""
        return (self.dense_ms * self.density + CALL) / self.sparse_ms


def run(
    *,
    channels: Sequence[int] = CHANNELS,
    sizes: Sequence[int] = SIZES,
    densities: Sequence[float] = DENSITIES,
    threads: int | None = None,
    repeats: int = 20,
) -> Iterator[Point]:
    """Time every combination, one after the other.

    Raises:
        RuntimeError: where the kernels cannot run, or if one computes something else than the dense convolution.
    """
    with using_threads(threads), torch.inference_mode():
        for size in sizes:
            for width in channels:
                yield from (_point(width, size, density, repeats) for density in densities)


def _point(channels: int, size: int, density: float, repeats: int) -> Point:
    torch.manual_seed(0)
    mask = blobs(1, (size, size), density)
    image = (
        torch.randn(1, channels, size, size)
        .where(mask[:, None], torch.zeros(()))
        .contiguous(memory_format=torch.channels_last)
    )
    weight, bias = torch.randn(channels, channels, 3, 3) * (9 * channels) ** -0.5, torch.randn(channels)
    reason = indirect.unsupported(weight, 1)
    if reason is not None:
        raise RuntimeError(f"no masked convolution to time: {reason}")

    window = (1, 1), (1, 1), (1, 1)  # padding, stride and dilation
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *window, 1, image.shape)
    sites = ActiveSites(mask)
    table = kernel_map(sites, Window((3, 3), (1, 1), (1, 1)), sites)
    rows = image.permute(0, 2, 3, 1).flatten(0, 2)[sites.index]
    padded = F.pad(rows, (0, 0, 0, 2))
    epilogue = Epilogue(shift=bias)
    by_rows = indirect.Prepared(indirect.pack(weight, 1), epilogue)  # once, as oneDNN's weights are
    runs: dict[str, Callable[[], Tensor]] = {
        "indirect": lambda: by_rows.run(rows, None, table.table, table.inputs),
        "dense": lambda: torch.ops.mkldnn._convolution_pointwise(image, packed, bias, *window, 1, "none", [], ""),
    }
    ways = ["indirect"]
    if winograd.unsupported(weight, *window[1:], 1) is None:
        by_tiles = winograd.Prepared(winograd.pack(weight), epilogue)
        cut = tiles(sites, Window((3, 3), (1, 1), (1, 1)), sites)
        runs["winograd"] = lambda: by_tiles.run(rows, None, cut, len(rows), torch.empty_like(rows))
        ways.append("winograd")
    if _has_spconv():
        runs["spconv"] = lambda: spconv.convolve(padded, weight, bias, 1, table)

    wanted = F.conv2d(image.double(), weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1).flatten(0, 2)
    for name, call in runs.items():
        got = call().permute(0, 2, 3, 1).flatten(0, 2)[sites.index] if name == "dense" else call()
        wrong = (got - wanted[sites.index]).abs().max().item()
        if not wrong <= 1e-4 * wanted.abs().max().item():
            raise RuntimeError(f"{name}, {channels} channels at {size}x{size}, density {density}: error {wrong:.3g}")
    seconds = alternate(runs, repeats=repeats, settle=1)
    ms = {name: quartiles(taken)[1] for name, taken in seconds.items()}
    way = min(ways, key=ms.__getitem__)
    return Point(
        channels=channels,
        size=size,
        density=len(sites) / size**2,
        way=way,
        sparse_ms=ms[way],
        dense_ms=ms["dense"],
        spconv_ms=ms.get("spconv"),
        speedup=gain(seconds["dense"], seconds[way]),
        speedup_spconv=gain(seconds["spconv"], seconds[way]) if "spconv" in seconds else None,
    )


def _has_spconv() -> bool:
    try:
        spconv.load()
    except ImportError:
        return False
    return True


def line(point: Point) -> str:
    """A point in a line."""
    rivals = f"dense {point.dense_ms:.3f} ms ({point.speedup:.2f}×)"
    if point.spconv_ms is not None:
        rivals += f", spconv {point.spconv_ms:.3f} ms ({point.speedup_spconv:.2f}×)"
    return (
        f"{point.channels:3} channels, {point.size}×{point.size}, {point.density:4.0%} active: "
        f"{point.sparse_ms:.3f} ms, {rivals}, efficiency {point.efficiency:.2f}"
    )


def summary(points: Sequence[Point]) -> str:
    """The worst of all, and up to which density skipping pays."""
    middle = [point for point in points if 0.1 <= round(point.density, 2) <= 0.5]
    lines = [
        _worst(
            "lowest efficiency at 10 to 50 %, 128 channels and more",
            "efficiency",
            [p for p in middle if p.channels >= 128],
        ),
        _worst("lowest efficiency at 10 to 50 %, 64 channels", "efficiency", [p for p in middle if p.channels == 64]),
        _worst("lowest speed-up over spconv", "speedup_spconv", points),
    ]
    for size in dict.fromkeys(point.size for point in points):
        ends = [
            f"{max((p.density for p in curve if p.speedup >= 1), default=0):.0%} at {channels} channels"
            for channels, curve in _curves(points, size).items()
        ]
        lines.append(f"{size}×{size}: faster than dense up to {', '.join(ends)}")
    return "\n".join(lines)


def _worst(what: str, attribute: str, points: Sequence[Point]) -> str:
    known = [point for point in points if getattr(point, attribute) is not None]
    if not known:
        return f"{what}: not measured"
    worst = min(known, key=lambda point: getattr(point, attribute))
    value, size = getattr(worst, attribute), worst.size
    return f"{what}: {value:.2f} ({worst.channels} channels, {size}×{size}, {worst.density:.0%})"


def save(points: Sequence[Point], path: Path, command: str) -> None:
    """Write all points as JSON, with the machine, the versions and the command."""
    found = [{**asdict(point), "efficiency": point.efficiency} for point in points]
    path.write_text(json.dumps({"command": command, **environment(), "points": found}, indent=1) + "\n")


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw, for each map size, the speed-ups and the efficiency over density, a curve for each number of channels."""
    with bench_extra():
        from matplotlib.figure import Figure
    quantities = {
        "speedup": "speed-up over dense",
        "speedup_spconv": "speed-up over spconv",
        "efficiency": "efficiency",
    }
    quantities = {name: label for name, label in quantities.items() if getattr(points[0], name) is not None}
    sizes = list(dict.fromkeys(point.size for point in points))
    figure = Figure(figsize=(4 * len(sizes), 3 * len(quantities)), layout="constrained")
    panels: Any = figure.subplots(len(quantities), len(sizes), squeeze=False, sharex=True, sharey="row")
    for line_of_panels, (name, label) in zip(panels, quantities.items(), strict=True):
        line_of_panels[0].set_ylabel(label)
        for axes, size in zip(line_of_panels, sizes, strict=True):
            for channels, curve in _curves(points, size).items():
                values = [getattr(point, name) for point in curve]
                axes.plot([point.density for point in curve], values, marker=".", label=f"{channels} channels")
            axes.axhline(1, color="black", linewidth=0.8, linestyle="--")  # where it breaks even
            axes.grid(alpha=0.3)
            if name != "efficiency":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}×")
    for axes, size in zip(panels[0], sizes, strict=True):
        axes.set_title(f"3×3 convolution on {size}×{size}", fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("share of active pixels")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _curves(points: Sequence[Point], size: int) -> dict[int, list[Point]]:
    """The points of a map size by channels."""
    curves: dict[int, list[Point]] = {}
    for point in points:
        if point.size == size:
            curves.setdefault(point.channels, []).append(point)
    return curves
