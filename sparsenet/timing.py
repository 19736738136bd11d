"""Alternating measurement: machines drift, so what is compared is timed in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Clock = Callable[[Callable[[], Any]], float]
"""Calls a function and gives the seconds that it took."""


def by_processor(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def by_events(function: Callable[[], Any]) -> float:
    """Between two events of the current CUDA stream: from when the device is ready for the call's first work to the end
    of its last, with what it waits for in between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: torch.device) -> Clock:
    return by_events if device.type == "cuda" else by_processor


def alternate(
    functions: dict[str, Callable[[], Any]],
    repeats: int = 20,
    warmup: int = 2,
    settle: int = 0,
    clock: Clock = by_processor,
) -> dict[str, list[float]]:
    """Call every function in turn, `repeats` times over, and time each call.

    Args:
        functions: by name; by the processor's clock each call should end with its result ready.
        repeats: timed rounds; the order of the functions is reversed in every other one.
        warmup: rounds before, not timed.
        settle: calls right before each one, not timed. Functions with thread pools of their own need one: the threads
            of the last pool spin on for a while and take the cores (ResNet-18, compiled, beside ONNX Runtime: 24 ms
            without, 18 ms with one, 17 ms by itself).
        clock: what times a call: of work on a CUDA device, `by_events`.

    Returns:
        Seconds of each call, by name, round by round: entries of one index were measured next to each other, so
        quote the median of their ratios.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for turn in range(warmup + repeats):
        for name in order if turn % 2 == 0 else reversed(order):
            for _ in range(settle):
                functions[name]()
            taken = clock(functions[name])
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds
