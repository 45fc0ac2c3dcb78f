"""Does a resize job's work: makes room, calls the kernel step by step, watches, heals what an error left.

Blocking, in a thread of its own; what happens is told through one callback. The kernel's work itself runs in the
resizer's child process.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from storaged.balloon.engine import BalloonEngine
from storaged.core import events as ev
from storaged.core.ports import Clock, Filesystem, Resizer
from storaged.errors import FilesystemError, Kind, StoragedError
from storaged.resize.bounds import compute
from storaged.resize.compact import empty_chunks, next_chunk
from storaged.resize.fit import Step, cramped_metadata, next_step
from storaged.resize.heal import Healer
from storaged.resize.job import Job
from storaged.resize.layout import KERNEL_MINIMUM, Chunk, Layout, Longest, left_to_move
from storaged.resize.pivot import Pivot, has_place, next_pivot
from storaged.units import MIB, sector_floor

log = logging.getLogger(__name__)

POLL_S = 0.1
BUSY_WAIT_S = 30.0
"""How long to wait for the kernel's own chunk reclaim to let go of the exclusive slot."""
BUSY_POLL_S = 0.2
CANCEL_TRIES = 50
LEFT_OVER_S = 1.0
"""A relocation that nobody cancels now ends by itself only in its first moments."""
YIELD_MORE = 16 * MIB
"""Room the balloon gives up beyond what moves, for what does not fit together exactly."""

STAYS = (errno.ENOSPC, errno.ETXTBSY, errno.EINVAL, errno.EAGAIN)
"""What the kernel says of a chunk that stays; the last while a cancel that met nothing is left over: a balance does not
even begin then, and only the end of a relocation, such as the next cut, makes the kernel forget it."""
EMPTY = -1
"""Stands for all empty chunks among what was tried; other negative numbers are cuts that were refused."""
LITTLE = 16 * MIB
"""What is moved in no time, even by somebody who was told to stop."""
MOST_PIVOTS = 3
"""In a row that gained nothing."""
MOST_REFUSALS = 8
"""Cuts in a row that gained nothing: where the guest writes on, the bound is another one every time."""
WORTH_A_ROUND = 8 * MIB
"""What must be gained before all chunks are looked at again."""

Tell = Callable[[ev.JobPrepared | ev.JobProgressed | ev.JobEnded], None]


@dataclass(slots=True)
class _Work:
    job: Job
    tell: Tell
    settle: Callable[[], None]
    stop: threading.Event
    moved: int = 0
    kernel_refused: bool = False
    refused: bool = False
    """The kernel found no room for what a best effort only tried."""

    def heed(self) -> None:
        """Raises ECANCELED once the job is to stop."""
        if self.stop.is_set():
            raise FilesystemError("cancelled", errno.ECANCELED)


class _NoLongerCertain(FilesystemError):
    """Somebody has taken the room while the kernel was busy: what was to be done has to be judged anew."""


