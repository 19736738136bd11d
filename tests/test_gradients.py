"""No gradient is lost in silence: every parameter's equals that of a masked dense network written out by hand, or the
operation raises and is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsenet
from sparsenet import GivenMask
from tests.models import assert_same, at_size, blobs

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
    "data": Op(lambda net, x: x.data * 2, stops=True),
    "detach": Op(lambda net, x: x.detach() + x.sin()),
    "clone": Op(lambda net, x: x.clone().contiguous(memory_format=torch.channels_last)),
    "contiguous": Op(lambda net, x: x.contiguous()),
    "to": Op(lambda net, x: x.to(torch.float64).sin().to(x.dtype), dtype=torch.float32),
    "double": Op(lambda net, x: x.double().sin().float(), dtype=torch.float32),
    "relu_": Op(lambda net, x: x.clone().relu_() + x),
    "+=": Op(add_in_place),
    "in-place, result unused": Op(write_to_parts),
    "an unknown operation": Op(lambda net, x: x.roll(1, 3), leaves=True),
}

# What raises, and how the operation is named.
RAISES: dict[tuple[str, str, str], str] = {}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_same(found[name], wanted[name], rounds=1e4)


def gradients(output: Tensor, *modules: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output differently."""
    weights = torch.linspace(-1, 1, output.numel()).to(output).view(output.shape)
    (output * weights).sum().backward()
    found = {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}
    return {**found, "images": images.grad}


class Pair:
    """A selective net, and the same net by hand with its own parameters."""

    def __init__(self, op: Op, place: str, storage: str) -> None:
        net = Net(op.guided, place).double()
        if op is OPS["scripted module"]:
            net.inner = torch.jit.script(net.inner)
        chooser = nn.Conv2d(6, 1, 3, padding=1).double()
        nn.init.normal_(chooser.weight, std=1.5)
        images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
        net, chooser, images = net.to(op.dtype), chooser.to(op.dtype), images.to(op.dtype)
        self.op, self.storage, self.mask = op, storage, blobs(2, SIZE)
        self.net, self.images = net, images.clone().requires_grad_()
        self.selective = sparsenet.selectify(
            net, "stem", selector=chooser if storage == "live" else GivenMask(), example_inputs=images
        ).train()
        if storage == "live":
            nn.init.uniform_(self.selective.selector.down["1"].weight, -2, 2)
            nn.init.zeros_(self.selective.selector.down["1"].bias)
        self.selector = nn.Module()
        self.selector.selector = copy.deepcopy(self.selective.selector)
        self.selective_images = images.clone().requires_grad_()

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


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("place", ["entry", "inside"])
@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str, place: str, storage: str) -> None:
    pair = Pair(OPS[name], place, storage)
    if (name, place, storage) not in RAISES:
        pair.compare()
        return
    with pytest.raises(RuntimeError, match=RAISES[name, place, storage]):
        pair.compare()
