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

    format   what qcow2 is: numbers in, bytes out
    sources  where guest bytes are stored, and how they are read
    scan     what each guest cluster will be: unallocated, zero or data
    plan     where everything goes in the file, and how large it becomes
    write    the stream

The format is specified in QEMU's docs/interop/qcow2.rst, called "the specification" below.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import stat
import struct
import sys
from array import array
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

__version__ = "1.0.0"

PROGRAM = "qcow2_to_stdout.py"


class Error(Exception):
    """Something that the user, the disk or the consumer did: one line on stderr, exit 1."""


def quoted(name: str) -> str:
    """A file's name as it may stand in a message: on one line, without control characters."""
    return "'" + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) + "'"


def reason(error: OSError) -> str:
    """What the system says of an error, without Python's own decoration."""
    return os.strerror(error.errno) if error.errno else str(error)


# ---------------------------------------------------------------------------------------------
# Format: what qcow2 is. Constants named as in the specification; pure functions that turn
# numbers into bytes. Nothing here knows of files, disks or options.
# ---------------------------------------------------------------------------------------------

SECTOR_SIZE = 512  # QEMU counts virtual sizes in these
CLUSTER_SIZES = tuple(1 << bits for bits in range(9, 22))
REFCOUNT_WIDTHS = (1, 2, 4, 8, 16, 32, 64)
ENTRY_SIZE = 8  # bytes of one entry in the L1, an L2 and the refcount table

OFLAG_COPIED = 1 << 63  # the cluster's refcount is exactly one
OFLAG_ZERO = 1 << 0  # version 3: the cluster reads as zeros

INCOMPATIBLE_DATA_FILE = 1 << 2
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

EXTENSION_DATA_FILE_NAME = 0x44415441
EXTENSION_FEATURE_NAME_TABLE = 0x6803F857

MAX_L1_BYTES = 32 << 20  # QCOW_MAX_L1_SIZE in QEMU's block/qcow2.h: no larger table is opened
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # QCOW_MAX_REFTABLE_SIZE in the same place
MAX_HOST_OFFSET = 1 << 56  # table entries keep an offset in bits 9 to 55

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


