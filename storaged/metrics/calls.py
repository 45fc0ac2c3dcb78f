"""What callers did: gRPC's own names, so that dashboards for other servers fit."""

from __future__ import annotations

from collections.abc import Iterator

from storaged.metrics.family import PLAIN, Distribution, Family, Metric, Type, Values
from storaged.rpc.calls import BUCKETS
from storaged.rpc.server import Server

_WHICH = (("grpc_type", ()), ("grpc_service", ()), ("grpc_method", ()))
STARTED = Family("grpc_server_started_total", Type.COUNTER, "Calls that began", _WHICH)
HANDLED = Family("grpc_server_handled_total", Type.COUNTER, "Calls that ended", (*_WHICH, ("grpc_code", ())))
SECONDS = Family(
    "grpc_server_handling_seconds",
    Type.HISTOGRAM,
    "How long calls took, of those that hosts make all the time",
    _WHICH,
)
RELAYED = "with a vsock address"
OPEN = Family("storaged_vsock_connections", Type.GAUGE, "Relayed connections held now", present=RELAYED)
ACCEPTED = Family("storaged_vsock_accepted_total", Type.COUNTER, "Connections taken", present=RELAYED)
DROPPED = Family(
    "storaged_vsock_dropped_total",
    Type.COUNTER,
    "Connections refused, or ended by us",
    (("reason", ()),),
    present=RELAYED,
)
CALLS = (STARTED, HANDLED, SECONDS, OPEN, ACCEPTED, DROPPED)


class CallsCollector:
    """What callers did: every method and code, and who came over vsock."""

    families = CALLS

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """By the names that gRPC's other servers use."""
        calls = self._server.calls
        started: Values = {(*labels,): count for labels, count in calls.started.copy().items()}
        yield Metric(STARTED, started)
        yield Metric(HANDLED, {(*labels, code): count for (labels, code), count in calls.handled.copy().items()})
        yield Metric(
            SECONDS,
            {
                labels: Distribution(BUCKETS, list(duration.buckets), duration.total)
                for labels, duration in calls.seconds.copy().items()
            },
        )
        relay = self._server.relay
        if relay is not None:
            yield Metric(OPEN, {PLAIN: relay.open})
            yield Metric(ACCEPTED, {PLAIN: relay.accepted})
            yield Metric(DROPPED, {(reason,): count for reason, count in relay.dropped.items()})
