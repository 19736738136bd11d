"""3x3 convolution by tiles: the same as PyTorch's, at active pixels, and at no others."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import winograd
from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import index, machine
from sparsenet.regions import any_pool
from sparsenet.sites import ActiveSites, TileReading, Window, kernel_map, tiles
from tests import strategies
from tests.strategies import PADDING_MODES

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def rows_of(x: Tensor, sites: ActiveSites) -> Tensor:
    """Maps (N, C, H, W) as rows (n, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)[sites.index].contiguous()


def by_tiles(
    x: Tensor, weight: Tensor, epilogue: Epilogue, window: Window, full: bool, mask: Tensor, out_mask: Tensor
) -> Tensor:
    """Rows (n_out, O), between two that must not be written to."""
    source = ActiveSites.all(len(mask), (mask.shape[1], mask.shape[2]), mask.device) if full else ActiveSites(mask)
    target, rows = ActiveSites(out_mask), rows_of(x, source)
    memory = torch.full((len(target) + 2, len(weight)), 7.0, dtype=x.dtype)
    prepared = winograd.Prepared(winograd.pack(weight), epilogue)
    prepared.run(rows, epilogue.residual, tiles(source, window, target), len(rows), memory[1:-1])
    assert torch.equal(memory[[0, -1]], torch.full_like(memory[:2], 7.0))
    return memory[1:-1]


def by_pytorch(x: Tensor, weight: Tensor, epilogue: Epilogue, padding: int, mode: str, out_mask: Tensor) -> Tensor:
    padded = F.pad(x, (padding,) * 4, mode="constant" if mode == "zeros" else mode)
    sums = F.conv2d(padded, weight).permute(0, 2, 3, 1)[out_mask]
    return epilogue.of(sums)


@st.composite
def problems(draw: Any) -> tuple[Tensor, Tensor, int, str, bool]:
    """Masks of the input and the output, the padding, its mode, and whether the input is full."""
    padding, mode = draw(st.integers(0, 2)), draw(st.sampled_from(PADDING_MODES))
    least = max(1, 3 - 2 * padding) if mode in ("zeros", "replicate") else 3
    size = draw(st.tuples(st.integers(least, 17), st.integers(least, 17)))
    mask = draw(strategies.masks(size=size))
    out_size = (size[0] + 2 * padding - 2, size[1] + 2 * padding - 2)
    return mask, draw(strategies.masks(batch=len(mask), size=out_size)), padding, mode, draw(st.booleans())


@every_dtype
@given(
    problem=problems(),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 70),
    residual=st.sampled_from([None, "before", "after"]),
    activation=st.sampled_from([("clamp", -1.0, 2.0), ("clamp", 0.0, torch.inf), ("silu", 0.0, 0.0)]),
)
def test_equals_the_dense_convolution(
    dtype: torch.dtype,
    problem: tuple[Tensor, Tensor, int, str, bool],
    channels: int,
    outputs: int,
    residual: str | None,
    activation: tuple[str, float, float],
) -> None:
    """Tolerances: four times the error of PyTorch's own, or of rounding each product of the transformed numbers, whose
    magnitudes are at most four times those of the largest inputs and weights along each axis together."""
    mask, out_mask, padding, mode, full = problem
    window = Window((3, 3), padding=(padding, padding), padding_mode=mode)
    x = torch.randn(len(mask), channels, *mask.shape[1:], dtype=dtype)
    weight = torch.randn(outputs, channels, 3, 3, dtype=dtype)
    name, low, high = activation
    if dtype is torch.float64 and name != "clamp":
        name, low, high = "clamp", 0.0, 6.0
    added = None if residual is None else torch.randn(int(out_mask.sum()), outputs, dtype=dtype)
    scale, shift = torch.randn(2, outputs, dtype=dtype)
    epilogue = Epilogue(scale, shift, added, residual or "before", name, low, high)
    found = by_tiles(x, weight, epilogue, window, full, mask, out_mask)
    read = x if full else x * mask[:, None]
    plain = by_pytorch(read, weight, epilogue, padding, mode, out_mask)
    numbers = [None if part is None else part.double() for part in epilogue[:3]]
    exact = epilogue._replace(scale=numbers[0], shift=numbers[1], residual=numbers[2])
    truth = by_pytorch(read.double(), weight.double(), exact, padding, mode, out_mask)
    assert found.shape == truth.shape
    if truth.numel():
        largest = 9 * channels * read.abs().amax() * weight.abs().amax() * scale.abs().amax()
        rounding = torch.finfo(dtype).eps * largest.double() / (9 * channels) ** 0.5 + torch.finfo(dtype).eps * 10
        assert (found - truth).abs().max() <= 4 * torch.maximum((plain - truth).abs().max(), rounding)


