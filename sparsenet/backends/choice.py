"""Which way computes a frozen layer, by a short measurement, remembered for the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sparsenet import cache
from sparsenet.timing import Clock, alternate, by_processor

# Alternating rounds of a measurement. The ways of a layer differ by more than a machine drifts within milliseconds, or
# else it does not matter which is taken.
ROUNDS = 5


class Measurements:
    """Milliseconds of each way of each layer that was measured on this machine.

    Args:
        path: the file that remembers them, or `None` for no memory. A file that cannot be read or written is as none:
            what is measured then holds for this object.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.known = {} if path is None else _read(path)
        self._new = False

    def of(self, layer: str, ways: Mapping[str, Callable[[], Tensor]], clock: Clock = by_processor) -> dict[str, float]:
        """Milliseconds by name of way: measured now, unless they are known."""
        found = self.known.get(layer)
        if found is None or set(found) != set(ways):
            seconds = alternate(dict(ways), repeats=ROUNDS, warmup=1, clock=clock)
            found = {name: 1e3 * median(times) for name, times in seconds.items()}
            self.known[layer] = found
            self._new = True
        return found

    def save(self) -> None:
        if self.path is not None and self._new:
            cache.write(self.path, json.dumps(self.known, indent=1).encode())


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What a file remembers, of the right kind only."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    layers = found.items() if isinstance(found, dict) else ()
    return {
        layer: ways
        for layer, ways in layers
        if isinstance(ways, dict) and all(isinstance(ms, float | int) for ms in ways.values())
    }


def of_this_machine(device: torch.device | None = None) -> Measurements:
    """What is remembered under `$XDG_CACHE_HOME/sparsenet` (`~/.cache`), by processor or GPU, threads and PyTorch."""
    of = processor()
    if device is not None and device.type == "cuda":
        of = f"{torch.cuda.get_device_name(device)} {torch.get_float32_matmul_precision()}"
    name = "-".join("".join(letter if letter.isalnum() else " " for letter in of).split())
    return Measurements(cache.folder() / f"{name}-{torch.get_num_threads()}-torch{torch.__version__}.json")


def processor() -> str:
    """The processor's name."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
