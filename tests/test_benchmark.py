"""The benchmark works: a few of its rows, on small disks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import needs
from support.program import ROOT, TIMEOUT


def test_some_rows_of_the_benchmark(tmp_path: Path) -> None:
    needs(Path("/usr/bin/time").exists(), "GNU time")
    for tool in ("cc", "qemu-img", "nbdkit", "nbdcopy"):
        needs(shutil.which(tool) is not None, tool)
    (tmp_path / "disks").mkdir()
    # The floor, a ratio of sizes, a server, and a peer that is not here.
    words = ["4 GiB of data", "passed through: size", "ms a request", "8 TiB"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "benchmarks" / "benchmark.py"), "--quick", *words],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "disks"), "QEMU_SCRIPT": ""},
        timeout=TIMEOUT,
        check=True,
    )
    text = done.stdout.decode()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [(row[0], row[2]) for row in rows] == [
        ("case", "peer"),
        ("4 GiB of data", "the floor (C)"),
        ("zlib passed through: size", "its source"),
        ("zstd passed through: size", "its source"),
        ("NBD, 1 GiB, 2 ms a request", "nbdcopy"),
    ]
    assert all(float(row[4].split()[0]) <= 1 for row in rows if row[0].endswith("size"))
    assert "* not measured: `-R`, 8 TiB: QEMU's script is not here" in text
    assert not list((tmp_path / "disks").iterdir())
