"""A training loop counted in iterations, which can stop and resume."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from storage import CheckpointError, replacing

Images = list[Tensor]
Targets = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How long and with what learning rate SGD runs.

    After a linear warm-up the rate follows a cosine to zero, or, with `milestones`, falls to a
    tenth at each. Warm-up and milestones are shares of the iterations, so they scale with them.
    """

    iterations: int
    batch_size: int
    lr: float
    warmup: float = 0.05
    milestones: tuple[float, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 10.0  # largest norm of the gradient of all parameters together

    def sgd(self, parameters: Iterable) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def factor(self, step: int) -> float:
        """Share of `lr` at `step`, counted from 0."""
        warmup = round(self.warmup * self.iterations)
        if step < warmup:
            return (step + 1) / warmup
        if self.milestones:
            return 0.1 ** sum(step >= share * self.iterations for share in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.iterations - warmup)))


class Shuffled(Sampler[int]):
    """Indices of endlessly many epochs, each in a new order, from sample `start` to sample `stop`.

    The order depends on the seed only, so a resumed run sees the images the first would have seen.
    """

    def __init__(self, length: int, start: int, stop: int, seed: int):
        self.length, self.start, self.stop, self.seed = length, start, stop, seed

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while position < self.stop:
            epoch, offset = divmod(position, self.length)
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch))
            chosen = order[offset : offset + self.stop - position].tolist()
            yield from chosen
            position += len(chosen)


def batches(dataset: Dataset, schedule: Schedule, *, seed: int, workers: int, start: int = 0) -> DataLoader:
    """Batch `start` and those after it of a shuffled data set: lists of images and of targets."""
    size = schedule.batch_size
    return DataLoader(
        dataset,
        size,
        sampler=Shuffled(len(dataset), start * size, schedule.iterations * size, seed),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),  # seeds torch in the workers, and so the augmentation
    )


def _collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Images, Targets]:
    return [image for image, _ in items], [target for _, target in items]


def fit(
    model: nn.Module,
    loss: Callable[[Images, Targets, int], dict[str, Tensor]],
    data: Callable[[int], Iterable[tuple[Images, Targets]]],
    schedule: Schedule,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    title: str,
    amp: bool,
    state: Path,
    save_every: int = 500,
) -> list[float]:
    """Train `model` in place, leave it in eval mode, and return the loss of every iteration.

    Args:
        loss: (images, targets, step) -> the summands of the loss by name.
        data: first step -> the batches from there on.
        optimizer: SGD over all parameters unless given.
        title: names the run, at the progress bar and in `state`.
        amp: run the forward pass in bfloat16 where torch's autocast does.
        state: file that receives all that is needed to resume, every `save_every` iterations and at
            the end; where it exists the run goes on from it.

    Raises:
        RuntimeError: the loss is not finite.
        CheckpointError: `state` is damaged, or belongs to another run.
    """
    device = next(model.parameters()).device
    if optimizer is None:
        optimizer = schedule.sgd(model.parameters())
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    parts = {"model": model, "optimizer": optimizer, "rate": rate}
    run = f"{title}: {schedule}"
    losses = _resume(state, run, parts) if state.exists() else []
    model.train()
    with tqdm(total=schedule.iterations, initial=len(losses), desc=title, unit="it") as bar:
        for step, (images, targets) in enumerate(data(len(losses)), start=len(losses)):
            images = [image.to(device) for image in images]
            targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                summands = loss(images, targets, step)
            total = torch.stack(list(summands.values())).sum()
            if not torch.isfinite(total):
                shown = ", ".join(f"{name} {value.item():.3g}" for name, value in summands.items())
                raise RuntimeError(
                    f"{title}: the loss is not finite at iteration {step} ({shown}). "
                    "Lower --lr, lengthen the warm-up, or look for broken boxes in the data."
                )
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
            rate.step()
            losses.append(total.item())
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
            bar.update()
            if len(losses) % save_every == 0 or len(losses) == schedule.iterations:
                _suspend(state, run, parts, losses)
    model.eval()
    return losses


def _suspend(path: Path, run: str, parts: dict, losses: list[float]) -> None:
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"run": run, "losses": losses, "rng": torch.get_rng_state()}
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _resume(path: Path, run: str, parts: dict) -> list[float]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise CheckpointError(f"{path} cannot be read ({error}). Remove it to start over.") from error
    if content["run"] != run:
        raise CheckpointError(f"{path} is of another run ({content['run']}). Remove it, or choose another --out.")
    for name, part in parts.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["rng"])
    return content["losses"]
