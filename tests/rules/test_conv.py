"""Masked convolution against PyTorch's own on a map whose inactive pixels are zero, for every backend."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet import backends
from sparsenet.backends import rows
from sparsenet.features import Features
from sparsenet.masked_conv import MaskedConv2d
from sparsenet.rules.conv import masked_conv2d
from sparsenet.sites import KernelMap, Window
from tests import strategies
from tests.helpers import assert_equal, assert_guided, gradients, guide, keep, recorder, select
from tests.strategies import Conv

BACKENDS = ("auto", "reference", *backends.BACKENDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

Case = tuple[Conv, Tensor, bool]


def masked(module: nn.Conv2d, fill: Tensor | None = None) -> MaskedConv2d:
    """The masked convolution of the same parameters."""
    return MaskedConv2d.guide(copy.copy(module), "conv", (1, 1), fill)


def guided(module: nn.Conv2d, x: Tensor, mask: Tensor, full: bool, backend: str) -> Features:
    result = masked(module)(guide(x, select(mask, backend), full=full))
    assert not result.full
    return result


def dense(module: nn.Conv2d, x: Tensor, mask: Tensor, full: bool) -> Tensor:
    result: Tensor = module(x if full else keep(x, mask))
    return result


# -- equality --------------------------------------------------------------------------------------------------


@every_backend
@given(case=strategies.masked_convolutions())
def test_equals_the_dense_convolution_and_so_do_its_gradients(backend: str, case: Case) -> None:
    conv, mask, full = case
    module, x = conv.module(), conv.input().requires_grad_()
    result, expected = guided(module, x, mask, full, backend), dense(module, x, mask, full)
    assert_guided(result, expected)
    kept = keep(expected, result.selection.mask(result.grid))
    leaves = [x, *module.parameters()]
    for actual, wanted in zip(gradients(result.dense("the test"), leaves), gradients(kept, leaves), strict=True):
        assert_equal(actual, wanted)


@every_backend
@given(case=strategies.masked_convolutions())
def test_single_precision_is_as_precise_as_the_dense_convolution(backend: str, case: Case) -> None:
    conv, mask, full = case
    module, x = conv.module(torch.float32), conv.input(torch.float32)
    with torch.no_grad():
        result = guided(module, x, mask, full, backend)
        assert result.dtype == torch.float32
        assert_precise(result, conv, module, x if full else keep(x, mask))


def assert_precise(result: Features, conv: Conv, module: nn.Conv2d, read: Tensor) -> None:
    """The error is at most four times the dense convolution's, or what rounding each product may add up to."""
    mask = result.selection.mask(result.grid)
    double, absolute = copy.deepcopy(module).double(), copy.deepcopy(module)
    for parameter in absolute.parameters():
        parameter.abs_()
    truth = double(read.double())
    rounding = torch.finfo(torch.float32).eps * conv.products**0.5 * absolute(read.abs()).max()
    bound = 4 * max((module(read) - truth).abs().max(), rounding)
    error = (result.dense("the test") - keep(truth, mask)).abs().max()
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("wrong", ["dropped", "another row"])
def test_each_single_wrong_tap_is_caught(backend: str, wrong: str) -> None:
    """What the comparisons above would not notice, they would not test."""
    conv = Conv(1, (4, 4), 6, 5, (3, 3), (1, 1), 1, (1, 1), 1, "zeros", True)
    module, x, mask = (
        conv.module(torch.float32).requires_grad_(False),
        conv.input(torch.float32),
        torch.rand(1, 4, 4) < 0.6,
    )
    taps = (kernel_map_of(guide(x, select(mask))).table < int(mask.sum())).nonzero().tolist()
    assert len(taps) > 20
    for site, tap in taps:
        features = guide(x, select(mask, backend))
        table = kernel_map_of(features).table
        table[site, tap] = int(mask.sum()) if wrong == "dropped" else (table[site, tap] + 1) % int(mask.sum())
        result = masked(module)(features)
        with pytest.raises(AssertionError, match="error"):
            assert_precise(result, conv, module, keep(x, mask))


def kernel_map_of(features: Features) -> KernelMap:
    """The one that a 3x3 convolution will find."""
    return features.selection.kernel_map(features.grid, False, Window((3, 3), padding=(1, 1)), features.grid)


# -- properties that need no reference ---------------------------------------------------------------------------


@every_backend
@given(case=strategies.masked_convolutions())
def test_adjoint(backend: str, case: Case) -> None:
    """<Ax, y> = <x, Aᵀy>."""
    conv, mask, full = case
    module, x = conv.module(), conv.input().requires_grad_()
    module.bias = None
    result = guided(module, x, mask, full, backend).dense("the test")
    y = torch.randn_like(result)
    (transposed,) = torch.autograd.grad(result, x, y)
    scale = (result * y).abs().sum().item() + 1
    assert (result * y).sum().item() == pytest.approx((x * transposed).sum().item(), abs=1e-12 * scale)


