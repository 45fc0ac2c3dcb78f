"""One shrink of five layouts by three means: how small, what is written, how long.

The peers are one call of `btrfs filesystem resize` to the same size, and bisection as systemd-homed shrinks: ask for
what is used and a little, and halve the way after each refusal. Bisection works on a copy of the same image; what it
does to the filesystem is noted.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import Row, milliseconds, say
from benchmarks.resize import device_written, resized, resized_by_tool, wait_for_child
from lab.daemon import Daemon
from lab.layouts import Recipe, build, recipe
from lab.loop import Guest, run
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.rpc.proto import storaged_v1_pb2
from storaged.units import GIB, MIB, sector_ceil

SECTION = "shrink"
TOOL, HOMED = "btrfs filesystem resize", "bisection"
POLL_S = 0.01
HOMED_MARGIN = 16 * MIB
"""systemd's src/home/homework-luks.c: a btrfs home is asked to come down to what it uses and 16 MiB."""
HOMED_STEP = 16 * MIB
LEAST = 256 * MIB

_PLAIN = replace(
    recipe(0), size=2 * GIB, mkfs=(), mount="", snapshots=0, reflinks=False, preallocated=False, limit=None
)
LAYOUTS = {
    "a tenth used": replace(_PLAIN, seed=1, fill=0.1, large_share=0.9, deleted=0.0, rounds=1),
    "half of it deleted": replace(_PLAIN, seed=2, fill=0.5, large_share=0.9, deleted=0.5, rounds=2),
    "small files": replace(_PLAIN, seed=3, fill=0.3, large_share=0.5, deleted=0.2, rounds=2),
    "snapshots": replace(_PLAIN, seed=4, fill=0.4, large_share=0.9, deleted=0.5, rounds=3, snapshots=3),
    "compressed": replace(
        _PLAIN, seed=5, mount="compress-force=zstd:1", fill=0.6, large_share=0.9, deleted=0.5, rounds=2
    ),
}


@dataclass(slots=True)
class _Layout:
    """An image kept aside, put back before every attempt."""

    guest: Guest
    original: Path

    def restore(self) -> Guest:
        """The layout as it was made, mounted."""
        self.drop()
        run("cp", "--sparse=always", self.original, self.guest.image)
        self.guest.attach()
        self.guest.mount()
        return self.guest

    def drop(self) -> None:
        """Nothing mounted, nothing attached."""
        if os.path.ismount(self.guest.mountpoint):
            self.guest.unmount()
        if self.guest.device:
            self.guest.detach()


def _made(directory: Path, plan: Recipe) -> _Layout:
    guest = Guest(directory, plan.size, name=f"layout{plan.seed}", mount=plan.mount)
    build(guest, plan)
    layout = _Layout(guest, guest.image.with_suffix(".original"))
    layout.drop()
    run("cp", "--sparse=always", guest.image, layout.original)
    return layout


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    rows = []
    for name, plan in LAYOUTS.items():
        say(f"shrink: {name}")
        layout = _made(directory, plan)
        rows += _layout(directory, name, layout, 1 if quick else 3)
        layout.drop()
        layout.guest.image.unlink()
        layout.original.unlink()
    return rows


def _layout(directory: Path, name: str, layout: _Layout, runs: int) -> list[Row]:
    seconds = Row(SECTION, f"{name}: time to the bound", "ms", TOOL)
    written = Row(SECTION, f"{name}: written", "MB", TOOL)
    smallest = Row(SECTION, f"{name}: size reached", "MB", HOMED)
    further = Row(SECTION, f"{name}: size reached, best effort", "MB", HOMED)
    for _ in range(runs):
        target = _ours(directory, layout.restore(), seconds, written)
        smallest.ours.append(target / 1e6)
        _tool(layout.restore(), target, seconds, written)
        size, took, wrote, read_only = _bisected(layout.restore())
        smallest.peer.append(size / 1e6)
        further.peer.append(size / 1e6)
        _best_effort(directory, layout.restore(), further)
        smallest.facts.setdefault("bisection_ms", []).append(took)
        smallest.facts.setdefault("bisection_written_mb", []).append(wrote / 1e6)
        smallest.facts.setdefault("bisection_read_only", []).append(read_only)
    return [row for row in (seconds, written, smallest, further) if row.ours]


def _ours(directory: Path, guest: Guest, seconds: Row, written: Row) -> int:
    with Daemon(directory, stateful=guest.mountpoint) as daemon:
        target = daemon.minimum()
        wait_for_child(daemon)
        before = device_written(guest)
        if target < guest.image.stat().st_size:
            seconds.ours.append(milliseconds(lambda: resized(daemon, target, POLL_S)))
        written.ours.append((device_written(guest) - before) / 1e6)
    return target


def _best_effort(directory: Path, guest: Guest, further: Row) -> None:
    """One job from the full size to as small as it gets."""
    with Daemon(directory, stateful=guest.mountpoint) as daemon:
        wait_for_child(daemon)
        before = device_written(guest)

        def shrink() -> None:
            daemon.storage.Resize(storaged_v1_pb2.ResizeRequest(size_bytes=LEAST, best_effort=True), timeout=20)
            while daemon.status().resize_in_progress:
                time.sleep(POLL_S)

        further.facts.setdefault("ms", []).append(milliseconds(shrink))
        further.facts.setdefault("written_mb", []).append((device_written(guest) - before) / 1e6)
        further.ours.append(daemon.status().current_size / 1e6)


def _tool(guest: Guest, target: int, seconds: Row, written: Row) -> None:
    before = device_written(guest)
    try:
        seconds.peer.append(milliseconds(lambda: resized_by_tool(guest, target)))
    except RuntimeError as error:
        seconds.facts.setdefault("tool_refused", []).append(str(error)[-80:])
    written.peer.append((device_written(guest) - before) / 1e6)


def _bisected(guest: Guest) -> tuple[int, float, int, bool]:
    """The size that bisection comes to, milliseconds, bytes written, and whether the filesystem is read-only now."""
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    try:
        space = filesystem.space()
        before = device_written(guest)
        target = max(sector_ceil(space.data_used + space.metadata_used + HOMED_MARGIN), LEAST)

        def bisect() -> None:
            refused, reached = target, filesystem.size()
            attempt = target
            while reached - attempt >= HOMED_STEP or attempt == target:
                try:
                    resized_by_tool(guest, attempt)
                except RuntimeError:
                    if filesystem.read_only():
                        return
                    refused = attempt
                else:
                    reached = attempt
                if reached <= target:
                    return
                attempt = sector_ceil((refused + reached) // 2)

        took = milliseconds(bisect)
        return filesystem.size(), took, device_written(guest) - before, filesystem.read_only()
    finally:
        filesystem.close()
