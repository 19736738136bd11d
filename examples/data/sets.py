"""Training and test set of a recipe: the real data, or embedded ones of the same format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset, Subset

from data import coco, digits_coco, digits_voc, voc
from data.augment import digits_augmentation, evaluation_transform, ssd_augmentation


@dataclass(frozen=True)
class Data:
    """What a detector is trained on, the part of the test set that it is measured on, and the names of the classes."""

    train: Dataset
    test: Subset
    classes: Sequence[str]


def voc_or_digits(root: Path | None, eval_images: int, size: int = 300) -> Data:
    """Pascal VOC 2007+2012, or embedded digits where `root` is `None`.

    Args:
        eval_images: how many test images, the first; 0: all.
        size: side of the training images in pixels.
    """
    if root:
        classes: Sequence[str] = voc.CLASSES
        train: Dataset = voc.voc_train(root, ssd_augmentation(size))
        test: Dataset = voc.voc_test(root, evaluation_transform())
    else:
        classes = digits_voc.CLASSES
        digits = digits_voc.DigitsVOC().generate(Path("runs/data/digits-voc"))
        augment = digits_augmentation(size)
        train = voc.VOCBoxes(digits, "2007", "trainval", classes, drop_difficult=True, transforms=augment)
        test = voc.VOCBoxes(digits, "2007", "test", classes, transforms=evaluation_transform())
    return Data(train, first(test, eval_images), classes)


def coco_or_digits(root: Path | None, eval_images: int, size: int = 300) -> Data:
    """COCO 2017, or embedded digits in its format; arguments as in `voc_or_digits`."""
    embedded = root is None
    root = root or digits_coco.DigitsCOCO().generate(Path("runs/data/digits-coco"))
    train = coco.coco_train(root, digits_augmentation(size) if embedded else ssd_augmentation(size))
    test = coco.coco_val(root, evaluation_transform())
    if train.classes != test.classes:
        raise coco.COCOError(
            f"The categories of train2017 and val2017 under {str(root)!r} differ: {', '.join(train.classes)} and "
            f"{', '.join(test.classes)}. Give both files the same list 'categories'."
        )
    return Data(train, first(test, eval_images), test.classes)


def first(test: Dataset, count: int) -> Subset:
    """The first `count` of a data set, or all for 0."""
    length = len(test)  # type: ignore[arg-type]
    return Subset(test, range(min(count or length, length)))
