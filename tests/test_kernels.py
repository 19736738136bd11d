"""Kernels made at run time: each activation, pooling, every size of panel, and any number of threads."""

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import epilogue, indirect
from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import layout, machine
from sparsenet.kernels.activations import ACTIVATIONS
from tests import strategies

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))

PARAMETERS = {"clamp": [(-1.0, 2.5), (0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf)], "leaky_relu": [(0.01, 0.0)]}
CASES = [(name, *pair) for name in ACTIVATIONS for pair in PARAMETERS.get(name, [(0.0, 0.0)])]
every_activation = pytest.mark.parametrize(("name", "low", "high"), CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def by_kernel(values: Tensor, name: str, low: float, high: float) -> Tensor:
    """An activation of numbers (n,): the epilogue of a convolution that gives its input back."""
    packed = indirect.pack(torch.ones(1, 1, 1, 1, dtype=values.dtype), 1)
    rows = values[:, None].contiguous()
    return indirect.run(rows, packed, Epilogue(activation=name, low=low, high=high), None, len(rows))[:, 0]


def by_pytorch(values: Tensor, name: str, low: float, high: float) -> Tensor:
    return epilogue.ACTIVATIONS[name](values, low, high)


# -- activations -------------------------------------------------------------------------------------------------


def test_an_epilogue_and_a_kernel_know_the_same_activations() -> None:
    assert ACTIVATIONS.keys() == epilogue.ACTIVATIONS.keys()


@every_activation
@pytest.mark.parametrize("sign", [1, -1])
def test_activations_are_as_precise_as_pytorchs(name: str, low: float, high: float, sign: int) -> None:
    """From 2^-130, which is subnormal, to 2^127: at each magnitude the error is at most four times PyTorch's own, at
    this magnitude or a smaller one, or four units in the last place of the true number."""
    theirs, info = 0.0, torch.finfo(torch.float32)
    for exponent in range(-130, 128):
        values = sign * torch.ldexp(1 + torch.rand(256, dtype=torch.float64), torch.tensor(exponent)).float()
        values = values.clamp(info.min, info.max)
        truth = by_pytorch(values.double(), name, low, high)
        errors = [(each(values, name, low, high).double() - truth).abs() for each in (by_kernel, by_pytorch)]
        theirs = max(theirs, errors[1].nan_to_num(posinf=0.0).max().item())
        allowed = 4 * torch.maximum(torch.tensor(theirs), info.eps * truth.abs().clamp(min=info.tiny))
        defined = errors[1].isfinite()  # PyTorch's own may overflow
        ours = (errors[0] / allowed)[defined].max().item() if defined.any() else 0.0
        assert ours <= 1, f"at {sign} * 2^{exponent}: {ours:.3g} times what is allowed, {allowed.max():.3g}"


@every_activation
def test_zero_infinity_and_nan(name: str, low: float, high: float) -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    found, truth = by_kernel(values, name, low, high), by_pytorch(values.double(), name, low, high)
    defined = ~truth.isnan()  # -inf times 0 is no number to PyTorch, whatever the limit is
    torch.testing.assert_close(found[defined].double(), truth[defined], rtol=1e-6, atol=1e-30)
    assert found[-1].isnan()


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=70),
    bounds=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)).map(sorted),
)
def test_clamp_in_double_precision_is_exact(values: list[float], bounds: list[float]) -> None:
    numbers = torch.tensor(values, dtype=torch.float64)
    found, truth = by_kernel(numbers, "clamp", *bounds), by_pytorch(numbers, "clamp", *bounds)
    assert torch.equal(found.nan_to_num(nan=1.25), truth.nan_to_num(nan=1.25))
    assert torch.equal(found.isnan(), numbers.isnan())


