"""The recipe from end to end, as small as it gets, and the parts that only it uses."""

import dataclasses
import json
import math
import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

import finetune
import recipe
import sparsenet
import ssd_voc
from data import digits_voc
from data.voc import VOCError
from detectors.ssd import ssd300_vgg16_bn
from evaluation.detector import Evaluation
from evaluation.speed import compare_speed, in_turns
from evaluation.voc_map import Matches
from report import Comparison, markdown, thinned
from storage import save_checkpoint
from training import Schedule, batches


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
        ("--macs 0.5", "goes with --supervision gumbel"),
        ("--seeds 1 2 1", "--seeds: one occurs twice"),
        ("--accumulate 3", "a batch of 16 images cannot be divided among 1 processes in 3 parts each"),
        ("--iterations 0", "--iterations: 0 is no finite number at least 1"),
        ("--device quantum", "'quantum' is neither cpu nor cuda"),
    ],
)
def test_contradictory_arguments(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["ssd_voc.py", *arguments.split()])
    with pytest.raises(SystemExit):
        recipe.parse_arguments(ssd_voc.RECIPE)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--batch-size 3", "a batch of 3 images cannot be divided among 2 processes"),
        ("--device cuda:0", "each process needs a GPU of its own"),
    ],
)
def test_arguments_of_several_processes(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["ssd_voc.py", *arguments.split()])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        recipe.parse_arguments(ssd_voc.RECIPE)
    assert said in capsys.readouterr().err


def test_what_can_be_seen_to_fail_does_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "pretrain", lambda *given: pytest.fail("trained"))
    (tmp_path / "file").touch()
    small = digits_voc.DigitsVOC(train=2, test=2).generate(tmp_path / "small")
    monkeypatch.setattr(digits_voc.DigitsVOC, "generate", lambda self, root: small)
    for arguments, said in (
        (f"--out {tmp_path}/file", r"CheckpointError: No file can be made in .*another --out"),
        (f"--out {tmp_path} --at pool9", r"--at pool9, --width 0.25: .*pool9.*Choose another stage"),
        (f"--out {tmp_path} --supervision gumbel --macs 0.01", r"--macs 0.01: .*out of reach.*Choose another stage"),
        (f"--out {tmp_path} --width 0.125", r"--width 0.125: no Selective Module .* fits"),
    ):
        monkeypatch.setattr("sys.argv", ["ssd_voc.py", "--from-scratch", *arguments.split()])
        with pytest.raises(SystemExit, match=said):
            recipe.run(ssd_voc.RECIPE)


class Broken(torch.utils.data.Dataset):
    """One image, that cannot be read."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
def test_messages_say_what_is_wrong_and_no_more(workers):
    schedule = Schedule(iterations=1, batch_size=1, lr=1)
    for error, said in (
        (VOCError("Cannot decode a.jpg. Extract it again."), "VOCError: Cannot decode a.jpg. Extract it again."),
        (OSError("no room"), "OSError: no room. Mend that and repeat the command; what was saved is still there."),
    ):
        with pytest.raises(SystemExit) as ended, recipe.messages():
            list(batches(Broken(error), schedule, seed=0, workers=workers))
        assert ended.value.code == said


def test_log_that_cannot_be_written(monkeypatch, capsys):
    """TensorBoard's thread prints no traceback beside the message."""

    def full():
        raise OSError("no room")

    with pytest.raises(SystemExit, match="OSError: no room"), recipe.messages():
        writing = threading.Thread(target=full)
        writing.start()
        writing.join()
        full()
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_resumed_run_must_share(tmp_path, monkeypatch):
    """The phases that a changed option or another start concerns, and no others."""
    found = {}
    monkeypatch.setattr(
        finetune, "fit", lambda *args, title, about, **options: found.setdefault(title, []).append(about)
    )
    base = ssd300_vgg16_bn(3, width=0.25)
    training = ssd_voc.RECIPE.demo.training
    for changed in ({}, {"workers": 5}, {"missed_pixel": 3.0}):
        how = dataclasses.replace(training, **changed)
        finetune.finetune_dense(base, [None], how, 0, tmp_path)
        finetune.finetune_selective(base, [None], "pool3", how, 0, tmp_path)
    torch.nn.init.zeros_(base.backbone.trunk[0].conv1_1.weight)
    finetune.finetune_dense(base, [None], training, 0, tmp_path)
    assert set(found) == {"dense, seed 0", "selector, seed 0", "selective, seed 0"}
    for title, (first, other_workers, other_weight, *other_start) in found.items():
        assert first == other_workers and first["training images"] == 1
        assert (first == other_weight) == title.startswith("dense")
        assert first not in other_start


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
    models = {"dense": dense, "selective": selective}
    times = in_turns(models, images, batch=2, repeats=2)
    assert given == [dense, selective]
    for measured in (times, compare_speed(models, images, batch=2, repeats=2)):
        assert {name: len(values) for name, values in measured.items()} == {"dense": 2, "selective": 2}
        assert all(0 < value < 10_000 for values in measured.values() for value in values)
    assert given == [dense, selective]  # the last ones were in a process of their own


class Elsewhere(nn.Module):
    """Tells a file which process calls it, and on how many threads, and fails where there is none."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def forward(self, images):
        self.file.write_text(f"{os.getpid()} {torch.get_num_threads()} {[tuple(image.shape) for image in images]}")


def test_speed_is_measured_in_a_process_of_its_own(tmp_path):
    image = torch.rand(3, 8, 9)
    compare_speed({"one": Elsewhere(tmp_path / "told")}, [image] * 2, batch=2, repeats=1)
    process, threads, images = (tmp_path / "told").read_text().split(" ", 2)
    assert int(process) != os.getpid() and int(threads) == torch.get_num_threads()
    assert images == "[(3, 8, 9), (3, 8, 9)]"
    with pytest.raises(FileNotFoundError):
        compare_speed({"one": Elsewhere(tmp_path / "missing" / "told")}, [image], batch=1, repeats=1)


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
