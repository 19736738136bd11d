"""Programs: the work that modules of a frozen network ask for on features of active pixels, recorded once and replayed.

To go through the modules again takes Python longer than small layers take to compute, and drives the kernels' weights
out of the caches. As a CUDA graph does, a program leaves the modules out; unlike one, it is for any active pixels of
maps of a size, and it is only of modules whose code is known: PyTorch's, torchvision's, timm's and our own. Whatever
else they do than what is on the tape ends the recording, and whatever is changed in them ends the program.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from sparsenet.atlas import Route
from sparsenet.backends import indirect, winograd, workspace
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Reads
from sparsenet.features import Features, SparseFeatures
from sparsenet.frozen_layer import FrozenLayer
from sparsenet.kernels import queue
from sparsenet.selection import Selection
from sparsenet.sites import Pair
from sparsenet.work import VECTOR, Layer, OfActiveSites, Standalone, Work

# Packages whose modules do nothing but compute, from features and from what they have.
KNOWN = ("torch.", "torchvision.", "timm.", "sparsenet.frozen_", "sparsenet.chains")

# Programs that are kept for the sizes that a list of modules meets.
MOST_PROGRAMS = 64


class Programs:
    """Those of a list of modules."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Program] = {}
        self._met: dict[Hashable, int] = {}
        self._states: dict[tuple[int, int], State] = {}  # of the modules between two places, for programs of all sizes

    def run(self, modules: list[Any], place: int, x: Any) -> tuple[Any, int] | None:
        """What modules from a place on give of features, and the place behind the last of them; `None` where none has a
        program, and none is to be recorded."""
        if not _fits(x):
            return None
        options = x.selection.options
        key = (place, x.grid, x.full, x.selection.batch, x.form.channels, x.dtype, options.mean, options.reenter)
        program = self._kept.get(key)
        if program is not None and program.holds(modules):
            return program.run(x), program.end
        if len(self._met) >= MOST_PROGRAMS:
            self._kept, self._met, self._states = {}, {}, {}
        # On the second pass, in which layers know what is read twice; later now and then, for hooks may have gone.
        met = self._met[key] = self._met.get(key, 0) + 1
        if met.bit_count() > 1 or met == 1 or not _known(modules[place]):
            return None
        result, end, program = self._recorded(modules, place, x)
        if program is not None:
            self._kept[key] = program
        return result, end

    def _recorded(self, modules: list[Any], first: int, x: SparseFeatures) -> tuple[Any, int, Program | None]:
        """What modules give of features, as far as all that they do is on a tape, and one more; the place behind them;
        and the program of those whose work is on it."""
        rows, result, place = x.computed(), x, first
        ends: list[tuple[int, int, Work, Tensor | None]] = []
        with queue.recording() as tape:
            while place < len(modules) and tape.whole and _known(modules[place]):
                result = modules[place](result)
                place += 1
                if not _goes_on(result, x.selection):
                    break
                if tape.whole:
                    ends.append((place, len(tape.work), result._work, result.fill))
        for end, count, last, fill in reversed(ends):
            steps = _steps(rows, [*tape.work[:count], (last, None)])
            if steps is not None and len(steps) > 1:
                with suppress(RuntimeError):  # of tensors whose writes are not counted
                    state = self._state(modules, first, end)
                    return result, place, Program(first, end, state, steps, last.epilogue, last.steps, fill)
        return result, place, None

    def _state(self, modules: list[Any], first: int, end: int) -> State:
        """As they are now."""
        state = self._states.get((first, end))
        if state is None or state.modules != modules[first:end] or not state.holds():
            state = self._states[first, end] = State(modules[first:end])
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}, "_met": {}, "_states": {}}


def _fits(x: Any) -> bool:
    """Whether a program can be of these features."""
    if not isinstance(x, SparseFeatures) or not x.form.plain or not x.selection.queues:
        return False
    if x.selection.options.backend != "auto" or queue.tape() is not None:
        return False
    return x._work is None or x._work.gate is None


def _known(module: nn.Module) -> bool:
    """Whether nothing but the code of known packages runs in a module."""
    for part in module.modules():
        own = [type(part), *(type(vars(part)[name]) for name in ("forward", "_call_impl") if name in vars(part))]
        if not all(each.__module__.startswith(KNOWN) for each in own):
            return False
        if part._forward_hooks or part._forward_pre_hooks or part._compiled_call_impl is not None:
            return False
    return True


