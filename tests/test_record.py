"""What a record tells of a pass: masks, saliency, density, and multiply-accumulates counted by hand."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask, SelectiveModule
from tests.models import SmallNet, at_size, blobs, small_ssd

BACKENDS = ("reference", "rows", "spconv")
SIZE, HALF = (16, 20), (8, 10)
IMAGES = torch.rand(2, 3, *SIZE)


def selective(model: nn.Module, at: str = "stem", **options: Any) -> nn.Module:
    options = {"selector": GivenMask(), "example_inputs": IMAGES, **options}
    return sparsenet.selectify(model.eval(), at, **options)


@pytest.fixture
def net() -> nn.Module:
    return selective(SmallNet())


@pytest.fixture
def learned() -> nn.Module:
    """With a mask that is partly on, and partly on at half the size."""
    model = selective(SmallNet(), selector=nn.Conv2d(6, 1, 1))
    features = model.stem[1](model.stem[0](IMAGES))
    with torch.no_grad():
        model.selector.module.bias.fill_(-F.conv2d(features, model.selector.module.weight).median())
    return model


# -- multiply-accumulates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "giga"), [(21, 31.3735), (81, 34.3604)])
def test_macs_of_ssd300(classes: int, giga: float) -> None:
    """The published layer table's sums, in the plan and in a recorded pass."""
    model = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=classes).eval()
    model.score_thresh = 1.0
    selective = sparsenet.selectify(model, "pool3", selector=GivenMask())
    assert sparsenet.plan(selective).total_macs / 1e9 == pytest.approx(giga, abs=5e-5)
    with torch.no_grad(), sparsenet.record(selective) as rec:
        with sparsenet.use_mask([torch.ones(300, 300, dtype=torch.bool)]):
            selective([torch.rand(3, 300, 300)])
        assert rec.macs == rec.dense_macs == sparsenet.plan(selective).total_macs
        with sparsenet.use_mask([torch.zeros(300, 300, dtype=torch.bool)]):
            selective([torch.rand(3, 300, 300)])
        assert rec.dense_macs == sparsenet.plan(selective).total_macs
        assert rec.macs / 1e9 == pytest.approx(16.744, abs=5e-4)  # what lies before pool3
    assert sparsenet.plan(selective).downstream_macs == rec.dense_macs - rec.macs


@pytest.mark.parametrize("backend", BACKENDS)
def test_macs_follow_the_active_rows(net: nn.Module, backend: str) -> None:
    mask = blobs(2, SIZE)
    fine, coarse = (int(at_size(mask, size).sum()) for size in (SIZE, HALF))
    assert 0 < coarse < fine < 2 * 16 * 20
    pixels, half_pixels = 2 * 16 * 20, 2 * 8 * 10
    stem, classify = pixels * 3 * 6 * 9, 2 * 12 * 5
    with sparsenet.record(net) as rec, sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        net(IMAGES)
    assert rec.macs == stem + coarse * (6 * 12 * 9 + 12 * 12 * 9) + classify
    assert rec.dense_macs == stem + half_pixels * (6 * 12 * 9 + 12 * 12 * 9) + classify
    guided = [operation for operation in rec.operations if operation.status == "guided"]
    assert [operation.macs for operation in guided] == [coarse * 6 * 12 * 9, coarse * 12 * 12 * 9]
    assert [operation.size for operation in guided] == [HALF, HALF]
    assert {operation.backend for operation in guided} == {backend}


@pytest.mark.parametrize("backend", BACKENDS)
def test_macs_of_groups_strides_and_points(backend: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, (3, 5), padding="same", groups=4),
        nn.Conv2d(12, 4, 1),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 4, 2, stride=2),  # whose every output pixel meets one of its four taps
        nn.Conv2d(4, 2, 3),
        nn.Flatten(2),  # it leaves
        nn.Conv1d(2, 3, 1),  # and runs dense
    )
    model = selective(model, "0")
    mask = blobs(2, SIZE, seed=4)
    active, pixels = int(mask.sum()), 2 * 16 * 20
    inner = int(at_size(mask, (14, 18)).sum())
    dense_tail = 2 * 14 * 18 * 2 * 3
    with sparsenet.record(model) as rec, sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        model(IMAGES)
    stem = pixels * 3 * 8 * 9
    assert 0 < inner < 2 * 14 * 18
    assert rec.macs == stem + active * (2 * 12 * 15 + 12 * 4 + 4 * 4) + inner * 4 * 2 * 9 + dense_tail
    dense_inner = 2 * 14 * 18 * 4 * 2 * 9
    assert rec.dense_macs == stem + pixels * (2 * 12 * 15 + 12 * 4 + 4 * 4) + dense_inner + dense_tail
    assert (
        rec.dense_macs
        == 2 * sparsenet.plan(selective(sparsenet.densify(model), "0", example_inputs=IMAGES[:1])).total_macs
    )


