"""The daemon's life from start to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import fields
from functools import partial

from storaged import __version__, cmdline
from storaged.addresses import VsockAddress, parse_address
from storaged.app.beside import Beside, what_is_served
from storaged.app.guest import HOST_CID, GuestModules, guest_modules, make_reaper
from storaged.app.options import Options
from storaged.app.worlds import let_go, real_world, sim_world
from storaged.config import HOST, Settings
from storaged.guest.reaper import Reaper
from storaged.late import LateStorage
from storaged.notify import Notifier
from storaged.rpc.power import PowerControl
from storaged.rpc.server import Server
from storaged.rpc.startup import run_startup
from storaged.runtime import StorageService
from storaged.service import ManagedService

log = logging.getLogger("storaged")


async def serve(options: Options) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises StoragedError when it cannot start."""
    settings = options.settings
    addresses = [parse_address(text) for text in settings.serve.listen]
    beside = Beside(options)
    storage, late = _storage(options, beside)
    guest = guest_modules(options)
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
        at_once = late is None or late.in_use
        if at_once and not _waits(settings):
            beside.export(storage)
        bound = await server.start(addresses, settings.tls)
        what = what_is_served(storage, options) if at_once else f"what will be managed at {settings.serve.stateful}"
        log.info("storaged %s serves %s on %s", __version__, what, ", ".join(map(str, bound)))
        service.ready()
        background = [_watched(work) for work in _works(server, service, settings, stopping)]
        if at_once:
            await beside.begin(storage)
        elif late is not None:
            background.append(_watched(late.watch_for_it()))
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
        let_go(storage)
        server.power.power_off()


def _watched(work: Coroutine[None, None, None]) -> asyncio.Task[None]:
    """`work` as a task; that it failed is told at once, not when the daemon ends."""
    task = asyncio.create_task(work, name=getattr(work, "__qualname__", "background work"))

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s ended by a fault of storaged: %r", task.get_name(), error, exc_info=error)

    task.add_done_callback(ended)
    return task


def _react(stop: Callable[[], None], reload: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number, react in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        loop.add_signal_handler(number, react)


def _storage(options: Options, beside: Beside) -> tuple[StorageService, LateStorage | None]:
    """The engine, and what stands in for it as long as its filesystem cannot be managed."""
    settings = options.settings
    if options.sim:
        return StorageService(sim_world(options), settings.storage), None
    where, journal = settings.serve.stateful, settings.serve.state_dir
    make = partial(real_world, where, journal, fit=not settings.serve.allow_unsupported)
    late = LateStorage(make, where, settings.storage, beside.begin, patient=_waits(settings))
    return late.as_storage(), late


def _waits(settings: Settings) -> bool:
    """True where the daemon starts whatever is mounted, and without its metrics if need be."""
    return settings.serve.wait_for_stateful or os.getpid() == 1


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


def run(options: Options) -> None:
    """`serve` to its end. Raises StoragedError when it cannot start."""
    asyncio.run(serve(options))
