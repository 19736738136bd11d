"""Checkpoints as safetensors; a file is written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(model: nn.Module, path: Path, **about: Any) -> None:
    """Write the model's state, and `about` (what it is: JSON values) in the file's header."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"about": json.dumps(about)})


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load what `save_checkpoint` wrote into a model of the same structure.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another model.
    """
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"No checkpoint {path}. Train one with --from-scratch.") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Fetch it again, or train it with --from-scratch."
        ) from error
    except RuntimeError as error:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about", "nothing")
        raise CheckpointError(f"{path} is of another model; it says about itself: {about}. {error}") from error
