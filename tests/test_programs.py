"""Programs give what the modules give, whichever pixels are active, and never stand for code that does more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsenet
from sparsenet.kernels import machine
from sparsenet.programs import Program
from tests.bodies import images, masked, selective
from tests.models import assert_same

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))

WIDTH = 8
PASSES = 4  # of which the third and later replay


def projection(stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, stride, bias=False), nn.BatchNorm2d(WIDTH))


def of_mobilenet_v3(activation: str) -> nn.Module:
    mobilenetv3 = torchvision.models.mobilenetv3
    config = mobilenetv3.InvertedResidualConfig(WIDTH, 3, 3 * WIDTH, WIDTH, False, activation, 1, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def of_efficientnet(blocks: int = 2) -> nn.Module:
    """With squeeze-and-excitation inside, which is a step of one image in float32."""
    efficientnet = torchvision.models.efficientnet
    config = efficientnet.MBConvConfig(2, 3, 1, WIDTH, WIDTH, blocks)
    return nn.Sequential(*(efficientnet.MBConv(config, 0.2, nn.BatchNorm2d) for _ in range(blocks)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: torchvision.models.resnet.BasicBlock(WIDTH, WIDTH),
    "basic, projected": lambda: torchvision.models.resnet.BasicBlock(WIDTH, WIDTH, 2, projection(2)),
    "bottleneck": lambda: torchvision.models.resnet.Bottleneck(WIDTH, WIDTH // 4, groups=2),
    "bottleneck, projected": lambda: torchvision.models.resnet.Bottleneck(WIDTH, WIDTH // 4, 1, projection()),
    "inverted": lambda: torchvision.models.mobilenetv2.InvertedResidual(WIDTH, WIDTH, 1, 2),
    "inverted, stride": lambda: torchvision.models.mobilenetv2.InvertedResidual(WIDTH, WIDTH, 2, 3),
    "of MobileNetV3": partial(of_mobilenet_v3, "RE"),
    # In float64 a step that no kernel takes, inside of a block and in place.
    "of MobileNetV3, hardswish": partial(of_mobilenet_v3, "HS"),
    "scaled": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), timm.layers.LayerScale2d(WIDTH, 0.5)),
    "of EfficientNet": of_efficientnet,
    "timm's bottleneck": lambda: timm.models.resnet.Bottleneck(WIDTH, WIDTH // 4),
    "timm's, squeezed": lambda: timm.models._efficientnet_blocks.InvertedResidual(
        WIDTH, WIDTH, exp_ratio=2.0, act_layer=nn.SiLU, se_layer=partial(timm.layers.SEModule, rd_ratio=0.25)
    ),
    "timm's inverted": lambda: timm.models._efficientnet_blocks.InvertedResidual(WIDTH, WIDTH),
    "plain": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(inplace=True)),
    "dense layers": lambda: torchvision.models.densenet._DenseBlock(2, WIDTH, 2, WIDTH, 0),  # (N, 3 · WIDTH, H, W)
    "narrow again": lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
    "pool": lambda: nn.MaxPool2d(3, 2, padding=1),
    "pool, and more": lambda: nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.LeakyReLU(0.2), nn.BatchNorm2d(WIDTH)),
    "nothing": nn.Identity,
}
SAME_WIDTH = sorted(set(BLOCKS) - {"dense layers"})
SQUEEZED = ("of EfficientNet", "timm's, squeezed")


def made(body: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A selective model, and the frozen one."""
    model = selective(body, WIDTH, dtype)
    return model, sparsenet.freeze(model, images(dtype=dtype))


