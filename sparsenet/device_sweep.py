"""Single masked 3×3 convolutions on a device against the dense one, as a network's layers meet them: of fixed shapes,
and recorded as CUDA graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet import backends
from sparsenet.bench import DTYPES, computing_in, device_of, gain, quartiles
from sparsenet.cuda_graph import CudaGraph
from sparsenet.masks import blobs
from sparsenet.selector.levels import GivenLevels, active_count
from sparsenet.sites import ActiveSites, KernelMap, Window, kernel_map
from sparsenet.timing import alternate, clock_of

CHANNELS = (128, 256, 512)
SIZES = (19, 38, 75)
BATCHES = (8, 32)
DENSITIES = (0.1, 0.2, 0.3, 0.5)
# Milliseconds that a call may take by itself, beside the active share of the dense time.
CALL = 0.01


@dataclass(frozen=True)
class DevicePoint:
    """One convolution of `channels` to as many, on a batch of square maps.

    Attributes:
        ms: by contender, the median of a call: "dense", cuDNN's channels last, our backends by name, "spconv-triton".
        speedup: by contender, how many times as fast as the dense one.
        failures: by contender, why it takes no part.
    """

    dtype: str
    batch: int
    channels: int
    size: int
    density: float
    ms: dict[str, float]
    speedup: dict[str, float]
    failures: dict[str, str]

    @property
    def of_aim(self) -> dict[str, float]:
        """What each takes, by the active share of the dense time and one call."""
        aim = self.ms["dense"] * self.density + CALL
        return {name: ms / aim for name, ms in self.ms.items() if name != "dense"}


def run(
    device: str,
    *,
    dtypes: Sequence[str] = ("float16", "tf32"),
    batches: Sequence[int] = BATCHES,
    channels: Sequence[int] = CHANNELS,
    sizes: Sequence[int] = SIZES,
    densities: Sequence[float] = DENSITIES,
    repeats: int = 10,
) -> Iterator[DevicePoint]:
    """Time every combination, one after the other.

    Raises:
        ValueError: where there is no such device.
    """
    for dtype in dtypes:
        place = device_of(device, dtype)
        for batch in batches:
            for size in sizes:
                for width in channels:
                    for density in densities:
                        with computing_in(dtype), torch.inference_mode():
                            yield _point(place, dtype, batch, width, size, density, repeats)


def _point(
    device: torch.device, dtype: str, batch: int, channels: int, size: int, density: float, repeats: int
) -> DevicePoint:
    torch.manual_seed(0)
    kind = DTYPES[dtype][0]
    mask = GivenLevels(blobs(batch, (size, size), density).to(device), density).mask((size, size))
    sites = ActiveSites(mask, [active_count(density, (size, size))] * batch)
    image = torch.randn(batch, channels, size, size, dtype=torch.float64).to(device) * mask[:, None]
    weight = (torch.randn(channels, channels, 3, 3, dtype=torch.float64) * (9 * channels) ** -0.5).to(device)
    bias = torch.randn(channels, dtype=torch.float64).to(device)
    wanted = F.conv2d(image, weight, bias, padding=1).permute(0, 2, 3, 1).flatten(0, 2)[sites.index]

    image = image.to(kind, memory_format=torch.channels_last)
    weight, bias = weight.to(kind, memory_format=torch.channels_last), bias.to(kind)
    rows = image.permute(0, 2, 3, 1).flatten(0, 2)[sites.index]
    table = kernel_map(sites, Window((3, 3), (1, 1), (1, 1)), sites)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "dense": lambda: lambda: F.conv2d(image, weight, bias, padding=1),
        **{name: _backend(name, rows, weight, bias, table) for name in ("triton", "rows") if name in backends.NAMES},
        "spconv-triton": lambda: _submanifold(rows, weight, bias, sites),
    }
    runs: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    allowed = float("inf")  # of the dense one, which is the measure of the others
    for name, make in makers.items():
        try:
            call = make()
            found = call().double()
            found = found.permute(0, 2, 3, 1).flatten(0, 2)[sites.index] if name == "dense" else found
            wrong = (found - wanted).abs().max().item()
            if not wrong <= allowed:
                raise RuntimeError(f"error {wrong:.3g}, allowed {allowed:.3g}")
            runs[name] = _recorded(call) if device.type == "cuda" else call
        except Exception as error:  # whatever a contender raises is why it takes no part
            failures[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            continue
        if name == "dense":
            allowed = 4 * max(wrong, torch.finfo(kind).eps * wanted.abs().max().item())
    seconds = alternate(runs, repeats=repeats, settle=1, clock=clock_of(device))
    ms = {name: quartiles(taken)[1] for name, taken in seconds.items()}
    speedup = {name: gain(seconds["dense"], taken) for name, taken in seconds.items() if name != "dense"}
    return DevicePoint(dtype, batch, channels, size, len(sites) / mask.numel(), ms, speedup, failures)


def _backend(
    name: str, rows: Tensor, weight: Tensor, bias: Tensor, table: KernelMap
) -> Callable[[], Callable[[], Tensor]]:
    def make() -> Callable[[], Tensor]:
        used, reason = backends.choose(name, weight, 1)
        if reason is not None:
            raise RuntimeError(reason)
        padded = F.pad(rows, (0, 0, 0, 2))
        return lambda: backends.convolve(used, padded, weight, bias, 1, table)

    return make


def _submanifold(rows: Tensor, weight: Tensor, bias: Tensor, sites: ActiveSites) -> Callable[[], Tensor]:
    """A submanifold layer of spconv's interface on the same sites, their pairs found before the clock runs."""
    library: Any = importlib.import_module("spconv_triton.pytorch")
    height, width = sites.size
    place = torch.stack([sites.image, sites.pixel // width, sites.pixel % width], 1).int()
    layer = library.SubMConv2d(len(weight), len(weight), 3, padding=1, indice_key="sites").to(rows.device, rows.dtype)
    layer.weight.copy_(weight.permute(0, 2, 3, 1).reshape(layer.weight.shape))
    layer.bias.copy_(bias)
    known = layer(library.SparseConvTensor(rows, place, [height, width], len(sites.mask)))
    return lambda: layer(known.replace_feature(rows)).features


def _recorded(call: Callable[[], Tensor]) -> Callable[[], None]:
    """As a CUDA graph, or as it is where it cannot be one."""
    recording = CudaGraph()
    try:
        recording.capture(call)
    except RuntimeError:
        return lambda: (call(), None)[1]
    return recording.replay


def line(point: DevicePoint) -> str:
    """A point in a line."""
    contenders = ", ".join(
        f"{name} {point.ms[name]:.3f} ms ({times:.2f}×, {point.of_aim[name]:.2f} of the aim)"
        for name, times in point.speedup.items()
    )
    return (
        f"{point.dtype}, {point.batch} × {point.size}×{point.size}, {point.channels} channels, {point.density:4.0%} "
        f"active: dense {point.ms['dense']:.3f} ms, {contenders}"
    )