@every_backend
@given(case=strategies.masked_convolutions(modes=["zeros"]), place=st.integers(0, 10_000))
def test_an_impulse_comes_out_as_the_kernel(backend: str, case: Case, place: int) -> None:
    """Every tap has its own weight, so that a flipped, shifted or transposed kernel shows."""
    conv, mask, full = case
    module = conv.module()
    module.bias = None
    x = torch.zeros(conv.batch, conv.inputs, *conv.size, dtype=torch.float64)
    n, c, line, column = (int(index) for index in torch.unravel_index(torch.tensor(place % x.numel()), x.shape))
    x[n, c, line, column] = 1
    result = guided(module, x, mask, full, backend)
    expected = torch.zeros(result.shape, dtype=torch.float64)
    (top, _), (left, _) = conv.pads
    group, channel = divmod(c, conv.inputs // conv.groups)
    outputs = slice(group * conv.outputs // conv.groups, (group + 1) * conv.outputs // conv.groups)
    for i in range(conv.kernel[0]):
        for j in range(conv.kernel[1]):
            y, rest_y = divmod(line + top - i * conv.dilation[0], conv.stride[0])
            z, rest_z = divmod(column + left - j * conv.dilation[1], conv.stride[1])
            if rest_y == rest_z == 0 and 0 <= y < result.grid[0] and 0 <= z < result.grid[1]:
                expected[n, outputs, y, z] = module.weight[outputs, channel, i, j].detach()
    assert_guided(result, expected if full or mask[n, line, column] else torch.zeros_like(expected))


@every_backend
def test_an_antisymmetric_kernel_has_the_sign_of_the_slope(backend: str) -> None:
    module = nn.Conv2d(1, 1, (1, 3), bias=False).double()
    module.weight.data = torch.tensor([[[[-1.0, 0, 1]]]]).double()
    ramp = torch.arange(5.0).double().expand(1, 1, 2, 5)
    result = guided(module, ramp, torch.ones(1, 2, 5).bool(), False, backend)
    assert_equal(result.dense("the test"), torch.full((1, 1, 2, 3), 2.0).double())


@pytest.mark.parametrize("inactive", [0, 1])
def test_where_every_pixel_is_active_the_dense_operation_runs(inactive: int) -> None:
    module, x, mask = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5), torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 0, :inactive] = False
    record = recorder()
    with torch.no_grad():
        result = masked(module)(guide(x, select(mask, "auto", record=record)))
        if not inactive:
            assert torch.equal(result.dense("the test"), module(x.to(memory_format=torch.channels_last)))
    (operation,) = record.operations
    assert operation.backend == ("rows" if inactive else "dense")
    assert operation.macs == (50 - inactive) * 3 * 4 * 9


# -- the backend of rows -----------------------------------------------------------------------------------------


@given(case=strategies.masked_convolutions(), chunk=st.integers(1, 200))
def test_gathering_by_chunks_changes_nothing(case: Case, chunk: int) -> None:
    conv, mask, full = case
    module, x = conv.module(), conv.input().requires_grad_()
    leaves = [x, *module.parameters()]
    whole = guided(module, x, mask, full, "rows").dense("the test")
    with mock.patch.object(rows, "CHUNK", chunk):
        parts = guided(module, x, mask, full, "rows").dense("the test")
        assert_equal(parts, whole)
        found = gradients(parts, leaves)
    for actual, wanted in zip(found, gradients(whole, leaves), strict=True):
        assert_equal(actual, wanted)


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 40), (40, 17), (40, 1), (8, 40)])
def test_many_channels_come_in_parts(inputs: int, outputs: int) -> None:
    """Products before the gather are made some output channels at a time, where these are no more than the inputs."""
    module, x = nn.Conv2d(inputs, outputs, 3, padding=1).double(), torch.randn(2, inputs, 6, 7).double()
    mask = torch.rand(2, 6, 7) < 0.5
    for chunk in (1, 1 << 21):
        with mock.patch.object(rows, "CHUNK", chunk), torch.no_grad():
            assert_guided(guided(module, x, mask, False, "rows"), dense(module, x, mask, False))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding_mode", strategies.PADDING_MODES)
