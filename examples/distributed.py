"""One run in several processes, as torchrun starts them; in one process, what it would be without this file.

torchrun --nproc-per-node 4 examples/...
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def launched() -> int:
    """How many processes torchrun has started, joined or not; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the processes that torchrun has started, if it has, and leaves them at the end. They talk by NCCL where the
    device is "cuda", which is then the GPU of the process's local rank, and by Gloo elsewhere."""
    if launched() == 1:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def together() -> bool:
    """Whether other processes take part in the run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if together() else 0


def world() -> int:
    return dist.get_world_size() if together() else 1


def first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def share(batch_size: int) -> range:
    """The places in a batch that are this process's: equally many for each.

    Raises:
        ValueError: the batch cannot be divided.
    """
    each, rest = divmod(batch_size, world())
    if rest:
        raise ValueError(f"a batch of {batch_size} images cannot be divided among {world()} processes: choose another")
    return range(rank() * each, (rank() + 1) * each)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, without gradient."""
    values = values.detach().clone()
    if together():
        dist.all_reduce(values)
        values /= world()
    return values


def gathered(mine: Any) -> list[Any]:
    """What each process gives, in the order of ranks, for all of them."""
    if not together():
        return [mine]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, mine)
    return found
