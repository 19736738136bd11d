"""Detectors made smaller: what is kept stays as it was, and what is lost is as little as is said."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import sparsenet
from detectors.ssd import ssd300_vgg16_bn
from reduction import lasso
from reduction.channels import without_weak_filters
from reduction.graph import Convolutions, with_shapes
from reduction.imitation import Imitation, maps_of
from reduction.lasso import without_redundant_channels
from reduction.least_squares import Moments
from reduction.reduce import Reduction
from reduction.resolution import at_side
from storage import shapes_of


def detector(width=0.06, side=None):
    """In float64, with statistics of batch normalisation that differ from channel to channel."""
    torch.manual_seed(0)
    model = ssd300_vgg16_bn(11, width=width).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return at_side(model, side) if side else model


def convolutions(model):
    return [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]


def silence(model, share):
    """Let all but this share of each layer's channels be zero, whatever comes in, and keep which."""
    dead = {}
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for number, conv in enumerate(convolutions(model)):
        count = conv.out_channels - round(share * conv.out_channels)
        chosen = torch.randperm(conv.out_channels, generator=torch.Generator().manual_seed(number))[:count]
        parameters = [conv.weight]
        if number < len(norms):
            norm = norms[number]
            parameters += [norm.bias, norm.running_mean]
        else:
            parameters.append(conv.bias)
        with torch.no_grad():
            for parameter in parameters:
                parameter[chosen] = 0
        dead[conv] = chosen
    return dead


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return [torch.randn(2, 3, 96, 96, dtype=torch.float64) for _ in range(2)]


def outputs(model, images):
    with torch.no_grad():
        return [torch.cat(found) for found in zip(*(Convolutions(model)(batch) for batch in images), strict=True)]


