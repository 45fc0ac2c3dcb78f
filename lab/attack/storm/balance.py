"""The one case in which the kernel may force the filesystem read-only (docs/promise.md), and how it is told apart.

A balance by hand makes the only metadata that has room read-only while nothing is unallocated.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.core.model import MOST_SUPERBLOCKS, Space
from storaged.units import MIB

WITH_METADATA = ("full-balance",)
"""The storm's commands that relocate metadata."""
LOOK_EVERY_S = 0.002
NOTHING = MIB
LITTLE = 16 * MIB
"""Metadata that fits before a new chunk is needed: where more does, the balance is not what starves it."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the filesystem showed while a command ran."""

    read_only: bool
    unallocated: int
    metadata_readonly: int
    metadata_free: int = 0

    @property
    def starved(self) -> bool:
        """True while metadata is being relocated and has no room to grow."""
        relocated = self.metadata_readonly > MOST_SUPERBLOCKS
        return relocated and self.metadata_free < LITTLE and self.unallocated < NOTHING


def looked(space: Space) -> Look:
    """The part of `space` that matters here."""
    free = max(space.metadata_total - space.metadata_used, 0)
    return Look(space.read_only, space.unallocated, space.metadata_readonly, free)


def forced_read_only(command: str, looks: Sequence[Look]) -> bool:
    """True when `looks` during `command` show the named case, and nothing wider.

    It was writable when the command began; it became read-only while the command ran; and the last look before that,
    or the first after it, shows starved metadata.
    """
    if command not in WITH_METADATA or not looks or looks[0].read_only:
        return False
    first = next((index for index, look in enumerate(looks) if look.read_only), None)
    return first is not None and any(look.starved for look in looks[first - 1 : first + 1])


@contextlib.contextmanager
def watched(mountpoint: str, command: str) -> Iterator[list[Look]]:
    """What is seen while the block runs `command`: each look that differs from the last one; none where it is safe."""
    looks: list[Look] = []
    if command not in WITH_METADATA:
        yield looks
        return
    over = threading.Event()
    filesystem = BtrfsFilesystem(mountpoint)

    def watch() -> None:
        while True:
            last = over.is_set()
            with contextlib.suppress(OSError):
                now = looked(filesystem.space())
                if not looks or looks[-1] != now:
                    looks.append(now)
            if last:
                return
            time.sleep(LOOK_EVERY_S)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()
        filesystem.close()
