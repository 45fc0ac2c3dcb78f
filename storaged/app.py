"""Puts the rooms together: the only place that names the adapters, and the daemon's life from start to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import TypedDict

from storaged import __version__, cmdline
from storaged.addresses import VsockAddress, parse_address
from storaged.config import HOST, Settings
from storaged.core.ports import World
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.guest.clock import Clock, KernelClock
from storaged.guest.network import Network
from storaged.guest.power import Power, real_power
from storaged.guest.resolv import Resolv, ResolvFile
from storaged.notify import Notifier
from storaged.rpc.power import PowerControl
from storaged.rpc.server import Server
from storaged.runtime import StorageService
from storaged.service import ManagedService
from storaged.units import GIB, format_size

log = logging.getLogger("storaged")
HOST_CID = 2
"""VMADDR_CID_HOST (vsock(7))."""


class _Guest(TypedDict, total=False):
    network: Network
    resolv: Resolv
    clock: Clock
    power: Power


@dataclass(frozen=True, slots=True)
class Options:
    """What one run of `storaged serve` was asked for. `reread` gets the settings anew, where there is a file."""

    settings: Settings
    reread: Callable[[], Settings] | None = None
    sim: bool = False
    sim_size: int = 8 * GIB
    sim_speed: int = 0


def real_world(stateful: str, state_dir: str) -> World:
    """The ports of the btrfs mounted at `stateful`. Raises StoragedError when it cannot be managed."""
    # Imported here: `--sim` and the command line must work where these libraries cannot.
    from storaged.balloon.file import BtrfsBalloonFile
    from storaged.btrfs.filesystem import BtrfsFilesystem
    from storaged.btrfs.resizer import ChildResizer
    from storaged.btrfs.system import ProcSysctl, SystemClock
    from storaged.resize.journal import FileJournal

    try:
        filesystem = BtrfsFilesystem(stateful)
    except OSError as error:
        raise StoragedError(f"the filesystem at {stateful} cannot be used: {error}", Kind.UNAVAILABLE) from error
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


def real_guest(settings: Settings | None = None) -> tuple[Network, Resolv, Clock]:
    """The guest modules of this machine."""
    from storaged.guest.kernel_network import KernelNetwork
    from storaged.guest.zones import ZoneFiles

    settings = settings or Settings()
    network = Network(KernelNetwork(timeout_s=settings.network.timeout_s), settings.network)
    resolv = Resolv(ResolvFile(settings.resolv.path), settings.resolv)
    return network, resolv, Clock(KernelClock(), ZoneFiles(settings.clock))


def sim_guest() -> tuple[Network, Resolv, Clock]:
    """The same in memory: this machine is not touched."""
    from storaged.sim.clock import SimWallClock, SimZones
    from storaged.sim.network import SimNetwork, SimResolv

    return Network(SimNetwork()), Resolv(SimResolv()), Clock(SimWallClock(), SimZones())


async def serve(options: Options) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises StoragedError when it cannot start."""
    settings = options.settings
    addresses = [parse_address(text) for text in settings.serve.listen]
    world = sim_world(options) if options.sim else real_world(settings.serve.stateful, settings.serve.state_dir)
    storage = StorageService(world, settings.storage)
    server = Server(storage, **_guest(options), limits=settings.limits, vsock=settings.vsock)
    notifier = Notifier()
    service = ManagedService(storage, server, notifier, settings, options.reread)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    exporter = watcher = None
    background: list[asyncio.Task[None]] = []
    await storage.start()
    try:
        if settings.serve.metrics:
            from storaged import metrics  # 5 MB that a daemon without metrics need not carry

            exporter = metrics.serve(storage, settings.serve.metrics, server)
        bound = await server.start(addresses, settings.tls)
        size = format_size(storage.current_size())
        what = f"a simulated filesystem of {size}" if options.sim else f"{world.filesystem.mountpoint} ({size})"
        log.info("storaged %s serves %s on %s", __version__, what, ", ".join(map(str, bound)))
        service.ready()
        background = [asyncio.create_task(work) for work in _beside(server, service, settings, stopping)]
        watcher = None if options.sim else _watch_capacity(storage, loop)
        _warm_up(world)
        await stopping.wait()
        log.info("stopping")
        notifier.stopping()
        server.refuse("storaged is stopping")
        if watcher is not None:
            loop.remove_reader(watcher)
        await storage.close()
        await server.stop(service.settings.limits.drain_s)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if exporter is not None:
            exporter.shutdown()
        await storage.stop(release=settings.serve.release)
    if server.power is not None and server.power.due:
        server.power.power_off()


def _guest(options: Options) -> _Guest:
    """The guest modules that the server gets; a simulated guest has simulated ones."""
    if options.settings.serve.only_storage:
        return {}
    network, resolv, clock = sim_guest() if options.sim else real_guest(options.settings)
    return {"network": network, "resolv": resolv, "clock": clock, "power": _power(options)}


def _power(options: Options) -> Power:
    """The switch that Shutdown has."""
    if options.sim:
        from storaged.sim.power import SimPower

        return SimPower()
    return real_power()


def _beside(
    server: Server, service: ManagedService, settings: Settings, stopping: asyncio.Event
) -> Iterator[Coroutine[None, None, None]]:
    """What goes on while the daemon serves."""
    yield service.keep_alive()
    if server.power is not None:
        yield _until_off(server.power, server, stopping)
    if settings.serve.notify_host:
        yield _tell_host(settings)


async def _until_off(power: PowerControl, server: Server, stopping: asyncio.Event) -> None:
    await power.run(server.flushed)
    stopping.set()


async def _tell_host(settings: Settings) -> None:
    from storaged.rpc.ready import tell_host

    name = settings.serve.notify_host
    address = VsockAddress(HOST_CID, cmdline.read().listen_port) if name == HOST else parse_address(name)
    await tell_host(address, settings.notify)


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
