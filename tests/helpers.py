"""Guided features of an ordinary map, in either storage, and what they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsenet.features import Features, MaskedFeatures, SparseFeatures
from sparsenet.record import Record
from sparsenet.selection import Options, Selection
from sparsenet.selector.levels import GivenLevels
from sparsenet.selector.selector import Selector

STORAGES = ("reference", "rows")


def select(mask: Tensor, backend: str = "rows", *, record: Record | None = None, **options: Any) -> Selection:
    """The selection of a given entry mask, bool (N, H, W), under other `Options`."""
    size = (mask.shape[1], mask.shape[2])
    observers = () if record is None else (record,)
    return Selection(GivenLevels(mask), len(mask), size, mask.device, Options(backend, **options), observers)


def recorder() -> Record:
    """What a selection reports its operations to."""
    return Record(Selector(torch.nn.Identity(), 0))


def guide(x: Tensor, selection: Selection, *, full: bool = False) -> Features:
    """A map (N, C, H, W) as guided features, in the storage that the selection's backend reads.

    The reference storage keeps what `x` holds at inactive pixels, as it does behind a convolution: nothing that
    reads over space may see it.
    """
    grid = (x.shape[2], x.shape[3])
    if selection.dense_storage:
        return MaskedFeatures.make(x, selection, grid, full=full)
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    if not full:
        rows = rows[selection.sites(grid).index]
    return SparseFeatures.of_rows(rows, selection, grid, full=full)


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Zero at inactive pixels; the mask is bool, (N, H, W) or as `x` is laid out."""
    mask = mask[:, None] if mask.dim() == 3 != x.dim() else mask
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype))


def active(features: Features) -> Tensor:
    """Where guided features hold what was computed, in their own layout; what pads them is theirs too."""
    form, grid = features.form, features.grid
    mask = features.selection.mask(grid).expand(-1, prod(form.channels), -1, -1)
    if form.padding is None:
        return form.present(mask)
    around = form.padding if form.padding.mode != "zeros" else replace(form.padding, value=1.0)
    return around.apply(mask.double()) > 0


def assert_guided(result: Tensor, expected: Tensor) -> None:
    """Guided features that equal an ordinary map at active pixels, and that leave the region as zeros elsewhere."""
    assert isinstance(result, Features), type(result)
    assert result.shape == expected.shape
    assert_equal(result.dense("the test"), keep(expected, active(result)))


def assert_agrees(
    function: Callable[[Tensor], Any],
    storage: str,
    mask: Tensor,
    x: Tensor,
    *,
    full: bool,
    pointwise: bool = False,
    leaves: Sequence[Tensor] = (),
) -> None:
    """A function of guided features gives guided features, which equal what it gives of the ordinary map, zero at
    inactive pixels unless `full`; and so do the gradients of the map and of other `leaves`.

    Args:
        pointwise: whether its results are to keep the context of full features.
    """
    results = tree_leaves(function(guide(x * 1, select(mask, storage), full=full)))
    expected = tree_leaves(function(x * 1 if full or pointwise else keep(x, mask)))
    for result, wanted in zip(results, expected, strict=True):
        assert_guided(result, wanted)
        assert result.full == (pointwise and full)
        if wanted.requires_grad:
            inputs = [x, *leaves]
            found, right = (
                gradients(each, inputs) for each in (result.dense("the test"), keep(wanted, active(result)))
            )
            for actual, gradient in zip(found, right, strict=True):
                assert_equal(actual, gradient)


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
