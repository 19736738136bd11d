"""No gradient is lost in silence: every parameter's equals that of a masked dense network written out by hand, or the
operation raises and is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsenet
from sparsenet import GivenMask
from tests.models import Logits, assert_as_good, assert_same, at_size, blobs, error

SIZE = (10, 12)
HALF = (5, 6)
STORAGES = ("rows", "reference", "spconv", "live")


class Net(nn.Module):
    """Stem (the stage), two convolutions and a classifier of means, with `op` on full features (place "entry") or on
    others (place "inside")."""

    def __init__(self, op: Callable[[Net, Tensor], Tensor], place: str) -> None:
        super().__init__()
        self.op = op
        self.place = place
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)  # for operations that contain a convolution
        self.classify = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.place == "entry":
            x = torch.tanh(self.down(x) + self.down(self.op(self, x)))
        else:
            x = self.op(self, torch.tanh(self.down(x)))
        x = torch.tanh(self.again(x))
        return self.classify(x.mean((2, 3)))


def by_hand(net: Net, images: Tensor, gates: Callable[[Tensor], dict[Any, Tensor]], op: Op) -> Tensor:
    """`Net.forward` with every read of features that are not full multiplied by the mask of their size."""
    x = net.stem(images)
    found = gates(x)

    def read(x: Tensor, live: bool = True) -> Tensor:
        gate = found[tuple(x.shape[2:])]
        return x * (gate if live else gate.detach())

    if net.place == "entry":
        y = op.guided(net, read(x) if op.leaves else x)
        x = torch.tanh(net.down(x) + net.down(read(y) if op.spatial else y))
    else:
        x = torch.tanh(net.down(x))
        x = op.guided(net, read(x) if op.leaves or op.spatial else x)
        if op.leaves:
            return net.classify(torch.tanh(net.again(x)).mean((2, 3)))
    x = torch.tanh(net.again(read(x, live=not (op.stops and net.place == "inside"))))
    return net.classify(read(x).mean((2, 3)))


# -- operations ------------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * x * x


class Same(torch.autograd.Function):
    """A copy. What computes with numbers would leave in a padded map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1


