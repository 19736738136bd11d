"""Masked convolutions and frozen networks on a GPU: `make gpu`. On CPU the same properties are tested by way of
Triton's interpreter and the other backends."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import sparsenet
from sparsenet.backends import choice, spconv
from tests import strategies
from tests.helpers import gradients, guide, keep, select
from tests.models import SmallNet, with_lively_norms
from tests.rules.test_conv import masked
from tests.strategies import Conv

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_backend = pytest.mark.parametrize("backend", ["auto", "triton", "spconv", "rows", "reference"])


@pytest.fixture(params=["highest", "high"], autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Single precision as it is, and TF32, of matrix products and of cuDNN, which is what they are compared with."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(request.param)
    torch.backends.cudnn.allow_tf32 = request.param == "high"
    yield request.param
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def assert_as_precise(found: Tensor, plain: Tensor, truth: Tensor, absolute: Tensor, terms: int) -> None:
    """The error is at most four times the dense operation's on the same device, or what rounding each factor and sum
    may add up to, and two units in the last place of the largest result."""
    unit = 2.0**-10 if plain.dtype is torch.float32 and torch.backends.cudnn.allow_tf32 else 2.0**-23
    rounding = unit * terms**0.5 * absolute.abs().max() + torch.finfo(plain.dtype).eps * truth.abs().max() / 2
    allowed = 4 * torch.maximum((plain.double() - truth).abs().max(), rounding)
    assert (found.double() - truth).abs().max() <= allowed


Case = tuple[Conv, Tensor, bool]


@every_backend
@every_dtype
@given(case=strategies.masked_convolutions())
def test_as_precise_as_cudnn(backend: str, dtype: torch.dtype, case: Case) -> None:
    conv, mask, full = case
    module, x, mask = conv.module(dtype).cuda(), conv.input(dtype).cuda(), mask.cuda()
    read = x if full else keep(x, mask)
    with torch.no_grad():
        result = masked(module)(guide(x, select(mask, backend), full=full))
        kept = result.selection.mask(result.grid)
        double, absolute = copy.deepcopy(module).double(), copy.deepcopy(module).double()
        for parameter in absolute.parameters():
            parameter.abs_()
        truth, plain = keep(double(read.double()), kept), keep(module(read), kept)
        assert result.dtype == plain.dtype
        found = result.dense("the test")
        assert_as_precise(found, plain, truth, absolute(read.double().abs()), conv.products)


@pytest.mark.parametrize("backend", ["triton", "rows"])
@given(case=strategies.masked_convolutions())
def test_gradients_in_double_precision(backend: str, case: Case) -> None:
    conv, mask, full = case
    module, mask = conv.module().cuda(), mask.cuda()
    x = conv.input().cuda().requires_grad_()
    result = masked(module)(guide(x, select(mask, backend), full=full))
    expected = keep(module(x if full else keep(x, mask)), result.selection.mask(result.grid))
    torch.testing.assert_close(result.dense("the test"), expected, rtol=1e-9, atol=1e-9)
    leaves = [x, *module.parameters()]
    for found, wanted in zip(gradients(result.dense("t"), leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@every_dtype
def test_layers_of_the_size_of_networks(dtype: torch.dtype) -> None:
    """Tuned block sizes, many programs, and equal runs."""
    module = nn.Conv2d(256, 256, 3, padding=1, device="cuda", dtype=dtype)
    x, mask = torch.randn(8, 256, 38, 38, device="cuda", dtype=dtype), torch.rand(8, 38, 38, device="cuda") < 0.3

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        out = masked(module)(guide(leaves[0], select(mask, "triton"))).dense("the test")
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    first, second = run(), run()
    for found, again in zip(first, second, strict=True):
        assert torch.equal(found, again)
    with torch.no_grad():
        read, double = keep(x, mask), copy.deepcopy(module).double()
        truth, plain = keep(double(read.double()), mask), keep(module(read), mask)
        for parameter in double.parameters():
            parameter.abs_()
        assert_as_precise(first[0], plain, truth, double(read.double().abs()), 256 * 9 + 1)


@pytest.mark.parametrize("backend", ["triton", "spconv", "rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    module = nn.Conv2d(16, 24, 3, padding=1).cuda()
    x, mask = torch.randn(1, 16, 9, 9).cuda(), torch.rand(1, 9, 9).cuda() < 0.5
    with torch.autocast("cuda", dtype), torch.no_grad():
        plain, result = module(keep(x, mask)), masked(module)(guide(x, select(mask, backend)))
    assert result.dtype == plain.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.dense("the test"), keep(plain, mask), rtol=4 * eps, atol=16 * eps)


def test_auto_is_triton() -> None:
    x, selector = torch.rand(2, 3, 16, 20).cuda(), sparsenet.GivenMask()
    model = sparsenet.selectify(SmallNet().eval().cuda(), "stem", example_inputs=x, selector=selector)
    assert "triton" in str(sparsenet.plan(model))


@every_dtype
def test_a_frozen_network(dtype: torch.dtype) -> None:
    model = with_lively_norms(SmallNet()).eval().cuda()
    x = torch.rand(2, 3, 32, 32).cuda()
    selective = sparsenet.selectify(model, "stem", example_inputs=x, selector=sparsenet.GivenMask()).to(dtype)
    x = x.to(dtype)
    frozen = sparsenet.freeze(selective, x)
    mask = torch.rand(2, 8, 8).cuda() < 0.4
    with torch.no_grad(), sparsenet.use_mask(mask):
        found, plain = frozen(x), selective(x)
        with sparsenet.use_backend("reference"):
            truth = copy.deepcopy(selective).double()(x.double())
        assert torch.equal(found, frozen(x))
    error, theirs = ((each.double() - truth).abs().max() for each in (found, plain))
    assert error <= 4 * max(theirs, torch.finfo(dtype).eps * truth.abs().max())


def test_a_frozen_network_keeps_to_its_device() -> None:
    x = torch.rand(1, 3, 16, 16).cuda()
    frozen = sparsenet.freeze(SmallNet().eval().cuda(), x)
    with pytest.raises(RuntimeError, match="convert the model before"):
        frozen.cpu()
    with pytest.raises(RuntimeError):
        frozen(x.cpu())


def test_measurements_are_of_the_gpu() -> None:
    assert choice.of_this_machine(torch.device("cuda")).path != choice.of_this_machine().path


def test_reasons_of_spconv() -> None:
    weight = torch.empty(4, 4, 3, 3, device="cuda")
    assert spconv.unsupported(weight, 1) is None
    assert spconv.unsupported(weight.double(), 1) == "spconv has no torch.float64 on GPUs"
    assert spconv.unsupported(weight.bfloat16(), 1) == "spconv has no torch.bfloat16 on GPUs"


def test_two_devices() -> None:
    module, x = nn.Conv2d(3, 4, 3, padding=1), torch.rand(1, 3, 6, 6).cuda()
    with pytest.raises(RuntimeError, match="device"):
        masked(module)(guide(x, select(torch.rand(1, 6, 6).cuda() < 0.5, "triton")))
