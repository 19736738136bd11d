"""Dense and selective Pelee on Pascal VOC, or on embedded digits.

  python examples/pelee_voc.py                              demonstration on embedded data
  python examples/pelee_voc.py --data ROOT --from-scratch   the paper's experiment on Pascal VOC

For what it does see ssd_voc.py.
"""

from dataclasses import replace
from functools import partial

from data.sets import voc_or_digits
from detectors.pelee import pelee304
from detectors.peleenet import load_trunk
from recipe import CHECKPOINTS, DEMO_SCRATCH, DEMO_TRAINING, Preset, Recipe, paper_preset, run
from training import Schedule

# Normalised throughout, it takes a higher rate than SSD: 250 iterations at width 1 give 12.7 mAP by 0.05, 5.2 by 0.02.
DEMO = Preset(
    width=0.5,
    scratch=replace(DEMO_SCRATCH, iterations=4000, lr=0.05),
    training=replace(DEMO_TRAINING, finetune=replace(DEMO_TRAINING.finetune, iterations=300)),
    eval_images=200,
    checkpoint=None,
)

RECIPE = Recipe(
    about=__doc__,
    name="pelee_voc",
    detector=lambda classes, width: pelee304(classes, width=width),
    trunk=lambda model, path: load_trunk(model.backbone.trunk, path),
    least_images=2,
    load=partial(voc_or_digits, size=304),
    at="backbone.trunk.pool1",  # after the first stage, 38²
    demo=replace(DEMO, checkpoint=CHECKPOINTS / "pelee304_digits.safetensors"),
    # Pelee's own schedule.
    paper=paper_preset(Schedule(iterations=120_000, batch_size=32, lr=0.005, warmup=0.0216, milestones=(2 / 3, 5 / 6))),
)

if __name__ == "__main__":
    run(RECIPE)
