"""Shrinks step by step, each step durable, and made only when it is certain to succeed. Blocking."""

from __future__ import annotations

import errno
import logging
from functools import partial

from storaged.balloon.engine import BalloonEngine
from storaged.core.ports import Filesystem
from storaged.errors import FilesystemError, Kind
from storaged.resize.calls import KernelCalls, NoLongerCertainError
from storaged.resize.fit import Step, cramped_metadata, data_chunk, next_step
from storaged.resize.heal import Healer
from storaged.resize.layout import Chunk, Layout, Longest, left_to_move
from storaged.resize.work import Work
from storaged.units import MIB, sector_ceil, sector_floor

log = logging.getLogger(__name__)

TRIES_BESIDE_A_WRITER = 3
"""Cuts that the kernel may refuse before a promised shrink gives up: between the picture and the cut a guest writes."""
YIELD_MORE = 16 * MIB
"""Room the balloon gives up beyond what moves, for what does not fit together exactly."""


class Descent:
    """Gets a filesystem down to a size that is certain, room for metadata kept on the way and left at the end."""

    def __init__(self, filesystem: Filesystem, balloon: BalloonEngine, calls: KernelCalls, healer: Healer) -> None:
        self._fs = filesystem
        self._balloon = balloon
        self._calls = calls
        self._healer = healer

    def to(self, work: Work, target: int, *, rests: bool = True) -> None:
        """Down to `target` bytes. FilesystemError: OUT_OF_RANGE when a step is not certain; what was cut stays cut.

        `rests`: between two steps others may have the disk; not where the caller holds what they wait for.
        """
        size = self._fs.size()
        again = TRIES_BESIDE_A_WRITER
        while size > target:
            work.heed()
            with self._balloon.lock:
                step, layout = self._ready_step(work, target)
                if size == work.job.start_size:
                    work.prepared()
                if step.vacate:
                    self._balloon.vacate(step.vacate)
                self._balloon.anchor(layout, step.size)
                left = left_to_move(layout, target)
                told = left_to_move(layout, min(target, work.job.requested))  # a best effort goes on after `target`
                try:
                    self._calls.cut(work, step.size, step.moves, told, partial(self._still_certain, step.size))
                except NoLongerCertainError:
                    continue
                except FilesystemError as error:
                    again -= 1
                    raced = error.errno == errno.ENOSPC and again and not work.job.best_effort
                    if not raced or not self._forgotten(error):
                        raise
                    log.info("judged anew, for a guest that writes may have taken the room: %s", error)
                    continue
                if any(chunk.kind == "metadata" and chunk.top > step.size for chunk in layout.chunks):
                    self._leave_metadata_room(work)
                self._balloon.ease(target, left - step.moves)
            size = step.size
            if rests and size > target:
                self._calls.rest(work)

    def picture(self) -> tuple[Layout, Longest]:
        """What is where, after a commit: only then usage and free room are true."""
        self._fs.sync()
        return self._balloon.layout(), self._balloon.longest()

    def leave_well(self, work: Work) -> str:
        """At the end of a shrink: metadata has room, and the kernel makes chunks again; why not, or empty.

        It may have been refused a chunk and gone on without, and would not try again by itself.
        """
        with self._balloon.lock:
            self._leave_metadata_room(work)
        return self._healer.heal(FilesystemError("", errno.ENOSPC))

    def _forgotten(self, error: FilesystemError) -> bool:
        """True when the kernel's refusal has changed nothing, and was made to be forgotten."""
        return not self._healer.heal(error)

    def _still_certain(self, size: int) -> bool:
        layout, longest = self.picture()
        step = next_step(layout.as_it_is(), size, longest)
        return step.size == size and not step.blocked

    def _ready_step(self, work: Work, target: int) -> tuple[Step, Layout]:
        """The next step, room made for what it moves, and the layout it is for; FilesystemError if not certain."""
        widened = False
        while True:
            layout, longest = self.picture()
            step = next_step(layout, target, longest)
            if step.blocked and not widened and (cramped := cramped_metadata(layout)):
                widened = True
                self._widen(work, cramped)
                continue
            if step.blocked:
                # The guest has written since the request was judged.
                raise FilesystemError(step.blocked, errno.ENOSPC, Kind.OUT_OF_RANGE)
            step = self._no_more_than_a_chunk(layout, step, longest)
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

    def _no_more_than_a_chunk(self, layout: Layout, step: Step, longest: Longest) -> Step:
        """`step`, or a part of it where a balloon can give back afterwards what each cut takes from applications."""
        top = max((chunk.top for chunk in layout.chunks if not chunk.vacant), default=0)
        part = layout.size - data_chunk(layout.size)
        # What the balloon gives for a chunk should go by the same cut, so chunks go whole.
        if cut := next((c for c in layout.chunks if c.top - c.stripe_length < part < c.top), None):
            alone = layout.size - cut.top >= data_chunk(layout.size) // 2
            part = cut.top if alone else cut.top - cut.stripe_length
        part = max(sector_floor(part), sector_ceil(top))
        if not step.size < part < layout.size or not self._balloon.size():
            return step
        parted = next_step(layout, part, longest)
        return step if parted.blocked or parted.moves else parted

    def _widen(self, work: Work, chunk: Chunk) -> None:
        """A larger chunk for the metadata in `chunk`; what is short of room afterwards all the same blocks the step."""

        def certain() -> bool:
            cramped = cramped_metadata(self.picture()[0])
            return cramped is not None and cramped.logical == chunk.logical

        self._calls.widen(work, chunk, certain)

    def _leave_metadata_room(self, work: Work) -> None:
        """What was in a large chunk may be in a small one now: a larger one, before data takes the hole for it."""
        try:
            if cramped := cramped_metadata(self.picture()[0]):
                self._widen(work, cramped)
        except FilesystemError as error:
            if error.errno in (errno.EROFS, errno.ECANCELED):
                raise
            log.info("metadata stays in a small chunk: %s", error)  # the step is made all the same
