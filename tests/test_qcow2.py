"""Our own reader of qcow2: every feature gives the disk that QEMU sees, without QEMU.

The judge is `qemu-img convert`; the program has no other program to ask (an empty PATH). The same
images through a qemu-nbd must become the same stream, byte for byte.
"""

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from support import mutants
from support.disks import noise, write_disk
from support.fuse import FuseDisk
from support.images import as_raw, overlay, shell
from support.program import ROOT, altered, assert_refused, command, run, stream
from support.pythons import pythons, version
from support.qcow2 import (
    COMPRESSED,
    KIB,
    MIB,
    NO_PROGRAMS,
    compress,
    content,
    exported,
    extension,
    integer,
    judged,
    l2_table,
    make,
    parts,
    patched,
    qemu_io,
    scribble,
)

SIZE = 3 * MIB + 512
MUTANTS = int(os.environ.get("QCOW2_TEST_MUTANTS", "10000"))


def assert_read(image: Path) -> bytes:
    """The program alone, qemu-img, and the program with a qemu-nbd read the same disk."""
    native = stream("-f", "qcow2", image, env=NO_PROGRAMS)
    disk = judged(image)
    assert content(native) == disk
    name = str(image).replace(",", ",,")
    assert stream("--image-opts", f"driver=qcow2,file.filename={name}") == native
    return disk


# Features


