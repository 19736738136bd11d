"""Whole models before, with and after surgery."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask, MaskedConv2d
from tests.models import (
    SmallNet,
    assert_as_good,
    assert_same,
    assert_unchanged,
    at_size,
    blobs,
    convolutions,
    error,
    small_ssd,
    snapshot,
    with_lively_norms,
)

BACKENDS = ("reference", "rows", "spconv")


def vgg16_bn() -> nn.Module:
    """With a small classifier: torchvision's has 120 million weights, which no mask meets."""
    model = torchvision.models.vgg16_bn(weights=None, num_classes=10, init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(16, 16, 3, groups=4, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


# name: how it is made, its stage
MODELS: dict[str, tuple[Any, str]] = {
    "vgg16_bn": (vgg16_bn, "pool2"),
    "resnet50": (lambda: torchvision.models.resnet50(weights=None, num_classes=10), "layer1"),
    "densenet121": (lambda: torchvision.models.densenet121(weights=None, num_classes=10), "pool2"),
    "regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(weights=None, num_classes=10), "stride4"),
    "timm_resnet26d": (lambda: timm.create_model("resnet26d", num_classes=10), "layer1"),
    "timm_features": (lambda: timm.create_model("resnet18", features_only=True), "maxpool"),
    "sequential": (sequential, "1"),
}


@dataclass
class Case:
    """A model and its selective copy, which share nothing; and images."""

    model: nn.Module
    selective: nn.Module
    images: Tensor

    def truth(self) -> Any:
        with torch.no_grad():
            return copy.deepcopy(self.model).double()(self.images.double())


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    make, at = MODELS[request.param]
    torch.manual_seed(0)
    model = with_lively_norms(make())
    images = torch.rand(2, 3, 96, 80)
    return Case(model, sparsenet.selectify(model, at, selector=GivenMask(), example_inputs=images), images)


def run(model: nn.Module, images: Any, mask: Any = None, backend: str = "auto") -> Any:
    if mask is None:
        mask = torch.ones(len(images), 1, 1, dtype=torch.bool)
    with torch.no_grad(), sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        return model(images)


@contextmanager
def in_float64(*models: nn.Module) -> Iterator[None]:
    """Float32 weights are exact in float64, so that nothing is lost on the way back."""
    for model in models:
        model.double()
    try:
        yield
    finally:
        for model in models:
            model.float()


# -- what a selective model computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_active_is_the_original(case: Case, backend: str) -> None:
    """Within 8 times the error that PyTorch's own float32 has against float64."""
    with torch.no_grad():
        plain = case.model(case.images)
    assert_as_good(run(case.selective, case.images, backend=backend), plain, case.truth())


def test_storages_and_backends_agree_under_random_masks(case: Case) -> None:
    """In float64, where a wrong pixel cannot hide behind rounding; the mask changes the outputs."""
    mask = blobs(2, (48, 40))
    with in_float64(case.selective):
        images = case.images.double()
        reference, rows, spconv = (run(case.selective, images, mask, backend) for backend in BACKENDS)
        assert_same(rows, reference)
        assert_same(spconv, reference)
        assert error(reference, run(case.selective, images)) > 1e-3


@pytest.mark.parametrize("backend", ["rows", "spconv"])
def test_float32_rows_are_as_exact_as_the_float32_reference(case: Case, backend: str) -> None:
    mask = blobs(2, (96, 80), seed=1)
    reference = run(case.selective, case.images, mask, "reference")
    with in_float64(case.selective):
        truth = run(case.selective, case.images.double(), mask, "reference")
    assert_as_good(run(case.selective, case.images, mask, backend), reference, truth)


def test_an_image_does_not_see_its_batch(case: Case) -> None:
    """Nor an empty mask beside it."""
    mask = torch.cat([blobs(1, (48, 40)), torch.zeros(1, 48, 40, dtype=torch.bool)])
    with in_float64(case.selective):
        images = case.images.double()
        together = run(case.selective, images, mask)
        for image in range(2):
            alone = run(case.selective, images[image : image + 1], mask[image : image + 1])
            part = [level[image : image + 1] for level in together] if isinstance(together, list) else together[image]
            assert_same(part, alone if isinstance(alone, list) else alone[0])


# -- state -----------------------------------------------------------------------------------------------------


def test_keys_are_the_originals_plus_the_selectors(case: Case) -> None:
    learned = sparsenet.selectify(
        case.model,
        sparsenet.plan(case.selective).stage,
        selector=nn.Conv2d(sparsenet.plan(case.selective).channels, 1, 1),
        example_inputs=case.images,
    )
    for selective in (case.selective, learned):
        added = [key for key in selective.state_dict() if key.startswith("selector.")]
        assert [*case.model.state_dict(), *added] == list(selective.state_dict())
    assert added
    assert any(key.startswith("selector.down.1.") for key in added)


def test_original_checkpoints_load_before_and_after(case: Case) -> None:
    other = with_lively_norms(copy.deepcopy(case.model))
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.05)
    checkpoint = other.state_dict()
    after = copy.deepcopy(case.selective)
    missing, unexpected = after.load_state_dict(checkpoint, strict=False)
    assert unexpected == []
    assert all(key.startswith("selector.") for key in missing)
    before = copy.deepcopy(case.model)
    before.load_state_dict(checkpoint)
    before = sparsenet.selectify(
        before, sparsenet.plan(case.selective).stage, selector=GivenMask(), example_inputs=case.images
    )
    mask = blobs(2, (24, 20))
    first, second = run(before, case.images, mask), run(after, case.images, mask)
    assert error(first, second) == 0
    assert error(first, run(case.selective, case.images, mask)) > 0


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save])
def test_copies_are_whole_and_independent(case: Case, copied: Any) -> None:
    mask = blobs(2, (24, 20))
    expected = run(case.selective, case.images, mask)
    twin = copied(case.selective)
    assert error(run(twin, case.images, mask), expected) == 0
    assert str(sparsenet.plan(twin)) == str(sparsenet.plan(case.selective))
    with sparsenet.record(twin) as seen, sparsenet.record(case.selective) as unseen:
        run(twin, case.images, mask)
    assert seen.macs > 0
    assert unseen.macs == 0
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert error(run(case.selective, case.images, mask), expected) == 0
    assert_same(run(sparsenet.densify(copied(case.selective)), case.images), run(case.model, case.images), rounds=0)


