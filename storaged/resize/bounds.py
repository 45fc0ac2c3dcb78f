"""How small a filesystem can get, from a picture of its device: pure arithmetic, no filesystem touched.

`fit` judges one cut exactly. There is a cut below every chunk, so that judging them all takes the square of their
number; `_promising` sorts out, in one sweep, those that cannot be certain. What is left is judged from the deepest
up, and the first that fits is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from storaged.resize.fit import (
    SYSTEM_CHUNK,
    certain_in,
    data_chunk,
    fit,
    metadata_chunk,
    metadata_room,
    metadata_short_of,
    next_step,
    room_in,
)
from storaged.resize.layout import FIRST_USABLE, KERNEL_MINIMUM, Chunk, Layout, Longest, asked_once, holes_at
from storaged.units import MIB, SECTOR

MOST_BLOCKED = 16
"""Sizes that are certain and cannot be begun: then nothing below the guaranteed size is promised."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The answer: `minimum` is what a shrink is promised to reach; `why` names what stands at the bound."""

    minimum: int
    guaranteed: int
    why: str


def compute(layout: Layout, longest: Longest) -> Bounds:
    """Both bounds of `layout`. Not monotone in between: a smaller size may be certain where a larger one is not."""
    ordered = sorted(layout.chunks, key=lambda chunk: chunk.top, reverse=True)
    longest = asked_once(longest)
    reach = _Reach(ordered, longest)
    vacant = next((count for count, chunk in enumerate(ordered) if not chunk.vacant), len(ordered))
    sure = layout.size
    for count in range(vacant, -1, -1):
        sure = min(sure, _at(layout, ordered, count, reach)[0])
        if sure < layout.size:
            break
    left = MOST_BLOCKED
    for count in _promising(layout, ordered, reach):
        size, reason = _at(layout, ordered, count, reach)
        if size == layout.size:
            continue
        # What is certain at the end may not be on the way: while the filesystem is large, so are new metadata chunks.
        if next_step(layout, size, longest).blocked:
            left -= 1
            if not left:
                return Bounds(sure, sure, reason or _below(layout, ordered, count, reach, size))
        else:
            return Bounds(size, sure, reason or _below(layout, ordered, count, reach, size))
    reasons = (_at(layout, ordered, count, reach)[1] for count in range(min(len(ordered), 2) + 1))
    return Bounds(layout.size, sure, next(filter(None, reasons), "nothing can be cut away"))


class _Reach:
    """The longest extent of the topmost chunks; each chunk is asked for once, and only when it is reached."""

    def __init__(self, ordered: Sequence[Chunk], longest: Longest) -> None:
        self._ordered = ordered
        self._longest = longest
        self._known = [0]

    def of(self, count: int) -> int:
        """Bytes; 0 when the topmost `count` chunks hold no data."""
        while len(self._known) <= count:
            chunk = self._ordered[len(self._known) - 1]
            own = self._longest(chunk) if chunk.held and chunk.kind == "data" else 0
            self._known.append(max(self._known[-1], own))
        return self._known[count]


def _at(layout: Layout, ordered: Sequence[Chunk], count: int, reach: _Reach) -> tuple[int, str]:
    return fit(layout, ordered[:count], ordered[count:], reach.of(count))


def _below(layout: Layout, ordered: Sequence[Chunk], count: int, reach: _Reach, size: int) -> str:
    """What stands in the way of going further than `size`."""
    if size > KERNEL_MINIMUM:
        for deeper in range(count + 1, min(count + 3, len(ordered)) + 1):
            if reason := _at(layout, ordered, deeper, reach)[1]:
                return reason
    return (
        "the kernel resizes no filesystem below 256 MiB" if size == KERNEL_MINIMUM else "nothing more can be cut away"
    )


def _promising(  # noqa: C901, PLR0912, PLR0915  # one sweep with its sums in locals, for speed
    layout: Layout, ordered: Sequence[Chunk], reach: _Reach
) -> Iterator[int]:
    """How many chunks may go, deepest first. Each test is weaker than that of `fit`, so none that fits is left out."""
    gaps = holes_at(layout.chunks, layout.size)
    starts = [start for start, _ in gaps]
    sums = list(accumulate((length for _, length in gaps), initial=0))
    biggest = list(accumulate((length for _, length in gaps), max, initial=0))
    metadata = [chunk for chunk in ordered if chunk.kind == "metadata"]
    copies = max((len(chunk.stripes) for chunk in metadata), default=1)
    room = [room_in(chunk) for chunk in ordered]
    rooms = sum(room)
    unallocated = layout.size - FIRST_USABLE - sum(len(chunk.stripes) * chunk.stripe_length for chunk in ordered)
    free = metadata_room(metadata)
    most_new = data_chunk(layout.size)
    found: list[tuple[int, int, int]] = [(0, 0, 0)]
    # Of the chunks above: data held, bytes of the device of the largest one and of the empty ones, metadata used.
    data = largest = empty = used = 0
    system = moves = anything = 0
    gap = len(gaps)
    for count, chunk in enumerate(ordered, 1):
        if chunk.pinned:
            break
        device = len(chunk.stripes) * chunk.stripe_length
        unallocated += device
        if chunk.kind == "data":
            held = chunk.held
            data += held
            anything = anything or held
            rooms -= room[count - 1]
        elif chunk.kind == "metadata":
            used += chunk.used
            free -= metadata_room([chunk])
            moves = anything = 1
        elif chunk.kind == "system":
            system = max(system, len(chunk.stripes) * max(SYSTEM_CHUNK, chunk.length))
            anything = 1
        elif not chunk.vacant:
            break
        if chunk.used or chunk.kind != "data":
            largest = max(largest, device)
        else:
            empty += device
        if data > rooms + unallocated:
            break  # going further only makes it worse
        top = chunk.top
        while gap and starts[gap - 1] >= top:
            gap -= 1
        claimable = sums[gap] - largest - empty
        wanted = system
        if anything and metadata_short_of(layout, used, free, moves=bool(moves)) > 0:
            least = ordered[count].top if count < len(ordered) else KERNEL_MINIMUM
            wanted = max(wanted, copies * metadata_chunk(layout, least) + 16 * MIB)
        if not wanted or (claimable >= MIB and biggest[gap] >= wanted):
            fresh = min(sums[gap], claimable + most_new) if claimable >= MIB else 0
            if not data or data - SECTOR < rooms + fresh:
                found.append((count, data, fresh))
        if top <= KERNEL_MINIMUM:
            break
    yield from _with_extents(layout, ordered, found, reach)


def _with_extents(
    layout: Layout, ordered: Sequence[Chunk], found: Sequence[tuple[int, int, int]], reach: _Reach
) -> Iterator[int]:
    """Of `found`, (count, data, new chunks in bytes), those that stand when the longest extent is known too.

    It is rounded down to a power of two, so that the rooms have to be gone through a few times only.
    """
    counted = 0
    below: list[int] = []
    for count, data, fresh in reversed(found):
        longest = reach.of(count)
        if not data:
            yield count
            continue
        rounded = max(1 << (longest.bit_length() - 1), SECTOR) if longest else SECTOR
        if rounded != counted:
            counted = rounded
            below = list(accumulate((certain_in(chunk, rounded) for chunk in ordered), initial=0))
        chunk = data_chunk(layout.size)
        whole = fresh - fresh * (rounded - SECTOR) // chunk if rounded <= chunk else 0
        if data - rounded < below[-1] - below[count] + max(whole, 0) + 1:
            yield count