def test_macs_are_those_of_the_empty_mask_too(net: nn.Module) -> None:
    with sparsenet.record(net) as rec, sparsenet.use_mask(torch.zeros(2, 4, 4, dtype=torch.bool)):
        net(IMAGES)
    assert rec.macs == 2 * 16 * 20 * 3 * 6 * 9 + 2 * 12 * 5
    assert set(rec.density.values()) == {0.0}


def test_the_selector_counts_as_computed_and_not_as_dense() -> None:
    """Its attention too, whose fused kernel PyTorch does not count on every device."""
    module = SelectiveModule(6, 8)
    nn.init.constant_(module.logit.bias, 50.0)
    model = selective(SmallNet(), selector=module)
    nn.init.constant_(model.selector.down["1"].bias, 50.0)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode(), sparsenet.record(model) as rec:
            model(IMAGES)
        assert set(rec.density.values()) == {1.0}
        chain = 2 * 8 * 10 * 9
        assert rec.macs - rec.dense_macs == 2 * module.macs(SIZE) + chain
        assert rec.dense_macs == sparsenet.plan(model).total_macs


def test_only_the_forward_pass_counts(net: nn.Module) -> None:
    """Neither its backward pass, nor what runs beside it, nor another model."""
    other = selective(SmallNet())
    images = IMAGES.clone().requires_grad_()
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    with sparsenet.record(net) as rec, sparsenet.use_mask(mask):
        F.conv2d(images, torch.rand(4, 3, 3, 3))
        other(images)
        assert (rec.macs, rec.dense_macs, rec.operations) == (0, 0, [])
        output = net(images)
        counted = rec.macs
        assert counted == rec.dense_macs == sparsenet.plan(net).total_macs
        output.sum().backward()
        F.conv2d(images, torch.rand(4, 3, 3, 3))
        other(images)
    assert (rec.macs, rec.dense_macs) == (counted, counted)


def test_checkpoint_recomputation_does_not_count_twice() -> None:
    from torch.utils.checkpoint import checkpoint

    class Frugal(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.down(self.stem(x)))
            x = F.relu(x + checkpoint(self.block, x, use_reentrant=False))
            return self.classify(x.mean((2, 3)))

    model = selective(Frugal())
    with sparsenet.record(model) as rec, sparsenet.use_mask(blobs(2, SIZE)):
        output = model(IMAGES)
        found = rec.macs, rec.dense_macs, len(rec.operations)
        output.sum().backward()
    assert (rec.macs, rec.dense_macs, len(rec.operations)) == found
    assert rec.dense_macs == sparsenet.plan(model).total_macs


# -- masks and saliency ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_density(net: nn.Module, backend: str) -> None:
    mask = blobs(2, (32, 40))
    with sparsenet.record(net) as rec, sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        net(IMAGES)
    assert list(rec.masks) == [SIZE, HALF]
    for size, found in rec.masks.items():
        expected = at_size(mask, size)[:, 0]
        assert torch.equal(found, expected)
        assert rec.density[size] == pytest.approx(expected.double().mean().item())
    assert rec.saliency == {}


def test_saliency_and_its_threshold(learned: nn.Module) -> None:
    with torch.no_grad(), sparsenet.record(learned) as rec:
        learned(IMAGES)
    assert list(rec.masks) == list(rec.saliency) == [SIZE, HALF]
    module, down = learned.selector.module, learned.selector.down["1"]
    with torch.no_grad():
        fine = F.conv2d(learned.stem[1](learned.stem[0](IMAGES)), module.weight, module.bias).sigmoid()
        coarse = F.conv2d(fine, down.weight, down.bias, stride=2, padding=1).sigmoid()
    for size, expected in ((SIZE, fine), (HALF, coarse)):
        torch.testing.assert_close(rec.saliency[size], expected[:, 0])
        assert torch.equal(rec.masks[size], rec.saliency[size] > 0.5)
    assert 0.3 < rec.density[SIZE] < 0.7


@pytest.mark.parametrize("freeze", [False, True], ids=["selective", "frozen"])
@torch.no_grad()
def test_to_write_to_recorded_masks_changes_no_pass(freeze: bool) -> None:
    """Those of the smallest maps are always on, and kept."""
    images = torch.rand(1, 3, 4, 6)
    model = selective(SmallNet(), selector=nn.Conv2d(6, 1, 1), example_inputs=images)
    if freeze:
        model = sparsenet.freeze(model, images)
    before = model(images)
    with sparsenet.record(model) as rec:
        model(images)
        for mask in rec.masks.values():
            mask.zero_()
    assert rec.density[2, 3] == 1
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    with sparsenet.record(model) as rec:
        model(images)
    assert rec.density[2, 3] == 1


