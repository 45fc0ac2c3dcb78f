"""AF_VSOCK for a gRPC that cannot speak it: a relay to its unix socket, and who may come through.

A peer gets nothing from the server before it has sent the HTTP/2 preface, and a relayed connection costs two
descriptors and at most two buffers, however slow or silent its peer is. All on the event loop; no threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Container, Coroutine

from storaged.addresses import VsockAddress
from storaged.config import VsockConfig
from storaged.errors import Kind, StoragedError
from storaged.rpc.acceptor import BACKLOG, Acceptor

log = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What every HTTP/2 client sends first (RFC 9113, 3.4)."""
BUFFER = 64 << 10
"""Bytes that may wait for a slow reader before the other side is no longer read; one read more may be added."""
REASONS = ("cid", "full", "full_cid", "preface", "idle", "backend")


class _End(asyncio.Protocol):
    """One side of a relayed connection; hands what it reads to `other`."""

    def __init__(self, pair: _Pair, *, outer: bool) -> None:
        self._pair = pair
        self._outer = outer
        self.transport: asyncio.Transport | None = None
        self.other: _End
        self.finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._pair.ended:
            transport.abort()  # it was given up before it was there
            return
        transport.set_write_buffer_limits(high=BUFFER)

    def data_received(self, data: bytes) -> None:
        if self._outer:
            data = self._pair.heard(data)
        if data and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        self.finished = True
        if self.other.transport is None or self.other.finished:
            self._pair.end()
            return False
        with contextlib.suppress(OSError, RuntimeError):
            self.other.transport.write_eof()
        return True  # half closed: the other direction goes on

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pair.end(abruptly=exc is not None)
        self._pair.lost(self)