def check(model: Any, frozen: Any, passes: int = PASSES, dtype: torch.dtype = torch.float64) -> None:
    """On masks that differ, so that a program meets other sites than those that it was recorded on."""
    for seed in range(passes):
        with masked(seed):
            assert_same(frozen(images(dtype=dtype)), model(images(dtype=dtype)))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Those that run from now on."""
    found: list[Program] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, x: (found.append(self), run(self, x))[1])
    return found


@given(
    names=st.lists(st.sampled_from(SAME_WIDTH), min_size=2, max_size=5),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_blocks(names: list[str], batch: int, seed: int, dtype: torch.dtype) -> None:
    model, frozen = made(nn.Sequential(*(BLOCKS[name]() for name in (*names, "narrow again"))), dtype)
    for place, size in enumerate([12, 12, 9, 12, 9, 9]):
        with masked(seed + place, batch, size):
            assert_same(frozen(images(batch, size, dtype)), model(images(batch, size, dtype)))


@pytest.mark.parametrize(
    "name", sorted(set(SAME_WIDTH) - {"nothing", "narrow again", "plain", "scaled", "pool, and more", *SQUEEZED})
)
def test_a_block_is_replayed(name: str, replays: list[Program]) -> None:
    """As a whole, and with what stands beside it."""
    model, frozen = made(nn.Sequential(BLOCKS["plain"](), BLOCKS[name](), BLOCKS[name]()), torch.float32)
    replays.clear()
    check(model, frozen, dtype=torch.float32)
    if all(part.layer.waiting("guided") for part in frozen.body.modules() if hasattr(part, "layer")):
        assert replays and all((each.first, each.end) == (0, 4) for each in replays[-1:])


def test_squeeze_and_excitation_is_replayed(replays: list[Program]) -> None:
    """Of one image, and what is done to it is seen."""
    name = "of EfficientNet"
    model, frozen = made(nn.Sequential(BLOCKS["plain"](), BLOCKS[name](), BLOCKS["plain"]()), torch.float32)

    def check_one_image() -> None:
        for seed in range(PASSES):
            with masked(seed, batch=1):
                x = images(1, dtype=torch.float32)
                assert_same(frozen(x), model(x))

    check_one_image()
    check(model, frozen, dtype=torch.float32)  # two images, whose means are no step
    check_one_image()
    assert (replays[-1].first, replays[-1].end) == (0, 6)
    assert sum(step.gate is not None for step in replays[-1]._steps) == 2
    with torch.no_grad():
        for each in (model, frozen):
            each.body[1][1].block[2].fc1.bias.add_(0.5)
    check_one_image()
    calls: list[Any] = []
    frozen.body[1][0].block[2].scale_activation.register_forward_hook(lambda *_: calls.append(1))
    check_one_image()
    assert len(calls) == PASSES


def test_what_is_no_program_is_as_it_was(replays: list[Program]) -> None:
    """Around squeeze-and-excitation and dense blocks, of which only parts can be replayed."""
    body = [
        BLOCKS["of EfficientNet"](),
        BLOCKS["pool"](),
        BLOCKS["inverted"](),
        BLOCKS["basic"](),
        BLOCKS["dense layers"](),
    ]
    model, frozen = made(nn.Sequential(*body))
    check(model, frozen)
    assert replays


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_pixel_and_all_pixels(share: float) -> None:
    model, frozen = made(nn.Sequential(BLOCKS["bottleneck"](), BLOCKS["pool, and more"](), BLOCKS["inverted"]()))
    check(model, frozen)
    mask = torch.full((2, 12, 12), share == 1)
    with torch.no_grad(), sparsenet.use_mask(mask):
        for _ in range(PASSES):
            assert_same(frozen(images()), model(images()))
    check(model, frozen)


def test_memory_is_used_again(replays: list[Program]) -> None:
    """A long program has few buffers, and what it gives outlives it."""
    model, frozen = made(nn.Sequential(*(BLOCKS["bottleneck, projected"]() for _ in range(6))), torch.float32)
    replays.clear()
    with masked():
        x = images(dtype=torch.float32)
        expected = model(x)
        results = [frozen(x) for _ in range(PASSES)]
        for result in results:
            assert_same(result, expected)
    if replays:
        assert len(replays[-1]._steps) == 23 and len(replays[-1]._buffers) <= 4


class Counting(nn.Sequential):
    """Code that nobody knows."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x) * self.passes


class Alternating(nn.Module):
    """Layers alone, but not always the same."""

    passes: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.even = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(x) if self.passes[0] % 2 else self.even(x)


