"""Kernel maps against two plain loops over an index image, which `F.pad` has padded."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.sites import ActiveSites, KernelMap, Window, kernel_map, places_of
from tests import strategies
from tests.strategies import Conv


def ranks(mask: Tensor) -> Tensor:
    """The row of each pixel, counted one by one; how many there are where it is inactive."""
    rank, row = torch.full(mask.shape, float(mask.sum())), 0
    for place in [(n, y, x) for n, y, x in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist()]:
        if mask[place]:
            rank[place] = row
            row += 1
    return rank


def read_by_loops(source: Tensor, target: Tensor, conv: Conv) -> list[list[int]]:
    """What each tap of each output site reads: ranks padded as PyTorch pads a map for this convolution."""
    rank, outside = ranks(source), float(source.sum()) + 1
    (top, bottom), (left, right) = conv.pads
    padding: dict[str, Any] = {"mode": conv.padding_mode}
    if conv.padding_mode == "zeros":
        padding = {"value": outside}
    padded = F.pad(rank[:, None], (left, right, top, bottom), **padding)[:, 0].int().tolist()
    return [
        [
            padded[n][y * conv.stride[0] + i * conv.dilation[0]][x * conv.stride[1] + j * conv.dilation[1]]
            for i in range(conv.kernel[0])
            for j in range(conv.kernel[1])
        ]
        for n, y, x in target.nonzero().tolist()
    ]


def window(conv: Conv) -> Window:
    (top, _), (left, _) = conv.pads
    return Window(conv.kernel, conv.stride, (top, left), conv.dilation, conv.padding_mode)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Conv, Tensor, Tensor]:
    """A convolution, the mask of its input, and a mask of its output that has nothing to do with it."""
    conv = draw(strategies.convolutions())
    return conv, draw(strategies.masks(conv.batch, conv.size)), draw(strategies.masks(conv.batch, conv.out_size))


@given(problems())
def test_a_tap_finds_its_row_an_inactive_pixel_or_the_outside(problem: tuple[Conv, Tensor, Tensor]) -> None:
    conv, source, target = problem
    found = kernel_map(ActiveSites(source), window(conv), ActiveSites(target))
    expected = read_by_loops(source, target, conv)
    assert found.inputs == int(source.sum())
    assert found.table.dtype == torch.int32
    assert found.table.tolist() == expected


@given(problems())
def test_a_full_map_has_no_inactive_pixel(problem: tuple[Conv, Tensor, Tensor]) -> None:
    conv, source, target = problem
    everywhere = ActiveSites.all(len(source), conv.size, source.device)
    found = kernel_map(everywhere, window(conv), ActiveSites(target))
    assert found.table.tolist() == read_by_loops(torch.ones_like(source), target, conv)
    assert not (found.table == found.inputs).any()


@given(problems())
def test_without_kernels_sites_and_tables_are_the_same(problem: tuple[Conv, Tensor, Tensor]) -> None:
    """PyTorch's index arithmetic, which runs elsewhere than on CPU, of sites whose number is known and is not."""
    conv, source, target = problem
    (top, _), (left, _) = conv.pads
    window = Window(conv.kernel, conv.stride, (top, left), conv.dilation, conv.padding_mode)
    found = kernel_map(ActiveSites(source), window, ActiveSites(target))
    kernels = ActiveSites(source)
    for counted in (True, False):
        sites, others = (
            ActiveSites(mask, mask.flatten(1).sum(1).tolist() if counted else None, by_kernel=False)
            for mask in (source, target)
        )
        expected = kernel_map(sites, window, others)
        assert len(sites) == len(kernels)
        for name in ("index", "rank", "image", "pixel", "counts"):
            one, other = getattr(kernels, name), getattr(sites, name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert torch.equal(found.table, expected.table)
        assert found.inputs == expected.inputs


@given(strategies.masks())
def test_sites_are_numbered_row_by_row_and_image_after_image(mask: Tensor) -> None:
    sites = ActiveSites(mask)
    images, lines, columns = mask.nonzero(as_tuple=True)
    assert len(sites) == len(images)
    assert sites.size == mask.shape[1:]
    assert sites.image.tolist() == images.tolist()
    assert sites.index.tolist() == ((images * mask.shape[1] + lines) * mask.shape[2] + columns).tolist()
    assert sites.pixel.tolist() == (lines * mask.shape[2] + columns).tolist()
    surrounded = F.pad(ranks(mask), (0, 1, 0, 1), value=float(mask.sum()) + 1)
    assert sites.rank.tolist() == surrounded.int().tolist()


def test_all_sites_are_those_of_a_full_mask() -> None:
    everywhere, full = ActiveSites.all(2, (3, 4), torch.device("cpu")), ActiveSites(torch.ones(2, 3, 4).bool())
    for name in ("mask", "index", "image", "pixel", "rank"):
        assert torch.equal(getattr(everywhere, name), getattr(full, name))
    assert len(everywhere) == 24


def test_what_is_kept_between_passes_may_take_part_in_gradients() -> None:
    """Tensors made in inference mode may not, and the first pass may well be in it."""
    size, window = (7, 11), Window((3, 3), padding=(1, 1))  # of no other test: made here
    with torch.inference_mode():
        everywhere = ActiveSites.all(2, size, torch.device("cpu"))
        kernel_map(everywhere, window, ActiveSites(torch.rand(2, *size) < 0.5))
        kept = [everywhere.mask, everywhere.index, everywhere.image, everywhere.pixel, everywhere.rank]
    kept.append(places_of(size, size, window, torch.device("cpu")))
    assert not any(tensor.is_inference() for tensor in kept)


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=6))
def test_a_table_by_taps(table: list[list[int]]) -> None:
    found = KernelMap(torch.tensor(table, dtype=torch.int32).view(-1, 3), inputs=5)
    products = torch.arange(18).view(6, 3)  # of five rows, and of one of zeros, with three taps
    expected = [[int(products[min(row, 5), tap]) for tap, row in enumerate(taps)] for taps in table]
    assert found.products.tolist() == expected
    pairs, counts = found.pairs
    for tap in range(3):
        expected = [(taps[tap], output) for output, taps in enumerate(table) if taps[tap] < 5]
        assert counts[tap] == len(expected)
        assert list(zip(*pairs[:, tap, : len(expected)].tolist(), strict=True)) == expected
        assert (pairs[:, tap, len(expected) :] == -1).all()


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=9))
def test_the_inverse_of_a_table(table: list[list[int]]) -> None:
    """Each row and tap finds the sites that it is read for, in order, and nothing else."""
    found = KernelMap(torch.tensor(table, dtype=torch.int32).view(-1, 3), inputs=5).inverse
    times = found.shape[1] // 3
    assert found.dtype == torch.int32 and found.shape == (5, times * 3)
    for row in range(5):
        for tap in range(3):
            expected = [site for site, taps in enumerate(table) if taps[tap] == row]
            assert found[row, tap::3].tolist() == expected + [len(table)] * (times - len(expected))


def test_the_inverse_of_a_window_has_one_site_for_each_tap() -> None:
    sites = ActiveSites(torch.rand(2, 7, 8) < 0.5)
    assert kernel_map(sites, Window((3, 3), padding=(1, 1)), sites).inverse.shape == (len(sites), 9)


def test_an_unknown_padding_mode_is_refused() -> None:
    sites = ActiveSites(torch.ones(1, 2, 2).bool())
    with pytest.raises(ValueError, match="'mirror' is not one of zeros, reflect, replicate, circular"):
        kernel_map(sites, Window((3, 3), padding=(1, 1), padding_mode="mirror"), sites)


def test_more_pixels_than_32_bits_number() -> None:
    mask = torch.zeros(1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 masks of 32768x32768 have more pixels than 32 bits can number"):
        ActiveSites(mask.expand(2, 1 << 15, 1 << 15))
    ActiveSites(mask.expand(1, 1 << 15, 1 << 15))
