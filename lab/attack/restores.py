"""Rollbacks, restores and foreign files: the daemon serves in any case, and its answers are true."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc

from lab.attack.hands import SUBVOLUME
from lab.attack.oracle import SHOWN, available, fill_really, judged, reach
from lab.attack.registry import add, scenario
from lab.attack.testbed import Testbed, mib, mounted_at, report, sync, until, why
from lab.daemon import Daemon
from lab.loop import Guest, run
from lab.recovery import QUIET
from storaged.units import GIB, MIB

SIZE = 8 * GIB


def _subvolume(guest: Guest, name: str) -> None:
    run("btrfs", "-q", "subvolume", "create", guest.mountpoint / name)


def _started(bed: Testbed, guest: Guest, **options: Path | str) -> tuple[Daemon | None, list[str]]:
    try:
        return bed.daemon(guest, **options), []  # type: ignore[arg-type]
    except (RuntimeError, grpc.RpcError) as error:
        return None, [f"the daemon does not serve: {str(error).strip()[-300:]}"]


def _truthful(bed: Testbed, guest: Guest, daemon: Daemon, limits: tuple[int, ...], what: str) -> list[str]:
    """Every limit: SUCCESS and no more than it by the kernel's counts. The last one is filled for real."""
    faults = []
    success = False
    for limit in limits:
        try:
            success = report(daemon, limit)
        except grpc.RpcError as error:
            return [f"{what}: the report of {mib(limit)} MiB: {error.code()!s} {error.details()}"]
        found = reach(guest, 0) or 0
        bed.say(what=what, limit=mib(limit), success=success, reach=mib(found), says=why(daemon))
        if success and found > limit + SHOWN:
            faults.append(f"{what}: SUCCESS for {mib(limit)} MiB, {mib(found)} MiB can be written")
        if not success:
            faults.append(f"{what}: FAILED for {mib(limit)} MiB: {why(daemon)}")
    if success:
        growth = fill_really(guest)
        bed.say(what=what, written=str(growth))
        faults += judged(growth, limits[-1], what=what)
    return faults


@scenario("rollback", quick=True)
def rollback(bed: Testbed) -> list[str]:
    """The root subvolume is replaced by its own snapshot while the old balloon lies in the old one."""
    guest = bed.guest(SIZE)
    _subvolume(guest, "@")
    top = mounted_at(bed, guest, "top", "subvolid=5")
    guest.unmount()
    guest.mount_options = "subvol=@"
    guest.mount()
    daemon = bed.daemon(guest)
    faults = [] if report(daemon, GIB) else [f"FAILED before the rollback: {why(daemon)}"]
    (guest.mountpoint / "etc").write_text("configuration", encoding="utf-8")
    daemon.stop()
    guest.unmount()
    run("btrfs", "-q", "subvolume", "snapshot", top / "@", top / "@new")
    (top / "@").rename(top / "@old")
    (top / "@new").rename(top / "@")
    run("umount", top)  # or the old balloon could still be reached by a path
    guest.mount()
    bed.say(stub=(guest.mountpoint / SUBVOLUME).is_dir(), available=mib(available(guest) or 0))
    new, failed = _started(bed, guest)
    faults += failed
    if new is not None:
        faults += _truthful(bed, guest, new, (3 * GIB, 5 * GIB, 3 * GIB, 500 * MIB), "after the rollback")
    return faults


def _plain(guest: Guest) -> None:
    folder = guest.mountpoint / SUBVOLUME
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"{number:08}").touch()


def _tar(guest: Guest) -> None:
    archive = guest.mountpoint.parent / "backup.tar"
    run("tar", "-C", guest.mountpoint, "-cf", archive, ".")
    for path in guest.mountpoint.iterdir():
        if path.name == SUBVOLUME:
            run("btrfs", "-q", "subvolume", "delete", path)
    run("tar", "-C", guest.mountpoint, "-xf", archive)
    archive.unlink()


def _foreign_file(guest: Guest) -> None:
    (guest.mountpoint / SUBVOLUME).write_text("somebody's notes", encoding="utf-8")


def _foreign_inside(guest: Guest) -> None:
    _subvolume(guest, SUBVOLUME)
    (guest.mountpoint / SUBVOLUME / "notes").write_text("somebody's notes", encoding="utf-8")


def _foreign_owner(guest: Guest) -> None:
    _subvolume(guest, SUBVOLUME)
    os.chown(guest.mountpoint / SUBVOLUME, 1000, 1000)


def _symlink(guest: Guest) -> None:
    (guest.mountpoint / SUBVOLUME).symlink_to("/tmp")


def _cp(guest: Guest) -> None:
    for path in list(guest.mountpoint.iterdir()):
        if path.name == SUBVOLUME:
            copy = path.with_name("copied")
            run("cp", "-a", "--reflink=auto", path, copy)
            run("btrfs", "-q", "subvolume", "delete", path)
            copy.rename(path)


def in_the_way(bed: Testbed, do: Callable[[Guest], None], *, held_before: bool, must_hold: bool) -> list[str]:
    """Something else is where the balloon's subvolume belongs: the daemon serves, and what it answers is true."""
    guest = bed.guest(4 * GIB)
    if held_before:
        before = bed.daemon(guest)
        report(before, GIB)
        before.stop()
    do(guest)
    sync(guest)
    daemon, faults = _started(bed, guest)
    if daemon is None:
        return faults
    faults += [] if daemon.available() else ["GetAvailableSpace answers 0"]
    answers: list[str] = []
    for limit in (500 * MIB, 0, GIB):
        try:
            success = report(daemon, limit)
        except grpc.RpcError as error:
            faults.append(f"the report of {mib(limit)} MiB: {error.code()!s} {error.details()}")
            continue
        found = reach(guest, 0) or 0
        answers.append(f"{'yes' if success else 'no'}:{mib(limit)}/{mib(found)}")
        if success and found > limit + SHOWN:
            faults.append(f"SUCCESS for {mib(limit)} MiB, {mib(found)} MiB can be written")
        if must_hold and not success:
            faults.append(f"FAILED for {mib(limit)} MiB: {why(daemon)}")
    bed.say(success_limit_reach=",".join(answers), says=why(daemon))
    return faults


