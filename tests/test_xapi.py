"""XAPI's calls: maps and sizes in JSON on descriptors, a socket as output, Python 3.6.

The disks are real qcow2 images; what XAPI's program reads through a block device comes from
a raw copy of each here, because the program only sees the raw content anyway.
"""

import glob
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

import pytest
from support.disks import noise, padded
from support.importer import Image, read_image
from support.program import COVERAGE, TIMEOUT, assert_refused, command, run, stream

OLDEST = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.6*/bin/python3")))
THEIRS = OLDEST[0] if OLDEST and not COVERAGE else None  # coverage does not follow that one
MIB = 1 << 20


def qemu(*arguments: str) -> bytes:
    return subprocess.check_output(arguments, timeout=TIMEOUT)


class Vdi(NamedTuple):
    """A disk as XAPI has it: the raw content, and what qemu-img says of its image."""

    raw: Path
    map: bytes
    info: bytes


def make_vdi(
    folder: Path,
    name: str,
    size: int,
    writes: List[str],
    cluster_size: int,
    snapshot_of: Optional[str] = None,
    subclusters: bool = False,
) -> Vdi:
    """A qcow2 image with some writes (qemu-io's words), and its three faces.

    snapshot_of     the name of the one that becomes its backing file
    """
    image = folder / f"{name}.qcow2"
    options = f"cluster_size={cluster_size}" + ",extended_l2=on" * subclusters
    below = ["-b", f"{snapshot_of}.qcow2", "-F", "qcow2"] if snapshot_of else []
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *below, str(image), str(size))
    for words in writes:
        qemu("qemu-io", "-f", "qcow2", "-c", words, str(image))
    raw = folder / f"{name}.raw"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw))
    return Vdi(
        raw,
        qemu("qemu-img", "map", "--output=json", str(image)),
        qemu("qemu-img", "info", "--output=json", str(image)),
    )


def export(vdi: Vdi, base: Optional[Vdi] = None, *options: str, base_map: bool = True) -> bytes:
    """Call the program as XAPI does."""
    arguments: List[Any] = [vdi.raw]
    texts = []
    if base:
        arguments += ["--diff", base.raw]
        if base_map:
            texts += [("--json-header-diff-map", base.map), ("--json-header-diff-info", base.info)]
    texts += [("--json-header-map", vdi.map), ("--json-header-info", vdi.info)]
    descriptors = []
    for option, text in texts:
        reader, writer = os.pipe()
        threading.Thread(target=write_all, args=(writer, text)).start()
        descriptors.append(reader)
        arguments += [option, str(reader)]
    left, right = socket.socketpair()
    program = subprocess.Popen(
        command(*arguments, *options, python=THEIRS),
        stdout=left.fileno(),
        stderr=subprocess.PIPE,
        pass_fds=descriptors,
    )
    left.close()
    for reader in descriptors:
        os.close(reader)
    with right, right.makefile("rb") as received:
        image = received.read()
    _, stderr = program.communicate(timeout=TIMEOUT)
    if program.returncode or stderr:
        raise AssertionError(f"{program.returncode}: {stderr.decode()}")
    return image


def write_all(fd: int, text: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(text)


def imported(image: bytes) -> Image:
    """The image as the importer reads it, which knows no zero flag."""
    parsed = read_image(io.BytesIO(image))
    assert not parsed.zeros
    return parsed


WRITES = ["write -P 1 0 300000", "write -z 65536 65536", "write -P 2 2M 64k", "write -P 3 5M 4096"]


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 512, 8 * MIB + 65536 + 1024])
def test_a_full_export(tmp_path: Path, size: int, cluster_size: int) -> None:
    vdi = make_vdi(tmp_path, "disk", size, [*WRITES, f"write -P 9 {size - 512} 512"], cluster_size)
    image = export(vdi)
    parsed = imported(image)
    assert parsed.over() == padded(vdi.raw.read_bytes())
    assert parsed.size == size
    assert parsed.cluster_size == cluster_size, "XAPI's copy takes the source's"
    assert imported(export(vdi, None, "-c", "64K")).cluster_size == 65536


# Name -> cluster size, and whether each cluster has 32 subclusters of its own.
SNAPSHOTS = {
    "clusters of 16 KiB": (16384, False),
    "subclusters of a sector": (16384, True),
    "subclusters of a page": (131072, True),
    "subclusters of 64 KiB": (2 * MIB, True),
}


