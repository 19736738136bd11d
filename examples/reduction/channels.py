"""Channel reduction: filters of small norm go (Li et al., "Pruning Filters for Efficient ConvNets", 2017)."""

from __future__ import annotations

from typing import Any

import torch_pruning
from torch import nn

from reduction.graph import Convolutions, head_convolutions


def without_weak_filters(detector: Any, share: float) -> nn.Module:
    """Keep in every layer but the heads' last the share of the filters whose L1 norms are largest; in place."""
    network = Convolutions(detector)
    torch_pruning.pruner.MagnitudePruner(
        network,
        network.example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None),
        pruning_ratio=1 - share,
        ignored_layers=head_convolutions(detector),
        unwrapped_parameters=network.parameters_of_no_module,
    ).step()
    return detector
