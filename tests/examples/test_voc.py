"""The VOC reader: right on a good folder, and an error that names the file on a bad one."""

import pytest
from PIL import Image

from data.voc import VOCBoxes, VOCError, voc_test, voc_train

SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"


def item(name="cat", box=(11, 21, 40, 60), difficult=0):
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def write(root, annotations, year="2007", image_set="trainval"):
    base = root / "VOCdevkit" / f"VOC{year}"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "ImageSets" / "Main" / f"{image_set}.txt").write_text("".join(f"{name}\n" for name in annotations))
    for name, content in annotations.items():
        Image.new("RGB", (100, 80)).save(base / "JPEGImages" / f"{name}.jpg")
        whole = f"<annotation>{content and SIZE + content}</annotation>"
        (base / "Annotations" / f"{name}.xml").write_text(whole)
    return base


def read(root, **kwargs):
    return VOCBoxes(root, "2007", "trainval", **kwargs)


def test_boxes_and_labels(tmp_path):
    write(tmp_path, {"a": item() + item("person", (1, 1, 100, 80), difficult=1)})
    image, target = read(tmp_path)[0]
    assert image.shape == (3, 80, 100)
    assert target["boxes"].tolist() == [[10, 20, 40, 60], [0, 0, 100, 80]]
    assert target["labels"].tolist() == [8, 15]
    assert target["difficult"].tolist() == [False, True]


def test_nested_parts_are_not_objects(tmp_path):
    part = item("head").replace("object>", "part>")
    write(tmp_path, {"a": item("person").replace("</object>", part + "</object>")})
    assert read(tmp_path)[0][1]["labels"].tolist() == [15]


def test_training_drops_difficult_objects_and_images_of_only_such(tmp_path):
    write(tmp_path, {"a": item() + item(difficult=1), "b": item(difficult=1)})
    dataset = read(tmp_path, drop_difficult=True)
    assert len(dataset) == 1
    assert len(dataset[0][1]["labels"]) == 1


def test_the_paper_trains_on_both_years(tmp_path):
    for year in ("2007", "2012"):
        write(tmp_path, {f"a{year}": item()}, year)
    write(tmp_path, {"t": item()}, image_set="test")
    assert len(voc_train(tmp_path)) == 2
    assert len(voc_test(tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no VOC annotation"),
        ("<filename>a.jpg</filename>", "no object"),
        (item("unicorn"), "'unicorn'; known are aeroplane"),
        (item(box=(50, 1, 40, 10)), "degenerate"),
        (item(box=(1, 1, "nan", 10)), "degenerate"),
        (item(box=(1, 1, "inf", 10)), "degenerate"),
        (item(box=("x", 1, 40, 10)), "Object 1 .*'x'"),
        (item().replace("xmin", "left"), "'xmin'"),
        (item() + "<object>", "no VOC annotation"),
    ],
)
def test_bad_annotation(tmp_path, content, said):
    write(tmp_path, {"a": item(), "broken": content})
    with pytest.raises(VOCError, match=said) as error:
        read(tmp_path)
    assert "broken.xml" in str(error.value)


def test_annotation_of_text(tmp_path):
    base = write(tmp_path, {"a": item()})
    (base / "Annotations" / "a.xml").write_text("<annotation>text</annotation>")
    with pytest.raises(VOCError, match=r"a\.xml is no VOC annotation"):
        read(tmp_path)


def test_annotation_without_size(tmp_path):
    base = write(tmp_path, {"a": item()})
    (base / "Annotations" / "a.xml").write_text(f"<annotation>{item()}</annotation>")
    with pytest.raises(VOCError, match=r"a\.xml lacks the size of its image"):
        read(tmp_path)


def test_boxes_are_cut_at_the_border_and_left_out_beyond_it(tmp_path):
    over, beyond = item(box=(91, 71, 140, 90)), item("dog", (101, 1, 120, 20), difficult=1)
    write(tmp_path, {"a": over + beyond, "b": beyond, "c": item(box=(0.6, 1, 100.4, 80))})
    with pytest.warns(UserWarning, match=r"cut 1 boxes .* left out 2 ") as warned:
        dataset = read(tmp_path)
    assert len(warned) == 1
    assert [target["labels"].tolist() for _, target in dataset] == [[8], [], [8]]
    assert dataset[0][1]["boxes"].tolist() == [[90, 70, 100, 80]]
    assert dataset[0][1]["difficult"].tolist() == [False]
    assert dataset[1][1]["boxes"].shape == (0, 4)
    assert dataset[2][1]["boxes"].tolist() == [[0, 0, 100, 80]]
    with pytest.warns(UserWarning, match="left out 2 "):
        assert len(read(tmp_path, drop_difficult=True)) == 2


def test_a_box_of_one_pixel_has_area(tmp_path):
    write(tmp_path, {"a": item(box=(100, 80, 100, 80))})
    assert read(tmp_path)[0][1]["boxes"].tolist() == [[99, 79, 100, 80]]


def test_a_split_without_any_object_to_learn(tmp_path):
    write(tmp_path, {"a": item(difficult=1)})
    assert len(read(tmp_path)) == 1
    with pytest.raises(VOCError, match=r"VOC2007 trainval .* no object that is not difficult"):
        read(tmp_path, drop_difficult=True)


@pytest.mark.parametrize("kind", ["JPEGImages/a.jpg", "Annotations/a.xml", "ImageSets/Main/trainval.txt"])
def test_missing_file_or_a_folder_in_its_place(tmp_path, kind):
    base = write(tmp_path, {"a": item()})
    (base / kind).unlink()
    with pytest.raises(VOCError, match=kind.split("/")[-1]):
        read(tmp_path)
    (base / kind).mkdir()
    with pytest.raises(VOCError, match=kind.split("/")[-1]):
        read(tmp_path)


def test_list_that_is_no_text(tmp_path):
    base = write(tmp_path, {"a": item()})
    (base / "ImageSets" / "Main" / "trainval.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(VOCError, match=r"No VOC2007 trainval under .*can't decode"):
        read(tmp_path)


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(VOCError, match="Expected ROOT/VOCdevkit"):
        read(tmp_path)
    write(tmp_path, {})
    with pytest.raises(VOCError, match="empty"):
        read(tmp_path)


def test_truncated_image(tmp_path):
    base = write(tmp_path, {"a": item()})
    (base / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(VOCError, match="Cannot decode"):
        read(tmp_path)[0]
