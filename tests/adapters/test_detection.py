"""torchvision's detectors: an ignored location detects nothing and learns nothing, and masks follow the images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

import sparsenet
from sparsenet import GivenMask, adapters
from tests.adapters.detectors import (
    CANVAS,
    DENSE,
    DETECTORS,
    PLACED,
    PROPOSING,
    SIZES,
    Seen,
    active_anchors,
    canvas,
    discs,
    images_and_targets,
    make,
    nothing,
    without_objects,
)
from tests.models import assert_same, assert_unchanged, at_size, error, snapshot

AT = "backbone.body.layer1"


@pytest.fixture(scope="module", params=DETECTORS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A detector, and a selective copy of it."""
    original = make(request.param)
    return original, sparsenet.selectify(original, AT, selector=GivenMask())


@pytest.fixture
def original(pair: Any) -> Any:
    return pair[0].eval()


@pytest.fixture
def model(pair: Any) -> Any:
    return pair[1].eval()


def detect(model: Any, images: list[Tensor], mask: Any = None, backend: str = "auto") -> list[dict[str, Tensor]]:
    with torch.no_grad(), sparsenet.use_backend(backend):
        if mask is None:
            return model(images)
        with sparsenet.use_mask(mask):
            return model(images)


def train(model: Any, images: list[Tensor], targets: Any, mask: Any) -> dict[str, Tensor]:
    """Losses with dropout and batch normalisation as at test, so that passes can be compared."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)  # which of the regions the box head learns from is drawn
    with sparsenet.use_mask(mask):
        return model(images, targets)


# -- at test ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_a_full_mask_detects_what_the_original_does(original: Any, model: Any, backend: str) -> None:
    images = [torch.rand(3, 128, 160).double() for _ in range(2)]  # neither resized nor padded
    expected = detect(original, images)
    assert min(len(image["boxes"]) for image in expected) > 2
    found = detect(model, images, torch.ones(2, 128, 160, dtype=torch.bool), backend)
    assert_same(found, expected, rounds=1e8)


def test_storages_agree(model: Any) -> None:
    images, _ = images_and_targets()
    found, expected = (detect(model, images, discs(), backend) for backend in ("rows", "reference"))
    assert min(len(image["boxes"]) for image in expected) > 0
    assert_same(found, expected, rounds=1e8)


def candidates(model: Any, images: list[Tensor], mask: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes that the anchors give in a pass, or that its proposals are, and those that active anchors may give: in the
    pixels of the network's input."""
    seen = Seen(model)
    proposals: list[Any] = []
    if hasattr(model, "rpn"):
        seen.handles.append(model.rpn.register_forward_hook(lambda module, args, output: proposals.extend(output[0])))
    found = detect(model, images, mask)
    seen.close()
    if not proposals:
        for image, (height, width), (to_height, to_width) in zip(found, SIZES, PLACED, strict=True):
            ratio = torch.tensor([to_width / width, to_height / height] * 2, dtype=torch.float64)
            proposals.append(image["boxes"] * ratio)
    active = active_anchors(model, canvas(mask if mask is not None else discs()), seen.maps)
    allowed = [
        clip_boxes_to_image(boxes[keep], placed) for boxes, keep, placed in zip(seen.boxes, active, PLACED, strict=True)
    ]
    return proposals, allowed


def are_among(boxes: Tensor, allowed: Tensor) -> Tensor:
    return (torch.cdist(boxes, allowed, p=1) < 1e-3).any(1)


