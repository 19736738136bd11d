"""Triton's kernels against PyTorch in double precision: in the interpreter on CPU, or on a GPU (`make gpu`)."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import triton
from sparsenet.backends.epilogue import ACTIVATIONS, Epilogue
from sparsenet.kernels import triton_support
from sparsenet.sites import ActiveSites, KernelMap, Window, kernel_map
from tests import strategies

INTERPRETED = triton_support.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = [
    pytest.mark.skipif(triton_support.missing() is not None, reason=str(triton_support.missing())),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"),
]
if not INTERPRETED:
    pytestmark.append(pytest.mark.cuda)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
few = settings(max_examples=12)  # a launch takes the interpreter tens of milliseconds


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def random_table(sites: int, taps: int, inputs: int) -> Tensor:
    """Rows, inactive pixels and places outside, rows more than once among them, as replicated padding has them."""
    return torch.randint(0, inputs + 2, (sites, taps), dtype=torch.int32).to(DEVICE)


# -- convolution and its gradients -------------------------------------------------------------------------------


def dense(rows: Tensor, weight: Tensor, groups: int, table: Tensor, inputs: int) -> Tensor:
    """By PyTorch's convolution over the taps as a line."""
    beneath = torch.cat([rows[:inputs], rows.new_zeros(1, rows.shape[1])])
    read = beneath[table.long().clamp(max=inputs)].transpose(1, 2)  # (sites, C, taps)
    out: Tensor = F.conv1d(read, weight.flatten(2), groups=groups)[:, :, 0]
    return out


def unit(dtype: torch.dtype) -> float:
    """The rounding of a product's factors, or of its sum, whichever is more."""
    if dtype is torch.float64:
        return torch.finfo(dtype).eps
    return 2.0**-10 if triton_support.precision(dtype) == "tf32" else torch.finfo(torch.float32).eps


def assert_close(found: Tensor, truth: Tensor, absolute: Tensor, terms: int) -> None:
    """Sums of so many terms, of the magnitudes `absolute` in all, each rounded once; and the result's own rounding, by
    one unit in the last place, which the interpreter cuts off rather than rounds."""
    assert found.dtype in DTYPES.values() and found.shape == truth.shape
    if not found.numel():
        return  # and no largest magnitude
    allowed = 4 * unit(found.dtype) * math.sqrt(terms) * absolute.max() + torch.finfo(found.dtype).eps * truth.abs()
    error = (found.double() - truth).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


