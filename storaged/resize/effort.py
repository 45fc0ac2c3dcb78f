"""A shrink that goes as far as it can: what is certain first, then chunks are rewritten, or moved up for a moment.

Every cut is as certain as any other. Only what is rewritten may find no room, which changes nothing. Blocking.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field

from storaged.balloon.engine import BalloonEngine
from storaged.core.ports import Filesystem
from storaged.errors import FilesystemError, Kind
from storaged.resize.bounds import Bounds, compute
from storaged.resize.calls import KernelCalls
from storaged.resize.compact import empty_chunks, next_chunk
from storaged.resize.descent import Descent
from storaged.resize.fit import next_step
from storaged.resize.heal import Healer
from storaged.resize.layout import KERNEL_MINIMUM, Chunk, Layout, left_to_move
from storaged.resize.pivot import Pivot, has_place, next_pivot
from storaged.resize.work import Work
from storaged.units import MIB, sector_floor

log = logging.getLogger(__name__)

LITTLE = 16 * MIB
"""What is moved in no time, even by somebody who was told to stop."""
MOST_PIVOTS = 3
"""In a row that gained nothing."""
MOST_REFUSALS = 8
"""Cuts in a row that gained nothing: where the guest writes on, the bound is another one every time."""
WORTH_A_ROUND = 8 * MIB
"""What must be gained before all chunks are looked at again."""


@dataclass(slots=True)
class _Tried:
    """What was tried since something was last gained."""

    cuts: set[int] = field(default_factory=set)
    """Sizes that were refused."""
    chunks: set[int] = field(default_factory=set)
    """Logical addresses of what was rewritten."""
    empty: bool = False
    """Empty chunks were handed back; made for what did not fit into it, there are more after each that is rewritten."""

    def next_cut(self, bounds: Bounds, target: int, size: int) -> int:
        """The deepest cut that is certain and was not refused; 0 when there is none."""
        cuts = (max(bounds.minimum, target), max(bounds.guaranteed, target))
        return next((cut for cut in cuts if cut < size and cut not in self.cuts), 0)

    def next_chunk(self, layout: Layout) -> Chunk | None:
        """What to rewrite next. What is made new is rewritten too, so that their number is bounded."""
        most = sum(chunk.kind == "data" for chunk in layout.chunks)
        return next_chunk(layout, self.chunks) if len(self.chunks) <= most + 1 else None


class BestEffort:
    """Goes down as far as it gets."""

    def __init__(
        self, filesystem: Filesystem, balloon: BalloonEngine, calls: KernelCalls, descent: Descent, healer: Healer
    ) -> None:
        self._fs = filesystem
        self._balloon = balloon
        self._calls = calls
        self._descent = descent
        self._healer = healer

    def run(self, work: Work) -> str:
        """Towards the job's size; why it is no further, empty there. FilesystemError: ECANCELED, or the kernel's."""
        target = max(sector_floor(work.job.requested), KERNEL_MINIMUM)
        tried = _Tried()
        asked, pivots, refusals = 0, MOST_PIVOTS, MOST_REFUSALS
        lowest = self._fs.size()
        why = ""
        work.prepared()
        while (size := self._fs.size()) > target:
            self._calls.rest(work)
            work.heed()
            if size <= lowest - WORTH_A_ROUND:  # what was only taken back after a pivot is no gain
                lowest, pivots, refusals = size, MOST_PIVOTS, MOST_REFUSALS
            with self._balloon.lock:
                layout, longest = self._descent.picture()
            bounds = compute(layout, longest)
            why = bounds.why
            if refusals and (cut := tried.next_cut(bounds, target, size)):
                if refused := self._cut(work, cut):
                    why = refused
                    if self._balloon.size():
                        work.settle()  # what it gave for this must not add up with what it gives for the next
                gained = size - self._fs.size()
                if gained >= WORTH_A_ROUND:
                    tried = _Tried()
                if not gained:
                    tried.cuts.add(cut)  # else the same refusal again and again
                    refusals -= 1
            elif empty_chunks(layout) and not tried.empty:
                tried.empty = True  # not sooner: as room in chunks they are part of what was promised
                self._hand_back()
            elif size == asked and (chunk := tried.next_chunk(layout)):
                self._rewrite(work, layout, chunk, tried)
            elif pivots and (pivot := next_pivot(layout, longest, work.job.start_size, work.stop.is_set)):
                asked = size
                self._pivot(work, layout, pivot, target)
                pivots -= 1
                tried = _Tried()
            elif size != asked and (chunk := tried.next_chunk(layout)):
                asked = size  # whatever else there is, pivots are looked for once at each size, and at the end
                self._rewrite(work, layout, chunk, tried)
            else:
                break
        return why if size > target else ""

    def _cut(self, work: Work, cut: int, *, rests: bool = True) -> str:
        """Shrink to `cut` as far as it goes; why it stopped before, empty at `cut`. A best effort ends well there."""
        try:
            self._descent.to(work, cut, rests=rests)
        except FilesystemError as error:
            if error.kind is Kind.OUT_OF_RANGE:  # the guest has written meanwhile, or `cut` itself is not certain
                return error.message
            if error.errno not in (errno.ENOSPC, errno.ETXTBSY):
                raise
            work.refused = True
            return error.message
        return ""

    def _rewrite(self, work: Work, layout: Layout, chunk: Chunk, tried: _Tried) -> None:
        """Move what is in `chunk` to wherever the kernel finds room; where it finds none, it stays."""
        tried.chunks.add(chunk.logical)
        with self._balloon.lock:
            if chunk.balloon:
                self._balloon.vacate((chunk,))
            try:
                self._calls.move_out(work, layout, chunk)
            finally:
                if chunk.balloon:
                    work.settle()
        tried.empty = False

    def _pivot(self, work: Work, layout: Layout, pivot: Pivot, target: int) -> None:
        """Grow for a moment, so that a chunk has where to go, and come back.

        The balloon stands still until then: it would take the room that the way back needs.
        """
        chunk = pivot.chunk
        with self._balloon.lock:
            try:
                if pivot.size > layout.size:
                    self._calls.resize(work, pivot.size)
                self._move_up(work, chunk)
                bounds = compute(self._balloon.layout(), self._balloon.longest())
                if why := self._cut(work, max(min(bounds.minimum, layout.size), target), rests=False):
                    log.info("a %s chunk moved in vain: %s", chunk.kind, why)
                    self._back(work, layout.size)
            except FilesystemError:
                self._back(work, layout.size)
                raise
            finally:
                if self._balloon.size() or any(chunk.balloon for chunk in layout.chunks):
                    work.settle()  # what it gave for one must not add up with what it gives for the next

    def _move_up(self, work: Work, chunk: Chunk) -> None:
        """Out of `chunk`, if there still is a place for what is in it; where the kernel finds none, it stays."""
        if chunk.balloon:
            self._balloon.vacate((chunk,))

        layout, longest = self._descent.picture()
        if not has_place(layout, chunk, longest):
            return  # the guest has written meanwhile

        def certain() -> bool:
            layout, longest = self._descent.picture()
            return has_place(layout, chunk, longest)

        # Nothing is looked up in between: the less time passes, the less a guest can write.
        self._calls.move_out(work, layout, chunk, certain)
        self._fs.sync()

    def _back(self, work: Work, size: int) -> None:
        """To the size before a pivot that was cut off or in vain; not where much has to move: a cancel is quick."""
        try:
            layout, longest = self._descent.picture()
            step = next_step(layout.as_it_is(), size, longest)
            if layout.size > step.size == size and not step.blocked and left_to_move(layout, size) <= LITTLE:
                self._balloon.vacate(step.vacate)  # or the kernel would copy it, onto the host's disk
                self._healer.surely(size)
        except FilesystemError as error:
            work.kernel_refused = True
            log.info("what was taken back for a moment stays: %s", error)

    def _hand_back(self) -> None:
        try:
            self._balloon.reclaim()
        except FilesystemError as error:
            log.info("empty chunks stay: %s", error)
