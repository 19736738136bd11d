"""Maps whose padding nothing has read yet, negative padding, and transposed convolutions, against PyTorch's own on maps
whose inactive pixels are zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from timm.layers import AvgPool2dSame, BlurPool2d, Conv2dSame
from timm.layers.padding import pad_same
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import GivenMask, backends
from sparsenet.masked_conv import MaskedConv2d
from tests import strategies
from tests.helpers import (
    STORAGES,
    assert_agrees,
    assert_equal,
    assert_guided,
    gradients,
    guide,
    keep,
    recorder,
    select,
)
from tests.models import at_size, blobs

every_storage = pytest.mark.parametrize("storage", STORAGES)
every_backend = pytest.mark.parametrize("backend", ("auto", "reference", *backends.BACKENDS))
every_mode = pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # left, right, top, bottom, as `F.pad` takes them


def image(mask: Tensor, channels: int = 4) -> Tensor:
    return torch.randn(len(mask), channels, *mask.shape[1:], dtype=torch.float64, requires_grad=True)


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# -- what is drawn -----------------------------------------------------------------------------------------------


@st.composite
def paddings(draw: DrawFn, size: Pair, mode: str, crops: bool = False) -> Sides:
    """As wide as PyTorch allows and at most 4; symmetric half of the time; with `crops`, taken off here and there."""
    found: list[int] = []
    for length in (size[1], size[0]):
        most = min(4, {"reflect": length - 1, "circular": length}.get(mode, 4))
        first = draw(st.integers(-min(2, length - 1) if crops else 0, most))
        # A crop leaves one pixel at least: what is left of nothing, PyTorch refuses for reasons of its own.
        least = -min(2, length + min(first, 0) - 1) if crops else 0
        found += [first, draw(st.one_of(st.just(first), st.integers(least, most)) if first >= least else st.just(0))]
    return found[0], found[1], found[2], found[3]


def padded(size: Pair, sides: Sides) -> Pair:
    left, right, top, bottom = sides
    return size[0] + top + bottom, size[1] + left + right


@st.composite
def kernels(draw: DrawFn, size: Pair, most: int) -> tuple[Pair, Pair]:
    """A kernel that fits on a map of this size, and its dilation."""
    found = []
    for length in size:
        dilation = draw(st.integers(1, 3))
        found.append((draw(st.integers(1, max(1, min(most, (length - 1) // dilation + 1)))), dilation))
    (height, down), (width, right) = found
    return (height, width), (down, right)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def small_masks(draw: DrawFn) -> Tensor:
    """Of at most 9 pixels, so that padding is a good part of what is read."""
    return draw(strategies.masks(draw(st.integers(1, 2)), draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))))


Padded = tuple[Tensor, bool, Sides, dict[str, Any]]  # the mask, whether the map is full, what is padded, and what reads


@st.composite
def convolved(draw: DrawFn, mode: str, crops: bool = False) -> Padded:
    mask = draw(small_masks())
    size: Pair = (mask.shape[1], mask.shape[2])
    sides = draw(paddings(size, mode, crops))
    size = padded(size, sides)
    own: Any = 0
    if mode == "constant" and min(sides) >= 0:
        own = draw(st.one_of(st.just(0), st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    by = (own, own) if isinstance(own, int) else own
    kernel, dilation = draw(kernels((size[0] + 2 * by[0], size[1] + 2 * by[1]), 5))
    stride: Any = draw(pairs)
    if own == 0 and stride == (1, 1):
        own = draw(st.sampled_from([0, "valid", "same"] if mode == "constant" and min(sides) >= 0 else [0, "valid"]))
    groups = draw(st.sampled_from([1, 2, 4]))
    reads = {"kernel": kernel, "stride": stride, "padding": own, "dilation": dilation, "groups": groups}
    return mask, draw(st.booleans()), sides, reads


def assert_convolution_agrees(case: Padded, mode: str, backend: str) -> None:
    mask, full, sides, reads = case
    reads = dict(reads)
    weight, bias = weights(6 if reads["groups"] == 2 else 4, 4 // reads["groups"], *reads.pop("kernel")), None
    bias = weights(len(weight))

    def function(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, sides, mode), weight, bias, **reads)

    assert_agrees(function, backend, mask, image(mask), full=full, leaves=[weight, bias])


# -- before a convolution ----------------------------------------------------------------------------------------


@every_backend
@every_mode
@given(data=st.data())
def test_a_convolution_reads_padding_as_part_of_its_window(backend: str, mode: str, data: st.DataObject) -> None:
    assert_convolution_agrees(data.draw(convolved(mode)), mode, backend)


@every_backend
@given(case=convolved("constant", crops=True))
def test_a_convolution_of_what_negative_padding_leaves(backend: str, case: Padded) -> None:
    assert_convolution_agrees(case, "constant", backend)


@every_backend
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (0, -1, 0, -1), (0, 2, 0, -1), (0, 0, 0, 0)])
def test_a_convolution_of_single_pixels_reads_padding_below_and_to_the_right(
    backend: str, sides: Sides, full: bool
) -> None:
    """Its window begins where the map begins, and yet its output is of another size."""
    mask, weight, bias = torch.rand(2, 4, 5) < 0.5, weights(3, 4, 1, 1), weights(3)
    assert_agrees(
        lambda x: F.conv2d(F.pad(x, sides), weight, bias),
        backend, mask, image(mask), full=full, leaves=[weight, bias],
    )  # fmt: skip


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_a_transposed_convolution_of_single_pixels_with_output_padding(storage: str, full: bool) -> None:
    mask, weight = torch.rand(2, 4, 5) < 0.5, weights(4, 3, 1, 1)
    assert_agrees(
        lambda x: F.conv_transpose2d(x, weight, output_padding=1, dilation=2),
        storage, mask, image(mask), full=full, leaves=[weight],
    )  # fmt: skip


@every_storage
def test_an_inactive_pixel_is_reflected_as_zero_and_an_active_one_as_it_is(storage: str) -> None:
    """By hand, with numbers: the mirror of column 1 lies before column 0."""
    x = torch.tensor([[[[5.0, 7.0, 9.0]]]]).double()
    taps = torch.tensor([[[[1.0, 10.0, 100.0]]]]).double()
    for active, expected in (([1, 1, 0], [757, 75, 0]), ([1, 0, 1], [50, 0, 90])):
        mask = torch.tensor([[active]]).bool()
        guided = F.conv2d(F.pad(guide(x, select(mask, storage)), (1, 1, 0, 0), mode="reflect"), taps)
        assert_equal(guided.dense("the test"), torch.tensor([[[expected]]]).double())


@every_storage
@every_mode
def test_gradcheck(storage: str, mode: str) -> None:
    mask = torch.arange(12).view(1, 3, 4) % 3 > 0

    def function(x: Tensor, weight: Tensor) -> Tensor:
        features = guide(x * 1, select(mask, storage))
        return F.conv2d(F.pad(features, (1, 2, 0, 1), mode), weight, stride=(1, 2)).dense("the test")

    assert torch.autograd.gradcheck(function, (image(mask, 2), weights(2, 2, 2, 3)))


@every_storage
@given(mask=small_masks(), full=st.booleans(), kernel=pairs, stride=pairs, dilation=pairs)
def test_tensorflow_same(storage: str, mask: Tensor, full: bool, kernel: Pair, stride: Pair, dilation: Pair) -> None:
    """As timm has it: the padding comes of the size that the map says it has."""
    weight = weights(5, 4, *kernel)

    def function(x: Tensor) -> Tensor:
        return F.conv2d(pad_same(x, list(kernel), list(stride), list(dilation)), weight, None, stride, 0, dilation)

    assert_agrees(function, storage, mask, image(mask), full=full, leaves=[weight])


@every_storage
@pytest.mark.parametrize(("width", "mode"), [(3, "reflect"), (4, "reflect"), (5, "replicate"), (3, "constant")])
@given(mask=strategies.masks(2, (6, 7)), full=st.booleans())
def test_blur_pooling(storage: str, width: int, mode: str, mask: Tensor, full: bool) -> None:
    blur = BlurPool2d(4, filt_size=width, pad_mode=mode).double()
    assert_agrees(blur, storage, mask, image(mask), full=full)


# -- before pooling ----------------------------------------------------------------------------------------------


@st.composite
def pooled(draw: DrawFn, kind: str, crops: bool = False) -> Padded:
    """Whatever pooling of a padded map stays guided."""
    mode = "constant" if crops else draw(st.sampled_from(["constant", "constant", "reflect", "replicate", "circular"]))
    mask = draw(small_masks())
    size: Pair = (mask.shape[1], mask.shape[2])
    sides = draw(paddings(size, mode, crops))
    size = padded(size, sides)
    kernel, dilation = draw(kernels(size, 4))
    number = draw(st.sampled_from([0.0, -torch.inf, 0.75])) if kind == "max" else 0.0
    arguments: dict[str, Any] = {"kernel_size": kernel, "stride": draw(st.one_of(st.none(), pairs))}
    if kind == "max":
        arguments["dilation"] = dilation
    else:
        arguments["count_include_pad"] = draw(st.booleans())
        arguments["divisor_override"] = draw(st.one_of(st.none(), st.integers(1, 9)))
    if mode == "constant" and number == (-torch.inf if kind == "max" else 0) and min(sides) >= 0:
        # What is padded twice with the same.
        arguments["ceil_mode"] = draw(st.booleans())
        arguments["padding"] = tuple(draw(st.integers(0, taps // 2)) for taps in kernel)
    return mask, draw(st.booleans()), sides, {"mode": mode, "value": number, "pool": arguments}


def assert_pooling_agrees(case: Padded, kind: str, sign: str, storage: str) -> None:
    mask, full, sides, reads = case
    x = image(mask, 2)
    x = (-x.abs()).detach().requires_grad_() if sign == "negative" else x
    value = {"value": reads["value"]} if reads["mode"] == "constant" else {}
    pool = F.max_pool2d if kind == "max" else F.avg_pool2d

    def function(x: Tensor) -> Tensor:
        return pool(F.pad(x, sides, reads["mode"], **value), **reads["pool"])

    assert_agrees(function, storage, mask, x, full=full)


@every_storage
@pytest.mark.parametrize(("kind", "sign"), [("max", "mixed"), ("max", "negative"), ("avg", "mixed")])
@given(data=st.data())
def test_pooling_reads_padding_as_part_of_its_window(storage: str, kind: str, sign: str, data: st.DataObject) -> None:
    """Where every active value is negative, zero padding wins the maximum and padding by -∞ does not."""
    assert_pooling_agrees(data.draw(pooled(kind)), kind, sign, storage)


@every_storage
@pytest.mark.parametrize("kind", ["max", "avg"])
@given(data=st.data())
def test_pooling_of_what_negative_padding_leaves(storage: str, kind: str, data: st.DataObject) -> None:
    assert_pooling_agrees(data.draw(pooled(kind, crops=True)), kind, "mixed", storage)


@every_storage
def test_padding_counts_as_pixels_and_the_own_padding_as_asked(storage: str) -> None:
    """By hand: PyTorch's average counts what `F.pad` has put there even under `count_include_pad=False`."""
    mask, x = torch.tensor([[[True, False]]]), torch.full((1, 1, 1, 2), 12.0).double()
    around = F.pad(guide(x, select(mask, storage)), (1, 0, 0, 0))
    for own, count_include_pad, expected in ((0, False, 6), (1, False, 6), (1, True, 2)):
        # Of three pixels, then with the own padding around them; the window of the first output is 2 or 3 wide.
        pooled = F.avg_pool2d(around, (1 + 2 * own, 2), (1, 2), (own, 0), count_include_pad=count_include_pad)
        assert pooled.shape == (1, 1, 1, 1)
        assert_equal(pooled.dense("the test"), torch.full((1, 1, 1, 1), expected).double())