def check_convolution(dtype: torch.dtype, groups: int, each: tuple[int, int], sites: int, taps: int) -> None:
    channels, outputs = each
    inputs = 8
    rows = random(inputs + 2, groups * channels, dtype=dtype)
    rows[inputs:] = 0
    weight, bias = random(groups * outputs, channels, 1, taps, dtype=dtype), random(groups * outputs, dtype=dtype)
    table = random_table(sites, taps, inputs)
    grad = random(sites, groups * outputs, dtype=dtype)

    def both(function: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    def by_kernels(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return triton.convolve(rows, weight, bias, groups, KernelMap(table, inputs))

    def by_pytorch(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dense(rows, weight, groups, table, inputs) + bias

    operands = rows, weight, bias, grad
    found = both(by_kernels, *operands)
    truth = both(by_pytorch, *(operand.double() for operand in operands))
    absolute = both(by_pytorch, *(operand.double().abs() for operand in operands))
    terms = [channels * taps + 1, outputs * max(1, sites) * taps, max(1, sites), max(1, sites)]
    for each_found, each_truth, each_absolute, count in zip(found, truth, absolute, terms, strict=True):
        assert_close(each_found, each_truth, each_absolute, count)


sides = st.sampled_from([1, 2, 7, 16, 19])


@every_dtype
@few
@given(
    groups=st.sampled_from([1, 1, 2, 3]),
    each=st.tuples(sides, sides),
    sites=st.sampled_from([0, 1, 5, 30]),
    taps=st.sampled_from([1, 2, 9]),
)
def test_a_convolution_and_its_gradients(
    dtype: torch.dtype, groups: int, each: tuple[int, int], sites: int, taps: int
) -> None:
    check_convolution(dtype, groups, each, sites, taps)


def test_with_tf32(tf32: None) -> None:
    check_convolution(torch.float32, 1, (33, 20), 40, 9)


@pytest.mark.parametrize("groups", [1, 5])
def test_many_programs(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are smaller than what there is on every side, the last ones filled in part."""
    from sparsenet.kernels import triton_convolution, triton_gradient

    config = type(triton_convolution.product.configs[0])
    small = {"BLOCK_SITES": 16, "BLOCK_OUTPUTS": 16, "BLOCK_CHANNELS": 16}
    for module in (triton_convolution, triton_gradient):
        for kernel in (module.product, module.by_channel):
            names = {**small, "TOGETHER": 3}.items()
            chosen = {name: size for name, size in names if name in kernel.arg_names}
            monkeypatch.setattr(kernel, "configs", [config(chosen, num_warps=2, num_stages=2)])
    monkeypatch.setattr(triton_gradient, "FEWEST", 20)  # shares of few sites, the last of fewer
    check_convolution(torch.float64, groups, (1, 1) if groups > 1 else (35, 37), 93, 3)
    check_convolution(torch.float32, groups, (1, 2) if groups > 1 else (1, 37), 93, 3)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsenet.kernels import triton_convolution

    monkeypatch.setattr(triton_convolution, "WIDE", 0)
    check_convolution(torch.float64, 2, (3, 4), 20, 4)
    check_convolution(torch.float64, 3, (1, 1), 20, 4)
    check_pooling(torch.float32, "max", 5, 8, 20, 4, -math.inf, None)


def test_equal_runs_give_equal_numbers() -> None:
    rows, weight, table = (
        random(52, 20),
        random(24, 20, 3, 3),
        random_table(3000 if DEVICE.type == "cuda" else 300, 9, 50),
    )

    def run() -> list[Tensor]:
        leaves = [rows.detach().requires_grad_(), weight.detach().requires_grad_()]
        out = triton.convolve(leaves[0], leaves[1], None, 1, KernelMap(table, 50))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# -- frozen layers -----------------------------------------------------------------------------------------------

PARAMETERS = {"clamp": [(-0.3, 0.7), (0.0, math.inf), (-math.inf, math.inf)], "leaky_relu": [(0.01, 0.0)]}
CASES = [(name, *pair) for name in ACTIVATIONS for pair in PARAMETERS.get(name, [(0.0, 0.0)])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("groups", [1, 21], ids=["product", "by channel"])
@pytest.mark.parametrize(("name", "low", "high"), CASES)
def test_every_epilogue(dtype: torch.dtype, groups: int, name: str, low: float, high: float) -> None:
    channels = 1 if groups > 1 else 6
    rows, weight = random(9, groups * channels, dtype=dtype), random(21, channels, 1, 2, dtype=dtype)
    table = random_table(13, 2, 8)
    packed = triton.pack(weight, groups)
    sums = dense(rows.double(), weight.double(), groups, table, 8)
    absolute = dense(rows.double().abs(), weight.double().abs(), groups, table, 8)
    for scales, shifts, order in [(False, False, None), (True, False, "before"), (True, True, "after")]:
        scale, shift = random(21) if scales else None, random(21) if shifts else None
        residual = None if order is None else random(13, 21, dtype=dtype)
        activation = order or "before", name, low, high
        found = triton.run(rows, packed, Epilogue(scale, shift, residual, *activation), table, 8)
        parts = [None if part is None else part.double() for part in (scale, shift, residual)]
        truth = Epilogue(*parts, *activation).of(sums)
        # As if nothing cancelled, and no activation's slope is above 2; 1 is what an exponential may round.
        magnitude = 1 + 2 * Epilogue(*(None if part is None else part.abs() for part in parts)).of(absolute)
        assert_close(found, truth, magnitude, channels * 2 + 3)


@pytest.mark.parametrize(("name", "low", "high"), CASES)
def test_zero_infinity_and_nan(name: str, low: float, high: float) -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -200.0, 200.0], device=DEVICE)
    packed = triton.pack(torch.ones(1, 1, 1, 1, device=DEVICE), 1)
    found = triton.run(values[:, None], packed, Epilogue(activation=name, low=low, high=high), None, 7)[:, 0]
    truth = ACTIVATIONS[name](values.double(), low, high)
    defined = ~truth.isnan()  # -inf times 0 is no number to PyTorch, whatever the limit is
    torch.testing.assert_close(found[defined].double(), truth[defined], rtol=1e-6, atol=1e-30)
    assert found[4].isnan()


@pytest.mark.parametrize("groups", [1, 6])
def test_images_that_follow_one_another(groups: int) -> None:
    def whole(*shape: int) -> Tensor:
        """Whose sums are exact: NumPy, which interprets products, rounds them by where a row lies in a block."""
        return random(*shape).mul(4).round()

    rows, packed = whole(30, 6), triton.pack(whole(6, 6 // groups, 1, 4), groups)
    table, residual = random_table(7, 4, 10), whole(21, 6)
    found = triton.run(rows, packed, Epilogue(residual=residual), table, 10, images=3)
    for image in range(3):
        written = slice(7 * image, 7 * image + 7)
        alone = rows[10 * image : 10 * image + 10]
        expected = triton.run(alone, packed, Epilogue(residual=residual[written]), table, 10)
        assert torch.equal(found[written], expected)
    pooled = triton.pool("max", rows, table, 10, -math.inf, images=3)
    assert torch.equal(pooled[7:14], triton.pool("max", rows[10:20], table, 10, -math.inf))


def test_rows_may_be_part_of_wider_ones_and_nothing_else_is_read() -> None:
    wide = torch.full((8, 20), math.nan, device=DEVICE)
    wide[:6, 3:11] = random(6, 8)
    rows, weight = wide[:, 3:11], random(5, 8, 1, 1)
    found = triton.run(rows, triton.pack(weight, 1), Epilogue(), None, 6)
    torch.testing.assert_close(found, rows[:6] @ weight[:, :, 0, 0].T)
    table = torch.tensor([[0, 3], [5, 6], [7, 7]], dtype=torch.int32, device=DEVICE)
    pooled = triton.pool("max", rows, table, 6, -math.inf)
    assert torch.equal(pooled[0], torch.maximum(rows[0], rows[3]))
    assert torch.equal(pooled[1], rows[5].clamp(min=0))


@few
@given(
    groups=st.integers(1, 12),
    each=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strange=st.booleans(),
)
def test_packing_and_back_is_exact(groups: int, each: tuple[int, int], kernel: tuple[int, int], strange: bool) -> None:
    weight = torch.randn(groups * each[0], each[1], *kernel)
    if strange:
        weight = weight.to(memory_format=torch.channels_last)
    packed = triton.pack(weight, groups)
    before = weight.clone()
    weight.zero_()
    assert torch.equal(triton.unpack(packed), before)


# -- pooling -----------------------------------------------------------------------------------------------------


def check_pooling(
    dtype: torch.dtype,
    operation: str,
    channels: int,
    inputs: int,
    sites: int,
    taps: int,
    outside: float,
    special: float | None,
) -> None:
    rows = random(inputs + 3, channels, dtype=dtype)  # of which the last must not be read
    if special is not None:
        rows[torch.rand(rows.shape, device=DEVICE) < 0.2] = special
    rows[inputs:] = math.nan
    table = random_table(sites, taps, inputs)
    beneath = torch.stack([torch.zeros(channels), torch.full((channels,), outside if operation == "max" else 0.0)])
    read = torch.cat([rows[:inputs], beneath.to(dtype).to(DEVICE)])[table.long()]
    found = triton.pool(operation, rows, table, inputs, outside)
    if operation == "max":
        torch.testing.assert_close(found, read.amax(1), rtol=0, atol=0, equal_nan=True)
        return
    truth, absolute = read.double().sum(1), read.double().abs().sum(1)
    finite = truth.isfinite()
    torch.testing.assert_close(found[~finite].double(), truth[~finite], equal_nan=True)
    assert_close(found[finite], truth[finite], absolute[finite], taps)


@every_dtype
@pytest.mark.parametrize("operation", ["max", "sum"])
@few
@given(
    channels=st.integers(1, 40),
    inputs=st.integers(0, 9),
    sites=st.integers(0, 40),
    taps=st.integers(1, 10),
    outside=st.sampled_from([-math.inf, -2.0, 0.0, 3.0]),
    special=st.sampled_from([None, math.nan, -math.inf, math.inf]),
)
def test_pooling(
    dtype: torch.dtype,
    operation: str,
    channels: int,
    inputs: int,
    sites: int,
    taps: int,
    outside: float,
    special: float | None,
) -> None:
    check_pooling(dtype, operation, channels, inputs, sites, taps, outside, special)


# -- index arithmetic --------------------------------------------------------------------------------------------


@few
@given(mask=strategies.masks(), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), coarse=st.booleans())
def test_sites_and_kernel_maps(mask: Tensor, kernel: tuple[int, int], coarse: bool) -> None:
    from sparsenet.kernels import triton_index

    source = ActiveSites(mask)
    index, rank = triton_index.sites(mask.to(DEVICE))
    assert torch.equal(index.cpu(), source.index)
    assert torch.equal(rank.cpu(), source.rank)
    window = Window(kernel, (2, 2) if coarse else (1, 1), (kernel[0] // 2, kernel[1] // 2))
    target = ActiveSites(mask[:, ::2, ::2] if coarse else mask)
    expected = kernel_map(source, window, target)
    if DEVICE.type == "cuda":
        found = kernel_map(ActiveSites(mask.to(DEVICE)), window, ActiveSites(target.mask.to(DEVICE))).table
    else:
        places = [window.reads(axis, source.size[axis], target.size[axis], DEVICE) for axis in (0, 1)]
        lines, columns = places[0] * (source.size[1] + 1), places[1]
        flat = (lines[:, None, :, None] + columns[None, :, None, :]).reshape(-1, window.taps).int()
        found = triton_index.table(flat, target.index, source.rank)
    assert torch.equal(found.cpu(), expected.table)


# -- what is refused ---------------------------------------------------------------------------------------------


def test_reasons() -> None:
    assert triton.unsupported(torch.empty(1, 1, 1, 1, dtype=torch.complex64, device=DEVICE), 1) == (
        "its kernels compute no torch.complex64"
    )
    huge = torch.empty(1, 1, 1, 1, device=DEVICE).expand(1 << 20, 1 << 11, 1, 1)
    assert triton.unsupported(huge, 1) == "its kernels count the elements of weights by 32 bits"
    assert triton.unsupported(torch.empty(1, 1, 1, 1, device=DEVICE), 1) is None


def test_tensors_on_two_devices() -> None:
    weight, table = torch.empty(3, 4, 1, 2, device="meta"), random_table(5, 2, 6)
    with pytest.raises(RuntimeError, match=r"tensors on .* and .*: move the model and its input to one device"):
        triton.convolve(random(8, 4), weight, None, 1, KernelMap(table, 6))


def test_two_dtypes() -> None:
    with pytest.raises(RuntimeError, match=r"of torch.float32 by weights of torch.float16: convert one of them"):
        triton.convolve(
            random(8, 4), random(3, 4, 1, 2, dtype=torch.float16), None, 1, KernelMap(random_table(5, 2, 6), 6)
        )


# -- compilers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [("cuda", "90"), ("hip", "gfx942")], ids=" ".join)
def test_the_kernels_compile_for_devices_that_are_not_here(target: tuple[str, str], tmp_path: Path) -> None:
    """What the interpreter lets pass, compilers may refuse."""
    script = Path(__file__).parent / "compiled.py"
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), *target], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("of by_channel, looked_up, placed, pooled, product\n")
