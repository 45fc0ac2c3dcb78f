"""Sizes in bytes and times in seconds: how people write them, how they are shown."""

from __future__ import annotations

import re

from storaged.errors import InvalidRequest

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
SECTOR = 4096
"""btrfs' sector size on every machine with 4 KiB pages, and the mask hosts apply to sizes."""
MAX_SIZE = (1 << 63) - 1
"""The largest size any kernel interface here takes (loff_t)."""

_FACTOR = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 1 << 50, "E": 1 << 60}
_SIZE = re.compile(r"(\d+)(\.\d+)?\s*([KMGTPE]?)(?:i?B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by `20G`, `1.5GiB`, `512MiB` or plain bytes; prefixes are powers of 1024.

    Raises InvalidRequest for anything else, a negative or a too large number.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"size {text!r} is not a size: write bytes, or 512MiB, 20G, 1.5T")
    whole, fraction, prefix = match.groups()
    factor = _FACTOR[prefix.upper()]
    size = int(whole) * factor
    if fraction:
        if factor == 1:
            raise InvalidRequest(f"size {text!r} is a fraction of a byte")
        size += int(fraction[1:]) * factor // 10 ** (len(fraction) - 1)
    if size > MAX_SIZE:
        raise InvalidRequest(f"size {text!r} is above the largest possible size, 8 EiB - 1")
    return size


def format_size(size: float) -> str:
    """`size` bytes with three significant digits and a binary prefix, as in `1.50 GiB`."""
    sign = "-" if size < 0 else ""
    value = abs(float(size))
    if value < KIB:
        return f"{sign}{value:.0f} B"
    for prefix in ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"):
        value /= 1024
        if value < 999.5 or prefix == "Ei":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{digits}f} {prefix}B"


def format_duration(seconds: float) -> str:
    """`seconds` for a person: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sector_floor(size: int) -> int:
    """The largest multiple of the sector size that is not above `size`."""
    return size // SECTOR * SECTOR


def sector_ceil(size: int) -> int:
    """The smallest multiple of the sector size that is not below `size`."""
    return -(-size // SECTOR) * SECTOR
