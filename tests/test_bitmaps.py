"""Dirty bitmaps and internal snapshots, by their names: of qcow2 files, without QEMU.

The judges: qemu-img compare and convert, and for a bitmap what qemu-io has written.
"""

import io
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator, List, Set, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disks import noise, write_disk
from support.images import shell
from support.importer import read_image
from support.nbd import Rogue, StorageDaemon, nbdkit, qemu_nbd
from support.program import assert_refused, assert_warned, run, stream
from support.pythons import pythons, version
from support.qcow2 import (
    KIB,
    MIB,
    NO_PROGRAMS,
    bitmap_directory,
    content,
    exported,
    extension,
    integer,
    judged,
    make,
    patched,
    qemu_io,
    scribble,
)

FIRST_NIGHT = ["-b", "monday.qcow2", "-F", "qcow2"]


def add_bitmap(image: Path, name: str, *options: Any) -> Path:
    shell("qemu-img", "bitmap", "--add", *options, image, name)
    return image


def guest_clusters(image: bytes) -> List[int]:
    """The clusters that a stream of the program's holds, zeros among them."""
    read = read_image(io.BytesIO(image))
    return sorted([*read.data, *read.zeros])


def night(folder: Path, name: str, *arguments: Any, **how: Any) -> Path:
    """A backup in a folder, of which nothing is written over."""
    how.setdefault("env", NO_PROGRAMS)
    path = folder / f"{name}.qcow2"
    path.write_bytes(stream(*arguments, cwd=folder, **how))
    return path


