"""Static capacity: so many active pixels for each size, whatever the saliency; and masks by threshold on a device,
which is waited for at most once in a pass."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsenet
from sparsenet.selection import Options, Selection
from sparsenet.selector.levels import ALWAYS_ON, GivenLevels, LearnedLevels, Octaves, active_count, strongest
from tests import strategies
from tests.helpers import gradients
from tests.models import selective_branches as selective
from tests.strategies import Pair

capacities = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
KINDS = ("random", "constant", "ties", "nan", "all nan", "infinite")


def scores(kind: str, batch: int, size: Pair) -> Tensor:
    found = torch.randn(batch, *size, dtype=torch.float64)
    match kind:
        case "constant":
            return torch.zeros_like(found)
        case "ties":
            return found.round()
        case "nan":
            return found.where(torch.rand(batch, *size) < 0.7, math.nan)
        case "all nan":
            return found * math.nan
        case "infinite":
            return found.where(torch.rand(batch, *size) < 0.5, -math.inf).where(
                torch.rand(batch, *size) < 0.9, math.inf
            )
    return found


@given(st.sampled_from(KINDS), strategies.batches, strategies.sizes, st.data())
def test_the_strongest_are_the_first_of_a_stable_sort(kind: str, batch: int, size: Pair, data: Any) -> None:
    numbers, count = scores(kind, batch, size), data.draw(st.integers(1, size[0] * size[1]))
    found = strongest(numbers, count)
    for image, mask in zip(numbers.tolist(), found, strict=True):
        flat = [-math.inf if math.isnan(number) else number for line in image for number in line]
        best = sorted(range(len(flat)), key=lambda place: (-flat[place], place))[:count]
        assert mask.flatten().nonzero()[:, 0].tolist() == sorted(best)


def levels(kind: str, batch: int, size: Pair, capacity: float, octaves: int, target: Any = None) -> LearnedLevels:
    down = Octaves({str(k): nn.Conv2d(1, 1, 3, 2, 1).double() for k in range(1, octaves + 1)})
    return LearnedLevels(scores(kind, batch, size)[:, None], down, 0.5, None, target, capacity)


@given(st.sampled_from(KINDS), strategies.batches, strategies.sizes, strategies.sizes, capacities, st.integers(0, 2))
def test_every_size_has_its_number(
    kind: str, batch: int, entry: Pair, size: Pair, capacity: float, octaves: int
) -> None:
    expected = active_count(capacity, size)
    assert expected == (size[0] * size[1] if max(size) <= ALWAYS_ON else max(1, round(capacity * size[0] * size[1])))
    for given_or_learned in (
        levels(kind, batch, entry, capacity, octaves),
        GivenLevels(scores(kind, batch, entry) > 0, capacity),
    ):
        mask = given_or_learned.mask(size)
        assert mask.shape == (batch, *size)
        assert mask.flatten(1).sum(1).tolist() == [expected] * batch
        assert given_or_learned.count(size) == expected


@given(strategies.masks(), strategies.sizes, capacities)
def test_a_given_mask_ranks_the_cells_that_it_covers(mask: Tensor, size: Pair, capacity: float) -> None:
    found = GivenLevels(mask, capacity).mask(size)
    wanted = GivenLevels(mask).mask(size)
    for image, any_covered in zip(found, wanted, strict=True):
        if any_covered.sum() <= image.sum():
            assert image[any_covered].all()  # there is a place for each
        else:
            assert any_covered[image].all()  # and none for others


def test_octaves_that_nothing_predicts_follow_the_maximum() -> None:
    found = levels("random", 2, (16, 16), 0.25, 0)
    pooled = torch.nn.functional.max_pool2d(found.octaves[0], 2)[:, 0]
    assert torch.equal(found.mask((8, 8)), strongest(pooled, 16))


def test_targets_of_the_warm_up_go_before() -> None:
    target = torch.zeros(2, 8, 8, dtype=torch.bool)
    target[:, 3, 2:5] = True
    found = levels("random", 2, (8, 8), 0.25, 0, lambda size: target).mask((8, 8))
    assert found[target].all()
    assert found.flatten(1).sum(1).tolist() == [16, 16]


# -- whole networks ------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.sampled_from([0.05, 0.3, 0.8, 1.0]), st.sampled_from([(20, 20), (9, 17), (5, 30)]), st.booleans())
def test_rows_equal_the_reference_with_the_same_mask(capacity: float, size: Pair, counted: bool) -> None:
    model, images = selective(capacity), torch.rand(3, 3, *size, dtype=torch.float64)
    model.selector.counted = counted
    with torch.no_grad():
        with sparsenet.use_backend("reference"), sparsenet.record(model) as slow:
            expected = model(images)
        with sparsenet.record(model) as rec:
            found = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for met, mask in rec.masks.items():
        assert torch.equal(mask, slow.masks[met])
        assert mask.flatten(1).sum(1).tolist() == [active_count(capacity, met)] * 3


@pytest.mark.parametrize("bias", [0.0, math.nan, -math.inf])
def test_saliency_that_tells_nothing(bias: float) -> None:
    model = selective()
    nn.init.zeros_(model.selector.module.logit.weight)
    nn.init.constant_(model.selector.module.logit.bias, bias)
    images = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad(), sparsenet.record(model) as rec:
        model(images)
    assert rec.masks[20, 20][0].flatten().nonzero()[:, 0].tolist() == list(range(120))  # the first ones


def test_a_full_capacity_is_the_original() -> None:
    model, images = selective(1.0), torch.rand(2, 3, 20, 20, dtype=torch.float64)
    with torch.no_grad():
        found = model(images)
        torch.testing.assert_close(found, sparsenet.densify(model)(images), rtol=1e-9, atol=1e-9)


def test_training_reaches_the_selector_through_the_mask() -> None:
    model = selective().train()
    images = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    (gradient,) = gradients(model(images), [model.selector.module.logit.weight])
    assert gradient.abs().sum() > 0


def test_a_frozen_model_keeps_its_capacity() -> None:
    model, images = selective(dtype=torch.float32), torch.rand(2, 3, 20, 20)
    frozen = sparsenet.freeze(model, images)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-5)
        with sparsenet.record(frozen) as rec, sparsenet.use_mask(torch.ones(2, 4, 4).bool()):
            frozen(images)
        assert rec.masks[20, 20].flatten(1).sum(1).tolist() == [120, 120]


@pytest.mark.parametrize("capacity", [0, -0.1, 1.5, math.nan])
def test_a_capacity_that_is_no_share(capacity: float) -> None:
    with pytest.raises(ValueError, match="capacity must be a share of the pixels, above 0 and 1 at most"):
        Options(capacity=capacity)


# -- waiting for the device ------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations whose results the program would have to wait for on a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "item", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        boolean = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.NAMES or boolean or repeats:
            self.found[name] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the transfers of whole tensors, which pass no dispatch on CPU."""
    found: Counter[str] = Counter()

    def counting(name: str, original: Any) -> Any:
        def counted(self: Tensor, *args: Any) -> Any:
            found[name] += 1
            return original(self, *args)

        return counted

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
    return found


