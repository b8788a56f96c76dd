"""Every command of the README and of the recipes is run as it stands there.

The disks that they name are set up beside a copy of the program; /dev/vg/NAME is put in place of
a loop device's name, and `ssh backup` leads to a real sshd here. Blocks that can't be run carry
their reason, `<!-- not run: … -->`; they are listed by the last test.
"""

import contextlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import pytest
from conftest import needs
from support import guarantees, judges
from support.ceph import Cluster
from support.disks import noise, write_disk
from support.nbd import free_port, make_certificates
from support.program import ROOT, TIMEOUT
from test_consumers import Upload, ssh_host

__all__ = ["ssh_host"]

README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "tests" / "RECIPES.md").read_text()
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
    for match in pattern.finditer(README + RECIPES):
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


# A thin pool of 64 KiB blocks: of the second snapshot, block 1 is another, and one is new.
POOL = """<superblock uuid="" time="1" transaction="1" data_block_size="128" nr_data_blocks="256">
<device dev_id="1" mapped_blocks="2" transaction="0" creation_time="0" snap_time="1">
<range_mapping origin_begin="0" data_begin="0" length="2" time="0"/></device>
<device dev_id="2" mapped_blocks="3" transaction="0" creation_time="0" snap_time="1">
<single_mapping origin_block="0" data_block="0" time="0"/>
<single_mapping origin_block="1" data_block="5" time="1"/>
<single_mapping origin_block="160" data_block="6" time="1"/></device></superblock>"""