def test_densify_gives_the_original_back(case: Case) -> None:
    dense = sparsenet.densify(copy.deepcopy(case.selective))
    assert type(dense) is type(case.model)
    assert repr(dense) == repr(case.model)
    assert list(dense.state_dict()) == list(case.model.state_dict())
    wanted, found = snapshot(case.model), snapshot(dense)
    assert found["modules"] == wanted["modules"]
    with torch.no_grad():
        assert error(dense(case.images), case.model(case.images)) == 0


def test_inplace_keeps_parameters_and_densify_undoes_it(case: Case) -> None:
    model = copy.deepcopy(case.model)
    before = snapshot(model)
    at = sparsenet.plan(case.selective).stage
    selective = sparsenet.selectify(model, at, selector=GivenMask(), example_inputs=case.images, inplace=True)
    assert selective is model
    ours = [(name, key) for name, key in snapshot(model)["parameters"] if not name.startswith("selector.")]
    assert ours == before["parameters"]
    assert any(isinstance(module, MaskedConv2d) for module in model.modules())
    assert sparsenet.densify(selective) is model
    assert_unchanged(model, before)


def test_surgery_leaves_no_trace_in_the_callers_model(case: Case) -> None:
    before = snapshot(case.model)
    case.model.train()
    at = sparsenet.plan(case.selective).stage
    selective = sparsenet.selectify(case.model, at, selector=GivenMask(), example_inputs=case.images)
    assert all(module.training for module in selective.modules())
    case.model.eval()
    assert_unchanged(case.model, before)
    ours, theirs = ({id(p) for p in model.parameters()} for model in (case.model, selective))
    assert not ours & theirs


def test_guided_convolutions_show_their_path_size_and_backend(case: Case) -> None:
    guided = [(name, module) for name, module in convolutions(case.selective) if type(module) is MaskedConv2d]
    assert {name for name, _ in guided} == {
        step.path for step in sparsenet.plan(case.selective).steps if step.operation.name == "conv2d"
    }
    for name, module in guided:
        assert module.path == name
        assert f"masked at {module.size[0]}x{module.size[1]}, backend=auto" in repr(module)


