"""The COCO reader: right on a good folder, and an error that names the file on a bad one."""

import json
import re
import warnings

import pytest
import torch
from PIL import Image

from data.augment import evaluation_transform, ssd_augmentation
from data.coco import COCOBoxes, COCOError, coco_train, coco_val
from data.sets import coco_or_digits

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def item(category=13, box=(10, 20, 30, 40), image=7, crowd=0, area=500.5, **others):
    return {
        "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": crowd, "area": area, **others
    }  # fmt: skip


def write(root, annotations, images=(7,), split="val2017"):
    """Images of 100 x 80 pixels; annotations get ids from 1 on. Returns the JSON's path."""
    for folder in (split, "annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    entries = []
    for number in images:
        name = f"{number:012d}.jpg"
        Image.new("RGB", (100, 80)).save(root / split / name)
        entries.append({"id": number, "file_name": name, "width": 100, "height": 80})
    path = root / "annotations" / f"instances_{split}.json"
    listed = [{"id": number, **each} for number, each in enumerate(annotations, start=1)]
    path.write_text(json.dumps({"images": entries, "annotations": listed, "categories": CATEGORIES}))
    return path


def read(root, **kwargs):
    return COCOBoxes(root, "val2017", **kwargs)


def test_boxes_and_labels(tmp_path):
    write(tmp_path, [item(), item(90, (0, 0, 100, 80), crowd=1, area=7)])
    dataset = read(tmp_path)
    assert dataset.classes == ("person", "stop sign", "toothbrush")
    image, target = dataset[0]
    assert image.shape == (3, 80, 100) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[10, 20, 40, 60], [0, 0, 100, 80]]
    assert target["labels"].tolist() == [2, 3]
    assert target["crowd"].tolist() == [False, True]
    assert target["area"].tolist() == [500.5, 7]


def test_annotations_find_their_images(tmp_path):
    write(tmp_path, [item(1, image=9), item(90, image=7), item(13, image=9)], images=(9, 2, 7))
    dataset = read(tmp_path)
    assert [path[-6:-4] for path in dataset.images] == ["09", "02", "07"]
    assert [target["labels"].tolist() for _, target in dataset] == [[1, 2], [], [3]]


def test_images_without_objects_are_kept_for_evaluation_only(tmp_path):
    write(tmp_path, [item(), item(image=3, crowd=1)], images=(7, 3, 5))
    target = read(tmp_path)[2][1]
    assert {name: value.shape for name, value in target.items()} == {
        "boxes": (0, 4), "labels": (0,), "crowd": (0,), "area": (0,)
    }  # fmt: skip
    training = read(tmp_path, drop_crowd=True)
    assert len(training) == 1
    assert training[0][1].keys() == {"boxes", "labels"}


def test_training_drops_crowds_between_objects(tmp_path):
    write(tmp_path, [item(1), item(crowd=1, box=(0, 0, 5, 5)), item(90)])
    [(_, target)] = read(tmp_path, drop_crowd=True)
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"].shape == (2, 4)


def test_the_paper_trains_without_crowds_and_evaluates_with_them(tmp_path):
    for split in ("train2017", "val2017"):
        write(tmp_path, [item(), item(crowd=1)], split=split)
    assert len(coco_train(tmp_path, ssd_augmentation())[0][1]["labels"]) <= 1
    image, target = coco_val(tmp_path, evaluation_transform())[0]
    assert image.dtype == torch.float32
    assert target["crowd"].tolist() == [False, True]
    assert type(target["boxes"]) is torch.Tensor


def test_boxes_are_cut_at_the_border_and_left_out_beyond_it(tmp_path):
    boxes = [(90, 70, 30, 30), (-5, -0.4, 20, 10), (10, 10, 0, 5), (10, 10, 5, 0), (100, 0, 9, 9), (5, 5, -3, 9)]
    path = write(tmp_path, [item(box=box) for box in boxes])
    with pytest.warns(UserWarning, match=r"cut 2 boxes .* left out 4 ") as warned:
        dataset = read(tmp_path)
    assert len(warned) == 1
    assert str(path) in str(warned[0].message)
    assert warned[0].filename == __file__
    expected = torch.tensor([[90, 70, 100, 80], [0, 0, 15, 9.6]])
    torch.testing.assert_close(dataset.targets[0]["boxes"], expected)
    assert len(dataset.targets[0]["area"]) == 2


