"""The hooks that surgery puts on a model: importable classes, so that models pickle and deep-copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsenet import context
from sparsenet.features import Departed, Features
from sparsenet.regions import Frame
from sparsenet.selection import Operation
from sparsenet.selector import Selector


@dataclass(eq=False)
class StageHook:
    """Forward hook of the embed stage: its output goes on as guided features."""

    selector: Selector

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.selector.enter(output)


@dataclass(eq=False)
class BeginHook:
    """Forward pre-hook of the root: notes where the images lie, and begins a record."""

    selector: Selector

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context.begin_frame(frame_of([*args, *kwargs.values()]))
        for observer in context.current().observers:
            if observer.selector is self.selector:
                observer.begin()


@dataclass(eq=False)
class EndHook:
    """Forward hook of the root, called after an error too: its outputs are ordinary tensors."""

    selector: Selector

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        context.end_frame()
        if type(output) is not Tensor:  # to look for features in what holds them takes 0.1 ms
            output = tree_map_only(Features | Departed, self._ordinary, output)
        for observer in context.current().observers:
            if observer.selector is self.selector:
                observer.end()
        return output

    def _ordinary(self, part: Features | Departed) -> Tensor:
        """What this model gives to its caller; the features of another one around it go on."""
        if part.selection.owner is not self.selector:
            return part
        if isinstance(part, Departed):
            return part.ordinary()
        part.selection.report(Operation("output", "output", part.grid))
        return part.dense("the model's output")


def frame_of(arguments: list[Any]) -> Frame | None:
    """The first map among a model's inputs, or else the first argument with images, a detector's list of them (its
    adapter says where it puts them; its targets may hold tensors that look like images)."""
    found = [[leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)] for argument in arguments]
    for tensors in found:
        for image in tensors:
            if image.dim() == 4:
                return Frame.plain(len(image), (image.shape[2], image.shape[3]))
    for tensors in found:
        sizes = [(image.shape[1], image.shape[2]) for image in tensors if image.dim() == 3]
        if sizes:
            return Frame(sizes, sizes, (max(height for height, _ in sizes), max(width for _, width in sizes)))
    return None
