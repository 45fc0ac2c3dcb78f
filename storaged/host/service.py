"""The host's daemon: a controller for each pool, and the door at which guests announce themselves."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
from typing import TYPE_CHECKING

from storaged.addresses import HYBRID, Address, UnixAddress
from storaged.errors import ConfigError
from storaged.host import identity
from storaged.host.api import HostApi
from storaged.host.config import GuestConfig, HostConfig, PoolConfig
from storaged.host.controller import Controller
from storaged.host.guests import GuestClient
from storaged.host.listener import Listener
from storaged.host.lock import locked
from storaged.host.remembered import Remembered
from storaged.host.watch import Source, ThinSource, Watcher, filesystem_source
from storaged.quiet import BoundedLog
from storaged.rpc.private import sweep

if TYPE_CHECKING:
    from storaged.host.console.server import Console

log = logging.getLogger(__name__)

REFUSED_EVERY_S = 60.0
"""A guest that is refused for the same reason is logged this often at most."""


def source(pool: PoolConfig) -> Source:
    """Where the pool's free bytes come from."""
    filesystem = filesystem_source(pool.path)
    return ThinSource(filesystem, pool.thin_pool) if pool.thin_pool else filesystem


class Host:
    """Everything that `storaged-host serve` runs."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self.controllers = [
            Controller(
                pool,
                [guest for guest in config.guests if guest.pool == pool.name],
                config.sharing,
                Watcher(source(pool)),
                self._connect,
                config.resize,
                Remembered(os.path.join(config.resize.state_dir, f"grants-{pool.name}")),
            )
            for pool in config.pools
        ]
        self._by_peer = {
            guest.peer: (controller, guest.name)
            for controller in self.controllers
            for guest in config.guests
            if guest.peer and guest.pool == controller.pool.name
        }
        self._refusals = BoundedLog(log, every_s=REFUSED_EVERY_S)
        self._api = HostApi(self.controllers)
        hybrid = [peer.removeprefix(HYBRID) for peer in self._by_peer if peer.startswith(HYBRID)]
        self._listener = Listener(self._ready, config.tls, self._api.add_to, hybrid)
        self.listening: list[Address] = []
        self._console = self._with_console() if config.console.listen else None

    def _with_console(self) -> Console:
        """The console asks where the command line does: at the first unix socket."""
        from storaged.host.console.backend import GrpcBackend
        from storaged.host.console.server import Console

        asked = next((address for address in self._config.listen if isinstance(address, UnixAddress)), None)
        if asked is None:
            raise ConfigError("console.listen needs a unix: address in serve.listen, where the console asks")
        console = Console(self._config.console, GrpcBackend(asked))
        console.bind()
        self._api.console = console
        return console

    def _connect(self, guest: GuestConfig) -> GuestClient:
        return GuestClient(guest.name, guest.address, self._config.tls, trusted=guest.trust_balloon)

    def _ready(self, peer: str) -> bool:
        known = self._by_peer.get(peer) or self._discovered(peer)
        if known is None:
            return False
        controller, name = known
        controller.ready(name)
        return True

    def _discovered(self, peer: str) -> tuple[Controller, str] | None:
        """A guest that nobody configured, when that is allowed and its image is where it should be."""
        discovery = self._config.discovery
        guest = discovery.guest(peer) if discovery is not None else None
        if guest is None:
            return None
        controller = next(each for each in self.controllers if each.pool.name == guest.pool)
        others = [member.config for each in self.controllers for member in each.members.values()]
        named = any(other.name == guest.name for other in others)
        reason = f"guest.{guest.name} is configured" if named else identity.why_not(guest, controller.pool, others)
        if reason:
            self._refusals.note(peer, "refused", f"guest at {peer} refused: {reason}")
            return None
        log.info("%s is a new guest", guest.name)
        controller.add(guest)
        self._by_peer[peer] = controller, guest.name
        return self._by_peer[peer]

    async def run(self) -> None:
        """Until cancelled. Raises StoragedError when it cannot begin."""
        for controller in self.controllers:
            controller.check()
        identity.check(self._config.pools, self._config.guests)
        exporter = None
        if self._config.metrics:
            # Loaded where it is wanted.
            from storaged.host.metrics import HostCollector
            from storaged.metrics.exporter import serve_collectors

            exporter = serve_collectors(self._config.metrics, lambda: None, HostCollector(self.controllers))
        try:
            if self._config.listen or any(peer.startswith(HYBRID) for peer in self._by_peer):
                self.listening = await self._listener.start(self._config.listen)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._api.run(), name="history")
                if self._console is not None:
                    group.create_task(self._console.run(), name="console")
                for controller in self.controllers:
                    group.create_task(controller.run(), name=f"pool {controller.pool.name}")
                log.info(
                    "sharing %s among %d guests%s",
                    ", ".join(pool.name for pool in self._config.pools),
                    len(self._config.guests),
                    "".join(f"; guests announce themselves at {address}" for address in self.listening),
                )
        finally:
            await self._listener.stop()
            if exporter is not None:
                await asyncio.to_thread(exporter.shutdown)


def tune() -> None:
    """Fit this process to very many guests: two descriptors each, and garbage looked for less often.

    What a wave of calls leaves behind is freed by counting references; walking over a thousand guests' objects for
    the rest, several times in a wave, took a fifth of it.
    """
    gc.set_threshold(100_000, 50, 100)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(config: HostConfig) -> None:
    """Run until SIGTERM or SIGINT. Raises StoragedError when it cannot begin."""
    with locked(config.resize.state_dir):
        await _serve(config)


async def _serve(config: HostConfig) -> None:
    tune()
    sweep()
    host = asyncio.create_task(Host(config).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, host.cancel)
    try:
        await host
    except asyncio.CancelledError:
        log.info("stopped; guests keep what they were granted last")
