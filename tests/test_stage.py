"""Where a model can be embedded at."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask
from tests.models import SmallNet, assert_unchanged, snapshot

IMAGES = torch.rand(1, 3, 64, 64)


def build(library: Any, name: str) -> nn.Module:
    if library is timm:
        model: nn.Module = timm.create_model(name)
        return model
    backbone = {"weights_backbone": None} if name in ("ssd300_vgg16", "lraspp_mobilenet_v3_large") else {}
    return torchvision.models.get_model(name, weights=None, **backbone)


STAGES = [
    (torchvision, "resnet18", "stride4", "layer1"),
    (torchvision, "resnet18", "pool1", "maxpool"),
    (torchvision, "vgg11", "stride4", "features.9"),
    (torchvision, "vgg11", "pool3", "features.10"),
    (torchvision, "mobilenet_v2", "stride8", "features.6"),
    (torchvision, "convnext_tiny", "stride4", "features.2.0"),
    (torchvision, "lraspp_mobilenet_v3_large", "stride4", "backbone.3"),
    (torchvision, "ssd300_vgg16", "stride8", "backbone.features"),  # conv4_3: the wrapper reads the image, not this map
    (torchvision, "ssd300_vgg16", "pool3", "backbone.features.16"),
    (torchvision, "maxvit_t", "stride4", "blocks.0"),  # windows of attention are no maps
    (timm, "efficientnet_b0", "stride8", "blocks.2"),
    (
        timm,
        "hrnet_w18_small",
        "stride4",
        "layer1",
    ),  # transition1.0 comes later, but the coarser branch starts before it
    (timm, "test_mambaout", "stride4", "stem.conv2"),  # what comes after is channels-last between blocks
    (timm, "test_convnext", "stages_1", "stages.1"),
]


@pytest.mark.parametrize(("library", "name", "at", "path"), STAGES, ids=lambda part: getattr(part, "__name__", part))
def test_names_resolve(library: Any, name: str, at: str, path: str) -> None:
    model = build(library, name)
    found = {stage_name: stage for stage in sparsenet.stages(model) for stage_name in stage.names}
    assert found[at].path == path
    assert sparsenet.plan(sparsenet.selectify(model, at, selector=GivenMask(), inplace=True)).stage == path


def test_sizes_and_shares_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    before = snapshot(model)
    found = sparsenet.stages(model, example_inputs=IMAGES)
    assert_unchanged(model, before)
    first, last = 32 * 32 * 27 * 4, 16 * 16 * 36 * 8
    assert [(s.names, s.path, s.size, s.channels, s.stride) for s in found] == [
        (("stride2",), "0", (32, 32), 4, 2),
        (("pool1",), "1", (16, 16), 4, 4),
        (("stride4",), "2", (16, 16), 8, 4),
    ]
    share = last / (first + last)
    assert [s.share_after for s in found] == [pytest.approx(expected) for expected in (share, share, 0)]


def test_it_prints_as_a_table() -> None:
    lines = str(sparsenet.stages(torchvision.models.resnet18(weights=None), example_inputs=IMAGES)).splitlines()
    assert lines[0].split() == ["stage", "module", "size", "stride", "channels", "MACs", "after"]
    assert "stride4   layer1   16x16  4       64        68.1%" in lines


def test_a_shortcut_is_not_cut_open() -> None:
    """A block that goes coarser reads its input twice: the stage is before it, not at the layer inside."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
            self.shortcut = nn.Conv2d(4, 4, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) + self.shortcut(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Block(), Block())
    found = {name: stage.path for stage in sparsenet.stages(model, example_inputs=IMAGES) for name in stage.names}
    assert found == {"stride2": "0", "stride4": "1", "stride8": "2"}


def test_a_head_that_runs_on_every_level_is_no_stage() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.head = nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.fine(x)
            return [self.head(level) for level in (fine, self.coarse(fine))]

    found = {name: stage.path for stage in sparsenet.stages(Pyramid(), example_inputs=IMAGES) for name in stage.names}
    assert found == {"stride2": "fine", "stride4": "coarse"}


def test_inputs_that_cannot_be_guessed() -> None:
    with pytest.raises(ValueError, match=r"give example_inputs=torch\.rand"):
        sparsenet.stages(SmallNet())
