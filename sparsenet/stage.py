"""From "pool3", "stride8" or a module path to the module to embed at, by watching one forward pass."""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsenet.macs import MacCounter
from sparsenet.sites import Pair


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass, in the order in which calls end."""

    path: str
    module: nn.Module
    input: Pair | None  # (H, W), if the first argument is a map (N, C, H, W)
    output: Pair | None  # the same of the output
    channels: int | None
    reads: frozenset[str]  # the modules whose outputs, as they are, it is called with
    macs: int  # of the pass until the call ended


@dataclass(frozen=True)
class Pass:
    """A watched forward pass: its calls, (H, W) of the network's transformed input (what its first convolution gets),
    and its multiply-accumulates."""

    calls: list[Call]
    entry: Pair | None
    macs: int

    def stride(self, size: Pair) -> int:
        assert self.entry is not None
        return round(self.entry[0] / size[0])

    @property
    def maps(self) -> list[Call]:
        """The calls that gave a map of the input's proportions, by which channels-last ones and tokens are told from
        them. A single pixel is no map: it is squeeze-and-excitation, or pooled for a classifier."""
        if self.entry is None:
            return []
        height, width = self.entry
        return [
            call
            for call in self.calls
            if call.output not in (None, (1, 1)) and abs(call.output[0] * width / height - call.output[1]) <= 1.5
        ]

    @property
    def poolings(self) -> list[str]:
        """Pooling modules in execution order, pooling to a fixed output size excluded."""
        return list(dict.fromkeys(call.path for call in self.calls if isinstance(call.module, _POOLING)))


@dataclass(frozen=True)
class Stage:
    """A place to embed at.

    Attributes:
        names: what `selectify` may be told, but for the path itself.
        path: the module's.
        size: (H, W) of its output, which has `channels` and lies at `stride`.
        share_after: of the network's multiply-accumulates, how many come after it.
    """

    names: tuple[str, ...]
    path: str
    size: Pair
    channels: int
    stride: int
    share_after: float


class Stages(tuple[Stage, ...]):
    """Stages in execution order; prints as a table."""

    def __str__(self) -> str:
        rows = [("stage", "module", "size", "stride", "channels", "MACs after")]
        for stage in self:
            size = f"{stage.size[0]}x{stage.size[1]}"
            names = ", ".join(stage.names) or "-"
            rows.append((names, stage.path, size, str(stage.stride), str(stage.channels), f"{stage.share_after:.1%}"))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def watchable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules below the root by path, but for scripted ones, which take no hooks."""
    return [(path, m) for path, m in model.named_modules() if path and not isinstance(m, torch.jit.ScriptModule)]


_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.FractionalMaxPool2d, nn.LPPool2d)


def _size(found: Any) -> Pair | None:
    return (found.shape[2], found.shape[3]) if isinstance(found, Tensor) and found.dim() == 4 else None


