"""Hostile metadata: thousands of layouts and maps, refused in one line or exact.

Inputs run in one process, which is what makes so many of them possible; those that are
accepted go through the strict sequential reader, and every hundredth through qemu-img check.
"""

import contextlib
import io
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import judges
from support.disks import noise, write_disk
from support.importer import read_image
from support.program import ROOT, assert_refused, run

import qcow2_to_stdout as program

MIB = 1 << 20
SAMPLES = sorted((ROOT / "tests" / "samples").glob("*.json"))
MUTANTS = int(os.environ.get("QCOW2_TEST_MUTANTS", "12000"))
SIZE = 25 * MIB


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pieces = [(0, noise(MIB)), (4 * MIB, noise(MIB)), (20 * MIB, noise(4096))]
    return write_disk(tmp_path_factory.mktemp("fuzz") / "disk.raw", SIZE, pieces)


def export(disk: Path, layout: bytes, *options: str) -> Optional[bytes]:
    """The image, or None where the layout is refused by an Error, in this very process."""
    with tempfile.TemporaryFile() as out, contextlib.ExitStack() as resources:
        (disk.parent / "layout").write_bytes(layout)
        words = [str(disk), "--layout", str(disk.parent / "layout"), "-m", "1", *options]
        parsed = program.make_parser().parse_args(words)
        saved = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            program.run(parsed, resources, program.Progress())
        except program.Error as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 400
            return None
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        out.seek(0)
        return out.read()


OPTIONS: List[List[str]] = [
    ["--trust-layout", "-c", "2M"],
    ["--trust-layout", "-c", "2M", "-b", "base", "-F", "raw"],
    ["-c", "2M"],
    ["--trust-layout", "-c", "1M", "-b", "base", "-F", "raw", "--compat", "0.10"],
]


def judge(disk: Path, image: Optional[bytes], number: int) -> int:
    """Look at an accepted image. Returns 1 if there is one."""
    if image is None:
        return 0
    parsed = read_image(io.BytesIO(image))
    assert parsed.size == SIZE
    if number % 100 == 0 and parsed.backing_file is None:
        path = disk.with_name("image.qcow2")
        path.write_bytes(image)
        judges.qemu_check(path)
    return 1


NUMBERS = ["0", "-1", "1", "511", "512", "65536", "4194304", "26214399", "26214400", "26214401",
           "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e3", "1.5",
           "NaN", "-0", "true", "null", '"12"', "[]", "{}", "99999999999999999999999999",
           "Infinity", "0x10", "007"]  # fmt: skip


def mutate(text: bytes, dice: random.Random) -> bytes:
    """One to three small changes of the kinds that files suffer."""
    for _ in range(dice.randint(1, 3)):
        kind = dice.randrange(7)
        at = dice.randrange(len(text)) if text else 0
        if kind == 0:
            text = text[:at] + bytes([dice.randrange(256)]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[at + dice.randint(1, 20) :]
        elif kind == 2:
            text = text[:at] + text[at : at + dice.randint(1, 60)] + text[at:]
        elif kind == 3:
            text = text[:at]
        else:  # numbers, the most hostile of all
            words = text.split(b":")
            index = dice.randrange(len(words))
            head = words[index].lstrip(b" 0123456789")
            words[index] = dice.choice(NUMBERS).encode() + head
            text = b":".join(words)
    return text


@pytest.mark.parametrize("share", range(4))
def test_mutants_of_the_real_samples(disk: Path, share: int) -> None:
    dice = random.Random(share)
    samples = [path.read_bytes() for path in SAMPLES if path.read_bytes()[:1] == b"["]
    accepted = 0
    for number in range(MUTANTS // 4):
        text = mutate(dice.choice(samples), dice)
        options = OPTIONS[number % len(OPTIONS)]
        if number % 10:  # all but the copy
            accepted += export(disk, text, *options, "--measure") is not None
        else:
            accepted += judge(disk, export(disk, text, *options), number)
    assert 0 < accepted < MUTANTS // 4


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["offset", "length", "start", "exists", "type", "x"]), inner
        )
    ),
    max_leaves=12,
)


@settings(max_examples=1500)
@given(value=json_values)
def test_any_json(value: Any) -> None:
    for entries in (value if isinstance(value, list) else [value], [value, value]):
        for overlay in (False, True):
            with contextlib.suppress(program.Error):
                program.read_layout(entries, "layout", SIZE, overlay)
    with contextlib.suppress(program.Error):
        program.read_info(json.dumps(value), "info")


def reader(text: bytes, step: int) -> Callable[[], bytes]:
    """What hands a text out in pieces."""
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    return lambda: pieces.pop(0) if pieces else b""


@settings(max_examples=1500)
@given(text=st.binary(max_size=200), cut=st.integers(0, 200))
def test_any_bytes(text: bytes, cut: int) -> None:
    for raw in (text, b"[" + text, b'[{"offset":' + text):
        with contextlib.suppress(program.Error):
            list(program.json_list(reader(raw, cut + 1), "layout"))
        with contextlib.suppress(program.Error):
            program.read_info(raw.decode("latin-1"), "info")


@settings(max_examples=500)
@given(values=st.lists(st.dictionaries(st.text(max_size=3), json_values)), cut=st.integers(1, 9))
def test_a_list_in_pieces_is_the_same_list(values: Any, cut: int) -> None:
    decoded = list(program.json_list(reader(json.dumps(values).encode(), cut), "layout"))
    assert json.dumps(decoded) == json.dumps(values)


BOMBS = {
    "depth": b"[" * 10_000_000,
    "objects": b'[{"offset":' * 2_000_000,
    "a number": b'[{"offset": ' + b"9" * 20_000_000 + b"}]",
    "a fraction": b'[{"offset": 0.' + b"9" * 20_000_000 + b"}]",
    "an exponent": b'[{"offset": 1e999999999, "length": 1}]',
    "a string": b'[{"offset": 0, "length": 1, "x": "' + b"x" * 20_000_000 + b'"}, 7]',
    "spaces": b" " * 20_000_000,
    "an info": b'{"a":' * 1_000_000,
    "an entry": b'[{"offset": 0, "length": 1, "x": [' + b"{}," * 10_000_000 + b"{}]}]",
    "many fields": b'{"virtual-size": 512, "x": [' + b"{}," * 10_000_000 + b"{}]}",
}


def little_memory() -> None:
    """Some times what the longest of these bombs is as text."""
    resource.setrlimit(resource.RLIMIT_AS, (400 * MIB, 400 * MIB))


@pytest.mark.guarantee(9, "hostile JSON", "refused in bounded time and memory")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_soon(tmp_path: Path, bomb: str) -> None:
    raw = write_disk(tmp_path / "disk.raw", MIB)
    began = time.monotonic()
    assert_refused(run(raw, "--layout", "-", stdin=BOMBS[bomb], preexec_fn=little_memory), "layout")
    assert time.monotonic() - began < 60
    reader = os.memfd_create("bomb")
    with os.fdopen(reader, "r+b") as file:
        file.write(BOMBS[bomb])
        file.seek(0)
        for option in ("--json-header-map", "--json-header-info"):
            file.seek(0)
            refused = run(raw, option, str(reader), pass_fds=[reader], preexec_fn=little_memory)
            # An info is one small object: one that isn't may use up the memory that there is.
            words = (
                [option] if option == "--json-header-map" or "memory" not in refused.stderr else []
            )
            assert_refused(refused, *words)
