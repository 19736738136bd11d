"""What each kind of operation does to guided features: importing a module registers its rules."""

from sparsenet.rules import combine, conv, metadata, norm, pointwise, pool, reduce

__all__ = ["combine", "conv", "metadata", "norm", "pointwise", "pool", "reduce"]
