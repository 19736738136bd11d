"""Kernels that wait in a queue, as on a GPU's stream, until something other than a kernel reads what they write.

Each kernel drives the interpreter out of the caches, so that Python between two of them takes about twice as long as
Python that follows Python. A frozen model therefore goes through its modules as far as it can before it computes any of
them (ResNet-50 at 448x448 and a density of 0.25: 0.96 of the time, MobileNetV2 at 0.2: 0.95).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from sparsenet.kernels.machine import Launch

# Bytes of results, about, from which waiting kernels run: what they read and write is not used again before (ResNet-50
# takes 1.02 of the time from 12 MB and from 3 MB, 1.08 from 20).
MOST = 8 << 20


class Job:
    """A kernel and what it is to be run on.

    Attributes:
        numbers: those that the kernel's fields name.
        held: what has the memory that they are addresses of.
    """

    __slots__ = ("held", "kernel", "numbers", "threads")

    def __init__(self, kernel: Launch, numbers: MutableSequence[int], threads: int, *held: Any):
        self.kernel = kernel
        self.numbers = numbers
        self.threads = threads
        self.held = held

    def run(self) -> None:
        self.kernel(self.numbers, self.threads)

    def wait(self) -> None:
        """Run after what waits in the current queue, or at once if there is none. The job itself may change then."""
        queue = _current.get()
        if queue is None:
            self.run()
        else:
            queue.add(self)


class Tape:
    """What a part of a pass asks of kernels, while it is recorded.

    Attributes:
        work: of layers, in the order in which it was computed, each with its result.
        whole: whether nothing else was asked of features.
    """

    __slots__ = ("whole", "work")

    def __init__(self) -> None:
        self.work: list[tuple[Any, Tensor]] = []
        self.whole = True


class Queue:
    """The kernels of a pass that have yet to run, in order.

    Attributes:
        tape: on which they are recorded, or `None`.
        kept: by thread, where its jobs are kept as they come: see `keeping`.
    """

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.kept: dict[int, list[Job]] = {}
        self._waiting: list[tuple[Launch, array[int], int, Any]] = []
        self._bytes = 0
        self._scratch: Tensor | None = None
        self._lock = threading.RLock()  # for threads of the model's own

    def add(self, job: Job) -> None:
        with self._lock:
            numbers = array("q", job.numbers)
            self._waiting.append((job.kernel, numbers, job.threads, job.held))
            kept = self.kept.get(threading.get_ident()) if self.kept else None
            if kept is not None:
                kept.append(Job(job.kernel, array("q", numbers), job.threads, *job.held))

    def run(self) -> None:
        """Run what waits."""
        if not self._waiting:
            return
        with self._lock:
            done = 0
            try:
                for launch, job, threads, _ in self._waiting:
                    launch.run(job, threads)
                    done += 1
            finally:  # what an interrupt leaves is run with what follows
                del self._waiting[:done]
                self._bytes = 0

    def expect(self, size: int) -> None:
        """A job is about to come whose result has so many bytes."""
        self._bytes += size
        if self._bytes > MOST:
            self.run()
            self._bytes = size

    def scratch(self, elements: int, like: Tensor) -> Tensor:
        """Memory for a job alone, (elements,): the jobs run one after the other, so that all have the same."""
        kept = self._scratch
        if kept is None or kept.dtype != like.dtype or kept.numel() < elements:
            kept = self._scratch = like.new_empty(elements)
        return kept


_current: ContextVar[Queue | None] = ContextVar("sparsenet.queue", default=None)


def current() -> Queue | None:
    """The queue of the current pass of a frozen model."""
    return _current.get()


def finish() -> None:
    """Run what waits in the current queue, before anything but its kernels reads what they write, or writes to what
    they read."""
    queue = _current.get()
    if queue is not None:
        queue.run()


def tape() -> Tape | None:
    """On which the current pass is recorded."""
    queue = _current.get()
    return None if queue is None else queue.tape


@contextmanager
def waiting() -> Iterator[None]:
    """Let jobs wait inside, at most to the end; those of a pass within another one wait in the same queue."""
    queue = _current.get() or Queue()
    token = _current.set(queue)
    try:
        yield
    finally:
        _current.reset(token)
        queue.run()


@contextmanager
def recording() -> Iterator[Tape]:
    """Record what is asked for inside, in the current queue."""
    queue = _current.get()
    assert queue is not None
    tape = queue.tape = Tape()
    try:
        yield tape
    finally:
        queue.tape = None


@contextmanager
def keeping() -> Iterator[list[Job]]:
    """Keep the jobs that this thread has wait in the current queue inside, to have them run again on the same memory.
    Scratch memory is theirs alone, too."""
    queue, thread = _current.get(), threading.get_ident()
    assert queue is not None and thread not in queue.kept
    before, queue._scratch = queue._scratch, None
    jobs = queue.kept[thread] = []
    try:
        yield jobs
    finally:
        del queue.kept[thread]
        queue._scratch = before