def test_ignored_locations_predict_nothing(original: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every detection, and every proposal, is what an active anchor gives; the original has others too."""
    images, _ = images_and_targets()
    if hasattr(model, "rpn"):  # room for more proposals than the active anchors give
        monkeypatch.setitem(model.rpn._post_nms_top_n, "testing", 1000)
    for found, allowed in zip(*candidates(original, images, None), strict=True):
        assert (~are_among(found, allowed)).sum() > 5
    for found, allowed in zip(*candidates(model, images, discs()), strict=True):
        assert len(found) > 2
        assert are_among(found, allowed).all()


def test_ignored_locations_are_certain(model: Any) -> None:
    """Also where everything comes to be proposed that could be: fewer active anchors than the network asks for."""
    images, _ = images_and_targets()
    seen = Seen(model)
    detect(model, images, discs())
    seen.close()
    active = active_anchors(model, canvas(discs()), seen.maps)
    assert 20 < active.sum() < 0.6 * active.numel()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not seen.scores.to(dtype).sigmoid()[~active].any()
    assert seen.scores.sigmoid()[active].min() > 0
    if hasattr(model, "rpn"):
        assert active.sum(1).min() < model.rpn.pre_nms_top_n() * len(seen.maps)
        assert torch.equal(seen.boxes[~active][:, 2:], seen.boxes[~active][:, :2])


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_an_empty_mask_detects_nothing(model: Any, backend: str) -> None:
    images, _ = images_and_targets()
    for found in detect(model, images, nothing(), backend):
        assert {name: len(part) for name, part in found.items()} == dict.fromkeys(found, 0)


# -- masks and boxes follow the images -------------------------------------------------------------------------


def test_boxes_follow_resizing_and_padding(model: Any) -> None:
    images, targets = images_and_targets()
    with torch.no_grad(), sparsenet.record(model) as rec, sparsenet.use_mask([t["boxes"] for t in targets]):
        model(images)
    pixels = torch.zeros(2, *CANVAS, dtype=torch.bool)
    for image, target, (height, width), (to_height, to_width) in zip(pixels, targets, SIZES, PLACED, strict=True):
        ratio = torch.tensor([to_width / width, to_height / height] * 2, dtype=torch.float64)
        for x1, y1, x2, y2 in (target["boxes"] * ratio).round(decimals=4).tolist():
            image[int(y1) : -int(-y2 // 1), int(x1) : -int(-x2 // 1)] = True
    assert len(rec.masks) > 2
    for size, mask in rec.masks.items():
        assert torch.equal(mask, at_size(pixels, size)[:, 0]), size


def test_masks_follow_resizing_and_padding(model: Any) -> None:
    images, _ = images_and_targets()
    with torch.no_grad(), sparsenet.record(model) as rec, sparsenet.use_mask([torch.ones_like(m) for m in discs()]):
        model(images)
    padded = canvas([torch.ones_like(m) for m in discs()])
    assert not padded.all() and not rec.masks[40, 40].all()
    for size, mask in rec.masks.items():
        assert torch.equal(mask, at_size(padded, size)[:, 0]), size


# -- in training -----------------------------------------------------------------------------------------------


def watched(owner: Any, name: str, run: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """A result, and what a method was called with."""
    method, seen = getattr(owner, name), []

    def watch(*args: Any) -> Any:
        seen.append(args)
        return method(*args)

    setattr(owner, name, watch)
    try:
        return run(), seen[-1]
    finally:
        setattr(owner, name, method)


def focal(logits: Tensor, truth: Tensor) -> Tensor:
    """-α (1 - p)² log p of the right answer, α = 1/4 for objects: arXiv 1708.02002."""
    p = logits.sigmoid()
    right, wrong = truth * (1 - p).square() * F.logsigmoid(logits), (1 - truth) * p.square() * F.logsigmoid(-logits)
    return -(0.25 * right + 0.75 * wrong).sum()


def retinanet_by_hand(model: Any, targets: Any, outputs: Any, anchors: Any, matched: Any, active: Tensor) -> Any:
    classes, boxes = [], []
    for image, target in enumerate(targets):
        valid = (active[image] & (matched[image] != -2)).nonzero()[:, 0]
        positive = [index for index in valid.tolist() if matched[image][index] >= 0]
        truth = torch.zeros_like(outputs["cls_logits"][image])
        wanted = torch.zeros_like(outputs["bbox_regression"][image])
        for index in positive:
            truth[index, target["labels"][matched[image][index]]] = 1
            box, anchor = target["boxes"][matched[image][index]], anchors[image][index]
            size, own = box[2:] - box[:2], anchor[2:] - anchor[:2]
            wanted[index, :2] = ((box[2:] + box[:2]) - (anchor[2:] + anchor[:2])) / 2 / own
            wanted[index, 2:] = (size / own).log()
        count = max(1, len(positive))
        classes.append(focal(outputs["cls_logits"][image][valid], truth[valid]) / count)
        boxes.append((outputs["bbox_regression"][image] - wanted)[positive].abs().sum() / count)
    return {"classification": sum(classes) / len(targets), "bbox_regression": sum(boxes) / len(targets)}


def fcos_by_hand(model: Any, targets: Any, outputs: Any, anchors: Any, matched: Any, active: Tensor) -> Any:
    classes, boxes, centres, count = 0.0, 0.0, 0.0, 0
    for image, target in enumerate(targets):
        truth = torch.zeros_like(outputs["cls_logits"][image])
        for index in (active[image] & (matched[image] >= 0)).nonzero()[:, 0].tolist():
            count += 1
            truth[index, target["labels"][matched[image][index]]] = 1
            box, anchor = target["boxes"][matched[image][index]], anchors[image][index]
            size, middle = anchor[2:] - anchor[:2], (anchor[2:] + anchor[:2]) / 2
            reach = outputs["bbox_regression"][image][index].view(2, 2) * size
            boxes = boxes + generalized_box_iou_loss(torch.cat([middle - reach[0], middle + reach[1]]), box)
            sides = torch.stack([middle - box[:2], box[2:] - middle])
            centre = (sides.amin(0) / sides.amax(0)).prod().sqrt()
            logit = outputs["bbox_ctrness"][image][index, 0]
            centres = centres + F.softplus(logit) - centre * logit
        classes = classes + focal(outputs["cls_logits"][image][active[image]], truth[active[image]])
    count = max(1, count)
    return {"classification": classes / count, "bbox_regression": boxes / count, "bbox_ctrness": centres / count}


BY_HAND: dict[str, Any] = {"retinanet": retinanet_by_hand, "fcos": fcos_by_hand}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("case", ["discs", "one image without", "nothing"])
def test_ignored_anchors_are_neither_positive_nor_negative(name: str, case: str) -> None:
    model = sparsenet.selectify(make(name), AT, selector=GivenMask(), inplace=True)
    images, targets = images_and_targets()
    mask = {"discs": discs(), "one image without": [discs()[0], nothing()[1]], "nothing": nothing()}[case]
    seen = Seen(model)
    losses, args = watched(model.head, "compute_loss", lambda: train(model, images, targets, mask))
    seen.close()
    active = active_anchors(model, canvas(mask), seen.maps)
    positive = torch.stack(args[3]) >= 0
    assert (positive & ~active).any() and ((positive & active).any() or case == "nothing")
    expected = BY_HAND[name](model, *args, active)
    assert losses.keys() == expected.keys()
    heads = list(model.head.parameters())
    for key in expected:
        assert_same(losses[key], torch.as_tensor(expected[key], dtype=torch.float64), rounds=1e5)
        found = torch.autograd.grad(losses[key], heads, retain_graph=True, materialize_grads=True)
        assert all(torch.isfinite(gradient).all() for gradient in found)
        if case != "nothing":
            wanted = torch.autograd.grad(expected[key], heads, retain_graph=True, materialize_grads=True)
            assert_same(found, wanted, rounds=1e7)
            plain = type(model.head).compute_loss(model.head, *args)
            assert abs(plain[key] - losses[key]) > 1e-3  # so that this could fail


@pytest.mark.parametrize("name", ["faster_rcnn", "faster_rcnn_of_one_map"])
def test_ignored_anchors_are_not_sampled(name: str) -> None:
    """All anchors that may be are sampled here."""
    model: Any = sparsenet.selectify(make(name), AT, selector=GivenMask(), inplace=True)
    images, targets = images_and_targets()
    seen = Seen(model)
    inside: list[Any] = []

    def run() -> Any:
        losses, args = watched(model.rpn, "compute_loss", lambda: train(model, images, targets, discs()))
        inside.extend(args)
        return losses

    losses, (anchors, placed) = watched(model.rpn, "assign_targets_to_anchors", run)
    seen.close()
    objectness, deltas, _, regression = inside
    labels, _ = type(model.rpn).assign_targets_to_anchors(model.rpn, anchors, placed)
    labels, active = torch.cat(labels), active_anchors(model, canvas(discs()), seen.maps).flatten()
    positive, counted = (labels == 1) & active, (labels >= 0) & active
    assert positive.any() and ((labels == 1) & ~active).any()
    logits, wanted = objectness.flatten(), torch.cat(regression)
    expected = (F.softplus(logits) - labels * logits)[counted].mean()
    assert losses["loss_objectness"].item() == pytest.approx(expected.item(), rel=1e-5)  # torchvision's is in float32
    distance = (deltas - wanted)[positive].abs()
    boxes = torch.where(distance < 1 / 9, 4.5 * distance.square(), distance - 1 / 18).sum() / counted.sum()
    assert_same(losses["loss_rpn_box_reg"], boxes, rounds=1e5)


@pytest.mark.parametrize("objects", [True, False], ids=["objects", "no objects"])
def test_an_empty_mask_has_finite_losses(model: Any, objects: bool) -> None:
    images, targets = images_and_targets(model)
    losses = train(model, images, targets if objects else without_objects(targets), nothing())
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    learned = {name: loss.item() for name, loss in losses.items() if name not in ROI_LOSSES or not objects}
    assert learned == dict.fromkeys(learned, 0.0)
    model.zero_grad()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    model.zero_grad()


# The heads behind the proposals learn from the objects' own boxes too, whatever the mask.
ROI_LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_keypoint")


def test_a_full_masks_losses_are_the_originals(original: Any, model: Any) -> None:
    _, targets = images_and_targets(original)
    images = [torch.rand(3, 128, 160).double() for _ in range(2)]
    if "masks" in targets[0]:
        targets = [{**t, "masks": torch.ones(len(t["boxes"]), 128, 160, dtype=torch.uint8)} for t in targets]
    everything = torch.ones(2, 128, 160, dtype=torch.bool)
    expected = train(original, images, targets, everything)
    assert_same(list(train(model, images, targets, everything).values()), list(expected.values()), rounds=1e7)


class HalfOpen(nn.Module):
    """Selects about half of the pixels of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Conv2d(8, 1, 3, padding=1)
        nn.init.normal_(self.logit.weight)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.logit(features)
        return logits - logits.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("name", [*DENSE, "faster_rcnn"])
def test_every_anchor_counts_where_the_mask_is_trained_by_its_effect(name: str) -> None:
    torch.manual_seed(0)
    model: Any = sparsenet.selectify(make(name), AT, selector=HalfOpen(), inplace=True)
    for convolution in model.selector.down.values():
        nn.init.constant_(convolution.bias, -2.7)  # which half of the probabilities' sum outweighs
    owner = model.rpn if hasattr(model, "rpn") else model.head
    images, targets = images_and_targets()
    with sparsenet.record(model) as rec:
        losses, args = watched(owner, "compute_loss", lambda: model.train()(images, targets))
    assert 0.1 < rec.density[20, 20] < 0.9
    expected = type(owner).compute_loss(owner, *args)
    expected = list(expected.values()) if isinstance(expected, dict) else list(expected)
    names = ("loss_objectness", "loss_rpn_box_reg") if hasattr(model, "rpn") else losses
    assert_same([losses[key] for key in names], expected, rounds=10)
    if hasattr(model, "rpn"):
        assert torch.cat(args[2]).ge(0).sum() > 0.5 * torch.cat(args[2]).numel()
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.selector.parameters())


