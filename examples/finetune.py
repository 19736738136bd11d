"""Fine-tuning of a dense detector, and of the same one made selective, alike but for the mask."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import sparsenet
from reduction.imitation import Imitation, maps_of
from sparsenet.train import Budget, Direct, Distilled, Indirect, importance, selector_only, stage_features, supervise
from training import Loss, Schedule, Targets, batches, fit

SUPERVISIONS = {
    "direct": "boxes are the target of the saliency (the paper's)",
    "indirect": "the detector's loss alone, through the layers next to the heads (the paper's)",
    "indirect-soft": "the same, multiplying by probabilities in training",
    "gumbel": "the detector's loss, masks drawn by their probabilities, with a budget on the density or the MACs",
    "distilled": "the pixels that matter most to the dense detector's loss are the target",
    "capacity": "as direct, with equally many active pixels in every image",
}
BY_TASK = ("indirect", "indirect-soft", "gumbel")  # these learn from a pass of the whole network


@dataclass(frozen=True)
class Training:
    """How a detector is fine-tuned.

    Attributes:
        finetune: of each detector.
        selector: of the selective detector's new branch alone, before that, on the dense detector's frozen features.
        selector_batches: how many batches of these features are made and kept, to be repeated.
        selector_by_task: iterations of the branch alone where the detector's loss teaches it, on the frozen detector.
        supervision: one of `SUPERVISIONS`.
        density: target of "gumbel", "distilled" and "capacity", active share at the stage.
        macs: target of "gumbel" in its place: share of the dense detector's multiply-accumulates.
        mask_warmup: share of the fine-tuning in which true boxes are active, predicted or not.
        missed_pixel: what a missed pixel counts in the mask's loss against a wasted one; 1 in the paper.
        size_balance: from 0, every missed pixel counts alike (the paper), to 1, every missed object does.
        accumulate: into how many parts each batch is divided, one after the other.
        ema: decay of the moving average of the weights that is left in the detector at the end; `None`: the last ones.
        workers: processes that prepare images.
        amp: half precision where torch's autocast has it: bfloat16, or `torch.float16`.
    """

    finetune: Schedule
    selector: Schedule
    selector_batches: int
    selector_by_task: int
    supervision: str = "direct"
    density: float = 0.3
    macs: float | None = None
    mask_warmup: float = 0.0
    missed_pixel: float = 1.0
    size_balance: float = 0.0
    accumulate: int = 1
    ema: float | None = None
    workers: int = 1
    amp: bool | torch.dtype = False

    @property
    def half(self) -> torch.dtype | None:
        """What the forward pass runs in, but for float32."""
        return torch.bfloat16 if self.amp is True else self.amp or None

    @property
    def capacity(self) -> float | None:
        return self.density if self.supervision == "capacity" else None

    def of_the_mask(self) -> dict[str, Any]:
        """What the mask's training depends on beside the schedule of fine-tuning."""
        names = ("supervision", "density", "macs", "missed_pixel", "size_balance", "mask_warmup", "selector_batches")
        schedules = {"selector_schedule": self.selector, "selector_iterations_by_task": self.selector_by_task}
        return {name: getattr(self, name) for name in names} | schedules

    def how(self) -> Direct | Indirect | Distilled:
        if self.supervision in ("direct", "capacity"):
            return Direct(self.missed_pixel, self.size_balance)
        if self.supervision == "distilled":
            return Distilled(self.density)
        if self.supervision == "gumbel":
            return Indirect("all", gumbel=1.0)
        return Indirect(soft=self.supervision == "indirect-soft")


def finetune_dense(
    base: nn.Module,
    train: Dataset,
    training: Training,
    seed: int,
    out: Path,
    imitation: Imitation | None = None,
) -> nn.Module:
    """A copy of `base`, trained on, which imitates a teacher's features if one is given."""
    dense = copy.deepcopy(base)
    about = {"dense weights": digest(base)}
    train_dense(dense, train, training.finetune, f"dense, seed {seed}", seed, training, out, imitation, about)
    return dense


def train_dense(
    model: nn.Module,
    train: Dataset,
    schedule: Schedule,
    title: str,
    seed: int,
    training: Training,
    out: Path,
    imitation: Imitation | None = None,
    about: dict[str, Any] | None = None,
) -> list[float]:
    """Train `model` in place with its own loss; of `about` see `fit`."""

    def loss(images: list[Tensor], targets: Targets, step: int) -> dict[str, Tensor]:
        return model(images, targets)

    if imitation is None:
        return _fit(loss, model, train, schedule, title, seed, training, out, about)
    optimizer = schedule.sgd([*model.parameters(), *imitation.parameters()])
    both = _imitating(loss, model, imitation)
    return _fit(both, model, train, schedule, title, seed, training, out, about, optimizer=optimizer, beside=imitation)