# -- against references without sparsenet ----------------------------------------------------------------------


def resnet18_by_hand(model: Any, images: Tensor, entry: Tensor) -> Tensor:
    """torchvision's resnet18 embedded at its max-pooling, written out: every spatial operation reads its input times
    the mask of its size, but for what reads the stage's own output, which is whole."""

    def norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    mask = functools.cache(lambda size: at_size(entry, size))

    def read(x: Tensor) -> Tensor:
        return x * mask(x.shape[2:])

    x = F.relu(norm(model.bn1, F.conv2d(images, model.conv1.weight, stride=2, padding=3)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    seen = x
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            out = F.relu(norm(block.bn1, F.conv2d(seen, block.conv1.weight, stride=block.stride, padding=1)))
            out = norm(block.bn2, F.conv2d(read(out), block.conv2.weight, padding=1))
            if block.downsample is not None:
                x = norm(block.downsample[1], F.conv2d(seen, block.downsample[0].weight, stride=block.stride))
            x = F.relu(out + x)
            seen = read(x)
    return F.linear(seen.mean((2, 3)), model.fc.weight, model.fc.bias)


def vgg16_bn_by_hand(model: Any, images: Tensor, entry: Tensor) -> Tensor:
    """torchvision's vgg16_bn embedded at its second pooling, written out."""
    mask = functools.cache(lambda size: at_size(entry, size))
    x, stage = images, 13
    for index, module in enumerate(model.features):
        seen = x if index <= stage + 1 else x * mask(x.shape[2:])
        if isinstance(module, nn.Conv2d):
            x = F.conv2d(seen, module.weight, module.bias, padding=1)
        elif isinstance(module, nn.BatchNorm2d):
            x = F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)
        elif isinstance(module, nn.ReLU):
            x = F.relu(x)
        else:
            x = F.max_pool2d(seen, 2)
    x = F.adaptive_avg_pool2d(x * mask(x.shape[2:]), (7, 7))
    return F.linear(x.flatten(1), model.classifier.weight, model.classifier.bias)


@pytest.mark.parametrize(
    ("make", "at", "by_hand"),
    [
        (lambda: torchvision.models.resnet18(weights=None, num_classes=10), "maxpool", resnet18_by_hand),
        (vgg16_bn, "pool2", vgg16_bn_by_hand),
    ],
    ids=["resnet18", "vgg16_bn"],
)
def test_masked_networks_written_out_by_hand(make: Any, at: str, by_hand: Any) -> None:
    model = with_lively_norms(make()).double()
    images = torch.rand(2, 3, 64, 48, dtype=torch.float64)
    selective = sparsenet.selectify(model, at, selector=GivenMask(), example_inputs=images[:1])
    one_pixel = torch.zeros(2, 16, 12, dtype=torch.bool)
    one_pixel[1, 15, 0] = True  # and no pixel at all in the first image
    for mask in (blobs(2, (32, 24), seed=3), one_pixel):
        with torch.no_grad():
            expected = by_hand(model, images, mask)
        for backend in BACKENDS:
            assert_same(run(selective, images, mask, backend), expected)
        assert error(expected, run(selective, images)) > 1e-3


# -- SSD300 ----------------------------------------------------------------------------------------------------


def head_outputs(model: Any, images: list[Tensor], mask: Any = None, backend: str = "auto") -> Any:
    found: list[Any] = []
    handle = model.head.register_forward_hook(lambda module, args, output: found.append(output))
    detections = run(model, images, mask, backend)
    handle.remove()
    return found[0], detections


def test_ssd300_vgg16() -> None:
    """All-active head outputs are the original's; under a mask the storages agree. Detections are compared below:
    a random network's scores have ties, which rounding orders."""
    model = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21).eval()
    for _, module in convolutions(model.head):
        nn.init.normal_(module.bias, std=0.5)
    selective = sparsenet.selectify(model, "pool2", selector=GivenMask())
    images = [torch.rand(3, 260, 300)]
    plain, _ = head_outputs(model, images)
    for backend in BACKENDS:
        active, _ = head_outputs(selective, images, backend=backend)
        assert active.keys() == plain.keys()
        for name in plain:
            assert tuple(active[name].shape) == tuple(plain[name].shape)
            # Float64 would take minutes; two float32 computations differ by at most twice their error.
            largest = plain[name].abs().max().item()
            assert error(active[name], plain[name]) <= 1e-5 * largest
    mask = blobs(1, (75, 75))
    reference, rows, spconv = (head_outputs(selective, images, mask, backend) for backend in BACKENDS)
    for name in plain:
        largest = plain[name].abs().max().item()
        assert error(rows[0][name], reference[0][name]) <= 1e-5 * largest
        assert error(spconv[0][name], reference[0][name]) <= 1e-5 * largest
        assert error(reference[0][name], plain[name]) > 1e-2 * largest


