"""Layouts of every dialect are understood, and nonsense in them is refused by its entry."""

import io
import json
import os
from pathlib import Path
from typing import Any, List, Set, Tuple

import pytest
from support.disks import noise, write_disk
from support.importer import read_image
from support.program import ROOT, assert_refused, run, stream

SAMPLES = ROOT / "tests" / "samples"
MIB = 1 << 20
SIZE = 8 * MIB + 512
OVERLAY = ["-b", "base.raw", "-F", "raw"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk without any zero cluster, so that the layout alone decides."""
    size = 32 * MIB
    return write_disk(tmp_path_factory.mktemp("layouts") / "disk.raw", size, [(0, noise(size))])


def exported(disk: Path, layout: Any, *options: str) -> Tuple[List[int], Set[int]]:
    """(data clusters, zero clusters) of the image that a layout gives."""
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    image = read_image(io.BytesIO(stream(disk, "--layout", "-", *options, stdin=text)))
    return list(image.data), image.zeros


def sample(name: str) -> bytes:
    return (SAMPLES / name).read_bytes()


def clusters(*ranges: Tuple[int, int]) -> List[int]:
    """Cluster numbers of 64 KiB that byte ranges touch."""
    return sorted({n for a, b in ranges for n in range(a // 65536, -(-b // 65536))})


def test_rbd_diff(dense: Path) -> None:
    changed = sample("rbd-diff-monday-to-tuesday.json")
    touched = clusters((0, 65536), (4 * MIB, 4 * MIB + 65536), (12 * MIB, 12 * MIB + 4096),
                       (20 * MIB, 20 * MIB + 1536))  # fmt: skip
    # Without trust the content decides, and this disk has no zeros.
    assert exported(dense, changed, *OVERLAY) == (touched, set())
    # With it, a cluster is zeros if the layout knows all of it.
    data, zeros = exported(dense, changed, "--trust-layout", *OVERLAY)
    assert (data, zeros) == (touched[1:], {0})
    data, zeros = exported(dense, changed, "--trust-layout")
    assert (data, zeros) == (touched[1:], set())
    whole = sample("rbd-diff-monday-to-tuesday-whole-object.json")
    data, zeros = exported(dense, whole, "--trust-layout", *OVERLAY)
    assert zeros == set(clusters((0, 4 * MIB)))
    assert data == clusters((4 * MIB, 8 * MIB), (12 * MIB, 16 * MIB), (20 * MIB, 24 * MIB))


def test_qemu_img_map(dense: Path) -> None:
    chain = sample("qemu-img-map-chain.json")
    data, zeros = exported(dense, chain, "--trust-layout", *OVERLAY)
    assert (data, zeros) == (clusters((65536, 131072), (6 * MIB, 6 * MIB + 65536)),
                             set(clusters((4 * MIB, 4 * MIB + 65536))))  # fmt: skip
    # Without a backing file the whole chain is data.
    data, zeros = exported(dense, chain, "--trust-layout")
    assert data == clusters((0, MIB), (4259840, 4325376), (6 * MIB, 6 * MIB + 65536),
                            (8 * MIB, SIZE))  # fmt: skip
    assert not zeros


def test_nbdinfo_dirty_bitmap(dense: Path) -> None:
    dirty = clusters((65536, 131072), (4 * MIB, 4 * MIB + 65536), (6 * MIB, 6 * MIB + 65536))
    assert exported(dense, sample("nbdinfo-map-dirty-bitmap.json"), *OVERLAY) == (dirty, set())
    assert exported(dense, sample("nbdinfo-map-dirty-bitmap.json")) == (dirty, set())


def test_nbdinfo_allocation(dense: Path) -> None:
    allocation = sample("nbdinfo-map-allocation.json")
    data = clusters((0, MIB), (4259840, 4325376), (6 * MIB, 6 * MIB + 4096), (8 * MIB, SIZE))
    assert exported(dense, allocation, "--trust-layout") == (data, set())
    # It does not say what has changed: over a backing file zeros must hide what is there.
    data_again, zeros = exported(dense, allocation, "--trust-layout", *OVERLAY)
    assert (data_again, zeros) == (data, set(clusters((0, SIZE))) - set(data))


def test_nbdinfo_allocation_depth(dense: Path) -> None:
    depth = sample("nbdinfo-map-allocation-depth.json")
    local = clusters((65536, 131072), (4 * MIB, 4 * MIB + 65536), (6 * MIB, 6 * MIB + 65536))
    assert exported(dense, depth, *OVERLAY) == (local, set())
    data, _ = exported(dense, depth, "--trust-layout")
    assert data == clusters((0, MIB), (4 * MIB, 4325376), (6 * MIB, 6 * MIB + 65536),
                            (8 * MIB, SIZE))  # fmt: skip


def test_a_plain_list_in_any_order_with_overlaps(dense: Path) -> None:
    layout = [
        {"offset": 5 * MIB, "length": 1},
        {"offset": 31 * MIB, "length": 99 * MIB},  # past the end
        {"offset": 65536 - 1, "length": 2},
        {"offset": 5 * MIB, "length": 65536},
        {"offset": 32 * MIB, "length": 0},
    ]
    assert exported(dense, layout)[0] == clusters((0, 131072), (5 * MIB, 5 * MIB + 65536),
                                                  (31 * MIB, 32 * MIB))  # fmt: skip


def test_data_wins_over_zeros(dense: Path) -> None:
    layout = [
        {"offset": 0, "length": 4 * 65536, "exists": "false"},
        {"offset": 70_000, "length": 1, "exists": "true"},
        {"offset": 3 * 65536, "length": 65536, "exists": "true"},
    ]
    data, zeros = exported(dense, layout, "--trust-layout", *OVERLAY)
    assert (data, zeros) == ([1, 3], {0, 2})


def test_zeros_in_pieces_make_a_whole_cluster(dense: Path) -> None:
    layout = [{"offset": n * 4096, "length": 4096, "exists": "false"} for n in range(31)]
    data, zeros = exported(dense, layout, "--trust-layout", *OVERLAY)
    assert (data, zeros) == ([1], {0})


def test_an_image_that_was_never_written(dense: Path) -> None:
    assert exported(dense, b"[]") == ([], set())
    assert exported(dense, b" \n[ ] \n", *OVERLAY) == ([], set())


def test_a_layout_from_a_file(dense: Path) -> None:
    image = stream(dense, "--layout", SAMPLES / "rbd-diff-monday.json")
    assert len(read_image(io.BytesIO(image)).data) == 1 + 16 + 1


def test_a_million_entries(dense: Path) -> None:
    entry = b'{"offset":%d,"length":16,"exists":"true"}'
    layout = b"[" + b",".join(entry % (n * 32) for n in range(1_000_000)) + b"]"
    assert len(exported(dense, layout, "-c", "2M")[0]) == 16


def test_a_refcount_table_over_8_mib(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk.raw", 40 << 30)
    layout = json.dumps([{"offset": 0, "length": 40 << 30}]).encode()
    result = run(disk, "--layout", "-", "--trust-layout", "-c512", "-r64", stdin=layout)
    assert_refused(result, "refcount table", "8 MiB", "--cluster-size", "--refcount-bits")


GOOD = {"offset": 0, "length": 512}
BAD = {
    "not JSON": (b"offset,length\n0,512\n", "not a JSON list"),
    "empty": (b"", "producer"),
    "an object": (b'{"offset": 0, "length": 512}', "not a JSON list"),
    "a number": (b"12", "not a JSON list"),
    "binary": (noise(5000), "not a JSON list"),
    "a binary list": (b"[" + noise(5000), "entry 0"),
    "UTF-16": ("[]".encode("utf-16"), "not a JSON list"),
    "cut short": (b'[{"offset": 0, "length": 512}', "behind entry 0"),
    "cut in an entry": (b'[{"offset": 0, "length": 512}, {"off', "entry 1"),
    "no comma": (b'[{"offset": 0, "length": 512} {}]', "behind entry 0"),
    "a comma too many": (b'[{"offset": 0, "length": 512},]', "entry 1"),
    "something behind": (b"[] []", "behind the end"),
    "nested": (b"[" * 200_000, "entry 0"),
    "nested in an entry": (b'[{"offset":' + b"[" * 200_000, "entry 0"),
    "a list of lists": (b"[[0, 512]]", "entry 0"),
    "null": (b"[null]", "entry 0"),
    "no length": ([GOOD, {"offset": 0}], "entry 1 has no 'length'"),
    "no offset": ([GOOD, {"length": 512}], "entry 1 has no 'offset'"),
    "empty entry": ([{}], "entry 0 has no 'offset'"),
    "negative": ([GOOD, {"offset": -512, "length": 512}], "entry 1"),
    "negative length": ([{"offset": 512, "length": -1}], "entry 0"),
    "fraction": ([{"offset": 0.5, "length": 512}], "0.5"),
    "float": ([{"offset": 0, "length": 512.0}], "512.0"),
    "boolean": ([{"offset": True, "length": 512}], "True"),
    "text": ([{"offset": "0", "length": 512}], "'0'"),
    "null length": ([{"offset": 0, "length": None}], "None"),
    "NaN": (b'[{"offset": NaN, "length": 512}]', "nan"),
    "infinite": (b'[{"offset": 1e999, "length": 512}]', "inf"),
    "a huge integer": (b'[{"offset": ' + b"9" * 5_000_000 + b', "length": 1}]', "entry 0"),
    "past the end": ([GOOD, {"offset": 33 * MIB, "length": 512}], "past the end"),
    "just past the end": ([{"offset": 32 * MIB, "length": 1}], "past the end"),
    "unknown exists": ([{**GOOD, "exists": "maybe"}], "entry 0"),
    "boolean exists": ([{**GOOD, "exists": False}], "entry 0"),
    "a list as exists": ([{**GOOD, "exists": ["true"]}], "entry 0"),
    "mixed dialects": ([GOOD, {**GOOD, "exists": "true"}], "entry 1"),
    "mixed with a map": ([{**GOOD, "exists": "true"}, {"start": 0, "length": 1}], "entry 1"),
    "a map without zero": ([{"start": 0, "length": 1, "depth": 0}], "entry 0"),
    "a map with text": (
        [{"start": 0, "length": 1, "depth": 0, "zero": "no", "data": True}],
        "entry 0",
    ),
    "an unknown NBD context": ([{**GOOD, "type": 2, "description": "mine"}], "entry 0"),
    "an NBD type of text": ([{**GOOD, "type": "2", "description": "zero"}], "entry 0"),
}


@pytest.mark.guarantee(5, "nonsense in a layout", "refused, by its entry")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("options", [[], ["--trust-layout"], OVERLAY], ids=["", "trust", "overlay"])
def test_nonsense_is_refused_by_its_entry(dense: Path, case: str, options: List[str]) -> None:
    layout, words = BAD[case]
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    result = run(dense, "--layout", "-", *options, stdin=text)
    assert_refused(result, "layout '-'", words)
    assert len(result.stderr) < 400


def test_a_layout_that_is_no_text(dense: Path) -> None:
    result = run(dense, "--layout", "/dev/zero")
    assert_refused(result, "/dev/zero", "not a JSON list")


def test_a_layout_that_is_not_there(dense: Path, tmp_path: Path) -> None:
    assert_refused(run(dense, "--layout", tmp_path / "none"), "--layout", "No such file")
    assert_refused(run(dense, "--layout", tmp_path), "--layout", "directory")


CONTRADICTIONS = [
    (["--diff", "D", "-R"], "--data-file-raw"),
    (["--diff", "D", "-d"], "--data-file"),
    (["--diff", "D", "--layout", "L"], "one of them"),
    (["--layout", "L", "-R"], "--layout"),
    (["-b", "N", "-F", "raw"], "--diff, --bitmap or --layout"),
    (["-b", "N", "--diff", "D"], "--backing-format"),
    (["-F", "raw"], "--backing-file"),
    (["-F", "raw", "--diff", "D"], "--backing-file"),
    (["-b", "N", "-F", "raw", "-d"], "--data-file"),
    (["-b", "", "-F", "raw", "--diff", "D"], "empty"),
    (["-b", "N", "-F", "", "--diff", "D"], "format"),
    (["-b", "N", "-F", "a,b=c", "--diff", "D"], "format"),
    (["-b", "N", "-F", "QCOW2", "--diff", "D"], "is no format"),
    (["-b", "file:N", "-F", "raw", "--diff", "D"], "from its own folder"),
    (["-b", "N" * 1024, "-F", "raw", "--diff", "D"], "1023"),
    (["-b", "N" * 377, "-F", "raw", "--diff", "D", "-c", "512"], "does not fit"),
    (["--compat", "0.10", "-r", "1"], "16-bit"),
    (["--compat", "0.10", "-d"], "data file"),
    (["--compat", "0.10", "-R"], "data file"),
    (["--json-header-diff-map", "3"], "--diff"),
    (["--layout", "L", "--json-header-map", "3"], "one of them"),
]


@pytest.mark.parametrize(("options", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_options_that_do_not_go_together(tmp_path: Path, options: List[str], words: str) -> None:
    for name in "DIL":
        write_disk(tmp_path / name, 1000, [(0, b"[]" if name == "L" else noise(1000))])
    os.truncate(tmp_path / "L", 2)
    assert_refused(run("I", *options, cwd=tmp_path), words)


def test_ovirt_imageio_names_zeros_and_dirty_extents(dense: Path) -> None:
    """With `hole` all that is no zeros counts, with `dirty` only what has changed."""
    size = dense.stat().st_size
    holes = [
        {"start": 0, "length": 65536, "zero": False, "hole": False},
        {"start": 65536, "length": size - 65536, "zero": True, "hole": True},
    ]
    dirty = [
        {"start": 0, "length": 65536, "zero": False, "dirty": True},
        {"start": 65536, "length": size - 65536, "zero": False, "dirty": False},
    ]
    expected = stream(dense, "--layout", "-", stdin=b'[{"offset": 0, "length": 65536}]')
    for extents in (holes, dirty):
        text = json.dumps(extents).encode()
        assert stream(dense, "--layout", "-", "--no-scan", stdin=text) == expected


@pytest.mark.guarantee(8, "a dirty bitmap that looks like a map", "refused")
def test_a_dirty_bitmap_in_the_disguise_of_a_map_is_refused(dense: Path) -> None:
    """As qemu-img map writes it where x-dirty-bitmap takes the place of block status."""
    extent = {
        "start": 0,
        "length": 65536,
        "depth": 0,
        "present": True,
        "zero": False,
        "data": False,
    }
    result = run(dense, "--layout", "-", stdin=json.dumps([extent]).encode())
    assert_refused(result, "entry 0", "--bitmap NAME")
