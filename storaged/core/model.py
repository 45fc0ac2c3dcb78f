"""The facts the core decides on: frozen, in bytes and seconds, without any way to fetch them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from storaged.units import GIB, MIB


class Told(enum.IntEnum):
    """What the host says of its disk (`vm_tools.StatefulDiskSpaceState`, same numbers)."""

    NONE = 0
    NORMAL = 1
    LOW = 2
    CRITICAL = 3


class Level(enum.IntEnum):
    """The guest's own view of the host's pressure; ordered, worse is greater."""

    NORMAL = 1
    LOW = 2
    CRITICAL = 3


@dataclass(frozen=True, slots=True)
class HostReport:
    """One UpdateStorageBalloon as it was told. `at` is monotonic seconds, `wall` seconds since the epoch."""

    told: Told
    free: int
    at: float
    wall: float = 0.0


@dataclass(frozen=True, slots=True)
class Space:
    """How a filesystem's bytes are spent, from the kernel's own accounting (sysfs `allocation/`).

    `data_used` counts what is written, what is reserved for writes under way and what is read-only; pinned
    bytes (freed, not yet committed) count as free because the next commit frees them. `unallocated` is what
    can become chunks. All logical bytes but `unallocated`, `size` and `device`, which are bytes of the device.
    """

    size: int
    device: int
    data_total: int
    data_used: int
    metadata_total: int
    metadata_used: int
    global_reserve: int
    unallocated: int
    data_chunk: int
    metadata_chunk: int
    data_pinned: int = 0
    data_copies: int = 1
    metadata_copies: int = 1
    mixed: bool = False
    read_only: bool = False
    exclusive_operation: str = "none"

    @property
    def data_free(self) -> int:
        """Bytes of data that fit into the data chunks there are."""
        return max(self.data_total - self.data_used, 0)

    @property
    def available(self) -> int:
        """Bytes of data that applications can still write."""
        return self.data_free + self.unallocated // self.data_copies

    @property
    def metadata_headroom(self) -> int:
        """Bytes of metadata that fit before a new chunk is needed; may be negative."""
        return self.metadata_total - self.metadata_used - self.global_reserve


@dataclass(frozen=True, slots=True)
class DirtyLimits:
    """The kernel's write-back limits. Of each pair the one that is not in force reads 0 (vm.dirty_*)."""

    dirty_bytes: int
    dirty_background_bytes: int
    dirty_ratio: int
    dirty_background_ratio: int


@dataclass(frozen=True, slots=True)
class Config:
    """What an administrator may choose; sizes in bytes, times in seconds."""

    reserve: int = GIB
    """Kept away from the guest: upstream's number, and room for the host's own writes."""
    low_enter: int = 2 * GIB
    low_leave: int = 4 * GIB
    critical_enter: int = GIB
    critical_leave: int = 2 * GIB
    settle_s: float = 10.0
    """How long a better level must last before it counts."""
    retry_first_s: float = 1.0
    retry_most_s: float = 30.0
    guard_every_s: float = 1.0
    """How often metadata headroom is looked at while the balloon holds anything."""
    guard_soon_s: float = 0.2
    """The same while headroom is small or has just been given."""
    guard_calm_s: float = 2.5
    """The same while there is so much headroom that nothing could use it up in that time."""
    trim_again_s: float = 60.0
    """Shortest time between two trims while the level stays above NORMAL."""
    capacity_wait_s: float = 5.0
    capacity_poll_s: float = 0.25
    low_dirty: int = 64 * MIB
    critical_dirty: int = 8 * MIB
    minimum_filesystem: int = 256 * MIB
    """The kernel refuses to resize below this (fs/btrfs/ioctl.c, btrfs_ioctl_resize)."""