@every_storage
@given(mask=strategies.masks(size=(7, 6)), full=st.booleans())
def test_the_paths_of_nasnet(storage: str, mask: Tensor, full: bool) -> None:
    """Its second path reads every second pixel, one to the right and below: it pads there and crops on the other side
    by one module, or by two operations."""
    shifted = nn.Sequential(nn.ZeroPad2d((-1, 1, -1, 1)), nn.AvgPool2d(1, 2, count_include_pad=False))
    plain = nn.AvgPool2d(1, 2, count_include_pad=False)
    first, second = weights(3, 4, 1, 1), weights(2, 4, 1, 1)

    def function(x: Tensor) -> Tensor:
        return torch.cat([F.conv2d(plain(x), first), F.conv2d(shifted(x), second)], 1)

    coarse, x = select(mask).mask((4, 3)), image(mask)
    result = function(guide(x * 1, select(mask, storage), full=full))
    read = x if full else keep(x, mask)
    expected = torch.cat([F.conv2d(keep(pool(read), coarse), w) for pool, w in ((plain, first), (shifted, second))], 1)
    assert_guided(result, expected)
    found = gradients(result.dense("the test"), [x, first, second])
    for actual, wanted in zip(found, gradients(keep(expected, coarse), [x, first, second]), strict=True):
        assert_equal(actual, wanted)


