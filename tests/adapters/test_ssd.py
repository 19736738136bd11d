"""torchvision's SSD: an ignored location detects nothing and learns nothing, and masks follow the images."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import example
from hypothesis import given as given_by
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

import sparsenet
from sparsenet import GivenMask, SelectiveModule
from sparsenet.adapters import torchvision_ssd
from sparsenet.kernels import machine
from tests.models import assert_same, at_size, error, small_ssd

LEVELS = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
ANCHORS = [4, 6, 6, 6, 4, 4]

Targets = list[dict[str, Tensor]]


def images_and_targets(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Targets]:
    """Two images of different sizes; the boxes are of their pixels."""
    images = [torch.rand(3, 200, 240, dtype=dtype), torch.rand(3, 300, 300, dtype=dtype)]
    targets = [
        {"boxes": torch.tensor([[20.0, 30, 120, 90], [150, 100, 230, 190]]), "labels": torch.tensor([1, 3])},
        {
            "boxes": torch.tensor([[10.0, 10, 60, 70], [100, 120, 280, 290], [5, 200, 45, 260]]),
            "labels": torch.tensor([2, 2, 1]),
        },
    ]
    return images, [{"boxes": t["boxes"].to(dtype), "labels": t["labels"]} for t in targets]


def masks(empty: bool = False) -> list[Tensor]:
    """Of the images' own sizes: a disc on one object of each image, and no other."""
    found = []
    for (height, width), (y, x), radius in (((200, 240), (60, 70), 45), ((300, 300), (205, 190), 80)):
        lines, columns = torch.arange(height)[:, None], torch.arange(width)
        found.append((lines - y).square() + (columns - x).square() < (0 if empty else radius**2))
    return found


def ssd_of_no_layers() -> SSD:
    """For what follows the head."""
    nothing = nn.Identity()
    return SSD(nothing, DefaultBoxGenerator([[2]]), (300, 300), 4, head=nothing).eval()


def everything() -> list[Tensor]:
    return [torch.ones_like(mask) for mask in masks()]


@pytest.fixture(scope="module")
def original() -> SSD:
    torch.manual_seed(0)
    return small_ssd().double()


@pytest.fixture
def model(original: SSD) -> Any:
    return sparsenet.selectify(original, "pool2", selector=GivenMask())


@pytest.fixture
def learned(original: SSD) -> Any:
    """With a Selective Module whose mask is partly on at every level, and which lets gradient through its attention."""
    module = SelectiveModule(8, 8)
    torch.manual_seed(3)
    nn.init.normal_(module.attend.restore.weight, std=0.1)
    nn.init.normal_(module.logit.weight, std=2.0)
    model = sparsenet.selectify(original, "pool2", selector=module)
    for convolution in model.selector.down.values():
        nn.init.normal_(convolution.weight, std=3.0)
        nn.init.zeros_(convolution.bias)
    with torch.no_grad():
        features = model.backbone.trunk[1](model.backbone.trunk[0](torch.rand(2, 3, 300, 300).double()))
        features = model.train().selector.module(features)
        module.logit.bias -= features.median()
    return model.train()


def active_anchors(mask: Tensor) -> Tensor:
    """Bool (N, 8732) by hand: an anchor counts if its cell does, and a cell does if any pixel under it is on."""
    parts = []
    for (height, width), anchors in zip(LEVELS, ANCHORS, strict=True):
        cells = at_size(mask, (height, width))[:, 0]
        parts.append(torch.stack([cells] * anchors, -1).flatten(1))
    return torch.cat(parts, 1)


def canvas(found: list[Tensor]) -> Tensor:
    """Masks of images as the detector resizes these, to 300×300: bool (N, 300, 300). Enlarging is nearest."""
    resized = []
    for mask in found:
        lines = torch.arange(300) * mask.shape[0] // 300
        columns = torch.arange(300) * mask.shape[1] // 300
        resized.append(mask[lines][:, columns])
    return torch.stack(resized)