class Flat(torch.autograd.Function):
    """Twice the input, by way of a shape that no feature map has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.flatten(1) * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad.view(ctx.shape)


def block(net: Net, x: Tensor) -> Tensor:
    return torch.tanh(net.inner(x)) * 1.5


@torch.jit.script
def scripted_function(x: Tensor) -> Tensor:
    return torch.sin(x) * 3


def add_in_place(net: Net, x: Tensor) -> Tensor:
    y = torch.sin(x)
    y += x
    y *= 2
    return y


def last(net: Net, x: Tensor) -> Tensor:
    """Channels last through a custom Function and a linear layer."""
    x = Cube.apply(x.permute(0, 2, 3, 1))
    return F.linear(x, net.inner.weight[:, :, 1, 1], net.inner.bias).permute(0, 3, 1, 2)


def apart(net: Net, x: Tensor) -> Tensor:
    """Channels in groups through custom Functions, and in another order."""
    x = Cube.apply(x.view(len(x), 2, 3, *x.shape[2:]))
    return Same.apply(x.transpose(1, 2)).flatten(1, 2)


def padded(net: Net, x: Tensor, mode: str = "constant") -> Tensor:
    x = Same.apply(F.pad(x, (2, 0, 1, 1), mode=mode))
    return torch.tanh(F.conv2d(x, net.inner.weight, net.inner.bias))


def write_by_views(net: Net, x: Tensor) -> Tensor:
    """What is written to a part is in the graph of the whole, also where only the wrapper is."""
    y = x.clone()
    y[:, :2].mul_(2)
    y = Cube.apply(y)
    y[:, 2:4] = y[:, :2] * 0.5
    y.permute(0, 2, 3, 1)[..., 4:].mul_(3)
    return Cube.apply(y)


def write_to_parts(net: Net, x: Tensor) -> Tensor:
    """In-place operations whose results are not used: the object itself has changed."""
    y = x.clone()
    y.add_(x)
    y.mul_(0.5)
    F.leaky_relu(y, 0.3, inplace=True)
    return y


@dataclass
class Op:
    """An operation on the features of a net, and how it treats them.

    leaves: it reads through the mask, and gives an ordinary tensor.
    spatial: it reads what a convolution does, and gives features that are not full.
    stops: its result gives the mask no gradient.
    """

    guided: Callable[[Net, Tensor], Tensor]
    leaves: bool = False
    spatial: bool = False
    stops: bool = False
    places: tuple[str, ...] = ("entry", "inside")
    dtype: torch.dtype = torch.float64


OPS: dict[str, Op] = {
    "none": Op(lambda net, x: x),
    "custom Function": Op(lambda net, x: Cube.apply(x)),
    "custom Function of a custom Function": Op(lambda net, x: Cube.apply(Cube.apply(x) + x)),
    "custom Functions side by side": Op(lambda net, x: Cube.apply(x) + Cube.apply(x) * x),
    "flattening Function": Op(lambda net, x: Flat.apply(x).view(x.shape), leaves=True),
    "block": Op(block, spatial=True),
    "checkpoint": Op(lambda net, x: checkpoint(block, net, x, use_reentrant=False), spatial=True),
    "reentrant checkpoint": Op(lambda net, x: checkpoint(block, net, x, use_reentrant=True), spatial=True),
    "reentrant pointwise": Op(lambda net, x: checkpoint(lambda x: x.sin() * x, x, use_reentrant=True)),
    "scripted function": Op(lambda net, x: scripted_function(x), leaves=True),
    "scripted module": Op(lambda net, x: net.inner(x), leaves=True),
    "scripted function, then a convolution": Op(
        lambda net, x: (1 + scripted_function(x).mean()) * net.inner(x), spatial=True, places=("inside",)
    ),
    "data": Op(lambda net, x: x.data * 2, stops=True),
    "detach": Op(lambda net, x: x.detach() + x.sin()),
    "clone": Op(lambda net, x: x.clone().contiguous(memory_format=torch.channels_last)),
    "contiguous": Op(lambda net, x: x.contiguous()),
    "to": Op(lambda net, x: x.to(torch.float64).sin().to(x.dtype), dtype=torch.float32),
    "double": Op(lambda net, x: x.double().sin().float(), dtype=torch.float32),
    "relu_": Op(lambda net, x: x.clone().relu_() + x),
    "+=": Op(add_in_place),
    "in-place, result unused": Op(write_to_parts),
    "in-place, by views": Op(write_by_views),
    "channels last": Op(last),
    "channels last, checkpoint": Op(lambda net, x: checkpoint(last, net, x, use_reentrant=False)),
    "channels apart": Op(apart),
    "channels apart, checkpoint": Op(lambda net, x: checkpoint(apart, net, x, use_reentrant=False)),
    "padded": Op(padded, spatial=True),
    "padded by reflection": Op(lambda net, x: padded(net, x, "reflect"), spatial=True),
    "padded by replication": Op(lambda net, x: padded(net, x, "replicate"), spatial=True),
    "padded, checkpoint": Op(lambda net, x: checkpoint(padded, net, x, use_reentrant=False), spatial=True),
    "padded, reentrant checkpoint": Op(lambda net, x: checkpoint(padded, net, x, use_reentrant=True), spatial=True),
    "an unknown operation": Op(lambda net, x: x.roll(1, 3), leaves=True),
}

# What raises, and how the operation is named: a custom Function or a scripted function that reads through the mask, and
# a backward pass that a reentrant checkpoint starts from features.
THROUGH_MASK = r"{} read guided features through their mask .* use_reentrant=False"
FROM_FEATURES = r"backward from guided features would leave out their mask's part .* use_reentrant=False"
FULL_OR_LIVE = [("entry", storage) for storage in STORAGES] + [("inside", "live")]
RAISES: dict[tuple[str, str, str], str] = {
    **{("flattening Function", *case): THROUGH_MASK.format(r"Tensor\.flatten") for case in FULL_OR_LIVE},
    **{("scripted function", *case): THROUGH_MASK.format(r"aten\W+sin\S*") for case in FULL_OR_LIVE},
    ("scripted function, then a convolution", "inside", "live"): THROUGH_MASK.format(r"aten\W+sin\S*"),
    **{("reentrant checkpoint", place, "live"): FROM_FEATURES for place in ("entry", "inside")},
    **{("padded, reentrant checkpoint", place, "live"): FROM_FEATURES for place in ("entry", "inside")},
    **{("reentrant pointwise", "entry", storage): FROM_FEATURES for storage in STORAGES},
}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name in wanted:
        assert_same(found[name], wanted[name], rounds=1e4)


def gradients(output: Tensor, *modules: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output differently."""
    weights = torch.linspace(-1, 1, output.numel()).to(output).view(output.shape)
    (output * weights).sum().backward()
    found = {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}
    return found if images.grad is None else {**found, "images": images.grad}


