"""Brings the balloon to where it must be, and says so only when it is true.

Blocking; run it off the event loop. One lock serialises it with the resize runner, which borrows the balloon.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from storaged.balloon import target
from storaged.core.model import Space
from storaged.core.ports import BalloonFile, Filesystem
from storaged.errors import FilesystemError, Kind
from storaged.resize.fit import LEAST_MARGIN
from storaged.resize.layout import Chunk, Layout, Longest, holes, with_balloon
from storaged.units import MIB, SECTOR, format_size

MOST_MOVES = 64
"""Moves per call: an idle filesystem needs under ten; a writer that never pauses must not hold us for ever."""
BUSY_WAIT_S = 2.0
CLEANER_WAIT_S = 1.0
ENOUGH_OF_A_CHUNK = 0.5
"""Where less is left, the kernel makes a smaller chunk."""
BUSY_POLL_S = 0.02
WORTH_A_TRIM = 4 * MIB
WORTH_A_COMMIT = 4 * MIB
WORTH_EASING = 8 * MIB
KEEP_MORE = 16 * MIB
"""Beyond what has yet to move, for what does not fit together exactly."""
MOST_TRIMS = 4
"""Per call: a guest that never stops deleting must not hold us for ever."""


Allowed = Callable[[Space], int]
"""Bytes that applications may still write, at the moment at which the space was looked at."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one call did: bytes the balloon holds, and the space that leaves."""

    size: int
    space: Space
    inflated: int
    deflated: int
    again: bool = False
    """It is within the slack, but the kernel may hold a chunk that it will give back: hold again soon."""


