"""What moves dimensions and channels but no pixel, in both storages; and whether a write reaches who it must reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.features import Features
from tests import strategies
from tests.helpers import (
    STORAGES,
    active,
    assert_agrees,
    assert_equal,
    assert_guided,
    gradients,
    guide,
    keep,
    recorder,
    select,
)

every_storage = pytest.mark.parametrize("storage", STORAGES)
C = 12
MASK = torch.arange(40).view(2, 4, 5) % 3 > 0


def image(mask: Tensor) -> Tensor:
    return torch.randn(len(mask), C, *mask.shape[1:], dtype=torch.float64, requires_grad=True)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """As torchvision's ShuffleNet has it."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


# -- views, permutations, parts ----------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Tensor], Any]] = {
    "x.permute": lambda x: x.permute(0, 2, 3, 1),
    "x.permute of a list": lambda x: x.permute([0, -2, -1, 1]),
    "torch.permute": lambda x: torch.permute(x, (3, 1, 0, 2)),
    "x.permute by name": lambda x: x.permute(dims=(0, 2, 3, 1)),
    "x.transpose": lambda x: x.transpose(1, -1),
    "torch.swapaxes": lambda x: torch.swapaxes(x, 2, 3),
    "x.movedim": lambda x: x.movedim(1, -1),
    "torch.movedim of several": lambda x: torch.movedim(x, (1, 2), (2, 1)),
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "x.view": lambda x: x.view(len(x), 3, 4, *x.shape[2:]),
    "x.view of a size": lambda x: x.view(x.size()),
    "x.view with a gap": lambda x: x.view(len(x), -1, 2, x.shape[2], x.shape[3]),
    "x.reshape": lambda x: x.reshape(len(x), 2, 3, 2, *x.shape[2:]),
    "torch.reshape": lambda x: torch.reshape(x, (len(x), 2, -1, *x.shape[2:])),
    "x.view_as": lambda x: x.view_as(torch.empty(len(x), 2, 6, *x.shape[2:])),
    "x.unflatten": lambda x: x.unflatten(1, (4, -1)),
    "torch.unflatten": lambda x: torch.unflatten(x, -3, (2, 2, 3)),
    "x.flatten": lambda x: x.unflatten(1, (2, 6)).flatten(1, 2),
    "torch.flatten": lambda x: torch.flatten(x.permute(0, 2, 3, 1).unflatten(3, (2, 2, 3)), 3),
    "x.unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1),
    "x.squeeze": lambda x: x[:, 2:3].squeeze(1),
    "x.squeeze of nothing": lambda x: x.squeeze(1),
    "torch.squeeze of several": lambda x: torch.squeeze(x[:, None, 1:2], (1, 2)),
    "x.expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "x.expand apart": lambda x: x.view(len(x), 3, 1, 4, *x.shape[2:]).expand(-1, 3, 2, 4, -1, -1),
    "torch.broadcast_to": lambda x: torch.broadcast_to(x[:, :1], (len(x), 2, *x.shape[2:])),
    "x.expand_as": lambda x: x[:, :1].expand_as(torch.empty(len(x), 2, *x.shape[2:])),
    "shuffle": lambda x: shuffle(x, 3),
    "F.channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "shuffle of channels last": lambda x: x.permute(0, 2, 3, 1).unflatten(3, (3, 4)).transpose(3, 4).flatten(3),
    "three groups of channels, turned": lambda x: x.view(len(x), 2, 3, 2, *x.shape[2:]).permute(0, 3, 1, 2, 4, 5),
    "slice": lambda x: x[:, 2:9:3],
    "the last ones": lambda x: x[:, -3:],
    "one": lambda x: x[:, 4],
    "one, and a new dimension": lambda x: x[:, 4, None],
    "dots": lambda x: x[..., None, :, :],
    "everything": lambda x: x[:],
    "list": lambda x: x[:, [3, 1, 1]],
    "truth values": lambda x: x[:, [True, False] * 6],
    "slice of channels last": lambda x: x.permute(0, 2, 3, 1)[..., 5:],
    "one of a group": lambda x: x.unflatten(1, (3, 4))[:, 1],
    "one of each group": lambda x: x.unflatten(1, (3, 4))[:, :, 2],
    "some of a group": lambda x: x.unflatten(1, (3, 4))[:, 1:, ::2],
    "list of groups": lambda x: x.unflatten(1, (3, 4))[:, [2, 0]],
    "x.narrow": lambda x: x.narrow(1, 2, 5),
    "x.narrow from behind": lambda x: x.narrow(-3, -2, 2),
    "torch.select": lambda x: torch.select(x, 1, -1),
    "x.chunk": lambda x: x.chunk(5, 1),
    "torch.chunk by name": lambda x: torch.chunk(x, chunks=2, dim=1),
    "x.chunk of channels last": lambda x: x.permute(0, 2, 3, 1).chunk(3, dim=-1),
    "torch.split": lambda x: torch.split(x, 5, dim=1),
    "x.split of sizes": lambda x: x.split([1, 3, 8], 1),
    "torch.tensor_split": lambda x: torch.tensor_split(x, (2, 7), 1),
    "x.unbind": lambda x: x[:, :3].unbind(1),
    "torch.unbind of groups": lambda x: torch.unbind(x.unflatten(1, (3, 4)), dim=1),
    "torch.index_select": lambda x: torch.index_select(x, 1, torch.tensor([5, 0, 5])),
    "torch.stack": lambda x: torch.stack([x, x * 2], 1),
    "torch.stack at the end": lambda x: torch.stack([x[:, 1], x[:, 2]], dim=-1),
    "x.reshape after a part": lambda x: x.chunk(2, 1)[1].reshape(len(x), 2, 3, *x.shape[2:]),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)),
    "pad channels by a number": lambda x: F.pad(x, (0, 0, 0, 0, -1, 3), value=2.5),
}


