"""The image reads exactly as the source, whoever reads it."""

import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import judges
from support.disks import Recipe, noise, padded, recipes, write_disk
from support.importer import read_image
from support.program import stream

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
REFCOUNT_WIDTHS = [1, 2, 4, 8, 16, 32, 64]


def judge(raw: Path, *options: str, readers: bool = True) -> bytes:
    """Export a disk and let every judge have a look. Returns the image."""
    image = stream(raw, *options)
    content = padded(raw.read_bytes())
    parsed = read_image(io.BytesIO(image))
    assert parsed.over() == content
    assert all(cluster.strip(b"\0") for cluster in parsed.data.values()), "zeros were stored"
    path = raw.with_name("image.qcow2")
    path.write_bytes(image)
    judges.qemu_check(path)
    judges.qemu_compare(raw, path)
    if readers and content:
        assert judges.dissect_read(image) == content
    return image


@settings(max_examples=80)
@given(
    recipe=recipes(),
    cluster_size=st.sampled_from(CLUSTER_SIZES),
    refcount_bits=st.sampled_from(REFCOUNT_WIDTHS),
)
def test_any_disk_reads_the_same(recipe: Recipe, cluster_size: int, refcount_bits: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw = recipe.write(Path(folder) / "disk.raw")
        judge(raw, "-c", str(cluster_size), "-r", str(refcount_bits))


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_libqcow_reads_the_same(tmp_path: Path, cluster_size: int) -> None:
    recipe = Recipe((3 << 20) + 513, [(0, "every4096", 99_999), (2 << 20, "noise", 1 << 20)])
    raw = recipe.write(tmp_path / "disk.raw")
    image = tmp_path / "image.qcow2"
    image.write_bytes(stream(raw, "-c", str(cluster_size)))
    assert judges.libqcow_read(image) == padded(raw.read_bytes())


EDGES = sorted(
    {0, 1, 511, 512, 513, 1023, 1024, 1025}
    # One L2 table of 512 bytes reaches 32 KiB, one L1 cluster of 512 bytes 2 MiB.
    | {edge + off for edge in (32 << 10, 2 << 20, 6 << 20) for off in (-1, 0, 1, 512)}
)


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("end", ["data", "hole"])
def test_sizes_at_the_edges_of_small_tables(tmp_path: Path, size: int, end: str) -> None:
    pieces = [(0, noise(600))]
    if end == "data":
        pieces.append((max(0, size - 1), b"\xff"))
    judge(write_disk(tmp_path / "disk.raw", size, pieces), "-c", "512")


@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize(
    ("cluster_size", "tables"), [(4096, 1), (4096, 3), (65536, 1), (2 << 20, 1)]
)
def test_sizes_at_the_edges_of_l2_tables(
    tmp_path: Path, cluster_size: int, tables: int, off: int
) -> None:
    size = tables * cluster_size * cluster_size // 8 + off
    last = (size - 1) // cluster_size * cluster_size
    pieces = [(0, b"first"), (max(0, last - 1), b"ab"), (size - 1, b"z")]
    raw = write_disk(tmp_path / "disk.raw", size, pieces)
    image = tmp_path / "image.qcow2"
    image.write_bytes(stream(raw, "-c", str(cluster_size)))
    judges.qemu_check(image)
    judges.qemu_compare(raw, image)


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_one_byte_at_the_end_of_a_cluster_is_kept(tmp_path: Path, cluster_size: int) -> None:
    size = 5 * cluster_size + 7
    pieces = [(2 * cluster_size - 1, b"\x01"), (4 * cluster_size, b"\x02"), (size - 1, b"\x03")]
    raw = write_disk(tmp_path / "disk.raw", size, pieces)
    parsed = read_image(io.BytesIO(judge(raw, "-c", str(cluster_size))))
    assert sorted(parsed.data) == [1, 4, 5]


def test_zeros_that_are_stored_take_no_space(tmp_path: Path) -> None:
    stored = write_disk(tmp_path / "stored.raw", 3 << 20, [(0, bytes(3 << 20))])
    hole = write_disk(tmp_path / "hole.raw", 3 << 20)
    assert stream(stored) == stream(hole)


def test_a_huge_hole_with_a_byte_at_its_end(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    size = 15 << 40  # what one file can have on ext4
    write_disk(raw, size, [(size - 1, b"\x01")])
    image = tmp_path / "image.qcow2"
    image.write_bytes(stream(raw))
    judges.qemu_check(image)
    extents = [extent for extent in judges.qemu_map(image) if extent["data"]]
    assert [(extent["start"], extent["length"]) for extent in extents] == [(size - 65536, 65536)]


@pytest.mark.parametrize("cluster_size", [1024, 65536])
@pytest.mark.parametrize("option", ["-d", "-R"])
def test_an_external_data_file(tmp_path: Path, option: str, cluster_size: int) -> None:
    recipe = Recipe((1 << 20) + 512, [(70_000, "noise", 300_000), (900_000, "every4096", 90_000)])
    raw = recipe.write(tmp_path / "disk.raw")
    image = tmp_path / "image.qcow2"
    image.write_bytes(stream("disk.raw", option, "-c", str(cluster_size), cwd=tmp_path))
    judges.qemu_check(image)
    judges.qemu_compare(raw, image)
    data = judges.qemu_info(image)["format-specific"]["data"]
    assert (data["data-file"], data["data-file-raw"]) == ("disk.raw", option == "-R")
