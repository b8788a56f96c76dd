#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Turn a disk into a qcow2 image on standard output, in one forward-only stream.

The image leaves in file order, so that it can go into a pipe, a socket or a file alike:

    +--------+----------+----------+-------+--------+---------------+
    | header | refcount | refcount |  L1   |   L2   | data clusters |
    |        |  table   |  blocks  | table | tables | (guest order) |
    +--------+----------+----------+-------+--------+---------------+

Every part is padded to whole clusters. The header comes first and says where all the rest
is, therefore everything must be counted before the first byte is written. The program goes
through five rooms, one after the other, and the file below is arranged in the same order:

    options -> sources -> scan -> plan -> write

    format   what qcow2 is: numbers to bytes, and bytes to numbers
    sources  where guest bytes are stored, and how they are read
    scan     what each guest cluster will be: unallocated, zero or data
    plan     where everything goes in the file, and how large it becomes
    write    the stream

The format is specified in QEMU's docs/interop/qcow2.rst, called "the specification" below.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C shall not end in a traceback, not even while the rest is imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import itertools
import operator
import os
import re
import select
import stat
import struct
import sys
import termios
import time
from array import array
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

__version__ = "2.0.0"

PROGRAM = "qcow2_to_stdout.py"


class Error(Exception):
    """Something that the user, the disk or the consumer did: one line on stderr, exit 1."""


class ReadError(Error):
    """Some bytes of a disk can't be read; others may."""


def quoted(name: str) -> str:
    """A file's name as it may stand in a message: on one line, without control characters."""
    return "'" + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) + "'"


def reason(error: Exception) -> str:
    """What the system says of an error, without Python's own decoration."""
    number = getattr(error, "errno", None)
    hint = "; raise the limit of open files (ulimit -n)" if number == errno.EMFILE else ""
    return os.strerror(number) + hint if number else str(error)


# ---------------------------------------------------------------------------------------------
# Format: what qcow2 is, in both directions. Constants named as in the specification; pure
# functions between numbers and bytes. Nothing here knows of files, disks or options.
# ---------------------------------------------------------------------------------------------

MAGIC = b"QFI\xfb"  # the first bytes of an image
SECTOR_SIZE = 512  # QEMU counts virtual sizes in these
DEFAULT_CLUSTER_SIZE = 64 << 10
MIN_EXTENDED_CLUSTER_SIZE = 16 << 10  # with extended L2 entries: 32 subclusters of a sector
CLUSTER_SIZES = tuple(1 << bits for bits in range(9, 22))
REFCOUNT_WIDTHS = (1, 2, 4, 8, 16, 32, 64)
ENTRY_SIZE = 8  # bytes of one entry in the L1, an L2 and the refcount table
EXTENDED_ENTRY_SIZE = 16  # bytes of an extended L2 entry
ALL_DATA = (1 << 32) - 1  # an extended entry's bitmap: all 32 subclusters hold data
ALL_ZEROS = ALL_DATA << 32  # all read as zeros
COMPRESSION_TYPES = {"zlib": 0, "zstd": 1}

OFFSET_MASK = (1 << 56) - (1 << 9)  # the bits of an entry that hold a host offset
OFLAG_COPIED = 1 << 63  # the cluster's refcount is exactly one
OFLAG_COMPRESSED = 1 << 62  # the other bits are a compressed cluster descriptor's
OFLAG_ZERO = 1 << 0  # version 3: the cluster reads as zeros

INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
KNOWN_FEATURES = (1 << 5) - 1  # dirty and corrupt say nothing of where data is
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_DATA_FILE_NAME = 0x44415441
EXTENSION_FEATURE_NAME_TABLE = 0x6803F857
EXTENSION_BITMAPS = 0x23852875

MAX_L1_BYTES = 32 << 20  # QCOW_MAX_L1_SIZE in QEMU's block/qcow2.h: no larger table is opened
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # QCOW_MAX_REFTABLE_SIZE in the same place
MAX_HOST_OFFSET = 1 << 56  # table entries keep an offset in bits 9 to 55
MAX_BACKING_NAME_BYTES = 1023
MAX_SNAPSHOTS, MAX_BITMAPS = 65536, 65535  # as many as QEMU reads

# Section "Header" of the specification: name, struct code. All integers are big-endian.
HEADER_FIELDS = (
    ("magic", "4s"),
    ("version", "I"),
    ("backing_file_offset", "Q"),
    ("backing_file_size", "I"),
    ("cluster_bits", "I"),
    ("size", "Q"),
    ("crypt_method", "I"),
    ("l1_size", "I"),
    ("l1_table_offset", "Q"),
    ("refcount_table_offset", "Q"),
    ("refcount_table_clusters", "I"),
    ("nb_snapshots", "I"),
    ("snapshots_offset", "Q"),
    # Version 3 only from here on.
    ("incompatible_features", "Q"),
    ("compatible_features", "Q"),
    ("autoclear_features", "Q"),
    ("refcount_order", "I"),
    ("header_length", "I"),
    ("compression_type", "B"),
    ("padding", "7s"),
)
HEADER_STRUCT = struct.Struct(">" + "".join(code for _, code in HEADER_FIELDS))
HEADER_LENGTH = {2: 72, 3: 112}  # bytes; version 3 as QEMU 9.0 writes it

# Section "Snapshots": offset and entries of the L1 table, sizes of ID, name and extra data.
SNAPSHOT_STRUCT = struct.Struct(">QIHH20xI")
# Section "Bitmap directory": offset and entries of the table, flags, type, log2 of the bytes that
# a bit stands for, sizes of name and extra data.
BITMAP_STRUCT = struct.Struct(">QIIBBHI")
BITMAP_IN_USE, BITMAP_AUTO, DIRTY_BITMAP = 1, 2, 1  # flags, and the only type

# Type (0 incompatible, 1 compatible, 2 autoclear), bit, name: the eight that QEMU writes.
FEATURE_NAMES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)

Range = Tuple[int, int]  # start and end in bytes or clusters, end exclusive


def div_up(number: int, divisor: int) -> int:
    """The quotient of two non-negative integers, rounded up."""
    return -(-number // divisor)


def align_up(number: int, unit: int) -> int:
    """The smallest multiple of unit that is not below number."""
    return div_up(number, unit) * unit


def pack_header(fields: Dict[str, Any]) -> bytes:
    """The header's bytes, as many as its version has. Fields that are not named are zero."""
    values = [fields.get(name, b"" if code.endswith("s") else 0) for name, code in HEADER_FIELDS]
    return HEADER_STRUCT.pack(*values)[: HEADER_LENGTH[fields["version"]]]


def unpack_header(data: bytes) -> Dict[str, Any]:
    """The fields of a header; what it does not reach is zero. Raises ValueError if it is none."""
    version = int.from_bytes(data[4:8], "big")
    if data[:4] != MAGIC or version not in HEADER_LENGTH or len(data) < HEADER_LENGTH[2]:
        raise ValueError("it has no qcow2 header")
    length = HEADER_LENGTH[2] if version == 2 else int.from_bytes(data[100:104], "big")
    padded = data[: min(length, HEADER_STRUCT.size)].ljust(HEADER_STRUCT.size, b"\0")
    fields = dict(zip((name for name, _ in HEADER_FIELDS), HEADER_STRUCT.unpack(padded)))
    if version == 2:
        fields.update(refcount_order=4, header_length=length)
    return fields


def pack_extension(kind: int, payload: bytes) -> bytes:
    """One header extension (section "Header extensions"), padded to a multiple of 8 bytes."""
    return struct.pack(">II", kind, len(payload)) + payload.ljust(align_up(len(payload), 8), b"\0")


def unpack_extensions(data: bytes) -> Dict[int, bytes]:
    """The payloads of header extensions by type. Raises ValueError where one ends behind data."""
    extensions = {}
    position = 0
    while position + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, position)
        if not kind:
            break
        position += 8
        if position + length > len(data):
            raise ValueError("a header extension that is longer than its place")
        extensions[kind] = data[position : position + length]
        position += align_up(length, 8)
    return extensions


def feature_name_table() -> bytes:
    """The payload of the feature name table extension."""
    return b"".join(
        struct.pack(">BB46s", kind, bit, name.encode("ascii")) for kind, bit, name in FEATURE_NAMES
    )


