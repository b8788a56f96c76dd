"""The fault bench: for every fault of a disk, a kernel, a pipe or an operator, what happens.

Either the image is exact and the exit status 0, or the status is not 0 and one line says why.
The README's table of guarantees names these tests.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest
from conftest import needs, remove_partition
from support.disks import Recipe, noise, write_disk
from support.fuse import FuseDisk
from support.program import (
    PROGRAM,
    PYTHON,
    TIMEOUT,
    Result,
    altered,
    assert_failed,
    catches,
    command,
    run,
    start,
    stream,
    wait_until_it_catches,
)

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return Recipe(6 * MIB, [(0, "noise", 3 * MIB), (4 * MIB, "every4096", 2 * MIB)]).write(
        tmp_path / "disk.raw"
    )


def finish(program: Any) -> Result:
    stdout, stderr = program.communicate(timeout=TIMEOUT)
    return Result(program.returncode, stdout or b"", stderr.decode())


def assert_exact_or_failed(result: Result, expected: bytes) -> None:
    """What the whole bench is about."""
    if result.status == 0:
        assert result.stdout == expected
        assert result.stderr == ""
    elif result.status > 0:
        assert_failed(result)
    assert "Traceback" not in result.stderr


# Sources


@pytest.mark.guarantee(5, "a read error", "exit 1, with the offset")
@pytest.mark.parametrize("phase", ["scan", "copy"])
def test_eio_from_a_remote_disk(tmp_path: Path, phase: str) -> None:
    needs(shutil.which("nbdkit") is not None, "nbdkit")
    raw = write_disk(tmp_path / "disk.raw", 8 * MIB, [(0, noise(8 * MIB))])
    address, trigger = tmp_path / "nbd", tmp_path / "trigger"
    if phase == "scan":
        trigger.touch()
    server = subprocess.Popen(
        ["nbdkit", "-f", "-r", "-U", str(address), "--filter=error", "file", str(raw),
         "error-pread-rate=100%", f"error-file={trigger}", "error=EIO"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not address.exists():
            time.sleep(0.02)
        name = f"driver=nbd,server.type=unix,server.path={address}"
        program = start("--image-opts", name)
        if phase == "copy":
            program.stdout.read(100_000)
            trigger.touch()
        result = finish(program)
        assert_failed(result, "cannot read", "Input/output error")
        assert (phase == "copy") or not result.stdout
    finally:
        server.terminate()
        server.wait()


def test_a_source_whose_server_is_killed(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, noise(32 * MIB))])
    source = fuse_disk(raw, direct=True)
    program = start(source.path)
    program.stdout.read(100_000)
    source.kill()
    assert_failed(finish(program), "cannot read")


@pytest.mark.guarantee(2, "system calls that signals interrupt", "they go on")
def test_a_storm_of_signals_that_interrupt_system_calls(disk: Path, tmp_path: Path) -> None:
    expected = stream(disk)
    with open(tmp_path / "image", "wb") as out, open(tmp_path / "log", "wb") as log:
        program = start(disk, stdout=subprocess.PIPE, stderr=log, bufsize=0)
        head = program.stdout.read(1)
        taken = [head]
        for _ in range(200):
            program.send_signal(signal.SIGUSR1)
            taken.append(program.stdout.read(20_000))
        taken += iter(lambda: program.stdout.read(1 << 16), b"")
        assert program.wait(TIMEOUT) == 0
        program.stdout.close()
        out.write(b"".join(taken))
    assert (tmp_path / "image").read_bytes() == expected
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.guarantee(6, "a device that grows or shrinks", "exit 1")
def test_a_device_that_grows(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    raw = write_disk(tmp_path / "disk.raw", 4 * MIB, [(0, noise(4 * MIB))])
    device = loop_device(raw)
    program = start(device)
    program.stdout.read(100_000)
    os.truncate(raw, 5 * MIB)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    assert_failed(finish(program), device, "4194304 to 5242880")


@pytest.mark.guarantee(
    6, "a block device to which this host writes, or on which it discards", "exit 1 within seconds"
)
@pytest.mark.parametrize("change", ["write", "write to memory", "discard", "partition"])
@pytest.mark.parametrize("way", ["by its name", "standard input"])
def test_a_device_that_is_changed_while_it_streams(
    tmp_path: Path, loop_device: Callable[..., str], change: str, way: str
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 6 * MIB, [(0, noise(6 * MIB))])
    device = loop_device(raw)
    with open(device, "r+b", buffering=0) as somebody:
        if way == "standard input":
            program = start("-", "--size", "6M", stdin=somebody, bufsize=0)
            words = ["standard input"]
        else:
            program = start(device, bufsize=0)
            words = [device, "snapshot"]
        head = program.stdout.read(1)
        assert head == b"Q"
        if change == "discard":
            subprocess.run(["blkdiscard", "-o", "1M", "-l", "64K", device], check=True)
        elif change == "partition":
            needs(shutil.which("addpart") is not None, "addpart (util-linux)")
            subprocess.run(["addpart", device, "1", "2048", "8192"], check=True)
            try:
                with open(f"{device}p1", "r+b", buffering=0) as partition:
                    partition.write(b"new" * 1000)
            finally:
                remove_partition(device, 1)
        else:
            os.pwrite(somebody.fileno(), b"new" * 1000, 5 * MIB)
            if change == "write":
                os.fsync(somebody.fileno())
        assert_failed(finish(program), *words)


@pytest.mark.parametrize("way", ["by its name", "standard input", "qcow2"])
def test_a_device_to_which_was_written_before(
    tmp_path: Path, loop_device: Callable[..., str], way: str
) -> None:
    """And what was written is in memory still."""
    raw = write_disk(tmp_path / "disk.raw", 6 * MIB, [(0, noise(6 * MIB))])
    options, fmt = {
        "by its name": ([], []),
        "standard input": (["--size", "8M"], []),
        "qcow2": (["-f", "qcow2"], ["-f", "qcow2"]),
    }[way]
    if way == "qcow2":
        raw.write_bytes(stream(raw))
    os.truncate(raw, 8 * MIB)
    device = loop_device(raw)
    with open(device, "r+b", buffering=0) as somebody:
        for at in range(4):
            os.pwrite(somebody.fileno(), noise(MIB // 2 + at, at), 7 * MIB)  # behind an image
            with open(device, "rb") as opened:
                done = subprocess.run(
                    command("-" if way == "standard input" else device, *options),
                    stdin=opened,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    check=False,
                )
            assert (done.returncode, done.stderr) == (0, b"")
            with open(device, "rb") as opened:
                (tmp_path / "now.raw").write_bytes(opened.read())
            (tmp_path / "image").write_bytes(done.stdout)
            now = [tmp_path / "now.raw", tmp_path / "image"]
            subprocess.run(["qemu-img", "compare", *(fmt or ["-f", "raw"]), *now], check=True)


@pytest.mark.guarantee(
    6, "a file that is truncated, extended, overwritten or punched", "exit 1 within seconds"
)
@pytest.mark.parametrize("change", ["truncate", "extend", "overwrite", "punch", "touch"])
@pytest.mark.parametrize("at", [1, 100_000, 2 * MIB])
@pytest.mark.parametrize("way", ["by its name", "standard input"])
def test_a_file_that_is_changed_while_it_streams(
    disk: Path, change: str, at: int, way: str
) -> None:
    if way == "standard input":
        with open(disk, "rb") as opened:
            program = start("-", "--size", "6M", stdin=opened, bufsize=0)
        words = ["standard input"]
    else:
        program = start(disk, bufsize=0)
        words = ["disk.raw", "snapshot"]
    taken = 0
    while taken < at:
        taken += len(program.stdout.read(at - taken))
    if change == "truncate":
        os.truncate(disk, 5 * MIB)
    elif change == "extend":
        os.truncate(disk, 7 * MIB)
    elif change == "punch":
        subprocess.run(["fallocate", "-p", "-o", "0", "-l", "65536", str(disk)], check=True)
    elif change == "touch":
        os.utime(disk)
    else:
        with open(disk, "r+b") as file:
            file.write(b"!")
    assert_failed(finish(program), *words)


@pytest.mark.guarantee(6, "a write that is under way when the program starts", "it is waited for")
@pytest.mark.parametrize("python", [PYTHON, *filter(None, [shutil.which("pypy3")])])
def test_a_file_in_the_midst_of_a_write(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], python: str
) -> None:
    """The time of a change is that of the write's beginning, however long the write takes."""
    old, new = (noise(4 * MIB, seed) for seed in (1, 2))
    disk = write_disk(tmp_path / "disk.raw", 4 * MIB, [(0, old)])
    expected = stream(write_disk(tmp_path / "new.raw", 4 * MIB, [(0, new)]))
    slow = fuse_disk(tmp_path / "new.raw", latency=0.05)
    writes_at_once = (
        "import mmap, os, sys\n"
        "data = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)\n"
        "os.write(os.open(sys.argv[2], os.O_WRONLY), data)\n"
    )
    since = disk.stat().st_mtime_ns
    words = [sys.executable, "-c", writes_at_once, str(slow.path), str(disk)]
    with subprocess.Popen(words) as writer:
        while disk.stat().st_mtime_ns == since:
            time.sleep(0.001)
        program = start(disk, python=python)
        assert writer.poll() is None, "it is no longer at work"
        result = finish(program)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout == expected


