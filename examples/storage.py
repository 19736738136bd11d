"""Checkpoints as safetensors; a file is written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the file and the way out."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    It is on the disk before it does, so that not even a power cut leaves half a file.

    Raises:
        CheckpointError: the disk is full, or cannot be written to; what was at `path` is still there.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system can
            _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save turns a full disk into a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"{path} could not be written ({cause}; {_free(path.parent)}). {_whole(path)} Make room, or choose another "
            "--out; a training that is repeated goes on from its last saved state."
        ) from error
    finally:
        with suppress(OSError):  # of a folder that is none
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    except OSError:
        return "the folder cannot be made"


def _whole(path: Path) -> str:
    return "The file of before is still there, whole." if path.exists() else "No file of that name was there before."


def save_checkpoint(model: nn.Module, path: Path, **about: Any) -> None:
    """Write the model's state, and `about` (what it is: JSON values) in the file's header."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"about": json.dumps(about)})


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load what `save_checkpoint` wrote into a model of the same structure.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another model; the model is as it was.
    """
    state = _read(path)
    theirs, ours = shapes_of(state), shapes_of(model.state_dict())
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about", "nothing")
        name = different[0]
        raise CheckpointError(
            f"{path} is of another model; it says about itself: {about}. {len(different)} tensors differ, such as "
            f"{name}: {theirs.get(name, 'missing')} in the file, {ours.get(name, 'missing')} in the model. Give "
            "the options that it was made with, or another --checkpoint."
        )
    model.load_state_dict(state)


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint; raises as `load_checkpoint` does."""
    return shapes_of(_read(path))


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"No checkpoint {path}. Train one with --from-scratch.") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Fetch it again, or train it with --from-scratch."
        ) from error
