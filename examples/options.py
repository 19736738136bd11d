"""Types of command-line options: they turn text into a value, or say what it has to be."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

import torch


def number(
    kind: type[int] | type[float],
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """A finite number within bounds, of which `above` and `below` themselves are out."""
    lower = [f"at least {least}"] * (least > -math.inf) + [f"above {above}"] * (above > -math.inf)
    bounds = [*lower, *[f"at most {most}"] * (most < math.inf), *[f"below {below}"] * (below < math.inf)]

    def read(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most and above < value < below):
            raise ArgumentTypeError(f"{text} is no finite number {' and '.join(bounds)}")
        return value

    read.__name__ = kind.__name__  # argparse says it of text that is none
    return read


COUNT = number(int, least=1)
NATURAL = number(int, least=0)
POSITIVE = number(float, above=0)
SHARE = number(float, above=0, most=1)  # of nothing would be none
PART = number(float, least=0, most=1)
DECAY = number(float, above=0, below=1)  # by 1 an average would stay what it was


def device(text: str) -> str:
    """What this machine computes on: "cpu", "cuda", or one GPU of several, such as "cuda:1"."""
    try:
        asked = torch.device(text)
    except RuntimeError:
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"PyTorch finds {torch.cuda.device_count()} GPUs here, and not {text!r}: give cpu")
    return text
