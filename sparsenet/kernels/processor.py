"""What kernels must know of the processor that they are made for."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import NamedTuple


class Processor(NamedTuple):
    """A processor.

    Attributes:
        bytes: in a vector register.
        registers: how many vector registers there are.
        identity: all that decides which machine code LLVM makes for it; `None` where only LLVM can tell.
    """

    bytes: int
    registers: int
    identity: str | None


@functools.cache
def processor() -> Processor:
    """That of this machine."""
    described = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and described.exists():
        first = described.read_text().partition("\n\n")[0].splitlines()
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
        flags = told.get("flags", "").split()
        names = ("vendor_id", "cpu family", "model", "model name", "stepping")
        return _of(flags, arm=False, identity=" | ".join([*(told.get(name, "") for name in names), *sorted(flags)]))
    from llvmlite import binding

    features = [name for name, there in binding.get_host_cpu_features().items() if there]
    return _of(features, arm="aarch64" in binding.get_default_triple(), identity=None)


def _of(features: list[str], arm: bool, identity: str | None) -> Processor:
    wide = "avx512f" in features
    return Processor(64 if wide else 32 if "avx2" in features else 16, 32 if wide or arm else 16, identity)
