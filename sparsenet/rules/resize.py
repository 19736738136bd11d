"""Interpolation to another size: every output pixel is a weighted sum of a few input pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.constants import constant
from sparsenet.features import Features, Leaves, MaskedFeatures, SparseFeatures, rule
from sparsenet.sites import Pair


@dataclass(frozen=True)
class Resizing:
    """A call of `torch.nn.functional.interpolate` on maps, but for the map. It works along each axis by itself, and an
    axis' weights are what it makes of the unit vectors: PyTorch's own, whatever the mode and the scale, in the
    precision that it computes them in, which may decide which pixels are read."""

    size: Pair | None
    scale: tuple[float, float] | None
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype

    def __call__(self, dense: Tensor) -> Tensor:
        size = None if self.size is None else list(self.size)
        return F.interpolate(dense, size, None if self.scale is None else list(self.scale), **dict(self.options))

    @lru_cache(maxsize=256)  # noqa: B019 - hashable, small, and few
    def out_grid(self, grid: Pair) -> Pair:
        _, _, height, width = self(torch.empty(1, 1, *grid, device="meta")).shape
        return height, width

    def reads(self, axis: int, length: int, out_length: int, device: torch.device) -> Tensor:
        return self._axis(axis, length)[0].to(device)

    def weights(self, axis: int, length: int, like: Tensor) -> Tensor:
        """Of each tap of every output coordinate along an axis: (out_length, taps)."""
        return self._weights(axis, length, like.dtype, like.device)

    @constant(64)
    def _weights(self, axis: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._axis(axis, length)[1].to(device, dtype)

    @constant(256)
    def _axis(self, axis: int, length: int) -> tuple[Tensor, Tensor]:
        def along(number: Any, other: Any) -> Any:
            return (number, other) if axis == 0 else (other, number)

        # The other axis is of two pixels and stays as it is: of one, PyTorch 2.11 smooths antialiased lines wrongly.
        alone = Resizing(
            None if self.size is None else along(self.size[axis], 2),
            None if self.scale is None else along(self.scale[axis], 1.0),
            self.options,
            self.dtype,
        )
        units = torch.eye(length, dtype=self.dtype).view(length, *along(length, 1)).expand(-1, *along(-1, 2))
        matrix = alone(units[None])[0].select(2 - axis, 0).T  # (out_length, length)
        used = matrix != 0
        taps = max(1, int(used.sum(1).max()))
        place = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :taps]
        weight = matrix.gather(1, place)
        return torch.where(weight != 0, place, length), weight


@rule(F.interpolate)
def interpolate(
    func: Any,
    input: Features,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Features:
    """Read zero at inactive pixels, kept at the active pixels of the new size; a fill stays what it is."""
    x = input
    if mode not in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        raise Leaves(f"resizes by {mode}")

    def both(value: Any, kind: Any) -> Any:
        if value is None:
            return None
        first, second = value if isinstance(value, tuple | list | torch.Size) else (value, value)
        return kind(first), kind(second)

    options = {
        "mode": mode,
        "align_corners": align_corners,
        "recompute_scale_factor": recompute_scale_factor,
        "antialias": antialias,
    }
    dtype = torch.promote_types(x.dtype, torch.float32)
    resizing = Resizing(both(size, int), both(scale_factor, float), tuple(options.items()), dtype)
    out_grid = height, width = resizing.out_grid(x.grid)
    if not height or not width:
        raise Leaves("gives a map without pixels")
    if isinstance(x, MaskedFeatures):
        return MaskedFeatures.make(resizing(x.read("interpolate")), x.selection, out_grid, full=False, fill=x.fill)
    assert isinstance(x, SparseFeatures)
    kernel_map = x.selection.kernel_map(x.grid, x.full, resizing, out_grid)
    rows, taps = x.surrounded(), kernel_map.table.shape[1]
    columns = rows.index_select(0, kernel_map.table.view(-1)).view(-1, taps, rows.shape[1])
    if taps == 1 and mode.startswith("nearest"):
        out = columns[:, 0]
    else:
        weights = [resizing.weights(axis, x.grid[axis], rows) for axis in (0, 1)]
        weight = (weights[0][:, None, :, None] * weights[1][None, :, None, :]).reshape(height * width, taps)
        out = (columns * weight.index_select(0, x.selection.sites(out_grid).pixel)[:, :, None]).sum(1)
    return SparseFeatures.of_rows(out, x.selection, out_grid, fill=x.fill)
