"""Alternating measurement: machines drift, so what is compared is timed in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int = 20, warmup: int = 2, settle: int = 0
) -> dict[str, list[float]]:
    """Call every function in turn, `repeats` times over, and time each call.

    Args:
        functions: by name; each call should end with its result ready (synchronise a device inside).
        repeats: timed rounds; the order of the functions is reversed in every other one.
        warmup: rounds before, not timed.
        settle: calls right before each one, not timed. Functions with thread pools of their own need one: the threads
            of the last pool spin on for a while and take the cores (ResNet-18, compiled, beside ONNX Runtime: 24 ms
            without, 18 ms with one, 17 ms by itself).

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
            start = time.perf_counter()
            functions[name]()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds
