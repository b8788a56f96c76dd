"""NBD servers' disks: URIs, and our client against real servers and one that breaks every rule.

No program of QEMU's is there for it to ask (an empty PATH).
"""

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from conftest import needs
from support.disks import noise, write_disk
from support.images import shell
from support.nbd import (
    Request,
    Rogue,
    StorageDaemon,
    free_port,
    make_certificates,
    nbdkit,
    qemu_nbd,
)
from support.program import (
    TIMEOUT,
    altered,
    assert_failed,
    assert_refused,
    run,
    start,
    stream,
)
from support.pythons import pythons, version
from support.qcow2 import KIB, MIB, NO_PROGRAMS, content, judged, make, qemu_io

import qcow2_to_stdout as program


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data, a hole, zeros that are stored, data."""
    pieces = [(0, noise(MIB)), (2 * MIB, bytes(MIB)), (3 * MIB, noise(MIB, 2))]
    return write_disk(tmp_path / "disk", 5 * MIB, pieces)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, Path]:
    """Those of the server that is meant, and of another authority."""
    needs(shutil.which("certtool") is not None, "certtool (gnutls-bin)")
    folder = tmp_path_factory.mktemp("pki")
    return make_certificates(folder / "good"), make_certificates(folder / "other")


def export(uri: str, *options: Any, **how: Any) -> bytes:
    how.setdefault("env", NO_PROGRAMS)
    return stream(uri, *options, **how)


# URIs


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("nbd://example.com", ("example.com", 10809, None, "")),
        ("nbd://example.com/", ("example.com", 10809, None, "")),
        ("nbd://example.com:1/disk", ("example.com", 1, None, "disk")),
        ("nbd://example.com//disk", ("example.com", 10809, None, "/disk")),
        ("nbd://h/hello%20world", ("h", 10809, None, "hello world")),
        ("nbd://h/pool/image@snap+1", ("h", 10809, None, "pool/image@snap+1")),
        ("nbd://[::1]:10810/a", ("::1", 10810, None, "a")),
        ("nbd://[fe80::1%25eth0]/", ("fe80::1%eth0", 10809, None, "")),
        ("nbd:///a", ("localhost", 10809, None, "a")),
        ("nbds://h/%C3%BC", ("h", 10809, None, "ü")),
        ("nbd+unix:///disk?socket=nbd.sock", ("localhost", 10809, "nbd.sock", "disk")),
        ("nbd+unix://?socket=/a%26b", ("localhost", 10809, "/a&b", "")),
        ("nbds+unix:///?socket=/s&tls-certificates=/p", ("localhost", 10809, "/s", "")),
    ],
)
def test_uris_as_their_specification_has_them(uri: str, expected: Tuple[Any, ...]) -> None:
    address = program.parse_nbd_uri(uri)
    assert address[:4] == expected
    assert address.has_tls == uri.startswith("nbds")


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("nbd://alice:secret@h/a", "user and password"),
        ("nbds://alice@h/a", "user and password"),
        ("nbds://alice:sec/ret@h/a", "NBD URI"),
        ("nbd://alice:secret@h:port/a", "user and password"),
        ("nbd+unix://alice:secret@/a?socket=/s", "user and password"),
        ("nbd://h:secret/a", "NBD URI"),
        ("nbds://h/?tls-psk-file=secret", "tls-psk-file"),
        ("nbds://h/?tls-username=secret", "tls-username"),
        ("nbd://h/?tls-certificates=/p", "nbds"),
        ("nbd://h/a#b", "%23"),
        ("nbd://h:70000/", "NBD URI"),
        ("nbd://[::1/", "NBD URI"),
        ("nbd+unix:///a", "socket=PATH"),
        ("nbd+unix://a?socket=/s", "socket=PATH"),
        ("nbd://h/?socket=/s", "socket=PATH"),
        ("nbd+vsock://3/", "TCP and Unix"),
        ("nbd+unix:///?socket=/s&x=secret", "'x'"),
    ],
)
def test_uris_that_are_refused(uri: str, word: str, disk: Path) -> None:
    """In one line before the first byte, which shows nothing that may be a password."""
    for options in ([uri], [str(disk), "--diff", uri]):
        result = run(*options, env=NO_PROGRAMS)
        assert_refused(result, word)
        assert "secret" not in result.stderr
        assert "sec/ret" not in result.stderr


def test_options_that_do_not_go_with_a_uri() -> None:
    for options, word in (
        (["-f", "qcow2"], "leave -f qcow2 out"),
        (["-d"], "server"),
        (["-R"], "server"),
        (["-l", "s"], "qcow2"),
        (["--size", "1M"], "--size"),
    ):
        assert_refused(run("nbd://localhost:1/", *options), word)


def test_a_file_of_such_a_name(tmp_path: Path) -> None:
    (tmp_path / "nbd:").mkdir()
    write_disk(tmp_path / "nbd:" / "x", MIB, [(0, noise(MIB))])
    assert content(stream("./nbd://x", cwd=tmp_path)) == noise(MIB)
    assert_refused(run("nbd:x:1", cwd=tmp_path), "no file", "nbd:x:1")


# Real servers

POLICY = ["--filter=blocksize-policy"]
STRICT = "blocksize-error-policy=error"
SERVERS = {
    "plain": ([], []),
    "no structured replies": (["--no-sr"], []),
    "blocks of 512 bytes": (POLICY, [STRICT, "blocksize-minimum=512"]),
    "blocks of 4 KiB": (POLICY, [STRICT, "blocksize-minimum=4096"]),
    "blocks of 64 KiB": (POLICY, [STRICT, "blocksize-minimum=65536", "blocksize-preferred=65536"]),
    "requests of 64 KiB": (POLICY, [STRICT, "blocksize-minimum=1", "blocksize-maximum=65536"]),
    "no block status": (["--filter=noextents"], []),
    "late answers": (["--filter=delay", "--threads=16"], ["delay-read=10ms"]),
    "one at a time": (["--filter=noparallel"], []),
    "no multi-conn": (["--filter=multi-conn"], ["multi-conn-mode=disable"]),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_servers(kind: str, tmp_path: Path, disk: Path) -> None:
    """Whatever a server can do: the stream of the disk itself."""
    options, parameters = SERVERS[kind]
    with nbdkit(tmp_path, *options, "file", disk, *parameters) as server:
        for more in ([], ["-c", "4K"], ["-c", "2M", "-m", "16"]):
            assert export(server.uri, *more) == stream(disk, *more)


@pytest.mark.parametrize("size", [1, 511, 513, 65537, MIB + 4097, 3 * MIB - 1])
def test_odd_sizes(size: int, tmp_path: Path) -> None:
    """nbdkit shows them as they are; QEMU rounds up to sectors."""
    disk = write_disk(tmp_path / "disk", size, [(0, noise(size))])
    expected = stream(disk)
    for server in (nbdkit(tmp_path, "file", disk), nbdkit(tmp_path, "--no-sr", "file", disk)):
        with server as running:
            assert export(running.uri) == expected
    with qemu_nbd(tmp_path, "-f", "raw", disk) as running:
        assert export(running.uri) == expected


def test_an_empty_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    with nbdkit(tmp_path, "file", tmp_path / "disk") as server:
        assert export(server.uri) == stream(tmp_path / "disk")


def test_a_huge_disk(tmp_path: Path) -> None:
    """Its holes take more than one question, for lengths have 32 bits."""
    words = ["data", "@1000000000000 1 2 3 @5000000000000 4", "size=6T"]
    with nbdkit(tmp_path, *words) as server:
        image = tmp_path / "image.qcow2"
        image.write_bytes(export(server.uri, "-c", "2M"))
    assert image.stat().st_size < 64 * MIB
    qemu_io(image, "read -P 3 1000000000002 1", "read -P 4 5000000000000 1", "read -P 0 5T 64k")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_tcp(host: str, tmp_path: Path, disk: Path) -> None:
    if host == "[::1]":
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                needs(False, "IPv6")
    port = free_port()
    with nbdkit(tmp_path, "-e", "an export", "file", disk, port=port):
        assert export(f"nbd://{host}:{port}/an%20export") == stream(disk)


def test_many_extents_of_a_qcow2(tmp_path: Path) -> None:
    image = make(tmp_path / "a.qcow2", 64 * MIB)
    qemu_io(
        image, *(f"write -P {at % 251 + 1} {at * 128}k 64k" for at in range(500)), "write -z 0 4k"
    )
    with qemu_nbd(tmp_path, "-f", "qcow2", image) as server:
        assert export(server.uri) == stream("-f", "qcow2", image)


def test_exports_by_name(tmp_path: Path, disk: Path) -> None:
    with qemu_nbd(tmp_path, "-f", "raw", "-x", "ü /x?#", disk) as server:
        uri = server.uri.replace("///", "///%C3%BC%20/x%3F%23")
        assert export(uri) == stream(disk)
        for other in (server.uri, server.uri.replace("///", "///other")):
            assert_refused(run(other), "no such export", other)


def test_base_is_a_servers_disk(tmp_path: Path, disk: Path) -> None:
    """And INPUT too; each server's zeros are known from its block status."""
    other = write_disk(tmp_path / "other", 5 * MIB, [(0, noise(MIB)), (4 * MIB, noise(MIB, 3))])
    options = ["-b", "x.qcow2", "-F", "qcow2"]
    expected = stream(disk, "--diff", other, *options)
    (tmp_path / "one").mkdir()
    with nbdkit(tmp_path, "file", disk) as one, nbdkit(tmp_path / "one", "file", other) as two:
        assert export(str(disk), "--diff", two.uri, *options) == expected
        assert export(one.uri, "--diff", two.uri, *options) == expected
        assert export(one.uri, "--diff", other, *options) == expected
        image = tmp_path / "disk.qcow2"
        shell("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
        assert export("-f", "qcow2", image, "--diff", two.uri, *options) == expected


def test_a_server_that_answers_no_handshake(tmp_path: Path, disk: Path) -> None:
    with nbdkit(tmp_path, "--oldstyle", "file", disk) as server:
        assert_refused(run(server.uri), "oldstyle")
    with nbdkit(tmp_path, "--mask-handshake=0", "file", disk) as server:
        assert_refused(run(server.uri), "fixed newstyle")
    assert_refused(run("nbd+unix:///?socket=/nowhere"), "cannot open", "No such file")
    assert_refused(run(f"nbd://localhost:{free_port()}/"), "Connection refused")
    assert_refused(run("nbd://no.such.host.invalid/"), "nbd://no.such.host.invalid/")
    assert_refused(run("nbd+unix:///?socket=/" + "x" * 200), "cannot open")


@pytest.mark.parametrize("python", pythons(), ids=version)
def test_every_python_reads_from_servers(
    python: str, tmp_path: Path, disk: Path, certificates: Tuple[Path, Path]
) -> None:
    secure = ["--tls=require", f"--tls-certificates={certificates[0]}"]
    with nbdkit(tmp_path, "file", disk) as server:
        assert export(server.uri, python=python) == stream(disk)
    with nbdkit(tmp_path, *secure, "file", disk) as server:
        uri = server.uri.replace("nbd+", "nbds+") + f"&tls-certificates={certificates[0]}"
        assert export(uri, python=python) == stream(disk)


# TLS


def test_tls(tmp_path: Path, disk: Path, certificates: Tuple[Path, Path]) -> None:
    good, other = certificates
    words = ["--tls=require", f"--tls-certificates={good}", "--tls-verify-peer", "file", disk]
    with nbdkit(tmp_path, *words) as server:
        secure = server.uri.replace("nbd+", "nbds+")
        assert export(f"{secure}&tls-certificates={good}") == stream(disk)
        assert_refused(run(server.uri), "wants TLS; write nbds")
        for uri in (f"{secure}&tls-certificates={other}", secure):
            assert_refused(run(uri), "cannot open", "certificate verify failed")
        assert_refused(run(f"{secure}&tls-certificates=/nowhere"), "No such file")
    with nbdkit(tmp_path, "file", disk) as server:
        uri = server.uri.replace("nbd+", "nbds+") + f"&tls-certificates={good}"
        assert_refused(run(uri), "cannot open", "TLS")


def test_tls_wants_the_clients_certificate(
    tmp_path: Path, disk: Path, certificates: Tuple[Path, Path]
) -> None:
    """A folder without one, and a server that insists."""
    good = certificates[0]
    folder = tmp_path / "public"
    folder.mkdir()
    (folder / "ca-cert.pem").write_bytes((good / "ca-cert.pem").read_bytes())
    words = ["--tls=require", f"--tls-certificates={good}", "file", disk]
    with nbdkit(tmp_path, *words) as server:
        uri = server.uri.replace("nbd+", "nbds+") + f"&tls-certificates={folder}"
        assert export(uri) == stream(disk)
        system = {**os.environ, "SSL_CERT_FILE": str(folder / "ca-cert.pem")}
        assert run(server.uri.replace("nbd+", "nbds+"), env=system).stdout == stream(disk)
    with nbdkit(tmp_path, "--tls-verify-peer", *words) as server:
        assert_refused(run(uri), "cannot open")


@pytest.mark.guarantee(5, "a TLS certificate of another host", "refused")
def test_tls_checks_the_name_of_the_host(
    tmp_path: Path, disk: Path, certificates: Tuple[Path, Path]
) -> None:
    good = certificates[0]
    port = free_port()
    words = ["--tls=require", f"--tls-certificates={good}", "file", disk]
    with nbdkit(tmp_path, *words, port=port):
        key = f"/?tls-certificates={good}"
        assert export(f"nbds://localhost:{port}{key}") == stream(disk)
        result = run(f"nbds://127.0.0.1:{port}{key}")
        assert_refused(result, f"nbds://127.0.0.1:{port}", "127.0.0.1")


# Faults of real servers


def test_errors_name_the_offset(tmp_path: Path, disk: Path) -> None:
    """Met in the scan: no image. Met in the copy: exit status 1, and no whole one."""
    bad = "if [ $4 -le 3200000 ] && [ $(($4 + $3)) -gt 3200000 ]; then echo EIO >&2; exit 1; fi"
    words = ["eval", f"get_size=echo {5 * MIB}", "can_extents=exit 3", "thread_model=echo parallel"]
    read = f"dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=64K status=none"
    with nbdkit(tmp_path, *words, f"pread={bad}; {read}") as server:
        result = run(server.uri, "-c", "64K")
    assert result.status == 1
    offset = int(re.findall(r"at offset (\d+): Input/output error", result.stderr)[0])
    assert offset <= 3200000 < offset + 2 * MIB
    assert result.stderr.count("\n") == 1


@pytest.mark.guarantee(5, "an NBD server that dies", "exit 1, with the offset")
@pytest.mark.parametrize("moment", ["scan", "copy"])
def test_a_server_that_dies(moment: str, tmp_path: Path) -> None:
    """The offset is named, and nothing pads the image."""
    slow = ["delay-read=300ms"] if moment == "scan" else []
    options = ["--filter=delay"] if slow else []
    with nbdkit(tmp_path, *options, "pattern", "64M", *slow) as server:
        running = start(server.uri, bufsize=0)
        head = b"" if slow else running.stdout.read(4)
        time.sleep(2 if slow else 0)
        server.process.kill()
        rest, stderr = running.communicate(timeout=TIMEOUT)
    assert running.returncode == 1
    assert len(head + rest) < 64 * MIB
    assert re.search(rb"error: cannot read 'nbd.*' at offset \d+: [^\n]+\n\Z", stderr), stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_stalls_is_waited_for(signum: int, tmp_path: Path) -> None:
    """As a slow one, but a signal ends the wait at once; and a server may go on."""
    with nbdkit(tmp_path, "pattern", "64M") as server:
        expected = export(server.uri)
        running = start(server.uri, bufsize=0)
        head = running.stdout.read(4)
        server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        if signum == signal.SIGHUP:
            server.process.send_signal(signal.SIGCONT)
            assert head + running.communicate(timeout=TIMEOUT)[0] == expected
            return
        running.send_signal(signum)
        running.communicate(timeout=10)
        assert running.returncode == -signum


# A server that breaks the rules

Answer = Callable[[Rogue, Request], bool]


def where(offset: int, answer: Callable[[Rogue, Request], Any], command: int = 0) -> Answer:
    """Another answer for the requests that touch an offset."""

    def decide(rogue: Rogue, request: Request) -> bool:
        touched = request.offset <= offset < request.offset + request.length
        if request.command != command or not touched:
            return False
        answer(rogue, request)
        return True

    return decide


NOISE = noise(MIB)


def out_of_order(rogue: Rogue, request: Request) -> bool:
    """Hold back what has come until nothing more comes, then answer in halves from the end."""
    if request.command:
        return False
    held: List[Request] = rogue.how.setdefault("held", [])
    held.append(request)
    rogue.sock.settimeout(0.02)
    try:
        if rogue.sock.recv(1, socket.MSG_PEEK):
            return True
    except socket.timeout:
        pass
    finally:
        rogue.sock.settimeout(None)
    for part in (1, 0):
        for each in reversed(held):
            start = each.offset + part * (each.length // 2)
            end = each.offset + each.length if part else each.offset + each.length // 2
            data = struct.pack(">Q", start) + rogue.disk[start:end]
            rogue.chunk(each, 1, data, is_last=False)
    for each in held:
        rogue.chunk(each, 0, b"")
    held.clear()
    return True


def with_holes(rogue: Rogue, request: Request) -> bool:
    """Zeros in chunks without data, and data in pieces of a sector."""
    if request.command:
        return False
    for at in range(request.offset, request.offset + request.length, 512):
        data = rogue.disk[at : min(at + 512, request.offset + request.length)]
        if any(data):
            rogue.chunk(request, 1, struct.pack(">Q", at) + data, is_last=False)
        else:
            rogue.chunk(request, 2, struct.pack(">QI", at, len(data)), is_last=False)
    rogue.chunk(request, 0, b"")
    return True


def too_long_for_one_chunk(rogue: Rogue, request: Request) -> bool:
    """NBD_EOVERFLOW for what is not to be fragmented."""
    if not request.flags & 4:
        return False
    rogue.chunk(request, 32769, struct.pack(">IH", 75, 0))
    return True


def small_steps(rogue: Rogue, request: Request) -> bool:
    """Block status in steps of a sector, and far beyond what was asked for."""
    if request.command != 7:
        return False
    length = 512 if request.offset % 4096 else 0xFFFFFFFF
    rogue.chunk(request, 5, struct.pack(">IIIII", 7, 512, 0, length, 0))
    return True


@pytest.mark.parametrize("answer", [out_of_order, with_holes, too_long_for_one_chunk, small_steps])
def test_answers_that_are_odd_but_right(answer: Answer, tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", MIB, [(0, NOISE[: 300 * KIB]), (700 * KIB, NOISE[:9999])])
    with Rogue(tmp_path, disk.read_bytes(), answer) as rogue:
        assert export(rogue.uri) == stream(disk)


def test_a_server_of_the_old_days(tmp_path: Path) -> None:
    """Without NBD_OPT_GO, without structured replies."""
    disk = write_disk(tmp_path / "disk", MIB, [(0, NOISE)])
    with Rogue(tmp_path, NOISE, go=False, structured=False) as rogue:
        assert export(rogue.uri) == stream(disk)


WRONG = [
    (32769, struct.pack(">IH", 5, 3) + b"why", "why"),
    (32769, struct.pack(">IH", 5, 0), "Input/output error"),
    (32769, struct.pack(">IH", 5, 9) + b"a\nb\x1b[1m" + bytes(3), "Input/output error"),
    (32770, struct.pack(">IHQ", 5, 0, 700), "at offset 700: Input/output error"),
    (33000, struct.pack(">IH", 5, 0), "Input/output error"),
    (32769, b"", "breaks the protocol"),
    (32769, struct.pack(">IH", 0xFFFFFFFF, 0), "rror"),
    (32769, struct.pack(">IH", 5, 60000), "Input/output error"),
    (1, struct.pack(">Q", 9 * MIB) + b"x" * 512, "not asked for"),
    (1, struct.pack(">Q", 1 << 63) + b"x" * 512, "not asked for"),
    (1, struct.pack(">Q", 0) + b"x" * 511, "not complete"),
    (1, b"1234567", "breaks the protocol"),
    (2, struct.pack(">QI", 0, 1 << 31), "not asked for"),
    (2, struct.pack(">QI", 0, 100), "not complete"),
    (2, b"", "breaks the protocol"),
    (0, b"", "not complete"),
    (5, struct.pack(">III", 7, 512, 0), "not complete"),
    (77, b"", "breaks the protocol"),
]


@pytest.mark.guarantee(5, "an NBD server that breaks the protocol", "exit 1, in one line")
@pytest.mark.parametrize(("kind", "data", "words"), WRONG)
def test_answers_that_are_wrong(kind: int, data: bytes, words: str, tmp_path: Path) -> None:
    answer = where(0, lambda rogue, request: rogue.chunk(request, kind, data))
    with Rogue(tmp_path, NOISE, answer) as rogue:
        result = run(rogue.uri, env=NO_PROGRAMS)
    assert_refused(result, "cannot read", "at offset", words)
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    "packet",
    [
        b"garbage" * 99,
        struct.pack(">IHHQI", 0x668E33EF, 1, 1, 999, 8) + bytes(8),
        struct.pack(">IHHQI", 0x668E33EF, 1, 5, 1, 0xFFFFFFFF),
        struct.pack(">IHHQI", 0x668E33EF, 1, 1, 2, 0xFFFFFFFF) + bytes(64),
        struct.pack(">IIQ", 0x67446698, 0, 2) + bytes(512),
        struct.pack(">IHHQI", 0x12345678, 1, 1, 2, 8),
        b"",
    ],
)
def test_garbage(packet: bytes, tmp_path: Path) -> None:
    def say(rogue: Rogue, _: Request) -> None:
        rogue.sock.sendall(packet)
        rogue.sock.shutdown(socket.SHUT_WR)

    with Rogue(tmp_path, NOISE, where(0, say)) as rogue:
        assert_refused(run(rogue.uri, env=NO_PROGRAMS), "cannot read", "at offset")


def test_an_error_in_the_copy(tmp_path: Path) -> None:
    """Another answer, once all was well in the scan: exit status 1, with the offset."""

    def fail(rogue: Rogue, request: Request) -> bool:
        if request.command or request.length <= 4096 or request.offset < 512 * KIB:
            return False
        rogue.chunk(request, 32769, struct.pack(">IH", 5, 0))
        return True

    disk = noise(8 * MIB)
    with Rogue(tmp_path, disk, fail) as rogue:
        result = run(rogue.uri, env=NO_PROGRAMS)
    assert_failed(result, "at offset", "Input/output error")
    assert len(result.stdout) < 8 * MIB


@pytest.mark.parametrize(
    "payload",
    [b"", b"1", struct.pack(">I", 7), struct.pack(">III", 7, 0, 0), struct.pack(">III", 8, MIB, 0)],
)
def test_block_status_that_says_nothing(payload: bytes, tmp_path: Path) -> None:
    answer = where(0, lambda rogue, request: rogue.chunk(request, 5, payload), command=7)
    with Rogue(tmp_path, NOISE, answer) as rogue:
        assert_refused(run(rogue.uri, env=NO_PROGRAMS), "cannot read", "at offset 0")


def test_block_status_that_fails(tmp_path: Path) -> None:
    error = struct.pack(">IH", 22, 0)
    answer = where(0, lambda rogue, request: rogue.chunk(request, 32769, error), command=7)
    with Rogue(tmp_path, NOISE, answer) as rogue:
        result = run(rogue.uri, env=NO_PROGRAMS)
    assert_refused(result, "cannot read", "at offset 0", "Invalid argument")


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no NBD server"),
        (b"", "closed the connection"),
        (b"NBDMAGICIHAVEOPT\0\3" + bytes(999), "breaks the protocol"),
        (b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", 0x3E889045565A9, 8, 1, 1 << 31), "breaks"),
    ],
)
def test_greetings_that_are_none(greeting: bytes, words: str, tmp_path: Path) -> None:
    with Rogue(tmp_path, NOISE, greeting=greeting) as rogue:
        assert_refused(run(rogue.uri, env=NO_PROGRAMS), "cannot open", words)


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([], "does not say how large"),
        ([struct.pack(">HQH", 0, MIB, 1), struct.pack(">HIII", 3, 3, 4096, MIB)], "3 bytes"),
        ([struct.pack(">HQH", 0, MIB, 1), struct.pack(">HIII", 3, 512, 4096, 0)], "not possible"),
        ([struct.pack(">HQH", 0, MIB, 1), struct.pack(">HIII", 3, 0, 0, 0)], "not possible"),
        ([b"\0\0"], "breaks the protocol"),
    ],
)
def test_exports_that_are_not_possible(infos: List[bytes], words: str, tmp_path: Path) -> None:
    with Rogue(tmp_path, NOISE, infos=infos) as rogue:
        result = run(rogue.uri, env=NO_PROGRAMS)
        assert_refused(result, "cannot open")


