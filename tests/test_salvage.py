"""Disks that live or die, and secrets: --salvage, --live, --no-scan, --object."""

import io
import os
import re
import shutil
import socket
import struct
import time
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple

import pytest
from conftest import needs
from support.disks import noise, write_disk
from support.fuse import FuseDisk
from support.images import make_encrypted, overlay, shell
from support.importer import read_image
from support.nbd import Request, Rogue, free_port, make_certificates, nbdkit
from support.program import (
    TIMEOUT,
    Result,
    assert_failed,
    assert_refused,
    run,
    start,
    stream,
)
from support.pythons import pythons, version
from support.qcow2 import (
    COMPRESSED,
    KIB,
    MIB,
    NO_PROGRAMS,
    content,
    integer,
    judged,
    l2_table,
    make,
    patched,
    qemu_io,
)

FuseMaker = Callable[..., FuseDisk]
Ranges = Sequence[Tuple[int, int]]
DISK = noise(2 * MIB, 1) + bytes(MIB) + noise(MIB, 2) + bytes(MIB)


def without(disk: bytes, ranges: Ranges) -> bytes:
    """The disk with zeros in place of some ranges (start, length)."""
    left = bytearray(disk)
    for at, length in ranges:
        left[at : at + length] = bytes(len(left[at : at + length]))
    return bytes(left)


def assert_salvaged(result: Result, ranges: Ranges, what: str = "became zeros") -> None:
    """Exit status 3, and a line for each range (start, length) that was lost."""
    lines = [
        f"qcow2_to_stdout.py: warning: {length} bytes from offset {at} can't be read"
        for at, length in ranges
    ]
    said = result.stderr.splitlines()
    assert [line.rsplit(":", 1)[0] for line in said] == lines, result.stderr
    assert all(what in line for line in said), result.stderr
    assert result.status == 3, result.status


def failing(*ranges: Tuple[int, int]) -> Callable[[Rogue, Request], bool]:
    """A server's answers where it can't read some ranges (start, length)."""

    def answer(rogue: Rogue, request: Request) -> bool:
        end = request.offset + request.length
        hit = any(request.offset < at + size and at < end for at, size in ranges)
        if request.command == 0 and hit:
            rogue.chunk(request, 32769, struct.pack(">IH", 5, 0))
        return request.command == 0 and hit

    return answer


# What can't be read