def test_rounding_at_the_border_is_no_warning(tmp_path):
    write(tmp_path, [item(box=(-0.01, 20, 100.02, 60.3))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path)[0][1]["boxes"].tolist() == [[0, 20, 100, 80]]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (item(category=12), "category 12; known are"),
        (item(category=None), "category None; known are"),
        (item(category=[13]), "lacks one of"),
        (item(image=[7]), "lacks one of"),
        (item(image=8), "image 8, which is not in the list"),
        (item(box=(1, 2, 3)), "lacks one of"),
        (item(box=("x", 1, 2, 3)), "'x'"),
        (item(box=(float("nan"), 1, 2, 3)), "finite"),
        (item(box=(1, 1, float("inf"), 3)), "finite"),
        (item(area=float("nan")), "finite"),
        (item(area=None), "lacks one of"),
        *(({k: v for k, v in item().items() if k != gone}, f"'{gone}'") for gone in item()),
    ],
)
def test_bad_annotation(tmp_path, broken, said):
    path = write(tmp_path, [item(), broken])
    with pytest.raises(COCOError, match=re.escape(said)) as error:
        read(tmp_path)
    assert f"Annotation 2 in {path}" in str(error.value)


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
@pytest.mark.parametrize("content", [None, {}, "text"])
def test_json_that_is_no_instances_file(tmp_path, kind, content):
    path = write(tmp_path, [item()])
    path.write_text(json.dumps(json.loads(path.read_text()) | {kind: content}))
    with pytest.raises(COCOError, match=f"no list '{kind}'") as error:
        read(tmp_path)
    assert str(path) in str(error.value)
    path.write_text("[]")
    with pytest.raises(COCOError, match="no list"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "entry", "said"),
    [
        ("images", {"id": 8}, "has no proper file_name, height, width"),
        ("images", {"file_name": "a", "height": 1, "width": 1}, "has no proper id"),
        ("images", {"id": [8], "file_name": 5, "height": None, "width": "1"}, "proper id, file_name, height, width"),
        ("images", 5, "has no proper id"),
        ("images", {"id": 7, "file_name": "a", "height": 1, "width": 1}, "Id 7 occurs twice"),
        ("categories", {"id": 8}, "has no proper name"),
        ("categories", {"id": None, "name": "unknown"}, "has no proper id"),
        ("categories", {"id": 13, "name": "again"}, "Id 13 occurs twice"),
        ("annotations", 5, "An annotation in"),
    ],
)
def test_bad_entry(tmp_path, kind, entry, said):
    path = write(tmp_path, [item()])
    content = json.loads(path.read_text())
    content[kind].append(entry)
    path.write_text(json.dumps(content))
    with pytest.raises(COCOError, match=said) as error:
        read(tmp_path)
    assert str(path) in str(error.value)


def test_splits_of_different_categories(tmp_path):
    for split in ("train2017", "val2017"):
        path = write(tmp_path, [item()], split=split)
    path.write_text(path.read_text().replace("toothbrush", "hair drier"))
    with pytest.raises(COCOError, match=r"differ: person, stop sign, toothbrush and person, stop sign, hair drier"):
        coco_or_digits(tmp_path, 0)


def test_missing_folders(tmp_path):
    with pytest.raises(COCOError, match=r"instances_val2017\.json.*Expected ROOT"):
        read(tmp_path)
    write(tmp_path, [item()])
    (tmp_path / "val2017").rename(tmp_path / "val2014")
    with pytest.raises(COCOError, match=r"val2017.*Expected ROOT"):
        read(tmp_path)


def test_missing_images(tmp_path):
    write(tmp_path, [item()], images=range(1, 9))
    for number in (3, 4, 5):
        (tmp_path / "val2017" / f"{number:012d}.jpg").unlink()
    with pytest.raises(COCOError, match=r"000000000003\.jpg, and 2 more of the 8 .*Download"):
        read(tmp_path)


@pytest.mark.parametrize("cut", [0, 30, -1])
def test_truncated_json(tmp_path, cut):
    path = write(tmp_path, [item()])
    path.write_text(path.read_text()[:cut])
    with pytest.raises(COCOError, match="damaged or incomplete") as error:
        read(tmp_path)
    assert str(path) in str(error.value)


def test_json_of_other_bytes(tmp_path):
    path = write(tmp_path, [item()])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(COCOError, match="damaged or incomplete"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_undecodable_image(tmp_path, content):
    write(tmp_path, [item()])
    (tmp_path / "val2017" / "000000000007.jpg").write_bytes(content)
    with pytest.raises(COCOError, match=r"Cannot decode .*000000000007\.jpg.*Extract it again"):
        read(tmp_path)[0]


def test_image_of_another_size(tmp_path):
    write(tmp_path, [item()])
    Image.new("RGB", (80, 100)).save(tmp_path / "val2017" / "000000000007.jpg")
    with pytest.raises(COCOError, match=r"000000000007\.jpg is of size \(100, 80\), annotated as \(80, 100\)"):
        read(tmp_path)[0]


def test_grey_images_are_read_in_colour(tmp_path):
    write(tmp_path, [item()])
    Image.new("L", (100, 80)).save(tmp_path / "val2017" / "000000000007.jpg")
    assert read(tmp_path)[0][0].shape == (3, 80, 100)


def test_no_object_at_all(tmp_path):
    path = write(tmp_path, [])
    with pytest.raises(COCOError, match="no object in any image") as error:
        read(tmp_path)
    assert str(path) in str(error.value)
    write(tmp_path, [item(crowd=1)])
    assert len(read(tmp_path)) == 1
    with pytest.raises(COCOError, match="no object that is no crowd"):
        read(tmp_path, drop_crowd=True)