class ResizeRunner:
    """Runs at most one job at a time on one filesystem."""

    def __init__(
        self,
        filesystem: Filesystem,
        resizer: Resizer,
        balloon: BalloonEngine,
        clock: Clock,
        *,
        poll_s: float = POLL_S,
    ) -> None:
        self._fs = filesystem
        self._resizer = resizer
        self._balloon = balloon
        self._clock = clock
        self._poll_s = poll_s
        self._stops: dict[str, threading.Event] = {}  # by job; made by whichever comes first, work or cancel
        self._running = ""
        self._healer = Healer(filesystem, resizer, poll_s, BUSY_WAIT_S)
        self.recover = self._healer.recover

    def run(self, job: Job, tell: Tell, settle: Callable[[], None]) -> None:
        """Do the job's work; returns after JobEnded was told, whatever happened.

        `settle` is called before that, to bring the balloon back to the size the host is owed.
        """
        work = _Work(job, tell, settle, self._stops.setdefault(job.id, threading.Event()))
        self._running = job.id
        try:
            outcome, reason = self._attempt(work)
        except Exception as error:  # noqa: BLE001  # whatever it is, the job must end
            outcome, reason = ev.Outcome.FAILED, str(error) or repr(error)
        finally:
            self._running = ""
            self._stops.pop(job.id, None)
        try:
            settle()
        except Exception as error:  # noqa: BLE001  # the job's end is told all the same
            reason = reason or f"the balloon did not come back: {error}"
        now, wall = self._clock.monotonic(), self._clock.wall()
        tell(ev.JobEnded(job.id, outcome, self._true_size(job), reason, now, wall, work.moved))

    def _attempt(self, work: _Work) -> tuple[ev.Outcome, str]:
        """Do the work; how it came out and why."""
        try:
            if not work.job.shrinks:
                self._grow(work)
            elif work.job.best_effort:
                return ev.Outcome.SUCCEEDED, self._shrink_as_far(work)
            else:
                self._shrink(work, sector_floor(work.job.requested))
                self._leave_well(work)
        except FilesystemError as error:
            if work.refused and error.errno != errno.ECANCELED:
                self._healer.heal(FilesystemError("", errno.ENOSPC))  # whatever ended it now
            healed = self._healer.heal(error) if work.kernel_refused else ""
            stopped = error.errno == errno.ECANCELED
            return ev.Outcome.STOPPED if stopped else ev.Outcome.FAILED, error.message + healed
        size = self._fs.size()
        if size != sector_floor(work.job.requested):
            return ev.Outcome.FAILED, f"the filesystem has {size} bytes after it"
        return ev.Outcome.SUCCEEDED, ""

    def cancel(self, job_id: str) -> None:
        """Stop the job; its JobEnded says how it ended. Blocks until the kernel has let go, some seconds at most."""
        self._stops.setdefault(job_id, threading.Event()).set()
        for _ in range(CANCEL_TRIES):
            # Again and again: one that comes between two kernel calls finds nothing running.
            if self._running != job_id:
                return
            self._resizer.cancel()
            time.sleep(self._poll_s)

    def _true_size(self, job: Job) -> int:
        try:
            return self._fs.size()
        except (StoragedError, OSError):
            return job.current_size

    def _grow(self, work: _Work) -> None:
        if (size := self._fs.size()) > sector_floor(work.job.requested):
            # Somebody else has grown it meanwhile: going back is a shrink, which nobody has judged.
            raise FilesystemError(f"the filesystem has {size} bytes by now; ask again", kind=Kind.OUT_OF_RANGE)
        work.tell(ev.JobPrepared(work.job.id))
        self._call(work, partial(self._resizer.resize, work.job.requested))

    def _shrink_as_far(self, work: _Work) -> str:
        """Towards the target as far as it goes, chunks rewritten on the way; why it is no further, empty at the target.

        Every cut is as certain as any other. Only what is rewritten may find no room, which changes nothing.
        """
        target = max(sector_floor(work.job.requested), KERNEL_MINIMUM)
        tried: set[int] = set()
        asked, pivots, refusals = 0, MOST_PIVOTS, MOST_REFUSALS
        lowest = self._fs.size()
        why = ""
        work.tell(ev.JobPrepared(work.job.id))
        while (size := self._fs.size()) > target:
            work.heed()
            if size <= lowest - WORTH_A_ROUND:  # what was only taken back after a pivot is no gain
                lowest, pivots, refusals = size, MOST_PIVOTS, MOST_REFUSALS
            with self._balloon.lock:
                layout, longest = self._picture()
            bounds = compute(layout, longest)
            why = bounds.why
            cuts = (max(bounds.minimum, target), max(bounds.guaranteed, target))
            cut = next((cut for cut in cuts if cut < size and -cut not in tried), 0)
            if cut and refusals:
                why = self._tried_cut(work, cut) or why
                if (gained := size - self._fs.size()) >= WORTH_A_ROUND:
                    tried.clear()
                if not gained:
                    tried.add(-cut)  # else the same refusal again and again
                    refusals -= 1
                continue
            if empty_chunks(layout) and EMPTY not in tried:
                tried.add(EMPTY)  # not sooner: as room in chunks they are part of what was promised
                self._hand_back()
                continue
            most = sum(chunk.kind == "data" for chunk in layout.chunks)
            chunk = next_chunk(layout, tried) if size == asked and len(tried) <= most + 2 else None
            if chunk is None and pivots:  # at a new size, and when there is nothing else to do
                asked = size
                if pivot := next_pivot(layout, longest, work.job.start_size, work.stop.is_set):
                    self._pivot(work, layout, pivot, target)
                    pivots -= 1
                    tried.clear()
                    continue
                chunk = next_chunk(layout, tried) if len(tried) <= most + 2 else None
            if chunk is None:
                break
            tried.add(chunk.logical)
            self._rewrite(work, layout, chunk)
            tried.discard(EMPTY)  # one that was made for what did not fit into it, too
        why += self._leave_well(work)
        return why if size > target else ""

    def _tried_cut(self, work: _Work, cut: int) -> str:
        """Shrink to `cut` as far as it goes; why it stopped before, empty at `cut`. A best effort ends well there."""
        try:
            self._shrink(work, cut)
        except FilesystemError as error:
            if self._balloon.size():
                work.settle()  # what it gave for this must not add up with what it gives for the next
            if error.kind is Kind.OUT_OF_RANGE:  # the guest has written meanwhile, or `cut` itself is not certain
                return error.message
            if error.errno not in (errno.ENOSPC, errno.ETXTBSY):
                raise
            work.refused = True
            return error.message
        return ""

    def _rewrite(self, work: _Work, layout: Layout, chunk: Chunk) -> None:
        """Move what is in `chunk` to wherever the kernel finds room; where it finds none, it stays."""
        with self._balloon.lock:
            if chunk.balloon:
                self._balloon.vacate((chunk,))
            try:
                self._move_out(work, layout, chunk)
            finally:
                if chunk.balloon:
                    work.settle()

    def _move_out(self, work: _Work, layout: Layout, chunk: Chunk, certain: Callable[[], bool] | None = None) -> None:
        """One call that moves what is in `chunk`, told as it goes; what the kernel does not move stays."""
        left = chunk.held + left_to_move(layout, work.job.requested)
        move = partial(self._resizer.move_out, chunk.logical, metadata=chunk.kind == "metadata")
        if self._goes(work, partial(self._watched, work, Step(layout.size, (), chunk.held), left, move, certain)):
            work.moved += chunk.held
            self._progress(work, layout.size, work.moved, work.moved + left - chunk.held)

    def _goes(self, work: _Work, call: Callable[[], None]) -> bool:
        """False when the chunk that `call` moves stays where it is: that ends nothing."""
        try:
            call()
        except FilesystemError as error:
            if error.errno not in STAYS:
                raise
            work.refused = True
            return False
        return True

    def _pivot(self, work: _Work, layout: Layout, pivot: Pivot, target: int) -> None:
        """Grow for a moment, so that a chunk has where to go, and come back.

        The balloon stands still until then: it would take the room that the way back needs.
        """
        chunk = pivot.chunk
        with self._balloon.lock:
            try:
                if pivot.size > layout.size:
                    self._call(work, partial(self._resizer.resize, pivot.size))
                self._move_up(work, chunk)
                bounds = compute(self._balloon.layout(), self._balloon.longest())
                if why := self._tried_cut(work, max(min(bounds.minimum, layout.size), target)):
                    log.info("a %s chunk moved in vain: %s", chunk.kind, why)
                    self._back(layout.size)
            except FilesystemError:
                self._back(layout.size)
                raise
            finally:
                if any(chunk.balloon for chunk in layout.chunks):
                    work.settle()  # what it gave for one must not add up with what it gives for the next

    def _move_up(self, work: _Work, chunk: Chunk) -> None:
        """Out of `chunk`, if there still is a place for what is in it; where the kernel finds none, it stays."""
        if chunk.balloon:
            self._balloon.vacate((chunk,))

        def certain() -> bool:
            layout, longest = self._picture()
            return has_place(layout, chunk, longest)

        if not certain():
            return  # the guest has written meanwhile
        self._move_out(work, self._balloon.layout(), chunk, certain)
        self._fs.sync()

    def _back(self, size: int) -> None:
        """To the size before a pivot that was cut off or in vain; not where much has to move: a cancel is quick."""
        with contextlib.suppress(FilesystemError):
            layout, longest = self._picture()
            step = next_step(layout.as_it_is(), size, longest)
            if layout.size > step.size == size and not step.blocked and left_to_move(layout, size) <= LITTLE:
                self._healer.surely(size)

    def _hand_back(self) -> None:
        try:
            self._fs.reclaim_empty_chunks()
        except FilesystemError as error:
            log.info("empty chunks stay: %s", error)

    def _shrink(self, work: _Work, target: int) -> None:
        """Step by step down to the target: each step is durable, and made only when it is certain to succeed."""
        size = self._fs.size()
        while size > target:
            work.heed()
            with self._balloon.lock:
                step, layout = self._ready_step(work, target)
                left = left_to_move(layout, target)
                if size == work.job.start_size:
                    work.tell(ev.JobPrepared(work.job.id))
                if step.vacate:
                    self._balloon.vacate(step.vacate)
                self._balloon.anchor(layout, step.size)
                try:
                    resize = partial(self._resizer.resize, step.size)
                    self._watched(work, step, left, resize, partial(self._still_certain, step.size))
                except _NoLongerCertain:
                    continue
                if any(chunk.kind == "metadata" and chunk.top > step.size for chunk in layout.chunks):
                    self._leave_metadata_room(work)
            work.moved += step.moves
            size = step.size
            self._progress(work, size, work.moved, work.moved + left - step.moves)

    def _picture(self) -> tuple[Layout, Longest]:
        self._fs.sync()  # usage and free room are true only after a commit
        return self._balloon.layout(), self._balloon.longest()

    def _still_certain(self, size: int) -> bool:
        layout, longest = self._picture()
        step = next_step(layout.as_it_is(), size, longest)
        return step.size == size and not step.blocked

    def _ready_step(self, work: _Work, target: int) -> tuple[Step, Layout]:
        """The next step, room made for what it moves, and the layout it is for; FilesystemError if not certain."""
        widened = False
        while True:
            layout, longest = self._picture()
            step = next_step(layout, target, longest)
            if step.blocked and not widened and (cramped := cramped_metadata(layout)):
                widened = True
                self._widen(work, cramped)
                continue
            if step.blocked:
                # The guest has written since the request was judged.
                raise FilesystemError(step.blocked, errno.ENOSPC, Kind.OUT_OF_RANGE)
            if not step.moves:
                return step, layout
            if not (ready := next_step(layout.as_it_is(), target, longest)).blocked:
                return ready, layout
            # What moves needs room that the balloon holds: as much as is cut away, so nothing is gained by others.
            staying = [chunk for chunk in layout.chunks if chunk.top <= step.size]
            lowest = [chunk for chunk in staying if chunk.top <= target]
            wanted = step.moves + YIELD_MORE
            if not (self._balloon.yield_room(wanted, lowest) or self._balloon.yield_room(wanted, staying)):
                why = "the balloon could not make room for what has to move"
                raise FilesystemError(why, errno.ENOSPC, Kind.OUT_OF_RANGE)

    def _widen(self, work: _Work, chunk: Chunk) -> None:
        """A larger chunk for the metadata in `chunk`; what is short of room afterwards all the same blocks the step."""

        def certain() -> bool:
            cramped = cramped_metadata(self._picture()[0])
            return cramped is not None and cramped.logical == chunk.logical

        move = partial(self._resizer.move_out, chunk.logical, metadata=True)
        self._goes(work, partial(self._call, work, move, certain))

    def _leave_well(self, work: _Work) -> str:
        """At the end of a shrink: metadata has room, and the kernel makes chunks again; why not, or empty.

        It may have been refused a chunk and gone on without, and would not try again by itself.
        """
        with self._balloon.lock:
            self._leave_metadata_room(work)
        return self._healer.heal(FilesystemError("", errno.ENOSPC))

    def _leave_metadata_room(self, work: _Work) -> None:
        """What was in a large chunk may be in a small one now: a larger one, before data takes the hole for it."""
        try:
            if cramped := cramped_metadata(self._picture()[0]):
                self._widen(work, cramped)
        except FilesystemError as error:
            if error.errno in (errno.EROFS, errno.ECANCELED):
                raise
            log.info("metadata stays in a small chunk: %s", error)  # the step is made all the same

    def _watched(
        self,
        work: _Work,
        step: Step,
        left: int,
        call: Callable[[], None],
        certain: Callable[[], bool] | None = None,
    ) -> None:
        """Call the kernel while another thread reports how far it is."""
        done = threading.Event()
        size = self._fs.size()  # the kernel shows the target at once, so this is read first
        written = self._resizer.written()

        def watch() -> None:
            while not done.wait(self._poll_s):
                # Between chunks the thread's own writes are the signal; never more than the chunk held.
                within = min(max(self._resizer.written() - written, 0), step.moves)
                self._progress(work, size, work.moved + within, work.moved + left)

        watcher = threading.Thread(target=watch, name="resize watch", daemon=True)
        watcher.start()
        try:
            self._call(work, call, certain)
        finally:
            done.set()
            watcher.join()

    def _progress(self, work: _Work, size: int, moved: int, to_move: int) -> None:
        work.tell(ev.JobProgressed(work.job.id, size, moved, to_move, self._clock.wall()))

    def _call(self, work: _Work, call: Callable[[], None], certain: Callable[[], bool] | None = None) -> None:
        """One call of the kernel, waiting for the kernel's own work to end first.

        What was `certain` is asked again after a wait: raises _NoLongerCertain when it is not.
        """
        began = time.monotonic()
        until = began + BUSY_WAIT_S
        once_more = True
        while True:
            work.heed()
            try:
                call()
            except FilesystemError as error:
                if once_more and _left_over(error, work, began):
                    once_more = False
                    continue
                if error.kind is not Kind.BUSY:
                    work.kernel_refused = True
                    if error.errno == errno.EINVAL and work.stop.is_set():
                        # What the kernel says of a balance that is cancelled before it has begun (btrfs_balance).
                        raise FilesystemError("cancelled", errno.ECANCELED) from error
                    raise
                paused = "paused" in self._fs.space().exclusive_operation
                if paused or time.monotonic() >= until:
                    hint = "; cancel the paused balance first" if paused else ""
                    raise FilesystemError(error.message + hint, error.errno, Kind.BUSY) from error
                work.stop.wait(BUSY_POLL_S)
                if certain is not None and not certain():
                    raise _NoLongerCertain("what was certain before a wait no longer is", errno.EAGAIN) from error
                continue
            return


def _left_over(error: FilesystemError, work: _Work, began: float) -> bool:
    """True when a cancel that was meant for an earlier resize has met this one.

    A cancel that comes when nothing is being moved any more leaves its request behind, and the next relocation ends at
    once (fs/btrfs: exclop_start_or_cancel_reloc counts it up, only the end of a relocation sets it back; seen on 6.18).
    """
    soon = time.monotonic() - began < LEFT_OVER_S
    return error.errno == errno.ECANCELED and error.kind is not Kind.UNAVAILABLE and not work.stop.is_set() and soon
