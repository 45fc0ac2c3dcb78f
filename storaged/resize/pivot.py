"""Which chunk to move up for a moment, so that it comes back shorter: pure choice from a picture of the device.

A new chunk is a tenth of the filesystem at most. What was made when the filesystem was large is longer than what the
same files or the same metadata need once it is small, and where no hole is left nothing can be moved to change that.
A shrink that goes as far as it can may take back some of the room it has cut away: the chunk goes up there, where it
was becomes a hole, and the next cut brings it down into a part of it. Or the filesystem is large enough for a moment
that a new chunk takes a long extent, which then goes into a hole that was there all the time.

Only where the way back is certain, and leads below the size that was there before: `compute` is asked about the picture
as it will be. Metadata goes only where a hole for all of it, for the reserve and for the copies that the move makes is
certain: there is one, made for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from storaged.resize.bounds import compute
from storaged.resize.compact import WORTH_MOVING, metadata_is_safe
from storaged.resize.fit import (
    CHUNK_STEP,
    METADATA_MARGIN,
    certain_room,
    metadata_chunk,
    metadata_room,
    metadata_short_of,
)
from storaged.resize.layout import Chunk, Layout, Longest, asked_once, holes_at
from storaged.units import GIB, KIB, MIB, sector_ceil

STRIPE = 64 * KIB
"""The kernel rounds the length of a stripe down to this (BTRFS_STRIPE_LEN)."""
WORTH_A_PIVOT = 8 * MIB
"""What must be certain to be gained."""
MOST_JUDGED = 8
"""Chunks of metadata, of files with room between them, and of the balloon alone: those with most to gain of each."""
MOST_CHUNKS = 512
"""It takes the square of their number: 2 s for 421."""
TOPMOST = 2
WORTH_OF_MOVED = 16
"""What is moved may be this many times what is gained."""
MOST_MADE = 8
"""New chunks that one chunk's data may go into."""


@dataclass(frozen=True, slots=True)
class Pivot:
    """Grow to `size`, move what is in `chunk`, and shrink: to `returns` is certain then."""

    chunk: Chunk
    size: int
    returns: int


def next_pivot(
    layout: Layout, longest: Longest, most: int, cancelled: Callable[[], bool] = lambda: False
) -> Pivot | None:
    """The one that gets furthest; None when none is certain to gain anything. The filesystem is never above `most`.

    None too as soon as it is `cancelled`, and for more chunks than are judged within some seconds.
    Rather one whose data comes back into holes alone: what takes room among other data takes it from what comes next.
    """
    if not metadata_is_safe(layout) or len(layout.chunks) > MOST_CHUNKS:
        return None
    once = asked_once(longest)
    for alone in (True, False):
        found: list[Pivot] = []
        for chunk in _candidates(layout):
            if cancelled():
                return None
            judged = (_judged(layout, chunk, size, once, alone=alone) for size in _sizes(layout, chunk, most))
            found += [pivot for pivot in judged if pivot is not None]
        if found:
            return min(found, key=lambda pivot: (pivot.returns, pivot.size))
    return None


def has_place(layout: Layout, chunk: Chunk, longest: Longest) -> bool:
    """True when what is in `chunk` by now is certain to find a place at the present size, new chunks counted alone."""
    now = next((other for other in layout.chunks if other.logical == chunk.logical), None)
    if now is None or not metadata_is_safe(layout):
        return False
    return _made(layout, now, layout.size, longest(now) if now.kind == "data" else 0) is not None


def _candidates(layout: Layout) -> list[Chunk]:
    metadata = [chunk for chunk in layout.chunks if chunk.kind == "metadata"]
    data = [chunk for chunk in layout.chunks if chunk.kind == "data" and not chunk.pinned]
    # The topmost though they may be full: what they hold may come back into holes that are too short for a chunk.
    topmost = [chunk for chunk in sorted(data, key=lambda chunk: chunk.top)[-TOPMOST:] if chunk.held]
    loose = [c for c in data if c.held and c.length - c.held >= WORTH_MOVING and c not in topmost]
    vacant = [chunk for chunk in data if chunk.vacant]
    return [
        chunk
        for kind in (metadata, topmost, loose, vacant)
        for chunk in sorted(kind, key=lambda chunk: chunk.length - chunk.held, reverse=True)[:MOST_JUDGED]
    ]


