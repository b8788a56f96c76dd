"""Any chain of qcow2 images: what QEMU makes of it, read by ourselves or by qemu-nbd."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, List, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from support.disks import noise
from support.program import stream

KIB = 1024


class Write(NamedTuple):
    """A command of qemu-io: how, and where, in parts of 1000 of the image's size."""

    how: str
    start: int
    length: int


class Member(NamedTuple):
    """An image of a chain."""

    size: int
    cluster_size: int
    options: List[str]
    writes: List[Write]


WRITES = st.builds(
    Write,
    st.sampled_from(["write -P 7", "write -P 0", "write -z", "write -z -u", "write -c", "discard"]),
    st.integers(0, 999),
    st.integers(1, 300),
)
SIZES = st.one_of(
    st.integers(1, 3000).map(lambda sectors: sectors * 512),
    st.sampled_from([64 * KIB, 1024 * KIB, 1024 * KIB + 512]),
)
OPTIONS = st.sampled_from(
    [
        [],
        ["compat=0.10"],
        ["extended_l2=on", "cluster_size=16384"],
        ["lazy_refcounts=on", "refcount_bits=1"],
        ["compression_type=zstd"],
    ]
)
MEMBERS = st.builds(
    Member,
    SIZES,
    st.sampled_from([512, 4 * KIB, 64 * KIB, 256 * KIB]),
    OPTIONS,
    st.lists(WRITES, max_size=6),
)


def qemu(*words: Any, check: bool = True) -> None:
    """Run one of QEMU's programs."""
    arguments = [str(word) for word in words]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert not (check and done.returncode), done.stderr


def make(folder: Path, bottom: int, members: List[Member]) -> Path:
    """The chain in files, the lowest of which is raw (if it has any bytes); returns the top."""
    below, form = folder / "raw", "raw"
    below.write_bytes(noise(bottom))
    for number, member in enumerate(members):
        path = folder / f"{number}.qcow2"
        options = [f"cluster_size={member.cluster_size}", *member.options]
        backing = ["-b", below, "-F", form] if bottom or number else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *backing, "-o", ",".join(options),
             path, member.size)  # fmt: skip
        commands = []
        for how, start, length in member.writes:
            cluster = 16 * KIB if "extended_l2=on" in member.options else member.cluster_size
            # Compressed are whole clusters, discarded whole sectors.
            unit = {"write -c": cluster, "discard": 512}.get(how, 1)
            at = member.size * start // 1000 // unit * unit
            count = min(max(unit, member.size * length // 1000 // unit * unit), member.size - at)
            commands += ["-c", f"{how} {at} {count}"] if count else []
        # Where a cluster is allocated, QEMU does not write a compressed one.
        is_sure = not any(write.how == "write -c" for write in member.writes)
        qemu("qemu-io", "-f", "qcow2", *commands, path, check=is_sure)
        below, form = path, "qcow2"
    return below


@settings(max_examples=25)
@given(
    st.one_of(st.just(0), st.integers(1, 1_500_000)),
    st.lists(MEMBERS, min_size=1, max_size=3),
    st.sampled_from([[], ["-c", "4K"], ["-c", "2M", "--compat", "0.10"]]),
)
def test_any_chain(bottom: int, members: List[Member], options: List[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="chain"))
    try:
        top = make(folder, bottom, members)
        raw = folder / "expected"
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, raw)
        expected = stream(raw, *options)
        assert stream("-f", "qcow2", top, *options) == expected
        shown = f"driver=qcow2,file.filename={top}"
        assert stream("--image-opts", shown, *options) == expected
    finally:
        shutil.rmtree(folder)
