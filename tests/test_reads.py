"""How much is read, and by whom: counts, not seconds."""

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable, List

import pytest
from support.disks import Recipe, noise, write_disk
from support.fuse import FuseDisk
from support.program import (
    TIMEOUT,
    altered,
    assert_failed,
    command,
    run,
    start,
    stream,
    wait_until_it_catches,
)

MIB = 1 << 20


def bytes_read(fuse: FuseDisk) -> int:
    return sum(length for _, length in fuse.reads())


@pytest.fixture
def counted(fuse_disk: Callable[..., FuseDisk]) -> Callable[[Path], FuseDisk]:
    """A disk that sees every read: nothing is cached."""
    return lambda path: fuse_disk(path, direct=True, count=True)


def test_a_disk_full_of_data_is_read_little_more_than_once(
    tmp_path: Path, counted: Callable[[Path], FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, noise(32 * MIB))])
    disk = counted(raw)
    image = stream(disk.path)
    assert bytes_read(disk) <= 1.10 * 32 * MIB
    assert image == stream(raw)


def test_stored_zeros_are_read_once(tmp_path: Path, counted: Callable[[Path], FuseDisk]) -> None:
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, bytes(32 * MIB))])
    disk = counted(raw)
    stream(disk.path)
    assert bytes_read(disk) <= 1.05 * 32 * MIB


def test_a_mixed_disk_is_read_at_most_twice(
    tmp_path: Path, counted: Callable[[Path], FuseDisk]
) -> None:
    recipe = Recipe(32 * MIB, [(0, "every65536", 16 * MIB), (20 * MIB, "noise", 4 * MIB)])
    disk = counted(recipe.write(tmp_path / "disk.raw"))
    stream(disk.path)
    data = 12 * MIB
    assert bytes_read(disk) <= 1.10 * (32 * MIB + data)


def test_a_trusted_layout_is_read_once_and_a_raw_data_file_not_at_all(
    tmp_path: Path, counted: Callable[[Path], FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 16 * MIB, [(0, noise(16 * MIB))])
    layout = b'[{"offset": 1048576, "length": 8388608}]'
    disk = counted(raw)
    stream(disk.path, "--layout", "-", "--trust-layout", stdin=layout)
    assert 8 * MIB <= bytes_read(disk) <= 1.05 * 8 * MIB
    disk = counted(raw)
    stream(disk.path, "-R")
    assert bytes_read(disk) <= 1  # waits for the end of a write, and looks for a magic number
    disk = counted(raw)
    stream(disk.path, "--layout", "-", stdin=layout)
    assert bytes_read(disk) <= 1.10 * 8 * MIB


def test_holes_are_not_read_in_any_mode(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 512 * MIB, [(MIB, noise(MIB)), (300 * MIB, noise(MIB))])
    base = write_disk(tmp_path / "base.raw", 512 * MIB, [(MIB, noise(MIB))])
    for options in ([], ["--diff", str(base)], ["-c", "512"]):
        log = tmp_path / "trace"
        words = [str(word) for word in command(raw, *options)]
        subprocess.run(
            ["strace", "-f", "-e", "pread64,preadv,preadv2,sendfile", "-o", str(log), *words],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        counts = [line.rsplit("=", 1)[1] for line in log.read_text().splitlines() if "= " in line]
        read = sum(int(count) for count in counts if count.strip().isdigit())
        assert read < 8 * MIB


DISKS = {
    "dense": Recipe(24 * MIB + 7, [(0, "noise", 24 * MIB + 7)]),
    "zeros": Recipe(24 * MIB, [(0, "zeros", 24 * MIB), (20 * MIB, "last", 70_000)]),
    "mixed": Recipe(24 * MIB, [(0, "every65536", 8 * MIB), (9 * MIB, "every4096", 8 * MIB)]),
}


@pytest.mark.guarantee(3, "another number of readers", "the same bytes")
@pytest.mark.parametrize("disk", DISKS)
def test_the_same_bytes_from_any_number_of_readers(tmp_path: Path, disk: str) -> None:
    raw = DISKS[disk].write(tmp_path / "disk.raw")
    base = DISKS["mixed"].write(tmp_path / "base.raw")
    for options in ([], ["--diff", str(base)], ["-c", "512"], ["-c", "2M"]):
        images = [stream(raw, "-m", str(count), *options) for count in (1, 2, 4, 16)]
        assert len({hashlib.sha256(image).hexdigest() for image in images}) == 1


def test_a_far_source_that_nothing_keeps_is_read_once(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, noise(32 * MIB))])
    disk = fuse_disk(raw, latency=0.002, direct=True, count=True)
    assert stream(disk.path, "-m", "16") == stream(raw)
    assert bytes_read(disk) <= 1.10 * 32 * MIB