@pytest.fixture
def desk(tmp_path: Path, loop_device: Callable[..., str], ssh_host: str) -> Callable[..., None]:
    """Run a block in a folder where all that it names is there: all of it, or until one fails.

    A recipe alone, as a script would: that a command in its midst fails must be seen at its end.
    """
    needs(shutil.which("restic") is not None, "restic")
    needs(shutil.which("thin_delta") is not None, "thin_delta (thin-provisioning-tools)")
    shutil.copy(ROOT / "qcow2_to_stdout.py", tmp_path)
    devices: Dict[str, str] = {}
    content = noise(3 * MIB)
    for name in ("vm", "monday", "tuesday", "vdi", "restored", "luks"):
        disk = write_disk(tmp_path / f"{name}.disk", 16 * MIB, [(0, content), (9 * MIB, content)])
        if name == "tuesday":
            write_disk(disk, 16 * MIB, [(0, content[:MIB]), (9 * MIB, noise(MIB, 5))])
        devices[name] = loop_device(disk)
    shutil.copy(tmp_path / "vm.disk", tmp_path / "disk.raw")
    for number in (1, 2):
        shutil.copy(tmp_path / "vm.disk", tmp_path / f"vm{number}.raw")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "pool.xml").write_text(POOL)
    shell = """
    again() { for _ in 1 2 3 4 5 6; do "$@" && return; done; }  # see images.make_encrypted
    qemu-img convert -O vmdk disk.raw disk.vmdk
    qemu-img convert -O qcow2 disk.raw yesterday.qcow2
    qemu-img create -q -f qcow2 -b yesterday.qcow2 -F qcow2 today.qcow2
    qemu-io -c 'write -P 3 1M 1M' today.qcow2
    qemu-img convert -O qcow2 vdi.disk vdi.qcow2
    qemu-img convert -O qcow2 disk.raw guest.qcow2
    qemu-img bitmap --add guest.qcow2 since-monday
    secret="--object secret,id=s,file=key"
    again qemu-img create -q $secret -f qcow2 \
      -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100 locked.qcow2 8M
    again qemu-img create -q $secret -f luks -o key-secret=s,iter-time=100 luks.new 1M
    dd if=luks.new of=luks.disk conv=notrunc status=none
    thin_restore -q -i pool.xml -o pool_tmeta
    restic init
    """
    write_disk(tmp_path / "pool_tmeta", 4 * MIB)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    shutil.copy(ROOT / "qcow2_to_stdout.py", bin_folder)
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
        text = text.replace("/usr/local/bin", "bin").replace("/dev/mapper/vg-pool_", "./pool_")
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
    assert len(PLAIN) >= 15
    for block in PLAIN:
        desk(block.text, URL=url)
    names = ("tuesday", "imported", "streamed", "pulled", "export", "full", "next", "shown", "thin")
    for name in (*names, "unlocked", "unlocked-luks"):
        subprocess.run(["qemu-img", "check", "-q", f"{name}.qcow2"], cwd=tmp_path, check=True)
    for name, raw in (("tuesday", "tuesday"), ("imported", "vm"), ("streamed", "vm"),
                      ("pulled", "vm"), ("restored", "vm"), ("export", "vdi")):  # fmt: skip
        compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2"]
        words = [*compare, str(tmp_path / f"{raw}.disk"), str(tmp_path / f"{name}.qcow2")]
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    desk("qemu-img compare guest.qcow2 next.qcow2")
    map_of_thin = ["qemu-img", "map", "--output=json", str(tmp_path / "thin.qcow2")]
    extents = json.loads(subprocess.check_output(map_of_thin))
    changed = [(each["start"], each["length"]) for each in extents if not each["depth"]]
    assert changed == [(1 << 16, 1 << 16), (10 * MIB, 1 << 16)]
    assert (tmp_path / "restored.disk").read_bytes() == (tmp_path / "tuesday.disk").read_bytes()
    assert (tmp_path / "vm.raw").read_bytes() == (tmp_path / "tuesday.disk").read_bytes()
    assert Upload.taken["/readme.qcow2"][:4] == b"QFI\xfb"
    (upload,) = (block for block in PLAIN if block.title == "Uploads")
    desk(upload.text, fails=True, URL=f"{url}/moved")


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_the_commands_for_nbd_servers(desk: Callable[..., None], tmp_path: Path) -> None:
    """In 30 seconds, with TLS, and from what libvirt shows; libvirt itself is not here."""
    (tmp_path / "bin" / "virsh").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "virsh").chmod(0o755)
    certificates = make_certificates(tmp_path / "pki")
    (quick,), (tls,), (libvirt,) = noted("nbd"), noted("tls"), noted("libvirt")
    port, path = free_port(), tmp_path / "vm.sock"
    nbdkit = ["nbdkit", "--foreground", f"--port={port}", "--ipaddr=127.0.0.1"]
    servers = (
        ([*nbdkit, "file", "disk.raw"], quick),
        ([*nbdkit, "--tls=require", f"--tls-certificates={certificates}", "file", "disk.raw"], tls),
        (["qemu-nbd", "--read-only", "--persistent", "--format", "qcow2", "-B", "backup-vda",
          "-x", "vda", "-k", str(path), "guest.qcow2"], libvirt),
    )  # fmt: skip
    desk("qcow2_to_stdout.py -f qcow2 guest.qcow2 > monday.qcow2; "
         "qemu-img bitmap --add guest.qcow2 backup-vda")  # fmt: skip
    for server, block in servers:
        with subprocess.Popen(server, cwd=tmp_path) as process:
            while not (path.exists() if block is libvirt else is_listening(port)):
                assert process.poll() is None
                time.sleep(0.05)
            text = block.text.replace("localhost/", f"localhost:{port}/")
            desk(text.replace("/var/tmp/vm.sock", str(path)))
            process.terminate()
    for name in ("vm", "small", "over-tls", "whole"):
        subprocess.run(["qemu-img", "check", "-q", f"{name}.qcow2"], cwd=tmp_path, check=True)
    judges.qemu_compare(tmp_path / "vm.disk", tmp_path / "over-tls.qcow2")


# What restic 0.17 does with --stdin-from-command, by an older one.
NEWER_RESTIC = """#!/bin/bash
[ "$1 $2 $4 $5" = "backup --stdin-filename --stdin-from-command --" ] || exec {restic} "$@"
"${{@:6}}" > {folder}/taken && exec {restic} backup --stdin --stdin-filename "$3" < {folder}/taken
"""


