"""What can't be done is refused before the first byte, with one line that helps."""

import errno
import functools
import os
import pty
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import needs, remove_partition
from support.disks import noise, write_disk
from support.program import PROGRAM, Result, assert_refused, assert_warned, command, run, stream

import qcow2_to_stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return write_disk(tmp_path / "disk.raw", 100_000, [(0, b"data")])


def test_a_missing_file(tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "none.raw"), "none.raw", "No such file")


def test_a_folder(tmp_path: Path) -> None:
    assert_refused(run(tmp_path), str(tmp_path), "a folder")


def test_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert_refused(run(tmp_path / "fifo"), "fifo", "a FIFO")


def test_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert_refused(run(tmp_path / "socket"), "a socket")


def test_a_character_device() -> None:
    assert_refused(run("/dev/zero"), "/dev/zero", "a character device")


def test_an_unreadable_file(disk: Path) -> None:
    needs(os.geteuid() == 0, "root, to become somebody else")
    disk.chmod(0)
    os.chmod(disk.parent, 0o755)
    unprivileged = ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all"]
    program = Path("/tmp") / f"qcow2_to_stdout_{os.getpid()}.py"
    program.write_bytes(PROGRAM.read_bytes())
    try:
        with open(disk, "rb") as opened:  # the folders above belong to root
            done = subprocess.run(
                [*unprivileged, "/usr/bin/python3", program, f"/proc/self/fd/{opened.fileno()}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[opened.fileno()],
                check=False,
            )
    finally:
        program.unlink()
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"Permission denied" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_an_empty_name() -> None:
    assert_refused(run(""), "''", "No such file")


def test_a_name_with_control_characters_stays_on_one_line(tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "a\nb\x1b[31m"), "a\\nb\\x1b[31m")


