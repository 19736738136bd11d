"""A frozen Selective Module against itself, not frozen."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsenet
from sparsenet import frozen_layer
from sparsenet.chains import FusedForward
from sparsenet.frozen_branch import MOST_SIZES, BranchForward, DirectForward, OctavesForward, _held, _Recording
from sparsenet.frozen_modules import FrozenConv2d
from sparsenet.kernels import machine, queue
from sparsenet.selector.levels import LearnedLevels, Octaves
from sparsenet.selector.selective_module import SelectiveModule

SWITCHES = ("dilated", "non_local", "deconv", "skip", "separable")
ALONE = ["all", *(f"no {name}" for name in SWITCHES), "none"]
side = st.integers(1, 23)


@cache
def made(name: str, dtype: torch.dtype) -> tuple[SelectiveModule, Any]:
    """A module as if trained, and the same frozen."""
    torch.manual_seed(0)
    off = SWITCHES if name == "none" else [name.removeprefix("no ")]
    module = SelectiveModule(12, 8, **{switch: switch not in off for switch in SWITCHES}).to(dtype).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    if hasattr(module.attend, "restore"):
        nn.init.normal_(module.attend.restore.weight)
    nn.init.normal_(module.logit.weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_layer, "MARGIN", 0)  # by kernels that wait, whatever is faster in this moment
        return module, sparsenet.freeze(module, torch.randn(1, 12, 20, 21, dtype=dtype))


def compare(found: Tensor, module: SelectiveModule, features: Tensor) -> None:
    """To a few roundings of what the sums are made of, beside the dense float32 module's own distance to float64."""
    exact = copy.deepcopy(module).double()(features.double())
    error = (module(features) - exact).abs().max()
    limit = 4 * error + 16 * torch.finfo(features.dtype).eps * exact.abs().max()
    assert found.shape == exact.shape and found.dtype == features.dtype
    assert (found - exact).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_every_variant_frozen_equals_itself(name: str, dtype: torch.dtype) -> None:
    module, frozen = made(name, dtype)
    direct = [part for part in frozen.modules() if isinstance(vars(part).get("forward"), DirectForward)]
    under = {id(part) for each in direct for part in each.modules()}
    assert {id(part) for part in frozen.modules() if isinstance(part, FrozenConv2d)} <= under
    for batch, size, memory in [(1, (45, 38), torch.channels_last), (3, (6, 7), torch.contiguous_format)]:
        features = torch.randn(batch, 12, *size, dtype=dtype).contiguous(memory_format=memory)
        compare(frozen(features), module, features)


@given(side, side, st.integers(1, 3))
@torch.no_grad()
def test_any_size_and_batch(height: int, width: int, batch: int) -> None:
    module, frozen = made("all", torch.float32)
    features = torch.randn(batch, 12, height, width)
    compare(frozen(features), module, features)


@torch.no_grad()
def test_inside_a_selective_model_it_reads_what_the_stage_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 4, 3, padding=1)
    )
    branch, image = made("all", torch.float32)[0], torch.randn(2, 3, 40, 44)
    selective = sparsenet.selectify(model.eval(), "pool1", selector=copy.deepcopy(branch), example_inputs=image).eval()
    frozen = sparsenet.freeze(selective, image)
    with sparsenet.record(selective) as expected, sparsenet.record(frozen) as watched:
        selective(image)
        frozen(image)
    assert (watched.macs, watched.dense_macs) == (expected.macs, expected.dense_macs)
    compare(frozen.selector.module(model[:4](image)), branch, model[:4](image))
    torch.testing.assert_close(frozen(image), selective(image))


@torch.no_grad()
def test_hooks_inside_are_called() -> None:
    module, frozen = made("all", torch.float32)
    frozen, seen = copy.deepcopy(frozen), []
    frozen.head[1].register_forward_hook(lambda *_: seen.append("norm"))
    features = torch.randn(1, 12, 9, 8)
    compare(frozen(features), module, features)
    assert seen == ["norm"]