def _goes_on(x: Any, selection: Selection) -> bool:
    """Whether a program can end in these features, or go on with them."""
    fits = isinstance(x, SparseFeatures) and x.selection is selection and x.form.plain
    return fits and not x.full and x._work is not None


class Step(NamedTuple):
    """A layer's work, with registers in place of memory: the first one is what the program reads, each other one what a
    step gives.

    Attributes:
        prepared: its kernel, with weights and epilogue.
        reads, adds, gate: the registers of the rows that it reads, of the residual, and of the numbers by which the
            channels are multiplied before they are read.
        route: of the table by which it reads, or of the tiles; `None` where each row reads itself.
        out_grid: of what it gives.
    """

    layer: Layer
    prepared: Any
    reads: int
    adds: int | None
    gate: int | None
    grid: Pair
    route: Route | None
    out_grid: Pair

    def registers(self) -> list[int]:
        """Those that it reads."""
        return [register for register in (self.reads, self.adds, self.gate) if register is not None]


def _steps(rows: Tensor, done: Sequence[tuple[Work, Tensor | None]]) -> list[Step] | None:
    """Work that reads rows, and what other of it gives, as steps; `None` where it is not that alone, or not of kernels
    that wait."""
    registers, steps = {_place(rows): 0}, []
    for work, result in done:
        reads, residual, prepared = work.reads, work.epilogue.residual, _prepared(work)
        if prepared is None or reads.everything or not reads.outputs:
            return None
        gate = None if reads.gate is None else reads.gate[None]
        if gate is not None and not (isinstance(prepared, indirect.Prepared) and prepared.groups == 1):
            return None
        parts = (reads.rows, residual, gate)
        source, added, factor = (None if part is None else registers.get(_place(part), -1) for part in parts)
        if source is None or -1 in (source, added, factor):
            return None
        route = None
        if reads.tables is not None:
            assert isinstance(reads.tables, OfActiveSites)
            route = reads.tables.route.of_tiles(isinstance(prepared, winograd.Prepared))
        steps.append(Step(work.layer, prepared, source, added, factor, reads.grid, route, reads.out_grid))
        if result is not None:
            registers[_place(result)] = len(steps)
    return steps


def _prepared(work: Work) -> Any:
    """The kernel of work, with weights and epilogue, if it is one that waits."""
    layer = work.layer
    if isinstance(layer, Standalone):
        return layer.ready(work.dtype)
    way = layer.waiting("guided") if isinstance(layer, FrozenLayer) else None
    return None if way is None else way.ready(work.epilogue)


def _place(rows: Tensor) -> tuple[int, torch.Size]:
    return rows.data_ptr(), rows.shape


