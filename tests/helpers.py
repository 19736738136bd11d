"""Guided features of an ordinary map, in either storage, and what they must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsenet.features import Features, MaskedFeatures, SparseFeatures
from sparsenet.record import Record
from sparsenet.selection import Selection
from sparsenet.selector.levels import GivenLevels
from sparsenet.selector.selector import Selector

STORAGES = ("reference", "rows")


def select(mask: Tensor, backend: str = "rows", *, record: Record | None = None, strict: bool = False) -> Selection:
    """The selection of a given entry mask, bool (N, H, W)."""
    size = (mask.shape[1], mask.shape[2])
    observers = () if record is None else (record,)
    return Selection(GivenLevels(mask), len(mask), size, mask.device, backend, strict, observers)


def recorder() -> Record:
    """What a selection reports its operations to."""
    return Record(Selector(torch.nn.Identity(), 0))


def guide(x: Tensor, selection: Selection, *, full: bool = False) -> Features:
    """A map (N, C, H, W) as guided features, in the storage that the selection's backend reads.

    The reference storage keeps what `x` holds at inactive pixels, as it does behind a convolution: nothing that
    reads over space may see it.
    """
    grid = (x.shape[2], x.shape[3])
    if selection.backend == "reference":
        return MaskedFeatures.make(x, selection, grid, full=full)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    if not full:
        rows = rows[selection.sites(grid).index]
    return SparseFeatures.of_rows(rows, selection, grid, full=full)


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Zero at inactive pixels; the mask is bool (N, H, W) or (N, 1, H, W)."""
    mask = mask if mask.dim() == 4 else mask[:, None]
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype))


def assert_guided(result: Tensor, expected: Tensor) -> None:
    """Guided features that equal an ordinary map at active pixels, and that leave the region as zeros elsewhere."""
    assert isinstance(result, Features), type(result)
    assert result.shape == expected.shape
    dense = result.dense("the test")
    assert_equal(dense, keep(expected, result.selection.mask(result.grid)))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert type(actual) is Tensor, type(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a weighted sum of the result, by weights that depend on its shape only.

    Where the result is not finite (max-pooling over padding alone) it takes no part.
    """
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape).sin()
    weighted = torch.where(result.isfinite(), result, 0) * weights
    return list(torch.autograd.grad(weighted.sum(), inputs, retain_graph=True, materialize_grads=True))
