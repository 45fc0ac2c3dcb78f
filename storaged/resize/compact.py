"""Which chunk to rewrite next, so that a shrink can go on: pure choice from a picture of the device.

A chunk that is rewritten leaves with its files in one piece after the other, and its scattered free room becomes
room for a whole new chunk. Where the kernel puts what moves is its own choice, so the gain is not promised: a
shrink that goes as far as it can tries, looks again, and goes on where it helped. Data only: metadata that finds no
room can force a filesystem read-only, data cannot.
"""

from __future__ import annotations

from collections.abc import Collection

from storaged.resize.fit import metadata_chunk, metadata_is_short
from storaged.resize.layout import Chunk, Layout, holes
from storaged.units import MIB

WORTH_MOVING = MIB
"""A chunk with less free room than this is as good as full."""


def next_chunk(layout: Layout, tried: Collection[int]) -> Chunk | None:
    """The data chunk to rewrite next: the one that costs least; None when none can gain anything.

    `tried` are the logical addresses of those that were rewritten since something was last gained. None either when
    metadata is short: rewriting makes copies of it.
    """
    if not metadata_is_safe(layout):
        return None
    data = [chunk for chunk in layout.chunks if chunk.kind == "data"]
    everywhere = sum(sum(chunk.rooms) for chunk in data) + sum(holes(layout.chunks, layout.size))
    worth = [
        chunk
        for chunk in data
        if chunk.held
        and not chunk.pinned
        and chunk.logical not in tried
        and sum(chunk.rooms) + chunk.balloon >= WORTH_MOVING
        and everywhere - sum(chunk.rooms) >= chunk.held
    ]
    return min(worth, key=lambda chunk: (chunk.held, -chunk.top), default=None)


def metadata_is_safe(layout: Layout) -> bool:
    """True when metadata has room for the copies that moving data makes, or for another chunk; never when mixed."""
    if any(chunk.kind == "mixed" for chunk in layout.chunks):
        return False
    if not metadata_is_short(layout):
        return True
    metadata = [chunk for chunk in layout.chunks if chunk.kind == "metadata"]
    another = metadata_chunk(layout, layout.size) * max((len(c.stripes) for c in metadata), default=1)
    return max(holes(layout.chunks, layout.size), default=0) >= another + 16 * MIB


def empty_chunks(layout: Layout) -> bool:
    """True when data chunks that nobody uses can be handed back without the kernel making another one."""
    data = [chunk for chunk in layout.chunks if chunk.kind == "data"]
    return any(chunk.used for chunk in data) and any(not chunk.used for chunk in data)
