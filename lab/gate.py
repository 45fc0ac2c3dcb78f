"""The gate a shrink must pass: random filesystems, each shrunk to the size that is promised, then as far as it goes.

For every layout: the promise is kept, the filesystem is never forced read-only, it takes writes afterwards up to what
statvfs shows, no file is damaged, `btrfs check` is clean. Run `python -m lab.gate FIRST COUNT [quick]` for a table.

Where the filesystem is small, every deeper cut is tried on a copy too: what the kernel could have done, by luck or not;
`quick` leaves that out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lab.layouts import Recipe, build, fingerprints, recipe
from lab.loop import Guest, fill, memory, run, sweep, workspace
from storaged.balloon.engine import BalloonEngine
from storaged.balloon.file import BtrfsBalloonFile
from storaged.btrfs.filesystem import BtrfsFilesystem
from storaged.btrfs.resizer import ChildResizer
from storaged.btrfs.system import SystemClock
from storaged.core import events as ev
from storaged.errors import FilesystemError
from storaged.resize.bounds import Bounds, compute
from storaged.resize.job import Job
from storaged.resize.layout import FIRST_USABLE, KERNEL_MINIMUM, Layout
from storaged.resize.runner import ResizeRunner
from storaged.sim import SimDisk, SimPreallocated
from storaged.units import GIB, MIB

BRUTE_FORCE_UP_TO = GIB
BRUTE_FORCE_CUTS = 8
AFTERWARDS = "afterwards"
SHARES = {"at most half used": 0.5, "at most three quarters used": 0.75, "all": float("inf")}


@dataclass(frozen=True, slots=True)
class Room:
    """What statvfs showed on a filesystem of `size` bytes, and what could then be written."""

    size: int
    shown: int
    written: int

    @property
    def slack(self) -> int:
        """What may be missing: chunks for the metadata of what is written, each up to a tenth of the filesystem."""
        return max(self.shown // 10, min(self.size // 64, 64 * MIB))

    @property
    def tested(self) -> bool:
        """True where so much was shown that it could have been missing."""
        return self.shown > self.slack

    @property
    def faults(self) -> list[str]:
        """A false ENOSPC."""
        missing = self.written < self.shown - self.slack
        return [f"false ENOSPC: {self.shown} shown, {self.written} written"] if missing else []


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one layout; sizes in bytes, `faults` empty when it passed."""

    plan: Recipe
    used: int
    floor: int
    """The least size that could hold what is used, if it could be packed without a gap."""
    bound: int
    guaranteed: int
    min_dev_size: int
    reached: int
    """After a second job, which goes below the bound as far as it can."""
    brute_force: int | None
    moved: int
    seconds: float
    bounds_seconds: float
    faults: tuple[str, ...]
    why: str = ""
    """What ended the second job."""
    room: Room | None = None
    """Whether what statvfs shows can be written afterwards; None where nothing shrank."""


def floor(layout: Layout) -> int:
    """What the files hold, and every copy of the metadata; nobody gets below that, whatever they move."""
    held = sum(chunk.held * len(chunk.stripes) for chunk in layout.chunks)
    return max(FIRST_USABLE + held, KERNEL_MINIMUM)


def judge(plan: Recipe, directory: Path, *, brute_force: bool = True) -> Verdict:
    """Make the layout, shrink it to its bound, look at what is left."""
    guest = Guest(directory, plan.size, mkfs=plan.mkfs, mount=plan.mount)
    build(guest, plan)
    before = fingerprints(guest.mountpoint)
    filesystem = BtrfsFilesystem(str(guest.mountpoint))
    balloon = BtrfsBalloonFile(str(guest.mountpoint))
    engine = BalloonEngine(filesystem, balloon, SimPreallocated(SimDisk()))
    resizer = ChildResizer(filesystem)
    faults: list[str] = []
    room: Room | None = None

    def settle() -> None:
        if plan.limit is not None:
            engine.hold(plan.limit)

    try:
        engine.prepare()
        if plan.limit is not None:
            try:
                engine.hold(plan.limit)
            except FilesystemError as error:
                # Where metadata is full nobody can write what the kernel shows: neither the balloon nor an application.
                if _can_write(guest, plan.limit):
                    faults.append(f"balloon: {error}")
        filesystem.sync()
        space = filesystem.space()
        # A mixed chunk counts as data and as metadata.
        used = space.data_used + (0 if space.mixed else space.metadata_used) - engine.size()
        least = int(run("btrfs", "inspect-internal", "min-dev-size", guest.mountpoint).split()[0])
        begun = time.monotonic()
        layout = engine.layout()
        bounds: Bounds = compute(layout, engine.longest())
        took = time.monotonic() - begun
        brute = _brute_force(guest, engine, bounds.minimum) if brute_force and plan.size <= BRUTE_FORCE_UP_TO else None
        begun = time.monotonic()
        runner = ResizeRunner(filesystem, resizer, engine, SystemClock())
        moved, why, wrong = _resized(runner, filesystem, engine, bounds.minimum, settle)
        faults += wrong
        seconds = time.monotonic() - begun
        reached = filesystem.size()
        if filesystem.read_only():
            faults.append("forced read-only")
        else:
            engine.hold(None)
            if reached < plan.size:  # else nothing was done, and what is wrong was so before
                room = _room(guest, filesystem)
                faults += room.faults
    finally:
        resizer.close()
        balloon.close()
        filesystem.close()
    faults += damage(guest, before)
    guest.close()
    return Verdict(
        *(plan, used, floor(layout), bounds.minimum, bounds.guaranteed, least, reached, brute, moved, seconds, took),
        *(tuple(faults), why, room),
    )


