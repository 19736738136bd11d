"""The loop: schedules, resuming, the errors; and checkpoints."""

import contextlib
import errno
import itertools
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from storage import CheckpointError, ensure_writable, load_checkpoint, save_checkpoint
from training import Schedule, Shuffled, _suspend, batches, fit

SCHEDULE = Schedule(iterations=8, batch_size=2, lr=0.1, warmup=0.25)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((3,), float(index)), {"value": torch.tensor(2.0 * index)}


def run(model, state, stop_at=None, loss_of=lambda error: error.square(), amp=False, dtype=torch.float32, **options):
    def loss(images, targets, step):
        if step == stop_at:
            raise KeyboardInterrupt
        error = model(torch.stack(images).to(dtype) / 5).squeeze(1) - torch.stack([t["value"] for t in targets]) / 5
        return {"square": loss_of(error).mean()}

    def data(start):
        return batches(Numbers(), SCHEDULE, seed=0, workers=0, start=start)

    return fit(model, loss, data, SCHEDULE, title="test", amp=amp, state=state, save_every=3, **options)


def line():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    straight, resumed = line(), line()
    losses = run(straight, tmp_path / "a.pt")
    assert losses[-1] < losses[0]
    with pytest.raises(KeyboardInterrupt):
        run(resumed, tmp_path / "b.pt", stop_at=5)
    resumed = line()
    assert run(resumed, tmp_path / "b.pt", stop_at=0) == losses  # goes on from iteration 3
    torch.testing.assert_close(resumed.weight, straight.weight, rtol=0, atol=0)


def test_finished_run_is_not_repeated(tmp_path):
    first = line()
    losses = run(first, tmp_path / "a.pt")
    second = line()
    assert run(second, tmp_path / "a.pt", stop_at=0) == losses
    assert torch.equal(first.weight, second.weight)


def test_not_finite(tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at iteration 0 \(square nan\).*Lower --lr"):
        run(line(), tmp_path / "a.pt", loss_of=lambda error: error * float("nan"))


@pytest.mark.parametrize("options", [{"ema": 0.7}, {"accumulate": 2}, {"amp": torch.float16}, {"amp": True}])
def test_resumed_with_options(tmp_path, options):
    straight, resumed = line(), line()
    losses = run(straight, tmp_path / "a.pt", **options)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, tmp_path / "b.pt", stop_at=5, **options)
    resumed = line()
    assert run(resumed, tmp_path / "b.pt", **options) == losses
    assert torch.equal(resumed.weight, straight.weight)
    with pytest.raises(CheckpointError, match="another run"):
        run(line(), tmp_path / "b.pt")


def test_average_of_weights(tmp_path):
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(self.weight.detach().clone())
            return super().forward(x)

    torch.manual_seed(0)
    model = Watched(3, 1)
    run(model, tmp_path / "a.pt", ema=0.7)
    plain = line()
    run(plain, tmp_path / "b.pt")
    average, *others = *seen[1:], plain.weight.detach()  # after each iteration
    for weight in others:
        average = 0.7 * average + 0.3 * weight
    torch.testing.assert_close(model.weight.detach(), average)
    assert not torch.allclose(average, plain.weight)


def test_parts_of_a_batch_make_one_step(tmp_path):
    whole, parts = line().double(), line().double()
    calls = []

    def loss_of(error):
        calls.append(len(error))
        return error.square()

    for model, accumulate in ((whole, 1), (parts, 2)):
        losses = run(model, tmp_path / f"{accumulate}.pt", loss_of=loss_of, accumulate=accumulate, dtype=torch.float64)
        assert len(losses) == SCHEDULE.iterations
    assert calls == [2] * 8 + [1] * 16
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-12, atol=1e-12)


def test_batch_that_has_no_such_parts(tmp_path):
    with pytest.raises(ValueError, match="cannot be divided into 3 equal parts"):
        run(line(), tmp_path / "a.pt", accumulate=3)