class Pair:
    """A selective net, and the same net by hand with its own parameters."""

    def __init__(self, op: Op, place: str, storage: str) -> None:
        self.op, self.storage, self.mask = op, storage, blobs(2, SIZE)
        nets = [Net(op.guided, place).double() for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        if op is OPS["scripted module"]:
            for net in nets:
                net.inner = torch.jit.script(net.inner)
        chooser = nn.Conv2d(6, 1, 3, padding=1).double()
        nn.init.normal_(chooser.weight, std=1.5)
        self.images = torch.rand(2, 3, *SIZE, dtype=torch.float64).to(op.dtype).requires_grad_()
        self.net, net = (net.to(op.dtype) for net in nets)
        # In place: PyTorch's deep copy of a scripted module has parameters that take no gradient.
        self.selective = sparsenet.selectify(
            net,
            "stem",
            selector=chooser.to(op.dtype) if storage == "live" else GivenMask(),
            example_inputs=self.images.detach(),
            inplace=True,
        ).train()
        if storage == "live":
            down = self.selective.selector.down["1"]
            down.weight.data.copy_(torch.tensor([[2.0, -1, 1], [-2, 3, -1], [1, -2, 0]]))
            nn.init.zeros_(down.bias)
        self.selector = nn.Module()
        self.selector.selector = copy.deepcopy(self.selective.selector)
        self.selective_images = self.images.detach().clone().requires_grad_()

    def settings(self) -> ExitStack:
        stack = ExitStack()
        if self.storage != "live":
            stack.enter_context(sparsenet.use_mask(self.mask))
            stack.enter_context(sparsenet.use_backend(self.storage))
        return stack

    def gates(self, features: Tensor) -> dict[Any, Tensor]:
        if self.storage != "live":
            return {size: at_size(self.mask, size).to(features) for size in (SIZE, HALF)}
        selector = self.selector.selector
        fine = selector.module(features).sigmoid()
        coarse = F.conv2d(fine, selector.down["1"].weight, selector.down["1"].bias, stride=2, padding=1).sigmoid()
        assert all(0.1 < (p > 0.5).double().mean() < 0.9 for p in (fine, coarse))
        # Straight through: the hard mask forward, the probability's gradient backward.
        return {tuple(p.shape[2:]): (p > 0.5).to(p) + (p - p.detach()) for p in (fine, coarse)}

    def compare(self) -> None:
        with self.settings():
            output = self.selective(self.selective_images)
        expected = by_hand(self.net, self.images, self.gates, self.op)
        assert_same(output, expected, rounds=1e4)
        found = gradients(output, self.selective, images=self.selective_images)
        assert_same_gradients(found, gradients(expected, self.net, self.selector, images=self.images))


CASES = [(name, place) for name, op in OPS.items() for place in op.places]


def compared(name: str, place: str, storage: str) -> AbstractContextManager[Any]:
    """What a comparison must end with: nothing, or the error."""
    reason = RAISES.get((name, place, storage))
    return nullcontext() if reason is None else pytest.raises(RuntimeError, match=reason)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("name", "place"), CASES)
def test_gradients(name: str, place: str, storage: str) -> None:
    pair = Pair(OPS[name], place, storage)
    with compared(name, place, storage):
        pair.compare()


@pytest.mark.parametrize(("name", "place"), CASES)
def test_gradients_of_the_mask_alone(name: str, place: str) -> None:
    """Only the selector trains: its gradient comes through the mask, by features that take none themselves."""
    pair = Pair(OPS[name], place, "live")
    for parameter in (*pair.net.parameters(), pair.images, pair.selective_images):
        parameter.requires_grad_(False)
    for key, parameter in pair.selective.named_parameters():
        parameter.requires_grad_(key.startswith("selector."))
    with compared(name, place, "live"):
        pair.compare()


