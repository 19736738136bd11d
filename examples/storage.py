"""Checkpoints as safetensors; a file is written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the file and the way out."""


def ensure_writable(folder: Path, option: str) -> None:
    """Make the folder, if need be, and see that a file of a MiB can be made in it: before hours of work, not after.

    Raises:
        CheckpointError: they cannot; it names the option that gave the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as error:
        raise CheckpointError(f"No file can be made in {folder} ({error}). Choose another {option}.") from error


def brief(error: BaseException) -> str:
    """The first two lines of what an error says, as one: PyTorch's go on for a line per tensor, or for ways to load
    what is no checkpoint."""
    if isinstance(error, UnpicklingError):
        return "it has more than tensors in it, or is no file that PyTorch wrote"
    return " ".join(str(error).split("\n")[:2]).replace("\t", "")


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


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: of safetensors, or of PyTorch's own format, where a training's may be inside
    under "state_dict".

    Raises:
        CheckpointError: no such file, a damaged one, or one without tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}. Give another, or train one with --from-scratch.") from error
    except Exception as error:  # torch.load raises many kinds
        raise CheckpointError(
            f"{path} is damaged ({brief(error)}). Fetch it again, or train it with --from-scratch."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name: it is no checkpoint of a network. Give another file.")
    return state


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load what `save_checkpoint` wrote into a model of the same structure.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another model; the model is as it was.
    """
    state = read_state(path)
    theirs, ours = shapes_of(state), shapes_of(model.state_dict())
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        about, name = _about(path), different[0]
        raise CheckpointError(
            f"{path} is of another model; it says about itself: {about}. {len(different)} tensors differ, such as "
            f"{name}: {theirs.get(name, 'missing')} in the file, {ours.get(name, 'missing')} in the model. Give "
            "the options that it was made with, another --checkpoint, or train one with --from-scratch."
        )
    model.load_state_dict(state)


def checkpoint_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint; raises as `read_state` does."""
    return shapes_of(read_state(path))


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _about(path: Path) -> str:
    if path.suffix != ".safetensors":
        return "nothing"
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("about", "nothing")