@pytest.mark.filterwarnings("default:restic is older")
def test_the_command_for_a_newer_restic(desk: Callable[..., None], tmp_path: Path) -> None:
    """What breaks off is no snapshot."""
    restic = shutil.which("restic")
    if b"stdin-from-command" not in subprocess.check_output([str(restic), "help", "backup"]):
        warnings.warn("restic is older than 0.17: a script stands in for a newer one", stacklevel=1)
        (tmp_path / "bin" / "restic").write_text(
            NEWER_RESTIC.format(restic=restic, folder=tmp_path)
        )
        (tmp_path / "bin" / "restic").chmod(0o755)
    (block,) = noted("restic 0.17")
    desk(block.text)
    desk(block.text.replace("/dev/vg/vm", "/dev/vg/vm --nonsense"), fails=True)
    desk("restic snapshots --json | grep -o short_id | wc -l | grep -x 1; "
         "restic dump latest vm.qcow2 > vm.qcow2")  # fmt: skip
    judges.qemu_compare(tmp_path / "vm.disk", tmp_path / "vm.qcow2")


TABLE = README.split("## Which command do I need?")[1].split("\n\n**")[0]
ROWS = [row.replace("\\|", "|") for row in re.findall(r"\| `(.*?)`[^`|]* \|$", TABLE, re.MULTILINE)]


def test_each_row_of_the_table(desk: Callable[..., None], tmp_path: Path) -> None:
    """Which command do I need? What a row writes is what it promises."""
    assert len(ROWS) >= 14
    certificates = make_certificates(tmp_path / "pki")
    port = free_port()
    desk("qcow2_to_stdout.py /dev/vg/monday > monday.qcow2; qemu-img snapshot -c clean guest.qcow2;"
         "qemu-io -c 'write -P 7 2M 64k' -c 'write -z 9M 64k' guest.qcow2 > /dev/null")  # fmt: skip
    server = ["nbdkit", "--foreground", f"--port={port}", "--ipaddr=127.0.0.1", "--tls=require",
              f"--tls-certificates={certificates}", "file", "disk.raw"]  # fmt: skip
    with subprocess.Popen(server, cwd=tmp_path) as process:
        try:
            while not is_listening(port):
                assert process.poll() is None
                time.sleep(0.05)
            for row in ROWS:
                desk(f"set -o pipefail; {row}".replace("localhost/", f"localhost:{port}/"))
                for name, same in (("tuesday", "guest"), ("flat", "today"), ("diff", "today"),
                                   ("since", "guest"), ("clean", "monday")):  # fmt: skip
                    if f"> {name}.qcow2" in row:
                        desk(f"qemu-img check -q {name}.qcow2 && "
                             f"qemu-img compare -q {name}.qcow2 {same}.qcow2")  # fmt: skip
                for image in ("vm.qcow2", "disk.qcow2", "there/vm.qcow2"):
                    if f"> {Path(image).name}" in row and (tmp_path / image).exists():
                        judges.qemu_compare(tmp_path / "vm.disk", tmp_path / image)
        finally:
            process.terminate()
    desk("qemu-img compare -q -f raw -F qcow2 /dev/vg/restored guest.qcow2")


def virsh_of_nobody(folder: Path, script: Path) -> None:
    """A virsh whose libvirt is a session of nobody, with all that it has in one folder."""
    folder.chmod(0o777)
    (folder / "run").mkdir()
    (folder / "run").chmod(0o777)
    names = {"HOME": "", "XDG_RUNTIME_DIR": "run", "XDG_CACHE_HOME": "c", "XDG_CONFIG_HOME": "g"}
    env = " ".join(f"{name}={folder / value}" for name, value in names.items())
    nobody = f"setpriv --reuid=65534 --regid=65534 --clear-groups env {env}"
    script.write_text(
        f"#!/bin/sh\ncp *.xml {folder}; cd {folder}; exec {nobody} "
        f'{shutil.which("virsh")} --quiet --connect qemu:///session "$@"\n'
    )
    script.chmod(0o755)


DOMAIN = """<domain type='qemu'><name>vm</name><memory unit='MiB'>64</memory><os>
<type arch='x86_64' machine='pc'>hvm</type></os><devices><disk type='file' device='disk'>
<driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>
</devices></domain>"""


