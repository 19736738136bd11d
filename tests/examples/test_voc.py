"""The VOC reader: right on a good folder, and an error that names the file on a bad one."""

import pytest
from PIL import Image

from data.voc import VOCBoxes, VOCError, voc_test, voc_train


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
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{content}</annotation>")
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


@pytest.mark.parametrize("kind", ["JPEGImages/a.jpg", "Annotations/a.xml", "ImageSets/Main/trainval.txt"])
def test_missing_file(tmp_path, kind):
    base = write(tmp_path, {"a": item()})
    (base / kind).unlink()
    with pytest.raises(VOCError, match=kind.split("/")[-1]):
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
