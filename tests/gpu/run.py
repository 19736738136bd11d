"""All checks and benchmarks of a CUDA device, in less than ten minutes, and one JSON of what came of them:

    python tests/gpu/run.py --json gpu.json

Each part runs in a process of its own, with the time that is left to it, and the file is written before and after each,
so that what was measured before something hangs or fails is kept. `--device cpu` runs the same parts where there is no
device: on small sizes, with the CPU in its place (see `pretend.py`), to see that the script and what it calls work. Its
times say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Of them, so many seconds are kept for what is left to write.
RESERVE = 5.0
# Contenders that are no dense engines.
SPARSE = ("spconv", "spconv-triton")
# Lines of what a part printed, if it did not pass: a test's failure, or a traceback.
TAIL = 80


@dataclass
class Part:
    """A command, the most seconds that it may take, and what came of it.

    Attributes:
        command: in which `{json}` stands for the file that the part writes.
        missing: why it cannot run here, or empty.
        status: "waiting", "running", "passed", "failed", "timed out", "no time left" or "not here".
        tail: the last lines that it printed.
        result: the JSON that it wrote.
    """

    name: str
    command: list[str]
    most: float
    missing: str = ""
    status: str = "waiting"
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    result: Any = None


def parts(device: str) -> Iterator[Part]:
    """The checks, and what is measured, the most important first."""
    small = device == "cpu"
    yield _tests("kernels", small, 100, "tests/test_triton.py", "many_programs" if small else "not compile")
    yield _tests("networks", small, 110, "tests/gpu", "test_capacity or test_cuda")
    # What compiles for minutes is compared with by itself, so that the rest has been measured before.
    quick, slow = "cudnn,cudnn-graph,spconv,spconv-triton", "cudnn-graph" if small else "compile"
    yield _network(small, "ssd300_vgg16", "pool2", 0.2, 32, "float16", quick, 200)
    yield _network(small, "ssd300_vgg16", "pool2", 0.2, 1, "float16", quick, 60)
    yield _sweep(small, 100, dtypes=["float16"], batches=[32], sizes=[38, 75, 19], densities=[0.2, 0.1, 0.5])
    yield _network(small, "ssd300_vgg16", "pool2", 0.2, 32, "float16", slow, 150)
    yield _sanitized(small)
    tf32 = {"dtypes": ["tf32"], "batches": [8], "channels": [256, 512], "sizes": [38, 75], "densities": [0.1, 0.5]}
    yield _sweep(small, 60, **tf32)
    yield _network(small, "ssd300_vgg16", "pool2", 0.2, 8, "tf32", quick, 80)
    yield _network(small, "resnet50", "layer1", 0.25, 8, "float16", quick, 80, size=448)
    yield _network(small, "ssd300_vgg16", "pool2", 0.2, 8, "float32", quick, 80)


def _tests(name: str, small: bool, most: float, path: str, chosen: str) -> Part:
    several = ["-n", "8"] if importlib.util.find_spec("xdist") and not small else []
    report = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    return Part(name, [sys.executable, "-m", "pytest", *report, *several, path, "-k", chosen], most)


def _sanitized(small: bool) -> Part:
    """Every kernel under NVIDIA's compute-sanitizer: none reads or writes what is not its own."""
    chosen = "many_programs or images_that_follow or part_of_wider_ones or sites_and_kernel_maps"
    found = _tests("compute-sanitizer", True, 90, "tests/test_triton.py", "images_that_follow" if small else chosen)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        found.missing = "" if small else "compute-sanitizer is not on the PATH, nor in /usr/local/cuda/bin"
    elif not small:
        found.command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *found.command]
    return found


def _network(
    small: bool, model: str, at: str, density: float, batch: int, dtype: str, against: str, most: float, size: int = 0
) -> Part:
    name = f"{model} {batch} {dtype} against {against}"
    repeats = 20
    if small:
        model, at, size, batch, repeats = "timm:test_resnet", "layer1", 64, min(batch, 2), 1
    command = ["-m", "sparsenet.cli", "bench", model, "--at", at, "--density", str(density), "--batch", str(batch)]
    command += ["--repeats", str(repeats), "--json", "{json}", "--device", "cuda", "--dtype", dtype]
    command += ["--against", against, *(["--size", str(size)] if size else [])]
    return Part(name, [sys.executable, *_with(small), *command], most)


def _sweep(small: bool, most: float, **combinations: Any) -> Part:
    if small:
        combinations |= {"batches": [2], "channels": [16], "sizes": [9], "densities": [0.3], "repeats": 1}
    command = [str(Path(__file__)), "--sweep", "{json}", json.dumps(combinations)]
    return Part(f"layers {combinations['dtypes'][0]}", [sys.executable, *_with(small), *command], most)


def _with(small: bool) -> list[str]:
    return [str(Path(__file__).with_name("pretend.py"))] if small else []


