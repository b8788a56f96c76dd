"""Any image that QEMU opens, read directly or through its daemon: the same bytes from both."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import needs
from support import judges
from support.ceph import Cluster
from support.disks import noise, write_disk
from support.program import (
    TIMEOUT,
    Result,
    altered,
    assert_refused,
    command,
    run,
    start,
    stream,
    wait_until_it_catches,
)
from support.pythons import pythons, version

MIB = 1 << 20


def shell(*arguments: Any, **options: Any) -> bytes:
    words = [str(word) for word in arguments]
    return bytes(subprocess.check_output(words, timeout=TIMEOUT, **options))


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


@pytest.fixture(autouse=True)
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


def leftovers(folder: Path) -> List[str]:
    """Folders, mounts and daemons of programs that had this temporary folder."""
    found = [str(path) for path in folder.iterdir()]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            arguments = os.fsdecode((status.parent / "cmdline").read_bytes())
        except OSError:
            continue
        if arguments.startswith("qemu-storage-daemon") and str(folder) in arguments:
            found.append(arguments)
    return found


def through_the_daemon(path: Path, *options: Any, form: str = "qcow2") -> bytes:
    """The image by way of the FUSE export, which --image-opts always takes."""
    name = str(path).replace(",", ",,")
    return stream(f"driver={form},file.driver=file,file.filename={name}", "--image-opts", *options)


def check_both_ways(path: Path, tmp_path: Path, *options: Any, direct: bool = True) -> bytes:
    """The stream of an image equals that of its raw content, whichever way it is read."""
    expected = stream(as_raw(path), *options)
    images = [stream("-f", "qcow2", path, *options), through_the_daemon(path, *options)]
    digests = {hashlib.sha256(image).hexdigest() for image in [expected, *images]}
    assert len(digests) == 1
    log = tmp_path / "trace"
    program = [str(word) for word in ("-f", "qcow2", path, *options)]
    shell("strace", "-f", "-e", "execve", "-o", log, "python3", PROGRAM, *program)
    assert ("qemu-storage-daemon" not in log.read_text()) == direct
    return expected


PROGRAM = Path(__file__).resolve().parents[1] / "qcow2_to_stdout.py"


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


@pytest.fixture
def chain(tmp_path: Path) -> List[Path]:
    """Qcow2 on qcow2 on raw, with different cluster sizes."""
    raw = write_disk(
        tmp_path / "bottom.raw", 4 * MIB + 1000, [(MIB, noise(2 * MIB)), (4 * MIB, noise(1000))]
    )
    middle = overlay(tmp_path / "middle.qcow2", raw, "raw", "-o", "cluster_size=4096")
    write(middle, "write -P 1 1M 8192", "write -z 2M 64k", "write -P 2 3145000 1000")
    top = overlay(tmp_path / "top.qcow2", middle, "qcow2", "-o", "cluster_size=512k")
    write(top, "write -P 3 1100000 4096", "write -P 4 3M 1")
    return [raw, middle, top]


def test_a_chain(chain: List[Path], tmp_path: Path) -> None:
    for options in ([], ["-c", "4K"], ["-c", "2M", "-r", "1"]):
        check_both_ways(chain[2], tmp_path, *options)
        check_both_ways(chain[1], tmp_path, *options)


@pytest.mark.parametrize("size", ["2M", "6M", "4194816"])
def test_an_overlay_larger_or_smaller_than_its_backing_file(tmp_path: Path, size: str) -> None:
    base = write_disk(tmp_path / "base.raw", 4 * MIB + 512, [(0, noise(4 * MIB + 512))])
    top = tmp_path / "top.qcow2"
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top, size)
    write(top, "write -P 3 1M 100k")
    check_both_ways(top, tmp_path)


def test_extended_l2_entries(tmp_path: Path) -> None:
    base = write_disk(tmp_path / "base.raw", 4 * MIB, [(0, noise(4 * MIB))])
    top = overlay(tmp_path / "top.qcow2", base, "raw", "-o", "extended_l2=on,cluster_size=128k")
    write(top, "write -P 1 12k 4k", "write -z 1M 8k", "discard 2M 128k")
    check_both_ways(top, tmp_path)


def test_internal_snapshots(tmp_path: Path) -> None:
    image = write(create(tmp_path / "a.qcow2", "4M"), "write -P 1 0 2M")
    shell("qemu-img", "snapshot", "-c", "one", image)
    write(image, "write -P 2 1M 2M")
    check_both_ways(image, tmp_path)


def test_compressed_clusters(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "a.raw", 4 * MIB, [(0, b"text" * 500_000)])
    shell("qemu-img", "convert", "-c", "-O", "qcow2", raw, tmp_path / "a.qcow2")
    check_both_ways(tmp_path / "a.qcow2", tmp_path, direct=False)


def test_an_external_data_file(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", "4M", "-o", f"data_file={tmp_path}/a.data")
    write(image, "write -P 1 1M 1M")
    check_both_ways(image, tmp_path, direct=False)


def test_a_data_file_that_only_the_backing_name_tells_of(tmp_path: Path) -> None:
    """QEMU's words on the chain tell of no such file, and name places that look like its own."""
    data = tmp_path / "data"
    middle = create(tmp_path / "middle.qcow2", "1M", "-o", f"data_file={data}")
    write(middle, "write -P 7 0 1M")
    shell("qemu-img", "amend", "-f", "qcow2", "-o", "data_file=", middle)
    os.truncate(middle, 8 * MIB)
    files = {
        key: {"driver": "file", "filename": str(path)}
        for key, path in (("file", middle), ("data-file", data))
    }
    name = "json:" + json.dumps({"driver": "qcow2", **files})
    top = tmp_path / "top.qcow2"
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", name, top, "1M")
    check_both_ways(top, tmp_path, direct=False)


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_a_backing_name_in_json(tmp_path: Path, form: str) -> None:
    """Whatever its options mean, QEMU knows best."""
    base = write(create(tmp_path / "base", "2M", form=form), "write -P 7 512 1M", form=form)
    options = {} if form == "qcow2" else {"offset": 512, "size": 2 * MIB - 512}
    node = {"driver": form, **options, "file": {"driver": "file", "filename": str(base)}}
    top = tmp_path / "top.qcow2"
    shell(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", f"json:{json.dumps(node)}", "-F", form, top
    )
    check_both_ways(top, tmp_path, direct=False)


