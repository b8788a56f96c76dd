"""A difference, opened over its base, is the new disk: as an overlay and as a bare image."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Tuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import judges
from support.disks import noise, padded, pattern, write_disk
from support.importer import Image, read_image
from support.program import run, stream

CLUSTERS = st.sampled_from([512, 1024, 4096, 65536, 1 << 20])


class Change(NamedTuple):
    """A base, what was written over it, and the new disk's size."""

    base_size: int
    base: List[Tuple[int, str, int]]
    size: int
    written: List[Tuple[int, str, int]]

    def write(self, folder: Path) -> Tuple[Path, Path]:
        """(base, new disk), both sparse files."""
        base = [(offset, pattern(name, length)) for offset, name, length in self.base]
        write_disk(folder / "base.raw", self.base_size, base)
        after = (folder / "base.raw").read_bytes()[: self.size].ljust(self.size, b"\0")
        write_disk(folder / "new.raw", self.size, [(0, after)] if after.strip(b"\0") else [])
        with open(folder / "new.raw", "r+b") as file:
            for offset, data in self.pieces():
                file.seek(offset)
                file.write(data)
        return folder / "base.raw", folder / "new.raw"

    def pieces(self) -> List[Tuple[int, bytes]]:
        cut = [(o, pattern(n, length)[: max(0, self.size - o)]) for o, n, length in self.written]
        return [(offset, data) for offset, data in cut if data]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    sizes = st.one_of(
        st.integers(0, 2 << 20),
        st.integers(0, 32).flatmap(lambda n: st.sampled_from([n << 16, (n << 16) + 512])),
    )
    base_size = draw(sizes)
    size = base_size if draw(st.booleans()) else draw(sizes)
    piece = st.tuples(
        st.one_of(st.integers(0, 2 << 20), st.integers(0, 32).map(lambda n: n << 16)),
        st.sampled_from(["noise", "zeros", "first", "last", "every512", "every65536"]),
        st.one_of(st.integers(1, 200_000), st.sampled_from([512, 4096, 65536, 262_144])),
    )
    pieces = st.lists(piece, max_size=5)
    return Change(base_size, draw(pieces), size, draw(pieces))


def truth(change: Change, new: bytes, form: str, spread: int) -> Tuple[str, List[Any]]:
    """A true layout of a change, in the given dialect."""
    extents = [(offset, offset + len(data)) for offset, data in change.pieces()]
    if change.size != change.base_size:
        smaller, larger = sorted((change.base_size, change.size))
        if smaller < change.size:
            extents.append((smaller, larger))
    extents = [(max(0, a - spread), min(change.size, b + spread)) for a, b in extents]
    entries: List[Any] = []
    for start, end in extents:
        zero = not new[start:end].strip(b"\0")
        if form == "rbd":
            exists = "false" if zero else "true"
            entries.append({"offset": start, "length": end - start, "exists": exists})
        elif form == "map":
            common = {"depth": 0, "present": True, "data": not zero}
            entries.append({"start": start, "length": end - start, "zero": zero, **common})
            # What a deeper layer holds has not changed, whatever it is.
            deeper = {"depth": 1, "present": True, "data": True, "zero": False}
            entries.append({"start": 0, "length": min(512, change.size), **deeper})
        elif form == "bitmap":
            kind = {"type": 1, "description": "dirty"}
            entries.append({"offset": start, "length": end - start, **kind})
        else:
            entries.append({"offset": start, "length": end - start})
    return form, entries[::-1]


def check_overlay(folder: Path, image: bytes, new: Path) -> Image:
    """The image over base.raw is the new disk: QEMU's word, and a sequential reader's."""
    overlay = folder / "overlay.qcow2"
    overlay.write_bytes(image)
    judges.qemu_check(overlay)
    judges.qemu_compare(new, overlay)
    parsed = read_image(io.BytesIO(image))
    assert parsed.over((folder / "base.raw").read_bytes()) == padded(new.read_bytes())
    return parsed


