"""Indirect supervision: where the mask takes gradient, and how much, against a masked network written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from detectors.ssd import ssd300_vgg16_bn
from sparsenet.train import Direct, Distilled, Indirect, supervise
from tests.models import Logits, SmallNet, assert_same, small_ssd

SIZE = (9, 11)
LAYERS = ("a", "b", "c")


class Chain(nn.Module):
    """A stem (the stage) and three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(torch.tanh(self.a(self.stem(x))))))


def learner(logits: Tensor) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    images = torch.rand(len(logits), 3, *SIZE, dtype=torch.float64)
    model = sparsenet.selectify(Chain().double(), "stem", selector=Logits(logits.clone()), example_inputs=images)
    return model.train(), images


def plain(model: nn.Module) -> Chain:
    """The network of a learner, not selective."""
    twin = Chain().double()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if "selector" not in name})
    return twin


def logits_of(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    st.sets(st.sampled_from(LAYERS)),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([-9.0, 0.0, 9.0]),
    st.sampled_from([None, [0.0, -3.0, -1e4, 2.0]]),
)
@settings(max_examples=40)
def test_gradient_reaches_the_mask_through_the_named_layers_only(
    layers: set[str], soft: bool, seed: int, shift: float, fill: list[float] | None
) -> None:
    """The last layer is a head, with what it says of an ignored pixel or without; it says no less than -10."""
    logits = logits_of(seed) + shift  # about half of the pixels, none, or all
    model, images = learner(logits)
    model.c.fill = None if fill is None else torch.tensor(fill)
    with supervise(model, Indirect(sorted(layers), soft=soft)) as supervision:
        output = model(images)
    (output.square().sum() + supervision.loss()).backward()

    twin, by_hand = plain(model), logits.clone().requires_grad_()
    p = by_hand.sigmoid()
    gate = p if soft else (logits > 0).to(p) + (p - p.detach())

    def read(x: Tensor, layer: str) -> Tensor:
        return x * (gate if layer in layers else gate.detach())

    x = read(torch.tanh(twin.a(twin.stem(images))), "a")
    x = read(F.relu(twin.b(x)), "b")
    expected = read(twin.c(x), "c")
    if fill is not None:
        beyond = 1 - (gate if "c" in layers else gate.detach())
        expected = expected + torch.tensor(fill).double().clamp(min=-10)[:, None, None] * beyond
    (expected.square().sum() + 0 * by_hand.sum()).backward()
    assert_same(output, expected)
    assert_same(model.selector.module.logits.grad, by_hand.grad)
    for (name, found), wanted in zip(list(model.named_parameters()), twin.parameters(), strict=False):
        assert_same(found.grad, wanted.grad), name
    assert bool(model.selector.module.logits.grad.any()) == bool(layers) or shift == -9


def test_in_no_block_and_through_all_layers_are_the_same() -> None:
    found = []
    for inside in (False, True):
        model, images = learner(logits_of(0))
        if inside:
            with supervise(model, Indirect("all")):
                model(images).square().sum().backward()
        else:
            model(images).square().sum().backward()
        found.append(model.selector.module.logits.grad)
    assert torch.equal(*found)


def test_the_layers_next_to_the_heads_of_ssd300() -> None:
    """Those of the paper's indirect supervision, and the heads."""
    model: Any = sparsenet.selectify(ssd300_vgg16_bn(3, width=0.125), "pool2", selector=nn.Conv2d(16, 1, 1))
    heads = {f"head.{kind}_head.module_list.{k}" for kind in ("classification", "regression") for k in range(6)}
    trunk = {"backbone.trunk.0.conv4_3", "backbone.trunk.1.fc7"}
    extras = {f"backbone.extras.{k - 6}.conv{k}_2" for k in (6, 7, 8, 9)}
    assert model.selector.near_heads == heads | trunk | extras
    assert Indirect().gating(model).layers == heads | trunk | extras
    with pytest.raises(ValueError, match=r"no guided convolutions: backbone\.trunk\.0\.conv1_1; guided are"):
        Indirect(["backbone.trunk.0.conv1_1"]).gating(model)


def targets() -> list[dict[str, Tensor]]:
    return [{"boxes": torch.tensor([[30.0, 40, 130, 160]]), "labels": torch.tensor([1])}]


