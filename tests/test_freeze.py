"""A frozen model computes what the model that it was made from does, whatever way each of its layers takes."""

import copy
import io
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask, frozen_modules, strips
from sparsenet.atlas import Route
from sparsenet.backends import indirect
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Indirect, OnRows, Reads, Spec, Way, Winograd
from sparsenet.features import Features
from sparsenet.freeze import freeze
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.frozen_modules import FrozenConv2d, FrozenLinear, OfAllPixels
from sparsenet.kernels import machine
from sparsenet.selection import Selection
from sparsenet.sites import Window
from tests import strategies
from tests.helpers import assert_equal
from tests.models import assert_as_good, assert_same, assert_unchanged, blobs, small_ssd, snapshot, with_lively_norms

WAYS = ("indirect", "winograd", "rows", "dense")
every_way = pytest.mark.parametrize("way", WAYS)


@contextmanager
def forced(*names: str) -> Iterator[None]:
    """Inside, each layer takes the first of these ways that can compute it: measurements are never wrong, only slow."""

    def fastest(self: FrozenLayer, kind: str, reads: Reads, epilogue: Epilogue) -> Way:
        candidates = self._candidates[kind]
        return self._way(next((name for name in names if name in candidates), candidates[0]))

    with mock.patch.object(FrozenLayer, "_fastest", fastest):
        yield


# -- hand-written models -----------------------------------------------------------------------------------------

WIDTH = 6


class Made(nn.Module):
    """A stage, and a function of its output. The stage's own output is a map that a mask guides, in selective ones."""

    def __init__(self, function: Callable[[Any, Tensor], Any], parts: dict[str, nn.Module]):
        super().__init__()
        self.function = function
        self.stage = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.stage(x))


def conv(inputs: int = WIDTH, outputs: int = WIDTH, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


def parts(**more: Any) -> dict[str, nn.Module]:
    """What every function of `CASES` may use, and `more`, by name."""
    return {
        "a": conv(),
        "b": conv(bias=False),
        "c": conv(kernel=1),
        "d": conv(groups=WIDTH),
        "n": nn.BatchNorm2d(WIDTH),
        "m": nn.BatchNorm2d(WIDTH),
        "act": nn.ReLU(inplace=True),
        **more,
    }


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any]]] = {}


