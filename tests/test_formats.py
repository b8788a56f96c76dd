"""Any image that QEMU opens, read by ourselves or through qemu-nbd: the same bytes from both."""

import hashlib
import json
import os
import re
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
from support import judges
from support.ceph import Cluster
from support.disks import noise, write_disk
from support.images import (
    as_raw,
    create,
    make_encrypted,
    nbd_server,
    overlay,
    shell,
    wrapped,
    write,
)
from support.program import (
    PROGRAM,
    TIMEOUT,
    assert_refused,
    run,
    start,
    stream,
)
from support.pythons import pythons, version

MIB = 1 << 20
SECTOR_SIZE = 512

pytestmark = pytest.mark.usefixtures("temporary")


def through_qemu(path: Path, *options: Any, form: str = "qcow2") -> bytes:
    """The image by way of a private qemu-nbd, which --image-opts always takes."""
    name = str(path).replace(",", ",,")
    return stream(f"driver={form},file.driver=file,file.filename={name}", "--image-opts", *options)


def check_both_ways(path: Path, *options: Any, direct: bool = True) -> bytes:
    """The stream of an image equals that of its raw content, whichever way it is read.

    direct  it is read where there are no programs of QEMU's
    """
    expected = stream(as_raw(path), *options)
    words = ["-f", "qcow2", path, *options]
    images = [stream(*words), through_qemu(path, *options)]
    digests = {hashlib.sha256(image).hexdigest() for image in [expected, *images]}
    assert len(digests) == 1
    alone = run(*words, env={"PATH": "/none"})
    if direct:
        assert (alone.status, alone.stdout) == (0, expected)
    else:
        assert_refused(alone, "cannot run qemu-img", "qemu-utils")
    return expected


@pytest.fixture
def chain(tmp_path: Path) -> List[Path]:
    """Qcow2 on qcow2 on raw, with different cluster sizes."""
    raw = write_disk(
        tmp_path / "bottom.raw", 4 * MIB + 1000, [(MIB, noise(2 * MIB)), (4 * MIB, noise(1000))]
    )
    middle = overlay(tmp_path / "middle.qcow2", raw, "raw", "-o", "cluster_size=4096")
    write(middle, "write -P 1 1M 8192", "write -z 2M 64k", "write -P 2 3145000 1000")
    top = overlay(tmp_path / "top.qcow2", middle, "qcow2", "-o", "cluster_size=512k")
    write(top, "write -P 3 1100000 4096", "write -P 4 3M 1")
    return [raw, middle, top]


def test_a_chain(chain: List[Path], tmp_path: Path) -> None:
    for options in ([], ["-c", "4K"], ["-c", "2M", "-r", "1"]):
        check_both_ways(chain[2], *options)
        check_both_ways(chain[1], *options)


@pytest.mark.parametrize("size", ["2M", "6M", "4194816"])
def test_an_overlay_larger_or_smaller_than_its_backing_file(tmp_path: Path, size: str) -> None:
    base = write_disk(tmp_path / "base.raw", 4 * MIB + 512, [(0, noise(4 * MIB + 512))])
    top = tmp_path / "top.qcow2"
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top, size)
    write(top, "write -P 3 1M 100k")
    check_both_ways(top)


def test_extended_l2_entries(tmp_path: Path) -> None:
    base = write_disk(tmp_path / "base.raw", 4 * MIB, [(0, noise(4 * MIB))])
    top = overlay(tmp_path / "top.qcow2", base, "raw", "-o", "extended_l2=on,cluster_size=128k")
    write(top, "write -P 1 12k 4k", "write -z 1M 8k", "discard 2M 128k")
    check_both_ways(top)


def test_internal_snapshots(tmp_path: Path) -> None:
    image = write(create(tmp_path / "a.qcow2", "4M"), "write -P 1 0 2M")
    shell("qemu-img", "snapshot", "-c", "one", image)
    write(image, "write -P 2 1M 2M")
    check_both_ways(image)


def test_compressed_clusters(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "a.raw", 4 * MIB, [(0, b"text" * 500_000)])
    shell("qemu-img", "convert", "-c", "-O", "qcow2", raw, tmp_path / "a.qcow2")
    check_both_ways(tmp_path / "a.qcow2")