def test_an_encrypted_image_is_refused_in_qemus_words(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    secret = ["--object", "secret,id=s,data=abc"]
    options = ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    shell("qemu-img", "create", "-q", "-f", "qcow2", *secret, *options, image, "1M")
    result = run("-f", "qcow2", image)
    assert_refused(result, str(image), "encrypt")


FORMATS = ["vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "qcow", "luks"]


@pytest.mark.parametrize("form", FORMATS[:6])
def test_other_formats(tmp_path: Path, form: str) -> None:
    raw = write_disk(tmp_path / "a.raw", 8 * MIB, [(MIB, noise(MIB)), (7 * MIB, noise(70_000))])
    image = tmp_path / f"a.{form}"
    options = ["-o", "force_size=on"] if form == "vpc" else []
    shell("qemu-img", "convert", "-f", "raw", "-O", form, *options, raw, image)
    streamed = stream("-f", form, image)
    (tmp_path / "a.qcow2").write_bytes(streamed)
    judges.qemu_check(tmp_path / "a.qcow2")
    shell("qemu-img", "compare", "-f", form, "-F", "qcow2", image, tmp_path / "a.qcow2")


def test_dmg(tmp_path: Path) -> None:
    """A disk image of Apple's: a table of stored blocks, written here by hand."""
    content = noise(MIB)
    image = tmp_path / "a.dmg"
    image.write_bytes(dmg(content))
    parsed = stream("-f", "dmg", image)
    (tmp_path / "a.qcow2").write_bytes(parsed)
    assert judges.qemu_read(tmp_path / "a.qcow2") == content


def dmg(content: bytes) -> bytes:
    """The smallest dmg that there is: one raw chunk, one property list, one trailer."""
    import base64
    import struct

    sectors = len(content) // 512
    mish = struct.pack(">4sIQQQII24sII128s", b"mish", 1, 0, sectors, 0, 0, 0, b"", 2, 0, b"")
    mish = mish[:200].ljust(200, b"\0") + struct.pack(">I", 2)
    mish += struct.pack(">IIQQQQ", 1, 0, 0, sectors, 0, len(content))
    mish += struct.pack(">IIQQQQ", 0xFFFFFFFF, 0, sectors, 0, len(content), 0)
    table = base64.b64encode(mish)
    plist = (
        b"<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict>"
        b"<key>Data</key><data>" + table + b"</data></dict></array></dict></dict></plist>"
    )
    koly = bytearray(512)
    koly[0:12] = struct.pack(">4sII", b"koly", 4, 512)
    struct.pack_into(">QQ", koly, 24, 0, len(content))
    struct.pack_into(">QQ", koly, 216, len(content), len(plist))
    struct.pack_into(">Q", koly, 492, sectors)
    return content + plist + bytes(koly)


def test_the_difference_of_two_members_reads_only_what_they_do_not_share(
    chain: List[Path], tmp_path: Path
) -> None:
    raw, middle, top = chain
    for new, base, form in ((top, middle, "qcow2"), (top, raw, "raw"), (middle, raw, "raw")):
        options: List[Any] = ["-b", base.name, "-F", form, "--diff", base, "--diff-format", form]
        image = stream("-f", "qcow2", new, *options)
        difference = tmp_path / "difference.qcow2"
        difference.write_bytes(image)
        judges.qemu_check(difference)
        shell("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", new, difference)
        assert len(image) < 2 * MIB
        plain = stream(as_raw(new), "--diff", as_raw(base, form), *options[:4])
        assert image == plain


def test_what_a_chain_shares_is_not_read(tmp_path: Path) -> None:
    base = write(create(tmp_path / "base.qcow2", "64M"), "write -P 1 0 64M")
    top = write(overlay(tmp_path / "top.qcow2", base, "qcow2"), "write -P 2 32M 64k")
    log = tmp_path / "trace"
    options = ["-f", "qcow2", top, "--diff", base]
    shell("strace", "-e", "preadv,preadv2,pread64", "-o", log, "python3", PROGRAM, *options)
    lines = [line for line in log.read_text().splitlines() if "preadv" in line]
    assert sum(int(line.rsplit("=", 1)[1]) for line in lines) < 3 * 65536 + 512


NAMES = [
    "a,b=c",
    'quo"te',
    "sp ace",
    "-dash",
    "new\nline",
    "äöü 日本",
    "co:lon",
    "json:{}",
    "back\\slash",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_names_mean_nothing(tmp_path: Path, name: str, form: str) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", form, raw, tmp_path / "image")
    (tmp_path / "image").rename(tmp_path / name)
    assert stream("-f", form, "--", name, cwd=tmp_path) == stream(raw)


def test_an_nbd_export(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", 4 * MIB, [(MIB, noise(MIB))])
    address = tmp_path / "socket"
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", "-k", str(address), str(raw)])
    try:
        while not address.exists():
            time.sleep(0.02)
        options = f"driver=nbd,server.type=unix,server.path={address}"
        assert stream("--image-opts", options) == stream(raw)
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def nbd_server(folder: Path, *arguments: Any) -> Iterator[Tuple[Any, str]]:
    """nbdkit, and the option string of the disk that it shows."""
    address = folder / "nbd"
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(address), *map(str, arguments)])
    try:
        while not address.exists():
            assert server.poll() is None, "nbdkit ended"
            time.sleep(0.02)
        yield server, f"driver=nbd,server.type=unix,server.path={address}"
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait()


def check_against_qemu(tmp_path: Path, options: str) -> None:
    """The image of an option string reads as what qemu-img makes of it."""
    expected = tmp_path / "expected.raw"
    shell("qemu-img", "convert", "--image-opts", options, "-O", "raw", expected)
    assert any(expected.read_bytes())
    assert stream("--image-opts", options) == stream(expected)


def test_a_hole_that_is_no_zeros(tmp_path: Path) -> None:
    """A server may tell that something is not allocated, and not what it reads as."""
    plugin = tmp_path / "plugin.sh"
    plugin.write_text(
        "case $1 in\n"
        "get_size) echo 1048576;;\n"
        "pread) head -c $3 /dev/zero | tr '\\0' A;;\n"
        "can_extents) ;;\n"
        "extents) echo 0 1048576 hole;;\n"
        "*) exit 2;;\n"
        "esac\n"
    )
    plugin.chmod(0o755)
    with nbd_server(tmp_path, "sh", plugin) as (_, options):
        check_against_qemu(tmp_path, options)


def test_a_server_for_one_client_and_a_file_that_nothing_names(tmp_path: Path) -> None:
    """What QEMU reads is known when it shows the image; by then it holds the one connection."""
    raw = write_disk(tmp_path / "raw", 4 * MIB, [(0, noise(4 * MIB))])
    address = tmp_path / "nbd"
    words = ["qemu-nbd", "-t", "-r", "-f", "raw", "--shared=1", "-k", str(address), str(raw)]
    with subprocess.Popen(words) as server:
        try:
            while not address.exists():
                time.sleep(0.02)
            data = f"data_file={tmp_path / 'data'}"
            uri = f"nbd+unix:///?socket={address}"
            top = tmp_path / "top.qcow2"
            backing = ["-u", "-F", "raw", "-b", uri]
            shell("qemu-img", "create", "-q", "-f", "qcow2", "-o", data, *backing, top, "4M")
            write(top, "write -P 5 1M 64k")
            expected = as_raw(top)
            assert stream("-f", "qcow2", top) == stream(expected)
            program = start("-f", "qcow2", top)
            program.stdout.read(1)
            os.utime(tmp_path / "data")
            assert b"changed while" in program.communicate(timeout=TIMEOUT)[1]
        finally:
            server.kill()


def test_a_signal_while_an_abandoned_program_is_ended(dense_vmdk: Path, tmp_path: Path) -> None:
    """Of a compressed chain, qemu-img need not say everything; an export is there already."""
    small = write(create(tmp_path / "small.qcow2", "1M"), "write -c 0 64k")
    marker = tmp_path / "marker"
    slow = (
        "import pathlib, subprocess, time\n"
        "kill = subprocess.Popen.kill\n"
        "def slow(self):\n"
        "    kill(self)\n"
        "    if 'map' in str(self.args):\n"
        f"        pathlib.Path({str(marker)!r}).touch()\n"
        "        time.sleep(1)\n"
        "subprocess.Popen.kill = slow\n"
    )
    words = ["-f", "vmdk", dense_vmdk, "--diff", small, "--diff-format", "qcow2"]
    program = start(*map(str, words), env=altered(tmp_path, slow))
    while not marker.exists():
        time.sleep(0.01)
    marker.unlink()
    while not marker.exists():  # the second: the base's
        time.sleep(0.01)
    program.send_signal(signal.SIGTERM)
    stderr = program.communicate(timeout=TIMEOUT)[1]
    assert (program.returncode, stderr) == (-signal.SIGTERM, b"")


def test_a_remote_disk_that_grows_while_it_is_opened(tmp_path: Path) -> None:
    """Between qemu-img's answers and the export, of which the end would be in no range."""
    plugin = tmp_path / "plugin.sh"
    plugin.write_text(
        "case $1 in\n"
        f"get_size) echo >> {tmp_path}/asked; n=$(wc -l < {tmp_path}/asked)\n"
        "  [ $n -ge $LATE ] && echo 2097152 || echo 1048576;;\n"
        "pread) head -c $3 /dev/zero | tr '\\0' A;;\n"
        "can_extents) exit 3;;\n"
        "*) exit 2;;\n"
        "esac\n"
    )
    plugin.chmod(0o755)
    for late in range(2, 5):
        (tmp_path / "asked").write_text("")
        folder = tmp_path / str(late)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LATE", str(late))
            with nbd_server(folder, "sh", plugin) as (_, options):
                result = run("--image-opts", options)
        if late == 4:  # after all have asked
            assert result.status == 0
        else:
            assert_refused(result, "run the program again" if late == 3 else "of its 1048576 bytes")


FILTERS = {
    "file": "",
    "file.file": "file.driver=compress,",
    "file.image": "file.driver=blkdebug,",
}


@pytest.mark.parametrize("node", FILTERS)
def test_a_part_of_an_overlay(tmp_path: Path, node: str) -> None:
    """What the overlay has not got itself is not zeros: its backing file shows through."""
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    top = overlay(tmp_path / "top.qcow2", raw, "raw")
    part = f"driver=raw,offset=65536,size=524288,{FILTERS[node]}"
    check_against_qemu(tmp_path, f"{part}{node}.driver=qcow2,{node}.file.filename={top}")


def test_an_overlay_on_a_part_of_an_overlay(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    middle = overlay(tmp_path / "middle.qcow2", raw, "raw")
    inner = {"driver": "qcow2", "file": {"driver": "file", "filename": str(middle)}}
    part = {"driver": "raw", "offset": 65536, "size": 524288, "file": inner}
    top = tmp_path / "top.qcow2"
    name = f"json:{json.dumps(part)}"
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", name, top, "512K")
    assert stream("-f", "qcow2", top) == stream(as_raw(top))
    assert any(as_raw(top).read_bytes())


@pytest.mark.parametrize("way", ["raw", "qcow2", "option string"])
@pytest.mark.parametrize("trust", [[], ["--trust-layout"]])
def test_a_shorter_disk_that_ends_within_a_sector(
    tmp_path: Path, way: str, trust: List[str]
) -> None:
    """No layout speaks of the zeros behind its end, where the backing file has other bytes."""
    size = (1 << 20) + 1000
    write_disk(tmp_path / "base.raw", 2 << 20, [(0, noise(2 << 20))])
    new = write_disk(tmp_path / "new.raw", size, [(0, noise(2 << 20)[:size])])
    words = [str(new)]
    if way == "qcow2":
        words = ["-f", "qcow2", str(overlay(tmp_path / "new.qcow2", new, "raw"))]
    elif way == "option string":
        words = ["--image-opts", f"driver=raw,file.driver=file,file.filename={new}"]
    options = ["--layout", "-", "-b", "base.raw", "-F", "raw", *trust]
    (tmp_path / "overlay.qcow2").write_bytes(stream(*words, *options, stdin=b"[]"))
    judges.qemu_compare(new, tmp_path / "overlay.qcow2")


def test_an_option_string_that_would_write_is_refused(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    top = overlay(tmp_path / "top.qcow2", raw, "raw")
    before = top.read_bytes()
    for key, value in (("file.read-only", "off"), ("read-only", "n"), ("file.read-only", "false")):
        node = f"driver=copy-on-read,{key}={value},file.driver=qcow2,file.file.filename={top}"
        assert_refused(run("--image-opts", node), "for writing")
    for flag in ("noread-only", "nofile.read-only", "read-only=on,noread-only"):
        node = f"driver=copy-on-read,file.driver=qcow2,{flag},file.file.filename={top}"
        assert_refused(run("--image-opts", node), "for writing")
    inner = json.dumps({"driver": "file", "filename": str(top), "read-only": False})
    node = f"driver=qcow2,file.filename=json:{inner.replace(',', ',,')}"
    assert_refused(run("--image-opts", node), "for writing")
    stream("--image-opts", f"driver=qcow2,read-only=on,file.read-only=yes,file.filename={top}")
    assert top.read_bytes() == before


@pytest.mark.parametrize("phase", ["scan", "copy"])
def test_a_signal_while_a_server_does_not_answer(tmp_path: Path, phase: str) -> None:
    """No signal interrupts a wait for a file system: the daemon must go first."""
    raw = write_disk(tmp_path / "raw", 64 * MIB, [(0, noise(64 * MIB))])
    # From a far server, all would have been fetched by the scan.
    delay = "5ms" if phase == "scan" else "0"
    words = ["--filter=delay", "file", raw, f"rdelay={delay}"]
    with nbd_server(tmp_path, *words) as (server, options):
        program = start("--image-opts", options)
        if phase == "copy":
            program.stdout.read(4 * MIB)
        else:
            while not daemons_of(program.pid):
                time.sleep(0.01)
            time.sleep(0.5)
        server.send_signal(signal.SIGSTOP)
        taken = threading.Thread(target=program.stdout.read, daemon=True)
        taken.start()
        time.sleep(1)  # until it waits
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT) == -signal.SIGTERM
        taken.join()
        assert program.stderr.read() == b""
        program.stdout.close()
        program.stderr.close()


@pytest.mark.xdist_group("ceph")
def test_rbd_without_a_mapped_device(ceph: Cluster, tmp_path: Path) -> None:
    ceph.rbd("create", "--size", "8M", "direct")
    ceph.io("direct", "write -P 1 1M 64k", "write -P 2 5M 512")
    ceph.rbd("snap", "create", "--no-progress", "direct@night")
    layout = ceph.rbd("diff", "--format", "json", "direct@night")
    options = f"driver=rbd,pool=rbd,image=direct,snapshot=night,conf={ceph.conf}"
    image = stream("--image-opts", options, "--layout", "-", stdin=layout.encode())
    (tmp_path / "a.qcow2").write_bytes(image)
    shell("qemu-img", "compare", "-f", "raw", "-F", "qcow2", ceph.url("direct@night"),
          tmp_path / "a.qcow2")  # fmt: skip
    assert image == stream("--image-opts", options)


def test_a_block_device_in_an_option_string(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    image = write(create(tmp_path / "a,b.qcow2", "1M"), "write -P 7 0 64k")
    device = loop_device(image)
    expected = stream(as_raw(image))
    assert stream("--image-opts", f"driver=qcow2,file.filename={device}") == expected
    name = str(image).replace(",", ",,")
    assert stream("--image-opts", f"driver=qcow2,file.filename={name}") == expected


def test_a_script_around_the_daemon(dense_vmdk: Path, tmp_path: Path) -> None:
    """Its child, the real one, inherits all that it has."""
    env = replaced(tmp_path, "qemu-storage-daemon", '#!/bin/sh\nREAL "$@"\ntrue\n')
    expected = stream("-f", "vmdk", dense_vmdk)
    assert stream("-f", "vmdk", dense_vmdk, env=env) == expected


def test_a_signal_while_the_daemon_is_waited_for(
    dense_vmdk: Path, tmp_path: Path, temporary: Path
) -> None:
    """After an error, of a daemon that does not end when it is asked to."""
    script = "#!/bin/sh\ntrap '' TERM\nexec 1>&-\nsleep 60\n"
    env = replaced(tmp_path, "qemu-storage-daemon", script)
    program = start("-f", "vmdk", dense_vmdk, env=env)
    while not list(temporary.iterdir()):
        time.sleep(0.01)
    time.sleep(1.5)
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=TIMEOUT)
    assert program.returncode in (1, -signal.SIGTERM)
    assert not list(temporary.iterdir())


def test_block_devices_hold_images_too(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    image = write(create(tmp_path / "a.qcow2", "8M"), "write -P 1 1M 1M")
    expected = stream("-f", "qcow2", image)
    device = loop_device(image)
    assert stream("-f", "qcow2", device) == expected
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "vdi", raw, tmp_path / "a.vdi")
    assert stream("-f", "vdi", loop_device(tmp_path / "a.vdi")) == stream(raw)


def test_what_qemu_says_is_passed_on(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    assert_refused(run("-f", "qcow2", raw), "raw", "not in qcow2 format")
    assert_refused(run("-f", "nonsense", raw), "Unknown driver 'nonsense'")
    assert_refused(run("-f", "qcow2", tmp_path / "none"), "none", "No such file")
    assert_refused(run("-f", "a b", raw), "format")
    base = create(tmp_path / "base.qcow2", "1M")
    top = overlay(tmp_path / "top.qcow2", base, "qcow2")
    base.unlink()
    assert_refused(run("-f", "qcow2", top), "base.qcow2", "No such file")
    assert_refused(run("-f", "qcow2", raw, "-d"), "--data-file", "--format qcow2")
    assert_refused(run("--image-opts", "file.filename=x"), "driver")
    assert_refused(run("--image-opts", "driver=nbd,server.type=unix,server.path=/none"), "/none")


def test_an_image_that_a_running_vm_holds(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", "1M")
    vm = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert vm.stdin is not None
    try:
        deadline = time.monotonic() + 10
        while run("-f", "qcow2", image).status == 0 and time.monotonic() < deadline:
            time.sleep(0.05)  # until it has the lock
        assert_refused(run("-f", "qcow2", image), "running VM", "snapshot")
    finally:
        vm.communicate(timeout=TIMEOUT)


def test_programs_that_are_not_installed(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", "1M")
    (tmp_path / "bin").mkdir()
    python = shutil.which("python3") or ""
    env = {"PATH": str(tmp_path / "bin")}
    result = run("-f", "qcow2", image, env=env, python="/usr/bin/python3")
    assert python
    assert_refused(result, "qemu-img", "qemu-utils", "Fedora")
    os.symlink(shutil.which("qemu-img") or "", tmp_path / "bin" / "qemu-img")
    options = ["--image-opts", f"driver=qcow2,file.filename={image}"]
    result = run(*options, env=env, python="/usr/bin/python3")
    assert_refused(result, "qemu-storage-daemon", "qemu-system-common")


@pytest.mark.parametrize("directory", ["missing", "read-only"])
def test_a_temporary_folder_that_cannot_be_made(tmp_path: Path, directory: str) -> None:
    image = create(tmp_path / "a.qcow2", "1M")
    env = {**os.environ, "TMPDIR": "/proc/none" if directory == "missing" else "/proc"}
    result = run("--image-opts", f"driver=qcow2,file.filename={image}", env=env)
    assert result.status in (0, 1)  # Python falls back to /tmp where it can
    assert result.stderr.count("\n") == result.status


def daemons_of(pid: int) -> List[int]:
    words = ["pgrep", "-P", str(pid), "-f", "qemu-storage-daemon"]
    found = subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout.split()
    return [int(word) for word in found]


@pytest.fixture
def dense_vmdk(tmp_path: Path) -> Path:
    raw = write_disk(tmp_path / "raw", 8 * MIB, [(0, noise(8 * MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, tmp_path / "a.vmdk")
    return tmp_path / "a.vmdk"


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGPIPE]
)
def test_no_ending_leaves_a_daemon(dense_vmdk: Path, signum: int, temporary: Path) -> None:
    program = start("-f", "vmdk", dense_vmdk)
    program.stdout.read(100_000)
    (daemon,) = daemons_of(program.pid)
    assert not list(temporary.iterdir()), "mount and folder are gone while it runs"
    if signum == signal.SIGPIPE:
        program.stdout.close()
    else:
        program.send_signal(signum)
        program.stdout.close()
    assert program.wait(TIMEOUT) == -signum
    assert program.stderr.read() == b""
    program.stderr.close()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{daemon}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{daemon}")


@pytest.mark.parametrize("python", pythons(), ids=version)
def test_an_export_under_every_python(dense_vmdk: Path, python: str) -> None:
    expected = stream(as_raw(dense_vmdk, "vmdk"))
    assert stream("-f", "vmdk", dense_vmdk, python=python) == expected
    program = start("-f", "vmdk", dense_vmdk, python=python)
    program.stdout.read(1)
    os.utime(dense_vmdk)
    assert b"changed while" in program.communicate(timeout=TIMEOUT)[1]


def test_a_daemon_that_dies(dense_vmdk: Path) -> None:
    expected = stream("-f", "vmdk", dense_vmdk)
    program = start("-f", "vmdk", dense_vmdk)
    taken = program.stdout.read(100_000)
    (daemon,) = daemons_of(program.pid)
    os.kill(daemon, signal.SIGKILL)
    image = taken + program.stdout.read()
    stderr = program.communicate(timeout=TIMEOUT)[1]
    if program.returncode == 0:  # all of it was in the page cache already
        assert image == expected
    else:
        assert program.returncode == 1
        assert b"cannot read" in stderr
        assert stderr.count(b"\n") == 1


def test_an_image_that_changes_while_it_is_exported(dense_vmdk: Path) -> None:
    program = start("-f", "vmdk", dense_vmdk)
    program.stdout.read(100_000)
    os.utime(dense_vmdk)
    stdout, stderr = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 1
    assert b"a.vmdk" in stderr
    assert b"changed" in stderr
    assert stdout


def test_a_member_that_changes_while_it_is_read(chain: List[Path]) -> None:
    program = start("-f", "qcow2", chain[2], "-c", "4K")
    program.stdout.read(10_000)
    os.utime(chain[0])
    stderr = program.communicate(timeout=TIMEOUT)[1].decode()
    assert program.returncode == 1
    assert "bottom.raw" in stderr


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_an_image_that_is_replaced_while_it_is_opened(tmp_path: Path, form: str) -> None:
    for name, byte in (("cur", 1), ("new", 2)):
        image = create(tmp_path / name, "8M", form=form)
        write(image, f"write -P {byte} {byte}M 1M", form=form)
    env = wrapped(tmp_path, f"[ -e {tmp_path}/new ] && mv {tmp_path}/new {tmp_path}/cur")
    assert_refused(run("-f", form, tmp_path / "cur", env=env), "cur", "replaced")


def test_a_qemu_that_talks_too_much(tmp_path: Path) -> None:
    image = write(create(tmp_path / "a.qcow2", "8M"), "write -P 1 1M 1M")
    env = wrapped(tmp_path, "head -c 200000 /dev/zero | tr '\\0' 'x' >&2")
    assert stream("-f", "qcow2", image, env=env) == stream("-f", "qcow2", image)


def test_many_inherited_descriptors(dense_vmdk: Path) -> None:
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        result = run("-f", "vmdk", dense_vmdk, pass_fds=descriptors)
    finally:
        for fd in descriptors:
            os.close(fd)
    assert (result.status, result.stderr) == (0, "")


@pytest.mark.parametrize("target", ["absolute", "relative"])
def test_a_temporary_folder_behind_a_link(
    dense_vmdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" if target == "absolute" else "real")
    expected = stream("-f", "vmdk", dense_vmdk)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "link"), "link"):
        env = {**os.environ, "TMPDIR": name}
        assert stream("-f", "vmdk", dense_vmdk, env=env) == expected
    assert not list((tmp_path / "real").iterdir())


@pytest.mark.parametrize("missing", [1, 511, 512, MIB])
def test_a_truncated_image(tmp_path: Path, missing: int) -> None:
    """QEMU would show zeros, which its own allowance for the last sector of a raw disk hides."""
    image = write(create(tmp_path / "a.qcow2", "4M"), "write -P 1 0 4M")
    stored = max(each["offset"] + each["length"] for each in judges.qemu_map(image))
    os.truncate(image, stored - missing)
    assert_refused(run("-f", "qcow2", image), "is truncated")
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    assert_refused(run("--image-opts", node), "is truncated")
    top = write(overlay(tmp_path / "top.qcow2", image, "qcow2"), "write -c -P 2 0 64k")
    assert_refused(run("-f", "qcow2", top), "is truncated")


def test_a_truncated_image_that_was_copied_without_its_holes(tmp_path: Path) -> None:
    """QEMU says that what lies behind the end is zeros, and data all the same."""
    image = create(tmp_path / "a.qcow2", "64M", "-o", "preallocation=metadata")
    write(image, "write -P 5 20M 40M")
    stream("-f", "qcow2", image)
    os.truncate(image, 50 * MIB)
    assert judges.qemu_map(image)[-1]["zero"]
    assert_refused(run("-f", "qcow2", image), "is truncated")
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    assert_refused(run("--image-opts", node), "is truncated")


def test_a_truncated_image_whose_tables_are_missing(tmp_path: Path) -> None:
    """What an L2 table behind the end would tell of seems never to have been written."""
    image = create(tmp_path / "a.qcow2", "4G")
    for gigabyte in range(4):
        write(image, f"write -P 7 {gigabyte}G 64k")
    content = image.read_bytes()
    cuts = range(65536 * 3, len(content), 65536)  # the first where the L1 table would be
    assert len(cuts) > 4
    for cut in cuts:
        image.write_bytes(content[:cut])
        result = run("-f", "qcow2", image)
        assert_refused(result, "a.qcow2")
        assert "is truncated" in result.stderr or "cannot open" in result.stderr
        node = f"driver=qcow2,file.driver=file,file.filename={image}"
        assert_refused(run("--image-opts", node), "a.qcow2")


def test_the_extent_of_a_flat_vmdk(tmp_path: Path) -> None:
    """Its name stands in the descriptor; it is watched, and its end is known."""
    needs(os.geteuid() == 0, "root, for a PID namespace")
    raw = write_disk(tmp_path / "a.raw", 3 * MIB, [(0, noise(3 * MIB))])
    image, extent = tmp_path / "a.vmdk", tmp_path / "a-flat.vmdk"
    flat = ("-o", "subformat=monolithicFlat")
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", *flat, raw, image)
    assert stream("-f", "vmdk", image) == stream(raw)
    alone = ["unshare", "--pid", "--fork", *command("-f", "vmdk", image)]  # no /proc tells of QEMU
    program = subprocess.Popen(alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.read(100_000)
    os.utime(extent)
    stderr = program.communicate(timeout=60)[1]
    assert (program.returncode, b"it was written to" in stderr) == (1, True), stderr
    os.truncate(extent, 2 * MIB)
    assert_refused(run("-f", "vmdk", image), "a-flat.vmdk", "is truncated")


@pytest.mark.parametrize("form", ["vdi", "vmdk", "qcow", "qed", "vpc", "parallels", "vhdx"])
def test_a_truncated_image_of_another_format(tmp_path: Path, form: str) -> None:
    raw = write_disk(tmp_path / "a.raw", 3 * MIB + 512, [(0, noise(3 * MIB + 512))])
    image = tmp_path / f"a.{form}"
    shell("qemu-img", "convert", "-f", "raw", "-O", form, raw, image)
    stream("-f", form, image)
    os.truncate(image, 2 * MIB)
    result = run("-f", form, image)
    assert_refused(result, "a." if form in ("qed", "vpc", "vhdx") else "is truncated")


def test_a_truncated_data_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    image = create(tmp_path / "a.qcow2", "4M", "-o", f"data_file={data}")
    write(image, "write -P 1 0 4M")
    stream("-f", "qcow2", image)
    snapshot = tmp_path / "snapshot"
    snapshot.write_bytes(data.read_bytes())
    os.truncate(data, 3 * MIB)
    assert_refused(run("-f", "qcow2", image), "data", "is truncated")
    # Which file an option has put in its place, nobody tells: the header's does not count.
    node = f"driver=qcow2,file.driver=file,file.filename={image},data-file.driver=file"
    stream("--image-opts", f"{node},data-file.filename={snapshot}")


@pytest.mark.parametrize("missing", [1, 512])
def test_a_truncated_extent_of_a_vmdk(tmp_path: Path, missing: int) -> None:
    raw = write_disk(tmp_path / "a.raw", 3 * MIB, [(0, noise(3 * MIB))])
    flat = ("-o", "subformat=monolithicFlat")
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", *flat, raw, tmp_path / "a.vmdk")
    os.truncate(tmp_path / "a-flat.vmdk", 3 * MIB - missing)
    assert_refused(run("-f", "vmdk", tmp_path / "a.vmdk"), "a-flat.vmdk", "is truncated")


def test_no_room_for_the_folder(dense_vmdk: Path, tmp_path: Path) -> None:
    needs(os.geteuid() == 0, "root, to mount a full file system")
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "none", str(folder)]
    subprocess.run(mount, check=True)
    try:
        result = run("-f", "vmdk", dense_vmdk, env={**os.environ, "TMPDIR": str(folder)})
        assert_refused(result, "temporary folder", "No space left")
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_no_fuse_device(dense_vmdk: Path) -> None:
    needs(os.geteuid() == 0, "root, to hide a device")
    hide = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"'
    words = ["unshare", "-m", "bash", "-c", hide, "bash", *command("-f", "vmdk", dense_vmdk)]
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False
    )
    assert_refused(Result(done.returncode, done.stdout, done.stderr.decode()), "no /dev/fuse")


def test_without_the_system_call_a_mount_goes_by_the_helper(
    tmp_path: Path, dense_vmdk: Path
) -> None:
    poor = altered(tmp_path, "import sys\nsys.modules['ctypes'] = None\n")
    assert stream("-f", "vmdk", dense_vmdk, env={**poor}) == stream("-f", "vmdk", dense_vmdk)


def test_a_system_that_starts_no_thread(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", "1M")
    poor = altered(
        tmp_path,
        "import threading\n"
        "def refuse(self): raise RuntimeError('can\\'t start new thread')\n"
        "threading.Thread.start = refuse\n",
    )
    for options in (
        ["-f", "qcow2", image],
        ["--image-opts", f"driver=qcow2,file.filename={image}"],
    ):
        assert_refused(run(*options, env=poor), "start new thread")


def test_a_signal_while_a_folder_is_made(dense_vmdk: Path, temporary: Path) -> None:
    """With threads at work already: it is for the main one, which has blocked it."""
    slow = "mkdir:delay_exit=500000:when=2"
    words = ["strace", "-f", "-qq", "-e", "trace=mkdir", "-e", f"inject={slow}", "-o"]
    traced_command = command("-f", "vmdk", dense_vmdk, "--diff", dense_vmdk)
    words += [f"{dense_vmdk}.log", *map(str, traced_command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as traced:
        while not list(temporary.iterdir()):  # the first one's is gone soon
            time.sleep(0.001)
        while list(temporary.iterdir()):
            time.sleep(0.001)
        while not list(temporary.iterdir()):
            time.sleep(0.001)
        children = Path(f"/proc/{traced.pid}/task/{traced.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        traced.communicate(timeout=TIMEOUT)
    assert traced.returncode == -signal.SIGTERM
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("victim", ["program", "group", "daemon"])
def test_no_mount_is_left_by_a_sudden_death(dense_vmdk: Path, temporary: Path, victim: str) -> None:
    """While the export is opened, of which nothing but an empty file may stay."""
    needs(os.geteuid() == 0, "root, whose exports are in a name space of their own")
    for pause in (0, 0.005, 0.01, 0.02, 0.03, 0.05):
        program = start("-f", "vmdk", dense_vmdk, start_new_session=True)
        # Its folder may come and go unseen, where the machine is busy.
        while not (list(temporary.iterdir()) or daemons_of(program.pid)):
            assert program.poll() is None
            time.sleep(0.001)
        time.sleep(pause)
        if victim == "group":
            os.killpg(program.pid, signal.SIGKILL)
        elif victim == "program":
            program.kill()
        else:
            for daemon in daemons_of(program.pid):
                os.kill(daemon, signal.SIGKILL)
        stderr = program.communicate(timeout=TIMEOUT)[1]
        if victim == "daemon":
            assert program.returncode in (0, 1), stderr
        else:
            assert program.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while left_of_mounts(temporary) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left_of_mounts(temporary)
        if victim == "daemon":
            assert not list(temporary.iterdir())
        shutil.rmtree(temporary)
        temporary.mkdir()


def left_of_mounts(folder: Path) -> List[str]:
    """Mounts and daemons that the folder's user has left: nothing but empty files."""
    return [each for each in leftovers(folder) if not each.startswith(f"{folder}/")]


def test_qemu_img_ends_with_the_program(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen(1)
        name = f"driver=nbd,server.type=unix,server.path={tmp_path}/s"
        program = start("--image-opts", name)
        connection = silent.accept()[0]  # which never answers
        program.kill()
        program.communicate(timeout=TIMEOUT)
        assert connection.recv(1) == b"", "qemu-img is gone as well"
        connection.close()


def test_processes_that_proc_does_not_tell_of(dense_vmdk: Path, temporary: Path) -> None:
    """As in a name space of processes with the /proc of another."""
    needs(os.geteuid() == 0, "root, to make a name space")
    words = ["unshare", "--pid", "--fork", *map(str, command("-f", "vmdk", dense_vmdk))]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == stream("-f", "vmdk", dense_vmdk)


def test_a_daemon_that_shows_nothing(dense_vmdk: Path, tmp_path: Path, temporary: Path) -> None:
    script = "#!/bin/sh\necho hello; exec sleep 60\n"
    env = replaced(tmp_path, "qemu-storage-daemon", script)
    result = run("-f", "vmdk", dense_vmdk, env=env)
    assert_refused(result, "can't be seen")


SILENT_DAEMON = """
import time

time.sleep(60)
"""
STOPPED_DAEMON = """
import ctypes, os, signal, subprocess, sys, time

daemon = subprocess.Popen(
    ["REAL", *sys.argv[1:]],
    stdout=subprocess.PIPE,
    preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0),
)
hello = os.read(daemon.stdout.fileno(), 1)
daemon.send_signal(signal.SIGSTOP)
os.waitpid(daemon.pid, os.WUNTRACED)
os.write(1, hello)
time.sleep(60)
"""


@pytest.mark.parametrize("daemon", [SILENT_DAEMON, STOPPED_DAEMON], ids=["silent", "stopped"])
def test_a_daemon_that_hangs(dense_vmdk: Path, tmp_path: Path, daemon: str) -> None:
    """One is the real one, stopped when it has said hello."""
    env = replaced(tmp_path, "qemu-storage-daemon", f"#!{sys.executable}\n{daemon}")
    assert_refused(run_impatiently("-f", "vmdk", str(dense_vmdk), env=env), "does not answer")


def run_impatiently(*arguments: str, **options: Any) -> Result:
    """Run the program with less patience than the minute that it grants QEMU."""
    impatient = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import qcow2_to_stdout as p; "
        "p.QEMU_PATIENCE = 1; sys.exit(p.main())"
    )
    words = [sys.executable, "-c", impatient, *arguments]
    done = subprocess.run(words, capture_output=True, timeout=TIMEOUT, check=False, **options)
    return Result(done.returncode, done.stdout, done.stderr.decode())


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen(1)
        name = f"driver=nbd,server.type=unix,server.path={tmp_path}/s"
        assert_refused(run_impatiently("--image-opts", name), "qemu-img does not answer")


@pytest.mark.parametrize("daemon", [SILENT_DAEMON, STOPPED_DAEMON], ids=["silent", "stopped"])
def test_a_signal_while_a_daemon_hangs(dense_vmdk: Path, tmp_path: Path, daemon: str) -> None:
    """It is not for the minute to pass that a signal waits."""
    marker = tmp_path / "marker"
    said = f"\nopen({str(marker)!r}, 'w').close()\ntime.sleep(60)"
    script = f"#!{sys.executable}\n{daemon}".replace("\ntime.sleep(60)", said)
    env = replaced(tmp_path, "qemu-storage-daemon", script)
    program = start("-f", "vmdk", dense_vmdk, env=env)
    while not marker.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == -signal.SIGTERM
    assert program.communicate() == (b"", b"")


def test_a_qemu_img_that_is_killed_where_nobody_asks_for_its_status(tmp_path: Path) -> None:
    """A parent that ignores SIGCHLD hands that down: the kernel forgets how children end."""
    image = write(create(tmp_path / "a.qcow2", "8M"), "write -P 1 0 8M")
    entry = (
        '{"start": 0, "length": 65536, "depth": 0, "zero": false, "data": true, "offset": 327680}'
    )
    dies = f"case $1 in map) echo '[{entry},'; kill -9 $$;; esac"
    env = wrapped(tmp_path, dies)
    for handler in (signal.SIG_DFL, signal.SIG_IGN):
        ignore = functools.partial(signal.signal, signal.SIGCHLD, handler)
        result = run("-f", "qcow2", image, env=env, preexec_fn=ignore)
        assert_refused(result, "cannot open", "a.qcow2")


@pytest.mark.parametrize(
    "text", ["", "[]", "[{SOME}", "[{SOME},", "[{SOME}]", "[{LATE}]", "[5]", "[{DEEP}]", "{}"]
)
def test_a_map_that_does_not_tell_of_all_of_the_disk(tmp_path: Path, text: str) -> None:
    image = write(create(tmp_path / "a.qcow2", "8M"), "write -P 1 0 8M")
    entry = '{"start": %d, "length": 65536, "depth": 0, "zero": false, "data": true, "offset": 0}'
    for name, json_text in (("SOME", entry % 0), ("LATE", entry % 65536), ("DEEP", "[" * 100_000)):
        text = text.replace("{" + name + "}", json_text)
    env = wrapped(tmp_path, f"case $1 in map) echo '{text}'; exit;; esac")
    assert_refused(run("-f", "qcow2", image, env=env), "cannot open", "a.qcow2", "qemu-img")


@pytest.mark.parametrize("text", ["nonsense", "", "[]", "{}", "[1]", "null", "[{}]", "[" * 100_000])
def test_a_qemu_img_that_prints_nonsense(tmp_path: Path, text: str) -> None:
    image = create(tmp_path / "a.qcow2", "1M")
    (tmp_path / "text").write_text(text)
    env = replaced(tmp_path, "qemu-img", f"#!/bin/sh\ncat {tmp_path}/text\n")
    assert_refused(run("-f", "qcow2", image, env=env), "cannot open", "qemu-img")


def test_a_member_that_is_rebased_while_the_chain_is_opened(tmp_path: Path) -> None:
    old, new = (
        write(create(tmp_path / f"{name}.qcow2", "1M"), f"write -P {number} 0 1M")
        for number, name in enumerate(("old", "new"), 1)
    )
    middle = overlay(tmp_path / "middle.qcow2", old, "qcow2")
    top = overlay(tmp_path / "top.qcow2", middle, "qcow2")
    rebase = f"REAL rebase -u -b {new} -F qcow2 {middle}"
    script = f'#!/bin/sh\nREAL "$@" && case $1 in info) {rebase};; esac\n'
    env = replaced(tmp_path, "qemu-img", script)
    assert_refused(run("-f", "qcow2", top, env=env), "changed while")


@pytest.mark.parametrize("size", [100_000, 65536 * 3 + 1])
def test_a_raw_backing_file_that_ends_within_a_sector(tmp_path: Path, size: int) -> None:
    backing = tmp_path / "base.raw"
    backing.write_bytes(noise(size))
    image = create(tmp_path / "a.qcow2", "1M", "-b", str(backing), "-F", "raw")
    assert stream("-f", "qcow2", image) == stream(as_raw(image))


@pytest.mark.parametrize("python", pythons(), ids=version)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_chain_with_names_beyond_ascii(tmp_path: Path, python: str, locale: str) -> None:
    base = write(create(tmp_path / "bäse.qcow2", "1M"), "write -P 5 64k 100k")
    top = write(overlay(tmp_path / "töp.qcow2", base, "qcow2"), "write -P 6 512k 64k")
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    image = stream("-f", "qcow2", top, env=env, python=python)
    assert image == stream(as_raw(top))


def test_a_backing_file_whose_name_qemu_cannot_print(tmp_path: Path) -> None:
    shown = write_disk(tmp_path / "\N{REPLACEMENT CHARACTER}.raw", MIB, [(0, noise(MIB))])
    hidden = os.fsencode(tmp_path) + b"/\xff.raw"
    Path(os.fsdecode(hidden)).write_bytes(noise(MIB, 1))
    top = tmp_path / "top.qcow2"
    words = [b"qemu-img", b"create", b"-q", b"-f", b"qcow2", b"-b", hidden, b"-F", b"raw"]
    subprocess.run([*words, os.fsencode(top)], check=True)
    assert stream("-f", "qcow2", top) == stream(os.fsdecode(hidden)) != stream(shown)
    program = start("-f", "qcow2", top)
    program.stdout.read(1)
    os.utime(hidden)
    assert b"changed while" in program.communicate(timeout=TIMEOUT)[1]


def test_a_remote_backing_file_with_a_local_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    remote = write_disk(tmp_path / "remote.raw", MIB, [(0, noise(MIB))])
    url = f"nbd+unix:///?socket={tmp_path}/s"
    Path(url).parent.mkdir(parents=True)
    write_disk(Path(url), MIB, [(0, noise(MIB, 1))])
    server = ["nbdkit", "-f", "-U", f"{tmp_path}/s", "file", str(remote)]
    with subprocess.Popen(server) as nbdkit:
        try:
            while not Path("s").exists():
                time.sleep(0.02)
            create(tmp_path / "top.qcow2", "1M", "-b", url, "-F", "raw")
            assert stream("-f", "qcow2", "top.qcow2") == stream(remote)
        finally:
            nbdkit.terminate()


OPTION_STRINGS = {
    "raw": "driver=raw,offset=512,size=7M,file.driver=file,file.filename=RAW",
    "quorum": "driver=quorum,vote-threshold=1,children.0.driver=raw,"
    "children.0.file.driver=file,children.0.file.filename=RAW",
    "blkdebug": "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=RAW",
}


@pytest.mark.parametrize("kind", OPTION_STRINGS)
def test_a_changed_file_behind_an_option_string(tmp_path: Path, kind: str) -> None:
    raw = write_disk(tmp_path / "big.raw", 8 * MIB, [(0, noise(8 * MIB))])
    name = OPTION_STRINGS[kind].replace("RAW", str(raw))
    program = start("--image-opts", name)
    program.stdout.read(100_000)
    os.utime(raw)
    stderr = program.communicate(timeout=TIMEOUT)[1]
    assert program.returncode == 1
    assert b"big.raw" in stderr


@pytest.mark.parametrize("signals", [(15, 1), (2, 2), (15, 15), (1, 2)])
def test_two_signals_are_no_more_than_one(dense_vmdk: Path, signals: Any) -> None:
    for pause in (0, 0.02, 0.04, 0.08, 0.12, 0.2):
        program = start("-f", "vmdk", dense_vmdk)
        wait_until_it_catches(program, signal.SIGUSR1)
        time.sleep(pause)
        for signum in signals:
            program.send_signal(signum)
        stderr = program.communicate(timeout=TIMEOUT)[1]
        assert program.returncode in (-signals[0], -signals[1]), stderr
        assert not stderr


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_without_root(tmp_path: Path, form: str) -> None:
    needs(os.geteuid() == 0, "root, to become somebody else")
    if form == "vmdk":  # direct reading needs none of this
        needs(os.stat("/dev/fuse").st_mode & 0o006 == 0o006, "a /dev/fuse for everybody")
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", form, raw, tmp_path / "image")
    folder = Path("/tmp") / f"unprivileged{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        shutil.copy(PROGRAM, folder)
        shutil.copy(tmp_path / "image", folder / "image")
        os.chmod(folder / "image", 0o644)
        image = shell("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                      "/usr/bin/python3", folder / PROGRAM.name,
                      "-f", form, folder / "image", cwd="/")  # fmt: skip
        assert image == stream(raw)
    finally:
        shutil.rmtree(folder)
