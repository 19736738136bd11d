"""Distillation of saliency: a teacher's importance of pixels, and the target that is made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet.train import Distilled, importance, supervise
from tests.models import SmallNet, assert_same


def test_importance_by_hand() -> None:
    """The first-order change of the loss when a pixel is zeroed: all of it, in a linear network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)).double()
    weights = torch.randn(2, 2, 6, 7).double()
    images = torch.rand(2, 3, 6, 7).double()
    found = importance(net, "0", lambda: (net(images) * weights).sum())
    x = net[0](images).detach()
    whole = (net[1](x) * weights).sum((1, 2, 3))
    for y in range(6):
        for column in range(7):
            without = x.clone()
            without[:, :, y, column] = 0
            change = (whole - (net[1](without) * weights).sum((1, 2, 3))).abs()
            assert_same(found[:, y, column], change, rounds=1e5)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net[0]._forward_hooks


def test_importance_behind_an_operation_in_place_and_where_gradients_are_off() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 1, 1))
    images = torch.rand(1, 3, 5, 5)
    with torch.no_grad():
        found = importance(net, "0", lambda: net(images).square().sum())
    assert found.shape == (1, 5, 5) and found.any() and not found.requires_grad


def test_importance_that_cannot_be() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1))
    with pytest.raises(ValueError, match="no module 'layer9'"):
        importance(net, "layer9", lambda: net(torch.rand(1, 3, 5, 5)).sum())
    with pytest.raises(RuntimeError, match="ran 0 times"):
        importance(net, "0", lambda: torch.zeros(()))
    with pytest.raises(RuntimeError, match="does not depend"):
        importance(net, "0", lambda: _detached(net))


def _detached(net: nn.Module) -> Tensor:
    return net(torch.rand(1, 3, 5, 5)).sum().detach() + torch.zeros((), requires_grad=True)


def test_the_target_selects_the_share_asked_for_in_each_image() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 3, 16, 20)
    model = sparsenet.selectify(SmallNet(), "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=images).train()
    matters = torch.rand(3, 16, 20) ** 4 * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    with supervise(model, Distilled(density=0.25), importance=matters) as supervision:
        model(images)
    wanted = supervision.wanted  # type: ignore[attr-defined]
    assert (wanted > 0.5).double().mean((1, 2)).tolist() == pytest.approx([0.25] * 3, abs=1 / 320)
    levels, _ = supervision.passes[0]
    assert [tuple(logits.shape[2:]) for logits in levels.octaves] == [(16, 20), (8, 10)]
    coarse = F.max_pool2d(wanted[:, None], 2)[:, 0]
    total = sum(
        F.binary_cross_entropy(logits[:, 0].sigmoid().double(), target.double(), reduction="sum")
        for logits, target in zip(levels.octaves, (wanted, coarse), strict=True)
    )
    assert supervision.loss().item() == pytest.approx(total.item() / (3 * (320 + 80)), rel=1e-5)


def test_an_image_in_which_nothing_matters() -> None:
    images = torch.rand(1, 3, 16, 20)
    model = sparsenet.selectify(SmallNet(), "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=images).train()
    with supervise(model, Distilled(), importance=torch.zeros(1, 16, 20)) as supervision:
        model(images)
    assert not supervision.wanted.any() and supervision.loss().isfinite()  # type: ignore[attr-defined]


def test_a_student_learns_what_matters() -> None:
    """A teacher that looks at bright pixels only: after some steps the student selects these."""
    torch.manual_seed(0)
    teacher = SmallNet()
    with torch.no_grad():
        teacher.stem[0].weight.fill_(0.2)
        teacher.stem[0].bias.fill_(-3.0)  # only the bright square passes the ReLU
    model = sparsenet.selectify(teacher, "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=torch.rand(1, 3, 16, 20))
    images = torch.rand(8, 3, 16, 20) * 0.1
    images[:, :, 4:10, 5:12] = 1.0
    matters = importance(teacher.eval(), sparsenet.plan(model).stage, lambda: teacher(images).square().sum())
    optimizer = torch.optim.Adam(model.selector.parameters(), lr=0.1)
    for _ in range(100):
        with supervise(model, Distilled(density=0.15), importance=matters) as supervision:
            model.train()(images)
        optimizer.zero_grad()
        supervision.loss().backward()
        optimizer.step()
    with torch.no_grad(), sparsenet.record(model.eval()) as rec:
        model(images)
    chosen = rec.masks[16, 20]
    assert chosen[:, 5:9, 6:11].double().mean() > 0.9 and chosen[:, :, 14:].double().mean() < 0.1