@pytest.mark.parametrize("backend", BACKENDS)
def test_ssd_detections(backend: str) -> None:
    """In float64, so that scores have no ties: boxes, labels and scores in the same order."""
    model = small_ssd().double()
    model.score_thresh, model.detections_per_img = 0.5, 10_000
    selective = sparsenet.selectify(model, "pool2", selector=GivenMask())
    images = [torch.rand(3, 240, 200, dtype=torch.float64), torch.rand(3, 300, 300, dtype=torch.float64)]
    with torch.no_grad():
        plain = model(images)
    assert all(len(found["boxes"]) > 50 for found in plain)
    assert_same(run(selective, images, backend=backend), plain, rounds=1e5)
    mask = list(blobs(2, (30, 30)))
    masked = run(selective, images, mask, backend)
    assert_same(masked, run(selective, images, mask, "reference"), rounds=1e5)
    for found, all_found in zip(masked, plain, strict=True):
        assert 0 < len(found["boxes"]) < len(all_found["boxes"])


# -- unusual models --------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One block called on its own output, and one shared convolution at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.same = self.block[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x)))
        return self.same(self.pool(x)).amax((2, 3))


def test_a_module_used_twice() -> None:
    model = Twice().double()
    images = torch.rand(2, 3, 12, 16, dtype=torch.float64)
    selective = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=images)
    mask = blobs(2, (12, 16))

    def conv(x: Tensor) -> Tensor:
        return F.conv2d(x, model.block[0].weight, model.block[0].bias, padding=1)

    with torch.no_grad():
        fine, coarse = at_size(mask, (12, 16)), at_size(mask, (6, 8))
        x = F.relu(conv(F.relu(conv(model.stem(images))) * fine)) * fine
        expected = (conv(F.max_pool2d(x, 2) * coarse) * coarse).amax((2, 3))
    for backend in BACKENDS:
        assert_same(run(selective, images, mask, backend), expected)
    assert isinstance(selective.same, MaskedConv2d)
    assert repr(sparsenet.densify(selective)) == repr(model)


def test_the_stage_called_on_guided_input_is_a_no_op() -> None:
    """The block embedded at runs twice: the second time it gets guided features, and hands them on."""
    model = Twice().double()
    images = torch.rand(2, 3, 12, 16, dtype=torch.float64)
    selective = sparsenet.selectify(model, "block", selector=GivenMask(), example_inputs=images)
    mask = blobs(2, (12, 16))

    def conv(x: Tensor) -> Tensor:
        return F.conv2d(x, model.block[0].weight, model.block[0].bias, padding=1)

    with torch.no_grad():
        coarse = at_size(mask, (6, 8))
        x = F.relu(conv(F.relu(conv(model.stem(images))))) * at_size(mask, (12, 16))
        expected = (conv(F.max_pool2d(x, 2) * coarse) * coarse).amax((2, 3))
    for backend in BACKENDS:
        with sparsenet.record(selective) as rec:
            assert_same(run(selective, images, mask, backend), expected)
        assert len(rec.selections) == 1


