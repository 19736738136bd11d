"""What a caller sets around a forward pass, and where the caller's images lie in the network's input.

Both are context variables, so that threads, nested models and re-entrant calls stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from sparsenet import backends
from sparsenet.regions import Frame, Regions, check_regions

if TYPE_CHECKING:
    from sparsenet.selection import Observer
    from sparsenet.selector.supervision import Supervision


@dataclass(frozen=True)
class Settings:
    """What holds for the forward passes inside the current `with` blocks."""

    regions: Regions | None = None
    backend: str | None = None
    supervision: Supervision | None = None
    stop_at: Literal["stage", "selector"] | None = None
    observers: tuple[Observer, ...] = ()


_settings: ContextVar[Settings] = ContextVar("sparsenet.settings")
_frames: ContextVar[tuple[Frame | None, ...]] = ContextVar("sparsenet.frames", default=())  # of nested models


def current() -> Settings:
    return _settings.get(Settings())


def frame() -> Frame | None:
    """Where the images of the current forward pass lie; `None` when the root module was not called."""
    frames = _frames.get()
    return frames[-1] if frames else None


def begin_frame(frame: Frame | None) -> None:
    """A selective model is called, maybe inside another one."""
    _frames.set((*_frames.get(), frame))


def set_frame(frame: Frame) -> None:
    """The network has placed the images of the current pass."""
    _frames.set((*_frames.get()[:-1], frame))


def end_frame() -> None:
    _frames.set(_frames.get()[:-1])


@contextmanager
def setting(**changes: Any) -> Iterator[None]:
    token = _settings.set(replace(current(), **changes))
    try:
        yield
    finally:
        _settings.reset(token)


@contextmanager
def use_mask(mask: Tensor | list[Tensor]) -> Iterator[None]:
    """Inside, every selective model takes its mask from here instead of from its selector.

    Args:
        mask: one of
            - a bool tensor (N, H, W) of any H and W: it covers each image whole, and a cell of a feature map is
              active if any of it is;
            - a list of N bool tensors (H, W), for detectors whose images differ in size;
            - a list of N tensors (boxes, 4): x1, y1, x2, y2 in pixels of the images as the caller gives them.
              What lies outside the image is clipped.
            A detector's own resizing and batch padding are followed; padding is inactive.

    Raises:
        TypeError, ValueError: here for a wrong dtype or shape and for boxes with NaN; in the forward pass for a
            mask of another batch size.
    """
    with setting(regions=check_regions(mask)):
        yield


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, masked convolutions run by `name`: "reference" (masked dense storage) or one of
    `sparsenet.backends.BACKENDS`.

    Layers that a backend does not support run by "rows"; `record` tells which, and why.

    Raises:
        ValueError: for an unknown name.
        ImportError: for "spconv" and "triton" where they are not installed, or too old.
    """
    with setting(backend=backends.check(name)):
        yield
