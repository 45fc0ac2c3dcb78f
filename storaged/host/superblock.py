"""How large a btrfs is, read from the image that holds it: the host's own look, whatever the guest says.

The superblock lies at 64 KiB (kernel: fs/btrfs/accessors.h, struct btrfs_super_block). A mounted filesystem writes it
with each commit, the last thing a shrink does.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass

from storaged.errors import Kind, StoragedError

AT = 0x10000
LENGTH = 4096
MAGIC = b"_BHRfS_M"
_CSUM = 32
# bytenr and flags, magic, total_bytes, num_devices; csum_type; dev_item.total_bytes
_WHERE, _MAGIC, _TOTAL, _DEVICES, _TYPE, _DEVICE_TOTAL = 0x30, 0x40, 0x70, 0x88, 0xC4, 0xD1
_CRC32C, _XXHASH, _SHA256, _BLAKE2 = range(4)
_TRIES = 5


class NoFilesystem(StoragedError):
    """What the image holds is no btrfs that can be believed: nothing may be cut."""

    kind = Kind.PRECONDITION


@dataclass(frozen=True, slots=True)
class Superblock:
    """`size`: the filesystem's bytes; nothing of it lies behind them."""

    size: int


def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _table()


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC, as btrfs has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _sound(block: bytes) -> bool:
    """True unless the checksum is wrong; xxhash is not checked, only read twice."""
    body = block[_CSUM:]
    match struct.unpack_from("<H", block, _TYPE)[0]:
        case 0:
            return block[:4] == struct.pack("<I", crc32c(body))
        case 1:
            return True
        case 2:
            return block[:_CSUM] == hashlib.sha256(body).digest()
        case 3:
            return block[:_CSUM] == hashlib.blake2b(body, digest_size=_CSUM).digest()
    return False


def parse(block: bytes) -> Superblock:
    """What the 4096 bytes say. Raises NoFilesystem."""
    if len(block) != LENGTH or block[_MAGIC : _MAGIC + 8] != MAGIC:
        raise NoFilesystem("the image holds no btrfs at its beginning")
    if struct.unpack_from("<Q", block, _WHERE)[0] != AT or not _sound(block):
        raise NoFilesystem("the btrfs superblock in the image is damaged")
    (total,) = struct.unpack_from("<Q", block, _TOTAL)
    (devices,) = struct.unpack_from("<Q", block, _DEVICES)
    (device,) = struct.unpack_from("<Q", block, _DEVICE_TOTAL)
    if devices != 1:
        raise NoFilesystem(f"the btrfs in the image has {devices} devices: one is accepted")
    return Superblock(max(total, device))


def read(path: str) -> Superblock:
    """The superblock in the image at `path`; blocks. Raises NoFilesystem, OSError.

    Read twice the same: it may be written right now.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        last = os.pread(fd, LENGTH, AT)
        for left in range(_TRIES, 0, -1):
            block = os.pread(fd, LENGTH, AT)
            if block == last:
                try:
                    return parse(block)
                except NoFilesystem:
                    if left == 1:
                        raise
            last = block
    finally:
        os.close(fd)
    raise NoFilesystem("the btrfs superblock in the image changes all the time")
