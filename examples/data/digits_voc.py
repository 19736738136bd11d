"""A small detection data set made from what scikit-learn and scikit-image carry, in VOC's layout.

Handwritten digits of many sizes lie on photographs; most of each image is background, as in the
images a detector usually sees. Nothing is downloaded, and the same reader reads it as real VOC.
"""

import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "hubble_deep_field", "moon", "rocket")


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

        The files appear all at once (a rename), so an interrupted run leaves nothing half-made.
        """
        marker = root / "digits-voc.json"
        parameters = json.loads(json.dumps(asdict(self)))
        if marker.exists() and json.loads(marker.read_text()) == parameters:
            return root
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=root.name))
        try:
            base = temporary / "VOCdevkit" / "VOC2007"
            for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
                (base / folder).mkdir(parents=True)
            numbers = list(range(self.train + self.test))
            with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                names = list(pool.map(partial(_write_image, self, base), numbers, chunksize=50))
            for image_set, chosen in (("trainval", names[: self.train]), ("test", names[self.train :])):
                listed = "".join(f"{name}\n" for name in chosen)
                (base / "ImageSets" / "Main" / f"{image_set}.txt").write_text(listed)
            (temporary / marker.name).write_text(json.dumps(parameters))
            if marker.exists():  # stale; a folder without our marker is not ours to remove
                shutil.rmtree(root)
            temporary.rename(root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return root


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


def draw(spec: DigitsVOC, split: str, rng: np.random.Generator):
    """One image (size, size, 3) uint8 and its objects, [(class index, (x1, y1, x2, y2), difficult)].

    Boxes are 0-based and exclude their maxima; they are tight around what is visible of a digit.
    """
    canvas = _background(spec, split, rng)
    digits, labels = _digits(split, spec.seed)
    taken = np.zeros((spec.size, spec.size), bool)
    objects: list[tuple[int, tuple[int, int, int, int], bool]] = []
    wanted = rng.integers(spec.objects[0], spec.objects[1] + 1)
    for _ in range(10 * wanted):  # a digit whose place is taken gives way to another
        if len(objects) == wanted:
            break
        i = rng.integers(len(labels))
        side = np.exp(rng.uniform(*np.log(spec.digit)))
        alpha = _render(digits[i], side, rng.uniform(-15, 15))
        h, w = alpha.shape
        x, y = rng.integers(0, spec.size - w + 1), rng.integers(0, spec.size - h + 1)
        place = np.s_[y : y + h, x : x + w]
        if taken[place].mean() > 0.03:
            continue
        taken[place] = True
        colour = _contrasting(canvas[place].mean(), rng)
        canvas[place] += alpha[..., None] * rng.uniform(0.85, 1) * (colour - canvas[place])
        box = (int(x), int(y), int(x + w), int(y + h))
        objects.append((int(labels[i]), box, max(h, w) < spec.difficult_below))
    return canvas.clip(0, 255).astype(np.uint8), objects


def _render(digit: np.ndarray, side: float, degrees: float) -> np.ndarray:
    """An 8x8 digit as smooth opacity (h, w) in 0..1, about `side` pixels long, cropped to the ink."""
    scale = side / 8
    extent = int(np.ceil(11 * scale)) + 2  # room for the rotation
    c, s = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    centre = extent / 2
    framed = Image.fromarray(np.pad(digit, 4))
    matrix = (c, s, 8 - (c + s) * centre, -s, c, 8 - (c - s) * centre)
    ink = framed.transform((extent, extent), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    alpha = np.clip((np.asarray(ink) / 255 - 0.2) / 0.35, 0, 1)
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _contrasting(brightness: float, rng: np.random.Generator) -> np.ndarray:
    """A random colour (3,), light on dark ground and dark on light ground."""
    hue = rng.dirichlet((1, 1, 1))
    tint = hue / hue.max()  # its largest channel is 1
    return 90 * tint * rng.random() if brightness > 115 else 255 - 80 * (1 - tint)


def _background(spec: DigitsVOC, split: str, rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, (size, size, 3) float32; train and test see different halves."""
    photos = _photos()
    photo = photos[rng.integers(len(photos))]
    half = photo.shape[1] // 2
    photo = photo[:, :half] if split == "train" else photo[:, half:]
    side = int(rng.uniform(0.5, 1) * min(photo.shape[:2]))
    x, y = rng.integers(0, photo.shape[1] - side + 1), rng.integers(0, photo.shape[0] - side + 1)
    crop = Image.fromarray(photo[y : y + side, x : x + side])
    resized = crop.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32) * rng.uniform(0.7, 1.1)


@lru_cache
def _photos() -> list[np.ndarray]:
    """Colour photographs (H, W, 3) uint8 that lie inside the installed packages."""
    photos = [getattr(skimage.data, name)() for name in PHOTOS]
    photos += [skimage.data.stereo_motorcycle()[0], *load_sample_images().images]
    return [photo if photo.ndim == 3 else np.stack([photo] * 3, axis=-1) for photo in photos]


@lru_cache
def _digits(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits (n, 8, 8) uint8 and their labels; two thirds are the training split's."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    cut = len(order) * 2 // 3
    chosen = order[:cut] if split == "train" else order[cut:]
    return (data.images[chosen] * (255 / 16)).astype(np.uint8), data.target[chosen]