# -- surgery ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_densify_leaves_no_trace(name: str) -> None:
    model = make(name)
    before = snapshot(model)
    sparsenet.selectify(model, AT, selector=GivenMask(), inplace=True)
    images, _ = images_and_targets()
    detect(model, images, discs())
    assert_unchanged(sparsenet.densify(model), before)


def test_maps_are_not_kept_beyond_the_pass(model: Any) -> None:
    from sparsenet.adapters import torchvision_detection

    images, _ = images_and_targets()
    detect(model, images, discs())
    assert torchvision_detection._sources.get() == []
    with pytest.raises(ValueError, match="3d tensors"):
        detect(model, [images[0][None]], discs()[:1])
    assert torchvision_detection._sources.get() == []


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(model: Any, copied: Any) -> None:
    images, targets = images_and_targets(model)
    twin = copied(model)
    expected, detected = train(model, images, targets, discs()), detect(model.eval(), images, discs())
    for parameter in twin.parameters():
        parameter.data.mul_(1.25)
    losses = train(twin, images, targets, discs())
    assert error(list(losses.values()), list(expected.values())) > 1e-3
    assert_same(train(model, images, targets, discs()), expected, rounds=0)
    assert_same(detect(model.eval(), images, discs()), detected, rounds=0)
    for module in twin.modules():
        for stand_in in vars(module).values():
            for part in ("model", "owner", "rpn"):
                if type(stand_in).__module__.startswith("sparsenet.adapters") and hasattr(stand_in, part):
                    assert getattr(stand_in, part) in set(twin.modules())
    sparsenet.densify(twin)


