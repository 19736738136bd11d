"""The kernel of attention, against PyTorch's own in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsenet.kernels import attention, machine

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))


def operands(count: int, keys: int, channels: int, size: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (n, C) and (m, C) twice, as a layer of all three leaves them: rows of rows."""
    generator = torch.Generator().manual_seed(seed)
    beside = size * torch.randn(count, 3 * channels, generator=generator)
    pooled = size * torch.randn(keys, 2 * channels, generator=generator)
    return beside[:, :channels], pooled[:, :channels], pooled[:, channels:]


@given(
    count=st.integers(0, 70),
    keys=st.integers(1, attention.MOST_KEYS),
    channels=st.integers(1, 20),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_the_kernel(count: int, keys: int, channels: int, size: float, seed: int) -> None:
    """To a few roundings of the largest value, times those of the largest score, and nothing beyond is written to."""
    query, key, value = operands(count, keys, channels, size, seed)
    memory = torch.full((count + 2, channels), 7.0)
    attention.attend(query, key, value, memory[1:-1]).run()
    assert memory[[0, -1]].eq(7.0).all()
    exact = F.scaled_dot_product_attention(*(part.double()[None] for part in (query, key, value)))[0]
    scores = query.double().abs() @ key.double().abs().T / channels**0.5
    largest = scores.max().item() if count else 0.0
    allowed = 8 * torch.finfo(torch.float32).eps * (largest + 1) * value.abs().max().item()
    assert ((memory[1:-1] - exact).abs() <= allowed).all()


@pytest.mark.parametrize("channels", [1, 32, attention.MOST_CHANNELS])
def test_channels_of_all_modules(channels: int) -> None:
    query, key, value = operands(40, 33, channels, 1.0, 0)
    out = torch.empty(40, channels)
    attention.attend(query, key, value, out).run()
    exact = F.scaled_dot_product_attention(*(part.double()[None] for part in (query, key, value)))[0]
    torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-5)


def test_what_is_no_number_reaches_those_who_attend_to_it_alone() -> None:
    query, key, value = operands(3, 5, 4, 1.0, 0)
    query[1, 0] = torch.nan
    out = torch.empty(3, 4)
    attention.attend(query, key, value, out).run()
    assert out.isnan().any(1).tolist() == [False, True, False]
