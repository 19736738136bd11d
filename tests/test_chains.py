"""Convolutions that follow one another in a frozen `nn.Sequential` give what the modules give one by one, whatever is
done to these modules between two passes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsenet
from sparsenet.programs import Program
from tests.bodies import images, masked, selective
from tests.models import assert_same

WIDTH = 6


def pointwise(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 1, **options)


def depthwise(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, **options)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": pointwise,
    "depthwise": depthwise,
    "step": lambda: depthwise(stride=2, bias=False),
    "whole": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
    "reflecting": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 1, groups=2),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "pool": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "nothing": nn.Identity,
}


def block() -> nn.Sequential:
    """As of MobileNetV2."""
    return nn.Sequential(
        nn.Sequential(pointwise(bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU6(inplace=True)),
        nn.Sequential(depthwise(), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(0.1)),
        pointwise(),
        nn.BatchNorm2d(WIDTH),
    )


@given(
    names=st.lists(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_sequence(names: list[list[str]], batch: int, seed: int) -> None:
    """Nested or not, on the first pass and on later ones, of other sizes too."""
    parts = [nn.Sequential(*(PARTS[name]() for name in each)) for each in names]
    model = selective(nn.Sequential(pointwise(), *parts), WIDTH)
    frozen = sparsenet.freeze(model, images())
    for count, size in [(2, 12), (batch, 9), (2, 12), (2, 12)]:
        with masked(seed, count, size):
            assert_same(frozen(images(count, size)), model(images(count, size)))


def test_what_lies_between_has_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read one another's rows, also where containers are nested."""
    seen: list[int] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, x: (seen.append(len(self._steps)), run(self, x))[1])
    model = selective(block(), WIDTH, torch.float32)
    frozen = sparsenet.freeze(model, images(dtype=torch.float32))
    with masked():
        for _ in range(3):
            seen.clear()
            frozen(images(dtype=torch.float32))
    assert seen == ([2] if frozen.body[2].layer.kernels("guided") else [])


@torch.no_grad()
def norm_written_to(body: Any) -> None:
    body[0][1].running_mean.add_(1)
    body[1][1].weight.mul_(2)


@torch.no_grad()
def bias_written_to(body: Any) -> None:
    body[2].bias.add_(1)


def other_statistics(body: Any) -> None:
    body[0][1].running_var = torch.full((WIDTH,), 3.0, dtype=torch.float64)


def other_eps(body: Any) -> None:
    body[0][1].eps = 0.5


def other_slope(body: Any) -> None:
    body[1][2].negative_slope = 0.7


def by_the_batch(body: Any) -> None:
    body[1][1].train()


def another_activation(body: Any) -> None:
    body[0][2] = nn.Tanh()


def one_part_less(body: Any) -> None:
    del body[0][1]


def one_part_more(body: Any) -> None:
    body.append(nn.ReLU())


def hooked(body: Any) -> None:
    body[0][2].register_forward_hook(lambda module, args, output: output * 2)


def hooked_container(body: Any) -> None:
    body[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hooked_convolution(body: Any) -> None:
    body[1][0].register_forward_hook(lambda module, args, output: -output)


@pytest.mark.parametrize(
    "change",
    [
        norm_written_to,
        bias_written_to,
        other_statistics,
        other_eps,
        other_slope,
        by_the_batch,
        another_activation,
        one_part_less,
        one_part_more,
        hooked,
        hooked_container,
        hooked_convolution,
    ],
)
def test_what_is_done_to_the_modules_is_seen(change: Callable[[Any], None]) -> None:
    model = selective(block(), WIDTH)
    frozen = sparsenet.freeze(model, images())
    with masked():
        for _ in range(3):
            before = frozen(images())
        assert_same(before, model(images()))
        for each in (model, frozen):
            change(each.body)
        after = frozen(images())
        assert not torch.allclose(after, before)
        assert_same(after, model(images()))


def test_copies_and_pickles() -> None:
    model = selective(block(), WIDTH, torch.float32)
    frozen = sparsenet.freeze(model, images(dtype=torch.float32))
    with masked():
        x = images(dtype=torch.float32)
        expected = frozen(x)
        for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            torch.testing.assert_close(other(x), expected)
            with torch.no_grad():
                other.body[0][1].running_mean.add_(1)
            assert not torch.allclose(other(x), expected)
        assert torch.equal(frozen(x), expected)


def test_a_record_counts_every_layer() -> None:
    model = selective(block(), WIDTH)
    frozen = sparsenet.freeze(model, images())
    with masked():
        frozen(images())
        with sparsenet.record(model) as expected:
            model(images())
        with sparsenet.record(frozen) as found:
            frozen(images())
    guided = [[(each.name, each.macs) for each in record.operations if each.convolves] for record in (expected, found)]
    assert guided[0] == guided[1] and len(guided[0]) == 3
