"""The facts the core decides on: frozen, in bytes and seconds, without any way to fetch them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from storaged.units import GIB, KIB, MIB

MOST_SUPERBLOCKS = 3 * 64 * KIB
"""Bytes that copies of the superblock keep read-only (exclude_super_stripes, fs/btrfs/block-group.c)."""


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

    `data_used` counts what is written and what is reserved for writes under way. Pinned bytes (freed, not yet
    committed) count as free because the next commit frees them. `data_readonly` is free room in chunks that are
    read-only for the moment, because a balance, a scrub or the kernel's cleaner is at work on them: it cannot be taken
    now, but applications have it again afterwards, so it counts as available. `unallocated` is what can become
    chunks. All logical bytes but `unallocated`, `size` and `device`, which are bytes of the device.
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
    metadata_readonly: int = 0
    """The part of `metadata_used` in chunks on their way out."""
    data_readonly: int = 0

    @property
    def data_free(self) -> int:
        """Bytes of data that fit into the data chunks there are, now."""
        return max(self.data_total - self.data_used - self.data_readonly, 0)

    @property
    def takeable(self) -> int:
        """Bytes of data that can be written or preallocated now."""
        return self.data_free + self.unallocated // self.data_copies

    @property
    def available(self) -> int:
        """Bytes of data that applications can write, now or once no chunk is read-only any more."""
        return self.takeable + self.data_readonly

    @property
    def metadata_headroom(self) -> int:
        """Bytes of metadata that fit before a new chunk is needed; may be negative."""
        return self.metadata_total - self.metadata_used - self.global_reserve


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Preallocated extents of applications that are not written yet: they can be, also while the filesystem is full.

    Logical bytes; what several files or snapshots share counts once. While it is not `known`, `size` is what was
    found so far. `files` counts each snapshot's own; `scanned` is the number of items read since the scan began.
    """

    size: int
    known: bool
    files: int = 0
    scanned: int = 0


@dataclass(frozen=True, slots=True)
class DirtyLimits:
    """The kernel's write-back limits. Of each pair the one that is not in force reads 0 (vm.dirty_*)."""

    dirty_bytes: int
    dirty_background_bytes: int
    dirty_ratio: int
    dirty_background_ratio: int


@dataclass(frozen=True, slots=True)
class KernelReclaim:
    """When the kernel relocates data chunks by itself (sysfs `allocation/data/`). It writes what it relocates.

    `threshold`: `bg_reclaim_threshold`, in percent (since Linux 5.19; off by default but on zoned devices). `dynamic`
    and `periodic`: `dynamic_reclaim` and `periodic_reclaim` (since 6.11, off by default). 0 where the kernel has none.
    """

    threshold: int = 0
    dynamic: int = 0
    periodic: int = 0

    @property
    def active(self) -> bool:
        """True when the kernel relocates anything."""
        return bool(self.threshold or self.dynamic or self.periodic)


@dataclass(frozen=True, slots=True)
class Config:
    """How the engine decides."""

    reserve: int = field(
        default=GIB,
        metadata={
            "help": "Kept away from the guest, for the host's own writes; hosts count on no less than 1 GiB.",
            "unit": "bytes",
            "reload": True,
        },
    )
    critical_enter: int = field(
        default=GIB,
        metadata={"help": "At or below this much free on the host: CRITICAL.", "unit": "bytes", "reload": True},
    )
    critical_leave: int = field(
        default=2 * GIB, metadata={"help": "Below this it stays CRITICAL.", "unit": "bytes", "reload": True}
    )
    low_enter: int = field(
        default=2 * GIB,
        metadata={"help": "At or below this much free on the host: LOW.", "unit": "bytes", "reload": True},
    )
    low_leave: int = field(
        default=4 * GIB, metadata={"help": "Below this it stays LOW.", "unit": "bytes", "reload": True}
    )
    settle_s: float = field(
        default=10.0, metadata={"help": "A better level must last this long before it counts.", "reload": True}
    )
    retry_first_s: float = field(
        default=1.0,
        metadata={
            "help": "A balloon that could not settle is tried again after this, then after twice that, and so on.",
            "least": 0.01,
            "reload": True,
        },
    )
    retry_most_s: float = field(
        default=30.0, metadata={"help": "Longest time between two tries.", "least": 0.01, "reload": True}
    )
    guard_every_s: float = field(
        default=1.0,
        metadata={
            "help": "How often metadata headroom is looked at while the balloon holds anything.",
            "least": 0.1,
            "reload": True,
        },
    )
    guard_soon_s: float = field(
        default=0.2,
        metadata={
            "help": "The same while headroom is small or has just been given.",
            "least": 0.01,
            "reload": True,
        },
    )
    guard_calm_s: float = field(
        default=2.5,
        metadata={
            "help": "The same while there is so much headroom that nothing could use it up in that time.",
            "least": 0.1,
            "reload": True,
        },
    )
    trim_again_s: float = field(
        default=60.0,
        metadata={"help": "Shortest time between two trims while the level stays above NORMAL.", "reload": True},
    )
    capacity_wait_s: float = field(
        default=5.0, metadata={"help": "How long a grow waits for its device.", "reload": True}
    )
    auto_grow: bool = field(
        default=False,
        metadata={"help": "Grow the filesystem to its device whenever that grows, unasked.", "reload": True},
    )
    resize_impact: str = field(
        default="normal",
        metadata={
            "help": "How much of the disk a shrink takes from applications that write meanwhile: it rests 8 times as"
            " long as it has moved (low), as long (normal), or not (high). Nobody writes: no rest.",
            "choices": ("low", "normal", "high"),
            "reload": True,
        },
    )
    capacity_poll_s: float = field(
        default=0.25, metadata={"help": "How often it looks at the device.", "least": 0.01, "reload": True}
    )
    low_dirty: int = field(
        default=64 * MIB,
        metadata={"help": "The kernel's vm.dirty_bytes at LOW.", "unit": "bytes", "least": MIB, "reload": True},
    )
    critical_dirty: int = field(
        default=8 * MIB,
        metadata={"help": "The kernel's vm.dirty_bytes at CRITICAL.", "unit": "bytes", "least": MIB, "reload": True},
    )
    minimum_filesystem: int = field(default=256 * MIB, metadata={"fixed": True})
    """The kernel refuses to resize below this (fs/btrfs/ioctl.c, btrfs_ioctl_resize)."""
