"""VOC average precision against hand-computed cases and a second implementation in another style."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from evaluation import voc_map
from evaluation.voc_map import average_precision, match, mean_average_precision, paired_bootstrap


def objects(*boxes, labels=None, difficult=None):
    n = len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels if labels is not None else [1] * n, dtype=torch.int64),
        "difficult": torch.tensor(difficult if difficult is not None else [False] * n, dtype=torch.bool),
    }


def detections(*boxes, scores, labels=None):
    found = objects(*boxes, labels=labels)
    return {
        "boxes": found["boxes"],
        "labels": found["labels"],
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


A, B, C = [0, 0, 10, 10], [100, 100, 120, 120], [200, 0, 230, 10]
ELSEWHERE = [400, 400, 410, 410]


def scores_of(predictions, targets, classes=1):
    return [x.tolist() for x in average_precision(match(predictions, targets, classes))]


def test_hit_miss_hit():
    """Precision 1 up to recall 1/2, then 2/3: eleven points read 6 x 1 and 5 x 2/3."""
    predictions = [detections(A, ELSEWHERE, B, scores=[0.9, 0.8, 0.7])]
    eleven, area = scores_of(predictions, [objects(A, B)])
    assert eleven == [pytest.approx((6 + 5 * 2 / 3) / 11)]
    assert area == [pytest.approx(0.5 + 0.5 * 2 / 3)]


def test_recall_that_stops_short():
    eleven, area = scores_of([detections(A, scores=[0.9])], [objects(A, B, C)])
    assert eleven == [pytest.approx(4 / 11)]  # recall 0, 0.1, 0.2, 0.3
    assert area == [pytest.approx(1 / 3)]


def test_recall_exactly_on_a_point():
    """3 of 10: the point at recall 0.3 counts, whatever floating point makes of it."""
    boxes = [[50 * i, 0, 50 * i + 40, 40] for i in range(10)]
    eleven, _ = scores_of([detections(*boxes[:3], scores=[0.9, 0.8, 0.7])], [objects(*boxes)])
    assert eleven == [pytest.approx(4 / 11)]


def test_second_detection_of_an_object_is_false():
    _, area = scores_of([detections(A, A, B, scores=[0.9, 0.8, 0.7])], [objects(A, B)])
    assert area == [pytest.approx(0.5 + 0.5 * 2 / 3)]


def test_a_taken_object_does_not_pass_a_detection_on_to_the_next_best():
    near_a = [2, 0, 12, 10]  # overlaps A by 2/3, and the object beside it by just over one half
    beside = [5, 0, 15, 10]
    _, area = scores_of([detections(A, near_a, scores=[0.9, 0.8])], [objects(A, beside)])
    assert area == [pytest.approx(0.5)]


def test_difficult_objects_count_neither_way():
    target = objects(A, B, difficult=[True, False])
    _, area = scores_of([detections(A, A, B, scores=[0.9, 0.8, 0.7])], [target])
    assert area == [pytest.approx(1)]


def test_detection_of_an_image_is_not_matched_in_another():
    _, area = scores_of([detections(A, scores=[0.9]), detections(scores=[])], [objects(B), objects(A)])
    assert area == [0]


def test_classes_are_apart_and_those_without_objects_are_left_out():
    matches = match([detections(A, A, scores=[0.9, 0.8], labels=[2, 1])], [objects(A)], num_classes=3)
    eleven, _ = average_precision(matches)
    np.testing.assert_allclose(eleven, [1, np.nan, np.nan])
    assert mean_average_precision(matches) == (1, 1)


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def naive(predictions, targets, label):
    """AP by thresholds: for each score, match all detections at or above it anew."""
    images = []  # per image: [(score, box)] best first, [(box, difficult)], of this class
    for p, t in zip(predictions, targets, strict=True):
        rows = zip(p["scores"].tolist(), p["boxes"].tolist(), p["labels"].tolist(), strict=True)
        wanted = zip(t["boxes"].tolist(), t["difficult"].tolist(), t["labels"].tolist(), strict=True)
        found = sorted(((s, b) for s, b, c in rows if c == label), reverse=True)
        images.append((found, [(b, d) for b, d, c in wanted if c == label]))
    positives = sum(not difficult for _, objects in images for _, difficult in objects)

    points = []  # (recall, precision)
    for threshold in [score for found, _ in images for score, _ in found]:
        right = wrong = 0
        for found, objects in images:
            taken = set()
            for score, box in found:
                if score < threshold:
                    break
                best, k = max(((iou(box, b), k) for k, (b, _) in enumerate(objects)), default=(0, -1))
                if best < 0.5:
                    wrong += 1
                elif not objects[k][1]:
                    right, wrong = right + (k not in taken), wrong + (k in taken)
                    taken.add(k)
        if right + wrong:
            points.append((right / positives, right / (right + wrong)))

    def best_from(recall):
        return max((p for r, p in points if r >= recall), default=0)

    recalls = sorted({0.0, *(r for r, _ in points)})
    area = sum((high - low) * best_from(high) for low, high in pairwise(recalls))
    return sum(best_from(k / 10) for k in range(11)) / 11, area


@pytest.fixture(scope="module")
def noisy():
    """Twelve images of two classes; detections twice per object, jittered a little and a lot."""
    rng = np.random.default_rng(0)
    targets, good, bad = [], [], []
    for _ in range(12):
        n = rng.integers(1, 6)
        corner, side = rng.uniform(0, 80, (n, 2)), rng.uniform(15, 40, (n, 2))
        boxes = np.hstack([corner, corner + side])
        targets.append(objects(*boxes, labels=rng.integers(1, 3, n), difficult=rng.random(n) < 0.25))
        for into, jitter in ((good, 2), (bad, 6)):
            shown = np.repeat(boxes, 2, axis=0) + rng.normal(0, jitter, (2 * n, 4))
            labels = np.repeat(targets[-1]["labels"].numpy(), 2)
            into.append(detections(*shown, scores=rng.random(2 * n), labels=labels))
    return targets, good, bad


def test_agrees_with_the_naive_implementation(noisy):
    targets, good, _ = noisy
    eleven, area = average_precision(match(good, targets, 2))
    for label in (1, 2):
        assert (eleven[label - 1], area[label - 1]) == pytest.approx(naive(good, targets, label))


def test_weights_equal_repeated_images(noisy):
    targets, good, _ = noisy
    counts = np.array([0, 2, 1, 3, 0, 1, 1, 1, 0, 2, 1, 0])
    repeated = [i for i, count in enumerate(counts) for _ in range(count)]
    again = match([good[i] for i in repeated], [targets[i] for i in repeated], 2)
    np.testing.assert_allclose(average_precision(match(good, targets, 2), counts), average_precision(again), rtol=1e-12)


def test_bootstrap(noisy):
    targets, good, bad = noisy
    better, worse = match(good, targets, 2), match(bad, targets, 2)
    assert paired_bootstrap([(better, better)], resamples=20) == (0, 0)
    low, high = paired_bootstrap([(worse, better)], resamples=200)
    difference = mean_average_precision(better)[0] - mean_average_precision(worse)[0]
    assert 0 < low < difference < high
    assert paired_bootstrap([(worse, better)] * 3, resamples=200) == pytest.approx((low, high))


def slow_eleven_point(matches, weights):
    """Class by class, at every detection in turn."""
    scores = []
    for label, positives in enumerate(weights @ matches.positives, start=1):
        if positives:
            mine = matches.label == label
            weight = weights[matches.image[mine]]
            true = np.cumsum(weight * matches.correct[mine])
            recall, precision = true / positives, true / np.maximum(np.cumsum(weight), 1)
            scores.append(np.mean([precision[recall >= k / 10].max(initial=0) for k in range(11)]))
    return np.mean(scores)


def test_bootstrap_gives_what_the_slow_one_does(noisy):
    targets, good, bad = noisy
    better, worse = match(good, targets, 2), match(bad, targets, 2)
    pairs = [(worse, better), (better, worse), (worse, better)]
    rng = np.random.default_rng(3)
    differences = []
    for _ in range(100):
        weights = rng.multinomial(12, np.full(12, 1 / 12))
        scores = [[slow_eleven_point(matches, weights) for matches in pair] for pair in pairs]
        differences.append(np.mean([second - first for first, second in scores]))
    found = paired_bootstrap(pairs, resamples=100, seed=3)
    assert found == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-12)


def test_bootstrap_resamples_each_detector_once(noisy, monkeypatch):
    targets, good, bad = noisy
    better, worse, other = match(good, targets, 2), match(bad, targets, 2), match(bad, targets, 2)
    first = paired_bootstrap([(worse, better)], resamples=20)
    monkeypatch.setattr(voc_map, "mean_average_precision", None)
    assert paired_bootstrap([(better, worse)], resamples=20) == pytest.approx((-first[1], -first[0]))
    with pytest.raises(TypeError):
        paired_bootstrap([(better, other)], resamples=20)
