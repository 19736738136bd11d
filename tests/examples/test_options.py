"""What options take, and what they say of the rest."""

from argparse import ArgumentTypeError

import pytest
import torch

import options


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (options.COUNT, {"1": 1, "12": 12}, {"0": "0 is no finite number at least 1", "-3": "at least 1"}),
        (options.NATURAL, {"0": 0}, {"-1": "at least 0"}),
        (options.POSITIVE, {"1e-3": 0.001}, {"0": "above 0", "-1": "above 0", "nan": "above 0", "inf": "above 0"}),
        (
            options.SHARE,
            {"1": 1.0, "0.3": 0.3},
            {"0": "0 is no finite number above 0", "1.5": "at most 1"},
        ),
        (options.DECAY, {"0.999": 0.999}, {"0": "above 0 and below 1", "1": "below 1"}),
        (options.PART, {"0": 0.0, "1": 1.0}, {"-0.1": "at least 0 and at most 1", "2": "at most 1"}),
    ],
)
def test_numbers(kind, taken, refused):
    assert {text: kind(text) for text in taken} == taken
    for text, said in refused.items():
        with pytest.raises(ArgumentTypeError, match=said):
            kind(text)
    with pytest.raises(ValueError):
        kind("many")
    assert kind.__name__ in ("int", "float")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [options.device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name, said in (
        ("cuda:2", "finds 2 GPUs here, and not 'cuda:2': give cpu"),
        ("gpu", "neither"),
        ("mps", "neither"),
    ):
        with pytest.raises(ArgumentTypeError, match=said):
            options.device(name)