def pack_entries(entries: "array[int]") -> bytes:
    """Table entries (typecode Q, host order) as the big-endian bytes that the file has."""
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def unpack_entries(data: bytes) -> "array[int]":
    """Table entries (typecode Q, host order) from the big-endian bytes that the file has."""
    entries = array("Q", data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def entry_range(first: int, step: int, count: int) -> "array[int]":
    """The entries first, first + step, first + 2 * step, … (count of them)."""
    return array("Q", range(first, first + count * step, step))


@functools.lru_cache(maxsize=2)
def ramp_and_ones(step: int, count: int, width: int) -> Tuple[int, int]:
    """The tables of 0, step, … and of 1, 1, 1, … as numbers; width: bytes of an entry."""
    ones = int.from_bytes((1).to_bytes(width, "big") * count, "big")
    return (ones - count) // ((1 << 8 * width) - 1) * step, ones  # a geometric series


def ramp_tables(first: int, step: int, entries: int, count: int) -> Iterator[bytes]:
    """Consecutive tables whose entries rise evenly, from first on: `count` of `entries` each.

    A table is one long number here, and the next one is the same number with a constant added
    to each of its 64-bit digits: that builds it six times faster than entry_range() does.
    """
    ramp, ones = ramp_and_ones(step, entries, ENTRY_SIZE)
    table = ramp + ones * first
    increment = ones * (entries * step)
    for _ in range(count):
        yield table.to_bytes(entries * ENTRY_SIZE, "big")
        table += increment


def rises_evenly(table: bytes, step: int, width: int) -> bool:
    """Whether each entry (of `width` bytes) is the one before it and step.

    The table is one long number here as well: that takes a tenth of the time that a loop does.
    """
    count = len(table) // width
    first = int.from_bytes(table[:width], "big")
    if int.from_bytes(table[-width:], "big") - first != (count - 1) * step:
        return False
    ramp, ones = ramp_and_ones(step, count, width)
    return int.from_bytes(table, "big") == ramp + ones * first


def refcount_ones(count: int, refcount_bits: int) -> bytes:
    """`count` refcounts of one."""
    group = max(1, 8 // refcount_bits)  # as many as fill a byte
    whole, rest = divmod(count, group)
    full, tail = (pack_refcounts([1] * number, refcount_bits) for number in (group, rest))
    return full * whole + tail


def pack_refcounts(counts: Iterable[int], refcount_bits: int) -> bytes:
    """Refcounts of any value; sub-byte ones fill a byte from its least significant bit."""
    if refcount_bits >= 8:
        entries = array({8: "B", 16: "H", 32: "I", 64: "Q"}[refcount_bits], counts)
        if sys.byteorder == "little":
            entries.byteswap()
        return entries.tobytes()
    shifts = range(0, 8, refcount_bits)
    rows = [iter(bytes(counts))] * len(shifts)
    groups = itertools.zip_longest(*rows, fillvalue=0)
    return bytes(sum(map(operator.lshift, group, shifts)) for group in groups)


def compressed_offset_bits(cluster_size: int) -> int:
    """How many bits of a compressed cluster descriptor hold the host offset."""
    return 71 - cluster_size.bit_length()


def pack_compressed(offset: int, size: int, cluster_size: int) -> int:
    """The L2 entry of a compressed cluster (section "Compressed Clusters Descriptor")."""
    sectors = (offset + size - 1) // SECTOR_SIZE - offset // SECTOR_SIZE
    return OFLAG_COMPRESSED | sectors << compressed_offset_bits(cluster_size) | offset


def unpack_compressed(entry: int, cluster_size: int) -> Tuple[int, int]:
    """(offset, upper bound of the length) of a compressed cluster, see pack_compressed()."""
    bits = compressed_offset_bits(cluster_size)
    offset = entry & (1 << bits) - 1
    sectors = (entry & OFLAG_COMPRESSED - 1) >> bits
    return offset, (sectors + 1) * SECTOR_SIZE - offset % SECTOR_SIZE


def extended_l2_table(table: bytes) -> bytes:
    """An L2 table in extended entries; all 32 subclusters of a cluster are in one state."""
    entries = unpack_entries(table)
    bitmaps = {0: 0, OFLAG_ZERO: ALL_ZEROS}
    both = array("Q", bytes(2 * len(table)))
    both[::2] = array("Q", (0 if entry == OFLAG_ZERO else entry for entry in entries))
    both[1::2] = array(
        "Q", (0 if entry & OFLAG_COMPRESSED else bitmaps.get(entry, ALL_DATA) for entry in entries)
    )
    return pack_entries(both)


_NEVER = 1 << 65  # no entry, and no difference of an entry and an offset


def plain_entries(table: bytes, start: int, end: int, allocated: int) -> Iterable[Range]:
    """(guest offset, entry) for table_runs(): of the first cluster only if all follow it evenly."""
    size = step = len(table)
    entries = unpack_entries(table)
    is_data = entries[0] & allocated and not entries[0] & OFLAG_COMPRESSED
    if is_data and rises_evenly(table, size, ENTRY_SIZE):
        step = end - start
    return zip(range(start, end, step), entries)


def subcluster_entries(table: bytes, start: int, end: int, allocated: int) -> Iterable[Range]:
    """As plain_entries(), of a table of extended ones: an entry for each run of subclusters.

    See section "Extended L2 Entries".
    """
    size = step = len(table)
    entries = unpack_entries(table)
    is_uniform = not entries[0] & OFLAG_COMPRESSED and entries[1] in (0, ALL_DATA, ALL_ZEROS)
    if is_uniform and rises_evenly(table, size << 64, EXTENDED_ENTRY_SIZE):
        step = end - start
    for at, entry, bitmap in zip(range(start, end, step), entries[::2], entries[1::2]):
        place = entry & (OFFSET_MASK | OFLAG_COPIED)
        if entry & OFLAG_COMPRESSED:
            yield at, entry
        elif (
            bitmap & bitmap >> 32
            or entry & OFFSET_MASK & size - 1
            or (bitmap & ALL_DATA and not place & allocated)
        ):
            raise ValueError(f"the L2 entry {entry:#x} with bitmap {bitmap:#x}")
        elif bitmap == ALL_DATA:
            yield at, place
        else:
            for first, flag in subcluster_runs(bitmap):
                distance = first * size // 32
                if at + distance < end:
                    yield at + distance, place + distance if flag is None else flag


@functools.lru_cache(maxsize=1024)
def subcluster_runs(bitmap: int) -> List[Tuple[int, Optional[int]]]:
    """(first, entry if it holds no data) of each run of alike subclusters."""
    flags = [None if bitmap >> bit & 1 else bitmap >> bit + 32 & OFLAG_ZERO for bit in range(32)]
    return [(bit, flag) for bit, flag in enumerate(flags) if not bit or flag != flags[bit - 1]]


def table_runs(
    entries: Iterable[Range],
    end: int,
    cluster_size: int,
    reserved: int,
    allocated: int,
    holders: Any,
) -> List[Any]:
    """What an L2 table says, up to a guest offset (section "Cluster mapping").

    entries     plain_entries() or subcluster_entries() of it
    reserved    the bits of an entry that must be clear
    allocated   those of which one at least is set where it has data
    holders     what stands for data and for compressed data in the runs; None is for zeros

    Returns runs: start and end in guest bytes, holder, host offset, and of a compressed cluster
    the bytes that hold it (an upper bound), else 0. Where there is none, nothing is allocated.
    Raises ValueError with the entry that can't be.
    """
    data, compressed = holders
    special = OFLAG_COMPRESSED | OFLAG_ZERO | reserved
    runs = []
    begin, holder, offset = 0, None, -1  # type: int, Any, int  # of the run so far, if there is one
    delta = same = _NEVER  # an entry continues it by this distance from its place, or as this
    for at, entry in entries:
        if entry - at == delta or entry == same:
            continue
        if offset >= 0:
            runs.append((begin, at, holder, offset, 0))
        begin, holder, offset = at, data, entry & OFFSET_MASK
        delta, same = entry - at, _NEVER
        if entry & special:
            if entry & OFLAG_COMPRESSED:
                offset, stored = unpack_compressed(entry, cluster_size)
                runs.append((at, min(at + cluster_size, end), compressed, offset, stored))
                offset, delta = -1, _NEVER
            elif entry & reserved:
                raise ValueError(f"the L2 entry {entry:#x}")
            else:
                holder, offset, same = None, 0, entry
        elif not entry & allocated:
            offset, delta, same = -1, _NEVER, entry
    if offset >= 0:
        runs.append((begin, end, holder, offset, 0))
    return runs


def c_string(name: bytes) -> str:
    """A name in a header, which a NUL byte ends before its place does."""
    return os.fsdecode(name.split(b"\0")[0])


def unpack_directory(
    read: Callable[[int, int], bytes], layout: struct.Struct, names: int, offset: int, count: int
) -> Iterator[Tuple[Tuple[int, ...], bytes, bytes]]:
    """(fields, extra data, names) of each entry of the snapshot table or the bitmap directory.

    read    takes an offset and a length, and returns the file's bytes there
    names   how many of the fields, before the last one, are sizes of names
    """
    for _ in range(count):
        fields = layout.unpack(read(offset, layout.size))
        offset += layout.size
        extra = read(offset, min(fields[-1], 16))
        offset += fields[-1]
        text = read(offset, sum(fields[-1 - names : -1]))
        offset = align_up(offset + len(text), 8)
        yield fields, extra, text


def set_bits(number: int, count: int) -> List[Range]:
    """(first, end) of each run of ones among the lowest bits of a number, from the lowest."""
    digits = format(number, f"0{count}b")[::-1]
    return [ones.span() for ones in re.finditer("1+", digits)]


# ---------------------------------------------------------------------------------------------
# Sources: where guest bytes are. A source has a size, extents (where its bytes are stored, in
# guest order), a way to read them, and a watch over what would change them. Only this room
# opens and reads disks.
# ---------------------------------------------------------------------------------------------

_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Python 3.7, Linux
SEEK_DATA, SEEK_HOLE = 3, 4  # Linux's, from fs.h; PyPy takes them, but doesn't name them
MAX_SIZE = (1 << 63) - 1  # bytes of a file; nothing can be read at that offset
HEAD_SIZE = 4 << 10  # bytes of a cluster that are looked at first: a page, read in any case
_ZERO_HEAD = bytes(HEAD_SIZE)
_ZERO_HEADS = bytes(4)  # after so many in a row, whole clusters are read
AT_EMPTY_PATH, AT_STATX_FORCE_SYNC = 0x1000, 0x2000  # Linux's, from fcntl.h
STATX_BASIC_STATS, STATX_SIZE = 0x7FF, 256  # Linux's, from stat.h: the usual fields; bytes of all
SYNC_FILE_RANGE_AND_WAIT = 7  # Linux's, from fs.h: wait for what is being written, and write

NO_DISKS = {
    stat.S_IFDIR: "a folder; give a regular file or a block device",
    stat.S_IFIFO: "a FIFO; write it to a file first, or read raw data by --size SIZE - < FIFO",
    stat.S_IFCHR: "a character device; give a regular file or a block device",
    stat.S_IFSOCK: "a socket; read a server's disk by a URI, nbd+unix:///EXPORT?socket=PATH",
}


@contextlib.contextmanager
def ignore_unavailable() -> Iterator[None]:
    """Go on where the system does not answer a question, or not us.

    Raises Error where it could, but not just now: what guards somebody's disk must not go blind.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO):
            what = quoted(str(error.filename or "a disk"))
            raise Error(f"cannot look at {what}: {reason(error)}") from error


def libc_call(name: str, *arguments: Any) -> int:
    """Call a function of the C library; -1 if it fails, or if there is no way to call it."""
    try:
        import ctypes

        return int(getattr(ctypes.CDLL(None), name)(*arguments))
    except (ImportError, OSError, AttributeError):
        return -1


def pread_into(fd: int, buffers: List[Any], offset: int) -> int:
    """os.preadv() for one buffer."""
    data = os.pread(fd, len(buffers[0]), offset)
    buffers[0][: len(data)] = data
    return len(data)


preadv = getattr(os, "preadv", pread_into)  # type: Callable[..., int]  # Python 3.7


def sys_folder(device: int) -> str:
    """Where Linux describes a block device."""
    return f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"


def file_identity(status: os.stat_result) -> Tuple[int, ...]:
    """What distinguishes files and devices: (device number,), or (file system, inode)."""
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return (status.st_dev, status.st_ino)


class Watch:
    """What a disk consists of, as it was found: open files and block devices.

    Of a file size and time of change count, of a device size and what this host writes to it.

    found   (label, descriptor, what counts) of each
    """

    def __init__(self) -> None:
        self.found = []  # type: List[Tuple[str, int, Tuple[Any, ...]]]

    def add(self, fd: int, label: str) -> None:
        """Watch what an open descriptor leads to, which messages call by its label."""
        self.found.append((label, fd, self._state(fd, is_thorough=True)))

    def check(self, is_last: bool = False) -> Optional[str]:
        """What has changed, in words; None if nothing has. The last check may take its time."""
        for label, fd, before in self.found:
            try:
                after = self._state(fd, is_last)
            except OSError as error:
                raise Error(f"cannot look at {label}: {reason(error)}") from error
            if after != before:
                how = "it was written to"
                if after[0] != before[0]:
                    how = f"its size went from {before[0]} to {after[0]} bytes"
                return f"{label} changed while it was read: {how}"
        return None

    @staticmethod
    def _state(fd: int, is_thorough: bool) -> Tuple[Any, ...]:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            if is_thorough:
                # What is only in memory is written first, so that it counts now and not later.
                # (fsync() would empty the disk's own memory as well, which takes longer.)
                libc_call("sync_file_range", fd, 0, 0, SYNC_FILE_RANGE_AND_WAIT)
            fields = []  # type: List[str]
            with ignore_unavailable(), open(sys_folder(status.st_rdev) + "/stat") as file:
                fields = file.read().split()  # see the kernel's Documentation/block/stat.rst
            position = os.lseek(fd, 0, os.SEEK_CUR)  # of standard input
            size = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, position, os.SEEK_SET)
            return (size, fields[6:7], fields[13:14])  # sectors written, discarded
        if is_thorough and stat.S_ISREG(status.st_mode) and not os.major(status.st_dev):
            # On no disk of this host: a network file system may answer from its memory.
            flags = AT_EMPTY_PATH | AT_STATX_FORCE_SYNC
            libc_call("statx", fd, b"", flags, STATX_BASIC_STATS, bytes(STATX_SIZE))
            status = os.fstat(fd)
        return (status.st_size, status.st_mtime_ns)


class DiskFile:
    """A regular file or block device, opened for reading only.

    label       its name in messages
    size        in bytes, when it was opened
    identity    see file_identity()
    """

    is_remote = False
    block_size = SECTOR_SIZE  # bytes: the smallest unit that can be bad

    def __init__(self, path: str, watch: Watch, label: Optional[str] = None) -> None:
        """Open and watch it. Raises Error if it is missing, unreadable or no disk."""
        self.path = path
        self.label = label or quoted(path)
        try:
            # Look before opening: to open a FIFO would wait for its other end.
            what = NO_DISKS.get(stat.S_IFMT(os.stat(path).st_mode))
            if what is not None:
                raise Error(f"cannot read {self.label}: it is {what}")
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self.fd)
            self.is_regular = stat.S_ISREG(status.st_mode)
            self.identity = file_identity(status)
            if self.is_regular:
                # A write that is under way has set the time of change already: wait for its end.
                # File systems lock a file for it, if asked for holes (ext4, tmpfs) or read (XFS).
                with contextlib.suppress(OSError):
                    os.lseek(self.fd, 0, SEEK_HOLE)
                    os.pread(self.fd, 1, 0)
            watch.add(self.fd, self.label)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            self.advise(0, 0, "RANDOM")  # heads of clusters are far from each other
        except (OSError, ValueError) as error:
            raise Error(f"cannot open {self.label}: {reason(error)}") from error
        if not self.is_regular:
            if not self.size:
                raise Error(f"cannot read {self.label}: the device is empty; attach what it shows")
            if has_other_views(status.st_rdev):
                # A partition and a mounted file system have memories of their own: what has been
                # read of this device before may be old by now.
                self.advise(0, 0, "DONTNEED")

    def close(self) -> None:
        """Close the descriptor, whatever its server says."""
        with contextlib.suppress(OSError):
            os.close(self.fd)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill all of view from offset on. Raises Error if it can't be read, or ends too early."""
        while len(view):
            try:
                count = preadv(self.fd, [view], offset)
            except OSError as error:
                raise self.read_error(offset, error) from error
            if not count:
                raise self.ended_early(offset)
            view = view[count:]
            offset += count

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from offset on. Raises what read_into() does."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def look_at_heads(self, offsets: "range") -> bytearray:
        """Read the first HEAD_SIZE bytes at some offsets: 1 where they are not all zeros.

        A head that the file's end cuts counts as zeros. Ends early after some such in a row.
        """
        pread, fd = os.pread, self.fd
        flags = bytearray()
        offset = -1
        try:
            for offset in offsets:
                head = pread(fd, HEAD_SIZE, offset)
                found = head != _ZERO_HEAD and len(head) == HEAD_SIZE
                flags.append(found)
                if not found and flags.endswith(_ZERO_HEADS):
                    break
        except OSError as error:
            raise self.read_error(offset, error) from error
        return flags

    def read_error(self, offset: int, error: OSError) -> ReadError:
        """What to raise where a read fails."""
        return ReadError(f"cannot read {self.label} at offset {offset}: {reason(error)}")

    def ended_early(self, offset: int) -> Error:
        """What to raise where there is nothing left to read."""
        if offset >= self.size:
            return Error(f"{self.label} is truncated: its image has data behind {self.size} bytes")
        return Error(
            f"{self.label} became shorter while it was read, {offset} instead of {self.size} "
            "bytes; export a snapshot instead"
        )

    def advise(self, offset: int, length: int, how: str) -> None:
        """Tell the kernel what is to come: how is RANDOM, NORMAL, WILLNEED or DONTNEED."""
        advice = getattr(os, "POSIX_FADV_" + how, None)
        if advice is not None:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, offset, length, advice)

    def is_cached(self, offset: int) -> bool:
        """Whether a byte is in memory; True where the kernel does not answer."""
        if _RWF_NOWAIT is None or preadv is pread_into:
            return True
        try:
            return bool(preadv(self.fd, [bytearray(1)], offset, _RWF_NOWAIT))
        except OSError as error:
            return error.errno != errno.EAGAIN

    def data_ranges(self, end: int) -> Iterator[Range]:
        """(start, end) of what may be no hole: all of a block device, or where nobody knows."""
        start = 0
        if not self.is_regular or not sys.platform.startswith("linux"):
            yield start, end
            return
        while start < end:
            try:
                data = os.lseek(self.fd, start, SEEK_DATA)
                hole = os.lseek(self.fd, data, SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end, or an empty file
                    if os.fstat(self.fd).st_size < self.size:
                        raise self.ended_early(start) from error
                    return
                data = hole = start
            if not start <= data < hole:
                data, hole = start, end
            if data < end:
                yield data, min(hole, end)
            start = hole


def has_other_views(device: int) -> bool:
    """Whether a partition or a mount may have its own idea of a block device, on Linux."""
    folder = sys_folder(device)
    with ignore_unavailable():
        names = [".", *os.listdir(folder)]
        if any(os.path.exists(f"{folder}/{name}/partition") for name in names):
            return True
    return is_mounted([f"{os.major(device)}:{os.minor(device)}"])


def is_mounted(numbers: Sequence[str]) -> bool:
    """Whether one of these devices (as "major:minor") is mounted, as far as Linux says."""
    with ignore_unavailable(), open("/proc/self/mountinfo", "rb") as mounts:
        return any(line.split()[2].decode("ascii") in numbers for line in mounts)
    return False


# A run of guest bytes that are stored one after the other; plain, for there are millions of them:
#
#   start, end  guest offsets in bytes, end exclusive
#   file        what holds them: a DiskFile, or whatever else has its methods (an NBD export)
#   offset      where in that file the byte of `start` is
#   stored      0; of a part of a compressed cluster, the bytes at `offset` that hold all of the
#               cluster (an upper bound), and `file` is the Qcow2Image that can inflate() them
Extent = Tuple[int, int, Any, int, int]


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Sorted ranges as disjoint ones: those that touch or overlap become one."""
    start = end = 0
    for next_start, next_end in ranges:
        if next_start > end:
            if end > start:
                yield start, end
            start = next_start
        end = max(end, next_end)
    if end > start:
        yield start, end


@functools.lru_cache(maxsize=4)
def zeros(length: int) -> bytes:
    """So many zeros, made once."""
    return bytes(length)


def cut(item: Any, start: int, end: int) -> Any:
    """The part of a range or an extent that lies between start and end."""
    if len(item) == 2:
        return start, end
    first, _, file, offset, stored = item
    return start, end, file, offset if stored else offset + start - first, stored


class Source:
    """A disk of `size` bytes (not rounded to sectors), and what would change it if it changed."""

    is_salvaged = False  # no file of it may be read but by read_into()
    images = ()  # type: Sequence[Any]  # the Qcow2Images of which clusters may be passed through

    def __init__(self, size: int, watch: Watch) -> None:
        self.size, self.watch = size, watch

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros: disjoint, in guest order, anew with each call."""
        raise NotImplementedError

    def copy_extents(self) -> Iterator[Extent]:
        """The same for the copy: perhaps with holes, which their file reads as zeros."""
        return self.extents()

    def finish(self) -> Optional[str]:
        """Expect the end of a stream. Returns a warning, or None."""
        return None

    def read_into(self, view: memoryview, start: int, extents: Sequence[Extent]) -> None:
        """Fill view with guest bytes from start on; what is stored nowhere is zeros.

        extents     those between start and the view's end, in order. Any thread may ask.
        """
        position = start
        for first, end, file, offset, stored in extents:
            clear(view[position - start : first - start])
            position = end
            part = view[first - start : end - start]
            if stored:
                cluster = file.inflate(offset, stored)
                at = first % len(cluster)
                part[:] = memoryview(cluster)[at : at + len(part)]
            else:
                file.read_into(part, offset)
        clear(view[position - start :])

    def is_damaged(self, _start: int, _end: int) -> bool:
        """Whether something between two guest offsets could not be read, and became zeros."""
        return False


class RawSource(Source):
    """A disk in one file (a DiskFile, or what has its methods), each byte at its own offset."""

    def __init__(
        self,
        file: Any,
        watch: Watch,
        size: Optional[int] = None,
        ranges: Optional[Iterable[Range]] = None,
    ) -> None:
        """size: where the disk ends, if before the file; ranges: what is not zeros, if known."""
        super().__init__(file.size if size is None else min(size, file.size), watch)
        self.file = file
        self._ranges = ranges

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        known = self._ranges
        for start, end in self.file.data_ranges(self.size) if known is None else joined(known):
            if start < self.size:
                yield start, min(end, self.size), self.file, start, 0

    def copy_extents(self) -> Iterator[Extent]:
        """The whole file: zeros of a hole are sent faster than the hole is asked for."""
        if self._ranges is not None or self.file.is_remote:
            return self.extents()
        return iter([(0, self.size, self.file, 0, 0)] if self.size else [])


class SalvageSource(Source):
    """Another disk with zeros in place of what can't be read.

    damage  the byte ranges of the guest that became zeros, in no order
    """

    is_salvaged = True

    def __init__(self, disk: Source) -> None:
        super().__init__(disk.size, disk.watch)
        self.damage = []  # type: List[Range]
        self._disk = disk

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        return self._disk.extents()

    def read_into(self, view: memoryview, start: int, extents: Sequence[Extent]) -> None:
        """Fill view with guest bytes from start on; what can't be read is zeros."""
        try:
            self._disk.read_into(view, start, extents)
        except ReadError:
            clear(view)
            for extent in extents:
                part = view[extent[0] - start : extent[1] - start]
                self.damage += joined(self._read_pieces(part, extent))

    def _read_pieces(self, view: memoryview, extent: Extent) -> List[Range]:
        """Read what can be read of an extent. Returns what became zeros."""
        start, end, file, offset, stored = extent
        try:
            self._disk.read_into(view, start, [extent])
            return []
        except ReadError:
            # Of a compressed cluster all is lost, else cut at a block near the middle.
            unit = 1 if stored else file.block_size
            half = max(1 + offset // unit, (offset + (end - start) // 2) // unit) * unit - offset
            if stored or half >= end - start:
                clear(view)
                return [(start, end)]
        first, second = cut(extent, start, start + half), cut(extent, start + half, end)
        return self._read_pieces(view[:half], first) + self._read_pieces(view[half:], second)

    def is_damaged(self, start: int, end: int) -> bool:
        """Whether something between two guest offsets could not be read, and became zeros."""
        return any(start < last and first < end for first, last in self.damage)


def clear(view: memoryview) -> None:
    """Set a buffer to zeros."""
    view[:] = bytes(len(view))


PIPE_PACKET = 64 << 10  # bytes that a packet in a pipe may have: a page, on any machine
END_OF_INPUT_TIMEOUT = 2.0  # seconds that standard input may stay open when it has given all


class StreamSource(Source):
    """The disk that standard input is, which comes only once, and the file of its one extent."""

    fd = None
    is_remote = False
    label = "standard input"
    identity = (-1,)

    def __init__(self, size: int, watch: Watch) -> None:
        super().__init__(size, watch)
        self._position, self._rest = 0, b""
        mode = os.fstat(0).st_mode
        if stat.S_ISSOCK(mode):
            import socket

            if socket_kind(0)[0] != socket.SOCK_STREAM:
                raise Error("standard input is a socket of packets; give it a stream")
        if os.isatty(0):  # which changes bytes
            raise Error("standard input is a terminal; give it a pipe or a file")
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            refuse_direct(0, mode, self.label)
            watch.add(0, self.label)

    def extents(self) -> Iterator[Extent]:
        """All of it: nothing can be known of a stream."""
        yield 0, self.size, self, 0, 0

    def advise(self, offset: int, length: int, how: str) -> None:
        """There is nothing that a kernel could do for a stream."""

    def read_into(
        self, view: memoryview, start: int, extents: Optional[Sequence[Extent]] = None
    ) -> None:
        """As a disk or, without extents, as a file: from start on, never back."""
        if extents is not None:
            super().read_into(view, start, extents)
            return
        self._skip_to(start)
        while len(view):
            # A pipe may keep packets apart, and what is not read of one is lost.
            data = self._rest or read_some(0, max(len(view), PIPE_PACKET), self.label)
            if not data:
                at, size = self._position, self.size
                raise Error(f"standard input ended after {at} bytes, but --size says {size}")
            count = min(len(data), len(view))
            view[:count] = data[:count]
            view, self._rest = view[count:], data[count:]
            self._position += count

    def _skip_to(self, offset: int) -> None:
        waste = memoryview(bytearray(min(offset - self._position, 1 << 20)))
        while self._position < offset:
            self.read_into(waste[: offset - self._position], self._position)

    def finish(self) -> Optional[str]:
        """Raise Error if more than `size` bytes come. Returns a warning if it stays open."""
        self._skip_to(self.size)
        if not self._rest and not wait_for(0, "POLLIN", END_OF_INPUT_TIMEOUT):
            return f"standard input is still open after the {self.size} bytes that --size says"
        if self._rest or read_some(0, 1, self.label):
            raise Error(f"standard input goes on after the {self.size} bytes that --size says")
        return None


def refuse_direct(fd: int, mode: int, what: str) -> None:
    """Raise Error if a descriptor takes whole blocks only or, of a pipe, keeps packets apart."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
        kind = "a pipe of packets" if stat.S_ISFIFO(mode) else "opened with O_DIRECT"
        raise Error(f"{what} is {kind}; redirect it by the shell's | or < and >")


def read_some(fd: int, length: int, what: str) -> bytes:
    """Up to `length` bytes of a stream, which may be one that does not block; none at its end."""
    while True:
        try:
            return os.read(fd, length)
        except BlockingIOError:
            wait_for(fd, "POLLIN")
        except OSError as error:
            raise Error(f"cannot read {what}: {reason(error)}") from error


def wait_for(fd: int, event: str, seconds: Optional[float] = None) -> bool:
    """Wait until a descriptor is ready: event is POLLIN or POLLOUT. False if time runs out."""
    poll = select.poll()
    poll.register(fd, getattr(select, event))
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


# Reading qcow2 without QEMU: the extents of an image and of the chain below it, table by table.

F_OFD_GETLK = 36  # Linux's, from fcntl.h
QEMU_LOCKS = (101, 200)  # bytes that QEMU locks: it may write; nobody else may read


class NeedsQemu(Exception):
    """An image has something that is not read here."""


@functools.lru_cache(maxsize=1)
def libzstd() -> Any:
    """The system's zstd library; None where there is none."""
    try:
        import ctypes

        library = ctypes.CDLL("libzstd.so.1")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("ZSTD_createCCtx", pointer, []),
            ("ZSTD_compressBound", size, [size]),
            ("ZSTD_compressCCtx", size, [pointer, pointer, size, pointer, size, ctypes.c_int]),
            ("ZSTD_decompress", size, [pointer, size, pointer, size]),
            ("ZSTD_findFrameCompressedSize", size, [pointer, size]),
            ("ZSTD_isError", ctypes.c_uint, [size]),
        ):  # type: Tuple[str, Any, List[Any]]
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        return library
    except (ImportError, OSError, AttributeError):
        return None


def import_zstd() -> Any:
    """Python's own zstd. Raises ImportError before 3.14."""
    import importlib

    return importlib.import_module("compression.zstd")


def inflate_zlib(data: bytes, size: int) -> bytes:
    """A cluster of `size` bytes from raw deflate, whatever follows; less if it is damaged."""
    import zlib

    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(-15).decompress(data, size)
    return b""


def inflate_zstd(data: bytes, size: int) -> bytes:
    """A cluster of `size` bytes from zstd frames, whatever follows; less if it is damaged."""
    library = libzstd()
    if library is None:
        return inflate_zstd_by_python(data, size)
    import ctypes

    cluster = ctypes.create_string_buffer(size)
    filled = 0
    while filled < size:
        # A frame's end must be known: what follows it is the next cluster's, or nothing at all.
        length = library.ZSTD_findFrameCompressedSize(data, len(data))
        if library.ZSTD_isError(length):
            return b""
        rest = ctypes.byref(cluster, filled)
        count = library.ZSTD_decompress(rest, size - filled, data, length)
        if library.ZSTD_isError(count):
            return b""
        filled, data = filled + count, data[length:]
    return cluster.raw


def inflate_zstd_by_python(data: bytes, size: int) -> bytes:
    """As inflate_zstd()."""
    zstd = import_zstd()
    cluster = b""
    with contextlib.suppress(zstd.ZstdError):
        while data and len(cluster) < size:
            frame = zstd.ZstdDecompressor()
            cluster += frame.decompress(data, size - len(cluster))
            data = frame.unused_data
    return cluster


def refuse_if_open_for_writing(file: DiskFile) -> None:
    """Raise Error if QEMU may write to an image. Its locks are asked for, not taken."""
    flock = "hhqqi"  # type, whence, start, length, process
    for byte in QEMU_LOCKS if sys.platform.startswith("linux") else ():
        wanted = struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        with contextlib.suppress(OSError):  # not on this file system
            found = struct.unpack(flock, fcntl.fcntl(file.fd, F_OFD_GETLK, wanted))
            if found[0] != fcntl.F_UNLCK:
                raise Error(
                    f"{file.label} is open for writing, in a running VM or a daemon; read that "
                    "one's NBD export, or make an external snapshot and export what is below it"
                )


class Qcow2File:
    """The file of a qcow2 image: its header, and the directories to which that leads.

    size            of the disk in bytes
    cluster_size    bytes
    backing_file    the name in the header, or None; backing_format, or empty
    """

    def __init__(self, path: str, watch: Watch, resources: contextlib.ExitStack) -> None:
        """Read the header. Raises Error for what is no image, or a broken one."""
        self.file = file = resources.enter_context(contextlib.closing(DiskFile(path, watch)))
        self.identity = file.identity
        first = file.read(0, min(file.size, 64 << 10))
        try:
            self.header = header = unpack_header(first)
            bits, length = header["cluster_bits"], header["header_length"]
            self.cluster_size = 1 << min(bits, 21)
            end = header["backing_file_offset"] or self.cluster_size  # as QEMU has it
            self.extensions = unpack_extensions(first[length : min(end, self.cluster_size)])
        except ValueError as error:
            raise Error(f"{file.label} is no qcow2 image: {error}") from error
        if not 9 <= bits <= 21 or (header["version"] > 2 and not 104 <= length <= 1 << bits):
            raise self.corrupt(f"clusters of 2^{bits} bytes, and a header of {length}")
        self.size = header["size"] // SECTOR_SIZE * SECTOR_SIZE
        start, length = header["backing_file_offset"], header["backing_file_size"]
        if start and (length > MAX_BACKING_NAME_BYTES or start + length > self.cluster_size):
            raise self.corrupt(f"a backing file's name of {length} bytes at offset {start}")
        self.backing_file = c_string(self.read(start, length) if start else b"") or None
        self.backing_format = c_string(self.extensions.get(EXTENSION_BACKING_FORMAT, b""))

    def corrupt(self, what: str) -> Error:
        """What to raise where metadata can't be."""
        return Error(f"{self.file.label} is corrupt: it has {what}; qemu-img check says more")

    def missing(self, kind: str, wanted: str, names: Iterable[str]) -> Error:
        """What to raise where there is no snapshot or bitmap of a name."""
        has = ", ".join(map(quoted, names)) or f"no {kind}s"
        return Error(f"{self.file.label} has no {kind} {quoted(wanted)}; it has {has}")

    def read(self, offset: int, length: int) -> bytes:
        """Metadata at an offset. Raises Error if it lies behind the file's end."""
        if offset + length > self.file.size:
            raise self.file.ended_early(self.file.size)
        return self.file.read(offset, length)

    def find_snapshot(self, wanted: str) -> Tuple[int, int, int]:
        """(offset and entries of its L1 table, its disk's size) by the ID or else the name."""
        by_id = {}  # type: Dict[str, Tuple[int, int, int]]
        by_name = dict(by_id)
        count = min(self.header["nb_snapshots"], MAX_SNAPSHOTS)
        table = self.header["snapshots_offset"]
        for fields, extra, names in unpack_directory(self.read, SNAPSHOT_STRUCT, 2, table, count):
            l1_offset, l1_entries, id_size, *_ = fields
            size = int.from_bytes(extra[8:], "big") if len(extra) == 16 else self.size
            found = l1_offset, l1_entries, size // SECTOR_SIZE * SECTOR_SIZE
            by_id.setdefault(os.fsdecode(names[:id_size]), found)
            by_name.setdefault(os.fsdecode(names[id_size:]), found)
        snapshots = {**by_name, **by_id}
        if wanted not in snapshots:
            raise self.missing("snapshot", wanted, by_name)
        return snapshots[wanted]

    def bitmap_ranges(self, name: str) -> Tuple[Iterator[Range], bool]:
        """(the byte ranges that a dirty bitmap says have changed, whether it is recording).

        Raises Error if there is none of that name, or if it can't be relied on.
        """
        directory = self.extensions.get(EXTENSION_BITMAPS, b"")
        count = position = 0
        if len(directory) == 24 and self.header["autoclear_features"] & AUTOCLEAR_BITMAPS:
            count, position = struct.unpack(">I12xQ", directory)
        count = min(count, MAX_BITMAPS)
        rows = unpack_directory(self.read, BITMAP_STRUCT, 1, position, count)
        bitmaps = {os.fsdecode(key): fields for fields, _, key in rows}
        if name not in bitmaps:
            raise self.missing("bitmap", name, bitmaps)
        offset, count, flags, kind, granularity_bits, _, extra_size = bitmaps[name]
        if flags & BITMAP_IN_USE or extra_size or kind != DIRTY_BITMAP:
            raise Error(
                f"the bitmap {quoted(name)} of {self.file.label} is in use or inconsistent: its "
                "writer has not closed the image; export the whole disk and begin a new bitmap"
            )
        reach = self.cluster_size * 8 << granularity_bits  # of a cluster of the bitmap, in bytes
        is_whole = count == div_up(self.header["size"], reach)
        if granularity_bits > 31 or not is_whole or count * ENTRY_SIZE > MAX_L1_BYTES:
            raise self.corrupt(f"a bitmap with a table of {count} entries")
        table = unpack_entries(self.read(offset, count * ENTRY_SIZE))
        return joined(self._dirty_ranges(table, granularity_bits)), bool(flags & BITMAP_AUTO)

    def _dirty_ranges(self, table: "array[int]", granularity_bits: int) -> Iterator[Range]:
        bits = self.cluster_size * 8
        for index, entry in enumerate(table):
            spans = [(0, bits)] if entry & 1 else []
            if entry & OFFSET_MASK:
                data = self.read(entry & OFFSET_MASK, self.cluster_size)
                spans = set_bits(int.from_bytes(data, "little"), bits)
            for span in spans:
                start, end = ((index * bits + bit) << granularity_bits for bit in span)
                yield start, min(end, self.size)


class Qcow2Image(Qcow2File):
    """A qcow2 image whose disk, or that of a snapshot, is read by its tables.

    reach           guest bytes that an L2 table describes
    table_count     how many of these the disk needs
    """

    def __init__(
        self,
        path: str,
        watch: Watch,
        resources: contextlib.ExitStack,
        snapshot: Optional[str] = None,
    ) -> None:
        """Read the header and the L1 table; snapshot: the ID or name of an internal one.

        Raises Error for what is no image, or a broken one, NeedsQemu for what is not read here.
        """
        super().__init__(path, watch, resources)
        features, kind = self.header["incompatible_features"], self.header["compression_type"]
        if features & ~KNOWN_FEATURES or kind > 1:
            raise NeedsQemu()
        if kind != bool(features & INCOMPATIBLE_COMPRESSION):
            raise self.corrupt("a compression type that its features don't match")
        self.compression_type, self._inflate = "zlib", inflate_zlib
        if kind:
            self.compression_type, self._inflate = "zstd", inflate_zstd
            try:
                libzstd() or import_zstd()
            except ImportError:
                raise NeedsQemu() from None
        self._is_external = bool(features & INCOMPATIBLE_DATA_FILE)
        self._data_file = self.file
        if self._is_external:
            self._data_file = self._open_data_file(path, watch, resources)
        # In an external data file, offset 0 may be a cluster's place.
        self._allocated = OFFSET_MASK | (OFLAG_COPIED if self._is_external else 0)
        flags = OFLAG_ZERO if self.header["version"] > 2 else 0
        self._unpack = plain_entries  # type: Callable[[bytes, int, int, int], Iterable[Range]]
        self._reserved = (self.cluster_size - 1) & ~flags
        entry_size = ENTRY_SIZE
        if features & INCOMPATIBLE_EXTENDED_L2:
            self._unpack, self._reserved = subcluster_entries, 0
            entry_size = EXTENDED_ENTRY_SIZE
        self.reach = self.cluster_size // entry_size * self.cluster_size
        self._read_l1(snapshot)

    def _open_data_file(self, path: str, watch: Watch, resources: contextlib.ExitStack) -> DiskFile:
        name = c_string(self.extensions.get(EXTENSION_DATA_FILE_NAME, b""))
        if not name:
            raise NeedsQemu()
        # QEMU looks for it in the current folder, and people beside the image.
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.exists(beside) and not (os.path.exists(name) and os.path.samefile(name, beside)):
            raise Error(
                f"the data file {quoted(name)} of {self.file.label} is looked for in the current "
                "folder, but there is one beside the image; change to that folder"
            )
        return resources.enter_context(contextlib.closing(DiskFile(name, watch)))

    def _read_l1(self, snapshot: Optional[str]) -> None:
        offset, entries = self.header["l1_table_offset"], self.header["l1_size"]
        if snapshot is not None:
            offset, entries, self.size = self.find_snapshot(snapshot)
        self.table_count = div_up(self.size, self.reach)
        if entries * ENTRY_SIZE > MAX_L1_BYTES or entries < self.table_count:
            raise self.corrupt(f"an L1 table of {entries} entries for {self.size} bytes")
        if offset % self.cluster_size and entries:
            raise self.corrupt(f"an L1 table at offset {offset}")
        self._l1 = unpack_entries(self.read(offset, self.table_count * ENTRY_SIZE))

    def table(self, index: int) -> Sequence[Extent]:
        """The extents of one L2 table, and in order with them zeros, which have no file.

        Raises Error where a file ends before its data.
        """
        offset = self._l1[index] & OFFSET_MASK
        if offset % self.cluster_size:
            raise self.corrupt(f"an L2 table at offset {offset}")
        table = self.read(offset, self.cluster_size) if offset else b""
        if table == zeros(len(table)):
            return ()
        start, end = index * self.reach, min((index + 1) * self.reach, self.size)
        holders = self._data_file, self
        try:
            entries = self._unpack(table, start, end, self._allocated)
            runs = table_runs(
                entries, end, self.cluster_size, self._reserved, self._allocated, holders
            )
        except ValueError as error:
            raise self.corrupt(str(error)) from error
        limit = min(self.file.size, self._data_file.size)
        # Compressed data may be shorter than what is said of it: then all is looked at closely.
        if [run for run in runs if run[3] + run[4] + run[1] - run[0] > limit]:
            return list(self._within_files(runs))
        return runs

    def _within_files(self, extents: Iterable[Extent]) -> Iterator[Extent]:
        data_size = self._data_file.size
        for extent in extents:
            start, end, file, offset, stored = extent
            behind = offset + end - start - data_size  # so many bytes of it
            if stored and offset < self.file.size:
                yield start, end, self, offset, min(stored, self.file.size - offset)
            elif file is None or (not stored and behind <= 0):
                yield extent
            elif stored or not self._is_external:
                raise self.file.ended_early(self.file.size)
            else:  # behind the end of a data file are zeros
                middle = max(start, end - behind)
                if middle > start:
                    yield start, middle, file, offset, 0
                yield middle, end, None, 0, 0

    def check_end(self) -> None:
        """Raise Error if the last table in use, or what it leads to, lies behind the file's end."""
        for index in reversed(range(self.table_count)):
            if self._l1[index] & OFFSET_MASK:
                self.table(index)
                return

    def compressed_offsets(self) -> "array[int]":
        """The host offsets of all compressed clusters, sorted."""
        tables = map(self.table, range(self.table_count))
        offsets = array("Q", (row[3] for table in tables for row in table if row[4]))
        # Mostly they are in order, and a list of so many numbers takes five times the space.
        is_sorted = all(map(operator.le, offsets, itertools.islice(offsets, 1, None)))
        return offsets if is_sorted else array("Q", sorted(offsets))

    def inflate(self, offset: int, stored: int) -> bytes:
        """The cluster that is compressed in `stored` bytes at an offset. For any thread."""
        cluster = self._inflate(self.file.read(offset, stored), self.cluster_size)
        if len(cluster) != self.cluster_size:
            what = f"the compressed cluster at offset {offset} is damaged"
            raise ReadError(f"cannot read {self.file.label}: {what}")
        return cluster


class Layer:
    """A member of a chain and what is below it, gone through once from its start to its end.

    extents     all that it holds
    """

    def __init__(self, member: Union[Qcow2Image, RawSource], below: Optional["Layer"]) -> None:
        if isinstance(member, Qcow2Image):
            self.extents = self._merged(member, below)
        else:
            self.extents = member.extents()
        self._position = 0  # what lies before is needed by nobody: tables of it are not read
        self._next = (0, 0, None, 0, 0)  # type: Extent

    def _merged(self, image: Qcow2Image, below: Optional["Layer"]) -> Iterator[Extent]:
        for index in range(image.table_count):
            start = index * image.reach
            end = min(start + image.reach, image.size)
            if end <= self._position:
                continue
            extents = image.table(index)
            if below is None:
                yield from [extent for extent in extents if extent[2] is not None]
                continue
            for extent in extents:
                if start < extent[0]:
                    yield from below.take(start, extent[0])
                if extent[2] is not None:
                    yield extent
                start = extent[1]
            if start < end:
                yield from below.take(start, end)

    def take(self, start: int, end: int) -> Iterator[Extent]:
        """What lies between start and end, cut to that. Never back: start must rise.

        Lazily, unlike a Cutter: a hole of the member above may be all of a disk.
        """
        self._position = start
        extent = self._next
        while extent[0] < end:
            if extent[1] > start:
                if start <= extent[0] and extent[1] <= end:
                    yield extent
                else:
                    yield cut(extent, max(start, extent[0]), min(end, extent[1]))
                if extent[1] > end:
                    break
            self._next = extent = next(self.extents, (MAX_SIZE, MAX_SIZE, None, 0, 0))


class ChainSource(Source):
    """The disk of a qcow2 image and of what is below it."""

    def __init__(self, members: Sequence[Union[Qcow2Image, RawSource]], watch: Watch) -> None:
        """The top image first; a raw disk may be below them all."""
        super().__init__(members[0].size, watch)
        self._members = members
        self.images = [member for member in members if isinstance(member, Qcow2Image)]

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        layer = None  # type: Any
        for member in reversed(self._members):
            layer = Layer(member, layer)
        return layer.extents  # type: ignore[no-any-return]


def open_qcow2(
    path: str, watch: Watch, resources: contextlib.ExitStack, snapshot: Optional[str] = None
) -> Optional[Source]:
    """Open a qcow2 image and the chain below it; None where QEMU must read it.

    Raises Error for a broken image, a chain that contains itself, or one that is being written.
    """
    images = []  # type: List[Qcow2Image]
    while True:
        try:
            image = Qcow2Image(path, watch, resources, None if images else snapshot)
        except NeedsQemu:
            return None
        except Error as error:
            below = f"; it is the backing file of {images[-1].file.label}" if images else ""
            raise Error(f"{error}{below}") from error
        if image.header["crypt_method"]:
            return None
        if image.identity in [each.identity for each in images]:
            raise Error(f"the chain of {images[0].file.label} contains {image.file.label} twice")
        refuse_if_open_for_writing(image.file)
        images.append(image)
        name, fmt = image.backing_file, image.backing_format
        if name is None:
            return ChainSource(images, watch)
        if fmt not in ("raw", "qcow2") or re.match("[^/]*:", name):
            return None
        path = os.path.join(os.path.dirname(path), name)
        if fmt == "raw":
            file = resources.enter_context(contextlib.closing(DiskFile(path, watch)))
            return ChainSource([*images, RawSource(file, watch)], watch)


# An NBD client of our own. doc/proto.md of the NBD project is "the protocol" below, and names all
# constants. Integers are big-endian.

NBD_MAGIC, NBD_OPTION_MAGIC, NBD_REP_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC = 0x67446698, 0x668E33EF
NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES = 1, 2
NBD_OPT_EXPORT_NAME, NBD_OPT_STARTTLS, NBD_OPT_GO = 1, 5, 7
NBD_OPT_STRUCTURED_REPLY, NBD_OPT_SET_META_CONTEXT = 8, 10
NBD_REP_ACK, NBD_REP_INFO, NBD_REP_META_CONTEXT = 1, 3, 4
NBD_REP_ERROR = 1 << 31  # added to each of the next
NBD_REP_ERR_UNSUP, NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNKNOWN = 1, 5, 6
NBD_INFO_EXPORT, NBD_INFO_BLOCK_SIZE = b"\0\0", b"\0\3"
NBD_FLAG_SEND_DF, NBD_CMD_FLAG_DF = 1 << 7, 1 << 2
NBD_CMD_READ, NBD_CMD_BLOCK_STATUS = 0, 7
NBD_REPLY_FLAG_DONE = 1
NBD_REPLY_NONE, NBD_REPLY_OFFSET_DATA, NBD_REPLY_OFFSET_HOLE, NBD_REPLY_BLOCK_STATUS = 0, 1, 2, 5
NBD_REPLY_ERROR_BIT, NBD_REPLY_ERROR_OFFSET = 1 << 15, (1 << 15) + 2
NBD_DIRTY_BITMAP = "qemu:dirty-bitmap:"  # before the name of one: a metadata context
NBD_STATE_ZERO, NBD_STATE_DIRTY = 2, 1  # of base:allocation, of a dirty bitmap
NBD_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
NBD_REPLY = ">IHHQ"  # magic, flags and type of a chunk (or the error), cookie
NBD_REFUSALS = {  # what the errors of a negotiation mean; some servers have no words for them
    2: "the server's policy forbids it",
    NBD_REP_ERR_TLS_REQD: "the server wants TLS; write nbds instead of nbd",
    NBD_REP_ERR_UNKNOWN: "the server has no such export",
    7: "the server is about to end",
}

NBD_PORT = 10809
NBD_TIMEOUT = 60  # seconds until an image or an export must be open: it may be far away
NBD_BUFFER_SIZE = 64 << 10  # bytes; a dozen heads arrive in one call
NBD_READ_SIZE = 512 << 10  # bytes of a request: larger ones are slower with several readers
NBD_HEADS = 64  # heads in flight, for a server that is far away
MAX_NBD_READ = 32 << 20  # bytes that a server must take if it names no limit
MAX_NBD_MIN_BLOCK = 64 << 10
MAX_NBD_STATUS = (1 << 32) - MAX_NBD_MIN_BLOCK  # bytes of a request for block status
MAX_NBD_PAYLOAD = 16 << 20  # bytes of a reply, but for data: nbdkit sends 8 MiB of block status
BROKEN_PROTOCOL = "the server breaks the protocol"


class NbdAddress(NamedTuple):
    """Where an NBD URI leads.

    socket      the path of a Unix socket, if it is one
    tls_folder  of certificates, where the system's are not meant
    """

    host: str
    port: int
    socket: Optional[str]
    export: str
    has_tls: bool
    tls_folder: Optional[str]


def is_nbd_uri(name: str) -> bool:
    """Whether a name is an NBD URI, of any transport."""
    return re.match(r"nbds?(\+[a-z]+)?://", name) is not None


def parse_nbd_uri(uri: str) -> NbdAddress:
    """Take an NBD URI apart, see doc/uri.md of the NBD project. Raises Error with what is wrong."""
    from urllib.parse import unquote

    decode = functools.partial(unquote, errors="surrogateescape")
    found = re.match(
        r"(nbds?)(\+\w+)?://(?:[^/?#]*@)?([^/?#@]*)/?([^?#]*)\??([^#]*)(.*)", uri, re.S
    )
    assert found
    scheme, transport, authority, path, query, fragment = found.groups("")
    place = re.match(r"(?:\[([\w:.%]+)\]|([^:\[\]]*))(?::(\d{1,5}))?\Z", authority)
    # Nothing is shown that a password may be a part of.
    shown = f"{scheme}{transport}://{authority}/{path}" if place else f"{scheme}://…"
    what = f"cannot open {quoted(shown)}: "
    pairs = (part.partition("=") for part in query.split("&") if part)
    values = {decode(key): decode(value) for key, _, value in pairs}
    unknown = values.keys() - {"socket", "tls-certificates"}
    if "@" in uri[: found.start(4)]:
        raise Error(what + "leave out user and password; TLS certificates are what is understood")
    if unknown:
        known = "socket and tls-certificates are"
        raise Error(what + f"the key {quoted(min(unknown))} is not understood; {known}")
    if transport not in ("", "+unix"):
        raise Error(what + "the transports are TCP and Unix sockets (nbd+unix)")
    if fragment or not place or int(place.group(3) or 1) >> 16:
        raise Error(what + "it is no NBD URI; # in a name is %23, and an IPv6 address is [::1]")
    if bool(transport) != ("socket" in values) or (transport and authority):
        raise Error(what + "a Unix socket is named by nbd+unix:///EXPORT?socket=PATH")
    if "tls-certificates" in values and scheme != "nbds":
        raise Error(what + "certificates are for TLS; write nbds instead of nbd")
    host = decode(place.group(1) or place.group(2)) or "localhost"
    port, has_tls = int(place.group(3) or NBD_PORT), scheme == "nbds"
    folder = values.get("tls-certificates")
    return NbdAddress(host, port, values.get("socket"), decode(path), has_tls, folder)


def socket_reason(error: Exception) -> str:
    """What went wrong with a connection: names and TLS have error numbers of their own."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, struct.error):
        return BROKEN_PROTOCOL
    if text == "timed out":
        return f"the server does not answer within {NBD_TIMEOUT} seconds"
    return re.sub(r"^\[.*?\] | \(_ssl\.c:\d+\)", "", quoted(text)[1:-1])


def start_tls(sock: Any, address: NbdAddress) -> Any:
    """A socket through TLS, with the files that libnbd and QEMU look for."""
    import ssl

    folder = address.tls_folder
    if folder is None:
        context = ssl.create_default_context()
    else:
        authority = os.path.join(folder, "ca-cert.pem")
        if not os.path.exists(authority):
            raise ValueError(f"{authority}: {os.strerror(errno.ENOENT)}")
        context = ssl.create_default_context(cafile=authority)
        # Python 3.13 wants more of a private authority than its users know of.
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        names = [os.path.join(folder, f"client-{kind}.pem") for kind in ("cert", "key")]
        if os.path.exists(names[0]):
            context.load_cert_chain(names[0], names[1], lambda: b"")  # else it asks the terminal
    context.check_hostname = address.socket is None
    return context.wrap_socket(sock, server_hostname=None if address.socket else address.host)


def shown_text(data: bytes) -> str:
    """What a server or a program says, as it may stand in a message."""
    return quoted(data.decode("utf-8", "replace"))[1:-1]


class NbdConnection:
    """A connection to an NBD server, negotiated up to where requests can be sent.

    size        of the export in bytes
    flags       of its transmission
    block_size  the unit of requests in bytes
    max_read    bytes of a request
    contexts    the metadata contexts that there are: number by name
    has_tls     whether it is encrypted
    """

    def __init__(
        self, sock: Any, export: str, wanted: Sequence[str], address: Optional[NbdAddress]
    ) -> None:
        """Negotiate.

        wanted      names of metadata contexts
        address     where the server is, if TLS is wanted

        Raises OSError, ValueError or struct.error, see socket_reason().
        """
        self._use(sock)
        self.has_tls = address is not None
        self.block_size, self.max_read = 1, MAX_NBD_READ
        self.contexts = {}  # type: Dict[str, int]
        magic, kind, flags = self.unpack(">8s8sH")
        if magic != NBD_MAGIC:
            raise ValueError("who answers is no NBD server")
        if kind != NBD_OPTION_MAGIC or not flags & NBD_FLAG_FIXED_NEWSTYLE:
            raise ValueError("the server talks an oldstyle protocol; fixed newstyle is needed")
        flags &= NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
        self.sock.sendall(struct.pack(">I", flags))
        if address is not None:
            accepted = None
            with contextlib.suppress(ValueError):
                accepted = self._ask(NBD_OPT_STARTTLS)
            if accepted is None:
                raise ValueError("the server has no TLS; write nbd instead of nbds")
            # What was sent in the clear and is not read yet goes with the old reader.
            self._use(start_tls(self.sock, address))
        name = os.fsencode(export)
        counted_name = struct.pack(">I", len(name)) + name
        if self._ask(NBD_OPT_STRUCTURED_REPLY) is not None:
            self._set_contexts(counted_name, [os.fsencode(each) for each in wanted])
        infos = self._ask(NBD_OPT_GO, counted_name + b"\0\1" + NBD_INFO_BLOCK_SIZE)
        if infos is None:
            self._send_option(NBD_OPT_EXPORT_NAME, name)  # without it, the server closes
            self.size, self.flags = self.unpack(">QH" if flags & NBD_FLAG_NO_ZEROES else ">QH124x")
        else:
            self._take_infos(infos)

    def _use(self, sock: Any) -> None:
        self.sock = sock
        self._reader = sock.makefile("rb", NBD_BUFFER_SIZE)

    def _set_contexts(self, name: bytes, wanted: Sequence[bytes]) -> None:
        queries = b"".join(struct.pack(">I", len(each)) + each for each in wanted)
        data = name + struct.pack(">I", len(wanted)) + queries
        for kind, payload in self._ask(NBD_OPT_SET_META_CONTEXT, data) or []:
            if kind == NBD_REP_META_CONTEXT:
                self.contexts[os.fsdecode(payload[4:])] = int.from_bytes(payload[:4], "big")

    def _take_infos(self, infos: List[Tuple[int, bytes]]) -> None:
        known = {payload[:2]: payload for kind, payload in infos if kind == NBD_REP_INFO}
        if NBD_INFO_EXPORT not in known:
            raise ValueError("the server does not say how large the export is")
        self.size, self.flags = struct.unpack(">2xQH", known[NBD_INFO_EXPORT])
        if NBD_INFO_BLOCK_SIZE in known:
            block, _, largest = struct.unpack(">2xIII", known[NBD_INFO_BLOCK_SIZE])
            if block not in [1 << bits for bits in range(17)] or largest < block:
                raise ValueError(f"blocks of {block} to {largest} bytes are not possible")
            self.block_size, self.max_read = block, min(largest, MAX_NBD_READ) // block * block

    def _send_option(self, option: int, data: bytes) -> None:
        self.sock.sendall(NBD_OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)

    def _ask(self, option: int, data: bytes = b"") -> Optional[List[Tuple[int, bytes]]]:
        """What the server replies to an option: type and payload of each; None if unknown to it."""
        self._send_option(option, data)
        replies = []  # type: List[Tuple[int, bytes]]
        while True:
            magic, echo, kind, length = self.unpack(">QIII")
            if magic != NBD_REP_MAGIC or echo != option:
                raise ValueError(BROKEN_PROTOCOL)
            payload = self.receive(length)
            if kind == NBD_REP_ACK:
                return replies
            if kind == NBD_REP_ERROR + NBD_REP_ERR_UNSUP:
                return None
            if kind & NBD_REP_ERROR:
                number = kind - NBD_REP_ERROR
                said = shown_text(payload) or f"error {number}"
                raise ValueError(NBD_REFUSALS.get(number, "the server refuses") + f" ({said})")
            replies.append((kind, payload))

    def receive(self, length: int) -> bytes:
        """`length` bytes. Raises OSError where they don't come, ValueError if they are too many."""
        if length > MAX_NBD_PAYLOAD:
            raise ValueError(BROKEN_PROTOCOL)
        data = bytearray(length)
        self.receive_into(memoryview(data))
        return bytes(data)

    def receive_into(self, view: Any) -> None:
        """Fill all of view. Raises OSError where the bytes don't come."""
        if self._reader.readinto(view) < len(view):
            raise OSError("the server has closed the connection")

    def unpack(self, code: str) -> Tuple[Any, ...]:
        """The numbers that come next. Raises OSError where they don't come."""
        return struct.unpack(code, self.receive(struct.calcsize(code)))


class NbdRequest:
    """A request, and what has come of its answer.

    view        where the data that is read goes; None if something else is asked for
    context     the metadata context that is asked for
    left        bytes of data that have not come yet
    extents     a block status answer: pairs of a length and a state, 32 bits each
    error       the offset where it failed, why, and the server's number for that
    """

    def __init__(self, offset: int, length: int, view: Any = None, context: int = 0) -> None:
        self.offset, self.length, self.view, self.context = offset, length, view, context
        self.left = 0 if view is None else length
        self.extents = b""
        self.error = None  # type: Optional[Tuple[int, str, int]]

    def place(self, offset: int, length: int) -> Any:
        """Where data of the answer goes. Raises ValueError if it was not asked for."""
        start = offset - self.offset
        if self.view is None or start < 0 or start + length > self.length:
            raise ValueError("the server sends bytes that were not asked for")
        self.left -= length
        return self.view[start : start + length]

    def fail(self, number: int, offset: int, said: str = "") -> None:
        """Take an error: the protocol's numbers are Linux's."""
        why = os.strerror(number & 0xFFFF) + (f" ({said})" if said else "")
        self.error = offset, why, number

    def receive_chunk(self, connection: NbdConnection, kind: int, length: int) -> None:
        """Receive the payload of a chunk, `length` bytes. Raises what NbdConnection does."""
        if kind == NBD_REPLY_OFFSET_DATA and length >= 8:
            (offset,) = connection.unpack(">Q")
            connection.receive_into(self.place(offset, length - 8))
            return
        payload = connection.receive(length)
        if kind == NBD_REPLY_OFFSET_HOLE:
            clear(self.place(*struct.unpack(">QI", payload)))
        elif kind == NBD_REPLY_BLOCK_STATUS and length % 8 == 4:
            if int.from_bytes(payload[:4], "big") == self.context:
                self.extents = payload[4:]
        elif kind & NBD_REPLY_ERROR_BIT:
            number, size = struct.unpack_from(">IH", payload)
            offset = self.offset
            if kind == NBD_REPLY_ERROR_OFFSET:
                (offset,) = struct.unpack_from(">Q", payload, 6 + size)
            self.fail(number, offset, shown_text(payload[6 : 6 + size]))
        elif kind != NBD_REPLY_NONE:
            raise ValueError(BROKEN_PROTOCOL)


class NbdExport:
    """An NBD server's export, with the methods of a DiskFile.

    Any thread may read; many requests are on their way at once. One of the threads that wait
    receives the answers to all of them, until its own are there; then another one does.
    """

    fd = None
    is_remote = True

    def __init__(self, connection: NbdConnection, label: str) -> None:
        """Use a connection, which is closed with the export; messages call it by its label."""
        import threading

        self._connection, self.label = connection, label
        self.identity = ("nbd", id(self))
        self.size, block = connection.size, connection.block_size
        self.block_size = max(block, SECTOR_SIZE)
        self._read_size = min(connection.max_read, max(NBD_READ_SIZE, block))
        # Else qemu-nbd sends a chunk for each extent.
        self._read_flags = NBD_CMD_FLAG_DF if connection.flags & NBD_FLAG_SEND_DF else 0
        self._sending = threading.Lock()
        # OpenSSL allows no two threads in one session.
        self._receiving = self._sending if connection.has_tls else threading.Lock()
        self._answered = threading.Condition()  # a batch is complete, or its receiver has ended
        self._cookies = itertools.count()
        # By the cookie of a request without an answer: all such requests of its batch, by cookie.
        self._waiting = {}  # type: Dict[int, Dict[int, NbdRequest]]
        self._broken = ""  # why nothing more can be asked

    def close(self) -> None:
        """Close the connection. A thread that still receives is stopped by that."""
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(2)
        self._connection.sock.close()

    def advise(self, offset: int, length: int, how: str) -> None:
        """The protocol's NBD_CMD_CACHE is not worth a request."""

    def is_cached(self, offset: int) -> bool:
        """A server is never as near as memory."""
        return False

    def _read_error(self, offset: int, why: str) -> ReadError:
        return ReadError(f"cannot read {self.label} at offset {offset}: {why}")

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill all of view from offset on. Raises Error where the server can't."""
        self._read([(view, offset)])

    def look_at_heads(self, offsets: "range") -> bytearray:
        """Read the first HEAD_SIZE bytes at some offsets: see DiskFile.look_at_heads()."""
        flags = bytearray()
        for begin in range(0, len(offsets), NBD_HEADS):
            heads = [bytearray(HEAD_SIZE) for _ in offsets[begin : begin + NBD_HEADS]]
            self._read([(memoryview(head), at) for head, at in zip(heads, offsets[begin:])])
            for head in heads:
                flags.append(head != _ZERO_HEAD)
                if flags.endswith(_ZERO_HEADS):
                    return flags
        return flags + bytes(len(offsets) - len(flags))

    def data_ranges(self, end: int) -> Iterator[Range]:
        """(start, end) of what may be no zeros before end; all of it if the server can't say."""
        context = self._connection.contexts.get("base:allocation")
        if context is None:
            return iter([(0, end)] if end else [])
        return joined(self._ranges(context, end, NBD_STATE_ZERO, 0))

    def bitmap_ranges(self, name: str, end: int) -> Iterator[Range]:
        """(start, end) of what a dirty bitmap says has changed before end.

        Raises Error if it was not asked for, or the server hasn't got it.
        """
        context = self._connection.contexts.get(NBD_DIRTY_BITMAP + name)
        if context is None:
            raise Error(f"cannot open {self.label}: its server has no dirty bitmap {quoted(name)}")
        return joined(self._ranges(context, end, NBD_STATE_DIRTY, NBD_STATE_DIRTY))

    def _whole_blocks(self, start: int, end: int) -> Range:
        """The server's blocks around a range; the last may be cut by the end of the export."""
        block = self._connection.block_size
        return start // block * block, min(align_up(end, block), self.size)

    def _ranges(self, context: int, end: int, mask: int, wanted: int) -> Iterator[Range]:
        """(start, end) of where the bits of mask in the block status are as wanted."""
        position = 0
        while position < end:
            at, last = self._whole_blocks(position, end)
            request = NbdRequest(at, min(last - at, MAX_NBD_STATUS), context=context)
            self._perform(NBD_CMD_BLOCK_STATUS, 0, [request])
            before = position
            for length, state in struct.iter_unpack(">II", request.extents):
                at += length
                start, position = position, max(position, min(at, end))
                if position > start and state & mask == wanted:
                    yield start, position
            if position == before:
                raise self._read_error(position, "the server gives no block status")

    def _read(self, pieces: Sequence[Tuple[memoryview, int]]) -> None:
        """Fill each view from its offset on, by reading whole blocks."""
        requests, copies = [], []
        for view, offset in pieces:
            first, last = self._whole_blocks(offset, offset + len(view))
            target = view
            if last - first > len(view):
                target = memoryview(bytearray(last - first))
                copies.append((view, target[offset - first :]))
            for at in range(first, last, self._read_size):
                part = target[at - first : at - first + self._read_size]
                requests.append(NbdRequest(at, len(part), part))
        flags = self._read_flags
        try:
            self._perform(NBD_CMD_READ, flags, requests)
        except ReadError:
            numbers = [each.error[2] for each in requests if each.error]
            if not flags or errno.EOVERFLOW not in numbers:
                raise
            self._read_flags = 0  # it can't send so much in one chunk
            self._read(pieces)
            return
        for view, target in copies:
            view[:] = target[: len(view)]

    def _perform(self, command: int, flags: int, requests: List[NbdRequest]) -> None:
        """Send requests, and wait until all are answered. Raises Error if one of them fails."""
        batch = dict(zip(self._cookies, requests))
        self._waiting.update(dict.fromkeys(batch, batch))
        packets = b"".join(
            NBD_REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, each.offset, each.length)
            for cookie, each in batch.items()
        )
        try:
            with self._sending:
                self._connection.sock.sendall(packets)
        except OSError as error:
            self._broken = self._broken or socket_reason(error)
            with self._answered:  # over TLS, others wait for the lock that this one had
                self._answered.notify_all()
        while batch and not self._broken:
            if self._receiving.acquire(False):
                self._receive(batch)
            else:
                with self._answered:
                    self._answered.wait_for(lambda: not (batch and self._receiving.locked()))
        if batch:
            raise Error(str(self._read_error(requests[0].offset, self._broken)))
        for request in requests:
            if request.error:
                raise self._read_error(*request.error[:2])

    def _receive(self, batch: Dict[int, NbdRequest]) -> None:
        """Receive answers, until those to a batch are complete, and let another thread do so."""
        try:
            while batch and not self._broken:
                self._receive_reply()
        except (OSError, ValueError, struct.error) as error:
            self._broken = socket_reason(error)
        finally:
            self._receiving.release()
            with self._answered:
                self._answered.notify_all()

    def _receive_reply(self) -> None:
        """Receive a reply, or a chunk of a structured one, to a request of any thread."""
        connection = self._connection
        magic, high, low, cookie = connection.unpack(NBD_REPLY)
        if cookie not in self._waiting:
            raise ValueError("the server answers what was not asked")
        request = self._waiting[cookie][cookie]
        is_last = True
        if magic == NBD_STRUCTURED_REPLY_MAGIC:
            is_last = bool(high & NBD_REPLY_FLAG_DONE)
            request.receive_chunk(connection, low, *connection.unpack(">I"))
        elif magic != NBD_SIMPLE_REPLY_MAGIC:
            raise ValueError(BROKEN_PROTOCOL)
        elif high or low:
            request.fail(high << 16 | low, request.offset)
        else:
            connection.receive_into(request.place(request.offset, request.length))
        if is_last:
            if request.left and not request.error:
                raise ValueError("the server's answer is not complete")
            batch = self._waiting.pop(cookie)
            del batch[cookie]
            if not batch:
                with self._answered:
                    self._answered.notify_all()


def open_export(
    sock: Any,
    label: str,
    resources: contextlib.ExitStack,
    export: str = "",
    address: Optional[NbdAddress] = None,
    bitmap: Optional[str] = None,
) -> NbdExport:
    """Negotiate on a new connection. Raises Error if that fails.

    label       what the export is called in messages
    address     where the server is, if TLS is wanted
    bitmap      the name of a dirty bitmap whose ranges will be asked for
    """
    contexts = ["base:allocation"] + ([] if bitmap is None else [NBD_DIRTY_BITMAP + bitmap])
    try:
        sock.settimeout(NBD_TIMEOUT)
        connection = NbdConnection(sock, export, contexts, address)
        connection.sock.settimeout(None)
    except (OSError, ValueError, struct.error) as error:
        raise Error(f"cannot open {label}: {socket_reason(error)}") from error
    return resources.enter_context(contextlib.closing(NbdExport(connection, label)))


def connect_nbd_uri(
    uri: str, resources: contextlib.ExitStack, bitmap: Optional[str] = None
) -> NbdExport:
    """Open what an NBD URI names; bitmap: see open_export(). Raises Error if it can't be had."""
    import socket

    address = parse_nbd_uri(uri)
    try:
        if address.socket is not None:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(NBD_TIMEOUT)
            sock.connect(os.fsencode(address.socket))
        else:
            sock = socket.create_connection((address.host, address.port), NBD_TIMEOUT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except (OSError, ValueError) as error:
        raise Error(f"cannot open {quoted(uri)}: {socket_reason(error)}") from error
    tls = address if address.has_tls else None
    return open_export(sock, quoted(uri), resources, address.export, tls, bitmap)


# Formats that only QEMU knows: where its programs say that data lies in one file, it is read there;
# all else is shown by a qemu-nbd of our own.

QEMU_EXIT_TIMEOUT = 3  # seconds for qemu-nbd to disconnect from a server that it reads
QEMU_PACKAGES = "qemu-utils (Debian) or qemu-img (Fedora)"
SOCKET_FOLDERS = ("/dev/shm", "/run", "/tmp")  # after $TMPDIR
SD_LISTEN_FDS_START = 3  # systemd's, from sd_listen_fds(3)
PR_SET_PDEATHSIG = 1  # Linux's, from prctl.h
QEMU_HINTS = (  # of what its programs say, what to do about it
    ("Failed to get.*lock", "a running VM holds the image: export its snapshot, or stop the VM"),
    ("key-secret", "name the key: --object secret,id=s,file=KEY --image-opts driver=qcow2,"
     "encrypt.key-secret=s,file.filename=IMAGE"),
    ("Unknown driver", "QEMU's names are such as qcow2, vmdk, vhdx, vdi, and vpc for VHD"),
    ("can only be used with read-only", "disks are opened for reading only: leave read-only=… out"),
)  # fmt: skip
MAX_COMPLAINT = 1000  # characters of what a program says
COWD_TABLE_SIZE = 4096 * 4  # bytes of a grain table in an extent of an ESX snapshot
VMDK_NO_PARENT = 0xFFFFFFFF  # in place of a parent's content ID
VHDX_REGIONS = 192 << 10  # the offset of its region table; 4 bytes of a GUID are enough
VHDX_BAT, VHDX_METADATA = bytes.fromhex("6677c22d"), bytes.fromhex("06a27c8b")
VHDX_PARAMETERS, VHDX_SECTOR_SIZE = bytes.fromhex("3767a1ca"), bytes.fromhex("1dbf4181")
VHDX_PRESENT, VHDX_NO_DATA = 6, (0, 1, 2, 3, 5)  # states of a block


class ImageName(NamedTuple):
    """A disk as QEMU's programs are to find it.

    name        as the user gave it
    format      such as "qcow2"; never guessed: empty is raw, though nobody has said so
    is_options  the name is a block device option string, and says the format itself
    """

    name: str
    format: str
    is_options: bool

    def arguments(self, objects: Sequence[str]) -> List[bytes]:
        """What names it to qemu-img and qemu-nbd: after a lock that stops no virtual machine."""
        options = self.name
        if not self.is_options:
            driver = "host_device" if is_block_device(self.name) else "file"
            name = self.name.replace(",", ",,")
            options = f"driver={self.format},file.driver={driver},file.filename={name}"
        words = ["--image-opts", options + ",force-share=on"]
        return [os.fsencode(word) for word in words + [f"--object={each}" for each in objects]]


def is_block_device(name: str) -> bool:
    """Whether a name leads to a block device; not if it leads nowhere, as QEMU will say."""
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISBLK(os.stat(name).st_mode)
    return False


def start_program(arguments: Sequence[bytes], listener: Any = None) -> Any:
    """Start one of QEMU's programs, and have it killed when the calling thread ends.

    listener    a socket to which it listens; otherwise its output goes into a pipe

    Returns a Popen. The pipe of its stderr keeps what it says first and loses the rest: nobody
    need read it. Raises Error if the program isn't there.
    """
    import subprocess

    parent = os.getpid()
    libc_call("getpid")  # has the library loaded now: a child had better not

    def prepare() -> None:
        libc_call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
        os.set_blocking(2, False)
        if listener is not None:
            os.dup2(listener.fileno(), SD_LISTEN_FDS_START)
            os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))

    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if listener is None else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=prepare,  # noqa: PLW1509  # no thread runs yet
            pass_fds=() if listener is None else (SD_LISTEN_FDS_START,),
        )
    except (OSError, subprocess.SubprocessError) as error:
        why = reason(error)
        if getattr(error, "filename", None) == os.devnull:
            why = f"{os.devnull}: {why}"
        elif isinstance(error, FileNotFoundError):
            why += f"; it comes with the package {QEMU_PACKAGES}"
        raise Error(f"cannot run {os.fsdecode(arguments[0])}: {why}") from error


