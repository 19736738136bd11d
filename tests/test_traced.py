"""A selective model as a graph of PyTorch's own operations, and compiled whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import sparsenet
from tests.models import selective_branches


def assert_same(graph: Any, model: nn.Module, batch: int, size: int, dtype: torch.dtype = torch.float64) -> None:
    tolerance = 1e-9 if dtype is torch.float64 else 1e-5
    for _ in range(2):  # of other images than it was made with, whose masks differ
        images = torch.rand(batch, 3, size, size, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), model(images), rtol=tolerance, atol=tolerance)


def test_a_graph_computes_what_the_model_does() -> None:
    model = selective_branches()
    graph: Any = sparsenet.traced(model, torch.rand(2, 3, 20, 20, dtype=torch.float64))
    assert_same(graph, model, 2, 20)
    names = {str(node.target) for node in graph.graph.nodes}
    assert not [name for name in names if "nonzero" in name or "local_scalar" in name or ".item" in name]
    assert {parameter.data_ptr() for parameter in graph.parameters()} <= {p.data_ptr() for p in model.parameters()}


def test_tracing_leaves_nothing_behind() -> None:
    """No tensor of the tracer is among what is kept between passes."""
    model, images = selective_branches(), torch.rand(3, 3, 22, 18, dtype=torch.float64)  # of no other test
    sparsenet.traced(model, images)
    with torch.no_grad(), sparsenet.use_backend("reference"):
        expected = model(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_compiled_whole() -> None:
    model = selective_branches(dtype=torch.float32)
    graph = sparsenet.traced(model, torch.rand(2, 3, 20, 20))
    assert_same(torch.compile(graph, fullgraph=True), model, 2, 20, torch.float32)


def test_a_torchvision_network_compiled_whole() -> None:
    """By the compiler's front ends, for machine code of so many layers takes it a minute."""
    resnet, images = torchvision.models.resnet18(weights=None).eval(), torch.rand(2, 3, 64, 64)
    model = sparsenet.selectify(resnet, "layer1", capacity=0.3, example_inputs=images)
    compiled = torch.compile(sparsenet.traced(model, images), fullgraph=True, backend="aot_eager")
    assert_same(compiled, model, 2, 64, torch.float32)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images: Tensor, factor: Tensor) -> dict[str, Tensor]:
        return {"map": self.conv(self.stem(images)) * factor}


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_other_forms_of_inputs_and_outputs(form: str) -> None:
    images, factor = torch.rand(1, 3, 12, 12), torch.rand(())
    example, selector = (images, factor), sparsenet.SelectiveModule(4, 8)
    model = sparsenet.selectify(Named().eval(), "stem", selector=selector, capacity=0.5, example_inputs=example)
    args, kwargs = ((images, factor), {}) if form == "tuple" else ((), {"images": images, "factor": factor})
    graph = sparsenet.traced(model, args or kwargs)
    with torch.no_grad():
        torch.testing.assert_close(graph(*args, **kwargs), model(images, factor))


def test_what_cannot_be_a_graph() -> None:
    images = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape("sparsenet.selectify(..., capacity=0.3)")):
        sparsenet.traced(selective_branches(None), images)
    model = selective_branches()
    with pytest.raises(ValueError, match="a given mask would become a constant of the graph"):
        with sparsenet.use_mask(torch.ones(1, 2, 2).bool()):
            sparsenet.traced(model, images)
    with pytest.raises(ValueError, match="frozen already"):
        sparsenet.traced(sparsenet.freeze(model, images), images)
