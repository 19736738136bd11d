"""Average precision as COCO defines it, by torchmetrics and faster-coco-eval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torchmetrics.detection import MeanAveragePrecision


@dataclass(frozen=True)
class COCOAP:
    """Means over the classes that have objects, in 0..1; NaN where there is no object to be found."""

    ap: float  # mean over the IoU thresholds 0.5, 0.55 ... 0.95
    ap50: float  # at 0.5
    ap75: float  # at 0.75
    small: float  # as `ap`, of objects of area up to 32² pixels
    medium: float  # up to 96²
    large: float  # above


def coco_average_precision(predictions: Sequence[dict], targets: Sequence[dict]) -> COCOAP:
    """AP of detections (`boxes` xyxy, `labels`, `scores`) against `data.coco.COCOBoxes`' targets, on the CPU.

    Of each image and class the best 100 detections count, at 101 points of recall. What `crowd`
    marks is not to be found, and detections inside it count neither way. `area` (square pixels,
    float) decides which sizes an object belongs to; where it is 0 that of the box does.
    """
    # As pycocotools has them: torchmetrics' own went through float32, and some recalls miss or gain a point by it.
    thresholds, recalls = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
    metric = MeanAveragePrecision(
        iou_thresholds=thresholds.tolist(), rec_thresholds=recalls.tolist(), backend="faster_coco_eval"
    )
    metric.warn_on_many_detections = False  # it counts all classes of an image together; the limit is of each
    wanted = [{**{k: t[k] for k in ("boxes", "labels", "area")}, "iscrowd": t["crowd"].int()} for t in targets]
    metric.update(list(predictions), wanted)
    found = metric.compute()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    values = [found[name].item() for name in names]
    return COCOAP(*(value if value >= 0 else float("nan") for value in values))