class Program:
    """Steps in place of modules.

    Args:
        first, end: the place of the first module, and that behind the last one.
        state: of the modules.
        steps: the last one is not computed, but waits for what follows.
        epilogue, taken: of the last one's work, and how many steps it has.
        fill: of the features that it gives.
    """

    def __init__(
        self,
        first: int,
        end: int,
        state: State,
        steps: list[Step],
        epilogue: Epilogue,
        taken: int,
        fill: Tensor | None,
    ):
        self.first, self.end = first, end
        self._state = state
        *self._steps, self._last = steps
        self._epilogue, self._taken, self._fill = epilogue._replace(residual=None), taken, fill
        self._sizes = list(dict.fromkeys(step.out_grid for step in steps))
        self._routes = list(dict.fromkeys(step.route for step in steps if step.route is not None))
        self._layers = [step.layer for step in self._steps if isinstance(step.layer, FrozenLayer)]
        self._places, self._buffers = _buffers(self._steps, self._last)

    def holds(self, modules: list[Any]) -> bool:
        """Whether the same modules are there, as they were."""
        return modules[self.first : self.end] == self._state.modules and self._state.holds()

    def run(self, x: SparseFeatures) -> Features:
        """What the modules give of features."""
        selection, rows, current = x.selection, x.computed(), queue.current()
        assert current is not None
        counts = {size: 1 if size == VECTOR else len(selection.sites(size)) for size in self._sizes}
        tables: dict[Route | None, Any] = {None: None}
        for route in self._routes:
            found = selection.along(route)
            tables[route] = found if route.tiles else found.table
        lengths = [max(counts[size] * channels for size, channels in each) for each in self._buffers]
        buffers = [workspace.empty(length, 1, rows) for length in lengths]
        for layer in self._layers:
            layer.count("guided")
        registers = [rows]
        for step, place in zip(self._steps, self._places, strict=True):
            count, channels = counts[step.out_grid], step.layer.outputs
            if place is None:
                out = workspace.empty(count, channels, rows)
            else:
                out = buffers[place].as_strided((count, channels), (channels, 1))
            source = registers[step.reads]
            residual = None if step.adds is None else registers[step.adds]
            weights = [] if step.gate is None else [step.prepared.gated(registers[step.gate].view(-1))]
            current.add(step.prepared.job(source, residual, tables[step.route], source.shape[0], out, *weights))
            registers.append(out)
        x.settle()
        return self._deferred(x, registers, counts[self._last.out_grid])

    def _deferred(self, x: SparseFeatures, registers: list[Tensor], outputs: int) -> Features:
        """What the last step gives when it is read."""
        selection, last = x.selection, self._last
        rows = registers[last.reads]
        tables = None if last.route is None else OfActiveSites(selection, last.route)
        gate = None if last.gate is None else registers[last.gate].view(-1)
        reads = Reads(rows, tables, rows.shape[0], outputs, 1, last.grid, last.out_grid, False, gate)
        residual = None if last.adds is None else registers[last.adds]
        work = Work(last.layer, selection, reads, self._epilogue._replace(residual=residual), self._taken)
        if 0 in last.registers():
            x.read_by(work)
        return type(x).deferred(work, selection, last.out_grid, full=False, fill=self._fill)


def _buffers(steps: list[Step], last: Step) -> tuple[list[int | None], list[list[tuple[Pair, int]]]]:
    """For the result of each step a buffer, which is that of others too that are read before; `None` for what the last
    step reads, which waits for others than the program's; and for each buffer the sizes and channels that lie in it.

    They are few, so that what is read was mostly just written.
    """
    reading = {register: number for number, step in enumerate(steps) for register in step.registers()}
    places: list[int | None] = []
    buffers: list[list[tuple[Pair, int]]] = []
    free: list[int] = []
    for number, step in enumerate(steps):
        register, size = number + 1, (step.out_grid, step.layer.outputs)
        place = None
        if register not in last.registers():
            place = min(free, key=lambda each: _distance(buffers[each], size), default=len(buffers))
            if place == len(buffers):
                buffers.append([])
            else:
                free.remove(place)
            buffers[place].append(size)
        places.append(place)
        for done in {*step.registers(), register} - {0}:
            other = places[done - 1]
            if other is not None and reading.get(done, number) == number:
                free.append(other)
    return places, buffers


def _distance(held: list[tuple[Pair, int]], size: tuple[Pair, int]) -> float:
    """How far what lies in a buffer is from a size, all pixels active."""

    def elements(each: tuple[Pair, int]) -> int:
        return max(1, prod(each[0])) * each[1]

    return abs(math.log(max(map(elements, held)) / elements(size)))


class State:
    """Modules as they were: what they have, and what theirs have.

    Raises:
        RuntimeError: for tensors of inference mode, whose writes are not counted.
    """

    def __init__(self, modules: list[Any]):
        self.modules = modules
        self._parts = [part for module in modules for part in module.modules()]
        self._kinds: list[Any] = list(map(type, self._parts))
        self._forwards = {kind: kind.forward for kind in self._kinds}
        named = [vars(part)[name] for part in self._parts for name in _WATCHED]
        self._live = [*map(vars, self._parts), *named]
        self._seen = list(map(dict, self._live))
        tensors = [each for held in self._live for each in held.values() if isinstance(each, Tensor)]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._versions = [tensor._version for tensor in self._tensors]

    def holds(self) -> bool:
        """Whether nothing was replaced, and no tensor written to."""
        if list(map(type, self._parts)) != self._kinds or has_global_hooks():
            return False
        if any(kind.forward is not forward for kind, forward in self._forwards.items()):
            return False
        try:
            if self._live != self._seen:  # what is the same object compares as equal at once
                return False
        except RuntimeError:  # of other tensors, which compare by element
            return False
        return [tensor._version for tensor in self._tensors] == self._versions


# What a module keeps by name, beside its attributes.
_WATCHED = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
