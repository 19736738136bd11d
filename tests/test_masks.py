"""Random masks of blobs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsenet.masks import blobs
from tests import strategies
from tests.strategies import Pair


@given(batch=strategies.batches, size=strategies.sizes, density=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_density_is_met_in_every_image(batch: int, size: Pair, density: float, seed: int) -> None:
    mask = blobs(batch, size, density, seed)
    assert mask.shape == (batch, *size)
    assert mask.dtype == torch.bool
    pixels = size[0] * size[1]
    wanted = max(round(density * pixels), int(density > 0))
    assert mask.flatten(1).sum(1).tolist() == [wanted] * batch
    assert torch.equal(mask, blobs(batch, size, density, seed))


def test_blobs_hang_together() -> None:
    """Most active pixels have active neighbours, unlike scattered ones, of which 0.2 ** 4 would."""
    mask = blobs(4, (64, 64), 0.2)
    inside = mask[:, 1:-1, 1:-1] & mask[:, 2:, 1:-1] & mask[:, :-2, 1:-1] & mask[:, 1:-1, 2:] & mask[:, 1:-1, :-2]
    assert inside.sum() > 0.5 * mask.sum()
    assert not torch.equal(blobs(1, (64, 64), 0.2, 0), blobs(1, (64, 64), 0.2, 1))


def test_a_density_that_is_none() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        blobs(1, (4, 4), 1.5)
