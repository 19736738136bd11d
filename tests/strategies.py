"""Every strategy of the tests: masks, sizes, and the geometries of convolution and pooling.

Strategies draw shapes, masks and switches. Feature values and weights are `torch.randn` in the tests: each example
starts from seed 0 (see `conftest.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]

LARGEST = 17
CHANNELS = 12
MASKS = ("random", "blobs", "full", "empty", "one pixel", "border", "one empty image")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

sides = st.integers(1, LARGEST)
sizes: SearchStrategy[Pair] = st.tuples(sides, sides)
batches = st.integers(1, 3)
channels = st.integers(1, CHANNELS)


# -- masks -----------------------------------------------------------------------------------------------------


@st.composite
def masks(draw: DrawFn, batch: int | None = None, size: Pair | None = None, kind: str | None = None) -> Tensor:
    """Active pixels, bool (N, H, W)."""
    batch = draw(batches) if batch is None else batch
    size = draw(sizes) if size is None else size
    kind = draw(st.sampled_from(MASKS)) if kind is None else kind
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scattered = torch.rand(batch, *size, generator=numbers)
    mask = torch.zeros(batch, *size, dtype=torch.bool)
    match kind:
        case "random":
            return scattered < draw(st.sampled_from([0.05, 0.2, 0.5, 0.9]))
        case "blobs":
            return F.max_pool2d((scattered < 0.05).float(), 5, 1, 2) > 0
        case "full":
            return ~mask
        case "empty":
            return mask
        case "one pixel":
            mask.view(-1)[scattered.argmax()] = True
            return mask
        case "border":
            mask[:, [0, -1]] = mask[:, :, [0, -1]] = True
            return mask
        case "one empty image":
            mask |= scattered < 0.5
            mask[draw(st.integers(0, batch - 1))] = False
            return mask
        case _:
            raise ValueError(kind)


# -- convolution -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution and the size of its input."""

    batch: int
    size: Pair
    inputs: int
    outputs: int
    kernel: Pair
    stride: Pair
    padding: Any
    dilation: Pair
    groups: int
    padding_mode: str
    bias: bool

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        conv = nn.Conv2d(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
            dtype=dtype,
        )
        for parameter in conv.parameters():
            nn.init.normal_(parameter)
        return conv

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.batch, self.inputs, *self.size, dtype=dtype)

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """((top, bottom), (left, right)), as PyTorch pads."""
        left, right, top, bottom = self.module()._reversed_padding_repeated_twice
        return (top, bottom), (left, right)

    @property
    def out_size(self) -> Pair:
        _, _, height, width = self.module()(self.input()).shape
        return height, width

    @property
    def products(self) -> int:
        """How many products an output is the sum of."""
        return self.inputs // self.groups * self.kernel[0] * self.kernel[1] + self.bias


@st.composite
def convolutions(draw: DrawFn, modes: Sequence[str] = PADDING_MODES) -> Conv:
    """Any convolution that PyTorch computes, on a map that is large enough for it (at most 19 pixels wide)."""
    mode = draw(st.sampled_from(modes))
    way = draw(st.sampled_from(["int", "pair", "same", "valid"]))
    kernel = draw(_pairs(1, 7))
    dilation = draw(_pairs(1, 3))
    stride = (1, 1) if way == "same" else draw(_pairs(1, 3))
    reach = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel, strict=True)]
    match way:
        case "int":
            pads = [draw(st.integers(0, 4))] * 2
            padding: Any = pads[0]
        case "pair":
            pads = [draw(st.integers(0, length // 2 + 1)) for length in reach]
            padding = tuple(pads)
        case _:
            pads = [length // 2 if way == "same" else 0 for length in reach]
            padding = way
    size = []
    for length, pad in zip(reach, pads, strict=True):
        least = {"reflect": pad + 1, "circular": pad}.get(mode, 1)
        least = max(1, least, length - 2 * pad)
        size.append(draw(st.integers(least, max(least, LARGEST))))
    groups = draw(st.one_of(st.just(1), st.integers(2, CHANNELS)))
    inputs, outputs = (groups * draw(st.integers(1, CHANNELS // groups)) for _ in range(2))
    bias = draw(st.booleans())
    shape = (size[0], size[1])
    return Conv(draw(batches), shape, inputs, outputs, kernel, stride, padding, dilation, groups, mode, bias)


@st.composite
def masked_convolutions(draw: DrawFn, modes: Sequence[str] = PADDING_MODES) -> tuple[Conv, Tensor, bool]:
    """A convolution, the mask of its input, and whether it reads the input whole."""
    conv = draw(convolutions(modes))
    return conv, draw(masks(conv.batch, conv.size)), draw(st.booleans())


@st.composite
def _pairs(draw: DrawFn, low: int, high: int) -> Pair:
    """Square at least half of the time."""
    first = draw(st.integers(low, high))
    return first, draw(st.one_of(st.just(first), st.integers(low, high)))


# -- pooling ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """A pooling operation, with the arguments it takes, and the size of its input."""

    batch: int
    size: Pair
    function: Any
    arguments: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x, **self.arguments)
        return result


@st.composite
def poolings(draw: DrawFn) -> Pool:
    """Any pooling that PyTorch computes, on a map that is large enough for it."""
    function = draw(st.sampled_from([F.max_pool2d, F.avg_pool2d]))
    kernel = draw(_pairs(1, 5))
    arguments: dict[str, Any] = {"kernel_size": kernel if draw(st.booleans()) else kernel[0]}
    kernel = kernel if arguments["kernel_size"] == kernel else (kernel[0], kernel[0])
    arguments["stride"] = draw(st.one_of(st.none(), st.integers(1, 3), _pairs(1, 3)))
    arguments["ceil_mode"] = draw(st.booleans())
    dilation = (1, 1)
    if function is F.max_pool2d:
        arguments["dilation"] = dilation = draw(_pairs(1, 3))
    else:
        arguments["count_include_pad"] = draw(st.booleans())
        arguments["divisor_override"] = draw(st.one_of(st.none(), st.integers(1, 9)))
    pads = [draw(st.integers(0, taps // 2)) for taps in kernel]
    arguments["padding"] = tuple(pads)
    size = []
    for taps, step, pad in zip(kernel, dilation, pads, strict=True):
        least = max(1, step * (taps - 1) + 1 - 2 * pad)
        size.append(draw(st.integers(least, LARGEST)))
    return Pool(draw(batches), (size[0], size[1]), function, arguments)


@st.composite
def masked_poolings(draw: DrawFn) -> tuple[Pool, Tensor, bool]:
    """A pooling, the mask of its input, and whether it reads the input whole."""
    pool = draw(poolings())
    return pool, draw(masks(pool.batch, pool.size)), draw(st.booleans())
