"""Block sizes of Triton's kernels, measured once for a shape of layer. Triton keeps the winners on disk, beside the
compiled kernels (`TRITON_CACHE_DIR`, `~/.triton/cache`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
from triton import testing

# Numbers of sites up to which a layer is small, and beyond which block sizes no longer change.
FEWEST, MOST = 1 << 9, 1 << 17

# Milliseconds for each block size, before and while it is timed. Triton's own are 25 and 100, by which a network of
# forty shapes of layers would take most of a minute, not counting what compilers take.
WARMUP, TIMED = 5, 25


def bucket(sites: int) -> int:
    """The number of sites as block sizes go by it: a power of two, so that the next mask of the same network finds its
    layers tuned."""
    return min(max(triton.next_power_of_2(sites), FEWEST), MOST)


def tuned(configs: list[triton.Config], key: list[str], fits: Callable[..., bool], interpreted: dict[str, int]) -> Any:
    """Decorates a kernel: the fastest of `configs` that fit runs.

    Args:
        key: arguments by which layers are tuned apart; the dtypes of tensors come by themselves.
        fits: whether a block size by name is worth measuring for an argument by name. The last configuration must serve
            all, and is measured if no other is worth it.
        interpreted: the block sizes under Triton's interpreter, where nothing is measured.
    """

    def worth(configs: list[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
        found = [config for config in configs if fits(**config.kwargs, arguments={**arguments, **more})]
        return found or configs[-1:]

    if triton.knobs.runtime.interpret:
        return triton.autotune([triton.Config(interpreted)], key)
    timed = functools.partial(testing.do_bench, warmup=WARMUP, rep=TIMED)
    pruned = {"early_config_prune": worth}
    return triton.autotune(configs, key, prune_configs_by=pruned, do_bench=timed, cache_results=True)


def within(block: int, length: int, least: int = 16) -> bool:
    """Whether a block is not mostly idle along so long a side."""
    return block <= max(least, triton.next_power_of_2(length))
