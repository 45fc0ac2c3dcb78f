"""Clock, write-back limits and journal in memory."""

from __future__ import annotations

import json

from storaged.core.model import DirtyLimits
from storaged.sim.faults import Faults

FOUND = DirtyLimits(0, 0, 20, 10)
"""The kernel's defaults (mm/page-writeback.c)."""


class SimClock:
    """Time that moves only when it is told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000 + self.now


class SimSysctl:
    """vm.dirty_* in memory, with the kernel's rule that a limit in bytes and its ratio exclude each other."""

    def __init__(self, found: DirtyLimits = FOUND, faults: Faults | None = None) -> None:
        self.limits = found
        self.faults = faults or Faults()

    def dirty_limits(self) -> DirtyLimits:
        return self.limits

    def set_dirty_limits(self, limits: DirtyLimits) -> None:
        self.faults.meet("set_dirty_limits")
        self.limits = DirtyLimits(
            limits.dirty_bytes,
            limits.dirty_background_bytes,
            0 if limits.dirty_bytes else limits.dirty_ratio,
            0 if limits.dirty_background_bytes else limits.dirty_background_ratio,
        )


class MemoryJournal:
    """Survives the service that wrote it, as a file would; goes through JSON so that nothing else gets in."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.text: str | None = None
        self.faults = faults or Faults()

    def load(self) -> dict[str, object] | None:
        if self.text is None:
            return None
        record: dict[str, object] = json.loads(self.text)
        return record

    def save(self, record: dict[str, object]) -> None:
        self.faults.meet("save")
        self.text = json.dumps(record)
