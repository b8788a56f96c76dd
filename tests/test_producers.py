"""Layouts from the programs that make them: a real Ceph cluster, a real NBD server."""

import io
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from conftest import needs
from support import judges
from support.ceph import Cluster
from support.importer import read_image
from support.program import TIMEOUT, assert_refused, run, stream

MIB = 1 << 20


def shell(*arguments: str) -> bytes:
    return subprocess.check_output(arguments, timeout=TIMEOUT)


@pytest.fixture
def rbd_image(ceph: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A new RBD image of 24 MiB and 512 bytes."""
    name = f"image{abs(hash(request.node.name))}"
    ceph.rbd("create", "--size", f"{24 * MIB + 512}B", name)
    yield name
    ceph.rbd("snap", "purge", "--no-progress", name)
    ceph.rbd("rm", "--no-progress", name)


NIGHTS = {
    "monday": ["write -P 1 0 64k", "write -P 2 4M 1M", "write -P 3 12M 4096"],
    "tuesday": ["write -P 4 4M 64k", "discard 0 64k", "write -P 5 20M 1536", "write -z 12M 4k"],
    "wednesday": [f"write -P 6 {24 * MIB} 512", "discard 4M 4M", "write -P 7 8M 100k"],
}


@pytest.mark.xdist_group("ceph")
@pytest.mark.parametrize("whole", [[], ["--whole-object"]], ids=["extents", "objects"])
@pytest.mark.parametrize("trust", [[], ["--trust-layout"]], ids=["look", "trust"])
def test_a_week_of_ceph_backups(
    ceph: Cluster, rbd_image: str, tmp_path: Path, whole: List[str], trust: List[str]
) -> None:
    before = None
    for night, writes in NIGHTS.items():
        ceph.io(rbd_image, *writes)
        ceph.rbd("snap", "create", "--no-progress", f"{rbd_image}@{night}")
        since: List[str] = ["--from-snap", before] if before else []
        layout = ceph.rbd("diff", "--format", "json", *whole, *since, f"{rbd_image}@{night}")
        snapshot = ceph.url(f"{rbd_image}@{night}")
        raw = tmp_path / f"{night}.raw"  # no kernel client here; a mapped device elsewhere
        shell("qemu-img", "convert", "-f", "raw", "-O", "raw", snapshot, str(raw))
        overlay: List[str] = ["-b", f"{before}.qcow2", "-F", "qcow2"] if before else []
        image = tmp_path / f"{night}.qcow2"
        image.write_bytes(stream(raw, "--layout", "-", *trust, *overlay, stdin=layout.encode()))
        judges.qemu_check(image)
        shell("qemu-img", "compare", "-f", "raw", "-F", "qcow2", snapshot, str(image))
        before = night
    sizes = {night: (tmp_path / f"{night}.qcow2").stat().st_size for night in NIGHTS}
    if not whole or not trust:  # whole objects of 4 MiB, if they are believed to be data
        assert sizes["tuesday"] < sizes["monday"]
    # Any night is still what it was, read through its own chain.
    for night in NIGHTS:
        snapshot = ceph.url(f"{rbd_image}@{night}")
        night_image = str(tmp_path / f"{night}.qcow2")
        shell("qemu-img", "compare", "-f", "raw", "-F", "qcow2", snapshot, night_image)


@pytest.mark.xdist_group("ceph")
def test_an_rbd_image_that_was_never_written(ceph: Cluster, rbd_image: str, tmp_path: Path) -> None:
    layout = ceph.rbd("diff", "--format", "json", rbd_image)
    assert json.loads(layout) == []
    raw = tmp_path / "disk.raw"
    shell("qemu-img", "convert", "-f", "raw", "-O", "raw", ceph.url(rbd_image), str(raw))
    assert not read_image(io.BytesIO(stream(raw, "--layout", "-", stdin=layout.encode()))).data


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def test_an_overlay_by_a_dirty_bitmap_from_an_nbd_server(tmp_path: Path) -> None:
    needs(shutil.which("nbdinfo") is not None, "nbdinfo (libnbd-bin)")
    disk = tmp_path / "disk.qcow2"
    socket = tmp_path / "nbd"
    shell("qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(8 * MIB + 512))
    shell("qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 6M 64k", str(disk))
    raw = tmp_path / "disk.raw"
    shell("qemu-img", "convert", "-O", "raw", str(disk), str(raw))
    (tmp_path / "monday.qcow2").write_bytes(stream(raw))
    shell("qemu-img", "bitmap", "--add", str(disk), "since-monday")
    shell("qemu-io", "-c", "write -P 3 64k 64k", "-c", "write -z 6M 64k", "-c",
          "write -P 4 8M 512", str(disk))  # fmt: skip
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", "since-monday", "-A", "-k", str(socket),
         str(disk)]
    )  # fmt: skip
    try:
        wait_for(socket)
        url = f"nbd+unix:///?socket={socket}"
        dirty = shell("nbdinfo", "--map=qemu:dirty-bitmap:since-monday", "--json", url)
        allocation = shell("nbdinfo", "--map", "--json", url)
        depth = shell("nbdinfo", "--map=qemu:allocation-depth", "--json", url)
        # How bitmaps were read before nbdinfo: no map of data, but it looks like one.
        node = f"driver=nbd,server.type=unix,server.path={socket}"
        bitmap = "x-dirty-bitmap=qemu:dirty-bitmap:since-monday"
        nowhere = shell("qemu-img", "map", "--output=json", "--image-opts", f"{node},{bitmap}")
    finally:
        server.terminate()
        server.wait()
    shell("qemu-img", "convert", "-O", "raw", str(disk), str(raw))
    assert_refused(run(raw, "--layout", "-", stdin=nowhere), "--bitmap NAME")
    for layout in (dirty, allocation, depth):
        for trust in ([], ["--trust-layout"]):
            overlay: List[str] = ["-b", "monday.qcow2", "-F", "qcow2"]
            image = stream(raw, "--layout", "-", *trust, *overlay, stdin=layout)
            (tmp_path / "tuesday.qcow2").write_bytes(image)
            judges.qemu_check(tmp_path / "tuesday.qcow2")
            judges.qemu_compare(raw, tmp_path / "tuesday.qcow2")
            if layout is dirty:
                parsed = read_image(io.BytesIO(image))
                # A bitmap knows what was written, not that it was zeros.
                assert len(parsed.data) + len(parsed.zeros) == 3
            full = stream(raw, "--layout", "-", *trust, stdin=layout)
            if layout is not dirty:
                assert read_image(io.BytesIO(full)).over() == raw.read_bytes()


def test_a_disk_of_one_layer_that_has_lost_what_its_backup_has(tmp_path: Path) -> None:
    """Its map lists what it holds: nothing of it may shine through from the backing file."""
    needs(shutil.which("nbdinfo") is not None, "nbdinfo (libnbd-bin)")
    disk, socket = tmp_path / "disk.qcow2", tmp_path / "nbd"
    shell("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "4M")
    shell("qemu-img", "snapshot", "-c", "clean", str(disk))
    shell("qemu-io", "-c", "write -P 1 1M 1M", str(disk))
    (tmp_path / "monday.qcow2").write_bytes(stream("-f", "qcow2", disk))
    shell("qemu-img", "snapshot", "-a", "clean", str(disk))
    shell("qemu-io", "-c", "write -P 2 3M 64k", str(disk))
    layouts = [shell("qemu-img", "map", "--output=json", str(disk))]
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-A", "-k", str(socket), str(disk)]
    )
    try:
        wait_for(socket)
        url = f"nbd+unix:///?socket={socket}"
        layouts.append(shell("nbdinfo", "--map=qemu:allocation-depth", "--json", url))
    finally:
        server.terminate()
        server.wait()
    for layout in layouts:
        for options in ([], ["--trust-layout"], ["--compat", "0.10"]):
            overlay = ["-b", "monday.qcow2", "-F", "qcow2", *options]
            image = stream("-f", "qcow2", disk, "--layout", "-", *overlay, stdin=layout)
            (tmp_path / "tuesday.qcow2").write_bytes(image)
            judges.qemu_check(tmp_path / "tuesday.qcow2")
            shell("qemu-img", "compare", str(disk), str(tmp_path / "tuesday.qcow2"))