@pytest.mark.parametrize(("at", "path"), [("stride4", AT), ("stride8", "backbone.body.layer2"), (AT, AT)])
def test_stages(original: Any, at: str, path: str) -> None:
    assert sparsenet.plan(sparsenet.selectify(original, at, selector=GivenMask())).stage == path


def test_subclasses_are_of_the_family(original: Any) -> None:
    family = type(adapters.find(original))
    assert issubclass(family, adapters.torchvision_detection.Detector)
    model = copy.copy(original)
    model.__class__ = type("Mine", (type(original),), {})
    assert type(adapters.find(model)) is family


def test_example_inputs_have_the_networks_size(original: Any) -> None:
    [image] = adapters.find(original).example_inputs(original)
    assert image.shape == (3, 128, 128) and image.dtype == torch.float64
    assert original.transform([image])[0].tensors.shape == (1, 3, 128, 128)


# -- torchvision's own models ----------------------------------------------------------------------------------

SMALL = {"weights": None, "weights_backbone": None, "min_size": 96, "max_size": 96, "num_classes": 2}
FEW = {"rpn_post_nms_top_n_test": 10, "box_detections_per_img": 3}
OWN: dict[str, dict[str, Any]] = {
    "retinanet_resnet50_fpn_v2": {"score_thresh": 0.0},
    "fcos_resnet50_fpn": {"score_thresh": 0.0},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {**FEW, "box_score_thresh": 0.0},
    "maskrcnn_resnet50_fpn_v2": {**FEW, "box_score_thresh": 0.0},
    "keypointrcnn_resnet50_fpn": {**FEW, "box_score_thresh": 0.0},
}


@pytest.mark.parametrize("name", OWN)
def test_torchvisions_models(name: str) -> None:
    """Head outputs and proposals of a full mask are the original's; an empty mask detects nothing."""
    torch.manual_seed(0)
    model = getattr(torchvision.models.detection, name)(**SMALL, **OWN[name]).eval()
    images = [torch.rand(3, 96, 96)]
    outputs = []
    for mask in (None, torch.ones(1, 1, 1, dtype=torch.bool)):
        if mask is not None:
            sparsenet.selectify(model, "stride8", selector=GivenMask(), inplace=True)
        seen = Seen(model)
        detect(model, images, mask)
        seen.close()
        outputs.append([seen.scores, seen.deltas])
    for plain, full in zip(*outputs, strict=True):
        assert error(full, plain) < 1e-4 * plain.abs().max()
    [found] = detect(model, images, torch.zeros(1, 96, 96, dtype=torch.bool))
    assert len(found["boxes"]) == 0


def test_families_of_the_detectors() -> None:
    assert set(DETECTORS) == set(DENSE) | set(PROPOSING)