def waits(model: Any, images: Tensor, transfers: Counter[str]) -> int:
    """How often a pass as it runs on a device would wait for it."""
    model.selector.counted = True
    before = transfers.total()
    with torch.no_grad(), Waits() as seen:
        model(images)
    return transfers.total() - before + seen.found.total()


def test_the_counters_see_what_waits(transfers: Counter[str]) -> None:
    with Waits() as seen:
        mask = torch.rand(3, 4) < 0.5
        mask.nonzero()
        mask[mask]
        mask.sum().item()
        int(mask.sum())
        bool(mask.all())
        torch.equal(mask, mask)
        mask.tolist()
    assert seen.found.keys() >= {"nonzero", "index", "_local_scalar_dense"}
    assert seen.found["_local_scalar_dense"] + seen.found["is_nonzero"] == 3
    assert transfers == {"tolist": 1}


@pytest.mark.parametrize("given_mask", [False, True])
def test_a_capacity_never_waits(given_mask: bool, transfers: Counter[str]) -> None:
    model, images = selective(), torch.rand(2, 3, 20, 20, dtype=torch.float64)
    if not given_mask:
        assert waits(model, images, transfers) == 0
        assert waits(model, torch.rand(2, 3, 14, 9, dtype=torch.float64), transfers) == 0  # a size that none had seen
        return
    with sparsenet.use_mask(torch.rand(2, 5, 5) < 0.5):
        assert waits(model, images, transfers) == 0


def test_a_threshold_waits_once(transfers: Counter[str]) -> None:
    model, images = selective(None), torch.rand(2, 3, 20, 20, dtype=torch.float64)
    assert waits(model, images, transfers) == 1
    with sparsenet.use_mask(torch.rand(2, 5, 5) < 0.5):
        assert waits(model, images, transfers) == 1
    boxes = torch.tensor([[2.0, 3, 9, 8]])
    with sparsenet.use_mask([boxes, boxes[:0]]):
        assert waits(model, images, transfers) == 1


def test_sizes_that_no_pass_had_met_are_reported_and_counted_ahead_from_then_on(transfers: Counter[str]) -> None:
    model, images = selective(None), torch.rand(2, 3, 33, 12, dtype=torch.float64)
    model.selector.counted = True
    with torch.no_grad(), sparsenet.record(model) as rec:
        model(images)
    late = [operation for operation in rec.operations if operation.status == "wait"]
    assert late and all("no pass had met the size" in (operation.reason or "") for operation in late)
    assert waits(model, images, transfers) == 1
    with torch.no_grad(), sparsenet.record(model) as rec:
        model(images)
    assert not [operation for operation in rec.operations if operation.status == "wait"]


def test_the_dense_storage_never_waits(transfers: Counter[str]) -> None:
    model, images = selective(None), torch.rand(2, 3, 20, 20, dtype=torch.float64)
    with sparsenet.use_backend("reference"):
        assert waits(model, images, transfers) == 0


@given(strategies.masks(), strategies.sizes)
def test_counted_sites_are_those_of_the_kernels(mask: Tensor, size: Pair) -> None:
    entry = (mask.shape[1], mask.shape[2])
    ahead, late, plain = (
        Selection(GivenLevels(mask), len(mask), entry, mask.device, Options("rows"), counted=counted)
        for counted in (True, True, False)
    )
    ahead.prepare([entry, size])
    for each in (entry, size):
        for found in (ahead, late):
            for name in ("index", "rank", "counts"):
                one, other = getattr(found.sites(each), name), getattr(plain.sites(each), name)
                assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_torchvision_network_waits_once(transfers: Counter[str]) -> None:
    images = torch.rand(2, 3, 64, 64)
    resnet = torchvision.models.resnet18(weights=None).eval()
    model = sparsenet.selectify(resnet, "layer1", example_inputs=images)
    assert waits(model, images, transfers) <= 1
    model = sparsenet.selectify(resnet, "layer1", example_inputs=images, capacity=0.3)
    assert waits(model, images, transfers) == 0
