"""All checks and benchmarks of a CUDA device, in less than ten minutes, and one JSON of what came of them:

    python tests/gpu/run.py --json gpu.json

Each part runs in a process of its own, with the time that is left to it, and the file is written after each, so that
what was measured before something hangs or fails is kept. `--device cpu` runs the same parts on small sizes where there
is no device, to see that the script works: its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Of them, so many seconds are kept for what is left to write.
RESERVE = 5.0


@dataclass
class Part:
    """A command, the most seconds that it may take, and what came of it.

    Attributes:
        status: "waiting", "passed", "failed", "timed out" or "no time left".
        tail: the last lines that it printed, unless it passed.
        result: the JSON that it wrote.
    """

    name: str
    command: list[str]
    most: float
    status: str = "waiting"
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    result: Any = None


def parts(device: str) -> Iterator[Part]:
    """The checks, and what is measured, the most important first. `{json}` stands for the file that a part writes."""
    checks = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    yield Part("checks", checks, 150)
    if device == "cpu":
        small = ["--size", "64", "--repeats", "2", "--against", "eager", "--json", "{json}"]
        yield _bench("resnet18", "resnet18", "layer1", 0.2, *small)
        yield _sweep(device, dtypes=["float32"], batches=[1], channels=[8], sizes=[9], densities=[0.3], repeats=2)
        return
    for batch in (32, 1):
        yield _ssd(batch, "float16")
    yield _sweep(device, dtypes=["float16"], batches=[32], densities=[0.1, 0.2, 0.5])
    yield _ssd(8, "tf32")
    yield _bench("resnet50", "resnet50", "layer1", 0.25, *f"--size 448 --batch 8 {_CUDA} float16".split())
    yield _sweep(device, dtypes=["tf32"], batches=[8], channels=[128, 512], sizes=[19, 75], densities=[0.1, 0.5])
    yield _ssd(8, "float32")


_CUDA = "--repeats 20 --json {json} --device cuda --dtype"


def _ssd(batch: int, dtype: str) -> Part:
    return _bench(f"SSD300 {batch} {dtype}", "ssd300_vgg16", "pool2", 0.2, *f"--batch {batch} {_CUDA} {dtype}".split())


def _sweep(device: str, **combinations: Any) -> Part:
    return Part("sweep", [str(Path(__file__)), "--sweep", device, "{json}", json.dumps(combinations)], 90)


def _bench(name: str, model: str, at: str, density: float, *options: str) -> Part:
    command = ["-m", "sparsenet.cli", "bench", model, "--at", at, "--density", str(density), *options]
    return Part(name, command, 120)


def run(part: Part, left: float) -> None:
    """Run a part in the time that is left, and keep what came of it."""
    if left <= 0:
        part.status = "no time left"
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "result.json"
        command = [sys.executable, *(str(written) if word == "{json}" else word for word in part.command)]
        with (Path(folder) / "output").open("w+") as output:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=min(left, part.most)
                )
                part.status = "passed" if done.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                part.status = "timed out"
            output.seek(0)
            part.tail = output.read().splitlines()[-1 if part.status == "passed" else -20 :]
        if written.exists():
            part.result = json.loads(written.read_text())
    part.seconds = time.monotonic() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every part passed, 1 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--budget", type=float, default=560.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not _has_cuda():
        parser.error("PyTorch finds no CUDA device here; --device cpu tries the script alone")
    end = time.monotonic() + options.budget - RESERVE
    todo = list(parts(options.device))
    for part in todo:
        run(part, end - time.monotonic())
        print(f"{part.name}: {part.status}, {part.seconds:.0f} s {part.tail[-1] if part.tail else ''}", flush=True)
        _write(options.json, options.device, todo)
    return int(any(part.status != "passed" for part in todo))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _write(path: Path, device: str, todo: list[Part]) -> None:
    from sparsenet.bench import environment

    path.write_text(json.dumps({"asked": device, **environment(), "parts": [asdict(part) for part in todo]}, indent=1))


def sweep(device: str, path: str, combinations: str) -> int:
    """Single convolutions; the file is written after each, so that it holds what was done when the time was up."""
    from sparsenet import device_sweep

    found = []
    for point in device_sweep.run(device, **json.loads(combinations)):
        print(device_sweep.line(point), flush=True)
        found.append({**asdict(point), "of_aim": point.of_aim})
        Path(path).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(sweep(*sys.argv[2:]) if sys.argv[1:2] == ["--sweep"] else main())