# -- the mask's gradient ---------------------------------------------------------------------------------------


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def test_the_mask_gets_gradient_where_it_is_off() -> None:
    """Multiplying by hard + (p - p.detach()) where features are read; pixels once switched off can return."""
    logits = torch.randn(2, 1, *SIZE, dtype=torch.float64)
    convolutions = (nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1))
    model = nn.Sequential(*convolutions, Square()).double()
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    selective = sparsenet.selectify(model, "0", selector=Logits(logits.clone()), example_inputs=images[:0]).train()
    found = selective(images).sum()
    found.backward()

    by_hand = logits.clone().requires_grad_()
    p = by_hand.sigmoid()
    gate = (p > 0.5).to(p) + (p - p.detach())
    x = F.conv2d(model[0](images), model[1].weight, model[1].bias, padding=1)
    x = F.conv2d(x * gate, model[2].weight, model[2].bias, padding=1)
    expected = (x.square() * gate).sum()  # pointwise on features, then read
    expected.backward()
    assert_same(found, expected)
    grad = selective.selector.module.logits.grad
    assert_same(grad, by_hand.grad)
    off = logits <= 0
    assert 50 < off.sum() < off.numel() - 50
    assert (grad[off] != 0).all()


@pytest.mark.parametrize("backend", ["rows", "spconv"])
def test_rows_refuse_a_live_mask(backend: str) -> None:
    pair = Pair(OPS["none"], "inside", "live")
    with (
        sparsenet.use_backend(backend),
        pytest.raises(RuntimeError, match=rf"the {backend} backend gives the mask no gradient.*'reference' or 'auto'"),
    ):
        pair.selective(pair.selective_images)
    # The ways out: evaluation, no gradients, or a mask that is given or supervised directly.
    boxes = [torch.tensor([[1.0, 1, 8, 8]])] * 2
    with sparsenet.use_backend(backend):
        with torch.no_grad():
            pair.selective(pair.selective_images)
        with sparsenet.use_mask(pair.mask):
            pair.selective(pair.selective_images).sum().backward()
        with sparsenet.train.direct(pair.selective, boxes):
            pair.selective(pair.selective_images).sum().backward()
        pair.selective.eval()(pair.selective_images).sum().backward()
    assert all(p.grad is None for p in pair.selective.selector.parameters())


def test_detached_masks_leave_the_selector_alone() -> None:
    pair = Pair(OPS["none"], "inside", "live")
    with sparsenet.train.direct(pair.selective, [torch.zeros(0, 4)] * 2):
        pair.selective(pair.selective_images).sum().backward()
    assert all(p.grad is None for p in pair.selective.selector.parameters())
    assert all(p.grad is not None for n, p in pair.selective.named_parameters() if n.startswith(("stem", "again")))