def div_up(number: int, divisor: int) -> int:
    """The quotient of two non-negative integers, rounded up."""
    return -(-number // divisor)


def align_up(number: int, unit: int) -> int:
    """The smallest multiple of unit that is not below number."""
    return div_up(number, unit) * unit


def pack_header(fields: Dict[str, Any]) -> bytes:
    """The header's bytes: 112 of them. Fields that are not named are zero."""
    codes = ">" + "".join(code for _, code in HEADER_FIELDS)
    values = [fields.get(name, b"" if code.endswith("s") else 0) for name, code in HEADER_FIELDS]
    return struct.pack(codes, *values)


def pack_extension(kind: int, payload: bytes) -> bytes:
    """One header extension (section "Header extensions"), padded to a multiple of 8 bytes."""
    return struct.pack(">II", kind, len(payload)) + payload.ljust(align_up(len(payload), 8), b"\0")


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


def entry_range(first: int, step: int, count: int) -> "array[int]":
    """The entries first, first + step, first + 2 * step, … (count of them)."""
    return array("Q", range(first, first + count * step, step))


def ramp_tables(first: int, step: int, entries: int, count: int) -> Iterator[bytes]:
    """Consecutive tables whose entries rise evenly, from first on: `count` of `entries` each.

    A table is one long number here, and the next one is the same number with a constant added
    to each of its 64-bit digits: that builds it six times faster than entry_range() does.
    """
    if not count:
        return
    table = int.from_bytes(pack_entries(entry_range(first, step, entries)), "big")
    ones = int.from_bytes((1).to_bytes(ENTRY_SIZE, "big") * entries, "big")
    increment = ones * (entries * step)
    for _ in range(count):
        yield table.to_bytes(entries * ENTRY_SIZE, "big")
        table += increment


def refcount_ones(count: int, refcount_bits: int) -> bytes:
    """`count` refcounts of one; sub-byte ones fill a byte from its least significant bit."""
    if refcount_bits >= 8:
        return (1).to_bytes(refcount_bits // 8, "big") * count
    full_byte = {1: 0xFF, 2: 0x55, 4: 0x11}[refcount_bits]
    whole, rest = divmod(count * refcount_bits, 8)
    tail = bytes((full_byte & ((1 << rest) - 1),)) if rest else b""
    return bytes((full_byte,)) * whole + tail


# ---------------------------------------------------------------------------------------------
# Sources: where guest bytes are. A source has a size and extents, each in one place of one
# file, and can be read into a buffer. Only this room opens and reads disks.
# ---------------------------------------------------------------------------------------------

_PREADV = getattr(os, "preadv", None)  # Python 3.7
_SEEK_DATA = getattr(os, "SEEK_DATA", None)  # not on every system, nor in PyPy
_SEEK_HOLE = getattr(os, "SEEK_HOLE", None)


class DiskFile:
    """A regular file or block device, opened for reading only.

    name    as the user gave it
    fd      its descriptor
    size    in bytes, when it was opened
    """

    def __init__(self, name: str) -> None:
        """Open name. Raises Error if it is missing, unreadable or nothing that holds a disk."""
        self.name = name
        try:
            # Look before opening: to open a FIFO would wait for its other end.
            self._refuse_unless_disk(os.stat(name).st_mode)
            self.fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            self._found = os.fstat(self.fd)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise Error(f"cannot open {quoted(name)}: {why}") from error
        self.is_regular = stat.S_ISREG(self._found.st_mode)

    def _refuse_unless_disk(self, mode: int) -> None:
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a FIFO"),
            (stat.S_ISCHR, "a character device"),
            (stat.S_ISSOCK, "a socket"),
        )
        for is_kind, kind in kinds:
            if is_kind(mode):
                raise Error(
                    f"cannot read {quoted(self.name)}: it is {kind}; give a regular file or a "
                    "block device"
                )

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

    @property
    def identity(self) -> Tuple[int, ...]:
        """Equal for two names of one file or one device, different otherwise."""
        return file_identity(self._found)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill all of view from offset on, in as many calls as the system wants.

        Raises Error where the file can't be read, or ends too early.
        """
        while len(view):
            try:
                if _PREADV is not None:
                    count = _PREADV(self.fd, [view], offset)
                else:
                    data = os.pread(self.fd, len(view), offset)
                    count = len(data)
                    view[:count] = data
            except OSError as error:
                raise self.read_error(offset, error) from error
            if not count:
                raise self.ended_early(offset)
            view = view[count:]
            offset += count

    def read_error(self, offset: int, error: OSError) -> Error:
        """What to raise where a read fails."""
        return Error(f"cannot read {quoted(self.name)} at offset {offset}: {reason(error)}")

    def ended_early(self, offset: int) -> Error:
        """What to raise where there is nothing left to read, although there was before."""
        return Error(
            f"{quoted(self.name)} became shorter while it was read: it ends at offset {offset} "
            f"now, it had {self.size} bytes; "
            "export a snapshot instead"
        )

    def data_extents(self, end: int) -> Iterator[Tuple[int, int]]:
        """(start, end) of what is not a hole before end, as far as the file system can tell.

        All of it where it can't: block devices, some file systems, some Pythons.
        """
        if not self.is_regular or _SEEK_DATA is None or _SEEK_HOLE is None:
            yield 0, end
            return
        position = 0
        while position < end:
            try:
                start = os.lseek(self.fd, position, _SEEK_DATA)
                position = os.lseek(self.fd, start, _SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end, or an empty file
                    return
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise self.read_error(position, error) from error
                start, position = position, end
            if start < end:
                yield start, min(position, end)

    def check_unchanged(self) -> None:
        """Raise Error if the file is not what it was when it was opened.

        That is its size and, for a regular file, the time of its last change. Whether a block
        device was written to can't be known.
        """
        now = os.fstat(self.fd)
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size != self.size:
            what = f"its size went from {self.size} to {size} bytes"
        elif self.is_regular and now.st_mtime_ns != self._found.st_mtime_ns:
            what = "it was written to"
        else:
            return
        raise Error(
            f"{quoted(self.name)} changed while it was read: {what}; the image is not consistent, "
            "export a "
            "snapshot instead"
        )


def file_identity(status: os.stat_result) -> Tuple[int, ...]:
    """What tells one file or device from another, whatever name it goes by."""
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return (status.st_dev, status.st_ino)


class Extent(NamedTuple):
    """A run of guest bytes, all stored one after the other in one file.

    start, end  guest offsets in bytes, end exclusive
    file        where they are stored
    offset      where in that file the byte of `start` is
    """

    start: int
    end: int
    file: DiskFile
    offset: int


class RawSource:
    """A disk whose guest bytes lie in one file, each at its own offset.

    size    of the disk in bytes, as it was found: not rounded to sectors
    files   all files that are read
    """

    def __init__(self, file: DiskFile) -> None:
        self.size = file.size
        self.files = [file]
        self._file = file

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        for start, end in self._file.data_extents(self.size):
            yield Extent(start, end, self._file, start)

    def stored(self, start: int, end: int) -> Iterator[Extent]:
        """Where the guest bytes from start to end are to be read; holes need not be told."""
        if start < self.size:
            yield Extent(start, min(end, self.size), self._file, start)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill view with guest bytes from start on; what is stored nowhere is zeros."""
        position = start
        for extent in self.stored(start, start + len(view)):
            clear(view[position - start : extent.start - start])
            position = extent.end
            extent.file.read_into(view[extent.start - start : position - start], extent.offset)
        clear(view[position - start :])

    def check_unchanged(self) -> None:
        """Raise Error if any file is not what it was when it was opened."""
        for file in self.files:
            file.check_unchanged()


def clear(view: memoryview) -> None:
    """Set a buffer to zeros."""
    if len(view):
        view[:] = bytes(len(view))


# ---------------------------------------------------------------------------------------------
# Scan: what each guest cluster will be. One cluster map, filled once and in guest order.
# ---------------------------------------------------------------------------------------------

UNALLOCATED, DATA, ZERO = 0, 1, 2  # what a cluster can be
_MIXED = 3  # only of a page: its clusters differ

MAP_PAGE = 8192  # clusters of a page of the map, or one L2 table if that has more
READ_SIZE = 1 << 20  # bytes of one read in the scan: larger ones gain nothing


class ClusterMap:
    """The state of every guest cluster, packed; append-only, in guest order.

    The map is kept in pages, each the reach of one or more whole L2 tables. A page of one
    state takes one byte, any other about a bit for each cluster (two with zero clusters).

    cluster_count   guest clusters of the disk
    table_entries   clusters in the reach of one L2 table
    page_clusters   clusters of a page, a multiple of table_entries
    data_clusters   how many are DATA so far
    """

    def __init__(self, cluster_count: int, table_entries: int) -> None:
        self.cluster_count = cluster_count
        self.table_entries = table_entries
        self.page_clusters = align_up(MAP_PAGE, table_entries)
        self.data_clusters = 0
        self._kinds = bytearray()  # of each page: its one state, or _MIXED
        self._packed = {}  # type: Dict[int, Tuple[int, int]]  # of mixed pages: DATA, ZERO bits
        self._open = bytearray()  # a byte for each cluster of the page that is being filled

    def __len__(self) -> int:
        """How many clusters have been told."""
        return len(self._kinds) * self.page_clusters + len(self._open)

    def append(self, state: int, count: int) -> None:
        """Tell that the next `count` clusters are all of one state."""
        if state == DATA:
            self.data_clusters += count
        while count:
            pages = 0 if self._open else count // self.page_clusters
            if pages:
                self._kinds += bytes((state,)) * pages
                count -= pages * self.page_clusters
            else:
                taken = min(count, self.page_clusters - len(self._open))
                self._open += bytes((state,)) * taken
                count -= taken
                self._close_full_page()

    def extend(self, states: bytes) -> None:
        """Tell the next clusters' states, a byte for each."""
        self.data_clusters += states.count(DATA)
        position = 0
        while position < len(states):
            taken = states[position : position + self.page_clusters - len(self._open)]
            self._open += taken
            position += len(taken)
            self._close_full_page()

    def finish(self) -> None:
        """Say that every cluster of the disk has been told."""
        if self._open:  # nothing lies past the end of the disk
            self.append(UNALLOCATED, self.page_clusters - len(self._open))

    def _close_full_page(self) -> None:
        if len(self._open) < self.page_clusters:
            return
        kind = self._open[0]
        if self._open.count(kind) != self.page_clusters:
            kind = _MIXED
            # A number in base two: the one conversion that needs no loop over clusters.
            self._packed[len(self._kinds)] = (
                int(self._open.translate(_DIGIT_OF_DATA), 2),
                int(self._open.translate(_DIGIT_OF_ZERO), 2),
            )
        self._kinds.append(kind)
        self._open = bytearray()

    def pages(self) -> Iterator[Tuple[int, int, bytes]]:
        """(first cluster, count of clusters, states): runs of equal pages, and mixed pages.

        states is one byte for all of the run, or a byte for each cluster of a mixed page.
        """
        for run in _PAGE_RUN.finditer(self._kinds):
            first, last = run.span()
            states = bytes(run.group()[:1])
            if states[0] == _MIXED:
                data, zero = (
                    format(bits, f"0{self.page_clusters}b").encode("ascii")
                    for bits in self._packed[first]
                )
                states = data.translate(_DATA_OF_DIGIT)
                if zero.find(b"1") >= 0:
                    both = zip(states, zero.translate(_ZERO_OF_DIGIT))
                    states = bytes(a | b for a, b in both)
            yield first * self.page_clusters, (last - first) * self.page_clusters, states

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
                    table = states[start : start + size]
                    yield 1, table.count(UNALLOCATED) < size

    def data_runs(self) -> Iterator[Tuple[int, int]]:
        """(first cluster, end cluster) of the runs of DATA, as long as they come."""
        first = end = 0
        for page, count, states in self.pages():
            if len(states) == 1:
                spans = [(0, count)] if states[0] == DATA else []
            else:
                spans = [run.span() for run in _DATA_RUN.finditer(states)]
            for start, stop in spans:
                if page + start != end:
                    if end > first:
                        yield first, end
                    first = page + start
                end = page + stop
        if end > first:
            yield first, end


_DIGIT_OF_DATA = bytes(ord("1") if state == DATA else ord("0") for state in range(256))
_DIGIT_OF_ZERO = bytes(ord("1") if state == ZERO else ord("0") for state in range(256))
_DATA_OF_DIGIT = bytes.maketrans(b"01", bytes((UNALLOCATED, DATA)))
_ZERO_OF_DIGIT = bytes.maketrans(b"01", bytes((UNALLOCATED, ZERO)))
_PAGE_RUN = re.compile(b"\x00+|\x01+|\x02+|\x03", re.DOTALL)
_STATE_RUN = re.compile(b"\x01+|\x02+")
_DATA_RUN = re.compile(b"\x01+")


def cluster_runs(ranges: Iterable[Tuple[int, int]], cluster_size: int) -> Iterator[Tuple[int, int]]:
    """(first, end) in clusters of what byte ranges touch: rounded outwards, joined, disjoint.

    The ranges must come in order of their start; they may touch and overlap.
    """
    first = end = 0
    for range_start, range_end in ranges:
        start, stop = range_start // cluster_size, div_up(range_end, cluster_size)
        if start > end:
            if end > first:
                yield first, end
            first = start
        end = max(end, stop)
    if end > first:
        yield first, end


def scan_full(source: RawSource, cluster_map: ClusterMap, cluster_size: int) -> None:
    """Fill the map for a full image: DATA wherever a cluster is not all zeros."""
    reader = ZeroDetector(source, cluster_size)
    ranges = ((extent.start, extent.end) for extent in source.extents())
    for first, end in cluster_runs(ranges, cluster_size):
        cluster_map.append(UNALLOCATED, first - len(cluster_map))
        step = max(1, READ_SIZE // cluster_size)
        for start in range(first, end, step):
            cluster_map.extend(reader.states(start, min(start + step, end)))
    cluster_map.append(UNALLOCATED, cluster_map.cluster_count - len(cluster_map))
    cluster_map.finish()


class ZeroDetector:
    """Reads clusters of a source and tells which are all zeros. One buffer, used again."""

    def __init__(self, source: RawSource, cluster_size: int) -> None:
        self._source = source
        self._cluster_size = cluster_size
        self._buffer = bytearray(max(READ_SIZE, cluster_size))
        self._zeros = bytes(len(self._buffer))

    def states(self, first: int, end: int) -> bytes:
        """DATA or UNALLOCATED for each cluster from first to end."""
        size = self._cluster_size
        length = (end - first) * size
        self._source.read_into(memoryview(self._buffer)[:length], first * size)
        buffer = self._buffer
        if buffer.startswith(self._zeros[:length] if length < len(buffer) else self._zeros):
            return bytes(end - first)
        zeros = self._zeros[:size]
        return bytes(
            UNALLOCATED if buffer.startswith(zeros, position) else DATA
            for position in range(0, length, size)
        )


# ---------------------------------------------------------------------------------------------
# Plan: where everything goes in the file. Pure arithmetic on the cluster map's counts.
# ---------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """What of the image follows from the disk's size alone.

    virtual_size    bytes, a multiple of 512
    cluster_size    bytes
    refcount_bits   width of a refcount
    """

    virtual_size: int
    cluster_size: int
    refcount_bits: int

    @property
    def cluster_count(self) -> int:
        """Guest clusters, the last of which may be partial."""
        return div_up(self.virtual_size, self.cluster_size)

    @property
    def table_entries(self) -> int:
        """Entries of one cluster of a table."""
        return self.cluster_size // ENTRY_SIZE

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table: one for each L2 table that the disk can have."""
        return div_up(self.cluster_count, self.table_entries)

    def refuse_if_too_large(self) -> None:
        """Raise Error for a disk that no qcow2 image with this cluster size can hold."""
        if self.l1_entries * ENTRY_SIZE > MAX_L1_BYTES:
            reach = (MAX_L1_BYTES // ENTRY_SIZE) * self.table_entries * self.cluster_size
            raise Error(
                f"a disk of {self.virtual_size} bytes needs an L1 table over 32 MiB, which QEMU "
                "can't open: "
                f"clusters of {self.cluster_size} bytes reach {reach} bytes; choose a larger "
                "--cluster-size"
            )


class Plan(NamedTuple):
    """Where each part of the image is, and how large.

    geometry                 of the disk
    refcount_table_clusters  clusters of the refcount table
    refcount_blocks          refcount blocks, a cluster each
    l1_clusters              clusters of the L1 table
    l2_tables                L2 tables, a cluster each
    data_clusters            host clusters of data
    """

    geometry: Geometry
    refcount_table_clusters: int
    refcount_blocks: int
    l1_clusters: int
    l2_tables: int
    data_clusters: int

    @property
    def _cluster_size(self) -> int:
        return self.geometry.cluster_size

    @property
    def refcount_table_offset(self) -> int:
        """Bytes from the start of the file; behind the header's cluster."""
        return self._cluster_size

    @property
    def refcount_block_offset(self) -> int:
        """Bytes from the start of the file."""
        return self.refcount_table_offset + self.refcount_table_clusters * self._cluster_size

    @property
    def l1_table_offset(self) -> int:
        """Bytes from the start of the file."""
        return self.refcount_block_offset + self.refcount_blocks * self._cluster_size

    @property
    def l2_table_offset(self) -> int:
        """Bytes from the start of the file."""
        return self.l1_table_offset + self.l1_clusters * self._cluster_size

    @property
    def data_offset(self) -> int:
        """Bytes from the start of the file."""
        return self.l2_table_offset + self.l2_tables * self._cluster_size

    @property
    def file_size(self) -> int:
        """Bytes of the whole image."""
        return self.data_offset + self.data_clusters * self._cluster_size


def make_plan(geometry: Geometry, l2_tables: int, data_clusters: int) -> Plan:
    """Lay the file out. Raises Error for an image that QEMU could not open.

    The refcount area counts itself: it grows until it covers the file that it is part of.
    """
    block_entries = geometry.cluster_size * 8 // geometry.refcount_bits
    l1_clusters = div_up(geometry.l1_entries, geometry.table_entries)
    others = 1 + l1_clusters + l2_tables + data_clusters
    blocks = tables = 0
    while True:
        needed = div_up(others + tables + blocks, block_entries)
        if needed == blocks:
            break
        blocks = needed
        tables = div_up(blocks, geometry.table_entries)
    plan = Plan(geometry, tables, blocks, l1_clusters, l2_tables, data_clusters)
    if tables * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise Error(
            f"an image of {plan.file_size} bytes needs a refcount table over 8 MiB, which QEMU "
            "can't open, with "
            f"clusters of {geometry.cluster_size} bytes and refcounts of {geometry.refcount_bits} "
            "bits; choose a larger --cluster-size or "
            "fewer --refcount-bits"
        )
    if plan.file_size > MAX_HOST_OFFSET:
        raise Error(
            f"an image of {plan.file_size} bytes has host offsets past 2^56, which qcow2 can't "
            "express; "
            "export fewer data"
        )
    return plan


# ---------------------------------------------------------------------------------------------
# Write: the stream. Metadata is generated table by table; data goes from the source's
# descriptor to the output's inside the kernel wherever it lets us.
# ---------------------------------------------------------------------------------------------

WRITE_SIZE = 256 << 10  # bytes of metadata or small clusters that are gathered into one write
PIPE_SIZE = 1 << 20  # what the system grants without privilege; twice the rate of 64 KiB
SENDFILE_MIN = 16 << 10  # bytes: below that, a call costs more than the copy that it saves
GATHER_GAP = 4 << 10  # bytes between two small runs that are read along: a page comes anyway
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # Linux's; the fcntl module names them since 3.10


class Output:
    """Standard output, whatever it is: pipe, socket or file, blocking or not.

    written     bytes that have left so far
    """

    def __init__(self, fd: int) -> None:
        """Raises Error if nothing can or should be written there."""
        self.fd = fd
        self.written = 0
        self._pending = []  # type: List[bytes]
        self._pending_size = 0
        self._can_sendfile = hasattr(os, "sendfile")
        try:
            self._status = os.fstat(fd)
        except OSError as error:
            raise Error("standard output is closed; redirect it to a file or a pipe") from error
        if os.isatty(fd):
            raise Error("standard output is a terminal; redirect it to a file or a pipe")
        if stat.S_ISFIFO(self._status.st_mode):
            self._grow_pipe()

    def refuse_if_among(self, files: Iterable[DiskFile]) -> None:
        """Raise Error if the output would overwrite one of the disks that are read."""
        for file in files:
            if file.identity == file_identity(self._status):
                raise Error(
                    f"standard output is {quoted(file.name)} itself, which would be overwritten; "
                    "write the image "
                    "elsewhere"
                )

    def _grow_pipe(self) -> None:
        if not sys.platform.startswith("linux"):
            return
        import fcntl

        with contextlib.suppress(OSError):  # a limit of the user's; the pipe stays as it is
            if fcntl.fcntl(self.fd, F_GETPIPE_SZ) < PIPE_SIZE:
                fcntl.fcntl(self.fd, F_SETPIPE_SZ, PIPE_SIZE)

    def write(self, data: bytes) -> None:
        """Write bytes, perhaps a little later: see flush()."""
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= WRITE_SIZE:
            self.flush()

    def write_zeros(self, count: int) -> None:
        """Write `count` zeros."""
        while count:
            step = min(count, WRITE_SIZE)
            self.write(bytes(step))
            count -= step

    def flush(self) -> None:
        """Write what is pending."""
        pending, self._pending, self._pending_size = self._pending, [], 0
        self._write_now(memoryview(pending[0] if len(pending) == 1 else b"".join(pending)))

    def _write_now(self, view: memoryview) -> None:
        while len(view):
            try:
                count = os.write(self.fd, view)
            except BlockingIOError:
                self._wait()
                continue
            except OSError as error:
                raise self._write_error(error) from error
            self.written += count
            view = view[count:]

    def send(self, file: DiskFile, offset: int, length: int) -> None:
        """Write `length` bytes of a file, from offset on."""
        self.flush()
        if self._can_sendfile:
            sent = self._sendfile(file, offset, length)
            offset += sent
            length -= sent
        buffer = bytearray(min(length, WRITE_SIZE))
        while length:
            view = memoryview(buffer)[: min(length, len(buffer))]
            file.read_into(view, offset)
            self._write_now(view)
            offset += len(view)
            length -= len(view)

    def _sendfile(self, file: DiskFile, offset: int, length: int) -> int:
        """Like send(), in the kernel. Less than length came through where the kernel won't."""
        sent = 0
        while sent < length:
            try:
                # The system call takes less than 2 GiB at once.
                count = os.sendfile(self.fd, file.fd, offset + sent, min(length - sent, 1 << 30))
            except BlockingIOError:
                self._wait()
                continue
            except (BrokenPipeError, ConnectionError) as error:
                raise self._write_error(error) from error
            except OSError:
                # An output opened for appending, an unusual source, a read or a write error:
                # the copy loop goes on from here and finds out which it was.
                self._can_sendfile = False
                break
            if not count:
                raise file.ended_early(offset + sent)
            self.written += count
            sent += count
        return sent

    def _wait(self) -> None:
        """Wait until a descriptor that does not block takes bytes again."""
        import select

        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        poll.poll()

    def _write_error(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return ConsumerGone()
        return Error(f"cannot write to standard output after {self.written} bytes: {reason(error)}")


class ConsumerGone(Exception):
    """Whoever reads standard output has closed it."""


class ImageOptions(NamedTuple):
    """What of the image the user has chosen.

    data_file_name  of the external data file, as it stands in the header, or None
    data_file_raw   the data file is kept identical to the disk's content
    """

    data_file_name: Optional[bytes]
    data_file_raw: bool


def header_cluster(plan: Plan, options: ImageOptions) -> bytes:
    """The first cluster: header, extensions. Raises Error if they don't fit."""
    geometry = plan.geometry
    extensions = b""
    if options.data_file_name is not None:
        extensions += pack_extension(EXTENSION_DATA_FILE_NAME, options.data_file_name)
    extensions += pack_extension(EXTENSION_FEATURE_NAME_TABLE, feature_name_table())
    header = pack_header(
        {
            "magic": b"QFI\xfb",
            "version": 3,
            "cluster_bits": geometry.cluster_size.bit_length() - 1,
            "size": geometry.virtual_size,
            "l1_size": geometry.l1_entries,
            "l1_table_offset": plan.l1_table_offset if plan.l1_clusters else 0,
            "refcount_table_offset": plan.refcount_table_offset,
            "refcount_table_clusters": plan.refcount_table_clusters,
            "incompatible_features": (
                INCOMPATIBLE_DATA_FILE if options.data_file_name is not None else 0
            ),
            "autoclear_features": AUTOCLEAR_DATA_FILE_RAW if options.data_file_raw else 0,
            "refcount_order": geometry.refcount_bits.bit_length() - 1,
            "header_length": 112,
        }
    )
    # The zeros behind the last extension are the one that ends the list.
    cluster = (header + extensions).ljust(geometry.cluster_size, b"\0")
    if len(cluster) > geometry.cluster_size:
        raise Error(
            "the name of the data file does not fit into a first cluster of "
            f"{geometry.cluster_size} bytes; choose a "
            "larger --cluster-size or a shorter name"
        )
    return cluster


def refcount_area(plan: Plan) -> Iterator[bytes]:
    """The refcount table and its blocks (section "Host cluster management")."""
    size = plan.geometry.cluster_size
    step = WRITE_SIZE // ENTRY_SIZE
    for start in range(0, plan.refcount_blocks, step):
        count = min(step, plan.refcount_blocks - start)
        first = plan.refcount_block_offset + start * size
        yield pack_entries(entry_range(first, size, count))
    yield bytes(plan.refcount_table_clusters * size - plan.refcount_blocks * ENTRY_SIZE)

    bits = plan.geometry.refcount_bits
    block_entries = size * 8 // bits
    full_blocks, rest = divmod(plan.file_size // size, block_entries)
    full_block = refcount_ones(block_entries, bits)
    for _ in range(full_blocks):
        yield full_block
    if rest:
        yield refcount_ones(rest, bits).ljust(size, b"\0")


def l1_table(plan: Plan, cluster_map: ClusterMap) -> Iterator[bytes]:
    """The L1 table (section "Cluster mapping"), an entry for each L2 table."""
    size = plan.geometry.cluster_size
    step = WRITE_SIZE // ENTRY_SIZE
    left = plan.geometry.l1_entries
    next_entry = plan.l2_table_offset | OFLAG_COPIED
    for tables, in_use in cluster_map.tables_in_use():
        run = min(tables, left)
        left -= run
        for start in range(0, run, step):
            count = min(step, run - start)
            if in_use:
                yield pack_entries(entry_range(next_entry, size, count))
                next_entry += count * size
            else:
                yield bytes(count * ENTRY_SIZE)
    yield bytes(plan.l1_clusters * size - plan.geometry.l1_entries * ENTRY_SIZE)


def l2_tables(plan: Plan, cluster_map: ClusterMap, in_place: bool) -> Iterator[bytes]:
    """The L2 tables that the image has (section "Cluster mapping").

    in_place    data clusters are where the guest sees them, in an external data file
    """
    size = plan.geometry.cluster_size
    entries = cluster_map.table_entries
    next_entry = plan.data_offset | OFLAG_COPIED
    for first, count, states in cluster_map.pages():
        if in_place:
            next_entry = (first * size) | OFLAG_COPIED
        if len(states) > 1:
            for table in mixed_l2_tables(states, entries, next_entry, size, in_place):
                yield table
            next_entry += states.count(DATA) * size
        elif states[0] == DATA:
            for table in ramp_tables(next_entry, size, entries, count // entries):
                yield table
            next_entry += count * size


def mixed_l2_tables(
    states: bytes, entries: int, next_entry: int, cluster_size: int, in_place: bool
) -> Iterator[bytes]:
    """The L2 tables of one mixed page; those without any cluster are left out."""
    first_entry = next_entry
    page = array("Q", bytes(len(states) * ENTRY_SIZE))
    for run in _STATE_RUN.finditer(states):
        start, end = run.span()
        if in_place:
            next_entry = first_entry + start * cluster_size
        page[start:end] = entry_range(next_entry, cluster_size, end - start)
        next_entry += (end - start) * cluster_size
    packed = pack_entries(page)
    for start in range(0, len(states), entries):
        if states.count(UNALLOCATED, start, start + entries) < entries:
            yield packed[start * ENTRY_SIZE : (start + entries) * ENTRY_SIZE]


def write_image(
    output: Output,
    plan: Plan,
    options: ImageOptions,
    source: RawSource,
    cluster_map: ClusterMap,
) -> None:
    """Write the whole image, in file order."""
    in_place = options.data_file_name is not None
    output.write(header_cluster(plan, options))
    for tables in (
        refcount_area(plan),
        l1_table(plan, cluster_map),
        l2_tables(plan, cluster_map, in_place),
    ):
        for table in tables:
            output.write(table)
    if not in_place:
        copy_data(output, source, cluster_map, plan.geometry.cluster_size)
    output.flush()


def copy_data(
    output: Output, source: RawSource, cluster_map: ClusterMap, cluster_size: int
) -> None:
    """Write the data clusters, in guest order.

    Long runs go straight from descriptor to descriptor. Short ones that lie close together
    are read in one call and written in one.
    """
    gathered = []  # type: List[Tuple[int, int]]
    for first, end in cluster_map.data_runs():
        start, stop = first * cluster_size, end * cluster_size
        if gathered and not (
            stop - start < SENDFILE_MIN
            and start - gathered[-1][1] < GATHER_GAP
            and stop - gathered[0][0] <= WRITE_SIZE
        ):
            copy_gathered(output, source, gathered)
            gathered = []
        if stop - start < SENDFILE_MIN:
            gathered.append((start, stop))
        else:
            copy_range(output, source, start, stop)
    if gathered:
        copy_gathered(output, source, gathered)


def copy_gathered(output: Output, source: RawSource, ranges: Sequence[Tuple[int, int]]) -> None:
    """Write several byte ranges that lie close together: one read for all of them."""
    base = ranges[0][0]
    view = memoryview(bytearray(ranges[-1][1] - base))
    source.read_into(view, base)
    output.write(b"".join([view[start - base : end - base] for start, end in ranges]))


def copy_range(output: Output, source: RawSource, start: int, end: int) -> None:
    """Write the guest bytes from start to end; what is stored nowhere is zeros."""
    position = start
    for extent in source.stored(start, end):
        output.write_zeros(extent.start - position)
        output.send(extent.file, extent.offset, extent.end - extent.start)
        position = extent.end
    output.write_zeros(end - position)


# ---------------------------------------------------------------------------------------------
# Command line: reads the options and joins the rooms.
# ---------------------------------------------------------------------------------------------

SIZE_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20}

EPILOG = f"""\
examples:
  {PROGRAM} disk.raw > disk.qcow2
  {PROGRAM} /dev/vg/vm | gzip > vm.qcow2.gz
  {PROGRAM} /dev/vg/vm | ssh backup 'cat > vm.qcow2'

exit status:
  0   every byte of a consistent image was written
  1   something went wrong, and one line on stderr says what; bytes that have already
      been written are no image
  2   wrong usage
  A consumer that goes away ends the program by SIGPIPE; SIGINT, SIGTERM and SIGHUP end
  it by that same signal.
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations of long options.

    argparse's own allow_abbrev=False also forbids `-c64K` before Python 3.8.
    """

    def _get_option_tuples(self, option_string: str) -> List[Any]:
        if option_string.startswith("--"):
            return []
        tuples = super()._get_option_tuples(option_string)
        return list(tuples)

    def error(self, message: str) -> Any:
        report(self.format_usage() + f"{PROGRAM}: error: {message}")
        sys.exit(2)


def cluster_size_argument(text: str) -> int:
    """A cluster size in bytes, from `65536`, `64K` or `2M`."""
    match = re.match(r"(\d+)([KkMm]?)\Z", text)
    size = int(match.group(1)) * SIZE_SUFFIXES[match.group(2).upper()] if match else 0
    if size in CLUSTER_SIZES:
        return size
    hint = ""
    if match and size * 1024 in CLUSTER_SIZES:
        hint = f"; did you mean {size}K?"
    raise argparse.ArgumentTypeError(f"{text!r} is not a power of two from 512 to 2M{hint}")


def refcount_bits_argument(text: str) -> int:
    """A refcount width in bits."""
    if text not in [str(width) for width in REFCOUNT_WIDTHS]:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1, 2, 4, 8, 16, 32 or 64")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = _Parser(
        prog=PROGRAM,
        description="Turn a disk into a qcow2 image on standard output, in one forward-only "
        "stream: no temporary file, and clusters that are all zeros take no space.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="INPUT", help="raw file or block device; only read")
    parser.add_argument(
        "-c",
        "--cluster-size",
        metavar="SIZE",
        type=cluster_size_argument,
        default=65536,
        help="a power of two from 512 to 2M (default: 64K)",
    )
    parser.add_argument(
        "-r",
        "--refcount-bits",
        metavar="BITS",
        type=refcount_bits_argument,
        default=16,
        help="1, 2, 4, 8, 16 (default), 32 or 64",
    )
    parser.add_argument(
        "-d",
        "--data-file",
        action="store_true",
        help="write only metadata: an image with INPUT as its external data file",
    )
    parser.add_argument(
        "-R",
        "--data-file-raw",
        action="store_true",
        help="the same with data_file_raw set: everything is allocated, INPUT is not read",
    )
    parser.add_argument("-V", "--version", action="version", version=PROGRAM + " " + __version__)
    return parser


def run(arguments: argparse.Namespace, resources: contextlib.ExitStack) -> None:
    """Go through the rooms. Raises Error, ConsumerGone, Interrupted."""
    output = Output(1)
    file = DiskFile(arguments.input)
    resources.callback(file.close)
    source = RawSource(file)
    output.refuse_if_among(source.files)

    geometry = Geometry(
        align_up(source.size, SECTOR_SIZE), arguments.cluster_size, arguments.refcount_bits
    )
    geometry.refuse_if_too_large()
    external = arguments.data_file or arguments.data_file_raw
    if external and geometry.virtual_size > MAX_HOST_OFFSET:
        raise Error(
            f"a data file of {geometry.virtual_size} bytes has offsets past 2^56, which qcow2 "
            "can't "
            "express"
        )
    options = ImageOptions(
        os.fsencode(arguments.input) if external else None, arguments.data_file_raw
    )
    if external and geometry.cluster_size == SECTOR_SIZE:
        raise Error(
            "an external data file needs clusters of at least 1024 bytes: its name does not fit "
            "into a first cluster of 512; choose a larger --cluster-size"
        )

    cluster_map = ClusterMap(geometry.cluster_count, geometry.table_entries)
    if options.data_file_raw:
        cluster_map.append(DATA, geometry.cluster_count)
        cluster_map.finish()
    else:
        scan_full(source, cluster_map, geometry.cluster_size)
    tables = sum(count for count, in_use in cluster_map.tables_in_use() if in_use)
    plan = make_plan(geometry, tables, 0 if external else cluster_map.data_clusters)
    source.check_unchanged()
    write_image(output, plan, options, source, cluster_map)
    source.check_unchanged()


class Interrupted(BaseException):
    """A signal that asks the program to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _interrupt(signum: int, _frame: Any) -> None:
    raise Interrupted(signum)


def catch_signals() -> None:
    """Let the signals that ask for an end go through the cleaning up; ignored ones stay so."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)


def end_by_signal(signum: int) -> int:
    """End the process by a signal, so that whoever waits for it sees that one."""
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)
    return 128 + signum


def report(message: str) -> None:
    """Write a message to stderr. Whatever becomes of it, the exit status tells the outcome."""
    with contextlib.suppress(OSError):
        os.write(2, (message + "\n").encode("utf-8", "surrogateescape"))


def open_standard_descriptors() -> None:
    """Keep a disk from being opened as descriptor 0 or 2, where messages would go."""
    for fd in (0, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program. Returns its exit status, or ends by a signal."""
    try:
        catch_signals()
        arguments = make_parser().parse_args(argv)
        with contextlib.ExitStack() as resources:
            run(arguments, resources)
        return 0
    except Error as error:
        report(f"{PROGRAM}: error: {error}")
    except MemoryError:
        report(f"{PROGRAM}: error: out of memory")
    except ConsumerGone:
        return end_by_signal(signal.SIGPIPE)
    except Interrupted as interruption:
        return end_by_signal(interruption.signum)
    return 1


if __name__ == "__main__":
    sys.exit(main())