def test_an_external_data_file(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", "4M", "-o", f"data_file={tmp_path}/a.data")
    write(image, "write -P 1 1M 1M")
    check_both_ways(image)


def test_a_data_file_that_only_the_backing_name_mentions(tmp_path: Path) -> None:
    """`qemu-img info` lists no such file, and names that look like its own lead elsewhere."""
    data = tmp_path / "data"
    middle = create(tmp_path / "middle.qcow2", "1M", "-o", f"data_file={data}")
    write(middle, "write -P 7 0 1M")
    shell("qemu-img", "amend", "-f", "qcow2", "-o", "data_file=", middle)
    os.truncate(middle, 8 * MIB)
    files = {
        key: {"driver": "file", "filename": str(path)}
        for key, path in (("file", middle), ("data-file", data))
    }
    name = "json:" + json.dumps({"driver": "qcow2", **files})
    top = tmp_path / "top.qcow2"
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", name, top, "1M")
    check_both_ways(top, direct=False)


@pytest.mark.guarantee(2, "a backing file's name in JSON", "QEMU reads the chain")
@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_a_backing_name_in_json(tmp_path: Path, form: str) -> None:
    """Whatever its options mean, QEMU knows best."""
    base = write(create(tmp_path / "base", "2M", form=form), "write -P 7 512 1M", form=form)
    options = {} if form == "qcow2" else {"offset": 512, "size": 2 * MIB - 512}
    node = {"driver": form, **options, "file": {"driver": "file", "filename": str(base)}}
    top = tmp_path / "top.qcow2"
    shell(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", f"json:{json.dumps(node)}", "-F", form, top
    )
    check_both_ways(top, direct=False)


def test_an_encrypted_image_is_refused_in_qemus_words(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    secret = ["--object", "secret,id=s,data=abc"]
    options = ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"]
    make_encrypted("qemu-img", "create", "-q", "-f", "qcow2", *secret, *options, image, "1M")
    result = run("-f", "qcow2", image)
    assert_refused(result, str(image), "encrypt")


def test_dmg(tmp_path: Path) -> None:
    """A disk image of Apple's: a table of stored blocks, written here by hand."""
    content = noise(MIB)
    image = tmp_path / "a.dmg"
    image.write_bytes(dmg(content))
    parsed = stream("-f", "dmg", image)
    (tmp_path / "a.qcow2").write_bytes(parsed)
    assert judges.qemu_read(tmp_path / "a.qcow2") == content


def dmg(content: bytes) -> bytes:
    """The smallest dmg that there is: one raw chunk, one property list, one trailer."""
    import base64
    import struct

    sectors = len(content) // 512
    mish = struct.pack(">4sIQQQII24sII128s", b"mish", 1, 0, sectors, 0, 0, 0, b"", 2, 0, b"")
    mish = mish[:200].ljust(200, b"\0") + struct.pack(">I", 2)
    mish += struct.pack(">IIQQQQ", 1, 0, 0, sectors, 0, len(content))
    mish += struct.pack(">IIQQQQ", 0xFFFFFFFF, 0, sectors, 0, len(content), 0)
    table = base64.b64encode(mish)
    plist = (
        b"<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict>"
        b"<key>Data</key><data>" + table + b"</data></dict></array></dict></dict></plist>"
    )
    koly = bytearray(512)
    koly[0:12] = struct.pack(">4sII", b"koly", 4, 512)
    struct.pack_into(">QQ", koly, 24, 0, len(content))
    struct.pack_into(">QQ", koly, 216, len(content), len(plist))
    struct.pack_into(">Q", koly, 492, sectors)
    return content + plist + bytes(koly)


def test_the_difference_of_two_members_reads_only_what_they_do_not_share(
    chain: List[Path], tmp_path: Path
) -> None:
    raw, middle, top = chain
    for new, base, form in ((top, middle, "qcow2"), (top, raw, "raw"), (middle, raw, "raw")):
        options: List[Any] = ["-b", base.name, "-F", form, "--diff", base, "--diff-format", form]
        image = stream("-f", "qcow2", new, *options)
        difference = tmp_path / "difference.qcow2"
        difference.write_bytes(image)
        judges.qemu_check(difference)
        shell("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", new, difference)
        assert len(image) < 2 * MIB
        plain = stream(as_raw(new), "--diff", as_raw(base, form), *options[:4])
        assert image == plain


def test_what_a_chain_shares_is_not_read(tmp_path: Path) -> None:
    base = write(create(tmp_path / "base.qcow2", "64M"), "write -P 1 0 64M")
    top = write(overlay(tmp_path / "top.qcow2", base, "qcow2"), "write -P 2 32M 64k")
    log = tmp_path / "trace"
    options = ["-f", "qcow2", top, "--diff", base]
    shell("strace", "-e", "preadv,preadv2,pread64", "-o", log, "python3", PROGRAM, *options)
    lines = [line for line in log.read_text().splitlines() if "preadv" in line]
    # Three headers and three L2 tables, two of them again for the copy, and what differs.
    assert sum(int(line.rsplit("=", 1)[1]) for line in lines) < 10 * 65536


NAMES = [
    "a,b=c",
    'quo"te',
    "sp ace",
    "-dash",
    "new\nline",
    "äöü 日本",
    "co:lon",
    "json:{}",
    "back\\slash",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_names_mean_nothing(tmp_path: Path, name: str, form: str) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", form, raw, tmp_path / "image")
    (tmp_path / "image").rename(tmp_path / name)
    assert stream("-f", form, "--", name, cwd=tmp_path) == stream(raw)


@pytest.mark.parametrize("form", ["qcow2", "vmdk"])
def test_a_folder_that_looks_like_an_address(tmp_path: Path, form: str) -> None:
    """What lies beside the image is looked for by its own name, too: relative to nothing else."""
    folder = tmp_path / "2026-11-21T10:00"
    folder.mkdir()
    name = f"top.{form}"
    if form == "qcow2":
        below = write(create(folder / "below.qcow2", "1M"), "write -P 1 0 1M")
        overlay(folder / name, Path(below.name), "qcow2")
    else:
        raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
        flat = ["-o", "subformat=monolithicFlat"]
        shell("qemu-img", "convert", "-O", "vmdk", *flat, raw, tmp_path / name)
        below = (tmp_path / "top-flat.vmdk").rename(folder / "top-flat.vmdk")
        (tmp_path / name).rename(folder / name)
    expected = stream("-f", form, folder / name)
    assert stream("-f", form, f"{folder.name}/{name}", cwd=tmp_path) == expected
    os.truncate(below, below.stat().st_size - MIB // 2)
    assert_refused(run("-f", form, f"{folder.name}/{name}", cwd=tmp_path), "is truncated")


def test_an_nbd_export(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", 4 * MIB, [(MIB, noise(MIB))])
    address = tmp_path / "socket"
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", "-k", str(address), str(raw)])
    try:
        while not address.exists():
            time.sleep(0.02)
        options = f"driver=nbd,server.type=unix,server.path={address}"
        assert stream("--image-opts", options) == stream(raw)
    finally:
        server.terminate()
        server.wait()


def check_against_qemu(tmp_path: Path, options: str) -> None:
    """The image of an option string reads as what qemu-img makes of it."""
    expected = tmp_path / "expected.raw"
    shell("qemu-img", "convert", "--image-opts", options, "-O", "raw", expected)
    assert any(expected.read_bytes())
    assert stream("--image-opts", options) == stream(expected)


@pytest.mark.guarantee(2, "a server that calls something a hole, but not zeros", "it is read")
def test_a_hole_that_is_no_zeros(tmp_path: Path) -> None:
    """A server may say that something is not allocated, and not what it reads as."""
    plugin = tmp_path / "plugin.sh"
    plugin.write_text(
        "case $1 in\n"
        "get_size) echo 1048576;;\n"
        "pread) head -c $3 /dev/zero | tr '\\0' A;;\n"
        "can_extents) ;;\n"
        "extents) echo 0 1048576 hole;;\n"
        "*) exit 2;;\n"
        "esac\n"
    )
    plugin.chmod(0o755)
    with nbd_server(tmp_path, "sh", plugin) as (_, options):
        check_against_qemu(tmp_path, options)


def test_a_server_for_one_client_and_a_file_that_nothing_names(tmp_path: Path) -> None:
    """What QEMU reads is known when it shows the image; by then it holds the one connection."""
    raw = write_disk(tmp_path / "raw", 4 * MIB, [(0, noise(4 * MIB))])
    address = tmp_path / "nbd"
    words = ["qemu-nbd", "-t", "-r", "-f", "raw", "--shared=1", "-k", str(address), str(raw)]
    with subprocess.Popen(words) as server:
        try:
            while not address.exists():
                time.sleep(0.02)
            data = f"data_file={tmp_path / 'data'}"
            uri = f"nbd+unix:///?socket={address}"
            top = tmp_path / "top.qcow2"
            backing = ["-u", "-F", "raw", "-b", uri]
            shell("qemu-img", "create", "-q", "-f", "qcow2", "-o", data, *backing, top, "4M")
            write(top, "write -P 5 1M 64k")
            expected = as_raw(top)
            assert stream("-f", "qcow2", top) == stream(expected)
            program = start("-f", "qcow2", top)
            program.stdout.read(1)
            os.utime(tmp_path / "data")
            assert b"changed while" in program.communicate(timeout=TIMEOUT)[1]
        finally:
            server.kill()


FILTERS = {
    "file": "",
    "file.file": "file.driver=compress,",
    "file.image": "file.driver=blkdebug,",
}


@pytest.mark.guarantee(2, "what an overlay does not hold itself", "the backing file shows through")
@pytest.mark.parametrize("node", FILTERS)
def test_a_part_of_an_overlay(tmp_path: Path, node: str) -> None:
    """What the overlay has not got itself is not zeros: its backing file shows through."""
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    top = overlay(tmp_path / "top.qcow2", raw, "raw")
    part = f"driver=raw,offset=65536,size=524288,{FILTERS[node]}"
    check_against_qemu(tmp_path, f"{part}{node}.driver=qcow2,{node}.file.filename={top}")


@pytest.mark.guarantee(
    2, "a disk that ends within a sector, over a longer backing file", "it reads as zeros there"
)
def test_an_overlay_on_a_part_of_an_overlay(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    middle = overlay(tmp_path / "middle.qcow2", raw, "raw")
    inner = {"driver": "qcow2", "file": {"driver": "file", "filename": str(middle)}}
    part = {"driver": "raw", "offset": 65536, "size": 524288, "file": inner}
    top = tmp_path / "top.qcow2"
    name = f"json:{json.dumps(part)}"
    shell("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", name, top, "512K")
    assert stream("-f", "qcow2", top) == stream(as_raw(top))
    assert any(as_raw(top).read_bytes())


@pytest.mark.parametrize("way", ["raw", "option string"])
@pytest.mark.parametrize("trust", [[], ["--trust-layout"]])
def test_a_shorter_disk_that_ends_within_a_sector(
    tmp_path: Path, way: str, trust: List[str]
) -> None:
    """No layout speaks of the zeros behind its end, where the backing file has other bytes."""
    size = (1 << 20) + 1000
    write_disk(tmp_path / "base.raw", 2 << 20, [(0, noise(2 << 20))])
    new = write_disk(tmp_path / "new.raw", size, [(0, noise(2 << 20)[:size])])
    words = [str(new)]
    if way == "option string":
        words = ["--image-opts", f"driver=raw,file.driver=file,file.filename={new}"]
    options = ["--layout", "-", "-b", "base.raw", "-F", "raw", *trust]
    (tmp_path / "overlay.qcow2").write_bytes(stream(*words, *options, stdin=b"[]"))
    judges.qemu_compare(new, tmp_path / "overlay.qcow2")


@pytest.mark.guarantee(7, "an option string that would open a disk for writing", "refused")
def test_an_option_string_that_would_write_is_refused(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", write_disk(tmp_path / "raw", MIB, []), "raw")
    for options in ("read-only=off", "file.read-only=off", "noread-only"):
        node = f"driver=qcow2,{options},file.driver=file,file.filename={top}"
        assert_refused(run("--image-opts", node), "leave read-only=… out")
    stream("--image-opts", f"driver=qcow2,read-only=on,file.read-only=yes,file.filename={top}")


def test_what_qemu_says_is_shown_without_its_own_options(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "a, b'.raw", MIB, [(0, noise(MIB))])
    for words in (["-f", "vmdk", str(raw)], ["-f", "vmkd", str(raw)]):
        result = run(*words)
        assert_refused(result, "cannot open '/", "a, b'.raw': ")
        assert "driver=" not in result.stderr


@pytest.mark.xdist_group("ceph")
def test_rbd_without_a_mapped_device(ceph: Cluster, tmp_path: Path) -> None:
    ceph.rbd("create", "--size", "8M", "direct")
    ceph.io("direct", "write -P 1 1M 64k", "write -P 2 5M 512")
    ceph.rbd("snap", "create", "--no-progress", "direct@night")
    layout = ceph.rbd("diff", "--format", "json", "direct@night")
    options = f"driver=rbd,pool=rbd,image=direct,snapshot=night,conf={ceph.conf}"
    image = stream("--image-opts", options, "--layout", "-", stdin=layout.encode())
    (tmp_path / "a.qcow2").write_bytes(image)
    shell("qemu-img", "compare", "-f", "raw", "-F", "qcow2", ceph.url("direct@night"),
          tmp_path / "a.qcow2")  # fmt: skip
    assert image == stream("--image-opts", options)


def test_a_block_device_in_an_option_string(
    tmp_path: Path, loop_device: Callable[..., str]
) -> None:
    image = write(create(tmp_path / "a,b.qcow2", "1M"), "write -P 7 0 64k")
    device = loop_device(image)
    expected = stream(as_raw(image))
    assert stream("--image-opts", f"driver=qcow2,file.filename={device}") == expected
    name = str(image).replace(",", ",,")
    assert stream("--image-opts", f"driver=qcow2,file.filename={name}") == expected


def test_block_devices_hold_images_too(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    image = write(create(tmp_path / "a.qcow2", "8M"), "write -P 1 1M 1M")
    expected = stream("-f", "qcow2", image)
    device = loop_device(image)
    assert stream("-f", "qcow2", device) == expected
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "vdi", raw, tmp_path / "a.vdi")
    assert stream("-f", "vdi", loop_device(tmp_path / "a.vdi")) == stream(raw)


def test_what_qemu_says_is_passed_on(tmp_path: Path) -> None:
    raw = write_disk(tmp_path / "raw", MIB, [(0, noise(MIB))])
    assert_refused(run("-f", "qcow2", raw), "raw", "no qcow2 image")
    assert_refused(run("-f", "nonsense", raw), "Unknown driver 'nonsense'", "vpc")
    assert_refused(run("-f", "qcow2", tmp_path / "none"), "none", "No such file")
    assert_refused(run("-f", "a b", raw), "format")
    base = create(tmp_path / "base.qcow2", "1M")
    top = overlay(tmp_path / "top.qcow2", base, "qcow2")
    base.unlink()
    assert_refused(run("-f", "qcow2", top), "base.qcow2", "No such file")
    assert_refused(run("-f", "qcow2", raw, "-d"), "--data-file", "--format qcow2")
    assert_refused(run("--image-opts", "file.filename=x"), "driver")
    assert_refused(run("--image-opts", "driver=nbd,server.type=unix,server.path=/none"), "/none")


def test_an_image_that_a_running_vm_holds(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", "1M")
    vm = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert vm.stdin is not None
    try:
        deadline = time.monotonic() + 10
        while run("-f", "qcow2", image).status == 0 and time.monotonic() < deadline:
            time.sleep(0.05)  # until it has the lock
        assert_refused(run("-f", "qcow2", image), "running VM", "snapshot")
    finally:
        vm.communicate(timeout=TIMEOUT)


def test_a_member_that_changes_while_it_is_read(chain: List[Path]) -> None:
    program = start("-f", "qcow2", chain[2], "-c", "4K")
    program.stdout.read(10_000)
    os.utime(chain[0])
    stderr = program.communicate(timeout=TIMEOUT)[1].decode()
    assert program.returncode == 1
    assert "bottom.raw" in stderr


@pytest.mark.guarantee(6, "an image that is replaced while QEMU opens it", "refused")
@pytest.mark.parametrize("form", ["vdi", "vmdk", "vhdx"])
def test_an_image_that_is_replaced_while_it_is_opened(tmp_path: Path, form: str) -> None:
    for name, byte in (("cur", 1), ("new", 2)):
        image = create(tmp_path / name, "8M", form=form)
        write(image, f"write -P {byte} {byte}M 1M", form=form)
    env = wrapped(tmp_path, f"[ -e {tmp_path}/new ] && mv {tmp_path}/new {tmp_path}/cur")
    result = run("-f", form, tmp_path / "cur", env=env)
    assert_refused(result, "cur", "was replaced while it was opened")


@pytest.mark.guarantee(6, "an image that ends before its data", "exit 1 before the first byte")
@pytest.mark.parametrize("missing", [1, 511, 512, MIB])
def test_a_truncated_image(tmp_path: Path, missing: int) -> None:
    """QEMU would show zeros, which its own allowance for the last sector of a raw disk hides."""
    image = write(create(tmp_path / "a.qcow2", "4M"), "write -P 1 0 4M")
    stored = max(each["offset"] + each["length"] for each in judges.qemu_map(image))
    os.truncate(image, stored - missing)
    assert_refused(run("-f", "qcow2", image), "is truncated")
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    assert_refused(run("--image-opts", node), "is truncated")
    top = write(overlay(tmp_path / "top.qcow2", image, "qcow2"), "write -c -P 2 0 64k")
    assert_refused(run("-f", "qcow2", top), "is truncated")


def test_a_truncated_image_that_was_copied_without_its_holes(tmp_path: Path) -> None:
    """QEMU says that what lies behind the end is zeros, and data all the same."""
    image = create(tmp_path / "a.qcow2", "64M", "-o", "preallocation=metadata")
    write(image, "write -P 5 20M 40M")
    stream("-f", "qcow2", image)
    os.truncate(image, 50 * MIB)
    assert judges.qemu_map(image)[-1]["zero"]
    assert_refused(run("-f", "qcow2", image), "is truncated")
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    assert_refused(run("--image-opts", node), "is truncated")


@pytest.mark.parametrize("form, unit", [("qcow2", 65536), ("qcow", 4096)])
def test_a_truncated_image_whose_tables_are_missing(tmp_path: Path, form: str, unit: int) -> None:
    """What an L2 table behind the end would map seems never to have been written."""
    image = create(tmp_path / "a", "4G", form=form)
    for gigabyte in range(4):
        write(image, f"write -P 7 {gigabyte}G {unit}", form=form)
    content = image.read_bytes()
    cuts = range(unit * 3 if form == "qcow2" else 48, len(content), unit)  # from the L1 table on
    assert len(cuts) > 4
    for cut in cuts:
        image.write_bytes(content[:cut])
        result = run("-f", form, image)
        assert_refused(result, "/a'")
        assert "is truncated" in result.stderr or "cannot open" in result.stderr
        node = f"driver={form},file.driver=file,file.filename={image}"
        assert_refused(run("--image-opts", node), str(image))


def test_the_extent_of_a_flat_vmdk(tmp_path: Path) -> None:
    """Its name stands in the descriptor; it is watched, and its end is known."""
    raw = write_disk(tmp_path / "a.raw", 3 * MIB, [(0, noise(3 * MIB))])
    image, extent = tmp_path / "a.vmdk", tmp_path / "a-flat.vmdk"
    flat = ("-o", "subformat=monolithicFlat")
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", *flat, raw, image)
    assert stream("-f", "vmdk", image) == stream(raw)
    program = start("-f", "vmdk", image)
    program.stdout.read(100_000)
    os.utime(extent)
    stderr = program.communicate(timeout=TIMEOUT)[1]
    assert (program.returncode, b"a-flat.vmdk' changed while" in stderr) == (1, True), stderr
    os.truncate(extent, 2 * MIB)
    assert_refused(run("-f", "vmdk", image), "a-flat.vmdk", "is truncated")


@pytest.mark.guarantee(
    6, "the same of other formats, where QEMU would read zeros", "exit 1 before the first byte"
)
@pytest.mark.parametrize("form", ["vdi", "vmdk", "qcow", "qed", "vpc", "parallels", "vhdx"])
def test_a_truncated_image_of_another_format(tmp_path: Path, form: str) -> None:
    raw = write_disk(tmp_path / "a.raw", 8 * MIB, [(0, noise(8 * MIB))])
    image = tmp_path / f"a.{form}"
    shell("qemu-img", "convert", "-f", "raw", "-O", form, raw, image)
    expected = stream("-f", form, image)
    size = image.stat().st_size
    for left in (size - 1, size - 511, 2 * MIB):
        os.truncate(image, left)
        if form == "vpc" and left > 2 * MIB:  # its end is a copy of its beginning
            assert stream("-f", form, image) == expected
            continue
        by_us = left % SECTOR_SIZE or form not in ("qed", "vpc", "vhdx")  # else by QEMU
        assert_refused(run("-f", form, image), "is truncated" if by_us else "a.")


def patch_vhd(image: Path, **fields: Any) -> None:
    """Set fields of a VHD's footer and of its copy, as their names say, and the checksum."""
    content = bytearray(image.read_bytes())
    places = {"creator": (28, ">4s"), "current_size": (48, ">Q"), "kind": (60, ">I")}
    ends = (0, len(content) - SECTOR_SIZE)
    for footer in (end for end in ends if content[end : end + 8] == b"conectix"):
        for name, value in fields.items():
            offset, code = places[name]
            struct.pack_into(code, content, footer + offset, value)
        struct.pack_into(">I", content, footer + 64, 0)
        checksum = ~sum(content[footer : footer + SECTOR_SIZE]) & 0xFFFFFFFF
        struct.pack_into(">I", content, footer + 64, checksum)
    image.write_bytes(content)


@pytest.mark.guarantee(6, "a VHD or VMDK that is a difference, without its parent", "refused")
@pytest.mark.parametrize("way", ["-f", "--image-opts", "below"])
def test_a_vhd_that_holds_a_difference(tmp_path: Path, way: str) -> None:
    """QEMU takes it for a whole disk: its parent's name stands in a place that it never reads."""
    image = tmp_path / "a.vhd"
    raw = write_disk(tmp_path / "a.raw", 4 * MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "vpc", raw, image)
    patch_vhd(image, kind=4)
    words = ["-f", "vpc", str(image)]
    if way == "--image-opts":
        words = ["--image-opts", f"driver=vpc,file.driver=file,file.filename={image}"]
    elif way == "below":
        words = ["-f", "qcow2", str(overlay(tmp_path / "top.qcow2", image, "vpc"))]
    assert_refused(run(*words), "a.vhd", "a differencing VHD")


@pytest.mark.guarantee(6, "a VHD of which QEMU would not read all", "refused")
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_a_vhd_of_which_qemu_would_not_read_the_end(tmp_path: Path, kind: str) -> None:
    """Of programs that it doesn't know, it takes a disk's size from cylinders and heads."""
    image = tmp_path / "a.vhd"
    raw = write_disk(tmp_path / "a.raw", 4 * MIB, [(0, noise(MIB))])
    shell("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={kind}", raw, image)
    for creator in (b"vbox", b"win "):
        patch_vhd(image, creator=creator)
        stream("-f", "vpc", image)
    patch_vhd(image, creator=b"vbox", current_size=100 * MIB)
    assert_refused(run("-f", "vpc", image), "a.vhd", "104857600 bytes")


def esx_snapshot(folder: Path) -> Tuple[Path, Path]:
    """A descriptor, and its extent: 32 KiB at 0 and at 4 MiB, each behind its own grain table."""
    write_disk(folder / "base-flat.vmdk", 8 * MIB, [(0, noise(8 * MIB))])
    head = "# Disk DescriptorFile\nversion=1\n"
    (folder / "base.vmdk").write_text(
        head + 'CID=11111111\nparentCID=ffffffff\ncreateType="vmfs"\n'
        'RW 16384 VMFS "base-flat.vmdk"\n'
    )
    (folder / "snapshot.vmdk").write_text(
        head + 'CID=22222222\nparentCID=11111111\ncreateType="vmfsSparse"\n'
        'parentFileNameHint="base.vmdk"\nRW 16384 VMFSSPARSE "snapshot-delta.vmdk"\n'
    )
    header = struct.pack("<4s10I", b"COWD", 1, 3, 16384, 1, 4, 4, 200, 0, 0, 0)
    directory = struct.pack("<4I", 8, 0, 104, 0)
    extent = bytearray(header.ljust(4 * SECTOR_SIZE, b"\0") + directory)
    for table in (8, 104):
        extent = extent.ljust(table * SECTOR_SIZE, b"\0")
        extent += struct.pack("<64I", *range(table + 32, table + 96)).ljust(32 * SECTOR_SIZE, b"\0")
        extent += noise(64 * SECTOR_SIZE, table)
    (folder / "snapshot-delta.vmdk").write_bytes(extent)
    return folder / "snapshot.vmdk", folder / "snapshot-delta.vmdk"


def test_a_truncated_snapshot_of_esx(tmp_path: Path) -> None:
    """Where a grain table is missing, its parent would show."""
    image, extent = esx_snapshot(tmp_path)
    expected = stream(as_raw(image, "vmdk"))
    assert stream("-f", "vmdk", image) == expected
    assert noise(64 * SECTOR_SIZE, 104) in expected
    for sectors in (*range(199, 5, -9), 135, 104, 103, 8, 7):
        os.truncate(extent, sectors * SECTOR_SIZE)
        assert_refused(run("-f", "vmdk", image), "snapshot", "vmdk'")


def test_a_vmdk_whose_parent_has_no_name(tmp_path: Path) -> None:
    """VirtualBox knows a parent by its UUID; QEMU by its file's name alone."""
    base = create(tmp_path / "base.vmdk", "4M", form="vmdk")
    write(base, "write -P 1 1M 1M", form="vmdk")
    image = tmp_path / "a.vmdk"
    shell("qemu-img", "create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", image)
    assert stream("-f", "vmdk", image) == stream("-f", "vmdk", base)
    content = image.read_bytes()
    (hint,) = re.findall(rb'parentFileNameHint="[^"]*"\n', content)
    image.write_bytes(content.replace(hint, b"#".ljust(len(hint) - 1) + b"\n"))
    assert_refused(run("-f", "vmdk", image), "a.vmdk", "a differencing VMDK")


def test_a_short_data_file(tmp_path: Path) -> None:
    """What lies behind its end is zeros, as QEMU has it; which other file an option names, too."""
    data = tmp_path / "data"
    image = create(tmp_path / "a.qcow2", "4M", "-o", f"data_file={data}")
    write(image, "write -P 1 0 4M")
    node = f"driver=qcow2,file.driver=file,file.filename={image}"
    copy = write_disk(tmp_path / "copy", 4 * MIB, [(0, noise(4 * MIB))])
    other = f"{node},data-file.driver=file,data-file.filename={copy}"
    assert stream("--image-opts", other) == stream(copy)
    os.truncate(data, 3 * MIB)
    assert stream("-f", "qcow2", image) == stream("--image-opts", node) == stream(as_raw(image))


@pytest.mark.parametrize("missing", [1, 512])
def test_a_truncated_extent_of_a_vmdk(tmp_path: Path, missing: int) -> None:
    raw = write_disk(tmp_path / "a.raw", 3 * MIB, [(0, noise(3 * MIB))])
    flat = ("-o", "subformat=monolithicFlat")
    shell("qemu-img", "convert", "-f", "raw", "-O", "vmdk", *flat, raw, tmp_path / "a.vmdk")
    os.truncate(tmp_path / "a-flat.vmdk", 3 * MIB - missing)
    assert_refused(run("-f", "vmdk", tmp_path / "a.vmdk"), "a-flat.vmdk", "is truncated")


@pytest.mark.parametrize("size", [100_000, 65536 * 3 + 1])
def test_a_raw_backing_file_that_ends_within_a_sector(tmp_path: Path, size: int) -> None:
    backing = tmp_path / "base.raw"
    backing.write_bytes(noise(size))
    image = create(tmp_path / "a.qcow2", "1M", "-b", str(backing), "-F", "raw")
    assert stream("-f", "qcow2", image) == stream(as_raw(image))


@pytest.mark.parametrize("python", pythons(), ids=version)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_chain_with_names_beyond_ascii(tmp_path: Path, python: str, locale: str) -> None:
    base = write(create(tmp_path / "bäse.qcow2", "1M"), "write -P 5 64k 100k")
    top = write(overlay(tmp_path / "töp.qcow2", base, "qcow2"), "write -P 6 512k 64k")
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    image = stream("-f", "qcow2", top, env=env, python=python)
    assert image == stream(as_raw(top))


@pytest.mark.guarantee(
    2,
    "a backing file's name that QEMU can't print",
    "the file that QEMU reads is read, and watched",
)
def test_a_backing_file_whose_name_qemu_cannot_print(tmp_path: Path) -> None:
    shown = write_disk(tmp_path / "\N{REPLACEMENT CHARACTER}.raw", 8 * MIB, [(0, noise(8 * MIB))])
    hidden = os.fsencode(tmp_path) + b"/\xff.raw"
    Path(os.fsdecode(hidden)).write_bytes(noise(8 * MIB, 1))
    top = tmp_path / "top.qcow2"
    words = [b"qemu-img", b"create", b"-q", b"-f", b"qcow2", b"-b", hidden, b"-F", b"raw"]
    subprocess.run([*words, os.fsencode(top)], check=True)
    assert stream("-f", "qcow2", top) == stream(os.fsdecode(hidden)) != stream(shown)
    program = start("-f", "qcow2", top)
    program.stdout.read(1)
    os.utime(hidden)
    assert b"changed while" in program.communicate(timeout=TIMEOUT)[1]


def test_a_truncated_image_whose_name_qemu_cannot_print(tmp_path: Path) -> None:
    """By QEMU, as its backing file is a VMDK. The last L2 table, and what that says of, is gone."""
    base = create(tmp_path / "base.vmdk", "4G", form="vmdk")
    top = overlay(tmp_path / "top.qcow2", base, "vmdk")
    for gigabyte in range(4):
        write(top, f"write -P 7 {gigabyte}G 64k")
    hidden = os.fsencode(tmp_path) + b"/B\xf6.qcow2"
    top.rename(os.fsdecode(hidden))
    assert run("-f", "qcow2", hidden, "--measure").status == 0
    os.truncate(hidden, os.stat(hidden).st_size - 2 * 65536)
    assert_refused(run("-f", "qcow2", hidden), "is truncated")


def test_a_truncated_backing_file_whose_name_qemu_cannot_print(tmp_path: Path) -> None:
    hidden = os.fsencode(tmp_path) + b"/B\xf6\xdfe.qcow2"
    base = write(create(tmp_path / "base.qcow2", "4M"), "write -P 1 0 4M")
    base.rename(os.fsdecode(hidden))
    top = tmp_path / "top.qcow2"
    words = [b"qemu-img", b"create", b"-q", b"-f", b"qcow2", b"-b", hidden, b"-F", b"qcow2"]
    subprocess.run([*words, os.fsencode(top)], check=True)
    assert stream("-f", "qcow2", top) == stream("-f", "qcow2", top, "-m", "1")
    os.truncate(hidden, 3 * MIB)
    assert_refused(run("-f", "qcow2", top), "is truncated")


def test_a_remote_backing_file_with_a_local_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    remote = write_disk(tmp_path / "remote.raw", MIB, [(0, noise(MIB))])
    url = f"nbd+unix:///?socket={tmp_path}/s"
    Path(url).parent.mkdir(parents=True)
    write_disk(Path(url), MIB, [(0, noise(MIB, 1))])
    server = ["nbdkit", "-f", "-U", f"{tmp_path}/s", "file", str(remote)]
    with subprocess.Popen(server) as nbdkit:
        try:
            while not Path("s").exists():
                time.sleep(0.02)
            create(tmp_path / "top.qcow2", "1M", "-b", url, "-F", "raw")
            assert stream("-f", "qcow2", "top.qcow2") == stream(remote)
        finally:
            nbdkit.terminate()


OPTION_STRINGS = {
    "raw": "driver=raw,offset=512,size=7M,file.driver=file,file.filename=RAW",
    "quorum": "driver=quorum,vote-threshold=1,children.0.driver=raw,"
    "children.0.file.driver=file,children.0.file.filename=RAW",
    "blkdebug": "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=RAW",
}


@pytest.mark.parametrize("kind", OPTION_STRINGS)
def test_a_changed_file_behind_an_option_string(tmp_path: Path, kind: str) -> None:
    raw = write_disk(tmp_path / "big.raw", 8 * MIB, [(0, noise(8 * MIB))])
    name = OPTION_STRINGS[kind].replace("RAW", str(raw))
    program = start("--image-opts", name)
    program.stdout.read(100_000)
    os.utime(raw)
    stderr = program.communicate(timeout=TIMEOUT)[1]
    assert program.returncode == 1
    assert b"big.raw" in stderr
