"""The Selective Module of a frozen model: rows from layer to layer by kernels that all wait, for what follows each is
known here.

Elsewhere in a frozen model a layer's work waits for what may become part of it, which takes Python as long as a small
layer takes to compute. All of this module's are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from sparsenet import context
from sparsenet.backends import indirect, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads, Spec
from sparsenet.chains import FusedForward, Link, Links, hooked
from sparsenet.features import Features, UnguidedFeatures, as_rows, ordinary
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.frozen_modules import FrozenBatchNorm2d, FrozenConv2d, FrozenReLU, behind
from sparsenet.kernels import attention, octave, queue
from sparsenet.kernels.queue import Job
from sparsenet.programs import State
from sparsenet.rules.conv import pair
from sparsenet.selector import SelectiveModule
from sparsenet.selector.levels import Octaves
from sparsenet.selector.selective_module import NonLocal
from sparsenet.sites import Pair, TransposedWindow, Window, dense_table
from sparsenet.work import OfAllPixels


def make_direct(branch: SelectiveModule) -> None:
    """Let a Selective Module of frozen layers compute them directly, if it is one for CPUs and nothing in it was
    replaced."""
    convolutions = [module for module in branch.modules() if isinstance(module, nn.Conv2d)]
    if not all(isinstance(module, FrozenConv2d) and module.layer.device.type == "cpu" for module in convolutions):
        return
    blocks = [module for module in branch.modules() if isinstance(module, nn.Sequential)]
    chains = [block for block in blocks if not any(isinstance(part, nn.Sequential) for part in block)]
    if not all(_known(part) for chain in chains for part in chain):
        return
    alone = [module for module in convolutions if not any(module in chain for chain in chains)]
    for module in [*chains, *alone]:
        module.forward = DirectForward(module)
    branch.forward = BranchForward(branch)  # type: ignore[method-assign]


def _known(part: nn.Module) -> bool:
    """Whether it is a layer, or what can be part of one."""
    by_statistics = type(part) is FrozenBatchNorm2d and part.running_mean is not None
    return by_statistics or type(part) in (FrozenConv2d, FrozenReLU)


class DirectForward:
    """The forward of a convolution, or of a sequence of them with normalisation and activation behind: ordinary maps
    (N, C, H, W) to such in channels-last memory.

    Where someone watches, by hooks or a record, it goes the way of the rest of a frozen model.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._links = Links()

    def __call__(self, x: Tensor) -> Tensor:
        module, links = self.module, self.links()
        if links is None or isinstance(x, Features) or not _fits(x, links[0].convolution):
            return FusedForward(module)(x) if isinstance(module, nn.Sequential) else type(module).forward(module, x)
        rows, grid = _through(links, _rows_of(x), x.shape[0], (x.shape[2], x.shape[3]))
        return _map(rows, x.shape[0], grid)

    def links(self) -> list[Link] | None:
        """All that it does, or `None` where that is not known."""
        module: Any = self.module
        parts: list[Any] = list(module) if isinstance(module, nn.Sequential) else [module]
        links = [] if context.current().observers else self._links.of(parts, 0)
        return links if links and sum(map(len, links)) == len(parts) else None


class _Layers(NamedTuple):
    """The layers of a module: see `SelectiveModule`.

    Attributes:
        deeper: `down` and `context`.
        embed, restore: of the non-local block, empty where there is none.
        logit: `head` and `logit`.
    """

    reduce: list[Link]
    deeper: list[Link]
    embed: list[Link]
    restore: list[Link]
    logit: list[Link]
    up: FrozenLayer
    normalised: Epilogue

    def waits(self) -> bool:
        """Whether the way of each is chosen, and by kernels that wait."""
        links = [*self.reduce, *self.deeper, *self.embed, *self.restore, *self.logit]
        layers = [self.up, *(link.convolution.layer for link in links)]
        return all(layer.waiting("everything") is not None for layer in layers)


class _Recording(NamedTuple):
    """The kernels of a pass, to be run again on the same memory, but for the features' rows and the logits.

    Attributes:
        reads, writes: which number of the first job is the address of the rows, and of the last one that of the logits.
    """

    jobs: list[Job]
    reads: int
    writes: int

    @classmethod
    def of(cls, jobs: list[Job], rows: Tensor, logits: Tensor) -> _Recording | None:
        """`None` where it would keep much memory."""
        first, *between, last = jobs
        reads, writes = first.numbers.index(rows.data_ptr()), last.numbers.index(logits.data_ptr())
        kept = [_without(first, rows), *between, _without(last, logits)]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in _held(kept)}
        return cls(kept, reads, writes) if sum(storages.values()) <= MOST_RECORDED else None

    def wait(self, rows: Tensor, logits: Tensor) -> None:
        """Run them after what waits in the current queue."""
        first, *between, last = self.jobs
        for job in (_with(first, self.reads, rows), *between, _with(last, self.writes, logits)):
            job.wait()


