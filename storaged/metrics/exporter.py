"""Serves the metrics over HTTP on a TCP port or a unix socket, in threads that never touch the event loop."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from socketserver import StreamRequestHandler, TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any

from storaged.addresses import TcpAddress, UnixAddress, parse_address
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.metrics import exposition
from storaged.metrics.exposition import Collector

if TYPE_CHECKING:
    from storaged.runtime import StorageService

log = logging.getLogger(__name__)
SOCKET_MODE = 0o660
SILENCE_S = 10.0
"""A connection that has not asked by then is dropped, so that it does not hold a thread."""
MOST_AT_ONCE = 16
"""Connections beyond these are closed unanswered: a scraper asks again."""
MOST_LINE, MOST_LINES = 4096, 64
PATH = "/metrics"


class BadRequest(Exception):
    """What came is no request."""


class _Handler(StreamRequestHandler):
    """One request, one answer, the end: HTTP as far as scrapers and curl need it."""

    timeout = SILENCE_S
    server: _Server

    def handle(self) -> None:
        try:
            method, path, headers = self._asked(time.monotonic() + SILENCE_S)
        except BadRequest as error:
            self._answer(HTTPStatus.BAD_REQUEST, str(error))
            return
        if method not in ("GET", "HEAD"):
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET is accepted", allow="GET, HEAD")
        elif path != PATH:
            self._answer(HTTPStatus.NOT_FOUND, f"metrics are at {PATH}")
        else:
            kind = exposition.chosen(headers.get("accept", ""))
            self._answer(HTTPStatus.OK, exposition.written(self.server.collectors, kind), kind, empty=method == "HEAD")

    def _asked(self, until: float) -> tuple[str, str, dict[str, str]]:
        words = self._line(until).split()
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise BadRequest("not HTTP/1")
        headers: dict[str, str] = {}
        for _ in range(MOST_LINES):
            line = self._line(until)
            if not line:
                return words[0], words[1].partition("?")[0], headers
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        raise BadRequest("too many headers")

    def _line(self, until: float) -> str:
        line = self.rfile.readline(MOST_LINE)
        if not line.endswith(b"\n") or time.monotonic() > until:
            raise BadRequest("incomplete, too long or too late")
        return line.decode("latin-1").strip()

    def _answer(
        self, status: HTTPStatus, body: str, kind: str = exposition.TEXT, *, allow: str = "", empty: bool = False
    ) -> None:
        content = body.encode()
        head = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(content)}",
            "Connection: close",
            *([f"Allow: {allow}"] if allow else []),
        ]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + (b"" if empty else content))


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 16
    collectors: Sequence[Collector] = ()

    def __init__(self, address: Any) -> None:
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        super().__init__(address, _Handler)

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
        return 0 if self._path is not None else int(self._server.server_address[1])

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


def serve(storage: StorageService, address: str, *more: Collector) -> Exporter:
    """Serve /metrics on `HOST:PORT` or `unix:/path`, with what `more` collects. Raises StoragedError."""
    from storaged.metrics.collector import StorageCollector  # a host's daemon serves no guest's metrics

    collector = StorageCollector(storage)
    try:
        return serve_collectors(address, collector.close, collector, *more)
    except BaseException:
        collector.close()
        raise


def serve_collectors(address: str, close: Callable[[], None], *collectors: Collector) -> Exporter:
    """The same for any collectors; `close` is called at the end. Raises StoragedError."""
    parsed = parse(address)
    try:
        server = _bind(parsed)
    except OSError as error:
        message = f"cannot serve metrics on {address}: {error.strerror or error}"
        raise StoragedError(message, Kind.UNAVAILABLE) from error
    server.collectors = collectors
    exporter = Exporter(server, close, parsed.path if isinstance(parsed, UnixAddress) else None)
    if isinstance(parsed, UnixAddress):
        log.info("metrics at %s", parsed)
    else:
        log.info("metrics at http://%s:%d%s", parsed.host, exporter.port, PATH)
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