def test_the_same_bytes_from_a_far_source(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = Recipe(24 * MIB + 7, [(0, "noise", 9 * MIB), (12 * MIB, "every4096", 9 * MIB)]).write(
        tmp_path / "disk.raw"
    )
    far = fuse_disk(raw, latency=0.002)
    for count in (1, 4):
        assert stream(far.path, "-m", str(count)) == stream(raw)


SHORT = """
import os

def shortened(call):
    def short(fd, buffers, *rest):
        return call(fd, [memoryview(buffers[0])[:5000]], *rest)
    return short

pread, sendfile = os.pread, os.sendfile
os.pread = lambda fd, length, offset: pread(fd, min(length, 5000), offset)
os.sendfile = lambda out, fd, offset, count: sendfile(out, fd, offset, min(count, 5000))
if hasattr(os, "preadv"):
    os.preadv = shortened(os.preadv)
"""


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", "MemAvailable: much\n", "nonsense\n"])
def test_a_far_source_where_free_memory_is_unknown(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], text: str
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 4 * MIB, [(0, noise(4 * MIB))])
    (tmp_path / "meminfo").write_text(text)
    code = (
        "import builtins\n"
        "real = open\n"
        "def other(name, *rest, **more):\n"
        f"    return real({str(tmp_path / 'meminfo')!r} if name == '/proc/meminfo' else name,"
        " *rest, **more)\n"
        "builtins.open = other\n"
    )
    far = fuse_disk(raw, latency=0.003)
    assert stream(far.path, env=altered(tmp_path, code)) == stream(raw)


@pytest.mark.guarantee(2, "a file system whose reads are short", "reads go on to their end")
def test_short_reads_are_read_to_their_end(tmp_path: Path) -> None:
    # A FUSE file can't show this: the kernel takes a short answer for the file's end.
    raw = Recipe(3 * MIB, [(0, "every4096", 2 * MIB)]).write(tmp_path / "disk.raw")
    base = Recipe(3 * MIB, [(0, "every65536", 2 * MIB)]).write(tmp_path / "base.raw")
    short = altered(tmp_path, SHORT)
    for options in ([], ["-c", "2M"], ["--diff", str(base)]):
        assert stream(raw, *options, env=short) == stream(raw, *options)


@pytest.mark.parametrize("cluster_size", [4096, 8192])
def test_what_lies_between_small_clusters_need_not_be_readable(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], cluster_size: int
) -> None:
    raw = write_disk(tmp_path / "disk.raw", MIB, [(0, noise(MIB))])
    layout = [
        {"offset": 65536 - cluster_size, "length": cluster_size},
        {"offset": 65536 + cluster_size, "length": cluster_size},
    ]
    disk = fuse_disk(raw, error_at=65536 + 100, direct=True)
    options = ["--layout", "-", "-c", str(cluster_size)]
    text = json.dumps(layout).encode()
    assert stream(disk.path, *options, stdin=text) == stream(raw, *options, stdin=text)


def test_a_file_system_that_answers_short(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    """As it may where reads bypass the page cache; sendfile then takes it for the end."""
    raw = write_disk(tmp_path / "disk.raw", 20 * MIB, [(0, noise(20 * MIB))])
    disk = fuse_disk(raw, direct=True, short=65536)
    assert stream(disk.path) == stream(raw)


@pytest.mark.parametrize("readers", ["1", "4"])
def test_a_read_error_ends_it_promptly_with_the_offset(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], readers: str
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 64 * MIB, [(0, bytes(64 * MIB))])
    bad = 9 * MIB
    disk = fuse_disk(raw, error_at=bad, direct=True, count=True)
    result = run(disk.path, "-m", readers)
    assert result.stdout == b""
    assert_failed(result, "cannot read", "Input/output error")
    offset = int(result.stderr.split("at offset ")[1].split(":")[0])
    assert offset <= bad < offset + 4 * MIB
    assert bytes_read(disk) < 48 * MIB


def test_an_interrupt_ends_it_while_readers_wait(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 64 * MIB, [(0, bytes(64 * MIB))])
    program = start(fuse_disk(raw, latency=1.0, direct=True).path)
    wait_until_it_catches(program, signal.SIGUSR1)
    time.sleep(2)
    program.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert program.wait(TIMEOUT) == -signal.SIGTERM
    assert time.monotonic() - began < 30
    program.communicate()