def _held(jobs: Iterable[Job]) -> Iterator[Tensor]:
    for job in jobs:
        for part in job.held:
            yield from (each for each in (part if isinstance(part, tuple) else [part]) if isinstance(each, Tensor))


def _without(job: Job, part: Tensor) -> Job:
    """The same, but that it does not hold this memory."""
    held = [each for each in job.held if not (isinstance(each, Tensor) and each.data_ptr() == part.data_ptr())]
    return Job(job.kernel, job.numbers, job.threads, *held)


def _with(job: Job, place: int, part: Tensor) -> Job:
    numbers = job.numbers[:]
    numbers[place] = part.data_ptr()
    return Job(job.kernel, numbers, job.threads, *job.held, part)


# Bytes of memory that recordings keep, each, and for how many sizes. What takes more has kernels that take longer
# than Python.
MOST_RECORDED = 4 << 20
MOST_SIZES = 8


class BranchForward:
    """The forward of the module as a whole, of a map (N, C, H, W) that kernels may have yet to write: 0.2 ms beside its
    kernels where these were recorded before, 0.7 where not, and 3 layer by layer (75x75 pixels at width 8, one
    image)."""

    def __init__(self, branch: SelectiveModule):
        self.branch = branch
        self._state: State | None = None
        self._found: _Layers | None = None
        self._recorded: dict[Any, list[_Recording] | None] = {}  # `None` where it would keep much memory

    def __call__(self, features: Tensor) -> Tensor:
        layers = self._layers(features)
        if layers is None:
            return type(self.branch).forward(self.branch, ordinary(features))
        batch, grid = features.shape[0], (features.shape[2], features.shape[3])
        rows = features.computed() if isinstance(features, Features) else _rows_of(features)
        free = self._free(layers, rows, batch, grid)
        if free is None:
            return _map(self._logits(layers, rows, batch, grid), batch, grid)
        key, recordings = free
        recording = None  # whose memory is for one pass at a time
        with suppress(IndexError):
            recording = recordings.pop()
        if recording is None:
            with queue.keeping() as jobs:
                logits = self._logits(layers, rows, batch, grid)
            recording = _Recording.of(jobs, rows, logits)
        else:
            logits = rows.new_empty(rows.shape[0], 1)
            recording.wait(rows, logits)
        result = _map(logits, batch, grid)
        if recording is None:
            self._recorded[key] = None
        else:
            recordings.append(recording)
        return result

    def _free(self, layers: _Layers, rows: Tensor, batch: int, grid: Pair) -> tuple[Any, list[_Recording]] | None:
        """Recordings that no pass has now, and the key they are kept by; `None` where there are to be none."""
        if queue.current() is None:
            return None
        key = (batch, grid, rows.stride(0), rows.dtype, torch.get_num_threads())
        if key not in self._recorded:
            if not layers.waits():
                return None
            if len(self._recorded) >= MOST_SIZES:
                self._recorded = {}
        recordings = self._recorded.setdefault(key, [])
        return None if recordings is None else (key, recordings)

    def _logits(self, layers: _Layers, rows: Tensor, batch: int, grid: Pair) -> Tensor:
        """Rows (N * H * W, 1), whose kernels may wait."""
        fine, _ = _through(layers.reduce, rows, batch, grid)
        coarse, coarse_grid = _through(layers.deeper, fine, batch, grid)
        if layers.restore:
            coarse = self._attended(layers, coarse, batch, coarse_grid)
        epilogue = layers.normalised._replace(residual=fine, order="after") if self.branch.skip else layers.normalised
        up: Any = self.branch.up
        window = TransposedWindow(up.kernel_size, up.stride, up.padding, up.dilation)
        tables = OfAllPixels(coarse_grid, window, grid, fine.device)
        reads = Reads(coarse, tables, prod(coarse_grid), batch * prod(grid), batch, coarse_grid, grid, True)
        return _through(layers.logit, layers.up.run(reads, epilogue), batch, grid)[0]

    def _attended(self, layers: _Layers, rows: Tensor, batch: int, grid: Pair) -> Tensor:
        """What the non-local block makes of rows (N * H * W, C)."""
        embedded, _ = _through(layers.embed, rows, batch, grid)
        inner, pixels = embedded.shape[1] // 3, prod(grid)
        keys = embedded[:, inner:]
        factor, height, width = NonLocal.key_grid(*grid)
        if factor > 1:
            table = dense_table(grid, Window((factor, factor), (factor, factor)), (height, width), rows.device)
            pooling = indirect.pooling("max", 2 * inner, rows.dtype, -math.inf)
            pooled = workspace.empty(batch * height * width, 2 * inner, rows)
            for image, target in zip(keys.split(pixels), pooled.split(height * width), strict=True):
                pooling.job(image, None, table, pixels, target).wait()
            keys = pooled
        attended = workspace.empty(batch * pixels, inner, rows)
        images = (each.chunk(batch) for each in (embedded[:, :inner], keys[:, :inner], keys[:, inner:], attended))
        for image in zip(*images, strict=True):
            attention.attend(*image).wait()
        (restore,) = layers.restore
        restored = restore.epilogue._replace(residual=rows)
        return restore.convolution.on_rows(attended, batch, grid, restored)[0]

    def _layers(self, x: Tensor) -> _Layers | None:
        """`None` where anything but kernels is to compute them."""
        plain = not isinstance(x, Features) or (isinstance(x, UnguidedFeatures) and x.form.plain)
        if not plain or x.shape[0] == 0 or context.current().observers:
            return None
        if self._state is None or not self._state.holds():
            self._found, self._recorded = self._find(), {}
            with suppress(RuntimeError):  # of tensors whose writes are not counted
                self._state = State([self.branch])
        layers = self._found
        if layers is None or not _fits(x, layers.reduce[0].convolution):
            return None
        return layers if indirect.unsupported(self.branch.up.weight, 1) is None else None

    def _find(self) -> _Layers | None:
        branch: Any = self.branch
        attend = [branch.attend.embed, branch.attend.restore] if type(branch.attend) is NonLocal else []
        parts = [branch.reduce, branch.down, *branch.context, branch.head, branch.logit, *attend]
        between = (branch.context, branch.attend, branch.up, branch.up_norm)
        links = [vars(part)["forward"].links() for part in parts]
        if None in links or any(map(hooked, between)) or has_global_hooks() or not self._by_kernels():
            return None
        reduce, down, near, far, head, logit, *attending = links
        embed, restore = attending or ([], [])
        weight, spec = branch.up.weight.detach(), Spec(pair(branch.up.stride), (0, 0), (1, 1), 1)
        # As one whose taps read what is there: see `TransposedWindow`.
        ways = {"guided": ["indirect"], "everything": ["indirect"]}
        up = FrozenLayer("up", weight.transpose(0, 1).contiguous(), spec, ways, None)
        up.settle()
        normalised = behind(up, Epilogue(shift=branch.up.bias), branch.up_norm, weight.dtype)
        activated = None if normalised is None else normalised.activated("clamp", 0.0, math.inf)
        if activated is None:
            return None
        return _Layers(reduce, [*down, *near, *far], embed, restore, [*head, *logit], up, activated)

    def _by_kernels(self) -> bool:
        """Whether there are kernels for what is no convolution."""
        up, attend = self.branch.up, self.branch.attend
        if type(up) is not nn.ConvTranspose2d or up.groups > 1 or indirect.unsupported(up.weight, 1):
            return False
        few = type(attend) is NonLocal and attend.restore.in_channels <= attention.MOST_CHANNELS
        return up.weight.dtype is torch.float32 if few else type(attend) is nn.Identity

    def __getstate__(self) -> dict[str, Any]:
        return {"branch": self.branch, "_state": None, "_found": None, "_recorded": {}}


