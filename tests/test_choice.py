"""The memory of measurements: what is known is not measured again, and a file that is of no use does no harm."""

import json
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsenet.backends import choice
from sparsenet.backends.choice import Measurements


class Way:
    """A way that counts its runs, and takes some time."""

    def __init__(self, work: int = 1):
        self.runs = 0
        self.numbers = torch.rand(work)

    def __call__(self) -> Tensor:
        self.runs += 1
        return self.numbers.sin()


def ways(*names: str) -> dict[str, Way]:
    return {name: Way() for name in names}


def measure(path: Path | None, layer: str, found: dict[str, Way]) -> dict[str, float]:
    measurements = Measurements(path)
    milliseconds = measurements.of(layer, found)
    measurements.save()
    return milliseconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "folder" / "machine.json"


def test_what_was_measured_is_remembered(path: Path) -> None:
    first, second = ways("indirect", "dense"), ways("indirect", "dense")
    found = measure(path, "a layer", first)
    assert min(way.runs for way in first.values()) >= choice.ROUNDS
    assert found.keys() == first.keys() and min(found.values()) > 0
    assert measure(path, "a layer", second) == found
    assert [way.runs for way in second.values()] == [0, 0]
    assert json.loads(path.read_text()) == {"a layer": found}
    assert os.listdir(path.parent) == [path.name]


def test_another_layer_is_measured_and_the_first_stays(path: Path) -> None:
    found, other = measure(path, "a layer", ways("indirect", "dense")), ways("rows")
    measure(path, "another layer", other)
    assert other["rows"].runs > 0
    assert Measurements(path).of("a layer", ways("indirect", "dense")) == found


@pytest.mark.parametrize("now", [("indirect",), ("indirect", "dense", "rows"), ("indirect", "rows")])
def test_other_ways_are_measured_again(path: Path, now: tuple[str, ...]) -> None:
    measure(path, "a layer", ways("indirect", "dense"))
    again = ways(*now)
    assert measure(path, "a layer", again).keys() == set(now)
    assert min(way.runs for way in again.values()) > 0
    assert json.loads(path.read_text())["a layer"].keys() == set(now)


def test_the_slower_way_takes_longer() -> None:
    found = Measurements(None).of("a layer", {"fast": Way(), "slow": Way(1 << 20)})
    assert found["fast"] < found["slow"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a layer": ',
        b"\xff\xfe\x00",
        b"null",
        b"3",
        b"[]",
        b'"a layer"',
        b'{"a layer": null}',
        b'{"a layer": 3}',
        b'{"a layer": ["indirect", "dense"]}',
        b'{"a layer": {"indirect": "fast", "dense": "slow"}}',
        b'{"a layer": {"indirect": null, "dense": 1.0}}',
    ],
)
def test_a_file_that_makes_no_sense_is_as_none(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    found = ways("indirect", "dense")
    milliseconds = measure(path, "a layer", found)
    assert all(isinstance(number, float) for number in milliseconds.values())
    assert min(way.runs for way in found.values()) > 0
    assert json.loads(path.read_text()) == {"a layer": milliseconds}


def test_a_path_that_cannot_be_a_file_is_as_none(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "folder", tmp_path / "file" / "machine.json", Path("/proc/nowhere/machine.json")):
        found = ways("indirect")
        assert measure(path, "a layer", found).keys() == {"indirect"}
        assert found["indirect"].runs > 0
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write whatever it likes")
def test_without_permission_it_is_as_none(path: Path) -> None:
    measure(path, "a layer", ways("indirect"))
    path.chmod(0)
    path.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        found = ways("indirect")
        measure(path, "a layer", found)
        assert found["indirect"].runs > 0
    finally:
        path.parent.chmod(stat.S_IRWXU)


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    measurements, found = Measurements(None), ways("indirect")
    measurements.of("a layer", found)
    runs = found["indirect"].runs
    measurements.of("a layer", found)
    assert found["indirect"].runs == runs  # this object remembers
    measurements.save()
    assert not list(tmp_path.iterdir())


def test_what_was_known_already_is_not_written(path: Path) -> None:
    measure(path, "a layer", ways("indirect"))
    before = path.stat().st_mtime_ns, path.stat().st_ino
    measure(path, "a layer", ways("indirect"))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


# -- processes ---------------------------------------------------------------------------------------------------


def _save_over_and_over(path: Path, name: str) -> None:
    layers: dict[str, Any] = {f"{name} {number}": {"indirect": 1.0} for number in range(300)}
    for _ in range(60):
        measurements = Measurements(path)
        measurements.known, measurements._new = layers, True
        measurements.save()


def test_a_file_that_two_processes_write_is_whole_at_any_time(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_over_and_over, args=(path, name)) for name in ("one", "other")]
    for process in processes:
        process.start()
    read = 0
    while any(process.is_alive() for process in processes):
        if path.exists():
            assert len(json.loads(path.read_text())) == 300
            read += 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert read > 0
    assert len(json.loads(path.read_text())) == 300
    assert os.listdir(path.parent) == [path.name]


# -- of this machine ---------------------------------------------------------------------------------------------


def test_it_is_kept_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = choice.of_this_machine().path
    assert found is not None and found.parent == tmp_path / "cache" / "sparsenet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = choice.of_this_machine().path
    assert found is not None and found.parent == tmp_path / ".cache" / "sparsenet"


def test_processor_threads_and_pytorch_tell_machines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> str:
        path = choice.of_this_machine().path
        assert path is not None
        return path.name

    known = {name()}
    changes: list[tuple[Any, str, Callable[[], Any]]] = [
        (torch, "get_num_threads", lambda: 77),
        (choice, "processor", lambda: "another processor"),
    ]
    for owner, attribute, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            known.add(name())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        known.add(name())
    assert len(known) == 4
    assert not any("/" in each for each in known)
