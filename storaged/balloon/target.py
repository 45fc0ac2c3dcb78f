"""How big the balloon must be: pure arithmetic on the kernel's space accounting.

What applications can still write is the free room in data chunks plus what is not allocated to any chunk. The
balloon file takes data room until that sum is the host's limit. Two facts of btrfs complicate it:

- Data chunks come in steps of a tenth of the filesystem, at most 1 GiB, and a large request makes the kernel
  allocate a chunk more than it needs. So the last two chunks are taken one by one.
- Metadata needs chunks too. When the metadata chunks there are run low, some unallocated room must stay for the
  next one, or the filesystem refuses writes, and later a deflated balloon does not help for half a minute. That
  *claim* is at most half a data chunk, and is given up where keeping it would break the promise to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from storaged.core.model import MOST_SUPERBLOCKS, Space
from storaged.units import MIB, SECTOR

TOLERANCE = MIB
"""Differences below this are not worth a commit; hosts report in steps of 100 MiB."""
CRAMPED_MOST = 8 * MIB
"""Metadata up to this is moved to a larger chunk within milliseconds, for twice as much written."""
LEAST_ROOM = 4 * MIB
"""Data room the kernel's own accounting may hide (superblock stripes, rounding)."""
IDLE_SLACK = 64 * MIB
"""By this much the kernel's accounts may be off for a moment: what it discards is hidden in pieces of up to 64 MiB
(BTRFS_ASYNC_DISCARD_DEFAULT_MAX_SIZE, fs/btrfs/discard.h), and applications write and delete while it is counted."""
WORTH_A_PIECE, MOST_PIECES = MIB, 64
"""Room that is taken piece by piece: the smallest of them, in bytes, and how many in one move."""


@dataclass(frozen=True, slots=True)
class Move:
    """The next thing to do to the balloon: grow it (`by` > 0), shrink it (`by` < 0), or nothing (0)."""

    by: int


SETTLED = Move(0)


