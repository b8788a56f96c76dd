"""What administrators met in the field: honest runs succeed, and what can't be done is explained.

None of these may be refused, waited for without end, or explained by something untrue.
"""

import contextlib
import itertools
import mmap
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from conftest import needs
from support.disks import noise, padded, write_disk
from support.fuse import FuseDisk
from support.images import as_raw, create, overlay, shell, write
from support.importer import read_image
from support.program import (
    PROGRAM,
    TIMEOUT,
    Result,
    assert_failed,
    assert_refused,
    assert_warned,
    command,
    run,
    start,
    stream,
    wait_until_it_catches,
)

MIB = 1 << 20
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # Linux's


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return write_disk(tmp_path / "disk.raw", 6 * MIB, [(0, noise(3 * MIB)), (5 * MIB, b"end")])


@pytest.fixture
def ext4(tmp_path: Path, loop_device: Callable[..., str]) -> Iterator[Path]:
    """A folder on ext4, which allocates what is written only when it writes it back."""
    device = loop_device(write_disk(tmp_path / "ext4", 256 * MIB))
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    folder = tmp_path / "on-ext4"
    folder.mkdir()
    subprocess.run(["mount", device, str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def finish(program: Any) -> Result:
    stdout, stderr = program.communicate(timeout=TIMEOUT)
    return Result(program.returncode, stdout or b"", (stderr or b"").decode())


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"it never happened: {what}"
        time.sleep(0.005)


def overwrite(path: Path) -> None:
    """In place, as a guest does."""
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))


# Sources


