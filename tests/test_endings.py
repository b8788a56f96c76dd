"""Exit status 0 means a whole image; every other ending says why, and never by a traceback."""

import errno
import os
import resource
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest
from conftest import needs
from support.disks import Recipe, noise, write_disk
from support.fuse import FuseDisk
from support.program import (
    TIMEOUT,
    Result,
    altered,
    assert_failed,
    assert_refused,
    command,
    run,
    start,
    stream,
    wait_until_it_catches,
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return Recipe(8 << 20, [(0, "noise", 8 << 20)]).write(tmp_path / "disk.raw")


def finish(program: Any) -> Result:
    stdout, stderr = program.communicate(timeout=TIMEOUT)
    return Result(program.returncode, stdout or b"", stderr.decode())


@pytest.mark.parametrize("taken", [0, 1, 65_536, 200_000, 3 << 20])
def test_a_consumer_that_goes_away_ends_it_by_sigpipe(disk: Path, taken: int) -> None:
    program = start(disk)
    assert len(program.stdout.read(taken)) == taken
    program.stdout.close()
    assert program.wait(TIMEOUT) == -signal.SIGPIPE
    assert program.stderr.read() == b""
    program.stderr.close()


ENDING = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR2"]


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("phase", ["scan", "write"])
def test_a_signal_ends_it_by_that_signal(
    disk: Path, fuse_disk: Callable[..., FuseDisk], name: str, phase: str
) -> None:
    signum = signal.Signals[name]
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if phase == "scan":
        program = start(fuse_disk(disk, latency=0.5, direct=True).path)
        wait_until_it_catches(program, signal.SIGUSR1)  # the last that it catches
        time.sleep(0.1)
    else:
        program = start(disk)
        program.stdout.read(1)
    program.send_signal(signum)
    result = finish(program)
    assert (result.status, result.stderr) == (-signum, "")


@pytest.mark.guarantee(
    5, "the same as a container's first process", "exit status 128 and the signal's number"
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_first_process_of_a_container(disk: Path, name: str) -> None:
    """The kernel does nothing by default there; the shell's convention says how it ended."""
    needs(os.geteuid() == 0, "root, to make a name space")
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *map(str, command(disk))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as container:
        assert container.stdout
        assert container.stdout.read(1) == b"Q"
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.Signals[name])
        assert container.communicate(timeout=TIMEOUT)[1] == b""
    assert container.returncode == 128 + signal.Signals[name]


def test_an_ignored_signal_stays_ignored(disk: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does

    program = start(disk, preexec_fn=ignore)
    program.stdout.read(1)
    program.send_signal(signal.SIGHUP)
    assert finish(program).status == 0


def test_an_ignored_sigusr1_stays_ignored(disk: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    program = start(disk, preexec_fn=ignore)
    program.stdout.read(1)
    program.send_signal(signal.SIGUSR1)
    result = finish(program)
    assert (result.status, result.stderr) == (0, "")


def test_a_full_device(disk: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = finish(start(disk, stdout=full))
    assert_failed(result, "cannot write", "No space left on device")


@pytest.mark.guarantee(5, "a block device that fails when it is written back", "exit 1")
def test_a_device_that_fails_when_it_is_written_back(
    disk: Path, small_file_system: Path, loop_device: Callable[..., str]
) -> None:
    """As a thin volume that runs full, or a remote one that goes away."""
    with open(small_file_system / "thin", "wb") as thin:
        thin.truncate(64 << 20)
    with open(loop_device(small_file_system / "thin"), "r+b") as out:
        result = finish(start(disk, stdout=out))
    assert_failed(result, "cannot write", "Input/output error")


@pytest.mark.guarantee(5, "a file that takes nothing, or asks to try again for ever", "exit 1")
@pytest.mark.parametrize("answer", ["0", "again"])
def test_a_file_that_takes_nothing(disk: Path, tmp_path: Path, answer: str) -> None:
    code = (
        "import errno, os\n"
        "write = os.write\n"
        "def take_nothing(fd, data):\n"
        "    if fd != 1: return write(fd, data)\n"
        f"    if {answer == '0'}: return 0\n"
        "    raise BlockingIOError(errno.EAGAIN, 'again')\n"
        "os.write = take_nothing\n"
    )
    with open(tmp_path / "out", "wb") as out:
        result = finish(start(disk, stdout=out, env=altered(tmp_path, code)))
    assert_failed(result, "cannot write")


@pytest.mark.guarantee(5, "a file size limit", "exit 1, with the bytes written")
def test_a_file_size_limit(disk: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with open(tmp_path / "out", "wb") as out:
        result = finish(start(disk, stdout=out, preexec_fn=limit))
    assert_failed(result, "cannot write", "after 1048576 bytes", "File too large")


def test_standard_output_closed(disk: Path) -> None:
    script = 'exec "$@" >&-'
    program = [str(word) for word in command(disk)]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *program], stderr=subprocess.PIPE, text=True, check=False
    )
    assert_failed(Result(done.returncode, b"", done.stderr), "standard output is closed")


def test_a_read_error_in_the_scan(disk: Path, fuse_disk: Callable[..., FuseDisk]) -> None:
    result = run(fuse_disk(disk, error_at=5 << 20, direct=True).path)
    assert result.stdout == b""
    assert_failed(result, "cannot read", "Input/output error", "at offset")


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.EAGAIN, errno.ESTALE, errno.EPIPE], ids=errno.errorcode.get
)
def test_a_read_error_in_the_copy(
    disk: Path, fuse_disk: Callable[..., FuseDisk], error: int
) -> None:
    # Where data is dense, the scan looks at the first 4 KiB of each cluster only.
    bad = fuse_disk(disk, error_at=(5 << 20) + 10_000, error=errno.errorcode[error], direct=True)
    result = run(bad.path)
    assert result.stdout.startswith(b"QFI\xfb")
    assert_failed(result, "cannot read", os.strerror(error), "at offset")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"!")


