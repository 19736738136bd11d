"""The frozen `nn.Sequential`: programs where it has any, and convolutions, each with the normalisation and activation
right behind it as one call. What computes these is found once: it takes as long as to compute a small layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsenet.backends.epilogue import Epilogue
from sparsenet.features import Features
from sparsenet.frozen_modules import FrozenBatchNorm2d, FrozenConv2d, behind, step_of
from sparsenet.programs import Programs
from sparsenet.work import Work


class FusedForward:
    """The forward of a frozen `nn.Sequential`."""

    def __init__(self, sequential: nn.Sequential):
        self.sequential = sequential
        self._links = Links()
        self._programs = Programs()

    def __call__(self, input: Any) -> Any:
        modules = self._modules([])
        place = 0
        while place < len(modules):
            replayed = self._programs.run(modules, place, input)
            if replayed is not None:
                input, place = replayed
                continue
            links = self._links.of(modules, place)
            if not links:
                input = modules[place](input)
                place += 1
            else:
                input, done = following(input, links)
                place += done
        return input

    def _modules(self, found: list[Any]) -> list[Any]:
        """The modules, and those of containers among them that are called alike."""
        for module in self.sequential._modules.values():
            within = vars(module).get("forward")
            if type(within) is FusedForward and not hooked(module):
                within._modules(found)
            else:
                found.append(module)
        return found


class Links:
    """The links of a list of modules, kept from pass to pass."""

    def __init__(self) -> None:
        self._kept: dict[int, Link] = {}

    def of(self, modules: list[Any], place: int) -> list[Link]:
        """Of the convolutions that follow one another from a place on."""
        links = []
        while place < len(modules) and type(modules[place]) is FrozenConv2d and not hooked(modules[place]):
            link = self._kept.get(place)
            if link is None or not link.holds(modules, place):
                link = self._kept[place] = Link(modules, place)
            links.append(link)
            place += len(link)
        return links

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}


class Link:
    """A convolution of a list of modules, and those behind it that become part of its work.

    Attributes:
        convolution: the first of them.
        epilogue: of its work, with all steps.
    """

    def __init__(self, modules: list[Any], place: int):
        self.convolution: FrozenConv2d = modules[place]
        self.layer = self.convolution.layer
        self.epilogue = Epilogue(shift=self.convolution._parameters["bias"])
        self._modules = modules[place : place + 1]
        for module in modules[place + 1 :]:
            epilogue = None if hooked(module) else behind(self.layer, self.epilogue, module, self.layer.dtype)
            if epilogue is None:
                break
            self.epilogue = epilogue
            self._modules.append(module)
        # The tensors are kept too, so that no other can have their identity.
        self._tensors, self._state = self._seen()

    def __len__(self) -> int:
        return len(self._modules)

    def holds(self, modules: list[Any], place: int) -> bool:
        """Whether the same modules are there, as they were."""
        same = modules[place : place + len(self)] == self._modules and not any(map(hooked, self._modules))
        return same and self._state is not None and self._seen()[1] == self._state

    def _seen(self) -> tuple[list[Tensor | None], list[Any] | None]:
        """The tensors that the epilogue is made of, and their state and that of the modules; `None` for tensors of
        inference mode, whose writes are not counted."""
        convolution, *others = self._modules
        tensors: list[Tensor | None] = [convolution._parameters["bias"]]
        state: list[Any] = []
        for module in others:
            if type(module) is FrozenBatchNorm2d:
                tensors += module._buffers.values()
                tensors += module._parameters.values()
                state += [module.training, module.eps]
            else:
                state.append(step_of(module, self.layer.dtype))
        try:
            state += [None if tensor is None else (id(tensor), tensor._version) for tensor in tensors]
        except RuntimeError:
            return tensors, None
        return tensors, state

    def whole(self, work: Work) -> Work:
        """The convolution's work, made that of the whole link."""
        work.epilogue, work.steps = self.epilogue, len(self) - 1
        return work

    def features(self, kind: type[Features], work: Work) -> Features:
        """What its work gives when it is read."""
        fill = None if len(self) > 1 else self.convolution._buffers["fill"]
        return kind.deferred(work, work.selection, work.reads.out_grid, full=False, fill=fill)


def following(input: Any, links: list[Link]) -> tuple[Any, int]:
    """What links give of anything, as far as the work of one can be read by the next; and how many modules that is."""
    first, *others = links
    features = first.convolution.forward(input)
    if not isinstance(features, Features) or features._work is None:
        return features, 1
    work, last, done = first.whole(features._work), first, len(first)
    for link in others:
        after = link.convolution.follows(work)
        if after is None:
            break
        work, last, done = link.whole(after), link, done + len(link)
    return last.features(type(features), work), done


def hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