@pytest.mark.parametrize("delay", [0.02, 0.04, 0.06, 0.09, None])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_source_that_the_kernel_is_writing_back_is_no_changed_one(
    ext4: Path, kind: str, delay: Any
) -> None:
    """Its blocks are counted when they are allocated; nothing of the disk changes."""
    write_disk(ext4 / "base.raw", 8 * MIB, [(0, noise(2 * MIB)), (7 * MIB, b"end")])
    source, options = ext4 / "base.raw", ["-f", "raw"]
    if kind == "qcow2":
        source = overlay(ext4 / "overlay.qcow2", source, "raw")
        write(source, "write -P 7 3M 1M", "write -P 8 5M 64k")
        options = ["-f", "qcow2"]
    expected = as_raw(source, kind).read_bytes()
    os.sync()
    with open(source, "r+b") as file:
        file.seek(-(-source.stat().st_size // 4096) * 4096 + MIB)
        if kind == "raw":
            file.seek(4 * MIB)
        for _ in range(200):  # one block here, and none beside it
            file.write(b"\0" * 4096)
            file.seek(8192, os.SEEK_CUR)
    if kind == "raw":
        expected = source.read_bytes()
    before = source.stat().st_blocks
    program = start(*options, source, bufsize=0)
    if delay is None:
        head = program.stdout.read(1)
    else:
        head = b""
        time.sleep(delay)
    subprocess.run(["sync", "-f", str(source)], check=True)
    result = finish(program)
    assert (result.status, result.stderr) == (0, "")
    assert delay is not None or source.stat().st_blocks != before, "it was written back before"
    (ext4 / "image.qcow2").write_bytes(head + result.stdout)
    assert as_raw(ext4 / "image.qcow2").read_bytes() == expected


@pytest.mark.guarantee(
    6, "a source that changes once all of it is copied", "exit 0, the old content"
)
def test_a_source_may_change_once_its_last_byte_is_copied(tmp_path: Path) -> None:
    """However long the reader takes: the last megabyte is in memory before the last look."""
    raw = write_disk(tmp_path / "disk.raw", 900_000, [(0, noise(900_000))])
    expected = stream(raw)
    program = start(raw, bufsize=0)
    image = b""
    while len(image) < 400_000:
        image += program.stdout.read(10_000)
        time.sleep(0.1)
    assert program.poll() is None
    overwrite(raw)
    time.sleep(3)  # until it has looked again
    image += b"".join(iter(lambda: program.stdout.read(1 << 16), b""))
    result = finish(program)
    assert (result.status, result.stderr) == (0, "")
    assert image == expected


def test_a_stream_that_has_given_all_may_stay_open(tmp_path: Path) -> None:
    """As from (cat disk.raw; sleep 1000)."""
    raw = write_disk(tmp_path / "disk.raw", 2 * MIB, [(0, noise(2 * MIB))])
    reader, writer = os.pipe()
    program = start("-", "--size", "2M", stdin=reader)
    os.close(reader)
    feeder = threading.Thread(target=write_all, args=(writer, raw.read_bytes()))
    feeder.start()
    result = finish(program)  # while the pipe is open
    feeder.join()
    os.close(writer)
    assert_warned(result, "standard input", "still open", str(2 * MIB))
    assert result.stdout == stream("-", "--size", "2M", stdin=raw.read_bytes())


def test_a_stream_that_goes_on_is_refused(tmp_path: Path) -> None:
    """At once, or after a pause that is shorter than the wait for its end."""
    for pause in (0, 0.5):
        reader, writer = os.pipe()
        program = start("-", "--size", "2M", stdin=reader)
        os.close(reader)
        feeder = threading.Thread(target=write_all, args=(writer, bytes(2 * MIB), pause, b"!"))
        feeder.start()
        result = finish(program)
        feeder.join()
        os.close(writer)
        assert_failed(result, "goes on after", str(2 * MIB))


def write_all(fd: int, data: bytes, pause: float = 0, more: bytes = b"") -> None:
    view = memoryview(data)
    with contextlib.suppress(BrokenPipeError):
        while view:
            view = view[os.write(fd, view) :]
        time.sleep(pause)
        if more:
            os.write(fd, more)


@pytest.mark.guarantee(6, "a change while a reader has stalled", "exit 1 within seconds")
@pytest.mark.parametrize("kind", ["raw", "device", "qcow2"])
def test_a_source_that_changes_ends_a_run_whose_reader_has_stalled(
    tmp_path: Path, loop_device: Callable[..., str], kind: str
) -> None:
    """Nobody waits for hours to learn that they were in vain: it ends in the middle of a write."""
    raw = write_disk(tmp_path / "disk.raw", 32 * MIB, [(0, noise(32 * MIB))])
    source, options = raw, ["-f", "raw"]
    if kind == "device":
        source = Path(loop_device(raw))
    elif kind == "qcow2":
        shell("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "disk.qcow2")
        source, options = tmp_path / "disk.qcow2", ["-f", "qcow2"]
    program = start(*options, source, bufsize=0)
    assert program.stdout.read(4) == b"QFI\xfb"
    with open(source, "r+b", buffering=0) as file:
        file.seek(20 * MIB)
        file.write(noise(65536, 5))
        if kind == "device":
            os.fsync(file.fileno())
    assert program.wait(TIMEOUT) == 1  # although its image is not read any further
    stderr = program.stderr.read().decode()
    program.stdout.close()
    program.stderr.close()
    assert_failed(Result(1, b"", stderr), source.name, "changed while it was read", "snapshot")


@pytest.mark.parametrize("kind", ["raw", "stream"])
def test_a_source_that_changes_ends_the_run_long_before_its_end(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], kind: str
) -> None:
    """Also while it is the source that takes its time."""
    raw = write_disk(tmp_path / "disk.raw", 64 * MIB, [(0, noise(64 * MIB))])
    if kind == "raw":
        slow = fuse_disk(raw, latency=0.05, count=True)
        program = start("-m", "1", slow.path)
        wait_until(lambda: len(slow.reads()) > 2, "it reads")
        with open(raw, "r+b") as file:
            file.write(b"new")
        assert_failed(finish(program), "changed while it was read")
        assert sum(length for _, length in slow.reads()) < 48 * MIB
        return
    with open(raw, "rb") as opened:
        program = start("-", "--size", "64M", stdin=opened, bufsize=0)
        assert program.stdout.read(1) == b"Q"
        with open(raw, "r+b") as file:
            file.write(b"new")
        assert program.wait(TIMEOUT) == 1
        program.stdout.close()
        assert b"changed while it was read" in program.stderr.read()
        program.stderr.close()


def pages_in_memory(device: str) -> int:
    """How many pages of a block device the kernel keeps."""
    with open(device, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        found = 0
        for offset in range(0, size, mmap.PAGESIZE):
            with contextlib.suppress(BlockingIOError):
                found += bool(os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT))
    return found


def sectors_read(device: str) -> int:
    return int(Path(f"/sys/class/block/{Path(device).name}/stat").read_text().split()[2])


@pytest.mark.guarantee(7, "a device that a VM has open", "its cache stays")
def test_a_device_that_a_vm_has_open_keeps_its_cache_and_is_read_from_it(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    raw = write_disk(tmp_path / "disk.raw", 16 * MIB, [(0, noise(16 * MIB))])
    device = loop_device(raw)
    with open(device, "rb") as vm:
        vm.read()
        kept, before = pages_in_memory(device), sectors_read(device)
        assert kept == 16 * MIB // mmap.PAGESIZE
        assert stream(device) == stream(raw)
        assert pages_in_memory(device) == kept
        assert sectors_read(device) == before


@pytest.mark.parametrize("readers", [[], ["-m", "16"]], ids=["default", "many"])
@pytest.mark.parametrize("content", ["dense", "mixed"])
def test_a_mount_of_one_stream_is_read_about_as_one_reader_reads_it(
    tmp_path: Path, fuse_disk: Callable[..., FuseDisk], readers: List[str], content: str
) -> None:
    """As rclone's: to go elsewhere opens a new stream, which takes far longer than a read."""
    pieces = [(0, noise(24 * MIB))]
    if content == "mixed":
        pieces = [(at * MIB, noise(MIB // 2, at)) for at in range(0, 24, 2)]
    raw = write_disk(tmp_path / "disk.raw", 24 * MIB, pieces)
    seeks = []
    for options in (["-m", "1"], readers):
        mount = fuse_disk(raw, direct=True, one_stream=True, count=True)
        assert stream(*options, mount.path) == stream(raw)
        seeks.append(mount.seeks())
        mount.close()
    alone, together = seeks
    assert together <= 2 * alone + 4


def test_two_disks_that_are_the_same_make_an_empty_overlay(disk: Path, tmp_path: Path) -> None:
    """Nothing differs, and that is a true answer."""
    (tmp_path / "link").symlink_to(disk)
    for base in (disk, tmp_path / "link"):
        image = stream(disk, "--diff", base, "-b", "monday.qcow2", "-F", "qcow2", cwd=tmp_path)
        found = read_image_of(image)
        assert (found.data, found.zeros, found.size) == ({}, set(), 6 * MIB)


def read_image_of(image: bytes) -> Any:
    import io

    return read_image(io.BytesIO(image))


# Outputs


def test_holes_may_be_dug_into_the_image_while_it_is_written(ext4: Path) -> None:
    """By fallocate -d, or a file system that does so by itself."""
    content = noise(MIB) + bytes(6 * MIB) + noise(MIB, 2)
    image = ext4 / "image.qcow2"
    with open(image, "wb") as out:
        program = start("-", "--size", "8M", stdin=subprocess.PIPE, stdout=out)
    program.stdin.write(content[: 6 * MIB])
    program.stdin.flush()
    wait_until(lambda: image.stat().st_size > 5 * MIB, "the image grows")
    subprocess.run(["sync", "-f", str(ext4)], check=True)
    before = image.stat().st_blocks
    subprocess.run(["fallocate", "-d", str(image)], check=True)
    assert image.stat().st_blocks < before, "there was nothing to dig"
    stderr = program.communicate(content[6 * MIB :])[1]
    assert (program.returncode, stderr) == (0, b"")
    assert image.read_bytes() == stream("-", "--size", "8M", stdin=content)


def test_a_shell_may_put_an_old_image_in_place_and_become_the_program(
    disk: Path, tmp_path: Path
) -> None:
    image = stream(disk)
    (tmp_path / "old.qcow2").write_bytes(image[: len(image) // 2] + b"old")
    script = 'sleep 0.1; cp old.qcow2 o.qcow2; sleep 0.1; exec "$@" 1<> o.qcow2'
    words = ["bash", "-c", script, "bash", *map(str, command(disk))]
    done = subprocess.run(words, cwd=tmp_path, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "o.qcow2").read_bytes() == image


def test_a_device_may_be_held_exclusively_by_the_caller(
    disk: Path, tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    device = loop_device(write_disk(tmp_path / "target", 16 * MIB))
    held = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        done = subprocess.run(command(disk), stdout=held, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(held)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = stream(disk)
    assert (tmp_path / "target").read_bytes()[: len(expected)] == expected


@pytest.mark.parametrize("options", [[], ["--measure"]], ids=["image", "measure"])
def test_a_fifo_may_be_open_both_ways(disk: Path, tmp_path: Path, options: List[str]) -> None:
    """By exec 3<>fifo, as scripts do that don't want to wait for the other end."""
    expected = stream(disk, *options)
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    program = start(disk, *options, stdout=fifo)
    taken = b""
    while len(taken) < len(expected):
        taken += os.read(fifo, len(expected) - len(taken))
    assert (program.wait(TIMEOUT), program.stderr.read()) == (0, b"")
    program.stderr.close()
    os.close(fifo)
    assert taken == expected


@pytest.mark.parametrize("state", ["begun", "placeholder"])
@pytest.mark.parametrize("what", ["--diff", "--layout"])
def test_an_overlay_may_be_made_while_its_backing_file_is_still_written(
    disk: Path, tmp_path: Path, state: str, what: str
) -> None:
    """The full image and the first overlay of a night, at once: a warning, for one may fail."""
    (tmp_path / "layout.json").write_text("[]")
    (tmp_path / "full.qcow2").touch()
    options = [what, str(disk if what == "--diff" else tmp_path / "layout.json")]
    options += ["-b", "full.qcow2", "-F", "qcow2"]
    content = disk.read_bytes()
    full = None
    if state == "begun":
        with open(tmp_path / "full.qcow2", "wb") as out:
            full = start("-", "--size", "6M", stdin=subprocess.PIPE, stdout=out)
        full.stdin.write(content[: 3 * MIB])
        full.stdin.flush()
        wait_until(lambda: (tmp_path / "full.qcow2").stat().st_size > MIB, "the image grows")
    with open(tmp_path / "overlay.qcow2", "wb") as out:
        program = start(disk, *options, stdout=out, cwd=tmp_path)
        result = finish(program)
    if full is not None:
        full.communicate(content[3 * MIB :])
        assert full.returncode == 0
        assert as_raw(tmp_path / "overlay.qcow2").read_bytes() == content
    assert_warned(result, "full.qcow2", "backing file")


def test_from_one_part_of_a_file_to_another(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    """Two loop devices on one file, which have no byte in common."""
    whole = write_disk(tmp_path / "whole", 32 * MIB, [(0, noise(8 * MIB))])
    first = loop_device(whole, "--sizelimit", str(8 * MIB))
    second = loop_device(whole, "--offset", str(16 * MIB))
    with open(second, "r+b") as out:
        done = subprocess.run(command(first), stdout=out, stderr=subprocess.PIPE, check=False)
        os.fsync(out.fileno())
    assert (done.returncode, done.stderr) == (0, b"")
    expected = stream(first)
    with open(whole, "rb") as file:
        file.seek(16 * MIB)
        assert file.read(len(expected)) == expected
    third = loop_device(whole, "--offset", str(4 * MIB))
    before = whole.read_bytes()
    with open(third, "r+b") as out:
        refused = finish(start(first, stdout=out))
    assert_refused(refused, "lies on it", "overwritten")
    assert whole.read_bytes() == before


def test_an_image_in_the_sources_own_file_system_is_refused_with_the_reason(
    mounted: Tuple[str, Path], tmp_path: Path
) -> None:
    """It would grow into what is read."""
    device, folder = mounted
    for source in (device, tmp_path / "file-system"):
        with open(folder / "image", "wb") as out:
            assert_refused(finish(start(source, stdout=out)), "grow into what is read")
        assert (folder / "image").read_bytes() == b""


def as_nobody(script: str, *arguments: Any) -> List[str]:
    """The words that run a shell's script as a user without any right."""
    needs(os.geteuid() == 0, "root, to become somebody else")
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    return [*words, "bash", "-c", script, "bash", *map(str, arguments)]


@pytest.mark.guarantee(9, "64 backups of one user at once", "the others get their pipes")
def test_many_backups_of_one_user_leave_pipes_to_others(tmp_path: Path) -> None:
    """The kernel counts the pages of all pipes of a user, and then hands out tiny ones."""
    soft = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    needs(soft == 16384, "the kernel's usual limit of pages for a user's pipes")
    count = 64
    # The folders of tests belong to root: what the user needs is handed over.
    raw = write_disk(tmp_path / "disk.raw", 4 * MIB, [(0, noise(4 * MIB))])
    script = """
        for i in $(seq "$1"); do
            /usr/bin/python3 /dev/fd/5 /dev/fd/6 < /dev/null |
                { dd bs=1 count=1 status=none; exec sleep 1000; } >&7 &
        done
        wait
    """
    capacity = f"import fcntl, os; print(fcntl.fcntl(os.pipe()[0], {F_GETPIPE_SZ}))"
    reader, writer = os.pipe()
    handed = {5: os.open(PROGRAM, os.O_RDONLY), 6: os.open(raw, os.O_RDONLY), 7: writer}
    redirections = " ".join(f"{fd}<&{given}" for fd, given in handed.items())
    script = f"exec {redirections}\n{script}"
    backups = subprocess.Popen(
        as_nobody(script, count), pass_fds=list(handed.values()), start_new_session=True
    )
    try:
        for fd in handed.values():
            os.close(fd)
        begun = b""
        while len(begun) < count:
            data = os.read(reader, count)
            assert data, "they have ended"
            begun += data
        assert begun == b"Q" * count
        other = subprocess.check_output(
            as_nobody('exec /usr/bin/python3 -c "$1"', capacity), timeout=TIMEOUT
        )
    finally:
        os.killpg(backups.pid, signal.SIGKILL)
        backups.wait()
        os.close(reader)
    assert int(other) == 65536


# Surroundings


def test_without_dev_null(disk: Path, tmp_path: Path) -> None:
    """In a chroot that somebody has made by hand, even with standard input closed.

    QEMU's programs are started with it as input; what is missing is named.
    """
    needs(os.geteuid() == 0, "root, to hide /dev")
    shell("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, tmp_path / "disk.qcow2")
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", disk, tmp_path / "disk.vmdk")
    bare = 'mount -t tmpfs none /dev; exec "$@"'
    for end, form in itertools.product((" <&-", ""), ("raw", "qcow2", "vmdk")):
        source = disk.with_suffix(f".{form}")
        words = ["unshare", "-m", "bash", "-c", bare + end, "bash"]
        done = subprocess.run(
            [*words, *map(str, command("-f", form, source))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
        if form == "vmdk":
            result = Result(done.returncode, done.stdout, done.stderr.decode())
            assert_refused(result, "/dev/null: No such file")
            continue
        assert (done.returncode, done.stderr) == (0, b""), (form, end)
        assert done.stdout == stream("-f", form, source)


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk"])
def test_few_descriptors_are_an_error_that_says_what_to_do(
    disk: Path, tmp_path: Path, form: str
) -> None:
    """Under `ulimit -n 8`."""
    source = disk
    if form == "vmdk":
        source = tmp_path / "disk.vmdk"
        shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", disk, source)
    if form == "qcow2":  # more members than that
        below, kind = disk, "raw"
        for number in range(10):
            source = overlay(tmp_path / f"{number}.qcow2", below, kind)
            below, kind = source, "qcow2"
    words = ["bash", "-c", 'ulimit -n 8; exec "$@"', "bash", *map(str, command("-f", form, source))]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    result = Result(done.returncode, done.stdout, done.stderr.decode())
    if result.status == 0 and form != "qcow2":
        assert (result.stdout, result.stderr) == (stream("-f", form, source), "")
        return
    assert_refused(result, "ulimit -n")


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk"])
@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/5", "/proc/self/fd/0"])
def test_an_image_may_be_named_by_its_descriptor(
    disk: Path, tmp_path: Path, form: str, name: str
) -> None:
    source = tmp_path / f"disk.{form}"
    if form != "raw":
        shell("qemu-img", "convert", "-f", "raw", "-O", form, disk, source)
    words = ["bash", "-c", 'exec "$@" < "$0" 5< "$0"', source, *command("-f", form, name)]
    done = subprocess.run(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False
    )
    if form == "vmdk" and done.returncode:  # QEMU's programs may have other descriptors
        assert_refused(Result(1, done.stdout, done.stderr.decode()), name, "descriptor")
        return
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == stream("-f", form, source)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_pipe_that_is_named_as_a_file_gets_a_hint(disk: Path, form: str) -> None:
    done = run("-f", form, "/dev/stdin", stdin=b"QFI\xfb" + bytes(4096))
    assert_refused(done, "/dev/stdin", "--size", "-" if form == "raw" else "file")


@pytest.mark.parametrize("options", [[], ["--live"]], ids=["usual", "live"])
@pytest.mark.parametrize("holder", ["image", "backing file"])
def test_an_image_that_is_open_for_writing_gets_the_ways_out(
    disk: Path, tmp_path: Path, holder: str, options: List[str]
) -> None:
    """A qcow2 image's tables change under a reader; a daemon that does nothing holds it, too."""
    base = create(tmp_path / "base.qcow2", "6M")
    image = overlay(tmp_path / "image.qcow2", base, "qcow2")
    held = image if holder == "image" else base
    vm = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(held)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert vm.stdin is not None
    assert vm.stdout is not None
    try:
        vm.stdin.write(b"length\n")
        vm.stdin.flush()
        assert vm.stdout.read(1)  # it is open
        result = run("-f", "qcow2", image, *options)
        assert_refused(result, held.name, "open for writing", "NBD", "snapshot")
    finally:
        vm.communicate(b"quit\n")
    assert stream("-f", "qcow2", image)


def test_descriptors_for_direct_io(disk: Path, ext4: Path) -> None:
    """They take and give whole, aligned blocks only: it works, or says what they are."""
    source = ext4 / "disk.raw"
    source.write_bytes(disk.read_bytes())
    expected = stream("-", "--size", "6M", stdin=disk.read_bytes())
    opened = os.open(source, os.O_RDONLY | os.O_DIRECT)
    result = finish(start("-", "--size", "6M", stdin=opened))
    os.close(opened)
    if result.status:
        assert_refused(result, "standard input", "O_DIRECT")
    else:
        assert (result.stdout, result.stderr) == (expected, "")
    out = os.open(ext4 / "image", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    result = finish(start(disk, stdout=out))
    os.close(out)
    if result.status:
        assert_failed(result, "standard output", "O_DIRECT")
    else:
        assert (ext4 / "image").read_bytes() == stream(disk)


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_a_folder_whose_name_looks_like_an_option_changes_no_hint(
    disk: Path, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "data-file"
    folder.mkdir()
    image = folder / "data-file.img"
    shell("qemu-img", "convert", "-f", "raw", "-O", form, disk, image)
    assert padded(disk.read_bytes()) == as_raw(image, form).read_bytes()
    stream("-f", form, image)
    image.write_bytes(b"no image at all" * 1000)
    result = run("-f", form, image)
    assert_refused(result, "data-file.img")
    for hint in ("--data-file", "data file", "external"):
        assert hint not in result.stderr.replace(str(image), "IMAGE")


def test_the_size_of_a_raw_disk_in_an_option_string(disk: Path, tmp_path: Path) -> None:
    """With a unit, as qemu-img takes it."""
    part = write_disk(tmp_path / "part.raw", 4 * MIB, [(0, disk.read_bytes()[: 4 * MIB])])
    name = f"driver=raw,size=4M,file.driver=file,file.filename={disk}"
    (tmp_path / "image.qcow2").write_bytes(stream("--image-opts", name))
    assert as_raw(tmp_path / "image.qcow2").read_bytes() == part.read_bytes()


def test_a_question_while_a_disk_is_opened_is_answered(disk: Path, tmp_path: Path) -> None:
    """By SIGUSR1: not with a share of nothing."""
    reader, writer = os.pipe()
    with open(tmp_path / "log", "wb") as log:
        program = start(disk, "--json-header-map", str(reader), pass_fds=[reader], stderr=log)
    os.close(reader)
    wait_until_it_catches(program, signal.SIGUSR1)
    wait_until(lambda: waits_for_a_pipe(program.pid), "it waits for the map")
    program.send_signal(signal.SIGUSR1)
    wait_until(lambda: (tmp_path / "log").stat().st_size, "an answer")
    os.write(writer, b"[]")
    os.close(writer)
    assert finish(program).status == 0
    answer = (tmp_path / "log").read_text()
    assert answer.count("\n") == 1
    assert answer.startswith("opening ")
    assert disk.name in answer
    assert "%" not in answer


def waits_for_a_pipe(pid: int) -> bool:
    """Whether a process sleeps in a read."""
    return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