IMPATIENT = """
import socket
real = socket.socket.settimeout
socket.socket.settimeout = lambda self, seconds: real(self, seconds and seconds / 100)
"""


@pytest.mark.guarantee(
    5, "a server that says nothing when the disk is opened", "exit 1 after a minute"
)
@pytest.mark.parametrize("option", [7, 8, 10])
def test_a_server_that_says_nothing_is_left_after_a_minute(option: int, tmp_path: Path) -> None:
    env = altered(tmp_path, IMPATIENT)
    with Rogue(tmp_path, NOISE, silent=(option,)) as rogue:
        assert_refused(run(rogue.uri, env=env), "cannot open", "does not answer within")


def test_a_server_that_falls_silent_after_the_handshake(tmp_path: Path) -> None:
    """It may be slow: it is waited for, and a signal ends it."""
    with Rogue(tmp_path, NOISE, where(0, lambda *_: None)) as rogue:
        running = start(rogue.uri)
        while not rogue.requests:
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=10)
        assert running.returncode == -signal.SIGTERM


# How much is asked for


def requests(log: Path) -> List[Tuple[int, int]]:
    """(offset, length) of the reads in nbdkit's log."""
    pairs = re.findall(r"\bRead id=\d+ offset=0x(\w+) count=0x(\w+)", log.read_text())
    return [(int(offset, 16), int(count, 16)) for offset, count in pairs]


