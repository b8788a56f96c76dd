"""The output is byte for byte that of QEMU's scripts/qcow2-to-stdout.py.

golden/qemu_script.json holds what that script wrote for disks that every machine makes the
same. Where QEMU_SCRIPT names the script itself, it is asked again, for disks of all kinds.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disks import Recipe, recipes
from support.program import ROOT, TIMEOUT, stream

GOLDEN = json.loads((ROOT / "tests" / "golden" / "qemu_script.json").read_text())
BY_DISK: Dict[str, List[Any]] = {}
for entry in GOLDEN:
    BY_DISK.setdefault(f"{entry['size']}-bytes", []).append(entry)


@pytest.mark.guarantee(4, "the options of QEMU's own script", "byte for byte what it writes")
@pytest.mark.parametrize("disk", BY_DISK)
def test_the_bytes_that_qemus_script_wrote(tmp_path: Path, disk: str) -> None:
    first = BY_DISK[disk][0]
    Recipe(first["size"], first["pieces"]).write(tmp_path / "disk.raw")
    for golden in BY_DISK[disk]:
        image = stream("disk.raw", *golden["options"], cwd=tmp_path)
        assert len(image) == golden["length"], golden["options"]
        assert hashlib.sha256(image).hexdigest() == golden["sha256"], golden["options"]


@pytest.mark.skipif("QEMU_SCRIPT" not in os.environ, reason="QEMU_SCRIPT names no script")
@settings(max_examples=100)
@given(
    recipe=recipes(max_size=1 << 20),
    cluster_size=st.sampled_from([1 << bits for bits in range(9, 22)]),
    refcount_bits=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    option=st.sampled_from([[], ["-d"], ["-R"]]),
)
def test_the_bytes_that_qemus_script_writes(
    recipe: Recipe, cluster_size: int, refcount_bits: int, option: List[str]
) -> None:
    if option and cluster_size == 512:
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe.write(Path(folder) / "disk.raw")
        options = ["disk.raw", "-c", str(cluster_size), "-r", str(refcount_bits), *option]
        theirs = subprocess.run(
            [sys.executable, os.environ["QEMU_SCRIPT"], *options],
            cwd=folder,
            stdout=subprocess.PIPE,
            timeout=TIMEOUT,
            check=True,
        ).stdout
        assert stream(*options, cwd=Path(folder)) == theirs
