"""Every command of the README is run as it stands there.

The disks that it names are set up beside a copy of the program; /dev/vg/NAME is put in place of
a loop device's name, and `ssh backup` leads to a real sshd here. Blocks that can't be run carry
their reason in the README, `<!-- not run: … -->`; they are listed by the last test.
"""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import pytest
from conftest import needs
from support import judges
from support.ceph import Cluster
from support.disks import noise, write_disk
from support.program import ROOT, TIMEOUT
from test_consumers import Upload, ssh_host

__all__ = ["ssh_host"]

README = (ROOT / "README.md").read_text()
MIB = 1 << 20


class Block(NamedTuple):
    """A block of shell commands: the nearest title, its note, its text."""

    title: str
    note: str
    text: str


def blocks() -> List[Block]:
    found = []
    title = ""
    pattern = re.compile(
        r"^#+ (?P<title>[^\n]*)$|(?:<!-- (?P<note>[^\n]*) -->\n)?```bash\n(?P<text>.*?)```",
        re.MULTILINE | re.DOTALL,
    )
    for match in pattern.finditer(README):
        if match["text"] is None:
            title = match["title"]
        else:
            found.append(Block(title, match["note"] or "", match["text"]))
    return found


BLOCKS = blocks()
PLAIN = [block for block in BLOCKS if not block.note]
NOT_RUN = [block for block in BLOCKS if block.note.startswith("not run: ")]


def noted(note: str) -> List[Block]:
    return [block for block in BLOCKS if block.note == f"runs with: {note}"]


@pytest.fixture
def desk(tmp_path: Path, loop_device: Callable[..., str], ssh_host: str) -> Callable[..., None]:
    """Run a block in a folder where all that it names is there: all of it, or until one fails.

    A recipe alone, as a script would: that a command in its midst fails must be seen at its end.
    """
    needs(shutil.which("restic") is not None, "restic")
    for name in ("qcow2_to_stdout.py",):
        shutil.copy(ROOT / name, tmp_path)
    devices: Dict[str, str] = {}
    content = noise(3 * MIB)
    for name in ("vm", "monday", "tuesday", "vdi", "restored"):
        disk = write_disk(tmp_path / f"{name}.disk", 16 * MIB, [(0, content), (9 * MIB, content)])
        if name == "tuesday":
            write_disk(disk, 16 * MIB, [(0, content[:MIB]), (9 * MIB, noise(MIB, 5))])
        devices[name] = loop_device(disk)
    shutil.copy(tmp_path / "vm.disk", tmp_path / "disk.raw")
    for number in (1, 2):
        shutil.copy(tmp_path / "vm.disk", tmp_path / f"vm{number}.raw")
    shell = """
    qemu-img convert -O vmdk disk.raw disk.vmdk
    qemu-img convert -O qcow2 disk.raw yesterday.qcow2
    qemu-img create -q -f qcow2 -b yesterday.qcow2 -F qcow2 today.qcow2
    qemu-io -c 'write -P 3 1M 1M' today.qcow2
    qemu-img convert -O qcow2 vdi.disk vdi.qcow2
    qemu-img convert -O qcow2 disk.raw disk.qcow2
    restic init
    """
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (tmp_path / "there").mkdir()  # not the home of whoever runs this
    words = ssh_host.rsplit(" ", 1)[0].split(" ", 1)[1]
    (bin_folder / "ssh").write_text(  # the host's name is all that differs from a real one
        f'#!/bin/bash\n[ "$1" != -n ] || {{ n=-n; shift; }}\n'
        f'shift; exec /usr/bin/ssh $n {words} root@127.0.0.1 "cd {tmp_path}/there && $*"\n'
    )
    (bin_folder / "ssh").chmod(0o755)
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}",
           "RESTIC_REPOSITORY": str(tmp_path / "repo"), "RESTIC_PASSWORD": "secret",
           "RESTIC_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    subprocess.run(["bash", "-ec", shell], cwd=tmp_path, env=env, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip

    def run(text: str, fails: bool = False, **more: str) -> None:
        for name, device in devices.items():
            text = text.replace(f"/dev/vg/{name}", device)
        if fails:  # also where bash takes no notice of `set -e`
            text = f"if {{ {text}\n}}; then exit 0; else exit 9; fi"
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            env={**env, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == (9 if fails else 0), f"{text}\n{done.stdout.decode()}"

    return run


@pytest.fixture
def url() -> Any:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upload)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/readme.qcow2"
    server.shutdown()
    server.server_close()


