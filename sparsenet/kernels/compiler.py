"""LLVM: from a kernel's source to machine code for this processor.

As a script it reads the source and writes an *image* of the code, sealed, so that LLVM, 94 MB with its heap, is in a
process that ends. It imports nothing of sparsenet for that, and llvmlite from the folder that it is given. An image is
position-independent and complete: the code, which begins with the kernel, and the constants that it reads.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import sys
from typing import Any, NamedTuple

DIGEST = hashlib.sha256().digest_size

# Of object files, as ELF numbers them.
PROGRAM, SYMBOLS, RELOCATIONS = 1, 2, 4  # types of sections
WRITTEN, IN_MEMORY, RUN = 1, 2, 4  # flags of sections
FUNCTION = 2  # type of a symbol
RELATIVE = (2, 4)  # relocations: distances of 32 bits from where they are written, R_X86_64_PC32 and PLT32


class Unfit(Exception):
    """The code needs more than an image has."""


def image(source: str) -> bytes:
    """The image of a kernel for x86-64.

    Raises:
        Unfit: see `linked`.
    """
    machine = _machine(reloc="pic", codemodel="small")
    return linked(machine.emit_object(optimised(source, machine)))


def sealed(image: bytes, key: str) -> bytes:
    """An image behind its digest."""
    return hashlib.sha256(key.encode() + image).digest() + image


def opened(content: bytes, key: str) -> bytes | None:
    """The image, or `None` if the digest is another one."""
    image = content[DIGEST:]
    return image if image and sealed(image, key) == content else None


def address(source: str, name: str) -> int:
    """Where a kernel's code is, made in this process."""
    modules, engine = _engine()
    module = optimised(source, _machine())
    engine.add_module(module)
    engine.finalize_object()
    modules.append(module)  # whose memory the code lies in
    found: int = engine.get_function_address(name)
    return found


def optimised(source: str, machine: Any) -> Any:
    from llvmlite import binding

    module = binding.parse_assembly(source)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return module


def _machine(**how: str) -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=features.flatten() + (",-prefer-256-bit" if features.get("avx512f") else ""),
        opt=3,
        **how,
    )


@functools.cache
def _engine() -> tuple[list[Any], Any]:
    from llvmlite import binding

    machine = _machine()
    return [], binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


class Section(NamedTuple):
    """The header of a section of an object file, as ELF names its numbers."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


def linked(code: bytes) -> bytes:
    """The image of an object file (ELF, x86-64): its sections one after the other, code first, and the distances
    between them filled in.

    Raises:
        Unfit: for what is written to, or lies elsewhere (a function of the C library), or a second function.
    """
    (headers,) = struct.unpack_from("<Q", code, 40)
    (count,) = struct.unpack_from("<H", code, 60)
    sections = [Section(*struct.unpack_from("<IIQQQQIIQQ", code, headers + 64 * each)) for each in range(count)]
    loaded = {place: each for place, each in enumerate(sections) if each.flags & IN_MEMORY and each.size}
    if any(each.type != PROGRAM or each.flags & WRITTEN for each in loaded.values()):
        raise Unfit("it has memory to write to")
    result, begins = bytearray(), {}
    for place in sorted(loaded, key=lambda place: not loaded[place].flags & RUN):
        section = loaded[place]
        result += bytes(-len(result) % max(1, section.align))
        begins[place] = len(result)
        result += code[section.offset : section.offset + section.size]
    (table,) = [each for each in sections if each.type == SYMBOLS]
    symbols = [struct.unpack_from("<IBBHQQ", code, table.offset + at) for at in range(0, table.size, 24)]
    places = [begins[section] + value if section in begins else None for _, _, _, section, value, _ in symbols]
    functions = [place for place, symbol in zip(places, symbols, strict=True) if symbol[1] & 15 == FUNCTION]
    if functions != [0]:
        raise Unfit("it is not one function")
    for section in sections:
        if section.type != RELOCATIONS or section.info not in begins:
            continue
        for at in range(section.offset, section.offset + section.size, 24):
            offset, info, added = struct.unpack_from("<QQq", code, at)
            target, kind = places[info >> 32], info & 0xFFFFFFFF
            if target is None or kind not in RELATIVE:
                raise Unfit(f"relocation {kind} reaches beyond it")
            written = begins[section.info] + offset
            struct.pack_into("<i", result, written, target + added - written)
    return bytes(result)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.stdout.buffer.write(sealed(image(sys.stdin.read()), sys.argv[2]))
