"""Pelee's published figures, and Pelee as a selective detector."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsenet
from detectors.pelee import pelee304
from sparsenet import GivenMask, SelectiveModule
from sparsenet.train import Direct, Indirect, supervise
from tests.models import assert_as_good, assert_same, at_size, blobs, with_lively_norms

STAGE = "backbone.trunk.pool1"
GRIDS = [19, 19, 10, 5, 3, 1]  # of the six predictors


def on_meta(*args, **kwargs):
    with torch.device("meta"):
        return pelee304(*args, **kwargs).eval()


def head_outputs(model, images):
    found = []
    handle = model.head.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    return found[-1]


def images_and_targets():
    """Of objects for the predictors at 19x19, 10x10 and 5x5: without a match a level learns nothing."""
    images = [torch.rand(3, 304, 304), torch.rand(3, 200, 240)]
    targets = [
        {"boxes": torch.tensor([[20.0, 30, 120, 160], [60, 70, 230, 235]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([2])},
    ]
    return images, targets


@pytest.fixture(scope="module")
def small():
    """A detector of four classes whose numbers are lively: normalisation is not the identity."""
    torch.manual_seed(0)
    return with_lively_norms(pelee304(4, width=0.125))


# -- as published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "millions", "giga"), [(21, 5.426, 1.205), (81, 5.981, 1.284)])
def test_parameters_and_macs(classes, millions, giga):
    model = on_meta(classes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    with FlopCounterMode(display=False) as counter:
        outputs = model.head(list(model.backbone(torch.empty(1, 3, 304, 304, device="meta")).values()))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=5e-4)
    assert outputs["cls_logits"].shape == (1, 5142, classes)
    assert outputs["bbox_regression"].shape == (1, 5142, 4)


def test_the_channels_and_grids_of_the_stages():
    trunk, x, found = on_meta(21).backbone.trunk, torch.empty(1, 3, 304, 304, device="meta"), {}
    for name, layer in trunk.named_children():
        found[name] = tuple((x := layer(x)).shape[1:])
    assert found == {
        "stem": (32, 76, 76),
        "stage1": (128, 76, 76),
        "pool1": (128, 38, 38),
        "stage2": (256, 38, 38),
        "pool2": (256, 19, 19),
        "stage3": (512, 19, 19),
        "pool3": (512, 10, 10),
        "stage4": (704, 10, 10),
    }


def test_maps_and_widths():
    maps = list(on_meta(21, width=0.5).backbone(torch.empty(1, 3, 304, 304, device="meta")).values())
    assert [tuple(m.shape[1:]) for m in maps] == [(128, grid, grid) for grid in GRIDS]
    assert maps[0] is maps[1]  # one ResBlock feeds two predictors


@pytest.mark.parametrize(("kind", "sizes"), [("voc", (10, 20, 37, 54, 71, 88)), ("coco", (7, 15, 33, 51, 69, 87))])
def test_anchors(small, kind, sizes):
    """The first square of each predictor and its centre; large ones are not cut off at the image."""
    generator, found = pelee304(4, width=0.125, anchors=kind).anchor_generator, []
    small.anchor_generator.register_forward_hook(lambda module, args, output: found.append(generator(*args)[0]))
    try:
        head_outputs(small, [torch.rand(3, 304, 304)])
    finally:
        small.anchor_generator._forward_hooks.clear()
    [boxes] = found
    first = 0
    for grid, size in zip(GRIDS, sizes, strict=True):
        assert (boxes[first, 2:] - boxes[first, :2]).tolist() == pytest.approx([3.04 * size] * 2)
        assert ((boxes[first, :2] + boxes[first, 2:]) / 2).tolist() == pytest.approx([152 / grid] * 2, abs=1e-3)
        first += 6 * grid**2
    assert first == len(boxes) == 5142
    widest = boxes[-6:, 2] - boxes[-6:, 0]
    assert widest.max().item() == pytest.approx(3.04 * sizes[-1] * 3**0.5)


def test_what_the_network_reads(small):
    """A red image, normalised by the mean of red, green and blue."""
    [image] = small.transform([torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 304, 304)])[0].tensors
    assert image[:, 7, 9].tolist() == pytest.approx([0.017 * (255 - 123.68), -0.017 * 116.78, -0.017 * 103.94])


def test_trains_on_images_with_and_without_objects():
    model = pelee304(4, width=0.125)
    images, targets = images_and_targets()
    empty = [{"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}] * 2
    for given in (targets, empty):
        losses = model(images, given)
        sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# -- as a selective detector -----------------------------------------------------------------------------------


def test_all_that_follows_stage_1_is_guided():
    """At full width; features leave where the head flattens its results, and nowhere else."""
    model = sparsenet.selectify(pelee304(21), at="pool2", example_inputs=[torch.rand(3, 304, 304)])
    plan = sparsenet.plan(model)
    assert (plan.stage, plan.channels, plan.size) == (STAGE, 128, (38, 38))
    assert plan.guided_share == plan.guided_conv_share == 1
    assert plan.downstream_macs / plan.total_macs == pytest.approx(0.734, abs=5e-4)
    heads = ["head.regression_head"] * 6 + ["head.classification_head"] * 6
    assert [step.path for step in plan.exits] == heads
    results = {f"head.{kind}_head.module_list.{k}" for kind in ("classification", "regression") for k in range(6)}
    assert model.selector.near_heads == results | {f"backbone.predictors.{k}.residual.2.conv" for k in range(5)}


def in_double(model):
    """The same detector in float64."""
    twin = pelee304(4, width=0.125).eval()
    twin.load_state_dict(model.state_dict())
    return twin.double()


def times_mask(model, mask):
    """Multiplies what each convolution and pooling after the stage reads by the mask of its size."""
    names, modules = zip(*model.named_modules(), strict=True)
    for module in modules[names.index(STAGE) + 1 :]:
        if isinstance(module, nn.Conv2d | nn.AvgPool2d):
            module.register_forward_pre_hook(lambda module, args: args[0] * at_size(mask, args[0].shape[2:]))
    return model


def active_anchors(mask):
    """Bool (N, 5142): an anchor counts if its cell does."""
    return torch.cat([at_size(mask, (g, g)).flatten(1).repeat_interleave(6, 1) for g in GRIDS], 1)


@pytest.mark.parametrize("backend", ["reference", "rows", "indirect"])
def test_selective_is_dense_times_mask(small, backend):
    model = sparsenet.selectify(in_double(small), at=STAGE, selector=GivenMask())
    images = [torch.rand(3, 304, 304).double() for _ in range(2)]
    mask = blobs(2, (304, 304), seed=3)
    with sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        found = head_outputs(model, images)
    expected = head_outputs(times_mask(in_double(small), mask), images)
    active = active_anchors(mask)
    assert 0.05 < active.double().mean() < 0.8
    for name in expected:
        assert_same(found[name][active], expected[name][active])
    certain = torch.tensor([1.0, 0, 0, 0]).double()
    assert (found["cls_logits"][~active].softmax(-1) == certain).all()
    assert not found["bbox_regression"][~active].any()


def test_all_active_is_the_original(small):
    model = sparsenet.selectify(small, at=STAGE, selector=GivenMask())
    images = [torch.rand(3, 304, 304), torch.rand(3, 304, 304)]
    with sparsenet.use_mask(torch.ones(2, 304, 304, dtype=torch.bool)):
        found = head_outputs(model, images)
        detections = model(images)
    expected = head_outputs(small, images)
    truth = head_outputs(in_double(small), [image.double() for image in images])
    assert_as_good(found, expected, truth)
    assert [len(each["boxes"]) for each in detections] == [len(each["boxes"]) for each in small(images)]


def test_frozen_is_the_unfrozen_one(small):
    model = sparsenet.selectify(small, at=STAGE, selector=GivenMask())
    images = [torch.rand(3, 304, 304), torch.rand(3, 304, 304)]
    mask = blobs(2, (304, 304), seed=3)
    frozen = sparsenet.freeze(model, images)
    active = active_anchors(mask)

    def outputs(net, given):
        with sparsenet.use_mask(mask):
            return {name: value[active] for name, value in head_outputs(net, given).items()}

    truth = sparsenet.selectify(in_double(small), at=STAGE, selector=GivenMask())
    assert_as_good(outputs(frozen, images), outputs(model, images), outputs(truth, [i.double() for i in images]))
    with torch.no_grad(), sparsenet.use_mask(mask):
        found, expected = frozen(images), model(images)
    assert [len(each["boxes"]) for each in found] == [len(each["boxes"]) for each in expected]


def learner() -> Any:
    """Selective Pelee whose mask is on in a part of the pixels, and whose module lets gradient through everywhere."""
    torch.manual_seed(0)
    dense = pelee304(4, width=0.125)
    channels = dense.backbone.trunk.stage1[-1].conv.out_channels
    model: Any = sparsenet.selectify(dense, at=STAGE, selector=SelectiveModule(channels, 8)).train()
    nn.init.normal_(model.selector.module.attend.restore.weight, std=0.1)
    nn.init.normal_(model.selector.module.logit.weight, std=2.0)
    nn.init.zeros_(model.selector.module.logit.bias)
    for convolution in model.selector.down.values():
        nn.init.normal_(convolution.weight, std=3.0)
        nn.init.zeros_(convolution.bias)
    with_head_biases(model)
    return model


def with_head_biases(model):
    for name, parameter in model.head.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("how", [Direct(), Indirect()], ids=["direct", "indirect"])
def test_every_parameter_of_the_selector_learns(how):
    model = learner()
    images, targets = images_and_targets()
    with supervise(model, how, [t["boxes"] for t in targets]) as supervision, sparsenet.record(model) as rec:
        losses = model(images, targets)
    assert all(0.01 < rec.density[grid, grid] < 0.99 for grid in (38, 19))
    assert set(model.selector.down) == {"1", "2", "3"}
    (sum(losses.values()) + supervision.loss()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for name, parameter in model.selector.named_parameters():
        assert parameter.grad.any(), name


@pytest.mark.parametrize("biased", [False, True])
def test_an_ignored_pixel_can_return(biased):
    """Of it a 1x1 head gives its bias alone, which may be zero; what it says of an ignored one is another thing."""
    dense = pelee304(4, width=0.125)
    if biased:
        with_head_biases(dense)
    closed = nn.Conv2d(dense.backbone.trunk.stage1[-1].conv.out_channels, 1, 1)
    nn.init.zeros_(closed.weight)
    nn.init.constant_(closed.bias, -2.0)
    model = sparsenet.selectify(dense, at=STAGE, selector=closed).train()
    for convolution in model.selector.down.values():
        nn.init.constant_(convolution.weight, 0.1)
        nn.init.constant_(convolution.bias, -2.0)
    images, targets = images_and_targets()
    with supervise(model, Indirect()), sparsenet.record(model) as rec:
        losses = model(images, targets)
    assert all(rec.density[grid, grid] == 0 for grid in (38, 19, 10, 5))
    sum(losses.values()).backward()
    for name, parameter in model.selector.named_parameters():
        assert parameter.grad.any(), name
