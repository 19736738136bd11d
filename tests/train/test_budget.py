"""A budget is met whatever the task pulls, and counts what a record counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsenet
from sparsenet.train import Budget, Indirect, supervise
from tests.models import SmallNet, small_ssd


def bright_spots(batch: int) -> tuple[Tensor, Tensor]:
    """Dark noise with a bright square each, whose mean colour is to be told."""
    images = 0.1 * torch.rand(batch, 3, 24, 24)
    colours = torch.rand(batch, 3) + 0.5
    for image, colour in zip(images, colours, strict=True):
        y, x = torch.randint(0, 16, (2,)).tolist()
        image[:, y : y + 8, x : x + 8] += colour[:, None, None]
    return images, colours


@pytest.mark.parametrize(
    ("target", "gumbel"), [({"density": 0.3}, 1.0), ({"density": 0.6}, None), ({"macs": 0.65}, 1.0)]
)
def test_the_target_is_reached(target: dict[str, float], gumbel: float | None) -> None:
    """Within ±0.02 on images not trained on, as inference has the masks."""
    torch.manual_seed(0)
    net = SmallNet(width=8, classes=3)
    selector, example = nn.Conv2d(8, 1, 5, padding=2), bright_spots(2)[0]
    model = sparsenet.selectify(net, "stem", selector=selector, example_inputs=example).train()
    budget = Budget(model, **target)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        images, colours = bright_spots(16)
        with supervise(model, Indirect(gumbel=gumbel), budget=budget) as supervision:
            loss = (model(images) - colours).square().mean()
        optimizer.zero_grad()
        (loss + supervision.loss()).backward()
        optimizer.step()
        rate.step()
    model.eval()
    with torch.no_grad(), sparsenet.record(model) as rec:
        model(bright_spots(200)[0])
    found = rec.density[24, 24] if "density" in target else rec.macs / rec.dense_macs
    assert found == pytest.approx(next(iter(target.values())), abs=0.02)


@pytest.mark.parametrize("side", [300, 320])
def test_the_cost_is_what_a_record_counts(side: int) -> None:
    """Exactly on inputs of the dry run's size, nearly on others."""
    torch.manual_seed(0)
    chooser = nn.Conv2d(8, 1, 3, padding=1)
    chooser.weight.data -= chooser.weight.mean((2, 3), keepdim=True).detach()  # of edges: about half are on
    nn.init.zeros_(chooser.bias)
    body = small_ssd().backbone
    model = sparsenet.selectify(body, "trunk.1", selector=chooser, example_inputs=torch.rand(1, 3, 300, 300)).train()
    budget = Budget(model, macs=1.0)
    with sparsenet.record(model) as rec, supervise(model, Indirect(), budget=budget) as supervision:
        model(torch.rand(3, 3, side, side))
    levels, _ = supervision.passes[0]
    assert 0.1 < rec.density[max(rec.density)] < 0.9
    exact = budget.cost(levels).item()
    assert exact == pytest.approx(rec.macs / rec.dense_macs, rel=1e-6 if side == 300 else 0.02)


@pytest.mark.parametrize("shift", [-0.65, 1.0])
def test_gradient_and_multiplier_by_hand(shift: float) -> None:
    """The penalty is a square, and near the target the multiplier moves by its slope."""
    logits = nn.Parameter(torch.randn(2, 1, 16, 20, generator=torch.Generator().manual_seed(0)) + shift)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, features: Tensor) -> Tensor:
            return self.logits[: len(features)]

    images = torch.rand(2, 3, 16, 20)
    model = sparsenet.selectify(SmallNet(), "stem", selector=Given(), example_inputs=images).train()
    budget = Budget(model, density=0.2, penalty=4.0, rate=0.5)
    budget.multiplier.fill_(1.5)
    with supervise(model, Indirect(), budget=budget) as supervision:
        model(images)
    loss = supervision.loss()
    loss.backward()
    excess = (logits > 0).float().mean().item() - 0.2
    near = abs(excess) < 0.1
    assert near == (shift < 0)
    assert loss.item() == pytest.approx(1.5 * excess + 2 * excess**2, rel=1e-5)
    p = logits.detach().sigmoid()
    wanted = (1.5 + 4 * excess) * p * (1 - p) / p.numel()
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-9)
    assert budget.multiplier.item() == pytest.approx(1.5 + (0.5 * 4 * excess if near else 0), rel=1e-5)
    before = copy.deepcopy(budget.eval().state_dict())
    supervision.loss()
    assert torch.equal(budget.multiplier, before["multiplier"])


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({}, "one target"),
        ({"density": 0.3, "macs": 0.3}, "one target"),
        ({"density": 0.0}, "above 0"),
        ({"macs": 1.5}, "above 0"),
        ({"macs": 0.01}, "out of reach: masks cut nothing of 0"),
    ],
)
def test_targets_that_cannot_be(targets: dict[str, Any], said: str) -> None:
    images = torch.rand(1, 3, 16, 20)
    model = sparsenet.selectify(SmallNet(), "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=images)
    with pytest.raises(ValueError, match=said):
        Budget(model, **targets)
