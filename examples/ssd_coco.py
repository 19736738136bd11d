"""Dense and selective SSD300 on COCO, or on embedded digits in its format.

  python examples/ssd_coco.py                              demonstration on embedded data
  python examples/ssd_coco.py --data ROOT --from-scratch   the paper's experiment on COCO

For what it does see ssd_voc.py.
"""

from dataclasses import replace

import ssd_voc
from data.sets import coco_or_digits
from detectors.ssd import load_imagenet_trunk, ssd300_vgg16_bn
from recipe import CHECKPOINTS, Recipe, paper_preset, run
from training import Schedule

RECIPE = Recipe(
    about=__doc__,
    name="ssd_coco",
    detector=lambda classes, width, **variant: ssd300_vgg16_bn(classes, width=width, anchors="coco", **variant),
    variants=("six", "batch_norm"),
    imagenet=lambda model: load_imagenet_trunk(model.backbone),
    load=coco_or_digits,
    at="pool3",
    demo=replace(ssd_voc.RECIPE.demo, checkpoint=CHECKPOINTS / "ssd300_digits_coco.safetensors"),
    # The original's steps, with the paper's rate and warm-up (five epochs).
    paper=paper_preset(Schedule(iterations=400_000, batch_size=32, lr=0.01, warmup=0.046, milestones=(0.7, 0.9))),
)

if __name__ == "__main__":
    run(RECIPE)
