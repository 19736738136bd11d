"""Pascal VOC detection, as tensors and with errors that name the file.

torchvision's `VOCDetection` finds the files and parses the XML; this module checks them and turns
the nested dicts of strings into boxes and labels.
"""

import math
from pathlib import Path
from xml.etree.ElementTree import ParseError, parse

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.io import ImageReadMode, decode_image

from data.border import Border

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LAYOUT = (
    "Expected ROOT/VOCdevkit/VOC2007/{JPEGImages,Annotations,ImageSets/Main} (and VOC2012 for training), "
    "as in the archives from http://host.robots.ox.ac.uk/pascal/VOC/; "
    "torchvision.datasets.VOCDetection(ROOT, year, image_set, download=True) fetches them."
)


class VOCError(ValueError):
    """A VOC folder that cannot be used; the message names the file and the way out."""


class VOCBoxes(Dataset):
    """One split of VOC; item: image (3, H, W) uint8 and a target of tensors.

    The target has `boxes` (n, 4) xyxy in pixels, `labels` (n,) from 1 on in the order of
    `classes`, `difficult` (n,) bool. Every annotation is read at construction, so a damaged one
    stops the run before the training, not in the middle. Boxes are cut at the image's border, and
    left out where nothing remains; a warning counts both (see `Border`).

    Args:
        root: the folder that contains VOCdevkit.
        year: "2007" or "2012".
        image_set: the list in ImageSets/Main, such as "trainval" or "test".
        classes: class names; any other name in an annotation is an error.
        drop_difficult: leave out objects marked difficult (and the flags), and images without any
            other object, as training does.
        transforms: called with (image, target).

    Raises:
        VOCError: missing folder or file, malformed XML, no object or size, unknown class, degenerate box, or no object
            that is not difficult in any image.
    """

    def __init__(self, root, year: str, image_set: str, classes=CLASSES, *, drop_difficult=False, transforms=None):
        try:
            files = VOCDetection(root, year=year, image_set=image_set)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise VOCError(f"No VOC{year} {image_set} under {str(root)!r}: {error}. {LAYOUT}") from error
        if not files.images:
            raise VOCError(f"The list of VOC{year} {image_set} under {str(root)!r} is empty. {LAYOUT}")
        self.classes = tuple(classes)
        self.transforms = transforms
        self.images: list[str] = []
        self.targets: list[dict[str, Tensor]] = []
        border = Border()
        for image, annotation in zip(files.images, files.annotations, strict=True):
            if not Path(image).is_file():
                raise VOCError(f"Missing image {image}, named in the list {image_set} of VOC{year}. {LAYOUT}")
            target = read_annotation(annotation, self.classes, border)
            if drop_difficult:
                keep = ~target.pop("difficult")
                target = {name: value[keep] for name, value in target.items()}
            if len(target["labels"]) or not drop_difficult:
                self.images.append(image)
                self.targets.append(target)
        if not any(len(target["labels"]) for target in self.targets):
            kind = "object that is not difficult" if drop_difficult else "object inside its image"
            raise VOCError(f"VOC{year} {image_set} under {str(root)!r} has no {kind}. {LAYOUT}")
        border.warn(f"VOC{year} {image_set} under {str(root)!r}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            image = tv_tensors.Image(decode_image(self.images[index], ImageReadMode.RGB))
        except RuntimeError as error:
            raise VOCError(f"Cannot decode {self.images[index]}: {error}. Extract it again.") from error
        target = dict(self.targets[index])
        size = image.shape[-2:]
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        return self.transforms(image, target) if self.transforms else (image, target)


def read_annotation(path: str, classes: tuple[str, ...], border: Border) -> dict[str, Tensor]:
    """Boxes, labels and difficult flags of one annotation file; see `VOCBoxes`. `border` counts.

    VOC counts pixels from 1 and its maxima are inclusive, so pixel columns xmin..xmax span
    [xmin - 1, xmax] in continuous coordinates. IoU there equals the devkit's with its "+1".
    """
    try:
        annotation = VOCDetection.parse_voc_xml(parse(path).getroot())["annotation"]
        objects = annotation["object"]
    except FileNotFoundError as error:
        raise VOCError(f"Missing annotation {path}. {LAYOUT}") from error
    except (OSError, ParseError, KeyError, TypeError) as error:
        raise VOCError(f"{path} is no VOC annotation ({error}). Extract it again, or leave it out.") from error
    if not objects:
        raise VOCError(f"{path} has no object. Leave the image out of its list in ImageSets/Main.")
    try:
        width, height = (float(annotation["size"][side]) for side in ("width", "height"))
    except (KeyError, TypeError, ValueError) as error:
        raise VOCError(f"{path} lacks the size of its image ({error}). Correct it.") from error
    boxes, labels, difficult = [], [], []
    for number, item in enumerate(objects, start=1):
        try:
            x1, y1, x2, y2 = (float(item["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax"))
            name = item["name"]
        except (KeyError, TypeError, ValueError) as error:
            raise VOCError(f"Object {number} of {path} lacks a name or a box ({error}). Correct it.") from error
        if name not in classes:
            raise VOCError(f"Object {number} of {path} is of class {name!r}; known are {', '.join(classes)}.")
        if x2 < x1 or y2 < y1 or not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise VOCError(f"Object {number} of {path} has a degenerate box {(x1, y1, x2, y2)}. Correct it.")
        inside = border.clip((x1 - 1, y1 - 1, x2, y2), width, height)
        if inside is None:
            continue
        boxes.append(inside)
        labels.append(1 + classes.index(name))
        difficult.append(item.get("difficult") == "1")
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult, dtype=torch.bool),
    }


def voc_train(root, transforms=None) -> ConcatDataset:
    """2007 trainval and 2012 trainval, the paper's training set."""
    return ConcatDataset(
        [VOCBoxes(root, y, "trainval", drop_difficult=True, transforms=transforms) for y in ("2007", "2012")]
    )


def voc_test(root, transforms=None) -> VOCBoxes:
    """2007 test with its difficult objects, which the evaluation needs."""
    return VOCBoxes(root, "2007", "test", transforms=transforms)
