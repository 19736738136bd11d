"""A selective network against dense engines, and spconv: in one process, by alternating runs, each checked first.

`compare` is the benchmark of a whole network; `sparsenet.sweep` is that of single convolutions.
"""

from __future__ import annotations

import copy
import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import coverage
from sparsenet.backends import spconv
from sparsenet.backends.choice import processor
from sparsenet.context import use_backend, use_mask
from sparsenet.engines import CUDA_ENGINES, ENGINES, Run, bench_extra, tensors
from sparsenet.freeze import freeze
from sparsenet.masks import blobs
from sparsenet.record import record
from sparsenet.selector import GivenMask
from sparsenet.sites import Pair
from sparsenet.surgery import example_inputs, plan, selectify
from sparsenet.timing import alternate, clock_of

# What a selective network can be compared with, besides our own dense one: the engines, and itself on spconv, and on
# GPUs on its port to Triton.
SPARSE = ("spconv", "spconv-triton")
RIVALS = (*ENGINES, "spconv")
CUDA_RIVALS = (*CUDA_ENGINES, "spconv", "spconv-triton")
TORCH = ("eager", "cudnn", "cudnn-graph", "compile")
# What a network can compute in: its tensors' dtype, and whether products of float32 may be rounded to TF32.
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "openvino", "llvmlite", "triton")
SPCONVS = ("spconv-cu120", "spconv-cu126", "spconv-triton")


