"""The recipe from end to end, as small as it gets, and the parts that only it uses."""

import json
import math

import numpy as np
import pytest
import torch

import recipe
import sparsenet
import ssd_voc
from data import digits_voc
from detectors.ssd import ssd300_vgg16_bn
from evaluation.detector import Evaluation
from evaluation.speed import compare_speed
from evaluation.voc_map import Matches
from report import Comparison, markdown, thinned
from storage import save_checkpoint


def test_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = digits_voc.DigitsVOC(train=2, test=2).generate(tmp_path / "small")
    monkeypatch.setattr(digits_voc.DigitsVOC, "generate", lambda self, root: small)
    save_checkpoint(ssd300_vgg16_bn(11, width=0.25), tmp_path / "dense.safetensors")
    command = (
        "ssd_voc.py --checkpoint dense.safetensors --selector-iterations 1 --iterations 1 --batch-size 2 "
        "--eval-images 2 --timed-images 2 --timed-batches 1 2 --repeats 1 --workers 0 --threads 1 "
        "--out out --device cpu"
    )
    monkeypatch.setattr("sys.argv", command.split())
    recipe.run(ssd_voc.RECIPE)

    written = {path.name for path in (tmp_path / "out").iterdir()}
    checkpoints = {"dense_seed0.safetensors", "selective_seed0.safetensors"}
    assert written == checkpoints | {"log", "result.json", "result.md", "selection.png"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["command"] == f"python examples/{command}"
    assert result["test_images"] == 2
    assert result["gmacs"]["dense"] == pytest.approx(2.10, abs=0.01)
    assert 1.002 < result["paper_like_g"]["dense"] / result["gmacs"]["dense"] < 1.02
    assert set(result["speed"]) == {"batch 1", "batch 2"}
    assert all(math.isfinite(speed["speedup"]) for speed in result["speed"].values())
    assert (tmp_path / "out" / "result.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--data x", "use --checkpoint or --from-scratch"),
        ("--data x --from-scratch --width 0.5", "add --no-imagenet"),
        ("--dense-only", "goes with"),
    ],
)
def test_contradictory_arguments(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["ssd_voc.py", *arguments.split()])
    with pytest.raises(SystemExit):
        recipe.parse_arguments(ssd_voc.RECIPE)
    assert said in capsys.readouterr().err


def test_presets(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ssd_voc.py", "--data", "x", "--from-scratch", "--iterations", "12"])
    args = recipe.parse_arguments(ssd_voc.RECIPE)
    assert (args.width, args.training.finetune.batch_size, args.training.finetune.lr, args.eval_images) == (
        1,
        32,
        0.01,
        0,
    )
    assert (args.training.finetune.iterations, args.scratch.iterations) == (12, 120_000)
    assert [args.training.finetune.factor(step) for step in (7, 8, 10)] == pytest.approx([1, 0.1, 0.01])


def test_speed_is_of_frozen_detectors_that_take_turns(monkeypatch):
    """In milliseconds per image, a value for each pass."""
    torch.manual_seed(0)
    images = [torch.rand(3, 300, 300) for _ in range(3)]
    dense = ssd300_vgg16_bn(3, width=0.25).eval()
    selective = sparsenet.selectify(dense, at="pool2", example_inputs=images[:1])
    given, frozen = [], sparsenet.freeze
    monkeypatch.setattr(sparsenet, "freeze", lambda model, inputs: given.append(model) or frozen(model, inputs))
    times = compare_speed({"dense": dense, "selective": selective}, images, batch=2, repeats=2)
    assert given == [dense, selective]
    assert {name: len(values) for name, values in times.items()} == {"dense": 2, "selective": 2}
    assert all(0 < value < 10_000 for values in times.values() for value in values)


def test_comparison_of_two_seeds():
    """Of 20 images with an object each, the dense detector finds all, the selective one half or all."""
    images, ones = np.arange(20), np.ones(20, int)

    def found(share):
        correct = images < 20 * share
        return Matches(images, ones, correct, ones[:, None])

    dense = [Evaluation(found(1))] * 2
    selective = [Evaluation(found(share), 4e9, 10e9, 0.25) for share in (0.5, 1)]
    times = {"dense": [10.0, 11.0, 12.0], "selective": [5.0, 5.0, 6.0]}
    figures = Comparison([3, 4], dense, selective, {1: times}, paper_like=11 * 10**9).figures()
    assert figures["map_11_point"] == {"dense": 100, "selective": pytest.approx(100 * (6 / 11 + 1) / 2, abs=1e-3)}
    assert figures["difference"] == pytest.approx(-22.727, abs=1e-3)
    low, high = figures["difference_95"]
    assert low < figures["difference"] < high <= 0
    assert (figures["macs_cut"], figures["active"], figures["speed"]["batch 1"]["speedup"]) == (60, 25, 2)
    lines = markdown(figures).splitlines()
    assert lines[2].startswith("| dense     | 100.0 ")
    assert "| 10.000          | 11.000                | 100 %  |" in lines[2]
    assert "4.000 (−60.0 %) |                       | 25.0 % | 5.0" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_thinned():
    assert thinned([1.0, 3.0, 5.0, 7.0], points=2) == [2, 6]
    assert thinned([1.0], points=100) == [1]
