"""Dense engines: each computes what the network does."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet import coverage, engines
from sparsenet.engines import ENGINES
from tests.models import with_lively_norms


class Heads(nn.Module):
    """A small network of two outputs, by name, one of them a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.map = nn.Conv2d(8, 5, 3, padding=1)
        self.classify = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"scores": self.classify(x.mean((2, 3))), "map": self.map(x)}


def assert_computes(network: nn.Module, images: Tensor, output: list[Tensor]) -> None:
    """Equal to the network in float64, but for 16 times its own rounding in float32."""
    with torch.no_grad():
        single = engines.tensors(network(images))
        double = engines.tensors(network.double()(images.double()))
    assert coverage.gap(output, double) <= coverage.FACTOR * coverage.own_error(single, double)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_computes_the_network(engine: str) -> None:
    network, images = with_lively_norms(Heads()), torch.rand(2, 3, 20, 28)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = ENGINES[engine](network, images)
    assert_computes(network, images, run())
    assert [output.shape for output in run()] == [(2, 4), (2, 5, 10, 14)]
    assert all(torch.equal(value, before[name]) for name, value in network.float().state_dict().items())


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "compile"])  # which takes long to compile
@pytest.mark.parametrize("name", ["timm:test_resnet", "test_efficientnet", "test_convnext"])
def test_an_engine_computes_a_network_of_timm(name: str, engine: str) -> None:
    network, images = coverage.named(name).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        coverage.enliven(network, images)
    assert_computes(network, images, ENGINES[engine](network, images)())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_missing_package_is_named(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(ImportError, match=rf"{engine}.* pip install 'sparsenet\[bench\]'"):
        ENGINES[engine](Heads(), torch.rand(1, 3, 16, 16))


# -- folding ---------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A convolution and a normalisation, and what else may be between them and around."""

    def __init__(self, between: Callable[["Pair", Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.between = between
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3) if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


class Standardised(nn.Conv2d):
    """Computes another weight first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def standardised(pair: Pair, x: Tensor) -> Tensor:
    if type(pair.conv) is nn.Conv2d:
        pair.conv.__class__ = Standardised
    return pair.norm(pair.conv(x))


def read_twice(pair: Pair, x: Tensor) -> Tensor:
    x = pair.conv(x)
    return x + pair.norm(x)


def also_returned(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    x = pair.conv(x)
    return x, pair.norm(x)


@pytest.mark.parametrize(
    ("between", "left"),
    [
        (lambda pair, x: pair.norm(pair.conv(x)), 0),
        (lambda pair, x: pair.norm(pair.conv(x)).relu_(), 0),
        (lambda pair, x: pair.norm(pair.conv(F.pad(x, (1, 0, 1, 0)))), 0),
        (lambda pair, x: pair.norm(pair.conv(x).relu()), 1),
        (lambda pair, x: pair.norm(pair.conv(pair.conv(x))), 1),
        (lambda pair, x: pair.norm(pair.norm(pair.conv(x))), 1),
        (lambda pair, x: pair.conv(pair.norm(x)), 1),
        (standardised, 1),
        (read_twice, 1),
        (also_returned, 1),
    ],
)
def test_what_is_folded_computes_the_same(between: Callable[[Pair, Tensor], Tensor], left: int) -> None:
    network, images = with_lively_norms(Pair(between)), torch.rand(2, 3, 8, 8)
    folded = engines.fold(network, images)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
    with torch.no_grad():
        assert_computes(network, images, engines.tensors(folded(images)))


def test_statistics_of_the_batch_are_not_folded() -> None:
    network = Pair(lambda pair, x: pair.norm(pair.conv(x)), nn.BatchNorm2d(3, track_running_stats=False))
    assert isinstance(engines.fold(network, torch.rand(2, 3, 8, 8)).norm, nn.BatchNorm2d)


class Twice(nn.Module):
    """Knows the same pair by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def test_a_normalisation_of_two_names_is_folded_once() -> None:
    network, images = with_lively_norms(Twice()), torch.rand(2, 3, 8, 8)
    folded = engines.fold(network, images)
    assert isinstance(folded.second[1], nn.Identity)
    with torch.no_grad():
        assert_computes(network, images, engines.tensors(folded(images)))


def test_timms_normalisation_keeps_its_activation() -> None:
    network, images = coverage.named("test_efficientnet").eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        coverage.enliven(network, images)
        folded = engines.fold(network, images)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert_computes(network, images, engines.tensors(folded(images)))
