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

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C shall not end in a traceback, not even while the rest is imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import contextlib
import errno
import functools
import io
import itertools
import operator
import os
import re
import stat
import struct
import sys
import time
from array import array

TYPE_CHECKING = False  # type checkers take it for true, whatever it says
if TYPE_CHECKING:
    from typing import (
        Any,
        Callable,
        Collection,
        Deque,
        Dict,
        Generator,
        Iterable,
        Iterator,
        List,
        NamedTuple,
        Optional,
        Sequence,
        Tuple,
        Union,
    )
else:
    # The names alone. typing takes longer to import than a small disk to export, and its
    # named tuples nearly as long again to be made: together some 8 ms.

    class _Subscriptable:
        def __getitem__(self, _item):
            return self

    Any = Callable = Collection = Deque = Dict = Generator = Iterable = _Subscriptable()
    Iterator = List = Optional = Sequence = Tuple = Union = _Subscriptable()

    class NamedTuple(tuple):
        """An immutable record: the fields are the class's annotations."""

        __slots__ = ()

        def __init_subclass__(cls):
            fields = list(cls.__annotations__)
            defaults = [getattr(cls, name) for name in fields if hasattr(cls, name)]
            cls._fields, cls._defaults = tuple(fields), defaults
            for index, name in enumerate(fields):
                setattr(cls, name, property(operator.itemgetter(index)))

        def __new__(cls, *values, **named):
            """Fields by position or name; those with a default may be left out."""
            if len(values) < len(cls._fields):
                rest = cls._fields[len(values) :]
                defaults = dict(zip(cls._fields[-len(cls._defaults) :], cls._defaults))
                values += tuple(named[n] if n in named else defaults[n] for n in rest)
            return tuple.__new__(cls, values)

        def _replace(self, **named):
            """A copy with some fields changed."""
            return type(self)(*(named.get(n, v) for n, v in zip(self._fields, self)))


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

MAGIC = b"QFI\xfb"  # the first bytes of an image
SECTOR_SIZE = 512  # QEMU counts virtual sizes in these
DEFAULT_CLUSTER_SIZE = 64 << 10
CLUSTER_SIZES = tuple(1 << bits for bits in range(9, 22))
REFCOUNT_WIDTHS = (1, 2, 4, 8, 16, 32, 64)
ENTRY_SIZE = 8  # bytes of one entry in the L1, an L2 and the refcount table

OFFSET_MASK = (1 << 56) - (1 << 9)  # the bits of an entry that hold a host offset
OFLAG_COPIED = 1 << 63  # the cluster's refcount is exactly one
OFLAG_COMPRESSED = 1 << 62  # the other bits are a compressed cluster descriptor's
OFLAG_ZERO = 1 << 0  # version 3: the cluster reads as zeros

INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_DATA_FILE_NAME = 0x44415441
EXTENSION_FEATURE_NAME_TABLE = 0x6803F857

MAX_L1_BYTES = 32 << 20  # QCOW_MAX_L1_SIZE in QEMU's block/qcow2.h: no larger table is opened
MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # QCOW_MAX_REFTABLE_SIZE in the same place
MAX_HOST_OFFSET = 1 << 56  # table entries keep an offset in bits 9 to 55
MAX_BACKING_NAME_BYTES = 1023

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


HEADER_LENGTH = {2: 72, 3: 112}  # bytes; version 3 as QEMU 9.0 writes it


def pack_header(fields: Dict[str, Any]) -> bytes:
    """The header's bytes, as many as its version has. Fields that are not named are zero."""
    codes = ">" + "".join(code for _, code in HEADER_FIELDS)
    values = [fields.get(name, b"" if code.endswith("s") else 0) for name, code in HEADER_FIELDS]
    return struct.pack(codes, *values)[: HEADER_LENGTH[fields["version"]]]


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
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Python 3.7, Linux
_SEEK_DATA = getattr(os, "SEEK_DATA", None)  # not on every system, nor in PyPy
_SEEK_HOLE = getattr(os, "SEEK_HOLE", None)
LINUX_SEEK_HOLE = 4  # from fs.h; PyPy takes it, but doesn't name it
ACCESS_MODE = os.O_RDONLY | os.O_WRONLY | os.O_RDWR  # the bits that tell one from another
MAX_SIZE = (1 << 63) - 1  # bytes of a file; nothing can be read at that offset
LOOP_MAJOR, LOOP_GET_STATUS64, LOOP_INFO_SIZE = 7, 0x4C05, 232  # Linux's, from major.h and loop.h
AT_EMPTY_PATH, AT_STATX_FORCE_SYNC = 0x1000, 0x2000  # Linux's, from fcntl.h
CLOCK_BOOTTIME = 7  # Linux's, from time.h; time has it from Python 3.7 on
SYNC_FILE_RANGE_AND_WAIT = 7  # Linux's, from fs.h: wait for what is being written, and write
STATX_BASIC_STATS, STATX_SIZE = 0x7FF, 256  # Linux's, from stat.h: the usual fields; bytes of all


class DiskFile:
    """A regular file or block device, opened for reading only.

    name    as the user gave it
    path    the same without symbolic links
    fd      its descriptor
    size    in bytes, when it was opened
    """

    can_sendfile = True
    _sectors_changed = None  # type: Optional[Tuple[str, ...]]  # of a block device

    def __init__(self, path: str, name: Optional[str] = None, is_export: bool = False) -> None:
        """Open path. Raises Error if it is missing, unreadable or nothing that holds a disk.

        is_export   it is a FUSE export, which answers the current time for its own: whether the
                    image has changed is asked elsewhere
        """
        self.name = name = path if name is None else name
        self._is_export = is_export
        try:
            self.path = os.path.realpath(path)
            # Look before opening: to open a FIFO would wait for its other end.
            self._refuse_unless_disk(os.stat(path).st_mode)
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._found = file_status(self.fd)
            self.is_regular = stat.S_ISREG(self._found.st_mode)
            if self.is_regular and not is_export:
                wait_for_write(self.fd)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            self._look_at_device()
            if not self.size and self.is_regular:
                self._refuse_if_longer()
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise Error(f"cannot open {quoted(name)}: {why}") from error
        if not self.size and stat.S_ISBLK(self._found.st_mode):
            raise Error(f"cannot read {quoted(name)}: the device is empty; attach what it shows")

    def _look_at_device(self) -> None:
        """Begin to watch a block device, and to see it as it is."""
        if stat.S_ISBLK(self._found.st_mode):
            self._sectors_changed = sectors_changed(self.fd)
            # What somebody has read of it before may be old by now: a partition's content, or a
            # mounted file system's, has a memory of its own.
            DiskFile.advise(self, 0, 0, "DONTNEED")

    def _was_written_to(self) -> bool:
        """Whether somebody has written to it, or discarded, as far as the system tells."""
        now = file_status(self.fd)
        if stat.S_ISREG(now.st_mode):
            return now.st_mtime_ns != self._found.st_mtime_ns
        before, after = self._sectors_changed, None
        if before is not None:
            after = sectors_changed(self.fd)
        return after is not None and after != before

    def _refuse_unless_disk(self, mode: int) -> None:
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a FIFO"),
            (stat.S_ISCHR, "a character device"),
            (stat.S_ISSOCK, "a socket"),
        )
        for is_kind, kind in kinds:
            if is_kind(mode):
                hint = ", or --size SIZE - < FIFO" if is_kind is stat.S_ISFIFO else ""
                raise Error(
                    f"cannot read {quoted(self.name)}: it is {kind}; give a regular file or a "
                    f"block device{hint}"
                )

    def _refuse_if_longer(self) -> None:
        try:
            is_longer = self.size < MAX_SIZE and os.pread(self.fd, 1, self.size)
        except OSError as error:
            raise self.read_error(self.size, error) from error
        if is_longer:
            raise Error(
                f"cannot read {self.label}: it holds more than the {self.size} bytes that it says "
                "it has"
            )

    def close(self) -> None:
        """Close the descriptor. That the file's server is gone has been said where it matters."""
        with contextlib.suppress(OSError):
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

    def look_at_heads(self, offsets: Iterable[int], times: List[float]) -> bytearray:
        """Read the first HEAD_SIZE bytes at some offsets: 1 where they are not all zeros.

        A head that the file's end cuts counts as zeros. Ends early after PATIENCE in a row.

        times   where the clock is noted: before the first read, and after each
        """
        pread, fd, now = os.pread, self.fd, time.monotonic
        flags = bytearray()
        offset = -1
        times.append(now())
        try:
            for offset in offsets:
                head = pread(fd, HEAD_SIZE, offset)
                times.append(now())
                found = head != _ZERO_HEAD and len(head) == HEAD_SIZE
                flags.append(found)
                if not found and flags.endswith(_IMPATIENT):
                    break
        except OSError as error:
            raise self.read_error(offset, error) from error
        return flags

    def read_error(self, offset: int, error: OSError) -> Error:
        """What to raise where a read fails."""
        return Error(f"cannot read {self.label} at offset {offset}: {reason(error)}")

    def ended_early(self, offset: int) -> Error:
        """What to raise where there is nothing left to read."""
        if offset >= self.size:
            return Error(
                f"{quoted(self.name)} is truncated: it has {self.size} bytes, and its image says "
                "that data lies behind them"
            )
        return Error(
            f"{quoted(self.name)} became shorter while it was read: it ends at offset {offset} "
            f"now, it had {self.size} bytes; export a snapshot instead"
        )

    def advise(self, offset: int, length: int, how: str) -> None:
        """Tell the kernel what is to come: how is RANDOM, NORMAL, WILLNEED or DONTNEED."""
        advice = getattr(os, "POSIX_FADV_" + how, None)
        if advice is not None:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.fd, offset, length, advice)

    def is_cached(self, offset: int) -> bool:
        """Whether a byte is in memory, as far as the kernel tells; False if it doesn't."""
        if _RWF_NOWAIT is None or _PREADV is None:
            return False
        try:
            return bool(_PREADV(self.fd, [bytearray(1)], offset, _RWF_NOWAIT))
        except OSError:
            return False

    def data_extents(self, end: int) -> Iterator[Tuple[int, int]]:
        """(start, end) of what is not a hole before end, as far as the file system can tell.

        All of it where it can't, or where what it tells can't be: block devices, some file
        systems, some Pythons.
        """
        if self.is_regular:
            self._refuse_if_longer()
        if not self.is_regular or _SEEK_DATA is None or _SEEK_HOLE is None:
            yield 0, end
            return
        position = 0
        while position < end:
            try:
                start = os.lseek(self.fd, position, _SEEK_DATA)
                hole = os.lseek(self.fd, start, _SEEK_HOLE) if start < self.size else 0
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end, or an empty file
                    return
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise self.read_error(position, error) from error
                start, hole = position, end
            if not position <= start < hole:
                start, hole = position, end
            position = hole
            if start < end:
                yield start, min(hole, end)

    def refuse_if_replaced(self) -> None:
        """Raise Error if the name leads elsewhere now: QEMU has opened it a second time."""
        with contextlib.suppress(OSError):
            if file_identity(os.stat(self.name)) == self.identity:
                return
        raise Error(f"{quoted(self.name)} was replaced while it was opened; run the program again")

    def check_unchanged(self) -> None:
        """Raise Error if the file is not what it was when it was opened.

        That is its size and the time of its last change or, of a block device, what has been
        written to it on this host.
        """
        if self._is_export:
            return
        try:
            was_written_to = self._was_written_to()
            size = os.lseek(self.fd, 0, os.SEEK_END)
        except OSError as error:
            raise self.read_error(self.size, error) from error
        if size != self.size:
            what = f"its size went from {self.size} to {size} bytes"
        elif was_written_to:
            what = "it was written to"
        else:
            return
        raise self.changed(what)

    def changed(self, what: str) -> Error:
        """What to raise where the file is not what it was."""
        return Error(
            f"{self.label} changed while it was read: {what}; the image is not consistent, "
            "export a snapshot instead"
        )

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return quoted(self.name)


def file_status(fd: int) -> os.stat_result:
    """What the system says of an open file; of one on a network file system, what its server does.

    Of those the system keeps size and times for seconds or minutes: another host may have written
    to the file since.
    """
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and not os.major(status.st_dev):  # on no disk of this host
        flags = AT_EMPTY_PATH | AT_STATX_FORCE_SYNC
        if libc_call("statx", fd, b"", flags, STATX_BASIC_STATS, bytes(STATX_SIZE)) == 0:
            return os.fstat(fd)
    return status


def sectors_changed(fd: int) -> Optional[Tuple[str, ...]]:
    """How much has been written to a block device, and discarded, since it is there, in sectors.

    None where the system doesn't tell. What is only in memory yet is written first, so that it
    counts now and not while the device is read. (fsync() would have the disk's own memory
    written as well, which takes its time.)
    """
    if libc_call("sync_file_range", fd, 0, 0, SYNC_FILE_RANGE_AND_WAIT) == 0:
        with suppress_untold(), open(_sys_folder(os.fstat(fd).st_rdev) + "/stat") as file:
            fields = file.read().split()  # see the kernel's Documentation/block/stat.rst
            return (*fields[6:7], *fields[13:14])
    return None


def wait_for_write(fd: int) -> None:
    """Wait until a write to a regular file, if one is under way, has come to its end.

    The time of a change is told when a write begins: what it changes later would go unnoticed.
    Linux's file systems lock a file while they write, for whoever asks for its holes (ext4,
    btrfs, tmpfs) or reads (XFS).
    """
    with contextlib.suppress(OSError):
        position = os.lseek(fd, 0, os.SEEK_CUR)  # others may share it
        with contextlib.suppress(OSError):
            os.lseek(fd, 0, LINUX_SEEK_HOLE)
        os.lseek(fd, position, os.SEEK_SET)
        if os.major(os.fstat(fd).st_dev):
            os.pread(fd, 1, 0)


def file_identity(status: os.stat_result) -> Tuple[int, ...]:
    """What tells one file or device from another: (device number,), or (file system, inode)."""
    if stat.S_ISBLK(status.st_mode):
        return (status.st_rdev,)
    return (status.st_dev, status.st_ino)


UNTOLD = (  # what a look at the system meets where that does not tell something, or not us
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESRCH,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTCONN,
    errno.ESTALE,
)


@contextlib.contextmanager
def suppress_untold() -> Iterator[None]:
    """Leave it where the system doesn't tell something, or not us.

    Raises Error where it could, but not just now, as with too few descriptors: what guards
    somebody's disk must not go blind by that.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNTOLD:
            what = quoted(error.filename) if isinstance(error.filename, str) else "a disk"
            raise Error(f"cannot look at {what}: {reason(error)}") from error


def layers_below(identity: Tuple[int, ...], fd: Optional[int] = None) -> Iterator[Tuple[int, ...]]:
    """The identities of a file or device and of all that it lies on, on Linux.

    A file lies on its file system's device (if it tells one: not so btrfs, overlayfs and
    remote ones), a loop device on what it shows, a partition on its disk, a mapped device on its
    slaves.

    fd      a descriptor of it, if there is one
    """
    yield identity
    if len(identity) > 1:
        if os.major(identity[0]):
            yield from layers_below(identity[:1])
        return
    shown = shown_by_loop(identity, fd)
    if shown != identity:
        yield from layers_below(shown)
    folder = os.path.realpath(_sys_folder(identity[0]))
    below = []
    with suppress_untold():
        os.stat(os.path.join(folder, "partition"))
        below.append(os.path.dirname(folder))
    with suppress_untold():
        slaves = os.path.join(folder, "slaves")
        below += [os.path.join(slaves, name) for name in os.listdir(slaves)]
    for each in below:
        with suppress_untold(), open(os.path.join(each, "dev")) as file:
            major, minor = map(int, file.read().split(":"))
            yield from layers_below((os.makedev(major, minor),))


def shown_by_loop(identity: Tuple[int, ...], fd: Optional[int] = None) -> Tuple[int, ...]:
    """The identity of the file or device that a loop device shows; of anything else, its own.

    The device itself is asked: a name of its file may lead elsewhere by now. What /sys says of
    that name counts only where the device can't be opened.

    fd      a descriptor of it: without one, its name in /dev is needed
    """
    # Its partitions, which have another number, would answer for it, but don't show all of it.
    if len(identity) > 1 or os.major(identity[0]) != LOOP_MAJOR:
        return identity
    if not sys.platform.startswith("linux"):
        return identity
    import fcntl

    folder = _sys_folder(identity[0])
    device = None
    try:
        with suppress_untold():  # no loop device, or not for us
            if fd is None:
                name = os.path.basename(os.path.realpath(folder))
                fd = device = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
            answer = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO_SIZE))
            place, inode, number = struct.unpack_from("QQQ", answer)  # number: if it is a device
            return (place, inode) if number in (0, place) else (number,)
    finally:
        if device is not None:
            os.close(device)
    with suppress_untold(), open(f"{folder}/loop/backing_file", "rb") as file:
        return file_identity(os.stat(file.read().rstrip(b"\n")))
    return identity


def tells_of_devices() -> bool:
    """Whether the system says which device lies on which: Linux does, where /sys is there."""
    return not sys.platform.startswith("linux") or os.path.isdir("/sys/dev/block")


def _sys_folder(device: int) -> str:
    return f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"


Range = Tuple[int, int]  # start and end in bytes or clusters, end exclusive


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

    @property
    def place(self) -> Tuple[Any, ...]:
        """Equal for extents that show the same bytes of the same file at the same address.

        By its path as well: not every file system gives two files two numbers.
        """
        return (self.file.path, self.file.identity, self.offset - self.start)


class Source:
    """A disk: its size, where its bytes are stored, and a way to read them.

    size    of the disk in bytes, not rounded to sectors
    files   all files that are read, or whose change would change the disk
    """

    def __init__(self, size: int, files: List[DiskFile]) -> None:
        self.size = size
        self.files = files

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        raise NotImplementedError

    def stored(self, start: int, end: int) -> Iterator[Extent]:
        """Where the guest bytes from start to end are to be read; holes need not be told."""
        raise NotImplementedError

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill view with guest bytes from start on; what is stored nowhere is zeros."""
        position = start
        for extent in self.stored(start, start + len(view)):
            clear(view[position - start : extent.start - start])
            position = extent.end
            extent.file.read_into(view[extent.start - start : position - start], extent.offset)
        clear(view[position - start :])

    def expect_reads(self, how: str) -> None:
        """Tell the kernel whether reads to come are RANDOM, so not worth reading ahead."""
        for file in self.files:
            file.advise(0, 0, how)

    def check_unchanged(self) -> None:
        """Raise Error if any file is not what it was when it was opened."""
        for file in self.files:
            file.check_unchanged()


