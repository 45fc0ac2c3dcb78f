"""The console's connections: uvicorn's HTTP/1.1, with deadlines and a limit for each peer.

uvicorn bounds neither the time that a request may take to arrive nor what one peer may hold. Here a request's header
and its body have a deadline each, which single bytes do not move; so has a reader that takes nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from storaged.host.console.limits import Crowd, Limits, peer_name
from storaged.quiet import BoundedLog

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)
_REASONS = {408: "Request Timeout", 429: "Too Many Requests", 503: "Service Unavailable"}


def peer_uid(connected: socket.socket) -> int | None:
    """The user at the other end of a unix socket, as the kernel says; None on other sockets."""
    if connected.family != socket.AF_UNIX:
        return None
    _, uid, _ = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


class Connections:
    """All connections of one console. `refusals`: where those that are ended are logged."""

    def __init__(self, limits: Limits, refusals: BoundedLog) -> None:
        self.limits = limits
        self.refusals = refusals
        self.crowd: Crowd[Bounded] = Crowd(limits.connections_per_peer, limits.connections, lambda each: each.waits)

    def protocol(self) -> type[asyncio.Protocol]:
        """What uvicorn makes one of for each connection."""
        return type("BoundedHttp", (Bounded,), {"everyone": self})


class Bounded(H11Protocol):
    """One connection. The scope's state has its `peer`, and on a unix socket its `uid`."""

    everyone: Connections
    peer = ""
    _phase = "header"
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _refused = False

    @property
    def waits(self) -> bool:
        """True while it waits for its peer: for a request, or to be read."""
        return self._phase != "answer" or self._stalled is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        connected: socket.socket = transport.get_extra_info("socket")
        uid = peer_uid(connected)
        name = transport.get_extra_info("peername")
        self.peer = f"uid {uid}" if uid is not None else peer_name(str(name[0]) if name else "")
        self.app_state = {**self.app_state, "peer": self.peer, "uid": uid}
        fits, victim = self.everyone.crowd.room(self.peer)
        if victim is not None:
            victim.end("connections", 503, "this connection waited, and others of its peer needed its place")
        if not fits:
            self._refused = True
            self.transport = transport
            self._say("connections", 503, f"{self.peer} has as many connections as one peer may have, all at work")
            return
        super().connection_made(transport)
        self.everyone.crowd.add(self.peer, self)
        self._arm(self.everyone.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._flows()
        self.everyone.crowd.discard(self.peer, self)
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._phase == "idle":
            self._enter("header", self.everyone.limits.header_s)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self._enter("idle", None)  # uvicorn ends it when nothing comes
        self._look()

    def _look(self) -> None:
        """Which deadline holds now."""
        state = self.conn.their_state
        if self.transport.is_closing():
            self._disarm()
        elif state is h11.SEND_BODY:
            self._enter("body", self.everyone.limits.body_s)
        elif state is h11.IDLE:
            if self._phase not in {"idle", "header"}:
                self._enter("header", self.everyone.limits.header_s)
        else:
            self._enter("answer", None)

    def _enter(self, phase: str, within_s: float | None) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        self._disarm()
        if within_s is not None:
            self._arm(within_s)

    def _arm(self, within_s: float) -> None:
        self._deadline = self.loop.call_later(within_s, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        limits = self.everyone.limits
        within_s = limits.body_s if self._phase == "body" else limits.header_s
        self.end("time-out", 408, f"the {self._phase} of the request did not arrive within {within_s:g} s")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.everyone.limits.send_s, self._unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flows()

    def _flows(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _unread(self) -> None:
        self._stalled = None
        self._note("slow", f"took nothing of its answer for {self.everyone.limits.send_s:g} s")
        self.transport.abort()

    @property
    def _answering(self) -> bool:
        """True while an answer to the newest request has begun: no other can."""
        return self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}

    def send_400_response(self, msg: str) -> None:
        self._note("invalid HTTP", "sent what is no HTTP")
        if self._answering:
            self.transport.abort()
            return
        super().send_400_response(msg)

    def end(self, reason: str, status: int, why: str) -> None:
        """Close it, with an answer if none has begun."""
        self.everyone.crowd.discard(self.peer, self)
        self._disarm()
        if self._answering or self._phase == "idle":
            if self._phase != "idle":
                self._note(reason, why)
            self.transport.abort()
        else:
            self._say(reason, status, why)

    def _say(self, reason: str, status: int, why: str) -> None:
        body = json.dumps({"error": why}).encode()
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.everyone.limits.send_s, self.transport.abort)
        self._note(reason, why)

    def _note(self, reason: str, why: str) -> None:
        self.everyone.refusals.note(self.peer, reason, f"console: connection of {self.peer} ended: {why}")


def quiet() -> None:
    """What uvicorn says of single requests is said here, at a bounded rate."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def details(scope: Any) -> tuple[str, int | None]:
    """The peer and the uid of a request's connection."""
    state = scope.get("state", {})
    return str(state.get("peer", "")), state.get("uid")
