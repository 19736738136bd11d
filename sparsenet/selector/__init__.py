"""Where masks come from: the Selective Module, masks that the caller gives, and the chain of downsamplers."""

from sparsenet.selector.selective_module import SelectiveModule
from sparsenet.selector.selector import GivenMask, Selector

__all__ = ["GivenMask", "SelectiveModule", "Selector"]