class _Pair:
    """A relayed connection: the peer, the backend, and the time they have."""

    def __init__(self, relay: Relay, cid: int) -> None:
        self._relay = relay
        self.cid = cid
        self._loop = asyncio.get_running_loop()
        self.outer, self.inner = _End(self, outer=True), _End(self, outer=False)
        self.outer.other, self.inner.other = self.inner, self.outer
        self._first = b""
        self._heard_at = self._loop.time()
        self.ended = False
        self._timer = self._loop.call_later(relay.config.preface_s, self._look)

    def heard(self, data: bytes) -> bytes:
        """What of `data`, which the peer sent, goes on to the backend; the preface is kept until it is whole."""
        self._heard_at = self._loop.time()
        if self.inner.transport is not None:
            return data
        self._first += data
        if not PREFACE.startswith(self._first[: len(PREFACE)]):
            self._drop("preface")
        elif len(self._first) >= len(PREFACE) and self.outer.transport is not None:
            self.outer.transport.pause_reading()  # nothing more is kept while the backend is fetched
            self._relay.spawn(self._connect())
        return b""

    async def _connect(self) -> None:
        try:
            inside = await self._relay.enter(self.cid)
            transport, _ = await self._loop.create_unix_connection(lambda: self.inner, sock=inside)
        except OSError as error:
            log.warning("the server behind the vsock relay does not answer: %s", error)
            self._drop("backend")
            return
        if self.ended or self.outer.transport is None:
            transport.abort()
            return
        transport.write(self._first)
        self._first = b""
        self.outer.transport.resume_reading()
        self._arm(self._relay.config.idle_s)

    def _arm(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        if self.inner.transport is None:
            self._drop("preface")
            return
        left = self._heard_at + self._relay.config.idle_s - self._loop.time()
        if left <= 0:
            self._drop("idle")
        else:
            self._arm(left)

    def _drop(self, reason: str) -> None:
        if not self.ended:
            self._relay.count(reason, self.cid)
        self.end(abruptly=True)

    def end(self, *, abruptly: bool = False) -> None:
        """Close both sides: what waits is still written for a while, unless `abruptly`."""
        first, self.ended = not self.ended, True
        for one in (self.outer, self.inner):
            if one.transport is not None:
                if abruptly:
                    one.transport.abort()
                elif not one.transport.is_closing():
                    one.transport.close()
        if abruptly:
            self._timer.cancel()
        elif first:
            self._timer.cancel()
            self._timer = self._loop.call_later(self._relay.config.preface_s, self._abort)

    def _abort(self) -> None:
        self.end(abruptly=True)

    @property
    def waiting(self) -> int:
        """Bytes that wait to be sent to the peer."""
        return self.outer.transport.get_write_buffer_size() if self.outer.transport is not None else 0

    def lost(self, one: _End) -> None:
        """`one` is gone; the pair with it when nothing is left."""
        one.transport = None
        if self.outer.transport is None and self.inner.transport is None:
            self._timer.cancel()
            self._relay.forget(self)


class Relay:
    """Carries connections of allowed peers to the unix socket `backend`.

    `cids`: who is allowed, in place of the configuration. `names`: a directory of ours; then the server behind sees
    each connection come from a socket in it, whose name begins with the context id and a dash.
    """

    def __init__(
        self, backend: str, config: VsockConfig | None = None, *, cids: Container[int] | None = None, names: str = ""
    ) -> None:
        self.backend = backend
        self.config = config or VsockConfig()
        self._cids = cids
        self._names = names
        self._entered = 0
        self.accepted = 0
        self._dropped = Counter(dict.fromkeys(REASONS, 0))
        self._pairs: set[_Pair] = set()
        self._by_cid: Counter[int] = Counter()
        self._acceptors: list[Acceptor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: set[tuple[str, int]] = set()

    @property
    def dropped(self) -> dict[str, int]:
        """Connections that were refused or ended by us, by reason; every reason is there."""
        return dict(self._dropped)

    @property
    def open(self) -> int:
        """Connections held now."""
        return len(self._pairs)

    async def enter(self, cid: int) -> socket.socket:
        """A connection to the backend for a peer. Raises OSError."""
        inside = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        name = ""
        try:
            if self._names:
                self._entered += 1
                name = os.path.join(self._names, f"{cid}-{self._entered}")
                inside.bind(name)
            await asyncio.get_running_loop().sock_connect(inside, self.backend)
        except BaseException:
            inside.close()
            raise
        finally:
            if name:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        return inside

    def listen(self, address: VsockAddress) -> VsockAddress:
        """Accept on `address`; the address with the port that was chosen for the port of any. Raises StoragedError."""
        try:
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise StoragedError(f"cannot listen on {address}: {error.strerror}", Kind.UNAVAILABLE) from error
        try:
            listener.bind((address.cid, address.port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise StoragedError(f"cannot listen on {address}: {error.strerror}", Kind.UNAVAILABLE) from error
        self._acceptors.append(Acceptor(listener, self._peer))
        return VsockAddress(address.cid, listener.getsockname()[1])

    def _peer(self, peer: socket.socket, address: tuple[int, int]) -> None:
        self.adopt(peer, address[0])

    def adopt(self, peer: socket.socket, cid: int) -> None:
        """Take a connected socket of the peer `cid`, which does not block, or drop it at once."""
        config = self.config
        if cid not in (config.cids if self._cids is None else self._cids):
            reason = "cid"
        elif len(self._pairs) >= config.connections:
            reason = "full"
        elif self._by_cid[cid] >= config.connections_per_cid:
            reason = "full_cid"
        else:
            self.accepted += 1
            pair = _Pair(self, cid)
            self._pairs.add(pair)
            self._by_cid[cid] += 1
            self.spawn(self._begin(pair, peer))
            return
        peer.close()
        self.count(reason, cid)

    async def flushed(self, within_s: float) -> None:
        """Returns once nothing waits to be sent to a peer, or `within_s` is over."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while any(pair.waiting for pair in self._pairs) and loop.time() < until:  # noqa: ASYNC110  # once, at the end
            await asyncio.sleep(0.01)

    async def _begin(self, pair: _Pair, peer: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: pair.outer, peer)
        except OSError:
            peer.close()
            self.forget(pair)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run a coroutine of a connection, and keep it until it is done."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def count(self, reason: str, cid: int) -> None:
        """One more was dropped. Said once for each reason and peer: a flood must not fill the log."""
        self._dropped[reason] += 1
        if (reason, cid) not in self._told and len(self._told) < 64:
            self._told.add((reason, cid))
            log.warning("vsock connection of context id %d dropped: %s (later ones are only counted)", cid, reason)

    def forget(self, pair: _Pair) -> None:
        """`pair` is over."""
        if pair in self._pairs:
            self._pairs.discard(pair)
            self._by_cid[pair.cid] -= 1

    def stop_listening(self) -> None:
        """Take no new connections; those that are there go on."""
        for acceptor in self._acceptors:
            acceptor.close()
        self._acceptors.clear()

    async def close(self) -> None:
        """End everything."""
        self.stop_listening()
        for pair in list(self._pairs):
            pair.end(abruptly=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next round
