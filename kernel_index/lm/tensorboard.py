"""Event files with scalars for TensorBoard, written without its package.

A record is its length and its content, each followed by a masked CRC-32C; the content is an ``Event`` in protocol
buffers: wall time (field 1, double), step (2, varint), file version (3) or summary (5), which holds values (1) of a tag
(1) and a float (2).
"""

import struct
import time
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed


def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        found.append(byte)
    return tuple(found)


_TABLE = _table()


def crc32c(content: bytes) -> int:
    """
    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(content: bytes) -> bytes:
    """One record of an event file."""
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes: wire type 2."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def scalars(step: int, values: dict[str, float], wall_time: float) -> bytes:
    """An ``Event`` of one value for each tag."""
    summary = b"".join(
        _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items()
    )
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + _field(5, summary)


class EventFile:
    """An event file in a folder; a resumed run adds another, and TensorBoard joins them by step."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file = (folder / f"events.out.tfevents.{now:.6f}.kernel_index").open("ab")
        self._file.write(record(b"\x09" + struct.pack("<d", now) + _field(3, b"brain.Event:2")))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(record(scalars(step, values, time.time())))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
