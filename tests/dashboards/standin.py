"""A host that shares its pool among guests and tells them, and serves what a host serves.

It stands in for the host's daemon where that is not built yet. Where a guest's daemon does not count its calls
itself, they are counted here, as they are made, and served with the guest's own metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from lab.daemon import Daemon
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, MIB
from tests.metrics.support import get

RESERVE = 512 * MIB
OWN_RESERVE = GIB
"""What a guest subtracts itself from what it is told."""
LOOK_EVERY_S = 0.25
NAMES = ("grpc_type", "grpc_service", "grpc_method")


class Member:
    """One guest, and the calls that were made to it."""

    def __init__(self, name: str, daemon: Daemon, metrics: str, image: Callable[[], int]) -> None:
        self.name = name
        self.daemon = daemon
        self.image = image
        self.grant = 0
        self._metrics = metrics
        self._registry = CollectorRegistry()
        self._started = Counter("grpc_server_started", "Calls that began", NAMES, registry=self._registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls that ended", (*NAMES, "grpc_code"), registry=self._registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "How long they took",
            NAMES,
            buckets=(0.01, 0.1, 1, 10),
            registry=self._registry,
        )

    def call(self, method: str, work: Callable[[], Any]) -> Any:
        """Make a call, count it; None when it was refused."""
        labels = ("unary", "vm_tools.Maitred", method)
        self._started.labels(*labels).inc()
        began, code = time.perf_counter(), "OK"
        try:
            return work()
        except grpc.RpcError as error:
            code = error.code().name
            return None
        finally:
            self._seconds.labels(*labels).observe(time.perf_counter() - began)
            self._handled.labels(*labels, code).inc()

    def text(self) -> bytes:
        """What the guest serves, with its calls."""
        own = get(self._metrics)[1]
        return own.encode() if "grpc_server_handled_total" in own else own.encode() + generate_latest(self._registry)


class StandIn:
    """Shares, tells and serves until the end of `with`. `/host` has its own metrics, `/guest/NAME` a guest's."""

    def __init__(self, members: list[Member], free: Callable[[], int], size: int) -> None:
        self._members = members
        self._free = free
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self._registry = registry = CollectorRegistry()
        pool = {
            part: Gauge(f"storaged_host_pool_{part}_bytes", part, ["pool"], registry=registry)
            for part in ("size", "free", "reserve", "promised")
        }
        self._pool = {part: gauge.labels("main") for part, gauge in pool.items()}
        self._pool["size"].set(size)
        self._pool["reserve"].set(RESERVE)
        self._pressure = Gauge("storaged_host_pressure", "One-hot", ["pool", "state"], registry=registry)
        self._guest = {
            part: Gauge(f"storaged_host_guest_{part}", part, ["vm"], registry=registry)
            for part in ("grant_bytes", "available_bytes", "balloon_bytes", "weight", "up")
        }
        self._image = Gauge("storaged_host_image_allocated_bytes", "st_blocks", ["vm"], registry=registry)
        self._rebalances = Counter("storaged_host_rebalances", "By reason", ["reason"], registry=registry)
        self._reaction = Histogram("storaged_host_reaction_seconds", "Crossing to answered", registry=registry)
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                member = next((one for one in members if self.path == f"/guest/{one.name}"), None)
                body = member.text() if member is not None else generate_latest(stand_in._registry)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._threads = [threading.Thread(target=self._server.serve_forever), threading.Thread(target=self._run)]

    @property
    def address(self) -> str:
        """Where it serves."""
        return f"127.0.0.1:{self._server.server_port}"

    def _run(self) -> None:
        try:
            while not self._stop.wait(LOOK_EVERY_S):
                self._share()
        except BaseException as error:  # noqa: BLE001  # the test tells it
            self.errors.append(error)

    def _share(self) -> None:
        """Grants that shrink go out first; what they add up to is at most what is free less the reserve."""
        free = self._free()
        began = time.perf_counter()
        each = max(free - RESERVE, 0) // len(self._members)
        state = "critical" if each < 256 * MIB else "low" if each < GIB else "normal"
        told = {
            "normal": vm_guest_pb2.DISK_NORMAL,
            "low": vm_guest_pb2.DISK_LOW,
            "critical": vm_guest_pb2.DISK_CRITICAL,
        }
        for member in sorted(self._members, key=lambda one: one.grant, reverse=True):
            daemon = member.daemon
            result = member.call("UpdateStorageBalloon", partial(daemon.report_free, each + OWN_RESERVE, told[state]))
            if result == vm_guest_pb2.SUCCESS:
                member.grant = each
            available = member.call("GetAvailableSpace", daemon.available)
            member.call("GetResizeStatus", daemon.status)
            self._guest["available_bytes"].labels(member.name).set(available or 0)
            self._guest["balloon_bytes"].labels(member.name).set(daemon.report().balloon.size_bytes)
            self._guest["grant_bytes"].labels(member.name).set(member.grant)
            self._guest["weight"].labels(member.name).set(1)
            self._guest["up"].labels(member.name).set(result is not None)
            self._image.labels(member.name).set(member.image())
        self._rebalances.labels("pressure" if state != "normal" else "demand").inc()
        self._reaction.observe(time.perf_counter() - began)
        for one in ("none", "normal", "low", "critical"):
            self._pressure.labels("main", one).set(one == state)
        self._pool["free"].set(free)
        self._pool["promised"].set(sum(member.grant for member in self._members))

    def __enter__(self) -> Self:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._share()  # whoever scrapes first finds everything there
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()