@pytest.mark.parametrize("soft", [False, True])
def test_a_detectors_mask_learns_next_to_its_heads(soft: bool) -> None:
    """Every parameter of the selector, and ignored pixels deep inside an ignored area: they can return."""
    torch.manual_seed(0)
    closed = nn.Conv2d(8, 1, 1)
    nn.init.zeros_(closed.weight)
    nn.init.constant_(closed.bias, -2.0)
    model: Any = sparsenet.selectify(small_ssd(), "pool2", selector=closed).train()
    probabilities = []
    enter = model.selector._levels

    def watch(features: Tensor) -> Any:
        levels = enter(features)
        for logits in levels.octaves:
            logits.retain_grad()
        probabilities.append(levels.octaves)
        return levels

    model.selector._levels = watch
    with sparsenet.record(model) as rec, supervise(model, Indirect(soft=soft)) as supervision:
        losses = model([torch.rand(3, 300, 300)], targets())
    assert rec.density[38, 38] == 0
    assert all(torch.isfinite(loss) and loss < 100 for loss in losses.values())  # nothing is certain of the background
    (sum(losses.values()) + supervision.loss()).backward()
    for name, parameter in model.selector.named_parameters():
        assert parameter.grad is not None, name
    for logits in probabilities[0][1:4]:
        assert (logits.grad != 0).double().mean() > 0.9, tuple(logits.shape)


def test_gumbel_draws_masks_with_their_probabilities() -> None:
    logits = torch.linspace(-3, 3, SIZE[1]).double().expand(400, 1, *SIZE).contiguous()
    model, images = learner(logits)
    with sparsenet.record(model) as rec, supervise(model, Indirect("all", gumbel=0.5)):
        model(images)
    share = rec.masks[SIZE].double().mean((0, 1))
    deviation = (share * (1 - share) / (400 * SIZE[0])).sqrt()
    assert ((share - logits[0, 0, 0].sigmoid()).abs() < 5 * deviation).all()
    model.eval()
    with sparsenet.record(model) as rec, supervise(model, Indirect("all", gumbel=0.5)):
        model(images)
    assert torch.equal(rec.masks[SIZE], logits[:, 0] > 0)  # inference draws nothing


def test_gumbel_takes_the_gradient_of_the_relaxed_sample() -> None:
    logits = logits_of(3)
    model, images = learner(logits)
    torch.manual_seed(5)
    with sparsenet.record(model) as rec, supervise(model, Indirect("all", gumbel=0.7)):
        output = model(images)
    output.square().sum().backward()
    torch.manual_seed(5)
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
    by_hand = logits.clone().requires_grad_()
    noisy = by_hand + noise.clamp(1e-6, 1 - 1e-6).logit().double()
    relaxed = (noisy / 0.7).sigmoid()
    gate = (noisy > 0).double() + relaxed - relaxed.detach()
    twin = plain(model)
    x = F.relu(twin.b(torch.tanh(twin.a(twin.stem(images))) * gate))
    expected = twin.c(x * gate) * gate
    assert_same(output, expected)
    assert torch.equal(rec.masks[SIZE], noisy[:, 0] > 0)
    (grad,) = torch.autograd.grad(expected.square().sum(), by_hand)
    assert_same(model.selector.module.logits.grad, grad)


def test_a_mask_that_is_supervised_directly_takes_no_gradient_from_the_task() -> None:
    model, images = learner(logits_of(0))
    for how in (Direct(), Distilled()):
        with supervise(model, how, [torch.zeros(0, 4)] * 2, importance=torch.rand(2, *SIZE)) as supervision:
            output = model(images)
        output.sum().backward()
        assert model.selector.module.logits.grad is None
        supervision.loss().backward()
        assert model.selector.module.logits.grad.all()
        model.selector.module.logits.grad = None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Indirect("trunk"), "layers must be 'heads', 'all'"),
        (lambda: Indirect(gumbel=0.0), "temperature, above 0, not 0.0"),
        (lambda: Distilled(density=1.0), "between 0 and 1, not 1.0"),
        (lambda: Direct(positive_weight=-1.0), "positive_weight must be > 0"),
    ],
)
def test_settings_check_themselves(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_what_a_supervision_needs() -> None:
    model, images = learner(logits_of(0))
    with pytest.raises(ValueError, match="needs boxes"), supervise(model, Direct()):
        pass
    with pytest.raises(ValueError, match="needs importance="), supervise(model, Distilled()):
        pass
    with pytest.raises(TypeError, match=r"is Direct\(...\), Indirect"), supervise(model, "direct"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="no selective model"), supervise(SmallNet(), Indirect()):
        pass
    with pytest.raises(ValueError, match="for 3 images, but the batch has 2"):
        with supervise(model, Distilled(), importance=torch.rand(3, *SIZE)):
            model(images)
