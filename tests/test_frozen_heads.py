"""Layers that each read a map of their own and leave the guided region side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsenet
from sparsenet import GivenMask
from sparsenet.features import Features
from sparsenet.frozen_heads import side_by_side
from sparsenet.kernels import machine
from tests import strategies

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason="kernels compute what is side by side")


class Net(nn.Module):
    """Two maps behind the stage, any of them read by each of some layers."""

    def __init__(self, layers: list[tuple[int, int, int]]):
        super().__init__()
        self.stage = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.reads = [place for place, _, _ in layers]
        self.layers = nn.ModuleList(
            nn.Conv2d((4, 5)[place], outputs, kernel, padding=kernel // 2) for place, outputs, kernel in layers
        )
        self.together: list[Tensor | None] = []

    def forward(self, x: Tensor) -> Tensor:
        first = self.stage(x)
        both = first, self.down(first)
        maps = [both[place] for place in self.reads]
        together = side_by_side(list(self.layers), maps) if isinstance(first, Features) else None
        self.together.append(together)
        if together is not None:
            return together
        each = [layer(read) for layer, read in zip(self.layers, maps, strict=True)]
        return torch.cat([one.permute(0, 2, 3, 1).flatten(1) for one in each], 1)


@torch.no_grad()
@given(
    layers=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40), st.sampled_from([1, 3])), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    size=strategies.sizes,
    data=st.data(),
)
def test_of_any_maps_and_channels(
    layers: list[tuple[int, int, int]], batch: int, size: tuple[int, int], data: st.DataObject
) -> None:
    """Of which any may be the largest."""
    images = torch.randn(batch, 3, *size, dtype=torch.float64)
    model = sparsenet.selectify(Net(layers).double().eval(), "stage", selector=GivenMask(), example_inputs=images)
    frozen = sparsenet.freeze(model, images)
    mask = data.draw(strategies.masks(batch, size))
    for _ in range(2):
        with sparsenet.use_mask(mask):
            torch.testing.assert_close(frozen(images), model(images))
    if not mask.all() and all(layer.layer.waiting("guided") for layer in frozen.layers):
        assert frozen.together[-1] is not None
    with sparsenet.use_mask(mask), sparsenet.record(frozen) as found, sparsenet.record(model) as expected:
        torch.testing.assert_close(frozen(images), model(images))
    assert found.macs == expected.macs