def case(**more: Any) -> Callable[[Callable[[Any, Tensor], Any]], Callable[[Any, Tensor], Any]]:
    def known(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        CASES[function.__name__] = (function, more)
        return function

    return known


def made(name: str, dtype: torch.dtype = torch.float64) -> Made:
    torch.manual_seed(1)
    function, more = CASES[name]
    model = with_lively_norms(Made(function, parts(**{key: make() for key, make in more.items()})))
    assert isinstance(model, Made)
    return model.to(dtype)


# Residuals.


@case()
def functional_relu_and_add(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.n(m.a(x)) + x)


@case()
def shortcut_before(m: Any, x: Tensor) -> Tensor:
    short = m.m(m.c(x))
    return m.act(m.n(m.b(m.act(m.a(x)))) + short)


@case()
def shortcut_after(m: Any, x: Tensor) -> Tensor:
    out = m.n(m.b(F.relu(m.a(x))))
    return m.act(m.m(m.c(x)) + out)


@case()
def shortcut_in_place(m: Any, x: Tensor) -> Tensor:
    out = m.n(m.b(m.act(m.a(x))))
    out += m.m(m.c(x))
    return m.act(out)


@case()
def shortcut_into_the_input(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    x += m.n(m.b(x))
    x += m.a(x)
    return x


@case()
def residual_after_the_activation(m: Any, x: Tensor) -> Tensor:
    return x + F.relu(m.n(m.a(x)))


@case()
def residual_is_half_of_a_map(m: Any, x: Tensor) -> Tensor:
    one, other = m.a(x).chunk(2, 1)
    return torch.cat([m.halve(one) + other, m.halve(F.relu(other)) + one], 1)


CASES["residual_is_half_of_a_map"][1]["halve"] = lambda: conv(WIDTH // 2, WIDTH // 2)


@case()
def residual_lies_as_pytorch_lays_maps(m: Any, x: Tensor) -> Tensor:
    other = torch.zeros(1, WIDTH, *x.shape[2:], dtype=x.dtype).contiguous() + m.c(x)
    return m.a(x) + other


@case()
def residual_of_another_precision(m: Any, x: Tensor) -> Tensor:
    return (m.a(x) + m.b(x).double()).to(x.dtype)


@case()
def residual_is_an_ordinary_map(m: Any, x: Tensor) -> Tensor:
    ones = torch.linspace(0, 1, x.shape[3], dtype=x.dtype).expand(1, WIDTH, *x.shape[2:])
    return F.relu(m.a(x) + ones) + (ones[:, :1] + m.b(x))


@case()
def residual_is_written_to_later(m: Any, x: Tensor) -> Tensor:
    other = m.c(x) * 1
    out = F.relu(m.a(x) + other)
    other.mul_(2)
    return out + other


@case()
def a_residual_for_each_channel(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x).mean((2, 3), keepdim=True) + m.c(x).amax((2, 3), keepdim=True)


@case()
def sums_with_itself(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y += y
    return y * y + y


@case()
def sums_and_numbers(m: Any, x: Tensor) -> Tensor:
    return 1 - (2 + m.a(x) * 3) / 2 + torch.add(m.b(x), m.c(x), alpha=2) - m.d(x)


@case()
def sums_of_four_layers(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) + (m.c(x) + m.d(x))


# What is read more than once.


@case()
def raw_and_normalised(m: Any, x: Tensor) -> Tensor:
    raw = m.a(x)
    return m.n(raw) * raw.sigmoid() + raw


@case()
def normalised_twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(y).relu() - m.m(y)


@case()
def normalised_raw_and_activated_in_place(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.a(x)
    z = m.n(y)
    y.relu_()
    return z, y


@case()
def two_layers_of_one_map(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.n(m.a(x)))
    return torch.cat([m.b(y), m.c(y), y], 1)


@case()
def shared_norm(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(F.relu(m.n(m.a(x)))))


@case()
def shared_layer_with_two_norms(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(x)) * m.m(m.a(F.relu(m.a(x))))


# Writes in place.


@case()
def input_activated_after_it_was_read(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    x.relu_()
    return y + x


@case()
def input_activated_after_it_was_read_and_normalised(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x))
    x.relu_()
    return y + x


@case()
def input_increased_after_it_was_read(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.c(x))
    y = F.relu(m.n(m.a(x)))
    x += 1
    return y + x


@case()
def input_summed_into_after_it_was_read(m: Any, x: Tensor) -> Tensor:
    y = m.n(m.a(x))
    x += m.b(x)
    return torch.cat([y, x], 1)


@case()
def input_written_through_channels(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    y = m.n(m.a(x))
    x[:, :2] = 0
    x[:, 2:4].mul_(3)
    return y + x


@case()
def input_written_through_a_view(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    y = m.n(m.a(x))
    last = x.permute(0, 2, 3, 1)
    last += 1
    z = m.m(m.b(x))
    x.view(len(x), 2, WIDTH // 2, *x.shape[2:]).clamp_(min=0)
    return y + x + z


@case()
def input_overwritten(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    y, z = m.n(m.a(x)), m.b(x)
    x.zero_() if not isinstance(x, Features) else x.mul_(0)
    return y + z + x


@case()
def result_written_before_it_was_read(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y *= 2
    y.relu_()
    y -= 1
    y[:, 0] = 3
    return y + x


@case()
def half_is_written_to(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    one, other = y.split([2, 4], 1)
    other += m.to_four(one)
    return y


CASES["half_is_written_to"][1]["to_four"] = lambda: conv(2, 4)


@case()
def an_ordinary_tensor_is_modified(m: Any, x: Tensor) -> Tensor:
    other = torch.ones(x.shape, dtype=x.dtype) + x.mean((1, 2, 3), keepdim=True)
    y, z = m.n(m.a(other)), m.c(other)
    other.mul_(5)
    return y + z + m.b(other) + m.d(x) * other


# Activations, gates, scales.


@case(tanh=lambda: nn.Hardtanh(-0.3, 0.4), six=nn.ReLU6, none=lambda: nn.Hardtanh(-1e9, 1e9))
def clamped(m: Any, x: Tensor) -> Tensor:
    return m.tanh(m.a(x)) + m.six(m.n(m.b(x) * 9)) + F.hardtanh(m.c(x), -0.1, max_val=0.2) + m.none(m.d(x))


@case(
    silu=lambda: nn.SiLU(inplace=True),
    swish=nn.Hardswish,
    gelu=nn.GELU,
    tanh=lambda: nn.GELU("tanh"),
    leaky=nn.LeakyReLU,
    sigmoid=nn.Sigmoid,
)
def activations(m: Any, x: Tensor) -> Tensor:
    y = m.silu(m.n(m.a(x))) * m.sigmoid(m.c(x)) + m.leaky(m.d(x))
    return m.swish(m.b(y)) + m.gelu(m.a(y)) - m.tanh(m.c(y))


@case()
def functional_activations(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.a(x)) * torch.sigmoid(m.c(x)) + F.leaky_relu(m.d(x), 0.3)
    return F.hardswish(m.b(y)) + F.gelu(m.a(y)) - F.gelu(m.c(y), approximate="tanh") + F.elu(m.d(y))


@case(squeeze=lambda: conv(WIDTH, 2, 1), excite=lambda: conv(2, WIDTH, 1))
def squeeze_and_excitation(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.n(m.a(x)))
    return m.b(y * m.excite(F.relu(m.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()) + x


@case(gate=lambda: nn.Linear(WIDTH, WIDTH))
def gate_of_a_linear_layer(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return y * m.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]


GATE: dict[str, Any] = {"gate": lambda: nn.Conv2d(1, WIDTH, 1)}


def read(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's result that something has read, what it read, and a number for each channel."""
    y = F.silu(m.n(m.a(x)))
    return y, y.mean((2, 3)), m.gate.bias.sigmoid()[:, None, None]


@case(grouped=lambda: conv(groups=2), down=lambda: conv(stride=2), **GATE)
def gate_that_every_kind_of_layer_reads(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y, mean, gate = read(m, x)
    z = gate * y
    return m.b(z), m.n(m.c(z)) + y, m.d(z), m.grouped(z), m.down(z), mean


@case(**GATE)
def gate_that_other_operations_read(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y, mean, gate = read(m, x)
    return F.relu(y * gate - 0.1), F.relu(y * gate) + y, m.n(y * gate), (y * gate) * gate, y * gate + y, mean


@case(**GATE)
def gate_is_written_to(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y, mean, gate = read(m, x)
    gate = gate.clone()
    z = y * gate
    gate.zero_()
    return m.b(z), mean


@case(**GATE)
def gated_map_is_written_to(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y, mean, gate = read(m, x)
    z = y * gate
    before, other = m.b(z), m.c(z)
    y.mul_(3)
    z.clamp_(min=0)
    return before, m.b(z), F.relu(other), y, mean


@case()
def scale_is_written_to(m: Any, x: Tensor) -> Tensor:
    scale = torch.full((WIDTH, 1, 1), 3.0).to(x.dtype)
    y = m.a(x) * scale
    scale.zero_()
    return y


@case(gate=lambda: conv(WIDTH, 1))
def gate_for_each_pixel(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * m.gate(x).sigmoid() + m.gate(x)


@case(gamma=lambda: nn.Conv2d(1, WIDTH, 1), up=lambda: nn.Linear(WIDTH, 9), down=lambda: nn.Linear(9, WIDTH))
def layer_scale(m: Any, x: Tensor) -> Tensor:
    gamma = m.gamma.bias
    y = F.layer_norm(m.d(x).permute(0, 2, 3, 1), (WIDTH,))
    y = (gamma * m.down(F.gelu(m.up(y)))).permute(0, 3, 1, 2)
    return x + y + m.a(x) * gamma[:, None, None]


# A pointwise layer, then a depthwise one.


@case(
    down=lambda: conv(groups=WIDTH, stride=2),
    far=lambda: conv(groups=WIDTH, padding=6, dilation=3, kernel=5, stride=(1, 3)),
    valid=lambda: conv(groups=WIDTH, padding=0),
    same=lambda: conv(groups=WIDTH, padding="same", padding_mode="reflect"),
    around=lambda: conv(groups=WIDTH, padding_mode="circular"),
    fewer=lambda: conv(inputs=3, kernel=1),
    first=lambda: conv(outputs=3, kernel=1),
)
def wide_maps(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    def wide() -> Tensor:
        return F.relu(m.n(m.fewer(m.first(x))))

    added = m.fewer(m.first(x)) + m.a(x)
    return (
        m.down(wide()),
        m.far(wide()) + x[..., ::3],
        m.m(m.valid(wide())),
        m.same(wide()),
        m.around(added),
        m.d(wide()),
    )


@case(
    down=lambda: conv(groups=WIDTH, stride=2),
    fewer=lambda: conv(inputs=3, kernel=1),
    first=lambda: conv(outputs=3, kernel=1),
    last=lambda: conv(outputs=3, kernel=1, bias=False),
    grouped=lambda: conv(kernel=1, groups=2),
    step=lambda: conv(kernel=1, stride=2),
)
def wide_maps_between_pointwise_layers(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    def wide(layer: Any) -> Tensor:
        return F.relu6(m.m(layer(F.relu(m.n(m.fewer(m.first(x)))))))

    twice = wide(m.d)
    return (
        m.last(wide(m.down)),
        F.relu(m.n(m.c(wide(m.d))) + x),
        F.relu(m.c(wide(m.d))) + x,
        m.c(twice) + twice,
        m.grouped(wide(m.d)),
        m.step(wide(m.d)),
        m.a(m.c(wide(m.d) + x)),
    )


@case()
def wide_map_read_twice(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = F.relu6(m.c(x))
    return F.relu(m.d(y)) + y, y


@case()
def wide_maps_written_to(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = m.a(x)
    y = m.c(x)
    z = m.d(y)
    y.mul_(2)
    other, third = m.d(m.c(x)), m.c(m.d(m.c(x)))
    x.add_(1)
    return m.n(z) + y, other, third, x


# Geometry.


@case(
    down=lambda: conv(stride=2),
    wide=lambda: conv(padding=2, dilation=2, groups=2),
    same=lambda: conv(padding="same", kernel=4),
    valid=lambda: conv(padding="valid", kernel=2),
    step=lambda: conv(kernel=1, stride=2),
)
def strides_and_paddings(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.down(x)
    return m.wide(x), m.same(x), m.valid(x), F.relu(y + m.step(x)), m.same(m.wide(y))


@case(
    reflect=lambda: conv(padding_mode="reflect"),
    replicate=lambda: conv(padding=(2, 1), padding_mode="replicate", stride=2),
    circular=lambda: conv(padding="same", padding_mode="circular"),
)
def padding_modes(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return m.n(m.reflect(x)) + x, m.replicate(m.a(x)), F.relu(m.circular(x))


@case(valid=lambda: conv(padding=0), down=lambda: conv(padding=0, stride=2))
def padded_by_hand(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    one = m.n(m.valid(F.pad(x, (1, 1, 1, 1))))
    other = m.down(F.pad(m.a(x), (0, 1, 0, 1)))
    return one + x, other, m.valid(F.pad(x, (2, 0, 1, 1), mode="reflect")), m.valid(F.pad(x, (0, 1, 2, 3)))


@case(valid=lambda: conv(padding=0))
def padded_map_is_written_to(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    y = m.n(m.valid(F.pad(x, (1, 1, 1, 1))))
    z = y + 0
    x = x + 1
    return z + x


@case(up=lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2), same=lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, 1, 1))
def transposed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.n(m.up(m.a(x))), F.relu(m.same(m.b(x))) + x


@case(down=lambda: conv(stride=2), pool=lambda: nn.MaxPool2d(3, 2, 1), mean=lambda: nn.AvgPool2d(2, ceil_mode=True))
def pooled_and_resized(m: Any, x: Tensor) -> Tensor:
    y = m.pool(m.act(m.n(m.a(x)))) + F.relu(m.down(x))
    y = F.interpolate(m.b(y), x.shape[2:], mode="nearest") + x
    return F.interpolate(m.mean(y), scale_factor=2, mode="bilinear", align_corners=False)


@case(one=lambda: conv(2, 4, 1), wide=lambda: conv(16, WIDTH, 1))
def dense_connections(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.n(torch.cat([m.a(x)], 1)))
    z = torch.cat([x, y, m.one(y[:, 2:4])], 1)
    return m.wide(z) + m.n(x)


@case()
def channels_shuffled(m: Any, x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    y = torch.cat([m.halve(one), other], 1)
    y = y.view(len(y), 2, WIDTH // 2, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
    return m.d(y)


CASES["channels_shuffled"][1]["halve"] = lambda: conv(WIDTH // 2, WIDTH // 2)


@case(to_square=lambda: nn.Linear(WIDTH, 8), rows=lambda: nn.BatchNorm2d(8))
def a_linear_layer_and_a_norm_over_lines(m: Any, x: Tensor) -> Tensor:
    """The norm's channels are lines: of 8 by 8 pixels with 8 channels, nothing but the layout tells."""
    y = m.to_square(m.a(x[:, :, :8, :8]).permute(0, 2, 3, 1))
    return m.rows(y)


@case(drop=nn.Dropout, drop_maps=nn.Dropout2d)
def dropout(m: Any, x: Tensor) -> Tensor:
    return m.drop_maps(m.a(m.drop(x))) + F.dropout(m.b(x), 0.5, False)


@case(group=lambda: nn.GroupNorm(2, WIDTH), instance=lambda: nn.InstanceNorm2d(WIDTH))
def other_norms(m: Any, x: Tensor) -> Tensor:
    return m.group(m.a(x)) + m.instance(m.b(x)) + F.normalize(m.c(x))


@case()
def control_flow_by_size(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.shape[2] > 9:
        y = m.n(y)
    for _ in range(y.size(3) % 3):
        y = m.b(F.relu(y))
    return y + x


@case()
def several_outputs(m: Any, x: Tensor) -> dict[str, Any]:
    y = m.a(x)
    return {"raw": y, "more": [m.n(y), (F.relu(y), y.mean((2, 3)))], "number": 3, "name": "out"}


@case(linear=lambda: nn.Linear(WIDTH, 4))
def a_classifier(m: Any, x: Tensor) -> Tensor:
    return m.linear(torch.flatten(F.adaptive_avg_pool2d(F.relu(m.n(m.a(x))), 1), 1))


@case()
def attention_over_the_map(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    flat = y.flatten(2)
    weights = (flat.transpose(1, 2) @ flat / 9).softmax(-1)
    return m.b((flat @ weights).view_as(y)) + x


def inputs(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64, *, last: bool = False) -> Tensor:
    torch.manual_seed(3)
    x = torch.randn(batch, WIDTH, height, width, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if last else x


SHAPES = [(2, 12, 11, False), (1, 12, 11, True), (3, 8, 9, True), (1, 16, 13, False), (2, 12, 11, False)]


@every_way
@pytest.mark.parametrize("name", CASES)
def test_a_model_without_masks(name: str, way: str) -> None:
    """Of any input size, batch and memory format, on the first pass and on later ones."""
    double, single = made(name), made(name, torch.float32)
    with forced(way), torch.no_grad():
        frozen = [freeze(model, inputs(2, 12, 11, model.stage.weight.dtype)) for model in (double, single)]
        for batch, height, width, last in SHAPES:
            x = inputs(batch, height, width, last=last)
            for _ in range(2):
                truth = double(x.clone())
                assert_same(frozen[0](x.clone()), truth)
                assert_as_good(frozen[1](x.float()), single(x.float()), truth)


@pytest.mark.parametrize("strip", [1, 2000])
@pytest.mark.parametrize("name", CASES)
def test_wide_maps_in_strips(name: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one line each, and of some, on the first pass and on those that know what is read twice."""
    monkeypatch.setattr(strips, "WIDE", 0)
    monkeypatch.setattr(strips, "STRIP", strip)
    double = made(name)
    with forced("indirect"), torch.no_grad():
        frozen = freeze(double, inputs(2, 12, 11, torch.float64))
        for batch, height, width, last in SHAPES:
            x = inputs(batch, height, width, last=last)
            for _ in range(3):
                assert_same(frozen(x.clone()), double(x.clone()))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("wide_maps", {2}), ("wide_map_read_twice", set()), ("wide_maps_between_pointwise_layers", {2, 3})],
)
def test_a_wide_map_is_made_in_strips(name: str, layers: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only a depthwise layer reads it; where something else does, it is made once, from the third pass on."""
    monkeypatch.setattr(strips, "WIDE", 0)
    ran: list[int] = []
    run = strips.Strips.run
    monkeypatch.setattr(strips.Strips, "run", lambda *args: (ran.append(2 + (args[0].wide is not None)), run(*args))[1])
    model, x = made(name), inputs(1, 12, 11, torch.float64)
    with forced("indirect"), torch.no_grad():
        frozen = freeze(model, x)
        for _ in range(2):
            frozen(x)
        ran.clear()
        frozen(x)
        assert set(ran) == layers


def masks_of(batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
    few, nothing = torch.zeros(batch, *size, dtype=torch.bool), torch.zeros(batch, *size, dtype=torch.bool)
    few[0, size[0] // 2, size[1] // 3] = True
    half = blobs(batch, size, seed=2)
    half[-1] = False
    scattered = torch.rand(batch, *size, generator=torch.Generator().manual_seed(0)) < 0.4
    return {
        "blobs": blobs(batch, size),
        "nothing": nothing,
        "one pixel": few,
        "everything": ~nothing,
        "an empty image": half,
        "scattered": scattered,
    }


@every_way
@pytest.mark.parametrize("name", CASES)
def test_a_selective_model(name: str, way: str) -> None:
    """Against the reference storage of the model that it was made from, under masks of every kind."""
    models = [
        sparsenet.selectify(made(name, dtype), "stage", selector=GivenMask(), example_inputs=inputs(2, 12, 11, dtype))
        for dtype in (torch.float64, torch.float32)
    ]
    with forced(way), torch.no_grad():
        frozen = [freeze(model, inputs(2, 12, 11, dtype)) for model, dtype in zip(models, DTYPES, strict=True)]
        for batch, size in [(2, (12, 11)), (1, (12, 11)), (3, (8, 9))]:
            x = inputs(batch, *size)
            for mask in masks_of(batch, size).values():
                with sparsenet.use_mask(mask):
                    with sparsenet.use_backend("reference"):
                        truth, plain = models[0](x.clone()), models[1](x.float())
                    assert_same(frozen[0](x.clone()), truth)
                    assert_as_good(frozen[1](x.float()), plain, truth)


DTYPES = (torch.float64, torch.float32)


# -- maps from before the stage meet guided ones -----------------------------------------------------------------


class Meeting(nn.Module):
    """What is computed before the stage meets what is computed after it, at the same size."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.before, self.stage, self.after, self.last = conv(), conv(), conv(), conv()
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        before = self.before(x)
        guided = self.norm(self.after(self.stage(before)))
        return self.last(self.function(before, guided)) + before.mean((2, 3), keepdim=True)


def iadd(one: Tensor, other: Tensor) -> Tensor:
    one += other
    return one


def imul(one: Tensor, other: Tensor) -> Tensor:
    one *= other
    return one


def set_channels(one: Tensor, other: Tensor) -> Tensor:
    one[:, :2] = other[:, :2]
    return one


def channels_last_sum(one: Tensor, other: Tensor) -> Tensor:
    return (one.permute(0, 2, 3, 1) + other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda b, g: b + g,
    "sum the other way": lambda b, g: g + b,
    "product": lambda b, g: b.sigmoid() * g,
    "in place into guided": lambda b, g: iadd(g, b),
    "in place from guided": lambda b, g: iadd(b, g),
    "product in place from guided": lambda b, g: imul(b, g.sigmoid()),
    "cat": lambda b, g: torch.cat([b, g], 1)[:, 2 : 2 + WIDTH],
    "cat the other way": lambda b, g: torch.cat([g, b], 1)[:, 2 : 2 + WIDTH],
    "channels last": channels_last_sum,
    "stack": lambda b, g: torch.stack([g, b], 1).sum(1),
    "stack the other way": lambda b, g: torch.stack([b, g], 1).amax(1),
    "where": lambda b, g: torch.where(b > 0, g, b),
    "where the other way": lambda b, g: torch.where(g > 0, b, g),
    "larger": lambda b, g: torch.maximum(b, g),
    "between": lambda b, g: torch.lerp(g, b, 0.3),
    "of three": lambda b, g: torch.addcmul(g, b, g, value=2),
    "channels into guided": lambda b, g: set_channels(g, b),
    "channels from guided": lambda b, g: set_channels(b, g),
    "padded": lambda b, g: F.pad(b, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] + g,
    "masked fill": lambda b, g: g.masked_fill(b > 0, 2.0),
    "matrix product of channels": lambda b, g: torch.einsum("nchw,nchw->nchw", b, g),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_maps_from_before_the_stage_are_ordinary_maps_to_guided_ones(name: str) -> None:
    model = with_lively_norms(Meeting(MEETINGS[name])).double()
    x = inputs(2, 10, 9)
    model = sparsenet.selectify(model, "stage", selector=GivenMask(), example_inputs=x.clone())
    with torch.no_grad():
        frozen = freeze(model, x.clone())
        for mask in masks_of(2, (10, 9)).values():
            with sparsenet.use_mask(mask):
                with sparsenet.use_backend("reference"):
                    truth = model(x.clone())
                for _ in range(2):
                    assert_same(frozen(x.clone()), truth)


# -- any program -------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """A list of steps on a growing list of maps of one size, all of which it gives back."""

    def __init__(self, steps: list[tuple[str, int, int]]):
        super().__init__()
        self.steps = steps
        self.stage = conv(4, 4)
        self.convs = nn.ModuleList([conv(4, 4), conv(4, 4, 1, bias=False), conv(4, 4, groups=4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stage(x)]
        maps.append(self.convs[0](maps[0]))
        for name, first, second in self.steps:
            one, other = maps[first % len(maps)], maps[second % len(maps)]
            match name:
                case "conv":
                    maps.append(self.convs[second % 3](one))
                case "norm":
                    maps.append(self.norms[second % 2](one))
                case "relu":
                    maps.append(F.relu(one))
                case "relu_":
                    maps[first % len(maps)] = self.activation(one)
                case "hardtanh":
                    maps.append(F.hardtanh(one, -0.5, 1.5))
                case "add":
                    maps.append(one + other)
                case "iadd":
                    one += other
                    maps[first % len(maps)] = one
                case "increase":
                    one.add_(0.25)
                case "scale":
                    maps.append(one * torch.linspace(0.5, 1, 4, dtype=x.dtype)[:, None, None])
                case "iscale":
                    one.mul_(torch.linspace(0.5, 1, 4, dtype=x.dtype)[:, None, None])
                case "cat":
                    maps.append(torch.cat([one[:, 2:], other[:, :2]], 1))
                case "write":
                    one[:, 1:3] = other[:, :2] * 0.5
                case "slice_":
                    one[:, 2:].clamp_(-0.5, 0.5)
                case "view":
                    maps.append(one.view_as(one))
                case "last_":
                    one.permute(0, 2, 3, 1).mul_(0.75)
                case "pool":
                    maps.append(F.max_pool2d(one, 3, 1, 1))
                case "clone":
                    maps.append(one.clone())
        return maps


STEPS = [
    *("conv", "conv", "conv", "norm", "norm", "relu", "relu_", "hardtanh", "add", "iadd", "increase", "scale"),
    *("iscale", "cat", "write", "slice_", "view", "last_", "pool", "clone"),
]


@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), max_size=12),
    batch=st.integers(1, 2),
    way=st.sampled_from(WAYS),
    data=st.data(),
)
def test_any_program(steps: list[tuple[str, int, int]], batch: int, way: str, data: st.DataObject) -> None:
    """Whatever is read before it is written, written through views, or never read at all."""
    model = with_lively_norms(Program(steps)).double()
    x = torch.randn(batch, 4, 5, 6, dtype=torch.float64)
    with forced(way), torch.no_grad():
        truth = model(x)
        frozen = freeze(model, x)
        for _ in range(2):
            for found, wanted in zip(frozen(x), truth, strict=True):
                assert_equal(found, wanted)
        mask = data.draw(strategies.masks(batch, (5, 6)))
        selective = sparsenet.selectify(model, "stage", selector=GivenMask(), example_inputs=x)
        for each in (mask, torch.ones_like(mask), torch.rand(mask.shape) < 0.3):
            try:
                with sparsenet.use_mask(each):
                    selective(x)
            except RuntimeError as error:  # rows refuse writes that they could not pass on
                assert "would be lost" in str(error)
                return
        frozen = freeze(selective, x)
        with sparsenet.use_mask(mask):
            with sparsenet.use_backend("reference"):
                truth = selective(x)
            for _ in range(2):
                for found, wanted in zip(frozen(x), truth, strict=True):
                    assert_equal(found, wanted)


# -- known networks ----------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), "layer1"),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), "features.3"),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 3, 2), 16, num_classes=10),
        "features.denseblock1",
    ),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), "maxpool"),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=10), "features.2"),
    "convnext": (
        lambda: timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 40)),
        "stages.0",
    ),
    "regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), "trunk_output.block1"),
    "resnetv2": (
        lambda: timm.create_model("resnetv2_50", num_classes=10, layers=(1, 1, 1, 1), channels=(32, 64, 64, 64)),
        "stages.0",
    ),
    "hrnet-like fpn": (lambda: timm.create_model("dla34", num_classes=10), "level2"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """A model, its frozen form, a selective one, and its frozen form."""
    torch.manual_seed(0)
    make, at = NETWORKS[request.param]
    model = with_lively_norms(make())
    images = torch.rand(2, 3, 64, 64)
    selective = sparsenet.selectify(model, at, selector=GivenMask(), example_inputs=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsenet.backends.choice.ROUNDS", 1)
        return model, freeze(model, images), selective, freeze(selective, images)


Networks = tuple[nn.Module, nn.Module, nn.Module, nn.Module]


def test_a_known_network(network: Networks) -> None:
    model, frozen, *_ = network
    double = copy.deepcopy(model).double()
    for x in (torch.rand(2, 3, 64, 64), torch.rand(1, 3, 96, 64).to(memory_format=torch.channels_last)):
        with torch.inference_mode():
            assert_as_good(frozen(x), model(x), double(x.double()))
        with torch.no_grad():
            assert_as_good(frozen(x), model(x), double(x.double()))


def test_a_known_network_under_masks(network: Networks) -> None:
    *_, selective, frozen = network
    double, x = copy.deepcopy(selective).double(), torch.rand(2, 3, 64, 64)
    for mask in [*masks_of(2, (16, 16)).values(), blobs(2, (64, 64), seed=5)]:
        with torch.inference_mode(), sparsenet.use_mask(mask):
            with sparsenet.use_backend("reference"):
                truth, plain = double(x.double()), selective(x)
            assert_as_good(frozen(x), plain, truth)


def test_a_record_counts_the_same(network: Networks) -> None:
    *_, selective, frozen = network
    for mask in (blobs(2, (16, 16)), torch.zeros(2, 8, 8, dtype=torch.bool)):
        found, expected = (recorded(model, torch.rand(2, 3, 64, 64), mask) for model in (frozen, selective))
        assert found.dense_macs == expected.dense_macs
        assert found.macs == expected.macs
        assert found.masks.keys() == expected.masks.keys()
        assert all(torch.equal(found.masks[size], expected.masks[size]) for size in expected.masks)
        assert found.density == expected.density


def test_a_record_of_a_full_mask_counts_all_macs(network: Networks) -> None:
    *_, selective, frozen = network
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    found, expected = (recorded(model, torch.rand(2, 3, 64, 64), mask) for model in (frozen, selective))
    assert (found.macs, found.dense_macs) == (expected.macs, expected.dense_macs)
    assert found.masks and all(mask.all() for mask in found.masks.values())


def test_a_full_mask_makes_no_selection(network: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, frozen = network
    x, mask = torch.rand(2, 3, 64, 64), torch.ones(2, 9, 11, dtype=torch.bool)
    with torch.no_grad():
        with sparsenet.use_mask(mask[:1]), pytest.raises(ValueError, match="the mask is for 1 images"):
            frozen(x)
        selections: list[Any] = []
        made = Selection.__init__
        monkeypatch.setattr(
            Selection, "__init__", lambda self, *a, **k: (selections.append(self), made(self, *a, **k))[1]
        )
        with sparsenet.use_mask(mask):
            expected = frozen(x)
        assert not any(type(each) is Selection for each in selections)
        mask[1, 4, 5] = False
        with sparsenet.use_mask(mask):
            found = frozen(x)
        assert any(type(each) is Selection for each in selections)
    assert_same(found[0], expected[0], rounds=1e4)
    assert not torch.equal(found[1], expected[1])


def recorded(model: nn.Module, x: Tensor, mask: Tensor) -> Any:
    with torch.no_grad(), sparsenet.record(model) as record, sparsenet.use_mask(mask):
        model(x)
    return record


def test_it_can_be_copied_pickled_and_saved(network: Networks) -> None:
    """Copies pack their weights by themselves, and compute the same to the last bit."""
    *_, frozen = network
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(buffer, weights_only=False)]
    x, mask = torch.rand(2, 3, 64, 64), blobs(2, (16, 16))
    with torch.no_grad(), sparsenet.use_mask(mask):
        expected = frozen(x)
        for each in copies:
            assert torch.equal(each(x), expected)
            assert [way(module) for module in each.modules()] == [way(module) for module in frozen.modules()]


def way(module: nn.Module) -> Any:
    return module.layer.chosen if isinstance(module, FrozenConv2d | FrozenLinear) else None


def test_its_state_is_the_originals(network: Networks) -> None:
    for model, frozen in (network[:2], network[2:]):
        state, expected = frozen.state_dict(), model.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_every_layer_is_frozen(network: Networks) -> None:
    *_, frozen = network
    kinds = {type(module) for module in frozen.modules()}
    assert kinds & {FrozenConv2d}
    assert nn.Linear not in kinds
    left = [module for module in frozen.modules() if type(module) is nn.Conv2d]
    assert all(convolution.weight.shape[:2] == (1, 1) for convolution in left)  # between octaves of the saliency


# -- what else is in the contract --------------------------------------------------------------------------------


@pytest.fixture
def small() -> nn.Module:
    return made("shortcut_before", torch.float32)


@pytest.fixture
def selective(small: nn.Module) -> nn.Module:
    return sparsenet.selectify(small, "stage", selector=GivenMask(), example_inputs=inputs(1, 12, 11, torch.float32))


X = inputs(2, 12, 11, torch.float32)


def test_its_argument_stays_as_it_is(small: nn.Module, selective: nn.Module) -> None:
    for model in (small, selective):
        model.train()
        model.n.eval()
        before, random = snapshot(model), torch.get_rng_state()
        freeze(model, X)
        assert_unchanged(model, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_in_evaluation_mode_and_learns_nothing(small: nn.Module) -> None:
    frozen = freeze(small.train(), X)
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_model_that_has_changed_since_is_another_one(small: nn.Module) -> None:
    frozen = freeze(small, X)
    with torch.no_grad():
        before = frozen(X)
        for parameter in small.parameters():
            parameter.zero_()
        assert torch.equal(frozen(X), before)


def test_norms_can_change(small: nn.Module) -> None:
    """What was folded into a layer is folded again."""
    frozen = freeze(small, X)
    with torch.no_grad():
        for model in (small, frozen):
            model.n.running_mean.add_(1)
            model.m.weight.mul_(2)
        torch.testing.assert_close(frozen(X), small(X))


def test_it_loads_no_other_weights(small: nn.Module) -> None:
    frozen = freeze(small, X)
    with torch.no_grad():
        before = frozen(X)
        other = {name: value + 1 for name, value in small.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"before sparsenet\.freeze"):
            frozen.load_state_dict(other)
        assert torch.equal(frozen(X), before), "half of the weights were loaded"


@pytest.mark.parametrize("change", ["double", "half", "bfloat16", "to_empty", "cuda"])
def test_it_keeps_its_dtype_and_device(small: nn.Module, change: str) -> None:
    model = with_lively_norms(nn.Sequential(nn.BatchNorm2d(WIDTH), small))
    frozen = freeze(model, X)
    with torch.no_grad():
        before = frozen(X)
        with pytest.raises((RuntimeError, AssertionError)):
            frozen.to_empty(device="meta") if change == "to_empty" else getattr(frozen, change)()
        assert {tensor.dtype for tensor in [*frozen.parameters(), *frozen.buffers()]} <= {torch.float32, torch.int64}
        assert torch.equal(frozen(X), before), "half of the model was converted"


def test_what_changes_nothing_is_fine(small: nn.Module) -> None:
    frozen = freeze(small, X)
    with torch.no_grad():
        before = frozen(X)
        for unchanged in (frozen.float(), frozen.cpu(), frozen.to(memory_format=torch.channels_last), frozen.eval()):
            assert unchanged is frozen
            assert torch.equal(frozen(X), before)
    with pytest.raises(RuntimeError, match=r"before sparsenet\.freeze"):
        freeze(copy.deepcopy(small).double(), X.double()).float()


def test_a_gradient_is_not_lost_in_silence(small: nn.Module, selective: nn.Module) -> None:
    x = X.clone().requires_grad_()
    frozen = freeze(small, X)
    with pytest.raises(RuntimeError, match="no gradients"):
        frozen(x)
    guided = freeze(selective, X)
    with sparsenet.use_mask(blobs(2, (12, 11))), pytest.raises(RuntimeError, match="no gradients"):
        guided(x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), small(X))
    assert not frozen(X).requires_grad  # gradients are enabled, but nothing asks for one


def test_what_cannot_be_frozen(small: nn.Module) -> None:
    frozen = freeze(small, X)
    for model, words in [
        (frozen, "frozen already"),
        (nn.Sequential(frozen, nn.ReLU()), "frozen already"),
        (torch.compile(small), "compiled"),
        (torch.jit.trace(nn.Conv2d(WIDTH, 3, 1), X), "scripted"),
        (copy.deepcopy(small).to("meta"), "meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            freeze(model, X)
    with pytest.raises(ValueError, match="reference"):
        freeze(small, X, backend="reference")
    with pytest.raises(ValueError, match="unknown backend 'fastest'"):
        freeze(small, X, backend="fastest")


@pytest.mark.parametrize("backend", ["auto", "indirect", "triton", "rows", "spconv"])
def test_every_backend(selective: nn.Module, backend: str) -> None:
    frozen = freeze(selective, X, backend=backend)
    double = copy.deepcopy(selective).double()
    with torch.no_grad(), sparsenet.use_mask(blobs(2, (12, 11))):
        with sparsenet.use_backend("reference"):
            truth, plain = double(X.double()), selective(X)
        assert_as_good(frozen(X), plain, truth)
    if backend != "auto":
        allowed = {backend, "rows"} if backend == "spconv" else {backend}
        assert {module.layer.chosen["guided"] for module in frozen.modules() if way(module)} <= allowed


@pytest.mark.parametrize("backend", ["reference", "rows", "indirect", "spconv"])
def test_a_backend_that_the_caller_asks_for(selective: nn.Module, backend: str) -> None:
    frozen = freeze(selective, X)
    double = copy.deepcopy(selective).double()
    with torch.no_grad(), sparsenet.use_mask(blobs(2, (12, 11))), sparsenet.use_backend(backend):
        plain = selective(X)
        with sparsenet.use_backend("reference"):
            truth = double(X.double())
        assert_as_good(frozen(X), plain, truth)


def test_a_learned_mask(small: nn.Module) -> None:
    selector = nn.Sequential(nn.Conv2d(WIDTH, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    model = sparsenet.selectify(small, "stage", selector=with_lively_norms(selector), example_inputs=X)
    frozen = freeze(model, X)
    double = copy.deepcopy(model).double()
    with torch.no_grad(), sparsenet.record(model) as expected, sparsenet.record(frozen) as found:
        plain = model(X)
        assert 0 < expected.density[12, 11] < 1
        assert_as_good(frozen(X), plain, double(X.double()))
    assert all(torch.equal(found.masks[size], expected.masks[size]) for size in expected.masks)
    assert (found.macs, found.dense_macs) == (expected.macs, expected.dense_macs)
    for size, saliency in expected.saliency.items():
        torch.testing.assert_close(found.saliency[size], saliency)


def test_threads_keep_their_passes_apart(selective: nn.Module) -> None:
    frozen = freeze(selective, X)
    masks = [blobs(2, (12, 11), seed=3), ~blobs(2, (12, 11), seed=4)]
    images = [X, X[:, :, :9, :9].contiguous()]
    with torch.no_grad():
        expected = []
        for mask, image in zip(masks, images, strict=True):
            with sparsenet.use_mask(mask):
                expected.append(frozen(image))
    wrong: list[int] = []
    start = threading.Barrier(2)

    def call(place: int) -> None:
        start.wait()
        for _ in range(60):
            with torch.no_grad(), sparsenet.use_mask(masks[place]):
                if not torch.equal(frozen(images[place]), expected[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_of_one_dense_way_keep_sizes_and_scales_apart() -> None:
    """The packed weights of one call are not taken for another's, whichever comes between."""
    from sparsenet.backends.ways import Dense

    dense = Dense(torch.randn(4, 4, 3, 3), Spec((1, 1), (1, 1), (1, 1), 1))
    rows, grid = torch.randn(30, 4), (5, 6)
    scales = [torch.full((4,), 1.0), torch.full((4,), 3.0)]
    reads = Reads(rows, None, 30, 30, 1, grid, grid, True)
    expected = [dense.run(reads, Epilogue(scale=scale)) for scale in scales]
    original = Dense.__setattr__

    def interrupted(self: Any, name: str, value: Any) -> None:
        original(self, name, value)
        if name == "_packed" and value[0] is scales[0]:  # another thread comes right here
            Dense.run(self, reads, Epilogue(scale=scales[1]))

    dense._packed = None
    with mock.patch.object(Dense, "__setattr__", interrupted):
        assert torch.equal(dense.run(reads, Epilogue(scale=scales[0])), expected[0])


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage, self.last, self.raises = conv(), conv(), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(x)
        if self.raises:
            raise KeyError("on purpose")
        return self.last(x)


def test_a_pass_that_raises_is_over(small: nn.Module) -> None:
    frozen: Any = freeze(Raising(), X)
    with torch.no_grad():
        expected = frozen(X)
        frozen.raises = True
        with pytest.raises(KeyError):
            frozen(X)
        assert frozen_modules._passes.get() == ()
        frozen.raises = False
        assert torch.equal(frozen(X), expected)
        with pytest.raises(RuntimeError):  # of another number of channels
            frozen(X[:, :3])
        assert frozen_modules._passes.get() == ()


def test_a_pass_whose_output_cannot_be_given_is_over() -> None:
    """A write that was lost is noticed when the output is made, after the model's own forward."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if m.writes:
            x.flatten(1).relu_()
        return x

    model: Any = Inner(function, a=conv())
    model.writes = False
    frozen: Any = freeze(model, X)
    frozen.writes = True
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="would be lost"):
            frozen(X)
        assert frozen_modules._passes.get() == ()


def test_a_part_can_be_called_by_itself(network: Networks) -> None:
    """Outside of a pass a layer gives ordinary tensors."""
    model, frozen = network[:2]
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            x = torch.rand(1, module.in_channels, 9, 9)
            with torch.no_grad():
                found = frozen.get_submodule(path)(x)
                assert type(found) is Tensor and found.is_contiguous()
                torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-4)
            break


def test_outputs_are_ordinary_tensors(small: nn.Module) -> None:
    frozen = freeze(made("several_outputs", torch.float32), X)
    with torch.no_grad():
        found = frozen(X)
    for tensor in (found["raw"], found["more"][0], *found["more"][1]):
        assert type(tensor) is Tensor and tensor.is_contiguous()
    assert (found["number"], found["name"]) == (3, "out")


def test_results_are_not_views_of_one_another(small: nn.Module) -> None:
    frozen = freeze(made("several_outputs", torch.float32), X)
    with torch.no_grad():
        first = frozen(X)
        kept = first["raw"].clone()
        frozen(X + 1)
        assert torch.equal(first["raw"], kept)


class Inner(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def agrees(model: nn.Module, x: Tensor, way: str = "indirect") -> None:
    model = with_lively_norms(model)
    double = copy.deepcopy(model).double()
    with forced(way), torch.no_grad():
        frozen = freeze(model, x.clone())
        for _ in range(2):
            assert_as_good(frozen(x.clone()), model(x.clone()), double(x.clone().double()))


@every_way
@pytest.mark.parametrize("taken", ["every other channel", "expanded", "transposed"])
def test_a_map_of_one_pixel_may_lie_in_any_way(taken: str, way: str) -> None:
    """In the layers of squeeze-and-excitation, which work on rows of ordinary tensors."""
    take = {
        "every other channel": lambda x: x[:, ::2, :1, :1],
        "expanded": lambda x: x[:, :1, :1, :1].expand(-1, 3, 1, 1),
        "transposed": lambda x: x[:, :1, :3, :1].transpose(1, 2),
    }[taken]
    agrees(Inner(lambda m, x: m.a(take(x)), a=conv(3, 5, 1)), X, way)
    agrees(Inner(lambda m, x: m.a(take(x)[:, :, 0, 0]), a=nn.Linear(3, 5)), X, way)


@every_way
def test_no_image_at_all(way: str) -> None:
    """What a detector's heads get where nothing was found."""

    def function(m: Any, x: Tensor) -> Tensor:
        found = F.max_pool2d(F.relu(m.n(m.a(x[: x.shape[0] - 2]))), 2)
        return m.l(torch.cat([m.c(found), found], 1).mean((2, 3)))

    model = with_lively_norms(Inner(function, a=conv(), n=nn.BatchNorm2d(WIDTH), c=conv(), l=nn.Linear(2 * WIDTH, 3)))
    with forced(way), torch.no_grad():
        for example in (2, 3):
            frozen = freeze(model, torch.cat([X, X])[:example])
            assert frozen(X).shape == model(X).shape == (0, 3)
            torch.testing.assert_close(frozen(torch.cat([X, X])), model(torch.cat([X, X])), rtol=1e-4, atol=1e-4)


@every_way
def test_a_linear_layer_of_any_number_of_dimensions(way: str) -> None:
    for shape in [(WIDTH,), (3, WIDTH), (2, 3, WIDTH), (0, WIDTH), (2, 1, 3, 1, WIDTH)]:
        model, x = nn.Linear(WIDTH, 4), torch.randn(shape)
        with forced(way), torch.no_grad():
            frozen = freeze(nn.Sequential(model), x)
            assert frozen(x).shape == model(x).shape
            torch.testing.assert_close(frozen(x), model(x))


def test_a_map_without_a_batch() -> None:
    agrees(Inner(lambda m, x: m.a(x[0]).relu(), a=conv()), X)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.wide(m.a(x)),
        lambda m, x: m.narrow(m.a(x)),
        lambda m, x: m.norm(m.a(x)),
        lambda m, x: m.a(m.a(x).double()),
        lambda m, x: m.n(m.a(x).double()),
        lambda m, x: m.a(m.a(x).half()),
        lambda m, x: m.linear(m.a(x).permute(0, 2, 3, 1)),
        lambda m, x: m.a(x) + m.narrowing(x),
        lambda m, x: m.a(x[:, :, :1])[:, :, :0],
    ],
)
@pytest.mark.parametrize("guided", [False, True])
def test_what_the_model_refuses_is_refused(function: Any, guided: bool) -> None:
    """No kernel reads what is not there."""
    model = Inner(
        lambda m, x: m.last(m.function2(m, m.stage(x)) if m.on else m.stage(x)),
        stage=conv(),
        a=conv(),
        n=nn.BatchNorm2d(WIDTH),
        wide=conv(WIDTH + 1),
        narrow=conv(WIDTH - 1),
        narrowing=conv(WIDTH, WIDTH - 1),
        norm=nn.BatchNorm2d(WIDTH - 1),
        linear=nn.Linear(WIDTH + 2, 3),
        last=nn.Identity() if not guided else conv(),
    ).eval()
    model.function2, model.on = function, False
    if guided:
        model = sparsenet.selectify(model, "stage", selector=GivenMask(), example_inputs=X)
    frozen: Any = freeze(model, X)
    model.on = frozen.on = True
    for each in (model, frozen):
        with torch.no_grad(), sparsenet.use_mask(blobs(2, (12, 11))):
            try:
                refused = None
                each(X)
            except Exception as error:
                refused = error
        if each is model:
            expected = refused
        else:
            assert (refused is None) == (expected is None), f"{expected!r} by the model, {refused!r} frozen"


def test_views_that_are_written_to_write_through_or_raise() -> None:
    """Where the frozen network has a copy and PyTorch a view, a write to it is not lost in silence, not in inference
    mode either."""
    writes: list[Callable[[Tensor], Any]] = [
        lambda h: h.view(len(h), -1).relu_(),
        lambda h: h.flatten(2).mul_(2),
        lambda h: h[0].zero_(),
        lambda h: h[:, :, 2:5].add_(1),
        lambda h: h[:, 1].sub_(1),
        lambda h: h[:, :, ::2, ::3].relu_(),
        lambda h: h.permute(1, 0, 3, 2).mul_(2),
        lambda h: h.unbind(1)[0].zero_(),
        lambda h: h.unflatten(1, (2, 3)).neg_(),
        lambda h: h.detach().mul_(3),
        lambda h: h.squeeze().add_(1),
        lambda h: h.narrow(2, 1, 3).zero_(),
        lambda h: h.select(1, 2).zero_(),
        lambda h: torch.as_strided(h, (2, 3), (3, 1)).zero_(),
        lambda h: h.reshape(len(h), WIDTH, -1)[:, 0].fill_(2),
        lambda h: h.unsqueeze(1).sigmoid_(),
        lambda h: h.T.zero_() if h.dim() == 2 else h.mT.mul_(2),
    ]
    for number, write in enumerate(writes):
        model = Inner(lambda m, x, write=write: (lambda h: (m.b(h), write(h), h)[::2])(m.a(x)), a=conv(), b=conv())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                try:
                    found = freeze(model.eval(), X)(X)
                except RuntimeError as error:
                    assert re.search("written|write", str(error)), f"{number}: {error}"
                    continue
                for each, wanted in zip(found, model(X), strict=True):
                    torch.testing.assert_close(each, wanted, msg=lambda text, number=number: f"{number}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_gives_the_same_to_its_precision(selective: nn.Module, dtype: torch.dtype) -> None:
    """What is frozen may compute in more precision than autocast asks for, never in less."""
    frozen, double = freeze(selective, X), copy.deepcopy(selective).double()
    for mask in (blobs(2, (12, 11)), torch.ones(2, 12, 11, dtype=torch.bool)):
        with torch.no_grad(), sparsenet.use_mask(mask), sparsenet.use_backend("auto"):
            truth = double(X.double())
            with torch.autocast("cpu", dtype):
                plain, found = selective(X), frozen(X)
            allowed = 2 * max((plain.double() - truth).abs().max().item(), torch.finfo(dtype).eps)
            assert (found.double() - truth).abs().max().item() <= allowed


@pytest.mark.parametrize("guided", [False, True])
def test_features_of_another_dtype_are_computed_in_theirs(guided: bool) -> None:
    """A model that turns to bfloat16 midway."""

    def function(m: Any, x: Tensor) -> Tensor:
        x = m.stage(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = m.c(m.a(x.bfloat16()).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.b(x.float())

    model: Any = Inner(function, stage=conv(), a=conv(), b=conv(), c=nn.Linear(WIDTH, WIDTH)).eval()
    if guided:
        model = sparsenet.selectify(model, "stage", selector=GivenMask(), example_inputs=X)
    frozen = freeze(model, X)
    with torch.no_grad(), sparsenet.use_mask(blobs(2, (12, 11))):
        expected, found = model(X), frozen(X)
    assert found.dtype == expected.dtype
    allowed = 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (found - expected).abs().max() <= allowed


# -- ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_each_way_computes_all_images_that_share_a_table(groups: int, images: int) -> None:
    grid, spec = (4, 5), Spec((1, 1), (1, 1), (1, 1), groups)
    weight, x = torch.randn(6, 6 // groups, 3, 3), torch.randn(images, 6, *grid)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
    window = Window((3, 3), padding=(1, 1))
    tables = OfAllPixels(grid, window, grid, rows.device)
    reads = Reads(rows, tables, 20, 20 * images, images, grid, grid, False)
    residual = torch.randn(20 * images, 6)
    expected = F.conv2d(x, weight, padding=1, groups=groups).permute(0, 2, 3, 1).flatten(0, 2) + residual
    ways: list[Way] = [Indirect(weight, spec), OnRows("rows", weight, spec), OnRows("indirect", weight, spec)]
    for each in [*ways, Winograd(weight, spec)] if groups == 1 else ways:
        found = each.run(reads, Epilogue(residual=residual))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_kernels_everything_runs_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has no llvmlite."""
    monkeypatch.setattr(indirect, "unsupported", lambda weight, groups: "no kernels here")
    for name in ("shortcut_before", "padded_by_hand", "layer_scale", "padding_modes", "strides_and_paddings"):
        for dtype in DTYPES:
            model = made(name, dtype)
            frozen = freeze(model, inputs(2, 12, 11, dtype))
            x = inputs(3, 12, 11, dtype)
            with torch.no_grad():
                assert_as_good(frozen(x), model(x), made(name)(x.double()))
            assert "indirect" not in {name for module in frozen.modules() for name in (way(module) or {}).values()}


def test_measurements_are_made_once_and_wrong_ones_do_no_harm(small: nn.Module) -> None:
    def layers(model: nn.Module) -> list[FrozenLayer]:
        return [module.layer for module in model.modules() if isinstance(module, FrozenConv2d)]

    first, second = freeze(small, X), freeze(small, X)
    assert [layer.milliseconds for layer in layers(first)] == [layer.milliseconds for layer in layers(second)]
    assert any(layer.milliseconds for layer in layers(first))
    for layer in layers(first):
        for kind, found in layer.milliseconds.items():
            assert layer.chosen[kind] == min(found, key=found.__getitem__)


def test_memory_holds_no_weights_that_nothing_reads(small: nn.Module) -> None:
    frozen = freeze(small, X)
    for module in frozen.modules():
        if isinstance(module, FrozenConv2d):
            assert module.layer._original is None
            assert set(module.layer._ways) == set(module.layer.chosen.values())
            assert "weight" not in module._parameters


@pytest.mark.parametrize("name", ["raw_and_normalised", "normalised_twice", "shortcut_before"])
def test_a_result_read_twice_is_computed_once_from_the_second_pass_on(name: str) -> None:
    model = made(name, torch.float32)
    frozen: Any = freeze(model, X)
    runs: list[FrozenLayer] = []
    run = FrozenLayer.run
    with mock.patch.object(FrozenLayer, "run", lambda self, *args: (runs.append(self), run(self, *args))[1]):
        with torch.no_grad():
            frozen(X)
    assert runs.count(frozen.a.layer) == 1


def test_nothing_piles_up_from_pass_to_pass() -> None:
    """What is kept for the next pass is found again there, though a scale is a new tensor in each."""

    def function(m: Any, x: Tensor) -> Tensor:
        scale = torch.sigmoid(m.n.weight)
        normal = F.batch_norm(m.b(x), m.n.running_mean.clone(), m.n.running_var.clone(), scale, None)
        return m.n(m.a(x) * scale[:, None, None]) + m.n(m.a(x)) + normal

    model = with_lively_norms(Inner(function, a=conv(), b=conv(), n=nn.BatchNorm2d(WIDTH)))
    frozen: Any = freeze(model, X)
    with torch.no_grad():
        sizes = []
        for _ in range(40):
            frozen(X)
            layers = (frozen.a.layer, frozen.b.layer)
            kept = [value for layer in layers for value in vars(layer).values() if isinstance(value, dict | list | set)]
            sizes.append(sum(map(len, kept)))
    assert max(sizes[20:]) <= max(sizes[:20])


# -- kernel maps -------------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """Layers, of which a pass takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 5, 3, padding=1)
        self.ways = nn.ModuleList([nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(5, 4, 3, 2, 1), nn.Conv2d(5, 4, 5)])
        self.last = nn.Conv2d(4, 2, 3, padding=1)
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.ways[self.turn](self.stage(x)))


@torch.no_grad()
def test_kernel_maps_are_found_at_the_entry_and_elsewhere_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = sparsenet.selectify(
        Turning().double().eval(), "stage", selector=GivenMask(), example_inputs=torch.rand(1, 3, 9, 8).double()
    )
    frozen = freeze(model, torch.rand(1, 3, 9, 8).double())
    found: list[Route] = []
    of = Route.of
    monkeypatch.setattr(Route, "of", lambda self, selection: (found.append(self), of(self, selection))[1])
    for seed, turn in enumerate([0, 0, 1, 1, 0, 2, 2]):
        found.clear()
        model.turn = frozen.turn = turn
        image = torch.rand(2, 3, 9, 8).double()
        with sparsenet.use_mask(blobs(2, (9, 8), seed)):
            result = frozen(image)
            alone = len(found)
            assert_same(result, model(image))
        # The pass before has met the same, at first that of `freeze`, or not.
        assert (alone == 0) == (machine.unsupported() is None and seed in (0, 1, 3, 6))


# -- detectors ---------------------------------------------------------------------------------------------------


def test_a_detector() -> None:
    torch.manual_seed(0)
    model = small_ssd(width=8)
    images = [torch.rand(3, 300, 300), torch.rand(3, 200, 260)]
    chosen = sparsenet.selectify(model, "backbone.trunk.2", selector=GivenMask())
    with torch.no_grad():
        for each, context in (
            (model, lambda: torch.no_grad()),
            (chosen, lambda: sparsenet.use_mask([torch.tensor([[20.0, 30, 120, 160]])] * 2)),
        ):
            frozen = freeze(copy.deepcopy(each).double(), [image.double() for image in images])
            double = copy.deepcopy(each).double()
            with as_context(context), sparsenet.use_backend("auto"):
                doubled = [image.double() for image in images]
                expected, found = double(doubled), frozen(doubled)
            assert min(len(image["boxes"]) for image in expected) > 0
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one["labels"], other["labels"])
                torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-9, atol=1e-7)
                torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-9, atol=1e-9)


def as_context(make: Callable[[], Any]) -> AbstractContextManager[Any]:
    found: AbstractContextManager[Any] = make()
    return found