def test_a_terminal(disk: Path) -> None:
    leader, follower = pty.openpty()
    try:
        done = subprocess.run(
            command(disk), stdout=follower, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 1
    assert "terminal" in done.stderr
    assert done.stderr.count("\n") == 1


def packet_pipe() -> Tuple[int, int]:
    return os.pipe2(os.O_DIRECT)


def packet_sockets(kind: int) -> Tuple[int, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    return theirs.detach(), ours.detach()


PACKETS: Dict[str, Callable[[], Tuple[int, int]]] = {
    "pipe": packet_pipe,
    "seqpacket": functools.partial(packet_sockets, socket.SOCK_SEQPACKET),
    "datagram": functools.partial(packet_sockets, socket.SOCK_DGRAM),
}


@pytest.mark.parametrize("kind", PACKETS)
def test_an_output_that_keeps_packets_apart(disk: Path, kind: str) -> None:
    """Of a packet that is longer than its reader's buffer, the rest would be lost in silence."""
    theirs, ours = PACKETS[kind]()
    try:
        done = subprocess.run(
            command(disk), stdout=ours, stderr=subprocess.PIPE, text=True, check=False
        )
        os.set_blocking(theirs, False)
        with pytest.raises(BlockingIOError):
            os.read(theirs, 1)
    finally:
        os.close(theirs)
        os.close(ours)
    assert_refused(Result(done.returncode, b"", done.stderr), "packets")


@pytest.mark.guarantee(
    7, "an output that is the input, by link, loop device, partition or mapping", "refused"
)
@pytest.mark.parametrize("link", ["same", "symlink", "hardlink"])
@pytest.mark.parametrize("mode", ["r+b", "ab"])
def test_an_output_that_is_the_input(disk: Path, link: str, mode: str) -> None:
    name = disk.with_name("other")
    if link == "symlink":
        name.symlink_to(disk)
    elif link == "hardlink":
        os.link(disk, name)
    else:
        name = disk
    before = disk.read_bytes()
    with open(name, mode) as out:
        done = subprocess.run(
            command(disk), stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "itself" in done.stderr
    assert disk.read_bytes() == before


def test_an_empty_device(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    device = loop_device(write_disk(tmp_path / "empty.raw", 0))
    assert_refused(run(device), device, "empty")


@pytest.mark.parametrize("way", ["device to file", "file to device", "device to device"])
@pytest.mark.parametrize("mode", ["r+b", "ab"])
def test_an_output_that_the_input_lies_on(
    disk: Path, loop_device: Callable[..., str], way: str, mode: str
) -> None:
    device = loop_device(disk)
    source, target = {
        "device to file": (device, str(disk)),
        "file to device": (str(disk), device),
        "device to device": (device, loop_device(disk)),
    }[way]
    before = disk.read_bytes()
    with open(target, mode) as out:
        done = subprocess.run(
            command(source), stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, "itself" in done.stderr) == (1, True)
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    "way, missing",
    [
        ("device to file", "/sys"),
        ("device to file", "/dev"),
        ("file to device", "/sys"),
        ("file to device", "/dev"),
        ("file to device", "rights"),
    ],
)
def test_an_output_that_the_input_lies_on_without_sysfs_or_rights(
    disk: Path, loop_device: Callable[..., str], way: str, missing: str
) -> None:
    """The device is asked by its descriptor: that needs no name, no /sys and no right."""
    device = loop_device(disk)
    source, target = (device, str(disk)) if way == "device to file" else (str(disk), device)
    before = disk.read_bytes()
    if missing == "rights":
        words = ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all"]
    else:
        words = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {missing}; exec "$@"', "sh"]
    with open(target, "r+b") as out, open(source, "rb") as opened, open(PROGRAM, "rb") as program:
        words += ["/usr/bin/python3", "-", f"/proc/self/fd/{opened.fileno()}"]
        done = subprocess.run(
            words,
            stdin=program,
            stdout=out,
            stderr=subprocess.PIPE,
            pass_fds=[opened.fileno()],
            text=True,
            check=False,
        )
    assert (done.returncode, "itself" in done.stderr) == (1, True), done.stderr
    assert disk.read_bytes() == before


def test_from_one_device_to_another_without_sysfs(
    disk: Path, loop_device: Callable[..., str]
) -> None:
    """A rescue system or a chroot may lack /sys: an ordinary place, which refuses nothing."""
    whole = loop_device(write_disk(disk.with_name("whole"), 8 << 20))
    other = loop_device(disk)
    hidden = 'mount -t tmpfs none /sys; exec "$@"'
    with open(whole, "r+b") as out:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", hidden, "sh", *(str(word) for word in command(other))],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    image = stream(other)
    with open(whole, "rb") as written:
        assert written.read(len(image)) == image


@pytest.mark.parametrize("error", ["ENFILE", "ENOMEM", "EIO"])
def test_an_output_of_which_just_now_nobody_can_say_what_lies_on_it(
    mounted: Tuple[str, Path], error: str
) -> None:
    device, folder = mounted
    raw = write_disk(folder / "disk.raw", 4096)
    shown = Path("/sys/class/block") / Path(device).name / "loop/backing_file"
    paths = [device, str(shown.resolve()), str(shown.resolve().parents[1] / "slaves")]
    image = Path(shown.read_text().strip())
    before = image.read_bytes()
    words = ["strace", "-f", "-o", "/dev/null", "-e", f"inject=openat:error={error}"]
    words += [word for path in paths for word in ("-P", path)]
    with open(image, "r+b") as out:
        done = subprocess.run(
            [*words, *map(str, command(raw))],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert_refused(
        Result(done.returncode, b"", done.stderr),
        "cannot look at",
        os.strerror(getattr(errno, error)),
    )
    assert image.read_bytes() == before


@pytest.mark.guarantee(
    7, "an output in a file system that lies on the input, or the other way round", "refused"
)
@pytest.mark.parametrize("below", ["device", "file-system"])
def test_an_output_on_the_other_side_of_a_file_system(
    mounted: Tuple[str, Path], tmp_path: Path, below: str
) -> None:
    """The image would overwrite the disk's own file system, or grow into what is read."""
    device, folder = mounted
    under = device if below == "device" else str(tmp_path / "file-system")
    disk = write_disk(folder / "disk.raw", 1 << 20, [(0, b"data")])
    for source, target in ((str(disk), under), (under, str(folder / "image"))):
        with open(target, "r+b" if target == under else "wb") as out:
            done = subprocess.run(
                command(source), stdout=out, stderr=subprocess.PIPE, text=True, check=False
            )
        why = (
            "grow into what is read"
            if target != under
            else "in use"
            if below == "device"
            else ("overwritten")
        )
        assert_refused(Result(done.returncode, b"", done.stderr), why)
    with open(folder / "size", "wb") as out:  # some text does no harm
        subprocess.run(command("--measure", under), stdout=out, check=True)
    with open(folder / "image", "wb") as out:  # beside the disk there is room
        subprocess.run(command(disk), stdout=out, check=True)


@pytest.mark.guarantee(7, "an output device that is mounted, or part of a volume", "refused")
def test_an_output_that_is_mounted(mounted: Tuple[str, Path], disk: Path, tmp_path: Path) -> None:
    """Nothing that is read lies on it, but somebody's files do."""
    device, _ = mounted
    before = (tmp_path / "file-system").read_bytes()
    with open(device, "r+b") as out:
        done = subprocess.run(
            command(disk), stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert_refused(Result(done.returncode, b"", done.stderr), "a device in use", "mounted")
    assert (tmp_path / "file-system").read_bytes() == before


def test_from_one_partition_to_another(disk: Path, loop_device: Callable[..., str]) -> None:
    needs(shutil.which("addpart") is not None, "addpart (util-linux)")
    whole = loop_device(write_disk(disk, 8 << 20, [(4096, b"x" * 65536)]))
    subprocess.run(["addpart", whole, "1", "8", "512"], check=True)
    subprocess.run(["addpart", whole, "2", "2048", "8192"], check=True)
    try:
        expected = stream(f"{whole}p1")
        with open(f"{whole}p2", "r+b") as out:
            subprocess.run(command(f"{whole}p1"), stdout=out, check=True)
        with open(f"{whole}p2", "rb") as written:
            assert written.read(len(expected)) == expected
    finally:
        for number in (1, 2):
            remove_partition(whole, number)


@pytest.mark.parametrize("target", ["file", "disk", "partition"])
def test_an_output_below_a_partition(
    disk: Path, loop_device: Callable[..., str], target: str
) -> None:
    """The source is a loop device on a partition of a loop device on the file."""
    needs(shutil.which("addpart") is not None, "addpart (util-linux)")
    whole = loop_device(write_disk(disk, 65536, [(0, b"x" * 65536)]))
    before = disk.read_bytes()
    subprocess.run(["addpart", whole, "1", "8", "64"], check=True)
    attach = ["losetup", "--find", "--show", f"{whole}p1"]
    try:
        source = subprocess.check_output(attach, text=True).strip()
        try:
            path = {"file": str(disk), "disk": whole, "partition": f"{whole}p1"}[target]
            with open(path, "r+b") as out:
                done = subprocess.run(
                    command(source), stdout=out, stderr=subprocess.PIPE, text=True, check=False
                )
        finally:
            subprocess.run(["losetup", "--detach", source], check=True)
    finally:
        remove_partition(whole, 1)
    assert (done.returncode, "itself" in done.stderr) == (1, True)
    assert disk.read_bytes() == before


def test_an_output_whose_file_has_got_another_name(
    disk: Path, loop_device: Callable[..., str], tmp_path: Path
) -> None:
    source = loop_device(disk)
    disk.rename(tmp_path / "elsewhere")
    write_disk(disk, 65536)
    with open(tmp_path / "elsewhere", "r+b") as out:
        done = subprocess.run(command(source), stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, b"itself" in done.stderr) == (1, True)


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    words = ["bash", "-c", 'mkdir gone; cd gone; rmdir ../gone; "$@" disk.raw', "bash", *command()]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert_refused(Result(done.returncode, done.stdout, done.stderr.decode()), "No such file")


def copied(disk: Path) -> Path:
    copy = disk.with_name("copy.raw")
    copy.write_bytes(disk.read_bytes())
    return copy


@pytest.mark.guarantee(8, "BASE in another format than the backing file that it is", "refused")
def test_a_base_and_a_backing_file_of_two_formats(disk: Path, tmp_path: Path) -> None:
    monday = tmp_path / "monday.qcow2"
    monday.write_bytes(stream(disk))
    options = [str(disk), "--diff", str(monday), "-b", str(monday), "-F", "qcow2"]
    assert_refused(run(*options), "add --diff-format qcow2")
    stream(*options, "--diff-format", "qcow2")
    (tmp_path / "link").symlink_to(monday)
    for other in (f"{tmp_path}/./monday.qcow2", f"{tmp_path}/link"):
        assert_refused(run(*options[:4], other, *options[5:]), "add --diff-format qcow2")


@pytest.mark.guarantee(
    8, "a BASE that looks like a qcow2 backing file, without `--diff-format`", "refused"
)
def test_a_base_that_looks_like_the_backing_file(disk: Path, tmp_path: Path) -> None:
    """The image goes into a pipe, and nothing else shows that BASE is meant to be its content."""
    monday = tmp_path / "monday.qcow2"
    monday.write_bytes(stream(disk))
    options = [str(disk), "--diff", str(monday), "-b", "elsewhere.qcow2", "-F", "qcow2"]
    assert_refused(run(*options), "begins as a qcow2 image", "add --diff-format qcow2")
    stream(*options, "--diff-format", "raw")
    stream(*options, "--diff-format", "qcow2")


@pytest.mark.guarantee(
    8, "a raw disk that begins as a qcow2 image does", "it is wrapped, with a warning"
)
def test_a_qcow2_image_that_is_wrapped(disk: Path, tmp_path: Path) -> None:
    """A format is never guessed, but who forgot -f sees it at once."""
    image = tmp_path / "guest.qcow2"
    image.write_bytes(stream(disk))
    for said, options in (("-f qcow2", [image]), ("--diff-format qcow2", [disk, "--diff", image])):
        result = run(*options)
        assert result.status == 0
        assert result.stderr.startswith("qcow2_to_stdout.py: warning: ")
        assert result.stderr.count("\n") == 1
        assert said in result.stderr
    wrapped = run(image).stdout
    assert wrapped == stream(image, "-f", "raw")
    assert run(image, "-f", "raw").stderr == ""


@pytest.mark.parametrize("form", ["vmdk", "vdi", "vhdx", "vpc", "parallels"])
def test_another_image_that_is_wrapped(tmp_path: Path, form: str) -> None:
    image = tmp_path / "a"
    subprocess.check_call(["qemu-img", "create", "-q", "-f", form, str(image), "4M"])
    result = run(image)
    assert result.status == 0
    assert f"begins as a {form} image does" in result.stderr
    assert result.stdout == stream(image, "-f", "raw")


def test_a_base_beside_an_option_string(disk: Path, tmp_path: Path) -> None:
    """What driver= says of INPUT says nothing of BASE."""
    options = [
        "--image-opts",
        f"driver=raw,file.driver=file,file.filename={disk}",
        "--diff",
        str(disk),
    ]
    assert_refused(run(*options), "add --diff-format")


@pytest.mark.guarantee(7, "an output that is the image's own backing file", "refused")
@pytest.mark.parametrize("name", ["monday.qcow2", "ABSOLUTE"])
def test_an_output_that_is_its_own_backing_file(disk: Path, tmp_path: Path, name: str) -> None:
    monday = tmp_path / "monday.qcow2"
    monday.write_bytes(stream(disk))
    before = monday.read_bytes()
    name = name.replace("ABSOLUTE", str(monday))
    for folder in (tmp_path, Path("/")):
        with open(monday, "r+b") as out:
            words = command(str(disk), "--diff", str(copied(disk)), "-b", name, "-F", "qcow2")
            done = subprocess.run(
                words, stdout=out, stderr=subprocess.PIPE, cwd=folder, check=False
            )
        assert (done.returncode, b"own backing file" in done.stderr) == (1, True)
        assert monday.read_bytes() == before


@pytest.mark.guarantee(5, "a backing file that a failed run has left", "a warning")
@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_backing_file_of_a_failed_run_is_warned_of(
    disk: Path, tmp_path: Path, content: bytes
) -> None:
    """It may become whole yet. The image's folder is where its name leads to."""
    (tmp_path / "monday.qcow2").write_bytes(content)
    options = ["--layout", "-", "-F", "qcow2", "-b"]
    with open(tmp_path / "tuesday.qcow2", "wb") as out:
        words = command(disk, *options, "monday.qcow2")
        done = subprocess.run(words, input=b"[]", stdout=out, stderr=subprocess.PIPE, check=False)
    assert_warned(Result(done.returncode, b"", done.stderr.decode()), "backing file")
    absolute = run(disk, *options, f"{tmp_path}/monday.qcow2", stdin=b"[]")
    assert_warned(absolute, "monday.qcow2")
    stream(disk, *options, "monday.qcow2", cwd=tmp_path, stdin=b"[]")  # who knows which one


@pytest.mark.guarantee(8, "a backing file that is a qcow2 image, given as raw", "a warning")
def test_a_backing_file_that_is_an_image_but_is_said_to_be_raw(disk: Path, tmp_path: Path) -> None:
    monday = tmp_path / "monday"
    monday.write_bytes(stream(disk))
    assert monday.stat().st_size != disk.stat().st_size
    newer = write_disk(tmp_path / "newer.raw", disk.stat().st_size, [(0, noise(4096, 3))])
    for what in (["--diff", str(disk)], ["--layout", "-"]):
        options = [str(newer), *what, "-b", str(monday), "-F"]
        assert_warned(run(*options, "raw", stdin=b"[]"), "monday", "-F qcow2")
        stream(*options, "qcow2", stdin=b"[]")


@pytest.mark.guarantee(7, "`disk.raw > disk.raw`, emptied by the shell", "refused, with the reason")
def test_an_input_that_the_shell_has_emptied(disk: Path) -> None:
    with open(disk, "wb") as out:
        words = command(disk)
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert_refused(Result(done.returncode, b"", done.stderr), "itself", "emptied")


@pytest.mark.parametrize("name", ["rbd:rbd/vm@monday", "json:{}"])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_the_address_of_a_remote_disk(tmp_path: Path, name: str, fmt: str) -> None:
    assert_refused(run("-f", fmt, name, cwd=tmp_path), name, "--image-opts")
    disk = write_disk(tmp_path / "disk.raw", 4096)
    assert_refused(run(disk, "--diff", name, cwd=tmp_path), name, "--image-opts")


def test_a_base_that_is_not_of_the_inputs_format(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "new.qcow2").write_bytes(stream(disk))
    options = ["-f", "qcow2", str(tmp_path / "new.qcow2"), "--diff", str(disk)]
    assert_refused(run(*options), str(disk), "without --diff-format")
    stream(*options, "--diff-format", "raw")


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_a_backing_file_of_a_run_that_broke_off_is_warned_of(
    tmp_path: Path, compat: str, cluster_size: int
) -> None:
    """Its header and its tables say that all is there."""
    content = [(0, noise(1 << 20)), (9 << 20, noise(3 << 20)), (14 << 20, noise(1000))]
    disk = write_disk(tmp_path / "disk.raw", 16 << 20, content)
    monday = tmp_path / "monday.qcow2"
    monday.write_bytes(stream(disk, "-c", str(cluster_size), "--compat", compat))
    options = ["--layout", "-", "-F", "qcow2", "-b", str(monday)]
    stream(disk, *options, stdin=b"[]")
    size = monday.stat().st_size
    for left in (size - 1, size - cluster_size, size // 2, 5 * cluster_size, cluster_size, 80, 50):
        os.truncate(monday, left)
        assert_warned(run(disk, *options, stdin=b"[]"), "monday.qcow2")


@pytest.mark.guarantee(8, "a backing file's name that QEMU would take for an address", "refused")
def test_a_backing_file_with_a_colon(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "a:b.raw").write_bytes(disk.read_bytes())
    options = [str(disk), "--diff", str(copied(disk)), "-F", "raw", "-b"]
    assert_refused(run(*options, "a:b.raw", cwd=tmp_path), "put ./ before")
    stream(*options, "./a:b.raw", cwd=tmp_path)
    stream(*options, "nbd:localhost:10809", cwd=tmp_path)
    assert_refused(run(*options, "2026-11-21T10:00.raw"), "put ./ before")  # it need not be here


def huge(tmp_path: Path, size: int) -> Path:
    """A sparse file larger than ext4 takes, on tmpfs where that is needed."""
    try:
        return write_disk(tmp_path / "huge.raw", size)
    except OSError:
        needs(os.path.ismount("/dev/shm"), "a file system for files of exabytes")
        path = Path(f"/dev/shm/qcow2_to_stdout_{os.getpid()}_{size}.raw")
        (tmp_path / "huge.raw").unlink()
        (tmp_path / "huge.raw").symlink_to(write_disk(path, size))
        return tmp_path / "huge.raw"


@pytest.fixture
def exabytes(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    made: List[Path] = []

    def make(size: int) -> Path:
        made.append(huge(tmp_path, size))
        return made[-1]

    yield make
    for path in made:
        os.unlink(os.path.realpath(path))


def test_an_l1_table_over_32_mib(exabytes: Callable[[int], Path]) -> None:
    reach = (32 << 20) // 8 * (512 // 8) * 512
    assert_refused(run("-c", "512", exabytes(reach + 1)), "L1 table", "32 MiB", "--cluster-size")


def test_the_largest_l1_table_is_taken(exabytes: Callable[[int], Path]) -> None:
    reach = (32 << 20) // 8 * (512 // 8) * 512
    assert len(stream("-c", "512", exabytes(reach))) == 65800 * 512


def test_a_refcount_table_over_8_mib() -> None:
    # 2^20 blocks of 64 refcounts each are what a table of 8 MiB reaches: 32 GiB of output.
    geometry = qcow2_to_stdout.Geometry(64 << 30, 512, 64)
    blocks, table = 1 << 20, (8 << 20) // 512
    l1_clusters = geometry.l1_entries * 8 // 512
    most = blocks * 64 - (1 + blocks + table + l1_clusters)
    plan = qcow2_to_stdout.make_plan(geometry, 0, most)
    assert (plan.refcount_blocks, plan.refcount_table_clusters) == (blocks, table)
    assert plan.file_size == 32 << 30
    plan.refuse_if_too_large()
    with pytest.raises(qcow2_to_stdout.Error, match=r"8 MiB.*--cluster-size"):
        qcow2_to_stdout.make_plan(geometry, 0, most + 1).refuse_if_too_large()


def test_host_offsets_past_2_to_the_56() -> None:
    geometry = qcow2_to_stdout.Geometry(1 << 57, 2 << 20, 1)
    qcow2_to_stdout.make_plan(geometry, 0, (1 << 35) - (1 << 20)).refuse_if_too_large()
    with pytest.raises(qcow2_to_stdout.Error, match="2\\^56"):
        qcow2_to_stdout.make_plan(geometry, 0, 1 << 35).refuse_if_too_large()


@pytest.mark.parametrize("option", ["-d", "-R"])
def test_a_data_file_past_2_to_the_56(exabytes: Callable[[int], Path], option: str) -> None:
    assert_refused(run("-c", "2M", option, exabytes((1 << 56) + 512)), "2^56")


@pytest.mark.parametrize("option", ["-d", "-R"])
def test_a_data_file_with_clusters_of_512_bytes(disk: Path, option: str) -> None:
    assert_refused(run("-c", "512", option, disk), "1024", "--cluster-size")


def test_a_data_file_name_that_does_not_fit(tmp_path: Path) -> None:
    fits = "d" * 250 + "/" + "e" * 250 + "/" + "f" * 250 + "/" + "g" * 151
    (tmp_path / fits).parent.mkdir(parents=True)
    write_disk(tmp_path / fits, 512)
    assert len(fits) == 1024 - 112 - 8
    (tmp_path / "image").write_bytes(stream("-c", "1024", "-d", fits, cwd=tmp_path))
    subprocess.run(["qemu-img", "compare", "-f", "raw", fits, "image"], cwd=tmp_path, check=True)
    os.rename(tmp_path / fits, tmp_path / (fits + "g"))
    assert_refused(run("-c", "1024", "-d", fits + "g", cwd=tmp_path), "does not fit", "1024")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "INPUT"),
        (["-c", "64", "x"], "did you mean 64K?"),
        (["-c", "1000", "x"], "power of two"),
        (["-c", "4M", "x"], "power of two"),
        (["-c", "64KB", "x"], "write 64K"),
        (["-c", "64KiB", "x"], "write 64K"),
        (["-c", "", "x"], "power of two"),
        (["-c", "-512", "x"], "-c"),
        (["-r", "3", "x"], "1, 2, 4, 8, 16, 32 or 64"),
        (["-r", "016", "x"], "1, 2, 4, 8, 16, 32 or 64"),
        (["-m", "0", "x"], "1 to 64"),
        (["-m", "65", "x"], "1 to 64"),
        (["--compess", "zlib", "x"], "did you mean --compress"),
        (["x", "y"], "standard output"),
        (["x", "-O", "qcow2"], "standard output"),
    ],
)
def test_wrong_usage_exits_2(arguments: List[str], words: str) -> None:
    result = run(*arguments)
    assert (result.status, result.stdout) == (2, b"")
    assert words in result.stderr
    assert result.stderr.startswith("usage: ")


def test_sizes_in_all_their_spellings(disk: Path) -> None:
    images = {stream("-c", size, disk) for size in ("2097152", "2M", "2m", "2048K", "2048k")}
    assert len(images) == 1
    assert stream("-c4096", disk) == stream("--cluster-size=4K", disk)


def test_help_and_version_are_for_people() -> None:
    text = run("--help").stdout.decode()
    for word in ("examples:", "exit status:", "gzip", "--data-file-raw"):
        assert word in text
    assert run("-V").stdout.startswith(b"qcow2_to_stdout.py ")
