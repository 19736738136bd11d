"""Memory for the results of layers, used again within and between the passes of a frozen model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sparsenet.kernels import queue

# Elements from which memory is kept. The C library gives blocks of megabytes back to the system when they are freed,
# and every page of the next one faults. Small blocks it keeps itself.
LARGE = 1 << 18

_current: ContextVar[Workspace | None] = ContextVar("sparsenet.workspace", default=None)

use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
"""How many tensors hold a storage; without it nothing is kept."""


class Workspace:
    """Blocks of memory, each free again when no tensor but the block's own refers to it.

    What the last pass did not use is given back at its end.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many elements, (elements,), not initialised."""
        with self._lock:
            found: _Block | None = None
            for block in self._blocks:  # of those that fit, the smallest
                if elements <= block.elements <= 2 * elements and block.dtype is dtype and block.free():
                    found = block if found is None or block.elements < found.elements else found
            if found is None:
                found = _Block(elements, dtype)
                self._blocks.append(found)
            found.used = True
            return found.tensor[:elements]

    def trim(self) -> None:
        """Give back what was not used since the last time."""
        with self._lock:
            self._blocks = [block for block in self._blocks if block.used]
            for block in self._blocks:
                block.used = not block.free()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class _Block:
    def __init__(self, elements: int, dtype: torch.dtype):
        self.tensor = torch.empty(elements, dtype=dtype)
        self.elements, self.dtype = elements, dtype
        self.used = True
        self._storage = self.tensor.untyped_storage()
        self._alone = use_count(self._storage._cdata)

    def free(self) -> bool:
        return bool(use_count(self._storage._cdata) == self._alone)


def empty(rows: int, channels: int, like: Tensor) -> Tensor:
    """Rows (n, C), not initialised, in the workspace of the current pass if there is one and they are large; on other
    devices PyTorch keeps memory itself."""
    waiting = queue.current()
    if waiting is not None:
        waiting.expect(rows * channels * like.element_size())
    workspace = _current.get()
    if workspace is None or use_count is None or rows * channels < LARGE or like.device.type != "cpu":
        return like.new_empty(rows, channels)
    return workspace.take(rows * channels, like.dtype).view(rows, channels)


def scratch(elements: int, like: Tensor) -> Tensor:
    """Memory that a job writes to and reads again, (elements,), not initialised: those of a queue, which run one after
    the other, have the same."""
    waiting = queue.current()
    return like.new_empty(elements) if waiting is None else waiting.scratch(elements, like)


@contextmanager
def used(workspace: Workspace) -> Iterator[None]:
    """Let the layers that run inside take their memory from a workspace."""
    token = _current.set(workspace)
    try:
        yield
    finally:
        _current.reset(token)
