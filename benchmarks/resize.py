"""How long a resize takes until the host sees it done, against `btrfs filesystem resize`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Goal, Row, in_turns, milliseconds, say
from benchmarks.process import children
from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB, SECTOR

SECTION = "resize"
PEER = "btrfs filesystem resize"
GOAL = Goal(1.05, of_ratio=True)
DISK, HALF = 40 * GIB, 20 * GIB
CYCLES = 4
MOVE_DISK = 8 * GIB
FILE = 256 * MIB
CHILD_WITHIN_S = 5.0
CALM_S = 0.01
"""Polling back to back takes a processor or two from the kernel's own work; polling at this pace does not."""


def resized(daemon: Daemon, size: int, poll_s: float = 0.0) -> None:
    """Resize as a host does: ask, then poll (back to back) until it is done. Raises RuntimeError when it failed."""
    status = daemon.resize(size)
    if status != vm_guest_pb2.ResizeFilesystemResponse.STARTED:
        raise RuntimeError(f"the resize to {size} did not start ({status})")
    while (seen := daemon.status()).resize_in_progress:
        if poll_s:
            time.sleep(poll_s)
    if seen.current_size != size:
        raise RuntimeError(f"the resize to {size} failed: {daemon.report().job.reason}")


def resized_by_tool(guest: Guest, size: int) -> None:
    """The same by btrfs-progs."""
    run("btrfs", "filesystem", "resize", str(size), guest.mountpoint)


def measure(directory: Path, *, quick: bool) -> list[Row]:
    """The rows of this section; `directory` is for their disks."""
    shrink = Row(SECTION, "shrink by 20 GiB, empty top", "ms", PEER, GOAL)
    grow = Row(SECTION, "grow by 1 GiB", "ms", PEER, GOAL)
    moving = Row(SECTION, "shrink, data above, polled in a loop", "ms", PEER)
    calm = Row(SECTION, f"the same, polled every {CALM_S * 1e3:.0f} ms", "ms", PEER, GOAL)
    for index in range(2 if quick else 5):
        say(f"resize of an empty filesystem, run {index + 1}")
        _empty(directory, index, shrink, grow)
    _moving(directory, 1 if quick else 5, moving, calm)
    return [shrink, grow, moving, calm]


def _empty(directory: Path, index: int, shrink: Row, grow: Row) -> None:
    ours, theirs = Guest(directory / "ours", DISK), Guest(directory / "theirs", DISK)
    try:
        with Daemon(directory, stateful=ours.mountpoint) as daemon:
            wait_for_child(daemon)

            def cycle(samples: tuple[list[float], list[float]], resize: Callable[[int], None]) -> None:
                samples[0].append(milliseconds(lambda: resize(HALF)))
                samples[1].append(milliseconds(lambda: resize(HALF + GIB)))
                resize(DISK)

            for turn in range(CYCLES):
                in_turns(
                    index + turn,
                    lambda: cycle((shrink.ours, grow.ours), lambda size: resized(daemon, size)),
                    lambda: cycle((shrink.peer, grow.peer), lambda size: resized_by_tool(theirs, size)),
                )
    finally:
        for guest in (ours, theirs):
            guest.close()
            guest.mountpoint.rmdir()


def holed(guest: Guest, files: int) -> None:
    """Write `files` files and delete every other one, so that what lies on top would fit below."""
    for number in range(files):
        fill(guest.mountpoint / f"file{number}", FILE)
    run("btrfs", "filesystem", "sync", guest.mountpoint)
    for number in range(0, files, 2):
        (guest.mountpoint / f"file{number}").unlink()
    run("btrfs", "filesystem", "sync", guest.mountpoint)


def wait_for_child(daemon: Daemon) -> None:
    """A host resizes a guest that has been up for a while: the resize child is there."""
    until = time.monotonic() + CHILD_WITHIN_S
    while not children(daemon.pid) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)  # it has been started; now it comes to where it waits


def lowest(daemon: Daemon, less: int) -> int:
    """`less` below what can be had without moving a byte, or as far as the daemon's bound lets it go."""
    minimum = daemon.minimum()
    wanted = daemon.report().bounds.guaranteed_size - less
    return max(minimum, wanted // SECTOR * SECTOR)


def device_written(guest: Guest) -> int:
    """Bytes written to the guest's device since it was attached."""
    name = Path(guest.device).name
    return int(Path(f"/sys/block/{name}/stat").read_text(encoding="ascii").split()[6]) * 512


def _moving(directory: Path, runs: int, row: Row, calm: Row) -> None:
    """One layout, kept aside and put back before every run, so that both sides have the very same work."""
    say("resize with data above the target: writing the layout")
    guest = Guest(directory / "moving", MOVE_DISK)
    try:
        holed(guest, 10)
        original = guest.image.with_suffix(".original")
        guest.unmount()
        guest.detach()
        _copy(guest.image, original)

        def restore() -> None:
            if guest.device:
                guest.unmount()
                guest.detach()
            _copy(original, guest.image)
            guest.attach()
            guest.mount()

        def ours(into: Row, poll_s: float) -> int:
            restore()
            with Daemon(directory, stateful=guest.mountpoint) as daemon:
                target = lowest(daemon, GIB)
                wait_for_child(daemon)
                before = device_written(guest)
                into.ours.append(milliseconds(lambda: resized(daemon, target, poll_s)))
                into.facts.setdefault("device_written", []).append(device_written(guest) - before)
                into.facts.setdefault("moved_bytes", []).append(daemon.report().job.moved_bytes)
            return target

        def theirs(target: int) -> None:
            restore()
            before = device_written(guest)
            try:
                took = milliseconds(lambda: resized_by_tool(guest, target))
            except RuntimeError as error:
                row.facts.setdefault("peer_failures", []).append(str(error))
            else:
                row.peer.append(took)
                calm.peer.append(took)
            row.facts.setdefault("peer_device_written", []).append(device_written(guest) - before)

        for index in range(runs):
            say(f"resize with data above the target, run {index + 1}")
            row.facts["target"] = target = ours(row, 0.0)  # first: it says where to
            theirs(target)
            ours(calm, CALM_S)
        row.name += f", {row.facts['moved_bytes'][-1] / MIB:.0f} MiB moved"
    finally:
        if guest.device:
            guest.close()


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    run("cp", "--sparse=always", source, target)
    shutil.copymode(source, target)
