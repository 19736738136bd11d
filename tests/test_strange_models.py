"""Models in neither library, with no adapter: whatever PyTorch runs, runs, and keeps its mask where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import sparsenet
from sparsenet import GivenMask
from tests.models import assert_same, blobs, tensors, with_lively_norms

BACKENDS = ("reference", "rows", "spconv", "auto")


def conv(inputs: int, outputs: int, stride: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, **options)


class ControlFlow(nn.Module):
    """Python decides by numbers: how often a block runs, and which of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.left, self.right = conv(3, 6, 2), conv(6, 6), conv(6, 6), conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in range(3):
            x = self.again(x).relu()
            if step == 1 and x.shape[-1] > 4:
                break
        x = self.left(x) if x.mean() > -1e9 else self.right(x)
        return x.sum((2, 3))


class Functional(nn.Module):
    """No modules but parameters: every operation is a call of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6, 2)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(6, 6, 3, 3) * 0.1) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for weight in self.weights:
            x = F.gelu(F.conv2d(x, weight, padding=1)) * self.scale[:, None, None] + x
            x = F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)
        return F.interpolate(torch.conv2d(x, self.weights[0]), scale_factor=2, mode="bilinear")


class InPlace(nn.Module):
    """Everything that can be done in place is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body, self.last = conv(3, 6, 2), nn.BatchNorm2d(6), conv(6, 6), conv(6, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.norm(self.body(x)))
        y += x
        y.mul_(0.5).clamp_(-1, 1)
        y[:, :2] *= 2
        y.sigmoid_()
        return F.leaky_relu_(self.last(y))


class Outputs(nn.Module):
    """A dict of maps, a tuple of two numbers, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = conv(3, 6), conv(6, 8, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        fine = self.stem(x)
        coarse = self.down(fine)
        return {"fine": fine, "coarse": [coarse, self.head(coarse)], "pair": (coarse.mean(), 3), "nothing": None}


class Shared(nn.Module):
    """One module at two places and three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 6), nn.Sequential(conv(6, 6), nn.BatchNorm2d(6), nn.SiLU())
        self.same = self.body[0]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body(self.stem(x))
        pooled = F.max_pool2d(self.body(x), 2)
        return [self.same(x), self.body(pooled), self.same(F.avg_pool2d(pooled, 3, 2, 1))]


class SeveralInputs(nn.Module):
    """Two images of one size, a map that was computed elsewhere, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = conv(3, 4, 2), conv(3, 4, 2), conv(12, 5)

    def forward(self, image: Tensor, other: Tensor, extra: Tensor, *, swap: bool = False) -> Tensor:
        left, right = self.left(image), self.right(other)
        return self.join(torch.cat([right, left, extra] if swap else [left, right, extra], 1)).amax((2, 3))


class Twice(nn.Module):
    """A backbone called for two images: each call selects for itself, and what meets leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 6, 2), conv(6, 6), conv(6, 3)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        first, second = (self.body(self.stem(x)).relu() for x in (image, other))
        return self.head(first - second)