def run(part: Part, left: float, environment: dict[str, str] | None = None) -> None:
    """Run a part in the time that is left, and keep what came of it."""
    if part.missing or left <= 0:
        part.status, part.tail = ("not here", [part.missing]) if part.missing else ("no time left", [])
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        command = [str(written) if word == "{json}" else word for word in part.command]
        with (Path(folder) / "output").open("w+", errors="replace") as output:
            try:
                part.status = _ended(command, output, min(left, part.most), environment)
            except OSError as error:
                part.status = "failed"
                output.write(str(error))
            output.seek(0)
            part.tail = output.read().splitlines()[-1 if part.status == "passed" else -TAIL :]
        with suppress(OSError, ValueError):  # not written, or not to its end
            part.result = json.loads(written.read_text())
    part.seconds = time.monotonic() - start


def _ended(command: list[str], output: Any, most: float, environment: dict[str, str] | None) -> str:
    """How a command ended. With it end the processes that it has started, such as compilers."""
    settings: dict[str, Any] = {"cwd": ROOT, "stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **settings)
    try:
        return "passed" if process.wait(most) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# -- what is to be reached ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """What is to be reached: at least, or at most, so much of a value; `met` is `None` where nothing was measured."""

    name: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


def aims(done: Sequence[Part]) -> list[Aim]:
    """What the issue asks of a device, and what came of it: of several values the worst."""
    networks = [part for part in done if part.name.startswith("ssd300_vgg16 ") and part.result]
    points = [point for part in done if part.name.startswith("layers") for point in part.result or []]

    def realised() -> Iterator[float]:
        for part in networks:
            if part.name.startswith("ssd300_vgg16 32 float16") and part.result["realised_fraction_torch"]:
                yield part.result["realised_fraction_torch"]

    def alone() -> Iterator[float]:
        for part in networks:
            if part.name.startswith("ssd300_vgg16 1 "):
                yield from (times for name, times in part.result["speedup"].items() if name not in SPARSE)

    def over(rival: str) -> Iterator[float]:
        return (point["ms"][rival] / point["ms"]["triton"] for point in points if {rival, "triton"} <= set(point["ms"]))

    found = [
        Aim("SSD300, batch 32, float16: realised fraction", min(realised(), default=None), least=0.6),
        Aim("SSD300, batch 1: times as fast as dense", min(alone(), default=None), least=1.0),
        Aim(
            "layers: time, by 1.6 of the active share of cuDNN's and 10 us",
            max((point["of_aim"]["triton"] for point in points if "triton" in point["of_aim"]), default=None),
            most=1.0,
        ),
        *(
            Aim(f"layers: times as fast as {rival}", min(over(rival), default=None), least=1.5)
            for rival in ("spconv", "spconv-triton")
        ),
    ]
    for name in ("kernels", "networks", "compute-sanitizer"):
        ran = [part.status == "passed" for part in done if part.name == name and part.status in ("passed", "failed")]
        found.append(Aim(f"{name}: passed", float(ran[0]) if ran else None, least=1.0))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every part passed, 1 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--budget", type=float, default=560.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget - RESERVE
    if options.device == "cuda" and not _has_cuda():
        parser.error("PyTorch finds no CUDA device here; --device cpu tries the script alone")
    interpret = "0" if options.device == "cuda" else "1"
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "HYPOTHESIS_PROFILE": "device"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    todo = list(parts(options.device))
    with importable():
        for part in todo:
            part.status = "running"
            _write(options.json, options.device, todo)
            run(part, end - time.monotonic(), environment)
            print(f"{part.name}: {part.status}, {part.seconds:.0f} s {part.tail[-1] if part.tail else ''}", flush=True)
            _write(options.json, options.device, todo)
    for aim in aims(todo):
        print(f"{aim.name}: {'not measured' if aim.value is None else f'{aim.value:.3f}'}, met: {aim.met}", flush=True)
    return int(any(part.status != "passed" for part in todo))


@contextmanager
def importable(root: Path = ROOT) -> Iterator[None]:
    """Inside, a checkout that is not installed has `sparsenet.adapters` too, which lies beside it: by a link."""
    sys.path.insert(0, str(root))
    if importlib.util.find_spec("sparsenet.adapters") is not None:
        yield
        return
    link = root / "sparsenet" / "adapters"
    link.symlink_to(root / "adapters")
    try:
        yield
    finally:
        link.unlink()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _write(path: Path, device: str, todo: list[Part]) -> None:
    from sparsenet.bench import environment

    reached = [{**asdict(aim), "met": aim.met} for aim in aims(todo)]
    found = {"asked": device, **environment(), "aims": reached, "parts": [asdict(part) for part in todo]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(path)


def sweep(path: str, combinations: str) -> int:
    """Single convolutions; the file is written after each, so that it holds what was done when the time was up."""
    from sparsenet import device_sweep

    found = []
    for point in device_sweep.run("cuda", **json.loads(combinations)):
        print(device_sweep.line(point), flush=True)
        found.append({**asdict(point), "of_aim": point.of_aim})
        partial = Path(path).with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(sweep(*sys.argv[2:]) if sys.argv[1:2] == ["--sweep"] else main())
