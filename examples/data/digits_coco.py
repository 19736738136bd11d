"""The embedded digits in COCO's layout: small objects, crowds, sparse category ids, images without objects.

ROOT/{train2017,val2017}/*.jpg   ROOT/annotations/instances_{train,val}2017.json
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from data.digits import CLASSES, Scene, generate, in_processes

CATEGORY_IDS = (1, 2, 5, 13, 27, 44, 62, 70, 81, 90)  # of CLASSES; with gaps, as COCO's 80 between 1 and 90


@dataclass(frozen=True)
class DigitsCOCO:
    """What to generate; equal parameters give equal files."""

    train: int = 2400
    val: int = 1000
    size: int = 300  # pixels, images are square
    objects: tuple[int, int] = (0, 7)  # per image, both inclusive
    digit: tuple[float, float] = (12, 200)  # longer side of a digit in pixels, log-uniform
    crowds: float = 0.15  # share of the images that get one, where it finds room
    crowd_objects: tuple[int, int] = (12, 25)
    crowd_digit: tuple[float, float] = (10, 18)
    crowd_side: int = 80  # pixels, of the square that a crowd is in
    seed: int = 0
    version: int = 1  # of the drawing code; count up when it changes

    def generate(self, root: Path) -> Path:
        """Write the data set under `root` unless it is there with these parameters; returns `root`.

        The files appear all at once, so an interrupted run leaves nothing half-made.
        """
        return generate(root, "digits-coco.json", asdict(self), self._write)

    def _write(self, root: Path) -> None:
        for folder in ("train2017", "val2017", "annotations"):
            (root / folder).mkdir()
        drawn = in_processes(partial(_write_image, self, root), self.train + self.val)
        categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
        for split, chosen in (("train2017", drawn[: self.train]), ("val2017", drawn[self.train :])):
            ids = count(1)
            content = {
                "images": [image for image, _ in chosen],
                "annotations": [{"id": next(ids), **item} for _, objects in chosen for item in objects],
                "categories": categories,
            }
            (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_image(spec: DigitsCOCO, root: Path, number: int) -> tuple[dict, list[dict]]:
    """Draw image `number`; its entry and its annotations. Its seed depends on its number only."""
    split = "train" if number < spec.train else "test"
    pixels, annotations = draw(spec, split, np.random.default_rng([spec.seed, number]))
    image_id = number + 1
    name = f"{image_id:012d}.jpg"
    Image.fromarray(pixels).save(root / ("train2017" if split == "train" else "val2017") / name, quality=92)
    height, width = pixels.shape[:2]
    image = {"id": image_id, "file_name": name, "height": height, "width": width}
    return image, [{"image_id": image_id, **item} for item in annotations]


def draw(spec: DigitsCOCO, split: str, rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
    """One image (size, size, 3) uint8 and its annotations, without their ids and the image's.

    The segmentation of a digit is its box, that of a crowd the ink of all its digits; `area` is the
    segmentation's.
    """
    scene = Scene(spec.size, split, spec.seed, rng)
    annotations = []
    for label, (x1, y1, x2, y2) in scene.scatter(spec.objects, spec.digit):
        outline = [x1, y1, x2, y1, x2, y2, x1, y2]
        box = (x1, y1, x2 - x1, y2 - y1)
        annotations.append(_annotation(label, box, (x2 - x1) * (y2 - y1), [outline], crowd=False))
    crowd = scene.crowd(spec.crowd_objects, spec.crowd_digit, spec.crowd_side) if rng.random() < spec.crowds else None
    if crowd:
        label, ink = crowd
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        x, y = int(columns[0]), int(rows[0])
        box = (x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y)
        annotations.append(_annotation(label, box, int(ink.sum()), run_lengths(ink), crowd=True))
    return scene.pixels(), annotations


def _annotation(label: int, box: tuple[int, int, int, int], area: int, segmentation, *, crowd: bool) -> dict:
    return {
        "category_id": CATEGORY_IDS[label],
        "bbox": list(box),
        "area": area,
        "iscrowd": int(crowd),
        "segmentation": segmentation,
    }


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length encoding of a mask (H, W) bool: down the columns, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *([0] if flat[0] else []), *changes.tolist(), flat.size]
    return {"size": list(mask.shape), "counts": [end - start for start, end in pairwise(bounds)]}
