"""What must fire when: each case is a healthy guest and pool with one thing changed, and says all that fires.

Values are in promtool's notation, a sample every 15 s for 45 minutes: `0x20 1x160` is 21 zeros, then ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from storaged.units import GIB, MIB

SAMPLES = 180
_WHERE = 'instance="g:1", host="h", vm="a"'
_CALL = 'grpc_type="unary", grpc_service="s", grpc_method="m"'
_POOL = '{job="storaged-host", instance="h:1", host="h", pool="p"}'


def of(metric: str, more: str = "") -> str:
    """The guest's series of that name."""
    return f'{metric}{{job="storaged", {_WHERE}{", " if more else ""}{more}}}'


def flat(value: float) -> str:
    """The same all the time."""
    return f"{value:g}x{SAMPLES}" if value < MIB else f"{value:.0f}x{SAMPLES}"


def rising(step: float) -> str:
    """More by `step` every 15 s."""
    return f"0+{step:g}x{SAMPLES}"


UP = of("up")
SIZE, AVAILABLE = of("storaged_filesystem_size_bytes"), of("storaged_filesystem_available_bytes")
TARGET, BALLOON = of("storaged_balloon_target_bytes"), of("storaged_balloon_size_bytes")
TOLD, TOLD_AT = of("storaged_host_free_bytes"), of("storaged_host_update_timestamp_seconds")
HEADROOM, UNALLOCATED = of("storaged_btrfs_metadata_headroom_bytes"), of("storaged_btrfs_unallocated_bytes")
READ_ONLY, DISCARD = of("storaged_filesystem_read_only"), of("storaged_filesystem_discard_supported")
MOVED, PROGRESS = of("storaged_resize_moved_bytes_total"), of("storaged_resize_progress_ratio")
STARTED = of("storaged_resize_start_time_seconds")
PROMISED = f"storaged_host_pool_promised_bytes{_POOL}"


def jobs(outcome: str) -> str:
    """Shrinks that ended so."""
    return of("storaged_resize_jobs_total", f'direction="shrink", outcome="{outcome}"')


def calls(code: str) -> str:
    """Calls that ended so."""
    return of("grpc_server_handled_total", f'{_CALL}, grpc_code="{code}"')


HEALTHY = {
    UP: flat(1),
    SIZE: flat(8 * GIB),
    AVAILABLE: flat(4 * GIB),
    TARGET: flat(2 * GIB),
    BALLOON: flat(2 * GIB),
    TOLD: flat(5 * GIB),
    TOLD_AT: flat(0),
    HEADROOM: flat(200 * MIB),
    UNALLOCATED: flat(3 * GIB),
    READ_ONLY: flat(0),
    DISCARD: flat(1),
    jobs("failed"): flat(0),
    jobs("success"): rising(1),
    MOVED: rising(1000),
    calls("OK"): rising(60),
    f"storaged_host_pool_free_bytes{_POOL}": flat(10 * GIB),
    f"storaged_host_pool_reserve_bytes{_POOL}": flat(2 * GIB),
    PROMISED: flat(8 * GIB),
}


@dataclass(frozen=True, slots=True)
class Case:
    """`about` is the alert that the case is for, whether it fires or not."""

    about: str
    title: str
    changed: dict[str, str]
    at: str
    fires: bool


def _fires(about: str, title: str, changed: dict[str, str], at: str) -> Case:
    return Case(about, title, changed, at, fires=True)


def _quiet(about: str, title: str, changed: dict[str, str], at: str = "12m") -> Case:
    return Case(about, title, changed, at, fires=False)


_RUNS = {STARTED: flat(0), PROGRESS: flat(0.4)}
_STANDS = {MOVED: flat(5)}
_LITTLE = {HEADROOM: flat(16 * MIB)}

