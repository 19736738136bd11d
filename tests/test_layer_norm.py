"""Frozen blocks whose channels go last and come back: normalisation of each pixel by a kernel, and permutations of what
a layer has yet to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask
from sparsenet.kernels import machine, norm
from sparsenet.rules import channels, combine, linear
from tests.models import assert_same, blobs

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))

WIDTH = 6


class Net(nn.Module):
    """As of ConvNeXt, put together by a function of the module and a map."""

    def __init__(self, function: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.stage = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.spread = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.norm, self.plain_norm = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH, 1, 1))
        self.last = nn.Conv2d(WIDTH, WIDTH, 3)
        self.function = function
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.stage(x))


def block(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.spread(x).permute(0, 2, 3, 1))
    y = m.scale * m.narrow(F.gelu(m.widen(y))).permute(0, 3, 1, 2)
    y += x
    return m.last(m.plain_norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def normalised_only(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.last(x).movedim(1, -1))


def norm_of_another_kind(m: Any, x: Tensor) -> Any:
    y = m.spread(x).permute(0, 2, 3, 1)
    crossed = torch.stack([m.norm.weight, m.norm.bias], 1)
    return F.layer_norm(y, (WIDTH,), crossed[:, 0], crossed[:, 1]), F.rms_norm(y, (WIDTH,))


def both_are_read(m: Any, x: Tensor) -> Any:
    y = m.spread(x)
    turned = y.permute(0, 2, 3, 1)
    return m.last(y), m.norm(turned), m.widen(turned)


def the_view_goes_on(m: Any, x: Tensor) -> Any:
    """An activation becomes part of the work of one of the two only."""
    y = m.spread(x)
    turned = y.permute(0, 2, 3, 1).relu()
    return m.widen(turned), m.last(y)


def written_through_the_view(m: Any, x: Tensor) -> Any:
    y = m.spread(x)
    turned = y.permute(0, 2, 3, 1)
    turned.relu_()
    return m.last(y), m.widen(turned)


def written_before_the_view_is_read(m: Any, x: Tensor) -> Any:
    y = m.spread(x)
    turned = y.permute(0, 2, 3, 1)
    y.relu_()
    return m.widen(turned), m.last(y)


def added_to_through_the_view(m: Any, x: Tensor) -> Any:
    y = m.spread(x)
    turned = y.permute(0, 3, 2, 1).transpose(1, 3)
    turned += x
    return m.last(turned), m.last(y)


def written_after_the_norm(m: Any, x: Tensor) -> Any:
    """Which has read what was."""
    y = m.spread(x)
    before = m.norm(y.permute(0, 2, 3, 1))
    y.mul_(2)
    return m.widen(before), m.last(y)


def of_unit_length(m: Any, x: Tensor) -> Any:
    """As SSD has it, and read by the next layer before."""
    y = m.spread(x).relu()
    return m.last(y), m.scale.view(1, -1, 1, 1) * F.normalize(y), F.normalize(m.last(y), 2.0, 1, 1e-2)


def of_unit_length_and_on(m: Any, x: Tensor) -> Any:
    """What follows becomes part of it, or does not."""
    y = m.spread(x)
    added = F.normalize(y, dim=-3) * m.scale + y
    return m.last(F.normalize(y).relu()), m.last(added), m.last(F.normalize(y, p=1.0)), F.normalize(y) * m.norm.bias[:1]


def unit_length_of_what_is_written_to(m: Any, x: Tensor) -> Any:
    y = m.spread(x)
    before = F.normalize(y)
    y.mul_(3).add_(x)
    scale = m.scale.detach().clone()
    after = F.normalize(y) * scale
    scale.zero_()
    before.relu_()
    return before, after, m.last(after)


FUNCTIONS = [
    of_unit_length,
    of_unit_length_and_on,
    unit_length_of_what_is_written_to,
    block,
    normalised_only,
    norm_of_another_kind,
    both_are_read,
    the_view_goes_on,
    written_through_the_view,
    written_before_the_view_is_read,
    added_to_through_the_view,
    written_after_the_norm,
]


def images(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(3), dtype=dtype)


def made(function: Callable[[Any, Tensor], Any], guided: bool, dtype: torch.dtype = torch.float64) -> Any:
    """A model, selective or not, and the frozen one."""
    torch.manual_seed(0)
    net: nn.Module = Net(function).to(dtype).eval()
    if guided:
        net = sparsenet.selectify(net, "stage", selector=GivenMask(), example_inputs=images(1, dtype))
    return net, sparsenet.freeze(net, images(1, dtype))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_frozen_block(function: Callable[[Any, Tensor], Any], guided: bool, batch: int) -> None:
    model, frozen = made(function, guided)
    for seed in range(2):
        with torch.no_grad(), sparsenet.use_mask(blobs(batch, (9, 8), seed)):
            assert_same(frozen(images(batch)), model(images(batch)))


def rows_of_kernels(
    function: Callable[[Any, Tensor], Any], guided: bool, name: str, elsewhere: tuple[Any, str]
) -> list[torch.Size]:
    """The shapes of the rows that a kernel of `norm` is given in a pass in which nothing is computed `elsewhere`, nor
    combined with anything as values, and which gives what the model does."""
    model, frozen = made(function, guided, torch.float32)
    shapes: list[torch.Size] = []
    kernel = getattr(norm, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, name, lambda rows, *args: (shapes.append(rows.shape), kernel(rows, *args))[1])
        for place, operation in (elsewhere, (combine, "aligned")):
            patch.setattr(place, operation, None)
        with torch.no_grad(), sparsenet.use_mask(blobs(1, (9, 8))):
            found = frozen(images(1, torch.float32))
    with torch.no_grad(), sparsenet.use_mask(blobs(1, (9, 8))):
        assert_same(found, model(images(1, torch.float32)))
    return shapes


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_its_norms_are_kernels_and_the_rest_is_part_of_a_layer(guided: bool) -> None:
    """Neither they, nor the scale and the residual, are operations on values."""
    pixels = int(blobs(1, (9, 8)).sum()) if guided else 72
    assert rows_of_kernels(block, guided, "layer_norm", (linear, "over_last")) == [(pixels, WIDTH)] * 2


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_unit_length_and_a_scale_are_one_kernel(guided: bool) -> None:
    assert len(rows_of_kernels(of_unit_length, guided, "unit_length", (channels, "over_channels"))) == 2


@given(
    count=st.integers(0, 100),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_the_kernel_of_unit_length(count: int, width: int, dtype: torch.dtype, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = size * torch.randn(count, width, generator=generator, dtype=dtype)
    weight = torch.randn(width, generator=generator, dtype=dtype)
    memory = torch.full((count + 2, width), 7.0, dtype=dtype)
    norm.unit_length(rows, weight, 1e-4, memory[1:-1]).run()
    assert memory[[0, -1]].eq(7.0).all()
    exact = F.normalize(rows.double(), eps=1e-4) * weight.double()
    assert ((memory[1:-1].double() - exact).abs() <= 16 * torch.finfo(dtype).eps * (exact.abs() + 1e-30)).all()


@given(
    count=st.integers(0, 100),
    channels=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shift=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_kernel(count: int, channels: int, dtype: torch.dtype, shift: float, seed: int) -> None:
    """As exact as PyTorch's own in double precision, but for some roundings, and nothing beyond is written to."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, channels, generator=generator, dtype=dtype) + shift
    weight, bias = torch.randn(2, channels, generator=generator, dtype=dtype)
    memory = torch.full((count + 2, channels), 7.0, dtype=dtype)
    norm.layer_norm(rows, weight, bias, 1e-3, memory[1:-1]).run()
    assert memory[[0, -1]].eq(7.0).all()
    exact = F.layer_norm(rows.double(), (channels,), weight.double(), bias.double(), 1e-3)
    # A rounding of a number of the size of `shift` is divided by the deviation.
    deviation = (rows.double().var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    roundings = 8 * torch.finfo(dtype).eps * (rows.double().abs().amax(1, keepdim=True) + 1) / deviation
    assert ((memory[1:-1].double() - exact).abs() <= roundings * (weight.double().abs() + 1) + 1e-12).all()
