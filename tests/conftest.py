"""Fixtures: disks on real block devices and real FUSE, all gone when their test is."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from hypothesis import HealthCheck, settings
from support.ceph import AVAILABLE, Cluster
from support.disks import noise, write_disk
from support.fuse import FuseDisk
from support.images import leftovers, shell
from support.pythons import pythons, version

settings.register_profile(
    "program",
    deadline=None,  # examples start processes
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("program")


for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    # A shell's job in the background ignores them, and so would every program that is started.
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, signal.SIG_DFL)


def pytest_report_header() -> str:
    """Say which Pythons run the program."""
    return "the program runs under: " + ", ".join(version(python) for python in pythons())


def needs(condition: bool, what: str) -> None:
    """Skip the test, saying what the machine lacks; pytest lists it at the end."""
    if not condition:
        pytest.skip(f"this machine lacks {what}")


@pytest.fixture
def loop_device() -> Iterator[Callable[..., str]]:
    """Make block devices: loop_device(file, *losetup options) gives the device's name."""
    needs(os.geteuid() == 0 and Path("/dev/loop-control").exists(), "root and loop devices")
    devices: List[str] = []

    def attach(file: Path, *options: str) -> str:
        device = subprocess.check_output(
            ["losetup", "--find", "--show", *options, str(file)], text=True
        ).strip()
        devices.append(device)
        return device

    yield attach
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


def remove_partition(device: str, number: int) -> None:
    """Undo addpart. A loop device on it may take an instant to be gone."""
    deadline = time.monotonic() + 20
    words = ["delpart", device, str(number)]
    while subprocess.run(words, stderr=subprocess.PIPE, check=False).returncode:
        assert time.monotonic() < deadline, "the partition stays in use"
        time.sleep(0.1)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of one mebibyte."""
    needs(os.geteuid() == 0, "root, to mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def fuse_disk(tmp_path: Path) -> Iterator[Callable[..., FuseDisk]]:
    """Make files on a FUSE file system: fuse_disk(file, **behaviour), see support.fuse."""
    needs(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse")
    disks: List[FuseDisk] = []

    def mount(file: Path, **behaviour: Any) -> FuseDisk:
        disks.append(FuseDisk(file, tmp_path / f"fuse{len(disks)}", **behaviour))
        return disks[-1]

    yield mount
    for disk in disks:
        disk.close()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ceph cluster for all tests of one worker; they share it by pytest's xdist_group."""
    needs(AVAILABLE, "ceph-mon, ceph-osd and ceph-common")
    # Ceph's sockets have names of at most 107 bytes, shorter than pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="ceph"))
    cluster = None
    try:
        cluster = Cluster(folder)
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of the test's own, in which nothing outlives it: no daemon either."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    deadline = time.monotonic() + 10
    while leftovers(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not leftovers(folder)


@pytest.fixture
def dense_vmdk(tmp_path: Path) -> Path:
    raw = write_disk(tmp_path / "raw", 8 << 20, [(0, noise(8 << 20))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, tmp_path / "a.vmdk")
    return tmp_path / "a.vmdk"


@pytest.fixture
def mounted(tmp_path: Path, loop_device: Callable[..., str]) -> Iterator[Tuple[str, Path]]:
    """A device, and the folder where the file system on it is mounted."""
    needs(shutil.which("mkfs.ext4") is not None, "mkfs.ext4 (e2fsprogs)")
    device = loop_device(write_disk(tmp_path / "file-system", 16 << 20))
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mount", device, str(folder)], check=True)
    yield device, folder
    subprocess.run(["umount", str(folder)], check=True)
