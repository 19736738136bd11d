"""Every test: one thread, the same random numbers on each run, NaN in all memory that nothing has written, and no
measurements but its own session's. Triton's kernels run in its interpreter, on CPU: `make gpu` runs those on devices.

`HYPOTHESIS_PROFILE=thorough` looks for new examples, many times as many.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
# On devices, whose kernels are compiled for every new geometry.
hypothesis.settings.register_profile("device", deadline=None, max_examples=8, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class TorchRandom:
    """PyTorch's generator as Hypothesis manages one: every example starts from seed 0, and replays exactly."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()
hypothesis.register_random(torch_random)  # which keeps only a weak reference

torch.set_num_threads(1)
# PyTorch then fills uninitialised memory with NaN (`torch.utils.deterministic.fill_uninitialized_memory`).
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session", autouse=True)
def own_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured while other tests run is nothing for a user's models to go by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
