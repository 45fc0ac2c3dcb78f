"""Serves the metrics over HTTP on a TCP port or a unix socket, in threads that never touch the event loop."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from storaged.addresses import TcpAddress, UnixAddress, parse_address
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.metrics.bridge import Source, registry

if TYPE_CHECKING:
    from storaged.runtime import StorageService

log = logging.getLogger(__name__)
SOCKET_MODE = 0o660
SILENCE_S = 10.0
"""A connection that says nothing for this long is dropped, so that it does not hold a thread."""
MOST_AT_ONCE = 16
"""Connections beyond these are closed unanswered: a scraper asks again."""


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # named as in http.server
        """Nothing: a line every few seconds tells nobody anything."""

    def address_string(self) -> str:
        """Who asks, without a look into the DNS."""
        return str(self.client_address[0])


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: Any) -> None:
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As HTTPServer does, which looks into the DNS for a name, and for a port where there is none."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", 0
        if self.address_family != socket.AF_UNIX:
            self.server_port = self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, if there are not too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base does it, and gives the place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is no news."""
        if isinstance(sys.exc_info()[1], OSError):
            log.debug("a scrape by %s was broken off: %s", client_address, request)
        else:
            log.error("a scrape failed", exc_info=sys.exc_info())


class _Tcp6Server(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX
    allow_reuse_address = False

    def get_request(self) -> tuple[Any, Any]:
        """With a peer's address of the shape that HTTP handlers expect."""
        connection, _ = self.socket.accept()
        return connection, ("local", 0)


class Exporter:
    """A running HTTP server."""

    def __init__(self, server: _Server, close: Callable[[], None], path: str | None) -> None:
        self._server = server
        self._close = close
        self._path = path
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The TCP port, also when 0 was asked for; 0 for a unix socket."""
        return self._server.server_port

    def shutdown(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def parse(address: str) -> TcpAddress | UnixAddress:
    """`HOST:PORT` (also with `tcp:` before it) or `unix:/path`. Raises ConfigError."""
    refusal = ConfigError(f"--metrics {address!r} is not HOST:PORT or unix:/path; IPv6 hosts are written in brackets")
    try:
        parsed = parse_address(address if address.startswith(("unix:", "tcp:")) else f"tcp:{address}")
    except ConfigError:
        raise refusal from None
    bare_colon = isinstance(parsed, TcpAddress) and ":" in parsed.host and not parsed.host.startswith("[")
    if bare_colon or not isinstance(parsed, TcpAddress | UnixAddress):
        raise refusal
    return parsed


def serve(storage: StorageService, address: str, *more: Source) -> Exporter:
    """Serve /metrics on `HOST:PORT` or `unix:/path`, with what `more` collects. Raises StoragedError."""
    from storaged.metrics.collector import StorageCollector  # a host's daemon serves no guest's metrics

    collector = StorageCollector(storage)
    try:
        return serve_collectors(address, collector.close, collector, *more)
    except BaseException:
        collector.close()
        raise


def serve_collectors(address: str, close: Callable[[], None], *collectors: Source) -> Exporter:
    """The same for any collectors; `close` is called at the end. Raises StoragedError."""
    parsed = parse(address)
    try:
        server = _bind(parsed)
    except OSError as error:
        message = f"cannot serve metrics on {address}: {error.strerror or error}"
        raise StoragedError(message, Kind.UNAVAILABLE) from error
    server.set_app(make_wsgi_app(registry(*collectors)))
    exporter = Exporter(server, close, parsed.path if isinstance(parsed, UnixAddress) else None)
    if isinstance(parsed, UnixAddress):
        log.info("metrics at %s", parsed)
    else:
        log.info("metrics at http://%s:%d/metrics", parsed.host, exporter.port)
    return exporter


def _bind(address: TcpAddress | UnixAddress) -> _Server:
    if isinstance(address, TcpAddress):
        host = address.host.strip("[]")
        family = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0][0]
        return (_Tcp6Server if family == socket.AF_INET6 else _Server)((host, address.port))
    _clear_stale(address.path)
    before = os.umask(0o777 & ~SOCKET_MODE)
    try:
        return _UnixServer(address.path)
    finally:
        os.umask(before)


def _clear_stale(path: str) -> None:
    """Remove a socket that nobody serves any more; anything else in the way stays, and is an error."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(17, "something that is no socket is in the way")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise FileExistsError(98, "another process serves there")