@every_storage
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_equals_what_pytorch_does(storage: str, name: str, full: bool) -> None:
    assert_agrees(MOVES[name], storage, MASK, image(MASK), full=full, pointwise=True)


@every_storage
@given(mask=strategies.masks(), full=st.booleans(), names=st.lists(st.sampled_from([*MOVES]), min_size=1, max_size=12))
@example(mask=torch.zeros(2, 3, 4).bool(), full=False, names=[*MOVES])
@example(mask=torch.ones(1, 1, 1).bool(), full=True, names=[*MOVES])
def test_whatever_the_mask(storage: str, mask: Tensor, full: bool, names: list[str]) -> None:
    for name in names:
        assert_agrees(MOVES[name], storage, mask, image(mask), full=full, pointwise=True)


@every_storage
def test_nothing_leaves(storage: str) -> None:
    record = recorder()
    for function in MOVES.values():
        function(guide(image(MASK), select(MASK, storage, record=record, strict=True)))
    assert not record.operations


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "x.permute": lambda x: x.permute(0, 2, 3, 5),
    "x.permute twice": lambda x: x.permute(0, 1, 2, 1),
    "x.transpose": lambda x: x.transpose(1, 4),
    "x.view": lambda x: x.view(len(x), 7, -1),
    "x.unflatten": lambda x: x.unflatten(1, (5, 2)),
    "x.narrow": lambda x: x.narrow(1, 10, 3),
    "x.select": lambda x: x.select(1, 12),
    "index": lambda x: x[:, 12],
    "too many": lambda x: x[:, 0, 0, 0, 0],
    "x.expand": lambda x: x.expand(-1, 24, -1, -1),
    "shuffle": lambda x: F.channel_shuffle(x, 5),
    "x.split": lambda x: x.split([1, 2], 1),
    "stack": lambda x: torch.stack([x, x[:, :1]], 1),
    "reflect": lambda x: F.pad(x, (5, 0, 0, 0), mode="reflect"),
    "circular": lambda x: F.pad(x, (0, 0, 0, 5), mode="circular"),
    "crop": lambda x: F.pad(x, (-3, -3)),
    "an odd padding": lambda x: F.pad(x, (1, 1, 1)),
}


@every_storage
@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_is_refused(storage: str, name: str) -> None:
    for x in (image(MASK).detach(), guide(image(MASK), select(MASK, storage))):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            REFUSED[name](x)