# Of a file


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, MIB, 16 * MIB])
@pytest.mark.parametrize("cluster_size", [512, 64 * KIB, 2 * MIB])
def test_what_a_bitmap_says(tmp_path: Path, cluster_size: int, granularity: int) -> None:
    """A bit marks each cluster that it touches, whichever of both is larger."""
    size = (8 if cluster_size == 512 else 40) * MIB + 512
    image = make(tmp_path / "a.qcow2", size, f"cluster_size={cluster_size}")
    add_bitmap(image, "b", "-g", granularity)
    unit = 64 * KIB
    assert guest_clusters(stream("-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT)) == []
    chance = random.Random(granularity)
    expected: Set[int] = set()
    commands = []
    for _ in range(6):
        start = chance.randrange(size // 512) * 512
        length = min(chance.choice((1, 3, 300, 3000)) * 512, size - start)
        commands.append(f"write -P 1 {start} {length}")
        first, last = start // granularity, (start + length - 1) // granularity
        end = min((last + 1) * granularity, size)
        expected.update(range(first * granularity // unit, -(-end // unit)))
    qemu_io(image, *commands)
    overlay = stream("-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT, env=NO_PROGRAMS)
    assert guest_clusters(overlay) == sorted(expected)
    assert content(overlay) == judged(image)
    qemu_io(image, f"write -P 2 0 {size}")  # entries that say: all set
    overlay = stream("-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT)
    assert guest_clusters(overlay) == list(range(-(-size // unit)))


def test_several_bitmaps_and_odd_names(tmp_path: Path) -> None:
    """As a libvirt domain has them after a few checkpoints."""
    image = make(tmp_path / "a.qcow2", 8 * MIB)
    names = ["libvirt-vda", "ü b", "a,b=c", "n\nl", "x" * 1023]
    for number, name in enumerate(names):
        add_bitmap(image, name)
        qemu_io(image, f"write -P {number} {number}M 64k")
    for number, name in enumerate(names):
        overlay = stream("-f", "qcow2", image, "--bitmap", name, *FIRST_NIGHT, env=NO_PROGRAMS)
        assert guest_clusters(overlay) == [at * 16 for at in range(number, len(names))]


@pytest.mark.parametrize("options", ["compat=1.1", "extended_l2=on", "data_file=data"])
def test_two_nights(tmp_path: Path, options: str) -> None:
    """Writes, zeros and discards; the overlay is the disk, the difference is its clusters."""
    options = options.replace("=data", f"={tmp_path}/data")
    image = scribble(make(tmp_path / "a.qcow2", 16 * MIB, options), 1, 16 * MIB)
    add_bitmap(image, "b")
    monday = night(tmp_path, "monday", "-f", "qcow2", image)
    scribble(image, 2, 16 * MIB)
    scribble(image, 3, 16 * MIB, 512)
    expected = judged(image)
    for compat in ("1.1", "0.10"):
        words = ["-f", "qcow2", str(image), "--bitmap", "b", "--compat", compat]
        tuesday = night(tmp_path, "tuesday", *words, *FIRST_NIGHT)
        assert judged(tuesday) == expected
        difference = stream(*words, env=NO_PROGRAMS)
        assert content(difference, judged(monday)) == expected
    assert night(tmp_path, "x", "-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT, "--no-scan")
    assert judged(tmp_path / "x.qcow2") == expected


Night = List[Tuple[str, int, int]]
WRITES: "st.SearchStrategy[Night]" = st.lists(
    st.tuples(
        st.sampled_from(
            ["write -P 7", "write -P 0", "write -z", "write -z -u", "discard", "snapshot"]
        ),
        st.integers(0, 999),
        st.integers(1, 300),
    ),
    min_size=1,
    max_size=8,
)


def live_through(image: Path, size: int, writes: Night) -> None:
    for number, (what, start, length) in enumerate(writes):
        if what == "snapshot":
            shell("qemu-img", "snapshot", "-c", f"{start}-{number}", image)
            continue
        at = start * size // 1000 // 512 * 512
        count = max(512, length * size // 1000 // 512 * 512)
        qemu_io(image, f"{what} {at} {min(count, size - at)}")


@pytest.mark.guarantee(
    2, "a bitmap of another granularity than the clusters", "each cluster that a bit touches counts"
)
@settings(max_examples=20)
@given(
    size=st.sampled_from([MIB, 3 * MIB + 512, 10 * MIB]),
    options=st.sampled_from(
        ["cluster_size=512", "cluster_size=64k", "cluster_size=2M", "extended_l2=on"]
    ),
    granularity=st.sampled_from([512, 4096, 65536, MIB]),
    cluster_size=st.sampled_from(["512", "64K", "2M"]),
    nights=st.tuples(WRITES, WRITES),
)
def test_any_two_nights(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    options: str,
    granularity: int,
    cluster_size: str,
    nights: Tuple[Night, Night],
) -> None:
    """Whatever a guest does: the overlay on the first night's image is the disk."""
    folder = tmp_path_factory.mktemp("nights")
    image = make(folder / "a.qcow2", size, options)
    live_through(image, size, nights[0])
    add_bitmap(image, "b", "-g", granularity)
    night(folder, "monday", "-f", "qcow2", image)
    live_through(image, size, nights[1])
    words = ["-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT, "-c", cluster_size]
    assert judged(night(folder, "tuesday", *words)) == judged(image)
    shutil.rmtree(folder)


@pytest.mark.guarantee(6, "a bitmap that is the backing file's", "refused")
def test_a_bitmap_of_an_overlay(tmp_path: Path) -> None:
    """What the image shows of its own backing file counts where the bitmap says so."""
    base = scribble(make(tmp_path / "base.qcow2", 8 * MIB), 1, 8 * MIB)
    top = add_bitmap(scribble(make(tmp_path / "top.qcow2", 8 * MIB, over=base), 2, 8 * MIB), "b")
    night(tmp_path, "monday", "-f", "qcow2", top)
    scribble(top, 3, 8 * MIB)
    tuesday = night(tmp_path, "tuesday", "-f", "qcow2", top, "--bitmap", "b", *FIRST_NIGHT)
    assert judged(tuesday) == judged(top)


def test_bitmaps_and_snapshots_of_a_chain_that_only_qemu_reads(tmp_path: Path) -> None:
    """The disk comes from a qemu-nbd; what the image itself says is read from the image."""
    base = qemu_io(make(tmp_path / "base.qcow2", 8 * MIB), "write -P 1 0 8M")
    shell("qemu-img", "convert", "-O", "vmdk", base, tmp_path / "base.vmdk")
    image = make(tmp_path / "a.qcow2", 8 * MIB, over=base)
    shell("qemu-img", "rebase", "-u", "-b", tmp_path / "base.vmdk", "-F", "vmdk", image)
    add_bitmap(scribble(image, 2, 8 * MIB), "b")
    moment = judged(image)
    shell("qemu-img", "snapshot", "-c", "s", image)
    night(tmp_path, "monday", "-f", "qcow2", image, "-l", "s", env=None)
    assert judged(tmp_path / "monday.qcow2") == moment
    scribble(image, 3, 8 * MIB)
    words = ["-f", "qcow2", str(image), "--bitmap", "b", *FIRST_NIGHT]
    assert judged(night(tmp_path, "tuesday", *words, env=None)) == judged(image)
    words = ["-f", "qcow2", str(image), "--diff", str(image), "--diff-snapshot", "s", *FIRST_NIGHT]
    assert judged(night(tmp_path, "since", *words, env=None)) == judged(image)
    assert_refused(run("-f", "qcow2", image, "-l", "t"), "snapshot", "'t'")
    assert_refused(run("-f", "qcow2", image, "--bitmap", "c"), "no bitmap 'c'", "'b'")


@pytest.mark.parametrize("python", pythons(), ids=version)
def test_every_python_reads_bitmaps_and_snapshots(tmp_path: Path, python: str) -> None:
    image = add_bitmap(scribble(make(tmp_path / "a.qcow2", 8 * MIB), 1, 8 * MIB), "b")
    moment = judged(image)
    shell("qemu-img", "snapshot", "-c", "s", image)
    night(tmp_path, "monday", "-f", "qcow2", image, "-l", "s", python=python)
    assert judged(tmp_path / "monday.qcow2") == moment
    scribble(image, 2, 8 * MIB)
    words = ["-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT]
    assert judged(night(tmp_path, "tuesday", *words, python=python)) == judged(image)
    words = ["-f", "qcow2", image, "--diff", image, "--diff-snapshot", "s", *FIRST_NIGHT]
    assert judged(night(tmp_path, "since", *words, python=python)) == judged(image)


# Bitmaps that can't be had


def test_a_bitmap_that_is_not_there(tmp_path: Path) -> None:
    """That of a backing file is another disk's. The names that there are, are named."""
    image = add_bitmap(make(tmp_path / "a.qcow2", MIB), "b")
    top = make(tmp_path / "top.qcow2", MIB, over=image)
    for path in (top, make(tmp_path / "none.qcow2", MIB)):
        result = run("-f", "qcow2", path, "--bitmap", "b", env=NO_PROGRAMS)
        assert_refused(result, "no bitmap 'b'", path.name, "no bitmaps")
    result = run("-f", "qcow2", image, "--bitmap", "c", env=NO_PROGRAMS)
    assert_refused(result, "no bitmap 'c'", "it has 'b'")
    raw = write_disk(tmp_path / "raw", MIB)
    assert_refused(run(raw, "--bitmap", "b"), "--bitmap", "-f qcow2", "nbd://")
    for option, word in (("--diff", "--diff"), ("--layout", "--layout"), ("-l", "--snapshot")):
        assert_refused(run("-f", "qcow2", image, "--bitmap", "b", option, raw), word)


def test_a_disabled_bitmap_is_read_with_a_warning(tmp_path: Path) -> None:
    image = add_bitmap(make(tmp_path / "a.qcow2", 8 * MIB), "b")
    qemu_io(image, "write -P 1 1M 64k")
    shell("qemu-img", "bitmap", "--disable", image, "b")
    qemu_io(image, "write -P 1 5M 64k")
    result = run("-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT, env=NO_PROGRAMS)
    assert_warned(result, "'b'", "disabled", "since")
    assert guest_clusters(result.stdout) == [16]


def test_a_bitmap_of_a_vm_that_was_killed(tmp_path: Path) -> None:
    """It is marked as in use: nobody knows what was written since it was stored."""
    image = add_bitmap(make(tmp_path / "a.qcow2", 8 * MIB), "b")
    words = [
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        "write 0 64k",
        "-c",
        "flush",
        "-c",
        "abort",
        str(image),
    ]
    assert subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode < 0
    result = run("-f", "qcow2", image, "--bitmap", "b", env=NO_PROGRAMS)
    assert_refused(result, "'b'", "in use", "whole disk", "new bitmap")
    # Whoever has a copy made of a running VM's disk has the same.
    assert len(judged(image)) == 8 * MIB


def bit_of_autoclear(image: Path) -> None:
    """As a program leaves it that knows no bitmaps, and wrote to the image."""
    patched(image, 88, bytes(8))


def extra_data(image: Path) -> None:
    patched(image, bitmap_directory(image) + 20, struct.pack(">I", 8))


def other_type(image: Path) -> None:
    patched(image, bitmap_directory(image) + 16, b"\2")


def huge_table(image: Path) -> None:
    patched(image, bitmap_directory(image) + 8, b"\xff" * 4)


def table_behind_the_end(image: Path) -> None:
    patched(image, bitmap_directory(image), struct.pack(">Q", 1 << 40))


def bits_behind_the_end(image: Path) -> None:
    patched(image, integer(image, bitmap_directory(image)), struct.pack(">Q", 1 << 40))


def directory_behind_the_end(image: Path) -> None:
    patched(image, extension(image, 0x23852875) + 16, struct.pack(">Q", 1 << 40))


def large_granularity(image: Path) -> None:
    patched(image, bitmap_directory(image) + 17, b"\xff")


DAMAGES = [
    bit_of_autoclear,
    extra_data,
    other_type,
    huge_table,
    table_behind_the_end,
    bits_behind_the_end,
    directory_behind_the_end,
    large_granularity,
]


@pytest.mark.guarantee(6, "a bitmap in use, or inconsistent", "refused")
@pytest.mark.parametrize("damage", DAMAGES)
def test_bitmaps_that_can_not_be_relied_on(tmp_path: Path, damage: Any) -> None:
    image = add_bitmap(make(tmp_path / "a.qcow2", 4 * MIB), "b", "-g", 512)
    qemu_io(image, "write -P 1 0 3k")
    damage(image)
    result = run("-f", "qcow2", image, "--bitmap", "b", env=NO_PROGRAMS)
    assert_refused(result, "a.qcow2")
    assert len(exported(image)) == 4 * MIB  # the whole disk can still be had


def test_a_disk_that_was_resized(tmp_path: Path) -> None:
    """QEMU lets a bitmap grow and shrink with its disk."""
    image = add_bitmap(make(tmp_path / "a.qcow2", 4 * MIB), "b")
    qemu_io(image, "write -P 1 1M 64k")
    night(tmp_path, "monday", "-f", "qcow2", image)
    shell("qemu-img", "resize", "-q", image, "9M")
    qemu_io(image, "write -P 2 8M 64k")
    words = ["-f", "qcow2", image, "--bitmap", "b", *FIRST_NIGHT]
    assert judged(night(tmp_path, "tuesday", *words)) == judged(image)


# Of a server


def test_the_bitmap_of_a_server(tmp_path: Path) -> None:
    """That of qemu-nbd -B, byte for byte as from the file."""
    image = add_bitmap(scribble(make(tmp_path / "a.qcow2", 40 * MIB), 1, 40 * MIB), "b")
    night(tmp_path, "monday", "-f", "qcow2", image)
    scribble(image, 2, 40 * MIB)
    expected = {
        options: stream("-f", "qcow2", image, "--bitmap", "b", *options)
        for options in ((), tuple(FIRST_NIGHT), ("--no-scan", *FIRST_NIGHT))
    }
    with qemu_nbd(tmp_path, "-f", "qcow2", "-B", "b", "-A", image) as server:
        for options, image_bytes in expected.items():
            assert stream(server.uri, "--bitmap", "b", *options, env=NO_PROGRAMS) == image_bytes
        assert_refused(run(server.uri, "--bitmap", "c"), "no dirty bitmap 'c'")
    with nbdkit(tmp_path, "--no-sr", "memory", "1M") as server:
        assert_refused(run(server.uri, "--bitmap", "b"), "no dirty bitmap 'b'")
    with nbdkit(tmp_path, "memory", "1M") as server:
        assert_refused(run(server.uri, "--bitmap", "b"), "no dirty bitmap 'b'")
    with Rogue(tmp_path, noise(MIB)) as rogue:  # it answers with another context
        assert_refused(run(rogue.uri, "--bitmap", "b"), "no dirty bitmap 'b'")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    made = StorageDaemon(tmp_path)
    yield made
    made.close()


def test_several_bitmaps_of_a_server(tmp_path: Path, daemon: StorageDaemon) -> None:
    image = make(tmp_path / "a.qcow2", 8 * MIB)
    for number, name in enumerate(("first", "the second")):
        add_bitmap(image, name)
        qemu_io(image, f"write -P {number} {number * 2 + 1}M 64k")
    file = {"driver": "file", "filename": str(image)}
    node = {"driver": "qcow2", "node_name": "n", "file": file, "read_only": True}
    daemon.run("blockdev-add", **node)
    bitmaps = ["first", "the second"]
    daemon.run("block-export-add", type="nbd", id="e", node_name="n", name="e", bitmaps=bitmaps)
    uri = daemon.uri.replace("NAME", "e")
    for name, expected in (("first", [16, 48]), ("the second", [48])):
        overlay = stream(uri, "--bitmap", name, *FIRST_NIGHT, env=NO_PROGRAMS)
        assert guest_clusters(overlay) == expected


# Internal snapshots


def test_snapshots_by_id_then_by_name(tmp_path: Path) -> None:
    """And of a disk that was smaller then; qemu-img convert -l shows the same, and more."""
    image = make(tmp_path / "a.qcow2", MIB)
    moments = {}
    for name, pattern in (("2", 1), ("x", 2), ("a long name, and more=", 3)):
        writes = f"write -P {pattern} {pattern * 64}k 128k", f"write -z {pattern * 32}k 16k"
        qemu_io(image, *writes)
        moments[name] = judged(image)
        shell("qemu-img", "snapshot", "-c", name, image)
    shell("qemu-img", "resize", "-q", image, "3M")
    qemu_io(image, "write -P 9 0 2M")
    assert exported(image, "-l", "x") == moments["x"]
    assert exported(image, "-l", "1") == moments["2"]
    assert exported(image, "--snapshot", "2") == moments["x"]  # the ID goes before the name
    for name in ("a long name, and more=", "3"):
        assert exported(image, "-l", name) == moments["a long name, and more="]
    raw = tmp_path / "raw"
    shell("qemu-img", "convert", "-l", "snapshot.name=x", "-f", "qcow2", "-O", "raw", image, raw)
    assert raw.read_bytes()[:MIB] == moments["x"]
    result = run("-f", "qcow2", image, "-l", "y", env=NO_PROGRAMS)
    assert_refused(result, "no snapshot 'y'", "'x'", "'a long name, and more='")
    empty = make(tmp_path / "b.qcow2", MIB)
    assert_refused(run("-f", "qcow2", empty, "-l", "1"), "no snapshot '1'", "no snapshots")


@pytest.mark.parametrize(
    "options", ["compat=0.10,cluster_size=512", "extended_l2=on", "compression_type=zstd"]
)
def test_snapshots_of_every_kind_of_image(tmp_path: Path, options: str) -> None:
    """As qemu-img convert -l has them, while the size is the same."""
    base = scribble(make(tmp_path / "base.qcow2", 4 * MIB), 1, 4 * MIB)
    image = make(tmp_path / "a.qcow2", 4 * MIB, options, base)
    moments = []
    for seed in range(3):
        scribble(image, seed, 4 * MIB)
        shell("qemu-img", "snapshot", "-c", f"s{seed}", image)
        moments.append(judged(image))
    scribble(image, 9, 4 * MIB)
    for number, moment in enumerate(moments):
        assert exported(image, "-l", f"s{number}") == moment
        raw = tmp_path / f"{number}.raw"
        shell("qemu-img", "convert", "-l", f"s{number}", "-f", "qcow2", "-O", "raw", image, raw)
        assert raw.read_bytes() == moment


def test_what_has_changed_between_two_moments(tmp_path: Path) -> None:
    """With --diff the same file; what both share is the same by its place."""
    image = scribble(make(tmp_path / "a.qcow2", 16 * MIB), 1, 16 * MIB)
    shell("qemu-img", "snapshot", "-c", "monday", image)
    monday = night(tmp_path, "monday", "-f", "qcow2", image, "-l", "monday")
    scribble(image, 2, 16 * MIB)
    shell("qemu-img", "snapshot", "-c", "tuesday", image)
    tuesday = judged(image)
    scribble(image, 3, 16 * MIB)
    since = ["-f", "qcow2", str(image), "--diff", str(image), "--diff-snapshot", "monday"]
    assert judged(night(tmp_path, "a1", *since, *FIRST_NIGHT)) == judged(image)
    assert judged(night(tmp_path, "a2", *since, "-l", "tuesday", *FIRST_NIGHT)) == tuesday
    assert content(stream(*since, "-l", "tuesday"), judged(monday)) == tuesday
    same = stream(*since, "-l", "monday", *FIRST_NIGHT)
    assert guest_clusters(same) == []
    raw = write_disk(tmp_path / "raw", 16 * MIB, [(0, tuesday)])
    options = ["--diff", image, "--diff-format", "qcow2", "--diff-snapshot", "monday"]
    assert judged(night(tmp_path, "a3", raw, *options, *FIRST_NIGHT)) == tuesday


def test_what_two_moments_share_is_not_read(tmp_path: Path) -> None:
    image = qemu_io(make(tmp_path / "a.qcow2", 64 * MIB), "write -P 3 0 48M")
    shell("qemu-img", "snapshot", "-c", "s", image)
    qemu_io(image, "write -P 4 1M 64k")
    words = [sys.executable, Path(__file__).parents[1] / "qcow2_to_stdout.py", "-f", "qcow2", image]
    words += ["--diff", image, "--diff-snapshot", "s"]
    log = tmp_path / "trace"
    calls = "pread64,preadv,preadv2,sendfile,splice"
    strace = ["strace", "-f", "-P", image, "-e", calls, "-o", log]
    done = subprocess.run(
        [str(word) for word in [*strace, *words]], stdout=subprocess.PIPE, check=True
    )
    assert guest_clusters(done.stdout) == [16]
    counts = [
        line.rsplit("=", 1)[1].split()[0] for line in log.read_text().splitlines() if "= " in line
    ]
    read = sum(int(count) for count in counts if count.isdigit())
    assert 128 * KIB <= read < 6 * MIB


@pytest.mark.parametrize(
    "words",
    [
        ["-l", "s", "a.raw"],
        ["--diff-snapshot", "s", "-f", "qcow2", "a.qcow2"],
        ["--diff", "a.raw", "--diff-snapshot", "s", "a.raw"],
        ["-f", "qcow2", "-l", "snapshot.name=s", "a.qcow2"],
        ["-f", "qcow2", "-l", "snapshot.id=1", "a.qcow2"],
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, words: List[str]) -> None:
    write_disk(tmp_path / "a.raw", MIB)
    make(tmp_path / "a.qcow2", MIB)
    assert_refused(run(*words, cwd=tmp_path), "snapshot")


def test_a_snapshot_table_that_is_cut_short(tmp_path: Path) -> None:
    image = qemu_io(make(tmp_path / "a.qcow2", MIB), "write -P 3 0 1M")
    shell("qemu-img", "snapshot", "-c", "s", image)
    whole = image.read_bytes()
    table = integer(image, 64)
    for length in (table + 10, table + 45, table):
        image.write_bytes(whole[:length])
        assert_refused(run("-f", "qcow2", image, "-l", "s", env=NO_PROGRAMS), "a.qcow2")
    image.write_bytes(whole)
    patched(image, 60, b"\xff" * 4)
    assert_refused(run("-f", "qcow2", image, "-l", "s", env=NO_PROGRAMS), "a.qcow2")
    assert exported(image) == b"\3" * MIB