@every_storage
@given(mask=strategies.masks(size=(7, 6)), full=st.booleans())
@pytest.mark.parametrize(
    "crop", [lambda x: x[:, :, 1:, 1:], lambda x: x[:, :, ::2, ::2]], ids=["shift", "every second"]
)
def test_a_crop_is_a_map_like_any_other(
    storage: str, crop: Callable[[Tensor], Tensor], mask: Tensor, full: bool
) -> None:
    """Padded and convolved: what is kept of the crop is what its size's mask has."""
    x, weight = image(mask), weights(3, 4, 3, 3)
    result = F.conv2d(F.pad(crop(guide(x * 1, select(mask, storage), full=full)), (1, 1, 1, 1), "reflect"), weight)
    cropped = crop(x if full else keep(x, mask))
    sites = select(mask).mask((cropped.shape[2], cropped.shape[3]))
    expected = F.conv2d(F.pad(keep(cropped, sites), (1, 1, 1, 1), "reflect"), weight)
    assert_guided(result, expected)
    found, right = (gradients(each, [x, weight]) for each in (result.dense("the test"), keep(expected, sites)))
    for actual, wanted in zip(found, right, strict=True):
        assert_equal(actual, wanted)


# -- padding twice, and channels -----------------------------------------------------------------------------------