def end_program(program: Any, timeout: float = 0) -> str:
    """Kill a program if it does not end by itself in time.

    Returns what it has said is wrong, in one line, and what to do if that is known.
    """
    import subprocess

    with contextlib.suppress(subprocess.TimeoutExpired):
        program.wait(timeout)
    program.kill()
    program.wait()
    os.set_blocking(program.stderr.fileno(), False)  # a child of it may hold the other end
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(program.stderr.fileno(), 64 << 10)
    text = shown_text(b"; ".join(filter(None, map(bytes.strip, said.splitlines()))))
    # What it calls the image is our own option string.
    text = re.sub(r"^qemu-(img|nbd): |[\w ]*open '.*,force-share=on': ", "", text)[:MAX_COMPLAINT]
    for pattern, hint in QEMU_HINTS:
        if re.search(pattern, text):
            text += f"; {hint}"
    return text


def run_qemu_img(
    arguments: Sequence[bytes], label: str, timeout: Optional[float] = None
) -> Generator[bytes, None, None]:
    """The lines that qemu-img prints of an image. Raises Error with its complaint."""
    failed = f"cannot open {label}: "
    with start_program([b"qemu-img", *arguments, b"--output=json"]) as program:
        try:
            if not wait_for(program.stdout.fileno(), "POLLIN", timeout):
                raise Error(failed + f"qemu-img does not answer within {timeout} seconds")
            for line in program.stdout:
                yield line
            if program.wait():
                raise Error(failed + (end_program(program) or "qemu-img says nothing"))
        finally:
            program.kill()