def damage(guest: Guest, before: dict[str, str]) -> list[str]:
    """What the disk no longer holds of the files that were there `before`; leaves the filesystem unmounted.

    It is mounted anew first: else most would be read from memory, whatever the disk holds.
    """
    guest.unmount()
    try:
        guest.mount()
    except RuntimeError as error:
        faults = [f"does not mount again: {error}"]
    else:
        after = fingerprints(guest.mountpoint, leave_out=AFTERWARDS)
        faults = [f"damaged: {name}" for name, digest in before.items() if after.get(name) != digest]
        guest.unmount()
    try:
        guest.check(data=True)
    except RuntimeError as error:
        faults.append(f"btrfs check: {str(error)[-200:]}")
    return faults


def _resized(
    runner: ResizeRunner,
    filesystem: BtrfsFilesystem,
    engine: BalloonEngine,
    promised: int,
    settle: Callable[[], None],
) -> tuple[int, str, list[str]]:
    """A job to what was promised, then one as far as it goes; bytes moved, what ended it, and what went wrong."""
    told: list[ev.JobEnded] = []
    faults = []

    def tell(event: ev.JobPrepared | ev.JobProgressed | ev.JobEnded) -> None:
        if isinstance(event, ev.JobEnded):
            told.append(event)

    before = filesystem.size()
    runner.run(Job("promised", promised, before, before), tell, settle)
    size = filesystem.size()
    if told[0].outcome is not ev.Outcome.SUCCEEDED or size != promised:
        faults.append(f"promised {promised}, reached {size}: {told[0].reason}")
    if size > KERNEL_MINIMUM:
        if before > size:  # what goes as far as it can begins where everybody begins
            runner.run(Job("back", before, size, size), tell, settle)
        filesystem.sync()
        size = max(size, compute(engine.layout(), engine.longest()).minimum)
        runner.run(Job("further", KERNEL_MINIMUM, before, before, best_effort=True), tell, settle)
    if told[-1].outcome is not ev.Outcome.SUCCEEDED or filesystem.size() > size:
        faults.append(f"went from {size} to {filesystem.size()}: {told[-1].reason}")
    return sum(end.moved for end in told), told[-1].reason, faults


def _brute_force(guest: Guest, engine: BalloonEngine, bound: int) -> int:
    """The smallest size that one resize of a copy comes to, of the deepest cuts below `bound`; `bound` if none does.

    The balloon is let go first, as before a shrink. That an attempt may force the copy read-only is why only copies
    are asked.
    """
    tops = sorted({chunk.top for chunk in engine.layout().chunks if 256 * MIB < chunk.top < bound})
    for top in (256 * MIB, *tops)[:BRUTE_FORCE_CUTS]:
        if top >= bound:
            break
        copy = Guest.__new__(Guest)
        copy.image, copy.mountpoint = guest.image.with_name("copy.img"), guest.image.with_name("copy")
        copy.mount_options, copy.device = guest.mount_options, ""
        run("sync", "-f", guest.mountpoint)
        run("cp", "--sparse=always", guest.image, copy.image)
        copy.mountpoint.mkdir(exist_ok=True)
        copy.attach()
        try:
            # A copy has the original's identifier, and the kernel mounts only one of the two.
            run("btrfstune", "-f", "-u", copy.device)
            copy.mount()
            balloon = BtrfsBalloonFile(str(copy.mountpoint))
            balloon.remove()
            balloon.close()
            run("btrfs", "filesystem", "sync", copy.mountpoint)
            run("btrfs", "filesystem", "resize", str(top), copy.mountpoint)
        except RuntimeError:
            continue
        else:
            return top
        finally:
            copy.close()
    return bound


def _can_write(guest: Guest, limit: int) -> bool:
    """True when an application gets more than `limit` and a chunk's slack, whatever statvfs shows."""
    path = guest.mountpoint / "more"
    written = 0
    with contextlib.suppress(OSError):
        written, _ = fill(path)
    path.unlink(missing_ok=True)
    return written > limit + guest.image.stat().st_size // 10 + 4 * MIB


