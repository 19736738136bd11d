"""Every test: one thread, the same random numbers on each run, and NaN in all memory that nothing has written.

`HYPOTHESIS_PROFILE=thorough` looks for new examples, many times as many.
"""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
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


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)