@every_storage
@pytest.mark.parametrize("name", ["x.permute", "one of each group", "x.flatten"])
def test_an_exit_in_another_layout(storage: str, name: str) -> None:
    x = image(MASK)
    moved = MOVES[name](guide(x, select(MASK, storage)))
    result, expected = moved.sort(1).values, MOVES[name](keep(x, MASK)).sort(1).values
    assert_equal(result, expected)
    assert_equal(gradients(result, [x])[0], gradients(expected, [x])[0])


# -- crops -------------------------------------------------------------------------------------------------------

slices = st.builds(slice, *[st.one_of(st.none(), st.integers(-8, 17))] * 2, st.one_of(st.none(), st.integers(1, 3)))


@every_storage
@given(mask=strategies.masks(), lines=slices, columns=slices, full=st.booleans(), layout=st.sampled_from([0, 1, 2]))
def test_crops_are_read_as_by_a_convolution_of_one_tap(
    storage: str, mask: Tensor, lines: slice, columns: slice, full: bool, layout: int
) -> None:
    def crop(x: Tensor) -> Tensor:
        if layout == 0:
            return x[:, :, lines, columns]
        return x.permute(0, 2, 3, 1)[:, lines, columns] if layout == 1 else x[:, 3:7, lines, columns]

    x, (height, width) = image(mask), mask.shape[1:]
    shape = (len(range(height)[lines]), len(range(width)[columns]))
    if 0 in shape:
        assert crop(guide(x, select(mask, storage), full=full)).numel() == 0
        return
    assert_agrees(crop, storage, mask, x, full=full, pointwise=shape == (height, width))