@every_storage
@given(mask=small_masks(), full=st.booleans(), first=st.tuples(*[st.integers(0, 2)] * 4), own=st.integers(0, 1))
def test_zeros_around_zeros_are_one_padding(storage: str, mask: Tensor, full: bool, first: Sides, own: int) -> None:
    weight = weights(3, 4, 1, 2)

    def function(x: Tensor) -> list[Tensor]:
        x = F.pad(F.pad(x, first), (1, 0, 2, 1))
        return [F.conv2d(x, weight, padding=own), F.avg_pool2d(F.pad(x, (0, 1)), 2, 1, own)]

    assert_agrees(function, storage, mask, image(mask), full=full, leaves=[weight])


@every_storage
@given(mask=small_masks(), full=st.booleans(), channels=st.tuples(st.integers(-2, 3), st.integers(-1, 3)))
@example(mask=torch.zeros(2, 3, 4).bool(), full=False, channels=(-1, 1))
def test_channels_are_padded_at_once_and_pixels_later(storage: str, mask: Tensor, full: bool, channels: Pair) -> None:
    weight = weights(3, 4 + sum(channels), 3, 2)

    def function(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 0, 1, 1, *channels)), weight, stride=2)

    assert_agrees(function, storage, mask, image(mask), full=full, leaves=[weight])