class OctavesForward:
    """The forward of the learned octaves: its own, but where kernels compute them. From 75x75 on PyTorch takes 35
    operations for logits and masks."""

    def __init__(self, octaves: Octaves):
        self.octaves = octaves

    def __call__(self, logits: Tensor, threshold: float) -> tuple[list[Tensor], list[Tensor]]:
        convolutions: list[Any] = list(self.octaves._modules.values())
        if context.current().observers or any(map(hooked, convolutions)) or not _of_one_channel(logits):
            return type(self.octaves).forward(self.octaves, logits, threshold)
        return octave.octaves(logits, threshold, [tuple(each._parameters.values()) for each in convolutions])


def _of_one_channel(logits: Tensor) -> bool:
    """Whether kernels can read logits."""
    plain = type(logits) is Tensor and logits.is_contiguous() and not logits.requires_grad
    return plain and logits.dtype is torch.float32 and indirect.unsupported(logits, 1) is None


def halves(convolution: Any) -> bool:
    """Whether it is one between two octaves, as it was made."""
    geometry = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    same = geometry == ((3, 3), (2, 2), (1, 1), (1, 1)) and convolution.padding_mode == "zeros"
    weight, bias = convolution.weight, convolution.bias
    fit = all(part is not None and part.is_contiguous() and part.dtype is torch.float32 for part in (weight, bias))
    return type(convolution) is nn.Conv2d and same and fit and weight.numel() == 9


def _fits(x: Tensor, first: FrozenConv2d) -> bool:
    return x.dim() == 4 and x.shape[1] == first.in_channels and first.takes(x)


def _rows_of(x: Tensor) -> Tensor:
    """A map (N, C, H, W) as rows (N * H * W, C), each contiguous."""
    rows = as_rows(x)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _through(links: list[Link], rows: Tensor, batch: int, grid: Pair) -> tuple[Tensor, Pair]:
    """What layers give of rows (N * H * W, C), whose kernels may wait, and its grid."""
    for link in links:
        rows, grid = link.convolution.on_rows(rows, batch, grid, link.epilogue)
    return rows, grid


def _map(rows: Tensor, batch: int, grid: Pair) -> Tensor:
    """Rows as a map, once they are computed."""
    queue.finish()
    return rows.view(batch, *grid, rows.shape[1]).permute(0, 3, 1, 2)
