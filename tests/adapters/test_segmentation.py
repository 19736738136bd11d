"""torchvision's segmentation networks: an ignored pixel is background."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

import sparsenet
from sparsenet import GivenMask, SelectiveModule, adapters
from tests.adapters.detectors import small_body
from tests.models import assert_same, assert_unchanged, blobs, error, snapshot, with_lively_norms

AT = "backbone.layer1"
SIZE = (96, 80)


def fcn() -> FCN:
    body = IntermediateLayerGetter(small_body(), {"layer3": "aux", "layer4": "out"})
    return FCN(body, FCNHead(20, 5), FCNHead(16, 5))


def deeplab() -> DeepLabV3:
    return DeepLabV3(IntermediateLayerGetter(small_body(), {"layer4": "out"}), DeepLabHead(20, 5, (1, 2, 3)))


def lraspp() -> LRASPP:
    return LRASPP(IntermediateLayerGetter(small_body(), {"layer2": "low", "layer4": "high"}), 12, 20, 5, 16)


FAMILIES = {"fcn": fcn, "deeplab": deeplab, "lraspp": lraspp}


def make(name: str) -> Any:
    """Weights with which the background is the least likely class of a pixel."""
    torch.manual_seed(0)
    model = with_lively_norms(FAMILIES[name]())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.out_channels == 5 and module.bias is not None:
            nn.init.normal_(module.bias)
            module.bias.data[0] = -5
    return model.double()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    original = make(request.param)
    return original, sparsenet.selectify(original, AT, selector=GivenMask())


def run(model: Any, images: Tensor, mask: Tensor, backend: str = "auto") -> dict[str, Tensor]:
    with torch.no_grad(), sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        return model(images)


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_a_full_mask_gives_the_originals_logits(pair: Any, backend: str) -> None:
    original, model = pair
    images = torch.rand(2, 3, *SIZE).double()
    with torch.no_grad():
        expected = original(images)
    found = run(model, images, torch.ones(2, *SIZE, dtype=torch.bool), backend)
    assert found.keys() == expected.keys()
    assert_same(list(found.values()), list(expected.values()), rounds=1e6)


def test_storages_agree(pair: Any) -> None:
    images = torch.rand(2, 3, *SIZE).double()
    found, expected = (run(pair[1], images, blobs(2, SIZE), backend) for backend in ("rows", "reference"))
    assert_same(list(found.values()), list(expected.values()), rounds=1e6)


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_an_ignored_pixel_is_certainly_background(pair: Any, backend: str) -> None:
    """A map that is enlarged has the mask of its new size, here the given one; the original finds no background."""
    original, model = pair
    images, mask = torch.rand(2, 3, *SIZE).double(), blobs(2, SIZE)
    assert 0.1 < mask.float().mean() < 0.9
    with torch.no_grad():
        assert all((logits.argmax(1) != 0).all() for logits in original(images).values())
    for logits in run(model, images, mask, backend).values():
        assert type(logits) is Tensor
        assert (logits.argmax(1)[~mask] == 0).all()
        assert (logits.softmax(1)[:, 0][~mask] == 1).all()
        assert (logits.softmax(1)[:, 0][mask] < 1).all()
        assert (logits.argmax(1)[mask] != 0).double().mean() > 0.9
    for logits in run(model, images, torch.zeros_like(mask), backend).values():
        assert (logits.argmax(1) == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_no_fill_where_the_mask_is_trained_by_its_effect(name: str) -> None:
    """A fill of -10⁴ would be the mask's gradient."""
    torch.manual_seed(0)
    model: Any = sparsenet.selectify(make(name), AT, selector=SelectiveModule(8, 8), inplace=True)
    nn.init.normal_(model.selector.module.logit.weight, std=2.0)
    logits = model.train()(torch.rand(2, 3, *SIZE).double())["out"]
    assert logits.abs().max() < 1e3
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.selector.module.parameters()]
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients[-2:])


@pytest.mark.parametrize("name", FAMILIES)
def test_ignored_pixels_give_no_gradient(name: str) -> None:
    model: Any = sparsenet.selectify(make(name), AT, selector=GivenMask(), inplace=True)
    mask = blobs(2, SIZE)
    with sparsenet.use_mask(mask):
        logits = model.train()(torch.rand(2, 3, *SIZE).double())["out"]
    truth = torch.full((2, *SIZE), 3)
    nn.functional.cross_entropy(logits, truth.masked_fill(mask, -100), ignore_index=-100).backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_densify_leaves_no_trace(name: str) -> None:
    model = make(name)
    before = snapshot(model)
    sparsenet.selectify(model, AT, selector=GivenMask(), inplace=True)
    run(model, torch.rand(2, 3, *SIZE).double(), blobs(2, SIZE))
    assert_unchanged(sparsenet.densify(model), before)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_give_the_same(pair: Any, copied: Any) -> None:
    images = torch.rand(2, 3, *SIZE).double()
    twin = copied(pair[1])
    found, expected = (run(model, images, blobs(2, SIZE)) for model in (twin, pair[1]))
    assert_same(list(found.values()), list(expected.values()), rounds=0)


def test_the_family(pair: Any) -> None:
    original, _ = pair
    adapter = adapters.find(original)
    assert type(adapter) is adapters.torchvision_segmentation.TorchvisionSegmentation
    assert adapter.example_inputs(original).shape == (1, 3, 520, 520)
    mine = copy.copy(original)
    mine.__class__ = type("Mine", (type(original),), {})
    assert type(adapters.find(mine)) is type(adapter)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_torchvisions_models(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3).eval()
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(images)["out"]
    sparsenet.selectify(model, "stride4", selector=GivenMask(), example_inputs=images, inplace=True)
    found = run(model, images, torch.ones(1, 1, 1, dtype=torch.bool))["out"]
    assert error(found, expected) < 1e-4 * expected.abs().max()
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[:, 20:60, 30:50] = True
    logits = run(model, images, mask)["out"]
    assert (logits.softmax(1)[:, 0][~mask] == 1).all() and (logits.softmax(1)[:, 0][mask] < 1).all()
