"""COCO's average precision against hand-computed cases and a second, slow implementation."""

import math

import numpy as np
import pytest
import torch

from evaluation.coco_ap import COCOAP, coco_average_precision


def objects(*boxes, labels=None, crowd=None, area=None):
    n = len(boxes)
    found = torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)
    sides = found[:, 2:] - found[:, :2]
    return {
        "boxes": found,
        "labels": torch.tensor(labels if labels is not None else [1] * n, dtype=torch.int64),
        "crowd": torch.tensor(crowd if crowd is not None else [False] * n, dtype=torch.bool),
        "area": torch.tensor(area, dtype=torch.float32) if area is not None else sides.prod(1),
    }


def detections(*boxes, scores, labels=None):
    found = objects(*boxes, labels=labels)
    return {"boxes": found["boxes"], "labels": found["labels"], "scores": torch.tensor(scores, dtype=torch.float32)}


RECALLS = np.linspace(0, 1, 101)  # pycocotools'; its 0.7 is greater than 7 / 10
SMALL, MEDIUM, LARGE = [0, 0, 20, 20], [100, 100, 150, 150], [200, 200, 350, 350]
ELSEWHERE = [400, 400, 450, 450]


def test_all_found():
    found = coco_average_precision(
        [detections(SMALL, MEDIUM, LARGE, scores=[0.9, 0.8, 0.7])], [objects(SMALL, MEDIUM, LARGE)]
    )
    assert found == COCOAP(*[pytest.approx(1)] * 6)


def test_hit_miss_hit():
    """Precision 1 up to recall 1/2 (51 of the 101 points), then 2/3."""
    found = coco_average_precision(
        [detections(MEDIUM, ELSEWHERE, LARGE, scores=[0.9, 0.8, 0.7])], [objects(MEDIUM, LARGE)]
    )
    assert found.ap == found.ap50 == found.ap75 == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)


@pytest.mark.parametrize("found", range(1, 10))
def test_recall_that_lies_on_a_point(found):
    """`found` of 10 objects: the points 0 ... found/10 count, the last among them if it is so for pycocotools."""
    boxes = [[50 * i, 0, 50 * i + 40, 40] for i in range(10)]
    prediction = detections(*boxes[:found], scores=np.linspace(0.9, 0.1, found))
    expected = (found / 10 >= RECALLS).mean()
    assert expected == pytest.approx((10 * found + (found != 7)) / 101)
    assert coco_average_precision([prediction], [objects(*boxes)]).ap == pytest.approx(expected, abs=1e-6)


def test_thresholds():
    """Overlap 18/25 = 0.72: correct at 0.5, 0.55 ... 0.7, five of the ten thresholds."""
    found = coco_average_precision([detections([0, 0, 72, 100], scores=[0.9])], [objects([0, 0, 100, 100])])
    assert (found.ap, found.ap50, found.ap75) == (pytest.approx(0.5), pytest.approx(1), 0)


def test_detections_inside_a_crowd_count_neither_way():
    """However many; and a crowd that is not found costs nothing."""
    inside = [[400 + i, 400, 420 + i, 420] for i in range(30)]
    target = objects(MEDIUM, [390, 390, 460, 460], crowd=[False, True])
    scores = [0.5, *np.linspace(0.99, 0.6, 30)]  # those in the crowd come first
    assert coco_average_precision([detections(MEDIUM, *inside, scores=scores)], [target]).ap == pytest.approx(1)
    assert coco_average_precision([detections(MEDIUM, scores=[0.5])], [target]).ap == pytest.approx(1)
    plain = objects(MEDIUM, [390, 390, 460, 460])
    assert coco_average_precision([detections(MEDIUM, *inside, scores=scores)], [plain]).ap < 0.1


def test_a_crowd_is_of_its_class_and_image_only():
    target = objects(MEDIUM, ELSEWHERE, labels=[1, 2], crowd=[False, True])
    wrong = detections(ELSEWHERE, MEDIUM, scores=[0.9, 0.5])
    assert coco_average_precision([wrong], [target]).ap == pytest.approx(0.5)


def test_the_best_hundred_of_each_image_and_class():
    """The hit is number 101 of its class in one image; of another class or image it would be number one."""
    false = [[10 * i, 500, 10 * i + 5, 505] for i in range(100)]
    scores = [*np.linspace(0.99, 0.5, 100), 0.1]
    target, empty = objects(MEDIUM), objects()
    assert coco_average_precision([detections(*false, MEDIUM, scores=scores)], [target]).ap == 0
    one_less = detections(*false[1:], MEDIUM, scores=scores[1:])
    assert coco_average_precision([one_less], [target]).ap == pytest.approx(0.01)
    other_class = detections(*false, MEDIUM, scores=scores, labels=[2] * 100 + [1])
    assert coco_average_precision([other_class], [target]).ap == pytest.approx(1)
    other_image = [detections(*false, scores=scores[:-1]), detections(MEDIUM, scores=[0.1])]
    assert coco_average_precision(other_image, [empty, target]).ap == pytest.approx(1 / 101, abs=1e-6)


def test_sizes_are_apart():
    """Two small objects, of which one is found, a large one that is found, and no medium one."""
    also_small = [60, 0, 80, 20]
    found = coco_average_precision([detections(SMALL, LARGE, scores=[0.9, 0.8])], [objects(SMALL, also_small, LARGE)])
    assert found.small == pytest.approx(51 / 101, abs=1e-6)
    assert found.large == pytest.approx(1)
    assert math.isnan(found.medium)


