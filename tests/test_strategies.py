"""The strategies themselves: what they promise to draw is drawn, PyTorch takes every geometry; and `conftest.py`."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn import functional as F

from tests import strategies
from tests.strategies import MASKS, PADDING_MODES, Conv, Pool

# As many examples as a property test draws, so that each of them meets what is found here.
drawing = settings(max_examples=40, phases=[hypothesis.Phase.generate], suppress_health_check=list(HealthCheck))


def drawn(strategy: Any) -> list[Any]:
    found = []

    @drawing
    @given(strategy)
    def draw(value: Any) -> None:
        found.append(value)

    draw()
    return found


def share(found: list[Any], predicate: Callable[[Any], Any]) -> float:
    return sum(bool(predicate(value)) for value in found) / len(found)


def kinds(mask: Tensor) -> set[str]:
    """The kinds that a mask could be an example of, by looking at it."""
    active = mask.flatten(1).sum(1)
    border = torch.zeros_like(mask)
    border[:, [0, -1]] = border[:, :, [0, -1]] = True
    found = {
        "full": bool(mask.all()),
        "empty": not mask.any(),
        "one pixel": int(active.sum()) == 1,
        "border": torch.equal(mask, border) and not mask.all(),
        "one empty image": bool((active == 0).any() and (active > 0).any()),
    }
    return {kind for kind, is_one in found.items() if is_one} or {"random", "blobs"}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_of_the_kind_asked_for(kind: str) -> None:
    for mask in drawn(strategies.masks(2, (7, 9), kind)):
        assert mask.shape == (2, 7, 9)
        assert mask.dtype == torch.bool
        if kind not in ("random", "blobs"):
            assert kind in kinds(mask)


def test_every_kind_of_mask_is_drawn() -> None:
    assert {kind for mask in drawn(strategies.masks()) for kind in kinds(mask)} == set(MASKS)


def test_batches_differ_in_their_images() -> None:
    found = drawn(strategies.masks(3, (9, 9), "random"))
    assert share(found, lambda mask: not torch.equal(mask[0], mask[1])) > 0.7
    assert len({tuple(mask.flatten().tolist()) for mask in found}) > 20


CONVOLUTIONS: dict[str, Callable[[Conv], bool]] = {
    **{mode: lambda conv, mode=mode: conv.padding_mode == mode for mode in PADDING_MODES},
    "padded by another mode": lambda conv: conv.padding_mode != "zeros" and conv.padding not in ("valid", 0, (0, 0)),
    "same": lambda conv: conv.padding == "same",
    "valid": lambda conv: conv.padding == "valid",
    "padding int": lambda conv: isinstance(conv.padding, int) and conv.padding > 0,
    "padding pair": lambda conv: isinstance(conv.padding, tuple) and conv.padding[0] != conv.padding[1],
    "even same": lambda conv: conv.padding == "same" and conv.kernel[0] % 2 == 0 and conv.dilation[0] % 2 == 1,
    "not square": lambda conv: conv.kernel[0] != conv.kernel[1],
    "one tap": lambda conv: conv.kernel == (1, 1),
    "large kernel": lambda conv: max(conv.kernel) >= 6,
    "stride": lambda conv: max(conv.stride) == 3,
    "dilation": lambda conv: max(conv.dilation) == 3,
    "dense": lambda conv: conv.groups == 1,
    "groups": lambda conv: 1 < conv.groups < conv.inputs,
    "depthwise": lambda conv: conv.groups == conv.inputs > 1,
    "bias": lambda conv: conv.bias,
    "no bias": lambda conv: not conv.bias,
    "one pixel": lambda conv: 1 in conv.size,
    "batch": lambda conv: conv.batch > 1,
}


def test_every_kind_of_convolution_is_drawn() -> None:
    found = drawn(strategies.convolutions())
    missing = [name for name, predicate in CONVOLUTIONS.items() if not any(map(predicate, found))]
    assert not missing


def test_pytorch_takes_every_convolution() -> None:
    for conv in drawn(strategies.convolutions()):
        assert conv.module()(conv.input()).numel() > 0


POOLINGS: dict[str, Callable[[Pool], Any]] = {
    "max": lambda pool: pool.function is F.max_pool2d,
    "average": lambda pool: pool.function is F.avg_pool2d,
    "ceil_mode": lambda pool: pool.arguments["ceil_mode"],
    "ceil_mode that counts": lambda pool: (
        pool(torch.zeros(1, 1, *pool.size)).shape
        != Pool(1, pool.size, pool.function, {**pool.arguments, "ceil_mode": False})(
            torch.zeros(1, 1, *pool.size)
        ).shape
    ),
    "padding": lambda pool: max(pool.arguments["padding"]) > 0,
    "dilation": lambda pool: max(pool.arguments.get("dilation", (1, 1))) > 1,
    "stride of the kernel": lambda pool: pool.arguments["stride"] is None,
    "padding not counted": lambda pool: (
        not pool.arguments.get("count_include_pad", True) and max(pool.arguments["padding"]) > 0
    ),
    "padding counted": lambda pool: pool.arguments.get("count_include_pad") and max(pool.arguments["padding"]) > 0,
    "divisor": lambda pool: pool.arguments.get("divisor_override"),
}


def test_every_kind_of_pooling_is_drawn() -> None:
    found = drawn(strategies.poolings())
    missing = [name for name, predicate in POOLINGS.items() if not any(map(predicate, found))]
    assert not missing


def test_uninitialised_memory_is_poisoned() -> None:
    for memory in (torch.empty(3), torch.ones(2).new_empty(3), torch.empty_like(torch.ones(2, 2).double())):
        assert memory.isnan().all()


@given(strategies.sides)
def test_every_example_meets_the_same_random_numbers(side: int) -> None:
    assert torch.equal(torch.rand(side), torch.rand(side, generator=torch.Generator().manual_seed(0)))
