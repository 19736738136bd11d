"""The cells of the paper's tables: each a detector trained in one way and measured once, kept, and found again."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsenet
from data.sets import Data
from evaluation.detector import Evaluation, evaluate, multiply_accumulates
from evaluation.voc_map import Matches, mean_average_precision
from finetune import Training, finetune_dense, finetune_selective, made_selective, train_dense
from reduction.graph import with_shapes
from reduction.imitation import Imitation
from reduction.reduce import Reduction, reduced, sampled_images
from reduction.resolution import at_side
from report import coco_percent, origin, write_json
from storage import checkpoint_shapes, load_checkpoint, replacing, save_checkpoint
from training import Schedule


@dataclass(frozen=True)
class Cell:
    """One detector of a table.

    Attributes:
        training: how it is fine-tuned from the dense checkpoint.
        seed: of the fine-tuning.
        at: the stage; `None` for the dense detector, the baseline.
        off: the Selective Module's switches that are off.
        masks: what the trained detector is measured with: "own" masks, or as many pixels at the stage as those have, in
            "random" blobs or nearest to the "centre".
        reduction: what the dense checkpoint was made smaller by before it is fine-tuned.
    """

    training: Training
    seed: int
    at: str | None = None
    off: tuple[str, ...] = ()
    masks: str = "own"
    reduction: Reduction | None = None

    @property
    def name(self) -> str:
        """Readable, and of these settings only."""
        words = [self.reduction.name] if self.reduction else []
        words += ["dense"] if self.at is None else [self.at, self.training.supervision, *(f"no_{o}" for o in self.off)]
        return f"{'-'.join(words)}-seed{self.seed}-{_digest(self._trained())}"

    def settings(self) -> dict[str, Any]:
        """All of them, as JSON values."""
        settings = asdict(self)
        settings["training"]["amp"] = str(self.training.half)
        return settings

    def _trained(self) -> dict[str, Any]:
        settings = self.settings()
        del settings["masks"]
        if self.reduction is None:  # so that a cell is called as before there were any; and so with `macs`
            del settings["reduction"]
        for irrelevant in ("workers", "amp"):
            del settings["training"][irrelevant]
        if self.training.macs is None:
            del settings["training"]["macs"]
        if self.at is None:  # what the dense detector never sees
            settings["training"] = {name: settings["training"][name] for name in ("finetune", "accumulate", "ema")}
        return settings


@dataclass(frozen=True)
class Bench:
    """What all cells of a run share.

    Attributes:
        base: the dense detector that each starts from.
        title: names the detector.
        seen: what it was trained on and is measured on, a line that becomes part of the cells' names.
        store: folder of the cells.
        ready: gives `base` its weights, when a cell needs them.
    """

    base: nn.Module
    data: Data
    title: str
    seen: str
    store: Path
    ready: Callable[[], None] = lambda: None

    def folder(self, cell: Cell) -> Path:
        return self.store / f"{cell.name}-{_digest(self.seen)}"

    def train_base(self, schedule: Schedule, training: Training) -> None:
        """Train `base` from scratch, unless that is done."""
        folder = self.store / f"{self.title.replace(' ', '-')}-scratch-{_digest([self.seen, asdict(schedule)])}"
        checkpoint = folder / "model.safetensors"
        if not checkpoint.exists():
            train_dense(self.base, self.data.train, schedule, f"{self.title}, from scratch", 0, training, folder)
            save_checkpoint(self.base, checkpoint, seen=self.seen)
        load_checkpoint(self.base, checkpoint)

    def measure(self, cell: Cell) -> tuple[dict[str, Any], Evaluation]:
        """Train the cell unless it is trained, evaluate it unless that is done; its figures, and all matches."""
        folder = self.folder(cell)
        figures, matches = folder / f"{cell.masks}.json", folder / f"{cell.masks}.npz"
        if not figures.exists():
            model, minutes = self.trained(cell)
            title = f"{cell.name}, {cell.masks} masks"
            found = evaluate(model, self.data.test, len(self.data.classes), title, OTHER_MASKS[cell.masks])
            if cell.at is None:
                macs = multiply_accumulates(model, self.data.test[0][0])
                found = replace(found, macs=macs, dense_macs=macs)
            with replacing(matches) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, **vars(found.matches))
            eleven, area = mean_average_precision(found.matches)
            write_json(figures, origin(self.base) | cell.settings() | {
                "seen": self.seen,
                "minutes": round(minutes, 2),
                "test_images": len(found.matches.positives),
                "map_11_point": 100 * eleven,
                "map_area": 100 * area,
                "macs": found.macs,
                "dense_macs": found.dense_macs,
                "density": found.density,
                "coco": coco_percent(found.coco) if found.coco else None,
            })  # fmt: skip
        known = json.loads(figures.read_text())
        with np.load(matches) as arrays:
            kept = Matches(**arrays)
        return known, Evaluation(kept, known["macs"], known["dense_macs"], known["density"])

    def measured(self, cell: Cell) -> bool:
        """Whether `measure` has nothing left to do."""
        return (self.folder(cell) / f"{cell.masks}.json").exists()

    def trained(self, cell: Cell) -> tuple[nn.Module, float]:
        """The cell's detector, and the minutes that its training took, or that of a resumed one since then."""
        self.ready()
        folder = self.folder(cell)
        checkpoint, clock = folder / "model.safetensors", folder / "minutes.json"
        if checkpoint.exists() and clock.exists():
            return self._load(cell, checkpoint), json.loads(clock.read_text())["minutes"]
        began = time.perf_counter()
        start, train, imitation = self.start(cell.reduction), self.data.train, None
        if cell.reduction is not None and cell.reduction.kind == "imitation":
            imitation = Imitation(self.base, start, sampled_images(start, train))
        if cell.at is None:
            model = finetune_dense(start, train, cell.training, cell.seed, folder, imitation)
        else:
            switches = dict.fromkeys(cell.off, False)
            model = finetune_selective(
                start, train, cell.at, cell.training, cell.seed, folder, switches, imitation=imitation
            )
        minutes = (time.perf_counter() - began) / 60
        save_checkpoint(model, checkpoint, cell=cell.settings(), seen=self.seen)
        write_json(clock, {"minutes": minutes})
        for resume in folder.glob("*.resume.pt"):
            resume.unlink()
        return model, minutes

    def start(self, reduction: Reduction | None) -> nn.Module:
        """The dense detector that fine-tuning begins with; a reduced one is made once and kept, for all its cells."""
        if reduction is None:
            return self.base
        made = reduction.start
        checkpoint = self.store / f"start-{made.name}-{_digest([self.seen, asdict(made)])}" / "model.safetensors"
        if not checkpoint.exists():
            save_checkpoint(
                reduced(self.base, made, self.data.train), checkpoint, reduction=asdict(made), seen=self.seen
            )
        start = self._shaped(reduction, checkpoint)
        load_checkpoint(start, checkpoint)
        return start

    def _shaped(self, reduction: Reduction | None, checkpoint: Path) -> nn.Module:
        """A dense detector as wide as a checkpoint's, which may be of its selective form."""
        model = copy.deepcopy(self.base)
        if reduction is None:
            return model
        if reduction.kind == "resolution":
            return at_side(model.eval(), int(reduction.amount))
        return with_shapes(model, checkpoint_shapes(checkpoint))

    def _load(self, cell: Cell, checkpoint: Path) -> nn.Module:
        model = self._shaped(cell.reduction, checkpoint)
        if cell.at is not None:
            model = made_selective(model, cell.at, cell.training, dict.fromkeys(cell.off, False))
        load_checkpoint(model, checkpoint)
        return model.eval()


def _random(mask: Tensor, image: int) -> Tensor:
    return sparsenet.masks.blobs(1, (mask.shape[1], mask.shape[2]), mask.float().mean().item(), seed=image).to(
        mask.device
    )


def _centre(mask: Tensor, image: int) -> Tensor:
    rows, columns = (torch.linspace(-1, 1, length, device=mask.device) for length in mask.shape[1:])
    nearness = -(rows[:, None] ** 2 + columns**2).flatten()
    chosen = torch.zeros_like(nearness, dtype=torch.bool)
    chosen[nearness.topk(int(mask.sum())).indices] = True
    return chosen.view_as(mask)


OTHER_MASKS: dict[str, Callable[[Tensor, int], Tensor] | None] = {"own": None, "random": _random, "centre": _centre}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
