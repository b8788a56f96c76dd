"""A strictly sequential reader of qcow2 streams, like the importer at XAPI's end.

It reads a stream once from its first byte to its last, never seeks, and insists on the order
that the program promises. Nothing here comes from the program: the layouts are written down
a second time, from the specification.
"""

import struct
from typing import BinaryIO, Dict, List, NamedTuple, Optional, Set

COPIED = 1 << 63
ZERO = 1


class Image(NamedTuple):
    """What a stream held.

    size          virtual size in bytes
    cluster_size  in bytes
    version       2 or 3
    data          guest cluster -> its bytes
    zeros         guest clusters with the zero flag
    extensions    type -> payload of each header extension
    backing_file  its name, or None
    length        bytes of the stream
    """

    size: int
    cluster_size: int
    version: int
    data: Dict[int, bytes]
    zeros: Set[int]
    extensions: Dict[int, bytes]
    backing_file: Optional[bytes]
    length: int

    def over(self, base: bytes = b"") -> bytes:
        """The disk's content: this image's clusters over those of a base."""
        content = bytearray(base[: self.size].ljust(self.size, b"\0"))
        for index in self.zeros:
            start = index * self.cluster_size
            content[start : start + self.cluster_size] = bytes(self.cluster_size)
        for index, cluster in self.data.items():
            start = index * self.cluster_size
            content[start : start + self.cluster_size] = cluster
        return bytes(content[: self.size])


class _Counting:
    """A stream that only goes forward, and knows how far it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = 0

    def read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.file.read(length - len(data))
            assert piece, f"the stream ends at {self.position + len(data)}"
            data += piece
        self.position += length
        return data


def check_refcounts(blocks: bytes, bits: int, clusters: int) -> None:
    """Every cluster of the file has a refcount of one, and nothing behind it has any."""
    if bits >= 8:
        ones = (1).to_bytes(bits // 8, "big") * clusters
        assert blocks == ones.ljust(len(blocks), b"\0"), "a refcount is wrong"
        return
    per_byte = 8 // bits
    for index in range(len(blocks) * per_byte):
        value = blocks[index // per_byte] >> (index % per_byte * bits) & ((1 << bits) - 1)
        assert value == (1 if index < clusters else 0), f"refcount {index} is {value}"


def parse_extensions(area: bytes) -> Dict[int, bytes]:
    """The header extensions, up to the one that ends them."""
    extensions = {}
    position = 0
    while position + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, position)
        if not kind:
            break
        extensions[kind] = area[position + 8 : position + 8 + length]
        assert len(extensions[kind]) == length
        position += 8 + -(-length // 8) * 8
    return extensions


def read_image(file: BinaryIO) -> Image:  # noqa: PLR0915  # reads as the file does: top to bottom
    """Read a whole stream. Raises AssertionError where it is not what was promised."""
    stream = _Counting(file)
    header = stream.read(512)
    magic, version = struct.unpack_from(">4sI", header)
    assert magic == b"QFI\xfb"
    backing_offset, backing_size, cluster_bits, size, crypt, l1_size = struct.unpack_from(
        ">QIIQII", header, 8
    )
    l1_offset, table_offset, table_clusters, snapshots, _ = struct.unpack_from(">QQIIQ", header, 40)
    assert (crypt, snapshots) == (0, 0)
    refcount_order, length = 4, 72
    if version == 3:
        refcount_order, length = struct.unpack_from(">II", header, 96)
        incompatible = struct.unpack_from(">Q", header, 72)[0]
        assert incompatible == 0, "a stream with data has no external data file"
    cluster_size, bits = 1 << cluster_bits, 1 << refcount_order
    header += stream.read(cluster_size - 512)
    end = backing_offset or cluster_size
    extensions = parse_extensions(header[length:end])
    backing = header[backing_offset : backing_offset + backing_size] if backing_offset else None

    # Each part begins where the one before it ends.
    assert table_offset == stream.position == cluster_size
    table = stream.read(table_clusters * cluster_size)
    offsets = [entry for (entry,) in struct.iter_unpack(">Q", table) if entry]
    blocks = b""
    for offset in offsets:
        assert offset == stream.position
        blocks += stream.read(cluster_size)
    entries_per_table = cluster_size // 8
    l1_entries: List[int] = []
    if l1_size:
        assert l1_offset == stream.position
        l1 = stream.read(-(-l1_size // entries_per_table) * cluster_size)
        l1_entries = [entry for (entry,) in struct.iter_unpack(">Q", l1)]
        assert not any(l1_entries[l1_size:])
    else:
        assert l1_offset == 0

    guest_clusters = -(-size // cluster_size)
    assert l1_size == -(-guest_clusters // entries_per_table)
    found: Dict[int, int] = {}
    zeros: Set[int] = set()
    for l1_index, entry in enumerate(l1_entries):
        if not entry:
            continue
        assert entry == stream.position | COPIED
        l2 = stream.read(cluster_size)
        assert l2.strip(b"\0"), "an L2 table without a cluster takes space"
        for l2_index, (cluster,) in enumerate(struct.iter_unpack(">Q", l2)):
            guest = l1_index * entries_per_table + l2_index
            if cluster == ZERO:
                assert version == 3
                zeros.add(guest)
            elif cluster:
                assert cluster & COPIED
                assert not cluster & ZERO
                found[guest] = cluster & ~COPIED
            if cluster:
                assert guest < guest_clusters
    data = {}
    for guest, offset in found.items():  # a dict keeps guest order
        assert offset == stream.position
        data[guest] = stream.read(cluster_size)
    assert not file.read(1), "bytes behind the last cluster"
    check_refcounts(blocks, bits, stream.position // cluster_size)
    return Image(size, cluster_size, version, data, zeros, extensions, backing, stream.position)
