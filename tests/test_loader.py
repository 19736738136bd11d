"""Machine code from another process and from disk: as LLVM makes it in this one, and never what something else left."""

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsenet.backends import indirect, winograd
from sparsenet.backends.epilogue import Epilogue
from sparsenet.kernels import compiler, convolution, index, loader, machine
from sparsenet.kernels import winograd as winograd_kernel
from sparsenet.kernels.machine import Kernel
from sparsenet.kernels.processor import Processor, processor
from sparsenet.profile import Profile
from sparsenet.sites import Window, dense_tiles

pytestmark = [
    pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported())),
    pytest.mark.skipif(processor().identity is None, reason="code is kept for x86-64 on Linux only"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known, of code or of reasons."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loader, "_reasons", [])
    return tmp_path / "sparsenet" / "kernels"


def adding(number: int) -> Kernel:
    """A kernel that adds to the job's only number."""
    kernel = Kernel(f"adding_{number}", ("total",), torch.float32)
    kernel.build.store(kernel.build.add(kernel.field("total"), kernel.integer(number)), kernel.place("total"))
    return kernel


def source_of(kernel: Kernel) -> str:
    kernel.build.ret_void()
    return str(kernel.module)


def sum_of(kernel: Kernel) -> int:
    total: int = kernel.compiled()([10], 1)[0]
    return total


def no_process(*_: Any, **__: Any) -> Any:
    raise AssertionError("a process is started")


# -- the same code -----------------------------------------------------------------------------------------------


def convolved(groups: int, residual: str | None, activation: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    rows, weight = torch.randn(43, 24, dtype=dtype), torch.randn(72, 24 // groups, 1, 3, dtype=dtype)
    table = torch.randint(0, 44, (37, 3), dtype=torch.int32)
    added = None if residual is None else torch.randn(37, 72, dtype=dtype)
    epilogue = Epilogue(residual=added, activation=activation, low=0.1, high=2.0)
    epilogue = epilogue if residual is None else epilogue._replace(order=residual)
    return indirect.run(rows, indirect.pack(weight, groups), epilogue, table, 43)


def depthwise() -> Tensor:
    weight = torch.randn(40, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.linspace(-3, 3, 9 * 40).view(9, 40)
    return indirect.run(rows, indirect.pack(weight, 40), Epilogue(), torch.arange(8).int().view(4, 2), 9)


def pooled() -> Tensor:
    rows = torch.linspace(-3, 3, 9 * 40).sin().view(9, 40)
    return indirect.pool("max", rows, torch.arange(10).int().view(5, 2), 9, -1.0)


def by_winograd() -> Tensor:
    torch.manual_seed(0)
    rows, weight = torch.randn(81, 19), torch.randn(35, 19, 3, 3)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    tiles = dense_tiles((9, 9), window, (9, 9), torch.device("cpu"))
    prepared = winograd.Prepared(winograd.pack(weight), Epilogue(activation="gelu"))
    return prepared.run(rows, None, tiles, 81, torch.empty(81, 35))


def indices() -> Tensor:
    mask = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    found, rank = index.sites(mask)
    lines = torch.tensor([[0, 3], [3, 7]], dtype=torch.int32)
    return torch.cat([found, rank.flatten().long(), index.any_of(mask, lines, lines).flatten().long()])


CASES: dict[str, Callable[[], Tensor]] = {
    **{
        f"{activation}, {dtype}, {groups} groups, residual {residual}": functools.partial(
            convolved, groups, residual, activation, dtype
        )
        for activation, dtype, groups, residual in [
            ("clamp", torch.float32, 1, None),
            ("clamp", torch.float64, 2, "before"),
            ("silu", torch.float32, 3, "after"),
            ("gelu", torch.float32, 1, None),
            ("gelu_tanh", torch.float32, 1, "before"),
            ("hardswish", torch.float32, 2, None),
        ]
    },
    "depthwise": depthwise,
    "pooling": pooled,
    "Winograd": by_winograd,
    "indices": indices,
}
CACHED: list[Any] = [
    *(convolution.product, convolution.by_channel, winograd_kernel.product),
    *(index.sites_kernel, index.table_kernel, index.any_of_kernel),
]


def forget() -> None:
    for each in CACHED:
        each.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_llvm_in_this_process_does(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    made = CASES[case]()
    files = len(list(folder.iterdir()))
    assert files > 0 and loader.reason() is None
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", no_process)
        read = CASES[case]()
    assert loader.reason() is None
    forget()
    monkeypatch.setattr(loader, "_reasons", ["asked for"])
    here = CASES[case]()
    forget()
    assert made.isfinite().all()
    assert torch.equal(made, here) and torch.equal(read, here)
    assert len(list(folder.iterdir())) == files


def test_llvm_is_not_in_the_process(tmp_path: Path) -> None:
    """Neither where code is made nor where it is read."""
    script = """
import torch, sparsenet
from torch import nn
from sparsenet.kernels import loader
images = torch.randn(1, 3, 16, 16)
model = sparsenet.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), images)
with torch.no_grad():
    model(images)
print("libllvmlite" in open("/proc/self/maps").read(), loader.reason())
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["False", "None"]
    assert list((tmp_path / "sparsenet" / "kernels").iterdir())


# -- files -------------------------------------------------------------------------------------------------------


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[: compiler.DIGEST],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: flipped(content, 0),
        lambda content: flipped(content, compiler.DIGEST),
        lambda content: flipped(content, len(content) - 1),
        lambda content: bytes(len(content)),
    ],
)
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], folder: Path) -> None:
    assert sum_of(adding(5)) == 15
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert sum_of(adding(5)) == 15
    assert [each.name for each in folder.iterdir()] == [path.name]
    assert path.read_bytes() == content
    assert loader.reason() is None


def test_another_kernels_file_is_not_run(folder: Path) -> None:
    assert sum_of(adding(5)) == 15
    (path,) = folder.iterdir()
    assert sum_of(adding(6)) == 16
    (other,) = set(folder.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    assert sum_of(adding(5)) == 15
    assert path.read_bytes() != other.read_bytes()


def test_a_file_that_others_can_write_is_not_read(folder: Path) -> None:
    assert sum_of(adding(5)) == 15
    (path,) = folder.iterdir()
    assert loader._read(path) == path.read_bytes()
    path.chmod(0o666)
    assert loader._read(path) == b""


def test_source_processor_llvm_and_compiler_tell_files_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import llvmlite

    one, other = source_of(adding(5)), source_of(adding(6))
    known = {loader.path_of(one), loader.path_of(other)}
    changes: list[tuple[Any, str, Any]] = [
        (loader, "processor", lambda: Processor(64, 32, "another")),
        (llvmlite, "__version__", "9.9"),
        (loader, "_compiler_text", lambda: "another"),
    ]
    for owner, attribute, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            known.add(loader.path_of(one))
    assert len(known) == 5
    assert loader.path_of(one) in known and source_of(adding(5)) == one


def test_without_a_folder_to_write_to_it_is_made_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert sum_of(adding(5)) == 15
    assert loader.reason() is None
    assert os.listdir(tmp_path) == ["file"]


def _add(numbers: list[int]) -> None:
    for number in numbers:
        assert sum_of(adding(number)) == 10 + number
    assert loader.reason() is None


def test_processes_that_make_the_same_code_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=([*range(4)],)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {each.name for each in folder.iterdir()} == {loader.path_of(written(number)).name for number in range(4)}


def written(number: int) -> str:
    """The source as it is compiled."""
    sources: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "address", lambda source, name: sources.append(source) or 0)
        adding(number).compiled()
    return sources[0]


# -- where it cannot be ------------------------------------------------------------------------------------------


def refuses(*_: Any, **__: Any) -> Any:
    raise OSError("no more processes")


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "expected"),
    [
        (subprocess, "run", refuses, "no more processes"),
        (sys, "executable", "/usr/bin/nothing", "not python"),
        (sys, "executable", "/nowhere/python3", "No such file"),
        (loader, "PATIENCE", 0.001, "timed out"),
        (loader, "processor", lambda: Processor(16, 16, None), "x86-64"),
        (compiler, "__file__", os.devnull, "gave none"),
        (compiler, "__file__", "/nowhere/compiler.py", "ended with 2"),
    ],
)
def test_llvm_stands_in_and_says_why(
    owner: Any, attribute: str, value: Any, expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader._compiler_text()
    monkeypatch.setattr(owner, attribute, value)
    assert sum_of(adding(5)) == 15
    reason = loader.reason()
    assert reason is not None and expected in reason
    assert str(Profile(1.0, (), reason)).endswith(reason)
    assert not folder.exists() or not list(folder.iterdir())
    assert sum_of(adding(6)) == 16  # without another try
    assert loader.reason() == reason


def test_memory_that_may_not_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.mmap, "PROT_EXEC", 1 << 20)
    assert sum_of(adding(5)) == 15
    assert "may not be run" in str(loader.reason())


HEAD = 'target triple = "unknown-unknown-unknown"\n'
BEYOND = {
    "a function of the C library": HEAD
    + "declare i32 @getpid()\n"
    + "define void @f(i64* %job) nounwind {\n"
    + "  %found = call i32 @getpid()\n  %new = zext i32 %found to i64\n  store i64 %new, i64* %job\n  ret void\n}",
    "memory to write to": HEAD
    + "@total = global i64 3\n"
    + "define void @f(i64* %job) nounwind {\n"
    + "  %old = load i64, i64* @total\n  %new = add i64 %old, 1\n  store i64 %new, i64* @total\n"
    + "  store i64 %new, i64* %job\n  ret void\n}",
    "a second function": HEAD
    + "define void @g() nounwind {\n  ret void\n}\n"
    + "define void @f(i64* %job) nounwind {\n  call void @g()\n  ret void\n}",
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_an_image_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(compiler.Unfit):
        compiler.image(BEYOND[name])
    loader.address(BEYOND[name], "f")
    assert "Unfit" in str(loader.reason())
