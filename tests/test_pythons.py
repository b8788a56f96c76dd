"""The same bytes from every Python on the machine: CPython 3.6 to the newest, and PyPy."""

import hashlib
from pathlib import Path

import pytest
from support.disks import Recipe
from support.program import stream
from support.pythons import pythons, version

PYTHONS = pythons()


def test_there_are_pythons_to_compare() -> None:
    assert PYTHONS


OPTIONS = [[], ["-c", "512", "-r", "1"], ["-c", "2M", "-r64"], ["-c4K", "-d"], ["-R", "-c", "1K"]]

# Of what QEMU's script writes for the same disk and options.
DIGESTS = [
    "00a1aa4471f03e28a967875c570996676902f2decca74add4d15aaf38c0cbe6e",
    "8bb7fbb8147becbc0fa1bb735f91cf34e5d9ce4f8359a478dd8999b24bb8c7de",
    "14815216fa402d26f7352363bef4e9bfa58dc2d2bc342264bd57ff13576f2f4c",
    "e35b2a085859302092e1eecbfcafc58192138b548f2c14fefe91a3186297853a",
    "6092164ff8bb3b5b01cd12931dbc4fe97f0c6294d6582e6fcda84ded53b0f785",
]


@pytest.mark.guarantee(3, "any Python from 3.6 on, and PyPy", "the same bytes")
@pytest.mark.parametrize("python", PYTHONS, ids=version)
def test_every_python_writes_the_same_bytes(tmp_path: Path, python: str) -> None:
    recipe = Recipe((9 << 20) + 77, [(0, "every512", 1 << 20), (3_000_001, "noise", 4 << 20)])
    recipe.write(tmp_path / "disk.raw")
    digests = [
        hashlib.sha256(stream("disk.raw", *options, python=python, cwd=tmp_path)).hexdigest()
        for options in OPTIONS
    ]
    assert digests == DIGESTS
    disk = (tmp_path / "disk.raw").read_bytes()
    options = ["-", "--size", str(len(disk)), "-c", "4K"]
    streamed = stream(*options, stdin=disk, python=python)
    assert (
        hashlib.sha256(streamed).hexdigest()
        == hashlib.sha256(stream(*options, stdin=disk)).hexdigest()
    )