def _room(guest: Guest, filesystem: BtrfsFilesystem) -> Room:
    """Write until there is no room, which should be where statvfs says."""
    filesystem.sync()
    shown = filesystem.statvfs_available() or 0
    os.sync()
    written, _ = fill(guest.mountpoint / AFTERWARDS)
    return Room(filesystem.size(), shown, written)


def summary(verdicts: Iterable[Verdict]) -> str:
    """The table's last lines."""
    seen = list(verdicts)
    failed = [verdict for verdict in seen if verdict.faults]
    lines = [f"layouts {len(seen)}, failed {len(failed)}"]
    ratios: dict[str, Callable[[Verdict], float]] = {
        "bound / used": lambda v: v.bound / v.used,
        "reached / used": lambda v: v.reached / v.used,
        "reached / floor": lambda v: v.reached / v.floor,
        "floor / min-dev-size": lambda v: v.floor / v.min_dev_size,
        "min-dev-size / used": lambda v: v.min_dev_size / v.used,
        "reached / min-dev-size": lambda v: v.reached / v.min_dev_size,
        "bound / min-dev-size": lambda v: v.bound / v.min_dev_size,
        "guaranteed / min-dev-size": lambda v: v.guaranteed / v.min_dev_size,
    }
    lines += [f"{name}: {_spread([of(verdict) for verdict in seen])}" for name, of in ratios.items()]
    lines.append(f"above min-dev-size: {sum(verdict.reached > verdict.min_dev_size for verdict in seen)}")
    for name, share in SHARES.items():
        some = [verdict for verdict in seen if verdict.used <= share * verdict.plan.size]
        if some:
            medians = ", ".join(f"{what} {_median(some, what):.2f}" for what in ("bound", "reached", "floor"))
            lines.append(f"{name}: {len(some)} layouts; median of min-dev-size: {medians}")
    tried = [verdict for verdict in seen if verdict.brute_force is not None]
    if tried:
        for name in ("bound", "reached"):
            deeper = [getattr(verdict, name) / (verdict.brute_force or verdict.bound) for verdict in tried]
            lines.append(
                f"{name} / brute force: median {statistics.median(deeper):.2f}, worst {max(deeper):.2f};"
                f" at least as low on {sum(ratio <= 1 for ratio in deeper)} of {len(tried)}"
            )
    lines.append(_rooms([verdict.room for verdict in seen if verdict.room is not None]))
    lines += [f"  {verdict.plan}: {'; '.join(verdict.faults)}" for verdict in failed]
    return "\n".join(lines)


def _rooms(rooms: list[Room]) -> str:
    """How much the check for a false ENOSPC is worth."""
    tested = [room for room in rooms if room.tested]
    text = f"false ENOSPC: {len(rooms)} looked at, {sum(room.written > 0 for room in rooms)} written to"
    if not tested:
        return f"{text}, none showed room enough to tell"
    missing = [1 - room.written / room.shown for room in tested]
    return f"{text}, {len(tested)} showed room enough to tell; missing of it: {_spread(missing)}"


def _spread(ratios: Iterable[float]) -> str:
    ordered = sorted(ratios)
    p90 = ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)]
    return f"median {statistics.median(ordered):.2f}, p90 {p90:.2f}, worst {ordered[-1]:.2f}"


def _median(verdicts: Iterable[Verdict], what: str) -> float:
    ratios: list[float] = [getattr(verdict, what) / verdict.min_dev_size for verdict in verdicts]
    return statistics.median(ratios)


def main(first: int, count: int, *, brute_force: bool = True) -> int:
    """Judge `count` layouts from seed `first`; 1 when any failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleared
    sweep(memory())
    verdicts = []
    for seed in range(first, first + count):
        with workspace(memory()) as directory:
            verdict = judge(recipe(seed), directory, brute_force=brute_force)
        verdicts.append(verdict)
        print(
            f"{verdict.plan}: used {verdict.used // MIB} floor {verdict.floor // MIB} bound {verdict.bound // MIB}"
            f" reached {verdict.reached // MIB}"
            f" guaranteed {verdict.guaranteed // MIB} min-dev-size {verdict.min_dev_size // MIB}"
            f" brute force {'-' if verdict.brute_force is None else verdict.brute_force // MIB}"
            f" moved {verdict.moved // MIB} in {verdict.seconds:.2f} s (bounds {verdict.bounds_seconds * 1e3:.0f} ms)"
            f" because {verdict.why}"
            f" then {f'{room.written / MIB:.1f} of {room.shown / MIB:.1f} written' if (room := verdict.room) else '-'}"
            f" {'FAILED ' + '; '.join(verdict.faults) if verdict.faults else 'ok'}",
            flush=True,
        )
    print(summary(verdicts))
    return 1 if any(verdict.faults for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), brute_force="quick" not in sys.argv[3:]))