def test_float16_scales_the_loss(tmp_path):
    """A gradient of 2e-8 is none in float16, and is one where the loss is scaled."""
    scaled, plain = line(), line()
    for model, amp in ((scaled, torch.float16), (plain, False)):
        steep = torch.optim.SGD(model.parameters(), 1e6)
        run(model, tmp_path / f"{amp}.pt", loss_of=lambda error: error * 2e-8, amp=amp, optimizer=steep)
    assert (plain.weight - line().weight).abs().max() > 0.01
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=0, atol=1e-3)
    assert torch.load(tmp_path / "torch.float16.pt")["scaler"]["scale"] > 1


def test_state_of_what_stands_beside_the_model(tmp_path):
    beside = nn.BatchNorm1d(3)
    with pytest.raises(KeyboardInterrupt):
        run(line(), tmp_path / "a.pt", stop_at=3, beside=beside)
    beside.running_mean.fill_(7)
    run(line(), tmp_path / "a.pt", beside=beside)
    assert beside.running_mean.tolist() == [0, 0, 0]


def logged(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_log(tmp_path):
    """A resumed run's holds every iteration once, also those between the last state and the interruption."""
    told = itertools.count()

    def scalars():
        return {"told": next(told)}

    losses = run(line(), tmp_path / "a.pt", log=tmp_path / "a", scalars=scalars)
    straight = logged(tmp_path / "a")
    assert set(straight) == {"loss/square", "rate/0", "told"}
    steps = range(SCHEDULE.iterations)
    assert straight["loss/square"] == [(step, pytest.approx(losses[step])) for step in steps]
    assert straight["rate/0"] == [(step, pytest.approx(0.1 * SCHEDULE.factor(step))) for step in steps]
    assert straight["told"] == [(step, step) for step in steps]
    with pytest.raises(KeyboardInterrupt):
        run(line(), tmp_path / "b.pt", log=tmp_path / "b", stop_at=5)
    assert [step for step, _ in logged(tmp_path / "b")["loss/square"]] == [0, 1, 2, 3, 4]
    time.sleep(1.1)  # TensorBoard orders a log's files by the second of their making
    run(line(), tmp_path / "b.pt", log=tmp_path / "b")
    assert logged(tmp_path / "b")["loss/square"] == straight["loss/square"]


def test_state_of_another_run_or_damaged(tmp_path):
    state = tmp_path / "a.pt"
    run(line(), state, about={"missed_pixel": 8.0})
    before = state.read_bytes()
    with pytest.raises(CheckpointError, match=r"another run \(missed_pixel 8.0, not 1.0\). Repeat that one, remove"):
        run(line(), state, about={"missed_pixel": 1.0})
    with pytest.raises(CheckpointError, match=r"another run \(ema None, not 0.9; missed_pixel 8.0, not None\)"):
        run(line(), state, ema=0.9)
    with pytest.raises(CheckpointError, match=r"another model or optimizer \(.*size mismatch for weight.*Remove it"):
        run(nn.Linear(4, 1), state, about={"missed_pixel": 8.0})
    assert state.read_bytes() == before
    state.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read \(it has more than tensors in it, or is no file"):
        run(line(), state)


@contextlib.contextmanager
def largest_file(size):
    """A write that makes a file longer fails, as on a full disk (EFBIG for ENOSPC)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def large():
    return nn.Linear(300, 300)


@pytest.mark.parametrize("write", [save_checkpoint, lambda model, path: _suspend(path, "run", {"model": model}, 0, [])])
def test_full_disk(tmp_path, write):
    path = tmp_path / "sub" / "file"
    write(line(), path)
    before = path.read_bytes()
    with largest_file(100_000), pytest.raises(CheckpointError, match=r"sub/file could not be written.*File too large"):
        write(large(), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    write(large(), path)
    assert path.stat().st_size > 100_000


def test_full_disk_while_the_training_saves(tmp_path, monkeypatch):
    state = tmp_path / "a.pt"
    with pytest.raises(KeyboardInterrupt):
        run(line(), state, stop_at=5)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*The file of before is still there, whole"):
        run(line(), state)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]
    monkeypatch.undo()
    straight, resumed = line(), line()
    assert run(resumed, state, stop_at=0) == run(straight, tmp_path / "b.pt")


def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(CheckpointError, match=r"No file can be made in .*file.*another --store"):
            ensure_writable(folder, "--store")
    with largest_file(2**19), pytest.raises(CheckpointError, match=r"File too large"):
        ensure_writable(tmp_path, "--store")
    ensure_writable(tmp_path / "new" / "sub", "--store")
    assert not list((tmp_path / "new" / "sub").iterdir())
    with pytest.raises(CheckpointError, match=r"No file of that name was there before.*another --out"):
        save_checkpoint(line(), tmp_path / "file" / "m.safetensors")


def test_learning_rate():
    cosine = Schedule(iterations=100, batch_size=1, lr=1, warmup=0.1)
    assert [cosine.factor(s) for s in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])
    steps = Schedule(iterations=120, batch_size=1, lr=1, warmup=0, milestones=(2 / 3, 5 / 6))
    assert [steps.factor(s) for s in (0, 79, 80, 99, 100)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_every_epoch_shows_every_image_once():
    def order(seed, positions=range(15)):
        shuffled = Shuffled(Numbers(), seed)
        return [int(shuffled[position][0][0]) for position in positions]

    first = order(0)
    assert [sorted(first[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert first[:5] != first[5:10]
    assert order(0, reversed(range(15))) == first[::-1]
    assert order(1)[:5] not in (first[:5], first[5:10])  # nor do seeds share epochs


class Drawn(torch.utils.data.Dataset):
    """Random numbers of all three kinds."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64), {}


def test_randomness_of_a_sample_depends_on_its_position_only():
    schedule = Schedule(iterations=6, batch_size=2, lr=1)

    def drawn(workers, start=0, seed=5):
        return [
            torch.stack(images) for images, _ in batches(Drawn(), schedule, seed=seed, workers=workers, start=start)
        ]

    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    straight = drawn(workers=0)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]
    assert len(torch.cat(straight)[:, 1:].unique()) == 3 * 12
    for others in (drawn(0, start=4), drawn(1, start=4)):
        assert torch.equal(torch.cat(others), torch.cat(straight[4:]))
    assert not torch.equal(torch.cat(drawn(0, seed=6))[:, 1:], torch.cat(straight)[:, 1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_twice_a_run_gives_what_it_would_have_given(tmp_path, workers):
    """Once in an iteration, once while it writes its state; see the script."""
    script = Path(__file__).with_name("killed_run.py")
    path = os.pathsep.join([str(script.parents[2] / "examples"), str(script.parents[2])])
    subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(workers)],
        env=os.environ | {"PYTHONPATH": path}, check=True, timeout=120,
    )  # fmt: skip
    (straight, model), (killed, other) = (torch.load(tmp_path / name) for name in ("straight", "killed"))
    assert len(straight) == 12 and len(set(straight)) == 12
    assert killed == straight
    assert all(torch.equal(model[name], other[name]) for name in model)


def test_checkpoint_round_trip(tmp_path):
    first, second = line(), nn.Linear(3, 1)
    save_checkpoint(first, tmp_path / "sub" / "m.safetensors", width=1)
    load_checkpoint(second, tmp_path / "sub" / "m.safetensors")
    assert torch.equal(first.weight, second.weight)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["m.safetensors"]


def test_checkpoint_errors(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="--from-scratch"):
        load_checkpoint(line(), path)
    save_checkpoint(nn.Linear(4, 1), path, width=0.25)
    model = line()
    said = r"another model.*\"width\": 0.25.*1 tensors differ.*weight: \(1, 4\) in the file, \(1, 3\).*--checkpoint"
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(model, path)
    assert torch.equal(model.bias, line().bias)  # which would fit
    with pytest.raises(CheckpointError, match=r"bias: \(1,\) in the file, missing in the model"):
        load_checkpoint(nn.Linear(4, 1, bias=False), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"m.safetensors is damaged"):
        load_checkpoint(line(), path)