@pytest.mark.parametrize("kind", SNAPSHOTS)
def test_a_snapshot_of_xcp_ng(tmp_path: Path, kind: str) -> None:
    """The disk is an overlay: its map has parts of clusters, from the image and from below."""
    size = 8 * MIB + 512
    cluster_size, subclusters = SNAPSHOTS[kind]
    below = [*WRITES, "write -P 5 6M 512k", f"write -P 9 {size - 512} 512"]
    base = make_vdi(tmp_path, "base", size, below, 65536)
    changed = [
        "write -P 4 3M 512",
        "write -P 6 3200000 4096",
        "write -P 7 131072 4096",  # a subcluster among those of the base
        "write -P 8 200704 65536",
        "write -z 6M 4096",
        "write -z 6500k 64k",
        "discard 2M 64k",
        f"write -P 3 {size - 1024} 512",
    ]
    disk = make_vdi(tmp_path, "disk", size, changed, cluster_size, "base", subclusters)
    content, before = padded(disk.raw.read_bytes()), base.raw.read_bytes()
    assert content != padded(before)
    full = imported(export(disk))
    assert (full.over(), full.cluster_size) == (content, cluster_size)
    for options, base_map in (([], True), ([], False), (["-c", "4K"], True), (["-c", "64K"], True)):
        difference = imported(export(disk, base, *options, base_map=base_map))
        assert difference.over(before) == content
        assert len(difference.data) * difference.cluster_size < len(full.data) * cluster_size
    again = imported(export(base, disk))  # back again: reverted to the snapshot
    assert again.over(disk.raw.read_bytes()) == padded(before)


def test_what_the_map_calls_data_is_not_read_before(tmp_path: Path) -> None:
    vdi = make_vdi(tmp_path, "disk", 4 * MIB, ["write -P 0 1M 64k", "write -P 7 2M 64k"], 65536)
    # Zeros that are stored as data: a scan would have dropped them.
    assert list(imported(export(vdi)).data) == [16, 32]


@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 512])
@pytest.mark.parametrize("sizes", [(65536, 65536), (65536, 4096), (512, 2 * MIB)])
def test_a_difference(tmp_path: Path, size: int, sizes: Any) -> None:
    base = make_vdi(tmp_path, "base", size, [*WRITES, "write -P 5 7M 64k"], sizes[0])
    changed = ["write -P 4 3M 1000", "write -P 1 2M 64k", "discard 7M 64k", "write -z 0 65536"]
    disk = make_vdi(
        tmp_path, "disk", size, [*WRITES, *changed, f"write -P 9 {size - 512} 512"], sizes[1]
    )
    parsed = imported(export(disk, base))
    assert parsed.over(base.raw.read_bytes()) == padded(disk.raw.read_bytes())
    full = imported(export(disk, base, base_map=False))
    assert full.over(base.raw.read_bytes()) == padded(disk.raw.read_bytes())


@pytest.mark.parametrize("base_map", [True, False])
@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 512])
def test_identical_disks_export_nothing(tmp_path: Path, size: int, base_map: bool) -> None:
    writes = [*WRITES, f"write -P 9 {size - 512} 512"]
    base = make_vdi(tmp_path, "base", size, writes, 65536)
    disk = make_vdi(tmp_path, "disk", size, writes, 65536)
    assert not imported(export(disk, base, base_map=base_map)).data


def test_a_disk_that_has_grown(tmp_path: Path) -> None:
    base = make_vdi(tmp_path, "base", 3 * MIB + 512, WRITES[:3], 65536)
    disk = make_vdi(tmp_path, "disk", 8 * MIB + 512, [*WRITES, "write -P 8 8M 512"], 65536)
    for first, second in ((disk, base), (base, disk)):
        parsed = imported(export(first, second))
        assert parsed.over(second.raw.read_bytes()) == padded(first.raw.read_bytes())


def test_extents_count_outwards(tmp_path: Path) -> None:
    vdi = make_vdi(tmp_path, "disk", 4 * MIB, ["write -P 7 1000448 1024"], 512)
    assert list(imported(export(vdi, None, "-c", "64K")).data) == [15]


def test_the_virtual_size_comes_from_info(tmp_path: Path) -> None:
    vdi = make_vdi(tmp_path, "disk", 4 * MIB, WRITES[:1], 65536)
    with open(vdi.raw, "ab") as file:
        file.write(noise(100_000))  # a block device is as large as its volume
    assert imported(export(vdi)).size == 4 * MIB
    os.truncate(vdi.raw, 3 * MIB)
    with pytest.raises(AssertionError, match="another disk"):
        export(vdi)


