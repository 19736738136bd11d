"""Average precision as Pascal VOC defines it, and what chance makes of a difference of two.

VOC matches detections to objects image by image. So the matching is done once, and any resample of
the images is a new set of image weights on the same matches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torchvision.ops import box_iou


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections of a test set, best first, without those that count neither way. Two are equal if they are one."""

    image: np.ndarray  # (d,) index of the detection's image
    label: np.ndarray  # (d,) its class, from 1 on
    correct: np.ndarray  # (d,) bool
    positives: np.ndarray  # (images, classes) objects to be found; classes from label 1 on


def match(predictions: Sequence[dict], targets: Sequence[dict], num_classes: int, iou: float = 0.5) -> Matches:
    """Match each image's detections (`boxes`, `labels`, `scores`) to its objects, as the VOC devkit does.

    A detection looks for the object of its class that it overlaps most, whether taken or not. It is
    correct if they overlap enough and no better detection has taken the object; it counts neither
    way if the object is `difficult` (or, of COCO, a `crowd`). Those are not to be found.
    """
    rows = []  # (score, image, label, correct)
    positives = np.zeros((len(targets), num_classes), int)
    for image, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        labels = target["labels"].numpy()
        difficult = target["difficult" if "difficult" in target else "crowd"].numpy()
        np.add.at(positives[image], labels[~difficult] - 1, 1)
        overlaps = box_iou(prediction["boxes"], target["boxes"]).numpy()
        overlaps = np.where(prediction["labels"].numpy()[:, None] == labels, overlaps, -1)
        taken = np.zeros(len(labels), bool)
        for d in prediction["scores"].numpy().argsort(kind="stable")[::-1]:
            best = overlaps[d].argmax() if len(labels) else -1
            found = best >= 0 and overlaps[d, best] >= iou
            if found and difficult[best]:
                continue
            rows.append((prediction["scores"][d], image, prediction["labels"][d], found and not taken[best]))
            if found:
                taken[best] = True
    table = np.array(rows, dtype=float).reshape(-1, 4)
    table = table[table[:, 0].argsort(kind="stable")[::-1]]
    return Matches(table[:, 1].astype(int), table[:, 2].astype(int), table[:, 3].astype(bool), positives)


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The 11-point AP and the area AP of every class, in 0..1; NaN for a class without objects.

    The first is the mean, over recall 0, 0.1 ... 1, of the best precision at that recall or above
    (VOC 2007); the second integrates the best precision over recall (VOC 2010 on).
    `weights` (images,) counts how often each image occurs; once by default.
    """
    images, classes = matches.positives.shape
    weights = np.ones(images) if weights is None else weights
    positives = weights @ matches.positives
    result = np.full((2, classes), np.nan)
    for c in np.flatnonzero(positives):
        image, correct = _by_class(matches)[c]
        weight = weights[image]
        found = weight[correct]  # where recall grows; precision falls until the next
        true = np.cumsum(found)
        precision = true / np.maximum(np.cumsum(weight)[correct], 1)
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        result[0, c] = best[np.searchsorted(true / positives[c], np.arange(11) / 10)].mean()
        result[1, c] = (found @ best[:-1]) / positives[c]
    return result[0], result[1]


@cache
def _by_class(matches: Matches) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each class the images of its detections, and which of these are correct, as indices."""
    mine = [matches.label == label for label in range(1, 1 + matches.positives.shape[1])]
    return [(matches.image[m], np.flatnonzero(matches.correct[m])) for m in mine]


def mean_average_precision(matches: Matches, weights: np.ndarray | None = None) -> tuple[float, float]:
    """11-point and area AP, each averaged over the classes that have objects."""
    eleven, area = average_precision(matches, weights)
    return float(np.nanmean(eleven)), float(np.nanmean(area))


def paired_bootstrap(
    pairs: Sequence[tuple[Matches, Matches]], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the 11-point mAP of the second of each pair minus that of the first.

    Every resample draws the images anew, with replacement, the same ones for both of a pair. The
    pairs (such as one per training seed) are of the same images; their differences are averaged.
    """
    scores = [[_resampled(matches, resamples, seed) for matches in pair] for pair in pairs]
    differences = np.mean([second - first for first, second in scores], axis=0)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


@cache  # a detector is compared with several others
def _resampled(matches: Matches, resamples: int, seed: int) -> np.ndarray:
    """The 11-point mAP of each resample."""
    rng = np.random.default_rng(seed)
    images = len(matches.positives)
    draws = (rng.multinomial(images, np.full(images, 1 / images)) for _ in range(resamples))
    return np.array([mean_average_precision(matches, weights)[0] for weights in draws])
