"""Squeeze-and-excitation of a frozen model, as one call, gives what its modules give."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import sparsenet
from sparsenet import GivenMask, frozen_squeeze
from sparsenet.kernels import machine, squeeze
from tests.models import assert_same, blobs, with_lively_norms

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))

WIDTH = 12

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: SqueezeExcitation(WIDTH, 4),
    "torchvision, silu": lambda: SqueezeExcitation(WIDTH, 4, activation=nn.SiLU),
    "torchvision, hardsigmoid": lambda: SqueezeExcitation(WIDTH, 4, scale_activation=nn.Hardsigmoid),
    "timm": lambda: SqueezeExcite(WIDTH, rd_channels=4),
    "timm, of its layers": lambda: timm.layers.SEModule(WIDTH, rd_channels=4),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "with a maximum": lambda: timm.layers.SEModule(WIDTH, rd_channels=4, add_maxpool=True),
    "normalised": lambda: timm.layers.SEModule(WIDTH, rd_channels=4, norm_layer=nn.BatchNorm2d),
    "of one layer": lambda: timm.layers.EffectiveSEModule(WIDTH),
}


class Block(nn.Module):
    """Wide enough for several vectors of channels, with a residual."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.stage = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.wide = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.gate = gate
        self.narrow = nn.Conv2d(WIDTH, WIDTH, 1)
        self.last = nn.Conv2d(WIDTH, 5, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(x)
        return self.last(self.narrow(self.gate(self.wide(x))) + x)


def images(batch: int = 1, size: int = 11, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=dtype)


def made(gate: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = with_lively_norms(Block(gate)).to(dtype)
    for name, parameter in net.gate.named_parameters():
        nn.init.normal_(parameter, std=0.5 if name.endswith("weight") else 0.2)
    example = images(dtype=dtype)
    return sparsenet.selectify(net, "stage", selector=GivenMask(), example_inputs=example, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that were fused."""
    found: list[Any] = []
    gated = frozen_squeeze.gated
    monkeypatch.setattr(frozen_squeeze, "gated", lambda *args: (found.append(args[0]), gated(*args))[1])
    return found


def check(model: nn.Module, frozen: nn.Module, *examples: Tensor) -> None:
    for seed, x in enumerate(examples or (images(), images(size=8), images())):
        with torch.no_grad(), sparsenet.use_mask(blobs(len(x), (x.shape[2], x.shape[3]), seed)):
            assert_same(frozen(x), model(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name: str, calls: list[Any]) -> None:
    model = made(BLOCKS[name]())
    frozen = sparsenet.freeze(model, images())
    calls.clear()
    check(model, frozen)
    assert len(calls) == 3
    check(model, copy.deepcopy(frozen))
    check(model, pickle.loads(pickle.dumps(frozen)))
    assert len(calls) == 9


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_no_mask_guides(name: str, calls: list[Any]) -> None:
    torch.manual_seed(0)
    net = with_lively_norms(Block(BLOCKS[name]()))
    check(net, sparsenet.freeze(net, images()))
    assert calls


@pytest.mark.parametrize("name", OTHERS)
def test_another_block_runs_as_it_is(name: str, calls: list[Any]) -> None:
    model = made(OTHERS[name]())
    check(model, sparsenet.freeze(model, images()))
    assert not calls


def a_hook(frozen: Any) -> None:
    frozen.gate.fc1.register_forward_hook(lambda module, args, output: output * 2)


def a_hook_on_the_mean(frozen: Any) -> None:
    frozen.gate.avgpool.register_forward_hook(lambda module, args, output: output + 1)


def another_pooling(frozen: Any) -> None:
    frozen.gate.avgpool = nn.AdaptiveMaxPool2d(1)


def another_activation(frozen: Any) -> None:
    frozen.gate.activation = nn.Tanh()


@torch.no_grad()
def another_bias(frozen: Any) -> None:
    frozen.gate.fc2.bias.add_(1)


@pytest.mark.parametrize("change", [a_hook, a_hook_on_the_mean, another_pooling, another_activation, another_bias])
def test_what_has_changed_since(change: Callable[[Any], None]) -> None:
    model = made(BLOCKS["torchvision"]())
    frozen = sparsenet.freeze(model, images())
    check(model, frozen)
    for net in (model, frozen):
        change(net)
    check(model, frozen)


def test_what_is_not_fused(calls: list[Any]) -> None:
    """Several images, means over active pixels, other dtypes, and passes that someone watches."""
    model = made(BLOCKS["torchvision"]())
    frozen = sparsenet.freeze(model, images())
    calls.clear()
    check(model, frozen, images(2))
    with sparsenet.record(model) as expected:
        check(model, model, images())
    with sparsenet.record(frozen) as found:
        check(model, frozen, images())
    assert found.macs == expected.macs
    guided = [each.name for each in found.operations if each.status != "dense"]
    assert guided == [each.name for each in expected.operations]
    by_active = made(BLOCKS["torchvision"](), mean="active")
    check(by_active, sparsenet.freeze(by_active, images()))
    double = made(BLOCKS["torchvision"](), torch.float64)
    examples = [images(dtype=torch.float64)]
    check(double, sparsenet.freeze(double, examples[0]), *examples)
    assert not calls


@given(
    count=st.integers(0, 300),
    channels=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_means(count: int, channels: int, dtype: torch.dtype, seed: int) -> None:
    """As exact as numbers that are added in blocks are, and nothing beyond is written to."""
    rows = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 3
    memory = torch.full((channels + 2,), 7.0, dtype=dtype)
    squeeze.mean(rows, 12, memory[1:-1]).run()
    assert memory[[0, -1]].tolist() == [7.0, 7.0]
    longest = squeeze.BLOCK + -(-count // squeeze.BLOCK)
    allowed = (longest + 2) * torch.finfo(dtype).eps * rows.double().abs().sum(0) / 12
    assert ((memory[1:-1].double() - rows.double().sum(0) / 12).abs() <= allowed).all()


@given(
    parts=st.integers(1, 5),
    channels=st.integers(1, 40),
    vectors=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gated_weights(parts: int, channels: int, vectors: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(parts)
    weights = torch.randn(1, parts, 1, channels, vectors * machine.lanes(dtype), generator=generator, dtype=dtype)
    gate = torch.randn(channels, generator=generator, dtype=dtype)
    memory = torch.full((weights.numel() + 2,), 7.0, dtype=dtype)
    squeeze.gated(weights, gate, memory[1:-1].view(weights.shape)).run()
    assert memory[[0, -1]].tolist() == [7.0, 7.0]
    assert torch.equal(memory[1:-1].view(weights.shape), weights * gate[:, None])
