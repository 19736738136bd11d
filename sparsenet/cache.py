"""The folder of what is remembered for this machine: measurements, and machine code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder() -> Path:
    """`$XDG_CACHE_HOME/sparsenet` (`~/.cache`), which may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsenet"


def write(path: Path, content: bytes) -> bool:
    """Write a file, and its folder, so that others see all of it or nothing; whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError:
        os.unlink(partial)
        return False
    return True