@every_storage
def test_a_crop_of_the_focus_layer(storage: str) -> None:
    """YOLOX and GhostNet's cousins: four crops of every second pixel, side by side."""

    def focus(x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    mask = torch.rand(2, 6, 8) < 0.4
    for full in (False, True):
        assert_agrees(focus, storage, mask, image(mask), full=full)


# -- padding, until something reads it ---------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@given(mask=strategies.masks(2, (4, 5)), full=st.booleans(), sides=st.tuples(*[st.integers(0, 3)] * 4))
def test_a_padded_map_is_as_large_as_it_looks(
    storage: str, mode: str, mask: Tensor, full: bool, sides: tuple[int, ...]
) -> None:
    x = image(mask)
    result, read = (
        F.pad(guide(x, select(mask, storage), full=full), sides, mode=mode),
        F.pad(keep(x, mask), sides, mode),
    )
    assert isinstance(result, Features)
    assert result.full == full
    assert result.shape == read.shape
    left = result.sort(1).values  # an exit
    assert_equal(left, read.sort(1).values)
    assert_equal(gradients(left, [x])[0], gradients(read.sort(1).values, [x])[0])


# -- writes ------------------------------------------------------------------------------------------------------

Snippet = Callable[[Tensor], Any]


def write(x: Tensor, index: Any, value: Any) -> None:
    x[index] = value


def returning(*steps: Snippet) -> Snippet:
    """A map of its own, on which the steps are done, and which they leave behind."""

    def snippet(x: Tensor) -> Tensor:
        y = x.clone()
        for step in steps:
            step(y)
        return y

    return snippet


def both(part: Snippet, step: Snippet) -> Snippet:
    """A step on a part of a map of its own; what is left of both."""

    def snippet(x: Tensor) -> tuple[Tensor, ...]:
        y = x.clone()
        piece = part(y)
        step(piece)
        return y * 1, piece * 1

    return snippet


HALF = (slice(None), slice(None, 6))
OTHER = (slice(None), slice(6, None))

# What networks do: it must come out as in PyTorch.
WRITES: dict[str, Snippet] = {
    "a number": returning(lambda x: write(x, HALF, 1.5)),
    "a vector": returning(lambda x: write(x, HALF, torch.arange(6.0).double().view(6, 1, 1))),
    "a map": returning(lambda x: write(x, HALF, torch.ones(len(x), 6, *x.shape[2:]).double())),
    "its own other half": returning(lambda x: write(x, HALF, x[OTHER])),
    "what was computed": returning(lambda x: write(x, OTHER, torch.tanh(x[HALF]) * 2)),
    "one channel": returning(lambda x: write(x, (slice(None), 3), 2.0)),
    "one channel by another": returning(lambda x: write(x, (slice(None), 3), x[:, 2] * 3)),
    "channels last": returning(lambda x: write(x.permute(0, 2, 3, 1), (..., slice(4)), 1.0)),
    "channels apart": returning(lambda x: write(x.unflatten(1, (3, 4)), (slice(None), slice(1, None)), 1.0)),
    "everything": returning(lambda x: write(x, slice(None), 0.5)),
    "+=": returning(lambda x: x[HALF].add_(1)),
    "item +=": returning(lambda x: write(x, HALF, x[HALF].mul_(2))),
    "twice": returning(lambda x: write(x, HALF, 1.0), lambda x: x.mul_(2), lambda x: write(x, OTHER, 3.0)),
    "a temporal shift": returning(
        lambda x: write(x, (slice(None), slice(0, 3)), x[:, 3:6] * 1),
        lambda x: write(x, (slice(None), slice(9, 12)), 0.0),
    ),
    "a slice, in place": both(lambda x: x[HALF], lambda x: x.mul_(2)),
    "an activation of a slice": both(lambda x: x[:, 3:5], lambda x: F.relu(x, inplace=True)),
    "narrow": both(lambda x: x.narrow(1, 2, 3), lambda x: x.sub_(1)),
    "select": both(lambda x: x.select(1, 4), lambda x: x.neg_()),
    "a permutation": both(lambda x: x.permute(0, 2, 3, 1), lambda x: x.mul_(2)),
    "a transposition": both(lambda x: x.transpose(1, 3), lambda x: x.exp_()),
    "a view": both(lambda x: x.view(len(x), 3, 4, *x.shape[2:]), lambda x: x.add_(1)),
    "a view, and the map": both(lambda x: x.flatten(0, 0), lambda x: x.add_(1)),
    "unsqueezed": both(lambda x: x.unsqueeze(1), lambda x: x.tanh_()),
    "squeezed": both(lambda x: x[:, 1:2].squeeze(1), lambda x: x.tanh_()),
    "a clone": both(lambda x: x.clone(), lambda x: x.mul_(3)),
    "a list": both(lambda x: x[:, [1, 2]], lambda x: x.mul_(3)),
    "index_select": both(lambda x: x.index_select(1, torch.tensor([1, 2])), lambda x: x.mul_(3)),
    "a sum": both(lambda x: x + 0, lambda x: x.mul_(3)),
    "a part of a part": both(lambda x: x[HALF].permute(0, 2, 3, 1)[..., 1:3], lambda x: x.mul_(2)),
}
# What sparsenet may refuse, where a part is a copy of rows or of memory that PyTorch would have shared, or not.
UNSURE: dict[str, Snippet] = {
    "a chunk": both(lambda x: x.chunk(2, 1)[1], lambda x: x.mul_(2)),
    "unbound": both(lambda x: x.unbind(1)[2], lambda x: x.mul_(2)),
    "shuffled": both(lambda x: shuffle(x, 3), lambda x: x.mul_(2)),
    "groups turned": both(lambda x: x.unflatten(1, (3, 4)).transpose(1, 2), lambda x: x.mul_(2)),
    "one of each group": both(lambda x: x.unflatten(1, (3, 4))[:, :, 1], lambda x: x.mul_(2)),
    "contiguous": both(lambda x: x.contiguous(), lambda x: x.mul_(2)),
    "contiguous after a permutation": both(lambda x: x.permute(0, 2, 3, 1).contiguous(), lambda x: x.mul_(2)),
    "reshaped after a permutation": both(lambda x: x.permute(0, 2, 3, 1).reshape(x.mT.mT.shape), lambda x: x.mul_(2)),
    "merged after a permutation": both(
        lambda x: x.unflatten(1, (3, 4)).permute(0, 2, 1, 3, 4).flatten(1, 2), lambda x: x.mul_(2)
    ),
    "expanded": both(lambda x: x[:, :1].expand(-1, 3, -1, -1), lambda x: x.mul_(2)),
    "cropped": both(lambda x: x[:, :, 1:], lambda x: x.mul_(2)),
    "a crop, written": returning(lambda x: write(x, (..., slice(1, None)), 1.0)),
    "one image": returning(lambda x: x[0].mul_(2)),
    "one image, written": returning(lambda x: write(x, 0, 1.0)),
    "padded by nothing": both(lambda x: F.pad(x, (0, 0)), lambda x: x.mul_(2)),
    "padded": both(lambda x: F.avg_pool2d(F.pad(x, (1, 1)), 1), lambda x: x.mul_(2)),
    "pixels by a mask": returning(lambda x: write(x, x > 0, 1.0)),
    "detached": both(lambda x: x.detach(), lambda x: x.mul_(2)),
    "a write to the map": both(lambda x: x, lambda x: (x.unflatten(1, (3, 4)), x.mul_(2))),
    "a stale view": lambda x: [y := x.clone(), part := y[HALF], y.mul_(2), part * 1][3],
    "a stale view of a copy": lambda x: [y := x.clone(), part := shuffle(y, 3), y.mul_(2), part * 1][3],
    "a stale crop": lambda x: [y := x.clone(), part := y[:, :, 1:], y.mul_(2), part * 1][3],
    "a map of another's sites": lambda x: both(lambda y: y[HALF], lambda y: y.mul_(F.max_pool2d(x[HALF], 1)))(x),
    "from a copy to a view of it": both(lambda x: shuffle(x, 3)[HALF], lambda x: x.mul_(2)),
    "two parts": returning(lambda x: [part.mul_(2) for part in (x[HALF], x[OTHER])]),
    "two chunks": returning(lambda x: [part.mul_(2) for part in x.chunk(2, 1)]),
    "split": returning(lambda x: x.split(4, 1)[1].copy_(x.split(4, 1)[0])),
}


def outcome(snippet: Snippet, storage: str, full: bool) -> str:
    """ "equal" or "raises"; anything else is an error of the test."""
    x = image(MASK)
    expected = snippet(x if full else keep(x, MASK))
    expected = expected if isinstance(expected, tuple) else (expected,)
    try:
        found = snippet(guide(x * 1, select(MASK, storage), full=full))
        found = found if isinstance(found, tuple) else (found,)
        results = [part * 1 if isinstance(part, Features) else part for part in found]
    except RuntimeError as error:
        assert "would" in str(error) or "is a view and is being modified inplace" in str(error), error
        return "raises"
    for result, wanted in zip(results, expected, strict=True):
        assert_guided(result, wanted)
        if wanted.requires_grad:
            kept = keep(wanted, active(result))
            assert_equal(gradients(result.dense("the test"), [x])[0], gradients(kept, [x])[0])
    return "equal"


@every_storage
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_reaches_who_it_must_reach(storage: str, name: str, full: bool) -> None:
    assert outcome(WRITES[name], storage, full) == "equal"


@every_storage
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", UNSURE)
def test_a_write_is_right_or_raises(storage: str, name: str, full: bool) -> None:
    """In plain PyTorch some of these are errors too."""
    try:
        UNSURE[name](image(MASK))
    except RuntimeError:
        with pytest.raises(RuntimeError):
            UNSURE[name](guide(image(MASK) * 1, select(MASK, storage), full=full))
        return
    outcome(UNSURE[name], storage, full)


@every_storage
def test_some_writes_do_raise(storage: str) -> None:
    """Else the test above would hold nothing."""
    names = ["shuffled", "cropped", "contiguous", "a crop, written", "a stale view of a copy", "a stale crop"]
    assert {outcome(UNSURE[name], storage, False) for name in names} == {"raises"}


@every_storage
def test_a_map_that_a_write_restricts_leaves_no_view_behind(storage: str) -> None:
    """The view would still count as having every pixel."""
    selection, x, y = select(MASK, storage), image(MASK).detach(), image(MASK).detach()
    features = guide(x.clone(), selection, full=True)
    part = features[HALF]
    features.mul_(guide(y, selection))
    assert not features.full
    assert_guided(features, x * y)
    with pytest.raises(RuntimeError, match="a guided feature map was written to in place"):
        F.max_pool2d(part, 3, 1, 1)