@pytest.mark.guarantee(6, "a file on a network file system that another host changes", "exit 1")
@pytest.mark.parametrize("change", ["truncate", "extend", "overwrite"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_remote_file_that_another_host_changes(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], change: str, read_only: bool
) -> None:
    """Of a network file system the kernel keeps size and times for a while: it must ask."""
    raw = write_disk(tmp_path / "disk.raw", 6 * MIB, [(0, noise(6 * MIB))])
    remote = fuse_disk(raw, attr_timeout=300, read_only=read_only)
    program = start(remote.path)
    program.stdout.read(100_000)
    changes_on_the_server(raw, change)
    assert_failed(finish(program), str(remote.path), "snapshot")


@pytest.mark.parametrize("change", ["extend", "overwrite"])
def test_a_remote_file_that_another_host_has_changed(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], change: str
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 6 * MIB, [(0, noise(6 * MIB))])
    remote = fuse_disk(raw, attr_timeout=300, read_only=True)
    assert remote.path.stat().st_size == 6 * MIB
    changes_on_the_server(raw, change)
    assert stream(remote.path) == stream(raw)


def changes_on_the_server(raw: Path, change: str) -> None:
    if change == "truncate":
        os.truncate(raw, 5 * MIB)
    elif change == "extend":
        with open(raw, "ab") as file:
            file.write(noise(MIB, 2))
    else:
        with open(raw, "r+b") as file:
            file.write(b"!")