class TwoInputs(nn.Module):
    """Two images, a number by keyword, and a dict of results, one of them a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(1, 4, 3, padding=1)
        self.join = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image: Tensor, *, depth: Tensor, scale: float = 1.0) -> dict[str, Any]:
        found = self.join(torch.cat([self.left(image), self.right(depth)], 1)) * scale
        return {"map": found, "parts": (found.mean((2, 3)), scale)}


def test_two_inputs_and_a_dict_of_outputs() -> None:
    model = TwoInputs().double()
    image, depth = torch.rand(2, 3, 9, 11, dtype=torch.float64), torch.rand(2, 1, 9, 11, dtype=torch.float64)
    selective = sparsenet.selectify(
        model, "left", selector=GivenMask(), example_inputs={"image": image, "depth": depth}
    )
    mask = blobs(2, (9, 11))
    with torch.no_grad():
        both = torch.cat([model.left(image), model.right(depth)], 1)  # depth was ordinary until it met guided features
        found = F.conv2d(both, model.join.weight, model.join.bias, padding=1) * 0.5 * mask[:, None]
        for backend in BACKENDS:
            with sparsenet.use_mask(mask), sparsenet.use_backend(backend):
                output = selective(image, depth=depth, scale=0.5)
            assert output.keys() == {"map", "parts"}
            assert output["parts"][1] == 0.5
            assert_same(output["map"], found)
            assert_same(output["parts"][0], found.mean((2, 3)))


def test_boxes_follow_the_image_of_two_inputs() -> None:
    model = TwoInputs()
    image, depth = torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8)
    selective = sparsenet.selectify(
        model, "left", selector=GivenMask(), example_inputs={"image": image, "depth": depth}
    )
    with sparsenet.record(selective) as rec, sparsenet.use_mask([torch.tensor([[2.0, 1, 5, 3]])]):
        selective(image, depth=depth)
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[:, 1:3, 2:5] = True
    assert torch.equal(rec.masks[8, 8], expected)


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_outputs_that_are_feature_maps_serve_as_tensors(backend: str) -> None:
    """Even after the mask's context has ended."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    images, mask = torch.rand(2, 3, 6, 7), blobs(2, (6, 7))
    selective = sparsenet.selectify(model, "0", selector=GivenMask(), example_inputs=images)
    output = run(selective, images, mask, backend)
    with torch.no_grad():
        expected = model(images) * mask[:, None]
    assert output.shape == (2, 4, 6, 7)
    torch.testing.assert_close(torch.as_tensor(output.numpy()), expected)
    torch.testing.assert_close(output[1, :, 2:4].sum(), expected[1, :, 2:4].sum())
    torch.testing.assert_close(output.permute(0, 2, 3, 1), expected.permute(0, 2, 3, 1))
    torch.testing.assert_close(torch.stack([output, output])[1], expected)
    assert F.mse_loss(output, expected).item() < 1e-10


def test_strict_raises_where_features_leave() -> None:
    class Leaving(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.block(F.relu(self.down(self.stem(x))))
            return self.classify(x.roll(1, 3).mean((2, 3)))

    model, images = Leaving().eval(), torch.rand(1, 3, 8, 8)
    for backend in BACKENDS:
        strict = sparsenet.selectify(
            model, "stem", selector=GivenMask(), example_inputs=images, strict=True, backend=backend
        )
        with pytest.raises(RuntimeError, match=r"Tensor\.roll leaves the guided region .*strict=False"):
            run(strict, images)
    loose = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=images)
    assert [step.operation.name for step in sparsenet.plan(loose).exits] == ["Tensor.roll"]
    torch.testing.assert_close(run(loose, images), model(images))


def test_strict_allows_what_stays_inside() -> None:
    model, images = SmallNet().eval(), torch.rand(2, 3, 8, 8)
    strict = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=images, strict=True)
    torch.testing.assert_close(run(strict, images), model(images))


def test_a_selective_model_inside_a_selective_model() -> None:
    """Each has its own selection, and the outer one's boxes still find their images after the inner one has ended."""
    inner = sparsenet.selectify(
        nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Unflatten(1, (3, 8, 8))
        ),
        "0",
        selector=GivenMask(),
        example_inputs=torch.rand(1, 3, 8, 8),
    )
    body = nn.Sequential(inner, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    images = torch.rand(1, 3, 8, 8)
    outer = sparsenet.selectify(body, "1", selector=GivenMask(), example_inputs=images)
    box = [torch.tensor([[2.0, 2, 6, 5]])]
    with sparsenet.record(outer) as rec:
        run(outer, images, box)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 2:6] = True
    assert torch.equal(rec.masks[8, 8], mask)
    plain = images
    for module in (inner[0], inner[1], body[1], body[2]):
        plain = F.conv2d(plain, module.weight, module.bias, padding=1)
    assert error(run(outer, images), plain) < 1e-5
