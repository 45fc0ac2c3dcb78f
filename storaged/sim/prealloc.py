"""Preallocated extents in memory."""

from __future__ import annotations

from storaged.core.model import Unwritten
from storaged.sim.disk import SimDisk


class SimPreallocated:
    """`core.ports.Preallocated` on a SimDisk: what was preallocated there, and whether it is `known` yet."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        self.known = True

    def start(self) -> None:
        """There is nothing to begin."""

    def look(self, balloon_root: int, patience_s: float) -> Unwritten:  # noqa: ARG002  # known at once
        self.disk.faults.meet("look")
        with self.disk.lock:
            return Unwritten(self.disk.unwritten if self.known else 0, self.known, int(self.disk.unwritten > 0))

    def close(self) -> None:
        """There is nothing to stop."""
