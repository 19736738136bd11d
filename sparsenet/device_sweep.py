"""Single masked 3×3 convolutions on a device against the dense one, as a network's layers meet them: of fixed shapes,
several to a kernel map, and recorded as CUDA graphs."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet import backends
from sparsenet.backends import triton
from sparsenet.backends.epilogue import Epilogue
from sparsenet.bench import DTYPES, computing_in, device_of, environment, gain, quartiles, reason_of
from sparsenet.cuda_graph import CudaGraph
from sparsenet.masks import blobs
from sparsenet.selector.levels import GivenLevels, active_count
from sparsenet.sites import ActiveSites, KernelMap, Window, kernel_map
from sparsenet.timing import alternate, clock_of

CHANNELS = (128, 256, 512)
SIZES = (19, 38, 75)
BATCHES = (8, 32)
DENSITIES = (0.1, 0.2, 0.3, 0.5)
# Convolutions for each kernel map, whose time is theirs too: as many as VGG has of its larger sizes, and one more.
LAYERS = 4
# What a layer is to take at most: so many times the active share of the dense time, and milliseconds for its call.
AIM, CALL = 1.6, 0.01


@dataclass(frozen=True)
class DevicePoint:
    """One convolution of `channels` to as many, on a batch of square maps.

    Attributes:
        ms: by contender, the median of a layer's time, with its share of the kernel map: "dense", cuDNN's channels
            last, our backends by name, "spconv-triton".
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
        """What each takes, by what it is to take at most: 1 and less is enough."""
        aim = AIM * self.ms["dense"] * self.density + CALL
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
    counts = [active_count(density, (size, size))] * batch
    sites = ActiveSites(mask, counts)
    random = functools.partial(torch.randn, dtype=torch.float64, device=device)
    image = random(batch, channels, size, size) * mask[:, None]
    weight, bias = random(channels, channels, 3, 3) * (9 * channels) ** -0.5, random(channels)
    wanted = F.conv2d(image, weight, bias, padding=1).permute(0, 2, 3, 1).flatten(0, 2)[sites.index]

    image = image.to(kind, memory_format=torch.channels_last)
    weight, bias = weight.to(kind, memory_format=torch.channels_last), bias.to(kind)
    rows = image.permute(0, 2, 3, 1).flatten(0, 2)[sites.index]
    layer = _Layer(rows, weight, bias, mask, counts)
    makers: dict[str, Callable[[], Layers]] = {
        "dense": lambda: lambda: (F.conv2d(image, weight, bias, padding=1) for _ in range(LAYERS)),
        "triton": lambda: _triton(layer),
        "rows": lambda: _backend("rows", layer),
        "spconv": lambda: _backend("spconv", layer),
        "spconv-triton": lambda: _submanifold(layer, dtype == "tf32"),
    }
    runs: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    allowed = float("inf")  # of the dense one, which is the measure of the others
    for name, make in makers.items():
        try:
            layers = make()
            found = next(layers()).double()
            found = found.permute(0, 2, 3, 1).flatten(0, 2)[sites.index] if name == "dense" else found
            wrong = (found - wanted).abs().max().item()
            if not wrong <= allowed:
                raise RuntimeError(f"error {wrong:.3g}, allowed {allowed:.3g}")
            run = functools.partial(_exhausted, layers)
            runs[name] = _recorded(run) if recordable(device) else run
        except Exception as error:  # whatever a contender raises is why it takes no part
            failures[name] = reason_of(error)
            continue
        if name == "dense":
            allowed = 4 * max(wrong, torch.finfo(kind).eps * wanted.abs().max().item())
    seconds = alternate(runs, repeats=repeats, settle=1, clock=clock_of(device))
    ms = {name: quartiles(taken)[1] / LAYERS for name, taken in seconds.items()}
    speedup = {name: gain(seconds["dense"], taken) for name, taken in seconds.items() if name != "dense"}
    return DevicePoint(dtype, batch, channels, size, len(sites) / mask.numel(), ms, speedup, failures)


# -- the contenders: each call gives the results of so many layers, one after the other --------------------------

Layers = Callable[[], Iterator[Tensor]]


def _exhausted(layers: Layers) -> Tensor:
    *_, last = layers()
    return last


class _Layer(NamedTuple):
    """A masked convolution: rows (n, C) and weight (O, C, 3, 3), and the mask, bool (N, H, W), with so many pixels
    active in each image, by which its kernel map is made."""

    rows: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor
    counts: list[int]

    def kernel_map(self) -> KernelMap:
        sites = ActiveSites(self.mask, self.counts)
        return kernel_map(sites, Window((3, 3), (1, 1), (1, 1)), sites)


def _triton(layer: _Layer) -> Layers:
    """As frozen layers run."""
    reason = triton.unsupported(layer.weight, 1)
    if reason is not None:
        raise RuntimeError(reason)
    packed, epilogue = triton.pack(layer.weight, 1), Epilogue(shift=layer.bias)

    def layers() -> Iterator[Tensor]:
        known = layer.kernel_map()
        for _ in range(LAYERS):
            yield triton.run(layer.rows, packed, epilogue, known.table, known.inputs)

    return layers


def _backend(name: str, layer: _Layer) -> Layers:
    backends.check(name)
    used, reason = backends.choose(name, layer.weight, 1)
    if reason is not None:
        raise RuntimeError(reason)
    padded = F.pad(layer.rows, (0, 0, 0, 2))

    def layers() -> Iterator[Tensor]:
        known = layer.kernel_map()
        for _ in range(LAYERS):
            yield backends.convolve(used, padded, layer.weight, layer.bias, 1, known)

    return layers


def _submanifold(layer: _Layer, tf32: bool) -> Layers:
    """A submanifold layer of spconv's interface on the same sites, its pairs found in every call."""
    try:
        library: Any = importlib.import_module("spconv_triton.pytorch")
    except ImportError as error:
        raise ImportError(
            f"the package spconv-triton could not be imported ({error}): pip install spconv-triton"
        ) from error
    importlib.import_module("spconv_triton").constants.SPCONV_ALLOW_TF32 = tf32
    rows, weight, bias, mask, counts = layer
    sites = ActiveSites(mask, counts)
    height, width = sites.size
    place = torch.stack([sites.image, sites.pixel // width, sites.pixel % width], 1).int()
    module = library.SubMConv2d(len(weight), len(weight), 3, padding=1, indice_key="sites").to(rows.device, rows.dtype)
    module.eval().weight.copy_(weight.permute(0, 2, 3, 1).reshape(module.weight.shape))
    module.bias.copy_(bias)

    def layers() -> Iterator[Tensor]:
        known = library.SparseConvTensor(rows, place, [height, width], len(mask))
        for _ in range(LAYERS):
            known = module(known.replace_feature(rows))
            yield known.features

    return layers


def recordable(device: torch.device) -> bool:
    """Whether calls are recorded as CUDA graphs there."""
    return device.type == "cuda"


def _recorded(call: Callable[[], Tensor]) -> Callable[[], Any]:
    """As a CUDA graph, or as it is where it cannot be one."""
    recording = CudaGraph()
    try:
        recording.capture(call)
    except RuntimeError:
        return call
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


def save(points: Sequence[DevicePoint], path: Path, command: str) -> None:
    """Write all points as JSON, with the machine, the versions and the command; a file is replaced at once."""
    found = [{**asdict(point), "of_aim": point.of_aim} for point in points]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"command": command, **environment(), "points": found}, indent=1) + "\n")
    partial.replace(path)
