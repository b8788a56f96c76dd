"""Images with every feature of qcow2, made at random but the same each time, and damaged.

What is read of them here comes from the specification, and never from the program.
"""

import io
import os
import random
import struct
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from support.images import create, shell
from support.importer import read_image
from support.program import stream

KIB, MIB = 1 << 10, 1 << 20
OFFSETS = (1 << 56) - 512  # the bits of an entry that are an offset
COMPRESSED = 1 << 62
NO_PROGRAMS = {**os.environ, "PATH": "/nonexistent"}  # the environment of a host without QEMU


def make(path: Path, size: int, options: str = "", over: Optional[Path] = None) -> Path:
    """An empty image with options of qemu-img create, over a raw or a qcow2 file."""
    words = [word for option in options.split(",") if option for word in ("-o", option)]
    if over is not None:
        words += ["-b", str(over), "-F", "qcow2" if "qcow2" in over.suffix else "raw"]
    return create(path, str(size), *words)


def qemu_io(path: Any, *commands: str, form: str = "qcow2") -> Any:
    """Commands of qemu-io, for which a discard is one."""
    words = [word for command in commands for word in ("-c", command)]
    shell("qemu-io", "-d", "unmap", "-f", form, *words, path)
    return path


def random_commands(
    seed: int,
    size: int,
    unit: int,
    kinds: Sequence[str] = ("write", "write", "write -z", "write -z -u", "discard"),
    count: int = 12,
) -> List[str]:
    """Commands for qemu-io, at multiples of a unit of bytes."""
    chance = random.Random(seed)
    commands = []
    for _ in range(count):
        kind = chance.choice(kinds)
        start = chance.randrange(max(1, size // unit)) * unit
        length = min(chance.choice((1, 1, 2, 3, 17)) * unit, size - start)
        pattern = f"-P {chance.randrange(256)} " if kind == "write" else ""
        if length > 0:
            commands.append(f"{kind} {pattern}{start} {length}")
    return commands


def scribble(path: Path, seed: int, size: int, unit: int = 4 * KIB) -> Path:
    """Write, zero and discard at random."""
    qemu_io(path, *random_commands(seed, size, unit))
    return path


def compress(path: Path, seed: int, size: int, cluster_size: int) -> Path:
    """Write a few whole clusters compressed, each of other bytes.

    One process for each: in one, QEMU 7.2 lets the next ones overwrite what was discarded.
    """
    chance = random.Random(seed)
    text = path.with_suffix(".text")
    count = size // cluster_size
    for index in sorted(chance.sample(range(count), min(4, count))):
        text.write_bytes(b"".join(b"%09d" % chance.randrange(10**9) for _ in range(2 * KIB)))
        qemu_io(path, f"write -c -s {text} {index * cluster_size} {cluster_size}")
    text.unlink()
    return path


def judged(path: Path) -> bytes:
    """The disk as qemu-img convert reads it."""
    raw = path.with_name(path.name + ".judged")
    shell("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def content(image: bytes, base: bytes = b"") -> bytes:
    """The disk in a stream of the program's, by a strictly sequential reader."""
    return read_image(io.BytesIO(image)).over(base)


def exported(path: Any, *options: Any, **how: Any) -> bytes:
    """The disk that the program reads from a qcow2 image, on a host without QEMU's programs."""
    how.setdefault("env", NO_PROGRAMS)
    return content(stream("-f", "qcow2", path, *options, **how))


# Damage


def patched(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def integer(path: Path, offset: int, size: int = 8) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(size), "big")


def l2_table(path: Path, index: int = 0) -> int:
    """Where the L2 table is to which an entry of the L1 table leads."""
    return integer(path, integer(path, 40) + 8 * index) & OFFSETS


def extension(path: Path, kind: int) -> int:
    """Where the payload of a header extension is."""
    return path.read_bytes().index(struct.pack(">I", kind)) + 8


def bitmap_directory(path: Path) -> int:
    return integer(path, extension(path, 0x23852875) + 16)


def parts(path: Path) -> Dict[str, int]:
    """Where the parts of an image end that a reader needs."""
    cluster_size = 1 << integer(path, 20, 4)
    places = {"the header": 72, "the L1 table": integer(path, 40) + 8 * integer(path, 36, 4)}
    places["an L2 table"] = table = l2_table(path)
    places["an L2 table's end"] = table + cluster_size
    for start in range(table, table + cluster_size, 8):
        entry = integer(path, start)
        if entry & OFFSETS and not entry & COMPRESSED:
            places["a cluster of data"] = max(
                (entry & OFFSETS) + 512, places.get("a cluster of data", 0)
            )
    return places
