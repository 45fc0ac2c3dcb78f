"""What is certain to fit where: the conditions under which the kernel cannot fail to shrink.

Two numbers. The *guaranteed* size is the top of what anybody but the balloon holds: nothing has to move. The
*reachable* one is how far evacuation gets, chunk by chunk from the top, each of them moved by the kernel into the
room below. It is promised only where the kernel cannot fail, whatever order it works in:

- The kernel moves a data extent only into one piece of free room that is as long. If `longest` is the longest extent
  that has to move, then as long as any piece of room is at least that long, the next extent fits. So when an extent
  does not fit, every piece `p` of room has already taken more than `p - longest`: room for the sum of
  `p - longest` bytes is certain (`certain_room`) for all that has moved before the last extent.
- Metadata moves in nodes, so any room in the metadata chunks that stay will do, with a margin for the copies that
  the work itself makes; or a hole for a whole new chunk.
- A new chunk comes only while the new size is larger than all chunks together, those that still have to move included
  (`unclaimed`); a hole alone is not enough.
- One data chunk stays, even when no file holds any data: the kernel makes a new one before it cuts the last one away.

A used plus a margin does not do: of all such formulas that were measured, each sometimes failed, and a failure of
metadata can leave the filesystem read-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storaged.resize.layout import KERNEL_MINIMUM, Chunk, Layout, Longest, holes
from storaged.units import GIB, MIB, SECTOR, sector_ceil

METADATA_MARGIN = 32 * MIB
"""Metadata room beyond what moves, for the copies the move itself makes."""
LEAST_MARGIN = 8 * MIB
CRAMPED_MOST = 64 * MIB
"""Metadata up to this is moved within a moment."""
CHUNK_STEP = 16 * MIB
"""To which the kernel rounds a tenth of the filesystem up (fs/btrfs/volumes.c, as above)."""
MOST_AT_ONCE = 8
"""Chunks in one call of the kernel, where fewer are not certain."""
GAP_STEP = MIB
"""How closely the size of a gap is looked for."""
RELOCATION = 4 * MIB
"""Metadata that the kernel reserves before it takes any chunk away, an empty one too: 256 nodes, of 16 KiB at most here
(fs/btrfs/relocation.c, prepare_to_relocate)."""
SYSTEM_CHUNK = 32 * MIB
"""The largest new system chunk (fs/btrfs/volumes.c, init_alloc_chunk_ctl_policy_regular)."""


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
        higher = _with_a_gap(layout, moving, staying, size, longest)
        if higher is None:
            return layout.size, blocked
        reason = f"{higher - size} bytes stay unallocated, or what moves could not: {blocked}"
        size = higher
    if missing := _metadata_short(layout, moving, staying, size):
        reason = f"{missing} bytes stay unallocated for metadata, which could not grow otherwise"
        size = sector_ceil(size + missing)
    if not reason:
        return min(size, layout.size), ""
    if not moving or (size < moving[-1].top and not obstacle(layout, moving, staying, size, longest)):
        return min(size, layout.size), reason
    return layout.size, reason


def obstacle(
    layout: Layout,
    moving: Sequence[Chunk],
    staying: Sequence[Chunk],
    size: int,
    longest: int,
    *,
    one_call: bool = False,
) -> str:
    """Why `moving` might not fit below `size` beside `staying`; empty when it is certain to.

    Room that `moving` itself takes up below `size` is free only afterwards, so it does not count. In `one_call` of the
    kernel all of it is still there when the first has to move; step by step, what has moved is cut away.
    """
    if pinned := next((chunk for chunk in moving if chunk.pinned), None):
        return f"data chunk at {pinned.top - pinned.stripe_length} cannot move: an active swap file lies in it"
    if why := _unreserved(layout, moving, staying, size, one_call=one_call):
        return why
    last_data = _last_data(moving, staying)
    works = any(not chunk.vacant for chunk in moving)
    if last_data is None and not works:
        return ""
    where = f"{moving[-1].kind} chunk at {moving[-1].top - moving[-1].stripe_length}"
    if any(chunk.kind not in ("data", "metadata", "system") and not chunk.vacant for chunk in moving):
        return f"{where} cannot move: it mixes data and metadata"
    room = sorted(holes((*moving, *staying), size), reverse=True)
    claimable = unclaimed(moving, room, all_at_once=one_call)
    wanted = _wanted_holes(layout, moving, staying, size) if works else []
    if wanted and not any(chunk.kind in ("metadata", "system") for chunk in moving):
        # The kernel may make a data chunk though there is room in others, and claim with it what metadata will need.
        return f"{where} cannot move: metadata is short of room for the copies that this makes"
    if wanted and one_call and _data_comes_first(moving, empty_too=last_data is not None):
        return f"{where} cannot move: what comes before it may take the hole for a new metadata or system chunk"
    for needed in wanted:
        if not room or room[0] < needed or claimable < MIB:
            return f"{where} cannot move: no hole of {needed} bytes for a new metadata or system chunk"
        room = sorted([room[0] - needed, *room[1:]], reverse=True)
        claimable -= needed
    with_last = [chunk for chunk in moving if last_data and one_call and chunk.top < last_data.top]
    if last_data is not None and unclaimed([last_data, *with_last], room, all_at_once=True) - sum(wanted) < MIB:
        start = last_data.top - last_data.stripe_length
        return f"data chunk at {start} cannot move: it is the last one, and there is no hole for another"
    fresh = _new_chunks(room, size, claimable, in_full=bool(wanted))
    data = sum(chunk.held for chunk in moving if chunk.kind == "data")
    certain = sum(certain_in(chunk, longest) for chunk in staying) + certain_room(fresh, longest)
    if data and (not certain or data - longest >= certain):
        return (
            f"{where} cannot move: {data} bytes lie above {size}, and room for only {certain} is certain"
            f" below it (the longest extent has {longest})"
        )
    return ""


def _unreserved(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int, *, one_call: bool) -> str:
    """Why the kernel cannot even begin to take a chunk away: metadata has no room for what that reserves."""
    room = metadata_room((*moving, *staying)) - layout.global_reserve
    known = any(chunk.kind in ("metadata", "mixed") for chunk in (*moving, *staying))
    if not moving or not known or room >= RELOCATION:
        return ""
    if unclaimed(moving, holes((*moving, *staying), size), all_at_once=one_call) >= MIB:
        return ""  # it makes another metadata chunk
    return (
        f"{moving[-1].kind} chunk at {moving[-1].top - moving[-1].stripe_length} cannot go: metadata has {max(room, 0)}"
        f" bytes beside the kernel's reserve, and {RELOCATION} are needed"
    )


def _data_comes_first(moving: Sequence[Chunk], *, empty_too: bool) -> bool:
    """True when the kernel moves data before metadata or a system chunk: it works downwards, by the highest stripe.

    For an empty chunk it makes another one `empty_too`, where no data is used at all (`_last_data`).
    """
    data = [chunk.top for chunk in moving if chunk.kind == "data" and (chunk.used or empty_too)]
    return bool(data) and any(chunk.kind in ("metadata", "system") and chunk.top < max(data) for chunk in moving)


def _with_a_gap(
    layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int, longest: int
) -> int | None:
    """The smallest size found at which `moving` is certain to fit because there is a gap above what stays; None if not.

    The gap ends where the lowest of `moving` begins: what that takes up is free only afterwards.
    """
    gap = max(moving[-1].stripes) // SECTOR * SECTOR - size if moving else 0
    if gap < MIB or obstacle(layout, moving, staying, size + gap, longest):
        return None
    low, high = 0, gap
    while high - low > GAP_STEP:
        middle = (low + high) // 2 // SECTOR * SECTOR
        if obstacle(layout, moving, staying, size + middle, longest):
            low = middle
        else:
            high = middle
    return size + high


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
    room = unclaimed([last], holes((*moving, *staying), size)) - sum(_wanted_holes(layout, moving, staying, size))
    return max(MIB - room, 0)


def unclaimed(moving: Iterable[Chunk], room: Iterable[int], *, all_at_once: bool = False) -> int:
    """Bytes of new chunks that the kernel can make in `room` while `moving` is still there, one chunk after the other.

    It makes none when the device's new size is not above what all chunks take, those above the new end included
    (fs/btrfs/volumes.c, gather_device_info; measured on Linux 6.18). Empty chunks go along with the one that holds
    something, so all of them may still be there; where one call moves them `all_at_once`, the others
    too. Metadata that gets no chunk then forces the filesystem read-only: its own was taken out of use beforehand.
    """
    largest = empty = 0
    for chunk in moving:
        length = len(chunk.stripes) * chunk.stripe_length
        if not all_at_once and (chunk.used or chunk.kind != "data"):
            largest = max(largest, length)
        else:
            empty += length
    return sum(room) - largest - empty


def room_in(chunk: Chunk) -> int:
    """Bytes that data may take in `chunk` once the balloon gives up its own."""
    return sum(chunk.rooms) + sum(chunk.balloon_rooms) if chunk.kind == "data" else 0


def _metadata_short(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int) -> int:
    """Bytes of the device that metadata lacks once everything is below `size`; 0 when it can live there.

    A filesystem cut down to its last metadata chunk refuses writes that statvfs promises.
    """
    kept = [chunk for chunk in staying if chunk.kind in ("metadata", "mixed")]
    room = metadata_room(kept)
    used = sum(chunk.used for chunk in moving if chunk.kind == "metadata")
    short = used + layout.global_reserve + metadata_margin(size) - room
    if short <= 0:
        return 0
    copies = max((len(chunk.stripes) for chunk in (*moving, *kept) if chunk.kind in ("metadata", "mixed")), default=1)
    taken = max(sum(c.held for c in moving if c.kind == "data") - sum(map(room_in, staying)), 0)
    return max(copies * short + MIB - max(sum(holes(staying, size)) - taken, 0), 0)


def certain_room(pieces: Iterable[int], longest: int) -> int:
    """Bytes of extents up to `longest` that are sure to fit into `pieces`, whatever the order."""
    return sum(piece - longest + SECTOR for piece in pieces if piece >= longest)


def certain_in(chunk: Chunk, longest: int) -> int:
    """`certain_room` of what is free in a data chunk, and of the balloon's; 0 of another."""
    if chunk.kind != "data":
        return 0
    certain = 0
    for pieces in (chunk.rooms, chunk.balloon_rooms):
        for piece in pieces:
            if piece < longest:
                break  # the longest come first: in a fragmented filesystem most are too short
            certain += piece - longest + SECTOR
    return certain