class ShortcutA(nn.Module):
    """ResNet's parameter-free shortcut: every second pixel, and channels of zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.before = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.down, self.last = nn.Conv2d(4, 7, 3, 2, 1), nn.Conv2d(7, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x)).relu()
        return self.last(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)))


@every_backend
def test_a_shortcut_without_parameters(backend: str) -> None:
    model, x, mask = ShortcutA().double(), torch.randn(2, 3, 16, 24).double(), blobs(2, (8, 12))
    selective = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=x)
    assert sparsenet.plan(selective).guided_conv_share == 1
    assert not sparsenet.plan(selective).exits, str(sparsenet.plan(selective))
    coarse = at_size(mask, (4, 6))
    before = keep(model.before(model.stem(x)).relu(), mask)
    shortcut = F.pad(before[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
    expected = keep(model.last(keep(model.down(before) + shortcut, coarse)), coarse)
    assert_equal(selected(selective, x, mask, backend), expected)


# -- what leaves -------------------------------------------------------------------------------------------------

PADDED = "reads a padded map"
TWICE = "pads a padded map in another way"
ANOTHER = "pools a map padded by another number"
WEIGHT = torch.linspace(-1, 1, 32).double().view(2, 4, 2, 2).cos()
ODD = torch.linspace(-1, 2, 72).double().view(2, 4, 3, 3).cos()


def reflecting(make: Callable[..., nn.Conv2d], inputs: int = 4, own: int = 1) -> nn.Conv2d:
    """A convolution with padding of its own that is not zero."""
    conv = make(inputs, 2, 2, padding=own, padding_mode="reflect", bias=False)
    conv.weight = nn.Parameter(WEIGHT[:, :1].expand(-1, inputs, -1, -1), requires_grad=False)
    return conv


def masked(*args: Any, **kwargs: Any) -> MaskedConv2d:
    return MaskedConv2d.guide(nn.Conv2d(*args, **kwargs), "conv", (1, 1))


LEAVING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "own padding on reflected": (lambda x: F.conv2d(F.pad(x, (1, 1, 1, 0), "reflect"), WEIGHT, padding=1), TWICE),
    "own padding by words": (lambda x: F.conv2d(F.pad(x, (1, 1, 1, 0), "circular"), ODD, padding="same"), TWICE),
    "own padding on a crop": (lambda x: F.conv2d(F.pad(x, (-1, 1)), WEIGHT, padding=1), TWICE),
    "own reflection on zeros": (lambda x: reflecting(masked)(F.pad(x, (1, 1))), TWICE),
    "own reflection on reflected": (lambda x: reflecting(masked)(F.pad(x, (1, 1, 1, 0), "reflect")), TWICE),
    "own reflection by two functions": (lambda x: reflecting(nn.Conv2d)(F.pad(x, (1, 1))), TWICE),
    "channels last, a module": (
        lambda x: reflecting(masked, 6)(x.permute(0, 2, 3, 1)),
        "pads a map laid out as NHWC, or its batch",
    ),
    "another number, a module": (
        lambda x: reflecting(masked, own=0)(F.pad(x, (1, 1, 1, 0), value=2.0)),
        "reads a map padded by another number than zero",
    ),
    "another number, a convolution": (
        lambda x: F.conv2d(F.pad(x, (1, 1, 1, 0), value=2.0), WEIGHT),
        "reads a map padded by another number than zero",
    ),
    "another number, an average": (lambda x: F.avg_pool2d(F.pad(x, (1, 1), value=2.0), 2), ANOTHER),
    "-∞, an average": (lambda x: F.avg_pool2d(F.pad(x, (1, 1), value=-torch.inf), 2), ANOTHER),
    "ceil_mode after zeros": (lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2, ceil_mode=True), ANOTHER),
    "own padding after zeros": (lambda x: F.max_pool2d(F.pad(x, (1, 1)), 3, 2, 1), TWICE),
    "own padding after a crop": (lambda x: F.avg_pool2d(F.pad(x, (-1, 1)), 3, 2, 1), TWICE),
    "own padding after reflection": (lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 0), "reflect"), 3, 2, 1), TWICE),
    "ceil_mode after a crop": (lambda x: F.avg_pool2d(F.pad(x, (-1, 0)), 3, 2, ceil_mode=True), TWICE),
    "ceil_mode after replication": (
        lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 0), "replicate"), 3, 2, ceil_mode=True),
        TWICE,
    ),
    "an activation": (lambda x: F.relu(F.pad(x, (1, 1))), PADDED),
    "an activation of reflected": (lambda x: F.pad(x, (0, 0, 2, 1), "reflect").sigmoid(), PADDED),
    "a softmax over channels": (lambda x: F.pad(x, (1, 1)).softmax(1), PADDED),
    "a number": (lambda x: F.pad(x, (1, 1), value=3.0) + 1, PADDED),
    "a map": (lambda x: F.pad(x, (1, 0, 1, 0)) * F.pad(x, (0, 1, 0, 1)), PADDED),
    "a map of its size": (lambda x: F.pad(x, (1, -1)) - x, PADDED),
    "concatenation": (lambda x: torch.cat([F.pad(x, (1, 1, 0, 1)), F.pad(x, (2, 0, 1, 0), "circular")], 1), PADDED),
    "a norm": (lambda x: F.group_norm(F.pad(x, (1, 1)), 2), PADDED),
    "channels last": (lambda x: F.pad(x, (1, 1)).permute(0, 2, 3, 1), PADDED),
    "tokens": (lambda x: F.pad(x, (1, 1)).flatten(2), "merges or splits pixels"),
    "a part": (
        lambda x: F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:],
        "takes dimensions that are not there, or pixels of padding",
    ),
    "half of the channels": (lambda x: F.pad(x, (1, 1)).chunk(2, 1)[1], "cuts the batch or the map, not channels"),
    "a resize": (lambda x: F.interpolate(F.pad(x, (1, 1)), scale_factor=2.0), PADDED),
    "a transposed convolution": (lambda x: F.conv_transpose2d(F.pad(x, (1, 1)), WEIGHT.transpose(0, 1)), PADDED),
    "a mean": (lambda x: F.pad(x, (1, 1), value=1.0).mean((2, 3)), PADDED),
    "reflection of zeros": (lambda x: F.pad(F.pad(x, (1, 1)), (1, 1, 0, 2), "reflect"), TWICE),
    "zeros around reflected": (lambda x: F.pad(F.pad(x, (1, 1, 1, 0), "reflect"), (1, 1)), TWICE),
    "zeros around another number": (lambda x: F.pad(F.pad(x, (1, 1), value=1.0), (1, 1)), TWICE),
    "zeros around a crop": (lambda x: F.pad(F.pad(x, (-1, 0)), (1, 1)), TWICE),
    "a crop of zeros": (lambda x: F.pad(F.pad(x, (1, 1)), (-1, 0)), TWICE),
    "channels of a padded map": (lambda x: F.pad(F.pad(x, (1, 1)), (0, 0, 0, 0, 1, 0)), "pads channels in another way"),
    "padding of channels last": (
        lambda x: F.pad(x.permute(0, 2, 3, 1), (1, 1)),
        "pads a map laid out as NHWC, or its batch",
    ),
    "the batch": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "pads a map laid out as NCHW, or its batch"),
}
MASK = torch.arange(84).view(2, 6, 7) % 3 > 0


@every_storage
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", LEAVING)
def test_what_cannot_be_a_window_leaves_as_the_padded_tensor(storage: str, name: str, full: bool) -> None:
    function, reason = LEAVING[name]
    x, record = image(MASK), recorder()
    result = function(guide(x * 1, select(MASK, storage, record=record), full=full))
    expected = function(keep(x, MASK))
    assert_equal(result, expected)
    assert_equal(gradients(result, [x])[0], gradients(expected, [x])[0])
    assert [(operation.status, operation.reason) for operation in record.operations] == [("exit", reason)]
    with pytest.raises(RuntimeError, match="leaves the guided region") as raised:
        function(guide(x * 1, select(MASK, storage, strict=True), full=full))
    assert reason in str(raised.value)


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_a_reduction_reads_the_padded_tensor(storage: str, full: bool) -> None:
    x, record = image(MASK), recorder()
    features = F.pad(guide(x * 1, select(MASK, storage, record=record), full=full), (1, 0, 2, 1), value=0.5)
    expected = F.pad(keep(x, MASK), (1, 0, 2, 1), value=0.5)
    for reduce in (lambda x: x.amax((2, 3)), lambda x: x.sum(1), lambda x: x.std()):
        assert_equal(reduce(features), reduce(expected))
        assert_equal(gradients(reduce(features), [x])[0], gradients(reduce(expected), [x])[0])
    assert {operation.status for operation in record.operations} == {"reduction"}


@every_storage
@pytest.mark.parametrize("step", [F.relu_, lambda x: x.add_(1), lambda x: x[:, :2].zero_(), lambda x: x.mul_(x)])
def test_a_write_to_a_padded_map_raises(storage: str, step: Callable[[Tensor], Any]) -> None:
    """There is no memory that holds the padding, and a write to another copy would be lost."""
    features = F.pad(guide(image(MASK).detach(), select(MASK, storage)), (1, 1))
    with pytest.raises(RuntimeError, match="would"):
        step(features)
        F.max_pool2d(features, 2)


# -- in models ---------------------------------------------------------------------------------------------------

READING = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)
# What comes behind a stem of 4 channels at 9 x 12.
MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "zeros": lambda: [
        *(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(4, 6, 3, 2), nn.ReLU()),
        *(nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(6, 5, (3, 2), padding=(0, 1), groups=1)),
    ],
    "reflection": lambda: [
        *(nn.ReflectionPad2d((1, 2, 1, 1)), nn.Conv2d(4, 6, 3, 2), nn.ReLU()),
        *(nn.ReflectionPad2d(2), nn.Conv2d(6, 4, 3, dilation=2, groups=2)),
    ],
    "replication": lambda: [nn.Conv2d(4, 6, 3, padding=1), nn.ReplicationPad2d((0, 3, 2, 1)), nn.Conv2d(6, 6, (4, 3))],
    "circular": lambda: [
        nn.CircularPad2d(1),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.CircularPad2d((0, 1, 1, 0)),
        nn.Conv2d(6, 2, 2),
    ],
    "same": lambda: [
        *(Conv2dSame(4, 6, 3, 2), nn.ReLU(), MaxPool2dSame(3, 2), Conv2dSame(6, 4, 2), AvgPool2dSame(2, 2)),
    ],
    "blur": lambda: [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        BlurPool2d(6),
        nn.Conv2d(6, 4, 3, padding=1),
        BlurPool2d(4, 4),
    ],
    "maximum": lambda: [
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ConstantPad2d(1, -torch.inf), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1), nn.Conv2d(6, 3, 1)),
    ],
    "crop": lambda: [
        *(nn.Conv2d(4, 6, 1), nn.ZeroPad2d((-1, 1, -1, 1)), nn.AvgPool2d(1, 2, count_include_pad=False)),
        nn.Conv2d(6, 4, 3, padding=1),
    ],
    "padded output": lambda: [nn.Conv2d(4, 6, 3, padding=1), nn.ReflectionPad2d((2, 0, 1, 1))],
}


def selected(model: nn.Module, x: Tensor, mask: Tensor, backend: str) -> Tensor:
    with sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        result: Tensor = model(x)
    return result


def by_hand(model: nn.Sequential, x: Tensor, mask: Tensor) -> Tensor:
    """Whatever reads over space is kept at the active pixels of its output's size; the first reads every pixel."""
    selection, x = select(mask), model[0](x)
    for module in model[1:]:
        x = module(x)
        x = keep(x, selection.mask((x.shape[2], x.shape[3]))) if isinstance(module, READING) else x
    return x


