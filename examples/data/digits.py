"""Handwritten digits on photographs, both from installed packages: what the embedded data sets draw with.

Digits of many sizes lie on parts of photographs; most of each image is background, as in the images
a detector usually sees. Nothing is downloaded. The layouts are `digits_voc`'s and `digits_coco`'s.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "hubble_deep_field", "moon", "rocket")

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 from 0 on, without the maxima


class Scene:
    """A part of a photograph that digits are drawn on; each step draws from `rng` in a fixed order.

    Train and test see different halves of the photographs, and different digits.
    """

    def __init__(self, size: int, split: str, seed: int, rng: np.random.Generator):
        self.rng = rng
        self.canvas = _background(size, split, rng)  # (size, size, 3) float32
        self.digits, self.labels = _digits(split, seed)
        self.taken = np.zeros((size, size), bool)  # where objects are

    def pixels(self) -> np.ndarray:
        """The image, (size, size, 3) uint8."""
        return self.canvas.clip(0, 255).astype(np.uint8)

    def scatter(self, count: tuple[int, int], digit: tuple[float, float]) -> list[tuple[int, Box]]:
        """Draw digits apart from one another; returns class index and box of each.

        A number from `count`, both inclusive, unless there is no room; the longer sides are
        log-uniform in `digit` pixels. Boxes are tight around what is visible.
        """
        objects: list[tuple[int, Box]] = []
        wanted = self.rng.integers(count[0], count[1] + 1)
        for _ in range(10 * wanted):  # a digit whose place is taken gives way to another
            if len(objects) == wanted:
                break
            i = self.rng.integers(len(self.labels))
            side = np.exp(self.rng.uniform(*np.log(digit)))
            alpha = _render(self.digits[i], side, self.rng.uniform(-15, 15))
            h, w = alpha.shape
            size = len(self.canvas)
            x, y = self.rng.integers(0, size - w + 1), self.rng.integers(0, size - h + 1)
            place = np.s_[y : y + h, x : x + w]
            if self.taken[place].mean() > 0.03:
                continue
            self.taken[place] = True
            self._paint(place, alpha)
            objects.append((int(self.labels[i]), (int(x), int(y), int(x + w), int(y + h))))
        return objects

    def crowd(self, count: tuple[int, int], digit: tuple[float, float], side: int) -> tuple[int, np.ndarray] | None:
        """Draw many digits of one class in a free square of `side` pixels, over one another too.

        Returns the class index and the mask (size, size) bool of their ink; None, and nothing is
        drawn, where ten squares are not free.
        """
        size = len(self.canvas)
        for _ in range(10):
            left, top = self.rng.integers(0, size - side + 1, 2)
            if not self.taken[top : top + side, left : left + side].any():
                break
        else:
            return None
        label = self.rng.integers(len(CLASSES))
        alike = np.flatnonzero(self.labels == label)
        ink = np.zeros((size, size), bool)
        for _ in range(self.rng.integers(count[0], count[1] + 1)):
            length = self.rng.uniform(*digit)
            alpha = _render(self.digits[self.rng.choice(alike)], length, self.rng.uniform(-15, 15))
            h, w = alpha.shape
            x, y = left + self.rng.integers(0, side - w + 1), top + self.rng.integers(0, side - h + 1)
            place = np.s_[y : y + h, x : x + w]
            ink[place] |= alpha > 0.5
            self._paint(place, alpha)
        self.taken |= ink
        return int(label), ink

    def _paint(self, place: tuple[slice, slice], alpha: np.ndarray) -> None:
        colour = _contrasting(self.canvas[place].mean(), self.rng)
        self.canvas[place] += alpha[..., None] * self.rng.uniform(0.85, 1) * (colour - self.canvas[place])


def generate(root: Path, marker: str, parameters: dict, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a new folder that becomes `root`, unless that is there with these parameters.

    The file `marker` in it holds the parameters. The files appear all at once (a rename), so an
    interrupted run leaves nothing half-made; a folder without our marker is not ours to remove. Of
    processes that generate the same at once, the first to be done gives the folder: the others may
    be reading it already when a later one is done.

    Raises:
        OSError: `root` is there, not empty and without `marker`.
    """
    parameters = json.loads(json.dumps(parameters))

    def current() -> bool:
        try:
            return json.loads((root / marker).read_text()) == parameters
        except FileNotFoundError:
            return False

    if current():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root.parent, prefix=root.name))
    try:
        made = temporary / "new"
        made.mkdir()
        write(made)
        (made / marker).write_text(json.dumps(parameters))
        if (root / marker).exists() and not current():  # of other parameters
            with suppress(FileNotFoundError):  # another process has moved it
                root.rename(temporary / "old")
        try:
            made.rename(root)
        except OSError:  # there is a folder
            if not current():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def in_processes(draw: Callable, count: int) -> list:
    """`draw(number)` for each of the numbers below `count`, in their order."""
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(draw, range(count), chunksize=50))


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


def _background(size: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, (size, size, 3) float32; train and test see different halves."""
    photos = _photos()
    photo = photos[rng.integers(len(photos))]
    half = photo.shape[1] // 2
    photo = photo[:, :half] if split == "train" else photo[:, half:]
    side = int(rng.uniform(0.5, 1) * min(photo.shape[:2]))
    x, y = rng.integers(0, photo.shape[1] - side + 1), rng.integers(0, photo.shape[0] - side + 1)
    crop = Image.fromarray(photo[y : y + side, x : x + side])
    resized = crop.resize((size, size), Image.Resampling.BICUBIC)
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