class BalloonEngine:
    """Owns the balloon file of one filesystem."""

    def __init__(self, filesystem: Filesystem, balloon: BalloonFile) -> None:
        self._fs = filesystem
        self._balloon = balloon
        self.lock = threading.RLock()
        """Held by whoever moves the balloon; the resize runner holds it during each of its steps."""
        self.inflated_total = 0
        self.deflated_total = 0
        self.target = 0
        self._left_out = 0
        """Freed bytes that the last trim of this call left out, because it would have held them back."""
        self._spent_then: int | None = None
        """What applications had written when the host last said what they may write; None: nobody knows."""
        self._said = 0
        """What the host said then, in bytes."""

    def size(self) -> int:
        """Bytes the balloon holds now."""
        return self._balloon.size()

    def prepare(self) -> str:
        """Give a new filesystem's metadata a chunk of the usual size while there is room; says what it did.

        mkfs makes metadata chunks as small as 8 MiB (single profile), of which the kernel keeps 5 to 7 MiB in
        reserve: with the balloon over the rest, not even a directory could be made.
        """
        with self.lock:
            return self._widen_metadata(2.0)

    def _widen_metadata(self, spare: float) -> str:
        """Where metadata is cramped and `spare` times a new chunk is unallocated; says what it did."""
        space = self._fs.space()
        wanted = space.metadata_chunk * space.metadata_copies
        if not target.cramped(space) or space.unallocated < spare * wanted:
            return ""
        layout = self._fs.layout()
        better = max(space.metadata_total, space.metadata_used + space.global_reserve) + LEAST_MARGIN
        if max(holes(layout.chunks, layout.size), default=0) < better * space.metadata_copies:
            return ""  # in pieces: what moves would find smaller chunks than it has, or none
        self._fs.grow_metadata()
        total = self._fs.space().metadata_total
        return f"metadata chunks grown from {format_size(space.metadata_total)} to {format_size(total)}"

    def _make_room_for_metadata(self, space: Space) -> None:
        """Before the balloon takes the rest: data that came and went may have taken all chunks before `prepare`."""
        if not target.cramped(space):
            return
        wanted = ENOUGH_OF_A_CHUNK * space.metadata_chunk * space.metadata_copies
        if space.unallocated < wanted and space.data_free >= 2 * space.data_chunk:
            self._hand_back_chunks()
            # Where metadata is so full that no balance may run, the kernel's cleaner does it after a commit.
            until = time.monotonic() + CLEANER_WAIT_S
            while self._fs.space().unallocated < wanted and time.monotonic() < until:
                time.sleep(BUSY_POLL_S)
        with contextlib.suppress(FilesystemError):  # busy, or no room for it: metadata is looked after as it grows
            self._widen_metadata(ENOUGH_OF_A_CHUNK)

    def hold(self, limit: int | None, *, fresh: bool = True) -> Held:
        """Size the balloon so that applications can write `limit` bytes; None gives everything back.

        `fresh`: the host has just said so. Otherwise it said so some time ago, and what applications have written
        since counts against it; where nobody knows how much that is, nothing is given back.
        Returns when it is so and committed. Raises FilesystemError with the reason when it cannot be.
        """
        with self.lock:
            if limit is None:
                return self._release()
            if not fresh:
                self._fs.sync()  # until then what was freed counts as spent
                return self._settle(partial(self._left_of, limit), may_give=self._spent_then is not None)
            self._spent_then, self._said = self._spent(self._fs.space()), limit
            held = self._settle(lambda _: limit, may_give=True)
            self._spent_then = self._spent(held.space)
            return held

    def _left_of(self, limit: int, space: Space) -> int:
        """What of `limit` applications may still write at the moment of `space`; all where nobody knows.

        They may go on while we work. It is never more than `limit`, also when they have deleted.
        """
        if self._spent_then is None:
            return limit
        return min(max(limit - (self._spent(space) - self._spent_then), 0), limit)

    def _spent(self, space: Space) -> int:
        """Bytes that are not the balloon's, of data and of metadata."""
        metadata = (space.metadata_used - space.metadata_readonly) * space.metadata_copies
        return space.data_used - self._balloon.size() + metadata

    def guard(self, reserve: int, spent: int) -> tuple[int, bool]:
        """Give a chunk to metadata if it is about to run out: empty ones first, then one of the balloon's.

        Returns the bytes that the balloon gave up, and whether to look again soon.
        """
        with self.lock:
            space = self._fs.space()
            if self._balloon.size() and target.cramped(space):
                with contextlib.suppress(FilesystemError):
                    self._widen_metadata(ENOUGH_OF_A_CHUNK)
                space = self._fs.space()
            if space.exclusive_operation != "none" or not target.relief_due(space, self._balloon.size()):
                return 0, target.tight(space)
            if space.data_free >= space.data_chunk:
                self._hand_back_chunks()
                space = self._fs.space()
                if not target.relief_due(space, self._balloon.size()):
                    return 0, True
            budget = target.relief_budget(space, reserve, spent)
            owned = [c for c in self.layout().chunks if c.vacant and c.kind == "data" and 0 < c.balloon <= budget]
            if not owned:
                return 0, True
            chunk = max(owned, key=lambda c: c.balloon)
            given = self._balloon.vacate([(chunk.logical, chunk.length)])
            self.deflated_total += given
            self._fs.sync()
            self._hand_back_chunks()
            with contextlib.suppress(FilesystemError):  # else a writer of data is soon there, and takes it
                self._widen_metadata(ENOUGH_OF_A_CHUNK)
            return given, True

    def layout(self) -> Layout:
        """The filesystem's chunks with the balloon's share counted in."""
        layout = self._fs.layout()
        if not self._balloon.size():
            return layout
        return replace(layout, chunks=with_balloon(layout.chunks, self._balloon.extents()))

    def longest(self) -> Longest:
        """A function that tells the longest extent of a chunk that is not the balloon's."""
        ours = sorted(self._balloon.extents())
        starts = [start for start, _ in ours]

        def longest(chunk: Chunk) -> int:
            most = 0
            for start, length in self._fs.data_extents(chunk.logical, chunk.length):
                index = bisect.bisect_right(starts, start) - 1
                if index >= 0 and start < ours[index][0] + ours[index][1]:
                    continue
                most = max(most, length)
            return most

        return longest

    def yield_room(self, size: int, chunks: Iterable[Chunk]) -> int:
        """Give at least `size` bytes of `chunks` back for what moves there, in the longest pieces; bytes given.

        Whole extents go. One that is just long enough is better than a longer one: others could take the rest.
        """
        with self.lock:
            pieces = sorted(piece for _, own in self._pieces(chunks) for piece in own)
            enough = [piece for piece in pieces if piece[0] >= size]
            given = 0
            for length, start in [enough[0]] if enough else reversed(pieces):
                if given >= size:
                    break
                given += self._balloon.vacate([(start, length)])
            return self._given(given)

    def _pieces(self, chunks: Iterable[Chunk]) -> list[tuple[Chunk, list[tuple[int, int]]]]:
        """The balloon's extents in each of `chunks`, shortest first: (length, logical start); asked for once."""
        extents = self._balloon.extents()
        return [
            (c, sorted((length, start) for start, length in extents if c.logical <= start < c.logical + c.length))
            for c in chunks
            if c.balloon
        ]

    def _given(self, size: int) -> int:
        self.deflated_total += size
        if size:
            self._fs.sync()
        return size

    def ease(self, target: int, keep: int) -> int:
        """Give back what a shrink to `target` bytes has cut away from what applications may write; bytes given.

        Of what stays below `target`, room is left for `keep` bytes that have to move there, and a piece in every chunk
        that would be empty without: as a hole it is not the same room. Then what is cut away next; nothing that lies
        below what has yet to move, for it might attract that, which then moves twice. Nothing is taken.
        """
        with self.lock:
            short = self._short()
            if keep:  # the next step gives as much, until it has cut that away
                short -= self._fs.space().data_chunk
            if short < WORTH_EASING:
                return 0
            chunks = self.layout().chunks
            staying = [chunk for chunk in chunks if chunk.balloon and chunk.top <= target]
            moves = max((chunk.top for chunk in chunks if not chunk.vacant), default=0)
            next_cut = [chunk for chunk in chunks if chunk.balloon and chunk.top > target and chunk.top >= moves]
            spare = sum(chunk.balloon for chunk in staying) - keep - KEEP_MORE
            given = self._give_at_most(min(short, spare), staying, leave=True)
            given += self._give_at_most(short - given, next_cut, leave=False)
            return self._given(given)

    def _give_at_most(self, size: int, chunks: Iterable[Chunk], *, leave: bool) -> int:
        """Whole extents, the longest first; bytes given, not yet free. `leave`: no chunk gets empty."""
        pieces = []
        for chunk, own in self._pieces(chunks):
            pieces += own[1:] if leave and chunk.vacant else own
        given = 0
        for length, start in sorted(pieces, reverse=True):
            if length <= size - given:
                given += self._balloon.vacate([(start, length)])
        return given

    def _short(self) -> int:
        """Bytes that applications lack of what the host's last word allows, because the balloon holds them."""
        if self._spent_then is None or not self._balloon.size():
            return 0  # nobody has said anything yet, or there is nothing to give
        space = self._fs.space()
        return -goal_gap(space, self._left_of(self._said, space))

    def vacate(self, chunks: Iterable[Chunk]) -> int:
        """Let the balloon go out of `chunks`, for a resize that is about to cut them away; bytes given back."""
        with self.lock:
            return self._given(self._balloon.vacate([(chunk.logical, chunk.length) for chunk in chunks]))

    def anchor(self, layout: Layout, size: int) -> None:
        """Hold one sector where a data chunk of `layout` goes above `size` and nobody else holds any data.

        The kernel makes a new data chunk before it cuts one away while no data is used at all, and may find no room
        (btrfs_may_alloc_data_chunk, fs/btrfs/volumes.c); the least bit of it will do. The next `hold` takes care of
        what is left.
        """
        data = [chunk for chunk in layout.chunks if chunk.kind == "data"]
        if any(chunk.held for chunk in data) or all(chunk.top <= size for chunk in data):
            return
        with self.lock, contextlib.suppress(FilesystemError):  # without it the kernel says why not
            if not self._balloon.size():
                self._balloon.extend(SECTOR)
                self._fs.sync()

    def _release(self) -> Held:
        held = self._balloon.size()
        self.target = 0
        self._spent_then = None
        self._balloon.remove()
        self._fs.sync()
        self.deflated_total += held
        return Held(0, self._fs.space(), 0, held)

    def _settle(self, allowed: Allowed, *, may_give: bool) -> Held:
        before = (self.inflated_total, self.deflated_total)
        self._left_out = 0
        space = self._fs.space()
        if target.next_move(space, self._balloon.size(), allowed(space)).by > 0:
            self._make_room_for_metadata(space)
        for committed in (False, True, True):
            self._approach(allowed, may_give=may_give and committed)
            # Only a commit makes it durable, f_bavail true, and everything count that was deleted a moment ago.
            self._fs.sync()
            space = self._fs.space()
            by = target.next_move(space, self._balloon.size(), allowed(space)).by
            if by == 0 or (by > 0 and _moves_chunks(space)) or (by < 0 and not may_give):
                break
        return self._checked(allowed, self.inflated_total - before[0], self.deflated_total - before[1])

    def _approach(self, allowed: Allowed, *, may_give: bool) -> None:
        """Move until nothing is left to do by the kernel's present account.

        Before a commit nothing is given: what was just deleted still counts as used, so it would be too much.
        """
        looked = 0
        space = self._fs.space()
        if space.read_only:
            raise FilesystemError("the filesystem is read-only", errno.EROFS, Kind.PRECONDITION)
        most = space.size  # the largest inflation that is still worth trying after an ENOSPC
        for _ in range(MOST_MOVES):
            held, limit = self._balloon.size(), allowed(space)
            by = min(target.next_move(space, held, limit).by, most)
            self.target = max(held + goal_gap(space, limit), 0)
            if by > 0 and space.exclusive_operation != "none":
                if space.available <= target.ceiling(space, limit):
                    return
                space = self._wait_while_busy()
                continue
            if by == 0 or most < SECTOR or (by < 0 and not may_give):
                return
            if by > 0 and looked < MOST_TRIMS and self._hand_back_freed(space):
                looked += 1
            elif by > 0:
                pieces = self._fitting(by, space, limit)
                try:
                    for piece in pieces:
                        self._balloon.extend(piece)
                        self.inflated_total += piece
                except FilesystemError as error:
                    most = self._after_refusal(error, by, space, limit)
                else:
                    if sum(pieces) < by:
                        return
            else:
                held = self._balloon.size()
                self._balloon.shrink(-by)
                self.deflated_total += held - self._balloon.size()  # whole extents: it may be more than was asked
                self._fs.sync()  # until then the kernel counts it as used
            space = self._fs.space()

    def _fitting(self, size: int, space: Space, limit: int) -> list[int]:
        """What to ask for so that the next metadata chunk keeps its room; less than `size` where that is enough.

        For a piece that fits nowhere whole the kernel makes a new data chunk, though there is room for it in all
        (find_free_extent, fs/btrfs/extent-tree.c). The promise to the host goes first: what it needs is taken anyway.
        """
        if size > space.data_free or space.mixed or not target.metadata_claim(space):
            return [size]
        self._fs.sync()  # until then the kernel tells of room that is taken
        rooms = [room for chunk in self._fs.layout().chunks for room in chunk.rooms]
        pieces, left = target.pieces(size, rooms)
        must = space.available - (size - left) > target.ceiling(space, limit)
        return [*pieces, left] if left and must else pieces

    def _checked(self, allowed: Allowed, inflated: int, deflated: int) -> Held:
        """What was done, once it is seen to be enough."""
        space = self._fs.space()
        limit = allowed(space)
        if space.available > target.ceiling(space, limit):
            raise FilesystemError(
                f"applications can still write {space.available} bytes, {limit} are allowed;"
                " the kernel gives the balloon no more room",
                errno.ENOSPC,
            )
        held = self._balloon.size()
        if deflated and target.relief_due(space, held + deflated):
            self._hand_back_chunks()
        # A balance hides the chunk that it empties, the cleaner one that it deletes, and it begins after our commit.
        again = _moves_chunks(space) and target.next_move(space, held, limit).by > 0
        again = again or (bool(held) and (inflated > target.TOLERANCE or target.losing_a_chunk(space)))
        return Held(held, space, inflated, deflated, again)

    def _wait_while_busy(self) -> Space:
        """The space once the kernel's exclusive operation is over: its own chunk reclaim and ours take milliseconds.

        Nothing is taken meanwhile: it would be copied, which writes to the host. Raises when it takes longer.
        """
        until = time.monotonic() + BUSY_WAIT_S
        while (space := self._fs.space()).exclusive_operation != "none":
            paused = "paused" in space.exclusive_operation
            if paused or time.monotonic() >= until:
                text = f"the kernel is busy with an exclusive operation ({space.exclusive_operation})"
                raise FilesystemError(text, errno.EBUSY, Kind.BUSY)
            time.sleep(BUSY_POLL_S)
        return space

    def _hand_back_freed(self, space: Space) -> bool:
        """Freed blocks on their way to the host before the balloon lies over them; False when there are none.

        What is freed but not yet discarded would stay allocated on the host for as long as the balloon holds it.
        """
        if space.data_pinned >= WORTH_A_COMMIT:
            self._fs.sync()
            return True
        queued = self._fs.untrimmed()
        if queued is None or queued - self._left_out < WORTH_A_TRIM or not self._fs.discard_supported():
            return False
        self._fs.trim()
        self._left_out = self._fs.untrimmed() or 0
        return True

    def _after_refusal(self, error: FilesystemError, tried: int, space: Space, limit: int) -> int:
        """What to try next after the kernel refused `tried` bytes; raises when the reason is not lack of room."""
        if error.errno != errno.ENOSPC:
            raise FilesystemError(f"the balloon could not take {tried} bytes: {error.message}", error.errno)
        if space.available <= target.ceiling(space, limit):
            return 0  # close enough: what is missing is less than the slack
        self._fs.sync()
        return tried // 2

    def _hand_back_chunks(self) -> None:
        """After a deflation with metadata short: the room is wanted now, not when the cleaner comes by."""
        try:
            self._fs.reclaim_empty_chunks()
        except FilesystemError:
            self._fs.sync()  # no room even for that: the next commit wakes the kernel's cleaner


def _moves_chunks(space: Space) -> bool:
    """True while an exclusive operation is at work."""
    return space.exclusive_operation != "none" and "paused" not in space.exclusive_operation


def goal_gap(space: Space, limit: int) -> int:
    """Bytes the balloon still lacks (positive) or holds too many (negative) for `limit`."""
    return space.available - target.goal(space, limit)