# -- pooling -----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("operation", ["max", "sum"])
@given(
    channels=st.integers(1, 70),
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
    rows = torch.randn(inputs + 3, channels, dtype=dtype)  # of which the last must not be read
    if special is not None:
        rows[torch.rand(rows.shape) < 0.2] = special
    rows[inputs:] = math.nan
    table = torch.randint(0, inputs + 2, (sites, taps), dtype=torch.int32)
    beneath = torch.stack([torch.zeros(channels), torch.full((channels,), outside if operation == "max" else 0.0)])
    read = torch.cat([rows[:inputs], beneath.to(dtype)])[table.long()]
    found = indirect.pool(operation, rows, table, inputs, outside)
    if operation == "max":
        torch.testing.assert_close(found, read.amax(1), rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(found, read.sum(1), rtol=1e-5, atol=1e-5, equal_nan=True)


# -- panels ------------------------------------------------------------------------------------------------------


def dense(rows: Tensor, weight: Tensor, groups: int, table: Tensor | None, inputs: int) -> Tensor:
    """What `indirect.run` is to give, by PyTorch's convolution over the taps as a line."""
    table = torch.arange(inputs)[:, None] if table is None else table.long().clamp(max=inputs)
    read = torch.cat([rows[:inputs], rows.new_zeros(1, rows.shape[1])])[table]  # (sites, taps, C)
    out: Tensor = F.conv1d(read.transpose(1, 2), weight.flatten(2), groups=groups)[:, :, 0]
    return out


def compare(rows: Tensor, weight: Tensor, groups: int, table: Tensor | None, inputs: int) -> None:
    packed = indirect.pack(weight, groups)
    found = indirect.run(rows, packed, Epilogue(), table, inputs)
    truth = dense(rows.double(), weight.double(), groups, table, inputs)
    plain = dense(rows, weight, groups, table, inputs)
    absolute = dense(rows.double().abs(), weight.double().abs(), groups, table, inputs)
    if not truth.numel():
        assert found.shape == truth.shape
        return
    products = weight[0].numel()
    rounding = torch.finfo(rows.dtype).eps * products**0.5 * absolute.max()
    allowed = 4 * torch.maximum((plain - truth).abs().max(), rounding)
    assert (found - truth).abs().max() <= allowed
    assert torch.equal(indirect.unpack(packed), weight)


@every_dtype
@given(
    groups=st.integers(1, 9),
    each=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    sites=st.sampled_from([0, 1, 2, 5, 7, 13, 30]),
    taps=st.sampled_from([1, 1, 2, 9]),
)
def test_every_size_of_panel(dtype: torch.dtype, groups: int, each: tuple[int, int], sites: int, taps: int) -> None:
    """Outputs and channels that fill vectors, panels and tiles, or leave idle lanes."""
    inputs, outputs = (max(1, number // groups) for number in each)
    rows = torch.randn(12, groups * inputs, dtype=dtype)
    weight = torch.randn(groups * outputs, inputs, 1, taps, dtype=dtype)
    table = torch.randint(0, 10, (sites, taps), dtype=torch.int32)  # nine rows, zeros, and outside
    compare(rows, weight, groups, table, 8)
    found = indirect.run(rows, indirect.pack(weight, groups), Epilogue(), table, 8)
    for ahead in (
        0,
        indirect.AHEAD,
    ):  # as weights are read that are too many for a core's cache
        with mock.patch.multiple(indirect, WEIGHTS=0, AHEAD=ahead):
            compare(rows, weight, groups, table, 8)
            assert torch.equal(found, indirect.run(rows, indirect.pack(weight, groups), Epilogue(), table, 8))


@every_dtype
@given(channels=st.integers(1, 140), sites=st.sampled_from([0, 1, 2, 5, 13, 30]), taps=st.sampled_from([1, 4, 9]))
def test_depthwise(dtype: torch.dtype, channels: int, sites: int, taps: int) -> None:
    rows, weight = torch.randn(12, channels, dtype=dtype), torch.randn(channels, 1, 1, taps, dtype=dtype)
    compare(rows, weight, channels, torch.randint(0, 10, (sites, taps), dtype=torch.int32), 8)


@pytest.mark.parametrize("outputs", range(1, 71))
def test_each_number_of_outputs_and_nothing_beyond_them(outputs: int) -> None:
    """What lies behind the last row stays as it is."""
    rows, weight = torch.randn(5, 3), torch.randn(outputs, 3, 1, 1)
    compare(rows, weight, 1, None, 5)
    memory = torch.full((7, outputs), 7.0)
    indirect.run(rows, indirect.pack(weight, 1), Epilogue(), None, 5, memory[1:6])
    assert torch.equal(memory[[0, 6]], torch.full((2, outputs), 7.0))


def test_rows_may_be_part_of_wider_ones() -> None:
    wide, weight = torch.randn(6, 20), torch.randn(5, 8, 1, 1)
    found = indirect.run(wide[:, 3:11], indirect.pack(weight, 1), Epilogue(), None, 6)
    torch.testing.assert_close(found, wide[:, 3:11] @ weight[:, :, 0, 0].T)
    depthwise = torch.randn(8, 1, 1, 1)
    found = indirect.run(wide[:, 3:11], indirect.pack(depthwise, 8), Epilogue(), None, 6)
    torch.testing.assert_close(found, wide[:, 3:11] * depthwise[:, 0, 0, 0])
    table = torch.tensor([[0, 3], [5, 6], [7, 7]], dtype=torch.int32)
    pooled = indirect.pool("max", wide[:, 3:11], table, 6, -math.inf)
    assert torch.equal(pooled[0], torch.maximum(wide[0, 3:11], wide[3, 3:11]))
    assert torch.equal(pooled[1], wide[5, 3:11].clamp(min=0))


def test_large_weights_go_panel_by_panel() -> None:
    """Weights beyond `indirect.WEIGHTS` are computed a panel at a time, over all sites, and tap by tap where a panel is
    more than `indirect.AHEAD`."""
    large = 16 * 480 // machine.lanes(torch.float32)  # a panel is two vectors wide
    for channels, by_tap in ((200, False), (large, True)):
        rows, weight = torch.randn(40, channels), torch.randn(250, channels, 3, 3) / 48
        table = torch.randint(0, 42, (133, 9), dtype=torch.int32)
        packed = indirect.pack(weight, 1).weights
        assert packed.nbytes > indirect.WEIGHTS and (packed[0, 0].nbytes > indirect.AHEAD) == by_tap
        compare(rows, weight, 1, table, 40)


# -- threads -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[2, 7, 16])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("sites", [0, 1, 3, 30, 2000])
@pytest.mark.parametrize("depthwise", [False, True])
def test_more_threads_than_work(threads: int, sites: int, depthwise: bool) -> None:
    """Each output is computed once, by whichever thread, and the same to the last bit."""
    groups = 19 if depthwise else 1
    rows, weight = torch.randn(9, 19), torch.randn(19, 1 if depthwise else 19, 3, 3)
    table = torch.randint(0, 10, (sites, 9), dtype=torch.int32)
    found = indirect.run(rows, indirect.pack(weight, groups), Epilogue(), table, 9)
    torch.set_num_threads(1)
    assert torch.equal(found, indirect.run(rows, indirect.pack(weight, groups), Epilogue(), table, 9))
    compare(rows, weight, groups, table, 9)


def test_pooling_by_many_threads(threads: int) -> None:
    rows, table = torch.randn(50, 21), torch.randint(0, 51, (777, 4), dtype=torch.int32)
    read = torch.cat([rows, torch.zeros(1, 21)])[table.long()]
    assert torch.equal(indirect.pool("max", rows, table, 50, -math.inf), read.amax(1))


# -- packing -----------------------------------------------------------------------------------------------------


@every_dtype
@given(
    groups=st.integers(1, 12),
    each=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strange=st.booleans(),
)
def test_packing_and_back_is_exact(
    dtype: torch.dtype, groups: int, each: tuple[int, int], kernel: tuple[int, int], strange: bool
) -> None:
    outputs, channels = each
    weight = torch.randn(groups * outputs, channels, *kernel, dtype=dtype)
    if strange:
        weight = weight.to(memory_format=torch.channels_last)
    found = indirect.unpack(indirect.pack(weight, groups))
    assert found.shape == weight.shape
    assert torch.equal(found, weight)


@pytest.mark.parametrize("channels", [1, 3, 40])
def test_packing_depthwise_and_back_is_exact(channels: int) -> None:
    weight = torch.randn(channels, 1, 3, 2)
    assert torch.equal(indirect.unpack(indirect.pack(weight, channels)), weight)


def test_packed_weights_are_a_copy() -> None:
    weight = torch.randn(8, 8, 1, 1)
    packed, before = indirect.pack(weight, 1), weight.clone()
    weight.zero_()
    assert torch.equal(indirect.unpack(packed), before)


# -- layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(batch=st.integers(0, 3), channels=st.integers(1, layout.MOST_CHANNELS), size=strategies.sizes)
def test_a_copy_in_channels_last_memory(dtype: torch.dtype, batch: int, channels: int, size: tuple[int, int]) -> None:
    images = torch.randn(batch, channels, *size, dtype=dtype)
    copied = layout.channels_last(images, torch.empty(batch * size[0] * size[1], channels, dtype=dtype))
    assert torch.equal(copied, images)
    assert copied.is_contiguous(memory_format=torch.channels_last)
    assert images.numel() == 0 or copied.data_ptr() != images.data_ptr()


def test_a_large_image_is_copied_in_pieces() -> None:
    images = torch.randn(2, 3, 123, layout.PIECE // 50)
    rows = torch.empty(images.numel() // 3, 3)
    assert torch.equal(layout.channels_last(images, rows), images)
