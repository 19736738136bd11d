"""Machine code made at run time: vector arithmetic and loops on top of llvmlite, and its parallel launch.

llvmlite carries LLVM in its wheel, so that no compiler is needed where sparsenet runs. Kernels are written here without
it, and `sparsenet.kernels.loader` has them compiled. A kernel is a function of one argument, a `job`: an array of
64-bit numbers. Each thread that runs it takes pieces of the job until none is left. Launches go through the OpenMP
runtime that PyTorch has loaded, and so to PyTorch's own threads: a second pool would find the cores taken by the first,
whose threads spin for a while after every operation.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sparsenet.kernels import loader
from sparsenet.kernels.processor import processor


class Launch:
    """A compiled kernel.

    Args:
        address: of its function.
        length: how many numbers its job has.
    """

    def __init__(self, address: int, length: int):
        self._address = address
        self._length = length
        self._on_this_thread = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        self._on_threads = ctypes.CDLL(None).GOMP_parallel
        self._on_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._on_threads.restype = None

    def run(self, job: array[int], threads: int) -> None:
        """Run it on a job, on so many of PyTorch's threads (1: the calling one)."""
        address, length = job.buffer_info()
        assert length == self._length
        if threads == 1:
            self._on_this_thread(address)
        else:
            self._on_threads(self._address, address, threads, 0)

    def __call__(self, numbers: Sequence[int], threads: int) -> array[int]:
        """Run it on a new job, and give that as the kernel leaves it."""
        job = array("q", numbers)  # a third of the time that an array of ctypes takes
        self.run(job, threads)
        return job

    def each(self, jobs: array[int], threads: int) -> None:
        """Run it on jobs that follow one another, side by side on so many threads, each job on one of them."""
        first, numbers = jobs.buffer_info()
        _each()((self._address, first, self._length, numbers // self._length, 0), threads)


@functools.cache
def _each() -> Launch:
    kernel = Kernel("each", ("function", "jobs", "length", "count", "taken"), torch.float32)
    build, job = kernel.build, kernel.index_type.as_pointer()
    kind = kernel.ir.FunctionType(kernel.ir.VoidType(), [job])
    function = build.inttoptr(kernel.field("function"), kind.as_pointer())
    jobs, length = build.inttoptr(kernel.field("jobs"), job), kernel.field("length")
    with kernel.pieces(kernel.field("count")) as piece:
        build.call(function, [kernel.at(jobs, build.mul(piece, length))])
    return kernel.compiled()


@functools.lru_cache(maxsize=256)
def bits(number: float) -> int:
    """A float64 as the integer of the same bits: as a job holds it."""
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found


@functools.cache
def unsupported() -> str | None:
    """Why no kernel can run on this machine, or `None`."""
    try:
        import llvmlite.ir  # noqa: F401
    except ImportError:
        return "the package llvmlite is not installed"
    try:
        _ = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, TypeError, OSError):
        return "PyTorch's threads are not GNU OpenMP's"
    return None


def lanes(dtype: torch.dtype) -> int:
    """Numbers in a vector register."""
    return processor().bytes // dtype.itemsize


def registers() -> int:
    """Vector registers of the processor."""
    return processor().registers


@dataclass
class Loop:
    """A loop being written: `index` and the `values` it carries; set `following` to what the next turn gets."""

    index: Any
    values: list[Any]
    following: list[Any]


class Kernel:
    """A kernel being written, instruction by instruction. Operators of `build` are LLVM's.

    Args:
        name: of the kernel.
        fields: names of the job's 64-bit numbers, in order: addresses, integers, and float64 numbers.
        dtype: what vectors hold.
    """

    def __init__(self, name: str, fields: Sequence[str], dtype: torch.dtype):
        from llvmlite import ir

        self.ir: Any = ir
        self.fields = list(fields)
        self.lanes = lanes(dtype)
        self.index_type = ir.IntType(64)
        self.scalar = ir.FloatType() if dtype is torch.float32 else ir.DoubleType()
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.suffix = f"v{self.lanes}f{8 * dtype.itemsize}"
        self.bits = ir.VectorType(ir.IntType(8 * dtype.itemsize), self.lanes)
        self.lane_mask = ir.VectorType(ir.IntType(1), self.lanes)
        self.module = ir.Module(name)
        self.function = ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), [self.index_type.as_pointer()]), f"sparsenet_{name}"
        )
        self.function.attributes.add("nounwind")
        self.build = ir.IRBuilder(self.function.append_basic_block())
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)

    # -- numbers -----------------------------------------------------------------------------------------------

    def integer(self, value: int) -> Any:
        return self.ir.Constant(self.index_type, value)

    def constant(self, value: float) -> Any:
        return self.ir.Constant(self.vector, [value] * self.lanes)

    def field(self, name: str) -> Any:
        """An integer of the job."""
        return self.build.load(self.place(name))

    def number(self, name: str) -> Any:
        """A float64 number of the job, in every lane."""
        address = self.build.bitcast(self.place(name), self.ir.DoubleType().as_pointer())
        value = self.build.load(address)
        return self.splat(value if self.scalar == self.ir.DoubleType() else self.build.fptrunc(value, self.scalar))

    def pointer(self, name: str, integers: bool = False) -> Any:
        """An address in the job, of numbers or of 32-bit integers."""
        kind = self.ir.IntType(32) if integers else self.scalar
        return self.build.inttoptr(self.field(name), kind.as_pointer())

    def place(self, name: str) -> Any:
        """The address of one of the job's numbers."""
        return self.build.gep(self.function.args[0], [self.integer(self.fields.index(name))])

    def splat(self, value: Any) -> Any:
        """A scalar in every lane."""
        kind = self.ir.VectorType(value.type, self.lanes)
        undefined = self.ir.Constant(kind, self.ir.Undefined)
        first = self.ir.Constant(self.ir.IntType(32), 0)
        zeros = self.ir.Constant(self.ir.VectorType(self.ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.build.shuffle_vector(self.build.insert_element(undefined, value, first), undefined, zeros)

    def smaller(self, one: Any, other: Any) -> Any:
        """The smaller of two integers."""
        return self.build.select(self.build.icmp_signed("<", one, other), one, other)

    def parts(self, length: Any, size: Any) -> Any:
        """How many parts of a size a length has, of which the last may be smaller."""
        build = self.build
        return build.sdiv(build.add(length, build.sub(size, self.integer(1))), size)

    # -- memory ------------------------------------------------------------------------------------------------

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """A pointer, moved on by elements."""
        for offset in offsets:
            pointer = self.build.gep(pointer, [self.integer(offset) if isinstance(offset, int) else offset])
        return pointer

    def load(self, pointer: Any, mask: Any = None) -> Any:
        """A vector, aligned or not; with a mask, of its lanes only: elsewhere nothing is read, and the lane is zero."""
        address = self.build.bitcast(pointer, self.vector.as_pointer())
        if mask is None:
            return self.build.load(address, align=self._align)
        kind = [address.type, self.ir.IntType(32), self.lane_mask, self.vector]
        function = self._intrinsic(f"llvm.masked.load.{self.suffix}.p0", self.vector, kind)
        return self.build.call(function, [address, self.ir.Constant(self.ir.IntType(32), self._align), mask, self.zero])

    def store(self, value: Any, pointer: Any, mask: Any = None) -> None:
        """Write a vector, or those of its lanes that are in a mask."""
        address = self.build.bitcast(pointer, self.vector.as_pointer())
        if mask is None:
            self.build.store(value, address, align=self._align)
            return
        kind = [self.vector, address.type, self.ir.IntType(32), self.lane_mask]
        function = self._intrinsic(f"llvm.masked.store.{self.suffix}.p0", self.ir.VoidType(), kind)
        self.build.call(function, [value, address, self.ir.Constant(self.ir.IntType(32), self._align), mask])

    def first_lanes(self, count: Any) -> Any:
        """A mask of the first so many lanes: none if negative, all if more than there are."""
        places = self.ir.Constant(self.ir.VectorType(self.index_type, self.lanes), list(range(self.lanes)))
        return self.build.icmp_signed("<", places, self.splat(count))

    @property
    def _align(self) -> int:
        return 8 if self.scalar == self.ir.DoubleType() else 4

    def prefetch(self, pointer: Any) -> None:
        """Have a line of memory brought into the core's own cache; any address will do."""
        number, byte = self.ir.IntType(32), self.ir.IntType(8).as_pointer()
        kind = self.ir.FunctionType(self.ir.VoidType(), [byte, number, number, number])
        name = "llvm.prefetch.p0"
        function = self.module.globals.get(name) or self.ir.Function(self.module, kind, name)
        to_read, second_level, data = (self.ir.Constant(number, value) for value in (0, 2, 1))
        self.build.call(function, [self.build.bitcast(pointer, byte), to_read, second_level, data])

    # -- arithmetic --------------------------------------------------------------------------------------------

    def fma(self, one: Any, other: Any, added: Any) -> Any:
        """one · other + added, rounded once."""
        function = self._intrinsic(f"llvm.fma.{self.suffix}", self.vector, [self.vector] * 3)
        return self.build.call(function, [one, other, added])

    def clamp(self, value: Any, low: Any, high: Any) -> Any:
        """At least `low` and at most `high`; NaN stays, as in PyTorch."""
        build = self.build
        value = build.select(build.fcmp_ordered("<", value, low), low, value)
        return build.select(build.fcmp_ordered(">", value, high), high, value)

    def total(self, value: Any) -> Any:
        """The sum of the lanes, in every lane."""
        kind, step = self.ir.VectorType(self.ir.IntType(32), self.lanes), self.lanes // 2
        while step:
            turned = self.ir.Constant(kind, [(lane + step) % self.lanes for lane in range(self.lanes)])
            value = self.build.fadd(value, self.build.shuffle_vector(value, value, turned))
            step //= 2
        return value

    def root(self, value: Any) -> Any:
        """The square root, rounded once."""
        function = self._intrinsic(f"llvm.sqrt.{self.suffix}", self.vector, [self.vector])
        return self.build.call(function, [value])

    def polynomial(self, value: Any, coefficients: Sequence[float]) -> Any:
        """By Horner's rule, the constant first."""
        *lower, result = map(self.constant, coefficients)
        for coefficient in reversed(lower):
            result = self.fma(result, value, coefficient)
        return result

    def _intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        known = self.module.globals.get(name)
        return known or self.ir.Function(self.module, self.ir.FunctionType(result, arguments), name)

    # -- control -----------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: Any, carried: Sequence[Any] = (), step: int = 1) -> Iterator[Loop]:
        """Code that runs for every `step`-th index below `count`; afterwards `values` hold what came last."""
        build, before = self.build, self.build.block
        head, body, done = (self.function.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(self.index_type)
        index.add_incoming(self.integer(0), before)
        values = []
        for value in carried:
            phi = build.phi(value.type)
            phi.add_incoming(value, before)
            values.append(phi)
        build.cbranch(build.icmp_signed("<", index, count), body, done)
        build.position_at_end(body)
        loop = Loop(index, values, values)
        yield loop
        index.add_incoming(build.add(index, self.integer(step)), build.block)
        for phi, value in zip(values, loop.following, strict=True):
            phi.add_incoming(value, build.block)
        build.branch(head)
        build.position_at_end(done)

    @contextmanager
    def pieces(self, count: Any) -> Iterator[Any]:
        """Code that runs for each of the job's pieces, on whichever thread takes it. The job counts in `taken`."""
        build = self.build
        take, work, done = (self.function.append_basic_block() for _ in range(3))
        build.branch(take)
        build.position_at_end(take)
        piece = build.atomic_rmw("add", self.place("taken"), self.integer(1), "monotonic")
        build.cbranch(build.icmp_signed("<", piece, count), work, done)
        build.position_at_end(work)
        yield piece
        build.branch(take)
        build.position_at_end(done)

    def compiled(self) -> Launch:
        """The kernel, ready to run."""
        self.build.ret_void()
        # "no-builtins" keeps LLVM from making loops calls of the C library, which an image does not reach.
        source = str(self.module).replace(" nounwind\n", ' nounwind "no-builtins"\n')
        launch = Launch(loader.address(source, self.function.name), len(self.fields))
        # Instructions and blocks refer to one another, and would be some MB of garbage until it is collected.
        for block in self.function.blocks:
            block.instructions.clear()
        self.function.blocks.clear()
        return launch