def _sizes(layout: Layout, chunk: Chunk, most: int) -> list[int]:
    """The sizes worth judging, smallest first: a place for it above all others, or new chunks as long as it is.

    Under a balloon no more than a chunk's length is given to anybody, what the balloon has in `chunk` included.
    """
    top = sector_ceil(max(other.top for other in layout.chunks))
    if chunk.vacant:
        return [layout.size]
    needed = _round(chunk.held if chunk.kind == "data" else _metadata_needs(layout, chunk))
    above = top + len(chunk.stripes) * needed
    wanted = {layout.size, above, above + CHUNK_STEP}
    if chunk.kind == "data":
        wanted |= {above + 4 * CHUNK_STEP, 10 * needed, 10 * (needed + CHUNK_STEP)}
    most = min(most, layout.device)
    if any(other.balloon for other in layout.chunks):
        longest = max(other.length for other in layout.chunks if other.kind == "data")
        most = min(most, layout.size + longest - chunk.balloon)
    return sorted(size for size in wanted if layout.size <= size <= most)


def _judged(layout: Layout, chunk: Chunk, size: int, longest: Longest, *, alone: bool) -> Pivot | None:
    made = _made(layout, chunk, size, longest(chunk) if chunk.kind == "data" else 0)
    if made is None:
        return None

    def reach(of: Chunk) -> int:
        return longest(chunk if of in made else of)

    worst = max(
        compute(replace(layout, size=size, chunks=chunks), reach).minimum
        for chunks in _after(layout, chunk, made, alone=alone)
    )
    worth = max(WORTH_A_PIVOT, chunk.held // WORTH_OF_MOVED)
    return Pivot(chunk, size, worst) if worst <= layout.size - worth else None


def _after(layout: Layout, moved: Chunk, made: tuple[Chunk, ...], *, alone: bool) -> Iterator[tuple[Chunk, ...]]:
    """The chunks there may be afterwards: the kernel may put what moves into `made`, or beside others of its kind."""
    others = tuple(chunk for chunk in layout.chunks if chunk.logical != moved.logical)
    if alone and moved.kind == "data" and moved.held:
        yield (*(replace(chunk, rooms=()) for chunk in others), *made)
        return
    # Data that goes into the room among other data leaves as much less to come back as it takes of it.
    yield (*others, *made)
    for chunk in others:
        if chunk.kind == moved.kind == "metadata" and chunk.length - chunk.used >= moved.used:
            yield _beside(others, chunk, moved.used)


def _beside(others: tuple[Chunk, ...], chunk: Chunk, used: int) -> tuple[Chunk, ...]:
    return tuple(replace(o, used=o.used + used) if o.logical == chunk.logical else o for o in others)


def _would_starve(layout: Layout, moved: Chunk) -> bool:
    """True when the other metadata chunks could take all of `moved`, and would be short of room afterwards."""
    free = metadata_room(c for c in layout.chunks if c.kind == "metadata" and c.logical != moved.logical)
    return free >= moved.used and metadata_short_of(layout, moved.used, free, moves=False) > 0


def _made(layout: Layout, chunk: Chunk, size: int, longest: int) -> tuple[Chunk, ...] | None:
    """The chunks that the kernel makes for what is in `chunk` once the filesystem has `size`; None if not certain."""
    if chunk.vacant:
        return ()
    copies = len(chunk.stripes)
    gaps = holes_at(layout.chunks, size)
    at = max(other.logical + other.length for other in layout.chunks)
    if chunk.kind == "metadata":
        if _would_starve(layout, chunk):
            return None
        start, length = _place(gaps, copies * metadata_chunk(layout, size))
        length = length // copies // STRIPE * STRIPE
        if length < _metadata_needs(layout, chunk):
            return None
        stripes = tuple(start + length * copy for copy in range(copies))
        return (replace(chunk, logical=at, stripes=stripes, length=length, stripe_length=length),)
    made: list[Chunk] = []
    held = chunk.held
    while len(made) < MOST_MADE:
        start, length = _place(gaps, min(_round(-(-size // 10)), GIB))
        if length < MIB:
            return None
        used = min(held, length)
        held -= used
        rooms = (length - used,) if used < length else ()
        made.append(Chunk(at, length, used, 0, "data", (start,), length, rooms))
        certain = certain_room((new.length for new in made), longest)
        if certain and chunk.held - longest < certain:
            return tuple(made)
        at += length
    return None


def _place(gaps: list[tuple[int, int]], wanted: int) -> tuple[int, int]:
    """Take a chunk's place out of `gaps` as find_free_dev_extent does: the first long enough, or else the longest."""
    index = next((i for i, (_, length) in enumerate(gaps) if length >= wanted), None)
    if index is None:
        index = _longest(gaps)
    if index is None:
        return 0, 0
    start, length = gaps[index]
    taken = min(length, wanted) // STRIPE * STRIPE
    gaps[index] = (start + taken, length - taken)
    return start, taken


def _longest(gaps: Sequence[tuple[int, int]]) -> int | None:
    return max(range(len(gaps)), key=lambda i: gaps[i][1], default=None)


def _metadata_needs(layout: Layout, chunk: Chunk) -> int:
    return chunk.used + layout.global_reserve + METADATA_MARGIN


def _round(length: int) -> int:
    return -(-length // CHUNK_STEP) * CHUNK_STEP