def peak_memory(*arguments: str) -> int:
    """Peak RSS in bytes of a run whose image nobody keeps."""
    words: List[str] = [str(word) for word in command(*arguments)]
    code = "import resource, subprocess, sys\n" \
           "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n" \
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"  # fmt: skip
    return int(subprocess.check_output(["python3", "-c", code, *words], timeout=TIMEOUT))


@pytest.mark.guarantee(9, "the worst map that a disk can have", "a few bits per cluster")
def test_memory_is_bounded_on_a_worst_case_map(tmp_path: Path) -> None:
    small = write_disk(tmp_path / "small.raw", 512)
    raw = Recipe(256 * MIB, [(0, "every512", 256 * MIB)]).write(tmp_path / "disk.raw")
    clusters = 256 * MIB // 512
    grown = peak_memory(str(raw), "-c", "512") - peak_memory(str(small), "-c", "512")
    assert grown < 12 * MIB + clusters  # buffers, and less than a byte for each cluster


def test_memory_of_a_layout_does_not_depend_on_its_script(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 64 * MIB)
    peaks = []
    for name in ("disk", "d\u00efsk", "\u78c1\u76d8", "\U0001f4be"):
        entry = {"start": 0, "length": 4096, "depth": 0, "zero": False, "data": True}
        entries = [{**entry, "filename": name * (48 // len(name.encode()))}] * 100_000
        (tmp_path / "layout").write_text(json.dumps(entries, ensure_ascii=False), "utf-8")
        peaks.append(peak_memory(str(raw), "--layout", str(tmp_path / "layout")))
    assert max(peaks) - min(peaks) < 4 * MIB


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    few = write_disk(tmp_path / "few.raw", 256 * MIB, [(0, noise(MIB))])
    much = write_disk(tmp_path / "much.raw", 256 * MIB, [(0, noise(MIB) * 256)])
    assert peak_memory(str(much)) - peak_memory(str(few)) < 8 * MIB


SYSTEMS = {
    "has no preadv": "import os\ndel os.preadv\n",
    "has no RWF_NOWAIT": "import os\ndel os.RWF_NOWAIT\n",
    "knows no holes": "import os\ndel os.SEEK_DATA\ndel os.SEEK_HOLE\n",
    "refuses to look for holes": (
        "import errno, os\n"
        "lseek = os.lseek\n"
        "def refuse(fd, at, how):\n"
        "    if how in (os.SEEK_DATA, os.SEEK_HOLE): raise OSError(errno.EINVAL, 'no')\n"
        "    return lseek(fd, at, how)\n"
        "os.lseek = refuse\n"
    ),
    **{
        f"answers nonsense to a search for holes: {what}": (
            "import os\n"
            "lseek = os.lseek\n"
            "def answer(fd, at, how):\n"
            f"    return {value} if how == os.SEEK_{which} else lseek(fd, at, how)\n"
            "os.lseek = answer\n"
        )
        for what, which, value in (
            ("back", "DATA", "max(0, at - 65536)"),
            ("none at all", "HOLE", "at"),
            ("back again", "HOLE", "0"),
        )
    },
    "has no sendfile": "import os\ndel os.sendfile\n",
    "refuses sendfile": (
        "import errno, os\n"
        "def refuse(*rest): raise OSError(errno.EINVAL, 'no')\n"
        "os.sendfile = refuse\n"
    ),
    "takes no advice": "import os\ndel os.posix_fadvise, os.POSIX_FADV_RANDOM\n"
    "del os.POSIX_FADV_NORMAL, os.POSIX_FADV_WILLNEED\n",
    "is not Linux": "import sys\nsys.platform = 'freebsd14'\n",
    "can not ask a pipe": (
        "import fcntl\ndef refuse(*rest): raise OSError(25, 'no')\nfcntl.ioctl = refuse\n"
    ),
}


@pytest.mark.guarantee(
    3,
    "a system or a Python without holes, sendfile, preadv, advice or threads",
    "slower, the same bytes",
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_bytes_from_a_system_that(tmp_path: Path, system: str) -> None:
    poor = altered(tmp_path, SYSTEMS[system])
    base = DISKS["mixed"].write(tmp_path / "base.raw")
    for name, recipe in DISKS.items():
        raw = recipe.write(tmp_path / f"{name}.raw")
        for options in ([], ["--diff", str(base)], ["-c", "512"]):
            assert stream(raw, *options, env=poor) == stream(raw, *options)
