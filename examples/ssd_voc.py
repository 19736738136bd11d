"""Dense and selective SSD300 side by side: fine-tuned from one dense checkpoint, then compared.

  python examples/ssd_voc.py                              demonstration on embedded data, minutes
  python examples/ssd_voc.py --data ROOT --from-scratch   the paper's experiment on Pascal VOC

The selective detector gets a Selective Module after --at, which predicts where objects are; what
follows is computed there only. Both detectors see the same images in the same order, so what
differs afterwards is the selection. All output goes under --out; repeating the command of an
interrupted run resumes it.
"""

from data.sets import voc_or_digits
from detectors.ssd import load_imagenet_trunk, ssd300_vgg16_bn
from recipe import CHECKPOINTS, DEMO_SCRATCH, DEMO_TRAINING, Preset, Recipe, paper_preset, run
from training import Schedule

RECIPE = Recipe(
    about=__doc__,
    name="ssd_voc",
    detector=lambda classes, width, **variant: ssd300_vgg16_bn(classes, width=width, **variant),
    variants=("six", "batch_norm"),
    imagenet=lambda model: load_imagenet_trunk(model.backbone),
    load=voc_or_digits,
    at="pool2",
    demo=Preset(
        width=0.25,
        scratch=DEMO_SCRATCH,
        training=DEMO_TRAINING,
        eval_images=200,
        checkpoint=CHECKPOINTS / "ssd300_digits.safetensors",
    ),
    # The original's steps with the paper's rate, batch and five epochs of warm-up.
    paper=paper_preset(Schedule(iterations=120_000, batch_size=32, lr=0.01, warmup=0.0216, milestones=(2 / 3, 5 / 6))),
)

if __name__ == "__main__":
    run(RECIPE)
