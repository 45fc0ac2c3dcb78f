"""Brings the balloon to where it must be, and says so only when it is true.

Blocking; run it off the event loop. One lock serialises it with the resize runner, which borrows the balloon.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from storaged.balloon import grant as gr
from storaged.balloon import target
from storaged.balloon.grant import Grant
from storaged.balloon.metadata import MetadataCare
from storaged.core.model import Space, Unwritten
from storaged.core.ports import BalloonFile, Filesystem, Preallocated
from storaged.errors import FilesystemError, Kind
from storaged.resize.layout import Chunk, Layout, Longest
from storaged.units import GIB, MIB, SECTOR, format_size

MOST_MOVES = 64
"""Moves per call: an idle filesystem needs under ten; bounds one call under continuous writes."""
MOST_AT_ONCE = 256 * GIB
"""Bytes of one inflation, so that a newer limit need not wait for all of it."""
BUSY_WAIT_S = 2.0
BUSY_POLL_S = 0.02
LOOK_PATIENCE_S = 0.5
"""How long a report waits for the count of preallocated extents: milliseconds unless very much has changed."""
WORTH_A_TRIM = 4 * MIB
WORTH_A_COMMIT = 4 * MIB
WORTH_EASING = 8 * MIB
KEEP_MORE = 16 * MIB
"""Beyond what has yet to move, for what does not fit together exactly."""
MOST_TRIMS = 4
"""Trims per call; bounds one call under continuous deletions."""
PINNED = (
    "giving back {} of the balloon freed only {}: a snapshot or a copy of its files holds the extents;"
    " delete it to get the space back"
)


@dataclass(frozen=True, slots=True)
class Held:
    """What one call did: bytes the balloon holds, and the space that leaves."""

    size: int
    space: Space
    inflated: int
    deflated: int
    again: bool = False
    """It is within the slack, but more will be known or free soon: hold again."""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one sample between reports found and did."""

    size: int
    space: Space
    relief: int = 0
    tight: bool = False
    warning: str = ""


class Superseded(FilesystemError):
    """A newer limit is to be held: this one was given up on the way."""

    def __init__(self) -> None:
        super().__init__("a newer limit has come", errno.EAGAIN, Kind.BUSY)