def private_socket() -> Tuple[Any, Any]:
    """A Unix socket that listens, and one that is connected to it. Nobody else can reach it.

    Its name, in a folder of its own, is gone when this returns.
    """
    import socket
    import tempfile

    errors = []
    for parent in filter(None, (os.environ.get("TMPDIR"), *SOCKET_FOLDERS)):
        listener, sock = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        # A signal that ends the program must not leave the folder.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        try:
            with tempfile.TemporaryDirectory("", PROGRAM, parent) as folder:
                path = os.path.join(folder, "nbd")
                listener.bind(path)
                listener.listen(1)
                sock.connect(path)
                return listener, sock
        except OSError as error:
            errors.append(f"{quoted(parent)}: {socket_reason(error)}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    raise Error(f"cannot make a socket for qemu-nbd; TMPDIR names a folder ({'; '.join(errors)})")


def start_qemu_nbd(
    arguments: Sequence[bytes], label: str, watch: Watch, resources: contextlib.ExitStack
) -> NbdExport:
    """Have a private qemu-nbd open an image. To be called by the main thread.

    arguments   what names the image, and any options
    label       what the image is called in messages

    It ends with the resources, or with the main thread, whatever ends that. What it has open is
    watched. Raises Error with its complaint.
    """
    listener, sock = private_socket()
    resources.callback(sock.close)
    try:
        program = start_program([b"qemu-nbd", b"--read-only", *arguments], listener)
    finally:
        listener.close()  # so that the connection ends with qemu-nbd
    resources.enter_context(program)
    resources.callback(end_program, program, QEMU_EXIT_TIMEOUT)
    try:
        export = open_export(sock, label, resources)
    except Error as error:
        why = end_program(program)
        raise Error(f"cannot open {label}: {why}") if why else error from None
    folder = f"/proc/{program.pid}/fd"
    with ignore_unavailable():
        for path in (f"{folder}/{name}" for name in os.listdir(folder)):
            with ignore_unavailable():
                mode = os.stat(path).st_mode
                if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
                    file = DiskFile(path, watch, quoted(os.readlink(path)))
                    resources.callback(file.close)
    return export


class MappedSource(Source):
    """A disk whose guest bytes lie in files at offsets that are known: 26 bytes an extent."""

    def __init__(self, size: int, watch: Watch) -> None:
        super().__init__(size, watch)
        self._files = []  # type: List[DiskFile]
        self._rows = array("Q")  # start, end, offset in the file; in guest order
        self._owners = array("H")  # of each row, the index of its file

    def add(self, start: int, end: int, file: DiskFile, offset: int) -> None:
        """Append an extent. Raises Error if its file ends before it: QEMU would read zeros."""
        end = min(end, self.size)
        if offset + end - start > file.size:
            raise file.ended_early(file.size)
        if file not in self._files:
            self._files.append(file)
        index, rows, owners = self._files.index(file), self._rows, self._owners
        if rows and (start, offset, index) == (rows[-2], rows[-1] + start - rows[-3], owners[-1]):
            rows[-2] = end  # it continues the last one
        else:
            rows.extend((start, end, offset))
            owners.append(index)

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        numbers = iter(self._rows)
        for start, end, offset, index in zip(numbers, numbers, numbers, self._owners):
            yield start, end, self._files[index], offset, 0


class Member(NamedTuple):
    """An image in a chain.

    name    of its own file; empty if it is no local one
    info    what `qemu-img info` says of it
    files   that hold its data, each with the guest address where its share ends; none if unknown
    """

    name: str
    info: Dict[str, Any]
    files: List[Tuple[int, DiskFile]]


def data_files(
    name: str, info: Dict[str, Any], open_file: Callable[[str], DiskFile]
) -> List[Tuple[int, DiskFile]]:
    """See Member."""
    details = info.get("format-specific", {}).get("data", {})
    if {"data-file", "data-file-raw"} & details.keys():
        return []  # nobody knows whether the header or an option names it
    # A VMDK may have several, one after the other.
    extents = details.get("extents", [{"filename": name, "virtual-size": info["virtual-size"]}])
    names = [extent["filename"] for extent in extents]
    if not all(os.path.isfile(name) or is_block_device(name) for name in names):
        return []
    ends = itertools.accumulate(extent["virtual-size"] for extent in extents)
    return list(zip(ends, map(open_file, names)))


def refuse_misread(members: Sequence[Member]) -> None:
    """Raise Error if there is more in a chain than QEMU reads."""
    for name, info, files in members:
        fmt = info["format"]
        if fmt == "qcow2" and os.path.isfile(name):
            with contextlib.ExitStack() as resources, contextlib.suppress(NeedsQemu):
                image = Qcow2Image(name, Watch(), resources)
                collections.deque(map(image.table, range(image.table_count)), maxlen=0)
        for _, file in files:
            if fmt == "qcow":
                refuse_if_qcow_tables_are_missing(file)
            elif fmt == "vmdk":
                refuse_if_grain_tables_are_missing(file)
            elif fmt == "vpc":
                refuse_misread_vhd(file, info["virtual-size"])
    last = members[-1].info
    details = last.get("format-specific", {}).get("data", {})
    if details.get("parent-cid", VMDK_NO_PARENT) != VMDK_NO_PARENT:
        raise Error(
            f"{quoted(last['filename'])} is a differencing VMDK that does not name its parent's "
            "file, and QEMU would read zeros where that has data; merge them first"
        )


def refuse_misread_vhd(file: DiskFile, size: int) -> None:
    """Raise Error if a VHD has more than the `size` bytes that QEMU reads, or a parent.

    QEMU knows of no parents, such as those that XenServer's and Hyper-V's snapshots have, and takes
    the size from the geometry, unless it knows the program that made the image.
    """
    # Where there is a copy of the footer at the beginning, QEMU reads that.
    footer = file.read(0, SECTOR_SIZE)
    if not footer.startswith(b"conectix"):
        footer = file.read(file.size - SECTOR_SIZE, SECTOR_SIZE)
    creator, whole, kind = struct.unpack_from(">28x4s16xQ4xI", footer)
    if kind == 4:
        raise Error(
            f"{file.label} is a differencing VHD, and QEMU would read zeros where its parent has "
            "data; merge them first, or export the device that XenServer or Hyper-V makes of them"
        )
    if whole > size and creator not in (b"vpc ", b"qemu"):
        raise Error(
            f"{file.label} has a disk of {whole} bytes, of which QEMU would read {size}; convert "
            "it to another format with the program that made it"
        )


def refuse_if_qcow_tables_are_missing(file: DiskFile) -> None:
    """Raise Error if a qcow image (version 1) ends before its L1 or one of its L2 tables.

    QEMU would take what is missing for clusters that were never written.
    """
    size, cluster_bits, l2_bits, offset = struct.unpack(">24xQBB6xQ", file.read(0, 48))
    count = min(div_up(size, 1 << cluster_bits + l2_bits), MAX_L1_BYTES // ENTRY_SIZE)
    if offset + count * ENTRY_SIZE > file.size:
        raise file.ended_early(file.size)
    last = max(unpack_entries(file.read(offset, count * ENTRY_SIZE)), default=0) & ~OFLAG_COPIED
    if last and last + (ENTRY_SIZE << l2_bits) > file.size:
        raise file.ended_early(file.size)


def refuse_if_grain_tables_are_missing(file: DiskFile) -> None:
    """Raise Error if an extent of an ESX snapshot (COWD) ends before one of its grain tables."""
    magic, sector, count = struct.unpack("<4s16xII", file.read(0, 28))
    if magic == b"COWD" and count * 4 <= MAX_L1_BYTES:
        table = struct.unpack(f"<{count}I", file.read(sector * SECTOR_SIZE, count * 4))
        last = max(table, default=0) * SECTOR_SIZE
        if last and last + COWD_TABLE_SIZE > file.size:
            raise file.ended_early(file.size)


def local_name(name: str) -> str:
    """The file that QEMU's name of an image means; empty if it is no local one."""
    import json

    with contextlib.suppress(ValueError, LookupError, TypeError):
        if name.startswith("json:"):
            return str(json.loads(name[len("json:") :])["file"]["filename"])
    return "" if re.match("[^/]*:", name) else name


def parsed(text: bytes, label: str) -> Any:
    """What qemu-img has printed as JSON. Raises Error if it is none, as where it was killed."""
    import json

    try:
        return json.loads(text.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise Error(f"cannot open {label}: qemu-img does not print what it should") from error


def read_map(
    lines: Iterable[bytes], label: str, members: Sequence[Member], watch: Watch
) -> Optional[MappedSource]:
    """The disk where `qemu-img map` says that it is; None if QEMU must read some of it.

    Raises Error if a file ends before its data.
    """
    source = MappedSource(members[0].info["virtual-size"], watch)
    position = 0
    is_known = not any(member.info.get("encrypted") for member in members)
    # A list, an entry a line: no text is kept of it.
    for text in filter(None, (line.strip(b"[], \r\n") for line in lines)):
        entry = parsed(text, label)
        start, length, depth = entry["start"], entry["length"], entry["depth"]
        position = start + length
        if not entry["data"] or entry.get("compressed") or "offset" not in entry:
            is_known = is_known and entry["zero"]
            continue
        files = members[depth].files if depth < len(members) else []
        file = next((file for end, file in files if start < end), None)
        if file is None:
            is_known = False
            continue
        behind = entry["offset"] + length - file.size
        if members[depth].info["format"] == "raw" and 0 < behind < SECTOR_SIZE:
            length -= behind  # QEMU counts its last sector as whole
        source.add(start, start + length, file, entry["offset"])
    if position != source.size:
        raise Error(f"cannot open {label}: qemu-img maps {position} of {source.size} bytes")
    return source if is_known else None


def vhdx_items(table: bytes, first: int, code: str) -> Dict[bytes, Tuple[int, ...]]:
    """The entries of a VHDX's region or metadata table, by the first bytes of their GUIDs."""
    entries = (table[at : at + 32] for at in range(first, len(table) - 31, 32))
    return {entry[:4]: struct.unpack(code, entry[16:]) for entry in entries}


def read_vhdx(file: DiskFile, size: int, watch: Watch) -> Optional[MappedSource]:
    """The disk in a VHDX, from its block allocation table (MS-VHDX, sections 2.2.3 to 2.6).

    None where QEMU must say what it means. It has opened the image: there is no log to replay.
    """
    regions = vhdx_items(file.read(VHDX_REGIONS, 64 << 10), 16, "<QII")
    metadata, bat = regions[VHDX_METADATA][0], regions[VHDX_BAT][0]
    items = vhdx_items(file.read(metadata, 64 << 10), 32, "<IIII")
    block_size, sector_size = (
        int.from_bytes(file.read(metadata + items[guid][0], 4), "little")
        for guid in (VHDX_PARAMETERS, VHDX_SECTOR_SIZE)
    )
    blocks_per_bitmap = (sector_size << 23) // block_size
    source = MappedSource(size, watch)
    for first in range(0, div_up(size, block_size), blocks_per_bitmap):
        # Each of these groups is followed by the entry of a sector bitmap, which is not used.
        count = min(blocks_per_bitmap, div_up(size, block_size) - first)
        at = bat + (first + first // blocks_per_bitmap) * ENTRY_SIZE
        entries = struct.unpack(f"<{count}Q", file.read(at, count * ENTRY_SIZE))
        for index, entry in enumerate(entries, first):
            state, offset = entry & 7, entry >> 20 << 20
            if state == VHDX_PRESENT:
                start = index * block_size
                source.add(start, start + block_size, file, offset)
            elif state not in VHDX_NO_DATA:
                return None
    return source


def open_with_qemu(
    image: ImageName,
    watch: Watch,
    resources: contextlib.ExitStack,
    objects: Sequence[str] = (),
    snapshot: Optional[str] = None,
) -> Source:
    """Open a disk in any format that QEMU knows. To be called by the main thread.

    Where the offsets of all its data are known, it is read there; else by a qemu-nbd of our own.

    objects     definitions for QEMU's --object
    snapshot    the name or ID of an internal snapshot

    Raises Error if QEMU can't open it, or would read less than it holds.
    """
    opened = {}  # type: Dict[str, DiskFile]

    def open_file(name: str) -> DiskFile:
        if name not in opened:
            opened[name] = DiskFile(name, watch)
            resources.callback(opened[name].close)
        return opened[name]

    if not image.is_options:  # watched before anything is learned of it
        open_file(image.name)
    label, arguments = quoted(image.name), image.arguments(objects)
    info = run_qemu_img([b"info", b"--backing-chain", *arguments], label, NBD_TIMEOUT)
    infos = parsed(b"".join(info), label)
    names = [local_name(info["filename"]) for info in infos]
    if not image.is_options:  # which qemu-img may not be able to print
        names[0] = image.name
    members = [
        Member(name, info, data_files(name, info, open_file)) for name, info in zip(names, infos)
    ]
    refuse_misread(members)
    source, size = None, infos[0]["virtual-size"]  # type: Optional[Source], int
    if infos[0]["format"] == "vhdx" and not image.is_options:
        source = read_vhdx(members[0].files[0][1], size, watch)
    elif snapshot is None:
        with contextlib.closing(run_qemu_img([b"map", *arguments], label)) as lines:
            source = read_map(lines, label, members, watch)
    else:
        arguments.append(b"--load-snapshot=" + os.fsencode(snapshot))
    if source is None or image.is_options:
        source = RawSource(start_qemu_nbd(arguments, label, watch, resources), watch)
    for name, file in opened.items():
        if file_identity(os.stat(name)) != file.identity:
            raise Error(f"{quoted(name)} was replaced while it was opened; run the program again")
    return source


# ---------------------------------------------------------------------------------------------
# Scan: what each guest cluster will be. One cluster map, filled once and in guest order. What
# others say of a disk (layouts, maps, dirty bitmaps) becomes ranges; rules turn ranges into
# steps; readers take the steps that need a look, and the map gets the states.
# ---------------------------------------------------------------------------------------------

UNALLOCATED, DATA, ZERO, COMPRESSED = 0, 1, 2, 3  # what a cluster can be

MAP_PAGE = 8192  # clusters of a page of the map, or one L2 table if that has more
READ_SIZE = 512 << 10  # bytes of one read in the scan: the buffer stays in the core's cache
SHARE_SIZE = 16 << 20  # bytes of a reader's share: more than a thread's switch is worth
COLD_SHARE_SIZE = 2 << 20  # the same where reads must wait: readers stay close to each other
FIRST_SHARE_SIZE = 256 << 10  # bytes; each is twice the one before: nothing is known yet
ZSTD_LEVEL = 3  # QEMU's; at most others, old libraries are not deterministic
SAMPLES, SAMPLE_SIZE = 16, 256  # of a cluster, in bytes, that hint at whether it would shrink
PACK_SIZE = READ_SIZE  # bytes of a reader's share that is compressed: they fill its buffer
BATCH_STEPS = 256  # steps of a reader's share, however small they are
MANY_EXTENTS = 256  # of a share: each is too small to be worth a thread's switch
AHEAD_ITEMS = 2  # items for each reader: one at work, one that waits for it
INLINE_ITEMS = 3  # of a pipeline, before threads are worth their start
_UNKNOWN = b"\2"  # of a cluster, while it is being looked at
_UNKNOWN_RUN = re.compile(b"\2+(?:\0\2+)*")  # a hole of one is cleared sooner than read around
_SIDE_RUN = re.compile(b"\1+|\2+|\3+")
_ONES_OF_ZERO = bytes((255,)).ljust(256, b"\0")


class ClusterMap:
    """The state of every guest cluster, packed; append-only, in guest order.

    The map is kept in pages, each the reach of one or more whole L2 tables. A page of one
    state is that state's byte; any other is deflated, to three bits a cluster at most.

    cluster_count   guest clusters of the disk
    table_entries   clusters in the reach of one L2 table
    page_clusters   clusters of a page, a multiple of table_entries
    data_clusters   how many are DATA so far
    sizes           bytes of each COMPRESSED one
    """

    def __init__(self, cluster_count: int, table_entries: int, typecode: str = "H") -> None:
        """typecode: of an array that can hold a compressed cluster's size."""
        self.cluster_count = cluster_count
        self.table_entries = table_entries
        self.page_clusters = align_up(MAP_PAGE, table_entries)
        self.data_clusters = 0
        self.sizes = array(typecode)
        self._pages = []  # type: List[bytes]
        self._open = bytearray()  # a byte for each cluster of the page that is being filled

    def __len__(self) -> int:
        """How many clusters are known."""
        return len(self._pages) * self.page_clusters + len(self._open)

    def append(self, state: int, count: int) -> None:
        """Add `count` clusters, all of one state."""
        if state == DATA:
            self.data_clusters += count
        one = bytes((state,))
        lacking = self.page_clusters - len(self._open)
        if count >= lacking:
            self._open += one * lacking
            self._close_pages()
            pages, count = divmod(count - lacking, self.page_clusters)
            self._pages += [one] * pages
        self._open += one * count

    def extend(self, states: bytes, sizes: Iterable[int] = ()) -> None:
        """Add clusters by their states, a byte for each, and the sizes of the COMPRESSED ones."""
        self.sizes.extend(sizes)
        self.data_clusters += states.count(DATA)
        self._open += states
        self._close_pages()

    def finish(self) -> None:
        """Fill the last page: nothing lies past the end of the disk."""
        self.append(UNALLOCATED, -len(self._open) % self.page_clusters)

    def _close_pages(self) -> None:
        import zlib

        while len(self._open) >= self.page_clusters:
            page = bytes(self._open[: self.page_clusters])
            del self._open[: self.page_clusters]
            is_mixed = page.count(page[0]) < len(page)
            self._pages.append(zlib.compress(page, 1) if is_mixed else page[:1])

    def pages(self) -> Iterator[Tuple[int, int, bytes]]:
        """(first cluster, count of clusters, states): runs of equal pages, and mixed pages.

        states is one byte for all of a run, or a byte for each cluster of a mixed page.
        """
        import zlib

        first = 0
        for page, run in itertools.groupby(self._pages):
            count = sum(self.page_clusters for _ in run)
            if len(page) == 1:
                yield first, count, page
            else:
                states = zlib.decompress(page)
                for each in range(first, first + count, self.page_clusters):
                    yield each, self.page_clusters, states
            first += count

    def tables_in_use(self) -> Iterator[Tuple[int, bool]]:
        """(count of L2 tables, whether the file has them), in guest order.

        Together they cover the disk, or up to one page more.
        """
        size = self.table_entries
        for _, count, states in self.pages():
            if len(states) == 1:
                yield count // size, states[0] != UNALLOCATED
            else:
                for start in range(0, count, size):
                    yield 1, states.count(UNALLOCATED, start, start + size) < size

    def data_runs(self, short: int = 1, gap: int = 0) -> Iterator[Tuple[int, int, bytes]]:
        """(first cluster, end cluster, states) of the runs of DATA, as long as they come.

        Runs of less than `short` clusters, with at most `gap` others between two of them, come
        together, and with the state of each cluster. states is empty where all are DATA.
        """
        pattern = data_pattern(short, gap)
        first = end = 0
        for page, count, states in self.pages():
            for run in pattern.finditer(states):
                start, stop = run.span() if len(states) > 1 else (0, count)
                is_broken = states.count(DATA, start, stop) < run.end() - start
                if is_broken or page + start != end:
                    if end > first:
                        yield first, end, b""
                    first = page + start
                end = page + stop
                if is_broken:
                    yield first, end, run.group()
                    first = end
        if end > first:
            yield first, end, b""


def data_pattern(short: int, gap: int) -> Any:
    """Finds runs of DATA in states: one of `short` clusters or more, or shorter ones together.

    gap     clusters that may lie between two short ones
    """
    if short <= 1 or not gap:
        return re.compile(b"\x01+")
    return re.compile(
        b"\x01{%d,}|\x01+(?:[^\x01]{1,%d}\x01{1,%d}(?!\x01))*" % (short, gap, short - 1)
    )


def cluster_runs(ranges: Iterable[Sequence[Any]], cluster_size: int) -> Iterator[Range]:
    """The clusters that sorted byte ranges touch, rounded outwards: disjoint ranges."""
    return joined((each[0] // cluster_size, div_up(each[1], cluster_size)) for each in ranges)


def sweep(end: int, *rows: Iterable[Any], start: int = 0) -> Iterator[Tuple[int, int, List[Any]]]:
    """Lay several rows of disjoint, sorted ranges over each other, from start to end.

    Yields (start, end, items): in each row the range that covers this stretch, or None. The
    stretches are as long as they can be, and follow each other without a gap.
    """
    iterators = [iter(row) for row in rows]
    current = [next(iterator, _PAST) for iterator in iterators]
    position = start
    while position < end:
        items = []
        limit = end
        for item in current:
            is_here = item[0] <= position
            items.append(item if is_here else None)
            limit = min(limit, item[1] if is_here else item[0])
        yield position, limit, items
        position = limit
        for row, item in enumerate(current):
            if item[1] <= position:
                current[row] = next(iterators[row], _PAST)


class Cutter:
    """Takes a row of sorted, disjoint ranges or extents apart, from its start to its end."""

    def __init__(self, row: Iterable[Any]) -> None:
        self._row = iter(row)
        self._next = next(self._row, _PAST)

    def first(self, position: int) -> Range:
        """Start and end of the first range that ends behind a position; MAX_SIZE if none does."""
        while self._next[1] <= position:
            self._next = next(self._row, _PAST)
        return self._next[:2]

    def take(self, start: int, end: int) -> List[Any]:
        """What lies between start and end, cut to that. Never back: start must rise."""
        taken = []
        item = self._next
        while item[0] < end:
            if item[1] > start:
                if item[0] < start or item[1] > end:
                    taken.append(cut(item, max(start, item[0]), min(end, item[1])))
                else:
                    taken.append(item)
            if item[1] > end:
                break
            item = next(self._row, _PAST)
        self._next = item
        return taken


_PAST = (MAX_SIZE, MAX_SIZE + 1)  # behind every row


class ReadPolicy:
    """How the next reads are best made, from what the last ones were like.

    expects_data    so many clusters were data that the first bytes of each are looked at first
    is_cold         the first read was not in memory: what must be read is asked for ahead (None:
                    nothing is known yet)
    reads_all       it is to be read from the start to the end, as a program that serves files
                    (FUSE) likes it, if memory keeps them for the copy
    share_size      bytes of a reader's share, at most
    """

    def __init__(self, reads_all: bool = False, share_size: int = SHARE_SIZE) -> None:
        self.expects_data = True
        self.is_cold = None  # type: Optional[bool]
        self.reads_all = reads_all
        self.share_size = share_size
        self._window = FIRST_SHARE_SIZE

    def look_at(self, extents: Sequence[Extent]) -> None:
        """See what kind of source it is, by its first extent."""
        if self.is_cold is None and extents:
            file, offset, stored = extents[0][2:]
            file = file.file if stored else file
            self.is_cold = not file.is_cached(offset)
            if self.is_cold and isinstance(file, DiskFile) and file.size < available_memory() // 2:
                self.reads_all |= is_fuse(os.fstat(file.fd).st_dev)

    def is_quick(self, batch: Sequence["Step"]) -> bool:
        """Whether a share is but small reads from memory.

        These hand Python's lock from thread to thread with each call: four readers would take
        twice the time of one.
        """
        if self.is_cold or any(step.packer for step in batch):
            return False
        if sum(len(step.ours) + len(step.theirs) for step in batch) > MANY_EXTENTS:
            return True
        return self.expects_data and not any(step.theirs for step in batch)

    @property
    def looks_at_heads(self) -> bool:
        """Whether the first bytes of clusters are worth a read of their own."""
        return self.expects_data and not self.reads_all

    def learn(self, zeros: int, clusters: int) -> None:
        """Take note of how many of some clusters were zeros.

        From memory, several readers that read everything are the faster ones where more than a
        quarter is zeros. From a disk or a network, what is not read is won.
        """
        if clusters:
            self.expects_data = zeros <= clusters * (0.5 if self.is_cold else 0.25)

    def next_window(self) -> int:
        """Bytes of guest addresses that one step may span."""
        window = min(self._window, COLD_SHARE_SIZE if self.is_cold else SHARE_SIZE, self.share_size)
        self._window = 2 * window
        return window


def is_fuse(device: int) -> bool:
    """Whether a program serves the file system with this number, as far as Linux says."""
    place = f"^[0-9]+ [0-9]+ {os.major(device)}:{os.minor(device)} .* - fuse"
    with ignore_unavailable(), open("/proc/self/mountinfo", "rb") as mounts:
        return re.search(place.encode("ascii"), mounts.read(), re.MULTILINE) is not None
    return False


def available_memory() -> int:
    """Bytes that the page cache may take, as far as Linux says; 0 elsewhere."""
    with contextlib.suppress(OSError, LookupError, ValueError), open("/proc/meminfo") as file:
        return int(dict(line.split(":") for line in file)["MemAvailable"].split()[0]) << 10
    return 0


class Scratch(NamedTuple):
    """The buffers of one reader, for the disk and for its base.

    Used again and again: the kernel would have to clear new memory, which costs more than a read.
    """

    data: bytearray
    base: bytearray


# What is to be handed out in order, its bytes, what a reader does for it, and whether that is done
# sooner than another thread could be asked.
Job = Tuple[Any, int, Optional[Callable[[Scratch], Any]], bool]


class Readers:
    """A few threads that read, inflate and compress: system calls and zlib let each other run.

    Two or three of them overlap the latency of a disk or the network, and use more than one core
    where all is in memory. Started when there is work; they never keep the program alive.
    """

    def __init__(self, count: int, policy: ReadPolicy, cluster_size: int) -> None:
        self.count = count
        self.policy = policy
        self._buffer_size = max(PACK_SIZE, cluster_size)
        self._scratch = self._make_scratch()  # the main thread's
        self._threads = 0
        self._work = None  # type: Any  # a queue of what is to be done, and where its result goes

    def in_order(self, jobs: Iterable[Job], items: int, size: int) -> Iterator[Tuple[Any, Any]]:
        """(item, result) of each job, in order, while the next ones are at work already.

        items, size     how many jobs, and of how many bytes, may wait to be handed out
        """
        pending = collections.deque()  # type: collections.deque[Tuple[Any, int, Any]]
        waiting = 0
        for number, (item, length, work, is_quick) in enumerate(jobs):
            # A small disk is read before a thread has started.
            is_first = number < INLINE_ITEMS and not self.policy.is_cold
            if work is None:
                result = None, None  # type: Any
            elif is_quick or is_first or self.count == 1:
                result = work(self._scratch), None
            else:
                result = self._hand_over(work)
            pending.append((item, length, result))
            waiting += length
            while waiting > size or len(pending) > items:
                done, bytes_done, result = pending.popleft()
                waiting -= bytes_done
                yield done, self._wait_for(result)
        for item, _, result in pending:
            yield item, self._wait_for(result)

    @staticmethod
    def _wait_for(result: Any) -> Any:
        value, error = result if isinstance(result, tuple) else result.get()
        if error is not None:
            raise error
        return value

    def _make_scratch(self) -> Scratch:
        return Scratch(bytearray(self._buffer_size), bytearray(self._buffer_size))

    def _hand_over(self, work: Callable[[Scratch], Any]) -> Any:
        """Where its result will come: a queue of one."""
        import queue
        import threading

        make_queue = getattr(queue, "SimpleQueue", queue.Queue)  # Python 3.7: the lighter one
        if self._work is None:
            self._work = make_queue()
        if self._threads < self.count:
            try:
                threading.Thread(target=self._run, daemon=True).start()
            except RuntimeError as error:  # a limit of the system's
                raise Error(f"cannot start a reader: {error}; try --parallel 1") from error
            self._threads += 1
        result = make_queue()  # type: Any
        self._work.put((work, result))
        return result

    def _run(self) -> None:
        # A signal that is caught is for the main thread, whose wait it interrupts.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGUSR1])
        scratch = self._make_scratch()
        while True:
            work, result = self._work.get()
            try:
                result.put((work(scratch), None))
            except BaseException as error:  # goes on in the main thread
                result.put((None, error))


class Step(NamedTuple):
    """What some clusters are, or who finds out.

    first, end  clusters, end exclusive
    state       of all of them, or of each; with a probe: if nothing else is found there
    probe       finds out their states
    ours        extents of the disk there
    theirs      extents of its base there
    packer      compresses what is data
    """

    first: int
    end: int
    state: Union[int, bytes]
    probe: Optional["Probe"] = None
    ours: Sequence[Extent] = ()
    theirs: Sequence[Extent] = ()
    packer: Optional["Packer"] = None


class Probe(NamedTuple):
    """Finds out what clusters are by reading them.

    disks       the disk, and perhaps a base: what is equal there is unallocated
    zeros       the state of a cluster that differs from the base and is all zeros
    is_trusted  what only one of both disks stores differs, without looking
    """

    cluster_size: int
    disks: Sequence[Source]
    zeros: int
    policy: ReadPolicy
    is_trusted: bool = False

    def ask_ahead(self, step: Step) -> None:
        """Have the kernel fetch what is read next, so that it need not wait for each read."""
        size = self.cluster_size
        heads = self.policy.looks_at_heads and size > HEAD_SIZE and not step.theirs
        for start, end, file, offset, stored in itertools.chain(step.ours, step.theirs):
            if stored:
                file.file.advise(offset, stored, "WILLNEED")
            elif heads:
                for at in range(offset + -start % size, offset + end - start, size):
                    file.advise(at, HEAD_SIZE, "WILLNEED")
            else:
                file.advise(offset, end - start, "WILLNEED")

    def states(self, step: Step, scratch: Scratch) -> bytearray:
        """The states of a step's clusters, a byte for each."""
        first, end = step.first, step.end
        if len(self.disks) == 1:
            states = self._look(self.disks[0], first, end, step.ours, scratch)
            if isinstance(step.state, int):
                return states.replace(b"\0", bytes((step.state,)))
            known = int.from_bytes(step.state, "big")
            known &= int.from_bytes(states.translate(_ONES_OF_ZERO), "big")
            known |= int.from_bytes(states, "big")
            return bytearray(known.to_bytes(end - first, "big"))
        states = self._differences(step, scratch)
        size = self.cluster_size
        if self._is_damaged(first * size, end * size):  # what can't be read differs from anything
            for at in range(first, end):
                if not states[at - first] and self._is_damaged(at * size, (at + 1) * size):
                    ours = Cutter(step.ours).take(at * size, (at + 1) * size)
                    has_data = self._look(self.disks[0], at, at + 1, ours, scratch)[0]
                    states[at - first] = DATA if has_data else self.zeros
        return states

    def _is_damaged(self, start: int, end: int) -> bool:
        return any(disk.is_damaged(start, end) for disk in self.disks)

    def _look(
        self, disk: Source, first: int, end: int, extents: Sequence[Extent], scratch: Scratch
    ) -> bytearray:
        """Of each cluster from first to end: DATA, or UNALLOCATED where it is all zeros.

        Where data is dense, the first 4 KiB of a cluster nearly always prove that it is data: the
        rest of it need not be read twice. A disk full of data is read 1.07 times in all.
        """
        size = self.cluster_size
        states = bytearray(end - first)
        heads = self.policy.looks_at_heads and size > HEAD_SIZE
        for start, stop, file, offset, stored in extents:
            low, high = start // size - first, -(-stop // size) - first
            low += states[low] == DATA  # by an extent before
            states[low:high] = _UNKNOWN * (high - low)
            if stored:
                # Zeros would have become shorter: a cluster is not inflated for the scan as well.
                if stored > 2 * SECTOR_SIZE + file.cluster_size // 100:
                    states[low:high] = b"\1" * (high - low)
            elif heads:
                skip = -start % size  # to the first cluster that begins here
                offsets = range(offset + skip, offset + stop - start - HEAD_SIZE + 1, size)
                if offsets:
                    at = (start + skip) // size - first
                    found = file.look_at_heads(offsets).replace(b"\0", _UNKNOWN)
                    states[at : at + len(found)] = found
        stored_count = len(states) - states.count(0)
        rows = [(disk, Cutter(extents), scratch.data)]
        blank = zeros(size)
        for run in _UNKNOWN_RUN.finditer(states):
            for low, high in self._read(first + run.start(), first + run.end(), rows):
                places = range(0, (high - low) * size, size)
                flags = [not scratch.data.startswith(blank, at) for at in places]
                states[low - first : high - first] = bytes(flags)
        self.policy.learn(stored_count - states.count(DATA), stored_count)
        return states

    def _read(
        self, first: int, end: int, rows: Sequence[Tuple[Source, Cutter, bytearray]]
    ) -> Iterator[Range]:
        """Read clusters of some disks into buffers: (first, end) of those that are there now."""
        step = max(1, READ_SIZE // self.cluster_size)
        for low in range(first, end, step):
            high = min(low + step, end)
            start, stop = low * self.cluster_size, high * self.cluster_size
            for disk, extents, buffer in rows:
                view = memoryview(buffer)[: stop - start]
                disk.read_into(view, start, extents.take(start, stop))
            yield low, high

    def _differences(self, step: Step, scratch: Scratch) -> bytearray:
        size = self.cluster_size
        first, end, _, _, ours, theirs, _ = step
        both = sweep(end * size, *map(shifted, (ours, theirs)), start=first * size)
        differs = (
            (start, stop)
            for start, stop, (mine, yours) in both
            if (mine and mine[2:]) != (yours and yours[2:])
        )
        flags = [
            painted([(cluster_runs(row, size), 1)], first, end) for row in (differs, ours, theirs)
        ]
        # Of each cluster: 0 if both are equal, else 1 if only ours is stored, 2 if only theirs.
        sides = bytes([changed and mine + 2 * yours for changed, mine, yours in zip(*flags)])
        states = bytearray(end - first)
        rows = [*zip(self.disks, (Cutter(ours), Cutter(theirs)), scratch)]
        for run in _SIDE_RUN.finditer(sides):
            low, high = first + run.start(), first + run.end()
            side = sides[run.start()]
            if side == 3:
                found = self._compare(low, high, rows)
            elif self.is_trusted:
                found = bytearray(b"\1") * (high - low)
            else:
                disk, extents, _ = rows[side - 1]
                here = extents.take(low * size, high * size)
                found = self._look(disk, low, high, here, scratch)
            if side == 2:
                found = found.replace(b"\1", bytes((self.zeros,)))
            states[run.start() : run.end()] = found
        return states

    def _compare(
        self, first: int, end: int, rows: Sequence[Tuple[Source, Cutter, bytearray]]
    ) -> bytearray:
        size = self.cluster_size
        states = bytearray()
        blank = zeros(size)
        mine, yours = rows[0][2], memoryview(rows[1][2])
        for low, high in self._read(first, end, rows):
            for at in range(0, (high - low) * size, size):
                if mine.startswith(yours[at : at + size], at):
                    states.append(UNALLOCATED)
                else:
                    states.append(self.zeros if mine.startswith(blank, at) else DATA)
        return states


def shifted(extents: Iterable[Extent]) -> Iterator[Tuple[Any, ...]]:
    """Extents by what makes them equal: the very same bytes of the same file at one address."""
    for start, end, file, offset, stored in extents:
        yield start, end, file.identity, offset if stored else offset - start, stored


def painted(rows: Iterable[Tuple[Iterable[Range], int]], first: int, end: int) -> bytes:
    """The states of clusters from first to end, by runs within: later rows cover earlier ones."""
    states = bytearray(end - first)
    for runs, state in rows:
        one = bytes((state,))
        for low, high in runs:
            states[low - first : high - first] = one * (high - low)
    return bytes(states)


def probed_steps(runs: Iterable[Range], zeros: int, size: int, probe: Probe) -> Iterator[Step]:
    """Some clusters, whose content decides what they become; the others are unallocated.

    runs    of clusters, sorted and disjoint
    zeros   the state of one where nothing is stored, or nothing but zeros
    size    where the image ends, in bytes
    """
    unit, policy = probe.cluster_size, probe.policy
    count = div_up(size, unit)
    named, rows = Cutter(runs), [Cutter(disk.extents()) for disk in probe.disks]
    position = 0
    while position < count:
        first, end = named.first(position)
        reach = min(max(first, position), count) * unit
        stored = min(row.first(reach)[0] for row in rows) // unit
        known, state = (first, UNALLOCATED) if position < first else (min(end, stored), zeros)
        if known >= min(position + MAP_PAGE, count):
            stop = min(known, count)
            yield Step(position, stop, state)
            position = stop
            continue
        stop = position + max(1, policy.next_window() // unit)
        if stored >= stop:
            stop = min(stored, position + MAP_PAGE)
        stop = min(stop, count)
        here = named.take(position, stop)
        states = painted([(here, zeros)], position, stop)
        if stored >= stop:
            yield Step(position, stop, states)
        else:
            reaches = [(low * unit, min(high * unit, size)) for low, high in here]
            ours, theirs = (
                [extent for reach in reaches for extent in row.take(*reach)]
                for row in (*rows, Cutter(()))[:2]
            )
            is_whole = here == [(position, stop)]
            step = Step(position, stop, zeros if is_whole else states, probe, ours, theirs)
            policy.look_at(ours or theirs)
            if policy.is_cold:
                probe.ask_ahead(step)
            yield step
        position = stop


def known_steps(rows: Sequence[Tuple[Iterable[Range], int]], count: int) -> Iterator[Step]:
    """Clusters by runs of one state: later rows cover earlier ones, the rest is unallocated."""
    cutters = [(Cutter(runs), state) for runs, state in rows]
    position = 0
    while position < count:
        first = min(row.first(position)[0] for row, _ in cutters)
        if first >= min(position + MAP_PAGE, count):
            stop = min(first, count)
            yield Step(position, stop, UNALLOCATED)
        else:
            stop = min(position + MAP_PAGE, count)
            here = [(row.take(position, stop), state) for row, state in cutters]
            yield Step(position, stop, painted(here, position, stop))
        position = stop


def believed_steps(layout: "Layout", state: int, size: int, cluster_size: int) -> Iterator[Step]:
    """The clusters of which a layout speaks, without a look; in doubt they are data.

    state   of a cluster that is known to be zeros as a whole, and holds no data
    size    of the disk, in bytes
    """
    known = (  # rounded inwards, but for the disk's end: what lies behind it counts as zeros
        (div_up(start, cluster_size), (end if end < size else end + cluster_size) // cluster_size)
        for start, end in joined(layout.zeros)
    )
    whole = (each for each in known if each[0] < each[1])
    some_zeros, data = (cluster_runs(each, cluster_size) for each in (layout.zeros, layout.data))
    rows = ((some_zeros, DATA), (whole, state), (data, DATA))
    return known_steps(rows, div_up(size, cluster_size))


def compress_zlib(data: bytes) -> bytes:
    """A cluster as raw deflate, byte for byte as QEMU has it."""
    import zlib

    stream = zlib.compressobj(-1, zlib.DEFLATED, -12, 9)
    return stream.compress(data) + stream.flush()


def compress_zstd(data: bytes) -> bytes:
    """A cluster as one frame of zstd, byte for byte as QEMU has it."""
    library = libzstd()
    if library is None:
        return bytes(import_zstd().compress(data, ZSTD_LEVEL))
    import ctypes
    import threading

    context, target = zstd_encoder(threading.get_ident())
    count = library.ZSTD_compressCCtx(context, target, len(target), data, len(data), ZSTD_LEVEL)
    if library.ZSTD_isError(count):  # the one reason that is left
        raise MemoryError
    return ctypes.string_at(target, count)


@functools.lru_cache(maxsize=None)
def zstd_encoder(_thread: int) -> Tuple[Any, Any]:
    """What a thread compresses with, and where to: a context, and a buffer for any cluster."""
    import ctypes

    library = libzstd()
    size = library.ZSTD_compressBound(CLUSTER_SIZES[-1])
    return library.ZSTD_createCCtx(), ctypes.create_string_buffer(size)


def compressor(kind: str) -> Callable[[bytes], bytes]:
    """What compresses a cluster, in any thread. Raises Error where zstd is missing."""
    if kind == "zlib":
        return compress_zlib
    try:
        _ = libzstd() or import_zstd()
    except ImportError as error:
        raise Error(
            "--compress zstd needs libzstd.so.1 (Debian: libzstd1) or Python 3.14; install one of "
            "them, or use --compress zlib"
        ) from error
    return compress_zstd


class Packed(NamedTuple):
    """What became of some clusters.

    states  a byte for each
    sizes   of those that are COMPRESSED, in bytes
    data    of those that are not passed through, each as it is compressed
    """

    states: bytes
    sizes: List[int]
    data: List[bytes]


class Packer:
    """Compresses clusters, wherever that saves space.

    What an image of the disk holds compressed in our own way is passed through: its bytes go
    into the stream as they are. Of the others, the first ones wait in memory for the copy.

    share       clusters that a reader takes at once
    kept        a memory file with what the first clusters became, one after the other
    kept_end    the guest cluster before which all are in it
    """

    def __init__(self, cluster_size: int, disk: Source, kind: str, memory: int) -> None:
        """kind: zlib or zstd. memory: bytes to keep. Raises Error where zstd is missing."""
        import mmap

        self.cluster_size = cluster_size
        self.disk = disk
        self.share = max(1, PACK_SIZE // cluster_size)
        self._compress = compressor(kind)
        # Where the files of images hold what is compressed in our way, sorted.
        self._offsets = {
            image.file: image.compressed_offsets()
            for image in disk.images
            if (image.cluster_size, image.compression_type) == (cluster_size, kind)
        }  # type: Dict[Any, array[int]]
        # Its pages take memory only as they are filled.
        self.kept = mmap.mmap(-1, memory + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.kept_end = 0
        self._left = memory

    def steps(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Steps of which the data is compressed as well."""
        size = self.cluster_size
        extents = Cutter(self.disk.extents())
        for step in steps:
            if step.probe is not None:
                yield step._replace(packer=self)
            elif step.state != DATA and (isinstance(step.state, int) or DATA not in step.state):
                yield step
            else:
                for first in range(step.first, step.end, self.share):
                    end = min(first + self.share, step.end)
                    ours = extents.take(first * size, end * size)
                    state = step.state
                    if not isinstance(state, int):
                        state = state[first - step.first : end - step.first]
                    yield Step(first, end, state, None, ours, (), self)

    def pack(
        self, first: int, states: bytes, extents: Sequence[Extent], wanted: int, scratch: Scratch
    ) -> Packed:
        """Compress clusters from `first` on, of which those in the state that is wanted count."""
        size = self.cluster_size
        sizes = [0] * len(states)
        left = bytearray(state == wanted for state in states)
        for cluster, (_, _, length) in self.passed(extents).items():
            if left[cluster - first]:
                left[cluster - first] = 0
                sizes[cluster - first] = length
        doubtful = self._doubtful(extents)
        blobs = []
        cutter = Cutter(extents)
        for run in data_pattern(1, 0).finditer(left):
            low, high = run.span()
            start, end = (first + low) * size, (first + high) * size
            view = memoryview(scratch.data)[: end - start]
            self.disk.read_into(view, start, cutter.take(start, end))
            for index in range(low, high):
                at = (index - low) * size
                if first + index in doubtful:
                    places = range(at, at + size, size // SAMPLES)
                    sample = b"".join(view[place : place + SAMPLE_SIZE] for place in places)
                    if len(self._compress(sample)) >= len(sample):
                        continue
                blob = self._compress(bytes(view[at : at + size]))
                if len(blob) < size:
                    sizes[index] = len(blob)
                    blobs.append(blob)
        packed = bytes(COMPRESSED if length else state for length, state in zip(sizes, states))
        return Packed(packed, list(filter(None, sizes)), blobs)

    def _doubtful(self, extents: Iterable[Extent]) -> Set[int]:
        """Clusters that lie as they are in an image that holds others compressed in our way.

        Its writer has found them not to shrink, or a guest has written there since: a sample
        tells these apart, for a tenth of the time.
        """
        size = self.cluster_size
        found = set()  # type: Set[int]
        for start, end, file, _, stored in extents:
            if not stored and size > SAMPLES * SAMPLE_SIZE and self._offsets.get(file):
                found.update(range(start // size, div_up(end, size)))
        return found

    def passed(self, extents: Iterable[Extent]) -> Dict[int, Tuple[Any, int, int]]:
        """What an image holds in our way: (file, offset, length in bytes) by guest cluster."""
        size = self.cluster_size
        found = {}
        for start, end, image, offset, stored in extents:
            offsets = self._offsets.get(image.file) if stored else None
            if offsets and not start % size and end == min(start + size, self.disk.size):
                # Its exact length is not recorded: it ends where the next one begins, or before.
                index = bisect.bisect_right(offsets, offset)
                following = offsets[index] if index < len(offsets) else image.file.size
                length = min(stored, following - offset)
                if offset + stored == image.file.size:
                    image.inflate(offset, stored)  # the file may have been cut short there
                # One that begins before the last sector of another overlaps with it.
                if stored - SECTOR_SIZE < length < size:
                    found[start // size] = (image.file, offset, length)
        return found

    def keep(self, data: Sequence[bytes], end: int) -> None:
        """Keep what has become of the next clusters, before `end`, as long as there is room."""
        self._left -= sum(map(len, data))
        if self._left >= 0:
            self.kept.write(b"".join(data))
            self.kept_end = end


def fill_map(
    cluster_map: ClusterMap, steps: Iterable[Step], readers: Readers, packer: Optional[Packer]
) -> None:
    """Take all steps. Readers work ahead of the map, which is filled in guest order."""
    policy = readers.policy
    shares = batches(steps if packer is None else packer.steps(steps), policy.share_size)
    jobs = ((None, 0, functools.partial(examine, each), policy.is_quick(each)) for each in shares)
    for _, results in readers.in_order(jobs, AHEAD_ITEMS * readers.count, MAX_SIZE):
        for count, states in results:
            if isinstance(states, int):
                cluster_map.append(states, count)
            elif packer is not None and isinstance(states, Packed):
                cluster_map.extend(states.states, states.sizes)
                packer.keep(states.data, len(cluster_map))
            else:
                cluster_map.extend(states)
    cluster_map.finish()


def examine(batch: Sequence[Step], scratch: Scratch) -> List[Tuple[int, Any]]:
    """Take some steps: (count of clusters, their one state or a byte for each, or Packed)."""
    results = []
    for step in batch:
        count = step.end - step.first
        states = step.state  # type: Any
        if step.probe:
            states = step.probe.states(step, scratch)
        if step.packer:
            states = bytes((states,)) * count if isinstance(states, int) else states
            states = step.packer.pack(step.first, states, step.ours, DATA, scratch)
        results.append((count, states))
    return results


def batches(steps: Iterable[Step], share_size: int) -> Iterator[List[Step]]:
    """Steps in lists, each a reader's share: many small ones are not worth a thread's switch."""
    batch = []  # type: List[Step]
    size = number = 0
    for step in steps:
        batch.append(step)
        worker = step.probe or step.packer
        if worker is not None:
            number += 1
            size += (step.end - step.first) * worker.cluster_size
        # The first ones are small because nothing is known yet: they are batches themselves.
        is_first = worker is not None and number <= INLINE_ITEMS
        if is_first or size >= share_size or len(batch) >= BATCH_STEPS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# What other programs say of a disk's extents, in JSON. Nothing in it is trusted to be well-formed,
# and nothing is ever opened or run because of it.

_SPACES = re.compile(r"[ \t\r\n]*")
MAX_ENTRY = 64 << 10  # characters of an extent: what may be long in it is a file's name


class RangeList:
    """Byte ranges, perhaps overlapping, that come sorted: 16 bytes for each of perhaps millions."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        self._is_sorted = True
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[Range]:
        if not self._is_sorted:
            # One number for each takes less than half of the space of a pair.
            both = sorted(start << 64 | end for start, end in zip(self._starts, self._ends))
            self._starts = array("Q", (each >> 64 for each in both))
            self._ends = array("Q", (each & (1 << 64) - 1 for each in both))
            self._is_sorted = True
        return zip(self._starts, self._ends)

    def add(self, start: int, end: int) -> None:
        """Add a range, or make the last one longer: producers cut long extents into objects."""
        ends = self._ends
        if ends:
            if ends[-1] == start:
                ends[-1] = end
                return
            if start < self._starts[-1]:
                self._is_sorted = False
        self._starts.append(start)
        ends.append(end)


class Layout(NamedTuple):
    """What is known of a disk: ranges that may hold data, and that are known to be zeros."""

    data: RangeList
    zeros: RangeList

    def all(self) -> Iterator[Range]:
        """Both, in order of their starts."""
        import heapq

        return heapq.merge(self.data, self.zeros)


class JsonText:
    """A text in JSON that is read as it is decoded, from the character number `at` on."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        """read: gives more bytes, none at the end."""
        self._read = read
        self.text, self.at = "", 0

    def more(self) -> bool:
        """Read on. False at the end."""
        data = self._read()
        # Only names and descriptions can hold more than ASCII, and nobody asks for those.
        self.text, self.at = self.text[self.at :] + data.decode("latin-1"), 0
        return bool(data)

    def mark(self) -> str:
        """Skip spaces. Returns the next character, or an empty string at the end."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]  # always
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


def json_list(read: Callable[[], bytes], what: str) -> Iterator[Any]:
    """The elements of a JSON list, decoded one at a time as it is read.

    what    its name in messages

    Raises Error where it isn't a list.
    """
    import json

    decode = json.JSONDecoder().raw_decode
    json_text = JsonText(read)
    if json_text.mark() != "[":
        if not json_text.text:
            raise Error(f"{what} is not a JSON list: it is empty; has its producer failed?")
        raise Error(
            f"{what} is not a JSON list of extents, as `rbd diff --format json`, `qemu-img map "
            "--output=json` or `nbdinfo --map --json` write it"
        )
    json_text.at += 1
    index = 0
    has_more = json_text.mark() != "]"
    while has_more:
        try:
            entry, json_text.at = decode(json_text.text, json_text.at)
        except (ValueError, RecursionError) as error:
            left = len(json_text.text) - json_text.at
            if isinstance(error, ValueError) and left <= MAX_ENTRY and json_text.more():
                continue
            why = f"not JSON, nested too deep, or has more than {MAX_ENTRY} characters"
            raise Error(f"{what}: entry {index} is {why}") from error
        yield entry
        index += 1
        if json_text.text.startswith(",{", json_text.at):  # the shorter way to the same
            json_text.at += 1
            continue
        has_more = json_text.mark() == ","
        if has_more:
            json_text.at += 1
            json_text.mark()
    if json_text.mark() != "]":
        raise Error(f"{what}: there is no comma and no end behind entry {index - 1}")
    json_text.at += 1
    if json_text.mark():
        raise Error(f"{what}: there is something behind the end of the list")


# What an extent holds, by its entry and whether the image has a backing file: "data" or "zeros";
# with a backing file also "below", what a lower layer of the disk holds, so that it has not
# changed, and "absent", what none of its layers does. None stands for "nothing that counts here".
# Raises KeyError, ValueError or TypeError for what no such program writes.


def _rbd_kind(entry: Dict[str, Any], _overlay: bool) -> Optional[str]:
    return {"true": "data", "false": "zeros"}[entry["exists"]]  # strings: rbd writes no booleans


def _qemu_map_kind(entry: Dict[str, Any], overlay: bool) -> Optional[str]:
    zero, depth, present = entry["zero"], entry["depth"], entry.get("present", True)
    if not (isinstance(zero, bool) and isinstance(present, bool) and _is_whole(depth)):
        raise ValueError
    # What is stored nowhere reads as zeros: one that says otherwise is a dirty bitmap in disguise.
    if not (zero or entry["data"]):
        raise ValueError("neither zero nor data, as of an x-dirty-bitmap; use --bitmap NAME")
    if overlay and depth:
        return "below"
    if overlay and zero and not present:
        return "absent"
    return "zeros" if zero else "data"


def _qemu_map_allocation(entry: Dict[str, Any], _overlay: bool) -> Optional[str]:
    # XAPI's question to the same list: which clusters does the chain store at all?
    if not (isinstance(entry["data"], bool) and isinstance(entry["zero"], bool)):
        raise ValueError
    return "data" if entry["data"] or not entry["zero"] else "zeros"


def _nbdinfo_kind(entry: Dict[str, Any], overlay: bool) -> Optional[str]:
    flags, description = entry["type"], entry["description"]
    if not _is_whole(flags):
        raise ValueError
    if description in ("clean", "dirty"):  # qemu:dirty-bitmap:NAME
        return "data" if flags & NBD_STATE_DIRTY else None
    if description in ("data", "hole", "zero", "hole,zero"):  # base:allocation
        return "zeros" if flags & NBD_STATE_ZERO else "data"
    if description == "absent":  # qemu:allocation-depth: stored nowhere in the chain
        return "absent" if overlay else "zeros"
    if description.startswith("backing depth ") and overlay:
        return "below"
    if description.startswith(("local", "backing depth ")):
        return "data"
    raise ValueError


def _ovirt_kind(entry: Dict[str, Any], _overlay: bool) -> Optional[str]:
    if not all(isinstance(entry.get(key, True), bool) for key in ("zero", "hole", "dirty")):
        raise ValueError
    if not entry.get("dirty", True):
        return None
    return "zeros" if entry["zero"] else "data"


class Dialect(NamedTuple):
    """How one kind of program writes extents.

    start   the key of an extent's first byte
    keys    what may say what it holds
    kind    says what an entry holds, see above
    """

    name: str
    start: str
    keys: Tuple[str, ...]
    kind: Callable[[Dict[str, Any], bool], Optional[str]]


PLAIN = Dialect("a plain list", "offset", (), lambda _entry, _overlay: "data")
RBD_DIFF = Dialect("rbd diff", "offset", ("exists",), _rbd_kind)
QEMU_MAP = Dialect("qemu-img map", "start", ("zero", "data", "depth", "present"), _qemu_map_kind)
QEMU_ALLOCATION = QEMU_MAP._replace(kind=_qemu_map_allocation)
OVIRT = Dialect("ovirt-imageio", "start", ("zero", "hole", "dirty"), _ovirt_kind)
NBDINFO = Dialect("nbdinfo --map", "offset", ("type", "description"), _nbdinfo_kind)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0  # which no bool is


def read_layout(
    entries: Iterable[Any], what: str, size: int, overlay: bool, only: Optional[Dialect] = None
) -> Layout:
    """Understand a layout in any of the dialects.

    entries  the elements of its list
    what     its name in messages
    size     of the disk, in bytes
    overlay  whether the image has a backing file, so that deeper layers have not changed
    only     the one dialect that is right here, if it is not for the layout to choose

    Raises Error that names the first entry that makes no sense.
    """
    held = {kind: RangeList() for kind in ("data", "zeros", "absent")}
    dialect = only  # type: Any
    width, has_layers = -1, False
    known = {}  # type: Dict[Any, Callable[[int, int], None]]  # what takes extents of some values
    for index, entry in enumerate(entries):
        if type(entry) is not dict or len(entry) != width:
            dialect = _same_dialect(dialect, entry, f"{what}: entry {index}")
            width, keys = len(entry), [key for key in dialect.keys if key in entry]
            values_of = operator.itemgetter(dialect.start, "length", *keys)
        try:
            values = values_of(entry)
            start, length = values[:2]
            add = known.get(values[2:])
            if add is None:
                kind = dialect.kind(entry, overlay)
                has_layers = has_layers or kind == "below"
                add = known[values[2:]] = held[kind].add if kind in held else _ignore
            if not (_is_whole(start) and _is_whole(length)):
                raise ValueError(f"has start {ascii(start)[:40]} and length {ascii(length)[:40]}")
            if start > size or (start == size and length):
                raise ValueError(f"starts at {start}, past the end of the disk at {size}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise Error(f"{what}: entry {index} {_fault(error, entry, dialect)}") from error
        if length:
            add(start, min(start + length, size))
    # What none of several layers holds has not changed since the top one was added. But a map of
    # one layer says what that is, not what has changed: it may have lost what the backing file
    # still has.
    for start, end in held["absent"] if not has_layers else ():
        held["zeros"].add(start, end)
    return Layout(held["data"], held["zeros"])


def _ignore(_start: int, _end: int) -> None:
    pass


def _same_dialect(dialect: Optional[Dialect], entry: Any, label: str) -> Dialect:
    if not isinstance(entry, dict):
        raise Error(f"{label} is not an object with a start and a length")
    if "start" in entry:
        found = OVIRT if "hole" in entry or "dirty" in entry else QEMU_MAP
    elif "type" in entry or "description" in entry:
        found = NBDINFO
    else:
        found = RBD_DIFF if "exists" in entry else PLAIN
    if dialect is not None and found.name != dialect.name:
        raise Error(f"{label} is in the way of {found.name}, not of {dialect.name}")
    return dialect or found


def _fault(error: Exception, entry: Dict[str, Any], dialect: Dialect) -> str:
    """What is wrong with an entry, after its number."""
    if isinstance(error, KeyError):
        return f"has no {error}"
    if isinstance(error, ValueError) and error.args:
        return f"{error}; {dialect.name} does not write that"
    rest = {key: entry[key] for key in entry if key not in (dialect.start, "length")}
    return f"is not what {dialect.name} writes: {quoted(ascii(rest)[:80])}"


def read_info(text: str, what: str) -> Tuple[int, Optional[int]]:
    """(virtual size, cluster size if it is one of qcow2's) from `qemu-img info --output=json`.

    Raises Error where it isn't that.
    """
    import json

    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error(f"{what} is not JSON") from error
    if not isinstance(info, dict):
        raise Error(f"{what} is not what qemu-img info writes")
    size, cluster_size = info.get("virtual-size"), info.get("cluster-size")  # type: Any, Any
    if not _is_whole(size) or size > MAX_SIZE:
        raise Error(f"{what}: its 'virtual-size' is {ascii(size)[:40]}, which no disk has")
    is_known = _is_whole(cluster_size) and cluster_size in CLUSTER_SIZES
    return size, cluster_size if is_known else None


# ---------------------------------------------------------------------------------------------
# Plan: where everything goes in the file. Pure arithmetic on the cluster map's counts.
# ---------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """What of the image follows from the disk's size alone: sizes in bytes, refcounts in bits."""

    virtual_size: int  # a multiple of 512
    cluster_size: int
    refcount_bits: int
    is_extended: bool = False  # L2 entries are extended

    @property
    def cluster_count(self) -> int:
        """Guest clusters, the last of which may be partial."""
        return div_up(self.virtual_size, self.cluster_size)

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // (EXTENDED_ENTRY_SIZE if self.is_extended else ENTRY_SIZE)

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table: one for each L2 table that the disk can have."""
        return div_up(self.cluster_count, self.l2_entries)

    def refuse_if_too_large(self) -> None:
        """Raise Error for a disk that no qcow2 image with this cluster size can hold."""
        if self.l1_entries * ENTRY_SIZE > MAX_L1_BYTES:
            reach = (MAX_L1_BYTES // ENTRY_SIZE) * self.l2_entries * self.cluster_size
            raise Error(
                f"a disk of {self.virtual_size} bytes needs an L1 table over 32 MiB, which QEMU "
                f"can't open: clusters of {self.cluster_size} bytes reach {reach} bytes; choose a "
                "larger --cluster-size"
            )


class Plan(NamedTuple):
    """Where each part of the image is: offsets in bytes from the start of the file."""

    geometry: Geometry
    sizes: Sequence[int]  # bytes of each compressed cluster; they follow the others
    refcount_table_clusters: int
    refcount_blocks: int  # a cluster each
    l1_clusters: int
    refcount_table_offset: int
    refcount_block_offset: int
    l1_table_offset: int
    l2_table_offset: int
    data_offset: int
    packed_offset: int
    file_size: int

    @property
    def saved(self) -> int:
        """Bytes that compression has saved."""
        before = len(self.sizes) * self.geometry.cluster_size
        return before - (self.file_size - self.packed_offset)

    def compressed(self) -> Iterator[Tuple[int, int]]:
        """(offset, size) of each compressed cluster, in bytes."""
        offsets = packed_offsets(self.sizes, self.geometry)
        return ((self.packed_offset + offset, size) for offset, size in zip(offsets, self.sizes))

    def refuse_if_too_large(self) -> None:
        """Raise Error for an image that QEMU could not open."""
        size, bits = self.geometry.cluster_size, compressed_offset_bits(self.geometry.cluster_size)
        trouble = None
        if self.refcount_table_clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            trouble = (
                f"a refcount table over 8 MiB, with clusters of {size} bytes and refcounts of "
                f"{self.geometry.refcount_bits} bits; choose a larger --cluster-size or fewer "
                "--refcount-bits"
            )
        elif self.file_size > MAX_HOST_OFFSET:
            trouble = "host offsets past 2^56; export fewer data"
        elif self.sizes and self.file_size > 1 << bits:
            trouble = (
                f"compressed clusters past 2^{bits}, with clusters of {size} bytes; choose a "
                "smaller --cluster-size, or leave --compress out"
            )
        if trouble:
            raise Error(f"an image of {self.file_size} bytes has what QEMU can't open: {trouble}")


def packed_offsets(sizes: Iterable[int], geometry: Geometry) -> Iterator[int]:
    """Where each compressed cluster begins, in bytes behind the first, and where the last ends.

    Where as many touch a host cluster as its refcount can say, the next one is begun.
    """
    most = (1 << geometry.refcount_bits) - 1
    position = touching = 0
    for size in sizes:
        if touching == most:
            position = align_up(position, geometry.cluster_size)
            touching = 0
        yield position
        room = geometry.cluster_size - position % geometry.cluster_size
        position += size
        touching = touching + 1 if size < room else int(size > room)
    yield position


def make_plan(
    geometry: Geometry, l2_tables: int, data_clusters: int, sizes: Sequence[int] = ()
) -> Plan:
    """Lay the file out. sizes: bytes of each compressed cluster.

    The refcount area counts itself: it grows until it covers the file that it is part of.
    """
    size = geometry.cluster_size
    block_entries = size * 8 // geometry.refcount_bits
    l1_clusters = div_up(geometry.l1_entries * ENTRY_SIZE, size)
    (packed_size,) = collections.deque(packed_offsets(sizes, geometry), maxlen=1)
    others = 1 + l1_clusters + l2_tables + data_clusters + div_up(packed_size, size)
    blocks = tables = 0
    needed = div_up(others, block_entries)
    while needed != blocks:
        blocks, tables = needed, div_up(needed * ENTRY_SIZE, size)
        needed = div_up(others + tables + blocks, block_entries)
    counts = (1, tables, blocks, l1_clusters, l2_tables, data_clusters)
    offsets = [size * end for end in itertools.accumulate(counts)]
    offsets.append(offsets[-1] + align_up(packed_size, SECTOR_SIZE))
    return Plan(geometry, sizes, tables, blocks, l1_clusters, *offsets)


# ---------------------------------------------------------------------------------------------
# Write: the stream. Metadata is generated table by table; data goes from the source's
# descriptor to the output's inside the kernel wherever it lets us.
# ---------------------------------------------------------------------------------------------

WRITE_SIZE = 256 << 10  # bytes of metadata or small clusters that are gathered into one write
END_TIMEOUT = 1.0  # seconds that a reader may pause with the end of the image in its pipe
END_INTERVAL = 2  # milliseconds between two looks at what it has left
PIPE_SIZE = 1 << 20  # bytes for root
USER_PIPE_SIZE = 256 << 10  # for others: 64 backups at once must not use up their user's pages
TAIL_SIZE = 1 << 20  # bytes at the end of an image that are read before the last check
SOCKET_SIZE = 16 << 20  # bytes, more than two sockets on one host hold between two programs
COPY_SIZE = 4 << 20  # bytes that are sent at once
FETCH_SIZE = 1 << 20  # bytes that a reader fetches or inflates at once: 16 clusters
READ_AHEAD = 16 << 20  # bytes between the copy and what is fetched
READ_AHEAD_ITEMS = 256  # pieces, if they are small
SENDFILE_MIN = 16 << 10  # bytes: below that, a call costs more than the copy that it saves
GATHER_GAP = 4 << 10  # bytes between two small runs that are read along: a page comes anyway
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # Linux's; the fcntl module names them since 3.10


class ConsumerGone(Exception):
    """Whoever reads standard output has closed it."""


class Output:
    """Standard output, whatever it is: pipe, socket or file, blocking or not.

    written     bytes that have left so far
    head        the first of them

    What sendfile() puts into a pipe or a socket are the pages of the source's file: until the
    reader has taken them, they change with it. So the end of the image is kept in memory: once
    settle() is through, none of the source's pages is on its way, and the source is free.
    """

    def __init__(self, fd: int, is_text: bool = False) -> None:
        """Raises Error if nothing can or should be written there: text may go to a terminal."""
        self.fd = fd
        self.written = 0
        self.head = b""
        self._has_sent_pages = False
        self._channel_size = 0  # bytes that a pipe or a local socket holds
        self._tail_start = MAX_SIZE  # offset in the image from which on it is kept in memory
        self._pending = []  # type: List[Union[bytes, bytearray]]
        self._pending_size = 0
        # A run of a file's bytes that comes behind all that.
        self._file = None  # type: Any
        self._start = self._end = 0
        try:
            mode = os.fstat(fd).st_mode
        except OSError as error:
            raise Error("standard output is closed; redirect it to a file or a pipe") from error
        if os.isatty(fd) and not is_text:
            raise Error("standard output is a terminal; redirect it to a file or a pipe")
        refuse_direct(fd, mode, "standard output")
        self._is_socket, self._is_pipe = stat.S_ISSOCK(mode), stat.S_ISFIFO(mode)
        self._is_device = stat.S_ISBLK(mode)
        # A file or a disk is always said to be ready, even one that asks to try again.
        self._may_wait = not (self._is_device or stat.S_ISREG(mode))
        # What others write into the same file, sendfile() would not notice.
        is_shared = not self._may_wait and stderr_is_the_output()
        self._can_sendfile = hasattr(os, "sendfile") and not is_shared
        if self._is_socket:
            self._look_at_socket()
        elif self._is_pipe and not is_text:
            self._enlarge_pipe()

    def _look_at_socket(self) -> None:
        import socket

        try:
            kind, is_local = socket_kind(self.fd)
        except OSError as error:
            raise Error(f"cannot look at standard output: {reason(error)}") from error
        if kind != socket.SOCK_STREAM:  # a reader with a short buffer loses the end of each packet
            raise Error("standard output is a socket of packets; give it a stream")
        # A TCP receiver on this host may have any number of pages in its queue.
        self._can_sendfile = self._can_sendfile and is_local
        self._channel_size = SOCKET_SIZE if is_local else 0

    def _enlarge_pipe(self) -> None:
        self._channel_size = 64 << 10
        if sys.platform.startswith("linux"):
            wanted = USER_PIPE_SIZE if os.geteuid() else PIPE_SIZE
            with contextlib.suppress(OSError):  # a limit of the user's; the pipe stays as it is
                self._channel_size = fcntl.fcntl(self.fd, F_GETPIPE_SZ)
                if self._channel_size < wanted:
                    self._channel_size = fcntl.fcntl(self.fd, F_SETPIPE_SZ, wanted)

    def begin(self, size: int) -> None:
        """Take note of how long the image will be: its end is kept in memory."""
        if self._is_pipe or self._is_socket:
            self._tail_start = size - max(TAIL_SIZE, self._channel_size)

    def write(self, data: Union[bytes, bytearray]) -> None:
        """Write bytes, perhaps a little later."""
        if self._file is not None:
            self.send_run()
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= WRITE_SIZE:
            self._write_pending()

    def write_zeros(self, count: int) -> None:
        """Write `count` zeros."""
        for left in range(count, 0, -WRITE_SIZE):
            self.write(zeros(min(left, WRITE_SIZE)))

    def send(self, file: Any, offset: int, length: int) -> None:
        """Write bytes of a file, perhaps together with those that follow them there."""
        if file is self._file and offset == self._end:
            self._end += length
        else:
            self.send_run()
            self._file, self._start, self._end = file, offset, offset + length
        if self._end - self._start >= COPY_SIZE:
            self.send_run()

    def flush(self) -> None:
        """Write what is pending, but for the image's end."""
        self.send_run()
        self._write_pending()

    def settle(self) -> None:
        """Wait until none of the source's pages is on its way to the reader."""
        if self._has_sent_pages:
            self._write_tail(self._channel_size)

    def finish(self) -> None:
        """Write the end, and see the reader off.

        Raises ConsumerGone if it goes away while bytes are still in the pipe or the socket. It is
        waited for as long as it reads, and END_TIMEOUT more. What a file system reports only when
        a file is closed counts as well, and what a block device does when it is written back.
        """
        self._write_tail(MAX_SIZE)
        try:
            if self._is_device:
                os.fsync(self.fd)
            os.close(os.dup(self.fd))
        except OSError as error:
            raise self._write_error(error) from error
        if self._is_pipe or self._is_socket:
            see_reader_off(self.fd, self._is_socket)

    def send_run(self) -> None:
        """Send what send() was given so far."""
        file, offset, end = self._file, self._start, self._end
        if file is None:
            return
        self._file = None
        if end - offset >= SENDFILE_MIN and self._can_sendfile and file.fd is not None:
            self._write_pending()
            room = self._tail_start - self.written
            offset = self._sendfile(file.fd, offset, min(end, offset + room))
        while offset < end:
            data = bytearray(min(end - offset, WRITE_SIZE))
            file.read_into(memoryview(data), offset)
            self.write(data)
            offset += len(data)

    def _write_pending(self) -> None:
        if self._pending_size and self.written < self._tail_start:
            pending, self._pending, self._pending_size = self._pending, [], 0
            self._write_now(memoryview(pending[0] if len(pending) == 1 else b"".join(pending)))

    def _write_tail(self, length: int) -> None:
        data = memoryview(b"".join(self._pending))
        self._pending, self._pending_size = [bytes(data[length:])], len(data[length:])
        self._write_now(data[:length])

    def _write_now(self, view: memoryview) -> None:
        self.head = self.head or bytes(view[:SECTOR_SIZE])
        while len(view):
            try:
                count = os.write(self.fd, view)
            except OSError as error:
                if not (self._may_wait and isinstance(error, BlockingIOError)):
                    raise self._write_error(error) from error
                wait_for(self.fd, "POLLOUT")
                continue
            if not count:
                raise self._write_error(OSError("it takes nothing"))
            self.written += count
            view = view[count:]

    def _sendfile(self, fd: int, offset: int, end: int) -> int:
        """Write a file's bytes in the kernel. Returns the offset of the first that it won't."""
        while offset < end:
            try:
                count = os.sendfile(self.fd, fd, offset, end - offset)
            except OSError as error:
                # A full pipe is waited for. Else it is an output opened for appending, an unusual
                # source, a read or a write error, or a pipe that has room again: the copy loop
                # goes on from here and finds out which it was.
                if not isinstance(error, BlockingIOError):
                    self._can_sendfile = False
                elif self._may_wait and not wait_for(self.fd, "POLLOUT", 0):
                    wait_for(self.fd, "POLLOUT")
                    continue
                break
            if not count:  # the file's end, or a short read before: the same
                break
            self.written += count
            self._has_sent_pages = self._tail_start < MAX_SIZE
            offset += count
        return offset

    def _write_error(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return ConsumerGone()
        return Error(f"cannot write to standard output after {self.written} bytes: {reason(error)}")


def socket_kind(fd: int) -> Tuple[int, bool]:
    """(type of a socket, such as SOCK_STREAM; whether its other end is on this host for sure)."""
    import socket

    # What kind it is said to be here does not matter to the system.
    with socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        kind = opened.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        domain = getattr(socket, "SO_DOMAIN", None)  # Linux
        family = domain and opened.getsockopt(socket.SOL_SOCKET, domain)
        return kind, family == socket.AF_UNIX


def see_reader_off(fd: int, is_socket: bool) -> None:
    """Wait until the reader has taken what is in a pipe or socket: see Output.finish()."""
    request = termios.TIOCOUTQ if is_socket else termios.FIONREAD
    poll = select.poll()
    poll.register(fd, 0)  # hangups and errors alone
    left, since = MAX_SIZE, time.monotonic()
    while time.monotonic() < since + END_TIMEOUT:
        # First whether the reader has gone, then what it has left: not the other way round.
        is_gone = bool(poll.poll(0 if left == MAX_SIZE else END_INTERVAL))
        try:
            os.write(fd, b"")  # asks a socket whether its other end still reads
        except OSError as error:
            is_gone = is_gone or not isinstance(error, BlockingIOError)
        try:
            answer = fcntl.ioctl(fd, request, bytes(4))
        except OSError:  # not on this system
            return
        before, left = left, struct.unpack("i", answer)[0]
        if not left:  # of a socket, perhaps because it was thrown away: that is an error
            is_gone = is_socket and any(event & select.POLLERR for _, event in poll.poll(0))
        if is_gone:
            raise ConsumerGone()
        if not left:
            return
        if left < before:
            since = time.monotonic()


# What guards the output: it must not lie on what is read, and no other run may write into it.

LOOP_MAJOR, LOOP_GET_STATUS64, LOOP_INFO_SIZE = 7, 0x4C05, 232  # Linux's, from major.h and loop.h
LOCK_OFFSET = 1 << 60  # bytes: where in its file an output's lock is

# A stretch of a file or a device: its identity, start and end in bytes, end exclusive.
Stretch = Tuple[Tuple[int, ...], int, int]


class OutputGuard:
    """Looks after a regular file or a block device that the image goes to."""

    def __init__(self, output: Output) -> None:
        """Lock it, so that no second run of this program writes into it.

        Raises Error if one has, and for a device that is mounted or part of a volume.
        """
        self._output = output
        self._fd = output.fd
        status = os.fstat(self._fd)
        self._identity = file_identity(status)
        self._is_device = stat.S_ISBLK(status.st_mode)
        self._is_on_disk = self._is_device or stat.S_ISREG(status.st_mode)
        self._start = None  # type: Optional[int]  # offset of the image, if it can be asked
        if not self._is_on_disk:
            return
        if self._is_device and is_in_use(status.st_rdev):
            raise Error(
                "standard output is a device in use: it is mounted, or part of a volume; write "
                "the image elsewhere"
            )
        try:  # a place where no other program's locks are; it is free again when this process ends
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCK_OFFSET)
        except BlockingIOError as error:
            raise Error(
                "another run of this program is writing to the same file; give each a name of its "
                "own"
            ) from error
        except OSError:  # not on this file system
            pass
        is_appended = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_APPEND
        if self._is_device or not is_fuse(status.st_dev):
            # A file system that is a program may show nothing until all is there.
            with contextlib.suppress(OSError):
                self._start = os.lseek(self._fd, 0, os.SEEK_END if is_appended else os.SEEK_CUR)

    def refuse_if_source(self, watch: Watch) -> None:
        """Raise Error if the output would overwrite a disk that is read, or grow into it."""
        for label, fd, _ in watch.found if self._is_on_disk else ():
            theirs = file_identity(os.fstat(fd))
            if overlap(same_bytes(self._identity, self._fd), all_below(theirs, fd)):
                size = os.lseek(fd, 0, os.SEEK_END)
                fate = "would be overwritten" if size else "is empty now: has > emptied it?"
                raise Error(
                    f"standard output is {label} itself, or lies on it, which {fate}; write the "
                    "image elsewhere"
                )
            if overlap(all_below(self._identity, self._fd), same_bytes(theirs, fd)):
                raise Error(
                    f"standard output lies in a file system on {label}: the image would grow into "
                    "what is read; write it elsewhere"
                )

    def find_backing_file(self, name: str) -> Optional[str]:
        """Where a name in the image leads; None if nobody knows where the image will lie.

        Raises Error if that is the output.
        """
        path = None
        with ignore_unavailable(), contextlib.suppress(ValueError):
            if os.path.isabs(name):
                path = name
            elif self._is_on_disk:
                folder = os.path.dirname(os.readlink(f"/proc/self/fd/{self._fd}"))
                path = os.path.join(folder, name)
            if path is not None and file_identity(os.stat(path)) == self._identity:
                raise Error(
                    f"standard output is {quoted(name)} itself, the image's own backing file; "
                    "write the image elsewhere"
                )
        return path

    def check_intact(self) -> None:
        """Raise Error if somebody else has written to the file, or emptied it (`> FILE`)."""
        if self._start is None:
            return
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        is_whole = end == self._start + self._output.written
        if is_whole and not self._is_device:
            is_whole = os.fstat(self._fd).st_size >= end
        with ignore_unavailable(), open(f"/proc/self/fd/{self._fd}", "rb") as file:
            file.seek(self._start)
            is_whole = is_whole and file.read(len(self._output.head)) == self._output.head
        if not is_whole:
            raise Error(
                "standard output is a file or a device to which somebody else has written at the "
                "same time, and the image is not whole; give it a name of its own"
            )


def is_in_use(device: int) -> bool:
    """Whether a block device or a partition of it is mounted, or part of a volume, on Linux."""
    folder = sys_folder(device)
    numbers = [f"{os.major(device)}:{os.minor(device)}"]
    with ignore_unavailable():
        for name in os.listdir(folder):
            if os.path.exists(f"{folder}/{name}/partition"):
                numbers.append("{}:{}".format(*sys_numbers(f"{folder}/{name}/dev")))
        if os.listdir(f"{folder}/holders"):
            return True
    return is_mounted(numbers)


def same_bytes(
    identity: Tuple[int, ...], fd: Optional[int] = None, start: int = 0, end: int = MAX_SIZE
) -> List[Stretch]:
    """A stretch of a file or device, and what holds its very bytes, on Linux.

    A loop device shows a file, a partition is a part of its disk, a mapped device of its slaves.

    fd      a descriptor of it, if there is one
    """
    found = [(identity, start, end)]  # type: List[Stretch]
    if len(identity) > 1:
        return found
    folder = os.path.realpath(sys_folder(identity[0]))
    if os.major(identity[0]) == LOOP_MAJOR:
        with ignore_unavailable():
            shown, first, last = shown_by_loop(os.path.basename(folder), fd)
            found += same_bytes(shown, None, first + start, min(first + end, last))
    with ignore_unavailable():
        first, length = (sys_numbers(f"{folder}/{name}")[0] << 9 for name in ("start", "size"))
        disk = os.makedev(*sys_numbers(f"{os.path.dirname(folder)}/dev"))
        found += same_bytes((disk,), None, first + start, first + min(end, length))
    with ignore_unavailable():
        for name in os.listdir(f"{folder}/slaves"):
            found += same_bytes((os.makedev(*sys_numbers(f"{folder}/slaves/{name}/dev")),))
    return found


def all_below(identity: Tuple[int, ...], fd: int) -> List[Stretch]:
    """The same, and the devices of the file systems that hold it, down to the last.

    Not every file system names one: not so btrfs, overlayfs and remote ones.
    """
    found = same_bytes(identity, fd)
    for (*place, _), _, _ in found:
        if place and os.major(place[0]):
            found += same_bytes((place[0],))
    return found


def overlap(ours: List[Stretch], theirs: List[Stretch]) -> bool:
    """Whether any two stretches have a byte in common."""
    return any(
        identity == other and start < last and first < end
        for identity, start, end in ours
        for other, first, last in theirs
    )


def sys_numbers(path: str) -> List[int]:
    """The numbers in a file of /sys: in `dev`, a device's major and minor one."""
    with open(path) as file:
        return list(map(int, file.read().split(":")))


def shown_by_loop(name: str, fd: Optional[int]) -> Stretch:
    """What a loop device shows. It is asked itself: its file may have another name now."""
    # To close a descriptor of the output's would give up its lock.
    device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
    try:
        answer = fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(LOOP_INFO_SIZE))
    finally:
        if device != fd:
            os.close(device)
    place, inode, number, start, limit = struct.unpack_from("5Q", answer)
    # number: of a device that is shown; of a file it is 0, or its file system's
    identity = (place, inode) if number in (0, place) else (number,)
    return identity, start, start + limit if limit else MAX_SIZE


class Header(NamedTuple):
    """What the first cluster says beside the plan. Names are as they stand there, or None."""

    version: int  # 3, or 2, which has neither feature bits nor a zero flag
    data_file_name: Optional[bytes]  # of an external data file
    data_file_raw: bool  # the data file is kept identical to the disk's content
    backing_file: Optional[bytes]
    backing_format: bytes
    compression: str  # of clusters, if any are: zlib or zstd

    def extensions(self, cluster_size: int) -> bytes:
        """The header extensions, without the one that ends them.

        The features' names, which nobody needs to open an image, are left out where only so the
        first cluster has room for the rest. Raises Error if it has none for a file's name.
        """
        extensions = features = b""
        room = cluster_size - HEADER_LENGTH[self.version]
        if self.backing_file is not None:
            extensions += pack_extension(EXTENSION_BACKING_FORMAT, self.backing_format)
            room -= 8 + len(self.backing_file)  # 8: the extension that ends the others
        if self.data_file_name is not None:
            extensions += pack_extension(EXTENSION_DATA_FILE_NAME, self.data_file_name)
        if len(extensions) > room:
            what = "data" if self.backing_file is None else "backing"
            raise Error(
                f"the name of the {what} file does not fit into a first cluster of {cluster_size} "
                "bytes; choose a larger --cluster-size or a shorter name"
            )
        if self.version >= 3:
            features = pack_extension(EXTENSION_FEATURE_NAME_TABLE, feature_name_table())
        return extensions + (features if len(extensions + features) <= room else b"")

    def cluster(self, plan: Plan) -> bytes:
        """The first cluster: header, extensions, backing file name."""
        geometry = plan.geometry
        extensions = self.extensions(geometry.cluster_size)
        start = HEADER_LENGTH[self.version] + len(extensions) + 8
        name = self.backing_file or b""
        header = pack_header(
            {
                "magic": MAGIC,
                "version": self.version,
                "backing_file_offset": start if name else 0,
                "backing_file_size": len(name),
                "cluster_bits": geometry.cluster_size.bit_length() - 1,
                "size": geometry.virtual_size,
                "l1_size": geometry.l1_entries,
                "l1_table_offset": plan.l1_table_offset if plan.l1_clusters else 0,
                "refcount_table_offset": plan.refcount_table_offset,
                "refcount_table_clusters": plan.refcount_table_clusters,
                "incompatible_features": (
                    (0 if self.data_file_name is None else INCOMPATIBLE_DATA_FILE)
                    | (0 if self.compression == "zlib" else INCOMPATIBLE_COMPRESSION)
                    | (INCOMPATIBLE_EXTENDED_L2 if geometry.is_extended else 0)
                ),
                "autoclear_features": AUTOCLEAR_DATA_FILE_RAW if self.data_file_raw else 0,
                "refcount_order": geometry.refcount_bits.bit_length() - 1,
                "header_length": HEADER_LENGTH[self.version],
                "compression_type": COMPRESSION_TYPES[self.compression],
            }
        )
        # Zeros behind the last extension are the one that ends the list.
        cluster = header + extensions
        if name:
            cluster = cluster.ljust(start, b"\0") + name
        return cluster.ljust(geometry.cluster_size, b"\0")


def packed_range(first: int, step: int, count: int) -> Iterator[bytes]:
    """`count` table entries that rise evenly, in pieces."""
    some = WRITE_SIZE // ENTRY_SIZE
    for done in range(0, count, some):
        yield pack_entries(entry_range(first + done * step, step, min(some, count - done)))


def refcount_area(plan: Plan) -> Iterator[bytes]:
    """The refcount table and its blocks (section "Host cluster management")."""
    size, bits = plan.geometry.cluster_size, plan.geometry.refcount_bits
    yield from packed_range(plan.refcount_block_offset, size, plan.refcount_blocks)
    yield bytes(plan.refcount_table_clusters * size - plan.refcount_blocks * ENTRY_SIZE)

    block_entries = size * 8 // bits
    full_blocks, rest = divmod(plan.packed_offset // size, block_entries)
    yield from itertools.repeat(refcount_ones(block_entries, bits), full_blocks)
    whole = rest // 8 * 8  # what fills bytes
    counts = itertools.chain(itertools.repeat(1, rest - whole), packed_refcounts(plan))
    for _ in range(full_blocks, plan.refcount_blocks):
        others = pack_refcounts(itertools.islice(counts, block_entries - whole), bits)
        yield (refcount_ones(whole, bits) + others).ljust(size, b"\0")
        whole = 0


def packed_refcounts(plan: Plan) -> Iterator[int]:
    """Of each host cluster that compressed ones lie in, how many touch it."""
    size = plan.geometry.cluster_size
    touched = (
        cluster
        for offset, length in plan.compressed()
        for cluster in range(offset // size, (offset + length - 1) // size + 1)
    )
    return (sum(1 for _ in group) for _, group in itertools.groupby(touched))


def l1_table(plan: Plan, cluster_map: ClusterMap) -> Iterator[bytes]:
    """The L1 table (section "Cluster mapping"), an entry for each L2 table."""
    size = plan.geometry.cluster_size
    left = plan.geometry.l1_entries
    next_entry = plan.l2_table_offset | OFLAG_COPIED
    for tables, in_use in cluster_map.tables_in_use():
        count = min(tables, left)
        left -= count
        if in_use:
            yield from packed_range(next_entry, size, count)
            next_entry += count * size
        else:
            yield bytes(count * ENTRY_SIZE)
    yield bytes(plan.l1_clusters * size - plan.geometry.l1_entries * ENTRY_SIZE)


def l2_tables(plan: Plan, cluster_map: ClusterMap, in_place: bool) -> Iterator[bytes]:
    """The L2 tables that the image has (section "Cluster mapping"); not extended ones.

    in_place    data clusters are where the guest sees them, in an external data file
    """
    size = plan.geometry.cluster_size
    entries = cluster_map.table_entries
    next_entry = plan.data_offset | OFLAG_COPIED
    compressed = (pack_compressed(offset, length, size) for offset, length in plan.compressed())
    for first, count, states in cluster_map.pages():
        if in_place:
            next_entry = (first * size) | OFLAG_COPIED
        if len(states) > 1:
            yield from mixed_l2_tables(states, entries, next_entry, size, in_place, compressed)
            next_entry += states.count(DATA) * size
        elif states[0] == ZERO:
            table = pack_entries(array("Q", [OFLAG_ZERO]) * entries)
            yield from itertools.repeat(table, count // entries)
        elif states[0] == DATA:
            yield from ramp_tables(next_entry, size, entries, count // entries)
            next_entry += count * size
        elif states[0] == COMPRESSED:
            for _ in range(count // entries):
                yield pack_entries(array("Q", itertools.islice(compressed, entries)))


def mixed_l2_tables(
    states: bytes,
    entries: int,
    next_entry: int,
    size: int,
    in_place: bool,
    compressed: Iterator[int],
) -> Iterator[bytes]:
    """The L2 tables of one mixed page; those without any cluster are left out.

    The loops over entries are those of map() and accumulate(): runs may be short.
    """
    is_data = states.translate(_IS_DATA)
    stop = next_entry + len(states) * size
    if in_place:
        values = range(next_entry, stop, size)  # type: Iterable[int]
    else:  # the n-th cluster of data has the n-th offset
        nth = range(next_entry - size, stop, size)
        values = map(nth.__getitem__, itertools.accumulate(is_data))
    page = map(operator.mul, is_data, values)  # type: Iterator[int]
    if states.count(COMPRESSED):
        plain = zip(states, page)
        page = (next(compressed) if state == COMPRESSED else entry for state, entry in plain)
    has_offsets = states.count(DATA) or states.count(COMPRESSED)
    packed = bytearray(pack_entries(array("Q", page)) if has_offsets else len(states) * ENTRY_SIZE)
    if states.count(ZERO):  # the flag is in the last byte of an entry: as numbers, without a loop
        flags = int.from_bytes(states.translate(_ZERO_FLAGS), "big")
        flags |= int.from_bytes(packed[ENTRY_SIZE - 1 :: ENTRY_SIZE], "big")
        packed[ENTRY_SIZE - 1 :: ENTRY_SIZE] = flags.to_bytes(len(states), "big")
    for start in range(0, len(states), entries):
        if states.count(UNALLOCATED, start, start + entries) < entries:
            yield bytes(packed[start * ENTRY_SIZE : (start + entries) * ENTRY_SIZE])


_IS_DATA = bytes(state == DATA for state in range(256))
_ZERO_FLAGS = bytes(OFLAG_ZERO if state == ZERO else 0 for state in range(256))


def write_image(
    output: Output,
    plan: Plan,
    header: Header,
    source: Source,
    cluster_map: ClusterMap,
    readers: Readers,
    packer: Optional[Packer],
) -> None:
    """Write the whole image, in file order; its end may wait in memory, see Output."""
    in_place = header.data_file_name is not None
    entries = l2_tables(plan, cluster_map, in_place)
    if plan.geometry.is_extended:
        entries = map(extended_l2_table, entries)
    output.begin(plan.file_size)
    output.write(header.cluster(plan))
    for table in itertools.chain(refcount_area(plan), l1_table(plan, cluster_map), entries):
        output.write(table)
    if not in_place:
        copy_data(output, source, cluster_map, plan.geometry.cluster_size, readers)
    if packer is not None:
        write_compressed(output, plan, cluster_map, readers, packer)
    output.flush()


def copy_data(
    output: Output, source: Source, cluster_map: ClusterMap, cluster_size: int, readers: Readers
) -> None:
    """Write the data clusters, in guest order.

    Long runs go straight from descriptor to descriptor. Short ones that lie close together
    are read in one call, with what is between them, and written in one. What must be inflated
    or comes from a server is fetched ahead by the readers.
    """
    jobs = copy_jobs(source, cluster_map, cluster_size)
    for (start, end, extents, read), data in readers.in_order(jobs, READ_AHEAD_ITEMS, READ_AHEAD):
        if read is not None:
            output.send_run()
            output.write(read() if data is None else data)
            continue
        position = start
        for first, stop, file, offset, _ in extents:
            if position < first:  # what is stored nowhere is zeros
                output.write_zeros(first - position)
            output.send(file, offset, stop - first)
            position = stop
        output.write_zeros(end - position)


def copy_jobs(source: Source, cluster_map: ClusterMap, cluster_size: int) -> Iterator[Job]:
    """Pieces with data (start, end, extents, how they are read), and what a reader is to read.

    A piece that nobody need read goes from its file to the output.
    """
    cutter = Cutter(source.copy_extents())
    slices = [slice(at, at + cluster_size) for at in range(0, WRITE_SIZE, cluster_size)]
    gap = (GATHER_GAP - 1) // cluster_size
    for first, last, states in cluster_map.data_runs(SENDFILE_MIN // cluster_size, gap):
        step = max(1, (WRITE_SIZE if states else COPY_SIZE) // cluster_size)
        for low in range(first, last, step):
            high = min(low + step, last)
            start, end = low * cluster_size, high * cluster_size
            extents = cutter.take(start, end)
            is_far = source.is_salvaged
            for at, to, file, offset, stored in extents:
                if stored or file.is_remote:
                    is_far = True
                elif not is_far:
                    file.advise(offset, to - at, "WILLNEED")
            read = None
            if states:
                some = states[low - first : high - first].translate(_IS_DATA)
                chosen = itertools.compress(slices, some)
                read = functools.partial(fetch, source, start, end, extents, chosen)
            if states or not is_far:
                yield (start, end, extents, read), end - start, read if is_far else None, False
                continue
            parts = Cutter(extents)
            share = max(FETCH_SIZE, cluster_size)
            for at in range(start, end, share):
                to = min(at + share, end)
                read = functools.partial(fetch, source, at, to, parts.take(at, to), None)
                yield (at, to, (), read), to - at, read, False


def fetch(
    source: Source, start: int, end: int, extents: Sequence[Extent], chosen: Any, *_: Scratch
) -> Union[bytes, bytearray]:
    """The guest bytes from start to end, or the slices of them that are chosen."""
    data = bytearray(end - start)
    source.read_into(memoryview(data), start, extents)
    return data if chosen is None else b"".join(map(data.__getitem__, chosen))


def compressed_jobs(cluster_map: ClusterMap, packer: Packer) -> Iterator[Job]:
    """(compressed clusters, those of them that are passed through) of each share.

    What is not kept, the readers compress once more.
    """
    size, share = packer.cluster_size, packer.share
    cutter = Cutter(packer.disk.extents())
    for page, count, kinds in cluster_map.pages():
        for first in range(page, page + count, share) if kinds.count(COMPRESSED) else ():
            states = kinds * share if len(kinds) == 1 else kinds[first - page :][:share]
            clusters = [first + at for at, state in enumerate(states) if state == COMPRESSED]
            if not clusters:
                continue
            extents = cutter.take(first * size, (first + share) * size)
            passed = packer.passed(extents)
            work = None
            if clusters[-1] >= packer.kept_end and not passed.keys() >= set(clusters):
                work = functools.partial(packer.pack, first, states, extents, COMPRESSED)
            yield (clusters, passed), share * size, work, False


def write_compressed(
    output: Output, plan: Plan, cluster_map: ClusterMap, readers: Readers, packer: Packer
) -> None:
    """Write the compressed clusters, in guest order, up to the end of the file.

    Raises Error if one has another size than before.
    """
    targets = plan.compressed()
    position = plan.packed_offset
    packer.kept.seek(0)
    ahead = AHEAD_ITEMS * readers.count
    for (clusters, passed), packed in readers.in_order(
        compressed_jobs(cluster_map, packer), ahead, READ_AHEAD
    ):
        blobs = iter(packed.data if packed else ())
        for cluster in clusters:
            offset, size = next(targets)
            output.write_zeros(offset - position)
            if cluster in passed:
                file, start, found = passed[cluster]
                output.send(file, start, found)
            else:
                blob = next(blobs, b"") if packed else packer.kept.read(size)
                output.write(blob)
                found = len(blob)
            if found != size:
                raise Error(
                    "INPUT changed while it was read: what lies at offset "
                    f"{cluster * packer.cluster_size} compresses to another size; the image is not "
                    "whole, export a snapshot instead"
                )
            position = offset + size
    output.write_zeros(plan.file_size - position)


# ---------------------------------------------------------------------------------------------
# Command line: reads the options and joins the rooms.
# ---------------------------------------------------------------------------------------------

# What QEMU knows as a backing file's format, and before the colon of its name.
FORMATS = re.compile(
    r"(raw|qcow2?|qed|vmdk|vdi|vhdx|vpc|parallels|dmg|bochs|cloop|luks|file|host_device|nbd|rbd|"
    r"iscsi|nfs|ssh|gluster|https?|ftps?)\Z"
)
PROTOCOLS = re.compile(
    r"(json|file|host_device|host_cdrom|blkdebug|blkverify|fat|ftps?|gluster(\+(rdma|tcp|unix))?|"
    r"https?|iscsi|iser|nbd(\+(tcp|unix))?|nfs|null-(aio|co)|nvme|rbd|ssh):"
)
IMAGE_MAGICS = {
    MAGIC: "qcow2", b"KDMV": "vmdk", b"# Disk Descripto": "vmdk", b"vhdxfile": "vhdx",
    b"conectix": "vpc", b"<<< Oracle VM Vi": "vdi", b"<<< QEMU VM Virt": "vdi",
    b"WithoutFreeSpace": "parallels", b"WithouFreSpacExt": "parallels",
}  # fmt: skip
COMPRESS_MEMORY = 256 << 20  # bytes of compressed clusters that wait for the copy

EPILOG = f"""\
examples:
  {PROGRAM} disk.raw > disk.qcow2
  {PROGRAM} -f vmdk disk.vmdk > disk.qcow2
  {PROGRAM} -f qcow2 today.qcow2 > flat.qcow2
  {PROGRAM} /dev/vg/vm | gzip > vm.qcow2.gz
  {PROGRAM} --compress zstd /dev/vg/vm | ssh backup 'cat > vm.qcow2'
  {PROGRAM} /dev/vg/tuesday --diff /dev/vg/monday \\
      -b monday.qcow2 -F qcow2 > tuesday.qcow2

exit status:
  0   every byte of a consistent image was written
  1   something went wrong, and one line on stderr says what; bytes that have
      already been written are no image
  2   wrong usage
  3   the image is whole, but parts of INPUT could not be read (--salvage)
  A consumer that goes away ends the program by SIGPIPE; a signal that asks it
  to end (SIGINT, SIGTERM, SIGHUP...) ends it by that same signal.
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose words go to standard output as an image does, or to stderr."""

    def _print_message(self, message: str, _file: Any = None) -> None:
        output = Output(1, is_text=True)
        output.write(message.encode("utf-8"))
        output.flush()

    def error(self, message: str) -> Any:
        unknown, _, words = message.partition("unrecognized arguments: ")
        if not unknown and words:
            import difflib

            near = difflib.get_close_matches(words.split()[0], self._option_string_actions)
            hint = "one INPUT becomes one image, on standard output: INPUT > IMAGE"
            message += f"; did you mean {near[0]}?" if near else f"; {hint}"
        report(self.format_usage() + f"{PROGRAM}: error: {quoted(message)[1:-1]}")
        sys.exit(2)


def parse_size(text: str) -> int:
    """A number of bytes, from `65536`, `64K` or `1T` as qemu-img takes it; -1 for anything else."""
    match = re.match(r"(0|[1-9]\d{,19})([KMGTPE]?)\Z", text.upper(), re.ASCII)
    return int(match.group(1)) << 10 * " KMGTPE".index(match.group(2) or " ") if match else -1


def number_in(values: Sequence[int], what: str) -> Callable[[str], int]:
    """An argument's type: one of some numbers, that are called `what` in messages."""

    def parse(text: str) -> int:
        if parse_size(text) in values:
            return parse_size(text)
        plain = text.rstrip("iBb")
        hint = f"; write {plain}" if parse_size(plain) in values else ""
        if parse_size(text + "K") in values:
            hint = f"; did you mean {text}K?"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}{hint}")

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [options] INPUT > IMAGE",
        description="Turn a disk into a qcow2 image on standard output, in one forward-only\n"
        "stream: no temporary file, and clusters that are all zeros take no space.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    # fmt: off
    add = parser.add_argument_group("what to read").add_argument
    add("input", metavar="INPUT",
        help="file, block device, NBD URI (nbd://HOST/EXPORT), or - for standard input")
    add("--size", type=number_in(range(MAX_SIZE), "a number of bytes, perhaps with K, M, G or T"),
        help="with INPUT -: bytes of the disk. Read once: all clusters are stored, or the "
        "layout's only")
    add("-f", "--format", metavar="FMT",
        help="format of INPUT: raw (default), qcow2, or what QEMU reads, e.g. vmdk, vhdx")
    add("-l", "--snapshot", metavar="NAME",
        help="an internal snapshot of a qcow2 INPUT, by name or ID")
    add("--image-opts", action="store_true",
        help="INPUT is a QEMU option string: driver=rbd,pool=p,image=i")
    add("--object", metavar="DEF", action="append", default=[],
        help="an object for QEMU's programs, e.g. secret,id=s,file=key; may be repeated")
    add("--live", action="store_true",
        help="a disk that changes meanwhile is a warning, not an error")
    add("--salvage", action="store_true",
        help="what can't be read becomes zeros, is named, and ends in exit status 3")

    add = parser.add_argument_group("what to export (default: the whole disk)").add_argument
    add("--diff", metavar="BASE", help="only what differs from BASE")
    add("--diff-format", metavar="FMT", help="format of BASE (default: that of INPUT)")
    add("--diff-snapshot", metavar="NAME",
        help="an internal snapshot of a qcow2 BASE, which may be INPUT's own file")
    add("--bitmap", metavar="NAME",
        help="only what a dirty bitmap says has changed: of a qcow2 INPUT, or an NBD server's")
    add("--layout", metavar="FILE",
        help="only the extents in FILE (- is stdin): JSON of rbd diff, qemu-img map, nbdinfo "
        "--map, ovirt-imageio, or a list of offset and length")
    add("--no-scan", "--trust-layout", action="store_true",
        help="don't look for zeros: all is read once; faster from slow disks, a larger image")
    for option, what in (
        ("map", "qemu-img map of INPUT"), ("info", "qemu-img info of INPUT"),
        ("diff-map", "qemu-img map of BASE"), ("diff-info", "qemu-img info of BASE"),
    ):
        add(f"--json-header-{option}", metavar="FD", help=f"{what} in JSON, on a descriptor (XAPI)")

    add = parser.add_argument_group("what to write").add_argument
    add("-b", "--backing-file", metavar="NAME",
        help="an overlay on NAME; needs -F, and --diff, --bitmap or --layout")
    add("-F", "--backing-format", metavar="FMT", help="format of the backing file, e.g. qcow2")
    add("-c", "--cluster-size", metavar="SIZE",
        type=number_in(CLUSTER_SIZES, "a power of two from 512 to 2M"),
        help="a power of two from 512 to 2M (default: 64K)")
    add("-r", "--refcount-bits", metavar="BITS", default=16,
        type=number_in(REFCOUNT_WIDTHS, "1, 2, 4, 8, 16, 32 or 64"),
        help="1, 2, 4, 8, 16 (default), 32 or 64")
    add("--compat", choices=("1.1", "0.10"), default="1.1",
        help="qcow2 version 3 (1.1, default) or 2 (0.10)")
    add("--compress", choices=("zlib", "zstd"),
        help="compress clusters where that saves space; zlib, or zstd (QEMU 5.1 and later)")
    add("--compress-memory", metavar="SIZE", default=COMPRESS_MEMORY,
        type=number_in(range(MAX_SIZE), "a number of bytes, perhaps with K, M, G or T"),
        help="compressed clusters that wait in memory for the copy; the rest is compressed "
        "twice (default: 256M)")
    add("--extended-l2", action="store_true",
        help="32 subclusters a cluster, for an image that VMs write to (QEMU 5.2 and later)")
    add("-d", "--data-file", action="store_true",
        help="only metadata: INPUT is the image's external data file")
    add("-R", "--data-file-raw", action="store_true",
        help="the same, everything allocated; INPUT is not read")

    add = parser.add_argument_group("how to run").add_argument
    add("-m", "--parallel", metavar="N", type=number_in(range(1, 65), "1 to 64"), default=4,
        help="readers at work at once, 1 to 64 (default: 4)")
    add("--measure", action="store_true", help="write no image, print its exact size")
    add("--output", choices=("human", "json"), help="how --measure prints (default: human)")
    add("-p", "--progress", action="store_true", help="show progress on stderr (SIGUSR1: a line)")
    add("-h", "--help", action="help", help="show this text and exit")
    add("-V", "--version", action="version", version=PROGRAM + " " + __version__,
        help="show the version and exit")
    # fmt: on
    return parser


def refuse_contradictions(options: argparse.Namespace) -> None:
    """Raise Error for options that don't go together."""
    diff, bitmap, layout, snapshot = options.diff, options.bitmap, options.layout, options.snapshot
    external = "--data-file-raw" if options.data_file_raw else "--data-file"
    has_external = options.data_file or options.data_file_raw
    partials = [each for each in (diff, bitmap, layout) if each is not None]
    overlay, name = options.backing_file is not None, options.backing_file or ""
    maps = (options.json_header_map, options.json_header_info) != (None, None)
    base_maps = (options.json_header_diff_map, options.json_header_diff_info) != (None, None)
    is_stream = options.input == "-" and not options.image_opts
    is_uri = is_nbd_uri(options.input) and not options.image_opts
    is_qcow2 = options.format == "qcow2" and not is_stream
    fmt = options.format or "raw"
    has_format = fmt != "raw" or options.image_opts
    form = "--image-opts" if options.image_opts else f"--format {fmt}"
    base_format = options.diff_format or fmt
    contradictions = (
        (not is_stream and options.size is not None, "--size is for INPUT - only; leave it out"),
        (is_stream and fmt != "raw",
         f"INPUT - comes in order, and {fmt} is not read in order; write it to a file first"),
        (is_stream and options.size is None, "the size of INPUT - must be known first; add --size"),
        (is_stream and (maps or has_external or options.salvage),
         "INPUT - is read once; leave --data-file, --json-header and --salvage options out"),
        (is_stream and diff is not None,
         "INPUT - is read once, and a comparison reads twice; use --layout instead of --diff"),
        (diff == "-", "BASE is read more than once, and - comes once; a file of that name is ./-"),
        (is_stream and layout == "-",
         "standard input can't be both INPUT and the layout; put the layout into a file"),
        (options.output is not None and not options.measure,
         "--output says how --measure prints; add --measure"),
        (options.image_opts and options.format is not None,
         "--image-opts names the format itself, as driver=…; leave --format out"),
        (options.image_opts and not re.search(r"(^|,)driver=", options.input),
         f"{quoted(options.input)} names no driver=…, and a format is never guessed"),
        (is_uri and options.format is not None,
         f"an NBD server shows a disk as it is: leave -f {options.format} out"),
        ((has_format or is_uri) and has_external,
         f"{external} refers to a raw file, but INPUT is {'a server' if is_uri else form}"),
        ((has_format and maps) or (base_maps and (has_format or base_format != "raw")),
         "the --json-header options describe raw disks; leave --format and --diff-format out"),
        (options.diff_format is not None and diff is None, "--diff-format needs --diff BASE"),
        (not all(re.match(r"[\w-]+\Z", each, re.ASCII) for each in (fmt, base_format)),
         "a format is a name such as raw, qcow2 or vmdk"),
        (len(partials) > 1,
         "--diff, --bitmap and --layout all say what to export; give one of them"),
        (options.no_scan and diff is not None,
         "--diff compares, and --no-scan does not look; leave one of them out"),
        ((partials or maps) and has_external,
         f"{external} is all of the disk; leave --diff, --bitmap, --layout, --json-header-map out"),
        (maps and layout is not None,
         "--layout and --json-header-map both say where data is; give one of them"),
        (base_maps and diff is None, "--json-header-diff options describe BASE; add --diff BASE"),
        ((snapshot or "").startswith("snapshot."),
         "--snapshot takes the name or the ID itself, without snapshot.name= before it"),
        (snapshot is not None and not is_qcow2,
         "--snapshot is for a qcow2 file: -f qcow2 FILE; a server shows one by qemu-nbd -l"),
        (options.diff_snapshot is not None and (diff is None or base_format != "qcow2"),
         "--diff-snapshot is for a qcow2 BASE; add --diff BASE, and -f or --diff-format qcow2"),
        (bitmap is not None and not (is_qcow2 or is_uri),
         "--bitmap is for a qcow2 INPUT (add -f qcow2) or an NBD server's (nbd://…)"),
        (bitmap is not None and snapshot is not None,
         "a bitmap says what has changed in the disk as it is now; leave --snapshot out"),
        (any("data=" in each for each in options.object),
         "--object with data=… shows the secret to whoever lists processes; give file=NAME"),
        (overlay and has_external,
         f"--backing-file and {external} exclude each other: an overlay holds its own data"),
        (overlay and not partials,
         "--backing-file needs --diff, --bitmap or --layout, which say what differs from it"),
        (overlay and options.backing_format is None,
         "--backing-file needs --backing-format: a guess is a security hole; add -F qcow2, say"),
        (not overlay and options.backing_format is not None,
         "--backing-format describes a backing file; add --backing-file NAME"),
        (options.image_opts and diff is not None and options.diff_format is None
         and not is_nbd_uri(diff),
         "--image-opts says the format of INPUT alone; add --diff-format for BASE"),
        (re.match("[^/]*:", name) and (not PROTOCOLS.match(name) or os.path.exists(name)),
         f"QEMU takes {quoted(name)} for a protocol's address; put ./ before the name"),
        (re.match("(file|host_device|host_cdrom):[^/]", name),
         f"QEMU looks for {quoted(name)} from its own folder; leave out what is before the colon"),
        (overlay and not name, "the name of the backing file is empty; give one"),
        (overlay and not FORMATS.match(options.backing_format or ""),
         f"{quoted(options.backing_format or '')} is no format of QEMU's, such as raw or qcow2"),
        (len(os.fsencode(name)) > MAX_BACKING_NAME_BYTES,
         f"a backing file's name has at most {MAX_BACKING_NAME_BYTES} bytes; give a shorter one"),
        (options.compress is not None and has_external,
         f"--compress stores data in the image, and {external} does not; leave one of them out"),
        (options.compress is not None and is_stream,
         "INPUT - is read once, and compressed clusters are measured before they are written; "
         "write it to a file first, or compress the whole image: … - | zstd"),
        (options.compat == "0.10" and (has_external or options.refcount_bits != 16
                                       or options.compress == "zstd" or options.extended_l2),
         "--compat 0.10 has 16-bit refcounts, no external data file, no zstd (use --compress zlib) "
         "and no extended L2 entries (leave --extended-l2 out)"),
    )  # fmt: skip
    for is_so, message in contradictions:
        if is_so:
            raise Error(message)


def json_reader(
    what: str, name: str, is_fd: bool, resources: contextlib.ExitStack
) -> Callable[[], bytes]:
    """What reads more of a JSON text: of a file, of standard input (-) or of a descriptor."""
    fd = 0
    try:
        if is_fd:
            fd = int(name) if re.match(r"\d{1,9}\Z", name, re.ASCII) else -1
            os.fstat(fd)
        elif name != "-":
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            resources.callback(os.close, fd)
    except OSError as error:
        raise Error(f"cannot read {what}: {reason(error)}") from error
    return functools.partial(read_some, fd, READ_SIZE, what)


class KnownDisk(NamedTuple):
    """What XAPI's descriptors say of a disk, as far as they do.

    size, cluster_size  in bytes
    ranges              sorted, all of it but what is known to be zeros
    is_whole            the map covers the disk, as qemu-img's does; else it is not believed
    """

    size: Optional[int] = None
    cluster_size: Optional[int] = None
    ranges: Optional[RangeList] = None
    is_whole: bool = False


def read_known_disk(
    options: argparse.Namespace, prefix: str, name: str, resources: contextlib.ExitStack
) -> KnownDisk:
    """Read what XAPI's descriptors say of the disk in a file; prefix is "diff-" for BASE's."""
    size, cluster_size, layout = None, None, None  # type: Any, Optional[int], Any
    for kind in ("map", "info"):  # who writes both to pipes may do so in this order
        option = f"--json-header-{prefix}{kind}"
        fd = vars(options)[option[2:].replace("-", "_")]
        if fd is not None:
            read = json_reader(f"{option} {quoted(fd)}", fd, True, resources)
            if kind == "map":
                entries = json_list(read, option)  # the size may not be known yet
                layout = read_layout(entries, option, MAX_SIZE, False, QEMU_ALLOCATION)
            else:
                text = b"".join(iter(read, b"")).decode("latin-1")
                size, cluster_size = read_info(text, option)
    if layout is None:
        return KnownDisk(size, cluster_size)
    if size is None:
        with contextlib.closing(DiskFile(name, Watch())) as file:
            size = align_up(file.size, SECTOR_SIZE)
    if any(start >= size for start, _ in layout.all()):
        raise Error(f"--json-header-{prefix}map: it goes past the end of the disk at {size}")
    known = sweep(size, joined(layout.all()))
    gaps = [(start, end) for start, end, (item,) in known if item is None]
    for start, end in gaps:
        layout.data.add(start, end)
    return KnownDisk(size, cluster_size, layout.data, not gaps)


class Sources(NamedTuple):
    """What is read.

    disk            whose image is written
    base            with which it is compared, or None
    layout          what a layout or a dirty bitmap says is to be exported, or None
    virtual_size    bytes, a multiple of 512
    cluster_size    bytes, of the image to be written
    is_known        the extents of disk and base name what is data: no look is needed
    """

    disk: Source
    base: Optional[Source]
    layout: Optional[Layout]
    virtual_size: int
    cluster_size: int
    is_known: bool


def open_sources(
    options: argparse.Namespace, watch: Watch, resources: contextlib.ExitStack
) -> Sources:
    """Open what the options name. Raises Error if something isn't there or isn't right."""
    # Read before a disk is opened, which would get the number of a descriptor that is missing.
    known = read_known_disk(options, "", options.input, resources)
    known_base = read_known_disk(options, "diff-", options.diff, resources)
    opener = Opener(options, watch, resources)
    image = ImageName(options.input, options.format or "", options.image_opts)
    disk = opener.open(image, known, options.snapshot, options.bitmap)
    size = align_up(disk.size if known.size is None else known.size, SECTOR_SIZE)
    if align_up(disk.size, SECTOR_SIZE) < size:
        raise Error(
            f"{quoted(image.name)} has {disk.size} bytes, but --json-header-info says {size}; it "
            "describes another disk"
        )
    layout = base = None
    is_known = known.is_whole or options.no_scan
    if options.bitmap is not None:
        layout = Layout(opener.changed_ranges(disk), RangeList())
    if options.layout is not None:
        what = f"--layout {quoted(options.layout)}"
        read = json_reader(what, options.layout, False, resources)
        layout = read_layout(json_list(read, what), what, size, options.backing_file is not None)
    if options.diff is not None:
        base = opener.open_base(known_base)
        is_known = known.is_whole and known_base.is_whole
    if options.salvage:
        disk, base = SalvageSource(disk), base and SalvageSource(base)
    cluster_size = options.cluster_size or known.cluster_size or DEFAULT_CLUSTER_SIZE
    return Sources(disk, base, layout, size, cluster_size, is_known)


class Opener:
    """Opens disks of every kind, and the dirty bitmap of one."""

    def __init__(
        self, options: argparse.Namespace, watch: Watch, resources: contextlib.ExitStack
    ) -> None:
        self._options, self._watch, self._resources = options, watch, resources

    def open(
        self, image: ImageName, known: KnownDisk, snapshot: Optional[str], bitmap: Optional[str]
    ) -> Source:
        """Open a disk, or an internal snapshot of it. An NBD server's must have the bitmap."""
        watch, resources, objects = self._watch, self._resources, self._options.object
        name = image.name
        if image.is_options:
            return open_with_qemu(image, watch, resources, objects)
        if name == "-":
            return StreamSource(self._options.size, watch)
        if is_nbd_uri(name):
            return RawSource(connect_nbd_uri(name, resources, bitmap), watch, known.size)
        is_nbd = re.match(r"nbds?(\+\w+)?:", name, re.I)
        if (is_nbd or PROTOCOLS.match(name)) and not os.path.exists(name):
            hint = "a remote disk is named by --image-opts, such as driver=rbd,pool=…,image=…"
            if is_nbd:
                hint = "NBD has URIs: nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH"
            elif name.startswith(("file:", "host_")):
                hint = "leave out what is before the colon"
            raise Error(f"there is no file {quoted(name)}; {hint}")
        if image.format in ("", "raw"):
            file = DiskFile(name, watch)
            resources.callback(file.close)
            if not image.format and not self._options.data_file_raw:
                self._look_for_header(file)
            return RawSource(file, watch, known.size, known.ranges)
        source = None
        if image.format == "qcow2":
            source = open_qcow2(name, watch, resources, snapshot)
        if source is None and name.startswith(("/dev/fd/", "/dev/std", "/proc/self/")):
            image = image._replace(name=os.path.realpath(name))  # what it is to other programs
        return source or open_with_qemu(image, watch, resources, objects, snapshot)

    def open_base(self, known: KnownDisk) -> Source:
        """Open the disk that --diff names. Raises Error also if its format is in doubt."""
        options = self._options
        name, is_said = options.diff, options.diff_format is not None
        fmt = options.diff_format or options.format or ""
        if not is_said and (is_nbd_uri(name) or fmt == "raw"):
            fmt = ""
        try:
            return self.open(ImageName(name, fmt, False), known, options.diff_snapshot, None)
        except Error as error:
            if is_said or not fmt or not os.path.exists(name):
                raise
            raise Error(f"{error} (without --diff-format, BASE is {fmt}, as INPUT is)") from error

    def _look_for_header(self, file: DiskFile) -> None:
        """Say it if a raw disk begins as an image does: its guest may have written that."""
        start = b""
        with contextlib.suppress(Error):
            start = file.read(0, min(file.size, 16))
        for magic, fmt in IMAGE_MAGICS.items():
            if start.startswith(magic):
                is_base = file.path == self._options.diff
                option = "--diff-format" if is_base else "-f"
                message = (
                    f"{file.label} begins as a {fmt} image does, and is read as a raw disk; add "
                    f"{option} {fmt}, or {option} raw if it is a guest's"
                )
                if is_base and self._options.backing_format == fmt == "qcow2":
                    raise Error(message)
                warn(message)

    def changed_ranges(self, disk: Source) -> RangeList:
        """What the dirty bitmap of INPUT, which is open as a disk, says has changed."""
        name, bitmap = self._options.input, self._options.bitmap
        if is_nbd_uri(name) and isinstance(disk, RawSource):
            ranges, is_recording = disk.file.bitmap_ranges(bitmap, disk.size), True
        else:
            image = Qcow2File(name, self._watch, self._resources)
            ranges, is_recording = image.bitmap_ranges(bitmap)
        if not is_recording:
            warn(f"the bitmap {quoted(bitmap)} is disabled: what was written since is not in it")
        return RangeList(ranges)


def make_steps(
    options: argparse.Namespace, sources: Sources, geometry: Geometry, policy: ReadPolicy
) -> Iterable[Step]:
    """What is known of each cluster, or who finds out, as the options want it."""
    count, cluster_size = geometry.cluster_count, geometry.cluster_size
    size, disk, base, layout = geometry.virtual_size, sources.disk, sources.base, sources.layout
    if options.data_file_raw or (options.input == "-" and layout is None):
        return [Step(0, count, DATA)] if count else []
    overlay = options.backing_file is not None
    # What a cluster becomes that has changed and is all zeros: in an overlay it must hide the
    # backing file's; a bare difference is written over the base, by importers that know no flag.
    state = DATA
    if overlay and options.compat != "0.10":
        state = ZERO
    elif not overlay and base is None and options.bitmap is None:
        state = UNALLOCATED
    if base is not None:
        probe = Probe(cluster_size, [disk, base], state, policy, sources.is_known)
        return probed_steps([(0, count)], UNALLOCATED, size, probe)
    probe = Probe(cluster_size, [disk], state, policy)
    if layout is None and sources.is_known:
        return known_steps([(cluster_runs(disk.extents(), cluster_size), DATA)], count)
    if layout is None:
        return probed_steps([(0, count)], state, size, probe)
    # No layout speaks of the zeros that fill the last sector; a longer backing file has other
    # bytes there. QEMU rounds sizes up: of what it reads, that sector may be such a one.
    padding = max(0, disk.size - SECTOR_SIZE) if options.image_opts else disk.size
    if overlay and padding < size:
        layout.data.add(padding, size)
    if options.no_scan or options.input == "-":
        return believed_steps(layout, state, size, cluster_size)
    return probed_steps(cluster_runs(layout.all(), cluster_size), state, size, probe)


def make_geometry(options: argparse.Namespace, sources: Sources) -> Geometry:
    """What follows from the disk's size. Raises Error for what qcow2 does not allow."""
    geometry = Geometry(
        sources.virtual_size, sources.cluster_size, options.refcount_bits, options.extended_l2
    )
    geometry.refuse_if_too_large()
    if geometry.is_extended and geometry.cluster_size < MIN_EXTENDED_CLUSTER_SIZE:
        raise Error("--extended-l2 needs clusters of at least 16 KiB; choose --cluster-size 16K")
    return geometry


def make_header(options: argparse.Namespace, geometry: Geometry) -> Header:
    """What the image's first cluster is to say. Raises Error where it has no room for it."""
    external = options.data_file or options.data_file_raw
    if external and geometry.virtual_size > MAX_HOST_OFFSET:
        raise Error("qcow2 knows no offsets past 2^56; export so large a disk without --data-file")
    if external and geometry.cluster_size == SECTOR_SIZE:
        raise Error("an external data file needs a --cluster-size of 1024 or more, for its name")
    header = Header(
        version=2 if options.compat == "0.10" else 3,
        data_file_name=os.fsencode(options.input) if external else None,
        data_file_raw=options.data_file_raw,
        backing_file=None if options.backing_file is None else os.fsencode(options.backing_file),
        backing_format=os.fsencode(options.backing_format or ""),
        compression=options.compress or "zlib",
    )
    header.extensions(geometry.cluster_size)  # or there is no room for them
    return header


def make_packer(options: argparse.Namespace, disk: Source, cluster_size: int) -> Optional[Packer]:
    """What compresses the disk's clusters, if that is asked for."""
    if options.compress is None:
        return None
    memory = min(disk.size, options.compress_memory)
    return Packer(cluster_size, disk, options.compress, 0 if options.measure else memory)


def run(options: argparse.Namespace, resources: contextlib.ExitStack, progress: "Progress") -> int:
    """Go through the rooms. Returns the exit status. Raises Error and ConsumerGone."""
    refuse_contradictions(options)
    output = Output(1, is_text=options.measure)
    guard = None if options.measure else OutputGuard(output)
    # Sources: where guest bytes are.
    progress.enter(f"opening {quoted(os.path.basename(options.input))}")
    watch = Watch()
    sources = open_sources(options, watch, resources)
    if guard:
        guard.refuse_if_source(watch)
        look_at_backing_file(options, guard)
    geometry = make_geometry(options, sources)
    header = make_header(options, geometry)
    progress.watch(watch, options.live)
    # Scan: what each guest cluster will be.
    size, cluster_size = geometry.virtual_size, geometry.cluster_size
    policy = ReadPolicy(options.salvage, PACK_SIZE if options.compress else SHARE_SIZE)
    readers = Readers(options.parallel, policy, cluster_size)
    packer = make_packer(options, sources.disk, cluster_size)
    typecode = "H" if cluster_size <= 64 << 10 else "I"
    cluster_map = ClusterMap(geometry.cluster_count, geometry.l2_entries, typecode)
    progress.enter("scan", size, lambda: min(size, len(cluster_map) * cluster_size))
    steps = make_steps(options, sources, geometry, policy)
    fill_map(cluster_map, steps, readers, packer)
    # Plan: where everything goes.
    tables = sum(count for count, in_use in cluster_map.tables_in_use() if in_use)
    has_data = header.data_file_name is None
    plan = make_plan(geometry, tables, has_data and cluster_map.data_clusters, cluster_map.sizes)
    plan.refuse_if_too_large()
    if options.measure:
        progress.end_watch()
        full = make_plan(geometry, geometry.l1_entries, has_data and geometry.cluster_count)
        write_measurement(output, options.output or "human", plan, full)
        return report_damage(sources)
    # Write: the stream.
    progress.enter("write", plan.file_size, lambda: output.written)
    write_image(output, plan, header, sources.disk, cluster_map, readers, packer)
    warning = sources.disk.finish()
    output.settle()
    progress.end_watch()
    output.finish()
    if guard:
        guard.check_intact()
    data = (cluster_map.data_clusters + len(cluster_map.sizes)) * cluster_size
    progress.finish(size, min(size, data), plan.file_size, plan.saved)
    if warning:
        warn(warning)
    return report_damage(sources)


def write_measurement(output: Output, form: str, plan: Plan, full: Plan) -> None:
    """Print the sizes of the image and of one of a disk without zeros, as qemu-img does."""
    text = {
        "human": "required size: {}\nfully allocated size: {}\n",
        "json": '{{"required": {}, "fully-allocated": {}}}\n',
    }[form]
    output.write(text.format(plan.file_size, full.file_size).encode("ascii"))
    output.flush()


def report_damage(sources: Sources) -> int:
    """Name each range of the guest's addresses that could not be read. Returns the exit status."""
    status = 0
    for disk, what in ((sources.disk, "became zeros"), (sources.base, "counts as different")):
        for start, end in joined(sorted(disk.damage)) if isinstance(disk, SalvageSource) else ():
            warn(f"{end - start} bytes from offset {start} can't be read: that {what}")
            status = 3 if disk is sources.disk else status
    return status


def look_at_backing_file(options: argparse.Namespace, guard: OutputGuard) -> None:
    """Warn if what the image names is there, but not what it is said to be, or not whole.

    Raises Error if the output would overwrite it.
    """
    if options.backing_file is None:
        return
    path = guard.find_backing_file(options.backing_file)
    if path is None or not os.path.isfile(path):
        return
    with contextlib.ExitStack() as resources, contextlib.suppress(NeedsQemu):
        try:
            image = Qcow2Image(path, Watch(), resources)
            if options.backing_format == "raw":
                warn(
                    f"the backing file {quoted(path)} begins as a qcow2 image does; is it -F qcow2?"
                )
            image.check_end()
        except Error as error:
            if options.backing_format == "qcow2":
                warn(f"the backing file is no whole qcow2 image now: {error}")


class Progress:
    """What happens beside the work: what is said on stderr, and the look at what has changed.

    A timer's signal asks for both, so that the loops that do the work need not, and so that it
    happens even while a consumer keeps the program waiting. SIGUSR1 asks for a line at any time,
    as it does of dd.
    """

    def __init__(self) -> None:
        self._phase, self._total = "starting", 0
        self._done = lambda: 0  # type: Callable[[], int]
        self._began = self._entered = self._drew = self._looked = time.monotonic()
        self._interval = 0.0  # seconds between two drawings; 0: none
        self._clear = ""  # what removes a line from a terminal, that the next one replaces
        self._is_drawn = self._is_busy = False
        self._watch = None  # type: Optional[Watch]
        self._is_live = False

    def start(self, is_shown: bool) -> None:
        """Answer SIGUSR1, unless it is ignored, and begin to look at the sources.

        is_shown    say something every so often: redrawn on a terminal, a line into a log

        Raises Error if it would get into the image.
        """
        if is_shown and stderr_is_the_output():
            raise Error("--progress goes where the image goes; redirect it, for example by 2> LOG")
        if is_shown:
            is_terminal = os.isatty(2)
            self._interval = TERMINAL_INTERVAL if is_terminal else LOG_INTERVAL
            self._clear = "\r\x1b[K" if is_terminal else ""
        if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
            signal.signal(signal.SIGUSR1, lambda _signum, _frame: self._show(stays=True))
        signal.signal(signal.SIGALRM, lambda _signum, _frame: self._tick())
        interval = min(self._interval or WATCH_INTERVAL, WATCH_INTERVAL)
        signal.setitimer(signal.ITIMER_REAL, interval, interval)

    def stop(self) -> None:
        """Say no more; what was drawn on a terminal stays as a line."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._interval = 0.0
        if self._is_drawn:
            report("")
            self._is_drawn = False

    def watch(self, watch: Watch, is_live: bool) -> None:
        """Look from now on whether a source changes, which ends the run, or is but a warning."""
        self._watch, self._is_live = watch, is_live

    def end_watch(self) -> None:
        """Look a last time. What changes from now on does not count any more."""
        self._look(is_last=True)
        self._watch = None

    def _look(self, is_last: bool = False) -> None:
        change = self._watch.check(is_last) if self._watch else None
        if change is None:
            return
        if not self._is_live:
            raise Error(f"{change}; the image is not consistent, export a snapshot instead")
        self._watch = None
        warn(f"{change}; the image is not of one moment")

    def _tick(self) -> None:
        now = time.monotonic()
        if self._interval and now >= self._drew + self._interval * 0.9:
            self._drew = now
            self._show(stays=False)
        if now >= self._looked + WATCH_INTERVAL * 0.9:
            self._looked = now
            self._look()

    def enter(self, phase: str, total: int = 0, done: Callable[[], int] = lambda: 0) -> None:
        """Begin a phase of `total` bytes, of which done() says how many are behind."""
        self._phase, self._total, self._done = phase, total, done
        self._entered = time.monotonic()

    def line(self) -> str:
        """Phase, per cent, bytes, rate and time left, in less than a terminal's width."""
        done, seconds = self._done(), time.monotonic() - self._entered
        if not self._total:
            return f"{self._phase}  {duration(seconds)}"
        rate = done / seconds if seconds else 0.0
        left = duration((self._total - done) / rate) if rate else "?"
        return (
            f"{self._phase:5} {100 * done // self._total:3}%  {human(done)} of "
            f"{human(self._total)}  {human(rate)}/s  {left} left"
        )

    def _show(self, stays: bool) -> None:
        if self._is_busy or stderr_is_the_output():
            return
        self._is_busy = True  # a storm of signals would interrupt one answer by the next
        self._is_drawn = bool(self._clear) and not stays
        report(self._clear + self.line(), end="" if self._is_drawn else "\n", seconds=0)
        self._is_busy = False

    def finish(self, size: int, data: int, written: int, saved: int) -> None:
        """Sum up, all in bytes: the disk's size, its data, the image, what compression saved."""
        if not self._interval:
            return
        self._is_drawn = False  # this replaces it
        self.stop()
        seconds = time.monotonic() - self._began
        rate = written / seconds if seconds else 0.0
        report(
            f"{self._clear}disk {human(size)}: {human(data)} data, {human(size - data)} zeros or "
            f"unchanged; image {human(written)} in {duration(seconds)} ({human(rate)}/s)"
            + (f"; compression saved {human(saved)}" if saved else "")
        )


TERMINAL_INTERVAL, LOG_INTERVAL = 0.2, 5.0  # seconds between two drawings
WATCH_INTERVAL = 2.0  # seconds between two looks at the sources
STDERR_TIMEOUT = 5.0  # seconds that a message at the end waits for a full pipe


def human(count: float) -> str:
    """A number of bytes for people: three digits and a unit."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while count >= 999.5 and len(units) > 1:  # what rounds up to a thousand has four digits
        count /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def end_by_signal(signum: int) -> None:
    """End the process by a signal, so that whoever waits for it sees that one."""
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # the first process of a container can't be ended so


def report(message: str, end: str = "\n", seconds: float = STDERR_TIMEOUT) -> None:
    """Write a message to stderr. Whatever becomes of it, the exit status says how it ended.

    seconds     that a full pipe is waited for: perhaps nobody reads it
    """
    with contextlib.suppress(OSError, ImportError):
        if wait_for(2, "POLLOUT", seconds):
            os.write(2, (message + end).encode("utf-8", "surrogateescape"))


def warn(message: str) -> None:
    """Say what the user should know, though the image is what was asked for."""
    if not stderr_is_the_output():
        report(f"{PROGRAM}: warning: {message}")


def stderr_is_the_output() -> bool:
    """Whether messages would get into the image: by 2>&1, or by nohup on a terminal."""
    try:
        ours, theirs = os.fstat(1), os.fstat(2)
    except OSError:
        return False
    is_device = stat.S_ISCHR(ours.st_mode)  # a terminal, which no image goes to, or /dev/null
    return not is_device and file_identity(ours) == file_identity(theirs)


def open_standard_descriptors() -> None:
    """Keep a disk from being opened as descriptor 0 or 2, where messages would go."""
    for fd in (0, 2):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):  # not even that: then messages are lost
                null = os.open(os.devnull, os.O_RDWR)
                if null != fd:
                    os.dup2(null, fd)
                    os.close(null)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the program, and end the process with its exit status, or by a signal.

    At once: nothing is left for Python to do, and its end would wait for readers at work.
    """
    os._exit(run_to_status(argv))


def run_to_status(argv: Optional[Sequence[str]]) -> int:
    """Run the program, and say in one line what a user, a disk or a consumer did wrong."""
    progress = Progress()
    try:
        open_standard_descriptors()
        # Python's own answer to Ctrl-C would be a traceback.
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getpid() == 1:  # a container's first process: a default action does not end it
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(signum, lambda signum, _frame: os._exit(128 + signum))
        # Where it is ignored, nobody can learn how a child has ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        options = make_parser().parse_args(argv)
        progress.start(options.progress)
        try:
            with contextlib.ExitStack() as resources:
                return run(options, resources, progress)
        finally:
            progress.stop()
    except SystemExit as ending:  # argparse's
        return int(ending.code or 0)
    except Error as error:
        report(f"{PROGRAM}: error: {error}")
    except MemoryError:
        report(f"{PROGRAM}: error: out of memory")
    except ImportError as error:  # too few descriptors or too little memory, or Python is replaced
        report(f"{PROGRAM}: error: cannot load a part of Python: {error}")
    except OSError as error:  # a system that refuses what every program needs
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        report(f"{PROGRAM}: error: {reason(error)}")
    except ConsumerGone:
        end_by_signal(signal.SIGPIPE)
    return 1


if __name__ == "__main__":
    main()
