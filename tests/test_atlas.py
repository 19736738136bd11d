"""Atlases: all kernel maps of a pass at once are those found one by one."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsenet
from sparsenet import atlas
from sparsenet.atlas import Atlas, Atlases, Route
from sparsenet.kernels import machine
from sparsenet.selection import ITSELF, Options, Selection
from sparsenet.selector.levels import GivenLevels
from sparsenet.sites import Pair, Window
from tests import strategies

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason="kernels find what an atlas is of")


class Given(GivenLevels):
    """Masks of some sizes that have nothing to do with one another."""

    def __init__(self, masks: dict[Pair, Tensor]):
        super().__init__(next(iter(masks.values())))
        self.masks = masks

    def mask(self, size: Pair) -> Tensor:
        return self.masks[size]


def selection_of(masks: dict[Pair, Tensor], counted: bool = False) -> Selection:
    first = next(iter(masks.values()))
    size = (first.shape[1], first.shape[2])
    return Selection(Given(masks), len(first), size, first.device, Options(), counted=counted)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[Pair, Tensor], list[Route]]:
    """Masks of some sizes, and routes between them."""
    batch = draw(strategies.batches)
    sizes = draw(st.lists(strategies.sizes, min_size=1, max_size=3, unique=True))
    masks = {size: draw(strategies.masks(batch, size)) for size in sizes}
    if draw(st.booleans()):
        masks = {size: mask.transpose(1, 2).contiguous().transpose(1, 2) for size, mask in masks.items()}
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    routes = []
    for _ in range(draw(st.integers(1, 6))):
        size, out_size = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
        match draw(st.sampled_from(["map", "tiles", "spread", "pointwise"])):
            case "map":
                mode = draw(st.sampled_from(["zeros", "replicate", "circular"]))
                window = Window(draw(pair), draw(pair), draw(pair), draw(pair), mode)
                routes.append(Route(size, draw(st.booleans()), window, out_size))
            case "tiles":
                window = Window((3, 3), padding=draw(pair))
                routes.append(Route(size, draw(st.booleans()), window, out_size, tiles=True))
            case "spread":
                routes.append(Route(size, False, ITSELF, size, spread=True))
            case "pointwise":
                routes.append(Route(size, True, ITSELF, size))
    return masks, list(dict.fromkeys(routes))


def same(found: Any, expected: Any) -> None:
    tables = [found, expected] if isinstance(found, tuple) else [[found.table], [expected.table]]
    for one, other in zip(*tables, strict=True):
        assert one.dtype == other.dtype == torch.int32
        assert one.shape == other.shape
        assert torch.equal(one, other)
    assert getattr(found, "inputs", None) == getattr(expected, "inputs", None)


@pytest.mark.parametrize("alone", [0, atlas.ALONE], ids=["threads", "one thread"])
@given(problem=problems())
def test_it_finds_what_is_found_one_by_one(alone: int, problem: tuple[dict[Pair, Tensor], list[Route]]) -> None:
    masks, routes = problem
    batch = len(next(iter(masks.values())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "ALONE", alone)
        made = Atlas(routes, batch)
        sites, maps = made.found([masks[size] for size in made.sizes])
    assert list(maps) == routes
    for counted in (False, True):  # by kernels, and by PyTorch's operations
        selection = selection_of(masks, counted)
        for route in routes:
            same(maps[route], route.of(selection))
        for size, each in zip(made.sizes, sites, strict=True):
            expected = selection.sites(size)
            assert len(each) == len(expected)
            assert torch.equal(each.index, expected.index)
            assert torch.equal(each.rank, expected.rank)
            assert each.counts == expected.counts
            assert each.everywhere == expected.everywhere


@given(problem=problems())
def test_masks_do_not_hang_on_those_before(problem: tuple[dict[Pair, Tensor], list[Route]]) -> None:
    masks, routes = problem
    made = Atlas(routes, len(next(iter(masks.values()))))
    before = made.found([~masks[size] for size in made.sizes])[1]
    maps = made.found([masks[size] for size in made.sizes])[1]
    other = selection_of({size: ~mask for size, mask in masks.items()})
    for route in routes:
        same(maps[route], route.of(selection_of(masks)))
        same(before[route], route.of(other))  # nor are these written to by what follows


def test_passes_in_threads_share_an_atlas() -> None:
    size = (40, 50)
    routes = [Route(size, False, Window((3, 3), padding=(1, 1)), size, tiles=tiles) for tiles in (False, True)]
    made = Atlas(routes, 1)
    masks = [torch.rand(1, *size) < density for density in (0.2, 0.5, 0.8)]
    expected = [made.found([mask])[1] for mask in masks]

    def passes(place: int) -> None:
        for _ in range(100):
            found = made.found([masks[place]])[1]
            for route in routes:
                same(found[route], expected[place][route])

    with ThreadPoolExecutor(len(masks)) as threads:
        list(threads.map(passes, range(len(masks))))


def ask(selection: Selection, routes: list[Route]) -> None:
    for route in routes:
        same(selection.along(route), route.of(selection_of(selection.levels.masks)))  # type: ignore[attr-defined]


def test_a_pass_finds_what_the_last_one_of_its_size_has_asked_for() -> None:
    kept, sizes = Atlases(), [(6, 5), (3, 3)]
    first, second = Route((6, 5), True, Window((3, 3)), (3, 3)), Route((3, 3), False, ITSELF, (3, 3), spread=True)
    made: list[int] = []

    def turn(routes: list[Route], batch: int = 1, seed: int = 0) -> tuple[int, int]:
        """How many had to be found one by one, and how many the atlas was of."""
        torch.manual_seed(seed)
        selection = selection_of({size: torch.rand(batch, *size) < 0.5 for size in sizes})
        kept.begin(selection)
        before = len(selection._maps)
        ask(selection, routes)
        made.append(len(selection._maps) - before)
        return made[-1], before

    assert turn([first]) == (1, 0)
    assert turn([first], seed=1) == (0, 1)
    assert turn([first, second], seed=2) == (1, 1)
    assert turn([first, second], batch=2) == (0, 2)
    assert turn([second]) == (0, 2)
    assert turn([second], seed=3) == (0, 1)  # what was asked for no more is not found
    assert turn([]) == (0, 1)
    assert turn([]) == (0, 0)
    assert turn([second]) == (1, 0)
    assert turn([first]) == (1, 1)  # as many as the last pass asked for, and others
    assert turn([first]) == (0, 1)


def test_it_keeps_the_last_sizes() -> None:
    kept = Atlases()
    for length in range(1, 3 * atlas.MOST):
        for _ in range(3):
            selection = selection_of({(length, 2): torch.ones(1, length, 2, dtype=torch.bool)})
            kept.begin(selection)
            selection.spread((length, 2))
    assert len(kept._kept) == atlas.MOST
    assert (3 * atlas.MOST - 1, 2) in kept._kept


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 8, 3, padding=1)
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stage(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_model_have_atlases_of_their_own(copied: Any) -> None:
    torch.manual_seed(0)
    selector = sparsenet.SelectiveModule(8, 8)
    model = sparsenet.selectify(Net().eval(), "stage", selector=selector, example_inputs=torch.rand(1, 3, 12, 12))
    frozen = sparsenet.freeze(model, torch.rand(1, 3, 12, 12))
    images = torch.rand(5, 1, 3, 12, 12)
    before = [frozen(image) for image in images]
    assert frozen.selector._atlases._kept
    other = copied(frozen)
    assert not other.selector._atlases._kept
    del frozen
    for image, expected in zip(images, before, strict=True):
        torch.testing.assert_close(other(image), expected)
