"""COCO detection, as tensors and with errors that name the file.

The annotations are one JSON per split, and are read with the standard library: only boxes are
needed of them, and each is checked.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image

from data.border import Border

LAYOUT = (
    "Expected ROOT/{train2017,val2017}/*.jpg and ROOT/annotations/instances_{train,val}2017.json, as in "
    "train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download."
)


class COCOError(ValueError):
    """A COCO folder that cannot be used; the message names the file and the way out."""


class COCOBoxes(Dataset):
    """One split of COCO; item: image (3, H, W) uint8 and a target of tensors.

    The target has `boxes` (n, 4) xyxy in pixels, `labels` (n,) from 1 on without gaps, in the order
    of the categories' ids, `crowd` (n,) bool and `area` (n,) float as annotated, in square pixels;
    n may be 0. `classes` has the names in the same order. Every annotation is read at construction,
    so a damaged one stops the run before the training, not in the middle.

    Boxes are cut at the image's border. One of which nothing is left, for want of area or because
    it lies outside, is left out, for no detector could find it. A warning counts both, but for
    boxes that stand out by less than a pixel, which is rounding.

    Args:
        root: the folder that contains `split` and `annotations`.
        split: "train2017" or "val2017".
        drop_crowd: leave out crowds (and `crowd` and `area`), and images without any other object,
            as training does.
        transforms: called with (image, target).

    Raises:
        COCOError: missing folder, file or image; JSON that is damaged or no instances; an annotation
            of an unknown image or category, or without a finite box and area; no object at all.
    """

    def __init__(self, root, split: str, *, drop_crowd=False, transforms=None):
        path = Path(root) / "annotations" / f"instances_{split}.json"
        folder = Path(root) / split
        content = _load(path)
        categories = _by_id(path, content, "categories", {"name": str})
        images = _by_id(path, content, "images", {"file_name": str, "height": float, "width": float})
        _check_files(folder, [image["file_name"] for image in images.values()], path)

        self.classes = tuple(categories[i]["name"] for i in sorted(categories))
        self.transforms = transforms
        self.images: list[str] = []
        self.targets: list[dict[str, Tensor]] = []
        self.sizes: list[tuple[int, int]] = []  # (H, W)
        labels = {i: label for label, i in enumerate(sorted(categories), start=1)}
        objects: dict[int, list[tuple]] = {i: [] for i in images}  # of (box, label, crowd, area)
        border = Border()
        for item in content["annotations"]:
            image, label, box, crowd, area = _annotation(path, item, images, labels)
            if inside := border.clip(box, image["width"], image["height"]):
                objects[image["id"]].append((inside, label, crowd, area))
        for i, image in images.items():
            target = _target([item for item in objects[i] if not (drop_crowd and item[2])])
            if drop_crowd:
                del target["crowd"], target["area"]
                if not len(target["labels"]):
                    continue
            self.images.append(str(folder / image["file_name"]))
            self.targets.append(target)
            self.sizes.append((image["height"], image["width"]))
        if not any(len(target["labels"]) for target in self.targets):
            kind = "object that is no crowd" if drop_crowd else "object"
            raise COCOError(f"{path} has no {kind} in any image: nothing to train on or to find. {LAYOUT}")
        border.warn(str(path))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        path, size = self.images[index], self.sizes[index]
        try:
            image = tv_tensors.Image(decode_image(path, ImageReadMode.RGB))
        except RuntimeError as error:
            raise COCOError(f"Cannot decode {path}: {error}. Extract it again.") from error
        if tuple(image.shape[-2:]) != size:
            raise COCOError(f"{path} is of size {tuple(image.shape[-2:])}, annotated as {size}. Extract it again.")
        target = dict(self.targets[index])
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        return self.transforms(image, target) if self.transforms else (image, target)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise COCOError(f"Cannot read annotations {path}: {error}. {LAYOUT}") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise COCOError(f"{path} is damaged or incomplete ({error}). Download and extract it again.") from error
    for name in ("images", "annotations", "categories"):
        if not (isinstance(content, dict) and isinstance(content.get(name), list)):
            raise COCOError(f"{path} has no list {name!r}: it is no COCO instances file. {LAYOUT}")
    return content


def _by_id(path: Path, content: dict, kind: str, needed: dict[str, type]) -> dict[int, dict]:
    """The entries of list `kind` by their ids, in the file's order; `needed` are their other fields and types."""
    found: dict[int, dict] = {}
    for number, entry in enumerate(content[kind], start=1):
        fields = entry if isinstance(entry, dict) else {}
        lacking = [
            name
            for name, wanted in {"id": int, **needed}.items()
            if not isinstance(fields.get(name), (int, float) if wanted is float else wanted)
        ]
        if lacking:
            raise COCOError(f"Entry {number} of {kind!r} in {path} has no proper {', '.join(lacking)}. Correct it.")
        if entry["id"] in found:
            raise COCOError(f"Id {entry['id']} occurs twice among {kind!r} in {path}. Correct it.")
        found[entry["id"]] = entry
    return found


def _check_files(folder: Path, names: list[str], path: Path) -> None:
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise COCOError(f"No images for {path}: {error}. {LAYOUT}") from error
    missing = [name for name in names if name not in present]
    if missing:
        raise COCOError(
            f"Missing image {folder / missing[0]}, and {len(missing) - 1} more of the {len(names)} that {path} names. "
            f"Download and extract the images again. {LAYOUT}"
        )


def _annotation(path: Path, item: Any, images: dict, labels: dict) -> tuple[dict, int, tuple, bool, float]:
    """Image, label, box xyxy, crowd and area of one entry."""
    name = f"Annotation {item.get('id')!r} in {path}" if isinstance(item, dict) else f"An annotation in {path}"
    try:
        x, y, w, h = (float(value) for value in item["bbox"])
        area, crowd = float(item["area"]), bool(item["iscrowd"])
        image, category = item["image_id"], item["category_id"]
        hash((image, category))  # which of a list there is none
    except (KeyError, TypeError, ValueError) as error:
        raise COCOError(f"{name} lacks one of image, category, box, area and iscrowd ({error}). Correct it.") from error
    if image not in images:
        raise COCOError(f"{name} is of image {image!r}, which is not in the list 'images'. Correct it.")
    if category not in labels:
        known = ", ".join(map(str, labels))
        raise COCOError(f"{name} is of category {category!r}; known are {known}. Correct it.")
    if not all(map(math.isfinite, (x, y, w, h, area))):
        raise COCOError(f"{name} has a box {[x, y, w, h]} of area {area}, which are not all finite. Correct it.")
    return images[image], labels[category], (x, y, x + w, y + h), crowd, area


def _target(objects: list[tuple]) -> dict[str, Tensor]:
    boxes, labels, crowd, area = zip(*objects, strict=True) if objects else ((), (), (), ())
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "crowd": torch.tensor(crowd, dtype=torch.bool),
        "area": torch.tensor(area, dtype=torch.float32),
    }


def coco_train(root, transforms=None) -> COCOBoxes:
    """train2017 without crowds, the paper's training set."""
    return COCOBoxes(root, "train2017", drop_crowd=True, transforms=transforms)


def coco_val(root, transforms=None) -> COCOBoxes:
    """val2017 with its crowds and areas, which the evaluation needs."""
    return COCOBoxes(root, "val2017", transforms=transforms)
