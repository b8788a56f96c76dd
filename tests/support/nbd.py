"""NBD servers: real ones, one that breaks every rule, and certificates for them."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional

from support.program import TIMEOUT

MIB = 1 << 20


class Server(NamedTuple):
    """A server's process, and the URI of what it shows (without an export's name)."""

    process: Any
    uri: str


@contextlib.contextmanager
def serving(words: List[Any], uri: str, pid_file: Path) -> Iterator[Server]:
    """A server that writes its process ID into a file once it listens."""
    for path in (pid_file, pid_file.with_suffix("")):  # those of the last server
        if path.exists():
            path.unlink()
    env = {**os.environ, "TMPDIR": str(pid_file.parent)}  # a server that is killed leaves scripts
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL, env=env)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (pid_file.exists() and pid_file.read_text()):
            assert process.poll() is None, f"it ended: {words}"
            assert time.monotonic() < deadline, f"it does not listen: {words}"
            time.sleep(0.01)
        yield Server(process, uri)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def nbdkit(folder: Path, *words: Any, port: Optional[int] = None) -> Any:
    """nbdkit on a Unix socket, or a port of this host: options, plugin, parameters."""
    place, uri = [f"--unix={folder}/kit"], f"nbd+unix:///?socket={folder}/kit"
    if port is not None:
        place, uri = [f"--port={port}"], f"nbd://localhost:{port}/"
    pid_file = folder / "kit.pid"
    return serving(["nbdkit", "-f", *place, f"--pidfile={pid_file}", *words], uri, pid_file)


def qemu_nbd(folder: Path, *words: Any) -> Any:
    """qemu-nbd on a Unix socket, for many clients."""
    pid_file = folder / "qemu.pid"
    place = ["-k", folder / "qemu", f"--pid-file={pid_file}"]
    start = ["qemu-nbd", "-r", "-t", "-e", "8", *place]
    return serving([*start, *words], f"nbd+unix:///?socket={folder}/qemu", pid_file)


class StorageDaemon:
    """A qemu-storage-daemon with an NBD server, driven by QMP as management tools do."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"nbd+unix:///NAME?socket={folder}/daemon"
        monitor = ["--chardev", "stdio,id=c", "--monitor", "chardev=c"]
        address = f"addr.type=unix,addr.path={folder}/daemon"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", *monitor, "--nbd-server", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._receive("QMP")
        self.run("qmp_capabilities")

    def _receive(self, *keys: str) -> Any:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            assert line, "the daemon has ended"
            answer = json.loads(line)
            if any(key in answer for key in keys):
                return answer

    def run(self, command: str, **arguments: Any) -> Any:
        """Run a command; an underscore in the name of an argument is a dash."""
        assert self.process.stdin is not None
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        request = {"execute": command, "arguments": named}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = self._receive("return", "error")
        assert "error" not in answer, answer
        return answer["return"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


TEMPLATES = {
    "ca": "cn = authority\nca\ncert_signing_key\n",
    "server": "cn = localhost\ndns_name = localhost\ntls_www_server\nsigning_key\n",
    "client": "cn = client\ntls_www_client\nsigning_key\n",
}


def make_certificates(folder: Path) -> Path:
    """An authority, a certificate of localhost, and a client's, under the names of libnbd."""

    def certtool(*words: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["certtool", *words], cwd=folder, check=True, **quiet)  # type: ignore[call-overload]

    folder.mkdir()
    signed = ["--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem"]
    for kind, template in TEMPLATES.items():
        (folder / f"{kind}.info").write_text(template)
        certtool("--generate-privkey", "--key-type=ecdsa", "--outfile", f"{kind}-key.pem")
        how = ["--generate-self-signed"] if kind == "ca" else ["--generate-certificate", *signed]
        key = ["--load-privkey", f"{kind}-key.pem", "--template", f"{kind}.info"]
        certtool(*how, *key, "--outfile", f"{kind}-cert.pem")
    return folder


class Request(NamedTuple):
    """What a client asks for: a command (0 read, 7 block status) with flags, and where."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Rogue:
    """An NBD server that shows a disk of noise, and answers as a test wants.

    answer      is called with the server and each request that is to be answered otherwise; it
                says whether it has done so
    silent      options of the handshake that it does not answer
    structured  whether it knows structured replies
    go          whether it knows NBD_OPT_GO; else NBD_OPT_EXPORT_NAME
    size, flags of the export
    infos       what it says of the export, in place of that
    greeting    what it says first, in place of the right words
    requests    all requests so far
    """

    def __init__(
        self,
        folder: Path,
        disk: bytes,
        answer: Callable[["Rogue", Request], bool] = lambda *_: False,
        **how: Any,
    ) -> None:
        self.disk, self.answer, self.how = disk, answer, how
        self.requests: List[Request] = []
        self.fault: Optional[BaseException] = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "rogue"))
        self._listener.listen()
        self.uri = f"nbd+unix:///?socket={folder}/rogue"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Rogue":
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(TIMEOUT)
        if self.fault is not None:
            raise self.fault

    def _run(self) -> None:
        while True:
            try:
                self.sock, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self.sock, contextlib.suppress(EOFError, ConnectionError):
                    self._serve()
            except BaseException as error:  # for the test's own thread
                self.fault = error
                return

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.sock.recv(length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.sock.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

    def _serve(self) -> None:
        if "greeting" in self.how:
            self.sock.sendall(self.how["greeting"])
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(4096):
                pass
            return
        if not self._shake_hands():
            return
        while True:
            magic, *fields = struct.unpack(">IHHQQI", self._receive(28))
            assert magic == 0x25609513
            request = Request(*fields)
            if request.command == 2:
                return
            self.requests.append(request)
            if not self.answer(self, request):
                self.right(request)

    def _shake_hands(self) -> bool:
        self.sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        self._receive(4)
        while True:
            _, option, length = struct.unpack(">QII", self._receive(16))
            self._receive(length)
            if option in self.how.get("silent", ()):
                continue
            if option == 8:
                self._reply(option, 1 if self.how.get("structured", True) else (1 << 31) + 1)
            elif option == 10:
                self._reply(option, 4, struct.pack(">I", 7) + b"base:allocation")
                self._reply(option, 1)
            elif option == 7 and self.how.get("go", True):
                for info in self.how.get("infos", [self._export()]):
                    self._reply(option, 3, info)
                self._reply(option, 1)
                return True
            elif option == 1:
                self.sock.sendall(self._export()[2:])
                return True
            elif option == 2:
                return False
            else:
                self._reply(option, (1 << 31) + 1)

    def _export(self) -> bytes:
        size, flags = self.how.get("size", len(self.disk)), self.how.get("flags", 0x81)
        return struct.pack(">HQH", 0, size, flags)

    # What an answer may be made of.

    def right(self, request: Request) -> None:
        """Answer as a server should."""
        if request.command == 7:
            self.chunk(request, 5, struct.pack(">III", 7, request.length, 0))
        elif self.how.get("structured", True):
            self.chunk(request, 1, struct.pack(">Q", request.offset) + self.data(request))
        else:
            self.simple(request, 0, self.data(request))

    def data(self, request: Request) -> bytes:
        return self.disk[request.offset : request.offset + request.length]

    def chunk(self, request: Request, kind: int, data: bytes, is_last: bool = True) -> None:
        head = struct.pack(">IHHQI", 0x668E33EF, is_last, kind, request.cookie, len(data))
        self.sock.sendall(head + data)

    def simple(self, request: Request, error: int, data: bytes = b"") -> None:
        self.sock.sendall(struct.pack(">IIQ", 0x67446698, error, request.cookie) + data)