def _imitating(loss: Loss, model: nn.Module, imitation: Imitation) -> Loss:
    """A detector's loss, and beside it how far its features are from the teacher's."""

    def both(images: list[Tensor], targets: Targets, step: int) -> dict[str, Tensor]:
        with maps_of(model) as maps:
            losses = loss(images, targets, step)
        return losses | {"imitation": imitation(maps, images, targets)}

    return both


def finetune_selective(
    base: nn.Module,
    train: Dataset,
    at: str,
    training: Training,
    seed: int,
    out: Path,
    switches: dict[str, bool] | None = None,
    imitation: Imitation | None = None,
) -> nn.Module:
    """A copy of `base` made selective after the stage `at`, its branch trained alone first, then the whole.

    Args:
        switches: of the Selective Module (the paper's ablation), where they are not the default.
        imitation: of a teacher's features, while the whole is trained.
    """
    torch.manual_seed(seed)
    selective: Any = made_selective(base, at, training, switches)
    selective.to(memory_format=torch.channels_last)
    teaching = _Teaching(selective, base, at, training)
    about = {"dense weights": digest(base), "at": at, "switches": switches, **training.of_the_mask()}
    _train_selector(selective, train, teaching, seed, out, about)
    warmup = round(training.mask_warmup * training.finetune.iterations)

    def loss(images: list[Tensor], targets: Targets, step: int) -> dict[str, Tensor]:
        return teaching.losses(images, targets, step < warmup)

    schedule, branch = training.finetune, list(selective.selector.parameters())
    ids = {id(parameter) for parameter in branch}
    groups = [
        {"params": [parameter for parameter in selective.parameters() if id(parameter) not in ids]},
        {"params": branch, "lr": 10 * schedule.lr},  # it follows the features that it reads as they change
    ]
    title = f"selective, seed {seed}"
    beside: nn.Module | None = teaching.budget
    total: Loss = loss
    if imitation is not None:
        total = _imitating(loss, selective, imitation)
        groups.append({"params": list(imitation.parameters())})
        beside = imitation if beside is None else nn.ModuleList([beside, imitation])
    optimizer = schedule.sgd(groups)
    _fit(total, selective, train, schedule, title, seed, training, out, about, optimizer=optimizer, beside=beside)
    return selective


def digest(model: nn.Module) -> str:
    """What tells a model's weights from others."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:8]


def made_selective(base: nn.Module, at: str, training: Training, switches: dict[str, bool] | None = None) -> nn.Module:
    """A copy of `base` with an untrained branch; arguments as in `finetune_selective`."""
    example = [torch.rand(3, *base.transform.fixed_size, device=next(base.parameters()).device)]  # type: ignore[union-attr, misc]
    selector = None
    if switches:  # otherwise selectify's own, which is of the same budget
        plan = sparsenet.plan(sparsenet.selectify(base, at, selector=sparsenet.GivenMask(), example_inputs=example))
        budget = 0.02 * plan.total_macs
        selector = sparsenet.SelectiveModule.fit(plan.channels, size=plan.size, budget=budget, **switches)
    return sparsenet.selectify(base, at, selector=selector, example_inputs=example, capacity=training.capacity)


def budget(selective: nn.Module, training: Training) -> Budget | None:
    """What the masks may cost, where a budget teaches them.

    Raises:
        ValueError: for a target that no mask reaches.
    """
    if training.supervision != "gumbel":
        return None
    return Budget(selective, **({"density": training.density} if training.macs is None else {"macs": training.macs}))


class _Teaching:
    """What supervises the mask of one detector."""

    def __init__(self, selective: nn.Module, base: nn.Module, at: str, training: Training):
        self.selective = selective
        self.training = training
        self.budget = budget(selective, training)
        self.teacher: nn.Module | None = None
        if training.supervision == "distilled":
            self.stage = sparsenet.plan(selective).stage
            self.teacher = _giving_losses(copy.deepcopy(base).requires_grad_(False))

    def matters(self, images: list[Tensor], targets: Targets) -> Tensor | None:
        """The importance of each pixel to the teacher's loss, where it teaches."""
        teacher = self.teacher
        if teacher is None:
            return None
        return importance(teacher, self.stage, lambda: torch.stack(list(teacher(images, targets).values())).sum())

    def supervised(
        self, images: list[Tensor], targets: Targets, warmup: bool = False, matters: Tensor | None = None
    ) -> AbstractContextManager:
        if matters is None:
            matters = self.matters(images, targets)
        boxes = [target["boxes"] for target in targets]
        how = self.training.how()
        return supervise(self.selective, how, boxes, importance=matters, warmup=warmup, budget=self.budget)

    def losses(self, images: list[Tensor], targets: Targets, warmup: bool = False) -> dict[str, Tensor]:
        """The detector's own, and the mask's."""
        with self.supervised(images, targets, warmup) as supervision:
            losses = self.selective(images, targets)
        return losses | {"saliency": supervision.loss()}


