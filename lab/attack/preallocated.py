"""Preallocated, unwritten extents: what their owners can still write counts against the limit."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lab.attack.oracle import SHOWN, SLACK, available, data_chunk, fill_really, image_bytes, judged, reach
from lab.attack.preallocation import KEEP_SIZE, ZERO_RANGE, Unwritten, left, preallocate, punch
from lab.attack.registry import add
from lab.attack.testbed import Testbed, mib, report, sync, why
from lab.loop import Guest, fill, run
from storaged.units import GIB, KIB, MIB

SIZE = 6 * GIB
ROOM = 3 * GIB // 2
SMALL_FILES = 20_000
SNAPSHOTS = 10
PIECES = 48


@dataclass(slots=True)
class Made:
    """What the applications hold; `before_writing` frees what shares the extents, so that they are written in place."""

    parts: list[Unwritten]
    punched: int = 0
    """Bytes of extents that nothing refers to any more, and that are used as long as the rest of them is."""
    before_writing: Callable[[], None] = field(default=lambda: None)


def one_file(guest: Guest, _: Testbed) -> Made:
    return Made([preallocate(guest.mountpoint / "one", ROOM)])


def small_files(guest: Guest, _: Testbed) -> Made:
    folder = guest.mountpoint / "small"
    folder.mkdir()
    size = ROOM // SMALL_FILES // (4 * KIB) * (4 * KIB)
    parts = []
    for number in range(SMALL_FILES):
        path = folder / str(number)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        parts.append(Unwritten(path, 0, size))
    sync(guest)
    return Made(parts)


def nodatacow(guest: Guest, _: Testbed) -> Made:
    path = guest.mountpoint / "nodatacow"
    path.touch()
    run("chattr", "+C", path)
    return Made([preallocate(path, ROOM)])


def reflinks(guest: Guest, _: Testbed) -> Made:
    part = preallocate(guest.mountpoint / "origin", ROOM)
    copies = [guest.mountpoint / f"copy{number}" for number in range(3)]
    for copy in copies:
        run("cp", "--reflink=always", part.path, copy)
    sync(guest)
    # An extent that two files share is written to a new place: the last of them writes it where it is.

    def delete() -> None:
        for copy in copies:
            copy.unlink()
        sync(guest)

    return Made([part], before_writing=delete)


def snapshots(guest: Guest, _: Testbed) -> Made:
    subvolume = guest.mountpoint / "database"
    run("btrfs", "-q", "subvolume", "create", subvolume)
    part = preallocate(subvolume / "table", ROOM)
    made = [guest.mountpoint / f"snapshot{number}" for number in range(SNAPSHOTS)]
    for path in made:
        run("btrfs", "-q", "subvolume", "snapshot", subvolume, path)
    sync(guest)

    def delete() -> None:
        for path in made:
            run("btrfs", "-q", "subvolume", "delete", "--commit-after", path)
        run("btrfs", "subvolume", "sync", guest.mountpoint)

    return Made([part], before_writing=delete)


def holes(guest: Guest, _: Testbed) -> Made:
    path = guest.mountpoint / "holes"
    preallocate(path, ROOM)
    step = ROOM // PIECES
    for number in range(PIECES):
        punch(path, number * step, step // 4)
    sync(guest)
    parts = [Unwritten(path, number * step + step // 4, step - step // 4) for number in range(PIECES)]
    return Made(parts, punched=PIECES * (step // 4))


def zero_range(guest: Guest, _: Testbed) -> Made:
    path = guest.mountpoint / "zeroed"
    fill(path, 64 * MIB)
    return Made([preallocate(path, ROOM, ZERO_RANGE)])


def keep_size(guest: Guest, _: Testbed) -> Made:
    return Made([preallocate(guest.mountpoint / "kept", ROOM, KEEP_SIZE)])


def unlinked(guest: Guest, bed: Testbed) -> Made:
    path = guest.mountpoint / "unlinked"
    preallocate(path, ROOM)
    fd = os.open(path, os.O_RDWR)
    bed.finally_do(partial(os.close, fd))
    path.unlink()
    sync(guest)
    return Made([Unwritten(Path(f"/proc/self/fd/{fd}"), 0, ROOM)])


def half_written(guest: Guest, _: Testbed) -> Made:
    path = guest.mountpoint / "half"
    step = 2 * ROOM // PIECES
    preallocate(path, 2 * ROOM)
    for number in range(PIECES):
        Unwritten(path, number * step, step // 2).write()
    sync(guest)
    return Made([Unwritten(path, number * step + step // 2, step // 2) for number in range(PIECES)])


def read_only_snapshot(guest: Guest, _: Testbed) -> Made:
    made = snapshots(guest, _)
    run("btrfs", "-q", "subvolume", "snapshot", "-r", guest.mountpoint / "database", guest.mountpoint / "backup")
    # The original goes; a writable snapshot of the backup is what is then written.
    clone = guest.mountpoint / "clone"

    def swap() -> None:
        made.before_writing()
        run("btrfs", "-q", "subvolume", "snapshot", guest.mountpoint / "backup", clone)
        for name in ("backup", "database"):
            run("btrfs", "-q", "subvolume", "delete", "--commit-after", guest.mountpoint / name)
        run("btrfs", "subvolume", "sync", guest.mountpoint)

    return Made([Unwritten(clone / "table", 0, ROOM)], before_writing=swap)


def too_much(bed: Testbed, make: Callable[[Guest, Testbed], Made], limit: int, mkfs: tuple[str, ...]) -> list[str]:
    """More is preallocated than the limit: the answer must not be SUCCESS."""
    guest = bed.guest(SIZE, mkfs=mkfs)
    made = make(guest, bed)
    daemon = bed.daemon(guest)
    held = left(made.parts)
    success = report(daemon, limit)
    shown = available(guest)
    bed.say(limit=mib(limit), unwritten=mib(held), success=success, available=mib(shown or 0), says=why(daemon))
    if not success:
        # The room that nobody has preallocated must be held all the same.
        found = reach(guest, 0)
        most = SLACK + data_chunk(guest)
        return [] if found is not None and found <= most else [f"failed, and {mib(found or 0)} MiB are left besides"]
    made.before_writing()
    growth = fill_really(guest, made.parts)
    bed.say(written=str(growth))
    return [f"SUCCESS with {mib(held)} MiB unwritten", *judged(growth, limit)]


def enough(bed: Testbed, make: Callable[[Guest, Testbed], Made], limit: int, mkfs: tuple[str, ...]) -> list[str]:
    """The limit is above what is preallocated: SUCCESS, the rest is available, and the owner can write all he has."""
    guest = bed.guest(SIZE, mkfs=mkfs)
    made = make(guest, bed)
    daemon = bed.daemon(guest)
    held = left(made.parts)
    success = report(daemon, limit)
    shown = available(guest) or 0
    bed.say(limit=mib(limit), unwritten=mib(held), success=success, available=mib(shown), says=why(daemon))
    if not success:
        return [f"not SUCCESS with {mib(held)} of {mib(limit)} MiB preallocated: {why(daemon)}"]
    faults = []
    if shown < limit - held - made.punched - SLACK:
        faults.append(f"only {mib(shown)} MiB are available of {mib(limit)} less {mib(held)}")
    made.before_writing()
    growth = fill_really(guest, made.parts)
    bed.say(written=str(growth), unwritten_after=mib(left(made.parts)))
    if left(made.parts):
        faults.append(f"the owner could not write {mib(left(made.parts))} of {mib(held)} MiB preallocated")
    return faults + judged(growth, limit)


def later(bed: Testbed) -> list[str]:
    """An application preallocates its whole grant after the report; the next reports must count it."""
    guest = bed.guest(SIZE)
    daemon = bed.daemon(guest)
    faults = []
    if not report(daemon, 300 * MIB):
        faults.append("an empty guest is answered FAILED")
    part = preallocate(guest.mountpoint / "later", 256 * MIB)
    again = report(daemon, 300 * MIB)
    found = reach(guest, part.left) or 0
    bed.say(again=again, reach=mib(found), says=why(daemon))
    if again and found > 300 * MIB + SHOWN:
        faults.append(f"SUCCESS for 300 MiB, and {mib(found)} MiB can be written")
    less = report(daemon, 100 * MIB)
    bed.say(less=less, says=why(daemon))
    if less:
        faults.append("SUCCESS for 100 MiB with 256 MiB unwritten")
        faults += judged(fill_really(guest, [part]), 100 * MIB)
    return faults


def swap_file(bed: Testbed) -> list[str]:
    """An active swap file of 1.5 GiB on the guest's disk, and a limit of 300 MiB."""
    guest = bed.guest(SIZE)
    path = guest.mountpoint / "swap"
    path.touch()
    run("chattr", "+C", path)
    part = preallocate(path, ROOM)
    path.chmod(0o600)
    run("mkswap", path)
    off = partial(_swapoff, path)
    try:
        run("swapon", "-p", "-1" if os.getenv("SWAP_PRIORITY") else "0", path)
    except RuntimeError as error:
        bed.say(left_out=str(error))
        return []
    bed.finally_do(off)
    try:
        daemon = bed.daemon(guest)
        success = report(daemon, 300 * MIB)
        bed.say(success=success, available=mib(available(guest) or 0), says=why(daemon))
    finally:
        off()
    if not success:
        return []
    growth = fill_really(guest, [part])
    bed.say(written=str(growth))
    return ["SUCCESS with an active swap file of 1536 MiB", *judged(growth, 300 * MIB)]


