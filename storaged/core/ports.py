"""How effects reach the world. Implemented by the kernel adapters and by the simulation, with one contract.

Every method may block; callers run them off the event loop. Errors are `storaged.errors.FilesystemError`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from storaged.core.model import DirtyLimits, KernelReclaim, Space, Unwritten
from storaged.resize.layout import Layout


class Filesystem(Protocol):
    """The guest's filesystem."""

    @property
    def mountpoint(self) -> str: ...

    @property
    def uuid(self) -> str: ...

    def space(self) -> Space:
        """What is used and what is left, true at once, without a commit."""

    def metadata_headroom(self) -> int:
        """`Space.metadata_headroom` alone; microseconds, never blocks."""

    def layout(self) -> Layout:
        """Every chunk and where it lies, without the balloon's share."""

    def data_extents(self, start: int, length: int) -> list[tuple[int, int]]:
        """(logical start, length) of every data extent in the range, as of the last commit."""

    def size(self) -> int:
        """Bytes the filesystem has; microseconds, never blocks."""

    def device_size(self) -> int:
        """Bytes the device has now."""

    def statvfs_available(self) -> int | None:
        """f_bavail in bytes; None while the kernel's number cannot be believed."""

    def sync(self) -> None:
        """Commit the running transaction."""

    def discard_supported(self) -> bool:
        """True when freed blocks can be handed back to the host."""

    def untrimmed(self) -> int | None:
        """Freed bytes whose discard is still queued; None when the kernel does not say."""

    def kernel_reclaim(self) -> KernelReclaim:
        """When the kernel relocates data chunks by itself; microseconds, never blocks."""

    def set_kernel_reclaim(self, settings: KernelReclaim) -> None:
        """Change that, until the filesystem is unmounted."""

    def device_written(self) -> int:
        """Bytes written to the device since it appeared; rewriting a block counts again."""

    def trim(self, exclusive: AbstractContextManager[object] | None = None) -> int:
        """Discard all free space; bytes discarded as the kernel counts.

        While a chunk is discarded its free room is hidden from every account, so `exclusive` is entered for each chunk.
        """

    def reclaim_empty_chunks(self) -> None:
        """Turn completely empty data chunks back into unallocated space."""

    def grow_metadata(self) -> None:
        """Replace small metadata chunks by one of the kernel's present size."""


class BalloonFile(Protocol):
    """The file whose extents are the balloon."""

    @property
    def root_id(self) -> int:
        """The id of the balloon's subvolume; 0 while there is none."""

    @property
    def found(self) -> list[tuple[str, bool]]:
        """What was found and done when it was opened: (text, whether it is a warning)."""

    def size(self) -> int:
        """Bytes it holds now, without waiting for a commit."""

    def extend(self, size: int) -> None:
        """Take `size` more bytes: all or nothing. errno ENOSPC or EDQUOT when that cannot be."""

    def shrink(self, size: int) -> None:
        """Give at least `size` bytes back, whole extents from the end; they are free after the next commit."""

    def extents(self) -> list[tuple[int, int]]:
        """(logical start, length) of every extent as it lies on the disk; an extent goes only as a whole."""

    def vacate(self, ranges: list[tuple[int, int]]) -> int:
        """Give back every extent that touches one of the logical (start, length) ranges; bytes given."""

    def remove(self) -> None:
        """Give everything back and leave no trace."""


class Resizer(Protocol):
    """The kernel's resize, and its balance of one chunk, in a process of their own."""

    def resize(self, size: int) -> None:
        """Make the filesystem `size` bytes; returns when it is. FilesystemError with the kernel's errno."""

    def move_out(self, logical: int, *, metadata: bool = False) -> None:
        """Move all there is out of the data chunk at `logical`, and free it. FilesystemError: ENOSPC, nothing is lost.

        Where to is the kernel's choice: other data chunks, new ones. A `metadata` chunk only where a hole for it is
        certain.
        """

    def cancel(self) -> None:
        """Stop what is under way, from another thread; does nothing when nothing is."""

    def written(self) -> int:
        """Bytes the kernel wrote on behalf of both since the process began."""

    def close(self) -> None:
        """End the process."""


class Preallocated(Protocol):
    """What applications have preallocated and not written, in all subvolumes but the balloon's."""

    def start(self) -> None:
        """Begin the first scan, in the background and at idle priority."""

    def look(self, balloon_root: int, patience_s: float) -> Unwritten:
        """What it comes to now; not known before the first scan is complete, and when it takes over `patience_s`.

        `balloon_root` is the id of the balloon's subvolume, 0 when there is none. Its extents are not counted, also
        where a snapshot shares them. Any thread; never raises.
        """

    def close(self) -> None:
        """End the scan and its process."""


class Sysctl(Protocol):
    """The kernel's write-back limits."""

    def dirty_limits(self) -> DirtyLimits: ...

    def set_dirty_limits(self, limits: DirtyLimits) -> None: ...


class Clock(Protocol):
    """Time, as the daemon sees it."""

    def monotonic(self) -> float: ...

    def wall(self) -> float: ...


class JournalStore(Protocol):
    """One small document that is either the old one or the new one, whatever happens."""

    def load(self) -> dict[str, object] | None: ...

    def save(self, record: dict[str, object]) -> None: ...


@dataclass(slots=True)
class World:
    """The ports of one filesystem, real or simulated."""

    filesystem: Filesystem
    balloon: BalloonFile
    preallocated: Preallocated
    resizer: Resizer
    sysctl: Sysctl
    clock: Clock
    journal: JournalStore
    simulated: bool = False
    poll_s: float = 0.1
    """How often a running resize is looked at."""

    def close(self) -> None:
        """Let go of what the real ports hold open: the filesystem can be unmounted afterwards."""
        for port in (self.resizer, self.balloon, self.filesystem):
            close = getattr(port, "close", None)
            if close is not None:
                close()