@pytest.fixture
def libvirt(tmp_path: Path) -> Iterator[Path]:
    """A folder where libvirt runs, ended with its test."""
    needs(os.geteuid() == 0 and shutil.which("virsh") is not None, "root and virsh")
    needs(shutil.which("qemu-system-x86_64") is not None, "qemu-system-x86_64")
    folder = Path(tempfile.mkdtemp(prefix="libvirt"))  # its sockets have names of 107 bytes
    try:
        yield folder
    finally:
        subprocess.run(
            ["virsh", "destroy", "vm"],
            check=False,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        )
        for file in folder.glob("run/libvirt/*.pid"):
            os.kill(int(file.read_text()), 15)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_commands_for_libvirt(desk: Callable[..., None], libvirt: Path, tmp_path: Path) -> None:
    """Two nights of a guest that runs on, as the README has them."""
    virsh_of_nobody(libvirt, tmp_path / "bin" / "virsh")
    backup, checkpoint = re.findall(r"```xml\n(.*</domainbackup>\n)(.*?)```", README, re.DOTALL)[0]
    (block,) = noted("libvirt")

    def there(text: str) -> str:
        return text.replace("/var/tmp", str(libvirt))

    first = re.sub(r" *<incremental>.*\n", "", backup)
    for name, text in (("backup", backup), ("tuesday", checkpoint), ("first", first),
                       ("monday", checkpoint.replace("tuesday", "monday"))):  # fmt: skip
        (tmp_path / f"{name}.xml").write_text(there(text))
    disk = libvirt / "vm.qcow2"
    shutil.copy(tmp_path / "guest.qcow2", disk)
    disk.chmod(0o666)
    (libvirt / "vm.xml").write_text(DOMAIN.format(disk))
    write = ("virsh qemu-monitor-command vm --hmp 'qemu-io -d "
             "/machine/peripheral/virtio-disk0/virtio-backend \"write -P {} {} 64k\"'")  # fmt: skip
    full = "qcow2_to_stdout.py 'nbd+unix:///vda?socket=/var/tmp/vm.sock' > monday.qcow2"
    desk(there("virsh create /var/tmp/vm.xml && virsh backup-begin vm first.xml monday.xml"))
    desk(there(full))
    desk(f"virsh domjobabort vm && {write.format(7, '5M')}")
    restic, file = re.findall(r"`(\| restic[^`]*)` for\s`(> [^`]*)`", README)[0]
    assert file in block.text
    without_end = there(block.text).replace("virsh domjobabort vm", "true")
    desk("set -o pipefail\n" + without_end.replace(file, restic))
    desk("restic dump latest tuesday.qcow2 > by-restic.qcow2; virsh domjobabort vm; "
         "virsh checkpoint-delete vm tuesday")  # fmt: skip
    desk(there(block.text))
    desk("cmp by-restic.qcow2 tuesday.qcow2; virsh destroy vm; "
         "qemu-img check -q tuesday.qcow2 && "
         "qemu-io -r -c 'read -P 7 5M 64k' tuesday.qcow2 | grep -v 'verification failed' && "
         f"qemu-img compare tuesday.qcow2 {disk}")  # fmt: skip
    extents = subprocess.check_output(["qemu-img", "map", str(tmp_path / "tuesday.qcow2")])
    assert extents.count(b"tuesday.qcow2") == 1


@pytest.mark.xdist_group("ceph")
def test_the_commands_for_ceph(desk: Callable[..., None], ceph: Cluster, tmp_path: Path) -> None:
    second, *others = noted("ceph")
    assert len(others) == 3
    first = re.sub(r" --from-snap monday| -b monday.qcow2 -F qcow2", "", second.text)
    first = first.replace("tuesday", "monday")
    for begin, goes_on in ((first, [second]), (others[0].text, others[1:])):
        ceph.rbd("create", "--size", "16M", "vm")
        ceph.io("vm", "write -P 1 0 2M")
        desk(begin, CEPH_CONF=str(ceph.conf))
        ceph.io("vm", "write -P 2 1M 64k", "discard 0 64k")
        for block in goes_on:
            desk(block.text, CEPH_CONF=str(ceph.conf))
        ceph.rbd("snap", "purge", "--no-progress", "vm")
        ceph.rbd("mv", "vm", f"vm-of-{len(goes_on)}")  # a watcher may take leave yet
    for name in ("tuesday", "vm-tuesday"):
        words = ["qemu-img", "map", "--output=json", str(tmp_path / f"{name}.qcow2")]
        assert b'"depth": 1' in subprocess.check_output(words)


