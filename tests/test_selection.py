"""One mask per size, given or learned, whatever produces the size first; and the gradient that masks take."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparsenet
from sparsenet.features import Features, MaskedFeatures
from sparsenet.kernels import machine
from sparsenet.regions import Frame, check_regions
from sparsenet.selection import Options, Selection
from sparsenet.selector.levels import Gating, GivenLevels, LearnedLevels, Octaves, learned_octaves
from tests import strategies
from tests.helpers import STORAGES, assert_equal, assert_guided, guide, keep, select
from tests.strategies import Pair

every_storage = pytest.mark.parametrize("storage", STORAGES)


# -- given masks -------------------------------------------------------------------------------------------------


def cells(length: int, to: int, index: int) -> range:
    """What lies under a cell of a coarser axis; of a finer one, the pixel that it lies in."""
    if to > length:
        return range(index * length // to, index * length // to + 1)
    return range(index * length // to, -(-(index + 1) * length // to))


@given(strategies.masks(), strategies.sizes)
def test_a_cell_is_active_if_any_pixel_under_it_is(mask: Tensor, size: Pair) -> None:
    found = GivenLevels(mask).mask(size)
    assert found.dtype == torch.bool
    for image, expected in zip(found.tolist(), mask.tolist(), strict=True):
        for i in range(size[0]):
            for j in range(size[1]):
                under = [
                    expected[y][x] for y in cells(mask.shape[1], size[0], i) for x in cells(mask.shape[2], size[1], j)
                ]
                assert image[i][j] == any(under)


SAME_SIZE = {
    "3x3": lambda x: F.conv2d(x, torch.ones(2, 2, 3, 3).double(), stride=2, padding=1),
    "1x1": lambda x: F.conv2d(x, torch.ones(2, 2, 1, 1).double(), stride=2),
    "5x5": lambda x: F.conv2d(x, torch.ones(2, 2, 5, 5).double(), stride=2, padding=2),
    "pool": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
}


@every_storage
@given(mask=strategies.masks(), order=st.permutations(list(SAME_SIZE)))
def test_the_mask_of_a_size_does_not_depend_on_what_produces_it(storage: str, mask: Tensor, order: list[str]) -> None:
    selection, x = select(mask, storage), torch.rand(len(mask), 2, *mask.shape[1:]).double() + 0.1
    size = (-(-mask.shape[1] // 2), -(-mask.shape[2] // 2))
    results = [SAME_SIZE[name](guide(x, selection, full=True)) for name in order]
    for result in results:
        assert result.grid == size
        assert torch.equal(result.dense("the test")[:, 0] > 0, GivenLevels(mask).mask(size))
    assert_guided(sum(results[1:], results[0]), sum(SAME_SIZE[name](x) for name in order))
    assert selection.sites(size) is selection.sites(size)
    assert selection.sizes == list(dict.fromkeys([(mask.shape[1], mask.shape[2]), size]))


# -- learned masks -----------------------------------------------------------------------------------------------


def chain(octaves: int) -> Octaves:
    """Downsamplers with weights of their own, so that no octave can stand in for another."""
    return Octaves({str(k): nn.Conv2d(1, 1, 3, 2, 1).double() for k in range(1, octaves + 1)})


def learned(size: Pair, octaves: int, batch: int = 2, live: bool = True) -> tuple[LearnedLevels, list[Tensor]]:
    """Levels, and their logits, octave by octave."""
    logits, down = torch.randn(batch, 1, *size, dtype=torch.float64, requires_grad=True), chain(octaves)
    expected = [logits]
    for k in range(1, octaves + 1):
        expected.append(down[str(k)](torch.sigmoid(expected[-1])))
    return LearnedLevels(logits, down, 0.5, Gating() if live else None), expected


def test_each_octave_has_its_downsampler() -> None:
    levels, logits = learned((40, 24), 3)
    for size, expected in zip([(40, 24), (20, 12), (10, 6), (5, 3)], logits, strict=True):
        assert torch.equal(levels.mask(size), expected[:, 0] > 0)  # a probability above one half
        saliency = levels.saliency(size)
        assert saliency is not None
        assert_equal(saliency, torch.sigmoid(expected[:, 0]))


@given(height=st.integers(4, 60), width=st.integers(4, 30))
def test_any_other_size_is_brought_from_the_nearest_octave(height: int, width: int) -> None:
    levels, logits = learned((40, 24), 3)
    octave = min(3, max(0, round(math.log2(40 / height))))
    expected = F.interpolate(logits[octave], (height, width), mode="bilinear", align_corners=False)
    assert torch.equal(levels.mask((height, width)), expected[:, 0] > 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3)])
def test_tiny_maps_are_always_on(size: Pair) -> None:
    levels, _ = learned((12, 12), 2)
    assert levels.mask(size).all()
    assert levels.mask(size).shape == (2, *size)
    assert levels.gate(size) is levels.saliency(size) is None


def test_an_octave_without_a_downsampler_is_pooled_from_the_last() -> None:
    levels, logits = learned((64, 64), 1)
    for size in ((16, 16), (8, 8), (4, 5)):
        assert torch.equal(levels.mask(size), GivenLevels(logits[1][:, 0] > 0).mask(size))
        assert levels.gate(size) is levels.saliency(size) is None


@pytest.mark.parametrize(
    ("sizes", "octaves"),
    [([], 0), ([(38, 38)], 0), ([(38, 38), (19, 19)], 1), ([(5, 5), (3, 3), (1, 1)], 3), ([(4, 3), (3, 3)], 3)],
)
def test_a_network_gets_the_downsamplers_it_needs(sizes: list[Pair], octaves: int) -> None:
    assert learned_octaves((38, 38), sizes) == octaves


def test_predicted_masks_meet_their_targets() -> None:
    logits, forced = torch.full((1, 1, 8, 8), -5.0), torch.zeros(1, 8, 8, dtype=torch.bool)
    forced[0, 2, 3] = True
    levels = LearnedLevels(logits, Octaves(), 0.5, None, target=lambda size: GivenLevels(forced).mask(size))
    assert torch.equal(levels.mask((8, 8)), forced)


# -- the gradient that masks take --------------------------------------------------------------------------------


def entered(live: bool) -> tuple[Features, Selection, list[Tensor], Tensor]:
    """Features as they enter, their selection, the logits of its two octaves, and the map itself."""
    levels, _ = learned((8, 8), 1, live=live)
    selection = Selection(levels, 2, (8, 8), torch.device("cpu"), Options())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return MaskedFeatures.make(x, selection, (8, 8), full=True), selection, levels.octaves, x


def test_the_effect_of_a_pixel_reaches_its_saliency_active_or_not() -> None:
    """Straight through: behind the first guided operation a pixel counts as mask + saliency - saliency."""
    features, selection, logits, x = entered(live=True)
    weights = [torch.randn(3, 3, 3, 3, dtype=torch.float64) for _ in range(3)]

    y = F.silu(F.conv2d(features, weights[0], padding=1))
    y = F.conv2d(F.conv2d(y, weights[1], stride=2, padding=1), weights[2], padding=1)
    found = torch.autograd.grad(y.square().mean((2, 3)).sum(), logits, retain_graph=True)

    gates = []
    for level, size in zip(logits, [(8, 8), (4, 4)], strict=True):
        saliency = level.sigmoid()
        gates.append(selection.mask(size) + saliency - saliency.detach())
    z = F.silu(F.conv2d(x, weights[0], padding=1)) * gates[0]
    z = F.conv2d(F.conv2d(z, weights[1], stride=2, padding=1) * gates[1], weights[2], padding=1)
    # Behind the last convolution the reader squares before it masks.
    expected = torch.autograd.grad((z.square() * gates[1]).mean((2, 3)).sum(), logits)
    for actual, wanted, size in zip(found, expected, [(8, 8), (4, 4)], strict=True):
        assert_equal(actual, wanted)
        inactive = ~selection.mask(size)
        assert inactive.any()
        # Only where nothing that reads a pixel is active, nor anything around, does it get none.
        assert (actual[inactive] != 0).double().mean() > 0.5


def test_what_reads_full_features_whole_gives_their_mask_no_gradient() -> None:
    features, _, logits, _ = entered(live=True)
    entry, coarse = torch.autograd.grad(F.max_pool2d(F.relu(features), 2).sum(), logits, retain_graph=True)
    through_the_downsampler = torch.autograd.grad(logits[1], logits[0], coarse)[0]
    assert (coarse != 0).all()
    assert_equal(entry, through_the_downsampler)


@pytest.mark.parametrize("detached", [False, True])
def test_without_a_live_mask_there_is_no_gradient(detached: bool) -> None:
    features, _, logits, _ = entered(live=detached)
    features = features.detach() if detached else features
    for result in (features.sum(), torch.cat([features, features], 1).sum(), (features + features).sum()):
        assert not result.requires_grad
    assert logits[0].grad is None


@every_storage
def test_given_masks_take_no_gradient(storage: str) -> None:
    mask = torch.rand(1, 4, 4) < 0.5
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(guide(x, select(mask, storage)).sum(), x)
    assert_equal(found, keep(torch.ones_like(x), mask))


# -- independence of the batch -----------------------------------------------------------------------------------


def network() -> nn.Module:
    conv = lambda stride: nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1), nn.BatchNorm2d(4), nn.ReLU())  # noqa: E731
    body = [conv(1), conv(1), conv(2), nn.MaxPool2d(3, 2, 1), conv(1), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), *body).double().eval()


@every_storage
@given(mask=strategies.masks(3, (13, 10)))
def test_an_image_gives_the_same_whatever_its_batch(storage: str, mask: Tensor) -> None:
    x = torch.randn(3, 3, 13, 10, dtype=torch.float64)
    model = sparsenet.selectify(network(), at="0", selector=sparsenet.GivenMask(), example_inputs=x, backend=storage)
    with torch.no_grad():
        with sparsenet.use_mask(mask):
            together = model(x)
        for i in range(3):
            with sparsenet.use_mask(mask[i : i + 1]):
                assert_equal(model(x[i : i + 1]), together[i : i + 1])


@every_storage
def test_so_it_does_with_a_learned_selector(storage: str) -> None:
    x = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    model = sparsenet.selectify(network(), at="0", selector=nn.Conv2d(4, 1, 3, 1, 1), example_inputs=x, backend=storage)
    with torch.no_grad(), sparsenet.record(model) as record:
        together, masks = model(x), record.masks
        assert 0.1 < record.density[20, 20] < 0.9
        for i in range(3):
            assert_equal(model(x[i : i + 1]), together[i : i + 1])
            assert all(torch.equal(record.masks[size][0], masks[size][i]) for size in masks)


@pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (None, True),
        (Frame.plain(2, (12, 16)), True),
        (Frame([(6, 8), (6, 8)], [(12, 16), (12, 16)], (12, 16)), False),  # enlarged
        (Frame([(6, 8), (6, 8)], [(6, 8), (6, 8)], (8, 8)), False),  # padded
    ],
)
def test_whether_a_mask_is_full_is_told_where_it_is_all_that_counts(
    frame: Frame | None, told: bool, full: bool
) -> None:
    masks = torch.ones(2, 6, 8, dtype=torch.bool)
    masks[1, 5, 7] = full
    regions = check_regions(masks)
    assert regions.full(frame, 2) is (full if told else None)
    assert regions.full(frame, 3) is None
    if told:
        assert regions.entry_mask(frame, 2, torch.device("cpu")).all() == full
    assert check_regions([torch.zeros(0, 4)] * 2).full(frame, 2) is None
