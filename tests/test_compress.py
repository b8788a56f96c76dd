"""Compressed images: they read as the source, their size is known first, their refcounts are right.

`qemu-img check` never inflates a cluster, so each image is read as well.
"""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import List, NamedTuple, Optional

import pytest
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, judges
from support.disks import noise, write_disk
from support.nbd import nbdkit
from support.program import TIMEOUT, altered, assert_failed, assert_refused, run, start, stream

from qcow2_to_stdout import Geometry, make_plan, packed_offsets, packed_refcounts

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
REFCOUNT_WIDTHS = [1, 2, 4, 8, 16, 32, 64]
KINDS = ["zlib", "zstd"]


def text(length: int, seed: int = 0) -> bytes:
    """Bytes that compress as those of files do."""
    chosen = random.Random(seed)
    words = [noise(chosen.randrange(2, 9), seed + number) for number in range(200)]
    return b" ".join(chosen.choices(words, k=length // 3 + 1))[:length]


def content(name: str, length: int, seed: int) -> bytes:
    if name == "text":
        return text(length, seed)
    return noise(length, seed) if name == "noise" else name[:1].encode() * length


def mixed(path: Path, size: int, seed: int = 0) -> Path:
    """A disk of text, noise, single bytes and zeros in turns."""
    chosen = random.Random(seed)
    pieces, at = [], 0
    while at < size:
        length = min(chosen.choice([700, 5000, 70_000, 200_000]), size - at)
        name = chosen.choice(["text", "noise", "x", ""])
        pieces.append((at, content(name, length, at) if name else b""))
        at += length
    return write_disk(path, size, pieces)


class Entries(NamedTuple):
    """What the L2 tables of an image lead to."""

    plain: int
    compressed: List[int]
    bitmaps: List[int]


def in_use(table: bytes, entry_size: int) -> List[int]:
    """The numbers of the entries that are not zero."""
    return sorted({match.start() // entry_size for match in re.finditer(b"[^\0]", table)})


def count_references(image: bytes) -> Entries:
    """Assert that each refcount is the number of things that lie in its cluster."""
    version, bits = struct.unpack_from(">4xI12xI", image)
    l1_entries, l1_offset, table_offset, table_clusters = struct.unpack_from(">36xIQQI", image)
    features, order = struct.unpack_from(">72xQ16xI", image) if version == 3 else (0, 4)
    size, entry_size = 1 << bits, 16 if features & 16 else 8
    counts: Counter[int] = Counter()
    entries = Entries(0, [], [])

    def touch(offset: int, length: int) -> None:
        counts.update(range(offset // size, (offset + length - 1) // size + 1))

    touch(0, size)
    touch(table_offset, table_clusters * size)
    touch(l1_offset, max(1, l1_entries * 8) if l1_offset else 0)
    for (l1_entry,) in struct.iter_unpack(">Q", image[l1_offset:][: l1_entries * 8]):
        table = l1_entry & (1 << 56) - 512
        if not table:
            continue
        touch(table, size)
        for number in in_use(image[table : table + size], entry_size):
            at = table + number * entry_size
            entry, bitmap = struct.unpack(">QQ", image[at : at + entry_size].ljust(16, b"\0"))
            entries.bitmaps.append(bitmap)
            if entry >> 62 & 1:
                assert not entry >> 63, "a compressed cluster is never COPIED"
                offset = entry & (1 << 70 - bits) - 1
                sectors = (entry & (1 << 62) - 1) >> 70 - bits
                entries.compressed.append(offset)
                touch(offset, (sectors + 1) * 512 - offset % 512)
            elif entry & (1 << 56) - 512:
                assert entry >> 63, "a cluster of its own is COPIED"
                entries = entries._replace(plain=entries.plain + 1)
                touch(entry & (1 << 56) - 512, size)
    width, found = 1 << order, {}
    for index in range(table_clusters * size // 8):
        block = struct.unpack_from(">Q", image, table_offset + 8 * index)[0]
        if block:
            touch(block, size)
            step = max(1, width // 8)
            for number in in_use(image[block : block + size], step):
                value = int.from_bytes(image[block + number * step :][:step], "big")
                for part in range(max(1, 8 // width)):
                    count = value >> part * width & (1 << width) - 1
                    if count:
                        at = (index * size // step + number) * max(1, 8 // width) + part
                        found[at] = count
    assert found == dict(counts)
    return entries


def judge(raw: Path, *options: str, source: Optional[Path] = None) -> bytes:
    """Compress a disk, look at the image in every way, and return it.

    source  the image that holds the disk, if that is not raw
    """
    disk = ["-f", "qcow2", str(source)] if source else [str(raw)]
    image = stream(*disk, *options)
    path = raw.with_name("image.qcow2")
    path.write_bytes(image)
    judges.qemu_check(path)
    judges.qemu_compare(raw, path)
    count_references(image)
    size = json.loads(stream(*disk, *options, "--measure", "--output", "json"))["required"]
    assert size == len(image)
    return image


@settings(max_examples=35)
@given(
    seed=st.integers(0, 1 << 20),
    size=st.one_of(st.integers(0, 3 << 20), st.sampled_from([0, 1, 512, 65536, 1 << 20])),
    cluster_size=st.sampled_from(CLUSTER_SIZES),
    refcount_bits=st.sampled_from(REFCOUNT_WIDTHS),
    kind=st.sampled_from([*KINDS, "0.10"]),
    has_base=st.booleans(),
    extended=st.booleans(),
)
def test_any_disk_reads_the_same(
    seed: int,
    size: int,
    cluster_size: int,
    refcount_bits: int,
    kind: str,
    has_base: bool,
    extended: bool,
) -> None:
    options = ["-c", str(cluster_size)]
    if kind == "0.10":
        options += ["--compress", "zlib", "--compat", "0.10"]
    else:
        options += ["--compress", kind, "-r", str(refcount_bits)]
        options += ["--extended-l2"] if extended and cluster_size >= 16 << 10 else []
    with tempfile.TemporaryDirectory() as folder:
        raw = mixed(Path(folder) / "disk.raw", size, seed)
        if has_base:
            base = mixed(Path(folder) / "base.raw", max(0, size - seed % 90_000), seed)
            with open(base, "r+b") as file:
                file.seek(size // 3)
                file.write(text(size // 9, seed + 1))
            options += ["--diff", str(base), "-b", str(base), "-F", "raw"]
        image = judge(raw, *options)
        for few in (["-m", "1", "--compress-memory", "0"], ["-m", "7", "--compress-memory", "90K"]):
            assert stream(raw, *options, *few) == image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster_size", [4096, 65536, 1 << 20])
def test_it_is_no_larger_than_qemu_img_makes_it(
    tmp_path: Path, cluster_size: int, kind: str
) -> None:
    pieces = [
        (at, content("noise" if at // 65536 % 2 else "text", 65536, at))
        for at in range(0, 4 << 20, 65536)
    ]
    for number, raw in enumerate(
        (
            mixed(tmp_path / "mixed.raw", 5 << 20),
            write_disk(tmp_path / "turns.raw", 4 << 20, pieces),
            write_disk(tmp_path / "noise.raw", 4 << 20, [(0, noise(4 << 20))]),
        )
    ):
        image = stream(raw, "--compress", kind, "-c", str(cluster_size))
        options = f"cluster_size={cluster_size},compression_type={kind}"
        theirs = tmp_path / "theirs.qcow2"
        images.shell("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, theirs)
        assert len(image) <= theirs.stat().st_size
        if number == 2:
            assert len(image) <= len(stream(raw, "-c", str(cluster_size)))


@pytest.mark.guarantee(
    4, "a compressed cluster", "byte for byte that of `qemu-img convert -c` with the same library"
)
@pytest.mark.parametrize("kind", KINDS)
def test_clusters_are_byte_for_byte_those_of_qemu_img(tmp_path: Path, kind: str) -> None:
    raw = write_disk(tmp_path / "disk.raw", 1 << 20, [(0, text(1 << 20))])
    theirs = tmp_path / "theirs.qcow2"
    options = f"compression_type={kind}"
    images.shell("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, theirs)
    image, other = stream(raw, "--compress", kind), theirs.read_bytes()
    ours_at, theirs_at = (count_references(each).compressed for each in (image, other))
    length = ours_at[1] - ours_at[0]
    assert image[ours_at[0] :][:length] == other[theirs_at[0] :][:length]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("refcount_bits", REFCOUNT_WIDTHS)
def test_a_guest_that_writes_to_it_leaves_it_intact(
    tmp_path: Path, refcount_bits: int, extended: bool
) -> None:
    raw = mixed(tmp_path / "disk.raw", 3 << 20, refcount_bits)
    options = ["--compress", "zlib", "-r", str(refcount_bits)]
    image = tmp_path / "image.qcow2"
    image.write_bytes(stream(raw, *options, *(["--extended-l2"] if extended else [])))
    chosen = random.Random(refcount_bits)
    spots = [(chosen.randrange(0, 5000) * 512, chosen.choice([512, 70_144])) for _ in range(20)]
    commands = [f"write -P 7 {offset} {length}" for offset, length in spots]
    images.write(image, *commands)
    images.write(raw, *commands, form="raw")
    judges.qemu_check(image)
    judges.qemu_compare(raw, image)


@pytest.mark.parametrize("cluster_size", [16 << 10, 64 << 10, 2 << 20])
def test_extended_entries_say_all_or_nothing(tmp_path: Path, cluster_size: int) -> None:
    size = 8 * cluster_size
    raw = write_disk(tmp_path / "disk.raw", size, [(0, noise(cluster_size))])
    base = write_disk(tmp_path / "base.raw", size, [(0, text(3 * cluster_size))])
    over = ["--diff", str(base), "-b", str(base), "-F", "raw"]
    image = judge(raw, "--extended-l2", *over, "-c", str(cluster_size))
    everything = (1 << 32) - 1
    bitmaps = count_references(image).bitmaps
    assert bitmaps == [everything, everything << 32, everything << 32]
    kinds = [
        (each["start"], each["data"], each["zero"], each["depth"])
        for each in judges.qemu_map(tmp_path / "image.qcow2")
    ]
    hole = (3 * cluster_size, False, True, 1)
    assert kinds == [(0, True, False, 0), (cluster_size, False, True, 0), hole]


def test_extended_entries_go_with_a_data_file(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 1 << 20, [(0, noise(99_999))])
    (tmp_path / "i.qcow2").write_bytes(stream("disk.raw", "-d", "--extended-l2", cwd=tmp_path))
    judges.qemu_check(tmp_path / "i.qcow2")
    judges.qemu_compare(raw, tmp_path / "i.qcow2")


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_other_readers_know_what_zlib_is(tmp_path: Path, cluster_size: int) -> None:
    """They and QEMU read every byte."""
    raw = mixed(tmp_path / "disk.raw", 5 << 20)
    image = judge(raw, "--compress", "zlib", "-c", str(cluster_size))
    assert judges.dissect_read(image) == raw.read_bytes()
    assert judges.libqcow_read(tmp_path / "image.qcow2") == raw.read_bytes()


# What an image holds compressed is passed through


def compressed_by_qemu(path: Path, raw: Path, options: str) -> Path:
    images.shell("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    return path


def passed_through(image: Path, *options: str) -> bytes:
    """Export a compressed image, look at the result in every way, and return it."""
    whole = judge(images.as_raw(image, "qcow2"), *options, source=image)
    for few in (["-m", "1", "--compress-memory", "0"], ["-m", "7", "--compress-memory", "90K"]):
        assert stream("-f", "qcow2", image, *options, *few) == whole
    return whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_what_is_compressed_is_passed_through(tmp_path: Path, cluster_size: int, kind: str) -> None:
    raw = mixed(tmp_path / "disk.raw", 5 << 20, 1)
    options = f"cluster_size={cluster_size},compression_type={kind}"
    theirs = compressed_by_qemu(tmp_path / "theirs.qcow2", raw, options)
    image = passed_through(theirs, "--compress", kind, "-c", str(cluster_size))
    assert len(image) <= theirs.stat().st_size
    other = 16384 if cluster_size == 65536 else 65536
    passed_through(theirs, "--compress", kind, "-c", str(other))
    passed_through(theirs, "--compress", "zlib" if kind == "zstd" else "zstd")


ONLY_SAMPLES = """
import zlib
real = zlib.compressobj
class Small:
    def __init__(self, *arguments):
        self.object = real(*arguments)
    def compress(self, data):
        assert len(data) <= 4096, "a whole cluster was compressed"
        return self.object.compress(data)
    def flush(self):
        return self.object.flush()
zlib.compressobj = Small
"""


def test_what_its_writer_found_not_to_shrink_is_not_compressed_again(tmp_path: Path) -> None:
    pieces = [
        (at, content("noise" if at // 65536 % 3 else "text", 65536, at))
        for at in range(0, 4 << 20, 65536)
    ]
    raw = write_disk(tmp_path / "disk.raw", 4 << 20, pieces)
    theirs = compressed_by_qemu(tmp_path / "theirs.qcow2", raw, "compression_type=zlib")
    (tmp_path / "altered").mkdir()
    env = altered(tmp_path / "altered", ONLY_SAMPLES)
    image = stream("-f", "qcow2", theirs, "--compress", "zlib", env=env)
    assert image == passed_through(theirs, "--compress", "zlib")
    assert len(image) <= theirs.stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_guest_has_written_since_is_compressed(tmp_path: Path, kind: str) -> None:
    """Into the compressed image itself, and into an overlay; zeros hide what is below them."""
    raw = mixed(tmp_path / "disk.raw", 5 << 20, 2)
    theirs = compressed_by_qemu(tmp_path / "theirs.qcow2", raw, f"compression_type={kind}")
    source = tmp_path / "text"
    source.write_bytes(text(1 << 20))
    images.write(theirs, f"write -s {source} 1M 1M", "write -z 0 300k")
    image = passed_through(theirs, "--compress", kind)
    assert len(image) <= theirs.stat().st_size - 300_000
    above = images.overlay(tmp_path / "above.qcow2", theirs, "qcow2")
    images.write(above, f"write -s {source} 3000k 1M", "write -z 1M 200k", "write -P 7 2M 70000")
    image = passed_through(above, "--compress", kind)
    assert len(image) <= theirs.stat().st_size
    finer = images.overlay(tmp_path / "finer.qcow2", theirs, "qcow2", "-o", "extended_l2=on")
    images.write(finer, "write -P 9 66k 2k", "write -z 200k 4k", f"write -s {source} 3M 64k")
    passed_through(finer, "--compress", kind)
    passed_through(finer, "--compress", kind, "--extended-l2")


@pytest.mark.parametrize("kind", KINDS)
def test_disks_of_every_source_are_compressed(tmp_path: Path, kind: str) -> None:
    """A server's, foreign ones by their offsets and by qemu-nbd: the bytes of the raw disk's."""
    raw = mixed(tmp_path / "disk.raw", 4 << 20, 3)
    expected = judge(raw, "--compress", kind)
    with nbdkit(tmp_path, "file", raw) as server:
        assert stream(server.uri, "--compress", kind) == expected
    for form, options in (
        ("vmdk", []),
        ("vmdk", ["-o", "subformat=streamOptimized"]),
        ("vhdx", []),
    ):
        image = tmp_path / "foreign"
        words = ["qemu-img", "convert", "-f", "raw", "-O", form, *options]
        subprocess.check_call([*words, raw, image])
        assert stream("-f", form, image, "--compress", kind) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_compressed(tmp_path: Path, kind: str) -> None:
    """By a dirty bitmap, by comparison with and without a backing file."""
    raw = mixed(tmp_path / "disk.raw", 4 << 20, 4)
    guest, monday = tmp_path / "guest.qcow2", tmp_path / "monday.qcow2"
    subprocess.check_call(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, guest])
    monday.write_bytes(stream("-f", "qcow2", guest, "--compress", kind))
    subprocess.check_call(["qemu-img", "bitmap", "--add", guest, "b"])
    source = tmp_path / "text"
    source.write_bytes(text(1 << 20))
    images.write(guest, f"write -s {source} 1M 300k", "write -z 2M 100k")
    over = ["-b", str(monday), "-F", "qcow2"]
    for options in (["--bitmap", "b"], ["--diff", str(monday)]):
        tuesday = tmp_path / "tuesday.qcow2"
        tuesday.write_bytes(stream("-f", "qcow2", guest, *options, *over, "--compress", kind))
        count_references(tuesday.read_bytes())
        judges.qemu_check(tuesday)
        judges.qemu_compare(images.as_raw(guest, "qcow2"), tuesday)
        bare = stream("-f", "qcow2", guest, *options, "--compress", kind)
        assert count_references(bare).compressed
        said = stream("-f", "qcow2", guest, *options, "--compress", kind, "--measure")
        assert said.startswith(b"required size: %d\n" % len(bare))


def test_layouts_are_compressed_without_a_look(tmp_path: Path) -> None:
    raw = mixed(tmp_path / "disk.raw", 3 << 20)
    layout = tmp_path / "layout.json"
    layout.write_text('[{"offset": 0, "length": 3145728}]')
    looked = stream(raw, "--compress", "zlib", "--layout", layout)
    assert looked == judge(raw, "--compress", "zlib")
    judge(raw, "--compress", "zlib", "--layout", str(layout), "--no-scan")


CHANGE = """
import os, sys, qcow2_to_stdout as program
make_plan = program.make_plan
def plan(*arguments):
    with open({!r}, "r+b") as file:
        file.write(os.urandom(65536))
    return make_plan(*arguments)
program.make_plan = plan
sys.argv = ["qcow2_to_stdout.py", {!r}, "--compress", "zlib", "--live", *{!r}]
program.main()
"""


@pytest.mark.guarantee(5, "a cluster that compresses to another size the second time", "exit 1")
@pytest.mark.parametrize(("memory", "status"), [("0", 1), ("1M", 0)])
def test_a_size_that_differs_the_second_time_is_an_error(
    tmp_path: Path, memory: str, status: int
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 1 << 20, [(0, text(1 << 20))])
    code = CHANGE.format(str(raw), str(raw), ["--compress-memory", memory])
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        ["python3", "-c", code],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.count(b"\n") == 1
    assert (b"compresses to another size" if status else b"not of one moment") in done.stderr


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 96 << 20, [(0, noise(65_000) + bytes(536))])
    with open(raw, "r+b") as file:
        for at in range(0, 96 << 20, 65536):
            file.seek(at)
            file.write(noise(40_000, at))
    with start("--compress", "zstd", "--compress-memory", "1M", raw) as program:
        peak = 0
        while program.stdout.read(1 << 20):
            status = Path(f"/proc/{program.pid}/status").read_text()
            peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max([peak, *map(int, peaks)])
        assert program.wait() == 0, program.stderr.read()
    assert 0 < peak < 62 << 10  # KiB


def test_progress_says_what_was_saved(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 1 << 20, [(0, b"x" * (1 << 20))])
    assert "; compression saved 0.999 MiB" in run(raw, "--compress", "zlib", "-p").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "--compress", "zlib"], ["--data-file", "leave one"]),
        (["-R", "--compress", "zlib"], ["--data-file-raw"]),
        (["--compat", "0.10", "--compress", "zstd"], ["use --compress zlib"]),
        (["--compat", "0.10", "--extended-l2"], ["leave --extended-l2 out"]),
        (["--extended-l2", "-c", "8K"], ["at least 16 KiB"]),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, options: List[str], words: List[str]) -> None:
    assert_refused(run(write_disk(tmp_path / "disk.raw", 1 << 20), *options), *words)


def test_a_stream_is_not_compressed(tmp_path: Path) -> None:
    result = run("--size", "1M", "-", "--compress", "zlib", stdin=bytes(1 << 20))
    assert_refused(result, "write it to a file first")


def test_a_system_without_zstd_says_so(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 1 << 20, [(0, b"x")])
    code = "import ctypes\ndef none(*_): raise OSError\nctypes.CDLL = none\n"
    code += "import sys\nsys.modules['compression'] = None\n"
    result = run(raw, "--compress", "zstd", env=altered(tmp_path, code))
    assert_failed(result, "libzstd.so.1", "--compress zlib")


def test_pythons_own_zstd_does_the_same(tmp_path: Path) -> None:
    """That of 3.14, as its authors have it for older ones: both ways, where no libzstd is."""
    code = "import ctypes, sys, types\ndef none(*_): raise OSError\nctypes.CDLL = none\n"
    code += "import backports.zstd\nsys.modules['compression'] = types.ModuleType('compression')\n"
    code += "sys.modules['compression.zstd'] = backports.zstd\n"
    env = altered(tmp_path, code)
    raw = mixed(tmp_path / "raw", 3 << 20)
    image = compressed_by_qemu(tmp_path / "a.qcow2", raw, "compression_type=zstd")
    plain = run("-f", "qcow2", image, env=env, python=sys.executable)
    assert plain == run("-f", "qcow2", image)
    ours = run(raw, "--compress", "zstd", env=env, python=sys.executable)
    (tmp_path / "ours").write_bytes(ours.stdout)
    judges.qemu_compare(raw, tmp_path / "ours")


def test_compressed_clusters_stay_where_descriptors_reach() -> None:
    geometry = Geometry(1 << 60, 2 << 20, 16)
    plan = make_plan(geometry, 1, 1 << 28, [1000])
    assert plan.packed_offset > 1 << 49
    with pytest.raises(Exception, match=r"2\^49"):
        plan.refuse_if_too_large()


@given(
    sizes=st.lists(st.integers(1, 4095), max_size=300),
    refcount_bits=st.sampled_from([1, 2, 4, 8]),
)
def test_no_refcount_overflows(sizes: List[int], refcount_bits: int) -> None:
    geometry = Geometry(1 << 30, 4096, refcount_bits)
    offsets = list(packed_offsets(sizes, geometry))
    counts: Counter[int] = Counter()
    end = 0
    for offset, size in zip(offsets, sizes):
        assert offset in (end, -(-end // 4096) * 4096)
        end = offset + size
        counts.update({offset // 4096, (end - 1) // 4096})
    assert offsets[-1] == end
    refcounts = list(packed_refcounts(make_plan(geometry, 1, 0, sizes)))
    assert refcounts == [counts[index] for index in range(len(counts))]
    assert max(counts.values(), default=0) < 1 << refcount_bits


def test_a_truncated_image_does_not_pass_through(tmp_path: Path) -> None:
    """The compressed cluster at its end is looked at: nobody else would before it is needed."""
    raw = write_disk(tmp_path / "raw", (4 << 20), [(0, text(4 << 20))])
    image = tmp_path / "a.qcow2"
    compressed_by_qemu(image, raw, "compression_type=zlib")
    stream("-f", "qcow2", "--compress", "zlib", image)
    os.truncate(image, image.stat().st_size - 1000)
    assert_refused(run("-f", "qcow2", "--compress", "zlib", image), "is damaged")


def test_what_a_guest_has_written_into_a_compressed_image_shrinks(tmp_path: Path) -> None:
    """Noise at the start of each cluster, text behind it: a sample from all of it says so."""
    unit = noise(4 << 10) + text(60 << 10)
    raw = write_disk(tmp_path / "raw", 5 << 20, [(0, unit * 64)])
    image = tmp_path / "a.qcow2"
    subprocess.check_call(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image])
    images.write(image, "write -c -P 1 4M 64k")
    ours = len(stream("-f", "qcow2", "--compress", "zlib", image))
    theirs = tmp_path / "theirs"
    words = ["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2"]
    subprocess.check_call([*words, image, theirs])
    assert ours <= theirs.stat().st_size


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_compressed_image_boots_where_it_lies(tmp_path: Path, kind: str) -> None:
    """A boot sector that says so on QEMU's debug port, and ends the machine."""
    needs(shutil.which("qemu-system-x86_64") is not None, "qemu-system-x86_64")
    # mov al, 'B'; out 0xe9, al; mov al, 1; out 0xf4, al; hlt
    sector = bytes.fromhex("b042e6e9b001e6f4f4").ljust(510, b"\0") + b"\x55\xaa"
    raw = write_disk(tmp_path / "raw", 1 << 20, [(0, sector), (1 << 10, text(100_000))])
    image = tmp_path / "a.qcow2"
    image.write_bytes(stream(raw, "--compress", kind))
    assert count_references(image.read_bytes()).compressed
    machine = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg"]
    devices = ["-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    drive = ["-drive", f"file={image},format=qcow2,if=ide"]
    done = subprocess.run(
        [*machine, *devices, *drive], stdout=subprocess.PIPE, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout[-1:]) == (3, b"B")
