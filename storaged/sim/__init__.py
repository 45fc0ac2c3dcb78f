"""The ports in memory, with faults: powers tests, `--sim` and the fleet simulation."""

from storaged.sim.disk import SimDisk
from storaged.sim.filesystem import SimBalloonFile, SimFilesystem
from storaged.sim.prealloc import SimPreallocated
from storaged.sim.resizer import SimResizer
from storaged.sim.system import MemoryJournal, SimClock, SimSysctl
from storaged.sim.world import make_world

__all__ = [
    "MemoryJournal",
    "SimBalloonFile",
    "SimClock",
    "SimDisk",
    "SimFilesystem",
    "SimPreallocated",
    "SimResizer",
    "SimSysctl",
    "make_world",
]
