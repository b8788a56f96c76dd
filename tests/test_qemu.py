"""QEMU's programs at work for ours: any format, and nothing of them outlives the program.

They fail, hang, die and talk; the program ends at any moment, by any signal.
"""

import functools
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest
from conftest import needs
from support.disks import noise, write_disk
from support.images import (
    as_raw,
    create,
    leftovers,
    make_encrypted,
    nbd_server,
    replaced,
    shell,
    write,
)
from support.program import (
    PROGRAM,
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
from support.pythons import pythons, version

MIB = 1 << 20
DISK_SIZE = 24 * MIB

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    pieces = [(0, noise(70_000)), (3 * MIB, noise(9 * MIB, 1)), (20 * MIB, b"text" * 50_000)]
    return write_disk(tmp_path / "disk.raw", DISK_SIZE, pieces)


@pytest.fixture
def packed(raw: Path) -> Path:
    """An image that qemu-img describes and maps, and qemu-nbd reads."""
    return convert(raw, "vmdk", "subformat=streamOptimized")


def convert(raw: Path, form: str, options: str = "") -> Path:
    image = raw.with_name(f"a.{form}")
    words = ["-o", options] if options else []
    shell("qemu-img", "convert", "-f", "raw", "-O", form, *words, raw, image)
    return image


def qemu_of(program: Any) -> List[int]:
    """The process numbers of QEMU's programs that a program has started."""
    words = ["pgrep", "-P", str(program.pid), "^qemu-"]
    found = subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout.split()
    return [int(word) for word in found]


def assert_nothing_left(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while leftovers(folder):
        assert time.monotonic() < deadline, leftovers(folder)
        time.sleep(0.02)


# Every format


FORMATS = [
    ("vmdk", ""),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vmdk", "subformat=streamOptimized"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "block_size=1M"),
    ("qed", ""),
    ("parallels", ""),
    ("qcow", ""),
]


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A folder where everybody may read; the program is in it, and a folder to write to."""
    needs(os.geteuid() == 0, "root, to become somebody else")
    folder = Path(tempfile.mkdtemp(prefix="unprivileged", dir="/tmp"))
    folder.chmod(0o755)
    shutil.copy(PROGRAM, folder)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)
    yield folder
    assert_nothing_left(folder / "tmp")
    shutil.rmtree(folder)


def as_nobody(folder: Path, *words: Any) -> Result:
    """A run without root, capabilities, a way to get any, and devices but /dev/null."""
    bare = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"'
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    words = ("/usr/bin/python3", folder / PROGRAM.name, *words)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", bare, "sh", *nobody, "--no-new-privs", *map(str, words)],
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=TIMEOUT,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode())


@pytest.mark.parametrize("form, options", FORMATS)
def test_a_format(theirs: Path, form: str, options: str) -> None:
    """Exact; also by way of qemu-nbd, and for somebody who may do nothing."""
    pieces = [(0, noise(70_000)), (3 * MIB, noise(2 * MIB, 1)), (20 * MIB, b"text" * 50_000)]
    raw = write_disk(theirs / "disk.raw", DISK_SIZE, pieces)
    image = convert(raw, form, options)
    for path in theirs.glob("a*"):
        path.chmod(0o644)
    expected = stream(raw)
    assert stream("-f", form, image) == expected
    node = f"driver={form},file.driver=file,file.filename={image}"
    assert stream("--image-opts", node) == expected
    assert as_nobody(theirs, "-f", form, image) == (0, expected, "")


@pytest.mark.parametrize("form", ["luks", "qcow2"])
def test_an_encrypted_disk(theirs: Path, form: str) -> None:
    raw = write_disk(theirs / "disk.raw", 4 * MIB, [(MIB, noise(MIB))])
    (theirs / "key").write_text("secret")
    secret = ["--object", f"secret,id=s,file={theirs / 'key'}"]
    prefix = "" if form == "luks" else "encrypt."
    options = f"{prefix}key-secret=s,{prefix}iter-time=100"
    options += "" if form == "luks" else ",encrypt.format=luks"
    image = theirs / "image"
    convert_words = ["qemu-img", "convert", *secret, "-f", "raw", "-O", form, "-o", options]
    make_encrypted(*convert_words, raw, image)
    image.chmod(0o644)
    node = f"driver={form},{prefix}key-secret=s,file.filename={image}"
    expected = stream(raw)
    assert stream("--image-opts", node, *secret) == expected
    assert as_nobody(theirs, "--image-opts", node, *secret) == (0, expected, "")
    assert_refused(run("--image-opts", node), "secret")
    (theirs / "key").write_text("guess")
    assert_refused(run("--image-opts", node, *secret), "Invalid password")


@pytest.mark.parametrize("python", pythons(), ids=version)
def test_under_every_python(packed: Path, raw: Path, python: str) -> None:
    assert stream("-f", "vmdk", packed, python=python) == stream(raw)
    program = start("-f", "vmdk", packed, python=python)
    program.stdout.read(1)
    os.utime(packed)
    stderr = program.communicate(timeout=TIMEOUT)[1]
    assert (program.returncode, b"a.vmdk' changed while" in stderr) == (1, True), stderr


# Nothing is left


ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]


@pytest.mark.guarantee(10, "any ending while QEMU reads", "no process, mount or folder stays")
@pytest.mark.parametrize("signum", [*ENDINGS, signal.SIGPIPE])
def test_no_ending_leaves_anything(packed: Path, signum: int, temporary: Path) -> None:
    program = start("-f", "vmdk", packed)
    program.stdout.read(100_000)
    assert len(qemu_of(program)) == 1
    assert not list(temporary.iterdir()), "the socket's folder is gone while it runs"
    if signum != signal.SIGPIPE:
        program.send_signal(signum)
    program.stdout.close()
    assert program.wait(TIMEOUT) == -signum
    assert program.stderr.read() == b""
    program.stderr.close()
    assert_nothing_left(temporary)


def test_an_error_leaves_nothing(packed: Path, tmp_path: Path, temporary: Path) -> None:
    for words in (["--diff", str(tmp_path / "none")], ["--size", "1K"], ["-b", "a", "-F", "x"]):
        assert run("-f", "vmdk", packed, *words).status in (1, 2)
        assert_nothing_left(temporary)
    with open("/dev/full", "wb") as full:
        whole = command("-f", "vmdk", packed)
        done = subprocess.run(whole, stdout=full, stderr=subprocess.PIPE, check=False)
    assert_failed(Result(done.returncode, b"", done.stderr.decode()), "No space left")
    assert_nothing_left(temporary)


@pytest.mark.guarantee(10, "SIGKILL at any moment", "the same")
@pytest.mark.parametrize("share", range(4))
def test_sudden_deaths(packed: Path, temporary: Path, share: int) -> None:
    """Fifteen of sixty, at moments from the start of Python to the midst of the copy."""
    dice = random.Random(share)
    began = time.monotonic()
    program = start("-f", "vmdk", packed)
    program.stdout.read(1)
    whole = (time.monotonic() - began) * 1.2
    program.kill()
    program.communicate(timeout=TIMEOUT)
    kept = 0
    for number in range(15):
        program = start("-f", "vmdk", packed, start_new_session=True)
        time.sleep(dice.uniform(0, whole))
        if number % 3:
            program.kill()
        else:  # as a terminal, a container or a service is killed
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate(timeout=TIMEOUT)
        for folder in temporary.iterdir():  # hit between the two calls that make it and remove it
            shutil.rmtree(folder)
            kept += 1
        assert_nothing_left(temporary)
    assert kept <= 1


@pytest.mark.guarantee(10, "two signals at once", "it ends by one of them, and nothing stays")
@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGHUP), (signal.SIGINT,) * 2])
def test_two_signals_are_no_more_than_one(
    packed: Path, signals: Tuple[int, int], temporary: Path
) -> None:
    for pause in (0, 0.02, 0.05, 0.1, 0.2):
        program = start("-f", "vmdk", packed)
        wait_until_it_catches(program, signal.SIGUSR1)
        time.sleep(pause)
        for signum in signals:
            program.send_signal(signum)
        stderr = program.communicate(timeout=TIMEOUT)[1]
        assert program.returncode in (-signals[0], -signals[1]), stderr
        assert not stderr
        assert_nothing_left(temporary)


@pytest.mark.guarantee(5, "a qemu-nbd that is killed", "exit 1")
def test_a_qemu_nbd_that_dies(tmp_path: Path, temporary: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 40 * MIB, [(0, noise(40 * MIB))])  # not all is ahead
    packed = convert(raw, "vmdk", "subformat=streamOptimized")
    program = start("-f", "vmdk", packed)
    program.stdout.read(100_000)
    (server,) = qemu_of(program)
    os.kill(server, signal.SIGKILL)
    stderr = program.communicate(timeout=TIMEOUT)[1].decode()
    assert_failed(Result(program.returncode, b"", stderr), "a.vmdk", "offset")
    assert_nothing_left(temporary)


# What is missing, wrong, slow or silent


def test_programs_that_are_not_installed(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    env = {**os.environ, "PATH": str(tmp_path / "bin")}
    assert_refused(run("-f", "vmdk", packed, env=env), "qemu-img", "qemu-utils", "Fedora")
    (tmp_path / "bin" / "qemu-img").symlink_to(shutil.which("qemu-img") or "")
    assert_refused(run("-f", "vmdk", packed, env=env), "qemu-nbd", "qemu-utils")
    (tmp_path / "bin" / "qemu-nbd").write_text("no program")
    assert_refused(run("-f", "vmdk", packed, env=env), "qemu-nbd", "Permission denied")


@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_a_program_that_fails(packed: Path, tmp_path: Path, program: str, temporary: Path) -> None:
    said = f"echo '{program}: first line' >&2; echo second >&2; seq 9999 >&2; exit 1"
    env = replaced(tmp_path, program, f"#!/bin/sh\n{said}\n")
    result = run("-f", "vmdk", packed, env=env)
    assert_refused(result, f"cannot open '{packed}'", "first line", "second")
    assert len(result.stderr) < 3000
    assert_nothing_left(temporary)


@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_a_program_that_is_killed(packed: Path, tmp_path: Path, program: str) -> None:
    """Also where the parent ignores SIGCHLD, so that the kernel forgets how children end."""
    env = replaced(tmp_path, program, "#!/bin/sh\nkill -9 $$\n")
    for handler in (signal.SIG_DFL, signal.SIG_IGN):
        ignore = functools.partial(signal.signal, signal.SIGCHLD, handler)
        result = run("-f", "vmdk", packed, env=env, preexec_fn=ignore)
        assert_refused(result, "cannot open", "a.vmdk")


@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_a_program_that_is_slow_and_talks(
    packed: Path, raw: Path, tmp_path: Path, program: str
) -> None:
    talk = "head -c 200000 /dev/zero | tr '\\0' x >&2; sleep 1"
    env = replaced(tmp_path, program, f'#!/bin/sh\n{talk}\nexec REAL "$@"\n')
    assert stream("-f", "vmdk", packed, env=env) == stream(raw)


ENTRY = '{"start": %d, "length": 65536, "depth": 0, "zero": false, "data": true, "offset": 0}'
SOME = ENTRY % 0
INFOS = ["", "nonsense", '[{"filename": ']
MAPS = ["", "[]", f"[{SOME}", f"[{SOME},", f"[{SOME}]", f"[{ENTRY % 65536}]", f"[{SOME[:9]}"]


@pytest.mark.guarantee(
    5, "a qemu-img that prints nonsense, or half", "exit 1 before the first byte"
)
@pytest.mark.parametrize("what, texts", [("info", INFOS), ("map", MAPS)])
def test_a_qemu_img_that_prints_nonsense(tmp_path: Path, what: str, texts: List[str]) -> None:
    image = write(create(tmp_path / "a.vdi", "8M", form="vdi"), "write -P 1 0 8M", form="vdi")
    answer = f"[ $1 = {what} ] && exec cat {shlex.quote(str(tmp_path / 'text'))}"
    env = replaced(tmp_path, "qemu-img", f'#!/bin/sh\n{answer}\nexec REAL "$@"\n')
    for text in texts:
        (tmp_path / "text").write_text(text)
        assert_refused(run("-f", "vdi", image, env=env), "cannot open", "a.vdi", "qemu-img")


def impatient(*arguments: Any) -> List[str]:
    """The command with a second of patience where the program has a minute."""
    script = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import qcow2_to_stdout as p; "
        "p.NBD_TIMEOUT = 1; p.main()"
    )
    return [sys.executable, "-c", script, *map(str, arguments)]


# Two of them are there and silent; one is the real one, stopped when the program has its greeting.
SILENT = "#!/bin/sh\nexec sleep 60\n"
STOPPED = "#!/bin/sh\nkill -STOP $$\n"


@pytest.mark.guarantee(5, "a qemu-img or qemu-nbd that hangs", "exit 1 after a minute")
@pytest.mark.parametrize("script", [SILENT, STOPPED], ids=["silent", "stopped"])
@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_a_program_that_hangs(
    packed: Path, tmp_path: Path, program: str, script: str, temporary: Path
) -> None:
    env = replaced(tmp_path, program, script)
    words = impatient("-f", "vmdk", packed)
    done = subprocess.run(words, env=env, capture_output=True, timeout=TIMEOUT, check=False)
    result = Result(done.returncode, done.stdout, done.stderr.decode())
    assert_refused(result, "a.vmdk", "not answer")
    assert_nothing_left(temporary)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("program", ["qemu-img", "qemu-nbd"])
def test_a_signal_while_a_program_hangs(
    packed: Path, tmp_path: Path, program: str, signum: int, temporary: Path
) -> None:
    """It is not for the minute to pass that a signal waits, and the silent one goes as well."""
    marker = tmp_path / "pid"
    said = f"echo $$ > {marker}.new; mv {marker}.new {marker}"
    env = replaced(tmp_path, program, f"#!/bin/sh\n{said}\nexec sleep 60\n")
    ours = start("-f", "vmdk", packed, env=env)
    while not marker.exists():
        time.sleep(0.01)
    ours.send_signal(signum)
    assert ours.wait(30) == -signum
    assert ours.communicate() == (b"", b"")
    deadline = time.monotonic() + 20
    while Path(f"/proc/{marker.read_text().strip()}").exists():
        assert time.monotonic() < deadline, "the silent program is still there"
        time.sleep(0.02)
    assert_nothing_left(temporary)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_qemu_nbd_is_stopped(packed: Path, signum: int, temporary: Path) -> None:
    program = start("-f", "vmdk", packed)
    program.stdout.read(100_000)
    (server,) = qemu_of(program)
    os.kill(server, signal.SIGSTOP)
    time.sleep(0.2)
    program.send_signal(signum)
    assert program.wait(TIMEOUT) == -signum
    assert program.communicate()[1] == b""
    assert_nothing_left(temporary)


@pytest.mark.parametrize("phase", ["scan", "copy"])
def test_a_signal_while_a_remote_server_does_not_answer(
    tmp_path: Path, phase: str, temporary: Path
) -> None:
    raw = write_disk(tmp_path / "raw", 64 * MIB, [(0, noise(64 * MIB))])
    delay = "5ms" if phase == "scan" else "0"
    words = ["--filter=delay", "file", raw, f"rdelay={delay}"]
    with nbd_server(tmp_path, *words) as (server, options):
        program = start("--image-opts", options)
        if phase == "copy":
            program.stdout.read(4 * MIB)
        else:
            while not qemu_of(program):
                time.sleep(0.01)
            time.sleep(0.5)
        server.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        program.send_signal(signal.SIGTERM)
        assert program.communicate(timeout=TIMEOUT)[1] == b""
        assert program.returncode == -signal.SIGTERM
        assert_nothing_left(temporary)


# Where the program is called


def test_many_inherited_descriptors(packed: Path, raw: Path) -> None:
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        image = stream("-f", "vmdk", packed, pass_fds=descriptors)
    finally:
        for fd in descriptors:
            os.close(fd)
    assert image == stream(raw)


def test_variables_of_a_socket_unit(packed: Path, raw: Path) -> None:
    """They are those of whom systemd has started, and no child's."""
    env = {**os.environ, "LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b"}
    assert stream("-f", "vmdk", packed, env=env) == stream(raw)


@pytest.mark.parametrize("kind", ["missing", "no folder", "full", "a long name", "a link"])
def test_a_temporary_folder(packed: Path, raw: Path, tmp_path: Path, kind: str) -> None:
    """Where it is of no use, another is found."""
    folder = tmp_path / "folder"
    is_full = kind == "full"
    if kind == "no folder":
        folder.write_text("")
    elif is_full:
        needs(os.geteuid() == 0, "root, to mount a full file system")
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "none", str(folder)]
        subprocess.run(mount, check=True)
    elif kind == "a long name":
        folder = tmp_path / ("x" * 120)
        folder.mkdir()
    elif kind == "a link":
        (tmp_path / "real").mkdir()
        folder.symlink_to("real")
    try:
        for name in (str(folder), folder.name):
            env = {**os.environ, "TMPDIR": name}
            assert stream("-f", "vmdk", packed, env=env, cwd=tmp_path) == stream(raw)
        assert not folder.is_dir() or not list(folder.iterdir())
    finally:
        if is_full:
            subprocess.run(["umount", str(folder)], check=True)


def test_no_folder_that_can_be_written_to(packed: Path) -> None:
    needs(os.geteuid() == 0, "root, to mount file systems")
    mounts = [f"mount -t tmpfs -o ro none {name}" for name in ("/dev/shm", "/run")]
    mounts += ["mount --bind /tmp /tmp", "mount -o remount,ro,bind /tmp"]
    words = ["unshare", "-m", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
    env = {**os.environ, "TMPDIR": "/tmp"}
    done = subprocess.run(
        [*words, *map(str, command("-f", "vmdk", packed))],
        env=env,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    result = Result(done.returncode, done.stdout, done.stderr.decode())
    assert_refused(result, "TMPDIR", "Read-only file system")


@pytest.mark.parametrize("is_base", [False, True])
def test_a_foreign_image_in_a_chain(packed: Path, raw: Path, tmp_path: Path, is_base: bool) -> None:
    top = create(tmp_path / "top.qcow2", "24M", "-b", str(packed), "-F", "vmdk")
    write(top, "write -P 7 1M 64k")
    if is_base:
        image = stream(raw, "--diff", top, "--diff-format", "qcow2")
        assert image == stream(raw, "--diff", as_raw(top))
        return
    assert stream("-f", "qcow2", top) == stream(as_raw(top))
    program = start("-f", "qcow2", top)
    program.stdout.read(1)
    os.utime(packed)
    stderr = program.communicate(timeout=TIMEOUT)[1]
    assert (program.returncode, b"a.vmdk' changed while" in stderr) == (1, True), stderr