CASES = (
    _fires("StoragedBalloonOffTarget", "short for three minutes", {BALLOON: flat(2 * GIB - 128 * MIB)}, "3m30s"),
    _quiet("StoragedBalloonOffTarget", "gave 32 MiB to metadata", {BALLOON: flat(2 * GIB - 32 * MIB)}),
    _quiet("StoragedBalloonOffTarget", "on its way for a minute", {BALLOON: f"{2 * GIB}x7 0x4 {2 * GIB}x160"}, "2m45s"),
    _quiet("StoragedBalloonOffTarget", "above its target: no danger", {BALLOON: flat(3 * GIB)}),
    _fires("StoragedHostReportStale", "half a GiB was left, then silence", {TOLD: flat(GIB // 2)}, "5m"),
    _quiet("StoragedHostReportStale", "little room, but told", {TOLD: flat(GIB // 2), TOLD_AT: rising(15)}),
    _quiet("StoragedHostReportStale", "silent for 90 s", {TOLD: flat(GIB // 2)}, "1m30s"),
    _quiet("StoragedHostReportStale", "exactly the reserve is left", {TOLD: flat(GIB)}),
    _quiet("StoragedHostReportStale", "much room, long silence", {}, "44m"),
    _fires("StoragedMetadataHeadroomLow", "no chunk to be had", {**_LITTLE, UNALLOCATED: flat(MIB)}, "5m"),
    _quiet("StoragedMetadataHeadroomLow", "for a minute", {**_LITTLE, UNALLOCATED: flat(MIB)}, "1m"),
    _quiet("StoragedMetadataHeadroomLow", "there is room for a chunk", _LITTLE),
    _quiet("StoragedMetadataHeadroomLow", "all allocated, ample headroom", {UNALLOCATED: flat(MIB)}),
    _fires("StoragedFilesystemReadOnly", "the kernel gave up", {READ_ONLY: flat(1)}, "1m"),
    _quiet("StoragedFilesystemReadOnly", "a remount, seen once", {READ_ONLY: "0x10 1 0x160"}, "2m45s"),
    _fires("StoragedResizeFailed", "one job", {jobs("failed"): "0x20 1x160"}, "10m"),
    _quiet("StoragedResizeFailed", "long ago", {jobs("failed"): "0x20 1x160"}, "22m"),
    _quiet("StoragedResizeFailed", "cancelled is not failed", {jobs("cancelled"): "0x20 1x160"}, "10m"),
    _fires("StoragedResizeStuck", "40 % for half an hour", {**_RUNS, **_STANDS}, "20m"),
    _quiet("StoragedResizeStuck", "slow, but it moves", _RUNS, "20m"),
    _quiet("StoragedResizeStuck", "it has just begun", {**_RUNS, **_STANDS}, "10m"),
    _quiet("StoragedResizeStuck", "no job, nothing moves", _STANDS, "20m"),
    _fires("StoragedDiscardUnavailable", "a disk without discard", {DISCARD: flat(0)}, "20m"),
    _quiet("StoragedDiscardUnavailable", "five minutes without", {DISCARD: "0x20 1x160"}, "5m"),
    _quiet("StoragedDiscardUnavailable", "a disk with discard", {}, "17m"),
    _fires("StoragedGuestNearlyFull", "100 MiB of 8 GiB", {AVAILABLE: flat(100 * MIB)}, "6m"),
    _fires(
        "StoragedGuestNearlyFull",
        "1 % of a large disk",
        {SIZE: flat(800 * GIB), AVAILABLE: flat(8 * GIB)},
        "6m",
    ),
    _quiet("StoragedGuestNearlyFull", "300 MiB of 8 GiB", {AVAILABLE: flat(300 * MIB)}),
    _quiet("StoragedGuestNearlyFull", "for four minutes", {AVAILABLE: f"{4 * GIB}x8 0x15 {4 * GIB}x150"}, "6m"),
    _fires("StoragedPoolOverpromised", "a byte too much", {PROMISED: flat(8 * GIB + 1)}, "3m"),
    _quiet("StoragedPoolOverpromised", "between two looks", {PROMISED: flat(9 * GIB)}, "30s"),
    _quiet("StoragedPoolOverpromised", "exactly used up", {}),
    _fires("StoragedRpcErrors", "one call in eleven", {calls("INTERNAL"): rising(6)}, "16m"),
    _quiet("StoragedRpcErrors", "for five minutes", {calls("INTERNAL"): rising(6)}, "5m"),
    _quiet("StoragedRpcErrors", "one call in a hundred", {calls("INTERNAL"): rising(0.6)}, "16m"),
    _quiet("StoragedRpcErrors", "callers that ask wrongly", {calls("INVALID_ARGUMENT"): rising(60)}, "16m"),
    _fires("StoragedDown", "no answer for four minutes", {UP: flat(0)}, "4m"),
    _quiet("StoragedDown", "a restart", {UP: "1x8 0x4 1x160"}, "3m"),
    _quiet("StoragedDown", "somebody else is down", {'up{job="node", instance="x"}': flat(0)}),
)


def document(cases: tuple[Case, ...] = CASES) -> str:
    """The cases as promtool reads them, for rule files beside it."""
    tests = [
        {
            "name": f"{case.about}: {case.title}",
            "interval": "15s",
            "input_series": [
                {"series": series, "values": values} for series, values in {**HEALTHY, **case.changed}.items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": case.at,
                    "exp_samples": [{"labels": f'{{alertname="{case.about}"}}', "value": 1}] if case.fires else [],
                }
            ],
        }
        for case in cases
    ]
    return yaml.safe_dump(
        {
            "rule_files": ["rules.yml", "alerts.yml"],
            "evaluation_interval": "15s",
            "group_eval_order": ["storaged-rules", "storaged-alerts"],
            "tests": tests,
        }
    )
