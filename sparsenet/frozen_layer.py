"""The weights of a frozen layer, and the choice among the ways to compute it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsenet import backends
from sparsenet.backends.choice import Measurements
from sparsenet.backends.epilogue import Epilogue
from sparsenet.backends.ways import Dense, Indirect, Norm, OnDevice, OnRows, Reads, Spec, Triton, Way, Winograd
from sparsenet.kernels import queue
from sparsenet.timing import clock_of

# What another way must take of the first one's time to be chosen. It is colder memory that a measurement does not see:
# each way has weights and results of its own.
MARGIN = 0.93

# Bytes of a map from which a depthwise layer reads it in strips, as the pointwise layer before it makes them, if both
# run by the direct kernels (see `sparsenet.strips`). Of smaller maps nothing is gained (MobileNetV2 at 448x448, whose
# maps have 19, 7 and 2 MB: from 12 MB 1.04 of the time from 6).
WIDE = 6 << 20

# `MARGIN` for a depthwise layer of such a map, whose measurement does not see what strips save.
MARGIN_IN_STRIPS = 0.6

# Ways that are no backends of rows.
OWN: dict[str, Callable[[Tensor, Spec], Way]] = {each.name: each for each in (Indirect, Winograd, Dense)}

# Normalisations and factors that a layer remembers.
MOST_EPILOGUES = 16


class FrozenLayer:
    """The weights of a layer, packed for the ways that compute it: one where a mask guides it, and one where all pixels
    are computed.

    While there are `measurements`, the first run of each kind measures all `candidates` on what it reads and keeps the
    fastest, the first one where it makes little difference; of the others no weights stay. `settle` ends that. Then the
    weights are there once, in the order of the way that computes them, but for Winograd's, which are transformed, and
    those of a second way as long as all pixels are computed.

    Args:
        path: of its module in the model.
        candidates: names of ways, by kind: "guided" or "everything".
    """

    def __init__(
        self,
        path: str,
        weight: Tensor,
        spec: Spec,
        candidates: dict[str, list[str]],
        measurements: Measurements | None,
    ):
        self.path = path
        self.outputs = len(weight)
        self.spec = spec
        self.dtype = weight.dtype
        self.device = weight.device
        self.shape = tuple(weight.shape)
        self.breaks: set[int] = set()
        self.milliseconds: dict[str, dict[str, float]] = {}
        self._candidates = candidates
        self._measurements = measurements
        self._original: Tensor | None = weight
        self._ways: dict[str, Way] = {}
        self._chosen: dict[str, Way] = {}
        self._beside: Dense | Winograd | None = None
        self._epilogues: dict[Any, tuple[list[int], list[Tensor], Epilogue | None]] = {}

    @property
    def weight(self) -> Tensor:
        """The weight as it was, (O, C / groups, kh, kw)."""
        return next(iter(self._ways.values())).weight() if self._original is None else self._original

    @property
    def chosen(self) -> dict[str, str]:
        """The name of the way for each kind."""
        return {kind: way.name for kind, way in self._chosen.items()}

    def kernels(self, kind: str) -> Indirect | None:
        """The direct kernels, where they are what computes layers of a kind."""
        way = self._chosen.get(kind)
        return way if isinstance(way, Indirect) else None

    def waiting(self, kind: str) -> Indirect | Winograd | None:
        """The kernels that wait, where they are what computes layers of a kind."""
        way = self._chosen.get(kind)
        return way if isinstance(way, Indirect | Winograd) else None

    def run(self, reads: Reads, epilogue: Epilogue) -> Tensor:
        way = self._chosen.get(reads.kind)
        if way is None:
            way = self._chosen[reads.kind] = self._fastest(reads.kind, reads, epilogue)
            self._drop()
        self.count(reads.kind)
        if not way.waits:
            queue.finish()
        return way.run(reads, epilogue)

    def count(self, kind: str) -> None:
        """It is computed, as one of a kind."""
        if self._beside is not None:
            self._beside.count(self._chosen[kind] is self._beside)

    def _fastest(self, kind: str, reads: Reads, epilogue: Epilogue) -> Way:
        names = self._candidates[kind]
        if len(names) == 1 or self._measurements is None:
            return self._way(names[0])
        geometry = f"{self.shape} {tuple(self.spec)} {reads.grid} {reads.outputs} {self.dtype}"
        layer = f"{kind}: {geometry} {epilogue.activation} {epilogue.residual is not None}"

        def by(name: str) -> Tensor:
            result = self._way(name).run(reads, epilogue)
            queue.finish()
            return result

        queue.finish()  # what is read
        runs = {name: functools.partial(by, name) for name in names}
        self.milliseconds[kind] = found = self._measurements.of(layer, runs, clock_of(self.device))
        first, best = names[0], min(found, key=found.__getitem__)
        in_strips = kind == "everything" and self.spec.groups == self.outputs and reads.rows.nbytes >= WIDE
        margin = MARGIN_IN_STRIPS if in_strips else MARGIN
        return self._way(best if found[best] < margin * found[first] else first)

    def reason(self, kind: str) -> str:
        """Why the layer runs as it does."""
        name = self.chosen[kind]
        found = self.milliseconds.get(kind, {})
        others = ", ".join(f"{other} {ms:.3f}" for other, ms in found.items() if other != name)
        if others:
            return f"measured: {found[name]:.3f} ms against {others}"
        return "the only way" if len(self._candidates[kind]) == 1 else "not met by the example inputs"

    def _way(self, name: str) -> Way:
        if name not in self._ways:
            weight = self.weight
            kinds: dict[str, Callable[[Tensor, Spec], Way]] = {
                "indirect": Indirect,
                "winograd": Winograd,
                "triton": Triton,
                "dense": Dense if weight.device.type == "cpu" else OnDevice,
            }
            self._ways[name] = kinds.get(name, functools.partial(OnRows, name))(weight, self.spec)
        return self._ways[name]

    def settle(self) -> None:
        """End the measurements: what has not run takes the first candidate, and only what is chosen stays in memory."""
        self._measurements = None
        for kind, names in self._candidates.items():
            self._chosen.setdefault(kind, self._default(names))
        self._drop()
        usual, other = self._chosen.get("guided"), self._chosen.get("everything")
        if usual is not other and usual is not None and (type(other) is Dense or isinstance(other, Winograd)):
            other.stand_beside(usual)
            self._beside = other

    def _drop(self) -> None:
        """Only what is chosen stays in memory."""
        self._ways = {way.name: way for way in self._chosen.values()}
        self._original = None

    def _computes(self, name: str) -> bool:
        """Whether a way is for where the weight is."""
        backend = backends.BACKENDS.get("indirect" if name == Winograd.name else name)
        return backend is None or backend.unsupported(self.weight, self.spec.groups) is None

    def _default(self, names: list[str]) -> Way:
        """A way that is there already, if it is among these."""
        return next((way for way in self._chosen.values() if way.name in names), None) or self._way(names[0])

    def normalised(self, epilogue: Epilogue, norm: Norm) -> Epilogue | None:
        """With batch normalisation by running statistics as the next step."""

        def made() -> Epilogue | None:
            scale = torch.rsqrt(norm.var.double() + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight.double()
            shift = -norm.mean.double() * scale
            shift = shift if norm.bias is None else shift + norm.bias.double()
            return epilogue.scaled(scale.to(norm.mean.dtype), shift.to(norm.mean.dtype))

        return self._kept(epilogue, norm[:4], norm.eps, made)

    def scaled(self, epilogue: Epilogue, factor: Tensor, cells: Tensor) -> Epilogue | None:
        """With a factor for each channel as the next step; `cells` is a view of it, copied because it may be written to
        before the layer is computed."""
        return self._kept(epilogue, (factor,), 0.0, lambda: epilogue.scaled(cells.flatten().clone(), None))

    def _kept(
        self, epilogue: Epilogue, parts: tuple[Tensor | None, ...], number: float, made: Callable[[], Epilogue | None]
    ) -> Epilogue | None:
        """An epilogue that hangs on these tensors, kept for the next pass, until one of them is written to."""
        if not epilogue.scales:
            return None
        tensors = [part for part in (*parts, epilogue.scale, epilogue.shift) if part is not None]
        try:
            versions = [part._version for part in tensors]
        except RuntimeError:  # of inference mode, whose writes are not counted
            return made()
        key = (number, *map(id, tensors))
        known = self._epilogues.get(key)
        if known is None or known[0] != versions:
            if len(self._epilogues) >= MOST_EPILOGUES:  # of tensors that are new in every pass
                self._epilogues.clear()
            # The tensors are kept too, so that no other can have their identity.
            known = self._epilogues[key] = (versions, tensors, made())
        return known[2]

    def kept(self) -> list[Any]:
        """What a later pass may drop, and a recording reads: what the ways have packed, and the normalisations folded
        for them."""
        return [*(dict(vars(way)) for way in self._chosen.values()), *self._epilogues.values()]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is packed for this machine."""
        chosen = {kind: [name] for kind, name in self.chosen.items()}
        dropped: dict[str, Any] = {"_ways": {}, "_chosen": {}, "_epilogues": {}, "_measurements": None, "_beside": None}
        return self.__dict__ | dropped | {"_original": self.weight, "_candidates": chosen or self._candidates}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        assert self._original is not None
        self.device = self._original.device  # to which `torch.load` may have brought it
        for kind, names in self._candidates.items():
            self._candidates[kind] = [name if self._computes(name) else "rows" for name in names]
        self.settle()