def altered(module: Any, change: str) -> None:
    match change:
        case "weights of the transposed convolution":
            module.up.weight.mul_(-2)
        case "a bias of it":
            module.up.bias = nn.Parameter(torch.randn(8), requires_grad=False)
        case "a normalisation":
            module.up_norm.running_mean.add_(1)
        case "another activation":
            module.head[-1] = nn.ELU()
        case "no skip":
            module.skip = False
        case "no attention":
            module.attend = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [
        "weights of the transposed convolution",
        "a bias of it",
        "a normalisation",
        "another activation",
        "no skip",
        "no attention",
    ],
)
@torch.no_grad()
def test_what_is_changed_later_counts(change: str) -> None:
    module, frozen = (copy.deepcopy(each) for each in made("all", torch.float32))
    features = torch.randn(2, 12, 13, 10)
    for _ in range(2):  # what was recorded, too
        compare(frozen(features), module, features)
    for each in (module, frozen):
        torch.manual_seed(1)
        altered(each, change)
    compare(frozen(features), module, features)


@torch.no_grad()
def test_all_of_it_is_computed_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, frozen = made("all", torch.float32)
    monkeypatch.setattr(SelectiveModule, "forward", None)
    features = torch.randn(2, 12, 45, 38)
    found = frozen(features)
    monkeypatch.undo()
    compare(found, module, features)


def recordings(frozen: Any) -> list[Any]:
    return [each for free in frozen.forward._recorded.values() for each in free or ()]


def recorded(*sizes: tuple[int, ...]) -> tuple[SelectiveModule, Any]:
    """A module, and the same frozen, which has met features of these sizes."""
    module, frozen = made("all", torch.float32)
    frozen = copy.deepcopy(frozen)
    for size in sizes:
        frozen(torch.randn(size))
    return module, frozen