def _giving_losses(detector: nn.Module) -> nn.Module:
    """A detector that gives its losses, as in training, while its normalisation works as in evaluation."""
    detector.eval()
    detector.training = True
    return detector


def _train_selector(
    selective: Any, train: Dataset, teaching: _Teaching, seed: int, out: Path, about: dict[str, Any]
) -> None:
    """The new branch first learns alone where to look; the detector stays as it is, so that both detectors' own weights
    are trained for equally many iterations. Where a target teaches it, nothing after it runs, and the features that it
    reads are kept and repeated: images and the layers before it take five times as long as its own step."""
    training, selector = teaching.training, selective.selector
    schedule = training.selector
    device = next(selector.parameters()).device
    frozen = [parameter for parameter in selective.parameters() if parameter.requires_grad]
    _giving_losses(selective).requires_grad_(False)
    selector.requires_grad_(True)
    # Adam, for a fresh branch: after 300 iterations SGD at its best rate is where Adam is after 120.
    optimizer = torch.optim.AdamW(selector.parameters(), schedule.lr, betas=(0.9, 0.99), weight_decay=0.1)
    title = f"selector, seed {seed}"

    def features(start: int) -> Iterator[tuple[list, Targets]]:
        kept: list[tuple[list, Targets]] = []
        count = min(training.selector_batches, schedule.iterations)
        made = batches(train, replace(schedule, iterations=count), seed=seed, workers=training.workers)
        for images, targets in tqdm(made, desc=f"features, seed {seed}", unit="batch"):
            images = [image.to(device) for image in images]
            matters = teaching.matters(images, [{k: v.to(device) for k, v in target.items()} for target in targets])
            with torch.autocast(device.type, training.half, enabled=training.half is not None):
                found = stage_features(selective.eval(), images)
            if matters is not None:
                targets = [target | {"matters": row.cpu()} for target, row in zip(targets, matters, strict=True)]
            kept.append(([found.to("cpu")], targets))
        selector.train()
        for step in range(start, schedule.iterations):
            yield kept[step % len(kept)]

    def on_features(features: list, targets: Targets, step: int) -> dict[str, Tensor]:
        matters = torch.stack([target["matters"] for target in targets]) if teaching.teacher is not None else None
        with teaching.supervised(features, targets, matters=matters) as supervision:
            selector_only(selective, *features)
        return {"saliency": supervision.loss()}

    def by_task(images: list[Tensor], targets: Targets, step: int) -> dict[str, Tensor]:
        return teaching.losses(images, targets)

    options: dict[str, Any] = {"optimizer": optimizer, "ema": None}
    if training.supervision in BY_TASK:
        schedule = replace(schedule, iterations=training.selector_by_task)
        options |= {"beside": teaching.budget}
        _fit(by_task, selector, train, schedule, title, seed, training, out, about, **options)
    else:
        options |= {"data": features, "accumulate": 1}
        _fit(on_features, selector, train, schedule, title, seed, training, out, about, **options)
    for parameter in frozen:
        parameter.requires_grad_(True)


def _fit(
    loss: Loss,
    model: Any,
    train: Dataset,
    schedule: Schedule,
    title: str,
    seed: int,
    training: Training,
    out: Path,
    about: dict[str, Any] | None,
    **options,
) -> list[float]:
    def shuffled(start: int):
        return batches(train, schedule, seed=seed, workers=training.workers, start=start)

    torch.manual_seed(seed)
    name = title.replace(", ", "_").replace(" ", "_")
    given: dict[str, Any] = {"data": shuffled, "accumulate": training.accumulate, "ema": training.ema} | options
    return fit(
        model.to(memory_format=torch.channels_last),  # twice as fast on CPUs as the default format
        loss,
        schedule=schedule,
        title=title,
        amp=training.amp,
        state=out / f"{name}.resume.pt",
        about={"seed": seed, "training images": len(train), **(about or {})},  # type: ignore[arg-type]
        log=out / "log" / name,
        **given,
    )
