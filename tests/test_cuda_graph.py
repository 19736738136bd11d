"""Recordings in place of a frozen model's call. What is recorded here is the call itself: as on a device, a replay
reads the recording's own inputs and writes to its own outputs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsenet
from sparsenet import constants
from sparsenet.cuda_graph import MOST_GRAPHS, GraphedCall, one_device
from sparsenet.freeze import record_calls
from sparsenet.sites import ActiveSites
from tests.models import selective_branches

CPU = torch.device("cpu")


class Recording:
    """A graph without a device."""

    made: list[Recording]

    def __init__(self) -> None:
        self.made.append(self)
        self.replays = 0

    def capture(self, call: Callable[[], Any]) -> Any:
        self.call, self.outputs = call, call()
        for output in tree_leaves(self.outputs):
            if isinstance(output, Tensor):
                output.fill_(float("nan"))  # what is recorded has not run yet
        return self.outputs

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(tree_leaves(self.outputs), tree_leaves(self.call()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)


@pytest.fixture
def made() -> list[Recording]:
    Recording.made = []
    return Recording.made


def recorded(model: nn.Module, example: Any, **options: Any) -> Any:
    frozen = sparsenet.freeze(model, example)
    record_calls(frozen, GraphedCall(frozen, CPU, list, graph=Recording, **options))
    return frozen


def frozen_branches(**options: Any) -> tuple[Any, Any]:
    model = selective_branches(dtype=torch.float32)
    images = torch.rand(2, 3, 20, 20)
    return recorded(model, images, **options), sparsenet.freeze(model, images)


def test_one_recording_for_each_form_of_inputs(made: list[Recording]) -> None:
    graphed, plain = frozen_branches()
    forms = [(2, 20), (2, 20), (1, 20), (2, 24), (1, 20)]
    with torch.no_grad():
        for batch, size in forms:
            images = torch.rand(batch, 3, size, size)
            torch.testing.assert_close(graphed(images), plain(images))
    assert [recording.replays for recording in made] == [2, 2, 1]


def test_results_stay_as_they_are_and_inputs_are_read_anew(made: list[Recording]) -> None:
    graphed, plain = frozen_branches()
    images = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        first = graphed(images)
        kept = first.clone()
        images.mul_(0.5)
        second = graphed(images)
        torch.testing.assert_close(second, plain(images))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert len(made) == 1


def test_inference_mode(made: list[Recording]) -> None:
    graphed, plain = frozen_branches()
    with torch.inference_mode():
        images = torch.rand(2, 3, 20, 20)
        torch.testing.assert_close(graphed(images), plain(images))
        torch.testing.assert_close(graphed(images), plain(images))
    assert len(made) == 1


def test_masks_and_boxes_are_inputs(made: list[Recording]) -> None:
    graphed, plain = frozen_branches()
    images = torch.rand(2, 3, 20, 20)
    box = torch.tensor([[1.0, 2, 9, 8]])
    with torch.no_grad():
        for regions in [[box, box], [box.repeat(3, 1) + torch.rand(3, 4), box + 4], [box[:0], box]]:
            with sparsenet.use_mask(regions):
                torch.testing.assert_close(graphed(images), plain(images))
        assert len(made) == 1  # however many boxes there are
        for _ in range(2):
            with sparsenet.use_mask(torch.rand(2, 5, 5) < 0.3):
                torch.testing.assert_close(graphed(images), plain(images))
        assert len(made) == 2
        torch.testing.assert_close(graphed(images), plain(images))
    assert len(made) == 3


def test_the_form_used_longest_ago_is_dropped(made: list[Recording]) -> None:
    graphed, _ = frozen_branches()
    with torch.no_grad():
        for batch in [*range(1, MOST_GRAPHS + 1), 1, MOST_GRAPHS + 1]:
            graphed(torch.rand(batch, 3, 20, 20))
        assert len(made) == MOST_GRAPHS + 1
        graphed(torch.rand(1, 3, 20, 20))  # used since
        assert len(made) == MOST_GRAPHS + 1
        graphed(torch.rand(2, 3, 20, 20))  # dropped
    assert len(made) == MOST_GRAPHS + 2


def test_watched_passes_run_as_they_are_written(made: list[Recording]) -> None:
    graphed, plain = frozen_branches()
    images = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        with sparsenet.record(graphed) as rec:
            torch.testing.assert_close(graphed(images), plain(images))
        assert rec.masks[20, 20].sum() == 240
        with sparsenet.use_backend("reference"):
            torch.testing.assert_close(graphed(images), plain(images), rtol=1e-4, atol=1e-5)
    assert not made


def test_the_fastest_of_several_backends_is_kept(made: list[Recording]) -> None:
    graphed, plain = frozen_branches(backends=(None, "reference"))
    images = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        torch.testing.assert_close(graphed(images), plain(images), rtol=1e-4, atol=1e-5)
        first = [recording.replays for recording in made]
        torch.testing.assert_close(graphed(images), plain(images), rtol=1e-4, atol=1e-5)
    assert len(made) == 2
    assert sorted(recording.replays - before for recording, before in zip(made, first, strict=True)) == [0, 1]


def test_the_structure_of_outputs_and_other_arguments(made: list[Recording]) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor, *, scale: float = 1.0) -> Any:
            found = self.conv(images) * scale
            return {"map": found, "more": [found.mean((2, 3)), "name"]}

    graphed = recorded(Several().eval(), torch.rand(1, 3, 8, 8))
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        once, twice = graphed(images), graphed(images, scale=2.0)
    torch.testing.assert_close(twice["map"], once["map"] * 2)
    assert twice["more"][1] == "name"
    assert len(made) == 2
    with pytest.raises(TypeError, match="a CUDA graph is for arguments of one form, and set cannot be compared"):
        graphed(images, scale={1.0})


def test_copies_run_without_recordings(made: list[Recording]) -> None:
    graphed, plain = frozen_branches()
    images = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(graphed)(images), plain(images))
    assert not made


def test_what_is_kept_between_passes_is_held_by_the_recording() -> None:
    size = (13, 6)  # of no other test
    with constants.held() as held:
        sites = ActiveSites.all(1, size, CPU)
        assert ActiveSites.all(1, size, CPU) is sites
    ActiveSites.all(2, size, CPU)
    assert held == [sites, sites]


def test_what_cannot_be_recorded_says_so(made: list[Recording]) -> None:
    graphed, _ = frozen_branches()

    def refuse(self: Recording, call: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed._compiled_call_impl._graph = type("Refusing", (Recording,), {"capture": refuse})
    with pytest.raises(RuntimeError, match=r"not permitted.*Freeze the network before that, or without cuda_graph"):
        graphed(torch.rand(2, 3, 20, 20).requires_grad_(False))


def test_gradients_and_other_devices_are_refused(made: list[Recording]) -> None:
    graphed, _ = frozen_branches()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        graphed(torch.rand(2, 3, 20, 20).requires_grad_())
    with pytest.raises(ValueError, match="an input is on meta, but the frozen model's weights are on cpu"):
        graphed(torch.rand(2, 3, 20, 20, device="meta"))
    assert not made


def test_a_mask_that_decides_shapes_is_refused() -> None:
    images = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape("sparsenet.selectify(..., capacity=0.3)")):
        sparsenet.freeze(selective_branches(None), images, cuda_graph=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    images = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a CUDA device, and PyTorch finds none here: freeze without it"):
        sparsenet.freeze(selective_branches(), images, cuda_graph=True)


def test_weights_must_be_on_one_cuda_device() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match=r"they are on cpu, meta: model.cuda\(\)"):
        one_device(model)
    with pytest.raises(ValueError, match="they are on no device"):
        one_device(nn.ReLU())