class RawSource(Source):
    """A disk whose guest bytes lie in one file, each at its own offset."""

    def __init__(
        self, file: DiskFile, size: Optional[int] = None, ranges: Optional[Iterable[Range]] = None
    ) -> None:
        """The disk in a file.

        size    where the disk ends, if not with the file
        ranges  what may hold anything but zeros, if somebody knows better than the file system
        """
        super().__init__(file.size if size is None else min(size, file.size), [file])
        self._file = file
        self._ranges = ranges

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        ranges = self._file.data_extents(self.size) if self._ranges is None else self._ranges
        for start, end in ranges:
            if start < self.size:
                yield Extent(start, min(end, self.size), self._file, start)

    def stored(self, start: int, end: int) -> Iterator[Extent]:
        """Where the guest bytes from start to end are to be read; holes need not be told."""
        if start < self.size:
            yield Extent(start, min(end, self.size), self._file, start)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill view with guest bytes from start on; what is stored nowhere is zeros."""
        if start + len(view) <= self.size:
            self._file.read_into(view, start)
        else:
            super().read_into(view, start)


PIPE_PACKET = 64 << 10  # bytes that a packet in a pipe may have: a page, on any machine


def is_stream_socket(fd: int) -> bool:
    """Whether a socket is a stream, and does not keep packets apart."""
    import socket

    # What kind it is said to be here does not matter to the system.
    with socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        return opened.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM


class StreamFile(DiskFile):
    """Standard input: a disk that comes byte after byte, and only once."""

    can_sendfile = False

    def __init__(self, size: int) -> None:
        """A stream that must have just `size` bytes."""
        self.name = "-"
        self.fd = 0
        self.size = size
        self._position = 0
        self._rest = b""
        self._found = file_status(0)
        if stat.S_ISSOCK(self._found.st_mode) and not is_stream_socket(0):
            raise Error("standard input is a socket of packets; give it a stream")
        if os.isatty(0):
            raise Error(
                "standard input is a terminal, which changes bytes; give it a pipe or a file"
            )
        self._look_at_device()
        if stat.S_ISREG(self._found.st_mode):
            wait_for_write(0)

    def close(self) -> None:
        """It is not ours to close."""

    def check_unchanged(self) -> None:
        """Raise Error if it is a file or a device, and not what it was; else it is gone."""
        if self._was_written_to():
            raise self.changed("it was written to")

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return "standard input"

    def advise(self, offset: int, length: int, how: str) -> None:
        """There is nothing to tell the kernel of a stream."""

    def is_cached(self, offset: int) -> bool:
        """Nothing can be read ahead: as good as in memory."""
        return True

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill view from offset on, which must not lie behind what has been read."""
        self.skip_to(offset)
        while len(view):
            count = self._read(view)
            if not count:
                raise self.ended_early(self._position)
            view = view[count:]

    def skip_to(self, offset: int) -> None:
        """Read on and forget."""
        waste = memoryview(bytearray(min(offset - self._position, 1 << 20)))
        while self._position < offset:
            if not self._read(waste[: offset - self._position]):
                raise self.ended_early(self._position)

    def _read(self, view: memoryview) -> int:
        data = self._rest or self._receive(min(len(view), READ_SIZE))
        self._rest = data[len(view) :]
        data = data[: len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _receive(self, length: int) -> bytes:
        while True:
            try:
                # A pipe may keep packets apart, and what is not read of one is lost.
                return os.read(self.fd, max(length, PIPE_PACKET))
            except BlockingIOError:
                wait_for(self.fd, "POLLIN")
            except OSError as error:
                raise self.read_error(self._position, error) from error

    def ended_early(self, offset: int) -> Error:
        """What to raise where the stream is shorter than it was said to be."""
        return Error(
            f"standard input ended after {offset} bytes, but --size says {self.size}; the image is "
            "not whole"
        )

    def expect_end(self) -> None:
        """Raise Error unless the stream has just the bytes that it was said to have."""
        self.skip_to(self.size)
        if self._read(memoryview(bytearray(1))):
            raise Error(
                f"standard input goes on after the {self.size} bytes that --size says; the image "
                "is not whole"
            )


def wait_for(fd: int, event: str, seconds: Optional[float] = None) -> bool:
    """Wait until a descriptor is ready: event is POLLIN or POLLOUT. False if time runs out."""
    import select

    poll = select.poll()
    poll.register(fd, getattr(select, event))
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


class ChainSource(Source):
    """A disk whose guest bytes lie in the members of a backing chain, at known offsets.

    The extents are kept in arrays: there can be millions of them.
    """

    def __init__(self, size: int, members: List[DiskFile]) -> None:
        super().__init__(size, members)
        self._starts = array("Q")
        self._ends = array("Q")
        self._offsets = array("Q")
        self._depths = array("L")

    def add(self, start: int, length: int, depth: int, offset: int, is_raw: bool) -> None:
        """Tell that guest bytes from start on lie in member `depth` at offset; in guest order."""
        behind = offset + length - self.files[depth].size
        if is_raw and 0 < behind < SECTOR_SIZE:  # QEMU counts its last sector as whole
            length -= behind
        self._starts.append(start)
        self._ends.append(start + length)
        self._offsets.append(offset)
        self._depths.append(depth)

    def _extent(self, index: int) -> Extent:
        file = self.files[self._depths[index]]
        return Extent(self._starts[index], self._ends[index], file, self._offsets[index])

    def extents(self) -> Iterator[Extent]:
        """All that may hold anything but zeros, in guest order."""
        return self.stored(0, self.size)

    def stored(self, start: int, end: int) -> Iterator[Extent]:
        """Where the guest bytes from start to end are to be read; all else reads as zeros."""
        import bisect

        end = min(end, self.size)
        for index in range(bisect.bisect_right(self._ends, start), len(self._starts)):
            extent = self._extent(index)
            if extent.start >= end:
                return
            first = max(start, extent.start)
            offset = extent.offset + first - extent.start
            yield Extent(first, min(end, extent.end), extent.file, offset)


def clear(view: memoryview) -> None:
    """Set a buffer to zeros."""
    if len(view):
        view[:] = bytes(len(view))


class Scratch(NamedTuple):
    """The buffers of one reader: for the disk, and for its base."""

    data: bytearray
    base: bytearray


class Experience:
    """What the last reads were like, from which the next ones take their way.

    expects_data    so many clusters were data that the first bytes of each are looked at first
    is_slow         reads waited for a disk or a network
    is_far          … so long that 4 KiB take no less time than 64
    """

    def __init__(self) -> None:
        self.expects_data = True
        self.is_slow = False
        self.is_far = False

    def learn(self, mean: float, is_far: bool) -> None:
        """Judge by the seconds that it took to look at the first bytes of a cluster."""
        self.is_slow = mean > SLOW_HEAD
        self.is_far = self.is_far or is_far

    @property
    def tolerable_zeros(self) -> float:
        """The share of zero clusters up to which their heads are worth a read of their own.

        From memory, several readers that read everything are the faster ones from a quarter on:
        on every other cluster by half. From a disk or a network, what is not read is won.
        """
        return 0.5 if self.is_slow else 0.25

    @property
    def read_size(self) -> int:
        """Bytes of one read."""
        return FAR_READ_SIZE if self.is_far else READ_SIZE


class Ticket:
    """The result of some work, as soon as a reader has done it."""

    def __init__(self, work: Callable[[Scratch], Any]) -> None:
        import threading

        self._work = work
        self._value = None  # type: Any
        self._error = None  # type: Optional[BaseException]
        self._done = threading.Lock()
        self._done.acquire()

    def perform(self, scratch: Scratch) -> None:
        """Do the work, in whatever thread this is."""
        try:
            self._value = self._work(scratch)
        except BaseException as error:  # goes on in the main thread
            self._error = error
        self._done.release()

    def is_done(self, seconds: float) -> bool:
        """Wait for the work, but no longer."""
        is_done = self._done.acquire(timeout=seconds)
        if is_done:
            self._done.release()
        return is_done

    def result(self) -> Any:
        """What the work has resulted in, once it is done. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


def start_thread(work: Callable[[], Any]) -> Any:
    """Start a thread that never keeps the program alive. Raises Error if there is none.

    Signals that end the program are for the main thread, which may have blocked them. Returns a
    lock that the thread holds while it is at work. (threading's own start() would wait for ever
    for one that finds no memory to begin with.)
    """
    import _thread

    at_work = _thread.allocate_lock()

    def run() -> None:
        # Whoever needs its work sees that it isn't at it any more.
        with contextlib.suppress(BaseException), at_work:
            work()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:  # a limit of the system's
        raise Error(f"too little of what a thread needs: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return at_work


def wait_in_steps(wait: Callable[[float], bool], seconds: float) -> bool:
    """Wait for something, but no longer. While the program is stopped (Ctrl-Z), no time counts.

    wait    waits for some seconds; whether it was in time
    """
    while seconds > 0:
        step = min(seconds, 1.0)
        if wait(step):
            return True
        seconds -= step  # whatever the clock says
    return False


@contextlib.contextmanager
def time_limit(seconds: float, act: Callable[[], Any]) -> Iterator[Any]:
    """Act, in another thread, if what is done inside takes longer. Yields an event: it did."""
    import threading

    is_done, is_late = threading.Event(), threading.Event()

    def watch() -> None:
        if not wait_in_steps(is_done.wait, seconds):
            is_late.set()
            act()

    start_thread(watch)
    try:
        yield is_late
    finally:
        is_done.set()


class Readers:
    """A few threads that read: system calls and large copies let each other run.

    Two or three of them overlap the latency of a disk or the network, and use more than one
    core where all is in memory already. Started when there is work for them; they never keep
    the program alive.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.scratch = Scratch(bytearray(), bytearray())  # the main thread's
        self.experience = Experience()
        self._threads = []  # type: List[Any]  # the locks that they hold
        self._submitted = 0
        self._queue = None  # type: Any

    def submit(self, work: Callable[[Scratch], Any], is_quick: bool = False) -> Callable[[], Any]:
        """Have work done. Returns what waits for its result, and raises what it raised.

        is_quick    it is done sooner than another thread could be asked to do it
        """
        self._submitted += 1
        # A small disk is read before a thread has started.
        is_first = self._submitted <= INLINE_PIECES and not self.experience.is_slow
        if is_quick or is_first or self.count == 1:
            value = work(self.scratch)
            return lambda: value
        ticket = Ticket(work)
        if not self._threads:
            import queue

            self._queue = queue.Queue()
        self._queue.put(ticket)
        if len(self._threads) < self.count:
            self._start_thread(ticket)
        return lambda: self._result(ticket)

    def _start_thread(self, ticket: Ticket) -> None:
        try:
            work = functools.partial(self._run, Scratch(bytearray(), bytearray()))
            self._threads.append(start_thread(work))
        except Error:  # the main thread can read as well
            self.count = max(1, len(self._threads))
            if not self._threads:
                ticket.perform(self.scratch)

    def _result(self, ticket: Ticket) -> Any:
        while not ticket.is_done(READER_PATIENCE):
            if not any(thread.locked() for thread in self._threads):  # they have found no memory
                import queue

                self.count = 1
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._queue.get_nowait().perform(self.scratch)
        return ticket.result()

    def _run(self, scratch: Scratch) -> None:
        while True:
            self._queue.get().perform(scratch)


# Other formats: QEMU's own programs read them. Of a qcow2 chain `qemu-img map` tells where in
# which member each extent lies, so that its data can be read without QEMU; anything else is
# shown as a raw file by a FUSE export of qemu-storage-daemon.

PACKAGES = {  # of Debian, of Fedora
    "qemu-img": ("qemu-utils", "qemu-img"),
    "qemu-storage-daemon": ("qemu-system-common", "qemu-img"),
}
FORMATS_WITH_OFFSETS = ("raw", "qcow2", "qcow", "qed", "vdi", "vpc", "vmdk", "parallels")
VMDK_NO_PARENT = 0xFFFFFFFF  # in place of a parent's content ID
COWD_TABLE_SIZE = 4096 * 4  # bytes of a grain table in an extent of an ESX snapshot
MAX_VMDK_DESCRIPTOR = 20 << 20  # bytes; QEMU reads no more either
QEMU_PATIENCE = 60  # seconds for an image to be opened: a remote server may be slow to answer
SIGNAL_PATIENCE = 1  # seconds for the main thread to take a signal: it may wait for the daemon
END_PATIENCE = 3  # seconds for the daemon to end: it may wait for a server
PR_SET_PDEATHSIG, CLONE_NEWNS = 1, 0x20000  # Linux's, from its prctl.h, sched.h and mount.h
MNT_DETACH, MS_REC, MS_SLAVE = 2, 0x4000, 0x80000


def start_program(arguments: List[bytes], **options: Any) -> Any:
    """Start one of QEMU's programs, with pipes behind it. Raises Error if it isn't there."""
    import subprocess

    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if "preexec_fn" in options:
        libc_call("getpid")  # has the library loaded now: a child had better not
    try:
        return subprocess.Popen(arguments, **{**pipes, **options})
    except (OSError, subprocess.SubprocessError) as error:
        name = os.fsdecode(arguments[0])
        debian, fedora = PACKAGES[name]
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise Error(
            f"cannot run {name}: {why}; it comes with the package {debian} (Debian) or "
            f"{fedora} (Fedora)"
        ) from error


def complaint(stderr: bytes) -> str:
    """What one of QEMU's programs says is wrong, in one line, and what to do if that is known."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines()]
    text = quoted("; ".join(line for line in lines if line) or "it says nothing")[1:-1]
    text = re.sub(r"^qemu-(img|storage-daemon): ", "", text)
    if "lock" in text and "Failed to get" in text:
        text += "; a running VM holds the image: export a snapshot of it, or stop the VM"
    if "Unknown driver" in text:
        text += "; QEMU's names are such as qcow2, vmdk, vhdx, vdi, and vpc for VHD"
    if "/dev/fuse" in text:
        text += "; to show a disk, QEMU needs a /dev/fuse that its user may open"
    return text


class Drain:
    """Reads what a program says on stderr, so that it never waits for a reader. Keeps the end.

    The pipe is the thread's to close: a child of the program may hold its other end for ever.
    """

    def __init__(self, pipe: Any) -> None:
        """Start to read. Raises Error if there is no thread for it."""
        import threading

        self._pipe = pipe
        self._kept = b""
        self._is_over = threading.Event()
        start_thread(self._run)

    def _run(self) -> None:
        with self._pipe, contextlib.suppress(OSError):
            data = b"?"
            while data:
                data = os.read(self._pipe.fileno(), 4096)
                self._kept = (self._kept + data)[-4096:]
        self._is_over.set()

    def text(self) -> bytes:
        """What was said last, once the program has ended."""
        self._is_over.wait(1)
        return self._kept


class ImageName(NamedTuple):
    """A disk as QEMU's programs are to find it.

    name        as the user gave it
    format      such as "qcow2"; never guessed
    is_options  the name is a block device option string, and tells the format itself
    """

    name: str
    format: str
    is_options: bool

    def _node(self) -> Dict[str, Any]:
        # What is before a colon would be a protocol in the names of files beside it.
        name = "./" + self.name if re.match("[^/]*:", self.name) else self.name
        file = {"driver": file_driver(name), "filename": name}
        return {"driver": self.format, "file": file}

    def img_arguments(self) -> List[bytes]:
        """What names it to qemu-img. As JSON, so that no character of a name means anything."""
        if self.is_options:
            return [b"--image-opts", os.fsencode(self.name)]
        return [b"json:" + dump_json(self._node())]

    def blockdev(self, node_name: str) -> bytes:
        """What names it to qemu-storage-daemon's --blockdev."""
        if not self.is_options:
            return dump_json({**self._node(), "node-name": node_name, "read-only": True})
        # Its syntax is the same, but for a driver that must be named where there is a file.
        values = dict(option_values(self.name))
        drivers = ""
        for key, name in sorted(values.items()):
            prefix = key[: -len("filename")]
            if key.endswith(".filename") and prefix + "driver" not in values:
                drivers += f",{prefix}driver={file_driver(name)}"
        return os.fsencode(f"{self.name}{drivers},node-name={node_name},read-only=on")


def option_values(options: str) -> List[Tuple[str, str]]:
    """The keys and values of a QEMU option string, as its programs read it.

    A comma in a value is doubled. A key alone is a flag: "on", and with "no" before it "off".
    """
    pairs = []
    for part in filter(None, re.findall(r"((?:[^,]|,,)*)(?:,|\Z)", options)):
        key, is_set, value = part.partition("=")
        if not is_set:
            is_off = key.startswith("no")
            key, value = (key[2:], "off") if is_off else (key, "on")
        pairs.append((key, value.replace(",,", ",")))
    return pairs


def opens_for_writing(options: str) -> bool:
    """Whether a QEMU option string asks for a disk that can be written to, wherever in it."""
    return any(
        (key.split(".")[-1] == "read-only" and value not in ("on", "yes", "true", "y"))
        or (value.startswith("json:") and "read-only" in value)
        for key, value in option_values(options)
    )


def file_driver(name: str) -> str:
    """QEMU's driver for a file or a block device."""
    with contextlib.suppress(OSError, ValueError):  # QEMU says what is wrong with it
        if stat.S_ISBLK(os.stat(name).st_mode):
            return "host_device"
    return "file"


def dump_json(value: Any) -> bytes:
    """JSON with the bytes of file names as they are."""
    import json

    return os.fsencode(json.dumps(value, ensure_ascii=False))


def run_qemu_img(
    command: bytes, image: ImageName, *options: bytes, patience: Optional[float] = None
) -> Generator[bytes, None, None]:
    """The lines that a command of qemu-img prints as JSON. Raises Error with its complaint.

    patience    seconds that it may take, if not any time
    """
    arguments = [b"qemu-img", command, b"--output=json", *options, *image.img_arguments()]
    parent = os.getpid()
    program = start_program(arguments, preexec_fn=lambda: die_with(parent, signal.SIGKILL))
    try:
        stderr = Drain(program.stderr)
        with contextlib.ExitStack() as limit:
            is_late = limit.enter_context(time_limit(patience, program.kill)) if patience else None
            for line in program.stdout:
                yield line
        if is_late and is_late.is_set():
            raise Error(
                f"cannot open {quoted(image.name)}: qemu-img does not answer within {patience} "
                "seconds"
            )
        if program.wait():
            raise Error(f"cannot open {quoted(image.name)}: {complaint(stderr.text())}")
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def parse_qemu_json(text: bytes, image: ImageName) -> Any:
    """What qemu-img printed. Raises Error if it is no JSON after all."""
    import json

    try:
        return json.loads(str(text, "utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise Error(f"cannot open {quoted(image.name)}: qemu-img printed no JSON") from error


def backing_chain(image: ImageName) -> List[Dict[str, Any]]:
    """What `qemu-img info` says of an image and of each backing file below it."""
    text = b"".join(run_qemu_img(b"info", image, b"--backing-chain", patience=QEMU_PATIENCE))
    chain = parse_qemu_json(text, image)
    for member in chain if isinstance(chain, list) and chain else [None]:
        refuse_unless_it_tells(image, member, ("filename", "format", "virtual-size"))
    return list(chain)


Place = Optional[Tuple[DiskFile, int]]


def extents_of_vmdk(member: Dict[str, Any]) -> List[str]:
    """The names of the files that hold what a VMDK stores; none for anything else."""
    data = member.get("format-specific", {}).get("data", {})
    return [extent["filename"] for extent in data.get("extents", [])]


def place_of_data(
    member: Dict[str, Any],
    own: Optional[DiskFile],
    open_file: Callable[[str], DiskFile],
    is_replaced: bool,
) -> Place:
    """The file in which the offsets count that are told of a member of a chain, and its end.

    None if it is not known. What is raw ends with a whole sector. All other files that hold data
    of it are opened, too, so that they are watched.

    own             the member's own file
    is_replaced     an option may name another data file than the header does
    """
    data = member.get("format-specific", {}).get("data", {})
    if is_replaced and "data-file" in data:
        return None
    names = [data["data-file"]] if "data-file" in data else []
    extents = extents_of_vmdk(member)
    if len(extents) == 1 or not tells_of_processes():  # else they are found where QEMU has them
        names += extents
    paths = [local_file(name) for name in names]
    files = [open_file(path) if path else None for path in paths] or [own]
    # "data-file-raw" is said even of a data file that the header does not name.
    is_known = "data-file" in data or "data-file-raw" not in data
    is_one = len(files) == 1 and len(extents) <= 1
    if not (is_known and is_one and files[0] and member["format"] in FORMATS_WITH_OFFSETS):
        return None
    is_raw = member["format"] == "raw" or "data-file" in data
    return files[0], align_up(files[0].size, SECTOR_SIZE if is_raw else 1)


def refuse_if_tables_are_missing(file: DiskFile, version: int) -> None:
    """Raise Error if a qcow or qcow2 image ends before its L1 or one of its L2 tables.

    QEMU would take what is missing for zeros, so for clusters that were never written.
    """
    header = bytearray(48)
    if file.size < len(header):
        return
    file.read_into(memoryview(header), 0)
    if version == 1:
        size, cluster_bits, l2_bits, l1_offset = struct.unpack(">24xQBB6xQ", header)
        l1_size = div_up(size, 1 << (cluster_bits + l2_bits))
    else:
        cluster_bits, l1_size, l1_offset = struct.unpack(">20xI12xIQ", header)
        l2_bits = cluster_bits - 3
    if header[:4] != MAGIC or l1_size * ENTRY_SIZE > MAX_L1_BYTES or not 0 < l2_bits < 22:
        return  # QEMU says what is wrong with it
    if l1_offset + l1_size * ENTRY_SIZE > file.size:
        raise file.ended_early(file.size)
    entries = read_entries(file, l1_offset, l1_size)
    last = max((entry & OFFSET_MASK for entry in entries), default=0)
    if last and last + (ENTRY_SIZE << l2_bits) > file.size:
        raise file.ended_early(file.size)


def read_entries(file: DiskFile, offset: int, count: int) -> "array[int]":
    """Entries of an L1 or an L2 table."""
    table = bytearray(count * ENTRY_SIZE)
    file.read_into(memoryview(table), offset)
    entries = array("Q", bytes(table))
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def refuse_if_end_is_missing(file: DiskFile) -> None:
    """Raise Error if a qcow2 image ends before its tables, or before the last data of its disk.

    So does one whose writer failed in the midst. What it lacks would read as zeros.
    """
    header = bytearray(80)
    if file.size < len(header):
        raise file.ended_early(file.size)
    file.read_into(memoryview(header), 0)
    version, bits, size, l1_size, l1_offset, features = struct.unpack(">4xI12xIQ4xIQ24xQ", header)
    is_plain = version == 2 or not features & (INCOMPATIBLE_DATA_FILE | INCOMPATIBLE_EXTENDED_L2)
    if not is_plain or not 9 <= bits <= 21 or l1_size * ENTRY_SIZE > MAX_L1_BYTES:
        return  # QEMU says what is wrong with it
    refuse_if_tables_are_missing(file, version=2)
    table_entries = (1 << bits) // ENTRY_SIZE
    l1 = read_entries(file, l1_offset, l1_size)
    for index in filter(l1.__getitem__, reversed(range(l1_size))):
        l2 = read_entries(file, l1[index] & OFFSET_MASK, table_entries)
        for at in reversed(range(table_entries)):
            offset = l2[at] & OFFSET_MASK
            if offset and not l2[at] & (OFLAG_COMPRESSED | OFLAG_ZERO):
                start = (index * table_entries + at) << bits
                if offset + min(1 << bits, size - start) > file.size:
                    raise file.ended_early(file.size)
                return


def refuse_if_grain_tables_are_missing(file: DiskFile) -> None:
    """Raise Error if an extent of an ESX snapshot (vmfsSparse) ends before one of its tables.

    They lie among the data, made as they were needed: the same as in qcow2.
    """
    header = bytearray(28)
    if file.size < len(header):
        return
    file.read_into(memoryview(header), 0)
    magic, sector, count = struct.unpack("<4s16xII", header)
    if magic != b"COWD" or count * 4 > MAX_L1_BYTES:
        return
    table = bytearray(count * 4)
    file.read_into(memoryview(table), sector * SECTOR_SIZE)
    last = max(struct.unpack(f"<{count}I", table), default=0) * SECTOR_SIZE
    if last and last + COWD_TABLE_SIZE > file.size:
        raise file.ended_early(file.size)


def refuse_if_more_than_qemu_reads(
    file: DiskFile, member: Dict[str, Any], has_parent: bool
) -> None:
    """Raise Error if QEMU takes an image for a smaller or an emptier disk than it is.

    member      what qemu-img says of it
    has_parent  QEMU has found an image below it
    """
    kind, size = member["format"], member["virtual-size"]
    if kind in ("qcow2", "qcow"):
        refuse_if_tables_are_missing(file, version=1 if kind == "qcow" else 2)
    elif kind == "vhdx" and file.size % SECTOR_SIZE:
        raise file.ended_early(file.size)  # QEMU sees all else that is missing
    elif kind == "vpc":
        refuse_if_vhd_is_more(file, size)
    elif kind == "vmdk":
        details = member.get("format-specific", {}).get("data", {})
        refuse_if_vmdk_is_more(file, size, details.get("parent-cid"), has_parent)


def refuse_if_vhd_is_more(file: DiskFile, size: int) -> None:
    """The same of a VHD.

    QEMU knows of no parents, such as those that XenServer's and Hyper-V's snapshots have; and
    unless it knows the program that has made the image, it takes the size from the geometry.
    """
    footer = bytearray(SECTOR_SIZE)
    for offset in (0, file.size - SECTOR_SIZE):  # where it has a copy at the beginning, there
        if offset >= 0 and not footer.startswith(b"conectix"):
            file.read_into(memoryview(footer), offset)
    creator, current_size, kind = struct.unpack(">28x4s16xQ4xI448x", footer)
    if kind == 4:
        raise Error(
            f"{quoted(file.name)} is a differencing VHD, and QEMU would read zeros where its "
            "parent has data; merge them first, or export the device that XenServer or Hyper-V "
            "makes of them"
        )
    if current_size > size and creator not in (b"vpc ", b"qemu"):
        raise Error(
            f"{quoted(file.name)} has a disk of {current_size} bytes, of which QEMU would read "
            f"{size}; convert it to another format with the program that made it"
        )


def refuse_if_vmdk_is_more(
    file: DiskFile, size: int, parent: Optional[int], has_parent: bool
) -> None:
    """The same of a VMDK: QEMU finds a parent by its file's name alone, and not every extent.

    parent  the parent's content ID, or what stands for none
    """
    if parent not in (None, VMDK_NO_PARENT) and not has_parent:
        raise Error(
            f"{quoted(file.name)} is a differencing VMDK that does not name its parent's file, and "
            "QEMU would read zeros where that has data; merge them first"
        )
    magic = bytearray(min(file.size, 4))
    file.read_into(memoryview(magic), 0)
    if bytes(magic) in (b"KDMV", b"COWD"):  # an extent, with its descriptor inside
        return
    text = bytearray(min(file.size, MAX_VMDK_DESCRIPTOR))
    file.read_into(memoryview(text), 0)
    extents = re.findall(rb"^\s*(?:RW|RDONLY|NOACCESS)\s+(\d{1,18})\s", text, re.MULTILINE)
    whole = sum(map(int, extents)) * SECTOR_SIZE
    if whole != size:
        raise Error(
            f"{quoted(file.name)} has extents of {whole} bytes, which QEMU would read as {size}: "
            "it skips one that is not RW, or takes one behind an empty line twice"
        )


def read_map(
    image: ImageName, size: int, places: List[Place]
) -> Generator[Dict[str, Any], None, None]:
    """What `qemu-img map` says of each part of an image, from its start to its size in bytes.

    places  of each member of its chain

    Raises Error where the parts don't follow each other up to there, or if a file ends before its
    data: QEMU would read zeros there, and even says so.
    """
    end = 0
    with contextlib.closing(run_qemu_img(b"map", image)) as lines:
        for line in lines:
            text = line.strip(b"[], \r\n")  # a list, an entry a line: nothing is kept of it
            if not text:
                continue
            entry = parse_qemu_json(text, image)
            refuse_unless_it_tells(image, entry, ("start", "length", "depth", "zero", "data"))
            numbers = (entry["length"], entry["depth"], entry.get("offset", 0))
            if entry["start"] != end or not all(map(_is_whole, numbers)):
                break
            end += entry["length"]
            place = places[entry["depth"]] if entry["depth"] < len(places) else None
            if place and entry["data"] and "offset" in entry:  # else it is compressed, or elsewhere
                file, file_end = place
                if entry["offset"] + entry["length"] > file_end:
                    raise file.ended_early(file.size)
            yield entry
    if end != size:
        raise Error(
            f"cannot open {quoted(image.name)}: of its {size} bytes, qemu-img has told of {end}"
        )


def refuse_unless_it_tells(image: ImageName, answer: Any, keys: Sequence[str]) -> None:
    """Raise Error if what qemu-img printed is no object with these keys."""
    if not (isinstance(answer, dict) and answer.keys() >= set(keys)):
        raise Error(
            f"cannot open {quoted(image.name)}: qemu-img has not told its {' and '.join(keys)}"
        )


def local_file(name: str) -> Optional[str]:
    """The name of a file that qemu-img has printed, as the system knows it; None for no file.

    Nor for a name that it could not print, if several files would have been printed so.
    """
    if PROTOCOLS.match(name):
        return None
    if "\ufffd" in name:
        return only_file_printed_as(name)
    try:
        path = os.fsdecode(name.encode("utf-8", "surrogateescape"))
        return path if os.path.exists(path) else None
    except ValueError:
        return None


def only_file_printed_as(name: str) -> Optional[str]:
    """The one file whose name is this one where bytes that are no UTF-8 are replaced."""
    import glob

    pattern = re.sub(b"(\xef\xbf\xbd)+", b"*", glob.escape(os.fsencode(name)))
    blurred, printed = re.compile("\ufffd+"), functools.partial(bytes.decode, errors="replace")
    same = [
        path
        for path in glob.glob(pattern)
        if blurred.sub("?", printed(path)) == blurred.sub("?", name)
    ]
    return os.fsdecode(same[0]) if len(same) == 1 else None


def member_files(
    chain: List[Dict[str, Any]], image: ImageName, open_file: Callable[[str], DiskFile]
) -> List[Any]:
    """Of each member of a chain the file that it lies in, opened, or None if there is none."""
    names = [local_file(member["filename"]) for member in chain[not image.is_options :]]
    if not image.is_options:
        names.insert(0, image.name)
    return [name and open_file(name) for name in names]


def holds_its_data(member: Dict[str, Any]) -> bool:
    """Whether what a member of a chain stores lies in its own file, as the guest sees it."""
    data = member.get("format-specific", {}).get("data", {})
    # "data-file-raw" is said even of a data file that the header does not name.
    has_data_file = "data-file" in data or "data-file-raw" in data
    is_plain = member["format"] in ("qcow2", "raw") and not member.get("encrypted")
    return is_plain and not has_data_file


def read_chain(
    image: ImageName, chain: List[Dict[str, Any]], files: List[Any], places: List[Place]
) -> Optional[ChainSource]:
    """The disk, to be read straight from its chain's files; None where QEMU must read it."""
    if image.is_options or not all(files) or not all(map(holds_its_data, chain)):
        return None
    for member in chain:
        # A name in JSON may hold any option, of which nothing more is said here.
        below = (member.get(f"{key}backing-filename", "") for key in ("", "full-"))
        if any(name.startswith("json:") for name in below):
            return None
    source = ChainSource(chain[0]["virtual-size"], files)
    # Closed here, and not by whoever collects garbage: he would swallow a signal's exception.
    with contextlib.closing(read_map(image, source.size, places)) as entries:
        for entry in entries:
            if entry["zero"]:
                continue
            is_there = "offset" in entry and entry["depth"] < len(files)
            if not entry["data"] or not is_there or entry.get("compressed"):
                return None
            is_raw = chain[entry["depth"]]["format"] == "raw"
            source.add(entry["start"], entry["length"], entry["depth"], entry["offset"], is_raw)
    return source


def stored_ranges(image: ImageName, size: int, places: List[Place]) -> "RangeList":
    """What of an image is not known to be zeros.

    An export's holes tell less: what QEMU can only find out by reading would be one of them.

    places  of each member of its chain
    """
    ranges = RangeList()
    with contextlib.closing(read_map(image, size, places)) as entries:
        for entry in entries:
            if not entry["zero"]:
                ranges.add(entry["start"], entry["start"] + entry["length"])
    return ranges


# Signals end the program by their default action, at once and whatever it waits for, as long as
# there is nothing to clean up. Once there is, they are caught.

ENDING_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGXCPU,
    signal.SIGUSR2,
)


class Interrupted(BaseException):
    """A signal that asks the program to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _interrupt(signum: int, _frame: Any) -> None:
    # One is enough: cleaning up must not be cut short. (Of one that is on its way already,
    # Python would complain if it was ignored by the system.)
    release_signals(lambda _signum, _frame: None)
    raise Interrupted(signum)


def catch_signals() -> None:
    """Let the signals that ask for an end go through the cleaning up; ignored ones stay so."""
    for signum in ENDING_SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)


def release_signals(how: Any = signal.SIG_DFL) -> None:
    """Handle the signals that are caught no more, but as `how` says."""
    for signum in ENDING_SIGNALS:
        if signal.getsignal(signum) == _interrupt:
            signal.signal(signum, how)


class Export:
    """A disk that qemu-storage-daemon shows as a raw file, as long as this lives.

    The daemon is a child. It ends with close(), or by the kernel's hand when this process is
    gone. As soon as the file is open, its mount and its folder are taken away: the open file
    goes on to work, and nothing is left to be cleaned up.
    """

    def __init__(self, image: ImageName) -> None:
        """Raises Error if nothing can be shown here at all."""
        if not os.path.exists("/dev/fuse"):
            raise Error(
                f"cannot open {quoted(image.name)}: there is no /dev/fuse, which reading this "
                "format needs; load the kernel's module fuse, or convert the image to raw"
            )
        import threading

        self._image = image
        self._is_closed = threading.Event()
        self._daemon = None  # type: Any
        self._folder = ""
        self.path = ""

    def open(self) -> DiskFile:
        """Show the disk and open it. Raises Error if that can't be done."""
        import tempfile

        catch_signals()
        # A signal in between would leave a folder that nobody knows of.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            self._folder = os.path.realpath(tempfile.mkdtemp(prefix="qcow2_to_stdout."))
            self.path = os.path.join(self._folder, "disk")
            with open(self.path, "wb"):
                pass
        except OSError as error:
            raise Error(f"cannot make a temporary folder: {reason(error)}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        export = {
            "type": "fuse",
            "id": "export",
            "node-name": "disk",
            "mountpoint": self.path,
            "writable": False,
            "allow-other": "off",
        }
        # The monitor comes last: it says hello when all before it is done.
        arguments = [b"qemu-storage-daemon", b"--blockdev", self._image.blockdev("disk")]
        arguments += [b"--export", dump_json(export)]
        arguments += [b"--chardev", b"stdio,id=monitor", b"--monitor", b"monitor"]
        parent = os.getpid()
        has_proc = tells_of_processes()
        may_be_alone = has_proc and mounts_are_shared()
        self._daemon = start_program(
            arguments,
            stdin=-1,
            start_new_session=True,
            preexec_fn=lambda: prepare_daemon(parent, may_be_alone),
        )
        self._stderr = Drain(self._daemon.stderr)
        ending = set(ENDING_SIGNALS) - set(blocked)
        start_thread(lambda: self._let_signals_through(ending))
        self._wait_until_ready()
        file = self._open_shown(has_proc)
        self._remove_mount()
        return file

    def _let_signals_through(self, ending: Any) -> None:
        """Kill the daemon if a signal should end us, and the main thread does not take it.

        It waits for the export then, and would for ever if a server behind that never answers:
        no signal that is caught interrupts a wait for a file system. With its daemon gone, every
        read fails.
        """
        late = 0
        while not self._is_closed.wait(SIGNAL_PATIENCE):
            late = late + 1 if ending & set(signal.sigpending()) else 0
            if late == 2:
                self._send(signal.SIGKILL)
            elif late == 8:  # it waits for something else: perhaps the output's server
                os.kill(os.getpid(), signal.SIGKILL)

    def _open_shown(self, has_proc: bool) -> DiskFile:
        """Open what the daemon shows. One that does not answer would hold us for ever."""
        with time_limit(QEMU_PATIENCE, lambda: self._send(signal.SIGKILL)) as is_late:
            shown = f"/proc/{self._daemon.pid}/root{self.path}" if has_proc else self.path
            shown = shown if os.path.exists(shown) else self.path
            try:
                file = DiskFile(shown, self._image.name, is_export=True)
            except Error:
                if is_late.is_set():
                    raise self._no_answer() from None
                raise
        if file.identity[0] == os.stat(self._folder).st_dev:  # the empty file below the mount
            file.close()
            if is_late.is_set():
                raise self._no_answer()
            raise Error(f"cannot open {quoted(self._image.name)}: its export can't be seen")
        return file

    def _no_answer(self) -> Error:
        return Error(
            f"cannot open {quoted(self._image.name)}: qemu-storage-daemon does not answer within "
            f"{QEMU_PATIENCE} seconds"
        )

    def held_files(self) -> Iterator[DiskFile]:
        """What the daemon reads itself, whatever the image consists of, opened here as well."""
        process = f"/proc/{self._daemon.pid}"
        names = []  # type: List[str]
        with suppress_untold():
            names = os.listdir(f"{process}/fd") if tells_of_processes() else []
        for name in names:
            path = f"{process}/fd/{name}"
            with suppress_untold(), contextlib.suppress(ValueError):  # closed since
                mode = os.stat(path).st_mode
                with open(f"{process}/fdinfo/{name}") as info:
                    flags = dict(line.split(":", 1) for line in info)["flags"]
                is_log = int(flags, 8) & ACCESS_MODE != os.O_RDONLY
                if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not is_log:
                    yield DiskFile(path, os.readlink(path))

    def _wait_until_ready(self) -> None:
        stdout = self._daemon.stdout
        wait = functools.partial(wait_for, stdout.fileno(), "POLLIN")
        if not wait_in_steps(wait, QEMU_PATIENCE):
            raise self._no_answer()
        if not os.read(stdout.fileno(), 1):
            complaints = complaint(self._stderr.text())
            raise Error(f"cannot open {quoted(self._image.name)}: {complaints}")

    def _remove_mount(self) -> None:
        """Take mount and folder away, also from under the open file. Where it can't be: later."""
        if not self._folder:
            return
        path = os.fsencode(self.path)
        if self._is_mounted() and libc_call("umount2", path, MNT_DETACH) != 0:
            import subprocess  # not root: FUSE's own helper may

            with contextlib.suppress(OSError):
                subprocess.call(
                    [b"fusermount3", b"-u", b"-z", path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)
            self._folder = ""

    def _is_mounted(self) -> bool:
        """Whether the mount is seen from here: if not, it goes with the daemon."""
        try:
            return os.stat(self.path).st_dev != os.stat(self._folder).st_dev
        except OSError as error:
            return error.errno != errno.ENOENT  # a mount whose daemon is dead

    def _send(self, signum: int) -> None:
        """Send a signal to the daemon and all of its session: it may be a script around it."""
        with contextlib.suppress(OSError):  # it has ended
            os.killpg(self._daemon.pid, signum)

    def close(self) -> None:
        """End the daemon, wait for it, and remove what is left."""
        self._is_closed.set()
        # Cleaning up must not be cut short.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            if self._daemon is not None:
                self._end_daemon()
            self._remove_mount()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _end_daemon(self) -> None:
        import subprocess

        self._send(signal.SIGTERM)
        try:
            self._daemon.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self._daemon.wait()
        for pipe in (self._daemon.stdin, self._daemon.stdout):
            pipe.close()


def libc_call(name: str, *arguments: Any) -> int:
    """Call a function of the C library; -1 if it fails, or if there is no way to call it."""
    try:
        import ctypes

        return int(getattr(ctypes.CDLL(None), name)(*arguments))
    except (ImportError, OSError, AttributeError):
        return -1


def die_with(parent: int, how: int) -> None:
    """In a child: have the kernel send it a signal when its parent ends, whatever ends that one."""
    libc_call("prctl", PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def prepare_daemon(parent: int, may_be_alone: bool) -> None:
    """In a child: let the kernel clean up after it, and end it when its parent has ended.

    As root its mounts are its own, and gone as soon as it is: then nothing but its death is
    needed. Else it is asked to end, and takes its mount away. So it is where its copies of the
    system's mounts would not follow these: what somebody unmounts would stay in use.
    """
    is_alone = (
        may_be_alone
        and libc_call("unshare", CLONE_NEWNS) == 0
        and (libc_call("mount", b"none", b"/", None, MS_REC | MS_SLAVE, None) == 0)
    )
    die_with(parent, signal.SIGKILL if is_alone else signal.SIGTERM)
    # The terminal's Ctrl-C is for the parent, which ends the daemon when it has cleaned up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def mounts_are_shared() -> bool:
    """Whether all mounts that are seen here are shared, as systemd has them."""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as mounts:
        return all(b" shared:" in line.split(b" - ")[0] for line in mounts)
    return False


def tells_of_processes() -> bool:
    """Whether /proc is that of our own process numbers: not so in some containers."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def open_image(image: ImageName, resources: contextlib.ExitStack) -> Source:
    """Open a disk in any format that QEMU knows: directly if possible, else by an export."""
    opened = {}  # type: Dict[str, DiskFile]

    def open_file(name: str) -> DiskFile:
        if name not in opened:
            opened[name] = DiskFile(name)
            resources.callback(opened[name].close)
        return opened[name]

    # Opened before anything is learned of them, so that a change from now on is seen.
    if not image.is_options:
        open_file(image.name)
    chain = backing_chain(image)
    files = member_files(chain, image, open_file)
    if len(chain) > 1 and backing_chain(image) != chain:  # what is opened is no more that chain
        raise Error(f"{quoted(image.name)} changed while it was opened; run the program again")
    for depth, (member, file) in enumerate(zip(chain, files)):
        if file:
            refuse_if_more_than_qemu_reads(file, member, has_parent=depth + 1 < len(chain))
        for path in filter(None, map(local_file, extents_of_vmdk(member))):
            with contextlib.closing(DiskFile(path)) as extent:
                refuse_if_grain_tables_are_missing(extent)
    places = [
        place_of_data(member, file, open_file, image.is_options and "data-file" in image.name)
        for member, file in zip(chain, files)
    ]
    source = read_chain(image, chain, files, places)  # type: Optional[Source]
    if source is None:
        watched = opened.values()
        source = open_export(image, chain[0]["virtual-size"], places, watched, resources)
    for each in opened.values():
        each.refuse_if_replaced()
    source.files = source.files + [each for each in opened.values() if each not in source.files]
    return source


def open_export(
    image: ImageName,
    size: int,
    places: List[Place],
    watched: Iterable[DiskFile],
    resources: contextlib.ExitStack,
) -> Source:
    """Open a disk as QEMU shows it.

    size        of the disk, in bytes
    places      of the data of each member of its chain, where they are known
    watched     the files that are known to hold it: that they change would be noticed
    """
    known = {each.identity for each in watched}
    held = []  # type: List[DiskFile]
    for _ in range(2):
        with contextlib.ExitStack() as attempt:
            # Asked while there is no export: some servers talk to one client at a time.
            ranges = stored_ranges(image, size, places)
            export = Export(image)
            attempt.callback(export.close)
            file = export.open()
            attempt.callback(file.close)
            found = len(held)
            for each in export.held_files():
                resources.callback(each.close)
                held.append(each)
            if file.size != size:  # nobody watches a remote disk
                break
            if known.issuperset(each.identity for each in held[found:]):
                resources.push(attempt.pop_all())
                source = RawSource(file, ranges=ranges)
                source.files += held
                return source
        # Files that nothing has named may have changed before they were watched: once more.
        known.update(each.identity for each in held)
    raise Error(f"{quoted(image.name)} changed while it was opened; run the program again")


# ---------------------------------------------------------------------------------------------
# Scan: what each guest cluster will be. One cluster map, filled once and in guest order.
# ---------------------------------------------------------------------------------------------

UNALLOCATED, DATA, ZERO = 0, 1, 2  # what a cluster can be
_MIXED = 3  # only of a page: its clusters differ

MAP_PAGE = 8192  # clusters of a page of the map, or one L2 table if that has more
READ_SIZE = 512 << 10  # bytes of one read in the scan: the buffer stays in the core's cache
PIECE_SIZE = 16 << 20  # bytes of a reader's share: more than a thread's switch is worth
BATCH_STEPS = 256  # steps of a reader's share, however small they are
PIECES_AHEAD = 2  # pieces for each reader: one at work, one that waits for it
FIRST_PIECE_SIZE = 256 << 10  # bytes; each is twice the one before: nothing is known yet
READER_PATIENCE = 1.0  # seconds between two looks whether any reader is at work
INLINE_PIECES = 3  # of a scan, before threads are worth their start
HEAD_SIZE = 4 << 10  # bytes of a cluster that are looked at first: a page, read in any case
PATIENCE = 4  # clusters with zeros at their head, in a row, until all the rest is read as well
SLOW_HEAD = 20e-6  # seconds to read one, ten times what it takes from memory
FAR_HEAD = 900e-6  # the same, for the quickest, where latency is all that counts
FAR_READ_SIZE = 1 << 20  # bytes of one read there: four readers get 570 MB/s, not 390
_ZERO_HEAD = bytes(HEAD_SIZE)
_IMPATIENT = bytes(PATIENCE)
_ZERO_RUN = re.compile(b"\x00+")


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

    def data_runs(self, short: int = 1, gap: int = 0) -> Iterator[Tuple[int, int, bytes]]:
        """(first cluster, end cluster, states) of the runs of DATA, as long as they come.

        Runs of less than `short` clusters, with at most `gap` others between two of them, come
        together, and with the state of each cluster. states is empty where all are DATA.
        """
        runs = data_pattern(short, gap)
        first = end = 0
        for page, count, states in self.pages():
            if len(states) == 1:
                spans = [(0, count)] if states[0] == DATA else []
            else:
                spans = [run.span() for run in runs.finditer(states)]
            for start, stop in spans:
                is_broken = len(states) > 1 and states.count(DATA, start, stop) < stop - start
                if is_broken or page + start != end:
                    if end > first:
                        yield first, end, b""
                    first = page + start
                end = page + stop
                if is_broken:
                    yield first, end, states[start:stop]
                    first = end
        if end > first:
            yield first, end, b""


@functools.lru_cache(maxsize=1)
def data_pattern(short: int, gap: int) -> Any:
    """Finds runs of DATA in states: one that is not short, or several short ones.

    short   clusters from which on a run stands alone
    gap     clusters that may lie between two short ones
    """
    if short <= 1 or not gap:
        return re.compile(b"\x01+")
    return re.compile(
        b"\x01{%d,}|\x01+(?:[^\x01]{1,%d}\x01{1,%d}(?!\x01))*" % (short, gap, short - 1)
    )


_DIGIT_OF_DATA = bytes(ord("1") if state == DATA else ord("0") for state in range(256))
_DIGIT_OF_ZERO = bytes(ord("1") if state == ZERO else ord("0") for state in range(256))
_DATA_OF_DIGIT = bytes.maketrans(b"01", bytes((UNALLOCATED, DATA)))
_ZERO_OF_DIGIT = bytes.maketrans(b"01", bytes((UNALLOCATED, ZERO)))
_PAGE_RUN = re.compile(b"\x00+|\x01+|\x02+|\x03", re.DOTALL)


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


def cluster_runs(ranges: Iterable[Sequence[Any]], cluster_size: int) -> Iterator[Range]:
    """The clusters that sorted byte ranges touch, rounded outwards: disjoint ranges."""
    return joined((each[0] // cluster_size, div_up(each[1], cluster_size)) for each in ranges)


def sweep(end: int, *rows: Iterable[Any]) -> Iterator[Tuple[int, int, List[Any]]]:
    """Lay several rows of disjoint, sorted ranges over each other, from 0 to end.

    Yields (start, end, items): in each row the range that covers this stretch, or None. The
    stretches are as long as they can be, and follow each other without a gap.
    """
    iterators = [iter(row) for row in rows]
    past = (end, end)
    current = [next(iterator, past) for iterator in iterators]
    position = 0
    while position < end:
        items = [item if item[0] <= position else None for item in current]
        limit = min([end] + [item[1] if item[0] <= position else item[0] for item in current])
        yield position, limit, items
        position = limit
        for row, item in enumerate(current):
            if item[1] <= position:
                current[row] = next(iterators[row], past)


@functools.lru_cache(maxsize=4)
def zeros(length: int) -> bytes:
    """So many zeros, made once."""
    return bytes(length)


class ZeroProbe(NamedTuple):
    """Reads a source and tells which of its clusters are all zeros.

    Where data is dense, the first 4 KiB of a cluster nearly always prove that it is data: the
    rest of it need not be read twice. A disk full of data is read 1.07 times in all.

    zeros, other    the state to give to a cluster that is all zeros, and to any other
    """

    source: Source
    zeros: int
    other: int

    def is_quick(self, experience: Experience) -> bool:
        """Whether the next piece is but a few small reads from memory.

        These hand Python's lock from thread to thread with each call: four readers would take
        twice the time of one.
        """
        return experience.expects_data and not experience.is_slow

    def states(
        self, first: int, end: int, cluster_size: int, experience: Experience, scratch: Scratch
    ) -> bytes:
        """The states of the clusters from first to end, a byte for each."""
        candidates = [(first, end)]
        if experience.expects_data and not experience.is_far and cluster_size > HEAD_SIZE:
            candidates = self._zero_heads(first, end, cluster_size, experience)
            if experience.is_far:
                self.source.expect_reads("NORMAL")  # whatever the kernel reads ahead is welcome
        is_zero = bytearray(end - first)  # 1 for yes
        for start_cluster, stop in candidates:
            is_zero[start_cluster - first : stop - first] = self._zero_flags(
                start_cluster, stop, cluster_size, experience.read_size, scratch
            )
        experience.expects_data = is_zero.count(1) <= len(is_zero) * experience.tolerable_zeros
        return bytes(is_zero.translate(bytes((self.other, self.zeros)).ljust(256, b"\0")))

    def _zero_flags(
        self, first: int, end: int, cluster_size: int, read_size: int, scratch: Scratch
    ) -> bytearray:
        """Read all of some clusters: a byte for each, 1 if it is all zeros."""
        flags = bytearray()
        step = max(1, read_size // cluster_size)
        for start in range(first, end, step):
            stop = min(start + step, end)
            buffer = read_clusters(self.source, start, stop, cluster_size, scratch.data)
            length = (stop - start) * cluster_size
            if buffer.startswith(zeros(length)):
                flags += b"\1" * (stop - start)
            else:
                blank = itertools.repeat(zeros(cluster_size))
                flags += bytes(map(buffer.startswith, blank, range(0, length, cluster_size)))
        return flags

    def _zero_heads(
        self, first: int, end: int, cluster_size: int, experience: Experience
    ) -> List[Range]:
        """Runs of clusters whose first bytes don't prove that they are data."""
        is_data = bytearray(end - first)
        times = []  # type: List[float]
        for extent in self.source.stored(first * cluster_size, end * cluster_size):
            start = div_up(extent.start, cluster_size)
            stop = (extent.end - HEAD_SIZE) // cluster_size + 1
            shift = extent.offset - extent.start
            if experience.is_slow:  # so ask for all of them at once
                for cluster in range(start, stop):
                    extent.file.advise(cluster * cluster_size + shift, HEAD_SIZE, "WILLNEED")
            offsets = range(start * cluster_size + shift, stop * cluster_size + shift, cluster_size)
            flags = extent.file.look_at_heads(offsets, times)
            is_data[start - first : start - first + len(flags)] = flags
        each = list(map(operator.sub, times[1:], times))
        # Far is what has not even one quick answer: a wire at its limit has many.
        is_far = len(each) >= PATIENCE and min(each) > FAR_HEAD
        experience.learn(sum(each) / len(is_data), is_far and self._is_kept(first * cluster_size))
        return [(first + run.start(), first + run.end()) for run in _ZERO_RUN.finditer(is_data)]

    def _is_kept(self, position: int) -> bool:
        """Whether all that is read stays in memory until it is copied: it is read once then."""
        if self.source.size > available_memory() // 2:
            return False
        for extent in self.source.stored(position, position + 1):
            times = []  # type: List[float]
            extent.file.look_at_heads([extent.offset] * 3, times)
            return min(times[2] - times[1], times[3] - times[2]) < SLOW_HEAD
        return False


def available_memory() -> int:
    """Bytes that the page cache may take, as far as Linux tells; 0 elsewhere."""
    with contextlib.suppress(OSError, LookupError, ValueError), open("/proc/meminfo") as file:
        return int(dict(line.split(":") for line in file)["MemAvailable"].split()[0]) << 10
    return 0


class DiffProbe(NamedTuple):
    """Compares a source with its base.

    zeros   the state to give to a cluster that differs from the base and is all zeros
    """

    source: Source
    base: Source
    zeros: int

    def is_quick(self, _experience: Experience) -> bool:
        """Whether the next piece is but a few small reads from memory: it never is."""
        return False

    def states(
        self, first: int, end: int, cluster_size: int, _experience: Experience, scratch: Scratch
    ) -> bytes:
        """The states of the clusters from first to end, a byte for each."""
        states = bytearray()
        blank = zeros(cluster_size)
        step = max(1, READ_SIZE // cluster_size)
        for start in range(first, end, step):
            stop = min(start + step, end)
            data = read_clusters(self.source, start, stop, cluster_size, scratch.data)
            base = read_clusters(self.base, start, stop, cluster_size, scratch.base)
            view = memoryview(base)
            for position in range(0, (stop - start) * cluster_size, cluster_size):
                if data.startswith(view[position : position + cluster_size], position):
                    states.append(UNALLOCATED)
                else:
                    states.append(self.zeros if data.startswith(blank, position) else DATA)
        return bytes(states)


def read_clusters(
    source: Source, first: int, end: int, cluster_size: int, buffer: bytearray
) -> bytearray:
    """The content of some clusters, padded to whole ones, at the start of a buffer.

    Made longer where that is needed: new memory would have to be cleared by the kernel first,
    which costs more than the read, so it is used again and again.
    """
    length = (end - first) * cluster_size
    if len(buffer) < length:
        buffer.extend(bytes(length - len(buffer)))
    source.read_into(memoryview(buffer)[:length], first * cluster_size)
    return buffer


Probe = Union[ZeroProbe, DiffProbe]


class Step(NamedTuple):
    """What is known of some clusters, or who finds out: first, end (exclusive), and which."""

    first: int
    end: int
    verdict: Union[int, Probe]


def full_steps(
    source: Source, cluster_count: int, cluster_size: int, trusted: bool
) -> Iterator[Step]:
    """A full image: every cluster that is not all zeros.

    trusted     what the source's extents name is data, without looking
    """
    probe = ZeroProbe(source, UNALLOCATED, DATA)
    stored = cluster_runs(source.extents(), cluster_size)
    for first, end, (found,) in sweep(cluster_count, stored):
        if found is None:
            yield Step(first, end, UNALLOCATED)
        else:
            yield Step(first, end, DATA if trusted else probe)


def layout_steps(
    source: Source, layout: "Layout", zeros: int, cluster_count: int, cluster_size: int
) -> Iterator[Step]:
    """The clusters that a layout names; their content decides what they become."""
    probe = ZeroProbe(source, zeros, DATA)
    named = cluster_runs(layout.all(), cluster_size)
    stored = cluster_runs(source.extents(), cluster_size)
    for first, end, (changed, found) in sweep(cluster_count, named, stored):
        if changed is None:
            yield Step(first, end, UNALLOCATED)
        else:
            yield Step(first, end, zeros if found is None else probe)


def trusted_layout_steps(
    layout: "Layout", zeros: int, size: int, cluster_size: int
) -> Iterator[Step]:
    """The clusters that a layout names, as it says: zeros only where it knows all of one."""
    named = cluster_runs(layout.all(), cluster_size)
    data = cluster_runs(layout.data, cluster_size)
    known = (  # rounded inwards, but for the disk's end: what lies behind it counts as zeros
        (div_up(start, cluster_size), (end if end < size else end + cluster_size) // cluster_size)
        for start, end in joined(layout.zeros)
    )
    whole = ((start, end) for start, end in known if start < end)
    cluster_count = div_up(size, cluster_size)
    for first, end, (changed, some_data, all_zeros) in sweep(cluster_count, named, data, whole):
        if changed is None:
            yield Step(first, end, UNALLOCATED)
        else:
            yield Step(first, end, zeros if all_zeros and not some_data else DATA)


def diff_steps(
    source: Source,
    base: Source,
    zeros: int,
    trusted: bool,
    geometry: "Geometry",
) -> Iterator[Step]:
    """The clusters that differ from those of a base.

    trusted     a cluster that only one side stores differs, without looking
    """
    size, count = geometry.cluster_size, geometry.cluster_count
    new = DATA if trusted else ZeroProbe(source, UNALLOCATED, DATA)
    gone = zeros if trusted else ZeroProbe(base, UNALLOCATED, zeros)
    both = DiffProbe(source, base, zeros)
    verdicts = {
        (False, False): UNALLOCATED,
        (True, False): new,
        (False, True): gone,
        (True, True): both,
    }  # type: Dict[Tuple[bool, bool], Union[int, Probe]]
    rows = (
        cluster_runs(places_that_differ(source, base, geometry.virtual_size), size),
        cluster_runs(source.extents(), size),
        cluster_runs(base.extents(), size),
    )
    for first, end, (differs, ours, theirs) in sweep(count, *rows):
        known_equal = differs is None
        verdict = UNALLOCATED if known_equal else verdicts[ours is not None, theirs is not None]
        yield Step(first, end, verdict)


def places_that_differ(source: Source, base: Source, size: int) -> Iterator[Range]:
    """Where two disks don't share the very same bytes of the very same file."""
    for start, end, (ours, theirs) in sweep(size, source.extents(), base.extents()):
        if (ours and ours.place) != (theirs and theirs.place):
            yield start, end


def fill_map(
    cluster_map: ClusterMap, steps: Iterable[Step], cluster_size: int, readers: Readers
) -> None:
    """Take all steps. Readers work ahead of the map, which is filled in guest order."""
    pending = collections.deque()  # type: Deque[Callable[[], Any]]

    def settle() -> None:
        for count, states in pending.popleft()():
            if isinstance(states, int):
                cluster_map.append(states, count)
            else:
                cluster_map.extend(states)

    for batch in batches(pieces(steps, cluster_size), PIECE_SIZE // cluster_size):
        probes = [step.verdict for step in batch if not isinstance(step.verdict, int)]
        is_quick = all(probe.is_quick(readers.experience) for probe in probes)
        work = functools.partial(examine, batch, cluster_size, readers.experience)
        pending.append(readers.submit(work, is_quick))
        if len(pending) > PIECES_AHEAD * readers.count:
            settle()
    while pending:
        settle()
    cluster_map.finish()


def examine(
    batch: List[Step], cluster_size: int, experience: Experience, scratch: Scratch
) -> List[Tuple[int, Union[int, bytes]]]:
    """Take some steps: (count of clusters, their one state or a byte for each)."""
    return [
        (
            end - first,
            verdict
            if isinstance(verdict, int)
            else verdict.states(first, end, cluster_size, experience, scratch),
        )
        for first, end, verdict in batch
    ]


def batches(steps: Iterable[Step], length: int) -> Iterator[List[Step]]:
    """Steps in lists, each a reader's share: many small ones are not worth a thread's switch."""
    batch = []  # type: List[Step]
    left = length
    for step in steps:
        batch.append(step)
        if not isinstance(step.verdict, int):
            left -= step.end - step.first
        # The first pieces are small because nothing is known yet: they are batches themselves.
        if left <= 0 or len(batch) >= BATCH_STEPS or step.end * 2 <= length:
            yield batch
            batch, left = [], length
    if batch:
        yield batch


def pieces(steps: Iterable[Step], cluster_size: int) -> Iterator[Step]:
    """The same steps, those that must be read cut to the share of one reader."""
    size = FIRST_PIECE_SIZE
    for step in steps:
        if isinstance(step.verdict, int):
            yield step
            continue
        start = step.first
        while start < step.end:
            end = min(start + max(1, size // cluster_size), step.end)
            yield Step(start, end, step.verdict)
            start = end
            size = min(size * 2, PIECE_SIZE)


# Layouts: what other programs say of a disk's extents, in JSON. Nothing in them is trusted to
# be well-formed, and nothing is ever opened or run because of them.

MAX_JSON_BYTES = 256 << 20  # some four million extents; what is larger is no layout
MAX_ENTRY = 64 << 10  # characters of an extent: what may be long in it is a file's name
MAX_INFO = 4 << 20  # characters of what qemu-img info says of one image, with many snapshots
MAX_DIGITS = 24  # of an integer: int() of a million digits would take minutes

_JSON_SPACE = re.compile(r"[ \t\r\n]*")


class RangeList:
    """Byte ranges, perhaps overlapping, that come sorted: 16 bytes for each of perhaps millions."""

    def __init__(self) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        self._is_sorted = True

    def __len__(self) -> int:
        return len(self._starts)

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
        if self._ends and self._ends[-1] == start:
            self._ends[-1] = end
            return
        self._is_sorted = self._is_sorted and not (self._starts and start < self._starts[-1])
        self._starts.append(start)
        self._ends.append(end)


class Layout(NamedTuple):
    """What a layout says, in bytes of the guest's disk.

    data    ranges that may hold data
    zeros   ranges that are known to be zeros now
    """

    data: RangeList
    zeros: RangeList

    def all(self) -> Iterator[Range]:
        """Both, in order of their starts."""
        import heapq

        return heapq.merge(self.data, self.zeros)


def json_decoder() -> Any:
    """A decoder that takes numbers of any length in no time; too long ones are infinite."""
    import json

    return json.JSONDecoder(
        parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else float("inf")
    )


def json_entries(text: str, what: str) -> Iterator[Any]:
    """The elements of a JSON list, one at a time, so that a long list takes no space.

    Raises Error where it isn't one.
    """
    decoder = json_decoder()

    def skip(position: int) -> int:
        return _JSON_SPACE.match(text, position).end()  # type: ignore[union-attr]  # always matches

    position = skip(0)
    if text[position : position + 1] != "[":
        if not text[position:]:
            raise Error(f"{what} is not a JSON list: it is empty; has its producer failed?")
        raise Error(
            f"{what} is not a JSON list of extents, as `rbd diff --format json`, `qemu-img map "
            "--output=json` or `nbdinfo --map --json` write it"
        )
    position = skip(position + 1)
    closed = text[position : position + 1] == "]"
    index = 0
    while not closed:
        try:
            entry, length = decode_entry(decoder, text, position)
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else "not JSON"
            if len(text) - position > MAX_ENTRY:
                why += f", or has more than {MAX_ENTRY} characters"
            raise Error(f"{what}: entry {index} is {why}") from error
        position += length
        yield entry
        position = skip(position)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise Error(f"{what}: there is no comma and no end behind entry {index}")
        closed = mark == "]"
        position = skip(position + 1)
        index += 1
    if closed and text[skip(position if index else position + 1) :]:
        raise Error(f"{what}: there is something behind the end of the list")


def decode_entry(decoder: Any, text: str, position: int) -> Tuple[Any, int]:
    """An element of a list, and its length as text. Never more of it is decoded than MAX_ENTRY."""
    try:
        entry, length = decoder.raw_decode(text[position : position + MAX_ENTRY // 64])
    except ValueError:  # it may have been cut: such a long one is rare
        entry, length = decoder.raw_decode(text[position : position + MAX_ENTRY])
    return entry, length


# Of a dialect: the key of an extent's start, and who tells from an entry and from whether the
# image has a backing file what the extent holds: "data" or "zeros"; with a backing file also
# "below", what a lower layer of the disk holds, so that it has not changed, and "absent", what
# none of its layers does. None stands for "nothing that counts here".


def _plain_kind(_entry: Dict[str, Any], _overlay: bool) -> Optional[str]:
    return "data"


def _rbd_kind(entry: Dict[str, Any], _overlay: bool) -> Optional[str]:
    # Strings, not booleans: that is what rbd writes.
    if entry["exists"] not in ("true", "false"):
        raise ValueError
    return "data" if entry["exists"] == "true" else "zeros"


def _qemu_map_kind(entry: Dict[str, Any], overlay: bool) -> Optional[str]:
    zero, depth, present = entry["zero"], entry["depth"], entry.get("present", True)
    if not (isinstance(zero, bool) and isinstance(present, bool) and _is_whole(depth)):
        raise ValueError
    # What is stored nowhere reads as zeros; one that says otherwise is no such map, but may
    # be a dirty bitmap that was asked for as if it were one.
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
        return "data" if flags & 1 else None
    if description in ("data", "hole", "zero", "hole,zero"):  # base:allocation
        return "zeros" if flags & 2 else "data"
    if description == "absent":  # qemu:allocation-depth: stored nowhere in the chain
        return "absent" if overlay else "zeros"
    if description == "local":
        return "data"
    if description.startswith("backing depth "):
        return "below" if overlay else "data"
    raise ValueError


class Dialect(NamedTuple):
    """How one kind of program writes extents: the key of the start, and how to read the rest."""

    name: str
    start: str
    kind: Callable[[Dict[str, Any], bool], Optional[str]]


PLAIN = Dialect("a plain list", "offset", _plain_kind)
RBD_DIFF = Dialect("rbd diff", "offset", _rbd_kind)
QEMU_MAP = Dialect("qemu-img map", "start", _qemu_map_kind)
QEMU_ALLOCATION = QEMU_MAP._replace(kind=_qemu_map_allocation)
NBDINFO = Dialect("nbdinfo --map", "offset", _nbdinfo_kind)


def _dialect(entry: Dict[str, Any]) -> Dialect:
    if "start" in entry:
        return QEMU_MAP
    if "type" in entry or "description" in entry:
        return NBDINFO
    return RBD_DIFF if "exists" in entry else PLAIN


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_layout(
    text: str, what: str, size: int, overlay: bool, only: Optional[Dialect] = None
) -> Layout:
    """Understand a layout in any of the dialects.

    text     the JSON
    what     its name in messages
    size     of the disk, in bytes
    overlay  whether the image has a backing file, so that deeper layers have not changed
    only     the one dialect that is right here, if it is not for the layout to choose

    Raises Error that names the first entry that makes no sense.
    """
    layout = Layout(RangeList(), RangeList())
    absent = RangeList()
    held = {"data": layout.data, "zeros": layout.zeros, "absent": absent}
    has_layers = False
    dialect = only
    for index, entry in enumerate(json_entries(text, what)):
        label = f"{what}: entry {index}"
        if not isinstance(entry, dict):
            raise Error(f"{label} is not an object with a start and a length")
        dialect = dialect or _dialect(entry)
        if _dialect(entry).name != dialect.name:
            raise Error(f"{label} is in the way of {_dialect(entry).name}, not of {dialect.name}")
        start, length = (_whole_number(entry, key, label) for key in (dialect.start, "length"))
        if start > size or (start == size and length):
            raise Error(f"{label} starts at {start}, past the end of the disk at {size}")
        try:
            kind = dialect.kind(entry, overlay)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, KeyError) and error.args[0] not in entry:
                why = f"it has no {error.args[0]!r}"
            else:
                rest = {key: entry[key] for key in entry if key not in (dialect.start, "length")}
                why = ascii(rest)[:80]
            raise Error(f"{label} is not what {dialect.name} writes: {quoted(why)}") from error
        has_layers = has_layers or kind == "below"
        if kind in held and length:
            held[kind].add(start, min(start + length, size))
    # What none of several layers holds has not changed since the top one was added. But a disk
    # of one layer tells what it is, not what has changed: it may have lost what the backing file
    # still has.
    if not has_layers:
        for start, end in absent:
            layout.zeros.add(start, end)
    return layout


def _whole_number(entry: Dict[str, Any], key: str, label: str) -> int:
    if key not in entry:
        raise Error(f"{label} has no {key!r}")
    value = entry[key]
    if not _is_whole(value):
        raise Error(f"{label}: its {key!r} is {ascii(value)[:40]}, not a whole number of bytes")
    return int(value)


class DiskInfo(NamedTuple):
    """What `qemu-img info --output=json` says: virtual size and cluster size (or None)."""

    virtual_size: int
    cluster_size: Optional[int]


def read_info(text: str, what: str) -> DiskInfo:
    """Understand `qemu-img info --output=json`. Raises Error where it isn't that."""
    text = text.strip()
    if len(text) > MAX_INFO:
        raise Error(
            f"{what} is longer than {MAX_INFO >> 20} MiB; that is not what qemu-img info writes"
        )
    try:
        info, end = json_decoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise Error(f"{what} is not JSON") from error
    if not isinstance(info, dict) or text[end:]:
        raise Error(f"{what} is not what qemu-img info writes")
    virtual_size = _whole_number(info, "virtual-size", what)
    if virtual_size >= 1 << 63:
        raise Error(f"{what}: its 'virtual-size' of {virtual_size} bytes is more than any disk has")
    cluster_size = info.get("cluster-size")
    return DiskInfo(
        virtual_size,
        cluster_size if _is_whole(cluster_size) and cluster_size in CLUSTER_SIZES else None,
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
                f"can't open: clusters of {self.cluster_size} bytes reach {reach} bytes; choose a "
                "larger --cluster-size"
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

    def refuse_if_too_large(self) -> None:
        """Raise Error for an image that QEMU could not open."""
        if self.refcount_table_clusters * self._cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise Error(
                f"an image of {self.file_size} bytes needs a refcount table over 8 MiB, which QEMU "
                f"can't open, with clusters of {self._cluster_size} bytes and refcounts of "
                f"{self.geometry.refcount_bits} bits; choose a larger --cluster-size or fewer "
                "--refcount-bits"
            )
        if self.file_size > MAX_HOST_OFFSET:
            raise Error(
                f"an image of {self.file_size} bytes has host offsets past 2^56, which qcow2 can't "
                "express; export fewer data"
            )


def make_plan(geometry: Geometry, l2_tables: int, data_clusters: int) -> Plan:
    """Lay the file out.

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
    return Plan(geometry, tables, blocks, l1_clusters, l2_tables, data_clusters)


# ---------------------------------------------------------------------------------------------
# Write: the stream. Metadata is generated table by table; data goes from the source's
# descriptor to the output's inside the kernel wherever it lets us.
# ---------------------------------------------------------------------------------------------

WRITE_SIZE = 256 << 10  # bytes of metadata or small clusters that are gathered into one write
PATIENCE_AT_END = 1.0  # seconds that a reader may pause with the end of the image in its pipe
POLL_AT_END = 2  # milliseconds between two looks at what it has left
PIPE_SIZE = 1 << 20  # what the system grants without privilege; twice the rate of 64 KiB
COPY_SIZE = 4 << 20  # bytes that are sent, and read ahead, at once
SOCKET_SIZE = 16 << 20  # bytes, more than two sockets on one host hold between two programs
READ_AHEAD = 16 << 20  # bytes between the copy and what the kernel is asked to fetch
SENDFILE_MIN = 16 << 10  # bytes: below that, a call costs more than the copy that it saves
GATHER_GAP = 4 << 10  # bytes between two small runs that are read along: a page comes anyway
LOCK_PLACE = 1 << 60  # bytes: where in its file an output's lock is
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # Linux's; the fcntl module names them since 3.10


def is_local_socket(fd: int) -> bool:
    """Whether a socket's other end is on this host for sure; False where that can't be asked."""
    import socket

    with socket.fromfd(fd, socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        domain = getattr(socket, "SO_DOMAIN", None)  # Linux
        return domain is not None and (
            opened.getsockopt(socket.SOL_SOCKET, domain) == socket.AF_UNIX
        )


def file_system(device: int) -> str:
    """The kind of the file system with this number, such as "ext4"; empty if nobody tells."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError, LookupError, ValueError), open(
        "/proc/self/mountinfo", "rb"
    ) as mounts:
        for line in mounts.read().decode("latin-1").splitlines():
            about_place, about_kind = line.split(" - ", 1)
            if about_place.split()[2] == number:
                return about_kind.split()[0]
    return ""


def files_below(name: str, folder: str) -> Iterator[str]:
    """A backing file and those below it, if they are qcow2 images: as far as they are here.

    name    as it stands in a header; a relative one is looked for in the folder
    """
    names, seen = [(name, folder)], []  # type: List[Tuple[str, str]], List[str]
    while names:
        for path in paths_in_name(*names.pop()):
            with suppress_untold(), contextlib.suppress(ValueError, OverflowError, struct.error):
                kind = stat.S_IFMT(os.stat(path).st_mode)
                if path in seen or kind not in (stat.S_IFREG, stat.S_IFBLK):
                    continue
                seen.append(path)
                yield path
                names.append((backing_name(path), os.path.dirname(path)))


def paths_in_name(name: str, folder: str) -> List[str]:
    """The files that a backing file's name may lead to, with or without one of QEMU's prefixes."""
    names = file_names_in_json(name) or [re.sub("^(file|host_device):", "", name)]
    with contextlib.suppress(OSError, ValueError):
        return [os.path.realpath(os.path.join(folder, each)) for each in names if each]
    return []


def file_names_in_json(name: str) -> List[str]:
    """The file names in an image's name that is QEMU's JSON (json:{…}); none in any other."""
    if not name.startswith("json:"):
        return []
    import json

    # QEMU takes single quotes as well.
    pattern = r"""filename["']\s*:\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')"""
    texts = []
    for double, single in re.findall(pattern, name):
        texts.append(double or re.sub(r'(?<!\\)"', r"\"", single.replace("\\'", "'")))
    with contextlib.suppress(ValueError):
        return [json.loads(f'"{text}"') for text in texts]
    return []


def backing_name(path: str) -> str:
    """The backing file's name in the header of a qcow2 image; empty for anything else."""
    with open(path, "rb") as file:
        magic, _, offset, length = struct.unpack(">4sIQI", file.read(20))
        if magic != MAGIC or not offset or length > MAX_BACKING_NAME_BYTES:
            return ""
        file.seek(offset)
        return os.fsdecode(file.read(length))


START_TICK = 0.02  # seconds: in hundredths Linux tells when a process was started; and a bit more


def process_age() -> Optional[float]:
    """Seconds since this process was started, or a hundredth more; None where nobody tells."""
    with suppress_untold(), open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return None


class Output:
    """Standard output, whatever it is: pipe, socket or file, blocking or not.

    written     bytes that have left so far

    What sendfile() puts into a pipe or a socket are the pages of the source's file: until the
    reader has taken them, they change with it. So the end of the image is copied: once that has
    been accepted, none of the source's pages is on its way, and the source is free to change.
    """

    def __init__(self, fd: int, is_text: bool = False) -> None:
        """Raises Error if nothing can or should be written there: text may go to a terminal."""
        self.fd = fd
        self.written = 0
        self._is_text = is_text
        self._lends_to = MAX_SIZE  # offset in the image up to which pages may be sent
        self._lent_to = 0  # … and were
        self._pending = []  # type: List[bytes]
        self._pending_size = 0
        self._can_sendfile = hasattr(os, "sendfile")
        self._head = b""  # of a file: its first bytes
        self._start = None  # type: Optional[int]  # … and where they are, if that can be asked
        self._has_no_holes = False  # nor will it, whatever is written
        try:
            self._status = os.fstat(fd)
        except OSError as error:
            raise Error("standard output is closed; redirect it to a file or a pipe") from error
        if os.isatty(fd) and not is_text:
            raise Error("standard output is a terminal; redirect it to a file or a pipe")
        self._is_socket = stat.S_ISSOCK(self._status.st_mode)
        self._is_pipe = stat.S_ISFIFO(self._status.st_mode)
        self._is_block_device = stat.S_ISBLK(self._status.st_mode)
        # A file or a disk is always said to be ready, even one that asks to try again.
        self._may_wait = not (self._is_block_device or stat.S_ISREG(self._status.st_mode))
        is_stream = True
        if self._is_socket:
            try:
                is_stream = is_stream_socket(fd)
                is_local = is_local_socket(fd)
            except OSError as error:
                raise Error(f"cannot look at standard output: {reason(error)}") from error
            # A receiver on this host may have pages in its queue, of which only a local socket
            # tells how many: the end of the image that must be copied has no bound.
            self._can_sendfile = self._can_sendfile and is_local
        elif self._is_pipe:
            import fcntl

            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            is_stream = not flags & getattr(os, "O_DIRECT", 0)
            if flags & ACCESS_MODE == os.O_RDWR:
                raise Error(
                    "standard output is a FIFO that is opened for reading as well, so that nobody "
                    "would notice if its reader went away; redirect by > instead of <>"
                )
            if not is_text:
                self._grow_pipe()
        if not is_stream:  # a reader with a short buffer loses the end of each packet
            raise Error("standard output is a pipe or a socket of packets; give it a stream")

    def claim_device(self) -> None:
        """Have a block device for this run alone, where the system can do that.

        It is opened as a mount does, and stays open, and so claimed, to the end. Raises Error if
        another run has it, or if it is mounted or part of a volume.
        """
        if not self._is_block_device:
            return
        self._start = os.lseek(self.fd, 0, os.SEEK_CUR)
        if not sys.platform.startswith("linux"):
            return
        with suppress_untold():  # no /proc, or no right to read
            try:
                os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise Error(
                    "standard output is a device in use: it is mounted, part of a volume, or "
                    "held by another program or run; write the image elsewhere"
                ) from error

    def claim_file(self) -> None:
        """Lock a regular file, so that no second run of this program writes into it.

        Raises Error if one has locked it, or has written to it since this program was started.
        """
        if not stat.S_ISREG(self._status.st_mode):
            return
        import fcntl

        try:  # a place where no other program's locks are; it is free again when this process ends
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCK_PLACE)
        except BlockingIOError as error:
            if self._is_locked_by_a_run():
                raise Error(
                    "another run of this program is writing to the same file; give each a name of "
                    "its own"
                ) from error
        except OSError:  # not on this file system
            pass
        is_appended = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND
        if stderr_is_the_output():  # what others say into the file, sendfile() would not notice
            self._can_sendfile = False
        kind = file_system(self._status.st_dev)
        # Others may take zeros for holes.
        self._has_no_holes = os.major(self._status.st_dev) > 0 or kind in ("btrfs", "tmpfs")
        if not kind.startswith("fuse"):  # a program may tell nothing until all is there
            with contextlib.suppress(OSError):
                self._start = os.lseek(self.fd, 0, os.SEEK_END if is_appended else os.SEEK_CUR)
        if self._start is not None and self._was_filled(self._start):
            raise Error(
                "standard output is a file to which somebody else has written an image since this "
                "program was started; give it a name of its own"
            )

    def _was_filled(self, start: int) -> bool:
        """Whether another run has written its image there since this process was started."""
        status, age = os.fstat(self.fd), process_age()
        if status.st_size <= start or age is None:
            return False
        if not 0 <= time.time() - status.st_mtime < age - START_TICK:
            return False
        with suppress_untold():  # no right to read
            # Not to be closed: the lock would be gone with it.
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(fd, len(MAGIC), start) == MAGIC
        return False

    def _is_locked_by_a_run(self) -> bool:
        """Whether it is not just the caller who has locked the file, and so all of it."""
        import fcntl

        if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32:
            return True
        flock = "hhqqi"  # type, whence, start, length, process
        wanted = struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, LOCK_PLACE, 1, 0)
        told = struct.unpack(flock, fcntl.fcntl(self.fd, fcntl.F_GETLK, wanted))
        return told[2:4] == (LOCK_PLACE, 1)

    def _refuse_if_disturbed(self) -> None:
        """Raise Error if somebody else has written to the file, or has emptied it.

        Such as `> FILE` in another shell.
        """
        if self._start is None:
            return
        end = os.lseek(self.fd, 0, os.SEEK_CUR)
        is_whole = end == self._start + self.written
        if not self._is_block_device:
            is_whole = (
                is_whole and os.fstat(self.fd).st_size >= end and self._first_hole(end) >= end
            )
            with suppress_untold(), open(f"/proc/self/fd/{self.fd}", "rb") as file:
                file.seek(self._start)
                is_whole = is_whole and file.read(len(self._head)) == self._head
        if not is_whole:
            raise Error(
                "standard output is a file or a device to which somebody else has written at the "
                "same time, and the image is not whole; give it a name of its own"
            )

    def _first_hole(self, end: int) -> int:
        """Where the first hole of a regular file is, behind the image's start; else its end.

        What is written is stored, zeros too: a hole has been made by somebody else.
        """
        if self._has_no_holes and sys.platform.startswith("linux"):
            with suppress_untold():
                try:
                    return os.lseek(self.fd, self._start or 0, LINUX_SEEK_HOLE)
                finally:
                    os.lseek(self.fd, end, os.SEEK_SET)
        return end

    def refuse_if_among(self, files: Iterable[DiskFile]) -> None:
        """Raise Error if the output would overwrite one of the disks that are read."""
        for file in files:
            if self._overlaps(file.identity, file.fd):
                fate = "would be overwritten" if file.size else "is empty now: has > emptied it?"
                raise Error(
                    f"standard output is {quoted(file.name)} itself, or lies on it, which {fate}; "
                    "write the image elsewhere"
                )

    def refuse_if_named(self, backing_file: str) -> None:
        """Raise Error if the output is the file that the image names, from here or beside it."""
        for folder in ("", self._folder()):
            for member in files_below(backing_file, folder):
                if self._overlaps(file_identity(os.stat(member))):
                    raise Error(
                        f"standard output is {quoted(member)} itself, or lies on it, the "
                        "image's own backing file; write the image elsewhere"
                    )

    def refuse_if_no_backing_file(self, name: str, fmt: str, sizes: Collection[int]) -> None:
        """Raise Error if what the image names is there, beside it, but not what it is said to be.

        Such as what a failed run has left, or a qcow2 image that would be shown as it is. Where
        the output's folder isn't known, only an absolute name leads anywhere.

        sizes   of the disk that it should hold, in bytes: a guest may have written on that what
                an image begins with
        """
        path = os.path.join(self._folder(), name)
        with suppress_untold(), contextlib.suppress(ValueError):
            status = os.stat(path) if os.path.isabs(path) else None
            if status and stat.S_ISDIR(status.st_mode):
                raise Error(f"the backing file {quoted(path)} is a folder; give an image's name")
            if not (status and stat.S_ISREG(status.st_mode) and fmt in ("raw", "qcow2")):
                return
            with open(path, "rb") as file:
                is_image = file.read(len(MAGIC)) == MAGIC
            if fmt == "raw":
                if is_image and align_up(status.st_size, SECTOR_SIZE) not in sizes:
                    raise Error(
                        f"the backing file {quoted(path)} is no raw disk, as --backing-format "
                        "says: it begins as a qcow2 image does, and has another size than the "
                        "disk; is it -F qcow2?"
                    )
                return
            if not is_image:
                raise Error(
                    f"the backing file {quoted(path)} is no qcow2 image, as --backing-format says; "
                    "is that wrong, or has the run that wrote it failed?"
                )
            with contextlib.closing(DiskFile(path)) as image:
                refuse_if_end_is_missing(image)

    def _folder(self) -> str:
        """Where the image will lie, if it goes into a file or a device and Linux tells."""
        with suppress_untold():  # no /proc
            return os.path.dirname(os.readlink(f"/proc/self/fd/{self.fd}"))
        return ""

    def _overlaps(self, theirs: Tuple[int, ...], fd: Optional[int] = None) -> bool:
        """Whether what is written would change a file or a device, or grow into it.

        theirs  its identity
        fd      a descriptor of it, if there is one
        """
        mode = self._status.st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return False
        ours = file_identity(self._status)
        # Two loop devices on one file are taken for one: they may show the same of it.
        if {ours, shown_by_loop(ours, self.fd)} & set(layers_below(theirs, fd)):
            return True
        if self._is_block_device and not tells_of_devices():
            raise Error(
                "standard output is a block device, and without /sys nobody knows whether what is "
                "read lies on it; mount /sys"
            )
        is_above = {theirs, shown_by_loop(theirs, fd)} & set(layers_below(ours, self.fd))
        return bool(is_above) and not self._is_text  # a few bytes beside it do no harm

    def _grow_pipe(self) -> None:
        if not sys.platform.startswith("linux"):
            return
        import fcntl

        with contextlib.suppress(OSError):  # a limit of the user's; the pipe stays as it is
            if fcntl.fcntl(self.fd, F_GETPIPE_SZ) < PIPE_SIZE:
                fcntl.fcntl(self.fd, F_SETPIPE_SZ, PIPE_SIZE)

    def begin(self, size: int) -> None:
        """Tell how long the image will be: of its end, copies are sent."""
        if not (self._is_pipe or self._is_socket):
            return
        # All that finish() needs: where it is missing, that is to be said before the first byte.
        import fcntl
        import select  # noqa: F401  # likewise
        import termios  # noqa: F401  # likewise

        holds = SOCKET_SIZE
        if self._is_pipe and sys.platform.startswith("linux"):
            with contextlib.suppress(OSError):
                holds = fcntl.fcntl(self.fd, F_GETPIPE_SZ)
        self._lends_to = size - holds

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
        if not self._pending:
            return
        pending, self._pending, self._pending_size = self._pending, [], 0
        self._head = self._head or bytes(pending[0][:SECTOR_SIZE])
        self._write_now(memoryview(pending[0] if len(pending) == 1 else b"".join(pending)))

    def finish(self) -> None:
        """Write what is pending, and see the reader off.

        A reader that goes away while its bytes are still in the pipe or the socket has not got
        the image. It is waited for as long as it reads, and PATIENCE_AT_END more; and until it
        has taken all pages of the source. What a file system says only when a file is closed is
        heard as well, and what a block device says only when it is written back.
        """
        self.flush()
        try:
            if self._is_block_device:
                os.fsync(self.fd)
            os.close(os.dup(self.fd))
        except OSError as error:
            raise self._write_error(error) from error
        self._refuse_if_disturbed()
        if not (self._is_pipe or self._is_socket):
            return
        import fcntl
        import select
        import termios

        request = termios.TIOCOUTQ if self._is_socket else termios.FIONREAD
        poll = select.poll()
        poll.register(self.fd, 0)
        left, since = -1, time.monotonic()
        copied = self.written - self._lent_to if self._lent_to else MAX_SIZE
        while left > copied or time.monotonic() < since + PATIENCE_AT_END:
            # First whether the reader has gone, then what it has left: not the other way round.
            events = [event for _, event in poll.poll(0 if left < 0 else POLL_AT_END)]
            is_refused = self._is_socket and not self._takes_more()
            try:
                answer = fcntl.ioctl(self.fd, request, bytes(4))
            except OSError:  # not on this system
                return
            before, left = left, struct.unpack("i", answer)[0]
            if self._is_socket and not left:  # perhaps because it was thrown away: that is an error
                events = [event & select.POLLERR for _, event in poll.poll(0)]
            elif not left:
                return
            if any(event & (select.POLLERR | select.POLLHUP) for event in events):
                raise ConsumerGone()
            if not left:
                return
            if is_refused:
                raise ConsumerGone()
            if left < before:
                since = time.monotonic()

    def _takes_more(self) -> bool:
        """Whether the other end of a socket still reads; to be asked without writing a byte."""
        try:
            os.write(self.fd, b"")
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _write_now(self, view: memoryview) -> None:
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

    def send(self, file: DiskFile, offset: int, length: int) -> None:
        """Write `length` bytes of a file, from offset on."""
        self.flush()
        lent = min(length, self._lends_to - self.written)
        if self._can_sendfile and file.can_sendfile and lent > 0:
            sent = self._sendfile(file, offset, lent)
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
            self._lent_to = self.written
            sent += count
        return sent

    def _write_error(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return ConsumerGone()
        return Error(f"cannot write to standard output after {self.written} bytes: {reason(error)}")


class ConsumerGone(Exception):
    """Whoever reads standard output has closed it."""


class Header(NamedTuple):
    """What the first cluster says beside the plan.

    version         3, or 2, which has neither feature bits nor a zero flag
    data_file_name  of the external data file, as it stands in the header, or None
    data_file_raw   the data file is kept identical to the disk's content
    backing_file    its name, as it stands in the header, or None
    backing_format  of the backing file, such as b"raw"
    has_features    their names are told, which nobody needs to open an image
    """

    version: int = 3
    data_file_name: Optional[bytes] = None
    data_file_raw: bool = False
    backing_file: Optional[bytes] = None
    backing_format: bytes = b""
    has_features: bool = True

    @property
    def extensions(self) -> bytes:
        """The header extensions, without the one that ends them."""
        extensions = b""
        if self.backing_file is not None:
            extensions += pack_extension(EXTENSION_BACKING_FORMAT, self.backing_format)
        if self.data_file_name is not None:
            extensions += pack_extension(EXTENSION_DATA_FILE_NAME, self.data_file_name)
        if self.version >= 3 and self.has_features:
            extensions += pack_extension(EXTENSION_FEATURE_NAME_TABLE, feature_name_table())
        return extensions

    @property
    def length(self) -> int:
        """Bytes of the first cluster that are in use."""
        length = HEADER_LENGTH[self.version] + len(self.extensions)
        if self.backing_file is not None:
            length += 8 + len(self.backing_file)  # 8: the extension that ends the others
        return length

    def fitted(self, cluster_size: int) -> "Header":
        """Itself, or without the features' names if only so the first cluster has room for it.

        Raises Error if it has none for a file's name even then.
        """
        header = self if self.length <= cluster_size else self._replace(has_features=False)
        if header.length > cluster_size:
            what = "data" if self.backing_file is None else "backing"
            raise Error(
                f"the name of the {what} file does not fit into a first cluster of {cluster_size} "
                "bytes; choose a larger --cluster-size or a shorter name"
            )
        return header

    def cluster(self, plan: Plan) -> bytes:
        """The first cluster: header, extensions, backing file name."""
        geometry = plan.geometry
        start = HEADER_LENGTH[self.version] + len(self.extensions) + 8
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
                    0 if self.data_file_name is None else INCOMPATIBLE_DATA_FILE
                ),
                "autoclear_features": AUTOCLEAR_DATA_FILE_RAW if self.data_file_raw else 0,
                "refcount_order": geometry.refcount_bits.bit_length() - 1,
                "header_length": HEADER_LENGTH[self.version],
            }
        )
        # Zeros behind the last extension are the one that ends the list.
        cluster = header + self.extensions
        if name:
            cluster = cluster.ljust(start, b"\0") + name
        return cluster.ljust(geometry.cluster_size, b"\0")


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
        if states[0] == ZERO and len(states) == 1:
            table = pack_entries(array("Q", [OFLAG_ZERO]) * entries)
            for _ in range(count // entries):
                yield table
        elif len(states) > 1:
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
    """The L2 tables of one mixed page; those without any cluster are left out.

    The loops over entries are those of map() and accumulate(): runs may be short.
    """
    is_data = states.translate(_IS_DATA)
    stop = next_entry + len(states) * cluster_size
    if in_place:
        values = range(next_entry, stop, cluster_size)  # type: Iterable[int]
    else:  # the n-th cluster of data has the n-th offset
        nth = range(next_entry - cluster_size, stop, cluster_size)
        values = map(nth.__getitem__, itertools.accumulate(is_data))
    page = map(operator.mul, is_data, values)
    if states.count(ZERO):
        page = map(operator.or_, page, states.translate(_ZERO_FLAGS))
    packed = pack_entries(array("Q", page))
    for start in range(0, len(states), entries):
        if states.count(UNALLOCATED, start, start + entries) < entries:
            yield packed[start * ENTRY_SIZE : (start + entries) * ENTRY_SIZE]


_IS_DATA = bytes(state == DATA for state in range(256))
_ZERO_FLAGS = bytes(OFLAG_ZERO if state == ZERO else 0 for state in range(256))


def write_image(
    output: Output,
    plan: Plan,
    header: Header,
    source: Source,
    cluster_map: ClusterMap,
    readers: Readers,
) -> None:
    """Write the whole image, in file order."""
    in_place = header.data_file_name is not None
    output.begin(plan.file_size)
    output.write(header.cluster(plan))
    for tables in (
        refcount_area(plan),
        l1_table(plan, cluster_map),
        l2_tables(plan, cluster_map, in_place),
    ):
        for table in tables:
            output.write(table)
    if not in_place:
        copy_data(output, source, cluster_map, plan.geometry.cluster_size, readers)
    output.flush()


def data_pieces(cluster_map: ClusterMap, cluster_size: int) -> Iterator[Tuple[int, int, bytes]]:
    """(start, end, states): byte ranges with data in guest order, cut to a handy size.

    states  empty if all of it is data; else many short runs lie close together, and this is
            the state of each cluster
    """
    runs = cluster_map.data_runs(SENDFILE_MIN // cluster_size, (GATHER_GAP - 1) // cluster_size)
    for first, end, states in runs:
        step = max(1, (WRITE_SIZE if states else COPY_SIZE) // cluster_size)
        for start in range(first, end, step):
            stop = min(start + step, end)
            some = states[start - first : stop - first]
            yield start * cluster_size, stop * cluster_size, some


class ReadAhead:
    """Has the kernel fetch what is copied next, so that the copy never waits for a slow disk.

    What is in memory already is not asked for.
    """

    def __init__(
        self, source: Source, pieces: Iterator[Tuple[int, int, bytes]], readers: Readers
    ) -> None:
        self._source = source
        self._pieces = pieces
        self._readers = readers
        self._asked = 0  # guest offset up to which everything was asked for
        self._is_proven = self._is_in_vain = False
        if readers.count == 1:
            self._asked = MAX_SIZE

    def advance(self, position: int) -> None:
        """Tell that the copy has come to a guest offset."""
        if position + READ_AHEAD // 2 < self._asked:
            return
        batch = []  # type: List[Range]
        while self._asked < position + READ_AHEAD:
            start, self._asked, _ = next(self._pieces, (0, MAX_SIZE, b""))
            if self._asked < MAX_SIZE:
                batch.append((start, self._asked))
        samples = batch[:: max(1, len(batch) // 8)] + batch[-1:]
        if not all(self._is_cached(*each) for each in samples):
            for start, end in batch:
                for extent in self._source.stored(start, end):
                    extent.file.advise(extent.offset, extent.end - extent.start, "WILLNEED")
                    if self._readers.experience.is_far:
                        self._readers.submit(functools.partial(self._fetch, extent))

    def _is_cached(self, start: int, end: int) -> bool:
        extents = self._source.stored(start, end)
        return all(each.file.is_cached(each.offset + each.end - each.start - 1) for each in extents)

    def _fetch(self, extent: Extent, scratch: Scratch) -> None:
        # Some far file systems fetch one page after the other, unless several readers ask. If
        # a second look takes as long as the first, nothing is kept and it is all in vain.
        for start in range(extent.start, extent.end, FAR_READ_SIZE):
            if self._is_in_vain:
                return
            end = min(start + FAR_READ_SIZE, extent.end)
            times = [time.monotonic()]
            for _ in range(1 if self._is_proven else 2):
                read_clusters(self._source, start, end, 1, scratch.data)
                times.append(time.monotonic())
            if not self._is_proven:
                self._is_in_vain = times[2] - times[1] > (times[1] - times[0]) / 2 > SLOW_HEAD
                self._is_proven = True


def copy_data(
    output: Output,
    source: Source,
    cluster_map: ClusterMap,
    cluster_size: int,
    readers: Readers,
) -> None:
    """Write the data clusters, in guest order.

    Long runs go straight from descriptor to descriptor. Short ones that lie close together
    are read in one call, with what is between them, and written in one.
    """
    # The kernel's own guess would also fetch what lies between two runs.
    source.expect_reads("NORMAL" if readers.count == 1 or readers.experience.is_far else "RANDOM")
    read_ahead = ReadAhead(source, data_pieces(cluster_map, cluster_size), readers)
    for start, stop, states in data_pieces(cluster_map, cluster_size):
        read_ahead.advance(start)
        if states:
            copy_fragments(output, source, start, stop, states, readers.scratch.data)
        elif stop - start < SENDFILE_MIN:
            data = read_clusters(source, start, stop, 1, readers.scratch.data)
            output.write(bytes(memoryview(data)[: stop - start]))
        else:
            copy_range(output, source, start, stop)


def copy_fragments(
    output: Output, source: Source, start: int, stop: int, states: bytes, buffer: bytearray
) -> None:
    """Write the data clusters from guest byte start to stop, of which states tells."""
    clusters = cluster_slices((stop - start) // len(states))
    chosen = itertools.compress(clusters, states.translate(_IS_DATA))
    try:
        data = read_clusters(source, start, stop, 1, buffer)
    except Error:  # perhaps it is between them that the disk can't be read
        if isinstance(source.files[0], StreamFile):
            raise
        for each in chosen:
            copy_range(output, source, start + each.start, start + each.stop)
    else:
        output.write(b"".join(map(data.__getitem__, chosen)))


@functools.lru_cache(maxsize=1)
def cluster_slices(cluster_size: int) -> List[slice]:
    """The places of the clusters in a buffer of WRITE_SIZE bytes."""
    return [slice(at, at + cluster_size) for at in range(0, WRITE_SIZE, cluster_size)]


def copy_range(output: Output, source: Source, start: int, end: int) -> None:
    """Write the guest bytes from start to end; what is stored nowhere is zeros."""
    position = start
    for extent_start, extent_end, file, offset in source.stored(start, end):
        if position < extent_start:
            output.write_zeros(extent_start - position)
        output.send(file, offset, extent_end - extent_start)
        position = extent_end
    if position < end:
        output.write_zeros(end - position)


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
SIZE_SUFFIXES = "KMGTPE"  # powers of 1024, as qemu-img takes them

EPILOG = f"""\
examples:
  {PROGRAM} disk.raw > disk.qcow2
  {PROGRAM} -f vmdk disk.vmdk > disk.qcow2
  {PROGRAM} /dev/vg/vm | gzip > vm.qcow2.gz
  {PROGRAM} /dev/vg/vm | ssh backup 'cat > vm.qcow2'
  {PROGRAM} /dev/vg/tuesday --diff /dev/vg/monday \\
      -b monday.qcow2 -F qcow2 > tuesday.qcow2

exit status:
  0   every byte of a consistent image was written
  1   something went wrong, and one line on stderr says what; bytes that have
      already been written are no image
  2   wrong usage
  A consumer that goes away ends the program by SIGPIPE; a signal that asks it
  to end (SIGINT, SIGTERM, SIGHUP...) ends it by that same signal.
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

    def _print_message(self, message: str, _file: Any = None) -> None:
        output = Output(1, is_text=True)
        output.write(message.encode("utf-8"))
        output.flush()

    def error(self, message: str) -> Any:
        report(self.format_usage() + f"{PROGRAM}: error: {quoted(message)[1:-1]}")
        sys.exit(2)


def parse_size(text: str) -> Optional[int]:
    """A number of bytes, from `65536`, `64K` or `1T`; None for anything else."""
    match = re.match(rf"(\d{{1,20}})([{SIZE_SUFFIXES}]?)\Z", text, re.ASCII | re.IGNORECASE)
    if not match:
        return None
    exponent = SIZE_SUFFIXES.index(match.group(2).upper()) + 1 if match.group(2) else 0
    return int(match.group(1)) << (10 * exponent)


def cluster_size_argument(text: str) -> int:
    """A cluster size in bytes."""
    size = parse_size(text)
    if size in CLUSTER_SIZES:
        return int(size or 0)
    hint = f"; did you mean {size}K?" if size and size * 1024 in CLUSTER_SIZES else ""
    if parse_size(text.rstrip("iBb")) in CLUSTER_SIZES:
        hint = f"; write {text.rstrip('iBb')}"
    raise argparse.ArgumentTypeError(f"{text!r} is not a power of two from 512 to 2M{hint}")


def size_argument(text: str) -> int:
    """A disk's size in bytes."""
    size = parse_size(text)
    if size is None:
        plain = text.rstrip("iBb")
        hint = f"; write {plain}" if parse_size(plain) is not None else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes, perhaps with K, M, G, T, P or E{hint}"
        )
    return size


def refcount_bits_argument(text: str) -> int:
    """A refcount width in bits."""
    if text not in [str(width) for width in REFCOUNT_WIDTHS]:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1, 2, 4, 8, 16, 32 or 64")
    return int(text)


def parallel_argument(text: str) -> int:
    """A number of readers."""
    if not re.match(r"[1-9]\d?\Z", text) or int(text) > 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
    return int(text)


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
    group = parser.add_argument_group("what to read")
    group.add_argument(
        "input", metavar="INPUT", help="file or block device, or - for standard input; only read"
    )
    group.add_argument(
        "--size",
        type=size_argument,
        help="with INPUT -: bytes of the disk. Read once: all clusters are stored, or the "
        "layout's only",
    )
    group.add_argument(
        "-f",
        "--format",
        metavar="FMT",
        default="raw",
        help="format of INPUT, e.g. qcow2, vmdk, vhdx (default: raw); QEMU reads others",
    )
    group.add_argument(
        "--image-opts",
        action="store_true",
        help="INPUT is a QEMU option string: driver=rbd,pool=p,image=i",
    )

    group = parser.add_argument_group("what to export (default: the whole disk)")
    group.add_argument("--diff", metavar="BASE", help="only what differs from BASE")
    group.add_argument(
        "--diff-format", metavar="FMT", help="format of BASE (default: that of INPUT)"
    )
    group.add_argument(
        "--layout",
        metavar="FILE",
        help="only the extents in FILE (- is stdin): JSON of rbd diff, qemu-img map, nbdinfo "
        "--map, or a list of offset and length",
    )
    group.add_argument(
        "--trust-layout",
        action="store_true",
        help="don't look for zeros in the layout's extents: read once",
    )
    for option, what in (
        ("map", "qemu-img map of INPUT"),
        ("info", "qemu-img info of INPUT"),
        ("diff-map", "qemu-img map of BASE"),
        ("diff-info", "qemu-img info of BASE"),
    ):
        group.add_argument(
            f"--json-header-{option}", metavar="FD", help=f"{what} in JSON, on a descriptor (XAPI)"
        )

    group = parser.add_argument_group("what to write")
    group.add_argument(
        "-b",
        "--backing-file",
        metavar="NAME",
        help="an overlay on NAME; with --diff or --layout",
    )
    group.add_argument(
        "-F", "--backing-format", metavar="FMT", help="format of the backing file, e.g. qcow2"
    )
    group.add_argument(
        "-c",
        "--cluster-size",
        metavar="SIZE",
        type=cluster_size_argument,
        help="a power of two from 512 to 2M (default: 64K)",
    )
    group.add_argument(
        "-r",
        "--refcount-bits",
        metavar="BITS",
        type=refcount_bits_argument,
        default=16,
        help="1, 2, 4, 8, 16 (default), 32 or 64",
    )
    group.add_argument(
        "--compat",
        choices=("1.1", "0.10"),
        default="1.1",
        help="qcow2 version 3 (1.1, default) or 2 (0.10)",
    )
    group.add_argument(
        "-d",
        "--data-file",
        action="store_true",
        help="only metadata: INPUT is the image's external data file",
    )
    group.add_argument(
        "-R",
        "--data-file-raw",
        action="store_true",
        help="the same, everything allocated; INPUT is not read",
    )

    group = parser.add_argument_group("how to run")
    group.add_argument(
        "-m",
        "--parallel",
        metavar="N",
        type=parallel_argument,
        default=4,
        help="readers at work at once, 1 to 64 (default: 4)",
    )
    group.add_argument(
        "--measure",
        action="store_true",
        help="write no image, print its exact size",
    )
    group.add_argument(
        "--output", choices=("human", "json"), help="how --measure prints (default: human)"
    )
    group.add_argument(
        "-p", "--progress", action="store_true", help="show progress on stderr (SIGUSR1: a line)"
    )
    group.add_argument("-h", "--help", action="help", help="show this text and exit")
    group.add_argument(
        "-V",
        "--version",
        action="version",
        version=PROGRAM + " " + __version__,
        help="show the version and exit",
    )
    return parser


def are_same_file(one: str, other: str) -> bool:
    """Whether two names are equal, or lead to one file from here."""
    with contextlib.suppress(OSError, ValueError):
        if one == other or os.path.realpath(one) == os.path.realpath(other):
            return True
        # Not every file system gives two files two numbers.
        return os.path.samefile(one, other) and os.stat(one).st_nlink > 1
    return False


def refuse_contradictions(options: argparse.Namespace) -> None:
    """Raise Error for options that don't go together."""
    external = "--data-file-raw" if options.data_file_raw else "--data-file"
    has_external = options.data_file or options.data_file_raw
    partial = "--diff" if options.diff is not None else "--layout"
    is_partial = options.diff is not None or options.layout is not None
    overlay = options.backing_file is not None
    maps = (options.json_header_map, options.json_header_info) != (None, None)
    base_maps = (options.json_header_diff_map, options.json_header_diff_info) != (None, None)
    old = options.compat == "0.10"
    is_stream = options.input == "-" and not options.image_opts
    has_format = options.format != "raw" or options.image_opts
    input_format = "--image-opts" if options.image_opts else f"--format {options.format}"
    contradictions = (
        (is_stream and options.size is None,
         "INPUT - is a stream, and the size of its disk must be known first; add --size"),
        (not is_stream and options.size is not None,
         "--size is for INPUT -, which can't be asked for its size; leave it out, or write - for "
         "INPUT"),
        (is_stream and (has_format or maps or has_external),
         "INPUT - is raw data that is read once; leave --format, --image-opts, --data-file and "
         "--json-header options out"),
        (is_stream and options.diff is not None,
         "INPUT - is read once, which leaves nothing to be copied after a comparison; use "
         "--layout instead of --diff"),
        (options.diff == "-",
         "BASE can't be a stream: it would be read more than once; a file of that name is ./-"),
        (base_maps and (options.diff_format or "raw") != "raw",
         "the --json-header-diff options describe a raw BASE; leave --diff-format out"),
        (is_stream and options.layout == "-",
         "standard input can't be both INPUT and the layout; put the layout into a file"),
        (options.output is not None and not options.measure,
         "--output says how --measure prints; add --measure"),
        (options.image_opts and options.format != "raw",
         "--image-opts names the format itself, as driver=…; leave --format out"),
        (options.image_opts and not re.search(r"(^|,)driver=", options.input),
         f"{quoted(options.input)} names no driver=…, and a format is never guessed"),
        (options.image_opts and opens_for_writing(options.input),
         f"{quoted(options.input)} would open a disk for writing; leave read-only=… out"),
        (has_format and has_external,
         f"{external} refers to INPUT as it is, and {input_format} is not raw; leave one out"),
        (has_format and (maps or base_maps),
         f"the --json-header options describe raw disks; leave {input_format} out"),
        (options.diff_format is not None and options.diff is None,
         "--diff-format is the format of BASE; add --diff BASE"),
        (not all(re.match(r"[\w-]+\Z", each or "raw", re.ASCII) for each in
                 (options.format, options.diff_format)),
         "a format is a name such as raw, qcow2 or vmdk"),
        (options.diff is not None and options.layout is not None,
         "--diff and --layout both say what to export; give one of them"),
        (options.trust_layout and options.layout is None,
         "--trust-layout needs a --layout to trust"),
        (is_partial and has_external,
         f"{partial} exports a part of the disk, but {external} refers to all of it; leave one of "
         "them out"),
        (maps and options.layout is not None,
         "--layout and --json-header-map both say where data is; give one of them"),
        (maps and has_external,
         f"--json-header-map says what to export, but {external} refers to all of the disk; leave "
         "one of them out"),
        (base_maps and options.diff is None,
         "--json-header-diff-map and --json-header-diff-info describe BASE; add --diff BASE"),
        (overlay and has_external,
         f"--backing-file and {external} exclude each other: an overlay holds its own data"),
        (overlay and not is_partial,
         "--backing-file needs --diff or --layout, which say what differs from it"),
        (overlay and options.backing_format is None,
         "--backing-file needs --backing-format: a format that is left to be guessed is a "
         "security hole; add for example -F qcow2"),
        (not overlay and options.backing_format is not None,
         "--backing-format describes a backing file; add --backing-file NAME"),
        (options.image_opts and options.diff is not None and options.diff_format is None,
         "--image-opts says the format of INPUT alone; add --diff-format for BASE"),
        (overlay and options.diff is not None and are_same_file(options.input, options.diff)
         and options.format == (options.diff_format or options.format),
         "INPUT and BASE are the same disk, which differs in nothing; give --diff the older one"),
        (overlay and options.diff is not None
         and are_same_file(options.diff, options.backing_file)
         and (options.diff_format or options.format) != options.backing_format,
         "BASE and the backing file are the same file, once as "
         f"{options.diff_format or options.format} and once as {options.backing_format}; add "
         f"--diff-format {options.backing_format}"),
        (overlay and re.match("[^/]*:", options.backing_file or "")
         and (not PROTOCOLS.match(options.backing_file)
              or os.path.exists(options.backing_file)),
         f"QEMU takes what is before the colon of {quoted(options.backing_file or '')} for a "
         "protocol; put ./ before the name"),
        (overlay and (re.match("(file|host_device|host_cdrom):[^/]", options.backing_file or "")
                      or not all(map(os.path.isabs, file_names_in_json(options.backing_file)))),
         f"QEMU looks for {quoted(options.backing_file or '')} from its own folder, not beside the "
         "overlay; give the name alone, or an absolute one"),
        (overlay and not options.backing_file,
         "the name of the backing file is empty; give one to --backing-file"),
        (overlay and not FORMATS.match(options.backing_format or ""),
         f"{quoted(options.backing_format or '')} is no format; give --backing-format raw, qcow2 "
         "or another that QEMU knows"),
        (overlay and len(os.fsencode(options.backing_file or "")) > MAX_BACKING_NAME_BYTES,
         f"the name of the backing file is longer than {MAX_BACKING_NAME_BYTES} bytes, qcow2's "
         "limit; give a shorter one"),
        (old and options.refcount_bits != 16,
         "--compat 0.10 has 16-bit refcounts only; leave --refcount-bits out"),
        (old and has_external,
         f"--compat 0.10 has no external data file; leave {external} out"),
    )  # fmt: skip
    for is_so, message in contradictions:
        if is_so:
            raise Error(message)


def read_json_source(name: str, option: str, what: str) -> str:
    """The text of a layout file, of standard input, or of a descriptor by its number."""
    file = 0 if name == "-" else name  # type: Union[int, str]
    if option.startswith("--json-header"):
        if not re.match(r"\d{1,9}\Z", name):
            raise Error(f"{option}: {quoted(name)} is not the number of an open descriptor")
        file = int(name)
    try:
        with open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as opened:
            raw = read_all(opened, MAX_JSON_BYTES + 1)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise Error(f"{option}: cannot read {quoted(name)}: {why}") from error
    if len(raw) > MAX_JSON_BYTES:
        raise Error(f"{what} is longer than {MAX_JSON_BYTES >> 20} MiB; that is no list of extents")
    # Only names and descriptions can hold more than ASCII, and nobody asks for those; but one
    # character of an unusual script would make the text take four times its size.
    return raw.decode("latin-1")


def read_all(file: Any, limit: int) -> bytes:
    """All of an unbuffered file, up to a limit, whether it blocks or not."""
    parts = []
    while limit > 0:
        data = file.read(min(limit, READ_SIZE))
        if data is None:
            wait_for(file.fileno(), "POLLIN")
            continue
        if not data:
            break
        parts.append(data)
        limit -= len(data)
    return b"".join(parts)


class KnownDisk(NamedTuple):
    """What XAPI's descriptors tell of a disk.

    info        its sizes, or None
    ranges      all of it but what is known to be zeros, or None
    is_whole    the map tells of every byte, as one of qemu-img does; else it is not believed
    """

    info: Optional[DiskInfo]
    ranges: Optional[RangeList]
    is_whole: bool


def read_known_disk(
    name: str, map_fd: Optional[str], info_fd: Optional[str], suffix: str
) -> KnownDisk:
    """Read what XAPI's descriptors tell of the disk in a file."""
    info = None
    # The map first: whoever writes both to pipes may do so in this order.
    map_option, info_option = (f"--json-header-{suffix}{kind}" for kind in ("map", "info"))
    map_json = "" if map_fd is None else read_json_source(map_fd, map_option, map_option)
    if info_fd is not None:
        info = read_info(read_json_source(info_fd, info_option, info_option), info_option)
    if map_fd is None:
        return KnownDisk(info, None, False)
    if info is None:
        with contextlib.closing(DiskFile(name)) as file:
            size = align_up(file.size, SECTOR_SIZE)
    else:
        size = info.virtual_size
    layout = read_layout(map_json, map_option, size, False, QEMU_ALLOCATION)
    stored, gaps = RangeList(), RangeList()
    for start, end, (told,) in sweep(size, joined(layout.all())):
        if told is None:
            gaps.add(start, end)
    for start, end in joined(Layout(layout.data, gaps).all()):
        stored.add(start, end)
    return KnownDisk(info, stored, not gaps)


class Sources(NamedTuple):
    """What is read: the disk, perhaps its base, and whether their extents are to be trusted."""

    disk: Source
    base: Optional[Source]
    virtual_size: int
    cluster_size: Optional[int]
    trusted: bool

    def sizes_below(self) -> Collection[int]:
        """The sizes in bytes that a raw disk below the overlay may have."""
        files = self.base.files if self.base else ()
        return {self.virtual_size, *(align_up(file.size, SECTOR_SIZE) for file in files)}


def open_sources(options: argparse.Namespace, resources: contextlib.ExitStack) -> Sources:
    """Open what the options name. Raises Error if something isn't there or isn't right."""

    # Read before a disk is opened, which would get the number of a descriptor that is missing.
    known = read_known_disk(options.input, options.json_header_map, options.json_header_info, "")
    known_base = read_known_disk(
        options.diff, options.json_header_diff_map, options.json_header_diff_info, "diff-"
    )
    info = known.info
    image = ImageName(options.input, options.format, options.image_opts)
    limit = info.virtual_size if info else options.size
    disk = open_disk(image, resources, limit, known.ranges)
    size = align_up(disk.size if info is None else info.virtual_size, SECTOR_SIZE)
    if align_up(disk.size, SECTOR_SIZE) < size:
        raise Error(
            f"{quoted(image.name)} has {disk.size} bytes, but --json-header-info says {size}; it "
            "describes another disk"
        )
    base = None
    trusted = known.is_whole
    if options.diff is not None:
        trusted = trusted and known_base.is_whole
        base_size = min(size, known_base.info.virtual_size) if known_base.info else size
        base_image = ImageName(options.diff, options.diff_format or options.format, False)
        try:
            base = open_disk(base_image, resources, base_size, known_base.ranges)
        except Error as error:
            is_said = options.diff_format is not None or base_image.format == "raw"
            if is_said or os.path.isdir(options.diff) or not os.path.exists(options.diff):
                raise
            raise Error(
                f"{error} (without --diff-format, BASE is {base_image.format}, as INPUT is)"
            ) from error
        if options.diff_format is None and (base_image.format, options.backing_format) == (
            "raw",
            "qcow2",
        ):
            refuse_if_qcow2(base, options.diff)
    return Sources(disk, base, size, info and info.cluster_size, trusted)


def refuse_if_qcow2(base: Source, name: str) -> None:
    """Raise Error if a base that is to be read as raw has the first bytes of a qcow2 image.

    Not to guess: a guest may have written them. But it is to be said which of both is meant.
    """
    magic = bytearray(len(MAGIC))
    base.read_into(memoryview(magic), 0)
    if magic == MAGIC:
        raise Error(
            f"{quoted(name)} begins as a qcow2 image does, and the backing file is one, but "
            "without --diff-format BASE is raw; add --diff-format qcow2, or --diff-format raw if "
            "it is a guest that wrote these bytes"
        )


def open_disk(
    image: ImageName,
    resources: contextlib.ExitStack,
    size: Optional[int],
    ranges: Optional[Iterable[Range]],
) -> Source:
    """Open a disk of any format; size and ranges: see RawSource."""
    if image.name == "-" and not image.is_options:
        return RawSource(StreamFile(size or 0))
    if not image.is_options and PROTOCOLS.match(image.name) and not os.path.exists(image.name):
        hint = "a remote disk is named by --image-opts, such as driver=rbd,pool=…,image=…"
        if image.name.startswith(("file:", "host_")):
            hint = "leave out what is before the colon"
        raise Error(f"there is no file {quoted(image.name)}; {hint}")
    if image.is_options or image.format != "raw":
        source = open_image(image, resources)
        if size is not None:
            source.size = min(source.size, size)
        return source
    file = DiskFile(image.name)
    resources.callback(file.close)
    return RawSource(file, size, ranges)


def make_steps(options: argparse.Namespace, sources: Sources, geometry: Geometry) -> Iterable[Step]:
    """What is known of each cluster, or who finds out, as the options want it."""
    count, size = geometry.cluster_count, geometry.cluster_size
    if options.data_file_raw or (options.input == "-" and options.layout is None):
        return [Step(0, count, DATA)] if count else []
    overlay = options.backing_file is not None
    has_zero_flag = options.compat != "0.10"
    # What a cluster becomes that has changed and is all zeros: in an overlay it must hide the
    # backing file's; a bare difference is written over the base, by importers that know no flag.
    if overlay:
        zeros = ZERO if has_zero_flag else DATA
    else:
        zeros = UNALLOCATED if sources.base is None else DATA
    if options.layout is not None:
        what = f"layout {quoted(options.layout)}"
        text = read_json_source(options.layout, "--layout", what)
        layout = read_layout(text, what, geometry.virtual_size, overlay)
        # No layout speaks of the zeros that fill the last sector; a longer backing file has other
        # bytes there. QEMU rounds sizes up: of what it reads, that sector may be such a one.
        is_rounded = options.image_opts or options.format != "raw"
        padding = max(0, sources.disk.size - SECTOR_SIZE) if is_rounded else sources.disk.size
        if overlay and padding < geometry.virtual_size:
            layout.data.add(padding, geometry.virtual_size)
        if options.trust_layout or options.input == "-":
            return trusted_layout_steps(layout, zeros, geometry.virtual_size, size)
        return layout_steps(sources.disk, layout, zeros, count, size)
    if sources.base is not None:
        return diff_steps(sources.disk, sources.base, zeros, sources.trusted, geometry)
    return full_steps(sources.disk, count, size, sources.trusted)


def make_header(options: argparse.Namespace, geometry: Geometry) -> Header:
    """What the image's first cluster is to say. Raises Error where it has no room for it."""
    external = options.data_file or options.data_file_raw
    if external and geometry.virtual_size > MAX_HOST_OFFSET:
        raise Error(
            f"a data file of {geometry.virtual_size} bytes has offsets past 2^56, which qcow2 "
            "can't express; export it without --data-file"
        )
    if external and geometry.cluster_size == SECTOR_SIZE:
        raise Error(
            "an external data file needs clusters of at least 1024 bytes, for its name; choose a "
            "larger --cluster-size"
        )
    header = Header(
        version=2 if options.compat == "0.10" else 3,
        data_file_name=os.fsencode(options.input) if external else None,
        data_file_raw=options.data_file_raw,
        backing_file=None if options.backing_file is None else os.fsencode(options.backing_file),
        backing_format=os.fsencode(options.backing_format or ""),
    )
    return header.fitted(geometry.cluster_size)


def run(options: argparse.Namespace, resources: contextlib.ExitStack, progress: "Progress") -> None:
    """Go through the rooms. Raises Error, ConsumerGone, Interrupted."""
    refuse_contradictions(options)
    output = Output(1, is_text=options.measure)
    if not options.measure:
        output.claim_file()  # before sources are opened, which may take a while
    sources = open_sources(options, resources)
    disks = [sources.disk] + ([sources.base] if sources.base else [])
    output.refuse_if_among(file for disk in disks for file in disk.files)
    if options.backing_file is not None:
        output.refuse_if_named(options.backing_file)
        output.refuse_if_no_backing_file(
            options.backing_file, options.backing_format, sources.sizes_below()
        )
    if not options.measure:
        output.claim_device()

    cluster_size = options.cluster_size or sources.cluster_size or DEFAULT_CLUSTER_SIZE
    geometry = Geometry(sources.virtual_size, cluster_size, options.refcount_bits)
    geometry.refuse_if_too_large()
    header = make_header(options, geometry)

    readers = Readers(options.parallel)
    for disk in disks:
        disk.expect_reads("RANDOM")  # heads of clusters are far from each other
    cluster_map = ClusterMap(geometry.cluster_count, geometry.table_entries)
    size = geometry.virtual_size
    progress.enter("scan", size, lambda: min(size, len(cluster_map) * cluster_size))
    fill_map(cluster_map, make_steps(options, sources, geometry), cluster_size, readers)
    tables = sum(count for count, in_use in cluster_map.tables_in_use() if in_use)
    has_data = header.data_file_name is None
    plan = make_plan(geometry, tables, cluster_map.data_clusters if has_data else 0)
    plan.refuse_if_too_large()
    check_unchanged(disks)
    if options.measure:
        full = make_plan(geometry, geometry.l1_entries, has_data and geometry.cluster_count)
        output.write(measurement(plan, full, options.output == "json"))
        output.flush()
        return
    progress.enter("write", plan.file_size, lambda: output.written)
    write_image(output, plan, header, sources.disk, cluster_map, readers)
    for file in sources.disk.files:
        if isinstance(file, StreamFile):
            file.expect_end()
    output.finish()
    check_unchanged(disks)
    progress.finish(size, min(size, cluster_map.data_clusters * cluster_size), plan.file_size)


def measurement(plan: Plan, full: Plan, as_json: bool) -> bytes:
    """The sizes that an image has now, and would have without a zero, as qemu-img prints them."""
    if as_json:
        sizes = {"required": plan.file_size, "fully-allocated": full.file_size}
        return dump_json(sizes) + b"\n"
    lines = f"required size: {plan.file_size}\nfully allocated size: {full.file_size}\n"
    return lines.encode("ascii")


def check_unchanged(disks: Iterable[Source]) -> None:
    """Raise Error if any of the disks is not what it was."""
    for disk in disks:
        disk.check_unchanged()


class Progress:
    """What is said on stderr while the program works, and after it.

    A timer's signal asks for it, so that the loops that do the work need not, and so that
    something is said even while a consumer keeps the program waiting. SIGUSR1 asks for a line
    at any time, as it does of dd.
    """

    def __init__(self) -> None:
        self._phase = "starting"
        self._total = 0
        self._done = lambda: 0  # type: Callable[[], int]
        self._began = self._entered = time.monotonic()
        self._is_on = False
        self._is_mute = self._is_busy = False
        self._is_terminal = False
        self._is_drawn = False

    def catch_signal(self) -> None:
        """Answer SIGUSR1, unless it is ignored, or the answer would get into the image."""
        if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
            self._is_mute = stderr_is_the_output()
            signal.signal(signal.SIGUSR1, lambda _signum, _frame: self._print())

    def turn_on(self) -> None:
        """Say something every so often: redrawn on a terminal, a line into anything else.

        Raises Error if it would get into the image.
        """
        if stderr_is_the_output():
            raise Error(
                "standard error goes where the image goes, and what --progress says would get "
                "into it; redirect one of them, for example by 2> LOG"
            )
        with contextlib.suppress(OSError):
            self._is_terminal = os.isatty(2)
        self._is_on = True
        interval = TERMINAL_INTERVAL if self._is_terminal else LOG_INTERVAL
        signal.signal(signal.SIGALRM, lambda _signum, _frame: self._draw())
        signal.setitimer(signal.ITIMER_REAL, interval, interval)

    def turn_off(self) -> None:
        """Say no more; what was drawn on a terminal stays as a line."""
        if self._is_on:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._is_on = False
        if self._is_drawn:
            report("")
            self._is_drawn = False

    def enter(self, phase: str, total: int, done: Callable[[], int]) -> None:
        """Begin a phase of `total` bytes, of which done() tells how many are behind."""
        self._phase, self._total, self._done = phase, total, done
        self._entered = time.monotonic()

    def line(self) -> str:
        """Phase, per cent, bytes, rate and time left, in less than a terminal's width."""
        done, seconds = self._done(), time.monotonic() - self._entered
        rate = done / seconds if seconds else 0.0
        share = 100 * done // self._total if self._total else 100
        left = duration((self._total - done) / rate) if rate else "?"
        return (
            f"{self._phase:5} {share:3}%  {human(done)} of {human(self._total)}  {human(rate)}/s  "
            f"{left} left"
        )

    def _print(self) -> None:
        if self._is_mute or self._is_busy:
            return
        self._is_busy = True  # a storm of signals would interrupt one answer by the next
        self._is_drawn = False
        start = "\r\x1b[K" if self._is_terminal and self._is_on else ""
        report(start + self.line(), patience=0)
        self._is_busy = False

    def _draw(self) -> None:
        if self._is_terminal:
            self._is_drawn = True
            report("\r\x1b[K" + self.line(), end="", patience=0)
        else:
            self._print()

    def finish(self, size: int, data: int, written: int) -> None:
        """Sum up, all in bytes: the disk's size, its data, the image."""
        if not self._is_on:
            return
        seconds = time.monotonic() - self._began
        rate = written / seconds if seconds else 0.0
        start = "\r\x1b[K" if self._is_drawn else ""
        self._is_drawn = False
        self.turn_off()
        report(
            f"{start}disk {human(size)}: {human(data)} data, {human(size - data)} zeros or "
            f"unchanged; image {human(written)} in {duration(seconds)} ({human(rate)}/s)"
        )


TERMINAL_INTERVAL, LOG_INTERVAL = 0.2, 5.0  # seconds between two drawings
STDERR_PATIENCE = 5.0  # seconds that a message at the end waits for a full pipe


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


def end_by_signal(signum: int) -> int:
    """End the process by a signal, so that whoever waits for it sees that one."""
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)
    return 128 + signum


def report(message: str, end: str = "\n", patience: float = STDERR_PATIENCE) -> None:
    """Write a message to stderr. Whatever becomes of it, the exit status tells the outcome.

    patience    seconds that a full pipe is waited for: perhaps nobody reads it
    """
    with contextlib.suppress(OSError, ImportError):
        if wait_for(2, "POLLOUT", patience):
            os.write(2, (message + end).encode("utf-8", "surrogateescape"))


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

    At once: nothing is left for Python to do. While it took itself down, a thread that begins
    only then would crash it (seen with Python 3.11), and with `-i` it would read commands next.
    """
    # What Python says of threads that find no memory would, with 2>&1, get into the image.
    sys.stderr = io.StringIO()
    try:
        status = run_to_status(argv)
    except SystemExit as ending:  # argparse's
        status = int(ending.code or 0)
    os._exit(status)


def run_to_status(argv: Optional[Sequence[str]]) -> int:
    """Run the program, and say in one line what went wrong."""
    progress = Progress()
    try:
        open_standard_descriptors()
        # Python's own answer to Ctrl-C would be a traceback.
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getpid() == 1:  # a container's first process: a default action ends it not
            catch_signals()
        # Where it is ignored, nobody can learn how a child has ended.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        progress.catch_signal()
        options = make_parser().parse_args(argv)
        if options.progress:
            progress.turn_on()
        try:
            with contextlib.ExitStack() as resources:
                run(options, resources, progress)
        finally:
            progress.turn_off()
            release_signals()  # nothing is left that could be cleaned up
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Python's end would make it deadly
        return 0
    except Error as error:
        report(f"{PROGRAM}: error: {error}")
    except MemoryError:
        report(f"{PROGRAM}: error: out of memory")
    except ImportError as error:  # too few descriptors or too little memory, or Python is replaced
        report(f"{PROGRAM}: error: cannot load a part of Python: {error}")
    except OSError as error:  # by a module's file, or by what nobody has thought of
        report(f"{PROGRAM}: error: {reason(error)}")
    except ConsumerGone:
        return end_by_signal(signal.SIGPIPE)
    except Interrupted as interruption:
        return end_by_signal(interruption.signum)
    except Exception as error:
        report(f"{PROGRAM}: error: a fault of this program, in line {last_line(error)}: {error!r}")
    return 1


def last_line(error: BaseException) -> int:
    """The line of this program that an exception comes from."""
    trace = error.__traceback__
    lines = [0]
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == main.__code__.co_filename:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1]


if __name__ == "__main__":
    main()
