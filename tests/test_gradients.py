"""No gradient is lost in silence: every parameter's equals that of a masked dense network written out by hand, or the
operation raises and is named."""

from __future__ import annotations

import warnings
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
Read = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Stem (the stage), then `op` on full features (place "entry") or on others ("inside")."""

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
            x = self.op(self, x)
        x = torch.tanh(self.down(x))
        if self.place == "inside":
            x = self.op(self, x)
        x = torch.tanh(self.again(x))
        return self.classify(x.mean((2, 3)))


def by_hand(net: Net, images: Tensor, gates: dict[Any, Tensor], op: Op) -> Tensor:
    """`Net.forward` with every read of features that are not full multiplied by the mask of their size."""
    left = False

    def read(x: Tensor) -> Tensor:
        return x if left else x * gates[tuple(x.shape[2:])]

    x = net.stem(images)
    if net.place == "entry":
        x = op.by_hand(net, x, read, lambda x: x)
        left = op.leaves
    x = torch.tanh(net.down(x))
    if net.place == "inside":
        x = op.by_hand(net, x, read, read)
        left = op.leaves
    x = torch.tanh(net.again(read(x)))
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
    return torch.relu(x) * 3


def scripted_module(net: Net, x: Tensor) -> Tensor:
    return torch.jit.script(net.inner)(x)


def add_in_place(net: Net, x: Tensor) -> Tensor:
    y = torch.sin(x)
    y += x
    y *= 2
    return y


def write_to_parts(net: Net, x: Tensor) -> Tensor:
    """In-place operations whose results are not used: the object itself has changed."""
    y = x.clone()
    y.relu_()
    F.leaky_relu(y, 0.3, inplace=True)
    y.add_(x).clamp_(max=0.7)
    return y


@dataclass
class Op:
    """An operation; whether it leaves the region; what it is by hand, if that is not the operation itself: of the net,
    its input, a read through the mask, and a read as a spatial operation has it."""

    guided: Callable[[Net, Tensor], Tensor]
    leaves: bool = False
    hand: Callable[[Net, Tensor, Read, Read], Tensor] | None = None
    dtype: torch.dtype = torch.float64

    def by_hand(self, net: Net, x: Tensor, read: Read, spatial: Read) -> Tensor:
        if self.hand is not None:
            return self.hand(net, x, read, spatial)
        return self.guided(net, read(x) if self.leaves else x)


def block_by_hand(net: Net, x: Tensor, read: Read, spatial: Read) -> Tensor:
    return block(net, spatial(x))


OPS: dict[str, Op] = {
    "none": Op(lambda net, x: x),
    "custom Function": Op(lambda net, x: Cube.apply(x)),
    "custom Function twice": Op(lambda net, x: Cube.apply(Cube.apply(x) + x)),
    "flattening Function": Op(lambda net, x: Flat.apply(x).view(x.shape), leaves=True),
    "block": Op(block, hand=block_by_hand),
    "checkpoint": Op(lambda net, x: checkpoint(block, net, x, use_reentrant=False), hand=block_by_hand),
    "reentrant checkpoint": Op(lambda net, x: checkpoint(block, net, x, use_reentrant=True), hand=block_by_hand),
    "reentrant pointwise": Op(lambda net, x: checkpoint(lambda x: x.sin() * x, x, use_reentrant=True)),
    "scripted function": Op(lambda net, x: scripted_function(x), leaves=True),
    "scripted module": Op(scripted_module, leaves=True),
    "data": Op(lambda net, x: x.data * 2),
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


def gradients(net: nn.Module, output: Tensor, images: Tensor) -> dict[str, Tensor]:
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()
    named = {name.removeprefix("selector.module."): p for name, p in net.named_parameters()}
    names = [*named, "images"]
    found = torch.autograd.grad(loss, [*named.values(), images], allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_same(found[name], wanted[name], rounds=1e4)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("place", ["entry", "inside"])
@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str, place: str, storage: str) -> None:
    op = OPS[name]
    net = Net(op.guided, place).to(op.dtype)
    images = torch.rand(2, 3, *SIZE, dtype=op.dtype, requires_grad=True)
    print(name, place, storage)
    run_and_compare(net, op, storage, images)


def run_and_compare(net: Net, op: Op, storage: str, images: Tensor) -> None:
    chooser = nn.Conv2d(6, 1, 3, padding=1).to(images.dtype)
    nn.init.normal_(chooser.weight, std=0.7)
    selective = sparsenet.selectify(
        net, "stem", selector=chooser if storage == "live" else GivenMask(), example_inputs=images.detach()
    ).train()
    mask = blobs(2, SIZE)
    with ExitStack() as settings, sparsenet.record(selective) as rec:
        if storage != "live":
            settings.enter_context(sparsenet.use_mask(mask))
            settings.enter_context(sparsenet.use_backend(storage))
        output = selective(images)
    if storage == "live":
        gates = live_gates(net, selective.selector, images)
        assert all(0.1 < density < 0.9 for density in rec.density.values())
    else:
        gates = {size: at_size(mask, size).to(images) for size in (SIZE, HALF)}
    expected = by_hand(net, images, gates, op)
    assert_same(output, expected, rounds=1e4)
    wanted = gradients(net, expected, images)
    if storage == "live":
        ...
    assert_same_gradients(gradients(selective, output, images), wanted)


def live_gates(net: Net, selector: Any, images: Tensor) -> dict[Any, Tensor]:
    """Straight-through masks by hand: hard + (p - p.detach())."""
    logits = selector.module(net.stem(images))
    fine = logits.sigmoid()
    down = selector.down["1"]
    coarse = F.conv2d(fine, down.weight, down.bias, stride=2, padding=1).sigmoid()
    return {tuple(p.shape[2:]): (p > 0.5).to(p) + (p - p.detach()) for p in (fine, coarse)}