def test_batch_normalisation_in_training_by_hand() -> None:
    """Mean and variance of the active pixels; the mask takes gradient through what is read, not who is counted."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 5, 3, padding=1)
            self.first, self.norm = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
            self.second = nn.Conv2d(5, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.norm(self.first(self.stem(x))))).sum((2, 3))

    logits = torch.randn(2, 1, *SIZE, dtype=torch.float64)
    model = Normed().double()
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    for live in (True, False):
        selective = sparsenet.selectify(model, "stem", selector=Logits(logits.clone()), example_inputs=images).train()
        hard = logits > 0
        with nullcontext() if live else sparsenet.use_mask(hard[:, 0]):
            selective(images).square().sum().backward()

        twin, by_hand = copy.deepcopy(model), logits.clone().requires_grad_()
        p = by_hand.sigmoid()
        gate = hard.to(p) + (p - p.detach() if live else 0)
        x = twin.first(twin.stem(images))
        active = x.permute(0, 2, 3, 1)[hard[:, 0]]
        mean, var = active.mean(0), active.var(0, unbiased=False)
        x = (x - mean[:, None, None]) / (var + twin.norm.eps).sqrt()[:, None, None]
        x = F.relu(x * twin.norm.weight[:, None, None] + twin.norm.bias[:, None, None])
        (twin.second(x * gate) * gate).sum((2, 3)).square().sum().backward()
        for (name, found), expected in zip(
            [(n, q) for n, q in selective.named_parameters() if "selector" not in n], twin.parameters(), strict=True
        ):
            assert found.grad is not None, name
            # The bias before a normalisation has no effect: its gradient is zero, to the rounding of its parts.
            assert_same(found.grad + (name == "first.bias"), expected.grad + (name == "first.bias"), rounds=1e5)
        assert_same(selective.norm.running_mean, 0.1 * mean)
        assert_same(selective.norm.running_var, 0.9 + 0.1 * active.var(0))
        if live:
            assert_same(selective.selector.module.logits.grad, by_hand.grad, rounds=1e5)


# -- whole models ----------------------------------------------------------------------------------------------


def test_densenet_with_checkpointing_learns_the_same() -> None:
    """Its `memory_efficient` switch recomputes every layer in the backward pass, live mask and all."""
    torch.manual_seed(0)
    plain = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5)
    frugal = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5, memory_efficient=True)
    frugal.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for model in (plain, frugal):
        torch.manual_seed(1)
        chooser = nn.Conv2d(16, 1, 3, padding=1)
        chooser.weight.data -= chooser.weight.mean((2, 3), keepdim=True).detach()  # of edges: about half are on
        selective = sparsenet.selectify(model.double(), "pool1", selector=chooser, example_inputs=images).train()
        with sparsenet.record(selective) as rec:
            output = selective(images)
        assert 0.2 < rec.density[16, 16] < 0.8
        found.append(gradients(output, selective, images=images))
    assert any(name.startswith("selector.down.1") for name in found[0])
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("backend", ["rows", "spconv"])
def test_resnet_learns_the_same_in_both_storages(backend: str) -> None:
    model = torchvision.models.resnet18(weights=None, num_classes=5).double()
    images, mask = torch.rand(2, 3, 64, 48, dtype=torch.float64), blobs(2, (16, 12))
    found = []
    for name in ("reference", backend):
        selective = sparsenet.selectify(model, "maxpool", selector=GivenMask(), example_inputs=images).train()
        with sparsenet.use_mask(mask), sparsenet.use_backend(name):
            output = selective(images)
        found.append((output.detach(), gradients(output, selective, images=images), selective.state_dict()))
    assert_same(found[1][0], found[0][0], rounds=1e5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, wanted in found[0][1].items():
        assert_same(found[1][1][name], wanted, rounds=1e7)  # training-mode BN of few pixels divides by small numbers
    for name, wanted in found[0][2].items():
        assert_same(found[1][2][name], wanted, rounds=1e5)


# -- modes of PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_autocast(storage: str) -> None:
    """Outputs and gradients miss the float32 truth by at most 4 times what dense bfloat16 autocast does by hand."""
    torch.manual_seed(0)
    pair = Pair(Op(block, spatial=True, dtype=torch.float32), "inside", storage)
    images = [pair.images.detach().clone().requires_grad_() for _ in range(3)]
    dtypes: dict[str, torch.dtype] = {}
    for name in ("down", "again", "inner"):
        module = pair.selective.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: dtypes.update({name: output.dtype}))

    def learn(run: Callable[[], Tensor], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for module in (pair.net, pair.selector, pair.selective):
            module.zero_grad()
        output = run()
        return output.detach(), gradients(output.float(), pair.net, pair.selector, pair.selective, images=images)

    def guided() -> Tensor:
        with pair.settings():
            return pair.selective(images[2])

    truth = learn(lambda: by_hand(pair.net, images[0], pair.gates, pair.op), images[0])
    with torch.autocast("cpu", torch.bfloat16):
        dense = learn(lambda: by_hand(pair.net, images[1], pair.gates, pair.op), images[1])
        found = learn(guided, images[2])
    assert dtypes == dict.fromkeys(("down", "again", "inner"), torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    assert_as_good(found[0], dense[0], truth[0], factor=4)
    assert found[1].keys() == truth[1].keys()
    for name, wanted in truth[1].items():
        assert found[1][name].dtype == torch.float32
        precise = torch.finfo(torch.bfloat16).eps * wanted.abs().max().item()
        assert error(found[1][name], wanted) <= 4 * max(error(dense[1][name], wanted), precise), name


@pytest.mark.parametrize("storage", STORAGES)
def test_inference_mode_and_no_grad(storage: str) -> None:
    """Nothing of them stays behind: gradients come back with the next pass."""
    pair = Pair(OPS["block"], "inside", storage)
    expected = by_hand(pair.net, pair.images, pair.gates, pair.op)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), pair.settings():
            output = pair.selective(pair.selective_images)
        assert not output.requires_grad
        assert_same(output, expected)
    with torch.no_grad(), sparsenet.record(pair.selective) as rec, pair.settings():
        pair.selective(pair.selective_images)
    assert not any(saliency.requires_grad for saliency in rec.saliency.values())
    pair.compare()


@pytest.mark.parametrize("storage", STORAGES)
def test_no_grad_for_a_part_of_the_network(storage: str) -> None:
    """A part that runs without gradients gives none, and spoils none: neither does what it caches."""

    def op(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            gain = 1 + x.mean()
        return net.inner(x) * gain

    pair = Pair(Op(op, spatial=True), "inside", storage)
    pair.compare()


@pytest.mark.parametrize("storage", STORAGES)
def test_two_backward_passes_through_one_graph(storage: str) -> None:
    pair = Pair(OPS["block"], "inside", storage)
    with pair.settings():
        output = pair.selective(pair.selective_images).square().sum()
    output.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in pair.selective.named_parameters() if p.grad is not None}
    output.backward()
    for name, grad in once.items():
        assert_same(pair.selective.get_parameter(name).grad, 2 * grad)


# -- what raises -----------------------------------------------------------------------------------------------


def guided_pass(op: Callable[[Net, Tensor], Tensor], storage: str) -> Tensor:
    """A forward pass whose `op` runs between two guided convolutions, but not in the dry run."""
    pair = Pair(OPS["none"], "inside", storage)
    pair.selective.op = op
    with pair.settings():
        return pair.selective(pair.selective_images)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["register_hook", "retain_grad"])
def test_hooks_on_features_raise(name: str, storage: str) -> None:
    def op(net: Net, x: Tensor) -> Tensor:
        x.register_hook(lambda grad: None) if name == "register_hook" else x.retain_grad()
        return x

    with pytest.raises(RuntimeError, match=rf"Tensor\.{name} on guided features would never see"):
        guided_pass(op, storage)


WRITES = {
    "view": lambda x: x.view(-1).zero_(),
    "slice": lambda x: x[1:].fill_(1),
    "select": lambda x: x.select(2, 0).add_(1),
    "detach": lambda x: x.detach().view(-1).zero_(),
    "chunk": lambda x: x.chunk(2, 3)[1].sqrt_(),
    "transpose": lambda x: x.transpose(2, 3)[0].zero_(),
    "a part of a part": lambda x: x[:, :2].permute(0, 2, 3, 1)[0].mul_(2),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", WRITES)
def test_writing_to_a_view_of_features_raises_at_their_next_use(name: str, storage: str) -> None:
    """It would have changed the features of the original network."""

    def op(net: Net, x: Tensor) -> Tensor:
        x = x.detach() if name != "detach" else x
        WRITES[name](x)
        return x

    with pytest.raises(RuntimeError, match=r"a view of a guided feature map was written to .* \.clone\(\)"):
        guided_pass(op, storage)


def test_writing_to_a_copy_is_allowed() -> None:
    def op(net: Net, x: Tensor) -> Tensor:
        x.flatten(1).clone().zero_()
        (x.view(-1) * 2).zero_()
        x.view(-1)
        return x

    assert torch.isfinite(guided_pass(op, "rows")).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("__setitem__", lambda net, x: x.__setitem__((0, 0), 1.0)),
        ("fill_", lambda net, x: x.fill_(1)),
        ("copy_", lambda net, x: x.copy_(torch.ones_like(x.view(x.shape)))),
        ("feature_alpha_dropout", lambda net, x: F.feature_alpha_dropout(x, 0.5, inplace=True)),
        (
            "guided features do not take new .data",
            lambda net, x: setattr(x, "data", torch.ones(2, 6, *HALF, dtype=x.dtype)),
        ),
        ("torch.sin", lambda net, x: torch.sin(x, out=x)),
        ("squeeze_", lambda net, x: x.squeeze_()),
    ],
)
def test_in_place_operations_without_a_rule_raise(name: str, op: Any, storage: str) -> None:
    def writes(net: Net, x: Tensor) -> Tensor:
        op(net, x)
        return x

    with pytest.raises(RuntimeError, match=rf"{name}.*(would write in place|return a new tensor)"):
        guided_pass(writes, storage)
