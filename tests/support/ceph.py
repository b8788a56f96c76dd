"""A real Ceph cluster on loopback: one monitor, one OSD that keeps its objects in memory."""

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, List

TIMEOUT = 60  # seconds for any one command
CONFIGURATION = """
[global]
fsid = {fsid}
mon initial members = a
mon host = 127.0.0.1:{port}
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
keyring = /dev/null
rbd default features = layering,exclusive-lock,object-map,fast-diff
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
"""

AVAILABLE = all(shutil.which(name) for name in ("ceph-mon", "ceph-osd", "ceph", "rbd"))


class Cluster:
    """A running cluster with a pool named rbd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "ceph.conf"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fsid, osd = uuid.uuid4(), str(uuid.uuid4())
        for name in ("mon", "osd"):
            (folder / name).mkdir(parents=True)
        self.conf.write_text(CONFIGURATION.format(fsid=fsid, port=port, folder=folder))
        self.run("monmaptool", "--create", "--fsid", str(fsid), "--addv", "a",
                 f"[v2:127.0.0.1:{port}]", str(folder / "monmap"), conf=False)  # fmt: skip
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(folder / "monmap"))
        self.run("ceph-mon", "-i", "a")
        self.run("ceph", "osd", "new", osd)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.run("ceph-osd", "-i", "0")
        self.run("ceph", "osd", "pool", "create", "rbd", "8", "8")
        deadline = time.monotonic() + TIMEOUT
        while "1 up" not in self.run("ceph", "-s"):
            assert time.monotonic() < deadline, "the OSD does not come up"
            time.sleep(0.3)
        self.run("rbd", "pool", "init", "rbd")

    def run(self, program: str, *arguments: str, conf: bool = True) -> str:
        """Run one of Ceph's programs against this cluster and return what it prints."""
        words: List[str] = [program, *(["-c", str(self.conf)] if conf else []), *arguments]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT, check=False
        )
        assert done.returncode == 0, (words, done.stderr.decode()[-800:])
        return done.stdout.decode()

    def rbd(self, *arguments: str) -> str:
        return self.run("rbd", *arguments)

    def url(self, image: str) -> str:
        """The image (or image@snapshot) as QEMU's tools take it."""
        return f"rbd:rbd/{image}:conf={self.conf}"

    def io(self, image: str, *commands: str) -> None:
        """Let qemu-io write to an image."""
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(
            ["qemu-io", "-f", "raw", "-d", "unmap", *words, self.url(image)],
            stdout=subprocess.DEVNULL,
            timeout=TIMEOUT,
            check=True,
        )

    def stop(self) -> None:
        """End both daemons."""
        pids = []
        for name in ("osd.0", "mon.a"):
            file: Any = self.folder / f"{name}.pid"
            if file.exists():
                pids.append(int(file.read_text()))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # nothing of it is kept
        deadline = time.monotonic() + TIMEOUT
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
