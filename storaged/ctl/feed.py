"""The reports of one guest as a queue that also carries what else can happen while somebody watches.

A thread reads the stream and finds the daemon again when it goes away. Ctrl-C becomes an event too, so that
whoever watches is never torn out of the middle of a line.
"""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from storaged.ctl.client import Client
from storaged.errors import Kind
from storaged.rpc.proto import storaged_v1_pb2 as pb

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

SILENCE_S = 10.0
"""A stream may well be silent this long; then the daemon is asked whether it still lives."""
TRY_AGAIN_S = 0.25
JOIN_WITHIN_S = 2.0
TWICE_S = 0.2
"""Signals nearer to each other are one Ctrl-C: a parent such as timeout(1) may pass on what we already got."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The daemon went away; it is being looked for."""


@dataclass(frozen=True, slots=True)
class Gone:
    """It did not come back, or refuses; nothing more will come."""

    reason: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody pressed Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The daemon has cancelled the job and says how it ended."""

    job: pb.Job


@dataclass(frozen=True, slots=True)
class CancelFailed:
    """The daemon could not be asked, or had nothing to cancel."""

    reason: str
    lost: bool


Event = pb.Report | Lost | Gone | Interrupted | Cancelled | CancelFailed


class Feed:
    """Use it in `with`, on the main thread; then take events with `next`.

    The first `patience` times Ctrl-C is an event; after that it is a KeyboardInterrupt, as ever.
    """

    def __init__(self, client: Client, *, interval_s: float = 0.0, patience: int = 1) -> None:
        self._client = client
        self._interval_s = interval_s
        self._patience = patience
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._call: Any = None
        self._asked: list[Any] = []
        self._lost = False
        self._interrupted_at = -math.inf
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self._before: Any = None

    def next(self) -> Event:
        """The next event; waits for it."""
        while True:
            try:
                event = self._events.get(timeout=SILENCE_S)
            except queue.Empty:
                if not self._lost:
                    self._ask_alive()
                continue
            if isinstance(event, Lost):
                self._lost = True
            elif isinstance(event, pb.Report):
                self._lost = False
            return event

    def cancel(self) -> None:
        """Ask the daemon to cancel the job; Cancelled or CancelFailed comes when it has answered."""
        call: Any = self._client.storage.CancelResize.future(
            pb.CancelResizeRequest(), timeout=self._client.work_within_s
        )
        self._asked.append(call)
        call.add_done_callback(self._cancel_answered)

    def _cancel_answered(self, call: Any) -> None:
        if self._closed.is_set():
            return
        try:
            self._events.put(Cancelled(call.result().job))
        except grpc.RpcError as error:
            failed = self._client.explain(error, self._client.work_within_s)
            self._events.put(CancelFailed(failed.message, failed.lost))

    def _ask_alive(self) -> None:
        call: Any = self._client.storage.GetReport.future(pb.GetReportRequest(), timeout=self._client.answer_within_s)
        self._asked = [call, *(asked for asked in self._asked if not asked.done())]
        call.add_done_callback(self._alive_answered)

    def _alive_answered(self, call: Any) -> None:
        if self._closed.is_set():
            return
        try:
            self._events.put(call.result())
        except grpc.RpcError as error:
            failed = self._client.explain(error)
            if failed.kind is not Kind.UNAVAILABLE:  # else the stream broke too, and its reader looks for the daemon
                self._events.put(Gone(failed.message))

    def _read(self) -> None:
        lost_at: float | None = None
        while not self._closed.is_set():
            reason = "it ended the stream"
            try:
                self._call = self._client.storage.Watch(pb.WatchRequest(min_interval_s=self._interval_s))
                for report in self._call:
                    lost_at = None
                    self._events.put(report)
            except grpc.RpcError as error:
                failed = self._client.explain(error)
                if not failed.lost and not self._closed.is_set():
                    self._events.put(Gone(failed.message))
                    return
                reason = failed.message
            if lost_at is None:
                lost_at = time.monotonic()
                self._events.put(Lost())
            elif time.monotonic() - lost_at > self._client.answer_within_s:
                self._events.put(Gone(f"{reason}; gave up after {self._client.answer_within_s:g} s"))
                return
            self._closed.wait(TRY_AGAIN_S)

    def _interrupt(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._interrupted_at < TWICE_S:
            return
        self._interrupted_at = now
        if self._patience <= 0:
            raise KeyboardInterrupt
        self._patience -= 1
        self._events.put(Interrupted())

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def start(self) -> None:
        """Begin to read reports."""
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        until = time.monotonic() + JOIN_WITHIN_S
        while True:
            for call in (self._call, *self._asked):
                if call is not None:
                    call.cancel()
            if not self._thread.is_alive() or time.monotonic() > until:
                break
            self._thread.join(0.05)
        signal.signal(signal.SIGINT, self._before)
