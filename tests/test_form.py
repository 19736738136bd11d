"""How the dimensions of a guided map lie: shapes alone, held to what PyTorch makes of ordinary tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sparsenet.form import Form, Padding

LENGTHS = st.integers(1, 4)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Any order of N, H and W with none to three channel dimensions among them."""
    order = draw(st.permutations("NHW" + "C" * draw(st.integers(0, 3))))
    channels = tuple(draw(LENGTHS) for letter in order if letter == "C")
    return Form("".join(order), channels)


def numbered(form: Form, batch: int, grid: tuple[int, int]) -> torch.Tensor:
    """A map (N, C, H, W) of which every number is another."""
    channels = torch.Size(form.channels).numel()
    return torch.arange(batch * channels * grid[0] * grid[1]).view(batch, channels, *grid)


@given(form=forms(), batch=LENGTHS, grid=st.tuples(LENGTHS, LENGTHS))
def test_every_number_is_where_the_letters_say(form: Form, batch: int, grid: tuple[int, int]) -> None:
    dense = numbered(form, batch, grid)
    logical = form.present(dense)
    assert tuple(logical.shape) == form.shape(batch, grid)
    for place in torch.cartesian_prod(*map(torch.arange, logical.shape)).view(-1, logical.dim()).tolist():
        at = {letter: index for letter, index in zip(form.order, place, strict=True) if letter != "C"}
        channel = 0
        for letter, index, length in zip(form.order, place, logical.shape, strict=True):
            channel = channel * length + index if letter == "C" else channel
        assert logical[tuple(place)] == dense[at["N"], channel, at["H"], at["W"]]
    cells = form.cells(logical)
    assert tuple(cells.shape) == (batch, *form.channels, *grid)
    assert torch.equal(cells.flatten(1, -3) if form.channels else cells[:, None], dense)
    for dim, length in enumerate(logical.shape):
        assert cells.shape[form.cell_dim(dim)] == cells.shape[form.cell_dim(dim - logical.dim())] == length


@given(form=forms(), data=st.data())
def test_permuted_is_what_permute_does(form: Form, data: st.DataObject) -> None:
    dims = data.draw(st.permutations(range(len(form.order))))
    dense, grid = numbered(form, 2, (3, 2)), (3, 2)
    after, moved = form.permuted([dim - len(dims) if dim % 2 else dim for dim in dims])
    expected = form.present(dense).permute(*dims)
    cells = dense.unflatten(1, form.channels) if form.channels else dense
    if form.channels:
        cells = cells.permute(0, *(1 + place for place in moved), -2, -1).flatten(1, -3)
    assert after.shape(2, grid) == tuple(expected.shape)
    assert torch.equal(after.present(cells), expected)


@given(form=forms(), batch=LENGTHS, grid=st.tuples(LENGTHS, LENGTHS), data=st.data())
def test_a_view_is_right_or_refused(form: Form, batch: int, grid: tuple[int, int], data: st.DataObject) -> None:
    """Dimensions are merged and split by chance."""
    dense = numbered(form, batch, grid)
    logical, shape = form.present(dense), []
    for length in logical.shape:
        if shape and data.draw(st.booleans()):
            shape[-1] *= length
        else:
            first = data.draw(st.sampled_from([each for each in range(1, length + 1) if length % each == 0]))
            shape.extend([first, length // first] if data.draw(st.booleans()) else [length])
    viewed = form.viewed(shape, batch, grid)
    if viewed is not None:
        assert viewed.shape(batch, grid) == tuple(shape)
        assert torch.equal(viewed.present(dense), logical.reshape(shape))


@given(form=forms(), data=st.data())
def test_splitting_and_merging_channels_is_never_refused(form: Form, data: st.DataObject) -> None:
    batch, grid = 2, (5, 3)
    shape, merged = [], False
    for letter, length in zip(form.order, form.shape(batch, grid), strict=True):
        if letter == "C" and merged and data.draw(st.booleans()):
            shape[-1] *= length
        else:
            shape.append(length)
        merged = letter == "C"
    viewed = form.viewed(shape, batch, grid)
    assert viewed is not None
    back = viewed.viewed(form.shape(batch, grid), batch, grid)
    assert back is not None and back.shape(batch, grid) == form.shape(batch, grid)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((2, 6, 5, 4), "NCHW"),
        ((2, 3, 2, 5, 4), "NCCHW"),
        ((2, 1, 6, 5, 4), "NCCHW"),
        ((1, 2, 6, 5, 4), "CNCHW"),
        ((2, 6, 5, 4, 1), "NCHWC"),
        ((2, 6, 20), None),
        ((12, 5, 4), None),
        ((2, 30, 4), None),
        ((2, 6, 4, 5), None),
        ((240,), None),
        ((2, 6, 5, 2, 2), None),
    ],
)
def test_views_of_a_map(shape: tuple[int, ...], order: str | None) -> None:
    viewed = Form("NCHW", (6,)).viewed(shape, 2, (5, 4))
    assert (viewed and viewed.order) == order


@given(form=forms(), data=st.data())
def test_dimensions_of_length_one(form: Form, data: st.DataObject) -> None:
    dense, grid, count = numbered(form, 2, (3, 2)), (3, 2), len(form.order)
    dim = data.draw(st.integers(-count - 1, count))
    more = form.unsqueezed(dim)
    expected = form.present(dense).unsqueeze(dim)
    assert torch.equal(more.present(dense), expected)
    assert more.without([dim]) == form
    assert more.shape(2, grid) == tuple(expected.shape)


paddings = st.builds(
    Padding, *[st.integers(-1, 3)] * 4, mode=st.just("zeros"), value=st.sampled_from([0.0, 1.5, -torch.inf])
)


@given(padding=paddings, other=paddings)
def test_two_paddings_are_one_or_refused(padding: Padding, other: Padding) -> None:
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    assert padding.apply(x).shape[2:] == padding.around((5, 4))
    assert padding.crops == (min(padding.top, padding.bottom, padding.left, padding.right) < 0)
    joined = padding.then(other)
    assert (joined is None) == (padding.crops or other.crops or padding.value != other.value)
    if joined is not None:
        assert torch.equal(joined.apply(x), other.apply(padding.apply(x)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_another_mode_is_pytorchs(mode: str) -> None:
    x = torch.randn(2, 3, 5, 4)
    padding = Padding(1, 2, 3, 0, mode)
    assert torch.equal(Form("NCHW", (3,), padding).present(x), F.pad(x, (3, 0, 1, 2), mode=mode))
    assert padding.then(padding) is None


def test_what_a_form_says_of_itself() -> None:
    plain = Form.plain_of(6)
    assert plain.plain and plain == Form("NCHW", (6,))
    last, padded = Form("NHWC", (6,)), Form("NCHW", (6,), Padding(1, 0, 0, 0))
    assert not last.plain and not padded.plain
    assert last.description == "reads a map laid out as NHWC"
    assert padded.description == "reads a padded map"
    assert last.letters([0, -1, 1]) == "NCH"
    with pytest.raises(IndexError):
        last.letters([4])
