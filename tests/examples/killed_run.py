"""Runs of a small training that are killed, and one that is not: a script of its own, for it forks before any backward.

Arguments: a folder, and how many workers. It leaves the losses in <folder>/straight and <folder>/killed.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import training

FOLDER, WORKERS = Path(sys.argv[1]), int(sys.argv[2])
SCHEDULE = training.Schedule(iterations=12, batch_size=4, lr=0.1)


class Noisy(torch.utils.data.Dataset):
    """Augmented by random numbers."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.full((6,), index / 9) + torch.randn(6), {"value": torch.rand(1)}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def run(name: str, killed_in_step: int | None = None, killed_in_save: int | None = None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    save = torch.save

    def half_saved(content, file):
        save(content, file)
        if len(content["losses"]) == killed_in_save:
            file.truncate(file.tell() // 2)
            kill()

    def loss(images, targets, step):
        if step == killed_in_step:
            kill()
        noise = 0.1 * torch.rand(())  # the loss draws too
        error = model(torch.stack(images)) - torch.stack([target["value"] for target in targets]) - noise
        return {"error": error.square().mean()}

    def data(start):
        torch.rand(3)  # and so do those who prepare data, however often a run is begun
        return training.batches(Noisy(), SCHEDULE, seed=3, workers=WORKERS, start=start)

    torch.save = half_saved
    losses = training.fit(
        model, loss, data, SCHEDULE, title="run", amp=False, state=FOLDER / f"{name}.pt", save_every=3, ema=0.9
    )
    torch.save = save
    torch.save([losses, model.state_dict()], FOLDER / name)


def in_a_fork(**kwargs) -> int:
    """The signal that ended the run, or 0."""
    child = os.fork()
    if not child:
        try:
            run(**kwargs)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert in_a_fork(name="straight") == 0
    assert in_a_fork(name="killed", killed_in_step=5) == signal.SIGKILL
    assert in_a_fork(name="killed", killed_in_save=9) == signal.SIGKILL
    assert (FOLDER / "killed.pt.part").exists()
    assert len(torch.load(FOLDER / "killed.pt")["losses"]) == 6  # the state of before is whole
    assert in_a_fork(name="killed") == 0
    assert not (FOLDER / "killed.pt.part").exists()
