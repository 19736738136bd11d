"""The embedded data set: VOC's layout, the same on every machine, its splits apart."""

import filecmp
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from data.augment import digits_augmentation, ssd_augmentation
from data.digits import CLASSES, _background, _digits
from data.digits_voc import DigitsVOC, draw
from data.voc import VOCBoxes

SMALL = DigitsVOC(train=6, test=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return SMALL.generate(tmp_path_factory.mktemp("data") / "digits")


def test_layout_is_read_as_voc(root):
    train, test = VOCBoxes(root, "2007", "trainval", CLASSES), VOCBoxes(root, "2007", "test", CLASSES)
    assert (len(train), len(test)) == (6, 3)
    assert not set(train.images) & set(test.images)
    for image, target in (*train, *test):
        assert image.shape == (3, 300, 300)
        assert 1 <= len(target["labels"]) <= 6
        boxes = target["boxes"]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 300).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        assert ((longer < SMALL.difficult_below) == target["difficult"]).all()


def test_boxes_in_the_files_are_the_drawn_ones(root):
    _, objects = draw(SMALL, "train", np.random.default_rng([SMALL.seed, 0]))
    _, target = VOCBoxes(root, "2007", "trainval", CLASSES)[0]
    assert target["boxes"].tolist() == [list(map(float, box)) for _, box, _ in objects]
    assert target["labels"].tolist() == [label + 1 for label, _, _ in objects]


def test_same_parameters_same_files(root, tmp_path):
    again = SMALL.generate(tmp_path / "digits")
    files = [os.path.relpath(os.path.join(d, f), root) for d, _, names in os.walk(root) for f in names]
    assert len(files) == 2 * 9 + 3
    assert filecmp.cmpfiles(root, again, files, shallow=False)[0] == files


def test_kept_while_current_and_renewed_when_stale(tmp_path):
    path = tmp_path / "digits"
    DigitsVOC(train=1, test=1).generate(path)
    before = (path / "digits-voc.json").stat().st_mtime_ns
    DigitsVOC(train=1, test=1).generate(path)
    assert (path / "digits-voc.json").stat().st_mtime_ns == before
    DigitsVOC(train=2, test=1).generate(path)
    assert len(VOCBoxes(path, "2007", "trainval", CLASSES)) == 2
    assert os.listdir(tmp_path) == ["digits"]  # nothing temporary is left


@pytest.mark.parametrize("before", [None, DigitsVOC(train=2, test=1)], ids=["missing", "stale"])
def test_of_two_that_generate_at_once_the_first_gives_the_folder(tmp_path, monkeypatch, before):
    """The second is done when the first is reading already, and removes nothing."""
    path, spec = tmp_path / "digits", DigitsVOC(train=1, test=1)
    if before:
        before.generate(path)
    inode = []

    def overtaken(self, root, write=DigitsVOC._write):
        write(self, root)
        if not inode:
            inode.append(0)
            spec.generate(path)
            inode[0] = path.stat().st_ino

    monkeypatch.setattr(DigitsVOC, "_write", overtaken)
    assert spec.generate(path) == path
    assert path.stat().st_ino == inode[0]
    assert len(VOCBoxes(path, "2007", "trainval", CLASSES)) == 1
    assert os.listdir(tmp_path) == ["digits"]


def test_processes_that_generate_at_once(tmp_path):
    """All begin before any is done, and each reads a whole folder."""
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        barrier = tmp_path / "barrier"
        barrier.mkdir()
        found = list(pool.map(_generate_and_read, [tmp_path / "digits"] * 3, [barrier] * 3, range(3)))
    assert found == [[2, 1]] * 3
    assert sorted(os.listdir(tmp_path)) == ["barrier", "digits"]


def _generate_and_read(path, barrier, number):
    spec, write = DigitsVOC(train=2, test=1), DigitsVOC._write

    def together(self, root):
        (barrier / str(number)).touch()
        while len(os.listdir(barrier)) < 3:
            time.sleep(0.01)
        write(self, root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsVOC, "_write", together)
        patch.setattr("data.digits_voc.in_processes", lambda draw, count: [draw(number) for number in range(count)])
        spec.generate(path)
    sets = [VOCBoxes(path, "2007", name, CLASSES) for name in ("trainval", "test")]
    return [len([image for image, _ in split]) for split in sets]


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("precious")
    with pytest.raises(OSError):
        DigitsVOC(train=1, test=1).generate(tmp_path / "digits")
    assert (tmp_path / "digits" / "mine.txt").exists()


def test_splits_share_no_digit():
    train, test = (_digits(split, 0) for split in ("train", "test"))
    assert len(train[1]) + len(test[1]) == 1797
    assert set(train[1]) == set(test[1]) == set(range(10))
    # The halves are cut from one permutation, so digits are apart; equal pictures would be a coincidence.
    pictures = [{picture.tobytes() for picture in pictures} for pictures, _ in (train, test)]
    assert not pictures[0] & pictures[1]


def test_splits_see_different_halves_of_the_photographs(monkeypatch):
    left_dark = np.zeros((100, 100, 3), np.uint8)
    left_dark[:, 50:] = 200
    monkeypatch.setattr("data.digits._photos", lambda: [left_dark])
    rng = np.random.default_rng(0)
    assert _background(SMALL.size, "train", rng).max() == 0
    assert _background(SMALL.size, "test", rng).min() > 100


def test_most_of_an_image_is_background():
    covered = []
    for i in range(60):
        seen = np.zeros((300, 300), bool)
        for _, (x1, y1, x2, y2), _ in draw(DigitsVOC(), "train", np.random.default_rng(i))[1]:
            seen[y1:y2, x1:x2] = True
        covered.append(seen.mean())
    assert 0.09 < np.mean(covered) < 0.18


@pytest.mark.parametrize("augmentation", [digits_augmentation, ssd_augmentation])
def test_augmentation_keeps_boxes_valid(root, augmentation):
    torch.manual_seed(0)
    dataset = VOCBoxes(root, "2007", "trainval", CLASSES, drop_difficult=True, transforms=augmentation())
    for _ in range(2):
        for image, target in dataset:
            assert image.shape == (3, 300, 300) and image.dtype == torch.float32
            assert image.min() >= 0 and image.max() <= 1
            boxes = target["boxes"]
            assert type(boxes) is torch.Tensor and boxes.shape == (len(target["labels"]), 4)
            assert (boxes >= 0).all() and (boxes <= 300).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 2).all()