@dataclass(frozen=True)
class Comparison:
    """What a network takes when only the pixels of a mask are computed, and when all are.

    Contenders: "sparse", the frozen selective network; "dense", the frozen original (both as CUDA graphs on a CUDA
    device, where the sparse one has a capacity of the density); those of `RIVALS`, or of `CUDA_RIVALS`, that were asked
    for. "spconv" is the frozen selective network on that backend, "spconv-triton" the same with that package's kernels;
    neither is a dense engine.

    Attributes:
        model: its name; `at`, the stage as asked for, and `stage`, its module path.
        size: (H, W) of the images, `batch` of them in a call.
        density: share of active pixels at the stage, as asked for; `density_met`, as it is.
        repeats: timed calls of each contender.
        ms: by contender, the median of a call; `quartiles`, the first and the third.
        speedup: by contender, how many times as fast as it the sparse one is: the median of the rounds' ratios.
        macs: multiply-accumulates of the selective network with this mask, and `dense_macs`, of the original.
        device, dtype: "cpu" or "cuda", and a name of `DTYPES`.
        best: the dense contender that the sparse one gains least over; `best_torch`, that of PyTorch's own.
        failures: by contender, why it takes no part: what it raised, or how wrong its output was.
    """

    model: str
    at: str
    stage: str
    batch: int
    size: Pair
    density: float
    density_met: float
    threads: int
    repeats: int
    ms: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    speedup: dict[str, float]
    macs: int
    dense_macs: int
    failures: dict[str, str]
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def macs_ratio(self) -> float:
        return self.dense_macs / self.macs

    @property
    def best(self) -> str | None:
        return self._best(("dense", *ENGINES, *CUDA_ENGINES))

    @property
    def best_torch(self) -> str | None:
        return self._best(TORCH)

    @property
    def realised_fraction(self) -> float | None:
        """How much of what the mask saves of the arithmetic is saved of the time, against the best dense contender."""
        return self._realised(self.best)

    @property
    def realised_fraction_torch(self) -> float | None:
        """The same against the best of PyTorch's own; `None` where neither took part."""
        return self._realised(self.best_torch)

    def _best(self, names: Sequence[str]) -> str | None:
        return min((name for name in names if name in self.speedup), key=self.speedup.__getitem__, default=None)

    def _realised(self, name: str | None) -> float | None:
        return None if name is None else self.speedup[name] / self.macs_ratio

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a head, and a row for each contender."""
        rows: list[tuple[str, ...]] = [("contender", "ms", "quartiles", "sparse is faster by", "realised")]
        for name, ms in self.ms.items():
            low, high = self.quartiles[name]
            row = (name, f"{ms:.2f}", f"{low:.2f} – {high:.2f}")
            faster = f"{self.speedup[name]:.2f}×" if name in self.speedup else ""
            realised = f"{self._realised(name):.2f}" if name in self.speedup and name not in SPARSE else ""
            rows.append((*row, faster, realised))
        return rows + [(name, "–", reason, "", "") for name, reason in self.failures.items()]

    @property
    def _where(self) -> str:
        return f"{self.threads} threads" if self.device == "cpu" else f"{self.dtype} on {self.device}"

    def summary(self) -> str:
        """What was compared, and what came of it, in words."""
        realised = [
            f"{share:.2f} of it realised against {name}"
            for name, share in ((self.best, self.realised_fraction), (self.best_torch, self.realised_fraction_torch))
            if name is not None and share is not None
        ]
        height, width = self.size
        return (
            f"{self.model}, {self.batch} × {height}×{width}, {self.density_met:.1%} active at {self.at} "
            f"({self.stage}), {self._where}, {self.repeats} rounds\n"
            f"MACs ratio {self.macs_ratio:.2f} ({self.macs / 1e6:.0f} of {self.dense_macs / 1e6:.0f} MMACs)"
            + "".join(f"; {each}" for each in dict.fromkeys(realised))
        )

    def save(self, path: Path, command: str) -> None:
        """Write everything as JSON, with the machine, the versions and the command."""
        found = {
            **asdict(self),
            "macs_ratio": self.macs_ratio,
            "best": self.best,
            "best_torch": self.best_torch,
            "realised_fraction": self.realised_fraction,
            "realised_fraction_torch": self.realised_fraction_torch,
        }
        path.write_text(json.dumps({"command": command, **environment(), **found}, indent=1) + "\n")

    def plot(self, path: Path) -> None:
        """Draw the milliseconds as bars, with their quartiles."""
        with bench_extra():
            from matplotlib.figure import Figure
        names, values = list(self.ms), list(self.ms.values())
        spread = [
            [value - self.quartiles[name][0] for name, value in self.ms.items()],
            [self.quartiles[name][1] - value for name, value in self.ms.items()],
        ]
        figure = Figure(figsize=(1.2 * len(names) + 1.5, 3.5), layout="constrained")
        axes = figure.subplots()
        colours = ["tab:orange" if name == "sparse" else "tab:gray" for name in names]
        bars = axes.bar(names, values, yerr=spread, color=colours, capsize=3)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
        axes.margins(y=0.15)
        axes.set_ylabel("milliseconds")
        axes.set_title(f"{self.model}, {self.density_met:.0%} active at {self.at}", fontsize="medium")
        figure.savefig(path, dpi=150)


def compare(
    name: str,
    at: str,
    density: float,
    *,
    size: int | None = None,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 20,
    against: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Comparison:
    """Time a model of torchvision or timm, with random weights, on random images and a mask of blobs.

    Of a one-stage detector the network is timed: what lies between the images' transform and the post-processing.

    Args:
        name: as `sparsenet.coverage.named` takes it; `at`, as `selectify` does.
        density: share of active pixels at the stage.
        size: of the square images; by default that of the model's family.
        threads: of every contender; by default as many as PyTorch has.
        repeats: timed calls of each contender.
        against: some of `RIVALS`, or of `CUDA_RIVALS`; by default all.
        device: "cpu" or "cuda", where the clock is CUDA events.
        dtype: a name of `DTYPES`; on CPU "float32" alone.

    Raises:
        ValueError: for what is unknown or out of range, two-stage detectors, and "cuda" where there is none.
        RuntimeError: if the sparse network itself fails, or is wrong.
    """
    place = device_of(device, dtype)
    rivals = CUDA_RIVALS if device == "cuda" else RIVALS
    against = rivals if against is None else against
    unknown = [rival for rival in against if rival not in rivals]
    if unknown:
        raise ValueError(f"unknown engine {', '.join(unknown)}: choose among {', '.join(rivals)}")
    for what, value in (("size", size), ("batch", batch), ("threads", threads), ("repeats", repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, not {value}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0, and 1 at most, not {density}")
    graph = device == "cuda"
    engines = CUDA_ENGINES if graph else ENGINES
    with using_threads(threads), computing_in(dtype):
        torch.manual_seed(0)
        network, images = network_of(coverage.named(name).eval(), size, batch)
        network, images = network.to(place, DTYPES[dtype][0]), images.to(place, DTYPES[dtype][0])
        capacity = density if graph else None
        selective = selectify(network, at, selector=GivenMask(), example_inputs=images, capacity=capacity)
        found = plan(selective)
        mask = blobs(batch, found.size, density).to(place)
        with torch.no_grad(), use_mask(mask), record(selective) as rec:
            selective(images)
        makers: dict[str, Callable[[], Run]] = {
            "sparse": lambda: _frozen(selective, images, mask, cuda_graph=graph),
            "dense": lambda: _frozen(network, images, cuda_graph=graph),
            **{rival: _bound(engines[rival], network, images) for rival in against if rival in engines},
        }
        if "spconv" in against:
            makers["spconv"] = lambda: _frozen(selective, images, mask, backend="spconv")
        if "spconv-triton" in against:
            makers["spconv-triton"] = lambda: _ported(lambda: _frozen(selective, images, mask, backend="spconv"))
        runs, failures = _prepared(makers, _Truth.of(network, images), _Truth.of(selective, images, mask))
        if "sparse" in failures:
            raise RuntimeError(f"the sparse network takes no part: {failures['sparse']}")
        seconds = alternate(runs, repeats=repeats, settle=1, clock=clock_of(place))
        cuts = {run: quartiles(taken) for run, taken in seconds.items()}
        return Comparison(
            model=name,
            at=at,
            stage=found.stage,
            batch=batch,
            size=(images.shape[2], images.shape[3]),
            density=density,
            density_met=mask.float().mean().item(),
            threads=torch.get_num_threads(),
            repeats=repeats,
            ms={run: middle for run, (_, middle, _) in cuts.items()},
            quartiles={run: (low, high) for run, (low, _, high) in cuts.items()},
            speedup={run: gain(taken, seconds["sparse"]) for run, taken in seconds.items() if run != "sparse"},
            macs=rec.macs,
            dense_macs=rec.dense_macs,
            failures=failures,
            device=device,
            dtype=dtype,
        )


def device_of(device: str, dtype: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: where it is unknown or not there, or computes nothing of the dtype here.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"PyTorch {torch.__version__} finds no CUDA device here: measure on cpu")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if device == "cpu" and dtype != "float32":
        raise ValueError(f"the engines compute in float32 on a CPU: measure {dtype} on cuda")
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Inside, products of float32 are rounded to TF32 on CUDA devices if the dtype is "tf32", and are not otherwise."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = DTYPES[dtype][1]
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """The first, the second and the third, in milliseconds."""
    ms = 1e3 * torch.tensor(seconds, dtype=torch.float64)
    low, middle, high = ms.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return low, middle, high


def gain(slow: list[float], fast: list[float]) -> float:
    """How many times as fast: the median of the ratios of what was measured next to each other."""
    return median(one / other for one, other in zip(slow, fast, strict=True))


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Inside, PyTorch has so many threads; `None` for as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """The machine, and the versions of what is compared."""
    versions: dict[str, str | None] = {}
    for package in (*PACKAGES, *SPCONVS):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(0)
        machine |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {"machine": machine, "versions": versions}


# -- the contenders --------------------------------------------------------------------------------------------


class DetectorNetwork(nn.Module):
    """A one-stage detector of torchvision between the transform of its images and its post-processing, which no engine
    takes whole: normalised images (N, 3, H, W) to what the head gives. Paths are the detector's."""

    def __init__(self, detector: Any):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head

    def forward(self, images: Tensor) -> Any:
        maps = self.backbone(images)
        return self.head([maps] if isinstance(maps, Tensor) else list(maps.values()))