def comfortable_headroom(space: Space) -> int:
    """Metadata bytes that should fit without a new chunk: 1/32 of the filesystem, 16 to 64 MiB."""
    return min(max(space.size // 32, 16 * MIB), 64 * MIB)


def least_headroom(space: Space) -> int:
    """Below this the balloon gives a chunk back: early enough that a balance still finds room to work in.

    Metadata must not run out altogether: symlink(2) then aborts the transaction, and the filesystem goes read-only
    (measured on Linux 6.18, fs/btrfs/inode.c, btrfs_symlink).
    """
    return comfortable_headroom(space) // 2


def cramped(space: Space) -> bool:
    """True when metadata lies in chunks as small as mkfs made them, and little enough to be moved to a usual one."""
    return (
        not space.mixed
        and not space.read_only
        and space.exclusive_operation == "none"
        and space.metadata_headroom < comfortable_headroom(space)
        and space.metadata_used - space.metadata_readonly <= CRAMPED_MOST
    )


def metadata_claim(space: Space) -> int:
    """Unallocated bytes to leave for the next metadata chunk; 0 while there is headroom."""
    if space.mixed:
        # Data and metadata share chunks: what metadata may need is left free inside them.
        return min(max(2 * space.global_reserve, comfortable_headroom(space)), space.data_chunk // 2)
    if space.metadata_headroom >= comfortable_headroom(space):
        return 0
    return min(space.metadata_chunk * space.metadata_copies, space.data_chunk) // 2


def allowance(reported_free: int, reserve: int) -> int:
    """What applications may still write when the host says `reported_free`: never less protective than upstream."""
    return max(reported_free - reserve, 0)


def goal(space: Space, limit: int) -> int:
    """Down to what `space.available` is taken for `limit`, both in logical bytes.

    It is given back only up to the limit: what metadata is left would otherwise be given to data again and again. In
    shared chunks it is a part of the limit; there is no way to keep data out of it.
    """
    claim = metadata_claim(space)
    return max(limit, claim) if space.mixed else limit + claim // space.data_copies


def slack(space: Space) -> int:
    """By how much `space.available` may be above the limit: a data chunk only where metadata needs room for a chunk."""
    return space.data_chunk if metadata_claim(space) else min(IDLE_SLACK, space.data_chunk)


def ceiling(space: Space, limit: int) -> int:
    """The most `space.available` may be for the promise to hold."""
    return limit + slack(space) + LEAST_ROOM


def due_again(space: Space, limit: int) -> bool:
    """True when so much more than `limit` is available that the balloon must be inflated without a new report.

    A data chunk that was given up for metadata is not taken back while metadata waits for it.
    """
    if space.metadata_headroom < least_headroom(space) and not space.mixed:
        return space.available > ceiling(space, limit) + TOLERANCE
    return space.available > max(goal(space, limit), limit + min(IDLE_SLACK, space.data_chunk)) + TOLERANCE


def next_move(space: Space, held: int, limit: int) -> Move:
    """The next move towards `limit` for a balloon that holds `held` bytes. Call again with new facts after it.

    Shapes: all logical bytes. The moves converge: each inflation is at most what is missing, the last chunks one by
    one.
    What is read-only for the moment cannot be taken, and is not tried.
    """
    short = limit - space.available
    if short > TOLERANCE:
        give = min(-(-short // SECTOR) * SECTOR, held)
        return Move(-give) if give else SETTLED
    missing = min(space.available - goal(space, limit), space.takeable)
    if missing < SECTOR:
        return SETTLED
    free = space.data_free
    if missing <= free:
        return Move(_sectors(missing))
    chunk = space.data_chunk
    # A chunk more would be allocated: does the room for metadata allow it?
    claim = metadata_claim(space)
    eaten = space.unallocated - chunk * space.data_copies < claim
    if claim and eaten and space.available - free <= ceiling(space, limit):
        return Move(_sectors(free)) if free >= SECTOR else SETTLED
    if missing > free + 2 * chunk:
        return Move(_sectors(missing - 2 * chunk))
    if free >= SECTOR:
        return Move(_sectors(free))
    return Move(_sectors(min(missing, chunk)))


def pieces(size: int, rooms: Iterable[int]) -> tuple[list[int], int]:
    """What to ask for, one after the other, to fill `size` bytes of pieces of free room, and what that leaves.

    Each is the largest that is left, or all that is still wanted: it fits nowhere but where it is meant to be, or
    there for certain.
    """
    ordered = sorted(room for room in rooms if room >= WORTH_A_PIECE)
    asked: list[int] = []
    while ordered and size >= SECTOR and len(asked) < MOST_PIECES:
        asked.append(_sectors(min(ordered.pop(), size)))
        size -= asked[-1]
    return asked, size


def relief_near(space: Space, held: int) -> bool:
    """True when metadata should have more room of what the balloon holds, as long as the grant pays for it.

    Early: where metadata has run out, handing a chunk back takes the kernel half a minute.
    """
    if not held or space.mixed:
        return False
    return space.metadata_headroom + space.unallocated // space.metadata_copies < comfortable_headroom(space)


def relief_due(space: Space, held: int) -> bool:
    """True when metadata is about to run out while the balloon holds room it could have, and would take it soon.

    The kernel allocates a metadata chunk when a reservation fails, and not before four fifths of the present ones are
    used (should_alloc_chunk, fs/btrfs/block-group.c). Before that, data would get there first.
    """
    if not held or space.mixed:
        return False
    reach = space.metadata_headroom + space.unallocated // space.metadata_copies
    if reach >= least_headroom(space):
        return False
    return space.metadata_used * 5 >= space.metadata_total * 4 or space.metadata_headroom < least_headroom(space) // 2


def losing_a_chunk(space: Space) -> bool:
    """True while the kernel takes an empty metadata chunk away: its room is read-only until everybody can have it.

    What superblock copies cover counts as read-only for ever, three stripes of 64 KiB at most (exclude_super_stripes,
    fs/btrfs/block-group.c).
    """
    return space.metadata_readonly > MOST_SUPERBLOCKS


def tight(space: Space, headroom: int | None = None) -> bool:
    """True when metadata could run out within a second of a storm of small files: look often.

    `headroom` is a newer value than that of `space`.
    """
    now = space.metadata_headroom if headroom is None else headroom
    return not space.mixed and now < 2 * comfortable_headroom(space)


def calm(space: Space, headroom: int) -> bool:
    """True when metadata could not run out within some seconds, so that looking seldom is enough."""
    return not space.mixed and headroom >= 4 * comfortable_headroom(space)


def relief_size(space: Space, chunk: int) -> int:
    """Host bytes that metadata can grow by when a data chunk of `chunk` bytes becomes unallocated."""
    return min(chunk * space.data_copies, space.metadata_chunk * space.metadata_copies)


def relief_allowed(size: int, left: int, owed: int, reserve: int) -> bool:
    """True when metadata may have `size` host bytes more: out of what is `left` of the grant, or else of the reserve.

    Beyond the grant it is at most half of the host's reserve in all; `owed` was taken before and not granted since.
    """
    return size <= left or owed + size <= reserve // 2


def _sectors(size: int) -> int:
    return size // SECTOR * SECTOR
