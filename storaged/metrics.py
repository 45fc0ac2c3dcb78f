"""Prometheus metrics: what the engine publishes, read at scrape time without touching the disk."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from storaged import __version__
from storaged.addresses import TcpAddress, parse_address
from storaged.core import events as ev
from storaged.core.machine import BalloonState, State
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.resize.job import JobState
from storaged.rpc.calls import BUCKETS
from storaged.rpc.server import Server
from storaged.runtime import StorageService

log = logging.getLogger(__name__)
_LEVELS = ("none", "normal", "low", "critical")
_OUTCOMES = {JobState.DONE: "success", JobState.FAILED: "failed", JobState.CANCELLED: "cancelled"}


class StorageCollector(Collector):
    """Turns the published snapshot into samples. Counts events as they pass."""

    def __init__(self, storage: StorageService) -> None:
        self._storage = storage
        self._updates = {"success": 0, "failed": 0, "ignored": 0}
        self._jobs = {(way, end): 0 for way in ("grow", "shrink") for end in _OUTCOMES.values()}
        self._was_active = False
        storage.observe(self._observe)

    def _observe(self, event: ev.Event, state: State) -> None:
        if isinstance(event, ev.HostReported) and state.report is not event.report:
            self._updates["ignored"] += 1
        elif isinstance(event, ev.BalloonSettled) and event.limit == state.balloon.limit:
            self._updates["success"] += 1
        elif isinstance(event, ev.BalloonFailed) and event.limit == state.balloon.limit:
            self._updates["failed"] += 1
        job = state.job
        if self._was_active and job is not None and not job.active:
            self._jobs["shrink" if job.shrinks else "grow", _OUTCOMES[job.state]] += 1
        self._was_active = job is not None and job.active

    def collect(self) -> Iterator[Metric]:
        """One family after the other; all label values are there from the start."""
        snapshot = self._storage.snapshot
        state, space = snapshot.state, snapshot.space
        balloon, job = state.balloon, state.job

        build = GaugeMetricFamily("storaged_build_info", "Version of the daemon", labels=["version", "python"])
        build.add_metric([__version__, "{}.{}.{}".format(*sys.version_info[:3])], 1)
        yield build
        level = state.pressure.level.name.lower() if state.pressure.known else "none"
        yield _one_hot("storaged_disk_pressure", "Host disk pressure in force", _LEVELS, level)
        if state.report is not None:
            yield _gauge("storaged_host_free_bytes", "Free bytes the host told last", state.report.free)
            yield _gauge("storaged_host_update_timestamp_seconds", "When the host told it", state.report.wall)
        states = [item.value for item in BalloonState]
        yield _one_hot("storaged_balloon_state", "What the balloon is doing", states, balloon.state.value)
        yield _gauge("storaged_balloon_size_bytes", "Bytes the balloon holds", balloon.size)
        yield _gauge("storaged_balloon_target_bytes", "Bytes the balloon should hold", snapshot.balloon_target)
        updates = CounterMetricFamily("storaged_balloon_updates", "Attempts to size the balloon", labels=["result"])
        for result, count in self._updates.items():
            updates.add_metric([result], count)
        yield updates
        adjusted = CounterMetricFamily(
            "storaged_balloon_adjusted_bytes", "Bytes taken and given back", labels=["direction"]
        )
        adjusted.add_metric(["inflate"], snapshot.inflated_total)
        adjusted.add_metric(["deflate"], snapshot.deflated_total)
        yield adjusted
        yield _gauge("storaged_filesystem_size_bytes", "Size of the filesystem", self._storage.current_size())
        yield _gauge("storaged_filesystem_available_bytes", "Bytes applications can write", space.available)
        if snapshot.bounds is not None:
            yield _gauge("storaged_filesystem_min_size_bytes", "Smallest size offered", snapshot.bounds.minimum)
        yield _gauge("storaged_btrfs_unallocated_bytes", "Bytes in no chunk", space.unallocated)
        yield _gauge(
            "storaged_btrfs_metadata_headroom_bytes",
            "Metadata that fits without a new chunk",
            space.metadata_headroom,
        )
        yield CounterMetricFamily("storaged_reclaimed_bytes", "Bytes handed back to the host", value=state.reclaimed)
        job_state = job.state if job is not None else None
        yield _one_hot(
            "storaged_resize_state",
            "State of the resize job, the last one if none runs",
            ["none", *(item.value.replace(" ", "_") for item in JobState)],
            job_state.value.replace(" ", "_") if job_state is not None else "none",
        )
        jobs = CounterMetricFamily("storaged_resize_jobs", "Resize jobs that ended", labels=["direction", "outcome"])
        for labels, count in self._jobs.items():
            jobs.add_metric(labels, count)
        yield jobs
        running = job if job is not None and job.active else None
        moved = snapshot.moved_total + (running.moved if running is not None else 0)
        yield CounterMetricFamily("storaged_resize_moved_bytes", "Bytes relocated by shrinks", value=moved)
        if running is not None:
            yield _gauge("storaged_resize_progress_ratio", "Progress of the running job", running.progress)
            yield _gauge("storaged_resize_target_bytes", "Size asked for by the running job", running.requested)
            yield _gauge("storaged_resize_start_time_seconds", "When the running job began", running.started)
            if running.eta is not None:
                yield _gauge("storaged_resize_eta_seconds", "Time left for the running job", running.eta)


class CallsCollector(Collector):
    """What callers did: every method and code, and who came over vsock."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """By the names that gRPC's other servers use."""
        calls = self._server.calls
        names = ["grpc_type", "grpc_service", "grpc_method"]
        started = CounterMetricFamily("grpc_server_started", "Calls that began", labels=names)
        for labels, count in list(calls.started.items()):
            started.add_metric(labels, count)
        yield started
        handled = CounterMetricFamily("grpc_server_handled", "Calls that ended", labels=[*names, "grpc_code"])
        for (labels, code), count in list(calls.handled.items()):
            handled.add_metric([*labels, code], count)
        yield handled
        seconds = HistogramMetricFamily("grpc_server_handling_seconds", "How long calls took", labels=names)
        for labels, duration in list(calls.seconds.items()):
            counts = list(accumulate(duration.buckets))
            bounds = [*map(floatToGoString, BUCKETS), "+Inf"]
            seconds.add_metric(labels, list(zip(bounds, counts, strict=True)), duration.total)
        yield seconds
        relay = self._server.relay
        if relay is not None:
            yield _gauge("storaged_vsock_connections", "Relayed connections held now", relay.open)
            yield CounterMetricFamily("storaged_vsock_accepted", "Connections taken", value=relay.accepted)
            dropped = CounterMetricFamily(
                "storaged_vsock_dropped", "Connections refused, or ended by us", labels=["reason"]
            )
            for reason, count in relay.dropped.items():
                dropped.add_metric([reason], count)
            yield dropped


def serve(storage: StorageService, address: str, calls_of: Server) -> Any:
    """Serve /metrics on `HOST:PORT`; the HTTP server. Raises StoragedError."""
    parsed = parse_address(f"tcp:{address}")
    if not isinstance(parsed, TcpAddress):
        raise ConfigError(f"--metrics {address!r} is not HOST:PORT")
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's only untyped function here
    registry = CollectorRegistry()
    registry.register(StorageCollector(storage))
    registry.register(CallsCollector(calls_of))
    try:
        server, _ = start_http_server(parsed.port, parsed.host.strip("[]"), registry=registry)
    except OSError as error:
        raise StoragedError(f"cannot serve metrics on {address}: {error.strerror}", Kind.UNAVAILABLE) from error
    log.info("metrics at http://%s:%d/metrics", parsed.host, server.server_port)
    return server


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _one_hot(name: str, text: str, states: Any, now: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["state"])
    for state in states:
        family.add_metric([state], 1 if state == now else 0)
    return family