# Does all but the last bit of its work, and fails.
FAILING = """#!{python}
import subprocess, sys
done = subprocess.run([{program!r}, *sys.argv[1:]], stdout=subprocess.PIPE)
sys.stdout.buffer.write(done.stdout[:-3])  # more than an end of line
sys.exit(done.returncode or 1)
"""


@pytest.mark.guarantee(5, "the failure of any program in a recipe", "the recipe fails")
def test_no_recipe_hides_a_failure(desk: Callable[..., None], tmp_path: Path, url: str) -> None:
    """Each program that a recipe runs fails, in turn; what that leaves does no harm afterwards."""
    (tmp_path / "failing").mkdir()
    tools = ("qcow2_to_stdout.py", "restic", "ssh", "curl", "thin_delta")
    for tool in tools:
        there = tmp_path / "bin" / tool
        program = str(there) if there.exists() else shutil.which(tool)
        path = tmp_path / "failing" / tool
        path.write_text(FAILING.format(python=sys.executable, program=program))
        path.chmod(0o755)
    count = 0
    for block in PLAIN:
        for tool in tools:
            if re.search(rf"(^ *|[|&(;'] ?){re.escape(tool)} ", block.text, re.MULTILINE):
                (tmp_path / "one").mkdir()
                (tmp_path / "one" / tool).symlink_to(tmp_path / "failing" / tool)
                more = {"PATH": f"{tmp_path}/one:{tmp_path}/bin:{os.environ['PATH']}"}
                desk(block.text, fails="install" not in block.text, URL=url, **more)
                shutil.rmtree(tmp_path / "one")
                count += 1
        desk(block.text, URL=url)
    assert count > 15
    whole = [str(tmp_path / "vm.disk"), str(tmp_path / "restored.qcow2")]
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", *whole], check=True)


def test_a_disk_that_is_full_here(desk: Callable[..., None], tmp_path: Path) -> None:
    """ssh does not say that it could not write all, where the program there has ended well."""
    needs(os.geteuid() == 0, "root, to mount a small file system")
    (block,) = (block for block in PLAIN if "pulled.qcow2" in block.text)
    desk("qcow2_to_stdout.py /dev/vg/vm > whole.qcow2")
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
        "Thin pools", "Uploads", "KubeVirt and Glance", "Restore",
    ]  # fmt: skip
    notes = [block.note for block in BLOCKS if block.note and block not in NOT_RUN]
    assert {note.split()[2] for note in notes} == {"nbd", "restic", "ceph", "libvirt", "tls"}


def test_every_option_is_in_the_readme() -> None:
    text = (ROOT / "qcow2_to_stdout.py").read_text()
    options = set(re.findall(r'"(--[a-z][a-z-]+)"', text.split("def make_parser")[1]))
    assert len(options) > 15
    for option in options:
        assert f"`{option}" in README or f"{option} " in README, option


def anchors(text: str) -> List[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_lines_are_short_and_links_lead_somewhere() -> None:
    for name in ("README.md", "tests/RECIPES.md", "tests/GUARANTEES.md"):
        text = (ROOT / name).read_text()
        for line in text.splitlines():
            assert len(line) <= 120 or line.startswith("|"), line
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)]*)\)", prose):
            file, _, anchor = target.partition("#")
            other = (ROOT / name).parent / file if file else ROOT / name
            assert other.exists(), target
            assert not anchor or anchor in anchors(other.read_text()), target


def test_the_guarantees_are_those_of_the_tests() -> None:
    """Stale? python tests/support/guarantees.py > tests/GUARANTEES.md"""
    promises = re.findall(r"^\d+\. \*\*(.+?)\.\*\*", README, re.M)
    assert promises == list(guarantees.PROMISES)
    assert (ROOT / "tests" / "GUARANTEES.md").read_text() == guarantees.document()
