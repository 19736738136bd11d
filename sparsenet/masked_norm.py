"""The batch normalisation across processes that surgery leaves in place of `nn.SyncBatchNorm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet.features import Features
from sparsenet.rules.norm import batch_norm


class MaskedSyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` whose statistics are of the active pixels of all processes, on any device; on anything
    but guided features, and outside of training, it does as ever.

    A class of its own because the original gathers its statistics in C++, where guided features look like a map.
    """

    @classmethod
    def guide(cls, norm: nn.SyncBatchNorm) -> None:
        norm.__class__ = cls

    def release(self) -> None:
        self.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        if not (isinstance(input, Features) and self.training and torch.distributed.is_initialized()):
            return super().forward(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / int(self.num_batches_tracked)
        group = self.process_group or torch.distributed.group.WORLD
        statistics = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return batch_norm(
            F.batch_norm, input, *statistics, self.weight, self.bias, True, momentum or 0.0, self.eps, group=group
        )
