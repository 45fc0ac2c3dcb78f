"""Keeps metadata from running out under the balloon, without making room for data (docs/decisions/0002-metadata.md).

Blocking; the engine's lock is held by whoever calls.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace

from storaged.balloon import target
from storaged.core.model import Space
from storaged.core.ports import BalloonFile, Filesystem
from storaged.errors import FilesystemError
from storaged.resize.fit import LEAST_MARGIN
from storaged.resize.layout import Chunk, Layout, holes, with_balloon
from storaged.units import MIB, format_size

CLEANER_WAIT_S = 1.0
DISCARD_WAIT_S = 30.0
"""An empty chunk is deleted only after it was discarded, some 10 s after a commit (BTRFS_DISCARD_UNUSED_DELAY)."""
POLL_S = 0.02
ENOUGH_OF_A_CHUNK = 0.5
"""Where less is left, the kernel makes a smaller chunk."""
WORTH_A_CHUNK = 16 * MIB
"""Bytes of a copy: a smaller metadata chunk would be used up at once."""


@dataclass(frozen=True, slots=True)
class Relief:
    """Bytes that the balloon gave up for metadata.

    `refused`: it needed room, but the grant and what may be taken beyond it are used up.
    """

    given: int = 0
    refused: bool = False


class MetadataCare:
    """Looks after the metadata of one filesystem."""

    def __init__(self, filesystem: Filesystem, balloon: BalloonFile) -> None:
        self._fs = filesystem
        self._balloon = balloon
        self._empty_since: float | None = None

    def widen(self, spare: float) -> str:
        """A larger chunk where metadata is cramped and `spare` times one is unallocated; says what it did."""
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

    def make_room(self, space: Space) -> None:
        """Before the balloon takes the rest: data that came and went may have taken all chunks before `widen`."""
        if not target.cramped(space):
            return
        wanted = ENOUGH_OF_A_CHUNK * space.metadata_chunk * space.metadata_copies
        if space.unallocated < wanted and space.data_free >= 2 * space.data_chunk:
            self.hand_back_chunks()
            # Where metadata is so full that no balance may run, the kernel's cleaner does it after a commit.
            until = time.monotonic() + CLEANER_WAIT_S
            while self._fs.space().unallocated < wanted and time.monotonic() < until:
                time.sleep(POLL_S)
        with contextlib.suppress(FilesystemError):  # busy, or no room for it: metadata is looked after as it grows
            self.widen(ENOUGH_OF_A_CHUNK)

    def relieve(self, left: int, owed: int, reserve: int) -> Relief:
        """Let metadata have its next chunk if it is about to run out: empty ones first, then one of the balloon's.

        `left` of the grant and `owed` are bytes of the host's disk, see `target.relief_allowed`.
        """
        space = self._fs.space()
        if self._balloon.size() and target.cramped(space):
            with contextlib.suppress(FilesystemError):
                self.widen(ENOUGH_OF_A_CHUNK)
            space = self._fs.space()
        if space.exclusive_operation != "none" or not target.relief_near(space, self._balloon.size()):
            return Relief()
        due = target.relief_due(space, self._balloon.size())
        data = [chunk for chunk in self.layout().chunks if chunk.kind == "data"]
        if any(not chunk.used for chunk in data):
            self.hand_back_chunks()  # where a balance finds no room, the kernel's cleaner does it after some seconds
            space = self._fs.space()
            if not target.relief_near(space, self._balloon.size()):
                return Relief()
            data = [chunk for chunk in self.layout().chunks if chunk.kind == "data"]
        if self._on_its_way(data, space):
            return Relief()
        owned = sorted((chunk.length, chunk.logical) for chunk in data if chunk.vacant)
        if not owned:
            return Relief()
        # The smallest that is worth it: what metadata does not take of it has to be taken back.
        worth = WORTH_A_CHUNK * space.metadata_copies
        length, logical = next((chunk for chunk in owned if chunk[0] * space.data_copies >= worth), owned[-1])
        size = target.relief_size(space, length)
        if not target.relief_allowed(size, left, owed if due else reserve, reserve):
            return Relief(refused=due)
        given = self._balloon.vacate([(logical, length)])
        self._fs.sync()
        self.hand_back_chunks()
        with contextlib.suppress(FilesystemError):  # else a writer of data is soon there, and takes it
            self.widen(ENOUGH_OF_A_CHUNK)
        return Relief(given)

    def _on_its_way(self, data: list[Chunk], space: Space) -> bool:
        """True while an empty chunk that is worth it may still become unallocated."""
        worth = WORTH_A_CHUNK * space.metadata_copies
        if not any(not chunk.used and chunk.length * space.data_copies >= worth for chunk in data):
            self._empty_since = None
            return False
        now = time.monotonic()
        if self._empty_since is None:
            self._empty_since = now
        return now - self._empty_since < DISCARD_WAIT_S

    def layout(self) -> Layout:
        """The filesystem's chunks with the balloon's share counted in."""
        layout = self._fs.layout()
        if not self._balloon.size():
            return layout
        return replace(layout, chunks=with_balloon(layout.chunks, self._balloon.extents()))

    def hand_back_chunks(self) -> None:
        """After a deflation with metadata short: the room is wanted now, not when the cleaner comes by."""
        try:
            self._fs.reclaim_empty_chunks()
        except FilesystemError:
            with contextlib.suppress(FilesystemError):
                self._fs.sync()  # no room even for that: the next commit wakes the kernel's cleaner