def test_the_annotated_area_decides_not_the_boxs():
    found = coco_average_precision([detections(MEDIUM, scores=[0.9])], [objects(MEDIUM, area=[900])])
    assert found.small == pytest.approx(1)
    assert math.isnan(found.medium)


def test_classes_without_objects_are_left_out():
    found = coco_average_precision([detections(MEDIUM, LARGE, scores=[0.9, 0.8], labels=[1, 7])], [objects(MEDIUM)])
    assert found.ap == pytest.approx(1)


def test_nothing_to_find_is_no_number_and_nothing_found_is_zero():
    assert all(map(math.isnan, vars(coco_average_precision([detections(MEDIUM, scores=[0.9])], [objects()])).values()))
    assert coco_average_precision([detections(scores=[])], [objects(MEDIUM)]).ap == 0


def overlap(a, b, crowd):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    mine, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (mine if crowd else mine + other - shared)


def naive(predictions, targets, label, least, sizes=(0, 1e10)):
    """AP of one class at one overlap: one pass over the detections, best first over all images."""
    todo, wanted = [], {}
    for image, (p, t) in enumerate(zip(predictions, targets, strict=True)):
        mine = [d for d in zip(p["scores"].tolist(), p["boxes"].tolist(), p["labels"].tolist(), strict=True)]
        todo += [(s, image, box) for s, box, _ in sorted((d for d in mine if d[2] == label), reverse=True)[:100]]
        columns = (t[name].tolist() for name in ("boxes", "labels", "crowd", "area"))
        for number, (box, c, crowd, area) in enumerate(zip(*columns, strict=True)):
            if c == label:
                ignored = crowd or not sizes[0] <= area <= sizes[1]
                wanted[image, number] = (box, crowd, ignored)
    positives = sum(not ignored for _, _, ignored in wanted.values())
    if not positives:
        return math.nan
    taken, outcomes = set(), []
    for _, image, box in sorted(todo, reverse=True):
        candidates = []
        for key, (other, crowd, ignored) in wanted.items():
            enough = key[0] == image and (crowd or key not in taken) and overlap(box, other, crowd) >= least
            if enough:  # objects that count go before those that are ignored
                candidates.append((not ignored, overlap(box, other, crowd), key))
        if candidates:
            counts, _, key = max(candidates)
            taken.add(key)
            if counts:
                outcomes.append(True)
        elif sizes[0] <= (box[2] - box[0]) * (box[3] - box[1]) <= sizes[1]:
            outcomes.append(False)
    hits = np.cumsum(outcomes)
    points = [(hit / positives, hit / n) for n, hit in enumerate(hits, start=1)]
    return np.mean([max((p for r, p in points if r >= recall), default=0) for recall in RECALLS])


def noisy(seed):
    """Images of three classes and all sizes, some crowds; detections three times per object, and many false ones."""
    rng = np.random.default_rng(seed)
    targets, predictions = [], []
    for _ in range(12):
        n = rng.integers(0, 7)
        corner, side = rng.uniform(0, 300, (n, 2)), np.exp(rng.uniform(np.log(12), np.log(400), (n, 2)))
        boxes = np.hstack([corner, corner + side])
        labels, crowd = rng.integers(1, 4, n), rng.random(n) < 0.2
        targets.append(objects(*boxes, labels=labels, crowd=crowd, area=side.prod(1) * rng.uniform(0.4, 1, n)))
        shown = np.repeat(boxes, 3, axis=0) + rng.normal(0, 0.1, (3 * n, 4)) * np.tile(np.repeat(side, 3, axis=0), 2)
        far = rng.uniform(0, 300, (140, 2))
        false = np.hstack([far, far + rng.uniform(10, 120, (140, 2))])
        found = np.vstack([shown, false])
        classes = np.concatenate([np.repeat(labels, 3), np.where(rng.random(140) < 0.8, 1, 2)])  # over 100 of class 1
        predictions.append(detections(*found, scores=rng.random(len(found)), labels=classes))
    return predictions, targets


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_naive_implementation(seed):
    predictions, targets = noisy(seed)
    assert max((p["labels"] == 1).sum() for p in predictions) > 100
    assert sum(t["crowd"].sum() for t in targets) > 1
    found = coco_average_precision(predictions, targets)

    def mean(*thresholds, sizes=(0, 1e10)):
        return np.nanmean([naive(predictions, targets, c, t, sizes) for c in (1, 2, 3) for t in thresholds])

    every = np.linspace(0.5, 0.95, 10)
    assert all(0.01 < value < 0.99 for value in vars(found).values())
    assert found.ap < found.ap50
    assert found.ap50 == pytest.approx(mean(0.5), abs=1e-6)
    assert found.ap75 == pytest.approx(mean(0.75), abs=1e-6)
    assert found.ap == pytest.approx(mean(*every), abs=1e-6)
    assert found.small == pytest.approx(mean(*every, sizes=(0, 32**2)), abs=1e-6)
    assert found.medium == pytest.approx(mean(*every, sizes=(32**2, 96**2)), abs=1e-6)
    assert found.large == pytest.approx(mean(*every, sizes=(96**2, 1e10)), abs=1e-6)
