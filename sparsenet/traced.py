"""`traced`: a selective model as an ordinary graph of PyTorch's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsenet import context
from sparsenet.selector.selector import check_capacity
from sparsenet.surgery import check_model, quietly


def traced(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A model of `selectify(..., capacity=...)` as gathers, products and the rest of PyTorch's own operations, for
    inputs of these very shapes: what `torch.compile(fullgraph=True)`, CUDA graphs and exporters take.

    Guided maps are tensor subclasses whose rules are Python, which Dynamo cannot read; here the model runs once, in
    evaluation mode, while `torch.export` writes down what is computed, by the `rows` backend. No number of active
    pixels is asked of the device, so that nothing of that run but the shapes remains.

        fast = torch.compile(sparsenet.traced(model, images), fullgraph=True)

    Args:
        model: selective, or any other that `torch.export` takes; it is left as it is, and shares its parameters with
            the result.
        example_inputs: what the model is called with, in one of the forms of `selectify`; no list of images.

    Returns:
        A `torch.fx.GraphModule` with the model's call and outputs. It takes the masks from the model's own selector.

    Raises:
        ValueError: for a selective model without capacity, inside `use_mask`, for frozen, compiled and scripted models.
        Whatever `torch.export` raises where control flow depends on numbers, as in a detector's post-processing.
    """
    check_model(model, inplace=False)
    check_capacity(model, "the shapes of a pass follow from its mask, and a graph has fixed ones")
    if context.current().regions is not None:
        raise ValueError("a given mask would become a constant of the graph: trace outside of use_mask")
    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    args = () if kwargs else example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with quietly(model), context.setting(backend=None, supervision=None, observers=()):
        graph = torch.export.export(model, args, kwargs, strict=False).module()
    graph.graph.eliminate_dead_code()  # questions about dtypes among it, which Dynamo does not take for operations
    graph.recompile()
    return graph