@given(problem=problems())
def test_each_tile_reads_what_its_pixels_read_and_writes_them(problem: tuple[Tensor, Tensor, int, str, bool]) -> None:
    mask, out_mask, padding, mode, full = problem
    window = Window((3, 3), padding=(padding, padding), padding_mode=mode)
    source = ActiveSites.all(len(mask), (mask.shape[1], mask.shape[2]), mask.device) if full else ActiveSites(mask)
    target = ActiveSites(out_mask)
    found, table = tiles(source, window, target), kernel_map(source, window, target).table
    reads = found.reads.view(-1, 4, 4)
    written = []
    for tile, writes in enumerate(found.writes.view(-1, 2, 2).tolist()):
        assert min(min(line) for line in writes) < len(target), "a tile without an active pixel"
        for y in range(2):
            for x in range(2):
                if writes[y][x] < len(target):
                    assert torch.equal(reads[tile, y : y + 3, x : x + 3].flatten(), table[writes[y][x]])
                    written.append(writes[y][x])
    assert sorted(written) == list(range(len(target)))


def test_a_last_line_of_half_a_tile_reads_nothing_beyond() -> None:
    reading = TileReading(Window((3, 3), padding=(1, 1)), (3, 4))
    outside = 3
    assert reading.reads(0, 3, 2, torch.device("cpu")).tolist() == [[3, 0, 1, 2], [1, 2, outside, outside]]
    assert reading.reads(1, 4, 2, torch.device("cpu")).tolist() == [[4, 0, 1, 2], [1, 2, 3, 4]]


def test_weights_of_every_impulse() -> None:
    """One weight of 1 at each place: the output is the input, shifted."""
    x, mask = torch.randn(1, 1, 6, 7), torch.ones(1, 6, 7, dtype=torch.bool)
    window = Window((3, 3), padding=(1, 1))
    for place in range(9):
        weight = torch.zeros(1, 1, 3, 3)
        weight.view(-1)[place] = 1
        found = by_tiles(x, weight, Epilogue(), window, True, mask, mask)
        expected = by_pytorch(x, weight, Epilogue(), 1, "zeros", mask)
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps * x.abs().max())


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("outputs", [5, 64, 320, 512])
@pytest.mark.parametrize("size", [(1, 1), (3, 30), (40, 41)])
def test_pieces_of_every_kind(threads: int, outputs: int, size: tuple[int, int]) -> None:
    """By tiles and by panels, and the same to the last bit for any number of threads."""
    x, mask = torch.randn(1, 24, *size), torch.rand(1, *size) < 0.8
    weight, window = torch.randn(outputs, 24, 3, 3) / 15, Window((3, 3), padding=(1, 1))
    found = by_tiles(x, weight, Epilogue(), window, True, mask, mask)
    torch.testing.assert_close(found, by_pytorch(x, weight, Epilogue(), 1, "zeros", mask), rtol=1e-4, atol=1e-4)
    torch.set_num_threads(1)
    assert torch.equal(found, by_tiles(x, weight, Epilogue(), window, True, mask, mask))


def test_layers_that_it_does_not_compute() -> None:
    weight = torch.randn(4, 4, 3, 3)
    assert winograd.unsupported(weight, (1, 1), (1, 1), 1) is None
    for refused in (
        (weight[:, :, :1], (1, 1), (1, 1), 1),
        (weight, (2, 2), (1, 1), 1),
        (weight, (1, 1), (2, 2), 1),
        (weight[:, :2], (1, 1), (1, 1), 2),
        (weight.half(), (1, 1), (1, 1), 1),
        (torch.empty(512, 512, 3, 3), (1, 1), (1, 1), 1),
    ):
        assert winograd.unsupported(*refused) is not None


@given(mask=strategies.masks(), place=st.integers(0, 10**6), every=st.integers(1, 2))
def test_whether_all_pixels_are_active(mask: Tensor, place: int, every: int) -> None:
    full = torch.ones_like(mask)
    assert index.all_of(mask[:, :, ::every]) == bool(mask[:, :, ::every].all()) and index.all_of(full)
    full.view(-1)[place % full.numel()] = False
    assert not index.all_of(full)


@given(mask=strategies.masks(), size=strategies.sizes)
def test_any_pooling_by_a_kernel_is_adaptive_pooling(mask: Tensor, size: tuple[int, int]) -> None:
    coarse = (min(size[0], mask.shape[1]), min(size[1], mask.shape[2]))
    expected = F.interpolate(F.adaptive_max_pool2d(mask[:, None].float(), coarse), size)[:, 0] > 0
    assert torch.equal(any_pool(mask, size), expected)
