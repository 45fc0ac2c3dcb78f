"""A picture of a filesystem's only device: its chunks, and the holes between them. Plain data and arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from storaged.units import MIB

KERNEL_MINIMUM = 256 * MIB
"""BTRFS_IOC_RESIZE refuses less (fs/btrfs/ioctl.c, btrfs_ioctl_resize)."""
FIRST_USABLE = MIB
"""No chunk lies in the first MiB of a device (BTRFS_DEVICE_RANGE_RESERVED)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block group and where it lies. `used` includes `balloon`, the bytes of it that are the balloon's.

    `logical` and `length` are in the filesystem's address space; `stripes` are the starts on the device, each
    `stripe_length` bytes (more than one for DUP).
    """

    logical: int
    length: int
    used: int
    balloon: int
    kind: str  # data, metadata, system or mixed
    stripes: tuple[int, ...]
    stripe_length: int
    rooms: tuple[int, ...] = ()
    """Lengths of the pieces of free room in it, longest first; data chunks only."""
    balloon_rooms: tuple[int, ...] = ()
    """Lengths of the balloon's pieces in it: room as well, once the balloon gives it up."""
    pinned: bool = False
    """An active swap file lies in it: the kernel does not move it."""

    def __post_init__(self) -> None:
        for name in ("rooms", "balloon_rooms"):
            if len(pieces := getattr(self, name)) > 1:
                object.__setattr__(self, name, tuple(sorted(pieces, reverse=True)))

    @property
    def top(self) -> int:
        """The end of its topmost stripe on the device."""
        return max(self.stripes) + self.stripe_length

    @property
    def vacant(self) -> bool:
        """True when nothing but the balloon holds it, so that it goes without a byte being moved."""
        return self.kind in ("data", "mixed") and self.used <= self.balloon

    @property
    def held(self) -> int:
        """Bytes that have to move when it goes."""
        return max(self.used - self.balloon, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """All chunks of a filesystem on its only device."""

    size: int
    device: int
    chunks: tuple[Chunk, ...]
    global_reserve: int = 0
    metadata_chunk: int = 256 * MIB

    def as_it_is(self) -> Layout:
        """The same, with room only where nobody holds it now, not even the balloon."""
        return replace(self, chunks=tuple(replace(chunk, balloon_rooms=()) for chunk in self.chunks))


Longest = Callable[[Chunk], int]
"""The longest extent of a chunk that is not the balloon's, in bytes; asked for only where it matters."""


def asked_once(longest: Longest) -> Longest:
    """The same, which asks for each chunk at most once."""
    known: dict[int, int] = {}

    def once(chunk: Chunk) -> int:
        if chunk.logical not in known:
            known[chunk.logical] = longest(chunk)
        return known[chunk.logical]

    return once


def holes(staying: Iterable[Chunk], size: int) -> list[int]:
    """Lengths of what is not allocated below `size`, lowest first."""
    return [length for _, length in holes_at(staying, size)]


def holes_at(staying: Iterable[Chunk], size: int) -> list[tuple[int, int]]:
    """The same with where each starts: (start, length)."""
    found = []
    at = FIRST_USABLE
    for start, end in sorted((stripe, stripe + chunk.stripe_length) for chunk in staying for stripe in chunk.stripes):
        if start >= size:
            break
        if start > at:
            found.append((at, start - at))
        at = max(at, end)
    if size > at:
        found.append((at, size - at))
    return found


def left_to_move(layout: Layout, target: int) -> int:
    """Bytes that lie in chunks reaching above `target`."""
    return sum(chunk.held for chunk in layout.chunks if chunk.top > target)


def with_balloon(chunks: Iterable[Chunk], extents: Iterable[tuple[int, int]]) -> tuple[Chunk, ...]:
    """`chunks` with the balloon's `extents`, pairs of (logical start, length), counted into them."""
    ordered = sorted(chunks, key=lambda chunk: chunk.logical)
    pieces: list[list[int]] = [[] for _ in ordered]
    index = 0
    for start, length in sorted(extents):
        # An extent lies in one chunk: no data extent crosses a block group.
        while index < len(ordered) and ordered[index].logical + ordered[index].length <= start:
            index += 1
        if index < len(ordered) and ordered[index].logical <= start:
            pieces[index].append(length)
    return tuple(
        replace(chunk, balloon=min(sum(held), chunk.used), balloon_rooms=tuple(held))
        for chunk, held in zip(ordered, pieces, strict=True)
    )
