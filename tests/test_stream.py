"""One forward-only stream, into whatever standard output is, and every byte of it."""

import hashlib
import os
import re
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from support.disks import Recipe, write_disk
from support.fuse import FuseDisk
from support.program import TIMEOUT, command, run, start, stream

RECIPE = Recipe((6 << 20) + 100, [(0, "noise", 2 << 20), (4 << 20, "every4096", 2 << 20)])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RECIPE.write(tmp_path_factory.mktemp("stream") / "disk.raw")


@pytest.fixture(scope="module")
def image(disk: Path) -> bytes:
    return stream(disk, "-c", "4096")


def test_into_a_file(disk: Path, image: bytes, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        subprocess.run(command(disk, "-c", "4096"), stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == image


@pytest.mark.guarantee(
    1,
    "an output opened for appending, which takes no sendfile",
    "the image is appended, to the byte",
)
def test_into_a_file_opened_for_appending(disk: Path, image: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"before")
    with open(tmp_path / "out", "ab") as out:
        subprocess.run(command(disk, "-c", "4096"), stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"before" + image


def test_into_a_file_from_an_offset_on(disk: Path, image: bytes, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        os.write(out.fileno(), b"head")
        subprocess.run(command(disk, "-c", "4096"), stdout=out, check=True)
        os.write(out.fileno(), b"tail")
    assert (tmp_path / "out").read_bytes() == b"head" + image + b"tail"


def read_slowly(read: Callable[[int], bytes]) -> bytes:
    """Take all there is in small bites, with a pause now and then."""
    taken: List[bytes] = []
    while True:
        data = read(7001)
        if not data:
            return b"".join(taken)
        taken.append(data)
        if len(taken) % 100 == 0:
            threading.Event().wait(0.001)


@pytest.fixture(params=["pipe", "socket"])
def channel(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "pipe":
        reader, writer = (os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb")))
        yield writer, lambda size: os.read(reader.fileno(), size)
    else:
        left, right = socket.socketpair()
        reader, writer = right.makefile("rb"), left.makefile("wb")
        left.close()  # the file object keeps the socket until it is closed itself
        yield writer, right.recv
        right.close()
    reader.close()
    writer.close()


@pytest.mark.guarantee(
    1, "a slow consumer, or a descriptor that does not block", "every byte arrives, in order"
)
@pytest.mark.parametrize("blocking", [True, False])
def test_into_a_slow_consumer(
    disk: Path,
    image: bytes,
    channel: Any,
    blocking: bool,
) -> None:
    writer, read = channel
    os.set_blocking(writer.fileno(), blocking)
    with start(disk, "-c", "4096", stdout=writer.fileno()) as program:
        writer.close()
        assert read_slowly(read) == image
        assert program.wait(TIMEOUT) == 0
        assert program.stderr.read() == b""


def calls(trace: Path, name: str) -> List[str]:
    return [line for line in trace.read_text().splitlines() if re.match(rf"[^(]*\b{name}\(", line)]


def trace(tmp_path: Path, *arguments: str) -> Path:
    """The system calls of a run into a pipe."""
    log = tmp_path / "trace"
    program = " ".join(str(word) for word in command(*arguments))
    shell = f"set -o pipefail; strace -f -o '{log}' {program} | cat > '{tmp_path}/out'"
    subprocess.run(["bash", "-c", shell], check=True, timeout=TIMEOUT)
    return log


def test_data_goes_by_sendfile_and_the_pipe_is_grown(tmp_path: Path) -> None:
    raw = Recipe(8 << 20, [(0, "noise", 8 << 20)]).write(tmp_path / "disk.raw")
    log = trace(tmp_path, str(raw))
    sent = sum(int(line.rsplit("=", 1)[1]) for line in calls(log, "sendfile"))
    assert sent == 7 << 20  # but for what the pipe holds at the end, which is copied
    assert any("F_SETPIPE_SZ, 1048576" in line for line in calls(log, "fcntl"))


def test_a_hole_is_never_read(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 64 << 20, [(32 << 20, b"x" * 70_000)])
    log = trace(tmp_path, str(raw))
    (opened,) = [line for line in calls(log, "openat") if str(raw) in line]
    fd = opened.rsplit("=", 1)[1].strip()
    reads = [line for line in calls(log, "preadv?2?") if f"({fd}," in line]
    read = sum(int(line.rsplit("=", 1)[1]) for line in reads)
    assert 0 < read <= 2 * 131072 + 16  # scan, copy, and a look at whether it is in memory


def test_data_file_raw_reads_nothing(tmp_path: Path) -> None:
    raw = Recipe(1 << 20, [(0, "noise", 1 << 20)]).write(tmp_path / "disk.raw")
    log = trace(tmp_path, "-f", "raw", str(raw), "-R")
    (opened,) = [line for line in calls(log, "openat") if str(raw) in line]
    fd = opened.rsplit("=", 1)[1].strip()
    assert not [line for line in calls(log, "(preadv?2?|sendfile)") if f"({fd}," in line]


def test_a_block_device(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    raw = Recipe((5 << 20) + 512, [(0, "noise", 1 << 20), (5 << 20, "noise", 512)]).write(
        tmp_path / "disk.raw"
    )
    assert stream(loop_device(raw)) == stream(raw)


def test_a_file_system_that_knows_no_holes(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = Recipe((3 << 20) + 5, [(2 << 20, "every4096", 1 << 20)]).write(tmp_path / "disk.raw")
    disk = fuse_disk(raw, direct=True, count=True)
    assert stream(disk.path) == stream(raw)
    scanned = {offset for offset, _ in disk.reads()}
    assert 0 in scanned  # the hole at the start was read, the file system does not report it


def test_names_are_bytes(tmp_path: Path, image: bytes, disk: Path) -> None:
    for name in ("-dash", "with space", 'a"b,c=d', "new\nline", "日本", b"\xff\xfe"):
        path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
        os.symlink(disk, path)
        # A leading dash needs the usual two before it.
        assert stream("-c", "4096", "--", os.fsencode(name), cwd=tmp_path) == image
        result = run("-c", "4096", path, env={"LC_ALL": "C", "PATH": os.environ["PATH"]})
        assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(image).digest()
