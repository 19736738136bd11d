"""`selectify(reenter=True)`: hybrids whose attention leaves the map's grid and returns to it, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sparsenet
from sparsenet import GivenMask, backends
from tests.helpers import STORAGES, assert_equal, gradients, keep
from tests.models import at_size, blobs

every_storage = pytest.mark.parametrize("storage", STORAGES)
BACKENDS = ("auto", "reference", *backends.BACKENDS)
C = 6


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1)).softmax(-1) @ value


class ByTokens(nn.Module):
    """Attention of every pixel to all others: flattened, transposed, and back; the residual is among tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.out(attend(*self.qkv(self.norm(tokens)).chunk(3, -1)))
        return tokens.transpose(1, 2).reshape(x.shape)


class ByHeads(nn.Module):
    """The same by PyTorch's fused attention, on heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        query, key, value = self.qkv(x).view(batch, 3, 2, C // 2, height * width).transpose(-2, -1).unbind(1)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.out(found.transpose(-2, -1).reshape(batch, C, height, width))


class ByModule(nn.Module):
    """`nn.MultiheadAttention`, whose forward is one function to PyTorch's dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens)
        return tokens.view(len(x), *x.shape[2:], C).permute(0, 3, 1, 2)


class ByPatches(nn.Module):
    """As MobileViT has it: pixels at one place of all 2x2 patches attend to one another, by reshapes and transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.outer = nn.Conv2d(C, C, 1), nn.Linear(C, 3 * C), nn.Conv2d(C, C, 1)
        self.fuse = nn.Conv2d(2 * C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        down, right = height // 2, width // 2
        y = self.inner(x).reshape(batch * C * down, 2, right, 2).transpose(1, 2)
        y = y.reshape(batch, C, down * right, 4).transpose(1, 3).reshape(batch * 4, down * right, C)
        y = attend(*self.qkv(y).chunk(3, -1))
        y = y.contiguous().view(batch, 4, down * right, C)
        y = y.transpose(1, 3).reshape(batch * C * down, right, 2, 2)
        y = y.transpose(1, 2).reshape(batch, C, height, width)
        return self.fuse(torch.cat([x, self.outer(y)], 1))


class ByWindows(nn.Module):
    """As MaxViT has it, on windows of 2x3 pixels, through channels-last; pixels far apart never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = x.permute(0, 2, 3, 1).view(batch, height // 2, 2, width // 3, 3, C)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, C)
        y = self.out(attend(*self.qkv(y).chunk(3, -1)))
        y = y.view(batch, height // 2, width // 3, 2, 3, C).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(batch, height, width, C).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """What was before the block is added to what left: that alone takes up the sites, with `reenter` or without."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.scale = block, nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) * self.scale


class Hybrid(nn.Module):
    """A stem, convolutions, attention, convolutions to a coarser size, attention there, and what follows."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.before = nn.Conv2d(3, C, 3, 2, 1), nn.Conv2d(C, C, 3, 1, 1)
        self.block, self.coarse_block = blocks
        self.after, self.down = nn.Conv2d(C, C, 3, 1, 1), nn.Conv2d(C, C, 3, 2, 1)
        self.last, self.head = nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), nn.Linear(C, 4)
        self.checkpointed = False

    def attention(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.before(self.stem(x)).relu()
        attended = self.attention(self.block, x)
        fine = self.after(attended).relu()
        coarse = self.attention(self.coarse_block, self.down(fine))
        last = self.last(coarse)
        return {"attended": attended, "fine": fine, "coarse": coarse, "last": last, "out": self.head(last.mean((2, 3)))}


# name: the blocks at either size, and whether all convolutions are guided without `reenter`
HYBRIDS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], bool]] = {
    "tokens": (lambda: (ByTokens(), ByTokens()), False),
    "heads": (lambda: (ByHeads(), ByHeads()), False),
    "module": (lambda: (ByModule(), ByModule()), False),
    "patches": (lambda: (ByPatches(), ByPatches()), False),
    "windows": (lambda: (ByWindows(), ByTokens()), False),
    "residuals": (lambda: (Residual(ByTokens()), Residual(ByWindows())), True),
    "residuals of heads": (lambda: (Residual(ByHeads()), Residual(ByPatches())), False),
    "nothing, and patches": (lambda: (nn.Identity(), ByPatches()), False),
}
SIZE, FINE, COARSE = (16, 24), (8, 12), (4, 6)


def hybrid(name: str) -> tuple[Hybrid, Tensor]:
    torch.manual_seed(0)
    return Hybrid(*HYBRIDS[name][0]()).double().eval(), torch.randn(2, 3, *SIZE, dtype=torch.float64)


def selective_of(model: nn.Module, x: Tensor, at: str = "stem", **options: Any) -> nn.Module:
    return sparsenet.selectify(model, at, selector=GivenMask(), example_inputs=x, **options)


def selected(model: nn.Module, x: Tensor, mask: Tensor, backend: str) -> Any:
    with sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        return model(x)


def assert_all_equal(found: Any, wanted: Any) -> None:
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    for actual, expected in zip(found, wanted, strict=True):
        assert_equal(actual, expected)


def parameters(model: nn.Module, names: list[str]) -> list[Tensor]:
    return [model.get_parameter(name) for name in names]


# -- hybrids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYBRIDS)
def test_storages_agree_and_all_active_is_the_original(name: str) -> None:
    model, x = hybrid(name)
    selective = selective_of(model, x, reenter=True)
    mask = blobs(2, FINE)
    with torch.no_grad():
        reference = selected(selective, x, mask, "reference")
        for backend in BACKENDS:
            assert_all_equal(selected(selective, x, mask, backend), reference)
            assert_all_equal(selected(selective, x, torch.ones_like(mask), backend), model(x))
            nothing = selected(selective, x, torch.zeros_like(mask), backend)
            assert not nothing["fine"].any()
        assert not torch.equal(reference["out"], model(x)["out"])


@pytest.mark.parametrize("name", HYBRIDS)
def test_each_image_is_by_itself(name: str) -> None:
    model, x = hybrid(name)
    selective, mask = selective_of(model, x, reenter=True), blobs(2, FINE)
    with torch.no_grad():
        both = selected(selective, x, mask, "rows")
        alone = [selected(selective, x[i : i + 1], mask[i : i + 1], "rows") for i in (0, 1)]
    assert_all_equal({key: torch.cat([part[key] for part in alone]) for key in both}, both)


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_plan(name: str) -> None:
    model, x = hybrid(name)
    guided_anyway = HYBRIDS[name][1]
    plain, plan = (sparsenet.plan(selective_of(model, x, reenter=reenter)) for reenter in (False, True))
    assert plan.guided_conv_share == 1, str(plan)
    assert (plain.guided_conv_share == 1) == guided_anyway, str(plain)
    assert "reentry" not in {step.operation.status for step in plain.steps}
    found = [step.operation for step in plan.steps if step.operation.status == "reentry"]
    assert bool(found) != guided_anyway
    assert {operation.size for operation in found} <= {FINE, COARSE}
    assert ("reentry" in str(plan)) != guided_anyway
    assert plain.exits  # attention leaves, whatever comes after it
    assert plan.exits


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """What re-enters has every pixel's context; the convolution that reads it keeps the active pixels. And the
    gradients of all parameters."""
    model, x = hybrid("tokens")
    mask = blobs(2, FINE)
    coarse_mask = at_size(mask, COARSE)
    before = keep(model.before(model.stem(x)).relu(), mask)
    attended = model.block(before)
    fine = keep(model.after(attended).relu(), mask)
    coarse = model.coarse_block(keep(model.down(fine), coarse_mask))
    last = keep(model.last(coarse), coarse_mask)
    wanted = {"attended": attended, "fine": fine, "coarse": coarse, "last": last, "out": model.head(last.mean((2, 3)))}
    assert (attended[~mask[:, None].expand_as(attended)] != 0).all()  # what an inactive pixel got by attention
    selective = selective_of(model, x, reenter=True)
    found = selected(selective, x, mask, backend)
    assert_all_equal(found, wanted)
    names = [name for name, _ in model.named_parameters()]
    for key in wanted:
        right = gradients(wanted[key], parameters(model, names))
        assert_all_equal(gradients(found[key], parameters(selective, names)), right)


@pytest.mark.parametrize("reenter", [False, True])
@pytest.mark.parametrize("name", HYBRIDS)
def test_outputs_are_ordinary(name: str, reenter: bool) -> None:
    model, x = hybrid(name)
    selective, mask = selective_of(model, x, reenter=reenter), blobs(2, FINE)
    for backend in BACKENDS:
        with torch.no_grad():
            found = tree_leaves(selected(selective, x, mask, backend))
        assert {type(part) for part in [*found, *tree_leaves(selected(selective, x, mask, backend))]} == {Tensor}


@every_storage
@pytest.mark.parametrize("name", HYBRIDS)
def test_strict_raises_nevertheless(name: str, storage: str) -> None:
    model, x = hybrid(name)
    selective = selective_of(model, x, reenter=True, strict=True)
    with pytest.raises(RuntimeError, match="leaves the guided region"):
        selected(selective, x, blobs(2, FINE), storage)


def test_a_record_shows_the_reentries() -> None:
    model, x = hybrid("tokens")
    selective = selective_of(model, x, reenter=True)
    with sparsenet.record(selective) as rec, torch.no_grad():
        selected(selective, x, blobs(2, FINE), "rows")
    found = [(operation.name, operation.size) for operation in rec.operations if operation.status == "reentry"]
    assert found == [("reenter", FINE), ("reenter", COARSE)]
    assert set(rec.masks) == {FINE, COARSE}


def test_densify_gives_the_original() -> None:
    model, x = hybrid("patches")
    original = sparsenet.densify(selective_of(model, x, reenter=True))
    assert_all_equal(original(x), model(x))


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["rows", "auto", "spconv"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_storages_have_the_same_gradients(name: str, backend: str) -> None:
    model, x = hybrid(name)
    selective, mask = selective_of(model, x, reenter=True).train(), blobs(2, FINE)
    names = [name for name, _ in model.named_parameters()]
    reference, found = (
        torch.cat([part.flatten() for part in tree_leaves(selected(selective, x, mask, each))])
        for each in ("reference", backend)
    )
    right = gradients(reference, parameters(selective, names))
    assert all(gradient.any() for gradient in right)
    assert_all_equal(gradients(found, parameters(selective, names)), right)


@every_storage
@pytest.mark.parametrize("name", HYBRIDS)
def test_checkpointed_attention_has_the_same_gradients(name: str, storage: str) -> None:
    model, x = hybrid(name)
    selective, mask = selective_of(model, x, reenter=True).train(), blobs(2, FINE)
    names = [name for name, _ in model.named_parameters()]
    found = []
    for checkpointed in (False, True):
        selective.checkpointed = checkpointed
        out = selected(selective, x, mask, storage)
        found.append([out["out"], *gradients(out["out"], parameters(selective, names))])
    assert_all_equal(found[1], found[0])


def test_a_learned_mask_takes_gradient_behind_a_reentry() -> None:
    """A mask that is trained by its effect is read where the re-entered map's convolution was: the branch's gradient
    is what autograd makes of the same computation by hand."""
    model, x = hybrid("tokens")
    selector = nn.Conv2d(C, 1, 3, padding=1)
    selective = sparsenet.selectify(model, "stem", selector=selector, example_inputs=x, reenter=True).double().train()
    with sparsenet.record(selective) as rec:
        out = selective(x)
    saliency = {size: each[:, None] for size, each in rec.saliency.items()}
    gates = {size: (each.detach() > 0.5) + (each - each.detach()) for size, each in saliency.items()}
    before = model.before(model.stem(x)).relu() * gates[FINE]
    fine = model.after(model.block(before)).relu() * gates[FINE]
    last = model.last(model.coarse_block(model.down(fine) * gates[COARSE])) * gates[COARSE]
    assert_equal(out["last"], last)
    branch = [parameter for parameter in selective.selector.parameters() if parameter.requires_grad]
    assert_all_equal(gradients(out["last"], branch), gradients(last, branch))


# -- what does not take up its sites -----------------------------------------------------------------------------


class Passing(nn.Module):
    """A stem, a convolution, something, a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor], inputs: int = C) -> None:
        super().__init__()
        self.function = function
        self.stem, self.before = nn.Conv2d(3, C, 3, 2, 1), nn.Conv2d(C, C, 3, 1, 1)
        self.after = nn.Conv2d(inputs, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(self.stem(x))))


