"""From a kernel's source to code in memory: made by a process of its own, kept on disk, loaded without LLVM.

LLVM's library and its heap would be a tenth of the memory of a frozen network. A file holds a SHA-256 digest and an
image (see `sparsenet.kernels.compiler`). Its name and the digest hang on the source, the processor, llvmlite's version
and the compiler's own text, so that a file that is damaged, or was made for anything else, is not run: it is made
again. Where none of that is possible LLVM makes the code in this process, and `reason` tells why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

from sparsenet import cache
from sparsenet.kernels import compiler
from sparsenet.kernels.processor import processor

# Seconds that the other process may take: a fraction of one, on a machine that is not busy.
PATIENCE = 240

_reasons: list[str] = []
_held: list[tuple[mmap.mmap, ctypes.c_char]] = []


class Unable(Exception):
    """Code cannot be made outside of this process, or not be loaded."""


def reason() -> str | None:
    """Why LLVM is in this process, or `None` where it is not."""
    return _reasons[0] if _reasons else None


def address(source: str, name: str) -> int:
    """Where the code of a kernel is.

    Args:
        source: in LLVM's language, of one function of this name.
    """
    if not _reasons:
        try:
            return _placed(_image(source))
        except Unable as error:
            _reasons.append(str(error))
    return compiler.address(source, name)


def path_of(source: str) -> Path:
    """The file of a kernel's code, which may not be there."""
    return cache.folder() / "kernels" / _key(source)


def _key(source: str) -> str:
    import llvmlite

    parts = (source, processor().identity or "", llvmlite.__version__, _compiler_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _compiler_text() -> str:
    return Path(compiler.__file__).read_text()


def _image(source: str) -> bytes:
    if processor().identity is None:
        raise Unable("code is kept for x86-64 on Linux only")
    key, path = _key(source), path_of(source)
    image = compiler.opened(_read(path), key)
    if image is None:
        content = _made(source, key)
        image = compiler.opened(content, key)
        if image is None:
            raise Unable("the process that makes the code gave none")
        cache.write(path, content)
    return image


def _read(path: Path) -> bytes:
    """What a file holds that no other user can have written."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            return file.read() if state.st_uid == os.geteuid() and not state.st_mode & 0o022 else b""
    except OSError:
        return b""


def _made(source: str, key: str) -> bytes:
    """The content of a kernel's file, from another process."""
    import llvmlite

    if not Path(sys.executable or "").name.startswith("python"):
        raise Unable(f"the program that runs is {sys.executable!r}, not python")
    library = str(Path(llvmlite.__file__).parents[1])
    command = [sys.executable, "-I", "-S", compiler.__file__, library, key]
    try:
        done = subprocess.run(command, input=source.encode(), capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unable(f"the process that makes the code failed: {error}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or ["no message"]
        raise Unable(f"the process that makes the code ended with {done.returncode}: {lines[-1]}")
    return done.stdout


def _placed(image: bytes) -> int:
    """The address of an image in memory that can be run, and from then on not be written."""
    try:
        memory = mmap.mmap(-1, len(image), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise Unable(f"no memory for code: {error}") from error
    memory[:] = image
    first = ctypes.c_char.from_buffer(memory)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(ctypes.addressof(first), len(image), mmap.PROT_READ | mmap.PROT_EXEC):
        raise Unable(f"memory may not be run: {os.strerror(ctypes.get_errno())}")
    _held.append((memory, first))  # as long as the process runs
    return ctypes.addressof(first)
