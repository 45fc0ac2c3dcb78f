"""What callers did: gRPC's own names, so that dashboards for other servers fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from storaged.rpc.calls import BUCKETS
from storaged.rpc.server import Server


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
            yield GaugeMetricFamily("storaged_vsock_connections", "Relayed connections held now", value=relay.open)
            yield CounterMetricFamily("storaged_vsock_accepted", "Connections taken", value=relay.accepted)
            dropped = CounterMetricFamily(
                "storaged_vsock_dropped", "Connections refused, or ended by us", labels=["reason"]
            )
            for reason, count in relay.dropped.items():
                dropped.add_metric([reason], count)
            yield dropped