def test_the_plain_commands(desk: Callable[..., None], tmp_path: Path, url: str) -> None:
    assert len(PLAIN) >= 10
    for block in PLAIN:
        desk(block.text, URL=url)
    for name in ("tuesday", "flat", "diff", "imported", "streamed", "pulled", "export"):
        subprocess.run(["qemu-img", "check", "-q", f"{name}.qcow2"], cwd=tmp_path, check=True)
    for name, raw in (("tuesday", "tuesday"), ("imported", "vm"), ("streamed", "vm"),
                      ("pulled", "vm"), ("restored", "vm"), ("export", "vdi")):  # fmt: skip
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2"]
        words = [*compare, str(tmp_path / f"{raw}.disk"), str(tmp_path / f"{name}.qcow2")]
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / "restored.disk").read_bytes() == (tmp_path / "tuesday.disk").read_bytes()
    judges.qemu_compare(tmp_path / "vm.disk", tmp_path / "there/vm.qcow2")
    assert (tmp_path / "vm.raw").read_bytes() == (tmp_path / "vm.disk").read_bytes()
    assert Upload.taken["/readme.qcow2"][:4] == b"QFI\xfb"
    (upload,) = (block for block in PLAIN if block.title == "Uploads")
    desk(upload.text, fails=True, URL=f"{url}/moved")


@pytest.mark.xdist_group("ceph")
def test_the_commands_for_ceph(desk: Callable[..., None], ceph: Cluster, tmp_path: Path) -> None:
    ceph.rbd("create", "--size", "16M", "vm")
    ceph.io("vm", "write -P 1 0 2M")
    first, *others = noted("ceph")
    assert len(others) == 2
    desk(first.text, CEPH_CONF=str(ceph.conf))
    ceph.io("vm", "write -P 2 1M 64k", "discard 0 64k")
    for block in others:
        desk(block.text, CEPH_CONF=str(ceph.conf))
    extents = subprocess.check_output(
        ["qemu-img", "map", "--output=json", str(tmp_path / "vm-tuesday.qcow2")]
    )
    assert b'"depth": 1' in extents
    ceph.rbd("snap", "purge", "--no-progress", "vm")
    ceph.rbd("rm", "--no-progress", "vm")


def test_the_commands_for_dirty_bitmaps(desk: Callable[..., None], tmp_path: Path) -> None:
    needs(shutil.which("nbdinfo") is not None, "nbdinfo")
    desk("./qcow2_to_stdout.py -f qcow2 disk.qcow2 > monday.qcow2; "
         "qemu-img bitmap --add disk.qcow2 since-monday; "
         "qemu-io -c 'write -P 7 2M 64k' disk.qcow2 > /dev/null")  # fmt: skip
    (block,) = noted("bitmap")
    desk(block.text)
    desk("qemu-img compare disk.qcow2 tuesday.qcow2")
    # Whoever comes first: the server has room for both.
    late = tmp_path / "late" / "nbdinfo"
    late.parent.mkdir()
    late.write_text(f'#!/bin/sh\nsleep 3; exec {shutil.which("nbdinfo")} "$@"\n')
    late.chmod(0o755)
    desk(block.text, PATH=f"{late.parent}:{os.environ['PATH']}")
    desk("qemu-img compare disk.qcow2 tuesday.qcow2")
    # One that is disabled says nothing of what is written, nor does one after an external snapshot.
    desk("qemu-img bitmap --disable disk.qcow2 since-monday; rm tuesday.qcow2")
    desk(block.text, fails=True)
    desk("qemu-img bitmap --enable disk.qcow2 since-monday")
    desk(block.text)
    desk("mv disk.qcow2 below.qcow2; rm tuesday.qcow2; "
         "qemu-img create -q -f qcow2 -b below.qcow2 -F qcow2 disk.qcow2")  # fmt: skip
    desk(block.text, fails=True)
    assert not (tmp_path / "tuesday.qcow2").exists()


