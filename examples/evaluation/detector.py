"""Run a detector over a test set."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import sparsenet
from evaluation.voc_map import Matches, match
from figures import Seen


@dataclass(frozen=True)
class Evaluation:
    """Matches of the whole test set; the rest are means over its images, known of selective detectors."""

    matches: Matches
    macs: float = float("nan")  # of a forward pass, Selective Module included
    dense_macs: float = float("nan")  # of the same pass without selection
    density: float = 1.0  # active share at the embed stage


@torch.no_grad()
def evaluate(
    model: nn.Module,
    test: Dataset,
    num_classes: int,
    title: str,
    other_mask: Callable[[Tensor, int], Tensor] | None = None,
) -> Evaluation:
    """Detect on each test image by itself, and match to its objects.

    Args:
        other_mask: (mask that a selective detector predicts at the stage, bool (1, h, w); index of the image) -> the
            mask that it is given instead, of any size; `None` keeps its own.
    """
    device = next(model.parameters()).device
    predictions, targets, records = [], [], []
    for i in tqdm(range(len(test)), desc=title, unit="image"):  # type: ignore[arg-type]
        image, target = test[i]
        if hasattr(model, "selector"):
            given: AbstractContextManager = nullcontext()
            if other_mask is not None:
                with sparsenet.record(model) as rec:
                    model([image.to(device)])
                given = sparsenet.use_mask(other_mask(rec.masks[max(rec.masks)].bool(), i))
            with given, sparsenet.record(model) as rec:
                [found] = model([image.to(device)])
            records.append((rec.macs, rec.dense_macs, rec.density[max(rec.density)]))
        else:
            [found] = model([image.to(device)])
        predictions.append({name: value.cpu() for name, value in found.items()})
        targets.append(target)
    means = [mean(column) for column in zip(*records, strict=True)]
    return Evaluation(match(predictions, targets, num_classes), *means)


@torch.no_grad()
def look(model: nn.Module, image: Tensor, classes: Sequence[str], least_score: float = 0.5) -> Seen:
    """What a selective detector computes in one image, and finds with at least that score."""
    with sparsenet.record(model) as rec:
        [found] = model([image.to(next(model.parameters()).device)])
    entry = max(rec.masks)
    sure = found["scores"] >= least_score
    return Seen(
        image=image,
        saliency=rec.saliency[entry][0].float().cpu(),
        mask=rec.masks[entry][0].bool().cpu(),
        boxes=found["boxes"][sure].cpu(),
        labels=[classes[label - 1] for label in found["labels"][sure].tolist()],
        scores=found["scores"][sure].cpu(),
    )