CHANGES = {
    "shrinks": lambda path: os.truncate(path, 4 << 20),
    "grows": lambda path: os.truncate(path, 9 << 20),
    "written": overwrite,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_copied(disk: Path, change: str) -> None:
    program = start(disk)
    program.stdout.read(100_000)  # the scan is over, most of the data is not copied yet
    CHANGES[change](disk)
    result = finish(program)
    assert_failed(result, "disk.raw", "snapshot")
    assert len(result.stdout) < (9 << 20)


def test_a_block_device_that_shrinks(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    raw = Recipe(8 << 20, [(0, "noise", 8 << 20)]).write(tmp_path / "disk.raw")
    device = loop_device(raw)
    program = start(device)
    program.stdout.read(100_000)
    os.truncate(raw, 4 << 20)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    assert_failed(finish(program), device, "snapshot")


@pytest.mark.guarantee(
    5, "stderr that goes where the image goes", "nothing is said there; `--progress` is refused"
)
@pytest.mark.parametrize("option", [["-p"], []], ids=["progress", "SIGUSR1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_messages_do_not_get_into_the_image(
    disk: Path, tmp_path: Path, kind: str, option: List[str]
) -> None:
    """What nohup does with -p on a terminal, and 2>&1 anywhere."""
    image = run(disk).stdout
    if kind == "file":
        with open(tmp_path / "out", "wb") as out:
            program = start(disk, *option, stdout=out, stderr=subprocess.STDOUT)
    else:
        program = start(disk, *option, stderr=subprocess.STDOUT)
    if not option:
        wait_until_it_catches(program, signal.SIGUSR1)
        for _ in range(20):
            program.send_signal(signal.SIGUSR1)
            time.sleep(0.002)
    written = program.communicate(timeout=TIMEOUT)[0] or (tmp_path / "out").read_bytes()
    if option:
        assert_refused(Result(program.returncode, b"", written.decode()), "--progress")
    else:
        assert (program.returncode, written == image) == (0, True)


def test_a_full_stderr_changes_nothing_but_the_message(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(tmp_path / "none"), stderr=full, check=False)
    assert done.returncode == 1


def test_closed_stdin_and_stderr_are_not_taken_for_the_disk(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "disk.raw", 100_000, [(0, noise(5000))])
    program = [str(word) for word in command(raw)]
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- 2>&-', "bash", *program],
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == run(raw).stdout


@pytest.mark.parametrize("mode", ["r+b", "ab"])
def test_a_file_that_is_written_over_or_appended_to(disk: Path, tmp_path: Path, mode: str) -> None:
    """Such as systemd's StandardOutput=file:…, which empties nothing."""
    image = tmp_path / "image"
    for _ in range(2):
        with open(image, mode if image.exists() else "wb") as out:
            subprocess.run(command(disk), stdout=out, check=True)
    assert image.read_bytes() == stream(disk) * (2 if mode == "ab" else 1)


@pytest.mark.guarantee(5, "an output file that another run empties or writes to", "exit 1")
@pytest.mark.parametrize("how", ["a second run", "emptied", "appended to"])
@pytest.mark.parametrize("where", ["disk", "tmpfs"])
def test_a_file_into_which_somebody_else_writes(
    disk: Path, tmp_path: Path, how: str, where: str
) -> None:
    """Such as the next night's run, when this one takes too long: its shell empties the file."""
    if where == "disk":
        write_and_disturb(disk, tmp_path / "image", how)
        return
    needs(os.path.ismount("/dev/shm"), "a tmpfs")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        write_and_disturb(disk, Path(folder) / "image", how)


def write_and_disturb(disk: Path, image: Path, how: str) -> None:
    content = disk.read_bytes()
    mode = "ab" if how == "appended to" else "wb"
    with open(image, mode) as out:
        program = subprocess.Popen(
            command("-", "--size", str(len(content))),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.PIPE,
        )
    assert program.stdin is not None
    program.stdin.write(content[: len(content) // 2])
    program.stdin.flush()
    deadline = time.monotonic() + TIMEOUT
    while image.stat().st_size < len(content) // 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with open(image, mode) as other:
        if how == "a second run":
            second = subprocess.run(
                command(disk), stdout=other, stderr=subprocess.PIPE, check=False
            )
            refused = Result(second.returncode, b"", second.stderr.decode())
            assert_failed(refused, "another run")
        elif how == "appended to":
            other.write(b"!")
    stderr = program.communicate(content[len(content) // 2 :])[1].decode()
    assert_failed(Result(program.returncode, b"", stderr), "somebody else", "a name of its own")


@pytest.mark.guarantee(5, "stderr of another program in the output file", "exit 1")
def test_an_output_into_which_another_program_says_something(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk]
) -> None:
    """As in `{ qcow2_to_stdout.py DISK & …; } > image 2>&1`, while the disk is waited for."""
    raw = write_disk(tmp_path / "disk.raw", 16 << 20, [(0, noise(16 << 20))])
    slow = fuse_disk(raw, latency=0.02)
    with open(tmp_path / "image", "wb") as out:
        program = subprocess.Popen(command(slow.path, "-c", "2M"), stdout=out, stderr=out)
        while os.lseek(out.fileno(), 0, os.SEEK_CUR) < 10 << 20:
            assert program.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        os.write(out.fileno(), b"warning")
        assert program.poll() is None, "it is no longer at work"
        assert program.wait(TIMEOUT) == 1


@pytest.mark.guarantee(5, "a second run into the same device", "refused")
def test_a_device_into_which_a_second_run_writes(
    disk: Path, tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    device = loop_device(write_disk(tmp_path / "target", 16 << 20))
    content = disk.read_bytes()
    with open(device, "r+b") as out, open(device, "r+b") as other:
        program = subprocess.Popen(
            command("-", "--size", str(len(content))), stdin=subprocess.PIPE, stdout=out
        )
        assert program.stdin is not None
        program.stdin.write(content[: len(content) // 2])  # more than a pipe takes: it is at work
        program.stdin.flush()
        second = subprocess.run(command(disk), stdout=other, stderr=subprocess.PIPE, check=False)
        refused = Result(second.returncode, b"", second.stderr.decode())
        assert_refused(refused, "another run")
        program.communicate(content[len(content) // 2 :])
        assert program.returncode == 0
        subprocess.run(command(disk), stdout=other, check=True)  # one after the other
    expected = stream(disk)
    assert (tmp_path / "target").read_bytes()[: len(expected)] == expected


@pytest.mark.guarantee(
    10, "a run that has ended, its descriptor still open", "its claim on the output has ended"
)
def test_a_file_that_is_read_or_written_one_after_the_other(disk: Path, tmp_path: Path) -> None:
    """The claim ends with the run, even where its descriptor lives on, and is no other's lock."""
    with open(tmp_path / "image", "wb") as kept:
        for _ in range(2):
            with open(tmp_path / "image", "wb") as out:
                subprocess.run(command(disk), stdout=out, check=True)
            subprocess.run(command(disk), stdout=kept, check=True)
            kept.seek(0)
        shell = ["flock", "image", "bash", "-c", '"$@" > image', "bash"]
        words = [*shell, *(str(word) for word in command(disk))]
        subprocess.run(words, cwd=tmp_path, check=True)
    assert (tmp_path / "image").read_bytes() == stream(disk)
    with open(tmp_path / "images", "wb") as out:
        out.write(b"before")
        out.flush()
        for _ in range(2):
            subprocess.run(command(disk), stdout=out, check=True)
    assert (tmp_path / "images").read_bytes() == b"before" + 2 * stream(disk)