class Scales(nn.Module):
    """A backbone called for the image at two scales, whose results meet at the coarser size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 6), conv(6, 6), conv(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.body(self.stem(F.interpolate(x, scale_factor=scale))) for scale in (1.0, 0.5)]
        return self.head(F.max_pool2d(found[0], 2) + found[1])


class Decoder(nn.Module):
    """A U-Net: the way down from before the stage, lateral connections from the trunk, the way up by three means."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.mid, self.low = conv(3, 4), conv(4, 6, 2), conv(6, 8, 2)
        self.up, self.merge = nn.ConvTranspose2d(8, 6, 2, 2), conv(12, 6)
        self.last = conv(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        mid = self.mid(fine).relu()
        low = self.low(mid).relu()
        x = self.merge(torch.cat([self.up(low), mid], 1)).relu()
        x = F.interpolate(x, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.last(torch.cat([x, fine], 1))


class Attention(nn.Module):
    """Attention in space and over channels, by hand, and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.gate = conv(3, 8, 2), nn.Conv2d(8, 24, 1), nn.Conv2d(2, 1, 7, padding=3)
        self.squeeze, self.last = nn.Linear(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        x = x * self.squeeze(x.mean((2, 3)))[:, :, None, None].sigmoid()
        query, key, value = self.qkv(x).flatten(2).chunk(3, 1)
        x = x + (value @ (query.mT @ key).softmax(1)).view_as(x)
        return self.last(x)


ONE: tuple[tuple[int, ...], ...] = ((2, 3, 12, 16),)
# name: the model, its stage, the shapes of its inputs, whether all convolutions after it are guided, and what leaves
MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[tuple[int, ...], ...], bool, set[str]]] = {
    "control flow": (ControlFlow, "stem", ONE, True, set()),
    "functional": (Functional, "stem", ONE, True, set()),
    "in place": (InPlace, "stem", ONE, True, set()),
    "outputs": (Outputs, "stem", ONE, True, set()),
    "shared": (Shared, "stem", ONE, True, set()),
    "several inputs": (SeveralInputs, "left", (*ONE, *ONE, (2, 4, 6, 8)), True, set()),
    "twice": (Twice, "stem", (*ONE, *ONE), False, {"Tensor.sub"}),
    "scales": (Scales, "stem", ONE, False, {"Tensor.add"}),
    "decoder": (Decoder, "low", ONE, True, set()),
    "decoder from the middle": (Decoder, "mid", ONE, True, set()),
    "attention": (Attention, "stem", ONE, True, {"Tensor.flatten"}),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    make, at, shapes, _, _ = MODELS[request.param]
    torch.manual_seed(0)
    model = with_lively_norms(make()).double()
    inputs = tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return model, sparsenet.selectify(model, at, selector=GivenMask(), example_inputs=inputs), inputs


def run(model: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor, backend: str) -> Any:
    with torch.no_grad(), sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        return model(*inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_active_is_the_original(case: tuple[nn.Module, nn.Module, tuple[Tensor, ...]], backend: str) -> None:
    model, selective, inputs = case
    with torch.no_grad():
        expected = model(*inputs)
    found = run(selective, inputs, torch.ones(2, 1, 1, dtype=torch.bool), backend)
    assert_same(found, expected)
    assert tree_map_only(Tensor, type, found) == tree_map_only(Tensor, type, expected)


def test_backends_agree_under_a_mask(case: tuple[nn.Module, nn.Module, tuple[Tensor, ...]]) -> None:
    _, selective, inputs = case
    mask = blobs(2, (12, 16))
    reference, rows, spconv, auto = (run(selective, inputs, mask, backend) for backend in BACKENDS)
    for found in (rows, spconv, auto):
        assert_same(found, reference)
    whole = run(selective, inputs, torch.ones_like(mask), "reference")
    assert any(not torch.equal(a, b) for a, b in zip(tensors(reference), tensors(whole), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_what_stays_guided(name: str) -> None:
    make, at, shapes, whole, leaving = MODELS[name]
    inputs = tuple(torch.randn(*shape) for shape in shapes)
    plan = sparsenet.plan(sparsenet.selectify(make().eval(), at, selector=GivenMask(), example_inputs=inputs))
    assert (plan.guided_conv_share == 1) == whole, str(plan)
    assert {step.operation.name for step in plan.exits} == leaving, str(plan)


def test_each_image_of_a_backbone_called_twice_has_its_own_pass() -> None:
    model = Twice().double().eval()
    inputs = tuple(torch.randn(2, 3, 12, 16, dtype=torch.float64) for _ in range(2))
    selective = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=inputs)
    mask = blobs(2, (6, 8))
    with torch.no_grad():
        kept = [torch.where(mask[:, None], model.body(model.stem(x)), 0).relu() for x in inputs]
        assert_same(run(selective, inputs, mask, "rows"), model.head(kept[0] - kept[1]))
    (reason,) = {step.operation.reason for step in sparsenet.plan(selective).exits}
    assert reason == "meets features of another selection"


def test_a_decoder_by_hand() -> None:
    """Lateral connections bring the dense trunk back in: what meets guided features of its size is masked."""
    model = Decoder().double().eval()
    image, mask = torch.randn(2, 3, 12, 16, dtype=torch.float64), blobs(2, (3, 4))
    selective = sparsenet.selectify(model, "low", selector=GivenMask(), example_inputs=image)

    def at(size: tuple[int, int]) -> Tensor:
        return F.interpolate(mask[:, None].double(), size, mode="nearest")

    with torch.no_grad():
        fine = model.fine(image).relu()
        mid = model.mid(fine).relu()
        up = model.up(model.low(mid).relu()) * at((6, 8))  # the first guided operation reads every pixel
        x = model.merge(torch.cat([up, mid * at((6, 8))], 1)).relu() * at((6, 8))
        x = F.interpolate(x, size=(12, 16), mode="bilinear") * at((12, 16))
        expected = model.last(torch.cat([x, fine * at((12, 16))], 1)) * at((12, 16))
    for backend in BACKENDS:
        assert_same(run(selective, (image,), mask, backend), expected)
