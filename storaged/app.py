"""Puts the rooms together: the only place that names the adapters, and the daemon's life from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from storaged import __version__, cmdline
from storaged.addresses import VsockAddress, parse_address
from storaged.autogrow import AutoGrow
from storaged.config import HOST, Settings
from storaged.core.ports import World
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.guest.clock import Clock, KernelClock
from storaged.guest.containers import Containers
from storaged.guest.mounts import Mounts
from storaged.guest.network import Network
from storaged.guest.power import Power, real_power
from storaged.guest.processes import Processes, ProcessSettings, Report
from storaged.guest.reaper import Reaper
from storaged.guest.resolv import Resolv, ResolvFile
from storaged.guest.termina import Termina
from storaged.guest.users import Users
from storaged.late import LateStorage
from storaged.notify import Notifier
from storaged.rpc.crash import CRASH_LISTENER_PORT, CrashReports
from storaged.rpc.outward import reach
from storaged.rpc.power import PowerControl
from storaged.rpc.server import Server
from storaged.rpc.startup import run_startup
from storaged.runtime import StorageService
from storaged.service import ManagedService
from storaged.units import GIB, format_size

log = logging.getLogger("storaged")
HOST_CID = 2
"""VMADDR_CID_HOST (vsock(7))."""


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
    with contextlib.ExitStack() as undo:
        undo.callback(filesystem.close)
        try:
            journal = FileJournal(os.path.join(state_dir, filesystem.uuid))
        except OSError as error:
            raise ConfigError(f"state directory {state_dir}: {error.strerror}") from error
        world = World(
            filesystem=filesystem,
            balloon=BtrfsBalloonFile(filesystem.mountpoint),
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
    power: Power

    async def close(self) -> None:
        """Begin nothing more; what runs keeps running."""
        await self.processes.close()
        for part in (self.mounts, self.containers, self.users):
            part.close()


def real_guest(settings: Settings, report: Report | None = None) -> GuestModules:
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
        real_power(),
    )


def sim_guest(settings: Settings) -> GuestModules:
    """The same in memory: this machine is not touched."""
    from storaged.sim.clock import SimWallClock, SimZones
    from storaged.sim.mounts import SimMounts
    from storaged.sim.network import SimNetwork, SimResolv
    from storaged.sim.power import SimPower
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
        SimPower(),
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
    settings = options.settings
    addresses = [parse_address(text) for text in settings.serve.listen]
    beside = _Beside(options)
    storage, late = _storage(options, beside)
    guest = _guest(options)
    parts = {} if guest is None else {item.name: getattr(guest, item.name) for item in fields(guest)}
    server = beside.server = Server(storage, **parts, limits=settings.limits, vsock=settings.vsock)
    notifier = Notifier()
    service = ManagedService(storage, server, notifier, settings, options.reread)
    stopping = asyncio.Event()
    _react(stopping.set, service.reload)
    reaper = None
    background: list[asyncio.Task[None]] = []
    await storage.start()
    try:
        reaper = await _begin(guest, options)
        if late is None:
            beside.export(storage)
        bound = await server.start(addresses, settings.tls)
        what = "what will be mounted" if late is not None else _what(storage, options)
        log.info("storaged %s serves %s on %s", __version__, what, ", ".join(map(str, bound)))
        service.ready()
        works = [*_works(server, service, settings, stopping), *([late.watch_for_it()] if late is not None else [])]
        background = [asyncio.create_task(work) for work in works]
        if late is None:
            await beside.begin(storage)
        await stopping.wait()
        log.info("stopping")
        notifier.stopping()
        server.refuse("storaged is stopping")
        beside.unwatch()
        await storage.close()
        await server.stop(service.settings.limits.drain_s)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        beside.end()
        if guest is not None:
            await guest.close()
        if reaper is not None:
            reaper.close()
        await storage.stop(release=settings.serve.release)
    if server.power is not None and server.power.due:
        _let_go(storage)
        server.power.power_off()


def _let_go(storage: StorageService) -> None:
    """Close what is open on the filesystem: process 1 unmounts it next, and may hold nothing of it."""
    with contextlib.suppress(StoragedError):  # there was none
        for part in (storage.world.balloon, storage.world.filesystem):
            close = getattr(part, "close", None)
            if close is not None:
                close()


def _react(stop: Callable[[], None], reload: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number, react in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        loop.add_signal_handler(number, react)


def _storage(options: Options, beside: _Beside) -> tuple[StorageService, LateStorage | None]:
    """The engine, and what stands in for it where its filesystem may come later."""
    settings = options.settings
    if options.sim:
        return StorageService(sim_world(options), settings.storage), None
    where, journal = settings.serve.stateful, settings.serve.state_dir
    if settings.serve.wait_for_stateful or os.getpid() == 1:
        late = LateStorage(lambda: real_world(where, journal), where, settings.storage, beside.begin)
        return late.as_storage(), late
    return StorageService(real_world(where, journal), settings.storage), None


class _Beside:
    """What stands beside the engine once it has its filesystem: capacity events, the resize child, metrics."""

    def __init__(self, options: Options) -> None:
        self.server: Server | None = None
        self._options = options
        self._exporter: Any = None
        self._watched: int | None = None

    def export(self, storage: StorageService) -> None:
        """Serve metrics if they were asked for. Raises StoragedError."""
        address = self._options.settings.serve.metrics
        if address and self._exporter is None and self.server is not None:
            from storaged.metrics import exporter  # 8 MB that a daemon without metrics need not carry
            from storaged.metrics.calls import CallsCollector

            self._exporter = exporter.serve(storage, address, CallsCollector(self.server))

    async def begin(self, storage: StorageService) -> None:
        """The filesystem is in use."""
        try:
            self.export(storage)
        except StoragedError as error:
            log.warning("no metrics: %s", error.message)
        AutoGrow(storage)
        if not self._options.sim:
            self._watched = _watch_capacity(storage, asyncio.get_running_loop())
        _warm_up(storage.world)
        log.info("in use: %s", _what(storage, self._options))

    def unwatch(self) -> None:
        """No capacity events any more."""
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    def end(self) -> None:
        """Everything is over."""
        self.unwatch()
        if self._exporter is not None:
            self._exporter.shutdown()


def _what(storage: StorageService, options: Options) -> str:
    size = format_size(storage.current_size())
    return f"a simulated filesystem of {size}" if options.sim else f"{storage.world.filesystem.mountpoint} ({size})"


def _guest(options: Options) -> GuestModules | None:
    """The guest modules that the server gets; a simulated guest has simulated ones."""
    if options.settings.serve.only_storage:
        return None
    if options.sim:
        return sim_guest(options.settings)
    return real_guest(options.settings, _crash_reports(options.settings.serve.crash_host))


def _crash_reports(name: str) -> Report | None:
    """Who is told of programs that ended though they should not have."""
    if not name:
        return None
    address = VsockAddress(HOST_CID, CRASH_LISTENER_PORT) if name == HOST else parse_address(name)

    async def report(program: str) -> None:
        async with reach(address) as target:
            await CrashReports(target)(program)

    return report


async def _begin(guest: GuestModules | None, options: Options) -> Reaper | None:
    """What process 1 does before the daemon serves: adopt orphans, start the programs of the startup folder."""
    if guest is None or options.sim:
        return None
    reaper = make_reaper(options.settings.processes)
    if cmdline.read().startup_processes:
        await run_startup(guest.processes)
    return reaper


def _works(
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
    except (OSError, ImportError) as error:  # the latter from pyudev, where libudev is not found
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
        found = None
        try:
            found = from_record(record, 0.0).dirty_found
        except ValueError as error:
            done.append(f"journal cannot be believed ({error}): the write-back limits stay as they are")
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
