"""A small detection data set made from what scikit-learn and scikit-image carry, in VOC's layout.

The images are `digits`'; nothing is downloaded, and the same reader reads it as real VOC.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from data.digits import CLASSES as CLASSES
from data.digits import Box, Scene, generate, in_processes


@dataclass(frozen=True)
class DigitsVOC:
    """What to generate; equal parameters give equal files."""

    train: int = 2400
    test: int = 1000
    size: int = 300  # pixels, images are square
    objects: tuple[int, int] = (1, 6)  # per image, both inclusive
    digit: tuple[float, float] = (16, 160)  # longer side of a digit in pixels, log-uniform
    difficult_below: float = 20  # pixels
    seed: int = 0
    version: int = 1  # of the drawing code; count up when it changes

    def generate(self, root: Path) -> Path:
        """Write the data set under `root` unless it is there with these parameters; returns `root`.

        The files appear all at once, so an interrupted run leaves nothing half-made.
        """
        return generate(root, "digits-voc.json", asdict(self), self._write)

    def _write(self, root: Path) -> None:
        base = root / "VOCdevkit" / "VOC2007"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (base / folder).mkdir(parents=True)
        names = in_processes(partial(_write_image, self, base), self.train + self.test)
        for image_set, chosen in (("trainval", names[: self.train]), ("test", names[self.train :])):
            listed = "".join(f"{name}\n" for name in chosen)
            (base / "ImageSets" / "Main" / f"{image_set}.txt").write_text(listed)


def _write_image(spec: DigitsVOC, base: Path, number: int) -> str:
    """Draw image `number` and its annotation; the seed of an image depends on its number only."""
    rng = np.random.default_rng([spec.seed, number])
    pixels, objects = draw(spec, "train" if number < spec.train else "test", rng)
    name = f"{number:06d}"
    Image.fromarray(pixels).save(base / "JPEGImages" / f"{name}.jpg", quality=92)
    annotation = ElementTree.Element("annotation")
    ElementTree.SubElement(annotation, "filename").text = f"{name}.jpg"
    size = ElementTree.SubElement(annotation, "size")
    for tag, value in zip(("height", "width", "depth"), pixels.shape, strict=True):
        ElementTree.SubElement(size, tag).text = str(value)
    for label, (x1, y1, x2, y2), difficult in objects:
        item = ElementTree.SubElement(annotation, "object")
        ElementTree.SubElement(item, "name").text = CLASSES[label]
        ElementTree.SubElement(item, "difficult").text = str(int(difficult))
        box = ElementTree.SubElement(item, "bndbox")
        # VOC counts from 1 and includes the maxima.
        for tag, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            ElementTree.SubElement(box, tag).text = str(value)
    ElementTree.indent(annotation)
    ElementTree.ElementTree(annotation).write(base / "Annotations" / f"{name}.xml")
    return name


def draw(spec: DigitsVOC, split: str, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, Box, bool]]]:
    """One image (size, size, 3) uint8 and its objects, [(class index, (x1, y1, x2, y2), difficult)].

    Boxes are 0-based and exclude their maxima; they are tight around what is visible of a digit.
    """
    scene = Scene(spec.size, split, spec.seed, rng)
    objects = [
        (label, (x1, y1, x2, y2), max(y2 - y1, x2 - x1) < spec.difficult_below)
        for label, (x1, y1, x2, y2) in scene.scatter(spec.objects, spec.digit)
    ]
    return scene.pixels(), objects
