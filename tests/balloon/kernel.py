"""A few lines that allocate as the kernel does, for the balloon's arithmetic to be tried on, and spaces to try."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from storaged.core.model import Space
from storaged.units import GIB, MIB, SECTOR, sector_floor


def extended(space: Space, by: int, extra_chunk: bool) -> Space | None:
    """`space` after `by` more bytes of data; None for ENOSPC. `extra_chunk`: a chunk more than needed is made."""
    if by > space.available:
        return None
    total, unallocated = space.data_total, space.unallocated
    missing = by - space.data_free
    while missing > 0 or (extra_chunk and missing > -space.data_chunk and by > space.data_free):
        chunk = min(space.data_chunk, unallocated // space.data_copies)
        if chunk <= 0:
            break
        total += chunk
        unallocated -= chunk * space.data_copies
        missing -= chunk
        if missing <= 0:
            if not extra_chunk:
                break
            extra_chunk = False
    if missing > 0:
        return None
    return replace(space, data_total=total, unallocated=unallocated, data_used=space.data_used + by)


def shrunk(space: Space, by: int) -> Space:
    """`space` after `by` bytes of data were given back; chunks stay."""
    return replace(space, data_used=space.data_used - by)


@st.composite
def spaces(draw: st.DrawFn, most: int = 1 << 44) -> tuple[Space, int]:
    """A filesystem in any state, and what a balloon on it holds."""
    size = sector_floor(draw(st.integers(256 * MIB, 4 * GIB) | st.integers(256 * MIB, most)))
    tenth = size // 10 // 65536 * 65536
    copies = draw(st.sampled_from([1, 1, 2]))
    metadata_total = draw(st.sampled_from([8 * MIB, 32 * MIB, min(256 * MIB, tenth)]))
    metadata_copies = draw(st.sampled_from([1, 2]))
    left = size - metadata_total * metadata_copies - 9 * MIB
    data_total = sector_floor(draw(st.integers(0, left // copies)))
    data_used = sector_floor(draw(st.integers(0, data_total)))
    mixed = draw(st.sampled_from([False, False, False, True]))
    data_chunk = draw(st.sampled_from([min(GIB, tenth), min(256 * MIB, tenth)]))
    space = Space(
        size=size,
        device=size,
        data_total=data_total,
        data_used=data_used,
        metadata_total=metadata_total,
        metadata_used=draw(st.integers(0, metadata_total)),
        global_reserve=draw(st.integers(3 * MIB, data_chunk // 2 if mixed else 64 * MIB)),
        unallocated=sector_floor(left - data_total * copies),
        data_chunk=data_chunk,
        metadata_chunk=min(256 * MIB, tenth),
        data_copies=copies,
        metadata_copies=metadata_copies,
        mixed=mixed,
    )
    return space, sector_floor(draw(st.integers(0, data_used)))


limits = st.integers(0, 8 * GIB) | st.integers(0, 1 << 44) | st.sampled_from([0, SECTOR, SECTOR - 1, (1 << 63) - 1])
