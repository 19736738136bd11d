"""The other three recipes; `test_ssd_voc` has what all share."""

import json

import pytest
import torch

import pelee_coco
import pelee_voc
import recipe
import ssd_coco
import ssd_voc
from data import digits_coco
from storage import load_checkpoint

RECIPES = [module.RECIPE for module in (ssd_voc, ssd_coco, pelee_voc, pelee_coco)]


def test_recipe_on_coco(tmp_path, monkeypatch, capsys):
    """From scratch to the table, by way of crowds; COCO's AP stands beside VOC's."""
    monkeypatch.chdir(tmp_path)
    small = digits_coco.DigitsCOCO(train=4, val=4).generate(tmp_path / "small")
    monkeypatch.setattr(digits_coco.DigitsCOCO, "generate", lambda self, root: small)
    command = (
        "pelee_coco.py --from-scratch --scratch-iterations 1 --selector-iterations 1 --iterations 1 --batch-size 2 "
        "--accumulate 1 --ema 0.9 --eval-images 4 --timed-images 1 --timed-batches 1 --repeats 1 --workers 0 "
        "--threads 1 --out out --device cpu"
    )
    monkeypatch.setattr("sys.argv", command.split())
    recipe.run(pelee_coco.RECIPE)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["coco"]) == {"dense", "selective"}
    assert set(result["coco"]["dense"]) == {"ap", "ap50", "ap75", "small", "medium", "large"}
    assert result["ema"] == 0.9
    assert "| AP50 " in capsys.readouterr().out
    assert (tmp_path / "out" / "log").is_dir()


@pytest.mark.parametrize("made", RECIPES, ids=lambda made: made.name)
def test_presets(made, monkeypatch):
    """Steps of the original detectors; the stage exists; ImageNet is for those that have a trunk of it."""
    monkeypatch.setattr("sys.argv", [f"{made.name}.py", "--data", "x", "--from-scratch"])
    args = recipe.parse_arguments(made)
    assert (args.width, args.eval_images) == (1, 0)
    assert args.imagenet == made.name.startswith("ssd")
    steps = [round(share * args.scratch.iterations, -3) for share in args.scratch.milestones]
    assert (*steps, args.scratch.iterations, args.scratch.batch_size) == {
        "ssd_voc": (80_000, 100_000, 120_000, 32),
        "ssd_coco": (280_000, 360_000, 400_000, 32),
        "pelee_voc": (80_000, 100_000, 120_000, 32),
        "pelee_coco": (70_000, 90_000, 100_000, 128),
    }[made.name]
    assert made.least_images == (2 if made.name.startswith("pelee") else 1)
    torch.manual_seed(0)
    model = made.detector(11, made.demo.width)
    if made.demo.checkpoint:  # that comes along
        load_checkpoint(model, made.demo.checkpoint)
    [found] = model.eval()([torch.rand(3, *model.transform.fixed_size)])
    assert {"boxes", "labels", "scores"} <= set(found)
