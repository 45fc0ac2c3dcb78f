"""The ports of a filesystem, a real one's or a simulated one's: made, watched, let go, given back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
from dataclasses import replace

from storaged.app.options import Options
from storaged.check import unfit
from storaged.core.ports import World
from storaged.errors import Kind, StoragedError, Unfit
from storaged.runtime import StorageService
from storaged.units import format_size

log = logging.getLogger("storaged")


def real_world(stateful: str, state_dir: str, *, fit: bool = False) -> World:
    """The ports of the btrfs mounted at `stateful`. Raises StoragedError when it cannot be managed.

    `fit`: raise Unfit on a kernel or a mount with which the engine cannot do its work.
    """
    # Imported here: `--sim` and the command line must work where these libraries cannot.
    from storaged.balloon.file import BtrfsBalloonFile
    from storaged.btrfs.filesystem import BtrfsFilesystem
    from storaged.btrfs.prealloc import PreallocScanner
    from storaged.btrfs.resizer import ChildResizer
    from storaged.btrfs.system import ProcSysctl, SystemClock
    from storaged.resize.journal import FileJournal

    try:
        filesystem = BtrfsFilesystem(stateful)
    except OSError as error:
        raise StoragedError(f"the filesystem at {stateful} cannot be used: {error}", Kind.UNAVAILABLE) from error
    with contextlib.ExitStack() as undo:
        undo.callback(filesystem.close)
        read_only = filesystem.space().read_only
        if fit and (problem := unfit(platform.release(), read_only=read_only, stateful=stateful)):
            raise Unfit(f"{problem}; serve.allow_unsupported starts all the same")
        journal = FileJournal(os.path.join(state_dir, filesystem.uuid))
        balloon = BtrfsBalloonFile(filesystem.mountpoint)
        undo.callback(balloon.close)
        world = World(
            filesystem=filesystem,
            balloon=balloon,
            preallocated=PreallocScanner(filesystem.fd),
            resizer=ChildResizer(filesystem),
            sysctl=ProcSysctl(),
            clock=SystemClock(),
            journal=journal,
        )
        undo.pop_all()
    return world


def sim_world(options: Options) -> World:
    """A simulated filesystem, as empty as one that was just made."""
    from storaged.btrfs.system import SystemClock
    from storaged.sim import SimDisk, make_world

    disk = SimDisk(options.sim_size, device=4 * options.sim_size)
    disk.speed = options.sim_speed or None
    return replace(make_world(disk, clock=SystemClock()), poll_s=0.1)


def watch_capacity(storage: StorageService, loop: asyncio.AbstractEventLoop) -> int | None:
    """Hear of the device's changes at once; without it a waiting job polls."""
    from storaged.btrfs.capacity import CapacityMonitor
    from storaged.btrfs.filesystem import BtrfsFilesystem

    filesystem = storage.world.filesystem
    assert isinstance(filesystem, BtrfsFilesystem)
    try:
        monitor = CapacityMonitor(filesystem.device_name, storage.capacity_changed)
    except (OSError, ImportError) as error:  # the latter from pyudev, where libudev is not found
        log.warning("no capacity events (%s); a job that waits for its device polls", error)
        return None
    loop.add_reader(monitor.fileno(), monitor.drain)
    return monitor.fileno()


def warm_up(world: World) -> None:
    """Start the resize child once we serve, so that the first job does not wait for it."""
    start = getattr(world.resizer, "start", None)
    if start is not None:
        start()


def let_go(storage: StorageService) -> None:
    """Close what is open on the filesystem: process 1 unmounts it next, and may hold nothing of it."""
    with contextlib.suppress(StoragedError):  # there was none
        storage.world.close()


def uninstall(stateful: str, state_dir: str) -> list[str]:
    """Give everything back: the balloon, the write-back limits, the journal. What was done, a sentence each."""
    from storaged.core.record import from_record

    world = real_world(stateful, state_dir)
    done = []
    record = world.journal.load()
    if record is not None:
        found = reclaim = None
        try:
            remembered = from_record(record, 0.0)
            found, reclaim = remembered.dirty_found, remembered.reclaim_found
        except ValueError as error:
            done.append(f"journal cannot be believed ({error}): the write-back limits stay as they are")
        if found is not None:
            world.sysctl.set_dirty_limits(found)
            done.append("write-back limits restored")
        if reclaim is not None:
            world.filesystem.set_kernel_reclaim(reclaim)
            done.append("the kernel's own reclaim is as it was found")
    held = world.balloon.size()
    world.balloon.remove()
    world.filesystem.sync()
    done.append(f"balloon removed, {format_size(held)} given back")
    directory = os.path.join(state_dir, world.filesystem.uuid)
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)
    done.append(f"journal removed from {directory}")
    return done
