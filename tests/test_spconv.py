"""spconv's tables, which its CUDA path reads, and what it cannot compute."""

import importlib
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsenet.backends import spconv
from sparsenet.sites import KernelMap


@given(sites=st.integers(0, 20), taps=st.sampled_from([1, 3, 9, 31, 32]), inputs=st.integers(0, 9))
def test_masked_pairs(sites: int, taps: int, inputs: int) -> None:
    """From the pairs alone, as implicit gemm reads them: where a bit is set, and only there, a tap has an input row."""
    table = torch.randint(0, inputs + 2, (sites, taps), dtype=torch.int32)
    pairs, bits, order = KernelMap(table, inputs).patterns
    assert {part.dtype for part in (pairs, bits, order)} == {torch.int32}
    assert pairs.shape == (taps, sites) and pairs.is_contiguous()
    assert pairs.T.tolist() == [[row if row < inputs else -1 for row in line] for line in table.tolist()]
    for site, number in enumerate(bits.tolist()):
        assert [number >> tap & 1 for tap in range(taps)] == [int(row < inputs) for row in table[site].tolist()]
    assert sorted(order.tolist()) == list(range(sites))
    assert bits[order.long()].tolist() == sorted(bits.tolist())


@given(sites=st.integers(0, 20), inputs=st.integers(0, 9))
def test_masked_pairs_multiply_as_the_convolution(sites: int, inputs: int) -> None:
    """The definition of implicit gemm, tap by tap."""
    table = torch.randint(0, inputs + 2, (sites, 4), dtype=torch.int32)
    rows, weight = torch.randn(inputs, 3).double(), torch.randn(5, 3, 2, 2).double()
    pairs, bits, order = KernelMap(table, inputs).patterns
    out = torch.zeros(sites, 5).double()
    for site in order.tolist():
        for tap in range(4):
            if int(bits[site]) >> tap & 1:
                out[site] += weight.flatten(2)[:, :, tap] @ rows[pairs[tap, site]]
    padded: Tensor = torch.cat([rows, rows.new_zeros(2, 3)])
    torch.testing.assert_close(out, torch.einsum("stc,oct->so", padded[table.long()], weight.flatten(2)))


def test_reasons() -> None:
    weight = torch.empty(4, 4, 3, 3)
    assert spconv.unsupported(weight, 1) is None
    assert spconv.unsupported(weight, 2) == "spconv has no grouped convolution"
    assert spconv.unsupported(weight.bfloat16(), 1) == "spconv has no torch.bfloat16 on CPU"
    with torch.autocast("cpu", torch.bfloat16):
        assert spconv.unsupported(weight, 1) == "spconv has no torch.bfloat16 on CPU"


def test_more_elements_than_it_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(1, 1 << 16).expand(1 << 15, -1)
    table = torch.zeros(1, 9, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="32 bits, and here are more: use backend='rows' or 'triton'"):
        spconv.convolve(rows, torch.zeros(1, 1, 3, 3), None, 1, KernelMap(table, 5))


def test_its_port_computes_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls on the other package, which has spconv's interface; here spconv stands in for it."""
    monkeypatch.setitem(sys.modules, "spconv_triton", importlib.import_module("spconv"))
    monkeypatch.setitem(sys.modules, "spconv_triton.pytorch", importlib.import_module("spconv.pytorch"))
    monkeypatch.setitem(sys.modules, "spconv_triton.constants", importlib.import_module("spconv.constants"))
    asked = []
    find = importlib.import_module
    monkeypatch.setattr(spconv.importlib, "import_module", lambda name: asked.append(name) or find(name))
    with spconv.ported():
        assert spconv.load().convolve is not None
    assert asked and all(name.startswith("spconv_triton.") for name in asked)
    asked.clear()
    spconv.load()
    assert asked and not any(name.startswith("spconv_triton") for name in asked)


def test_its_port_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv_triton", None)
    with spconv.ported(), pytest.raises(ImportError, match="pip install spconv-triton"):
        spconv.load()