class Tripled(nn.ReLU):
    """A class of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


def test_code_that_is_not_known_runs_in_every_pass(replays: list[Program]) -> None:
    body = nn.Sequential(BLOCKS["inverted"](), Counting(BLOCKS["basic"](), BLOCKS["basic"]()), BLOCKS["inverted"]())
    model, frozen = made(body)
    model.body[1].passes = frozen.body[1].passes = 0
    check(model, frozen)
    assert frozen.body[1].passes == model.body[1].passes == PASSES
    assert replays  # of what is around it


def test_code_that_is_not_known_inside_of_what_is() -> None:
    block: Any = BLOCKS["basic"]()
    block.bn2 = Alternating()
    model, frozen = made(nn.Sequential(BLOCKS["plain"](), block, BLOCKS["basic"]()))
    for number in range(2 * PASSES):
        Alternating.passes[0] = number // 3
        check(model, frozen, passes=1)


def test_hooks_are_called_in_every_pass() -> None:
    """Those that were there before a program could be made."""
    model, frozen = made(nn.Sequential(BLOCKS["plain"](), BLOCKS["basic"](), BLOCKS["basic"]()))
    calls: list[Any] = []
    frozen.body[2].conv2.register_forward_hook(lambda *_: calls.append(1))
    check(model, frozen)
    assert len(calls) == PASSES


def hooked_deep_inside(body: Any) -> None:
    body[0].bn1.register_forward_hook(lambda module, args, output: output * 2)


def hooked_before(body: Any) -> None:
    body[1].conv2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@torch.no_grad()
def norm_written_to(body: Any) -> None:
    body[1].bn2.running_mean.add_(1)


def other_tensor(body: Any) -> None:
    body[0].bn1.weight = nn.Parameter(torch.full((WIDTH,), 3.0, dtype=torch.float64))


def other_eps(body: Any) -> None:
    body[0].bn2.eps = 0.5


def other_block(body: Any) -> None:
    body[1] = BLOCKS["plain"]().double()


def other_part(body: Any) -> None:
    body[0].relu = nn.Tanh()


def no_projection(body: Any) -> None:
    body[2].downsample = None


def another_forward(body: Any) -> None:
    body[0].forward = lambda x: x * 2


def another_class(body: Any) -> None:
    body[0].relu.__class__ = Tripled


def by_the_batch(body: Any) -> None:
    body[1].bn1.train()


def one_less(body: Any) -> None:
    del body[1]


@pytest.mark.parametrize(
    "change",
    [
        hooked_deep_inside,
        hooked_before,
        norm_written_to,
        other_tensor,
        other_eps,
        other_block,
        other_part,
        no_projection,
        another_forward,
        another_class,
        by_the_batch,
        one_less,
    ],
)
def test_what_is_done_to_the_modules_is_seen(change: Callable[[Any], None], replays: list[Program]) -> None:
    """After a program was made, which a later one may follow."""
    block = torchvision.models.resnet.BasicBlock
    ends = [block(WIDTH, WIDTH, 1, projection()) for _ in range(2)]
    model, frozen = made(nn.Sequential(ends[0], block(WIDTH, WIDTH), ends[1]))
    check(model, frozen)
    assert (replays[-1].first, replays[-1].end) == (0, 3)
    with masked():
        before = frozen(images())
    for each in (model, frozen):
        torch.manual_seed(1)
        change(each.body)
    with masked():
        assert not torch.equal(frozen(images()), before)
    model.body.load_state_dict(model.body.state_dict())  # by_the_batch: statistics of that pass
    for seed in range(2 * PASSES):
        with masked(seed):
            if change is by_the_batch:
                frozen.body[1].bn1.load_state_dict(model.body[1].bn1.state_dict())
            assert_same(frozen(images()), model(images()))


def test_a_class_that_is_changed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen = made(nn.Sequential(BLOCKS["basic"](), BLOCKS["basic"]()))
    check(model, frozen)
    block = torchvision.models.resnet.BasicBlock
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: forward(self, x) * 2)
    check(model, frozen)


def test_hooks_of_all_modules_are_called() -> None:
    model, frozen = made(nn.Sequential(BLOCKS["basic"](), BLOCKS["basic"]()))
    check(model, frozen)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: called.append(module))
    try:
        with masked():
            frozen(images())
    finally:
        handle.remove()
    assert frozen.body[1].conv2 in called


@torch.no_grad()
def test_a_factor_that_is_written_to() -> None:
    model, frozen = made(nn.Sequential(BLOCKS["scaled"](), BLOCKS["scaled"](), BLOCKS["basic"]()))
    check(model, frozen)
    for each in (model, frozen):
        each.body[1][1].gamma.mul_(3)
    check(model, frozen)


def test_a_record_watches_the_modules(replays: list[Program]) -> None:
    model, frozen = made(nn.Sequential(BLOCKS["inverted"](), BLOCKS["inverted"]()))
    check(model, frozen)
    replays.clear()
    with masked():
        with sparsenet.record(model) as expected:
            model(images())
        with sparsenet.record(frozen) as found:
            frozen(images())
    guided = [[(each.name, each.macs) for each in record.operations if each.convolves] for record in (expected, found)]
    assert guided[0] == guided[1] and not replays


def test_tensors_whose_writes_are_not_counted() -> None:
    """Of inference mode: the modules run in every pass."""
    model, frozen = made(nn.Sequential(BLOCKS["plain"](), BLOCKS["basic"](), BLOCKS["basic"]()))
    with torch.inference_mode():
        bias = torch.ones(WIDTH, dtype=torch.float64)
    for each in (model, frozen):
        each.body[2].bn2.running_mean = bias
    check(model, frozen)
    with torch.inference_mode():
        bias.add_(1)
    check(model, frozen)


class Beside(nn.Module):
    """Known blocks in code that reads and writes beside them."""

    def __init__(self, function: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.blocks = nn.Sequential(BLOCKS["plain"](), BLOCKS["basic"](), BLOCKS["inverted"]())
        self.block = nn.Sequential(BLOCKS["basic"]())
        self.after = nn.Sequential(BLOCKS["narrow again"](), nn.ReLU(inplace=True))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def written_after(m: Beside, x: Tensor) -> Any:
    y = m.blocks(x)
    x.add_(1)
    return m.after(y) + x


def in_place_before(m: Beside, x: Tensor) -> Any:
    z = m.after(x)
    z.mul_(2)
    return m.blocks(z) + z + m.blocks(x)


def written_before_it_is_added(m: Beside, x: Tensor) -> Any:
    z = m.after(x)
    y = m.block(z)
    z.add_(1)
    return m.after(y) + z


def read_twice(m: Beside, x: Tensor) -> Any:
    y = m.blocks(x)
    return m.after(y) + y.relu(), y.mean((2, 3))


def of_two(m: Beside, x: Tensor) -> Any:
    return m.blocks(m.blocks(x) + m.after(m.blocks(x)))


def in_a_thread(m: Beside, x: Tensor) -> Any:
    y, found = m.blocks(x), []

    def branch() -> None:
        with torch.no_grad():
            found.append(m.blocks(y))

    thread = threading.Thread(target=branch)
    thread.start()
    thread.join()
    return m.after(found[0]) + y


@pytest.mark.parametrize(
    "function", [written_after, in_place_before, written_before_it_is_added, read_twice, of_two, in_a_thread]
)
def test_what_stands_beside(function: Callable[[Any, Tensor], Any], replays: list[Program]) -> None:
    model, frozen = made(Beside(function))
    check(model, frozen, 2 * PASSES)
    assert replays


def test_passes_at_once(replays: list[Program]) -> None:
    model, frozen = made(nn.Sequential(*(BLOCKS["bottleneck"]() for _ in range(3))))
    check(model, frozen)
    failures: list[BaseException] = []

    def passes(seed: int) -> None:
        try:
            with masked(seed):
                expected = model(images())
                for _ in range(8):
                    assert_same(frozen(images()), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=partial(passes, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and replays


def test_a_recording_that_raises(replays: list[Program]) -> None:
    """Leaves nothing behind: the next pass goes on as if it had not been."""
    model, frozen = made(nn.Sequential(BLOCKS["inverted"](), BLOCKS["pool"](), BLOCKS["basic"]()))
    frozen.body[1].kernel_size = 99
    with masked():
        for _ in range(PASSES):
            with pytest.raises(RuntimeError):
                frozen(images())
    frozen.body[1].kernel_size = 3
    check(model, frozen)
    assert replays
