"""Disks to export: made from patterns, the same from every run."""

import os
import random
from pathlib import Path
from typing import Iterable, List, NamedTuple, Tuple

from hypothesis import strategies as st


def noise(length: int, seed: int = 0) -> bytes:
    """Bytes that don't compress and are the same for the same seed."""
    return random.Random(seed).getrandbits(8 * length).to_bytes(length, "big") if length else b""


def write_disk(path: Path, size: int, pieces: Iterable[Tuple[int, bytes]] = ()) -> Path:
    """A sparse file of `size` bytes with pieces (offset, bytes) on it; the rest is holes."""
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data[: max(0, size - offset)])
    return path


def padded(content: bytes, unit: int = 512) -> bytes:
    """The content as a guest sees it: padded with zeros to whole sectors."""
    return content + bytes(-len(content) % unit)


class Recipe(NamedTuple):
    """A disk's description that is short when hypothesis prints it."""

    size: int
    pieces: List[Tuple[int, str, int]]  # offset, pattern, length

    def content(self) -> List[Tuple[int, bytes]]:
        return [(offset, pattern(name, length)) for offset, name, length in self.pieces]

    def write(self, path: Path) -> Path:
        if path.exists():
            os.unlink(path)
        return write_disk(path, self.size, self.content())


def pattern(name: str, length: int) -> bytes:
    """Bytes for a piece of a disk: dense, zeros, alternating, or one byte at an end."""
    if name == "zeros":
        return bytes(length)
    if name == "first":
        return (b"\x01" + bytes(length))[:length]
    if name == "last":
        return (bytes(length) + b"\x80")[-length:] if length else b""
    if name.startswith("every"):  # every other run of so many bytes is zeros
        run = int(name[5:])
        unit = noise(run, run) + bytes(run)
        return (unit * (length // len(unit) + 1))[:length]
    return noise(length, length)


PATTERNS = ["noise", "zeros", "first", "last", "every512", "every4096", "every65536"]


@st.composite
def recipes(draw: st.DrawFn, max_size: int = 4 << 20) -> Recipe:
    """Disks of any size, aligned to nothing, with pieces anywhere."""
    near = st.sampled_from([512, 4096, 65536, 1 << 20, 2 << 20]).flatmap(
        lambda unit: st.integers(0, max(1, max_size // unit)).flatmap(
            lambda count: st.integers(-2, 2).map(lambda off: max(0, count * unit + off))
        )
    )
    size = draw(st.one_of(near, st.integers(0, max_size)))
    offsets = st.one_of(
        st.integers(0, max(0, size - 1)),
        st.integers(0, size // 4096).map(lambda n: n * 4096),
    )
    lengths = st.one_of(st.integers(0, 200_000), st.sampled_from([1, 512, 4096, 65536, 1 << 20]))
    pieces = draw(
        st.lists(st.tuples(offsets, st.sampled_from(PATTERNS), lengths), min_size=0, max_size=6)
    )
    return Recipe(size, pieces)