class BalloonEngine:
    """Owns the balloon file of one filesystem."""

    def __init__(self, filesystem: Filesystem, balloon: BalloonFile, preallocated: Preallocated) -> None:
        self._fs = filesystem
        self._balloon = balloon
        self._preallocated = preallocated
        self._metadata = MetadataCare(filesystem, balloon)
        self.lock = threading.RLock()
        """Held while the balloon moves or a balance starts; by the resize runner during each of its steps."""
        self.superseded = threading.Event()
        """Set while a newer limit waits: inflating many TiB takes the kernel longer than a host waits."""
        self.inflated_total = 0
        self.deflated_total = 0
        self.target = 0
        self.unwritten = Unwritten(0, known=False)
        """The last count of applications' preallocated, unwritten extents."""
        self._excess = 0
        """Host bytes that have become unwritten since the report without taking free room."""
        self._held = 0
        """Bytes of the balloon as of the last call; for samples, which must be cheap."""
        self._left_out = 0
        """Freed bytes that the last trim of this call left out, because it would have held them back."""
        self._grant: Grant | None = None
        self._owed = 0
        """Host bytes taken beyond the grants, until a report grants as much again."""
        self._data_then = 0
        self._metadata_total = 0
        self._refused = False

    @property
    def grant(self) -> Grant | None:
        """The host's last report as it is kept; None before the first, and after a release."""
        return self._grant

    def size(self) -> int:
        """Bytes the balloon holds now."""
        return self._balloon.size()

    def count(self, patience_s: float) -> None:
        """Count the preallocated, unwritten extents; the grant stays as it is."""
        grant = self._grant
        self.unwritten = seen = self._preallocated.look(self._balloon.root_id, patience_s)
        if grant is None or not seen.known:
            return
        space = self._fs.space()
        excess = gr.unexplained(grant, self._spent(space), seen.size * space.data_copies)
        if grant is self._grant:
            self._excess = excess

    def reach(self, space: Space) -> int:
        """Host bytes that the guest can still take, by any kind of write: data, preallocated extents, metadata."""
        unwritten = self._bounded(self.unwritten, space, self._held)
        metadata = 0 if space.mixed else max(space.metadata_total - space.metadata_used, 0) * space.metadata_copies
        return space.available * space.data_copies + unwritten + metadata

    def potential(self, space: Space) -> int:
        """Host bytes that the guest holds and can still take. Writing does not change it, only the balloon does.

        It is of the moment at which the balloon changed last, also where `space` is older: what the balloon takes is
        used and no longer available. A `space` from before a shrink tells too little.
        """
        metadata = 0 if space.mixed else space.metadata_total * space.metadata_copies
        return max(self._data(space, self._held) + space.available * space.data_copies, 0) + metadata

    def prepare(self) -> str:
        """Give a new filesystem's metadata a chunk of the usual size while there is room; says what it did.

        mkfs makes metadata chunks as small as 8 MiB (single profile), of which the kernel keeps 5 to 7 MiB in
        reserve: with the balloon over the rest, not even a directory could be made.
        """
        with self.lock:
            self._held = self._balloon.size()
            return self._metadata.widen(2.0)

    def hold(self, limit: int | None, *, fresh: bool = True) -> Held:
        """Size the balloon so that no more than `limit` bytes can still reach the host; None gives everything back.

        `fresh`: the host has just said so. Otherwise it said so some time ago, and what applications have written
        since counts against it; where nobody knows how much that is, nothing is given back. A limit that is newer
        takes its place, also that of None.
        Returns when it is so and committed. Raises FilesystemError with the reason when it cannot be.
        """
        with self.lock:
            try:
                if limit is None and (fresh or self._grant is None):
                    return self._release()
                if fresh and limit is not None:
                    self._granted(limit)
                else:
                    self._fs.sync()  # until then what was freed counts as spent
                    self._count_again(limit)
                return self._settle(fresh=fresh)
            finally:
                self._held = self._size_or(self._held)

    def _size_or(self, last: int) -> int:
        try:
            return self._balloon.size()
        except (FilesystemError, OSError):
            return last

    def _granted(self, limit: int) -> None:
        """The host has said `limit`. What is preallocated is counted after what is used: what changes counts twice."""
        space = self._fs.space()
        self._see_metadata(space)
        self._owed = 0 if limit >= (beyond := self._beyond(space)) else beyond
        self._data_then = self._data(space)
        self._refused = False
        spent, written = self._spent(space), self._fs.device_written()
        unwritten, known = self._unwritten(space, LOOK_PATIENCE_S)
        self._grant = Grant(limit, spent, unwritten, known, written)
        self._excess = 0

    def _count_again(self, limit: int | None) -> None:
        """What is preallocated, where that was not known yet or stands in the way."""
        grant = self._grant
        if limit is not None and (grant is None or grant.spent is None):  # after a restart: nothing is given back
            unwritten, known = self._unwritten(self._fs.space(), LOOK_PATIENCE_S if grant is None else 0)
            self._grant = Grant(limit, None, unwritten if known else 0, known)
        elif grant is not None and (not grant.known or grant.overcommitted):
            space = self._fs.space()
            spent, written = self._spent(space), self._fs.device_written()
            unwritten, known = self._unwritten(space, 0)
            if known:
                self._grant = gr.counted_again(grant, spent, unwritten, device_written=written)
                self._excess = 0

    def _unwritten(self, space: Space, patience_s: float) -> tuple[int, bool]:
        """Host bytes of preallocated, unwritten extents and whether that is known; else the most it can be."""
        self.count(patience_s)
        return self._bounded(self.unwritten, space, self._balloon.size()), self.unwritten.known

    def _bounded(self, seen: Unwritten, space: Space, held: int) -> int:
        return (seen.size if seen.known else max(space.data_used - held, 0)) * space.data_copies

    def _left(self, space: Space, held: int | None = None) -> int:
        """Host bytes of the grant that may still be free at the moment of `space`."""
        return max(gr.left(self._grant, self._spent(space, held)) - self._excess, 0) if self._grant is not None else 0

    def _allowed(self, space: Space) -> int:
        """The same as bytes of data that applications may write."""
        return self._left(space) // space.data_copies

    def _spent(self, space: Space, held: int | None = None) -> int:
        """Host bytes that are not the balloon's, of data and of metadata; `held` where its size is known."""
        metadata = 0 if space.mixed else (space.metadata_used - space.metadata_readonly) * space.metadata_copies
        return self._data(space, held) + metadata

    def _data(self, space: Space, held: int | None = None) -> int:
        """Host bytes of applications' data."""
        held = self._balloon.size() if held is None else held
        return (space.data_used - held) * space.data_copies

    def _see_metadata(self, space: Space) -> None:
        """New chunks for metadata are paid by what is left of the grant, or they are owed."""
        last, self._metadata_total = self._metadata_total, space.metadata_total
        grown = (space.metadata_total - last) * space.metadata_copies if last else 0
        if grown > 0 and grown > self._left(space) and not space.mixed:
            self._owed += grown

    def _beyond(self, space: Space) -> int:
        """Host bytes taken beyond the grants: chunks for metadata, and data that was as fast as they were."""
        free = self._grant.free if self._grant is not None else 0
        return self._owed + max(self._data(space) - self._data_then - free, 0)

    def must_act(self, space: Space) -> bool:
        """True when more is available than is left of the grant, or metadata runs out; costs no system call."""
        if target.relief_near(space, self._held) or (self._held and target.cramped(space)):
            return True
        return self._exceeds(space)

    def _exceeds(self, space: Space) -> bool:
        """True when clearly more is available than is left of the grant."""
        if self._grant is None or space.read_only or space.exclusive_operation != "none":
            return False
        return target.due_again(space, self._left(space, self._held) // space.data_copies)

    def sample(self, reserve: int, *, adjust: bool) -> Sampled:
        """Between reports: give metadata its next chunk if it runs out; take what has become available (`adjust`).

        `reserve` is the host's, in bytes.
        """
        with self.lock:
            space = self._fs.space()
            self._see_metadata(space)
            relief = self._metadata.relieve(self._left(space), self._beyond(space), reserve)
            self.deflated_total += relief.given
            warning = ""
            if relief.refused and not self._refused:
                warning = (
                    f"metadata is nearly full ({format_size(max(space.metadata_headroom, 0))} left), and what the host"
                    " grants is used up: files cannot be created until space is freed on the host or in the guest"
                )
            self._refused = relief.refused
            self._held = self._size_or(self._held)
            space = self._fs.space()
            self._see_metadata(space)
            if adjust and self._exceeds(space):
                self._settle(fresh=False, giving=False)
                self._held = self._size_or(self._held)
                space = self._fs.space()
            return Sampled(self._held, space, relief.given, bool(relief.given) or target.tight(space), warning)

    def layout(self) -> Layout:
        """The filesystem's chunks with the balloon's share counted in."""
        return self._metadata.layout()

    def reclaim(self) -> None:
        """Hand empty data chunks back, never while the balloon inflates into them."""
        with self.lock:
            self._fs.reclaim_empty_chunks()

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
        """Bytes that applications lack of what the host's last report allows, because the balloon holds them."""
        if self._grant is None or self._grant.spent is None or not self._balloon.size():
            return 0  # nothing is known of any, or there is nothing to give
        space = self._fs.space()
        return self._allowed(space) - space.available

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
        self._grant = None
        self._owed = 0
        self._balloon.remove()
        self._fs.sync()
        self.deflated_total += held
        return Held(0, self._fs.space(), 0, held)

    def _settle(self, *, fresh: bool, giving: bool = True) -> Held:
        """Move the balloon to the grant, and see that it is there; `giving` False only takes."""
        before = (self.inflated_total, self.deflated_total)
        may_give = giving and self._grant is not None and self._grant.spent is not None
        warning = ""
        self._left_out = 0
        space = self._fs.space()
        if target.next_move(space, self._balloon.size(), self._allowed(space)).by > 0:
            self._metadata.make_room(space)
        for round_ in range(3):
            warning = self._approach(may_give=may_give and bool(round_)) or warning
            # Only a commit makes it durable, f_bavail true, and everything count that was deleted a moment ago.
            self._fs.sync()
            space = self._fs.space()
            if fresh and not round_ and self._grant is not None:
                self._grant = gr.committed(self._grant, self._spent(space))
            by = target.next_move(space, self._balloon.size(), self._allowed(space)).by
            if by == 0 or (by > 0 and _moves_chunks(space)) or (by < 0 and not may_give) or warning:
                break
        if giving and self._grant is not None:
            self._check_unwritten(self._grant)
        return self._checked(self.inflated_total - before[0], self.deflated_total - before[1], warning)

    def _approach(self, *, may_give: bool) -> str:
        """Move until nothing is left to do by the kernel's present account; a warning, or empty.

        Before a commit nothing is given: what was just deleted still counts as used, so it would be too much.
        """
        trims = 0
        space = self._fs.space()
        if space.read_only:
            raise FilesystemError("the filesystem is read-only", errno.EROFS, Kind.PRECONDITION)
        most = space.size  # the largest inflation that is still worth trying after an ENOSPC
        until = time.monotonic() + BUSY_WAIT_S
        for _ in range(MOST_MOVES):
            if self.superseded.is_set():
                raise Superseded
            held, limit = self._balloon.size(), self._allowed(space)
            by = min(target.next_move(space, held, limit).by, most, max(MOST_AT_ONCE, space.size // 32))
            self.target = max(held + goal_gap(space, limit), 0)
            over = space.available > target.ceiling(space, limit)
            if over and (space.exclusive_operation != "none" if by > 0 else space.data_readonly and not by):
                if by <= 0 and time.monotonic() >= until:
                    return ""  # `_checked` says so
                space = self._wait_while_busy() if by > 0 else self._a_moment_later()
                continue
            if (
                by == 0
                or most < SECTOR
                or (by < 0 and not may_give)
                or (by > 0 and space.exclusive_operation != "none")
            ):
                return ""
            if by > 0 and trims < MOST_TRIMS and self._hand_back_freed(space):
                trims += 1
            elif by > 0:
                most, done = self._take(by, space, limit, most)
                if done:
                    return ""
            elif warning := self._give_back(-by, space):
                return warning
            space = self._fs.space()
        return ""

    def _a_moment_later(self) -> Space:
        """The kernel's cleaner keeps a chunk read-only for milliseconds, a scrub for as long as it reads it."""
        time.sleep(BUSY_POLL_S)
        return self._fs.space()

    def _take(self, size: int, space: Space, limit: int, most: int) -> tuple[int, bool]:
        """Inflate by `size` bytes; what is still worth trying after that, and whether it is enough."""
        pieces = self._fitting(size, space, limit)
        try:
            for piece in pieces:
                self._balloon.extend(piece)
                self.inflated_total += piece
        except FilesystemError as error:
            return self._after_refusal(error, size, space, limit), False
        return most, sum(pieces) < size

    def _give_back(self, size: int, space: Space) -> str:
        """Give `size` bytes back, the first chunk's worth by itself; a warning when that freed nothing."""
        held = self._balloon.size()
        wanted = min(size, space.data_chunk)
        self._balloon.shrink(wanted)
        given = held - self._balloon.size()  # whole extents: it may be more than was asked
        self.deflated_total += given
        self._fs.sync()  # until then the kernel counts it as used
        after = self._fs.space()
        freed = space.data_used - after.data_used
        if given >= WORTH_A_TRIM and freed < given // 2:
            time.sleep(BUSY_POLL_S)  # a writer may have been as fast as we were
            self._fs.sync()
            freed = max(freed, space.data_used - self._fs.space().data_used)
            if freed < given // 2:
                return PINNED.format(format_size(given), format_size(max(freed, 0)))
        if size > wanted and (more := min(size - given, self._allowed(after) - after.available)) > 0:
            held = self._balloon.size()
            self._balloon.shrink(more)
            self.deflated_total += held - self._balloon.size()
            self._fs.sync()
        return ""

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

    def _checked(self, inflated: int, deflated: int, warning: str) -> Held:
        """What was done, once it is seen to be enough."""
        space = self._fs.space()
        limit = self._allowed(space)
        if space.available > target.ceiling(space, limit):
            why = "the kernel gives the balloon no more room"
            if space.data_readonly:
                why = f"{space.data_readonly} bytes are in chunks that a scrub or a balance keeps read-only"
            raise FilesystemError(
                f"applications can still write {space.available} bytes, {limit} are allowed; {why}", errno.ENOSPC
            )
        held = self._balloon.size()
        if deflated and target.relief_due(space, held + deflated):
            self._metadata.hand_back_chunks()
        # A balance hides the chunk that it empties, the cleaner one that it deletes, and it begins after our commit.
        again = (self._grant is not None and not self._grant.known) or (
            _moves_chunks(space) and target.next_move(space, held, limit).by > 0
        )
        again = again or (bool(held) and (inflated > target.TOLERANCE or target.losing_a_chunk(space)))
        return Held(held, space, inflated, deflated, again, warning)

    def _check_unwritten(self, grant: Grant) -> None:
        """Raise FilesystemError where preallocated extents alone are more than the host allows."""
        if not grant.overcommitted or grant.spent is None:
            return
        if not grant.known:
            text = (
                f"preallocated files are still being counted; up to {format_size(grant.unwritten)} may be unwritten in"
                f" them, {format_size(grant.limit)} are allowed: until that is known, nothing more is given"
            )
            raise FilesystemError(text, errno.EAGAIN, Kind.BUSY)
        text = (
            f"applications have preallocated {format_size(grant.unwritten)} that they have not written yet,"
            f" {format_size(grant.limit)} are allowed: nothing more is given, but these can be written"
        )
        raise FilesystemError(text, errno.ENOSPC)

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


def _moves_chunks(space: Space) -> bool:
    """True while an exclusive operation is at work."""
    return space.exclusive_operation != "none" and "paused" not in space.exclusive_operation


def goal_gap(space: Space, limit: int) -> int:
    """Bytes the balloon still lacks (positive) or holds too many (negative) for `limit`."""
    return space.available - target.goal(space, limit)