def watched(model: Any, run: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """A result, and what `compute_loss` was called with."""
    seen: list[tuple[Any, ...]] = []
    compute = model.compute_loss

    def watch(*args: Any) -> Any:
        seen.append(args)
        return compute(*args)

    model.compute_loss = watch
    try:
        return run(), seen[-1]
    finally:
        model.compute_loss = compute


def head_outputs(model: Any, images: list[Tensor]) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    handle = model.head.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    return found[-1]


# -- at test ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True])
def test_detections_are_those_of_all_anchors(model: Any, empty: bool) -> None:
    """Leaving ignored anchors out of the post-processing changes nothing: here it is done with them."""
    images, _ = images_and_targets()
    found: list[Any] = []
    detect = model.postprocess_detections

    def watch(*args: Any) -> Any:
        result = detect(*args)
        found.append((args, [dict(image) for image in result]))  # which the detector then scales back in place
        return result

    model.eval().postprocess_detections = watch
    model.score_thresh = 0.2  # of untrained scores: many candidates
    with torch.no_grad(), sparsenet.use_mask(masks(empty=empty)):
        model(images)
    [(args, detections)] = found
    expected = SSD.postprocess_detections(model, *args)
    assert empty or min(len(image["scores"]) for image in expected) > 10
    for image, wanted in zip(detections, expected, strict=True):
        assert {name: value.tolist() for name, value in image.items()} == {
            name: value.tolist() for name, value in wanted.items()
        }


# Just below the score of a class whose only rival's logit is higher by 4.
CLOSE = 0.01798


@given_by(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([-1.0, 0.0, 1e-30, 0.01, CLOSE, 0.3, 0.5, 0.999]),
    st.sampled_from([1, 3, 400]),
    st.sampled_from([1, 5, 200]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([0.1, 2.0, 30.0]),
)
@example(0, 1, 1, CLOSE, 400, 200, torch.float32, 2.0)
@example(0, 1, 2, 0.0, 400, 200, torch.float32, 30.0)
@example(0, 1, 1, -1.0, 400, 200, torch.float64, 2.0)
def test_detections_are_torchvisions(
    seed: int, batch: int, classes: int, threshold: float, top: int, most: int, dtype: torch.dtype, spread: float
) -> None:
    """To the last bit, with logits of few values: many scores are equal, some are one or zero, some are none at all."""
    torch.manual_seed(seed)
    model, count = ssd_of_no_layers(), 60
    model.score_thresh, model.topk_candidates, model.detections_per_img = threshold, top, most
    logits = (spread * torch.randn(batch, count, classes + 1)).round()
    logits[0, 3], logits[0, 4, 0], logits[0, 5, 1], logits[0, 6, 1:] = -torch.inf, torch.inf, torch.nan, -torch.inf
    outputs = {"cls_logits": logits.to(dtype), "bbox_regression": torch.randn(batch, count, 4, dtype=dtype)}
    corners = 80 * torch.rand(count, 2, dtype=dtype)
    anchors = [torch.cat([corners, corners + 5 + 20 * torch.rand(count, 2, dtype=dtype)], 1)] * batch
    sizes = [(100, 90), (64, 100), (80, 80)][:batch]
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        found = torchvision_ssd.Detections(model)(outputs, anchors, sizes)
        expected = SSD.postprocess_detections(model, outputs, anchors, sizes)
    assert len(found) == batch
    for image, wanted in zip(found, expected, strict=True):
        assert image.keys() == wanted.keys()
        for name, value in wanted.items():
            assert image[name].dtype == value.dtype
            assert torch.equal(image[name], value), name


def test_a_detector_with_detections_of_its_own_keeps_them(original: SSD) -> None:
    class Own(SSD):
        def postprocess_detections(self, *args: Any) -> Any:
            return super().postprocess_detections(*args)

    model = copy.deepcopy(original)
    model.__class__ = Own
    images, _ = images_and_targets()
    for made in (
        sparsenet.selectify(model, "pool2", selector=GivenMask(), example_inputs=images),
        sparsenet.freeze(model, (images,)),
    ):
        assert "postprocess_detections" not in vars(made)
    own = original.postprocess_detections
    model.__class__, model.postprocess_detections = SSD, own
    assert type(sparsenet.freeze(model, (images,)).postprocess_detections) is type(own)


@pytest.mark.parametrize("backend", ["reference", "rows", "spconv"])
def test_an_ignored_location_is_certainly_background(model: Any, backend: str) -> None:
    images, _ = images_and_targets()
    with sparsenet.use_mask(masks()), sparsenet.use_backend(backend):
        scores = head_outputs(model, images)["cls_logits"].softmax(-1)
    active = active_anchors(canvas(masks()))
    assert active.shape == scores.shape[:2] == (2, 8732)
    assert 100 < active.sum() < 0.6 * active.numel()
    certain = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert (scores[~active] == certain).all()
    assert (scores[active] != certain).any(-1).all()


def test_ignored_locations_are_background_in_half_precision(model: Any) -> None:
    model.bfloat16()
    with sparsenet.use_mask(masks(empty=True)):
        logits = head_outputs(model, [image.bfloat16() for image in images_and_targets()[0]])["cls_logits"]
    assert logits.dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        scores = logits.to(dtype).softmax(-1)
        assert torch.equal(scores, F.one_hot(torch.zeros_like(scores[..., 0], dtype=torch.long), 4).to(dtype))


@pytest.mark.parametrize("backend", ["reference", "rows", "spconv"])
def test_an_empty_mask_detects_nothing(model: Any, original: SSD, backend: str) -> None:
    images, _ = images_and_targets()
    with torch.no_grad():
        assert all(len(found["boxes"]) > 0 for found in original(images))
    with torch.no_grad(), sparsenet.use_mask(masks(empty=True)), sparsenet.use_backend(backend):
        for found in model(images):
            assert {name: len(part) for name, part in found.items()} == {"boxes": 0, "scores": 0, "labels": 0}


def test_detections_lie_where_the_mask_is(model: Any) -> None:
    """Each comes from an anchor of an active cell: none is left of the right edge's anchors."""
    images, _ = images_and_targets()
    mask = [torch.zeros_like(m) for m in masks()]
    for m in mask:
        m[:, -8:] = True
    model.score_thresh = 0.3
    with torch.no_grad(), sparsenet.use_mask(mask):
        [first, second] = model(images)
    for found, width in ((first, 240), (second, 300)):
        assert len(found["boxes"]) > 0
        small = found["boxes"][:, 2] - found["boxes"][:, 0] < width / 20
        assert (found["boxes"][small, 2] > 0.8 * width).all()


# -- masks and boxes follow the images -------------------------------------------------------------------------


def test_boxes_follow_the_resize(model: Any) -> None:
    """An image of 200×240 becomes 300×300: x by 1.25, y by 1.5."""
    images, targets = images_and_targets()
    with torch.no_grad(), sparsenet.record(model) as rec, sparsenet.use_mask([t["boxes"] for t in targets]):
        model(images)
    pixels = torch.zeros(2, 300, 300, dtype=torch.bool)
    pixels[0, 45:135, 25:150] = True  # 20, 30, 120, 90
    pixels[0, 150:285, 187:288] = True  # 150, 100, 230, 190: 187.5 and 287.5 reach into their pixels
    for x1, y1, x2, y2 in targets[1]["boxes"].long().tolist():
        pixels[1, y1:y2, x1:x2] = True
    assert list(rec.masks) == [(75, 75), *LEVELS]
    for size, mask in rec.masks.items():
        assert torch.equal(mask, at_size(pixels, size)[:, 0]), size


def test_masks_of_images_follow_the_resize(model: Any) -> None:
    images, _ = images_and_targets()
    with torch.no_grad(), sparsenet.record(model) as rec, sparsenet.use_mask(masks()):
        model(images)
    for size, mask in rec.masks.items():
        assert torch.equal(mask, at_size(canvas(masks()), size)[:, 0]), size


def test_boxes_do_not_mistake_instance_masks_for_images(model: Any) -> None:
    """Targets of instance segmentation carry tensors (objects, H, W)."""
    images, targets = images_and_targets()
    for image, target in zip(images, targets, strict=True):
        target["masks"] = torch.ones(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
    with sparsenet.use_mask([target["boxes"] for target in targets]), sparsenet.record(model) as rec:
        losses = model.train()(images, targets)
        from_keywords = model(images=images, targets=targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert_same(from_keywords, losses)
    assert rec.masks[38, 38][0].any()


# -- in training -----------------------------------------------------------------------------------------------


def slow_loss(
    model: SSD,
    targets: Targets,
    outputs: dict[str, Tensor],
    anchors: list[Tensor],
    matched: list[Tensor],
    active: Tensor,
) -> dict[str, Tensor]:
    """SSD's loss anchor by anchor. Boxes are matched among all anchors; ignored anchors are dropped afterwards."""
    boxes, classes, positives = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for image, target in enumerate(targets):
        found, background = 0, []
        for index in active[image].nonzero()[:, 0].tolist():
            logits = outputs["cls_logits"][image, index]
            truth = int(matched[image][index])
            if truth < 0:
                background.append(logits.logsumexp(0) - logits[0])
                continue
            found += 1
            classes = classes + logits.logsumexp(0) - logits[target["labels"][truth]]
            ax1, ay1, ax2, ay2 = anchors[image][index].tolist()
            x1, y1, x2, y2 = target["boxes"][truth].tolist()
            wanted = torch.tensor(
                [
                    10 * ((x1 + x2) - (ax1 + ax2)) / 2 / (ax2 - ax1),
                    10 * ((y1 + y2) - (ay1 + ay2)) / 2 / (ay2 - ay1),
                    5 * math.log((x2 - x1) / (ax2 - ax1)),
                    5 * math.log((y2 - y1) / (ay2 - ay1)),
                ],
                dtype=torch.float64,
            )
            distance = (outputs["bbox_regression"][image, index] - wanted).abs()
            boxes = boxes + torch.where(distance < 1, distance.square() / 2, distance - 0.5).sum()
        hardest = sorted(background, key=Tensor.item, reverse=True)[: 3 * found]
        classes = classes + sum(hardest)
        positives += found
    return {"bbox_regression": boxes / max(1, positives), "classification": classes / max(1, positives)}


def assert_loss_by_hand(model: Any, images: list[Tensor], targets: Targets, active: Tensor, run: Any) -> None:
    losses, (at_300, outputs, anchors, matched) = watched(model.train(), lambda: run(images, targets))
    positive = torch.stack(matched) >= 0
    assert (positive & active).any() and (positive & ~active).any()  # the objects have anchors on both sides
    expected = slow_loss(model, at_300, outputs, anchors, matched, active)
    assert losses.keys() == expected.keys()
    heads = list(model.head.parameters())
    for name in expected:
        assert_same(losses[name], expected[name], rounds=1e5)
        found = torch.autograd.grad(losses[name], heads, retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(expected[name], heads, retain_graph=True, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same(a, b, rounds=1e6)


def given(model: Any, mask: Any) -> Any:
    def run(images: list[Tensor], targets: Targets) -> Any:
        with sparsenet.use_mask(mask):
            return model(images, targets)

    return run


def test_ignored_anchors_are_neither_positive_nor_negative(model: Any) -> None:
    images, targets = images_and_targets()
    assert_loss_by_hand(model, images, targets, active_anchors(canvas(masks())), given(model, masks()))


def test_an_image_without_active_anchors_beside_another(model: Any) -> None:
    images, targets = images_and_targets()
    mask = [masks()[0], torch.zeros(300, 300, dtype=torch.bool)]
    assert_loss_by_hand(model, images, targets, active_anchors(canvas(mask)), given(model, mask))


def test_direct_supervision_ignores_too(learned: Any) -> None:
    images, targets = images_and_targets()
    with sparsenet.train.direct(learned, [t["boxes"] for t in targets]), sparsenet.record(learned) as rec:
        learned(images, targets)
        active = torch.cat(
            [
                torch.stack([rec.masks[size]] * anchors, -1).flatten(1)
                for size, anchors in zip(LEVELS, ANCHORS, strict=True)
            ],
            1,
        )
        assert_loss_by_hand(learned, images, targets, active, learned)


def test_a_mask_trained_by_its_effect_counts_every_anchor(learned: Any) -> None:
    """Dropping the ignored ones would reward masking everything."""
    images, targets = images_and_targets()
    with sparsenet.record(learned) as rec:
        losses, args = watched(learned, lambda: learned(images, targets))
    assert 0.1 < rec.density[38, 38] < 0.9
    expected = SSD.compute_loss(learned, *args)
    assert losses.keys() == expected.keys()
    for name in expected:
        assert_same(losses[name], expected[name], rounds=0)
    sum(losses.values()).backward()
    for name, parameter in learned.selector.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_a_full_masks_loss_is_the_originals(model: Any, original: SSD) -> None:
    images, targets = images_and_targets()
    twin = copy.deepcopy(original).train()
    expected = twin(images, targets)
    sum(expected.values()).backward()
    for backend in ("reference", "rows", "spconv"):
        model.zero_grad()
        with sparsenet.use_backend(backend):
            losses = given(model.train(), everything())(images, targets)
        assert losses.keys() == expected.keys()
        for name in expected:
            assert_same(losses[name], expected[name], rounds=1e5)
        sum(losses.values()).backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=False):
            assert_same(a.grad, b.grad, rounds=1e7)


@pytest.mark.parametrize("targets_too", [True, False], ids=["objects", "no objects"])
def test_an_empty_mask_has_a_finite_loss(model: Any, targets_too: bool) -> None:
    images, targets = images_and_targets()
    if not targets_too:
        targets = [{"boxes": t["boxes"][:0], "labels": t["labels"][:0]} for t in targets]
    losses = given(model.train(), masks(empty=True))(images, targets)
    assert {name: loss.item() for name, loss in losses.items()} == {"bbox_regression": 0.0, "classification": 0.0}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name  # and not NaN


# -- direct supervision ----------------------------------------------------------------------------------------


def cells_by_hand(boxes: Tensor, size: tuple[int, int], step: int) -> Tensor:
    """Columns ⌊(x1 - s) / s⌋ … ⌈(x2 + s) / s⌉ - 1, clipped, and rows alike."""
    cells = torch.zeros(size, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        for i in range(math.floor((y1 - step) / step), math.ceil((y2 + step) / step)):
            for j in range(math.floor((x1 - step) / step), math.ceil((x2 + step) / step)):
                if 0 <= i < size[0] and 0 <= j < size[1]:
                    cells[i, j] = True
    return cells


STEPS = {(75, 75): 4, (38, 38): 8, (19, 19): 16, (10, 10): 32, (5, 5): 64}


def targets_by_hand(targets: Targets) -> dict[Any, Tensor]:
    scale = [torch.tensor([1.25, 1.5, 1.25, 1.5]), torch.ones(4)]
    boxes = [target["boxes"] * by for target, by in zip(targets, scale, strict=True)]
    return {size: torch.stack([cells_by_hand(part, size, step) for part in boxes]) for size, step in STEPS.items()}


def close(model: Any) -> None:
    """A selector that predicts nothing anywhere."""
    nn.init.zeros_(model.selector.module.logit.weight)
    nn.init.constant_(model.selector.module.logit.bias, -30.0)
    for convolution in model.selector.down.values():
        nn.init.zeros_(convolution.weight)
        nn.init.constant_(convolution.bias, -30.0)


def masks_in_warmup(model: Any, images: list[Tensor], targets: Targets) -> dict[Any, Tensor]:
    with sparsenet.record(model) as rec, sparsenet.train.direct(model, [t["boxes"] for t in targets], warmup=True):
        model(images, targets)
    return rec.masks


@pytest.mark.parametrize(
    ("box", "size", "rows", "columns"),
    [
        ((16, 24, 40, 56), (38, 38), (2, 7), (1, 5)),  # on the grid: one cell more on each side
        ((17, 24, 41, 57), (38, 38), (2, 8), (1, 6)),  # 1.125 … 6.125, 2 … 8.125
        ((16, 24, 40, 56), (75, 75), (5, 14), (3, 10)),  # 3 … 11, 5 … 15
        ((16, 24, 40, 56), (19, 19), (0, 4), (0, 3)),  # 0 … 3.5, 0.5 … 4.5
        ((16, 24, 40, 56), (5, 5), (0, 1), (0, 1)),  # -0.75 … 1.625, clipped
        ((296, 0, 300, 4), (38, 38), (0, 1), (36, 37)),  # in the corner: 36 … 38.5, clipped
        ((100, 100, 100, 100), (38, 38), (11, 13), (11, 13)),  # a point: 11.5 … 13.5
    ],
)
def test_target_cells(learned: Any, box: Any, size: Any, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """The first and last row and column of one box, computed by hand."""
    close(learned)
    targets = [{"boxes": torch.tensor([box]).double(), "labels": torch.tensor([1])}]
    with sparsenet.record(learned) as rec, sparsenet.train.direct(learned, [targets[0]["boxes"]], warmup=True):
        learned.eval()([torch.rand(3, 300, 300).double()])
    expected = torch.zeros(1, *size, dtype=torch.bool)
    expected[:, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    assert torch.equal(rec.masks[size], expected)


def test_targets_follow_the_resize_on_every_map(learned: Any) -> None:
    images, targets = images_and_targets()
    close(learned)
    found = masks_in_warmup(learned, images, targets)
    for size, expected in targets_by_hand(targets).items():
        assert torch.equal(found[size], expected), size
    assert found[3, 3].all() and found[1, 1].all()  # always on


def test_warmup_adds_the_target_to_the_prediction(learned: Any) -> None:
    images, targets = images_and_targets()
    boxes = [t["boxes"] for t in targets]
    learned.eval()  # in training, the module's own batch normalisation changes from pass to pass
    found = masks_in_warmup(learned, images, targets)
    with sparsenet.record(learned) as rec, sparsenet.train.direct(learned, boxes):
        learned(images)
    for size, expected in targets_by_hand(targets).items():
        predicted = rec.saliency[size] > 0.5
        assert torch.equal(rec.masks[size], predicted)
        assert torch.equal(found[size], predicted | expected)
        assert size[0] < 38 or ((expected & ~predicted).any() and (predicted & ~expected).any())


def test_the_loss_is_averaged_over_all_coordinates_of_all_maps(learned: Any) -> None:
    images, targets = images_and_targets()
    with (
        sparsenet.record(learned) as rec,
        sparsenet.train.direct(learned, [t["boxes"] for t in targets]) as supervision,
    ):
        learned(images, targets)
    total, count = 0.0, 0
    for size, target in targets_by_hand(targets).items():
        for p, wanted in zip(rec.saliency[size].flatten().tolist(), target.flatten().tolist(), strict=True):
            total -= math.log(p) if wanted else math.log1p(-p)
            count += 1
    assert count == 2 * (75**2 + 38**2 + 19**2 + 10**2 + 5**2)
    assert supervision.loss().item() == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_missed_pixels_weigh_more_and_those_of_small_objects_most(learned: Any, balance: float) -> None:
    """Two objects of very different size, the small one on the large one, weighed cell by cell."""
    boxes = torch.tensor([[20.0, 20, 260, 260], [96, 96, 120, 136]]).double()
    images = [torch.rand(3, 300, 300).double()]
    with (
        sparsenet.record(learned.eval()) as rec,
        sparsenet.train.direct(learned, [boxes], positive_weight=5.0, size_balance=balance) as supervision,
    ):
        learned(images)
    total, count = 0.0, 0
    for (side, _), step in STEPS.items():
        large, small = (cells_by_hand(box[None], (side, side), step) for box in boxes)
        share = {True: int(small.sum()) ** -balance, False: int(large.sum()) ** -balance}  # by whether small is there
        inside = (large | small).nonzero().tolist()
        mean = sum(share[bool(small[y, x])] for y, x in inside) / len(inside)
        for y, x in itertools.product(range(side), repeat=2):
            p = rec.saliency[side, side][0, y, x].item()
            if large[y, x] or small[y, x]:
                total -= 5 * share[bool(small[y, x])] / mean * math.log(p)
            else:
                total -= math.log1p(-p)
        count += side**2
    assert supervision.loss().item() == pytest.approx(total / count, rel=1e-6)


def test_kept_features_train_the_selector_as_images_do(learned: Any) -> None:
    images, targets = images_and_targets()
    boxes = [target["boxes"] for target in targets]
    learned.eval()
    features = sparsenet.train.stage_features(learned, images)
    assert features.map.shape[:1] + features.map.shape[2:] == (2, 75, 75) and not features.map.requires_grad
    assert features.to(torch.float32).map.dtype == torch.float32
    found = []
    for given in ((images, targets), (features,)):
        with sparsenet.train.direct(learned, boxes) as supervision:
            sparsenet.train.selector_only(learned, *given)
        loss = supervision.loss()
        found.append([loss, *torch.autograd.grad(loss, list(learned.selector.parameters()))])
    for by_images, by_features in zip(*found, strict=True):
        assert torch.equal(by_images, by_features)


def test_one_step_reaches_every_parameter_of_the_selector(learned: Any) -> None:
    images, targets = images_and_targets()
    with sparsenet.train.direct(learned, [t["boxes"] for t in targets]) as supervision:
        losses = learned(images, targets)
    sum(losses.values()).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in learned.selector.parameters())  # the mask is detached
    supervision.loss().backward()
    for name, parameter in learned.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert set(learned.selector.down) == {"1", "2", "3", "4"}
    for name, parameter in learned.selector.named_parameters():
        assert parameter.grad.any(), name


def test_direct_training_learns_where_objects_are(original: SSD) -> None:
    """A few steps on one image: the loss falls, and the mask closes in on the boxes."""
    torch.manual_seed(0)
    model = sparsenet.selectify(copy.deepcopy(original).float(), "pool2", selector=SelectiveModule(8, 8)).train()
    image = torch.rand(3, 300, 300) * 0.1
    image[:, 120:200, 40:120] += 0.8
    targets = [{"boxes": torch.tensor([[40.0, 120, 120, 200]]), "labels": torch.tensor([1])}]
    optimizer = torch.optim.Adam(model.selector.parameters(), lr=0.05)
    found = []
    for _ in range(40):
        with sparsenet.record(model) as rec, sparsenet.train.direct(model, [targets[0]["boxes"]]) as supervision:
            model([image], targets)
        optimizer.zero_grad()
        supervision.loss().backward()
        optimizer.step()
        found.append((supervision.loss().item(), rec.density[75, 75]))
    assert found[-1][0] < 0.5 * found[0][0]
    wanted = cells_by_hand(targets[0]["boxes"], (75, 75), 4)
    assert (rec.masks[75, 75][0] == wanted).double().mean() > 0.9


def test_heads_results_leave_the_region_in_sight(model: Any) -> None:
    """They leave by a way of their own, unless that is to be told or forbidden."""
    images, _ = images_and_targets()
    run = given(model.eval(), masks())
    with torch.no_grad():
        expected = run(images, None)
        with sparsenet.record(model) as rec:
            assert_same(run(images, None), expected, rounds=0)
        left = [operation.size for operation in rec.operations if operation.status == "exit"]
        assert sorted(set(left)) == sorted({step.operation.size for step in sparsenet.plan(model).exits})
        assert len(left) >= 12
        model.selector.options = replace(model.selector.options, strict=True)
        with pytest.raises(RuntimeError, match="leaves the guided region"):
            run(images, None)


# -- frozen ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_pair(original: SSD) -> tuple[Any, Any]:
    """A selective model whose heads' biases are not zero, and the same frozen."""
    model = sparsenet.selectify(original, "pool2", selector=GivenMask()).eval()
    for name, parameter in model.head.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model, sparsenet.freeze(model, (images_and_targets()[0],))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("active", [masks, everything, lambda: masks(empty=True)], ids=["some", "all", "none"])
def test_frozen_heads_write_what_they_do_one_by_one(
    frozen_pair: tuple[Any, Any], active: Callable[[], list[Tensor]], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frozen = frozen_pair
    images, given_masks = images_and_targets()[0][:count], active()[:count]
    written: list[Tensor | None] = []
    together = torchvision_ssd.side_by_side

    def side_by_side(layers: Any, maps: Any) -> Tensor | None:
        written.append(together(layers, maps))
        return written[-1]

    monkeypatch.setattr(torchvision_ssd, "side_by_side", side_by_side)
    for _ in range(3):
        with sparsenet.use_mask(given_masks):
            wanted, found = head_outputs(model, images), head_outputs(frozen, images)
            with torch.no_grad():
                detected, expected = frozen(images), model(images)
        assert_same(found, wanted)
        for one, other in zip(detected, expected, strict=True):
            assert_same([one["boxes"], one["scores"]], [other["boxes"], other["scores"]])
    if machine.unsupported() is None and active is not everything:
        assert sum(each is not None for each in written) == 12


def test_frozen_heads_with_hooks(frozen_pair: tuple[Any, Any]) -> None:
    model, frozen = frozen_pair[0], copy.deepcopy(frozen_pair[1])
    seen: list[Any] = []
    frozen.head.regression_head.module_list[2].register_forward_hook(lambda *_: seen.append(1))
    images, _ = images_and_targets()
    with sparsenet.use_mask(masks()):
        assert_same(head_outputs(frozen, images), head_outputs(model, images))
    assert seen == [1]


def test_frozen_anchors_are_made_once(frozen_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For every size and number of images, and again if the generator was changed or they were written to."""
    model, frozen = frozen_pair[0], copy.deepcopy(frozen_pair[1])
    made: list[int] = []
    forward = DefaultBoxGenerator.forward
    monkeypatch.setattr(
        DefaultBoxGenerator, "forward", lambda self, images, maps: (made.append(1), forward(self, images, maps))[1]
    )
    images = [torch.rand(3, 300, 300, dtype=torch.float64)] * 2
    batch, maps = ImageList(torch.stack(images), [(300, 300)] * 2), [torch.rand(2, 4, *size) for size in LEVELS]
    kept, own = frozen.anchor_generator, model.anchor_generator

    def check(more: int) -> list[Tensor]:
        before = len(made)
        found = kept(batch, maps)
        assert len(made) - before == more
        assert_same(found, own(batch, maps), rounds=0)
        return found

    check(1)
    check(0)
    with torch.inference_mode():
        check(0)[0].mul_(2)
    check(1)
    check(0)[1].zero_()
    check(1)
    for generator in (kept, own):
        generator.steps = [2 * step for step in generator.steps]
    check(1)
    for generator in (kept, own):
        generator._wh_pairs[0].mul_(2)
    check(1)
    own._wh_pairs[0].div_(2)
    own.steps = [step // 2 for step in own.steps]  # it is the original's, and others'
    batch.image_sizes.pop()
    assert len(kept(batch, maps)) == 1


@pytest.mark.parametrize("kind", ["dense", "selective"])
def test_frozen_transform(original: SSD, kind: str) -> None:
    """Images of any size and memory, alone and together, in a detector of float32."""
    model: Any = copy.deepcopy(original).float()
    torch.manual_seed(0)
    images = [torch.rand(3, 300, 300), torch.rand(200, 240, 3).permute(2, 0, 1), torch.rand(3, 301, 310)[:, ::2]]
    if kind == "selective":
        model = sparsenet.selectify(model, "pool2", selector=GivenMask()).eval()
    frozen = sparsenet.freeze(model, (images[:1],))
    assert ("forward" in vars(frozen.transform)) and "forward" not in vars(model.transform)
    for chosen in ([0], [1], [2], [0, 1, 2], [2, 0]):
        given_images = [images[each] for each in chosen]
        found, expected = frozen.transform(given_images)[0], model.transform(given_images)[0]
        assert found.image_sizes == expected.image_sizes
        torch.testing.assert_close(found.tensors, expected.tensors, rtol=1e-5, atol=2e-3)  # of 255 in float32


# -- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(model: Any, copied: Any) -> None:
    """The loss of a copy is computed by the copy."""
    images, targets = images_and_targets()
    run = given(model.train(), masks())
    expected = run(images, targets)
    twin = copied(model)
    assert twin.compute_loss.model is twin
    assert all(head.forward.head is head for head in (twin.head.classification_head, twin.head.regression_head))
    assert_same(given(twin, masks())(images, targets), expected, rounds=0)
    twin.neg_to_pos_ratio = 1.0
    fewer = given(twin, masks())(images, targets)["classification"]
    assert fewer < 0.9 * expected["classification"]
    assert_same(run(images, targets), expected, rounds=0)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert_same(run(images, targets), expected, rounds=0)
    sparsenet.densify(twin)
    assert "compute_loss" not in vars(twin) and "forward" not in vars(twin.head.classification_head)
    assert_same(run(images, targets), expected, rounds=0)


# -- torchvision's own models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg() -> Any:
    torch.manual_seed(0)
    return torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)


def test_ssd300_vgg16(vgg: SSD) -> None:
    """An empty mask: no detections, and in training a finite loss whose gradients are finite; a full mask's loss is the
    original's."""
    images, targets = images_and_targets(torch.float32)
    images, targets = images[:1], targets[:1]
    model: Any = sparsenet.selectify(vgg, "pool2", selector=GivenMask())
    empty, full = ([fill(images[0][0], dtype=torch.bool)] for fill in (torch.zeros_like, torch.ones_like))
    with torch.no_grad(), sparsenet.use_mask(empty):
        [found] = model.eval()(images)
    assert len(found["boxes"]) == 0
    losses = given(model.train(), empty)(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is None or torch.isfinite(grad).all() for grad in gradients.values())
    with torch.no_grad():
        expected = vgg.train()(images, targets)
        found = given(model, full)(images, targets)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=0)


def test_ssd300_vgg16_learns_under_a_mask(vgg: SSD) -> None:
    images, targets = images_and_targets(torch.float32)
    images, targets = images[:1], targets[:1]
    model: Any = sparsenet.selectify(vgg, "pool2", selector=GivenMask()).train()
    losses = given(model, [targets[0]["boxes"][:1]])(images, targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("selector."):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(losses.values())


def test_ssdlite() -> None:
    """Its heads end in a pointwise convolution behind a depthwise one."""
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, norm_layer=nn.BatchNorm2d
    ).eval()
    images = [torch.rand(3, 160, 240)]
    selective = sparsenet.selectify(model, "stride8", selector=GivenMask())
    assert all(step.operation.reason != "" for step in sparsenet.plan(selective).exits)
    plain = head_outputs(model, images)
    with sparsenet.use_mask([torch.ones(160, 240, dtype=torch.bool)]):
        full = head_outputs(selective, images)
    for name in plain:
        assert error(full[name], plain[name]) < 1e-4 * plain[name].abs().max()
    with torch.no_grad(), sparsenet.use_mask([torch.zeros(160, 240, dtype=torch.bool)]):
        [found] = selective(images)
    assert len(found["boxes"]) == 0
