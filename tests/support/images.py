"""Images that QEMU's programs make, servers of disks, and what programs leave behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from support.program import TIMEOUT


def shell(*arguments: Any, **options: Any) -> bytes:
    words = [str(word) for word in arguments]
    return bytes(subprocess.check_output(words, timeout=TIMEOUT, **options))


def make_encrypted(*qemu_img: Any) -> None:
    """Run a qemu-img that sets a key: it measures its own speed, which fails on a busy machine."""
    words = [str(word) for word in qemu_img]
    assert any(subprocess.run(words, check=False).returncode == 0 for _ in range(20))


def create(path: Path, size: str, *options: str, form: str = "qcow2") -> Path:
    """An empty image, by qemu-img create."""
    shell("qemu-img", "create", "-q", "-f", form, *options, path, size)
    return path


def overlay(path: Path, base: Path, form: str, *options: str) -> Path:
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", form, *options, path)
    return path


def write(path: Path, *commands: str, form: str = "qcow2") -> Path:
    words = [word for command in commands for word in ("-c", command)]
    shell("qemu-io", "-f", form, *words, path)
    return path


def as_raw(path: Path, form: str = "qcow2") -> Path:
    raw = path.with_name(path.name + ".raw")
    shell("qemu-img", "convert", "-f", form, "-O", "raw", path, raw)
    return raw


def replaced(tmp_path: Path, program: str, script: str) -> Dict[str, str]:
    """An environment where a script stands for a program of QEMU's; REAL in it is the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / program).write_text(script.replace("REAL", shutil.which(program) or ""))
    (folder / program).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def wrapped(tmp_path: Path, script: str) -> Dict[str, str]:
    """An environment in which qemu-img does something before its work."""
    return replaced(tmp_path, "qemu-img", f'#!/bin/bash\n{script}\nexec REAL "$@"\n')


def leftovers(folder: Path) -> List[str]:
    """Folders, mounts and processes of QEMU's that programs with this temporary folder left."""
    found = [str(path) for path in folder.iterdir()]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"qemu-" in arguments[0] and os.fsencode(f"TMPDIR={folder}") in environment:
            found.append(f"{process.name}: {arguments[0].decode()}")
    return found


@contextlib.contextmanager
def nbd_server(folder: Path, *arguments: Any) -> Iterator[Tuple[Any, str]]:
    """nbdkit, and the option string of the disk that it shows."""
    address = folder / "nbd"
    env = {**os.environ, "TMPDIR": str(address.parent)}  # where it leaves scripts if it is killed
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(address), *map(str, arguments)], env=env)
    try:
        while not address.exists():
            assert server.poll() is None, "nbdkit ended"
            time.sleep(0.02)
        yield server, f"driver=nbd,server.type=unix,server.path={address}"
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait()
