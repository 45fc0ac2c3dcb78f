"""A device-mapper device's table and status, by ioctl: no process, so that it can be asked many times a second.

The requests of linux/dm-ioctl.h, version 4, on /dev/mapper/control; they need CAP_SYS_ADMIN. libdevmapper has no
Python binding that is kept up, and libblockdev asks for no status of a thin pool without LVM's programs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from storaged.errors import Kind, StoragedError

CONTROL = "/dev/mapper/control"
TABLE_STATUS = 0xC138FD0C
"""DM_TABLE_STATUS: _IOWR(0xfd, 12, struct dm_ioctl)."""
HEADER = struct.Struct("=3I2IIiIIIQ128s129s7s")
"""struct dm_ioctl: version, data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name, uuid,
data."""
TARGET = struct.Struct("=QQiI16s")
"""struct dm_target_spec: sector_start, length, status, next (from the first one), target_type; then text, to a NUL."""
VERSION = (4, 0, 0)
"""The kernel takes any minor version up to its own."""
STATUS_TABLE, BUFFER_FULL, NOFLUSH = 1 << 4, 1 << 8, 1 << 11
"""DM_STATUS_TABLE_FLAG, DM_BUFFER_FULL_FLAG, DM_NOFLUSH_FLAG."""
LONGEST_NAME = 127
"""DM_NAME_LEN less its final NUL."""
_ROOM, _MOST_ROOM = 4096, 1 << 20


class DeviceMapperError(StoragedError):
    """The device cannot be asked."""

    kind = Kind.UNAVAILABLE


def table(name: str) -> str:
    """As `dmsetup table NAME`: a line for each target, START LENGTH TYPE PARAMETERS, in sectors. As `status`."""
    return _ask(name, STATUS_TABLE)


def status(name: str) -> str:
    """As `dmsetup status --noflush NAME`, which waits for no commit of a pool. Blocks. Raises DeviceMapperError."""
    return _ask(name, NOFLUSH)


def _ask(name: str, flags: int) -> str:
    try:
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceMapperError(f"device-mapper cannot be asked: {CONTROL}: {error.strerror}") from error
    try:
        room = _ROOM
        while True:
            answer = request(name, flags, room)
            fcntl.ioctl(fd, TABLE_STATUS, answer)
            if not HEADER.unpack_from(answer)[7] & BUFFER_FULL or room >= _MOST_ROOM:
                return lines(bytes(answer))
            room *= 4
    except OSError as error:
        why = "there is no such device" if error.errno == errno.ENXIO else error.strerror
        raise DeviceMapperError(f"device-mapper device {name}: {why}") from error
    finally:
        os.close(fd)


def request(name: str, flags: int, room: int) -> bytearray:
    """What the kernel is asked with: `room` bytes, in which it also answers. Raises DeviceMapperError."""
    encoded = os.fsencode(name)
    if len(encoded) > LONGEST_NAME:
        raise DeviceMapperError(f"device-mapper device {name}: a name has at most {LONGEST_NAME} bytes")
    buffer = bytearray(room)
    HEADER.pack_into(buffer, 0, *VERSION, room, HEADER.size, 0, 0, flags, 0, 0, 0, encoded, b"", b"")
    return buffer


def lines(answer: bytes) -> str:
    """The targets in an answer, a line each. Raises DeviceMapperError when they do not fit into it."""
    header = HEADER.unpack_from(answer)
    start, count, flags = header[4], header[5], header[7]
    if flags & BUFFER_FULL:
        raise DeviceMapperError("device-mapper's answer is too long")
    found, at = [], start
    for _ in range(count):
        if at + TARGET.size > len(answer):
            raise DeviceMapperError("device-mapper's answer is not understood")
        begin, length, _, following, kind = TARGET.unpack_from(answer, at)
        text = answer[at + TARGET.size :].split(b"\0", 1)[0]
        words = (kind.split(b"\0", 1)[0], text)
        said = " ".join(word.decode("ascii", "replace") for word in words)
        found.append(f"{begin} {length} {said}".rstrip())
        at = start + following
    return "\n".join(found)