@pytest.mark.parametrize("cluster_size", [512 << bits for bits in range(13)])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_versions_and_cluster_sizes(tmp_path: Path, compat: str, cluster_size: int) -> None:
    image = make(tmp_path / "a.qcow2", SIZE, f"compat={compat},cluster_size={cluster_size}")
    scribble(image, cluster_size, SIZE, 512)
    scribble(image, cluster_size + 1, SIZE, cluster_size)
    assert_read(image)


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("form", ["compat=0.10", "compression_type=zlib", "compression_type=zstd"])
def test_compressed_clusters(tmp_path: Path, form: str, cluster_size: int) -> None:
    """Some that shrink to nearly nothing, some that don't, and the last one is cut by the end."""
    text = Path(os.__file__).read_bytes() * 100
    raw = tmp_path / "a.raw"
    raw.write_bytes(text[: 5 * MIB // 2] + noise(MIB // 2) + b"\1" * MIB + text[:1024])
    image = tmp_path / "a.qcow2"
    options = f"{form},cluster_size={cluster_size}"
    shell("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    assert assert_read(image) == raw.read_bytes()
    scribble(image, cluster_size, 3 * MIB, 512)
    assert_read(image)


@pytest.mark.parametrize("cluster_size", [16 * KIB, 64 * KIB, 2 * MIB])
def test_subclusters_over_compressed_clusters_and_a_base(tmp_path: Path, cluster_size: int) -> None:
    size = 8 * MIB + 1536
    base = scribble(make(tmp_path / "base.qcow2", size), 1, size, 512)
    options = f"extended_l2=on,cluster_size={cluster_size}"
    image = make(tmp_path / "a.qcow2", size, options, base)
    compress(image, cluster_size, size, cluster_size)
    for seed in range(4):
        scribble(image, cluster_size + seed, size, max(512, cluster_size // 32))
    assert_read(image)


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "extended_l2=on"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_images(tmp_path: Path, mode: str, options: str) -> None:
    image = make(tmp_path / "a.qcow2", 10 * MIB, f"preallocation={mode},{options}")
    qemu_io(image, "write -P 5 1M 3M", "discard 2M 64k")
    assert_read(image)


@pytest.mark.parametrize("options", ["", ",data_file_raw=on", ",extended_l2=on"])
def test_an_external_data_file(tmp_path: Path, options: str) -> None:
    image = make(tmp_path / "a.qcow2", SIZE, f"data_file={tmp_path}/data{options}")
    qemu_io(image, "write -P 1 0 4k", "write -P 2 1M 70k", "write -z 1088k 64k", "discard 64k 64k")
    assert_read(image)


def test_a_data_file_that_is_shorter_than_the_disk(tmp_path: Path) -> None:
    """As QEMU reads it: a disk of any length may have an image made for it."""
    data = tmp_path / "data"
    image = make(tmp_path / "a.qcow2", MIB + 512, f"data_file={data}")
    qemu_io(image, f"write -P 1 {MIB} 512", "write -P 2 0 64k", "write -P 3 900k 64k")
    for length in (MIB + 100, MIB, 910 * KIB + 7, 0):
        os.truncate(data, length)
        assert exported(image) == judged(image)


def test_the_name_of_a_data_file_is_looked_for_from_the_current_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=d", "a.qcow2", "1M"]
    shell(*words, cwd=folder)
    shell("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "a.qcow2", cwd=folder)
    assert exported("a.qcow2", cwd=folder) == b"\7" * MIB
    for _ in range(2):
        result = run("-f", "qcow2", folder / "a.qcow2", cwd=tmp_path)
        assert_refused(result, "data file 'd'", "current folder")
        shutil.copy(folder / "d", tmp_path)  # the same, but who knows
    (folder / "d").unlink()
    assert exported(folder / "a.qcow2", cwd=tmp_path) == b"\7" * MIB


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_zeros_and_discards_over_data(tmp_path: Path, compat: str) -> None:
    """Whole clusters, with space and without; and what shows the base again in version 2."""
    base = qemu_io(make(tmp_path / "base.qcow2", 4 * MIB), "write -P 3 0 4M")
    image = make(tmp_path / "a.qcow2", 4 * MIB, f"compat={compat}", base)
    qemu_io(image, "write -P 1 0 1M", "write -z 128k 100k", "write -z -u 512k 200k")
    qemu_io(image, "discard 64k 64k", "discard 2M 1M", "write -z 3M 256k", "write -P 9 3100k 4k")
    assert_read(image)


def test_a_dirty_image(tmp_path: Path) -> None:
    """Of a VM that was killed: its reference counts are wrong, and nobody needs them to read."""
    image = make(tmp_path / "a.qcow2", 4 * MIB, "lazy_refcounts=on")
    writes = ["-c", "write -P 5 0 100k", "-c", "write -P 6 2M 1M", "-c", "flush", "-c", "abort"]
    words = ["qemu-io", "-f", "qcow2", *writes, str(image)]
    assert subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode < 0
    assert integer(image, 72) & 1
    before = image.read_bytes()
    assert exported(image) == as_raw(image).read_bytes()
    image.write_bytes(before)
    patched(image, 79, b"\3")  # corrupt as well
    disk = exported(image)
    assert disk[: 100 * KIB] + disk[2 * MIB : 3 * MIB] == b"\5" * 100 * KIB + b"\6" * MIB


NAMES = ["a b'c", "a:b", "a,b=c", "n\nl", '{"x"}', "ü", "-x", "%s", "a\\b", "b\udcfcd"]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_odd_characters(tmp_path: Path, name: str) -> None:
    """Of the image, and of the one below it, which is named from the folder of the image."""
    folder = tmp_path / "folder"
    folder.mkdir()
    base = qemu_io(make(folder / "base.qcow2", MIB), "write -P 3 0 1M")
    image = qemu_io(make(folder / "a.qcow2", MIB, over=base), "write -P 1 64k 64k")
    expected = judged(image)
    base.rename(folder / name)
    # Whatever is before a colon is a protocol, in backing names too.
    stored = os.fsencode("./" + name)
    place, size = integer(image, 8), integer(image, 16, 4)
    patched(image, place, stored + bytes(size - len(stored)))
    patched(image, 16, struct.pack(">I", len(stored)))
    image.rename(folder / (name + "2"))
    assert exported(folder / (name + "2")) == expected
    # A name that begins with a dash can't be an option there.
    where = name + "2" if name[0] != "-" else "./" + name + "2"
    assert exported(where, cwd=folder) == expected


def test_names_end_with_a_nul_byte(tmp_path: Path) -> None:
    base = qemu_io(make(tmp_path / "base.qcow2", MIB), "write -P 3 0 1M")
    image = make(tmp_path / "a.qcow2", MIB, over=base)
    place = integer(image, 8)
    patched(image, place + len(str(base)), b"\0junk")
    patched(image, 16, struct.pack(">I", len(str(base)) + 5))
    assert exported(image) == judged(image) == b"\3" * MIB
    patched(image, place, b"\0")
    assert exported(image) == judged(image) == bytes(MIB)


# Chains


@pytest.mark.parametrize("seed", range(16))
def test_chains_of_members_of_other_sizes_and_cluster_sizes(tmp_path: Path, seed: int) -> None:
    """Four of them, the lowest raw (with holes, and an odd end) or not."""
    chance = random.Random(seed)
    sizes = [chance.randrange(1, 8 * KIB) * 512 for _ in range(4)]
    below = tmp_path / "bottom.raw"
    pieces = [(0, noise(sizes[0] // 3, seed)), (sizes[0] // 2, noise(sizes[0] // 2, seed))]
    write_disk(below, sizes[0] - chance.randrange(511), pieces)
    if not seed % 2:
        below = scribble(make(tmp_path / "bottom.qcow2", sizes[0]), seed, sizes[0], 512)
    for level, size in enumerate(sizes[1:]):
        kind = chance.choice(("compat=0.10", "compression_type=zstd", "extended_l2=on"))
        cluster_size = 1 << chance.randrange(14 if kind == "extended_l2=on" else 9, 22)
        image = make(
            tmp_path / f"{level}.qcow2", size, f"{kind},cluster_size={cluster_size}", below
        )
        if size >= cluster_size:
            compress(image, seed + level, size, cluster_size)
        scribble(image, seed + level, size, 512)
        below = scribble(image, seed + level + 100, size, 64 * KIB)
    assert_read(below)


def test_an_overlay_that_is_larger_than_the_device_below(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    """What the overlay holds close behind the device's end is as it should be."""
    device = loop_device(write_disk(tmp_path / "raw", 1000 * KIB, [(0, noise(1000 * KIB))]))
    image = overlay(tmp_path / "a.qcow2", Path(device), "raw", "-o", "cluster_size=4k")
    shell("qemu-img", "resize", "-q", "-f", "qcow2", image, "4M")
    qemu_io(image, "write -P 93 1004k 1k", "write -P 93 1012k 1k", "write -P 94 2M 1k")
    assert exported(image) == judged(image)


@pytest.mark.guarantee(6, "a chain that contains itself", "refused")
def test_a_chain_that_contains_itself(tmp_path: Path) -> None:
    image = make(tmp_path / "a.qcow2", MIB)
    top = make(tmp_path / "b.qcow2", MIB, over=image)
    shell("qemu-img", "rebase", "-u", "-b", top, "-F", "qcow2", image)
    assert_refused(run("-f", "qcow2", top, env=NO_PROGRAMS), "b.qcow2", "twice")
    shell("qemu-img", "rebase", "-u", "-b", image, "-F", "qcow2", image)
    assert_refused(run("-f", "qcow2", image, env=NO_PROGRAMS), "a.qcow2", "twice")


def test_a_long_chain(tmp_path: Path) -> None:
    """Two hundred members, as nightly snapshots make them that nobody merges."""
    image = make(tmp_path / "0.qcow2", 4 * MIB)
    (tmp_path / "template").write_bytes(
        make(tmp_path / "1.qcow2", 4 * MIB, over=image).read_bytes()
    )
    for number in range(1, 200):
        image = tmp_path / f"{number}.qcow2"
        shutil.copy(tmp_path / "template", image)
        below = os.fsencode(tmp_path / f"{number - 1}.qcow2")
        patched(image, integer(image, 8), below)
        patched(image, 16, struct.pack(">I", len(below)))
        if number % 20 == 1:
            qemu_io(image, f"write -P {number} {number * 16}k 64k")
    assert exported(image) == judged(image)


def test_a_missing_backing_file(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", MIB)
    top = make(tmp_path / "top.qcow2", MIB, over=base)
    base.unlink()
    assert_refused(run("-f", "qcow2", top), "base.qcow2", "No such file")


# What is QEMU's to read


def patched_format(path: Path, form: bytes) -> Path:
    return patched(path, extension(path, 0xE2792ACA), form)


@pytest.mark.parametrize("kind", ["json", "file", "no format", "other format", "unknown feature"])
def test_what_only_qemu_can_say_goes_to_qemu(tmp_path: Path, kind: str) -> None:
    base = qemu_io(make(tmp_path / "base.qcow2", MIB), "write -P 3 0 1M")
    top = make(tmp_path / "top.qcow2", MIB, over=base)
    rebase = ["qemu-img", "rebase", "-u"]
    if kind == "json":
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
        shell(*rebase, "-b", "json:" + json.dumps(node), "-F", "qcow2", top)
    elif kind == "file":
        shell(*rebase, "-b", f"file:{base}", "-F", "qcow2", top)
    elif kind == "no format":
        patched(top, extension(top, 0xE2792ACA) - 8, b"what")  # an unknown extension
    elif kind == "other format":
        shell("qemu-img", "convert", "-O", "vmdk", base, tmp_path / "base.vmdk")
        shell(*rebase, "-b", tmp_path / "base.vmdk", "-F", "vmdk", top)
    else:
        patched(top, 79, b"\x80")
        assert_refused(run("-f", "qcow2", top), "top.qcow2")
    if kind != "unknown feature":
        assert content(stream("-f", "qcow2", top)) == b"\3" * MIB
    result = run("-f", "qcow2", top, env=NO_PROGRAMS)
    assert_refused(result, "qemu-img", "qemu-utils")


LIBZSTD_IS_MISSING = """
import ctypes
class CDLL(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        if name and "zstd" in name:
            raise OSError("no such library")
        super().__init__(name, *rest, **more)
ctypes.CDLL = CDLL
"""


@pytest.mark.parametrize("python", [pythons()[0], None])
def test_without_libzstd(tmp_path: Path, python: Optional[str]) -> None:
    """Python 3.14 has its own; with an older one it is for QEMU. Nobody needs it for zlib."""
    env = altered(tmp_path, LIBZSTD_IS_MISSING)
    for kind in ("zstd", "zlib"):
        image = make(tmp_path / f"{kind}.qcow2", MIB, f"compression_type={kind}")
        compress(image, 1, MIB, 64 * KIB)
        expected = judged(image)
        assert exported(image, env=env, python=python) == expected
        result = run("-f", "qcow2", image, env={**env, "PATH": "/nonexistent"}, python=python)
        if kind == "zlib" or "3.14" in version(python or sys.executable):
            assert content(result.stdout) == expected
        else:
            assert_refused(result, "qemu")


@pytest.mark.parametrize("python", pythons(), ids=version)
def test_every_python_reads_every_feature(tmp_path: Path, python: str) -> None:
    for options in FEATURES:
        image = small_image(tmp_path, options)
        assert exported(image, python=python) == judged(image)


# Bad images

FEATURES = [
    "compat=0.10,cluster_size=512",
    "cluster_size=4k",
    "extended_l2=on,cluster_size=16k",
    "compression_type=zstd,cluster_size=4k",
    "data_file=DATA,cluster_size=4k",
    "over raw",
]


def small_image(folder: Path, options: str) -> Path:
    """An image of 300 KiB with a feature, and all that may be in an image of that kind."""
    name = "".join(filter(str.isalnum, options))
    image, size, seed = folder / f"{name}.qcow2", 300 * KIB, FEATURES.index(options)
    if options == "over raw":
        raw = write_disk(folder / "raw", 200 * KIB, [(3 * KIB, noise(90 * KIB))])
        make(image, size, "cluster_size=4k", raw)
    else:
        make(image, size, options.replace("DATA", str(folder / "data")))
    if "data_file" not in options:
        unit = 1 << integer(image, 20, 4)
        compress(image, seed, size, unit)
        shell("qemu-img", "snapshot", "-c", "s", image)
    if "compat" not in options:
        shell("qemu-img", "bitmap", "--add", "-g", "512", image, "b")
    return scribble(image, seed, size, 512)


@pytest.mark.parametrize("options", FEATURES)
def test_images_cut_short(tmp_path: Path, options: str) -> None:
    """In each part: an error before the first byte. Where all data is there, it is whole."""
    image = small_image(tmp_path, options)
    whole, expected = image.read_bytes(), judged(image)
    for what, end in parts(image).items():
        if what == "a cluster of data" and "data_file" in options:
            continue
        for length in (end - 1, end - 512, end // 2):
            if 0 <= length < len(whole):
                image.write_bytes(whole[:length])
                result = run("-f", "qcow2", image, env=NO_PROGRAMS)
                if result.status:
                    assert_refused(result, image.name)
                else:
                    assert what in ("an L2 table", "a cluster of data"), what
                    assert content(result.stdout) == expected
    image.write_bytes(whole)
    assert exported(image) == expected


@pytest.mark.parametrize("options", FEATURES[:4])
def test_images_cut_anywhere(tmp_path: Path, options: str) -> None:
    """It is the whole disk, or an error; never other bytes."""
    image = small_image(tmp_path, options)
    whole, expected = image.read_bytes(), judged(image)
    for end in range(0, len(whole), max(512, len(whole) // 400 // 512 * 512)):
        image.write_bytes(whole[:end])
        disk = mutants.read_disk(image)
        assert isinstance(disk, str) or disk == expected
        assert isinstance(disk, str) or end > len(whole) // 3


DAMAGES = {
    "a zero flag in version 2": ("compat=0.10", 0, 1),
    "an offset that is not aligned": ("compat=1.1", 0, 512),
    "an offset behind the end": ("compat=1.1", 0, 1 << 40),
    "a compressed cluster behind the end": ("compat=1.1", 0, 1 << 62 | 1 << 40),
    "a bitmap without an offset": ("extended_l2=on", 16, 0),
    "both bits of a subcluster": ("extended_l2=on", 8, 1 << 32 | 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_entries_that_no_image_can_have(tmp_path: Path, damage: str) -> None:
    options, place, bits = DAMAGES[damage]
    image = qemu_io(make(tmp_path / "a.qcow2", 4 * MIB, options), "write -P 1 0 192k")
    place += l2_table(image)
    patched(image, place, struct.pack(">Q", (integer(image, place) | bits) if bits else 0))
    assert_refused(run("-f", "qcow2", image, env=NO_PROGRAMS), "a.qcow2")


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_damaged_compressed_cluster(tmp_path: Path, kind: str) -> None:
    """It is met when it is read: in the scan if it is short, else in the copy. It is named."""
    image = make(tmp_path / "a.qcow2", 4 * MIB, f"compression_type={kind}")
    compress(image, 1, 4 * MIB, 64 * KIB)
    entries = [integer(image, l2_table(image) + 8 * index) for index in range(64)]
    entry = next(entry for entry in entries if entry & COMPRESSED)
    offset = entry & (1 << 54) - 1
    patched(image, offset, bytes(64))
    result = run("-f", "qcow2", image, env=NO_PROGRAMS)
    assert result.status == 1
    assert f"compressed cluster at offset {offset} is damaged" in result.stderr
    assert result.stderr.count("\n") == 1
    with pytest.raises(subprocess.CalledProcessError):
        shell("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "raw",
              stderr=subprocess.DEVNULL)  # fmt: skip


def test_a_name_that_is_no_qcow2_image(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("short", b"QFI\xfb"), ("raw", bytes(MIB))):
        (tmp_path / name).write_bytes(data)
        assert_refused(run("-f", "qcow2", tmp_path / name), name, "no qcow2 image")
    assert_refused(run("-f", "qcow2", tmp_path), "it is a folder")
    assert_refused(run("-f", "qcow2", tmp_path / "nothing"), "No such file")
    assert_refused(run("-f", "qcow2", "-"), "in order", "qcow2", "file")


@pytest.mark.guarantee(
    9, "images with damaged metadata", "what QEMU reads, or exit 1; no traceback, no hang"
)
@pytest.mark.parametrize("options", FEATURES)
def test_mutants(tmp_path: Path, options: str) -> None:
    """A bit or a byte of a header, table, descriptor or directory is another one.

    They are read in one process of little memory, each within seconds. QEMU reads those of
    which the program makes another disk than before, and every twentieth of the others.
    """
    image = small_image(tmp_path, options)
    words = [sys.executable, mutants.__file__, image, str(MUTANTS // len(FEATURES))]
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()[-2000:]
    counts: Dict[str, int] = json.loads(done.stdout)
    assert counts["read"] > 200, counts
    assert counts["refused"] > 50, counts
    assert counts["compared"] > 20, counts
    assert counts["KiB"] < 400 * KIB, counts


# Images in use


@contextlib.contextmanager
def running(*words: Any) -> Iterator[Any]:
    """A process that reads its input; ended with the test."""
    process = subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def holding(image: Path, *options: str) -> Iterator[None]:
    """A storage daemon that has an image open, and nothing to do with it."""
    node = ",".join([f"driver=qcow2,node-name=n,file.driver=file,file.filename={image}", *options])
    monitor = ["--chardev", "stdio,id=c", "--monitor", "chardev=c"]
    with running("qemu-storage-daemon", *monitor, "--blockdev", node) as daemon:
        assert b"QMP" in daemon.stdout.readline()
        yield


@pytest.mark.guarantee(6, "a qcow2 image that a VM has open for writing", "refused")
@pytest.mark.parametrize("member", ["top", "base"])
def test_an_image_that_is_open_for_writing(tmp_path: Path, member: str) -> None:
    """In a VM or a daemon; its tables may change at any time, with --live too."""
    base = make(tmp_path / "base.qcow2", MIB)
    top = make(tmp_path / "top.qcow2", MIB, over=base)
    busy = tmp_path / f"{member}.qcow2"
    with holding(busy):
        for options in ([], ["--live"], ["--salvage"], ["--diff", base]):
            result = run("-f", "qcow2", *options, top, env=NO_PROGRAMS)
            assert_refused(result, busy.name, "open for writing", "NBD", "snapshot")
    with holding(busy, "read-only=on"):
        assert exported(top) == bytes(MIB)
    assert exported(top) == bytes(MIB)


def test_a_raw_file_below_may_be_open_for_writing(tmp_path: Path) -> None:
    """It has no tables; what changes is noticed."""
    raw = write_disk(tmp_path / "a.raw", MIB, [(0, noise(MIB))])
    top = make(tmp_path / "top.qcow2", MIB, over=raw)
    with running("qemu-io", "-f", "raw", raw) as writer:
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        writer.stdout.readline()
        assert exported(top) == noise(MIB)


@pytest.mark.guarantee(6, "a member of a chain that changes", "exit 1")
def test_a_member_that_changes_while_it_is_read(tmp_path: Path) -> None:
    base = qemu_io(make(tmp_path / "base.qcow2", 8 * MIB), "write -P 3 0 8M")
    top = qemu_io(make(tmp_path / "top.qcow2", 8 * MIB, over=base), "write -P 4 0 1M")
    words = [str(word) for word in command("-f", "qcow2", top)]
    with running(*words) as program:
        program.stdout.read(4)
        os.utime(base)
        rest = program.communicate(timeout=60)[0]
    assert program.returncode == 1
    assert b"base.qcow2' changed while it was read" in rest


# How often


def bytes_read(fuse: FuseDisk, start: int = 0, end: int = 1 << 62) -> int:
    """How many bytes between two offsets were asked for."""
    cut = (min(at + length, end) - max(at, start) for at, length in fuse.reads())
    return sum(max(0, length) for length in cut)


def test_what_members_of_a_chain_share_is_not_read_by_diff(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    """Base with 32 MiB, two overlays; only the tables of the base are looked at."""
    base = make(tmp_path / "base.qcow2", 64 * MIB)
    qemu_io(base, "write -P 3 0 32M")
    fuse = fuse_disk(base, direct=True, count=True)
    one = overlay(tmp_path / "one.qcow2", fuse.path, "qcow2")
    qemu_io(one, "write -P 4 1M 1M")
    two = relinked(make(tmp_path / "two.qcow2", 64 * MIB, "cluster_size=4k", one), one)
    qemu_io(two, "write -P 5 1536k 1M", "write -z 8M 64k", "write -P 3 9M 64k")
    expected = judged(two)
    first = fuse_disk(base, direct=True, count=True)
    relinked(one, first.path)
    options: List[Any] = ["--diff", one, "-b", tmp_path / "one.qcow2", "-F", "qcow2"]
    difference = stream("-f", "qcow2", two, *options, env=NO_PROGRAMS)
    # What was written over is compared with what was there before, 64 KiB at a time.
    compared = MIB + 3 * 64 * KIB
    assert bytes_read(first, MIB) <= compared + 512 * KIB
    (tmp_path / "diff.qcow2").write_bytes(difference)
    assert judged(tmp_path / "diff.qcow2") == expected
    again = fuse_disk(base, direct=True, count=True)
    relinked(one, again.path)
    assert exported(one, "--diff", one) == bytes(64 * MIB)
    assert bytes_read(again) < MIB


def relinked(image: Path, below: Path) -> Path:
    shell("qemu-img", "rebase", "-u", "-b", below, "-F", "qcow2", image)
    return image


COUNTED_INFLATION = """
import os, zlib
log = os.open(%r, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
real = zlib.decompressobj
class Counting:
    def __init__(self, *arguments):
        self.object = real(*arguments)
    def decompress(self, data, *rest):
        os.write(log, bytes(data[:200]).hex().encode() + b"\\n")
        return self.object.decompress(data, *rest)
zlib.decompressobj = Counting
"""


def test_a_compressed_cluster_is_inflated_once(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    """And read once, but for what lies in the same sector as its neighbour."""
    chance = random.Random(1)
    text = b"".join(b"%012d" % chance.randrange(10**12) for _ in range(12 * MIB // 12))
    raw = write_disk(tmp_path / "raw", 16 * MIB, [(0, text)])
    image = tmp_path / "a.qcow2"
    shell("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    (tmp_path / "altered").mkdir()
    env = altered(tmp_path / "altered", COUNTED_INFLATION % str(tmp_path / "counts"))
    env["PATH"] = "/nonexistent"
    fuse = fuse_disk(image, direct=True, count=True)
    assert exported(fuse.path, env=env) == raw.read_bytes()
    inflated = (tmp_path / "counts").read_text().splitlines()
    assert len(inflated) == len(set(inflated)) == 12 * MIB // 65536
    assert bytes_read(fuse) <= 1.1 * image.stat().st_size


def test_a_qcow2_disk_full_of_data_is_read_little_more_than_once(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "raw", 16 * MIB, [(0, noise(16 * MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "a.qcow2")
    fuse = fuse_disk(tmp_path / "a.qcow2", direct=True, count=True)
    assert exported(fuse.path) == raw.read_bytes()
    assert bytes_read(fuse) <= 1.12 * 16 * MIB


def test_a_backing_name_right_behind_an_old_header(tmp_path: Path) -> None:
    """Version 2 without extensions: the name's place is where they end."""
    base = write_disk(tmp_path / "base", MIB, [(0, noise(MIB))])
    image = bytearray(stream(base, "--diff", base, "-b", "base", "-F", "raw", "--compat", "0.10"))
    offset = int.from_bytes(image[8:16], "big")
    name = bytes(image[offset : offset + 4])
    image[72 : offset + 4] = name.ljust(offset + 4 - 72, b"\xff")
    image[8:16] = (72).to_bytes(8, "big")
    (tmp_path / "a.qcow2").write_bytes(image)
    expected = stream(as_raw(tmp_path / "a.qcow2"))
    assert stream("-f", "qcow2", tmp_path / "a.qcow2") == expected