@pytest.mark.parametrize("by", ["norm", "lasso"])
def test_channels_that_are_zero_are_the_ones_to_go(by, images):
    model = detector(side=96)
    silence(model, 0.75)
    wide = outputs(model, images)
    smaller = copy.deepcopy(model)
    if by == "norm":
        without_weak_filters(smaller, 0.75)
    else:
        without_redundant_channels(smaller, 0.75, images, places=10_000)  # all: a channel may be on at few
    for before, after in zip(convolutions(model), convolutions(smaller), strict=True):
        assert after.out_channels == round(0.75 * before.out_channels) < before.out_channels
    assert smaller.backbone.scale_weight.shape == (24,)
    for before, after in zip(wide, outputs(smaller, images), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_filters_of_the_largest_norm_stay():
    model = detector()
    smaller = without_weak_filters(copy.deepcopy(model), 0.5)
    before, after = convolutions(model)[0], convolutions(smaller)[0]
    kept = before.weight.abs().sum((1, 2, 3)).argsort(descending=True)[: after.out_channels].sort().values
    torch.testing.assert_close(after.weight, before.weight[kept], rtol=0, atol=0)
    second = convolutions(smaller)[1].weight
    assert second.shape[1] == len(kept)
    assert {len(head.weight) for head in Convolutions(smaller).heads} == {
        len(head.weight) for head in Convolutions(model).heads
    }


def test_least_squares_restores_what_removal_loses(images):
    """Against the removal of the same channels alone."""
    model = detector(side=96)
    restored = without_redundant_channels(copy.deepcopy(model), 0.5, images, places=100)
    solve = Moments.solve
    try:
        Moments.solve = lambda self, weight, ridge=0.0: weight
        plain = without_redundant_channels(copy.deepcopy(model), 0.5, images, places=100)
    finally:
        Moments.solve = solve
    torch.manual_seed(2)
    others = [torch.randn(2, 3, 96, 96, dtype=torch.float64)]
    for which in (images, others):
        wanted = outputs(model, which)
        errors = [
            sum((found - target).square().sum().item() for found, target in zip(outputs(m, which), wanted, strict=True))
            for m in (restored, plain)
        ]
        assert errors[0] < 0.8 * errors[1], errors


def test_lasso_chooses_the_channels_that_the_rest_can_be_made_of():
    """Of four channels the third is the sum of the first two, and the last small: two or three suffice."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, 1, bias=False).double()
    x = torch.randn(500, 4, dtype=torch.float64) * torch.tensor([1, 1, 1, 0.01])
    with torch.no_grad():
        conv.weight[:, 0] = conv.weight[:, 1] = 0
        conv.weight[:, 2] *= 10
        found = Moments.of(x, x @ conv.weight[:, :, 0, 0].T)
        assert lasso.chosen([(found, conv)], 1) == [2]
        assert lasso.chosen([(found, conv)], 2) == [2, 3]  # the others give nothing


def test_sampled_patches_are_what_a_convolution_reads():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2, bias=False).double()
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    result = conv(x)
    at = lasso._places(result, 7, 0)
    patches = lasso._patches(conv, x, at, result.shape[3])
    wanted = result.flatten(2).transpose(1, 2).gather(1, at[..., None].expand(-1, -1, 4)).flatten(0, 1)
    torch.testing.assert_close(patches @ conv.weight.flatten(1).T, wanted)


def test_least_squares():
    torch.manual_seed(0)
    x, w = torch.randn(50, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    moments = Moments.of(x[:20], x[:20] @ w.T) + Moments.of(x[20:], x[20:] @ w.T)
    torch.testing.assert_close(moments.solve(torch.zeros_like(w), ridge=1e-12), w)
    torch.testing.assert_close(moments.solve(w), w, rtol=1e-12, atol=1e-12)
    other = w + 1
    assert moments.error(other) == pytest.approx((x @ (other - w).T).square().sum().item())


@pytest.mark.parametrize("side", [256, 212])
def test_boxes_of_a_smaller_input_are_in_the_pixels_of_the_image(side):
    """The detector finds what the anchors say where all regressions are zero: of images of any size, the same places
    up to the anchors' own positions."""
    model = at_side(ssd300_vgg16_bn(11, width=0.06).eval(), side)
    for head in [*model.head.regression_head.module_list, *model.head.classification_head.module_list]:
        nn.init.zeros_(head.weight)  # and every class as likely as another, lest one's probability be zero
        nn.init.zeros_(head.bias)
    seen = []
    model.anchor_generator.register_forward_hook(lambda module, inputs, found: seen.append(found[0]))
    height, width = 200, 450
    model.score_thresh = 0.0
    model.detections_per_img = model.topk_candidates = 10**6
    model.nms_thresh = 1.0
    with torch.no_grad():
        [found] = model([torch.rand(3, height, width)])
    [anchors] = seen
    clipped = anchors.clamp(0, side) * torch.tensor([width, height, width, height]) / side
    first = found["boxes"][found["labels"] == 1]
    apart = torch.cdist(first, clipped, compute_mode="donot_use_mm_for_euclid_dist")
    assert apart.amin(0).max() < 0.01 and apart.amin(1).max() < 0.01
    widths = anchors[:, 2] - anchors[:, 0]
    assert widths.min() > 0 and widths[0].item() == pytest.approx(0.1 * side, rel=1e-4)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres.min() > 0 and centres[-1].tolist() == pytest.approx([side / 2] * 2)


def test_a_side_of_300_changes_nothing():
    model = detector()
    other = at_side(copy.deepcopy(model), 300)
    image = torch.rand(3, 300, 300, dtype=torch.float64)
    assert other.anchor_generator.steps == model.anchor_generator.steps
    for name, value in model([image])[0].items():
        torch.testing.assert_close(other([image])[0][name], value, rtol=0, atol=0)


def test_smaller_images_cost_less():
    from evaluation.detector import multiply_accumulates

    model = ssd300_vgg16_bn(11, width=0.06).eval()
    image = torch.rand(3, 300, 300)
    whole = multiply_accumulates(model, image)
    selective = sparsenet.selectify(model, "pool3", example_inputs=[image])
    with sparsenet.record(selective) as record, torch.no_grad():
        selective([image])
    assert whole == record.dense_macs
    less = multiply_accumulates(at_side(model, 212), image)
    assert less / whole == pytest.approx((212 / 300) ** 2, rel=0.05)


def test_widths_of_another():
    model = detector()
    smaller = without_weak_filters(copy.deepcopy(model), 0.5)
    branch = sparsenet.SelectiveModule(8, 8)
    selective = sparsenet.selectify(smaller.float(), "pool3", selector=branch, example_inputs=[torch.rand(3, 300, 300)])
    again = with_shapes(model.float(), shapes_of(selective.state_dict()))
    again.load_state_dict(smaller.state_dict())
    image = torch.rand(3, 300, 300)
    for name, value in smaller([image])[0].items():
        torch.testing.assert_close(again([image])[0][name], value)
    assert str(again) == str(smaller)


TARGETS = [
    {"boxes": torch.tensor([[30.0, 40, 130, 160]]), "labels": torch.tensor([2])},
    {"boxes": torch.tensor([[200.0, 10, 290, 60], [0, 250, 40, 300]]), "labels": torch.tensor([1, 3])},
]


def test_a_student_equal_to_the_teacher_has_nothing_to_learn():
    model = detector().float()
    images = [torch.rand(3, 300, 300) for _ in TARGETS]
    imitation = Imitation(model, model, [torch.rand(2, 3, 300, 300)])
    with maps_of(model) as maps, torch.no_grad():
        model([torch.rand(3, 300, 300) for _ in TARGETS])
        elsewhere = imitation(maps, images, TARGETS).item()
        model(images)
        assert imitation(maps, images, TARGETS).item() < 1e-9 < 1e-3 < elsewhere


@pytest.mark.parametrize("selective", [False, True])
def test_only_the_student_learns_and_only_inside_boxes(selective):
    teacher = detector(0.12).float()
    student = without_weak_filters(copy.deepcopy(teacher), 0.5)
    images = [torch.rand(3, 300, 300) for _ in TARGETS]
    imitation = Imitation(teacher, student, [torch.rand(2, 3, 300, 300)])
    if selective:
        student = sparsenet.selectify(student, "pool3", example_inputs=images)
    student.train()
    boxes = [target["boxes"] for target in TARGETS]
    with maps_of(student) as maps:
        with sparsenet.train.direct(student, boxes, warmup=True) if selective else nullcontext():
            student(images, TARGETS)
    imitation(maps, images, TARGETS).backward()
    assert all(parameter.grad is not None for parameter in student.backbone.parameters())
    assert all(parameter.grad is None for parameter in [*imitation.teacher.parameters(), *teacher.parameters()])
    assert all(parameter.grad.abs().sum() > 0 for parameter in imitation.parameters())
    assert not any(name.startswith("teacher") for name in imitation.state_dict())
    if selective:
        return
    found = [values.detach().requires_grad_() for values in maps]
    imitation(found, images, TARGETS).backward()
    touched = found[0].grad.abs().sum(1) > 0
    inside = sparsenet.regions.box_cells(boxes, (38, 38), (8, 8)) > 0
    assert touched.any() and not (touched & ~inside).any()


@pytest.mark.parametrize(
    ("kind", "amount", "message"),
    [("squeeze", 0.5, "choose one of channels"), ("lasso", 1.5, "between 0 and 1"), ("resolution", 0.5, "64 or more")],
)
def test_reductions_that_are_none(kind, amount, message):
    with pytest.raises(ValueError, match=message):
        Reduction(kind, amount)


def test_names():
    assert Reduction("resolution", 256).name == "resolution-256" and Reduction("lasso", 0.85).name == "lasso-0.85"
    assert Reduction("imitation", 0.5).start == Reduction("channels", 0.5)