def test_saliency_carries_gradient_in_training(learned: nn.Module) -> None:
    """So that a budget on the density can be trained."""
    with sparsenet.record(learned) as rec:
        learned.train()(IMAGES)
    sum(saliency.mean() for saliency in rec.saliency.values()).backward()
    for name, parameter in learned.selector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    with sparsenet.record(learned.eval()) as rec, torch.no_grad():
        learned(IMAGES)
    assert not any(saliency.requires_grad for saliency in rec.saliency.values())


def test_the_last_pass_replaces_the_one_before(net: nn.Module) -> None:
    first, second = blobs(2, SIZE, seed=1), blobs(2, SIZE, seed=2)
    with sparsenet.record(net) as rec:
        for mask in (first, second):
            with sparsenet.use_mask(mask):
                net(IMAGES)
            assert torch.equal(rec.masks[SIZE], mask)
        once = rec.macs, len(rec.operations)
        with pytest.raises(ValueError, match="without a mask"):
            net(IMAGES)
        with sparsenet.use_mask(second):
            net(IMAGES[:, :, :8, :8])
        assert list(rec.masks) == [(8, 8), (4, 4)]
        with sparsenet.use_mask(second):
            net(IMAGES)
        assert (rec.macs, len(rec.operations)) == once
    assert torch.equal(rec.masks[SIZE], second)


def test_records_nest(net: nn.Module) -> None:
    mask = blobs(2, SIZE)
    with sparsenet.record(net) as outer, sparsenet.use_mask(mask):
        with sparsenet.record(net) as inner:
            net(IMAGES)
        assert outer.macs == inner.macs > 0
        assert outer.operations == inner.operations
        with sparsenet.use_mask(~mask):
            net(IMAGES)
    assert torch.equal(inner.masks[SIZE], mask)
    assert torch.equal(outer.masks[SIZE], ~mask)


def test_a_record_of_a_wrapped_model(net: nn.Module) -> None:
    with sparsenet.record(nn.DataParallel(net)) as rec, sparsenet.use_mask(blobs(2, SIZE)):
        nn.DataParallel(net)(IMAGES)
    assert rec.macs > 0


def test_exits_are_recorded_with_their_reason() -> None:
    model = selective(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LogSoftmax(1)), "0"
    )
    with sparsenet.record(model) as rec, sparsenet.use_mask(blobs(2, SIZE)):
        model(IMAGES)
    assert [(operation.status, operation.name) for operation in rec.operations] == [
        ("guided", "conv2d"),
        ("exit", "Tensor.flatten"),
    ]
    assert rec.operations[1].reason == "merges or splits pixels"
    assert rec.operations[1].size == (14, 18)


# -- threads ---------------------------------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other() -> None:
    """One model, a mask, a backend and a record for each thread, in step with each other."""
    model = selective(small_ssd(), "pool2", example_inputs=None)
    images = [torch.rand(3, 300, 300)]
    masks = [blobs(1, (300, 300), seed=seed) for seed in range(3)]
    settings = list(zip(masks, ("rows", "reference", "rows"), strict=True))

    def run(mask: Tensor, backend: str) -> tuple[Any, Any, int]:
        with torch.no_grad(), sparsenet.use_mask(list(mask)), sparsenet.use_backend(backend):
            with sparsenet.record(model) as rec:
                [found] = model(images)
        return found, rec.masks[38, 38], rec.macs

    alone = [run(mask, backend) for mask, backend in settings]
    assert len({macs for _, _, macs in alone}) == 3
    start = threading.Barrier(3)
    together: list[list[Any]] = [[] for _ in settings]

    def work(index: int) -> None:
        for _ in range(6):
            start.wait(timeout=60)
            together[index].append(run(*settings[index]))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for (found, mask, macs), runs in zip(alone, together, strict=True):
        assert len(runs) == 6
        for again, its_mask, its_macs in runs:
            assert its_macs == macs
            assert torch.equal(its_mask, mask)
            for name in found:
                assert torch.equal(again[name], found[name]), name


def test_a_mask_stays_in_its_thread(net: nn.Module) -> None:
    errors: list[str] = []

    def work() -> None:
        try:
            net(IMAGES)
        except ValueError as error:
            errors.append(str(error))

    with sparsenet.use_mask(torch.ones(2, 4, 4, dtype=torch.bool)):
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert len(errors) == 1 and "without a mask" in errors[0]
