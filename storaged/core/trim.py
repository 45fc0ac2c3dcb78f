"""Which free room may be trimmed now: pure choice from the free extents and the kernel's accounting.

While the kernel discards a free extent it takes all of it out of use (do_trimming in fs/btrfs/free-space-cache.c), but
promises it to writers all the same: data that was accepted meanwhile may find no place when it is written back, and
its application hears of it from fsync, or never. Measured on Linux 6.18: one accepted write in two was lost while an
application wrote on a full filesystem and FITRIM ran over it. So a chunk is trimmed only while there is more room
elsewhere than that holds back and than applications take in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from storaged.core.model import Space
from storaged.units import MIB

DATA_MARGIN = 64 * MIB
"""The least that applications may take while a call is under way; a sixteenth of the filesystem where that is less."""
METADATA_MARGIN = 16 * MIB
"""Left to metadata beyond the kernel's global reserve: where it finds no room, the filesystem is forced read-only."""


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """Where a chunk lies in logical addresses, in bytes, and its kind: data, metadata, mixed, system or other."""

    start: int
    length: int
    kind: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk that one call discards the free room of: `free` bytes, of which the kernel holds back `held` at a time.

    FITRIM passes over a chunk that begins before its range (btrfs_lookup_first_block_group), so it is all or nothing.
    """

    chunk: ChunkRange
    free: int
    held: int


def pieces(extents: Iterable[tuple[ChunkRange, int, int]]) -> Iterator[Piece]:
    """One for every chunk with free room; `extents` are (chunk, logical start, length) in ascending order.

    Extents of a chunk that touch each other count as one, since the kernel may keep them as one.
    """
    for chunk, those in groupby(extents, key=lambda extent: extent[0]):
        free = held = length = end = 0
        for _, start, more in those:
            length = length + more if start <= end else more
            end = start + more
            held = max(held, length)
            free += more
        yield Piece(chunk, free, held)


def is_safe(piece: Piece, space: Space) -> bool:
    """True when whoever writes while `piece` is discarded finds room elsewhere.

    Discarding is not slower than writing, so what is taken meanwhile is no more than what is discarded.
    """
    taken = max(piece.free, min(DATA_MARGIN, space.size // 16))
    data = space.available >= piece.held + taken
    metadata = space.metadata_headroom >= piece.held + METADATA_MARGIN
    return {"data": data, "metadata": metadata, "mixed": data and metadata}.get(piece.chunk.kind, False)
