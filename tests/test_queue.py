"""Kernels that wait give what kernels give that run at once, whatever reads or writes beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsenet
from sparsenet import GivenMask
from sparsenet.features import SparseFeatures
from sparsenet.form import Form
from sparsenet.kernels import machine, queue
from sparsenet.kernels.queue import Job, Queue
from tests.helpers import select
from tests.models import assert_same, blobs

pytestmark = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))

WIDTH = 5


class Net(nn.Module):
    """Convolutions, put together by a function of the module and what the stage gives."""

    def __init__(self, function: Callable[[Any, Tensor], Any], guided: bool):
        super().__init__()
        self.stage = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.before, self.a, self.b, self.c = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(4))
        self.function, self.guided = function, guided

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.before(self.stage(x)))


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def made(function: Callable[[Any, Tensor], Any], guided: bool = True) -> tuple[nn.Module, nn.Module]:
    """A model, selective or not, and the frozen one."""
    torch.manual_seed(0)
    net: nn.Module = Net(function, guided).double().eval()
    if guided:
        net = sparsenet.selectify(net, "stage", selector=GivenMask(), example_inputs=images())
    return net, sparsenet.freeze(net, images())


def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the queues, each time that one is run."""
    found: list[int] = []
    run = Queue.run

    def watched(self: Queue) -> None:
        if self._waiting:
            found.append(len(self._waiting))
        run(self)

    monkeypatch.setattr(Queue, "run", watched)
    return found


def in_a_row(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x).relu()).relu() + x)


def reads_between(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x))
    return m.c(y * y.mean((2, 3), keepdim=True)) + y


def writes_to_what_was_read(m: Any, x: Tensor) -> Any:
    y, z = m.a(x), m.b(x)
    first = m.c(y) + m.c(z)
    x += 1
    return first, m.c(x)


def writes_to_a_view(m: Any, x: Tensor) -> Any:
    y = m.b(m.a(x))
    part = x[:, 1:3]
    z = m.c(m.b(x))
    part.mul_(3)
    return y, z


def writes_to_what_has_left(m: Any, x: Tensor) -> Any:
    """Behind the stage this raises, where the map is not the ordinary one that it is before."""
    out = x.sin() if m.guided else x
    numbers = out.permute(0, 2, 3, 1).contiguous() if m.guided else out.permute(0, 2, 3, 1)
    y = m.b(m.a(x))
    numbers.mul_(2)
    return y.clone(), numbers.sum()


def in_a_thread(m: Any, x: Tensor) -> Any:
    """Each reads what the other has yet to compute."""
    y, found = m.a(x).relu(), []

    def branch() -> None:
        with torch.no_grad():
            found.append(m.c(m.b(y)))

    thread = threading.Thread(target=branch)
    thread.start()
    thread.join()
    return m.c(found[0] + m.b(y)), found[0].mean()


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    "function",
    [in_a_row, reads_between, writes_to_what_was_read, writes_to_a_view, writes_to_what_has_left, in_a_thread],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_stands_beside(function: Callable[[Any, Tensor], Any], guided: bool, batch: int) -> None:
    model, frozen = made(function, guided)
    for seed in range(2):
        with torch.no_grad(), sparsenet.use_mask(blobs(batch, (9, 8), seed)):
            assert_same(frozen(images(batch)), model(images(batch)))


@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.integers(1, 40),
    filled=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_what_leaves_lies_at_its_pixels(
    batch: int, size: tuple[int, int], channels: int, filled: bool, dtype: torch.dtype, seed: int
) -> None:
    """By a kernel that waits as by PyTorch: zero, or a number for each channel, where no pixel is active."""
    mask = blobs(batch, size, seed)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, *size, channels, generator=generator, dtype=dtype)
    fill = torch.randn(channels, generator=generator, dtype=dtype) if filled else None
    if fill is not None:
        fill[0] = -torch.inf
    expected = torch.where(mask[..., None], dense, torch.zeros(()).to(dtype) if fill is None else fill)
    with queue.waiting():
        selection = select(mask, "auto")
        features = SparseFeatures.of_kernel(dense[mask], selection, size, full=False, form=Form.plain_of(channels))
        features.fill = fill
        left = features.dense("a test", waits=True)
        selection.finish()
        assert torch.equal(left.permute(0, 2, 3, 1), expected)


def test_kernels_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """And run where their results are read."""
    _, frozen = made(in_a_row)
    found = lengths(monkeypatch)
    with torch.no_grad(), sparsenet.use_mask(blobs(1, (9, 8))):
        frozen(images())
    assert max(found) >= 2


def test_what_they_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen = made(in_a_row)
    found = lengths(monkeypatch)
    monkeypatch.setattr(queue, "MOST", 1)
    with torch.no_grad(), sparsenet.use_mask(blobs(1, (9, 8))):
        assert_same(frozen(images()), model(images()))
    assert max(found) == 1


def test_nothing_waits_for_someone_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are timed, each is computed when it is asked for."""
    _, frozen = made(in_a_row)
    found = lengths(monkeypatch)
    with torch.no_grad(), sparsenet.use_mask(blobs(1, (9, 8))), sparsenet.record(frozen):
        frozen(images())
    assert max(found) == 1


def test_a_frozen_model_within_a_frozen_one() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return m.c(m.inner(m.a(x)))

    torch.manual_seed(0)
    outer: Any = Net(function, False).double().eval()
    outer.inner = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1)).double()
    with torch.no_grad():
        expected = outer(images())
    frozen = sparsenet.freeze(outer, images())
    outer.inner = sparsenet.freeze(outer.inner, torch.randn(1, WIDTH, 9, 8, dtype=torch.float64))
    with torch.no_grad():
        assert_same(frozen(images()), expected)
        assert_same(outer(images()), expected)
    assert queue.current() is None


def test_a_pass_that_raises_leaves_nothing_waiting() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        m.kept = m.b(m.a(x))
        m.c(m.kept)
        if m.raises:
            raise KeyError("on purpose")
        return m.kept * 1

    torch.manual_seed(0)
    net: Any = Net(function, False).double().eval()
    net.raises = False
    frozen: Any = sparsenet.freeze(net, images())
    with torch.no_grad():
        expected = net(images())
        frozen.raises = True
        with pytest.raises(KeyError):
            frozen(images())
        assert_same(frozen.kept * 1, expected)
    assert queue.current() is None


class Counting:
    """In place of a kernel: it appends its number to a list, and may be interrupted."""

    def __init__(self, done: list[int]):
        self.done = done
        self.interrupts = {2}

    def job(self, numbers: list[int]) -> list[int]:
        return list(numbers)

    def run(self, job: list[int], threads: int) -> None:
        if job[0] in self.interrupts:
            self.interrupts.clear()
            raise KeyboardInterrupt
        self.done += job

    def __call__(self, numbers: list[int], threads: int) -> None:
        self.run(numbers, threads)


def test_what_an_interrupt_leaves_runs_with_what_follows() -> None:
    done: list[int] = []
    kernel: Any = Counting(done)
    with queue.waiting():
        for number in range(4):
            job = Job(kernel, [number], 1)
            job.wait()
            job.numbers[0] = 99  # it has been taken as it was
        assert not done
        with pytest.raises(KeyboardInterrupt):
            queue.finish()
        assert done == [0, 1]
        Job(kernel, [4], 1).wait()
    assert done == [0, 1, 2, 3, 4]
    Job(kernel, [5], 1).wait()  # where there is no queue
    assert done[-1] == 5
