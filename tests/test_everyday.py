"""The hundredth use: the size beforehand, progress, standard input, a copy of one file."""

import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disks import Recipe, noise, padded, recipes, write_disk
from support.fuse import FuseDisk
from support.importer import read_image
from support.program import (
    PROGRAM,
    ROOT,
    TIMEOUT,
    Result,
    assert_failed,
    assert_refused,
    command,
    run,
    start,
    stream,
    wait_until_it_catches,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


# --measure


@settings(max_examples=60)
@given(
    recipe=recipes(max_size=2 * MIB),
    cluster_size=st.sampled_from(["512", "1K", "4K", "64K", "2M"]),
    refcount_bits=st.sampled_from(["1", "4", "16", "64"]),
    mode=st.sampled_from(["full", "diff", "overlay", "layout", "trust", "0.10", "-d", "-R"]),
)
def test_the_measure_is_the_streams_size_to_the_byte(
    recipe: Recipe, cluster_size: str, refcount_bits: str, mode: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe.write(folder / "disk.raw")
        write_disk(folder / "base.raw", MIB, [(0, noise(MIB))])
        (folder / "layout").write_text(json.dumps([{"offset": 0, "length": recipe.size // 2}]))
        if mode in ("overlay", "-d", "-R") and cluster_size == "512":
            cluster_size = "1K"
        options: List[str] = {
            "full": [],
            "diff": ["--diff", "base.raw"],
            "overlay": ["--diff", "base.raw", "-b", "base.raw", "-F", "raw"],
            "layout": ["--layout", "layout"],
            "trust": ["--layout", "layout", "--trust-layout"],
            "0.10": ["--compat", "0.10"],
        }.get(mode, [mode])
        width = [] if mode == "0.10" else ["-r", refcount_bits]
        words = ["disk.raw", "-c", cluster_size, *width, *options]
        image = stream(*words, cwd=folder)
        sizes = json.loads(stream(*words, "--measure", "--output", "json", cwd=folder))
        assert sizes["required"] == len(image)
        assert sizes["fully-allocated"] >= sizes["required"]
        if mode == "full":
            write_disk(folder / "disk.raw", recipe.size, [(0, b"\1" * recipe.size)])
            full = stream("disk.raw", "-c", cluster_size, *width, cwd=folder)
            assert sizes["fully-allocated"] == len(full)


def test_measure_prints_what_qemu_img_measure_prints(tmp_path: Path) -> None:
    raw = Recipe(9 * MIB, [(0, "noise", 3 * MIB)]).write(tmp_path / "disk.raw")
    theirs = subprocess.check_output(
        ["qemu-img", "measure", "--output=json", "-f", "raw", "-O", "qcow2", str(raw)]
    )
    ours = stream(raw, "--measure", "--output=json")
    assert set(json.loads(ours)) == set(json.loads(theirs))
    human = stream(raw, "--measure").decode()
    lines = re.fullmatch(r"required size: (\d+)\nfully allocated size: (\d+)\n", human)
    assert lines
    assert int(lines.group(1)) == json.loads(ours)["required"] == len(stream(raw))


def test_measure_of_another_format_and_on_a_terminal(tmp_path: Path) -> None:
    raw = Recipe(4 * MIB, [(0, "noise", MIB)]).write(tmp_path / "disk.raw")
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    assert stream("-f", "qcow2", image, "--measure") == stream(raw, "--measure")
    leader, follower = pty.openpty()
    try:
        done = subprocess.run(command(raw, "--measure"), stdout=follower, check=False)
        assert done.returncode == 0
        assert os.read(leader, 1000).startswith(b"required size: ")
    finally:
        os.close(leader)
        os.close(follower)


def test_output_needs_measure(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 512)
    assert_refused(run(raw, "--output", "json"), "--measure")


# Progress


@pytest.fixture
def slow(tmp_path: Path, fuse_disk: Callable[..., FuseDisk]) -> Path:
    """A disk that takes some seconds to scan."""
    raw = write_disk(tmp_path / "disk.raw", 4 * MIB, [(0, noise(4 * MIB))])
    return fuse_disk(raw, latency=0.1, direct=True).path


def on_a_terminal(words: List[Any]) -> str:
    """All that a program draws on a terminal that is its stderr."""
    leader, follower = pty.openpty()
    drawn = b""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=follower) as program:
        os.close(follower)
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the last writer is gone
                break
            drawn += data
        assert program.wait(TIMEOUT) == 0
    os.close(leader)
    return drawn.decode()


LINE = (
    r"(starting|scan |write)\s+\d+%  [\d.]+ \w+ of [\d.]+ \w+  [\d.]+ \w+/s  "
    r"(\d+:)?(\d+:\d\d|\?) left"
)
SUMMARY = (
    r"disk [\d.]+ \w+: [\d.]+ \w+ data, [\d.]+ \w+ zeros or unchanged; image [\d.]+ \w+ in .*/s\)"
)


def test_progress_is_redrawn_on_a_terminal(slow: Path) -> None:
    drawn = on_a_terminal(command(slow, "-p"))
    pictures = [text.strip() for text in drawn.split("\r\x1b[K") if text.strip()]
    assert len(pictures) > 3
    of_the_copy = [text for text in pictures[:-1] if not text.startswith("opening ")]
    assert len(of_the_copy) > 3
    assert [text for text in of_the_copy if not re.fullmatch(LINE, text)] == []
    assert re.fullmatch(SUMMARY, pictures[-1])
    assert drawn.count("\n") == 1, "one line stays"
    assert max(map(len, pictures[:-1])) < 80
    assert any(text.startswith("scan") for text in pictures)
    assert any(text.startswith("write") for text in pictures)


def test_progress_in_a_log_is_lines(tmp_path: Path) -> None:
    raw = Recipe(4 * MIB, [(0, "noise", MIB), (2 * MIB, "zeros", MIB)]).write(tmp_path / "d")
    result = run(raw, "-p")
    assert result.status == 0
    assert result.stdout == stream(raw)
    assert re.fullmatch(SUMMARY + r"\n", result.stderr)
    assert "disk 4 MiB: 1 MiB data, 3 MiB zeros" in result.stderr


@pytest.mark.parametrize(
    "size, text",
    [
        (999 * KIB, "999 KiB"),
        (1999 * 512, "0.976 MiB"),  # three digits of 999.5 KiB would be a thousand
        (MIB, "1 MiB"),
        (1023 * MIB + 512 * KIB, "1 GiB"),
        (999 * GIB + 700 * MIB, "0.976 TiB"),
    ],
)
def test_sizes_for_people_have_three_digits(tmp_path: Path, size: int, text: str) -> None:
    result = run(write_disk(tmp_path / "disk.raw", size), "-p")
    assert result.status == 0
    assert result.stderr.startswith(f"disk {text}: 0 B data, {text} zeros")


@pytest.mark.parametrize("options", [[], ["-p"]])
def test_sigusr1_prints_one_line_in_both_phases(slow: Path, options: List[str]) -> None:
    program = start(slow, *options, bufsize=0)
    wait_until_it_catches(program, signal.SIGUSR1)
    time.sleep(0.3)
    program.send_signal(signal.SIGUSR1)
    scan = program.stderr.readline().decode()
    assert re.fullmatch(LINE + r"\n", scan), scan
    assert scan.startswith("scan")
    head = program.stdout.read(1)
    program.send_signal(signal.SIGUSR1)
    lines = iter(program.stderr.readline, b"")  # on a busy machine, -p has said something, too
    write = next(line.decode() for line in lines if not (options and line.startswith(b"scan")))
    assert write.startswith("write"), write
    image = head + program.stdout.read()
    assert program.wait(TIMEOUT) == 0
    assert len(read_image(io.BytesIO(image)).data) == 64
    rest = program.stderr.read().decode()
    assert bool(rest) == bool(options)
    program.stdout.close()
    program.stderr.close()


def test_without_progress_nothing_is_printed(tmp_path: Path) -> None:
    raw = Recipe(4 * MIB, [(0, "noise", MIB)]).write(tmp_path / "disk.raw")
    assert run(raw).stderr == ""


def test_an_error_after_progress_stands_on_its_own_line(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 4 * MIB, [(0, noise(4 * MIB))])
    disk = fuse_disk(raw, latency=0.1, direct=True, error_at=3 * MIB)
    leader, follower = pty.openpty()
    program = subprocess.Popen(command(disk.path, "-p"), stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    drawn = b""
    while True:
        try:
            drawn += os.read(leader, 4096)
        except OSError:  # the last writer is gone
            break
    os.close(leader)
    assert program.wait(TIMEOUT) == 1
    assert drawn.decode().splitlines()[-1].startswith("qcow2_to_stdout.py: error: cannot read")


# Standard input


@settings(max_examples=40)
@given(
    recipe=recipes(max_size=MIB),
    bite=st.sampled_from([1, 511, 4097, 65536, 1 << 20]),
    cluster_size=st.sampled_from(["512", "64K", "2M"]),
    form=st.sampled_from(["none", "plain", "rbd", "map", "bitmap"]),
)
def test_a_stream_of_odd_pieces(recipe: Recipe, bite: int, cluster_size: str, form: str) -> None:
    if bite == 1:
        recipe = recipe._replace(size=min(recipe.size, 5000))
    with tempfile.TemporaryDirectory() as name:
        content = recipe.write(Path(name) / "disk.raw").read_bytes()
        layout = Path(name) / "layout"
        start_at, length = recipe.size // 3, recipe.size // 3
        entry = {
            "plain": {"offset": start_at, "length": length},
            "rbd": {"offset": start_at, "length": length, "exists": "true"},
            "map": {"start": start_at, "length": length, "depth": 0, "zero": False, "data": True},
            "bitmap": {"offset": start_at, "length": length, "type": 1, "description": "dirty"},
        }.get(form)
        layout.write_text(json.dumps([entry] if length else []))
        options = ["--layout", str(layout)] if entry else []
        words = ["-", "--size", str(recipe.size), "-c", cluster_size, *options]
        program = start(*words, stdin=subprocess.PIPE, bufsize=0, stdout=subprocess.PIPE)
        feeder = subprocess.Popen(
            [sys.executable, "-c", FEED, str(Path(name) / "disk.raw"), str(bite)],
            stdout=program.stdin,
        )
        program.stdin.close()
        image = b"".join(iter(lambda: program.stdout.read(1 << 16), b""))
        stderr = program.stderr.read().decode()
        assert (program.wait(TIMEOUT), stderr, feeder.wait(TIMEOUT)) == (0, "", 0)
        program.stdout.close()
        program.stderr.close()
        parsed = read_image(io.BytesIO(image))
        size = parsed.cluster_size
        if entry:
            touched = range(start_at // size, -(-(start_at + length) // size)) if length else []
            assert list(parsed.data) == list(touched)
            for index, cluster in parsed.data.items():
                here = content[index * size : (index + 1) * size]
                assert cluster == here.ljust(size, b"\0")
        else:
            assert len(parsed.data) == -(-recipe.size // size), "every cluster is allocated"
            assert parsed.over() == padded(content)
        assert json.loads(stream(*words, "--measure", "--output", "json"))["required"] == len(image)


FEED = """
import os, sys
with open(sys.argv[1], "rb") as disk:
    while True:
        data = disk.read(int(sys.argv[2]))
        if not data:
            break
        os.write(1, data)
"""


@pytest.mark.guarantee(5, "standard input shorter or longer than `--size`", "exit 1 at its end")
@pytest.mark.parametrize("size", [0, 1, 512, 100_000, 3 * MIB])
@pytest.mark.parametrize("off", [-1, 1, 70_000])
def test_input_shorter_or_longer_than_its_size(size: int, off: int) -> None:
    if size + off < 0:
        return
    result = run("-", "--size", str(size), stdin=noise(size + off))
    words = "goes on after" if off > 0 else "ended after"
    assert_failed(result, "standard input", words, str(size))


@pytest.mark.guarantee(5, "a pipe or socket of packets, of which ends get lost", "refused")
@pytest.mark.parametrize("off", [0, 1, 3000])
def test_input_that_keeps_packets_apart(off: int) -> None:
    """What is not read of a packet is lost: that there is more must be seen nevertheless."""
    data = noise(8192)
    reader, writer = os.pipe2(os.O_DIRECT)
    for at in range(0, len(data), 1024):
        os.write(writer, data[at : at + 1024])
    os.close(writer)
    done = subprocess.run(
        command("-", "--size", str(8192 - off)),
        stdin=reader,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(reader)
    result = Result(done.returncode, done.stdout, done.stderr.decode())
    if off:
        assert_failed(result, "standard input", "goes on after")
    else:
        assert result == Result(0, stream("-", "--size", "8192", stdin=data), "")


def test_input_from_a_terminal() -> None:
    """Which would make line feeds of carriage returns."""
    leader, follower = pty.openpty()
    done = subprocess.run(
        command("-", "--size", "512"), stdin=follower, capture_output=True, check=False
    )
    os.close(leader)
    os.close(follower)
    assert_refused(Result(done.returncode, done.stdout, done.stderr.decode()), "a terminal")


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_input_from_a_socket_of_packets(kind: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs:
        with ours:
            ours.send(noise(4096))
        done = subprocess.run(
            command("-", "--size", "4000"),
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT,
            check=False,
        )
    assert_refused(Result(done.returncode, done.stdout, done.stderr.decode()), "packets")


def test_a_layout_does_not_hide_a_wrong_size(tmp_path: Path) -> None:
    (tmp_path / "layout").write_text('[{"offset": 0, "length": 4096}]')
    for given_size in (99_999, 100_001):
        result = run("-", "--size", str(given_size), "--layout", tmp_path / "layout",
                     stdin=noise(100_000))  # fmt: skip
        assert_failed(result, "standard input")


def test_input_from_a_file_and_with_suffixes(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 2 * MIB, [(0, noise(2 * MIB))])
    with open(raw, "rb") as file:
        done = subprocess.run(
            command("-", "--size", "2M"), stdin=file, stdout=subprocess.PIPE, check=True
        )
    assert done.stdout == stream(raw)


def test_input_and_output_may_be_one_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen(
        command("-", "--size", "512"), stdin=theirs.fileno(), stdout=theirs.fileno()
    ) as program:
        theirs.close()
        ours.sendall(noise(512))
        ours.shutdown(socket.SHUT_WR)
        image = b"".join(iter(lambda: ours.recv(65536), b""))
        assert program.wait(TIMEOUT) == 0
    assert list(read_image(io.BytesIO(image)).data) == [0]


def test_a_layout_that_comes_late_on_a_descriptor_that_does_not_block(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", MIB, [(0, noise(MIB))])
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    program = start(raw, "--layout", "-", stdin=reader)
    os.close(reader)
    for piece in (b"[", b'{"offset": 0, ', b'"length": 1}', b"]"):
        time.sleep(0.1)
        os.write(writer, piece)
    os.close(writer)
    image, stderr = program.communicate(timeout=TIMEOUT)
    assert (program.returncode, stderr) == (0, b"")
    assert list(read_image(io.BytesIO(image)).data) == [0]


def test_input_that_comes_late_on_a_descriptor_that_does_not_block() -> None:
    disk = noise(3 * 65536)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    program = start("-", "--size", str(len(disk)), stdin=reader)
    os.close(reader)
    for at in range(0, len(disk), 65536):
        time.sleep(0.1)
        os.write(writer, disk[at : at + 65536])
    os.close(writer)
    image, stderr = program.communicate(timeout=TIMEOUT)
    assert (program.returncode, stderr) == (0, b"")
    assert image == stream("-", "--size", str(len(disk)), stdin=disk)


def test_input_with_many_short_runs_that_ends_early(tmp_path: Path) -> None:
    layout = tmp_path / "layout.json"
    runs = [{"offset": at, "length": 512} for at in range(0, MIB, 1024)]
    layout.write_text(json.dumps(runs))
    options = ["-", "--size", "1M", "-c", "512", "--layout", str(layout)]
    assert_failed(run(*options, stdin=noise(100_000)), "ended after 100000 bytes")


def test_input_that_cannot_be_read() -> None:
    unreadable = os.open(os.devnull, os.O_WRONLY)
    try:
        program = start("-", "--size", "1M", stdin=unreadable)
    finally:
        os.close(unreadable)
    image, stderr = program.communicate(timeout=TIMEOUT)
    assert_failed(Result(program.returncode, image, stderr.decode()), "cannot read", "descriptor")


STREAM_MISUSE = [
    (["disk.raw", "--diff", "-"], "BASE"),
    (["-"], "--size"),
    (["disk.raw", "--size", "1M"], "--size"),
    (["-", "--size", "1M", "--diff", "disk.raw"], "--diff"),
    (["-", "--size", "1M", "--layout", "-"], "both"),
    (["-", "--size", "1M", "-f", "qcow2"], "qcow2 is not read in order"),
    (["-", "--size", "1M", "-d"], "--data-file"),
    (["-", "--size", "1M", "-R"], "--data-file"),
]


@pytest.mark.parametrize(("words", "reason"), STREAM_MISUSE, ids=str)
def test_what_a_stream_cannot_be(tmp_path: Path, words: List[str], reason: str) -> None:
    write_disk(tmp_path / "disk.raw", MIB)
    assert_refused(run(*words, cwd=tmp_path), reason)


@pytest.mark.parametrize(
    ("text", "hint"), [("1X", "bytes"), ("100GB", "write 100G"), ("-1", "--size"), ("", "")]
)
def test_sizes_that_are_none(text: str, hint: str) -> None:
    result = run("-", f"--size={text}")
    assert result.status == 2
    assert hint in result.stderr


# Help, packaging, copies


def test_help_fits_its_screens() -> None:
    text = run("--help", env={**os.environ, "COLUMNS": "80"}).stdout.decode()
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 80
    for title in ("what to read", "what to export", "what to write", "how to run"):
        assert title in text


def test_a_copy_that_is_piped_to_another_host(tmp_path: Path) -> None:
    raw = Recipe(2 * MIB, [(0, "noise", MIB)]).write(tmp_path / "disk.raw")
    with open(PROGRAM, "rb") as script:  # ssh host python3 - /dev/vg/vm < qcow2_to_stdout.py
        done = subprocess.run(
            [sys.executable, "-", str(raw)],
            stdin=script,
            stdout=subprocess.PIPE,
            cwd="/",
            check=True,
        )
    assert done.stdout == stream(raw)


def test_the_copied_file_works_alone(tmp_path: Path) -> None:
    raw = Recipe(2 * MIB, [(0, "noise", MIB)]).write(tmp_path / "disk.raw")
    copy = tmp_path / "elsewhere"
    shutil.copy(PROGRAM, copy)
    for flags in ([], ["-I"], ["-S"], ["-O"], ["-W", "error"], ["-X", "dev"]):
        done = subprocess.run(
            [sys.executable, *flags, str(copy), str(raw)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), flags
        assert done.stdout == stream(raw)


@pytest.mark.xdist_group("packaging")
def test_the_wheel(tmp_path: Path) -> None:
    """python -m build, twine check, pip install: the one module and its command."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("qcow2_to_stdout.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    python = sys.executable
    subprocess.run([python, "-m", "build", "--no-isolation", str(source)], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    built = sorted((source / "dist").iterdir())
    subprocess.run([python, "-m", "twine", "check", "--strict", *map(str, built)], check=True)
    (wheel,) = [path for path in built if path.suffix == ".whl"]
    target = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", str(target)], check=True)
    pip = [str(target / "bin" / "pip"), "install", "-q", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    raw = Recipe(2 * MIB, [(0, "noise", MIB)]).write(tmp_path / "disk.raw")
    installed = target / "bin" / "qcow2-to-stdout"
    assert subprocess.check_output([installed, raw]) == stream(raw)
    files = subprocess.check_output([python, "-m", "zipfile", "-l", str(wheel)], text=True)
    modules = [
        line.split()[0] for line in files.splitlines() if line.endswith("py") or ".py " in line
    ]
    assert modules == ["qcow2_to_stdout.py"]


def test_short_runs_behind_a_long_one_come_in_order(tmp_path: Path) -> None:
    """A long run is sent before what follows it is read."""
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    named = [(0, 64 << 10), *((at, 512) for at in range(65 << 10, MIB, 1 << 10))]
    layout = tmp_path / "layout"
    layout.write_text(json.dumps([{"offset": at, "length": length} for at, length in named]))
    options = ["--layout", str(layout), "-c", "512", "--trust-layout"]
    streamed = stream("--size", "1M", *options, "-", stdin=raw.read_bytes())
    assert streamed == stream(raw, *options)
