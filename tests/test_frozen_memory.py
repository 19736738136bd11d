"""What a frozen network holds: each weight once, whatever computes it, and exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import sparsenet
from sparsenet import GivenMask
from sparsenet.backends.choice import Measurements
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import MOST_IDLE, Reads, Spec, Way
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.frozen_modules import FrozenConv2d
from sparsenet.kernels import machine
from sparsenet.sites import ActiveSites, Window, dense_table, kernel_map

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))

WIDTH = 64  # which fills the panels of any processor


@contextmanager
def forced(**ways: str) -> Iterator[None]:
    """Inside, layers take this way for a kind."""

    def fastest(self: FrozenLayer, kind: str, reads: Reads, epilogue: Epilogue) -> Way:
        candidates = self._candidates[kind]
        return self._way(ways[kind] if ways[kind] in candidates else candidates[0])

    with mock.patch.object(FrozenLayer, "_fastest", fastest):
        yield


def network(norm: bool) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(WIDTH, WIDTH, 1)]
    for _ in range(2):
        parts += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), *([nn.BatchNorm2d(WIDTH)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts).eval()


def held(value: Any, seen: dict[int, int], objects: set[int]) -> dict[int, int]:
    """The bytes of each block of float32 numbers that can be reached from a value, those of oneDNN's among them."""
    if isinstance(value, Tensor):
        if value.is_mkldnn:
            seen[id(value)] = 4 * value.numel()
        elif value.dtype is torch.float32:
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif id(value) not in objects:
        objects.add(id(value))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            held(part, seen, objects)
        if type(value).__module__.startswith("sparsenet"):
            held(vars(value) if hasattr(value, "__dict__") else None, seen, objects)
    return seen


def weights_held(model: nn.Module) -> int:
    """Bytes of what is as large as a 3x3 layer's weight at least."""
    layers = [
        module.layer for module in model.modules() if isinstance(module, FrozenConv2d) and module.layer.shape[2] > 1
    ]
    assert len(layers) == 2
    found = held(layers, {}, set()).values()
    return sum(each for each in found if each >= 9 * WIDTH * WIDTH * 4)


ONCE = 2 * 9 * WIDTH * WIDTH * 4


@pytest.mark.parametrize(("way", "size"), [("dense", 1), ("winograd", 16 / 9)])
@pytest.mark.parametrize("norm", [False, True])
def test_a_second_way_holds_weights_while_all_pixels_are_computed(way: str, size: float, norm: bool) -> None:
    images, some = torch.randn(1, WIDTH, 9, 9), torch.rand(1, 9, 9) < 0.4
    everything = torch.ones(1, 9, 9, dtype=torch.bool)
    model = sparsenet.selectify(network(norm), "0", selector=GivenMask(), example_inputs=images)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with forced(guided="indirect", everything=way):
        frozen = sparsenet.freeze(model, images)

    def check(mask: Tensor, times: int, beside: bool) -> None:
        with sparsenet.use_mask(mask), torch.no_grad():
            found = frozen(images).clone()
            for _ in range(times - 1):
                assert torch.equal(frozen(images), found)
            truth = model(images)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
        assert weights_held(frozen) == ONCE * (1 + (size if beside else 0))
        state = frozen.state_dict()
        assert state.keys() == original.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in original.items())

    assert weights_held(frozen) == ONCE
    check(some, 1, False)
    check(everything, 2, True)
    check(some, MOST_IDLE - 1, True)
    check(everything, 1, True)
    check(some, MOST_IDLE, False)
    check(everything, 1, True)


@pytest.mark.parametrize(("way", "expected"), [("indirect", 1.0), ("winograd", 1 + 16 / 9)])
def test_a_way_for_both_kinds_holds_its_weights_once(way: str, expected: float) -> None:
    images = torch.randn(1, WIDTH, 9, 9)
    model = sparsenet.selectify(network(True), "0", selector=GivenMask(), example_inputs=images)
    with forced(guided=way, everything=way):
        frozen = sparsenet.freeze(model, images)
    for mask in (torch.rand(1, 9, 9) < 0.4, torch.ones(1, 9, 9, dtype=torch.bool)):
        with sparsenet.use_mask(mask), torch.no_grad():
            torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-4)
        assert weights_held(frozen) == pytest.approx(expected * ONCE)


class Known(Measurements):
    """Of a machine that has measured everything: the second way is the fastest."""

    def of(self, layer: str, ways: Any, clock: Any = None) -> dict[str, float]:
        return {name: 1.0 if place == 1 else 2.0 for place, name in enumerate(ways)}


def test_of_the_ways_that_are_not_chosen_nothing_is_made() -> None:
    weight = torch.randn(WIDTH, WIDTH, 1, 1)
    candidates = {"guided": ["indirect", "rows"], "everything": ["indirect", "dense"]}
    layer = FrozenLayer("layer", weight, Spec((1, 1), (0, 0), (1, 1), 1), candidates, Known(None))
    rows = torch.randn(12, WIDTH)
    reads = Reads(rows, None, 12, 12, 1, (3, 4), (3, 4), True)
    made: list[str] = []
    way = FrozenLayer._way

    def counted(self: FrozenLayer, name: str) -> Way:
        made.append(name)
        return way(self, name)

    with mock.patch.object(FrozenLayer, "_way", counted):
        results = [layer.run(reads._replace(everything=kind), Epilogue()) for kind in (False, True)]
    assert made == ["rows", "dense"]
    layer.settle()
    assert set(layer._ways) == {"rows", "dense"}
    for result in results:
        torch.testing.assert_close(result, rows @ weight[:, :, 0, 0].T, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.weight, weight)
    assert len(held(layer, {}, set())) == 1


def test_the_table_of_all_pixels_is_the_kernel_map_between_them() -> None:
    cpu = torch.device("cpu")
    for window in (
        Window((3, 3), (2, 1), (1, 1)),
        Window((7, 2), (2, 2), (3, 0)),
        Window((3, 3), (1, 1), (2, 2), (2, 2), "reflect"),
    ):
        source, target = ActiveSites.all(1, (8, 9), cpu), ActiveSites.all(1, (4, 7), cpu)
        found = dense_table((8, 9), window, (4, 7), cpu)
        assert found.dtype is torch.int32
        assert torch.equal(found, kernel_map(source, window, target).table)
