"""Puts the rooms together: the only place that names the adapters, and the daemon's life from start to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass, field, replace

from storaged import __version__
from storaged.addresses import parse_address
from storaged.config import ServeConfig
from storaged.core.ports import World
from storaged.errors import ConfigError
from storaged.guest.clock import Clock, ClockSettings, KernelClock
from storaged.guest.containers import Containers, ContainerSettings
from storaged.guest.mounts import Mounts, MountSettings
from storaged.guest.network import Network, NetworkSettings
from storaged.guest.processes import Processes, ProcessSettings, Report
from storaged.guest.reaper import Reaper
from storaged.guest.resolv import Resolv, ResolvFile, ResolvSettings
from storaged.guest.termina import Termina, TerminaSettings
from storaged.guest.users import Users
from storaged.rpc.server import Server, Tls
from storaged.rpc.startup import run_startup
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


@dataclass(frozen=True, slots=True)
class GuestModules:
    """All that is not storage, on this machine or in memory."""

    network: Network
    resolv: Resolv
    clock: Clock
    processes: Processes
    mounts: Mounts
    termina: Termina
    containers: Containers
    users: Users

    async def close(self) -> None:
        """Begin nothing more; what runs keeps running."""
        await self.processes.close()
        for part in (self.mounts, self.containers, self.users):
            part.close()


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """What these modules may be told."""

    network: NetworkSettings = field(default_factory=NetworkSettings)
    resolv: ResolvSettings = field(default_factory=ResolvSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    processes: ProcessSettings = field(default_factory=ProcessSettings)
    mounts: MountSettings = field(default_factory=MountSettings)
    termina: TerminaSettings = field(default_factory=TerminaSettings)
    containers: ContainerSettings = field(default_factory=ContainerSettings)


def real_guest(settings: GuestSettings, report: Report | None = None) -> GuestModules:
    """The modules of this machine. Call it from the main thread."""
    from storaged.guest.containers import TokenFile
    from storaged.guest.kernel_mounts import KernelMounts
    from storaged.guest.kernel_network import KernelNetwork
    from storaged.guest.local_users import LocalUsers
    from storaged.guest.spawn import RealSpawner, hand_down_default_signals
    from storaged.guest.zones import ZoneFiles

    hand_down_default_signals()
    processes = Processes(RealSpawner(settings.processes), settings.processes, report=report)
    mounts = Mounts(KernelMounts(), settings.mounts)
    return GuestModules(
        Network(KernelNetwork(timeout_s=settings.network.timeout_s), settings.network),
        Resolv(ResolvFile(settings.resolv.path), settings.resolv),
        Clock(KernelClock(), ZoneFiles(settings.clock)),
        processes,
        mounts,
        Termina(mounts, processes, settings.termina),
        Containers(TokenFile(settings.containers)),
        Users(LocalUsers()),
    )


def sim_guest(settings: GuestSettings) -> GuestModules:
    """The same in memory: this machine is not touched."""
    from storaged.sim.clock import SimWallClock, SimZones
    from storaged.sim.mounts import SimMounts
    from storaged.sim.network import SimNetwork, SimResolv
    from storaged.sim.processes import SimSpawner
    from storaged.sim.users import SimToken, SimUsers

    processes = Processes(SimSpawner(), settings.processes)
    mounts = Mounts(SimMounts(), settings.mounts)
    termina = Termina(mounts, processes, settings.termina)
    return GuestModules(
        Network(SimNetwork()),
        Resolv(SimResolv()),
        Clock(SimWallClock(), SimZones()),
        processes,
        mounts,
        termina,
        Containers(SimToken()),
        Users(SimUsers()),
    )


def make_reaper(settings: ProcessSettings) -> Reaper | None:
    """Reaps orphans where this process is asked to, or is process 1 and nobody else would."""
    if os.getpid() != 1 and not settings.adopt_orphans:
        return None
    from storaged.guest.reaper import become_subreaper

    if os.getpid() != 1:
        become_subreaper()
    return Reaper()


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
    guest = sim_guest(GuestSettings()) if options.sim else real_guest(GuestSettings())
    server = Server(
        storage,
        network=guest.network,
        resolv=guest.resolv,
        clock=guest.clock,
        processes=guest.processes,
        mounts=guest.mounts,
        termina=guest.termina,
        containers=guest.containers,
        users=guest.users,
    )
    exporter = reaper = None
    await storage.start()
    try:
        reaper = None if options.sim else make_reaper(guest.processes.settings)
        if not options.sim:
            await run_startup(guest.processes)
        if config.metrics:
            from storaged import metrics  # 5 MB that a daemon without metrics need not carry

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
        await guest.close()
        if reaper is not None:
            reaper.close()
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
