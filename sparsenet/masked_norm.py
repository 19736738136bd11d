"""The batch normalisation across processes that surgery leaves in place of `nn.SyncBatchNorm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.features import Features
from sparsenet.rules.norm import batch_norm, normalised_over


class MaskedSyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` whose statistics are of the active pixels of all processes, where its input is guided
    features; and which runs on CPUs, on ordinary maps too, where the original does not. Outside of training, and on
    ordinary maps of a GPU, it does as ever.

    A class of its own because the original gathers its statistics in C++, where guided features look like a map.
    """

    process_group: Any

    @classmethod
    def guide(cls, norm: nn.Module) -> None:
        norm.__class__ = cls

    def release(self) -> None:
        self.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        ours = isinstance(input, Features) or input.device.type == "cpu"
        if not (ours and self.training and torch.distributed.is_initialized()):
            return super().forward(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / int(self.num_batches_tracked)
        group = self.process_group or torch.distributed.group.WORLD
        statistics = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        parameters = (self.weight, self.bias)
        if isinstance(input, Features):
            return batch_norm(
                F.batch_norm, input, *statistics, *parameters, True, momentum or 0.0, self.eps, group=group
            )
        rows = input.movedim(1, -1).reshape(-1, input.shape[1])
        normalised = normalised_over(rows, input, *statistics, *parameters, momentum or 0.0, self.eps, group)
        if normalised is None:
            raise ValueError(f"no variance of one value per channel in all processes together: {tuple(input.shape)}")
        return normalised
