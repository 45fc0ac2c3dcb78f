"""A whole simulated world in one call."""

from __future__ import annotations

from storaged.core.ports import Clock, JournalStore, World
from storaged.sim.disk import SimDisk
from storaged.sim.filesystem import SimBalloonFile, SimFilesystem
from storaged.sim.prealloc import SimPreallocated
from storaged.sim.resizer import SimResizer
from storaged.sim.system import MemoryJournal, SimClock, SimSysctl


def make_world(
    disk: SimDisk,
    *,
    clock: Clock | None = None,
    sysctl: SimSysctl | None = None,
    journal: JournalStore | None = None,
) -> World:
    """The ports of `disk`. Pass the old `sysctl` and `journal` to simulate a restart."""
    return World(
        filesystem=SimFilesystem(disk),
        balloon=SimBalloonFile(disk),
        preallocated=SimPreallocated(disk),
        resizer=SimResizer(disk),
        sysctl=sysctl or SimSysctl(faults=disk.faults),
        clock=clock or SimClock(),
        journal=journal or MemoryJournal(disk.faults),
        simulated=True,
        poll_s=0.01,
    )