@pytest.mark.guarantee(6, "a file that is replaced or deleted", "the open one is read to its end")
def test_a_file_that_is_replaced_is_read_to_its_end(disk: Path, tmp_path: Path) -> None:
    expected = stream(disk)
    program = start(disk, bufsize=0)
    head = program.stdout.read(1)
    other = write_disk(tmp_path / "other", 6 * MIB, [(0, noise(6 * MIB, 9))])
    os.rename(other, disk)  # the open file is still the old one
    image = head + b"".join(iter(lambda: program.stdout.read(1 << 16), b""))
    assert finish(program).status == 0
    assert image == expected


@pytest.mark.guarantee(2, "sectors of 4 KiB, an odd number of them", "they are read")
@pytest.mark.parametrize("sectors", [1, 255, 1025])
def test_a_device_with_sectors_of_4_kib(
    tmp_path: Path, loop_device: Callable[..., str], sectors: int
) -> None:
    size = sectors * 4096
    raw = write_disk(tmp_path / "disk.raw", size, [(0, noise(size // 2)), (size - 1, b"z")])
    device = loop_device(raw, "--sector-size", "4096", "--direct-io=on")
    assert stream(device) == stream(raw)


@pytest.mark.guarantee(
    2, "a disk whose partition was written after the disk was cached", "it is read anew"
)
def test_a_disk_that_was_read_before_its_partition_was_written(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    """The kernel remembers what it has read of each, and one does not see the other's writes."""
    needs(shutil.which("addpart") is not None, "addpart (util-linux)")
    raw = write_disk(tmp_path / "disk.raw", 8 * MIB, [(0, noise(8 * MIB))])
    device = loop_device(raw)
    with open(device, "rb") as somebody:  # who has it open, so that nothing is forgotten
        before = somebody.read()
        base = write_disk(tmp_path / "base.raw", 8 * MIB, [(0, before)])
        subprocess.run(["addpart", device, "1", "2048", "8192"], check=True)
        try:
            with open(f"{device}p1", "r+b", buffering=0) as partition:
                partition.write(b"new" * 100_000)
                os.fsync(partition.fileno())
            image = stream(device)
            difference = stream(device, "--diff", base)
            with open(device, "rb") as opened:
                done = subprocess.run(
                    command("-", "--size", "8M"), stdin=opened, stdout=subprocess.PIPE, check=True
                )
        finally:
            remove_partition(device, 1)
    assert raw.read_bytes() != before
    assert image == done.stdout == stream(raw)
    assert difference == stream(raw, "--diff", base)


def test_a_deleted_file(disk: Path) -> None:
    expected = stream(disk)
    program = start(disk, bufsize=0)
    head = program.stdout.read(1)
    disk.unlink()
    image = head + b"".join(iter(lambda: program.stdout.read(1 << 16), b""))
    assert finish(program).status == 0
    assert image == expected


# Outputs


def interesting_bytes() -> List[int]:
    """Inside the header, at every part's edges, in the first and the last data cluster."""
    cluster = 65536
    parts = [0, 1, 2, 3, 4, 5]  # header, refcount table, refcount block, L1, L2, data
    edges = {part * cluster + off for part in parts for off in (-1, 0, 1)}
    return sorted(edge for edge in edges | {4, 72, 112, 504, 5 * cluster + 100} if edge >= 0)


@pytest.mark.guarantee(5, "a consumer that closes, at any byte", "it ends by SIGPIPE, silently")
@pytest.mark.parametrize("at", interesting_bytes())
def test_a_reader_that_closes_at_an_interesting_byte(disk: Path, at: int) -> None:
    program = start(disk, bufsize=0)
    taken = 0
    while taken < at:
        taken += len(program.stdout.read(at - taken))
    program.stdout.close()
    assert program.wait(TIMEOUT) == -signal.SIGPIPE
    assert program.stderr.read() == b""
    program.stderr.close()


@pytest.mark.guarantee(
    5, "a consumer that goes with the end of the image still in its pipe", "it ends by SIGPIPE"
)
@pytest.mark.parametrize("missing", [1, 65536, 500_000])
def test_a_reader_that_closes_before_the_end(disk: Path, missing: int) -> None:
    """Even when all that is missing has been in the pipe already."""
    image = stream(disk)
    program = start(disk, bufsize=0)
    left = len(image) - missing
    while left:
        left -= len(program.stdout.read(left))
    time.sleep(0.2)  # all of it is written by now
    program.stdout.close()
    assert program.wait(TIMEOUT) == -signal.SIGPIPE
    program.stderr.close()


@pytest.mark.guarantee(5, "a consumer that takes just the image's length", "exit 0")
def test_a_reader_that_takes_no_more_than_the_image(disk: Path) -> None:
    image = stream(disk)
    pipeline = f'"$@" | head -c {len(image)} | sha256sum; echo ${{PIPESTATUS[0]}}'
    for _ in range(15):
        words = ["bash", "-c", pipeline, "bash", *(str(word) for word in command(disk))]
        digest, _, status = subprocess.check_output(words, text=True).split()
        assert (digest, status) == (hashlib.sha256(image).hexdigest(), "0")


def sockets(family: str) -> Any:
    """Two connected sockets."""
    if family == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if family == "large tcp":
            needs(os.geteuid() == 0, "root, for a large buffer")
            listener.setsockopt(socket.SOL_SOCKET, 33, 64 * MIB)  # SO_RCVBUFFORCE
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_socket_whose_reader_takes_no_more_than_the_image(disk: Path, family: str) -> None:
    image = stream(disk)
    for _ in range(5):
        ours, theirs = sockets(family)
        with ours, theirs:
            program = start(disk, stdout=ours.fileno())
            ours.close()
            taken = b""
            while len(taken) < len(image):
                taken += theirs.recv(len(image) - len(taken))
        assert taken == image
        assert finish(program).status == 0


def test_a_socket_whose_reader_reads_no_more(disk: Path) -> None:
    """With the end of the image in its queue, and the socket still open."""
    image = stream(disk)
    ours, theirs = socket.socketpair()
    with theirs:
        program = start(disk, stdout=ours.fileno())
        ours.close()
        left = len(image) - 50_000
        while left:
            left -= len(theirs.recv(left))
        theirs.shutdown(socket.SHUT_RD)
        assert finish(program).status == -signal.SIGPIPE


def overwrite(path: Path) -> None:
    """In place, so that the same pages get other bytes."""
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))


@pytest.mark.guarantee(
    2,
    "a source that is written to while the consumer still reads what was sent",
    "the image stays as it was",
)
@pytest.mark.parametrize("kind", ["pipe", "unix", "tcp", "large tcp"])
def test_what_was_sent_changes_no_more(tmp_path: Path, kind: str) -> None:
    """Not even if its reader dawdles until the program has ended and the source goes on."""
    raw = write_disk(tmp_path / "disk.raw", 48 * MIB, [(0, noise(48 * MIB))])
    image = stream(raw)
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        ours, theirs = sockets(kind)
        reader, writer = theirs.detach(), ours.detach()
    program = start(raw, stdout=writer)
    os.close(writer)
    left = {"pipe": 500_000, "unix": 30_000, "tcp": 60_000, "large tcp": 30 * MIB}[kind]
    with open(reader, "rb", buffering=0) as file:
        taken = b""
        while len(taken) < len(image) - left:
            taken += file.read(min(1 << 20, len(image) - left - len(taken)))
        assert finish(program).status == 0
        overwrite(raw)  # as a VM may that was paused for the backup
        taken += b"".join(iter(lambda: file.read(1 << 20), b""))
    assert taken == image


def test_what_was_sent_into_a_pipe_that_has_grown(tmp_path: Path) -> None:
    """More of it holds pages of the source then than were to be copied: it waits for them."""
    raw = write_disk(tmp_path / "disk.raw", 96 * MIB, [(0, noise(96 * MIB))])
    image = stream(raw)
    reader, writer = os.pipe()
    # As for a user who has enough large pipes: the program can't make this one larger.
    grow = "import fcntl\nreal = fcntl.fcntl\nfcntl.fcntl = lambda *a: a[1] == 1031 or real(*a)\n"
    program = start(raw, stdout=writer, env=altered(tmp_path, grow))
    os.close(writer)
    with open(reader, "rb", buffering=0) as file:
        taken = file.read(100_000)
        fcntl.fcntl(reader, 1031, 1 * MIB)  # F_SETPIPE_SZ
        while len(taken) < len(image) - 900_000:
            taken += file.read(min(1 << 20, len(image) - 900_000 - len(taken)))
        time.sleep(2.5)
        if program.poll() is not None:
            overwrite(raw)
        taken += b"".join(iter(lambda: file.read(1 << 20), b""))
    assert finish(program).status == 0
    assert hashlib.sha256(taken).digest() == hashlib.sha256(image).digest()


def test_a_small_image_that_nobody_reads(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 512, [(0, b"x")])
    program = start(raw)
    program.stdout.close()
    assert program.wait(TIMEOUT) == -signal.SIGPIPE
    program.stderr.close()


def test_a_pipe_whose_reader_comes_later_is_not_waited_for_without_end(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 512, [(0, b"x")])
    reader, writer = os.pipe()
    subprocess.run(command(raw), stdout=writer, check=True, timeout=30)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == stream(raw)


@pytest.mark.guarantee(5, "a full file system", "exit 1, with the bytes written")
def test_a_full_file_system(disk: Path, small_file_system: Path) -> None:
    with open(small_file_system / "image", "wb") as out:
        result = finish(start(disk, stdout=out))
    assert_failed(result, "cannot write", "No space left on device", "after 1048576 bytes")


@pytest.mark.guarantee(5, "a socket that its peer resets", "exit 1, or it ends by SIGPIPE")
def test_a_socket_that_its_peer_resets(disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    program = start(disk, stdout=client.fileno())
    client.close()
    peer.recv(1000)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    result = finish(program)
    assert result.status in (1, -signal.SIGPIPE)
    assert result.stderr.count("\n") == (1 if result.status == 1 else 0)


def test_a_reader_that_dawdles(disk: Path) -> None:
    expected = stream(disk)
    program = start(disk, bufsize=0)
    taken = []
    for _ in range(5):
        time.sleep(0.3)
        taken.append(program.stdout.read(10_000))
    taken += iter(lambda: program.stdout.read(1 << 20), b"")
    assert b"".join(taken) == expected
    assert finish(program).status == 0


# The process


@pytest.mark.guarantee(
    5, "SIGINT, SIGTERM, SIGHUP, SIGQUIT at any moment", "it ends by that signal"
)
def test_every_signal_at_random_moments(disk: Path) -> None:
    """From the moment on that the program runs: before that, Python itself is starting."""
    dice = random.Random(4)
    ways: List[List[str]] = [[], ["-p"], ["-m", "1"], ["-c", "512"]]
    expected = [run(disk, *way).stdout for way in ways]
    for turn in range(40):
        signum = dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
        way = dice.randrange(len(ways))
        program = start(disk, *ways[way])
        wait_until_it_catches(program, signal.SIGUSR1)
        threading.Timer(dice.random() * 0.15, program.send_signal, [signum]).start()
        result = finish(program)
        if result.status == 0:
            assert result.stdout == expected[way], turn
        else:
            assert result.status == -signum != -signal.SIGUSR1, (turn, result.status, result.stderr)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("disk ")]
        assert all("%" in line or not line for line in lines), (turn, result.stderr)


def test_an_interrupt_while_modules_are_imported(disk: Path) -> None:
    """Between Python's own start and main(): no traceback either."""
    hits = 0
    for _ in range(60):
        program = start(disk)
        while not catches(program, signal.SIGINT):  # Python's own handler
            pass
        while catches(program, signal.SIGINT) and not catches(program, signal.SIGUSR1):
            pass
        was_early = not catches(program, signal.SIGUSR1)
        program.send_signal(signal.SIGINT)
        result = finish(program)
        assert (result.status, result.stderr) == (-signal.SIGINT, "")
        hits += was_early
        if hits == 3:
            return
    pytest.fail("no interrupt came in time")


@pytest.mark.guarantee(2, "SIGSTOP, then SIGCONT", "it goes on")
def test_stop_and_continue(disk: Path) -> None:
    expected = stream(disk)
    program = start(disk, bufsize=0)
    head = program.stdout.read(1)
    program.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    program.send_signal(signal.SIGCONT)
    image = head + b"".join(iter(lambda: program.stdout.read(1 << 16), b""))
    assert image == expected
    assert finish(program).status == 0


@pytest.mark.guarantee(
    5, "standard descriptors that are closed", "exit 1 without an output, else no difference"
)
@pytest.mark.parametrize("closed", [c for n in range(4) for c in itertools.combinations("012", n)])
def test_standard_descriptors_closed_in_every_combination(
    disk: Path, closed: Any, tmp_path: Path
) -> None:
    shell = 'exec "$@" ' + " ".join(f"{fd}>&-" for fd in closed)
    words = [str(word) for word in command(disk)]
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    if "1" in closed:
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.count(b"\n") == ("2" not in closed)
    else:
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == stream(disk)


@pytest.mark.guarantee(5, "a full stderr, or one that nobody reads", "the exit status says it")
@pytest.mark.parametrize("options", [[], ["-p"]])
def test_a_full_stderr(disk: Path, options: List[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(disk, *options), stdout=subprocess.PIPE, stderr=full, check=False
        )
        assert (done.returncode, done.stdout) == (0, stream(disk))
        done = subprocess.run(command(disk.with_name("none")), stderr=full, check=False)
        assert done.returncode == 1
        done = subprocess.run(command(disk, "-c", "7"), stderr=full, check=False)
        assert done.returncode == 2


@pytest.mark.parametrize("text", ["--help", "--version", "--measure"])
def test_text_into_a_full_device(disk: Path, text: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(disk, text), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("descriptors", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("options", [[], ["--diff", "BASE"]])
def test_few_descriptors(disk: Path, descriptors: int, options: List[str]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    base = write_disk(Path(f"{disk}.base"), 6 * MIB, [(0, noise(6 * MIB, 1))])
    options = [each.replace("BASE", str(base)) for each in options]
    result = run(disk, *options, preexec_fn=limit)
    if "qcow2_to_stdout" in result.stderr:  # Python itself needs some to start
        assert_exact_or_failed(result, stream(disk, *options))


@pytest.mark.guarantee(
    5, "little memory, few descriptors, few threads", "an exact image, or exit 1"
)
@pytest.mark.parametrize("megabytes", [24, 32, 48, 64, 96, 256, 1024])
def test_little_memory(disk: Path, megabytes: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * MIB, megabytes * MIB))

    result = run(disk, preexec_fn=limit)
    if result.status == 0 or result.stderr.startswith("qcow2_to_stdout"):
        assert_exact_or_failed(result, stream(disk))
    else:  # Python itself did not get so far
        assert result.stdout == b""


def test_a_limit_of_threads(disk: Path) -> None:
    """As in a container that may have few processes: one line says it, if threads are needed."""
    needs(os.geteuid() == 0, "root, to become somebody else")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    words = ["setpriv", "--reuid=65533", "--clear-groups", "--bounding-set=-all"]
    with open(PROGRAM, "rb") as program, open(disk, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(
            opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # what is cold is shared out
        done = subprocess.run(
            [*words, "/usr/bin/python3", "-", f"/proc/self/fd/{opened.fileno()}"],
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[opened.fileno()],
            preexec_fn=limit,
            check=False,
        )
    result = Result(done.returncode, done.stdout, done.stderr.decode())
    assert_exact_or_failed(result, stream(disk))


def test_a_storm_of_questions_how_far_it_is(disk: Path) -> None:
    """One signal's answer is not interrupted by that of the next."""
    program = start(disk, "-c", "512", stderr=subprocess.DEVNULL)
    wait_until_it_catches(program, signal.SIGUSR1)
    storm = f"while :; do kill -USR1 {program.pid} || exit; done 2> {os.devnull}"
    storms = [subprocess.Popen(["sh", "-c", storm]) for _ in range(2)]
    image = program.communicate(timeout=TIMEOUT)[0]
    for each in storms:
        each.wait()
    assert (program.returncode, image == stream(disk, "-c", "512")) == (0, True)


@pytest.mark.parametrize("options", [[], ["-p"]], ids=["SIGUSR1", "progress"])
def test_a_stderr_that_nobody_reads(
    disk: Path, fuse_disk: Callable[..., FuseDisk], options: List[str]
) -> None:
    """A parent that reads the image first must not wait for one who waits for it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    program = start(disk, *options, stderr=writer, bufsize=0)
    wait_until_it_catches(program, signal.SIGUSR1)
    program.send_signal(signal.SIGUSR1)
    assert program.stdout.read(1) == b"Q"
    program.send_signal(signal.SIGUSR1)
    os.close(writer)
    image = b"Q" + b"".join(iter(lambda: program.stdout.read(1 << 20), b""))
    assert (program.wait(TIMEOUT), image == stream(disk)) == (0, True)
    program.stdout.close()
    os.close(reader)


@pytest.mark.parametrize("phase", ["scan", "copy"])
@pytest.mark.parametrize("readers", ["1", "8"])
def test_a_signal_while_the_source_does_not_answer(
    disk: Path, fuse_disk: Callable[..., FuseDisk], readers: str, phase: str
) -> None:
    """There is nothing to clean up: it ends in the middle of a read."""
    shown = fuse_disk(disk, direct=True, latency=0.01)
    shown.path.open("rb").close()
    program = start(shown.path, "-m", readers, bufsize=0)
    wait_until_it_catches(program, signal.SIGUSR1)
    if phase == "copy":
        program.stdout.read(1)
    # It asks when nobody listens: what the server had begun to answer, not even SIGKILL ends.
    program.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    shown.server.send_signal(signal.SIGSTOP)
    os.waitpid(shown.server.pid, os.WUNTRACED)
    program.send_signal(signal.SIGCONT)
    try:
        taken = threading.Thread(target=program.stdout.read, daemon=True)
        taken.start()
        time.sleep(0.3)  # until it waits
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == -signal.SIGTERM
    finally:
        shown.server.send_signal(signal.SIGCONT)
    taken.join()
    assert program.stderr.read() == b""
    program.stdout.close()
    program.stderr.close()


@pytest.mark.guarantee(
    5, "a Python of which a part can't be loaded", "exit 1 before the first byte"
)
def test_a_python_that_lacks_a_part(disk: Path, tmp_path: Path) -> None:
    """What the end needs is loaded before the first byte leaves."""
    broken = "import sys\nsys.modules['termios'] = None\n"
    result = run(disk, env=altered(tmp_path, broken))
    assert (result.status, result.stdout) == (1, b"")
    assert "termios" in result.stderr


@pytest.mark.guarantee(3, "locale C, names that are no text", "no difference")
def test_locale_c_and_names_that_are_no_text(disk: Path, tmp_path: Path) -> None:
    expected = stream(disk)
    env = {"LC_ALL": "C", "PATH": os.environ["PATH"], "PYTHONUTF8": "0"}
    for name in ("Übung.raw", b"\xff\xfe.raw", "日本.raw"):
        path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
        os.link(disk, path)
        assert stream(path, env=env) == expected
        missing = run(path + b"x", env=env)
        assert_failed(missing, "No such file")


def test_two_runs_on_one_source(disk: Path) -> None:
    expected = stream(disk)
    first, second = start(disk), start(disk)
    assert finish(first).stdout == finish(second).stdout == expected


LATE_SECOND_THREAD = (
    "import _thread, time\n"
    "start, started = _thread.start_new_thread, []\n"
    "def late(*rest):\n"
    "    started.append(rest)\n"
    "    time.sleep(0.3 if len(started) > 1 else 0)\n"
    "    return start(*rest)\n"
    "_thread.start_new_thread = late\n"
)


def test_a_thread_that_begins_when_all_is_done(tmp_path: Path) -> None:
    """On a busy machine. The first thread does all the work meanwhile; then Python must not crash.

    What delays them is the system, by way of strace: a thread's first call, and the program's last.
    """
    disk = write_disk(tmp_path / "disk.raw", 5 * MIB, [(0, noise(5 * MIB))])
    words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=set_robust_list,exit_group"]
    words += ["-e", "inject=set_robust_list:delay_enter=600000"]
    words += ["-e", "inject=exit_group:delay_enter=1000000"]
    done = subprocess.run(
        [*words, *map(str, command(disk, "-m", "2"))],
        env=altered(tmp_path, LATE_SECOND_THREAD),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == stream(disk)


@pytest.mark.guarantee(3, "`python -I`, `-S`, `-O`, `-W error`", "no difference")
def test_under_a_python_without_extras(disk: Path) -> None:
    for flags in (["-I"], ["-S"], ["-O"], ["-OO"], ["-W", "error"], ["-X", "dev"], ["-B"]):
        done = subprocess.run(
            [PYTHON, *flags, str(PROGRAM), str(disk)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), flags
        assert done.stdout == stream(disk)


@pytest.mark.guarantee(5, "an error of the program itself", "exit 1, with its traceback")
def test_a_fault_of_the_program_itself_keeps_its_traceback(disk: Path, tmp_path: Path) -> None:
    """Whoever reports it can say where it happened."""
    broken = "import os\ndef fail(*rest): raise KeyError('what?')\nos.posix_fadvise = fail\n"
    result = run(disk, env=altered(tmp_path, broken))
    assert (result.status, result.stdout) == (1, b"")
    assert "Traceback" in result.stderr
    assert "os.posix_fadvise" in result.stderr
    assert "KeyError: 'what?'" in result.stderr


@pytest.mark.parametrize("way", ["-i", "PYTHONINSPECT"])
@pytest.mark.parametrize("arguments, status", [(["DISK"], 0), (["missing"], 1), (["--what"], 2)])
def test_under_a_python_that_stays(disk: Path, way: str, arguments: List[str], status: int) -> None:
    """Asked for commands after a program, Python reads them, and ends with their status."""
    done = subprocess.run(
        [PYTHON, *([way] if way == "-i" else []), str(PROGRAM),
         *(each.replace("DISK", str(disk)) for each in arguments)],
        input=b"print('an image?')\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **({} if way == "-i" else {way: "1"})},
        check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert done.stdout == (b"" if status else stream(disk))
    assert b"Traceback" not in done.stderr