def network_of(model: nn.Module, size: int | None, batch: int) -> tuple[nn.Module, Tensor]:
    """What is timed of a model, on which images. Its random weights are made to behave like trained ones."""
    example = example_inputs(model)
    if hasattr(model, "rpn"):
        raise ValueError("a two-stage detector chooses what its second stage computes, and no engine takes it whole")
    if isinstance(example, list):
        model, example = DetectorNetwork(model).eval(), example[0][None]
    channels, height, width = example.shape[1:]
    images = torch.rand(batch, channels, size or height, size or width)
    with torch.no_grad():
        coverage.enliven(model, images[:1])
    return model, images


def _frozen(
    network: nn.Module, images: Tensor, mask: Tensor | None = None, backend: str = "auto", cuda_graph: bool = False
) -> Run:
    with _masked(mask):
        frozen = freeze(network, images, backend=backend, cuda_graph=cuda_graph)

    @torch.inference_mode()
    def run() -> list[Tensor]:
        return _called(frozen, images, mask)

    return run


def _called(network: nn.Module, images: Tensor, mask: Tensor | None) -> list[Tensor]:
    with _masked(mask):
        return tensors(network(images))


def _masked(mask: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if mask is None else use_mask(mask)


def _bound(engine: Callable[[nn.Module, Tensor], Run], network: nn.Module, images: Tensor) -> Callable[[], Run]:
    return lambda: engine(network, images)


@dataclass(frozen=True)
class _Truth:
    """A network's output by its slow and obvious meaning in float64, and how wrong float32 may be."""

    output: list[Tensor]
    allowed: float

    @staticmethod
    def of(network: nn.Module, images: Tensor, mask: Tensor | None = None) -> _Truth:
        with torch.no_grad(), use_backend("reference"):
            single = _called(network, images, mask)
            output = _called(copy.deepcopy(network).double(), images.double(), mask)
        return _Truth(output, coverage.FACTOR * coverage.own_error(single, output))


def reason_of(error: Exception) -> str:
    """What was raised, and where, in a line."""
    (*_, place) = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0] + f" ({Path(place.filename).name}:{place.lineno})"


def _ported(make: Callable[[], Run]) -> Run:
    """A run on the backend spconv, computed by spconv-triton."""
    with spconv.ported():
        run = make()

    def ported() -> Any:
        with spconv.ported():
            return run()

    return ported


def _prepared(
    makers: dict[str, Callable[[], Run]], dense: _Truth, masked: _Truth
) -> tuple[dict[str, Run], dict[str, str]]:
    """The contenders that can take the network and compute it rightly, and the reasons of the others."""
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        truth = masked if name in ("sparse", *SPARSE) else dense
        try:
            run = make()
            wrong = coverage.gap(run(), truth.output)
        except Exception as error:  # whatever an engine raises is why it cannot take the network
            failures[name] = reason_of(error)
            continue
        if wrong <= truth.allowed:
            runs[name] = run
        else:
            failures[name] = f"wrong output: error {wrong:.3g}, allowed {truth.allowed:.3g}"
    return runs, failures
