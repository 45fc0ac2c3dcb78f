"""The console's door to the network: one socket, uvicorn behind it, in the event loop that is there anyway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from storaged.addresses import Address, TcpAddress, UnixAddress
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.host.console import guard, web
from storaged.host.console.backend import Backend
from storaged.host.console.connections import Connections, quiet
from storaged.host.console.guard import Codes
from storaged.host.console.hub import Hub
from storaged.host.console.limits import Limits, Streams
from storaged.host.console.settings import ConsoleSettings, read_token, read_users
from storaged.quiet import BoundedLog

log = logging.getLogger(__name__)

STOP_WITHIN_S = 2
BACKLOG = 128


class _Server(uvicorn.Server):
    """Leaves the process's signals to the process, and gives TLS a time to begin in."""

    def __init__(self, config: uvicorn.Config, handshake_s: float) -> None:
        super().__init__(config)
        self._handshake_s = handshake_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which waits a minute for a handshake, and limits nobody meanwhile."""
        await self.lifespan.startup()
        loop, config = asyncio.get_running_loop(), self.config

        def protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            made: asyncio.Protocol = make(config=config, server_state=self.server_state, app_state={}, _loop=loop)
            return made

        within_s = self._handshake_s if config.ssl is not None else None
        self.servers = [
            await loop.create_server(
                protocol, sock=each, ssl=config.ssl, ssl_handshake_timeout=within_s, backlog=config.backlog
            )
            for each in sockets or []
        ]
        self.started = True


class Console:
    """Serves the console. `address`: where, with the port chosen for port 0, once it has been bound."""

    def __init__(self, settings: ConsoleSettings, backend: Backend, limits: Limits | None = None) -> None:
        if settings.address is None:
            raise ConfigError("console.listen is not set")
        self.address: Address = settings.address
        self._settings = settings
        self._backend = backend
        self._limits = limits or Limits()
        self._token = read_token(settings.token_file)
        self._uids = frozenset({0, os.geteuid(), *read_users(settings.users)})
        self._codes = Codes()
        self._socket: socket.socket | None = None

    @property
    def url(self) -> str:
        """As a browser takes it."""
        if isinstance(self.address, TcpAddress):
            scheme = "https" if self._settings.tls else "http"
            host = self.address.host
            if host.strip("[]") in ("0.0.0.0", "::"):  # noqa: S104  # every address: browsers need one name
                host = next(iter(self._settings.names), "localhost")
            return f"{scheme}://{host}:{self.address.port}/"
        return str(self.address)

    @property
    def expires_s(self) -> float | None:
        """Seconds for which a link is good; None where nobody has to sign in."""
        return guard.CODE_S if isinstance(self.address, TcpAddress) else None

    def link(self) -> str:
        """A link that signs a browser in, once and within `expires_s`; the bare address where nobody has to."""
        if self.expires_s is None:
            return self.url
        return f"{self.url}login?code={self._codes.issue(time.monotonic())}"

    def bind(self) -> None:
        """Take the address. Raises StoragedError when it is taken."""
        try:
            if isinstance(self.address, UnixAddress):
                self._socket = _unix(self.address.path)
                if self._settings.users:
                    os.chmod(self.address.path, 0o666)  # noqa: S103  # the kernel says who connects, and that decides
            elif isinstance(self.address, TcpAddress):
                self._socket, port = _tcp(self.address)
                self.address = TcpAddress(self.address.host, port)
            if self._socket is not None:
                self._socket.listen(BACKLOG)  # whoever comes before we serve waits a moment
        except OSError as error:
            raise StoragedError(
                f"console: cannot listen on {self.address}: {error.strerror}", Kind.UNAVAILABLE
            ) from error

    async def run(self) -> None:
        """Until cancelled."""
        if self._socket is None:
            self.bind()
        assert self._socket is not None
        hub, refusals = Hub(self._backend), BoundedLog(log)
        door, streams = guard.door(self._settings, self._token, self._uids), Streams(self._limits)
        app = web.application(hub, self._backend, door, self._codes, streams, refusals, tls=self._settings.tls)
        quiet()
        config = self._configured(app, Connections(self._limits, refusals))
        server = _Server(config, self._limits.handshake_s)
        watching = asyncio.create_task(hub.run(), name="console watch")
        serving = asyncio.create_task(server.serve([self._socket]), name="console")
        how = "" if self.expires_s is None else "; `storagectl console` prints a link to sign in"
        log.info("console at %s%s", self.url, how)
        try:
            await asyncio.shield(serving)
        finally:
            watching.cancel()  # which ends the streams of events, too
            server.should_exit = True
            await asyncio.gather(watching, serving, return_exceptions=True)
            await self._backend.close()
            if isinstance(self.address, UnixAddress):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.address.path)

    def _configured(self, app: ASGIApp, connections: Connections) -> uvicorn.Config:
        config = uvicorn.Config(
            app,
            http=connections.protocol(),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=STOP_WITHIN_S,
            ssl_certfile=self._settings.certificate or None,
            ssl_keyfile=self._settings.key or None,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"console.certificate, console.key: {error.strerror or error}") from error
        return config


def _tcp(address: TcpAddress) -> tuple[socket.socket, int]:
    family, kind, protocol, _, where = socket.getaddrinfo(
        address.host.strip("[]"), address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError:
        listening.close()
        raise
    return listening, listening.getsockname()[1]


def _unix(path: str) -> socket.socket:
    """A socket for its owner alone from the moment it exists."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"unix:{path}: there is already something that is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise StoragedError(f"unix:{path} is served by another process", Kind.BUSY)
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listening.bind(path)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening
