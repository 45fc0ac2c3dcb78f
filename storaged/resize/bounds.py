"""How small a filesystem can get, from a picture of its device: pure arithmetic, no filesystem touched.

Two numbers. The *guaranteed* size is the top of what anybody but the balloon holds: nothing has to move. The
*reachable* one is how far evacuation gets, chunk by chunk from the top, each of them moved by the kernel into the
room below. It is promised only where the kernel cannot fail, whatever order it works in:

- The kernel moves a data extent only into one piece of free room that is as long. If `longest` is the longest extent
  that has to move, then as long as any piece of room is at least that long, the next extent fits. So when an extent
  does not fit, every piece `p` of room has already taken more than `p - longest`: room for the sum of
  `p - longest` bytes is certain (`certain_room`).
- Metadata moves in nodes, so any room in the metadata chunks that stay will do, with a margin for the copies that
  the work itself makes; or a hole for a whole new chunk.
- A new chunk comes only while the new size is larger than all chunks together, the one that moves included
  (`unclaimed`); a hole alone is not enough.
- One data chunk stays, even when no file holds any data: the kernel makes a new one before it cuts the last one away.

A used plus a margin does not do: of all such formulas that were measured, each sometimes failed, and a failure of
metadata can leave the filesystem read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from storaged.units import GIB, MIB, SECTOR, sector_ceil

KERNEL_MINIMUM = 256 * MIB
"""BTRFS_IOC_RESIZE refuses less (fs/btrfs/ioctl.c, btrfs_ioctl_resize)."""
FIRST_USABLE = MIB
"""No chunk lies in the first MiB of a device (BTRFS_DEVICE_RANGE_RESERVED)."""
METADATA_MARGIN = 32 * MIB
"""Metadata room beyond what moves, for the copies the move itself makes."""
SYSTEM_CHUNK = 32 * MIB
"""The largest new system chunk (fs/btrfs/volumes.c, init_alloc_chunk_ctl_policy_regular)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block group and where it lies. `used` includes `balloon`, the bytes of it that are the balloon's.

    `logical` and `length` are in the filesystem's address space; `stripes` are the starts on the device, each
    `stripe_length` bytes (more than one for DUP).
    """

    logical: int
    length: int
    used: int
    balloon: int
    kind: str  # data, metadata, system or mixed
    stripes: tuple[int, ...]
    stripe_length: int
    rooms: tuple[int, ...] = ()
    """Lengths of the pieces of free room in it; data chunks only."""
    balloon_rooms: tuple[int, ...] = ()
    """Lengths of the balloon's pieces in it: room as well, once the balloon gives it up."""

    @property
    def top(self) -> int:
        """The end of its topmost stripe on the device."""
        return max(self.stripes) + self.stripe_length

    @property
    def vacant(self) -> bool:
        """True when nothing but the balloon holds it, so that it goes without a byte being moved."""
        return self.kind == "data" and self.used <= self.balloon

    @property
    def held(self) -> int:
        """Bytes that have to move when it goes."""
        return max(self.used - self.balloon, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """All chunks of a filesystem on its only device."""

    size: int
    device: int
    chunks: tuple[Chunk, ...]
    global_reserve: int = 0
    metadata_chunk: int = 256 * MIB

    def as_it_is(self) -> Layout:
        """The same, with room only where nobody holds it now, not even the balloon."""
        return replace(self, chunks=tuple(replace(chunk, balloon_rooms=()) for chunk in self.chunks))


Longest = Callable[[Chunk], int]
"""The longest extent of a chunk that is not the balloon's, in bytes; asked for only where it matters."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The answer: `minimum` is what a shrink is promised to reach; `why` names what stands at the bound."""

    minimum: int
    guaranteed: int
    why: str


def compute(layout: Layout, longest: Longest) -> Bounds:
    """Both bounds of `layout`. Not monotone in between: a smaller size may be certain where a larger one is not."""
    ordered = sorted(layout.chunks, key=lambda chunk: chunk.top, reverse=True)
    best = sure = layout.size
    why = blocked = "nothing can be cut away"
    reach = 0
    for count in range(len(ordered) + 1):
        moving, staying = ordered[:count], ordered[count:]
        if moving and moving[-1].held and moving[-1].kind == "data":
            reach = max(reach, longest(moving[-1]))
        size, reason = fit(layout, moving, staying, reach)
        if size < best:
            best, why, blocked = size, reason, ""
        blocked = blocked or reason
        if all(chunk.vacant for chunk in moving):
            sure = min(sure, size)
        if moving and moving[-1].top <= KERNEL_MINIMUM:
            break
        if sum(c.held for c in moving if c.kind == "data") > _most_room(staying, layout.size):
            break  # going further only makes it worse
    if best == KERNEL_MINIMUM:
        why = "the kernel resizes no filesystem below 256 MiB"
    return Bounds(best, sure, blocked or why)


def fit(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], longest: int) -> tuple[int, str]:
    """The smallest size at which `moving` is certain to go in beside `staying`, and why it is not less.

    That is the top of what stays, with a hole behind it where metadata would otherwise have no room to live in. The
    present size when nothing is gained.
    """
    size = max(sector_ceil(max((chunk.top for chunk in staying), default=0)), KERNEL_MINIMUM)
    reason = ""
    if missing := _last_data_short(layout, moving, staying, size):
        reason = f"{missing} bytes stay unallocated, or the last data chunk could not make way for another"
        size = sector_ceil(size + missing)
    if blocked := obstacle(layout, moving, staying, size, longest):
        return layout.size, blocked
    if missing := _metadata_short(layout, moving, staying, size):
        reason = f"{missing} bytes stay unallocated for metadata, which could not grow otherwise"
        size = sector_ceil(size + missing)
    if not reason:
        return min(size, layout.size), ""
    if moving and size < moving[-1].top and not obstacle(layout, moving, staying, size, longest):
        return size, reason
    return layout.size, reason


def obstacle(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int, longest: int) -> str:
    """Why `moving` might not fit below `size` beside `staying`; empty when it is certain to.

    Room that `moving` itself takes up below `size` is free only afterwards, so it does not count.
    """
    last_data = _last_data(moving, staying)
    if last_data is None and not any(chunk.held or chunk.kind != "data" for chunk in moving):
        return ""
    where = f"{moving[-1].kind} chunk at {moving[-1].top - moving[-1].stripe_length}"
    if any(chunk.kind not in ("data", "metadata", "system") for chunk in moving):
        return f"{where} cannot move: it mixes data and metadata"
    room = sorted(holes((*moving, *staying), size), reverse=True)
    claimable = unclaimed(moving, room)
    wanted = (
        _wanted_holes(layout, moving, staying) if any(chunk.held or chunk.kind != "data" for chunk in moving) else []
    )
    for needed in wanted:
        if not room or room[0] < needed or claimable < MIB:
            return f"{where} cannot move: no hole of {needed} bytes for a new metadata or system chunk"
        room = sorted([room[0] - needed, *room[1:]], reverse=True)
        claimable -= needed
    if last_data is not None and unclaimed([last_data], room) - sum(wanted) < MIB:
        start = last_data.top - last_data.stripe_length
        return f"data chunk at {start} cannot move: it is the last one, and there is no hole for another"
    fresh = _new_chunks(room, size, claimable)
    data = sum(chunk.held for chunk in moving if chunk.kind == "data")
    certain = certain_room((*_rooms(staying), *fresh), longest)
    if data > certain:
        return (
            f"{where} cannot move: {data} bytes lie above {size}, and room for only {certain} is certain"
            f" below it (the longest extent has {longest})"
        )
    return ""


def _last_data(moving: Sequence[Chunk], staying: Sequence[Chunk]) -> Chunk | None:
    """The lowest data chunk of `moving` when no other stays.

    btrfs_may_alloc_data_chunk (fs/btrfs/volumes.c) makes a new one first, even for an empty one.
    """
    if any(chunk.kind == "data" for chunk in staying):
        return None
    return min((chunk for chunk in moving if chunk.kind == "data"), key=lambda chunk: chunk.top, default=None)


def _last_data_short(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int) -> int:
    """Bytes of the device that a new data chunk lacks beside the last one that moves; 0 when there is room."""
    last = _last_data(moving, staying)
    if last is None:
        return 0
    room = unclaimed([last], holes((*moving, *staying), size)) - sum(_wanted_holes(layout, moving, staying))
    return max(MIB - room, 0)


def unclaimed(moving: Iterable[Chunk], room: Iterable[int]) -> int:
    """Bytes of new chunks that the kernel can make in `room` while `moving` is still there, one chunk after the other.

    It makes none when the device's new size is not above what all chunks take, those above the new end included
    (fs/btrfs/volumes.c, gather_device_info; measured on Linux 6.18). Empty chunks go along with the one that holds
    something, so all of them may still be there.
    """
    largest = empty = 0
    for chunk in moving:
        length = len(chunk.stripes) * chunk.stripe_length
        if chunk.used or chunk.kind != "data":
            largest = max(largest, length)
        else:
            empty += length
    return sum(room) - largest - empty


def _rooms(staying: Iterable[Chunk]) -> list[int]:
    return [piece for chunk in staying if chunk.kind == "data" for piece in (*chunk.rooms, *chunk.balloon_rooms)]


def _metadata_short(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int) -> int:
    """Bytes of the device that metadata lacks once everything is below `size`; 0 when it can live there.

    A filesystem cut down to its last metadata chunk refuses writes that statvfs promises.
    """
    kept = [chunk for chunk in staying if chunk.kind in ("metadata", "mixed")]
    room = sum(chunk.length - chunk.used for chunk in kept)
    used = sum(chunk.used for chunk in moving if chunk.kind == "metadata")
    short = used + layout.global_reserve + metadata_margin(size) - room
    if short <= 0:
        return 0
    copies = max((len(chunk.stripes) for chunk in (*moving, *kept) if chunk.kind == "metadata"), default=1)
    taken = max(sum(c.held for c in moving if c.kind == "data") - sum(_rooms(staying)), 0)
    return max(copies * short + MIB - max(sum(holes(staying, size)) - taken, 0), 0)


def certain_room(pieces: Iterable[int], longest: int) -> int:
    """Bytes of extents up to `longest` that are sure to fit into `pieces`, whatever the order."""
    return sum(piece - longest + SECTOR for piece in pieces if piece >= longest)


def holes(staying: Iterable[Chunk], size: int) -> list[int]:
    """Lengths of what is not allocated below `size`, lowest first."""
    found = []
    at = FIRST_USABLE
    for start, end in sorted((stripe, stripe + chunk.stripe_length) for chunk in staying for stripe in chunk.stripes):
        if start >= size:
            break
        if start > at:
            found.append(start - at)
        at = max(at, end)
    if size > at:
        found.append(size - at)
    return found


def _most_room(staying: Iterable[Chunk], size: int) -> int:
    staying = list(staying)
    return sum(sum(c.rooms) + sum(c.balloon_rooms) for c in staying if c.kind == "data") + sum(holes(staying, size))


def _data_chunk(size: int) -> int:
    """The length of a new data chunk on a filesystem of `size`: a tenth, at most 1 GiB."""
    return max(min(GIB, size // 10) // 65536 * 65536, 65536)


def _new_chunks(room: Iterable[int], size: int, claimable: int) -> list[int]:
    """The data chunks the kernel can make in holes of these lengths, while any of `claimable` bytes is left."""
    chunk = _data_chunk(size)
    pieces: list[int] = []
    for hole in room:
        whole, rest = divmod(hole // 65536 * 65536, chunk)
        for piece in [chunk] * whole + ([rest] if rest >= MIB else []):
            if claimable < MIB:
                return pieces
            pieces.append(piece)
            claimable -= piece
    return pieces


def metadata_margin(size: int) -> int:
    """Metadata room that a filesystem of `size` bytes needs to live in: 1/64 of it, 8 to 32 MiB."""
    return min(max(size // 64, 8 * MIB), METADATA_MARGIN)


def _wanted_holes(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk]) -> list[int]:
    """Holes that new metadata and system chunks may need while `moving` moves, in bytes of the device."""
    wanted = []
    metadata = [chunk for chunk in moving if chunk.kind == "metadata"]
    kept = [chunk for chunk in staying if chunk.kind == "metadata"]
    free = sum(chunk.length - chunk.used for chunk in kept)
    margin = METADATA_MARGIN if metadata else metadata_margin(layout.size)
    short = sum(chunk.used for chunk in metadata) + layout.global_reserve + margin - free
    if short > 0:
        copies = max((len(chunk.stripes) for chunk in (*metadata, *kept)), default=1)
        one = max(min(layout.metadata_chunk, layout.size // 10), MIB)
        wanted += [copies * one + 16 * MIB] * -(-short // one)
    for chunk in moving:
        if chunk.kind == "system":
            wanted.append(len(chunk.stripes) * max(SYSTEM_CHUNK, chunk.length))
    return wanted


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the kernel's resize: let the balloon go out of `vacate`, then cut to `size`, moving `moves` bytes."""

    size: int
    vacate: tuple[Chunk, ...]
    moves: int
    blocked: str = ""
    """Why the call is not certain to succeed; it must not be made then."""


def next_step(layout: Layout, target: int, longest: Longest) -> Step:
    """The next call on the way to `target`: the topmost chunk that holds anything, and what is empty around it.

    One chunk at a time is durable, can be cancelled, and keeps what applications may write from jumping: the room
    that the balloon gives up is cut away by the same step.
    """
    ordered = sorted(
        (c for c in layout.chunks if c.used or c.kind != "data"), key=lambda chunk: chunk.top, reverse=True
    )
    chunk = ordered[0] if ordered and ordered[0].top > target else None
    size = target
    if chunk is not None and len(ordered) > 1:
        size = max(sector_ceil(ordered[1].top), target)
    going = sorted((c for c in layout.chunks if c.top > size), key=lambda c: c.top, reverse=True)
    staying = [c for c in layout.chunks if c.top <= size]
    reach = longest(chunk) if chunk is not None and chunk.kind == "data" and chunk.held else 0
    blocked = obstacle(layout, going, staying, size, reach) if going else ""
    if chunk is None:
        return Step(size, (), 0, blocked)
    return Step(size, (chunk,) if chunk.balloon else (), chunk.held, blocked)


def left_to_move(layout: Layout, target: int) -> int:
    """Bytes that lie in chunks reaching above `target`."""
    return sum(chunk.held for chunk in layout.chunks if chunk.top > target)


def with_balloon(chunks: Iterable[Chunk], extents: Iterable[tuple[int, int]]) -> tuple[Chunk, ...]:
    """`chunks` with the balloon's `extents`, pairs of (logical start, length), counted into them."""
    ordered = sorted(chunks, key=lambda chunk: chunk.logical)
    pieces: list[list[int]] = [[] for _ in ordered]
    index = 0
    for start, length in sorted(extents):
        # An extent lies in one chunk: no data extent crosses a block group.
        while index < len(ordered) and ordered[index].logical + ordered[index].length <= start:
            index += 1
        if index < len(ordered) and ordered[index].logical <= start:
            pieces[index].append(length)
    return tuple(
        replace(chunk, balloon=min(sum(held), chunk.used), balloon_rooms=tuple(held))
        for chunk, held in zip(ordered, pieces, strict=True)
    )
