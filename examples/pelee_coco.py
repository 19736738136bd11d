"""Dense and selective Pelee on COCO, or on embedded digits in its format.

  python examples/pelee_coco.py                              demonstration on embedded data
  python examples/pelee_coco.py --data ROOT --from-scratch   the paper's experiment on COCO

For what it does see ssd_voc.py.
"""

from dataclasses import replace
from functools import partial

from data.sets import coco_or_digits
from detectors.pelee import pelee304
from detectors.peleenet import load_trunk
from pelee_voc import DEMO
from recipe import CHECKPOINTS, Recipe, paper_preset, run
from training import Schedule

RECIPE = Recipe(
    about=__doc__,
    name="pelee_coco",
    detector=lambda classes, width: pelee304(classes, width=width, anchors="coco"),
    trunk=lambda model, path: load_trunk(model.backbone.trunk, path),
    least_images=2,
    load=partial(coco_or_digits, size=304),
    at="backbone.trunk.pool1",  # after the first stage, 38²
    demo=replace(DEMO, checkpoint=CHECKPOINTS / "pelee304_digits_coco.safetensors"),
    # Pelee's own schedule.
    paper=paper_preset(Schedule(iterations=100_000, batch_size=128, lr=0.01, warmup=0.046, milestones=(0.7, 0.9))),
)

if __name__ == "__main__":
    run(RECIPE)
