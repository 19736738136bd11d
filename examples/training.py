"""A training loop counted in iterations, which can stop and resume, in one process or several."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import distributed
import sparsenet
from randomness import mixed, seeded
from storage import CheckpointError, brief, replacing

Images = list[Tensor]
Targets = list[dict[str, Tensor]]
Loss = Callable[[Images, Targets, int], dict[str, Tensor]]


class NotFiniteError(RuntimeError):
    """A loss that is infinite or no number; the message names its summands and what to try."""


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


class Shuffled(Dataset):
    """A data set over and over, each epoch in a new order: item `p` is the p-th sample of an endless run.

    Its order and the random numbers that its augmentation draws depend on the seed and `p` only, so that a resumed run
    sees what the first would have seen, whatever process prepares it.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self._order: tuple[int, Tensor] | None = None  # of the last epoch asked for

    def __getitem__(self, position: int) -> Any:
        length = len(self.dataset)  # type: ignore[arg-type]
        epoch, offset = divmod(position, length)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, _permutation(length, mixed(self.seed, epoch))
        with seeded(mixed(self.seed, position)):
            return self.dataset[int(self._order[1][offset])]


def batches(dataset: Dataset, schedule: Schedule, *, seed: int, workers: int, start: int = 0) -> DataLoader:
    """Batch `start` and those after it of a shuffled data set, or this process's share of each: lists of images and of
    targets.

    Raises:
        ValueError: the batch cannot be divided among the processes.
    """
    size, share = schedule.batch_size, distributed.share(schedule.batch_size)
    return DataLoader(
        Shuffled(dataset, seed),
        batch_sampler=[
            range(step * size + share.start, step * size + share.stop)  # type: ignore[misc]
            for step in range(start, schedule.iterations)
        ],
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # or it would draw from the run's
    )


def _permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Images, Targets]:
    return [image for image, _ in items], [target for _, target in items]


class _Total(nn.Module):
    """The loss as the forward pass of a module: `DistributedDataParallel` averages the gradients of what that gives."""

    def __init__(self, model: nn.Module, beside: nn.Module | None, loss: Loss):
        super().__init__()
        self.model, self.beside = model, beside
        self.loss: Loss = loss

    def forward(self, images: Images, targets: Targets, step: int) -> dict[str, Tensor]:
        return self.loss(images, targets, step)


