"""Puts the rooms together: the only place that names the adapters, and the daemon's life from start to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass, replace

from storaged import __version__
from storaged.addresses import parse_address
from storaged.config import ServeConfig
from storaged.core.ports import World
from storaged.errors import ConfigError
from storaged.rpc.server import Server, Tls
from storaged.runtime import StorageService
from storaged.units import GIB, format_size

log = logging.getLogger("storaged")
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """What one run of `storaged serve` was asked for."""

    config: ServeConfig
    sim: bool = False
    sim_size: int = 8 * GIB
    sim_speed: int = 0
    insecure: bool = False
    tls: Tls | None = None
    release: bool = False


def real_world(stateful: str, state_dir: str) -> World:
    """The ports of the btrfs mounted at `stateful`. Raises StoragedError when it cannot be managed."""
    # Imported here: `--sim` and the command line must work where these libraries cannot.
    from storaged.balloon.file import BtrfsBalloonFile
    from storaged.btrfs.filesystem import BtrfsFilesystem
    from storaged.btrfs.resizer import ChildResizer
    from storaged.btrfs.system import ProcSysctl, SystemClock
    from storaged.resize.journal import FileJournal

    filesystem = BtrfsFilesystem(stateful)
    try:
        journal = FileJournal(os.path.join(state_dir, filesystem.uuid))
    except OSError as error:
        raise ConfigError(f"state directory {state_dir}: {error.strerror}") from error
    return World(
        filesystem=filesystem,
        balloon=BtrfsBalloonFile(filesystem.mountpoint),
        resizer=ChildResizer(filesystem),
        sysctl=ProcSysctl(),
        clock=SystemClock(),
        journal=journal,
    )


def sim_world(options: Options) -> World:
    """A simulated filesystem, as empty as one that was just made."""
    from storaged.btrfs.system import SystemClock
    from storaged.sim import SimDisk, make_world

    disk = SimDisk(options.sim_size, device=4 * options.sim_size)
    disk.speed = options.sim_speed or None
    return replace(make_world(disk, clock=SystemClock()), poll_s=0.1)


async def serve(options: Options) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises StoragedError when it cannot start."""
    config = options.config
    addresses = [parse_address(text) for text in config.listen]
    world = sim_world(options) if options.sim else real_world(config.stateful, config.state_dir)
    storage = StorageService(world, config.storage)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(storage)
    exporter = None
    await storage.start()
    try:
        if config.metrics:
            from storaged.metrics import exporter as metrics  # 5 MB that a daemon without metrics need not carry

            exporter = metrics.serve(storage, config.metrics)
        bound = await server.start(addresses, tls=options.tls, insecure=options.insecure)
        size = format_size(storage.current_size())
        what = f"a simulated filesystem of {size}" if options.sim else f"{world.filesystem.mountpoint} ({size})"
        log.info("storaged %s serves %s on %s", __version__, what, ", ".join(map(str, bound)))
        watcher = None if options.sim else _watch_capacity(storage, loop)
        _warm_up(world)
        await stopping.wait()
        log.info("stopping")
        if watcher is not None:
            loop.remove_reader(watcher)
        await storage.close()
        await server.stop(GRACE_S)
    finally:
        if exporter is not None:
            exporter.shutdown()
        await storage.stop(release=options.release)


def _watch_capacity(storage: StorageService, loop: asyncio.AbstractEventLoop) -> int | None:
    """Hear of the device's changes at once; without it a waiting job polls."""
    from storaged.btrfs.capacity import CapacityMonitor
    from storaged.btrfs.filesystem import BtrfsFilesystem

    filesystem = storage.world.filesystem
    assert isinstance(filesystem, BtrfsFilesystem)
    try:
        monitor = CapacityMonitor(filesystem.device_name, storage.capacity_changed)
    except OSError as error:
        log.warning("no capacity events (%s); a job that waits for its device polls", error)
        return None
    loop.add_reader(monitor.fileno(), monitor.drain)
    return monitor.fileno()


def _warm_up(world: World) -> None:
    """Start the resize child once we serve, so that the first job does not wait for it."""
    start = getattr(world.resizer, "start", None)
    if start is not None:
        start()


def uninstall(stateful: str, state_dir: str) -> list[str]:
    """Give everything back: the balloon, the write-back limits, the journal. What was done, a sentence each."""
    from storaged.core.record import from_record

    world = real_world(stateful, state_dir)
    done = []
    record = world.journal.load()
    if record is not None:
        found = from_record(record, 0.0).dirty_found
        if found is not None:
            world.sysctl.set_dirty_limits(found)
            done.append("write-back limits restored")
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


def run(options: Options) -> None:
    """`serve` to its end. Raises StoragedError when it cannot start."""
    asyncio.run(serve(options))
