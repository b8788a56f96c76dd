"""End to end with the programs that people pipe into, their failure included."""

import http.server
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from conftest import needs
from support import judges
from support.program import PYTHON, ROOT, TIMEOUT, stream

MIB = 1 << 20


def bash(
    script: str, check: bool = True, env: Optional[Dict[str, str]] = None
) -> "subprocess.CompletedProcess[bytes]":
    """A user's script, with pipefail, and the program as the README names it."""
    text = f"set -euo pipefail; export PATH={Path(PYTHON).parent}:$PATH; cd {ROOT}; {script}"
    return subprocess.run(
        ["bash", "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        timeout=TIMEOUT,
        check=check,
    )


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with a real file system and a file on it."""
    folder = tmp_path_factory.mktemp("consumers")
    (folder / "tree").mkdir()
    (folder / "tree" / "hello.txt").write_text("a file that a guest wrote\n" * 1000)
    raw = folder / "disk.raw"
    raw.touch()
    os.truncate(raw, 16 * MIB)
    mkfs = ["mkfs.ext4", "-q", "-F", "-d", str(folder / "tree"), str(raw)]
    subprocess.run(mkfs, check=True)
    return raw


def recognise(disk: Path, image: Path) -> None:
    """The restored image is sound, the same, and its file system can be read."""
    judges.qemu_check(image)
    judges.qemu_compare(disk, image)
    raw = image.with_name("restored.raw")
    raw.write_bytes(judges.qemu_read(image))
    listed = subprocess.check_output(
        ["debugfs", "-R", "cat /hello.txt", str(raw)], stderr=subprocess.DEVNULL
    )
    assert listed == b"a file that a guest wrote\n" * 1000
    subprocess.run(["e2fsck", "-fn", str(raw)], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize("tool", ["gzip", "zstd"])
def test_compressors(disk: Path, tmp_path: Path, tool: str) -> None:
    needs(shutil.which(tool) is not None, tool)
    bash(f"./qcow2_to_stdout.py {disk} | {tool} -c > {tmp_path}/image.packed")
    bash(f"{tool} -dc < {tmp_path}/image.packed > {tmp_path}/image.qcow2")
    recognise(disk, tmp_path / "image.qcow2")
    failed = bash(f"./qcow2_to_stdout.py {disk}.none | {tool} -c > /dev/null", check=False)
    assert failed.returncode == 1
    gone = bash(f"./qcow2_to_stdout.py {disk} | head -c 9999 | {tool} -c >/dev/null", check=False)
    assert gone.returncode == 141


def test_restic(disk: Path, tmp_path: Path) -> None:
    needs(shutil.which("restic") is not None, "restic")
    env = {"RESTIC_REPOSITORY": str(tmp_path / "repo"), "RESTIC_PASSWORD": "secret",
           "RESTIC_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    bash("restic init", env=env)
    backup = "restic backup --stdin --stdin-filename vm.qcow2"
    bash(f"./qcow2_to_stdout.py {disk} | {backup}", env=env)
    bash(f"restic dump latest vm.qcow2 > {tmp_path}/image.qcow2", env=env)
    recognise(disk, tmp_path / "image.qcow2")
    snapshots = bash("restic snapshots --json", env=env).stdout.count(b'"short_id"')

    # A stream that breaks off: restic can't know, the shell does, and forgets it.
    recipe = (
        (
            f"./qcow2_to_stdout.py {disk} --layout {tmp_path}/none"
            f" | {backup} --tag incomplete && restic tag --remove incomplete"
            " || {{ restic forget --tag incomplete --unsafe-allow-remove-all --keep-last 0"
            " 2>/dev/null || restic forget $(restic snapshots --tag incomplete --json"
            ' | grep -o \'"short_id":"[^"]*\' | cut -d\'"\' -f4); exit 1; }}'
        )
        .replace("{{", "{")
        .replace("}}", "}")
    )
    failed = bash(recipe, check=False, env=env)
    assert failed.returncode == 1
    left = bash("restic snapshots --json", env=env).stdout.count(b'"short_id"')
    assert left == snapshots
    if b"--stdin-from-command" in bash("restic backup --help").stdout:
        command = f"restic backup --stdin-from-command -- ./qcow2_to_stdout.py {disk}.none"
        assert bash(command, check=False, env=env).returncode != 0
        assert bash("restic snapshots --json", env=env).stdout.count(b'"short_id"') == snapshots


def test_borg(disk: Path, tmp_path: Path) -> None:
    needs(shutil.which("borg") is not None, "borg")
    env = {"BORG_REPO": str(tmp_path / "repo"), "BORG_BASE_DIR": str(tmp_path)}
    bash("borg init --encryption=none", env=env)
    bash(f"./qcow2_to_stdout.py {disk} | borg create ::monday -", env=env)
    bash(f"borg extract --stdout ::monday > {tmp_path}/image.qcow2", env=env)
    recognise(disk, tmp_path / "image.qcow2")
    broken = f"./qcow2_to_stdout.py {disk}.none | borg create ::tuesday - || borg delete ::tuesday"
    bash(broken, env=env)
    assert bash("borg list --short", env=env).stdout == b"monday\n"


@pytest.fixture
def ssh_host(tmp_path: Path) -> Iterator[str]:
    """The words that run a command on a local sshd."""
    needs(os.path.exists("/usr/sbin/sshd") and os.geteuid() == 0, "sshd and root")
    os.makedirs("/run/sshd", exist_ok=True)
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(key, check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "authorized", "StrictModes": "no", "UsePAM": "no",
        "PidFile": "none", "PermitRootLogin": "yes",
    }  # fmt: skip
    (tmp_path / "config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))
    server = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / "config")], stderr=subprocess.DEVNULL
    )
    words = f"ssh -q -p {port} -i {tmp_path}/user -o BatchMode=yes -o StrictHostKeyChecking=no " \
            "-o UserKnownHostsFile=/dev/null root@127.0.0.1"  # fmt: skip
    try:
        for _ in range(100):
            if subprocess.run([*words.split(), "true"], check=False).returncode == 0:
                break
            threading.Event().wait(0.1)
        yield words
    finally:
        server.terminate()
        server.wait()


def test_ssh(disk: Path, tmp_path: Path, ssh_host: str) -> None:
    bash(f"./qcow2_to_stdout.py {disk} | {ssh_host} 'cat > {tmp_path}/image.qcow2'")
    recognise(disk, tmp_path / "image.qcow2")
    # The other way round: a copy of the program runs there, without being installed.
    bash(f"{ssh_host} /usr/bin/python3 - {disk} < qcow2_to_stdout.py > {tmp_path}/pulled.qcow2")
    assert (tmp_path / "pulled.qcow2").read_bytes() == stream(disk)
    bash(f"{ssh_host} dd if={disk} status=none | ./qcow2_to_stdout.py --size 16M - "
         f"> {tmp_path}/dd.qcow2")  # fmt: skip
    judges.qemu_compare(disk, tmp_path / "dd.qcow2")
    failed = bash(f"./qcow2_to_stdout.py {disk}.none | {ssh_host} 'cat >/dev/null'", check=False)
    assert failed.returncode == 1
    gone = bash(f"./qcow2_to_stdout.py {disk} | {ssh_host} false", check=False)
    assert gone.returncode not in (0,)


class Upload(http.server.BaseHTTPRequestHandler):
    """Takes one PUT with a length known beforehand, and nothing else; or sends it elsewhere."""

    taken: Dict[str, bytes] = {}  # noqa: RUF012  # of the one test that uses it

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        self.taken[self.path] = self.rfile.read(length)
        is_whole = len(self.taken[self.path]) == length
        self.send_response(307 if "moved" in self.path else 201 if is_whole else 400)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_words: Any) -> None:
        pass


def test_an_upload_with_its_length_known_beforehand(disk: Path) -> None:
    needs(shutil.which("curl") is not None, "curl")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upload)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/vm.qcow2"
        bash(
            f"size=$(./qcow2_to_stdout.py --measure --output json {disk}"
            " | python3 -c 'import json, sys; print(json.load(sys.stdin)[\"required\"])'); "
            f"./qcow2_to_stdout.py {disk}"
            f" | curl -sf -T - -H 'Transfer-Encoding:' -H \"Content-Length: $size\" {url}"
        )
    finally:
        server.shutdown()
        server.server_close()
    assert Upload.taken["/vm.qcow2"] == stream(disk)


def test_many_disks_at_once(disk: Path, tmp_path: Path) -> None:
    names: List[str] = []
    for number in range(4):
        os.link(disk, disk.with_name(f"vm{number}.raw"))
        names.append(str(disk.with_name(f"vm{number}.raw")))
    listing = "\\n".join(names)
    bash(f"printf '{listing}\\n' | xargs -P 2 -I DISK sh -c "
         f"'./qcow2_to_stdout.py DISK > {tmp_path}/$(basename DISK).qcow2'")  # fmt: skip
    for number in range(4):
        assert (tmp_path / f"vm{number}.raw.qcow2").read_bytes() == stream(disk)
