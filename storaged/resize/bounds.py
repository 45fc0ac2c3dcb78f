"""How small a filesystem can get, from a picture of its device: pure arithmetic, no filesystem touched.

Two numbers: the *guaranteed* size needs no byte of anybody's data to move; the *reachable* one is what
evacuation, chunk by chunk, gets to. The first is answered to hosts; the second has its place here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from storaged.units import MIB, sector_ceil

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

    @property
    def top(self) -> int:
        """The end of its topmost stripe on the device."""
        return max(self.stripes) + self.stripe_length

    @property
    def vacant(self) -> bool:
        """True when nothing but the balloon holds it, so that it goes without a byte being moved."""
        return self.kind == "data" and self.used <= self.balloon


@dataclass(frozen=True, slots=True)
class Layout:
    """All chunks of a filesystem on its only device."""

    size: int
    device: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The answer: `minimum` is what a shrink is promised to reach; `why` names what stands at the bound."""

    minimum: int
    guaranteed: int
    why: str


def compute(layout: Layout) -> Bounds:
    """Bounds of `layout`: the top of what holds anything but the balloon, a sector up, at least 256 MiB."""
    holders = [chunk for chunk in layout.chunks if not chunk.vacant]
    top = max(holders, key=lambda chunk: chunk.top, default=None)
    if top is None or top.top <= KERNEL_MINIMUM:
        return Bounds(KERNEL_MINIMUM, KERNEL_MINIMUM, "the kernel resizes no filesystem below 256 MiB")
    guaranteed = sector_ceil(top.top)
    why = f"a {top.kind} chunk with {top.used - top.balloon} bytes in use ends at {top.top} on the device"
    return Bounds(guaranteed, guaranteed, why)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the kernel's resize: first let the balloon go out of `vacate`, then cut to `size`."""

    size: int
    vacate: tuple[Chunk, ...]
    moves: int


def plan_shrink(layout: Layout, target: int) -> tuple[Step, ...]:
    """The calls that take `layout` to `target`, each freeing at most one chunk that the balloon holds.

    One chunk at a time keeps what applications may write from jumping: the room that the balloon gives up is
    cut away by the same step. `target` must not be below the guaranteed bound; raises ValueError if it is.
    """
    minimum = compute(layout).guaranteed
    if target < minimum:
        raise ValueError(f"target {target} is below the guaranteed bound {minimum}")
    steps: list[Step] = []
    above = sorted((c for c in layout.chunks if c.top > target), key=lambda c: c.top, reverse=True)
    held = [chunk for chunk in above if chunk.balloon]
    for index, chunk in enumerate(held):
        # Everything above this chunk's lowest stripe must be gone or empty by then; the next balloon chunk
        # starts the next step.
        floor = held[index + 1].top if index + 1 < len(held) else target
        steps.append(Step(max(sector_ceil(floor), target), (chunk,), 0))
    if not steps or steps[-1].size != target:
        steps.append(Step(target, (), 0))
    return tuple(steps)


def balloon_above(layout: Layout, target: int) -> int:
    """Bytes of the balloon in chunks that reach above `target`."""
    return sum(chunk.balloon for chunk in layout.chunks if chunk.top > target)


def with_balloon(chunks: Iterable[Chunk], extents: Iterable[tuple[int, int]]) -> tuple[Chunk, ...]:
    """`chunks` with the balloon's `extents`, pairs of (logical start, length), counted into them."""
    ordered = sorted(chunks, key=lambda chunk: chunk.logical)
    held = [0] * len(ordered)
    index = 0
    for start, length in sorted(extents):
        # FIEMAP merges neighbours, so one extent may run over several chunks.
        end = start + length
        while index < len(ordered) and ordered[index].logical + ordered[index].length <= start:
            index += 1
        at = index
        while at < len(ordered) and ordered[at].logical < end:
            chunk = ordered[at]
            held[at] += max(min(end, chunk.logical + chunk.length) - max(start, chunk.logical), 0)
            at += 1
    return tuple(replace(chunk, balloon=min(share, chunk.used)) for chunk, share in zip(ordered, held, strict=True))
