"""All guests and pools: who is in danger, what is promised, what came back."""

from __future__ import annotations

from dashboards.src.guest import variables
from dashboards.src.model import (
    ANY_IS_BAD,
    BYTES,
    CALLS,
    COUNT,
    NEGATIVE_IS_BAD,
    RATE,
    SHARE,
    Board,
    Kind,
    Panel,
    Query,
    Row,
    lines,
    stat,
)

G = 'job=~"$job", host=~"$host"'
H = 'host=~"$host"'
NEARLY_FULL = f"storaged_filesystem_available_bytes{{{G}}} < bool 0.02 * storaged_filesystem_size_bytes{{{G}}}"
SHORT = f"storaged_balloon_target_bytes{{{G}}} - storaged_balloon_size_bytes{{{G}}} > bool 67108864"
SLACK = " - ".join(f"storaged_host_pool_{part}_bytes{{{H}}}" for part in ("free", "reserve", "promised"))
FAULTS = "UNKNOWN|INTERNAL|UNAVAILABLE|DATA_LOSS|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
"""Codes that are the server's doing."""

NOW = Row(
    "Now",
    (
        stat("Guests", "Daemons that answer the scrapes.", f"count(storaged_build_info{{{G}}})", COUNT),
        stat(
            "Guests in danger",
            "Nearly full, read-only, or with a balloon that is short of its target.",
            f"sum(clamp_max(({NEARLY_FULL}) + storaged_filesystem_read_only{{{G}}} + ({SHORT}), 1))",
            COUNT,
            steps=ANY_IS_BAD,
            runbook="StoragedGuestNearlyFull",
        ),
        stat(
            "Under pressure",
            "Guests whose host is at LOW or CRITICAL.",
            f'sum(storaged_disk_pressure{{{G}, state=~"low|critical"}})',
            COUNT,
            steps=ANY_IS_BAD,
            runbook="StoragedHostReportStale",
        ),
        stat(
            "Balloons off target",
            "Balloons that lack 64 MiB or more.",
            f"sum({SHORT})",
            COUNT,
            steps=ANY_IS_BAD,
            runbook="StoragedBalloonOffTarget",
        ),
        stat(
            "Trimmed",
            "Bytes trimmed in the time that is shown. Free space that is trimmed again counts again.",
            f"sum(increase(storaged_reclaimed_bytes_total{{{G}}}[$__range]))",
            BYTES,
            runbook="StoragedDiscardUnavailable",
        ),
        stat(
            "Tightest pool",
            "Free less reserve less promises, where it is least.",
            f"min({SLACK})",
            BYTES,
            steps=NEGATIVE_IS_BAD,
            runbook="StoragedPoolOverpromised",
        ),
    ),
)
DANGER = Row(
    "Who is in danger",
    (
        Panel(
            "Guests by what is left",
            "The guest with the least to write comes first; its name leads to its page.",
            Kind.TABLE,
            BYTES,
            (
                Query(f"sum by (host, vm) (storaged_filesystem_available_bytes{{{G}}})", "available"),
                Query(
                    f"sum by (host, vm) (storaged_filesystem_available_bytes{{{G}}})"
                    f" / sum by (host, vm) (storaged_filesystem_size_bytes{{{G}}})",
                    "of its size",
                ),
                Query(f"sum by (host, vm) (storaged_balloon_size_bytes{{{G}}})", "balloon"),
                Query(f"sum by (host, vm) (storaged_balloon_target_bytes{{{G}}})", "target"),
                Query(f"min by (host, vm) (storaged_btrfs_metadata_headroom_bytes{{{G}}})", "metadata headroom"),
                Query(f"max by (host, vm) (storaged_filesystem_read_only{{{G}}})", "read-only"),
            ),
            width=24,
            units=(("of its size", SHARE), ("read-only", COUNT)),
            runbook="StoragedGuestNearlyFull",
        ),
        lines(
            "Least available",
            "The ten guests whose applications can write least.",
            BYTES,
            (f"bottomk(10, sum by (host, vm) (storaged_filesystem_available_bytes{{{G}}}))", "{{host}}/{{vm}}"),
            runbook="StoragedGuestNearlyFull",
        ),
        Panel(
            "Balloons",
            "What all guests hold back, by host.",
            Kind.STACK,
            BYTES,
            (Query(f"sum by (host) (storaged_balloon_size_bytes{{{G}}})", "{{host}}"),),
            runbook="StoragedBalloonOffTarget",
        ),
    ),
)
POOLS = Row(
    "Pools",
    (
        lines(
            "Promises against the pools",
            "On every host the promises must stay below what is free less the reserve.",
            BYTES,
            (f"sum by (host, pool) (storaged_host_pool_promised_bytes{{{H}}})", "{{host}} {{pool}}: promised"),
            (
                f"sum by (host, pool) (storaged_host_pool_free_bytes{{{H}}} - storaged_host_pool_reserve_bytes{{{H}}})",
                "{{host}} {{pool}}: free less reserve",
            ),
            runbook="StoragedPoolOverpromised",
        ),
        Panel(
            "Trimmed, by host",
            "Bytes a second, as the kernel counts. What images cost is on the page of the host's pool.",
            Kind.STACK,
            RATE,
            (Query(f"sum by (host) (rate(storaged_reclaimed_bytes_total{{{G}}}[$__rate_interval]))", "{{host}}"),),
            runbook="StoragedDiscardUnavailable",
        ),
    ),
)
WORK = Row(
    "Work",
    (
        lines(
            "Resize jobs that ended",
            "In the time between two points, by outcome.",
            COUNT,
            (
                f"sum by (outcome) (increase(storaged_resize_jobs_total{{{G}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
            width=8,
            runbook="StoragedResizeFailed",
        ),
        lines(
            "Resize jobs under way",
            "Guests whose job runs, or waits for its disk.",
            COUNT,
            (
                (
                    "sum(storaged_resize_state"
                    f'{{{G}, state=~"requested|waiting_for_capacity|preparing|running|cancelling"}})'
                ),
                "jobs",
            ),
            width=8,
            runbook="StoragedResizeStuck",
        ),
        lines(
            "Calls that guests failed",
            "Calls a second that ended in a server's error, all guests together.",
            CALLS,
            (
                (
                    f"clamp_min(sum(rate(grpc_server_handled_total{{{G}}}[$__rate_interval]))"
                    f' - sum(rate(grpc_server_handled_total{{{G}, grpc_code!~"{FAULTS}"}}[$__rate_interval])), 0)'
                ),
                "failed",
            ),
            width=8,
            runbook="StoragedRpcErrors",
        ),
    ),
)

BOARD = Board(
    "storaged-fleet",
    "storaged / Fleet",
    "All guests and their hosts' pools: which guests are in danger, what is promised, what was trimmed.",
    variables(),
    (NOW, DANGER, POOLS, WORK),
)