DESCRIPTORS = {
    "not open": (None, "Bad file descriptor"),
    "nothing": (b"", "not"),
    "text": (b"hello", "not"),
    "a list of numbers": (b"[1]", "entry 0"),
    "another dialect": (b'[{"offset": 0, "length": 1}]', "entry 0"),
    "an entry that is cut": (b'[{"start": 0, "len', "entry 0"),
    "negative": (b'[{"start": 0, "length": -1, "depth": 0, "zero": false, "data": true}]', "-1"),
    "an object": (b'{"start": 0}', "not"),
    "a size beyond all": (b'{"virtual-size": 1' + b"0" * 22 + b"}", "not"),
    "no truth values": (b'[{"start": 0, "length": 1, "data": 1, "zero": 0}]', "entry 0"),
}


@pytest.mark.parametrize("case", DESCRIPTORS)
@pytest.mark.parametrize("option", ["map", "info", "diff-map", "diff-info"])
def test_a_descriptor_that_holds_something_else(tmp_path: Path, option: str, case: str) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(100_000))
    text, words = DESCRIPTORS[case]
    reader, writer = os.pipe()
    write_all(writer, text or b"")
    base: List[Any] = ["--diff", raw] if option.startswith("diff") else []
    name = f"--json-header-{option}"
    if text is None:
        os.close(reader)
    try:
        fds = [] if text is None else [reader]
        result = run(raw, *base, name, "999" if text is None else str(reader), pass_fds=fds)
    finally:
        if text is not None:
            os.close(reader)
    # An info is one object: it has no entries to name.
    assert_refused(result, name, "" if text and option.endswith("info") else words)


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "99999999999999999999", ""])
def test_a_descriptor_that_is_no_number(tmp_path: Path, number: str) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(1000))
    result = run(raw, f"--json-header-map={number}")
    assert_refused(result, "--json-header-map", "descriptor")


def test_without_descriptors_it_is_the_raw_disk(tmp_path: Path) -> None:
    vdi = make_vdi(tmp_path, "disk", 4 * MIB, WRITES[:2], 65536)
    assert json.loads(vdi.info)["virtual-size"] == 4 * MIB
    assert imported(stream(vdi.raw)).over() == vdi.raw.read_bytes()


def test_a_map_without_its_info(tmp_path: Path) -> None:
    vdi = make_vdi(tmp_path, "disk", 4 * MIB, WRITES[:3], 65536)
    reader, writer = os.pipe()
    threading.Thread(target=write_all, args=(writer, vdi.map)).start()
    try:
        image = stream(vdi.raw, "--json-header-map", str(reader), pass_fds=[reader])
    finally:
        os.close(reader)
    assert imported(image).over() == vdi.raw.read_bytes()


@pytest.mark.guarantee(2, "a map of XAPI's that does not cover the disk", "it is not believed")
def test_a_map_that_does_not_cover_the_disk_is_not_believed(tmp_path: Path) -> None:
    vdi = make_vdi(tmp_path, "disk", 4 * MIB, [*WRITES[:3], "write -P 8 3M 64k"], 65536)
    entries = json.loads(vdi.map)
    for part in ([], entries[:1], entries[1:], [entry for entry in entries if entry["data"]]):
        partial = vdi._replace(map=json.dumps(part).encode())
        assert imported(export(partial)).over() == vdi.raw.read_bytes()


@pytest.mark.guarantee(
    1, "a socket whose reader pauses", "every byte arrives, or it ends by SIGPIPE"
)
def test_a_consumer_that_leaves_its_socket_unread(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(1024))
    left, right = socket.socketpair()
    program = subprocess.Popen(command(raw, "-c", "512"), stdout=left.fileno())
    left.close()
    right.recv(1000)
    time.sleep(0.3)
    right.close()
    assert program.wait(TIMEOUT) == -signal.SIGPIPE


def test_a_descriptor_that_is_missing(tmp_path: Path) -> None:
    """It must not be taken for the disk that is opened next."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"[]".ljust(1 << 20))
    words = ["--diff", str(disk), "--json-header-diff-map", "3"]
    assert_refused(run(disk, *words), "--json-header-diff-map", "Bad file descriptor")
