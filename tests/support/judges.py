"""Independent readers of qcow2, who say what an image holds."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any, List, Optional, cast

from dissect.hypervisor.disk.qcow2 import QCow2

from support.program import TIMEOUT

LIBQCOW = """
import sys, pyqcow
image = pyqcow.file()
image.open(sys.argv[1])
left = image.get_media_size()
while left:
    data = image.read(min(left, 1 << 20))
    if not data:
        sys.exit("libqcow ended early")
    sys.stdout.buffer.write(data)
    left -= len(data)
"""


def _run(arguments: List[str], folder: Optional[Path] = None) -> bytes:
    done = subprocess.run(
        arguments,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, (arguments, done.stdout[-500:], done.stderr.decode()[-500:])
    return done.stdout


def qemu_check(image: Path) -> None:
    """qemu-img check finds neither errors nor leaked clusters."""
    # QEMU looks for an external data file from the current folder on.
    check = ["qemu-img", "check", "--output=json", "-f", "qcow2", str(image)]
    report = json.loads(_run(check, image.parent))
    for trouble in ("check-errors", "corruptions", "leaks"):
        assert not report.get(trouble), report


def qemu_compare(raw: Path, image: Path) -> None:
    """qemu-img compare finds both the same. A raw file's last sector counts as padded."""
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(image)]
    _run(compare, image.parent)


def qemu_read(image: Path, form: str = "qcow2") -> bytes:
    """All that QEMU reads from an image and its backing files."""
    raw = image.with_name(image.name + ".read")
    try:
        _run(["qemu-img", "convert", "-f", form, "-O", "raw", str(image), str(raw)])
        return raw.read_bytes()
    finally:
        if raw.exists():
            raw.unlink()


def qemu_info(image: Path) -> Any:
    return json.loads(_run(["qemu-img", "info", "--output=json", "-f", "qcow2", str(image)]))


def qemu_map(image: Path) -> Any:
    return json.loads(_run(["qemu-img", "map", "--output=json", "-f", "qcow2", str(image)]))


def libqcow_read(image: Path) -> bytes:
    """All that libqcow reads. Its Python binding is that of the system's own Python."""
    return _run(["/usr/bin/python3", "-c", LIBQCOW, str(image)])


def dissect_read(image: bytes) -> bytes:
    """All that dissect.hypervisor reads."""
    disk = QCow2(io.BytesIO(image))
    return cast(bytes, disk.open().read(disk.size))