def data_chunk(size: int) -> int:
    """The length of a new data chunk on a filesystem of `size`: a tenth, rounded up, at most 1 GiB."""
    return max(min(GIB, -(-size // 10 // CHUNK_STEP) * CHUNK_STEP), CHUNK_STEP)


def _new_chunks(room: Iterable[int], size: int, claimable: int, *, in_full: bool) -> list[int]:
    """The data chunks the kernel can make in holes of these lengths, while any of `claimable` bytes is left.

    The last may claim more than there is, and `in_full` it does not count: where metadata needs its share.
    """
    chunk = data_chunk(size)
    pieces: list[int] = []
    for hole in room:
        whole, rest = divmod(hole // 65536 * 65536, chunk)
        for piece in [chunk] * whole + ([rest] if rest >= MIB else []):
            if claimable < (max(piece, MIB) if in_full else MIB):
                return pieces
            pieces.append(piece)
            claimable -= piece
    return pieces


def metadata_margin(size: int) -> int:
    """Metadata room that a filesystem of `size` bytes needs to live in: 1/64 of it, 8 to 32 MiB."""
    return min(max(size // 64, LEAST_MARGIN), METADATA_MARGIN)


def metadata_room(chunks: Iterable[Chunk]) -> int:
    """Room in metadata chunks. An empty one is none: the kernel's cleaner may take it away at any moment."""
    return sum(chunk.length - chunk.used for chunk in chunks if chunk.used and chunk.kind in ("metadata", "mixed"))


def cramped_metadata(layout: Layout) -> Chunk | None:
    """The metadata chunk to move to a new one, because metadata is short of room and there is a hole for it.

    When a chunk is cut away, what was in it may have gone into the small ones that mkfs has made, and the new one
    may have gone again, because it was empty; the next step would find metadata full.
    """
    metadata = [chunk for chunk in layout.chunks if chunk.kind == "metadata" and chunk.used]
    if not metadata or not metadata_is_short(layout):
        return None
    room = metadata_room(metadata)
    # What fits beside the others goes there, and all are the worse for it.
    fresh = [chunk for chunk in metadata if chunk.used > room - (chunk.length - chunk.used)]
    if not fresh:
        return None
    chunk = min(fresh, key=lambda chunk: chunk.used)
    copies = len(chunk.stripes)
    hole = max(holes(layout.chunks, layout.size), default=0) // copies
    # An empty one will do, too: it stays once there is something in it.
    hole = max([hole, *(c.length for c in layout.chunks if c.kind == "metadata" and not c.used)])
    better = hole >= max(chunk.used + layout.global_reserve, chunk.length) + LEAST_MARGIN
    return chunk if better and chunk.used <= CRAMPED_MOST else None


def metadata_short_of(layout: Layout, used: int, free: int, *, moves: bool) -> int:
    """Bytes that `free` metadata room lacks for `used` bytes to move into it; what `moves` at all needs more margin."""
    margin = METADATA_MARGIN if moves else metadata_margin(layout.size)
    return used + layout.global_reserve + margin - free


def metadata_is_short(layout: Layout) -> bool:
    """True when metadata has no room for the copies that moving data makes."""
    return metadata_short_of(layout, 0, metadata_room(layout.chunks), moves=False) > 0


def metadata_chunk(layout: Layout, size: int) -> int:
    """The length of a new metadata chunk once the filesystem has `size`: a tenth, rounded up, at most the usual.

    The kernel reckons with the new size as soon as a shrink begins (fs/btrfs/volumes.c, btrfs_shrink_device).
    """
    return max(min(layout.metadata_chunk, -(-size // 10 // CHUNK_STEP) * CHUNK_STEP), MIB)


def _wanted_holes(layout: Layout, moving: Sequence[Chunk], staying: Sequence[Chunk], size: int) -> list[int]:
    """Holes that new metadata and system chunks may need while `moving` moves below `size`, in bytes of the device."""
    wanted = []
    metadata = [chunk for chunk in moving if chunk.kind == "metadata"]
    kept = [chunk for chunk in staying if chunk.kind == "metadata"]
    short = metadata_short_of(layout, sum(chunk.used for chunk in metadata), metadata_room(kept), moves=bool(metadata))
    if short > 0:
        copies = max((len(chunk.stripes) for chunk in (*metadata, *kept)), default=1)
        one = metadata_chunk(layout, size)
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
    above = [chunk for chunk in ordered if chunk.top > target]
    first: Step | None = None
    for count in range(1, max(min(len(above), MOST_AT_ONCE), 1) + 1):
        step = _step(layout, target, ordered, min(count, len(above)), longest)
        if not step.blocked:
            return step
        # What is certain for all of them may not be for the first alone: new metadata chunks get smaller with the size.
        first = first or step
    assert first is not None
    return first


def _step(layout: Layout, target: int, ordered: Sequence[Chunk], count: int, longest: Longest) -> Step:
    """The call that cuts away the topmost `count` chunks that hold anything, and what is empty around them."""
    size = target
    if len(ordered) > count:
        size = max(sector_ceil(ordered[count].top), target)
    going = sorted((c for c in layout.chunks if c.top > size), key=lambda c: c.top, reverse=True)
    staying = [c for c in layout.chunks if c.top <= size]
    reach = max((longest(chunk) for chunk in ordered[:count] if chunk.kind == "data" and chunk.held), default=0)
    blocked = obstacle(layout, going, staying, size, reach, one_call=True) if going else ""
    vacate = tuple(chunk for chunk in ordered[:count] if chunk.balloon)
    return Step(size, vacate, sum(chunk.held for chunk in ordered[:count]), blocked)