def test_what_is_a_hole_is_not_asked_for(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", 256 * MIB, [(MIB, noise(2 * MIB)), (200 * MIB, b"x")])
    log = tmp_path / "log"
    with nbdkit(tmp_path, "--filter=log", "file", disk, f"logfile={log}") as server:
        assert export(server.uri) == stream(disk)
    # Each cluster's head, and then the cluster; the file system's blocks around the last byte.
    data = 2 * MIB + 4096
    assert sum(length for _, length in requests(log)) <= 1.1 * data + 128 * KIB
    assert len(requests(log)) < 50


def test_without_a_scan_everything_is_asked_for_once(tmp_path: Path) -> None:
    disk = write_disk(tmp_path / "disk", 16 * MIB, [(0, noise(4 * MIB)), (8 * MIB, bytes(4 * MIB))])
    log = tmp_path / "log"
    with nbdkit(tmp_path, "--filter=log", "file", disk, f"logfile={log}") as server:
        image = export(server.uri, "--no-scan")
    assert content(image) == disk.read_bytes()
    asked = sorted(requests(log))
    assert sum(length for _, length in asked) == 8 * MIB
    assert all(one[0] + one[1] <= two[0] for one, two in zip(asked, asked[1:]))


# A backup as libvirt makes it


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    made = StorageDaemon(tmp_path)
    yield made
    made.close()


def test_a_pull_backup_of_a_running_disk(tmp_path: Path, daemon: StorageDaemon) -> None:
    """Two nights: the guest writes all the time, and each image is of one moment."""
    image = make(tmp_path / "guest.qcow2", 32 * MIB)
    qemu_io(image, "write -P 1 0 8M", "write -P 2 20M 1M")
    file = {"driver": "file", "filename": str(image)}
    daemon.run("blockdev-add", driver="qcow2", node_name="disk", file=file)
    daemon.run("block-export-add", type="nbd", id="g", node_name="disk", name="g", writable=True)
    guest = daemon.uri.replace("NAME", "g")
    nights = []
    for number, night in enumerate(("monday", "tuesday")):
        moment = raw_of(guest, tmp_path / f"{night}.raw")
        begin_backup(daemon, tmp_path, night, previous="monday" if number else None)
        uri = daemon.uri.replace("NAME", night)
        options = ["--bitmap", "backup-disk", "-b", "monday.qcow2", "-F", "qcow2"] if number else []
        running = start(uri, *options, cwd=tmp_path, env=NO_PROGRAMS, bufsize=0)
        qemu_io(
            guest, f"write -P {7 + number} 1M 3M", "write -P 9 20M 64k", "discard 4M 1M", form="raw"
        )
        head = running.stdout.read(4)
        qemu_io(guest, f"write -P {5 + number} 6M 2M", "write -z 30M 64k", form="raw")
        rest, stderr = running.communicate(timeout=TIMEOUT)
        assert (running.returncode, stderr) == (0, b"")
        (tmp_path / f"{night}.qcow2").write_bytes(head + rest)
        nights.append(tmp_path / f"{night}.qcow2")
        assert judged(nights[-1]) == moment
        end_backup(daemon, night)
    assert nights[1].stat().st_size < 8 * MIB < nights[0].stat().st_size
    assert_refused(run(guest, "--bitmap", "monday"), "no dirty bitmap 'monday'")


def raw_of(uri: str, path: Path) -> bytes:
    shell("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, path)
    return path.read_bytes()


def begin_backup(daemon: StorageDaemon, folder: Path, night: str, previous: Any) -> None:
    """What libvirt does: a scratch image, a bitmap from now on, a frozen one of what changed."""
    scratch = make(folder / f"{night}.scratch", 32 * MIB)
    file = {"driver": "file", "filename": str(scratch)}
    daemon.run("blockdev-add", driver="qcow2", node_name=night, file=file, backing="disk")
    actions = []
    if previous:
        bitmap = {"node": "disk", "name": "backup-disk", "disabled": True}
        merge = {"node": "disk", "target": "backup-disk", "bitmaps": [previous]}
        actions += [
            {"type": "block-dirty-bitmap-add", "data": bitmap},
            {"type": "block-dirty-bitmap-merge", "data": merge},
        ]
    backup = {"device": "disk", "job-id": night, "target": night, "sync": "none"}
    actions += [
        {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": night}},
        {"type": "blockdev-backup", "data": backup},
    ]
    daemon.run("transaction", actions=actions)
    bitmaps = {"bitmaps": [{"node": "disk", "name": "backup-disk"}]} if previous else {}
    daemon.run("block-export-add", type="nbd", id=night, node_name=night, name=night, **bitmaps)


def end_backup(daemon: StorageDaemon, night: str) -> None:
    daemon.run("block-export-del", id=night, mode="hard")
    daemon.run("job-cancel", id=night)
    deadline = time.monotonic() + TIMEOUT
    while any(job["id"] == night for job in daemon.run("query-jobs")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    daemon.run("blockdev-del", node_name=night)
