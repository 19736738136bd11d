"""The verdicts on what the paper found."""

from dataclasses import replace

import numpy as np
import pytest

from claims import Claim, checked, markdown
from evaluation.detector import Evaluation
from evaluation.voc_map import Matches


def measured(macs: float, found: float, seeds: int = 2):
    """A row whose detector computes this share of the MACs and finds this share of 200 objects, one an image."""
    correct = np.arange(200) < 200 * found
    matches = Matches(
        positives=np.ones((200, 1), int),
        image=np.arange(200)[correct],
        label=np.ones(correct.sum(), int),
        correct=correct[correct],
    )
    return [({"macs": macs * (1 + 0.01 * seed), "dense_macs": 1.0}, Evaluation(matches)) for seed in range(seeds)]


MAP = Claim("it finds more", "a", "b", "map")


@pytest.mark.parametrize(("more", "less", "holds"), [(0.9, 0.5, True), (0.5, 0.9, False), (0.5, 0.5, None)])
def test_accuracy_is_told_apart_by_its_interval(more, less, holds):
    found = checked(MAP, measured(0.5, more), measured(0.5, less))
    assert found["holds"] is holds
    low, high = found["range"]
    assert low <= found["difference"] <= high
    opposite = checked(replace(MAP, holds=False), measured(0.5, more), measured(0.5, less))
    assert opposite["holds"] is (holds is not True)


def test_saved_work_is_told_apart_by_the_seeds():
    claim = Claim("it cuts more", "a", "b", "macs")
    found = checked(claim, measured(0.5, 1), measured(0.7, 1))
    assert found["difference"] == pytest.approx(100 * (0.2 + 0.202) / 2, abs=0.01)
    assert found["range"] == [20.0, 20.2] and found["holds"] is True
    assert checked(claim, measured(0.7, 1), measured(0.5, 1))["holds"] is False
    mixed = measured(0.5, 1, 1) + measured(0.6, 1, 1)
    assert checked(claim, mixed, measured(0.55, 1))["holds"] is None
    assert "| MACs cut, a − b" in markdown([found]) and "| yes" in markdown([found])