# Does all but the last bit of its work, and fails.
FAILING = """#!{python}
import subprocess, sys
done = subprocess.run([{program!r}, *sys.argv[1:]], stdout=subprocess.PIPE)
sys.stdout.buffer.write(done.stdout[:-3])  # more than an end of line
sys.exit(done.returncode or 1)
"""


def test_no_recipe_hides_a_failure(desk: Callable[..., None], tmp_path: Path, url: str) -> None:
    """Each program that a recipe runs fails, in turn; what that leaves does no harm afterwards."""
    needs(shutil.which("nbdinfo") is not None, "nbdinfo")
    (tmp_path / "failing").mkdir()
    ours = tmp_path / "qcow2_to_stdout.py"
    shutil.copy(ours, tmp_path / "ours.py")
    failing = FAILING.format(python=sys.executable, program=str(tmp_path / "ours.py"))
    tools = ("restic", "gunzip", "gzip", "ssh", "qemu-img", "nbdinfo", "curl")
    for tool in tools:
        path = tmp_path / "failing" / tool
        program = tmp_path / "bin/ssh" if tool == "ssh" else shutil.which(tool)
        path.write_text(FAILING.format(python=sys.executable, program=str(program)))
        path.chmod(0o755)
    for name in ("disk", "monday"):
        shutil.copy(tmp_path / "yesterday.qcow2", tmp_path / f"{name}.qcow2")
    desk("qemu-img bitmap --add disk.qcow2 since-monday")
    count = 0
    for block in noted("bitmap") + PLAIN:
        if ours.name in block.text:
            ours.write_text(failing)
            desk(block.text, fails=True, URL=url)
            shutil.copy(tmp_path / "ours.py", ours)
            count += 1
        for tool in tools:
            if re.search(rf"(^|[ (]){tool} ", block.text, re.MULTILINE):
                more = {"PATH": f"{tmp_path}/one:{tmp_path}/bin:{os.environ['PATH']}"}
                (tmp_path / "one").mkdir()
                (tmp_path / "one" / tool).symlink_to(tmp_path / "failing" / tool)
                desk(block.text, fails=True, URL=url, **more)
                shutil.rmtree(tmp_path / "one")
                count += 1
        desk(block.text, URL=url)
    assert count > 20
    whole = [str(tmp_path / "vm.disk"), str(tmp_path / "restored.qcow2")]
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", *whole], check=True)


def test_a_disk_that_is_full_here(desk: Callable[..., None], tmp_path: Path) -> None:
    """ssh does not tell that it could not write all, where the program there has ended well."""
    needs(os.geteuid() == 0, "root, to mount a small file system")
    (block,) = (block for block in PLAIN if "pulled.qcow2" in block.text)
    desk("./qcow2_to_stdout.py /dev/vg/vm > whole.qcow2")
    size = (tmp_path / "whole.qcow2").stat().st_size - 8192
    (tmp_path / "full").mkdir()
    small = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(tmp_path / "full")]
    subprocess.run(small, check=True)
    try:
        desk(block.text.replace("pulled.qcow2", "full/pulled.qcow2"), fails=True)
    finally:
        subprocess.run(["umount", str(tmp_path / "full")], check=True)


def test_what_is_not_run_says_why() -> None:
    for block in NOT_RUN:
        print(f"not run ({block.note[9:]}), from “{block.title}”:\n{block.text}")
    assert [block.title for block in NOT_RUN] == [
        "Start in 30 seconds", "Full backup", "Uploads", "Performance",
    ]  # fmt: skip
    assert len(PLAIN) + len(NOT_RUN) + len(noted("ceph")) + len(noted("bitmap")) == len(BLOCKS)


def test_every_guarantee_names_tests_that_are_there() -> None:
    table = README.split("## Guarantees")[1].split("## Performance")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert names, row
        for file, test in names:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_option_is_in_the_readme() -> None:
    text = (ROOT / "qcow2_to_stdout.py").read_text()
    options = set(re.findall(r'"(--[a-z][a-z-]+)"', text.split("def make_parser")[1]))
    assert len(options) > 15
    for option in options:
        assert f"`{option}" in README or f"{option} " in README, option