def _swapoff(path: Path) -> None:
    with contextlib.suppress(OSError):
        if str(path) in Path("/proc/swaps").read_text(encoding="utf-8"):
            run("swapoff", path)


def restored_sparse(bed: Testbed) -> list[str]:
    """The image was made sparse again: written files of zeros that the host does not hold. Only printed."""
    guest = bed.guest(SIZE)
    with (guest.mountpoint / "zeros").open("wb") as file:
        for _ in range(512):
            file.write(bytes(MIB))
    before = image_bytes(guest)
    guest.unmount()
    run("fallocate", "--dig-holes", guest.image)
    guest.mount()
    bed.say(image=mib(before), dug=mib(image_bytes(guest)), free=mib(shutil.disk_usage(guest.mountpoint).free))
    return []


KINDS: dict[str, Callable[[Guest, Testbed], Made]] = {
    "one file": one_file,
    "small files": small_files,
    "nodatacow": nodatacow,
    "reflinks": reflinks,
    "snapshots": snapshots,
    "read-only snapshot": read_only_snapshot,
    "holes": holes,
    "zero range": zero_range,
    "keep size": keep_size,
    "unlinked": unlinked,
    "half written": half_written,
}
QUICK = ("one file", "nodatacow", "snapshots", "unlinked")


def _register() -> None:
    for kind, make in KINDS.items():
        name = kind.replace(" ", "-")
        quick = kind in QUICK
        add(f"preallocated-{name}", partial(too_much, make=make, limit=300 * MIB, mkfs=()), quick=quick)
        add(f"preallocated-{name}-allowed", partial(enough, make=make, limit=2 * GIB, mkfs=()),
            quick=kind == "snapshots")  # fmt: skip
    for name, mkfs in (("mixed", ("--mixed",)), ("single-4k", ("-m", "single", "--nodesize", "4096"))):
        add(f"preallocated-one-file-{name}", partial(too_much, make=one_file, limit=300 * MIB, mkfs=mkfs))
        add(f"preallocated-one-file-{name}-allowed", partial(enough, make=one_file, limit=2 * GIB, mkfs=mkfs))
    add("preallocated-later", later, quick=True)
    add("preallocated-swap-file", swap_file, places=("disk",))
    add("preallocated-sparse-again", restored_sparse)


_register()
