"""Files from what the Xet protocol uploads, for the hub that tests run.

Clients cut files into chunks and send the chunks in xorbs. A chunk has a header of 8 bytes and may
be compressed. Then a shard lists the chunks and the SHA-256 of each file.
Formats: huggingface/xet-core, xet_core_structures (version 0 of a chunk, 2 of a shard).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_LAST = b"\xff" * 32
_SHARD_HEADER_BYTES = 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


def read_xorb(data: bytes) -> list[bytes]:
    """The chunks of a xorb, in order, uncompressed."""
    chunks, at = [], 0
    while at < len(data):
        assert data[at] == 0, "a chunk of another version"
        size, scheme = int.from_bytes(data[at + 1 : at + 4], "little"), data[at + 4]
        length = int.from_bytes(data[at + 5 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        chunk = body if scheme == 0 else _lz4_frame(body)
        chunk = _ungroup(chunk) if scheme == 2 else chunk
        assert len(chunk) == length
        chunks.append(chunk)
        at += 8 + size
    return chunks


def read_shard(data: bytes, xorbs: dict[str, list[bytes]]) -> Iterator[tuple[str, bytes]]:
    """SHA-256 and content of each file that a shard describes."""
    at = _SHARD_HEADER_BYTES
    while (data[at : at + 32]) != _LAST:
        flags, n_parts = struct.unpack_from("<II", data, at + 32)
        at += 48
        content = b""
        for _ in range(n_parts):
            first, last = struct.unpack_from("<II", data, at + 40)
            content += b"".join(xorbs[_hex(data[at : at + 32])][first:last])
            at += 48
        at += 48 * n_parts if flags & _HAS_VERIFICATION else 0
        assert flags & _HAS_SHA256
        yield _hex(data[at : at + 32]), content
        at += 48


def _hex(digest: bytes) -> str:
    """Xet writes a hash as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte, which makes floats compress better."""
    out, at = bytearray(len(data)), 0
    for offset in range(4):
        count = len(range(offset, len(data), 4))
        out[offset::4] = data[at : at + count]
        at += count
    return bytes(out)


def _lz4_frame(data: bytes) -> bytes:
    """One LZ4 frame of independent or linked blocks, without checksums or content size."""
    assert data[:4] == b"\x04\x22\x4d\x18"
    assert data[4] & 0b1101 == 0, "a frame with checksums, sizes or a dictionary"
    out, at = bytearray(), 7
    while size := int.from_bytes(data[at : at + 4], "little"):
        at += 4
        length = size & 0x7FFFFFFF
        if size >> 31:
            out += data[at : at + length]
        else:
            _lz4_block(data[at : at + length], out)
        at += length
    return bytes(out)


def _lz4_block(data: bytes, out: bytearray) -> None:
    """Append what one LZ4 block holds to `out`, which its matches may look back into."""
    at = 0

    def longer(length: int) -> int:
        nonlocal at
        if length == 15:
            while data[at] == 255:
                length += 255
                at += 1
            length += data[at]
            at += 1
        return length

    while at < len(data):
        token = data[at]
        at += 1
        length = longer(token >> 4)
        out += data[at : at + length]
        at += length
        if at == len(data):
            return
        distance = int.from_bytes(data[at : at + 2], "little")
        at += 2
        length = longer(token & 15) + 4
        start = len(out) - distance
        while length > 0:  # a match may overlap itself
            part = out[start : start + length]
            out += part
            length -= len(part)
            start += len(part)