@scenario("two-daemons", quick=True)
def two_daemons(bed: Testbed) -> list[str]:
    """Two daemons on one filesystem, mounted by two subvolumes: only the first holds the balloon."""
    guest = bed.guest(4 * GIB)
    for name in ("a", "b"):
        _subvolume(guest, name)
    roots = [mounted_at(bed, guest, f"mount-{name}", f"subvol={name}") for name in ("a", "b")]
    first = bed.daemon(guest, state="first", at=roots[0])
    faults = [] if report(first, 300 * MIB) else [f"the first: FAILED: {why(first)}"]
    directory = bed.directory / "second"
    directory.mkdir()
    (directory / "storaged.toml").write_text(QUIET, encoding="utf-8")
    second = Daemon(directory, "--config", str(directory / "storaged.toml"), stateful=roots[1])
    bed.finally_do(second.kill)
    try:
        second.start()
    except (RuntimeError, grpc.RpcError):
        bed.say(second="does not start")
    else:
        try:
            answer = str(report(second, 100 * MIB))
        except grpc.RpcError as error:
            answer = str(error.details())
        files = list((roots[1] / SUBVOLUME).iterdir()) if (roots[1] / SUBVOLUME).is_dir() else []
        held = sum(path.stat().st_blocks * 512 for path in files)
        bed.say(second="serves", answers=answer, holds=mib(held), available=mib(available(guest) or 0))
        if held:
            faults.append(f"the second daemon holds {mib(held)} MiB too")
        if answer == "True" and (found := reach(guest, 0) or 0) > 100 * MIB + SHOWN:
            faults.append(f"the second daemon answers SUCCESS for 100 MiB, {mib(found)} MiB can be written")
    success = report(first, 300 * MIB)
    found = reach(guest, 0) or 0
    if not success or found > 300 * MIB + SHOWN:
        faults.append(f"the first: success {success}, {mib(found)} MiB can be written")
    return faults


@scenario("another-state-directory")
def another_journal(bed: Testbed) -> list[str]:
    """The balloon is there and the journal is not: after kill -9 with the state removed the daemon still serves."""
    guest = bed.guest(4 * GIB)
    daemon = bed.daemon(guest)
    report(daemon, 200 * MIB)
    daemon.kill()
    shutil.rmtree(bed.directory / f"{guest.image.parent.name}-state" / "state")
    new, faults = _started(bed, guest)
    found = reach(guest, 0) or 0
    bed.say(reach=mib(found))
    if found > 200 * MIB + SHOWN:
        faults.append(f"after a start without its journal {mib(found)} MiB can be written of 200")
    return faults + (_truthful(bed, guest, new, (500 * MIB, 0, 100 * MIB), "new journal") if new else [])


@scenario("full-state-directory")
def full_state(bed: Testbed) -> list[str]:
    """The journal's disk is full: kill -9 and a start leave in force what was last answered SUCCESS, or less."""
    faults = []
    for kind in ("full", "removed"):
        guest = bed.guest(4 * GIB)
        state = bed.directory / f"{guest.image.parent.name}-state" / "state"
        state.mkdir(parents=True)
        if kind == "full":
            run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", state)
            bed.finally_do(partial(subprocess.run, ["umount", str(state)], check=False, capture_output=True))
        daemon = bed.daemon(guest)
        promised = GIB if report(daemon, GIB) else None
        if kind == "full":
            (state / "junk").write_bytes(b"x" * 4096)
            with (state / "junk").open("ab") as file:
                try:
                    while True:
                        os.write(file.fileno(), b"x" * 4096)
                except OSError:
                    pass
        else:
            shutil.rmtree(state)
        for limit in (600 * MIB, 100 * MIB, 0):
            success = report(daemon, limit)
            promised = limit if success else promised
            bed.say(kind=kind, limit=mib(limit), success=success)
        daemon.kill()
        new, failed = _started(bed, guest)
        faults += failed
        within = until(lambda: (reach(guest, 0) or 0) <= (promised or 0) + SHOWN, 3)  # noqa: B023  # called here
        in_force = new.report().balloon.limit_bytes if new and new.report().balloon.HasField("limit_bytes") else None
        bed.say(kind=kind, promised=mib(promised or 0), in_force=in_force and mib(in_force),
                reach=mib(reach(guest, 0) or 0))  # fmt: skip
        if promised is not None and (in_force is None or in_force > promised):
            faults.append(f"{kind}: in force after the restart: {in_force}, last answered SUCCESS: {promised}")
        if not within:
            faults.append(f"{kind}: {mib(reach(guest, 0) or 0)} MiB can be written after the restart")
        if new is not None:
            new.kill()
    return faults


def _register() -> None:
    for name, do, held_before, must_hold in (
        ("plain-directory", _plain, False, True),
        ("tar", _tar, True, True),
        ("copied", _cp, True, True),
        ("foreign-file", _foreign_file, False, False),
        ("foreign-inside", _foreign_inside, False, False),
        ("foreign-owner", _foreign_owner, False, False),
        ("symlink", _symlink, False, False),
    ):
        add(f"restore-{name}", partial(in_the_way, do=do, held_before=held_before, must_hold=must_hold),
            quick=name in ("tar", "foreign-file"))  # fmt: skip


_register()