@settings(max_examples=60)
@given(change=changes(), cluster_size=CLUSTERS, compat=st.sampled_from(["1.1", "0.10"]))
def test_a_diff_as_an_overlay(change: Change, cluster_size: int, compat: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        base, new = change.write(Path(name))
        options = ["-b", "base.raw", "-F", "raw", "-c", str(cluster_size), "--compat", compat]
        parsed = check_overlay(Path(name), stream(new, "--diff", base, *options), new)
        assert parsed.version == (2 if compat == "0.10" else 3)
        assert (parsed.backing_file, parsed.extensions[0xE2792ACA]) == (b"base.raw", b"raw")
        if parsed.version == 3:
            assert all(cluster.strip(b"\0") for cluster in parsed.data.values())
        # Nothing that is equal is in it.
        before = base.read_bytes()[: parsed.size].ljust(parsed.size + cluster_size, b"\0")
        after = new.read_bytes().ljust(parsed.size + cluster_size, b"\0")
        for index in [*parsed.data, *parsed.zeros]:
            place = slice(index * cluster_size, (index + 1) * cluster_size)
            assert before[place] != after[place], index


@settings(max_examples=60)
@given(change=changes(), cluster_size=CLUSTERS)
def test_a_bare_diff_written_over_the_base(change: Change, cluster_size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        base, new = change.write(Path(name))
        parsed = read_image(io.BytesIO(stream(new, "--diff", base, "-c", str(cluster_size))))
        assert not parsed.zeros, "the importer knows no zero flag"
        assert parsed.over(base.read_bytes()) == padded(new.read_bytes())


@settings(max_examples=80)
@given(
    change=changes(),
    cluster_size=CLUSTERS,
    form=st.sampled_from(["plain", "rbd", "map", "bitmap"]),
    spread=st.sampled_from([0, 1, 4096, 65536]),
    trust=st.booleans(),
    compat=st.sampled_from(["1.1", "0.10"]),
)
def test_a_true_layout_as_an_overlay(  # what hypothesis draws
    change: Change, cluster_size: int, form: str, spread: int, trust: bool, compat: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, new = change.write(folder)
        _, entries = truth(change, new.read_bytes(), form, spread)
        options = ["-b", "base.raw", "-F", "raw", "-c", str(cluster_size), "--compat", compat]
        trusting = ["--trust-layout"] if trust else []
        layout = json.dumps(entries).encode()
        image = stream(new, "--layout", "-", *trusting, *options, stdin=layout)
        check_overlay(folder, image, new)


@settings(max_examples=40)
@given(change=changes(), cluster_size=CLUSTERS, trust=st.booleans())
def test_a_full_export_by_layout(change: Change, cluster_size: int, trust: bool) -> None:
    """The extents of a whole disk, as rbd diff without --from-snap gives them."""
    with tempfile.TemporaryDirectory() as name:
        _, new = change.write(Path(name))
        content = new.read_bytes()
        entries = [
            {"offset": start, "length": min(8192, len(content) - start), "exists": "true"}
            for start in range(0, len(content), 8192)
            if content[start : start + 8192].strip(b"\0")
        ]
        (Path(name) / "layout").write_text(json.dumps(entries))
        trusting = ["--trust-layout"] if trust else []
        size = ["-c", str(cluster_size)]
        image = stream(new, "--layout", Path(name) / "layout", *trusting, *size)
        assert read_image(io.BytesIO(image)).over() == padded(content)
        if not trust:
            assert image == stream(new, *size)


def test_zero_clusters_of_an_overlay_take_no_space(tmp_path: Path) -> None:
    base = write_disk(tmp_path / "base.raw", 64 << 20, [(0, noise(4 << 20))])
    new = write_disk(
        tmp_path / "new.raw", 64 << 20, [(1 << 20, base.read_bytes()[1 << 20 : 4 << 20])]
    )
    image = stream(new, "--diff", base, "-b", "base.raw", "-F", "raw")
    assert len(image) == 5 * 65536  # header, refcount table and block, L1, L2
    check_overlay(tmp_path, image, new)
    extents = judges.qemu_map(tmp_path / "overlay.qcow2")
    zero = [extent for extent in extents if extent["depth"] == 0]
    assert [(each["start"], each["length"], each["zero"], each["data"]) for each in zero] == [
        (0, 1 << 20, True, False)
    ]


def test_a_whole_l2_table_of_zero_clusters(tmp_path: Path) -> None:
    size = 3 * (4096 * 512)
    base = write_disk(tmp_path / "base.raw", size, [(0, noise(size))])
    new = write_disk(tmp_path / "new.raw", size, [(0, base.read_bytes()[:4096])])
    for sparse in (new, write_disk(tmp_path / "full.raw", size, [(0, new.read_bytes())])):
        image = stream(sparse, "--diff", base, "-b", "base.raw", "-F", "raw", "-c", "4096")
        assert len(check_overlay(tmp_path, image, sparse).zeros) == size // 4096 - 1
    huge = write_disk(tmp_path / "huge.raw", 64 << 30)
    layout = json.dumps([{"offset": 0, "length": 64 << 30, "exists": "false"}]).encode()
    options = ["--layout", "-", "--trust-layout", "-b", "base.raw", "-F", "raw"]
    image = stream(huge, *options, stdin=layout)
    (tmp_path / "overlay.qcow2").write_bytes(image)
    judges.qemu_check(tmp_path / "overlay.qcow2")
    judges.qemu_compare(huge, tmp_path / "overlay.qcow2")


def test_a_disk_compared_with_itself_is_an_empty_image(tmp_path: Path) -> None:
    new = write_disk(tmp_path / "new.raw", 1_000_001, [(0, noise(1_000_001))])
    (tmp_path / "copy.raw").write_bytes(new.read_bytes())
    empty = stream(write_disk(tmp_path / "hole.raw", 1_000_001))
    assert stream(new, "--diff", new) == empty
    assert stream(new, "--diff", tmp_path / "copy.raw") == empty


def test_two_loop_devices_on_one_file_are_two_disks(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    both = write_disk(tmp_path / "both.raw", 2 << 20, [(0, noise(2 << 20))])
    first = loop_device(both, "--sizelimit", "1M")
    second = loop_device(both, "--offset", "1M")
    for source, base, start in ((second, first, 1), (first, second, 0), (second, str(both), 1)):
        image = read_image(io.BytesIO(stream(source, "--diff", base)))
        assert image.over(bytes(1 << 20)) == both.read_bytes()[start << 20 :][: 1 << 20]
    assert not read_image(io.BytesIO(stream(first, "--diff", str(both)))).data


def test_a_longer_base_is_compared_up_to_the_disks_size(tmp_path: Path) -> None:
    content = noise(100_000)
    base = write_disk(tmp_path / "base.raw", 300_000, [(0, content + noise(200_000, 1))])
    new = write_disk(tmp_path / "new.raw", 100_000, [(0, content)])
    parsed = read_image(io.BytesIO(stream(new, "--diff", base, "-c", "512")))
    # The sector that the disk ends in is padded with zeros, which the base has not.
    assert list(parsed.data) == [100_000 // 512]
    assert parsed.over(base.read_bytes()) == padded(content)


@pytest.mark.parametrize("cluster_size", ["512", "1024", "65536"])
def test_the_longest_backing_file_name(tmp_path: Path, cluster_size: str) -> None:
    new = write_disk(tmp_path / "new.raw", 100_000, [(0, noise(70_000))])
    room = {"512": 512 - 112 - 16 - 8, "1024": 1024 - 112 - 16 - 8, "65536": 1023}[cluster_size]
    name = "./" * ((room - 8) // 2) + "base.raw"[: 8 - room % 2]
    base = write_disk(tmp_path / "base.raw", 100_000)
    options: List[Any] = ["--diff", base, "-F", "raw", "-c", cluster_size]
    image = stream(new, *options, "-b", name.ljust(room, "x"))
    assert read_image(io.BytesIO(image)).backing_file == name.ljust(room, "x").encode()
    result = run(new, *options, "-b", name.ljust(room + 1, "x"))
    assert (result.status, result.stdout) == (1, b"")
    assert "backing file" in result.stderr


def test_names_of_features_give_way_to_a_backing_file_name(tmp_path: Path) -> None:
    """As in images of QEMU's, where both have no room in the first cluster."""
    new = write_disk(tmp_path / "new.raw", 100_000, [(0, noise(70_000))])
    base = write_disk(tmp_path / "base.raw", 100_000)
    room = 1024 - 112 - 16 - 392 - 8
    for length, has_features in ((room, True), (room + 1, False)):
        name = "./" * ((length - 8) // 2) + "base.raw".rjust(8 + length % 2, "/")
        options = ["-b", name, "-F", "raw", "-c", "1024"]
        parsed = check_overlay(tmp_path, stream(new, "--diff", base, *options), new)
        assert (0x6803F857 in parsed.extensions) == has_features