@pytest.mark.parametrize("name", MODELS)
def test_padding_modules_in_a_selective_model(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), *MODELS[name]()).double().eval()
    x = torch.randn(2, 3, 18, 23, dtype=torch.float64)
    selective = sparsenet.selectify(model, at="0", selector=GivenMask(), example_inputs=x)
    plan = sparsenet.plan(selective)
    assert plan.guided_conv_share == 1, str(plan)
    assert not plan.exits, str(plan)
    parameters = dict(model.named_parameters())
    for mask in (blobs(2, (9, 12)), torch.zeros(2, 9, 12).bool(), torch.ones(2, 9, 12).bool()):
        expected = by_hand(model, x, mask)
        wanted = gradients(expected, [*parameters.values()])
        if mask.all():
            assert_equal(expected, model(x))
        for backend in ("auto", "reference", *backends.BACKENDS):
            result = selected(selective, x, mask, backend)
            assert_equal(result, expected)
            found = gradients(result, [selective.get_parameter(each) for each in parameters])
            for actual, gradient in zip(found, wanted, strict=True):
                assert_equal(actual, gradient)


# -- transposed convolution --------------------------------------------------------------------------------------


@st.composite
def transposed(draw: DrawFn) -> tuple[Tensor, bool, tuple[int, ...], bool, dict[str, Any]]:
    """A mask, whether the map is full, the weight's shape, whether there is a bias, and the geometry."""
    mask = draw(small_masks())
    groups = draw(st.sampled_from([1, 2, 4]))
    stride, dilation, pads, more, kernel = [], [], [], [], []
    for length in mask.shape[1:]:
        stride.append(draw(st.integers(1, 3)))
        dilation.append(draw(st.integers(1, 3)))
        kernel.append(draw(st.integers(1, 4)))
        more.append(draw(st.integers(0, max(stride[-1], dilation[-1]) - 1)))
        whole = (length - 1) * stride[-1] + dilation[-1] * (kernel[-1] - 1) + 1 + more[-1]
        pads.append(draw(st.integers(0, min(3, (whole - 1) // 2))))
    geometry = {
        "stride": tuple(stride),
        "padding": tuple(pads),
        "output_padding": tuple(more),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    shape = (4, draw(st.integers(1, 3)), *kernel)
    return mask, draw(st.booleans()), shape, draw(st.booleans()), geometry


@every_backend
@given(case=transposed())
def test_equals_the_dense_transposed_convolution_and_so_do_its_gradients(
    backend: str, case: tuple[Tensor, bool, tuple[int, ...], bool, dict[str, Any]]
) -> None:
    mask, full, shape, biased, geometry = case
    weight = weights(*shape)
    bias = weights(shape[1] * geometry["groups"]) if biased else None

    def function(x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, **geometry)

    leaves = [weight] if bias is None else [weight, bias]
    assert_agrees(function, backend, mask, image(mask), full=full, leaves=leaves)


@every_storage
def test_the_transpose_is_the_adjoint_of_the_convolution(storage: str) -> None:
    """<Ax, y> = <x, Aᵀy>, which ties the taps' order to that of `conv2d`."""
    mask, weight = torch.ones(1, 5, 6).bool(), weights(4, 3, 3, 2).detach()
    x, y = torch.randn(1, 3, 10, 7).double(), torch.randn(1, 4, 5, 6).double()
    result = F.conv_transpose2d(
        guide(y, select(mask, storage)), weight, stride=(2, 1), padding=(1, 0), output_padding=(1, 0)
    )
    forward = F.conv2d(x, weight, stride=(2, 1), padding=(1, 0))
    assert_equal((result.dense("the test") * x).sum(), (y * forward).sum())


@every_storage
def test_a_finer_size_has_the_nearest_mask(storage: str) -> None:
    mask, x = torch.tensor([[[True, False]]]), torch.ones(1, 1, 1, 2).double()
    result = F.conv_transpose2d(
        guide(x, select(mask, storage)), torch.ones(1, 1, 2, 4).double(), stride=2, padding=(0, 1)
    )
    assert_equal(result.dense("the test"), torch.tensor([[[[1.0, 1, 0, 0]] * 2]]).double())


@every_storage
@pytest.mark.parametrize(
    "options",
    [
        {"output_padding": 1},
        {"padding": 3},
        {"stride": 2, "output_padding": 2},
        {"groups": 3},
        {"bias": torch.ones(1).double()},
        {"bias": torch.ones(5).double()},
        {"weight": torch.ones(5, 3, 2, 2).double()},
    ],
    ids=str,
)
def test_what_the_dense_transposed_convolution_refuses_is_refused(storage: str, options: dict[str, Any]) -> None:
    mask = torch.ones(1, 3, 4).bool()
    arguments = {"weight": torch.ones(4, 3, 2, 2).double(), **options}
    for x in (image(mask), guide(image(mask), select(mask, storage))):
        with pytest.raises(RuntimeError):
            F.conv_transpose2d(x, **arguments)


@every_storage
def test_multiply_accumulates_of_a_transposed_convolution(storage: str) -> None:
    """Where stride and kernel fit, each output pixel is a single tap's product."""
    record, mask = recorder(), torch.arange(12).view(1, 3, 4) % 3 > 0
    F.conv_transpose2d(guide(image(mask), select(mask, storage, record=record)), weights(4, 5, 2, 2), stride=2)
    (operation,) = record.operations
    assert (operation.name, operation.status, operation.size) == ("conv_transpose2d", "guided", (6, 8))
    assert (operation.macs, operation.dense_macs) == (int(mask.sum()) * 4 * 4 * 5, 12 * 4 * 4 * 5)


class UNet(nn.Module):
    """Skip connections from the dense trunk, at the size of the images, and from two guided maps."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.mid, self.low = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.bottom = nn.Conv2d(8, 8, 3, 2, 1)
        self.up_low = nn.ConvTranspose2d(8, 8, (2, 3), 2, (0, 1))
        self.up_mid = nn.ConvTranspose2d(8, 6, 3, 2, 1, groups=2, bias=False)
        self.up_fine = nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=(0, 1))
        self.at_low, self.at_mid = nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(12, 6, 3, 1, 1)
        self.last = nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        mid = self.mid(fine).relu()
        low = self.low(mid).relu()
        x = self.at_low(torch.cat([self.up_low(self.bottom(low)), low], 1)).relu()
        x = self.at_mid(torch.cat([self.up_mid(x), mid], 1)).relu()
        return self.last(torch.cat([self.up_fine(x), fine], 1))


@pytest.fixture(scope="module")
def unets() -> tuple[UNet, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = UNet().double().eval(), torch.randn(2, 3, 13, 18, dtype=torch.float64)
    return model, sparsenet.selectify(model, "mid", selector=GivenMask(), example_inputs=x), x


@every_backend
def test_a_u_net_by_hand(unets: tuple[UNet, nn.Module, Tensor], backend: str) -> None:
    """And the gradients of all parameters. The finer size's mask is the entry mask's nearest."""
    model, selective, x = unets
    assert sparsenet.plan(selective).guided_conv_share == 1
    assert not sparsenet.plan(selective).exits, str(sparsenet.plan(selective))
    mask = blobs(2, (7, 9))
    at_fine = F.interpolate(mask[:, None].double(), (13, 18), mode="nearest") > 0
    at_low, at_bottom = at_size(mask, (4, 5)), at_size(mask, (2, 3))
    fine = model.fine(x).relu()
    mid = model.mid(fine).relu()  # the entry: what reads it first reads every pixel
    low = keep(model.low(mid).relu(), at_low)
    up = keep(model.up_low(keep(model.bottom(low), at_bottom)), at_low)
    y = keep(model.at_low(torch.cat([up, low], 1)).relu(), at_low)
    y = keep(model.at_mid(torch.cat([keep(model.up_mid(y), mask), keep(mid, mask)], 1)).relu(), mask)
    up = keep(model.up_fine(y), at_fine)
    expected = keep(model.last(torch.cat([up, keep(fine, at_fine)], 1)), at_fine)
    result = selected(selective, x, mask, backend)
    assert_equal(result, expected)
    names = [name for name, _ in model.named_parameters()]
    found, wanted = (
        gradients(y, [m.get_parameter(name) for name in names]) for y, m in ((result, selective), (expected, model))
    )
    for actual, gradient in zip(found, wanted, strict=True):
        assert_equal(actual, gradient)


@every_backend
def test_a_u_net_whose_every_pixel_is_active_is_the_original(
    unets: tuple[UNet, nn.Module, Tensor], backend: str
) -> None:
    model, selective, x = unets
    assert_equal(selected(selective, x, torch.ones(2, 7, 9).bool(), backend), model(x))


@pytest.mark.parametrize("kind", strategies.MASKS)
def test_a_u_net_in_both_storages(unets: tuple[UNet, nn.Module, Tensor], kind: str) -> None:
    _, selective, x = unets

    @given(mask=strategies.masks(2, (7, 9), kind))
    @settings(max_examples=5)
    def check(mask: Tensor) -> None:
        with torch.no_grad():
            reference, rows = (selected(selective, x, mask, storage) for storage in STORAGES)
        assert_equal(rows, reference)

    check()
