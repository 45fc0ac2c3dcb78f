"""Calls of the kernel for a resize job: waits until it is free, watches it at work, tells what a refusal means.

Blocking. The kernel's work itself runs in the resizer's child process.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from functools import partial

from storaged.core.ports import Clock, Filesystem, Resizer
from storaged.errors import FilesystemError, Kind
from storaged.resize import pace
from storaged.resize.layout import Chunk, Layout, left_to_move
from storaged.resize.work import Work

BUSY_WAIT_S = 30.0
"""How long to wait for the kernel's own chunk reclaim to let go of the exclusive slot."""
BUSY_POLL_S = 0.2
LEFT_OVER_S = 1.0
"""A relocation that nobody cancels now ends by itself only in its first moments."""
STAYS = (errno.ENOSPC, errno.ETXTBSY, errno.EINVAL, errno.EAGAIN)
"""What the kernel says of a chunk that stays; the last while a cancel that met nothing is left over: a balance does not
even begin then, and only the end of a relocation, such as the next cut, makes the kernel forget it."""

Call = Callable[[], None]
Certain = Callable[[], bool]


class NoLongerCertainError(FilesystemError):
    """Somebody has taken the room while the kernel was busy: what was to be done has to be judged anew."""


class KernelCalls:
    """Makes one call at a time."""

    def __init__(
        self, filesystem: Filesystem, resizer: Resizer, clock: Clock, poll_s: float, impact: Callable[[], str]
    ) -> None:
        self._fs = filesystem
        self._resizer = resizer
        self._clock = clock
        self._poll_s = poll_s
        self._impact = impact
        self._worked_s = 0.0
        """Moving, since the last rest."""

    def rest(self, work: Work) -> None:
        """Let others have the disk for a while, as long as they use it. Nothing may be locked that they wait for."""
        left, self._worked_s = pace.rest_s(self._impact(), self._worked_s), 0.0
        written = self._fs.device_written()
        while left > 0 and not work.stop.wait(min(pace.LOOK_S, left)):
            left -= pace.LOOK_S
            before, written = written, self._fs.device_written()
            if written - before < pace.QUIET:
                return

    def resize(self, work: Work, size: int) -> None:
        """Make the filesystem `size` bytes, moving nothing."""
        self._call(work, partial(self._resizer.resize, size))

    def cut(self, work: Work, size: int, moves: int, left: int, certain: Certain) -> None:
        """Shrink to `size`, told as it goes: `moves` bytes of the `left` that the job has to move yet."""
        self._watched(work, moves, left, partial(self._resizer.resize, size), certain)
        work.moved += moves
        work.progress(size, work.moved, work.moved + left - moves, self._clock.monotonic())

    def widen(self, work: Work, chunk: Chunk, certain: Certain) -> None:
        """Another chunk for the metadata in `chunk`; where the kernel moves nothing it stays, and that ends nothing."""
        move = partial(self._resizer.move_out, chunk.logical, metadata=True)
        _goes(work, partial(self._call, work, move, certain))

    def move_out(self, work: Work, layout: Layout, chunk: Chunk, certain: Certain | None = None) -> None:
        """Move what is in `chunk`, told as it goes; what the kernel does not move stays, and that ends nothing."""
        left = chunk.held + left_to_move(layout, work.job.requested)
        move = partial(self._resizer.move_out, chunk.logical, metadata=chunk.kind == "metadata")
        if _goes(work, partial(self._watched, work, chunk.held, left, move, certain)):
            work.moved += chunk.held
            work.progress(layout.size, work.moved, work.moved + left - chunk.held, self._clock.monotonic())

    def _watched(self, work: Work, moves: int, left: int, call: Call, certain: Certain | None) -> None:
        """Call the kernel while another thread reports how far it is."""
        done = threading.Event()
        size = self._fs.size()  # the kernel shows the target at once, so this is read first
        written = self._resizer.written()

        def watch() -> None:
            while not done.wait(self._poll_s):
                # Between chunks the thread's own writes are the signal; never more than the chunk held.
                within = min(max(self._resizer.written() - written, 0), moves)
                work.progress(size, work.moved + within, work.moved + left, self._clock.monotonic())

        watcher = threading.Thread(target=watch, name="resize watch", daemon=True)
        watcher.start()
        began = time.monotonic()
        try:
            self._call(work, call, certain)
        finally:
            self._worked_s += time.monotonic() - began if moves else 0
            done.set()
            watcher.join()

    def _call(self, work: Work, call: Call, certain: Certain | None = None) -> None:
        """One call of the kernel, waiting for the kernel's own work to end first.

        What was `certain` is asked again after a wait: raises NoLongerCertainError when it is not.
        """
        began = time.monotonic()
        until = began + BUSY_WAIT_S
        once_more = True
        while True:
            work.heed()
            try:
                return call()
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
                self._wait(work, error, until)
                if certain is not None and not certain():
                    raise NoLongerCertainError("what was certain before a wait no longer is", errno.EAGAIN) from error

    def _wait(self, work: Work, busy: FilesystemError, until: float) -> None:
        """For a moment, unless waiting is of no use, or has been long enough."""
        paused = "paused" in self._fs.space().exclusive_operation
        if paused or time.monotonic() >= until:
            hint = "; cancel the paused balance first" if paused else ""
            raise FilesystemError(busy.message + hint, busy.errno, Kind.BUSY) from busy
        work.stop.wait(BUSY_POLL_S)


def _goes(work: Work, call: Call) -> bool:
    """False when the chunk that `call` moves stays where it is: that ends nothing."""
    try:
        call()
    except FilesystemError as error:
        if error.errno not in STAYS:
            raise
        work.refused = True
        return False
    return True


def _left_over(error: FilesystemError, work: Work, began: float) -> bool:
    """True when a cancel that was meant for an earlier resize has met this one.

    A cancel that comes when nothing is being moved any more leaves its request behind, and the next relocation ends at
    once (fs/btrfs: exclop_start_or_cancel_reloc counts it up, only the end of a relocation sets it back; seen on 6.18).
    """
    soon = time.monotonic() - began < LEFT_OVER_S
    return error.errno == errno.ECANCELED and error.kind is not Kind.UNAVAILABLE and not work.stop.is_set() and soon