def test_a_healthy_disk_is_as_without_the_option(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", len(DISK), [(0, DISK)])
    for options in ([], ["-c", "4K"], ["--no-scan"], ["--measure"]):
        assert stream("--salvage", raw, *options) == stream(raw, *options)


@pytest.mark.guarantee(5, "bad sectors, with `--salvage`", "zeros, each range named, exit 3")
@pytest.mark.parametrize("at", [0, 511, 70_000, 2 * MIB - 1, 2 * MIB, 5 * MIB - 1])
@pytest.mark.parametrize("options", [[], ["-c", "512"], ["-c", "2M"], ["--no-scan"]])
def test_a_sector_of_a_file(
    tmp_path: Path, fuse_disk: FuseMaker, at: int, options: List[str]
) -> None:
    """Just that is lost, wherever it lies; its neighbours are not."""
    raw = write_disk(tmp_path / "raw", len(DISK), [(0, DISK)])
    disk = fuse_disk(raw, direct=True, error_at=at)
    lost = [(at // 512 * 512, 512)]
    result = run("--salvage", disk.path, *options)
    assert_salvaged(result, lost)
    assert content(result.stdout) == without(DISK, lost)
    assert run(disk.path, *options).status == 1


def test_the_last_sector_that_a_disk_cuts(tmp_path: Path, fuse_disk: FuseMaker) -> None:
    raw = write_disk(tmp_path / "raw", MIB + 700, [(0, noise(MIB + 700))])
    disk = fuse_disk(raw, direct=True, error_at=MIB + 690)
    result = run("--salvage", disk.path)
    assert_salvaged(result, [(MIB + 512, 188)])
    assert content(result.stdout)[: MIB + 512] == noise(MIB + 700)[: MIB + 512]
    assert not any(content(result.stdout)[MIB + 512 :])


@pytest.mark.parametrize("block", [1, 512, 4096, 65536])
def test_the_unit_is_a_servers_smallest_block(tmp_path: Path, block: int) -> None:
    """Several ranges, one line for each, in order; those that touch are one."""
    bad = [(3 * MIB + 100, 1), (512, 1), (1024, 512), (70_000, 140_000), (4 * MIB - 1, 1)]
    unit = max(block, 512)
    infos = [
        struct.pack(">HQH", 0, len(DISK), 0x81),
        struct.pack(">HIII", 3, block, 65536, 32 * MIB),
    ]
    sectors = sorted({at // unit for start, size in bad for at in range(start, start + size)})
    lost: List[Tuple[int, int]] = []
    for sector in sectors:
        if lost and sum(lost[-1]) == sector * unit:
            lost[-1] = lost[-1][0], lost[-1][1] + unit
        else:
            lost.append((sector * unit, unit))
    with Rogue(tmp_path, DISK, failing(*bad), infos=infos) as rogue:
        for options in ([], ["-m", "1"], ["--no-scan"]):
            result = run("--salvage", rogue.uri, *options, env=NO_PROGRAMS)
            assert_salvaged(result, lost)
            assert content(result.stdout) == without(DISK, lost)
        measured = run("--salvage", rogue.uri, "--measure", env=NO_PROGRAMS)
        assert_salvaged(measured, lost)
        size = int(re.findall(rb"required size: (\d+)", measured.stdout)[0])
        assert size == len(run("--salvage", rogue.uri, env=NO_PROGRAMS).stdout)


@pytest.mark.parametrize("python", pythons(), ids=version)
def test_every_python_salvages(tmp_path: Path, python: str) -> None:
    with Rogue(tmp_path, DISK, failing((70_000, 140_000))) as rogue:
        result = run("--salvage", rogue.uri, env=NO_PROGRAMS, python=python)
    lost = [(69632, 140_800)]
    assert_salvaged(result, lost)
    assert content(result.stdout) == without(DISK, lost)


def test_a_server_that_dies_can_not_be_salvaged(tmp_path: Path) -> None:
    def die(rogue: Rogue, request: Request) -> bool:
        if request.command == 0 and request.offset + request.length > MIB:
            rogue.sock.shutdown(socket.SHUT_RDWR)
        return False

    with Rogue(tmp_path, DISK, die) as rogue:
        assert_failed(run("--salvage", rogue.uri, env=NO_PROGRAMS), "cannot read", "at offset")


def test_a_large_range_is_one_range(tmp_path: Path) -> None:
    """Some thousand sectors that fail take a few MiB and seconds, however they are found."""
    disk = noise(MIB, 3) * 12
    lost = [(MIB, 10 * MIB)]
    with Rogue(tmp_path, disk, failing(*lost)) as rogue:
        result = run("--salvage", rogue.uri, env=NO_PROGRAMS)
        assert_salvaged(result, lost)
        assert content(result.stdout) == without(disk, lost)
        # Each sector once alone, and as often again in larger and larger pieces.
        assert len(rogue.requests) < 2.2 * 10 * MIB // 512


@pytest.mark.parametrize("kind", ["vmdk", "vdi"])
def test_a_sector_of_a_foreign_image(tmp_path: Path, fuse_disk: FuseMaker, kind: str) -> None:
    raw = write_disk(tmp_path / "raw", 4 * MIB, [(0, noise(4 * MIB))])
    image = tmp_path / f"a.{kind}"
    shell("qemu-img", "convert", "-f", "raw", "-O", kind, raw, image)
    place = image.read_bytes().index(raw.read_bytes()[2 * MIB : 2 * MIB + 512])
    disk = fuse_disk(image, direct=True, error_at=place + 5)
    result = run("--salvage", "-f", kind, disk.path)
    assert_salvaged(result, [(2 * MIB, 512)])
    assert content(result.stdout) == without(raw.read_bytes(), [(2 * MIB, 512)])


def test_a_stream_can_not_be_salvaged() -> None:
    assert_refused(run("--salvage", "-", "--size", "1M"), "--salvage")


# Of a qcow2 image


def test_a_sector_of_a_qcow2_image(tmp_path: Path, fuse_disk: FuseMaker) -> None:
    """Named by its place in the disk, which is not that in the file."""
    image = make(tmp_path / "a.qcow2", 8 * MIB)
    qemu_io(image, "write -P 5 6M 1M", "write -P 4 1M 64k")
    first = integer(image, l2_table(image) + 8 * (6 * MIB // 65536)) & (1 << 56) - 512
    disk = fuse_disk(image, direct=True, error_at=first + 100_000)
    result = run("--salvage", "-f", "qcow2", disk.path, env=NO_PROGRAMS)
    lost = [(6 * MIB + 99840, 512)]
    assert_salvaged(result, lost)
    assert content(result.stdout) == without(judged(image), lost)


@pytest.mark.guarantee(
    5, "a bad sector in a compressed cluster", "all of the cluster is zeros, and named"
)
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_compressed_cluster_is_lost_as_a_whole(
    tmp_path: Path, fuse_disk: FuseMaker, kind: str
) -> None:
    """One that can't be read, and one that can't be inflated."""
    image = make(tmp_path / "a.qcow2", 4 * MIB, f"compression_type={kind}")
    text = tmp_path / "text"
    for number in range(4):
        text.write_bytes(b"".join(b"%09d" % (7**at % 10**9) for at in range(number, number + 8000)))
        qemu_io(image, f"write -c -s {text} {number * 256}k 64k")
    whole = judged(image)
    entry = integer(image, l2_table(image) + 8 * 8)
    assert entry & COMPRESSED
    place = entry & (1 << 54) - 1
    disk = fuse_disk(image, direct=True, error_at=place + 2000)
    lost = [(512 * KIB, 64 * KIB)]
    result = run("--salvage", "-f", "qcow2", disk.path, env=NO_PROGRAMS)
    # Its neighbour in the file has a part of the sector.
    assert result.status == 3
    assert content(result.stdout)[512 * KIB : 576 * KIB] == bytes(64 * KIB)
    patched(image, place, bytes(64))
    for options in ([], ["-c", "4K"], ["--no-scan"]):
        result = run("--salvage", "-f", "qcow2", image, *options, env=NO_PROGRAMS)
        assert_salvaged(result, lost)
        assert content(result.stdout) == without(whole, lost)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_failing_disk_is_compressed(tmp_path: Path, fuse_disk: FuseMaker, kind: str) -> None:
    """A raw one, and a compressed image, of which nothing is passed through unread."""
    text = noise(2 * MIB, 5).hex().encode()
    raw = write_disk(tmp_path / "raw", 4 * MIB, [(0, text)])
    disk = fuse_disk(raw, direct=True, error_at=MIB + 690)
    result = run("--salvage", "--compress", kind, disk.path, env=NO_PROGRAMS)
    lost = [(MIB + 512, 512)]
    assert_salvaged(result, lost)
    whole = raw.read_bytes()
    image = tmp_path / "out.qcow2"
    image.write_bytes(result.stdout)
    assert judged(image) == without(whole, lost)
    assert len(result.stdout) < 3 * MIB

    source = tmp_path / "a.qcow2"
    options = f"compression_type={kind}"
    shell("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, source)
    entry = integer(source, l2_table(source) + 8 * 8)
    assert entry & COMPRESSED
    patched(source, entry & (1 << 54) - 1, bytes(64))
    result = run("--salvage", "--compress", kind, "-f", "qcow2", source, env=NO_PROGRAMS)
    lost = [(512 * KIB, 64 * KIB)]
    assert_salvaged(result, lost)
    image.write_bytes(result.stdout)
    assert judged(image) == without(whole, lost)


@pytest.mark.parametrize("what", ["header", "L1 table", "L2 table"])
def test_metadata_that_can_not_be_read(tmp_path: Path, fuse_disk: FuseMaker, what: str) -> None:
    """Without it nobody knows where anything is: no image."""
    image = qemu_io(make(tmp_path / "a.qcow2", 8 * MIB), "write -P 5 6M 1M")
    place = {"header": 10, "L1 table": integer(image, 40), "L2 table": l2_table(image)}[what]
    disk = fuse_disk(image, direct=True, error_at=place)
    result = run("--salvage", "-f", "qcow2", disk.path, env=NO_PROGRAMS)
    assert_refused(result, "cannot read", "Input/output error")


def test_a_truncated_image_can_not_be_salvaged(tmp_path: Path) -> None:
    image = qemu_io(make(tmp_path / "a.qcow2", 8 * MIB), "write -P 5 0 1M")
    os.truncate(image, image.stat().st_size - 300 * KIB)
    assert_refused(run("--salvage", "-f", "qcow2", image, env=NO_PROGRAMS), "truncated")


# In an overlay or a difference


def stored(image: bytes) -> Tuple[List[int], List[int]]:
    """The clusters of a stream with data, and those with the zero flag."""
    read = read_image(io.BytesIO(image))
    return sorted(read.data), sorted(read.zeros)


LOST = (128 * KIB, 64 * KIB)  # the third cluster


@pytest.mark.guarantee(5, "the same in an overlay", "explicit zeros, never the old data")
@pytest.mark.parametrize("how", ["--diff", "--layout", "--bitmap"])
@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_what_is_lost_hides_the_backing_file(
    tmp_path: Path, fuse_disk: FuseMaker, how: str, compat: str
) -> None:
    """Zeros that are said to be there: an unallocated cluster would show what is below."""
    monday = noise(MIB, 5)
    base = write_disk(tmp_path / "base.raw", MIB, [(0, monday)])
    changed = monday[: 128 * KIB] + noise(128 * KIB, 6) + monday[256 * KIB :]
    options: List[Any] = ["--salvage", "--compat", compat, "-b", base, "-F", "raw"]
    stdin = b""
    if how == "--bitmap":
        image = tmp_path / "a.qcow2"
        shell("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, image)
        shell("qemu-img", "bitmap", "--add", image, "b")
        write_disk(tmp_path / "new", 128 * KIB, [(0, changed[128 * KIB : 256 * KIB])])
        qemu_io(image, f"write -s {tmp_path}/new 128k 128k")
        options += ["-f", "qcow2", "--bitmap", "b"]
        place = integer(image, l2_table(image) + 16) & (1 << 56) - 512
        image.rename(tmp_path / "whole.qcow2")
        disk = fuse_disk(tmp_path / "whole.qcow2", direct=True, error_at=place + 9 * KIB)
        lost = [(137 * KIB, 512)]
        result = run(*options, disk.path, env=NO_PROGRAMS)
        expected: Tuple[List[int], List[int]] = ([2, 3], [])
    else:
        options += [how, base if how == "--diff" else "-"]
        stdin = b'[{"offset": 131072, "length": 131072}]' if how == "--layout" else b""
        with Rogue(tmp_path, changed, failing(LOST)) as rogue:
            result = run(*options, rogue.uri, env=NO_PROGRAMS, stdin=stdin)
        lost = [LOST]
        expected = ([3], [2]) if compat == "1.1" else ([2, 3], [])
    assert_salvaged(result, lost)
    assert stored(result.stdout) == expected
    (tmp_path / "o.qcow2").write_bytes(result.stdout)
    assert judged(tmp_path / "o.qcow2") == without(changed, lost)


def test_what_is_lost_is_data_in_a_bare_difference(tmp_path: Path) -> None:
    """Importers write it over the base, and know no zero flag."""
    base = write_disk(tmp_path / "base.raw", MIB, [(0, noise(MIB, 5))])
    with Rogue(tmp_path, noise(MIB, 5), failing(LOST)) as rogue:
        result = run("--salvage", rogue.uri, "--diff", base, env=NO_PROGRAMS)
    assert_salvaged(result, [LOST])
    assert stored(result.stdout) == ([2], [])


def test_what_is_lost_of_both_is_no_match(tmp_path: Path) -> None:
    """Nobody knows whether it was the same: zeros of the disk must not show the old data."""
    disk = noise(MIB, 5)
    (tmp_path / "two").mkdir()
    with Rogue(tmp_path, disk, failing(LOST)) as one, Rogue(
        tmp_path / "two", disk, failing(LOST)
    ) as two:
        words = ["--salvage", one.uri, "--diff", two.uri, "-b", "x", "-F", "raw"]
        result = run(*words, env=NO_PROGRAMS)
    assert result.status == 3
    assert stored(result.stdout) == ([], [2])
    assert len(result.stderr.splitlines()) == 2


def test_what_is_lost_where_base_is_zeros(tmp_path: Path) -> None:
    """Explicit zeros there too, whatever the base is."""
    base = write_disk(tmp_path / "base.raw", MIB)
    with Rogue(tmp_path, noise(MIB, 5), failing(LOST)) as rogue:
        words = ["--salvage", rogue.uri, "--diff", str(base), "-b", str(base), "-F", "raw"]
        result = run(*words, env=NO_PROGRAMS)
    assert_salvaged(result, [LOST])
    assert stored(result.stdout)[1] == [2]


def test_what_can_not_be_read_of_base_counts_as_different(tmp_path: Path) -> None:
    """The image is whole, and holds more than it would need to."""
    disk = noise(MIB, 5)
    raw = write_disk(tmp_path / "raw", MIB, [(0, disk)])
    with Rogue(tmp_path, disk, failing((128 * KIB + 9, 1))) as rogue:
        result = run("--salvage", raw, "--diff", rogue.uri, "-b", "x", "-F", "raw", env=NO_PROGRAMS)
    assert result.status == 0
    assert re.fullmatch(r"\S+ warning: 512 bytes from offset 131072 .*different.*\n", result.stderr)
    assert stored(result.stdout) == ([2], [])
    assert content(result.stdout)[128 * KIB : 192 * KIB] == disk[128 * KIB : 192 * KIB]
    (tmp_path / "two").mkdir()
    with Rogue(tmp_path / "two", disk, failing((128 * KIB + 9, 1))) as rogue:
        assert_failed(run(raw, "--diff", rogue.uri, env=NO_PROGRAMS), "Input/output error")


# Disks that change


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_disk_that_lives(tmp_path: Path, kind: str) -> None:
    """What changes is a warning, in one line, and the image is whole; else it is an error."""
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, noise(32 * MIB))])
    source, options = raw, ["-f", "raw"]
    if kind == "qcow2":
        source, options = overlay(tmp_path / "a.qcow2", raw, "raw"), ["-f", "qcow2"]
    for live in (["--live"], []):
        running = start(*options, *live, source, bufsize=0)
        head = running.stdout.read(4)
        with open(raw, "r+b") as file:
            file.seek(31 * MIB)
            file.write(b"changed")
        os.utime(raw)
        time.sleep(2.5 if live else 0)  # it looks every few seconds
        rest, stderr = running.communicate(timeout=TIMEOUT)
        if not live:
            assert_failed(Result(running.returncode, b"", stderr.decode()), "changed while")
            continue
        assert running.returncode == 0, stderr
        assert re.fullmatch(rb"\S+ warning: .*changed.*one moment.*\n", stderr), stderr
        (tmp_path / "o.qcow2").write_bytes(head + rest)
        disk = judged(tmp_path / "o.qcow2")
        assert len(disk) == 32 * MIB
        assert disk[: 16 * MIB] == noise(32 * MIB)[: 16 * MIB]


def test_a_disk_that_lives_and_does_not_change(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", MIB, [(0, noise(MIB))])
    assert stream("--live", raw) == stream(raw)


def test_a_disk_that_becomes_shorter_is_no_living_one(tmp_path: Path) -> None:
    """What is gone can't be read, with --live too: no image is padded."""
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, noise(32 * MIB))])
    running = start("--live", raw, bufsize=0)
    running.stdout.read(4)
    os.truncate(raw, MIB)
    running.stdout.read()
    stderr = running.stderr.read().decode()
    running.stdout.close()
    running.stderr.close()
    assert running.wait(TIMEOUT) == 1
    assert "disk.raw" in stderr.splitlines()[-1]


# No scan


def test_without_a_scan_everything_that_is_stored_is_data(tmp_path: Path) -> None:
    """Zeros that are stored, too; holes are none."""
    pieces = [(0, noise(MIB)), (2 * MIB, bytes(MIB))]
    raw = write_disk(tmp_path / "raw", 4 * MIB, pieces)
    image = stream("--no-scan", raw)
    assert content(image) == raw.read_bytes()
    assert stored(image) == ([*range(16), *range(32, 48)], [])
    qcow2 = qemu_io(make(tmp_path / "a.qcow2", 4 * MIB), "write -P 0 0 1M", "write -z 1M 1M")
    assert stored(stream("--no-scan", "-f", "qcow2", qcow2)) == (list(range(16)), [])
    base = qemu_io(make(tmp_path / "base.qcow2", 4 * MIB), "write -P 1 0 4M")
    top = qemu_io(make(tmp_path / "top.qcow2", 4 * MIB, over=base), "write -z 1M 1M")
    image = stream("--no-scan", "-f", "qcow2", top)
    assert stored(image) == ([*range(16), *range(32, 64)], [])
    assert content(image) == judged(top)


def test_without_a_scan_everything_is_read_once(tmp_path: Path, fuse_disk: FuseMaker) -> None:
    raw = write_disk(tmp_path / "raw", 8 * MIB, [(0, noise(4 * MIB)), (4 * MIB, bytes(4 * MIB))])
    disk = fuse_disk(raw, direct=True, count=True)
    assert content(stream("--no-scan", disk.path)) == raw.read_bytes()
    read = sum(length for _, length in disk.reads())
    assert 8 * MIB <= read <= 8 * MIB + 64 * KIB


def test_a_comparison_needs_a_scan(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB)
    assert_refused(run("--no-scan", raw, "--diff", raw), "--diff", "--no-scan")


# Secrets

SECRET = "correct horse battery staple"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(SECRET)
    return path


def luks(folder: Path, key: Path, kind: str) -> Tuple[str, Path]:
    """The option string of an encrypted image with data in it, and its file."""
    secret = ["--object", f"secret,id=s,file={key}"]
    path = folder / f"locked.{kind}"
    if kind == "luks":
        options = ["-o", "key-secret=s,iter-time=100"]
        opened = f"driver=luks,key-secret=s,file.filename={path}"
    else:
        options = ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"]
        opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    make_encrypted("qemu-img", "create", "-q", *secret, "-f", kind, *options, path, "8M")
    shell("qemu-io", *secret, "--image-opts", opened, "-c", "write -P 7 1M 1M")
    return opened, path


@pytest.mark.parametrize("kind", ["qcow2", "luks"])
def test_an_encrypted_disk(tmp_path: Path, key: Path, kind: str) -> None:
    """It is read decrypted; a missing key or option is an error that says so."""
    options, path = luks(tmp_path, key, kind)
    secret = f"secret,id=s,file={key}"
    image = stream("--object", secret, "--image-opts", options)
    raw = tmp_path / "raw"
    words = ["--object", secret, "--image-opts", options, "-O", "raw"]
    shell("qemu-img", "convert", *words, raw)
    assert content(image) == raw.read_bytes()
    assert content(image)[MIB : 2 * MIB] == b"\7" * MIB
    assert SECRET not in path.read_bytes().decode("latin-1")
    result = run("--image-opts", options)
    assert_refused(result, "cannot open", "secret")
    (tmp_path / "wrong").write_text("another one")
    wrong = f"secret,id=s,file={tmp_path}/wrong"
    result = run("--object", wrong, "--image-opts", options)
    assert_refused(result, "cannot open", "password")
    if kind == "qcow2":
        assert_refused(run("-f", "qcow2", path), "cannot open", "encrypt")
        base = ["--diff", str(path), "--diff-format", "qcow2"]
        assert_refused(run("--object", secret, "--image-opts", options, *base), "cannot open")


@pytest.mark.guarantee(7, "a secret in an option", "refused; those in files are shown nowhere")
def test_a_secret_is_not_shown(tmp_path: Path, key: Path) -> None:
    """Neither in a message, nor in a list of processes."""
    options = luks(tmp_path, key, "qcow2")[0]
    for definition in (f"secret,id=s,data={SECRET}", f"secret,data={SECRET},id=s"):
        result = run("--object", definition, "--image-opts", options)
        assert_refused(result, "data=", "file=")
        assert SECRET not in result.stderr
        assert "horse" not in result.stderr
    secret = f"secret,id=s,file={key}"
    raw = write_disk(tmp_path / "raw", 8 * MIB, [(0, noise(8 * MIB))])
    shell(
        "qemu-img",
        "convert",
        "-n",
        "--object",
        secret,
        "-f",
        "raw",
        raw,
        "--target-image-opts",
        options,
    )
    running = start("--object", secret, "--image-opts", options, bufsize=0)
    running.stdout.read(4)
    shown = b"".join(
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
    )
    assert str(key).encode() in shown
    assert b"horse" not in shown
    running.communicate(timeout=TIMEOUT)
    assert running.returncode == 0


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_an_object_that_qemu_does_not_know(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB)
    options = f"driver=raw,file.filename={raw}"
    result = run("--object", "nonsense,id=s", "--image-opts", options)
    assert_refused(result, "nonsense")
    result = run("--object", "secret,id=s,file=/nowhere", "--image-opts", options)
    assert_refused(result, "/nowhere", "No such file")


def test_nbd_over_tls_through_an_object(tmp_path: Path) -> None:
    """QEMU's own client, for what our URI can't say."""
    needs(shutil.which("certtool") is not None, "certtool (gnutls-bin)")
    good, other = (make_certificates(tmp_path / name) for name in ("good", "other"))
    disk = write_disk(tmp_path / "disk", MIB, [(0, noise(MIB))])
    port = free_port()
    words = ["--tls=require", f"--tls-certificates={good}", "--tls-verify-peer", "file", disk]
    with nbdkit(tmp_path, *words, port=port):
        server = f"server.type=inet,server.host=localhost,server.port={port}"
        options = f"driver=nbd,{server},tls-creds=t"
        for folder in (good, other):
            credentials = f"tls-creds-x509,id=t,endpoint=client,dir={folder}"
            result = run("--object", credentials, "--image-opts", options)
            if folder == good:
                assert (result.status, result.stderr) == (0, "")
                assert result.stdout == stream(disk)
            else:
                assert_refused(result, "cannot open")