def test_gradcheck(groups: int, padding_mode: str) -> None:
    conv = Conv(2, (4, 3), 4, 4, (3, 2), (2, 1), (1, 1), (1, 1), groups, padding_mode, True)
    module, x, mask = conv.module(), conv.input().requires_grad_(), torch.rand(2, 4, 3) < 0.6

    def through_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = guide(x, select(mask))
        mode = conv.padding_mode
        return masked_conv2d(x, weight, bias, conv.stride, conv.padding, groups=groups, padding_mode=mode).dense("test")

    assert torch.autograd.gradcheck(through_rows, (x, module.weight, module.bias))


# -- what surrounds the product ----------------------------------------------------------------------------------


@every_backend
@given(mask=strategies.masks(2, (8, 9)))
def test_only_the_first_guided_operation_reads_what_the_mask_hides(backend: str, mask: Tensor) -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, stride, 1) for stride in (1, 1, 2, 1))).double()
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    selective = sparsenet.selectify(model, at="0", selector=sparsenet.GivenMask(), example_inputs=x)
    expected = keep(model[1](model[0](x)), mask)
    coarse = select(mask).mask((4, 5))
    expected = keep(model[3](keep(model[2](expected), coarse)), coarse)
    with sparsenet.use_mask(mask), sparsenet.use_backend(backend):
        assert_equal(selective(x), expected)


@every_backend
def test_fill_is_what_inactive_pixels_leave_with(backend: str) -> None:
    module, x, mask = (
        nn.Conv2d(2, 3, 3, padding=1).double(),
        torch.randn(1, 2, 4, 4).double(),
        torch.rand(1, 4, 4) < 0.5,
    )
    fill = torch.tensor([1.0, -2.0, 3.0]).double()
    result = masked(module, fill)(guide(x, select(mask, backend)))
    expected = torch.where(mask[:, None], module(keep(x, mask)), fill[:, None, None])
    assert_equal(result.dense("the test"), expected)
    assert_guided(result + 0, expected)  # what is computed from it has no fill


@every_backend
def test_multiply_accumulates_are_counted_at_active_outputs(backend: str) -> None:
    mask, record = torch.rand(2, 6, 6) < 0.3, recorder()
    selection = select(mask, backend, record=record)
    masked(nn.Conv2d(4, 6, (3, 2), stride=2, groups=2))(guide(torch.randn(2, 4, 6, 6), selection))
    (operation,) = record.operations
    per_site = 6 * 4 // 2 * 3 * 2
    assert (operation.name, operation.status, operation.size) == ("conv2d", "guided", (2, 3))
    assert operation.dense_macs == 2 * 2 * 3 * per_site
    assert operation.macs == int(selection.mask((2, 3)).sum()) * per_site
    assert operation.backend == (backend if backend in ("reference", "indirect", "triton") else "rows")
    assert operation.reason == ("spconv: spconv has no grouped convolution" if backend == "spconv" else None)


@every_backend
def test_calls_of_the_function(backend: str) -> None:
    x, weight, bias = torch.randn(1, 2, 5, 5).double(), torch.randn(3, 2, 3, 3).double(), torch.randn(3).double()
    features = guide(x, select(torch.rand(1, 5, 5) < 0.5, backend), full=True)
    expected = F.conv2d(x, weight, bias, 2, 1)
    assert_guided(F.conv2d(features, weight, bias, 2, 1), expected)
    assert_guided(torch.conv2d(features, weight, bias, [2], [1]), expected)
    assert_guided(F.conv2d(input=features, weight=weight, bias=bias, stride=(2, 2), padding=(1, 1)), expected)
    assert_guided(F.conv2d(features, weight, padding="same"), F.conv2d(x, weight, padding="same"))


@every_backend
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_gives_the_dtype_of_the_dense_convolution(backend: str, bias: bool, kernel: int) -> None:
    module, x = nn.Conv2d(4, 8, kernel, padding="same", bias=bias), torch.randn(1, 4, 5, 5)
    mask = torch.rand(1, 5, 5) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = module(keep(x, mask)), guided(module, x, mask, False, backend)
        assert result.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(result.dense("the test"), keep(expected, mask), rtol=2**-6, atol=2**-4)


@every_backend
@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(1, 1, 5), (4, 4)),
        (nn.Conv2d(1, 1, 3, padding=3, padding_mode="reflect"), (3, 4)),
        (nn.Conv2d(1, 1, 3, padding=3, padding_mode="circular"), (4, 2)),
    ],
    ids=str,
)
def test_what_the_dense_convolution_refuses_is_refused(backend: str, module: nn.Conv2d, size: tuple[int, int]) -> None:
    x, mask = torch.randn(1, 1, *size), torch.ones(1, *size).bool()
    with pytest.raises(RuntimeError):
        module(x)
    with pytest.raises(RuntimeError):
        guided(module, x, mask, False, backend)
