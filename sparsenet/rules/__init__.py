"""What each kind of operation does to guided features: importing a module registers its rules."""

from sparsenet.rules import (
    channels,
    combine,
    conv,
    exits,
    linear,
    metadata,
    norm,
    pointwise,
    pool,
    reduce,
    resize,
    shape,
)

__all__ = [
    "channels",
    "combine",
    "conv",
    "exits",
    "linear",
    "metadata",
    "norm",
    "pointwise",
    "pool",
    "reduce",
    "resize",
    "shape",
]
