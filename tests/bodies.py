"""A stage and what follows it: what the tests of frozen sequences put their layers into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sparsenet
from sparsenet import GivenMask
from tests.models import blobs, with_lively_norms


class Net(nn.Module):
    """A stage of some channels and what follows it."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.stage = nn.Conv2d(3, width, 3, padding=1)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.stage(x))


def selective(body: nn.Module, width: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = with_lively_norms(Net(body, width)).to(dtype)
    return sparsenet.selectify(net, "stage", selector=GivenMask(), example_inputs=images(dtype=dtype))


def images(batch: int = 2, size: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype)


@contextmanager
def masked(seed: int = 0, batch: int = 2, size: int = 12) -> Iterator[None]:
    with torch.no_grad(), sparsenet.use_mask(blobs(batch, (size, size), seed)):
        yield