def fit(
    model: nn.Module,
    loss: Loss,
    data: Callable[[int], Iterable[tuple[Images, Targets]]],
    schedule: Schedule,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    title: str,
    amp: bool | torch.dtype,
    state: Path,
    about: Mapping[str, Any] | None = None,
    save_every: int = 500,
    accumulate: int = 1,
    ema: float | None = None,
    beside: nn.Module | None = None,
    log: Path | None = None,
    scalars: Callable[[], dict[str, float]] | None = None,
) -> list[float]:
    """Train `model` in place, leave it in eval mode, and return the loss of every iteration.

    The random numbers of an iteration depend on `torch.initial_seed()` and its number only, so that a run which was
    killed and resumed gives, on the same machine, bit for bit what it would have given.

    Where `torch.distributed` has several processes, each is given its share of every batch, and all end with the same
    model: gradients are averaged, and batch normalisation takes its statistics over all processes. The first writes the
    files; all read `state`. The losses are means over the processes.

    Args:
        loss: (images, targets, step) -> the summands of the loss by name, each a mean over the images. What it trains
            is `model` and `beside`.
        data: first step -> the batches from there on.
        optimizer: SGD over all parameters of `model` unless given.
        title: names the run, at the progress bar and in `state`.
        amp: run the forward pass in half precision where torch's autocast does: in bfloat16, or, for `torch.float16`,
            in float16 with a scaled loss.
        state: file that receives all that is needed to resume, every `save_every` iterations and at
            the end; where it exists the run goes on from it.
        about: what else the run depends on, by names that its user knows: `state` of another is refused.
        accumulate: into how many parts of equal size each batch is divided, one after the other, to take that much less
            memory: the same step up to rounding, where no summand is a mean over anything but images (batch
            normalisation has the statistics of a part, and a detector's loss the number of positives of a part).
        ema: leave the exponential moving average of the weights in the model, with this decay, such as 0.999.
        beside: a module with a state of its own that the loss uses, such as a `sparsenet.train.Budget`.
        log: folder of a TensorBoard log, with each summand of the loss, the rate, and `scalars`.
        scalars: called after each iteration for more values to log, by name.

    Raises:
        NotFiniteError: the loss is not finite, in any of the processes.
        ValueError: a batch cannot be divided into `accumulate` parts.
        CheckpointError: `state` is damaged, belongs to another run, is not the same for all processes, or cannot be
            written.
    """
    device = next(model.parameters()).device
    half = {True: torch.bfloat16, False: None}[amp] if isinstance(amp, bool) else amp
    if optimizer is None:
        optimizer = schedule.sgd(model.parameters())
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    scaler = GradScaler(device.type, enabled=half is torch.float16)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "rate": rate, "scaler": scaler}
    averaged = None
    if ema is not None:
        averaged = parts["ema"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
    if beside is not None:
        parts["beside"] = beside
    said = {"run": title, **asdict(schedule), "precision": half or torch.float32, "accumulate": accumulate, "ema": ema}
    run = {name: str(value) for name, value in {**said, **(about or {})}.items()}
    seed, losses = _resume(state, run, parts) if state.exists() else (torch.initial_seed(), [])
    if len(set(distributed.gathered(len(losses)))) > 1:
        raise CheckpointError(
            f"{state} is not the same for all processes: choose an --out that all share, and have it whole."
        )

    model.train()
    with ExitStack() as stack:
        total: nn.Module = _Total(model, beside, loss)
        if distributed.together():
            total = DistributedDataParallel(total)
            stack.enter_context(sparsenet.train.synchronised(model))
        writer = stack.enter_context(_writer(log, len(losses))) if log and distributed.first() else None
        bar = tqdm(
            total=schedule.iterations,
            initial=len(losses),
            desc=title,
            unit="it",
            disable=not distributed.first(),
        )
        stack.enter_context(bar)
        for step, (images, targets) in enumerate(data(len(losses)), start=len(losses)):
            torch.manual_seed(mixed(seed, step, distributed.rank()))
            optimizer.zero_grad()
            summands: dict[str, float] = {}
            for here, part in _divided(total, images, targets, accumulate):
                with here:
                    with torch.autocast(device.type, half, enabled=half is not None):
                        found = total(*_moved(*part, device), step)
                    scaler.scale(torch.stack(list(found.values())).sum() / accumulate).backward()
                values = distributed.mean(torch.stack(list(found.values()))).tolist()
                for name, value in zip(found, values, strict=True):
                    summands[name] = summands.get(name, 0.0) + value / accumulate
            whole = sum(summands.values())
            if not math.isfinite(whole):
                shown = ", ".join(f"{name} {value:.3g}" for name, value in summands.items())
                raise NotFiniteError(
                    f"{title}: the loss is not finite at iteration {step} ({shown}). "
                    "Lower --lr, lengthen the warm-up, or look for broken boxes in the data."
                )
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            scaler.step(optimizer)
            scaler.update()
            if averaged is not None:
                averaged.update_parameters(model)
            if writer is not None:
                _write(writer, step, summands, rate.get_last_lr(), scalars() if scalars else {})
            rate.step()
            losses.append(whole)
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
            bar.update()
            if distributed.first() and (len(losses) % save_every == 0 or len(losses) == schedule.iterations):
                if writer is not None:
                    writer.flush()  # a resumed run goes on in the log where it goes on in `state`
                _suspend(state, run, parts, seed, losses)
    if averaged is not None:
        model.load_state_dict(averaged.module.state_dict())
    model.eval()
    return losses


def _divided(
    total: nn.Module, images: Images, targets: Targets, parts: int
) -> Iterator[tuple[AbstractContextManager, tuple[Images, Targets]]]:
    """The parts of a batch, each with the context to compute it in: processes exchange gradients with the last."""
    if parts == 1:
        yield nullcontext(), (images, targets)
        return
    size, rest = divmod(len(targets), parts)
    if rest or len(images) != len(targets):
        raise ValueError(
            f"{len(images)} images with {len(targets)} targets cannot be divided into {parts} equal parts: choose a "
            "batch size that can, in each process"
        )
    for part in range(parts):
        last, chosen = part == parts - 1, slice(part * size, (part + 1) * size)
        here = total.no_sync() if isinstance(total, DistributedDataParallel) and not last else nullcontext()
        yield here, (images[chosen], targets[chosen])


def _moved(images: Images, targets: Targets, device: torch.device) -> tuple[Images, Targets]:
    return (
        [image.to(device) for image in images],
        [{name: value.to(device) for name, value in target.items()} for target in targets],
    )


def _writer(log: Path, start: int) -> Any:
    """Writes a TensorBoard log; what an interrupted run has logged from iteration `start` on no longer counts."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    return SummaryWriter(str(log), purge_step=start)


def _write(writer: Any, step: int, summands: dict[str, float], rates: list, others: dict[str, float]) -> None:
    named = {f"loss/{name}": value for name, value in summands.items()}
    named |= {f"rate/{group}": float(value) for group, value in enumerate(rates)} | others
    for name, value in named.items():
        writer.add_scalar(name, value, step)


def _suspend(path: Path, run: dict[str, str], parts: dict, seed: int, losses: list[float]) -> None:
    content = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:  # a file, whose errors say what is wrong
        torch.save(content | {"run": run, "seed": seed, "losses": losses}, file)


def _resume(path: Path, run: dict[str, str], parts: dict) -> tuple[int, list[float]]:
    """The seed and the losses of the run so far; its state goes into `parts`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(content["run"])
    except Exception as error:  # torch.load raises many kinds
        raise CheckpointError(f"{path} cannot be read ({brief(error)}). Remove it to start over.") from error
    names = [name for name in {**found, **run} if run.get(name) != found.get(name)]
    if names:
        different = "; ".join(f"{name} {found.get(name)}, not {run.get(name)}" for name in names)
        raise CheckpointError(
            f"{path} is of another run ({different}). Repeat that one, remove the file to start over, or choose "
            "another --out."
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(content[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is of another model or optimizer ({brief(error)}). Remove it, or choose another --out."
        ) from error
    return content["seed"], content["losses"]
