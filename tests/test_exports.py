"""QEMU's programs at work for ours: they fail, hang and die, and nothing of them outlives it."""

import errno
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest
import support.program
from conftest import needs
from support.disks import noise, write_disk
from support.images import as_raw, create, leftovers, nbd_server, replaced, shell, wrapped, write
from support.program import (
    PROGRAM,
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

pytestmark = pytest.mark.usefixtures("temporary")


SHARED = ["unshare", "-m", "--propagation", "shared"]


@pytest.fixture(params=["as they are", "shared"])
def mounts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where all mounts are shared, as systemd has them, root's daemon gets some of its own."""
    if request.param == "shared":
        needs(os.geteuid() == 0, "root, to have mounts shared")
        monkeypatch.setattr("support.program.PREFIX", SHARED)
    return str(request.param)


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


@pytest.mark.usefixtures("mounts")
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


@pytest.mark.usefixtures("mounts")
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
        "import _thread\n"
        "def refuse(*rest): raise RuntimeError('can\\'t start new thread')\n"
        "_thread.start_new_thread = refuse\n",
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


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("victim", ["program", "group", "daemon"])
def test_no_mount_is_left_by_a_sudden_death(dense_vmdk: Path, temporary: Path, victim: str) -> None:
    """While the export is opened, of which nothing but an empty file may stay."""
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


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("daemon", [SILENT_DAEMON, STOPPED_DAEMON], ids=["silent", "stopped"])
def test_a_daemon_that_hangs(dense_vmdk: Path, tmp_path: Path, daemon: str) -> None:
    """One is the real one, stopped when it has said hello."""
    env = replaced(tmp_path, "qemu-storage-daemon", f"#!{sys.executable}\n{daemon}")
    assert_refused(run_impatiently("-f", "vmdk", str(dense_vmdk), env=env), "does not answer")


def impatient(*arguments: str, seconds: int = 1) -> List[str]:
    """The command with less patience than the minute that the program grants QEMU."""
    script = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import qcow2_to_stdout as p; "
        f"p.QEMU_PATIENCE = {seconds}; p.main()"
    )
    return [*support.program.PREFIX, sys.executable, "-c", script, *arguments]


def run_impatiently(*arguments: str, **options: Any) -> Result:
    words = impatient(*arguments)
    done = subprocess.run(words, capture_output=True, timeout=TIMEOUT, check=False, **options)
    return Result(done.returncode, done.stdout, done.stderr.decode())


def test_stopped_for_longer_than_a_slow_qemu_img_may_take(dense_vmdk: Path, tmp_path: Path) -> None:
    """Ctrl-Z stops them both, and the clock goes on."""
    work = "for at in range(20): time.sleep(0.1)"
    script = f"#!{sys.executable}\nimport os, sys, time\n{work}\nos.execv('REAL', sys.argv)\n"
    program = subprocess.Popen(
        impatient("-f", "vmdk", str(dense_vmdk), seconds=5),
        env=replaced(tmp_path, "qemu-img", script),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    time.sleep(1)
    os.killpg(program.pid, signal.SIGSTOP)
    time.sleep(6)
    os.killpg(program.pid, signal.SIGCONT)
    image, stderr = program.communicate(timeout=TIMEOUT)
    assert (program.returncode, stderr) == (0, b"")
    assert image == stream("-f", "vmdk", dense_vmdk)


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen(1)
        name = f"driver=nbd,server.type=unix,server.path={tmp_path}/s"
        assert_refused(run_impatiently("--image-opts", name), "qemu-img does not answer")


@pytest.mark.usefixtures("mounts")
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


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A folder in which everybody may read, with the program in it."""
    needs(os.geteuid() == 0, "root, to become somebody else")
    folder = Path(tempfile.mkdtemp(prefix="unprivileged", dir="/tmp"))
    folder.chmod(0o755)
    shutil.copy(PROGRAM, folder)
    yield folder
    shutil.rmtree(folder)


SOMEBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3"]


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_without_root(theirs: Path, tmp_path: Path, form: str) -> None:
    if form == "vmdk":  # direct reading needs none of this
        needs(os.stat("/dev/fuse").st_mode & 0o006 == 0o006, "a /dev/fuse for everybody")
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", form, raw, theirs / "image")
    (theirs / "image").chmod(0o644)
    words = [*SOMEBODY, theirs / PROGRAM.name, "-f", form, theirs / "image"]
    assert shell(*words, cwd="/") == stream(raw)


def test_without_root_where_fuse_is_for_root_alone(theirs: Path) -> None:
    shell("qemu-img", "create", "-q", "-f", "vmdk", theirs / "image", "1M")
    (theirs / "image").chmod(0o644)
    private = 'mknod -m 600 "$0" c 10 229 && mount --bind "$0" /dev/fuse && exec "$@"'
    words: List[Any] = ["unshare", "-m", "sh", "-c", private, theirs / "fuse", *SOMEBODY]
    done = subprocess.run(
        [*words, theirs / PROGRAM.name, "-f", "vmdk", theirs / "image"],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    result = Result(done.returncode, b"", done.stderr)
    assert_refused(result, "Permission denied", "needs a /dev/fuse that its user may open")


def is_in_use(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        assert error.errno == errno.EBUSY
        return True
    return False


@pytest.mark.usefixtures("mounts")
def test_what_is_unmounted_meanwhile_is_free(
    dense_vmdk: Path, mounted: Tuple[str, Path], tmp_path: Path
) -> None:
    """As root the daemon may have mounts of its own: copies, which must follow the system's."""
    device, folder = mounted
    program = start("-f", "vmdk", dense_vmdk)
    program.stdout.read(100_000)
    for place in (["nsenter", "-m", "-t", str(program.pid)], []):  # perhaps one and the same
        subprocess.run([*place, "umount", str(folder)], check=bool(place))
    try:
        deadline = time.monotonic() + 20  # another test's name space may have a copy for a while
        while is_in_use(device) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_in_use(device)
    finally:
        subprocess.run(["mount", device, str(folder)], check=True)
        program.communicate(timeout=TIMEOUT)
    assert program.returncode == 0
