"""From "pool3", "stride8" or a module path to the module to embed at, by watching one forward pass."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.sites import Pair


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass, in the order in which calls end."""

    path: str
    module: nn.Module
    output: Pair | None  # (H, W), if the output is a 4-D tensor
    channels: int | None


def watchable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules below the root by path, but for scripted ones, which take no hooks."""
    return [(path, m) for path, m in model.named_modules() if path and not isinstance(m, torch.jit.ScriptModule)]


_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.FractionalMaxPool2d, nn.LPPool2d)


def watch(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Pair | None]:
    """The calls of all modules while `run()` runs the model, and (H, W) of the network's transformed input: what
    its first convolution gets."""
    calls: list[Call] = []
    inputs: list[Pair] = []

    def noted(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            is_map = isinstance(output, Tensor) and output.dim() == 4
            size = (output.shape[2], output.shape[3]) if is_map else None
            calls.append(Call(path, module, size, output.shape[1] if is_map else None))
            if isinstance(module, nn.Conv2d) and args and isinstance(args[0], Tensor) and args[0].dim() == 4:
                inputs.append((args[0].shape[2], args[0].shape[3]))

        return hook

    handles = [module.register_forward_hook(noted(path)) for path, module in watchable(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, inputs[0] if inputs else None


def resolve(model: nn.Module, at: str, aliases: dict[str, str], run: Callable[[], Any]) -> str:
    """The path of the module to embed at.

    - a module path, or one of the family's `aliases` for one;
    - "poolN": the N-th pooling module in execution order, pooling to a fixed output size excluded;
    - "strideN": the last module at that stride, relative to the network's transformed input, before the first
      coarser one. Modules inside a block that itself goes coarser do not count unless the block is a plain
      sequence, for such a block reads its input a second time (a residual's shortcut).

    Raises:
        ValueError: for an unknown stage, naming the closest and listing them.
    """
    modules = dict(model.named_modules())
    path = aliases.get(at, at)
    if path in modules and path:
        if isinstance(modules[path], torch.jit.ScriptModule):
            raise ValueError(f"stage {path!r} is scripted and takes no hooks: script it after, or embed at another one")
        return path
    calls, entry = watch(model, run)
    poolings = list(dict.fromkeys(call.path for call in calls if isinstance(call.module, _POOLING)))
    if match := re.fullmatch(r"pool([1-9]\d*)", at):
        if int(match[1]) <= len(poolings):
            return poolings[int(match[1]) - 1]
    elif (match := re.fullmatch(r"stride([1-9]\d*)", at)) and entry is not None:
        found = _last_at_stride(modules, calls, entry, int(match[1]))
        if found is not None:
            return found
    raise ValueError(_unknown(at, model, calls, poolings, entry, aliases))


def _stride(entry: Pair, size: Pair | None) -> int:
    assert size is not None
    return round(entry[0] / size[0])


def _last_at_stride(modules: dict[str, nn.Module], calls: list[Call], entry: Pair, stride: int) -> str | None:
    # A single pixel is no coarser map: it is squeeze-and-excitation, or pooled for a classifier.
    sized = [(call, _stride(entry, call.output)) for call in calls if call.output not in (None, (1, 1))]
    coarser = next((position for position, (_, found) in enumerate(sized) if found > stride), len(sized))
    before = {call.path for call, found in sized[:coarser] if found == stride}
    last = None
    branch = sized[coarser][0].path.split(".") if coarser < len(sized) else []
    for depth in range(max(1, len(branch))):
        parent = ".".join(branch[:depth])
        if depth and not isinstance(modules[parent], nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        children = [call.path for call, _ in sized[:coarser] if call.path.rpartition(".")[0] == parent]
        candidates = [path for path in children if path in before]
        last = candidates[-1] if candidates else last
    return last


def _unknown(
    at: str,
    model: nn.Module,
    calls: list[Call],
    poolings: list[str],
    entry: Pair | None,
    aliases: dict[str, str],
) -> str:
    strides = sorted({_stride(entry, call.output) for call in calls if call.output and entry})
    names = [f"pool{number + 1}" for number in range(len(poolings))] + [f"stride{stride}" for stride in strides]
    names += list(aliases)
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
