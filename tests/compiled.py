"""Compiles the Triton kernels for devices that are not here: `python tests/compiled.py cuda 90`.

Triton's compilers need no device. What they refuse the interpreter lets pass: types that do not agree, blocks that no
instruction multiplies, a vendor's own. Each kernel that a convolution, its gradient, pooling and the index arithmetic
launch is compiled for one or `--all` of its configurations, down to machine code.
"""

import argparse
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from sparsenet.backends import triton as backend
from sparsenet.backends.epilogue import ACTIVATIONS, Epilogue
from sparsenet.kernels import triton_gradient, triton_index, triton_support
from sparsenet.sites import KernelMap


class NoDevice:
    """A driver for a device that is not here."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("vendor", choices=["cuda", "hip"])
    parser.add_argument("architecture")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    cuda = arguments.vendor == "cuda"
    architecture: Any = int(arguments.architecture) if cuda else arguments.architecture
    triton.runtime.driver.set_active(NoDevice(GPUTarget(arguments.vendor, architecture, 32 if cuda else 64)))
    compiled: set[tuple[str, str]] = set()

    def compile_only(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        made = run(kernel, *args, **{**kwargs, "warmup": True})
        assert made.asm["cubin" if cuda else "hsaco"]
        compiled.add((kernel.fn.__name__, made.hash))

    def each_configuration(tuned: Autotuner, *args: Any, **kwargs: Any) -> None:
        tuned.nargs = dict(zip(tuned.arg_names, args, strict=False))
        fitting = tuned.prune_configs(kwargs)
        for config in fitting if arguments.all else fitting[:1]:
            tuned.fn.run(*args, **kwargs, **config.all_kwargs())

    run = JITFunction.run
    JITFunction.run, Autotuner.run = compile_only, each_configuration  # type: ignore[method-assign]
    triton_support.unsupported = lambda device, dtype: None  # type: ignore[assignment]
    everything()
    names = sorted({name for name, _ in compiled})
    print(f"{len(compiled)} of {', '.join(names)}")


def everything() -> None:
    for dtype in triton_support.DTYPES:
        for precision in ("highest", "high") if dtype is torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            for groups, channels, outputs in [(1, 128, 128), (2, 20, 12), (64, 1, 1)]:
                convolution(dtype, groups, channels, outputs)
        for operation in ("max", "sum"):
            backend.pool(operation, torch.zeros(40, 64, dtype=dtype), table(), 30, float("-inf"))
    for number, (name, _) in enumerate(ACTIVATIONS.items()):
        order = ("before", "after")[number % 2]
        rows, packed = torch.zeros(32, 64, dtype=torch.float16), backend.pack(torch.zeros(64, 64, 1, 1).half(), 1)
        steps = Epilogue(torch.ones(64), torch.ones(64), torch.zeros(32, 64).half(), order, name, 0.1, 6.0)
        backend.run(rows, packed, steps, None, 32)
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    index, rank = triton_index.sites(mask)
    triton_index.table(torch.zeros(64, 9, dtype=torch.int32), index, rank)


def table() -> torch.Tensor:
    return torch.zeros(4096, 9, dtype=torch.int32)


def convolution(dtype: torch.dtype, groups: int, channels: int, outputs: int) -> None:
    weight = torch.zeros(groups * outputs, channels, 3, 3, dtype=dtype)
    rows = torch.zeros(32, groups * channels, dtype=dtype)
    kernel_map = KernelMap(table(), 30)
    backend.convolve(rows, weight, None, groups, kernel_map)
    triton_gradient.of_weights(rows, torch.zeros(4096, groups * outputs, dtype=dtype), kernel_map.table, 30, groups)


if __name__ == "__main__":
    main()
