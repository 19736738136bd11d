"""What `profile` says of a frozen model, and its table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsenet
from sparsenet.selector import GivenMask


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.stem(x)))


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    selective = sparsenet.selectify(Network(), "stem", selector=GivenMask(), example_inputs=torch.rand(1, 3, 12, 12))
    return sparsenet.freeze(selective, torch.rand(1, 3, 12, 12))


def test_layers_with_their_density_and_multiply_accumulates(frozen):
    mask = torch.zeros(2, 12, 12, dtype=torch.bool)
    mask[:, :3, :4] = True
    with sparsenet.use_mask(mask):
        found = sparsenet.profile(frozen, torch.rand(2, 3, 12, 12), repeats=3)
    stem, body, last = found.layers
    assert [layer.path for layer in found.layers] == ["stem", "body.0", "last"]
    assert (stem.density, body.density, last.density) == (1, 12 / 144, 12 / 144)
    assert (stem.size, body.size) == ((12, 12), (12, 12))
    assert (stem.macs, body.macs, last.macs) == (2 * 144 * 216, 2 * 12 * 576, 2 * 12 * 32)
    assert all(0 < layer.ms < found.ms for layer in found.layers)
    assert all(
        layer.way in ("indirect", "winograd", "rows", "dense") and "ms against" in layer.reason
        for layer in found.layers
    )


def test_the_table_adds_up(frozen):
    with sparsenet.use_mask(torch.rand(1, 12, 12) < 0.5):
        found = sparsenet.profile(frozen, torch.rand(1, 3, 12, 12), repeats=2)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "size", "density", "MMACs", "ms", "share", "way", "reason"]
    assert [line.split()[0] for line in lines[1:4]] == ["stem", "body.0", "last"]
    shares = [float(line.split()[5].rstrip("%")) for line in lines[1:4]]
    rest = float(lines[4].split()[-1].rstrip("%"))
    assert lines[4].startswith("everything else")
    assert sum(shares) + rest == pytest.approx(100, abs=0.3)


def test_a_model_that_is_not_selective(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    frozen = sparsenet.freeze(Network(), torch.rand(1, 3, 12, 12))
    found = sparsenet.profile(frozen, torch.rand(1, 3, 12, 12), repeats=2)
    assert [layer.density for layer in found.layers] == [1, 1, 1]


def test_one_that_is_not_frozen():
    with pytest.raises(ValueError, match="not frozen"):
        sparsenet.profile(Network(), torch.rand(1, 3, 12, 12))
