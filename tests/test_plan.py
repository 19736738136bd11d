"""What surgery tells of a model before it runs."""

from __future__ import annotations

import pickle
from contextlib import suppress

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask
from tests.models import SmallNet, small_ssd

IMAGES = torch.rand(2, 3, 16, 20)


class Mixed(SmallNet):
    """Guided convolutions, a reduction, an operation without a rule, and a convolution after it."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.down(self.stem(x))))
        x = x * x.mean((2, 3), keepdim=True).sigmoid()
        return self.tail(x.roll(1, 2)).mean((2, 3))


def plan_of(model: nn.Module, at: str = "stem", **options: object) -> sparsenet.Plan:
    return sparsenet.plan(sparsenet.selectify(model, at, selector=GivenMask(), **options))


def test_shares_by_hand() -> None:
    plan = plan_of(Mixed(), example_inputs=IMAGES)
    stem, guided = 2 * 16 * 20 * 3 * 6 * 9, 2 * 8 * 10 * (6 * 12 * 9 + 12 * 12 * 9)
    tail = 2 * 6 * 8 * 12 * 4 * 9
    assert plan.total_macs == stem + guided + tail
    assert plan.downstream_macs == guided + tail
    assert plan.guided_macs == guided
    assert plan.guided_share == guided / (guided + tail)


def test_steps_in_order() -> None:
    plan = plan_of(Mixed(), example_inputs=IMAGES)
    assert (plan.at, plan.stage, plan.size, plan.channels) == ("stem", "stem", (16, 20), 6)
    assert plan.sizes == ((16, 20), (8, 10))
    assert [(step.path, step.operation.name, step.operation.status) for step in plan.steps] == [
        ("down", "conv2d", "guided"),
        ("block.0", "conv2d", "guided"),
        ("", "Tensor.mean", "reduction"),
        ("", "Tensor.roll", "exit"),
    ]
    [left] = plan.exits
    assert (left.operation.name, left.operation.size) == ("Tensor.roll", (8, 10))
    assert left.operation.reason == "moves pixels to other places"


@pytest.mark.parametrize(
    ("operation", "name", "reason"),
    [
        (lambda x: x.flip(3), "Tensor.flip", "moves pixels to other places"),
        (lambda x: torch.cat([x, x], 0), "torch.cat", "concatenates over another dimension than channels"),
        (lambda x: torch.cat([x, torch.ones(2, 1, 4, 4)], 1), "torch.cat", "meets a tensor of another size"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "F.max_pool2d_with_indices", "no rule"),
        (lambda x: F.normalize(x, dim=2), "F.normalize", "works over another dimension than channels"),
        (lambda x: x @ x.mT, "Tensor.mT", "no rule for this operation"),
        (lambda x: x[:, :, 0], "Tensor.__getitem__", "takes one image or one line of pixels"),
        (lambda x: x[:1], "Tensor.__getitem__", "takes some of the images"),
        (lambda x: x.softmax(3), "Tensor.softmax", "works over another dimension than channels"),
        (lambda x: x.flatten(2), "Tensor.flatten", "merges or splits pixels"),
        (lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), 2), "F.max_pool2d", "reads a map laid out as NHWC"),
        (lambda x: F.relu(F.pad(x, (1, 1))), "F.relu", "reads a padded map"),
    ],
)
def test_exits_say_what_left_and_why(operation: object, name: str, reason: str) -> None:
    class Leaving(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            with suppress(RuntimeError):  # sizes that do not fit: the original would fail too
                operation(F.relu(self.down(self.stem(x))))
            return super().forward(x)

    plan = plan_of(Leaving(), example_inputs=IMAGES)
    assert (plan.exits[0].operation.name, plan.exits[0].operation.size) == (name, (8, 10))
    assert reason in plan.exits[0].operation.reason
    assert name in str(plan) and reason in str(plan)


def test_layers_that_a_backend_falls_back_for_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    plan = plan_of(model, "0", example_inputs=IMAGES, backend="spconv")
    found = {step.path: (step.operation.backend, step.operation.reason or "") for step in plan.steps}
    assert found["1"] == ("spconv", "")
    assert found["2"][0] == found["3"][0] == "rows"
    assert "spconv has no grouped convolution" in found["2"][1] and "1x1" in found["3"][1]
    assert str(plan).count("spconv: ") == 2
    assert "spconv" not in str(plan_of(model, "0", example_inputs=IMAGES))


def test_it_prints_as_a_table() -> None:
    lines = str(plan_of(Mixed(), example_inputs=IMAGES)).splitlines()
    assert lines[0] == ("stage 'stem' = stem, 6 channels at 16x20; 2 guided operations, 1 reductions, 1 exits")
    assert lines[1].split() == ["module", "operation", "size", "status", "MMACs", "reason"]
    assert [line.split() for line in lines[2:-1]] == [
        ["down", "conv2d", "8x10", "guided", "0.1"],
        ["block.0", "conv2d", "8x10", "guided", "0.2"],
        ["Tensor.mean", "8x10", "reduction"],
        ["Tensor.roll", "8x10", "exit", "moves", "pixels", "to", "other", "places"],
    ]
    starts = {
        line.index(word)
        for line, word in zip(lines[1:-1], ("status", "guided", "guided", "reduction", "exit"), strict=False)
    }
    assert len(starts) == 1  # columns stand under their heads
    assert all(line == line.rstrip() for line in lines)
    assert lines[-1] == (
        "guided: 0.3 of 0.4 MMACs after the stage (88.2%), 88.2% of its convolutions' 0.4; "
        "the network has 0.5 on the example input"
    )


def test_poolings_and_strides_resolve_to_module_paths() -> None:
    model = torchvision.models.resnet18(weights=None, num_classes=2)
    images = torch.rand(1, 3, 64, 64)
    for at, stage, size in (
        ("pool1", "maxpool", (16, 16)),
        ("stride2", "relu", (32, 32)),
        ("stride4", "layer1", (16, 16)),
        ("stride8", "layer2", (8, 8)),
        ("layer3.0", "layer3.0", (4, 4)),
    ):
        plan = plan_of(model, at, example_inputs=images)
        assert (plan.at, plan.stage, plan.size) == (at, stage, size)


def test_ssd_by_name() -> None:
    plan = plan_of(small_ssd(), "pool3")
    assert (plan.stage, plan.size) == ("backbone.trunk.2.2", (38, 38))
    assert plan.sizes == ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))
    assert plan.guided_share == 1
    heads = [step for step in plan.steps if step.path.startswith("head.") and step.operation.status == "guided"]
    assert len(heads) == 12
    assert {step.path for step in plan.exits} == {"head.regression_head", "head.classification_head"}


def test_the_example_decides_sizes_not_results() -> None:
    """Another input size works; the plan is of the example."""
    model = SmallNet().eval()
    selective = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=IMAGES[:1])
    larger = torch.rand(3, 3, 40, 24)
    with sparsenet.use_mask(torch.ones(3, 4, 4, dtype=torch.bool)):
        torch.testing.assert_close(selective(larger), model(larger))
    assert sparsenet.plan(selective).size == (16, 20)
    assert sparsenet.plan(selective).total_macs * 2 == plan_of(model, example_inputs=IMAGES).total_macs


def test_a_plan_is_a_value() -> None:
    plan = plan_of(Mixed(), example_inputs=IMAGES)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan == plan_of(Mixed(), example_inputs=IMAGES)
    with pytest.raises(AttributeError):
        plan.total_macs = 0