def tokens(x: Tensor) -> Tensor:
    """Leaves the grid and returns to it, with every pixel where it was."""
    return attend(*[x.flatten(2).mT] * 3).mT.reshape(x.shape)


def to_batch(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(-1, channels, height // 2, width // 2)


RETURNING: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": tokens,
    "twice": lambda x: tokens(tokens(x)),
    "resized there and back": lambda x: F.interpolate(F.avg_pool2d(tokens(x), 2), scale_factor=2.0),
    "with an ordinary tensor": lambda x: tokens(x) + torch.ones(1, C, 1, 1).double(),
    "in place": lambda x: tokens(x).mul_(2).relu_(),
    "with channels of others": lambda x: torch.cat([tokens(x)[:, 1:], tokens(x.sin())[:, :1]], 1),
    "padded": lambda x: F.pad(tokens(x), (1, 1, 0, 0))[..., 1:-1],
    "channels last": lambda x: tokens(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
}
ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled attention": lambda x: F.avg_pool2d(tokens(x), 2),
    "a finer grid": lambda x: F.interpolate(tokens(x), scale_factor=2.0),
    "a line of tokens": lambda x: tokens(x).reshape(len(x), C, 1, -1),
    "space to batch": to_batch,
    "space to batch, after attention": lambda x: to_batch(tokens(x)),
    "images to batch": lambda x: tokens(x).repeat(2, 1, 1, 1),
    "one image": lambda x: tokens(x)[:1],
    "flip": lambda x: x.flip(3),
    "flip, after attention": lambda x: tokens(x).flip(2),
    "torch.flip of images": lambda x: torch.flip(tokens(x), (0,)),
    "fliplr": lambda x: torch.fliplr(x.flatten(2)).reshape(x.shape).flipud(),
    "roll": lambda x: torch.roll(x, (1, 1), (2, 3)),
    "roll, after attention": lambda x: tokens(x).roll(-1, 3),
    "rot90": lambda x: torch.rot90(x, 2, (2, 3)),
    "rot90, after attention": lambda x: tokens(x).rot90(1, (2, 3)),
    "transpose": lambda x: x.transpose(2, 3),
    "transpose, after attention": lambda x: tokens(x).transpose(2, 3),
    "mT, after attention": lambda x: tokens(x).mT,
    "permute, after attention": lambda x: tokens(x).permute(0, 1, 3, 2),
    "channels last and turned": lambda x: tokens(x).permute(0, 2, 3, 1).transpose(1, 2).permute(0, 3, 1, 2),
    "moved, then mixed": lambda x: tokens(x.flip(3)).exp(),
}


@pytest.mark.parametrize("name", [*RETURNING, *ELSEWHERE])
@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
def test_only_a_map_of_its_grid_and_batch_takes_up_its_sites(name: str, size: tuple[int, int]) -> None:
    """On a square map, too, where a turned one has the same shape."""
    function, returns = {**RETURNING, **ELSEWHERE}[name], name in RETURNING
    model, x = Passing(function).double().eval(), torch.randn(2, 3, 2 * size[0], 2 * size[1]).double()
    selective = selective_of(model, x, reenter=True)
    plan = sparsenet.plan(selective)
    assert ("reentry" in {step.operation.status for step in plan.steps}) == returns, str(plan)
    assert (plan.guided_conv_share == 1) == returns, str(plan)
    assert plan.exits
    mask = blobs(2, size)
    with torch.no_grad():
        expected = model.after(function(keep(model.before(model.stem(x)), mask)))
        expected = keep(expected, mask) if returns else expected
        for backend in BACKENDS:
            assert_equal(selected(selective, x, mask, backend), expected)
            assert_equal(selected(selective, x, torch.ones_like(mask), backend), model(x))


@every_storage
def test_another_pass_takes_up_nothing(storage: str) -> None:
    """What meets maps of two passes of the stage has no sites of its own."""

    class Two(Passing):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (tokens(self.before(self.stem(part))) for part in (x, x.flip(3)))
            return self.after(first + second)

    model, x, mask = Two(tokens).double().eval(), torch.randn(2, 3, 16, 16).double(), blobs(2, (8, 8))
    selective = selective_of(model, x, reenter=True)
    assert "reentry" not in {step.operation.status for step in sparsenet.plan(selective).steps}
    with torch.no_grad():
        expected = model.after(sum(tokens(keep(model.before(model.stem(part)), mask)) for part in (x, x.flip(3))))
        assert_equal(selected(selective, x, mask, storage), expected)


@every_storage
def test_a_convolution_by_its_function_takes_up_sites_too(storage: str) -> None:
    """By name, and in a subclass that keeps its own forward."""

    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(input=input, weight=weight, bias=self.bias, padding=self.padding)

    model, x, mask = Passing(tokens).double().eval(), torch.randn(2, 3, 16, 16).double(), blobs(2, (8, 8))
    model.after = Standardised(C, 4, 3, padding=1).double()
    selective = selective_of(model, x, reenter=True)
    assert sparsenet.plan(selective).guided_conv_share == 1
    with torch.no_grad():
        expected = keep(model.after(tokens(keep(model.before(model.stem(x)), mask))), mask)
        assert_equal(selected(selective, x, mask, storage), expected)
