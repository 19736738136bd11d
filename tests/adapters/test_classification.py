"""timm's and torchvision's networks that take a batch of images: their input sizes and names of stages."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torchvision
from torch import nn

import sparsenet
from sparsenet import GivenMask, adapters


@pytest.mark.parametrize(
    ("make", "family", "size"),
    [
        (lambda: torchvision.models.resnet18(weights=None), "TorchvisionClassification", 224),
        (lambda: torchvision.models.inception_v3(weights=None, init_weights=False), "TorchvisionClassification", 299),
        (lambda: torchvision.models.VisionTransformer(64, 32, 1, 1, 8, 8), "TorchvisionClassification", 64),
        (lambda: timm.create_model("resnet10t"), "Timm", 176),
    ],
    ids=["resnet18", "inception_v3", "vit", "timm"],
)
def test_example_inputs(make: Any, family: str, size: int) -> None:
    model = make()
    for kind in (type(model), type("Mine", (type(model),), {})):  # a subclass that is defined elsewhere
        model.__class__ = kind
        adapter = adapters.find(model)
        assert type(adapter).__name__ == family
        assert adapter.example_inputs(model).shape == (1, 3, size, size)


def test_models_of_no_known_family() -> None:
    for model in (nn.Conv2d(3, 3, 1), torchvision.models.video.r3d_18(weights=None)):
        adapter = adapters.find(model)
        assert type(adapter) is adapters.Adapter
        assert adapter.example_inputs(model) is None


@pytest.mark.parametrize(
    ("name", "options", "aliases"),
    [
        ("resnet10t", {}, {"act1": "act1", "layer2": "layer2"}),
        ("convnext_atto", {}, {"stages.1": "stages.1", "stages_1": "stages.1"}),
        ("convnext_atto", {"features_only": True}, {"stages.1": "stages_1", "stages_1": "stages_1"}),
        ("mobilenetv3_small_050", {}, {"blocks.1": "blocks.1", "blocks_1": "blocks.1"}),
        ("mobilenetv3_small_050", {"features_only": True}, {}),
    ],
)
def test_timms_stages(name: str, options: Any, aliases: dict[str, str]) -> None:
    model = timm.create_model(name, **options)
    found = adapters.find(model).aliases(model)
    assert aliases.items() <= found.items()
    modules = dict(model.named_modules())
    assert all(path in modules and path for path in found.values())


def test_a_stage_by_timms_name() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=2)
    assert sparsenet.plan(sparsenet.selectify(model, "blocks_1", selector=GivenMask())).stage == "blocks.1"