@pytest.mark.parametrize("size", [(1, 12, 13, 10), (3, 12, 9, 8)])
@torch.no_grad()
def test_what_was_recorded_is_computed_on_other_features(
    size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever these lie; what it gave before stays as it was."""
    module, frozen = recorded(size)
    assert len(recordings(frozen)) == 1
    monkeypatch.setattr(BranchForward, "_logits", None)
    layouts = (torch.contiguous_format, torch.channels_last)
    features = [torch.randn(size).contiguous(memory_format=layouts[turn % 2]) for turn in range(4)]
    found = [frozen(each) for each in features]
    for logits, each in zip(found, features, strict=True):
        compare(logits, module, each)
    assert len({logits.data_ptr() for logits in found}) == 4


@torch.no_grad()
def test_rows_that_lie_otherwise_are_recorded_for_themselves() -> None:
    """A part of the channels of a wider map in channels-last memory."""
    size = (2, 12, 9, 8)
    module, frozen = recorded(size)
    wide = torch.randn(2, 20, 9, 8).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        compare(frozen(wide[:, 3:15]), module, wide[:, 3:15])
        compare(frozen(wide[:, 8:]), module, wide[:, 8:])
    assert len(recordings(frozen)) == 2


@torch.no_grad()
def test_a_recording_is_for_one_pass_at_a_time() -> None:
    size = (1, 12, 13, 10)
    module, frozen = recorded(size)
    features = [torch.randn(size) for _ in range(2)]
    inner: list[Tensor] = []
    wait = _Recording.wait

    def another(self: Any, rows: Tensor, logits: Tensor) -> None:
        if not inner:  # while the first pass has its recording, a second one begins
            inner.append(torch.empty(0))
            inner[:] = [frozen(features[1])]
        wait(self, rows, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Recording, "wait", another)
        outer = frozen(features[0])
    compare(outer, module, features[0])
    compare(inner[0], module, features[1])
    assert len(recordings(frozen)) == 2
    assert len({id(each) for each in recordings(frozen)}) == 2


@torch.no_grad()
def test_threads_of_the_caller_have_a_recording_each() -> None:
    size = (1, 12, 21, 20)
    module, frozen = recorded(size)
    with ThreadPoolExecutor(4) as threads:
        features = [torch.randn(size) for _ in range(40)]
        for logits, each in zip(threads.map(frozen, features), features, strict=True):
            compare(logits, module, each)


@torch.no_grad()
def test_threads_of_one_pass_record_their_own() -> None:
    """They have the queue of the pass in common."""
    size = (1, 12, 13, 10)
    module, frozen = recorded()
    [alone] = recordings(recorded(size)[1])
    other, ready = copy.deepcopy(frozen), Barrier(2)
    features = [torch.randn(size) for _ in range(2)]

    def run(each: Any, image: Tensor) -> Tensor:
        ready.wait()
        return each(image)

    with queue.waiting(), ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            for twin in (frozen, other):
                twin.forward._recorded.clear()
            context = [copy_context() for _ in range(2)]
            found = [
                threads.submit(context[place].run, run, each, features[place])
                for place, each in enumerate((frozen, other))
            ]
            [logits.result() for logits in found]
            made = [len(each.jobs) for twin in (frozen, other) for each in recordings(twin)]
            assert made == [len(alone.jobs)] * 2
    for twin in (frozen, other):
        compare(twin(features[0]), module, features[0])


@torch.no_grad()
def test_recordings_have_scratch_memory_of_their_own() -> None:
    like = torch.empty(0)
    with queue.waiting():
        before = queue.current().scratch(10, like)
        with queue.keeping():
            first = queue.current().scratch(10, like)
        with queue.keeping():
            second = queue.current().scratch(10, like)
        assert queue.current().scratch(10, like) is before
    assert len({each.data_ptr() for each in (before, first, second)}) == 3


@torch.no_grad()
def test_recordings_keep_neither_features_nor_logits() -> None:
    """Neither of the pass that was recorded nor of a later one."""
    _, frozen = recorded()
    features = [torch.randn(1, 12, 13, 10).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    given_away = {part.untyped_storage().data_ptr() for part in (*features, *[frozen(each) for each in features])}
    held = {part.untyped_storage().data_ptr() for each in recordings(frozen) for part in _held(each.jobs)}
    assert held and not held & given_away


@torch.no_grad()
def test_recordings_are_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1, 12, 5, width) for width in range(1, MOST_SIZES + 4)]
    _, frozen = recorded(*sizes)
    assert 0 < len(recordings(frozen)) <= MOST_SIZES
    module, frozen = recorded((1, 12, 300, 300))
    assert not recordings(frozen)
    monkeypatch.setattr(queue, "keeping", None)  # it is not tried again
    features = torch.randn(1, 12, 300, 300)
    compare(frozen(features), module, features)


@torch.no_grad()
def test_an_interrupted_recording_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (1, 12, 13, 10)
    module, frozen = recorded(size)
    run = machine.Launch.run

    def interrupt(*_: Any) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(machine.Launch, "run", interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        frozen(torch.randn(size))
    monkeypatch.setattr(machine.Launch, "run", run)
    assert not recordings(frozen)
    features = torch.randn(size)
    compare(frozen(features), module, features)


@given(side, side, st.integers(0, 3), st.integers(0, 6), st.sampled_from([0.5, 0.3, 0.9]), st.integers(0, 99))
@torch.no_grad()
def test_octaves(height: int, width: int, batch: int, count: int, threshold: float, seed: int) -> None:
    """Logits and masks of all, but where a probability is the threshold to rounding."""
    torch.manual_seed(seed)
    octaves = Octaves({str(k): nn.Conv2d(1, 1, 3, 2, 1) for k in range(1, count + 1)})
    for convolution in octaves.values():
        nn.init.normal_(convolution.weight, std=2.0)
    logits = 3 * torch.randn(batch, 1, height, width)
    exact, _ = copy.deepcopy(octaves).double()(logits.double(), threshold)
    found, masks = OctavesForward(octaves)(logits, threshold)
    assert len(found) == count + 1
    for each, mask, wanted in zip(found, masks, exact, strict=True):
        torch.testing.assert_close(each, wanted.float(), rtol=1e-4, atol=1e-4)
        probabilities = wanted[:, 0].sigmoid()
        clear = (probabilities - threshold).abs() > 1e-4
        assert torch.equal(mask[clear], (probabilities > threshold)[clear])


@pytest.mark.parametrize("entry", [(40, 41), (2, 40), (40, 1)])
@torch.no_grad()
def test_masks_are_of_the_same_octaves(entry: tuple[int, int]) -> None:
    """Which octave a size is of, its height alone says."""
    torch.manual_seed(0)
    octaves = Octaves({str(k): nn.Conv2d(1, 1, 3, 2, 1) for k in range(1, 4)})
    for convolution in octaves.values():
        nn.init.normal_(convolution.weight, std=2.0)
    logits = 3 * torch.randn(2, 1, *entry)
    plain = LearnedLevels(logits, octaves, 0.5, None)
    kernels = LearnedLevels(logits, copy.deepcopy(octaves), 0.5, None)
    kernels.octaves, kernels._masks = OctavesForward(octaves)(logits, 0.5)
    for size in [entry, (20, 21), (10, 10), (2, 20), (1, 10), (20, 1), (1, 40), (7, 9)]:
        assert torch.equal(kernels.mask(size), plain.mask(size)), size


@torch.no_grad()
def test_what_is_on_the_threshold_is_not_above() -> None:
    octaves = Octaves({"1": nn.Conv2d(1, 1, 3, 2, 1)})
    nn.init.zeros_(octaves["1"].weight)
    nn.init.zeros_(octaves["1"].bias)
    _, masks = OctavesForward(octaves)(torch.zeros(2, 1, 9, 20), 0.5)
    assert [int(mask.sum()) for mask in masks] == [0, 0]


@torch.no_grad()
def test_hooks_between_octaves_are_called() -> None:
    octaves, seen = Octaves({"1": nn.Conv2d(1, 1, 3, 2, 1)}), []
    octaves["1"].register_forward_hook(lambda *_: seen.append(1))
    _, masks = OctavesForward(octaves)(torch.randn(1, 1, 9, 8), 0.5)
    assert seen == [1] and not masks


@torch.no_grad()
def test_pickled_it_is_as_it_was() -> None:
    module, frozen = made("no non_local", torch.float32)
    loaded, features = pickle.loads(pickle.dumps(frozen)), torch.randn(2, 12, 9, 8)
    compare(loaded(features), module, features)


@torch.no_grad()
def test_what_kernels_do_not_compute_is_left_as_it_was() -> None:
    module = copy.deepcopy(made("all", torch.float32)[0]).bfloat16()
    features = torch.randn(1, 12, 9, 8, dtype=torch.bfloat16)
    frozen = sparsenet.freeze(module, features)
    assert not any(isinstance(vars(part).get("forward"), DirectForward) for part in frozen.modules())
    assert any(isinstance(vars(part).get("forward"), FusedForward) for part in frozen.modules())
    assert torch.equal(frozen(features), module(features))


@torch.no_grad()
def test_no_image_gives_no_logit() -> None:
    _, frozen = made("all", torch.float32)
    assert frozen(torch.randn(0, 12, 9, 8)).shape == (0, 1, 9, 8)


@torch.no_grad()
def test_what_replaced_its_parts_is_computed_too() -> None:
    module = copy.deepcopy(made("all", torch.float32)[0])
    features = torch.randn(2, 12, 9, 8)
    module.head[1] = nn.SyncBatchNorm.convert_sync_batchnorm(module.head[1])
    module.down[2] = nn.ELU()
    compare(sparsenet.freeze(module, features)(features), module, features)


@torch.no_grad()
def test_what_it_cannot_read_is_refused_as_ever() -> None:
    _, frozen = made("all", torch.float32)
    for features in (torch.randn(1, 11, 9, 8), torch.randn(11, 9, 8)):
        with pytest.raises(RuntimeError, match="channels"):
            frozen(features)


@torch.no_grad()
def test_inside_another_selector_it_reads_what_that_gives() -> None:
    """A padded map, which waits for its reader, is not yet the ordinary map that it is of."""
    torch.manual_seed(0)
    branch = made("all", torch.float32)[0]
    outer = nn.Sequential(nn.ZeroPad2d(2), copy.deepcopy(branch), nn.ZeroPad2d(-2))
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(12, 4, 3, padding=1)).eval()
    image = torch.randn(2, 3, 40, 44)
    selective = sparsenet.selectify(model, "pool1", selector=outer, example_inputs=image).eval()
    frozen = sparsenet.freeze(selective, image)
    with sparsenet.record(selective) as expected, sparsenet.record(frozen) as watched:
        selective(image)
        frozen(image)
    assert torch.equal(watched.masks[20, 22], expected.masks[20, 22])
    torch.testing.assert_close(frozen(image), selective(image))
