"""Damaged images by the thousand, in one process: python3 mutants.py IMAGE COUNT.

Each is read by the program's reader and perhaps by qemu-img. Prints the counts of what became of
them as JSON. Whatever is no Error ends it by a traceback: a hang (by an alarm) and memory without
bound (by a limit) too.
"""

import collections
import contextlib
import itertools
import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, List, Tuple, Union

import qcow2_to_stdout as program

MIB = 1 << 20
OFFSETS = (1 << 56) - 512
MOST_COMPARED = 200  # of those that differ; QEMU takes much longer
SECONDS = 20  # for one image of a few hundred KiB


def read_disk(path: Path) -> Union[bytes, str]:
    """The disk, by its extents; or why there is none."""
    try:
        with contextlib.ExitStack() as resources:
            source: Any = program.open_qcow2(str(path), program.Watch(), resources)
            if source is None:
                return "it is QEMU's"
            if source.size > 64 * MIB:
                collections.deque(itertools.islice(source.extents(), 1 << 20), 0)
                return "it is large"
            disk = bytearray(source.size)
            position = 0
            with memoryview(disk) as view:
                for extent in source.extents():
                    start, end = extent[:2]
                    assert position <= start < end <= source.size, extent
                    source.read_into(view[start:end], start, [extent])
                    position = end
            return bytes(disk)
    except program.Error as error:
        assert "\n" not in str(error)
        assert 20 < len(str(error)) < 600
        return str(error)


def read_rest(path: Path) -> None:
    """A bitmap and a snapshot, whatever the damage has left of them."""
    with contextlib.ExitStack() as resources, contextlib.suppress(program.Error):
        image = program.Qcow2File(str(path), program.Watch(), resources)
        collections.deque(image.bitmap_ranges("b")[0], 0)
    with contextlib.ExitStack() as resources, contextlib.suppress(program.Error):
        source = program.open_qcow2(str(path), program.Watch(), resources, "s")
        collections.deque(itertools.islice(source.extents() if source else (), 1 << 20), 0)


def places(image: bytes) -> List[Tuple[int, int]]:
    """(offset, length) of what is worth damaging."""

    def number(offset: int, size: int = 8) -> int:
        return int.from_bytes(image[offset : offset + size], "big")

    cluster_size = 1 << number(20, 4)
    l1, l1_size = number(40), number(36, 4)
    found = [(0, 112), (0, 112), (0, 200), (l1, 8 * l1_size)]
    for index in range(l1_size):
        table = number(l1 + 8 * index) & OFFSETS
        if table:
            used = [at for at in range(0, cluster_size, 8) if number(table + at)] or [0]
            found += [(table + min(used), 8 + max(used) - min(used)), (table, cluster_size)] * 2
            # What is compressed: heads of deflate, and frames.
            entries = [number(table + at) for at in used]
            packed = [entry & (1 << 40) - 1 for entry in entries if entry >> 62 & 1]
            found += [(at, 64) for at in packed]
    if number(60, 4):
        found.append((number(64), 80))
    bitmaps = image.find(b"\x23\x85\x28\x75")
    if bitmaps > 0:
        directory = number(bitmaps + 8 + 16)
        found += [(directory, 40), (number(directory), 64)]
    return found


def mutants(image: bytes, count: int) -> Iterator[bytes]:
    """With one or two bytes changed where something is said; some are cut short besides."""
    chance = random.Random(count)
    wanted = places(image)
    for _ in range(count):
        mutant = bytearray(image)
        for _ in range(chance.choice((1, 1, 1, 2))):
            offset, length = chance.choice(wanted)
            at = offset + chance.randrange(length)
            if at < len(mutant):
                flipped = mutant[at] ^ 1 << chance.randrange(8)
                mutant[at] = chance.choice((flipped, flipped, 0, 1, 0x40, 0x7F, 0x80, 0xC0, 0xFF))
        if not chance.randrange(50):
            del mutant[chance.randrange(len(mutant)) :]
        yield bytes(mutant)


def compared(path: Path, disk: bytes) -> bool:
    """Whether QEMU reads it too. Raises AssertionError if it reads another disk."""
    raw = path.with_suffix(".raw")
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)]
    if subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode:
        return False
    theirs = raw.read_bytes()
    if theirs != disk:
        path.rename(path.with_suffix(".other"))
        raise AssertionError(f"QEMU reads another disk: {path.with_suffix('.other')}")
    return True


def main(path: Path, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    content, original = path.read_bytes(), read_disk(path)
    target = path.with_suffix(".mutant")
    counts = {"read": 0, "refused": 0, "compared": 0, "changed": 0}
    for number, mutant in enumerate(mutants(content, count)):
        target.write_bytes(mutant)
        signal.alarm(SECONDS)
        disk = read_disk(target)
        read_rest(target)
        signal.alarm(0)
        if isinstance(disk, str):
            counts["refused"] += 1
            continue
        counts["read"] += 1
        counts["changed"] += disk != original
        if (disk != original and counts["compared"] < MOST_COMPARED) or not number % 20:
            counts["compared"] += compared(target, disk)
    # Not getrusage(): there the memory of the process that started this one counts as well.
    status = Path("/proc/self/status").read_text()
    counts["KiB"] = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
