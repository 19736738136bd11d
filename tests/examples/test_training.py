"""The loop: schedules, resuming, the errors; and checkpoints."""

import pytest
import torch
from torch import nn

from storage import CheckpointError, load_checkpoint, save_checkpoint
from training import Schedule, Shuffled, batches, fit

SCHEDULE = Schedule(iterations=8, batch_size=2, lr=0.1, warmup=0.25)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((3,), float(index)), {"value": torch.tensor(2.0 * index)}


def run(model, state, stop_at=None, loss_of=lambda error: error.square()):
    def loss(images, targets, step):
        if step == stop_at:
            raise KeyboardInterrupt
        error = model(torch.stack(images) / 5).squeeze(1) - torch.stack([t["value"] for t in targets]) / 5
        return {"square": loss_of(error).mean()}

    def data(start):
        return batches(Numbers(), SCHEDULE, seed=0, workers=0, start=start)

    return fit(model, loss, data, SCHEDULE, title="test", amp=False, state=state, save_every=3)


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


def test_state_of_another_run_or_damaged(tmp_path):
    state = tmp_path / "a.pt"
    run(line(), state)
    content = torch.load(state)
    torch.save(content | {"run": "something else"}, state)
    with pytest.raises(CheckpointError, match="another run"):
        run(line(), state)
    state.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="Remove it"):
        run(line(), state)


def test_learning_rate():
    cosine = Schedule(iterations=100, batch_size=1, lr=1, warmup=0.1)
    assert [cosine.factor(s) for s in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])
    steps = Schedule(iterations=120, batch_size=1, lr=1, warmup=0, milestones=(2 / 3, 5 / 6))
    assert [steps.factor(s) for s in (0, 79, 80, 99, 100)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_every_epoch_shows_every_image_once():
    order = list(Shuffled(5, 0, 15, seed=0))
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert order[:5] != order[5:10]
    assert list(Shuffled(5, 7, 15, seed=0)) == order[7:]


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
    with pytest.raises(CheckpointError, match=r"another model.*\"width\": 0.25"):
        load_checkpoint(line(), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"m.safetensors is damaged"):
        load_checkpoint(line(), path)