def watch(model: nn.Module, run: Callable[[], Any]) -> Pass:
    """Watch the calls of all modules while `run()` runs the model."""
    calls: list[Call] = []
    inputs: list[Pair] = []
    made: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # outputs by identity, none kept alive
    reading: list[frozenset[str]] = []
    macs = [0]

    def count(more: int, convolved: Tensor | None) -> None:
        macs[0] += more

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        known = [made.get(id(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reading.append(frozenset(path for tensor, path in filter(None, known) if tensor() is not None))

    def after(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            read, size = _size(args[0] if args else None), _size(output)
            channels = None if size is None else output.shape[1]
            calls.append(Call(path, module, read, size, channels, reading.pop(), macs[0]))
            if size is not None:
                made[id(output)] = (weakref.ref(output), path)
            if isinstance(module, nn.Conv2d) and read is not None:
                inputs.append(read)

        return hook

    handles = []
    for path, module in watchable(model):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after(path)))
    try:
        with MacCounter(count):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return Pass(calls, inputs[0] if inputs else None, macs[0])


def list_stages(model: nn.Module, aliases: dict[str, str], run: Callable[[], Any]) -> Stages:
    """Every place that has a name: "poolN", "strideN", and the family's `aliases`."""
    return _named(model, watch(model, run), aliases)


def _named(model: nn.Module, watched: Pass, aliases: dict[str, str]) -> Stages:
    names: dict[str, list[str]] = {}
    for name, path in aliases.items():
        names.setdefault(path, []).append(name)
    for number, path in enumerate(watched.poolings, 1):
        names.setdefault(path, []).append(f"pool{number}")
    for stride, path in _strides(dict(model.named_modules()), watched).items():
        names.setdefault(path, []).append(f"stride{stride}")
    first: dict[str, Call] = {}
    for call in watched.maps:
        first.setdefault(call.path, call)
    return Stages(
        Stage(
            tuple(name for name in names[path] if name != path),
            path,
            call.output,
            call.channels,
            watched.stride(call.output),
            1 - call.macs / max(1, watched.macs),
        )
        for path, call in first.items()
        if path in names and call.output is not None and call.channels is not None
    )


def resolve(model: nn.Module, at: str, aliases: dict[str, str], run: Callable[[], Any]) -> str:
    """The path of the module to embed at.

    - a module path, or one of the family's `aliases` for one;
    - "poolN": the N-th pooling module in execution order, pooling to a fixed output size excluded;
    - "strideN": the last module at that stride, relative to the network's transformed input, before the first
      coarser one. Modules inside a block that goes from that stride to a coarser one do not count unless the block is a
      plain sequence, for such a block reads its input a second time (a residual's shortcut); and a module whose output
      the coarser one reads goes before a later one, which is a branch beside it (HRNet). Where no such module gives a
      map, as in networks that keep their maps channels-last between blocks, the first one that does.

    Raises:
        ValueError: for an unknown stage, naming the closest and listing them.
    """
    modules = dict(model.named_modules())
    path = aliases.get(at, at)
    if path in modules and path:
        if isinstance(modules[path], torch.jit.ScriptModule):
            raise ValueError(f"stage {path!r} is scripted and takes no hooks: script it after, or embed at another one")
        return path
    watched = watch(model, run)
    if match := re.fullmatch(r"pool([1-9]\d*)", at):
        if int(match[1]) <= len(watched.poolings):
            return watched.poolings[int(match[1]) - 1]
    elif match := re.fullmatch(r"stride([1-9]\d*)", at):
        found = _last_at_stride(modules, watched, int(match[1]))
        if found is not None:
            return found
    raise ValueError(_unknown(at, model, watched, aliases))


def _strides(modules: dict[str, nn.Module], watched: Pass) -> dict[int, str]:
    """Every stride that can be embedded at, and where."""
    strides = sorted({watched.stride(call.output) for call in watched.maps if call.output})
    found = {stride: _last_at_stride(modules, watched, stride) for stride in strides}
    return {stride: path for stride, path in found.items() if path is not None}


def _last_at_stride(modules: dict[str, nn.Module], watched: Pass, stride: int) -> str | None:
    sized = [(call, watched.stride(call.output)) for call in watched.maps if call.output]
    coarser = next((position for position, (_, found) in enumerate(sized) if found > stride), len(sized))
    elsewhere = {call.path for call, found in sized if found != stride}  # a head that runs on every level, say
    before = {call.path for call, found in sized[:coarser] if found == stride} - elsewhere
    candidates: list[str] = []
    branch = sized[coarser][0].path.split(".") if coarser < len(sized) else []
    for depth in range(max(1, len(branch))):
        parent = ".".join(branch[:depth])
        if depth and not isinstance(modules[parent], nn.Sequential | nn.ModuleList | nn.ModuleDict):
            reads = next((call.input for call in watched.calls if call.path == parent), None)
            if reads is None or watched.stride(reads) == stride:
                break
        children = [call.path for call, _ in sized[:coarser] if call.path.rpartition(".")[0] == parent]
        candidates += [path for path in children if path in before]
    if not candidates:
        return next((call.path for call, found in sized if found == stride and call.path not in elsewhere), None)
    steps = {".".join(branch[: depth + 1]) for depth in range(len(branch))}
    read = frozenset().union(*(call.reads for call in watched.calls if call.path in steps))
    return next((path for path in reversed(candidates) if path in read), candidates[-1])


def _unknown(at: str, model: nn.Module, watched: Pass, aliases: dict[str, str]) -> str:
    named = _named(model, watched, aliases)
    names = [name for stage in named for name in stage.names]
    paths = [path for path, _ in model.named_modules() if path]
    close = difflib.get_close_matches(at, names + paths, n=5, cutoff=0.5)
    hint = f"; the closest are {', '.join(map(repr, close))}" if close else ""
    top = [path for path in paths if path.count(".") < 2]
    shown = ", ".join(top[:40]) + (", …" if len(top) > 40 else "")
    return f"no stage {at!r} in {type(model).__name__}{hint}. Stages: {', '.join(names) or 'none'}. Modules: {shown}"


def check_output(path: str, output: Any) -> None:
    """Raise `ValueError` unless a stage's output is a 4-D tensor."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"stage {path!r} gives {type(output).__name__}, not one tensor: choose a module inside or before it"
        )
    if output.dim() != 4:
        raise ValueError(
            f"stage {path!r} gives a tensor of shape {tuple(output.shape)}, not a map (N, C, H, W): "
            "choose an earlier stage"
        )
    if not torch.is_floating_point(output):
        raise ValueError(f"stage {path!r} gives {output.dtype}, not floating-point features")
