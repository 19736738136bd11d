"""The embedded digits in COCO's layout: small objects, crowds, sparse ids, the same on every machine."""

import filecmp
import json
import os

import numpy as np
import pytest
import torch

from data.augment import digits_augmentation
from data.coco import coco_train, coco_val
from data.digits import CLASSES
from data.digits_coco import CATEGORY_IDS, DigitsCOCO, draw, run_lengths

SMALL = DigitsCOCO(train=40, val=10, crowds=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return SMALL.generate(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def content(root):
    return json.loads((root / "annotations" / "instances_train2017.json").read_text())


def decode(segmentation):
    """The mask (H, W) bool of COCO's run lengths."""
    counts = segmentation["counts"]
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    return flat.reshape(segmentation["size"][::-1]).T.astype(bool)


def test_layout_is_read_as_coco(root):
    train, val = coco_train(root), coco_val(root)
    assert train.classes == val.classes == CLASSES
    assert len(val) == 10 and 20 < len(train) < 40  # some images have no object
    assert not set(map(os.path.basename, train.images)) & set(map(os.path.basename, val.images))
    for image, target in (*train, *val):
        assert image.shape == (3, 300, 300)
        boxes = target["boxes"]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 300).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert all(len(target["labels"]) for _, target in train)


def test_annotations_are_the_drawn_ones(root, content):
    for number, image in enumerate(content["images"][:8]):
        _, annotations = draw(SMALL, "train", np.random.default_rng([SMALL.seed, number]))
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in mine] == annotations
        assert (root / "train2017" / image["file_name"]).is_file()
    assert len(content["annotations"]) > len(content["images"]) == 40


def test_ids_are_unique_and_sparse(content):
    ids = [a["id"] for a in content["annotations"]]
    assert len(set(ids)) == len(ids)
    assert [c["id"] for c in content["categories"]] == list(CATEGORY_IDS)
    assert min(CATEGORY_IDS) == 1 and max(CATEGORY_IDS) == 90 and len(set(CATEGORY_IDS)) == 10
    assert {a["category_id"] for a in content["annotations"]} <= set(CATEGORY_IDS)


def test_all_sizes_occur_small_ones_most(content):
    area = np.array([a["area"] for a in content["annotations"] if not a["iscrowd"]])
    shares = np.histogram(area, [0, 32**2, 96**2, np.inf])[0] / len(area)
    assert (shares > 0.1).all()
    assert shares[0] > 0.35


def test_crowds(content):
    crowds = [a for a in content["annotations"] if a["iscrowd"]]
    assert 5 <= len(crowds) <= 30
    for crowd in crowds:
        ink = decode(crowd["segmentation"])
        assert ink.shape == (300, 300)
        assert ink.sum() == crowd["area"]
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        x, y, w, h = crowd["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (columns[0], rows[0], columns[-1], rows[-1])
        assert max(w, h) <= SMALL.crowd_side
        others = [a for a in content["annotations"] if a["image_id"] == crowd["image_id"] and not a["iscrowd"]]
        for a, b, c, d in (other["bbox"] for other in others):
            assert not ink[b : b + d, a : a + c].any()


def test_segmentation_of_a_digit_is_its_box(content):
    for a in content["annotations"]:
        if not a["iscrowd"]:
            x, y, w, h = a["bbox"]
            [outline] = a["segmentation"]
            points = np.array(outline).reshape(4, 2)
            assert [*points.min(0), *points.max(0)] == [x, y, x + w, y + h]
            assert a["area"] == w * h


@pytest.mark.parametrize("fill", [0, 1, 0.5])
def test_run_lengths(fill):
    mask = np.random.default_rng(0).random((7, 5)) < fill
    encoded = run_lengths(mask)
    assert encoded["size"] == [7, 5]
    assert sum(encoded["counts"]) == 35
    assert (decode(encoded) == mask).all()
    assert run_lengths(np.array([[False, True], [True, True]])) == {"size": [2, 2], "counts": [1, 3]}


def test_same_parameters_same_files(root, tmp_path):
    again = SMALL.generate(tmp_path / "digits")
    files = [os.path.relpath(os.path.join(d, f), root) for d, _, names in os.walk(root) for f in names]
    assert len(files) == 50 + 3
    assert filecmp.cmpfiles(root, again, files, shallow=False)[0] == files


def test_kept_while_current_renewed_when_stale_and_never_half_made(tmp_path, monkeypatch):
    path, one = tmp_path / "digits", DigitsCOCO(train=1, val=1, objects=(2, 3))
    one.generate(path)
    marker = path / "digits-coco.json"
    before = marker.stat().st_mtime_ns
    one.generate(path)
    assert marker.stat().st_mtime_ns == before

    def interrupted(draw, count):
        draw(0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("data.digits_coco.in_processes", interrupted)
        for place in (path, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                DigitsCOCO(train=2, val=1).generate(place)
    assert os.listdir(tmp_path) == ["digits"]
    assert len(coco_val(path)) == 1
    DigitsCOCO(train=2, val=1, objects=(2, 3)).generate(path)
    assert len(coco_train(path)) == 2
    assert os.listdir(tmp_path) == ["digits"]  # nothing temporary is left


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("precious")
    with pytest.raises(OSError):
        DigitsCOCO(train=1, val=1).generate(tmp_path / "digits")
    assert os.listdir(tmp_path / "digits") == ["mine.txt"]


def test_augmentation_keeps_boxes_valid(root):
    torch.manual_seed(0)
    for image, target in coco_train(root, digits_augmentation()):
        assert image.shape == (3, 300, 300) and image.dtype == torch.float32
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert (target["boxes"] >= 0).all() and (target["boxes"] <= 300).all()
