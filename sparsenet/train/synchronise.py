"""Batch normalisation over all processes while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparsenet.masked_norm import MaskedSyncBatchNorm


@contextmanager
def synchronised(model: nn.Module, group: Any = None) -> Iterator[None]:
    """Inside, batch normalisation in training takes its statistics over the processes of a group: over all pixels of
    ordinary maps, over the active ones of guided features. For models before or after surgery, on any device.

        wrapped = nn.parallel.DistributedDataParallel(model)  # before, for on CPUs it refuses what it then gets
        with sparsenet.train.synchronised(model):
            ...  # train

    Modules change their class and keep everything else: their names, parameters and hooks. Afterwards the model is as
    it was, so that checkpoints and `freeze` see what they know. `nn.BatchNorm1d`, `2d` and `3d` and `nn.SyncBatchNorm`
    are meant; subclasses keep their own forward.

    Args:
        group: of processes; all of them if `None`.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    try:
        for module in model.modules():
            if type(module) in kinds:
                changed.append((module, type(module)))
                MaskedSyncBatchNorm.guide(module)
                if changed[-1][1] is not nn.SyncBatchNorm:
                    module.process_group = group
        yield
    finally:
        for module, kind in changed:
            if kind is not nn.SyncBatchNorm:
                del module.process_group
            module.__class__ = kind
