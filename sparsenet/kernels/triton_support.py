"""Whether Triton is here, and what its kernels can compute with. They are imported when first asked for: Triton takes a
second, and PyTorch for CPUs comes without it."""

from __future__ import annotations

import functools
import importlib
import os

import torch

# The oldest Triton whose autotuner keeps what it measured on disk.
OLDEST = (3, 4)

# Accumulators are of single precision, of double for double.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used at all, and the way out, or `None`."""
    oldest = ".".join(map(str, OLDEST))
    try:
        version: str = importlib.import_module("triton").__version__
    except ImportError:
        return f"the package triton could not be imported: install triton>={oldest}, or PyTorch for CUDA or ROCm"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {oldest}, the first to keep what it tuned: install a newer one"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU: Triton itself asks once, when they are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute with tensors of a kind, or `None`."""
    if dtype not in DTYPES:
        return f"its kernels compute no {dtype}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"its kernels are for GPUs, not for {device.type} (but in Triton's interpreter, TRITON_INTERPRET=1)"
    return missing()


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: as `torch.set_float32_matmul_precision` lets matrix products of single precision."""
    if dtype is not torch.float32 or torch.version.hip is not None:  # few of AMD's devices have TF32
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
