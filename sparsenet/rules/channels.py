"""Operations over channels, each pixel by itself: softmax, L2 normalisation, gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.backends import indirect, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads
from sparsenet.features import Features, Leaves, SparseFeatures, rule
from sparsenet.kernels import norm, queue
from sparsenet.work import Unfolded, Work

# Where each function has its argument `dim`, counted from the map, and what it is by default.
_PLACES: dict[Any, tuple[int, int | None]] = {
    torch.softmax: (1, None),
    Tensor.softmax: (1, None),
    F.softmax: (1, None),
    torch.log_softmax: (1, None),
    Tensor.log_softmax: (1, None),
    F.log_softmax: (1, None),
    F.softmin: (1, None),
    F.glu: (1, -1),
    F.normalize: (2, 1),
    torch.cumsum: (1, None),
    Tensor.cumsum: (1, None),
    torch.cumprod: (1, None),
    Tensor.cumprod: (1, None),
}


@rule(*_PLACES, any_form=True)
def channelwise(func: Any, input: Features, *args: Any, **kwargs: Any) -> Any:
    place, default = _PLACES[func]
    if not isinstance(input, Features) or kwargs.get("out") is not None:
        raise Leaves("writes to an `out` tensor")
    dim = args[place - 1] if len(args) >= place else kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise Leaves("works over dimensions that it does not name")
    if input.form.padding is not None:
        raise Leaves(input.form.description)
    if input.form.letters([dim]) != "C":
        raise Leaves("works over another dimension than channels")
    if func is F.normalize:
        by_kernel = _unit_length(input, *args, **kwargs)
        if by_kernel is not None:
            return by_kernel
    return over_channels(func, input, dim, place - 1, args, kwargs)


def _unit_length(
    x: Features, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Features | None:
    """L2 normalisation in a frozen network, not computed yet, or `None` where no kernel that waits computes it."""
    selection = x.selection
    waits = selection.queues and (selection.everything or isinstance(x, SparseFeatures))
    if not waits or p != 2 or len(x.form.channels) != 1:
        return None
    rows = x.computed()
    if indirect.unsupported(rows, 1) is not None:
        return None
    count = rows.shape[0]
    reads = Reads(rows, None, count, count, 1, x.grid, x.grid, selection.everything)
    work = Work(UnitLength(rows.shape[1], eps), selection, reads, Epilogue())
    x.read_by(work)
    return type(x).deferred(work, selection, x.grid, full=x.full, fill=None, form=x.form)


class UnitLength(Unfolded):
    """L2 normalisation of rows, and a number for each channel behind it, as SSD has it."""

    path = "normalize"

    def __init__(self, outputs: int, eps: float):
        super().__init__(outputs)
        self._eps = eps

    def scaled(self, epilogue: Epilogue, factor: Tensor, cells: Tensor) -> Epilogue | None:
        return epilogue.scaled(cells.flatten().clone(), None)  # which may be written to before it is read

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        rows, weight, rest = reads.rows, epilogue.scale, epilogue._replace(scale=None)
        weight = indirect.constant(self.outputs, 1.0, rows.dtype) if weight is None else weight
        out = workspace.empty(rows.shape[0], self.outputs, rows)
        norm.unit_length(rows, weight, self._eps, out).wait()
        if rest.scales:  # there is nothing else
            return out
        queue.finish()
        return rest.of(out)


def over_channels(
    func: Any, x: Features, dim: int | Sequence[int], place: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function of channel dimensions, named at `place` of its arguments, on each pixel's channels."""
    form, dims = x.form, [dim] if isinstance(dim, int) else dim
    cell_dims = form.cell_dim(dim) if isinstance(dim, int) else [form.cell_dim(each) for each in dim]
    if len(args) > place:
        args = (*args[:place], cell_dims, *args[place + 1 :])
    else:
        kwargs = {name: value for name, value in kwargs.items() if name != "axis"} | {"dim": cell_dims}
    cells = x.cells(x.value)
    empty = cells.shape[-2] == 0  # of no site PyTorch would warn that it has no variance
    results = func(F.pad(cells, (0, 0, 0, 1)) if empty else cells, *args, **kwargs)
    found = []
    for result in results if isinstance(results, tuple) else [results]:
        result = result[..., :0, :] if empty else result
        kept = form if result.dim() == cells.dim() else form.without(dims)
        found.append(x.like(x.packed(result), form=kept.with_channels(result.shape[1:-2])))
    if not isinstance(results, tuple):
        return found[0]
    return type(results)(found)
