"""One guest: pressure, balloon, room, metadata, its resize job, its calls."""

from __future__ import annotations

from dashboards.src.model import (
    AMBER,
    ANY_IS_BAD,
    BLUE,
    BYTES,
    CALLS,
    COUNT,
    GREEN,
    GREY,
    LITTLE_IS_BAD,
    MIB,
    PLAIN,
    RATE,
    RED,
    SECONDS,
    SHARE,
    Board,
    Kind,
    Panel,
    Query,
    Row,
    Variable,
    lines,
    stat,
)

G = 'job=~"$job", host=~"$host", vm=~"$vm"'
BY = "host, vm"
LEVELS = ((0, "not told", GREY), (1, "normal", GREEN), (2, "low", AMBER), (3, "critical", RED))
BALLOON = ((0, "idle", GREEN), (1, "inflating", BLUE), (2, "deflating", BLUE), (3, "failed", RED))
JOB = (
    (0, "none", GREY),
    (1, "requested", BLUE),
    (2, "waiting for capacity", AMBER),
    (3, "preparing", BLUE),
    (4, "running", BLUE),
    (5, "cancelling", AMBER),
    (6, "done", GREEN),
    (7, "failed", RED),
    (8, "cancelled", GREY),
)


def state(metric: str, names: tuple[tuple[int, str, str], ...], where: str = G, by: str = BY) -> str:
    """A one-hot metric as one number, as `names` number its states."""
    parts = []
    for number, text, _ in names:
        word = "none" if text == "not told" else text.replace(" ", "_")
        parts.append(f'{number} * {metric}{{{where}, state="{word}"}}')
    return f"sum by ({by}) ({' or '.join(parts)})"


def variables(first: str = "storaged_build_info") -> tuple[Variable, ...]:
    """What all pages can be narrowed to."""
    return (
        Variable("job", "Job", f"label_values({first}, job)", many=True),
        Variable("host", "Host", f'label_values({first}{{job=~"$job"}}, host)', many=True),
    )


def only(metric: str, more: str = "") -> str:
    """The guest's own value."""
    return f"{metric}{{{G}{more}}}"


NOW = Row(
    "Now",
    (
        stat(
            "Host pressure",
            "The level in force in this guest: what the host told, worse at once, better after it has lasted.",
            state("storaged_disk_pressure", LEVELS),
            COUNT,
            names=LEVELS,
            runbook="StoragedHostReportStale",
        ),
        stat(
            "Applications can write",
            "Bytes of data that fit before applications meet ENOSPC.",
            only("storaged_filesystem_available_bytes"),
            BYTES,
            steps=LITTLE_IS_BAD,
            runbook="StoragedGuestNearlyFull",
        ),
        stat(
            "Balloon short by",
            "What the balloon lacks to its target: applications may write this much more than the host can give.",
            f"clamp_min({only('storaged_balloon_target_bytes')} - {only('storaged_balloon_size_bytes')}, 0)",
            BYTES,
            steps=((None, GREEN), (64 * MIB, RED)),
            runbook="StoragedBalloonOffTarget",
        ),
        stat(
            "Metadata headroom",
            "Metadata that fits before a new chunk is needed.",
            only("storaged_btrfs_metadata_headroom_bytes"),
            BYTES,
            steps=((None, RED), (32 * MIB, AMBER), (64 * MIB, GREEN)),
            runbook="StoragedMetadataHeadroomLow",
        ),
        stat(
            "Read-only",
            "The filesystem takes no writes: by a mount option, or by force of the kernel after an error.",
            only("storaged_filesystem_read_only"),
            COUNT,
            steps=ANY_IS_BAD,
            names=((0, "no", GREEN), (1, "yes", RED)),
            runbook="StoragedFilesystemReadOnly",
        ),
        stat(
            "Gives blocks back",
            "Whether freed blocks can be discarded, so that the host gets them back.",
            only("storaged_filesystem_discard_supported"),
            COUNT,
            names=((0, "no", RED), (1, "yes", GREEN)),
            runbook="StoragedDiscardUnavailable",
        ),
    ),
)
SPACE = Row(
    "Space",
    (
        lines(
            "Filesystem",
            "Its size, what applications can still write, and the smallest size a shrink was last known to reach.",
            BYTES,
            (only("storaged_filesystem_size_bytes"), "size"),
            (only("storaged_filesystem_available_bytes"), "available"),
            (only("storaged_filesystem_min_size_bytes"), "smallest size"),
            runbook="StoragedGuestNearlyFull",
        ),
        lines(
            "Balloon against its target",
            "Both lie on each other when all is well; the size lags while the balloon moves.",
            BYTES,
            (only("storaged_balloon_target_bytes"), "target"),
            (only("storaged_balloon_size_bytes"), "size"),
            runbook="StoragedBalloonOffTarget",
        ),
        lines(
            "Free on the host, as told",
            "What the host said last, less 1 GiB for itself, is what the guest may take: by new files, by preallocated"
            " extents that are not written yet, and by metadata.",
            BYTES,
            (only("storaged_host_free_bytes"), "told"),
            (only("storaged_filesystem_available_bytes"), "available to applications"),
            (only("storaged_unwritten_bytes"), "preallocated, not written"),
            (only("storaged_may_write_bytes"), "can reach the host at most"),
            runbook="StoragedHostReportStale",
        ),
        lines(
            "Metadata",
            "Headroom, and the unallocated bytes that new chunks are made of. ENOSPC without full data starts here.",
            BYTES,
            (only("storaged_btrfs_metadata_headroom_bytes"), "metadata headroom"),
            (only("storaged_btrfs_unallocated_bytes"), "unallocated"),
            runbook="StoragedMetadataHeadroomLow",
        ),
    ),
)
STATES = Row(
    "What it does",
    (
        Panel(
            "Pressure over time",
            "The level in force.",
            Kind.STATES,
            COUNT,
            (Query(state("storaged_disk_pressure", LEVELS), "pressure"),),
            width=8,
            height=5,
            names=LEVELS,
        ),
        Panel(
            "Balloon over time",
            "What the balloon is doing; failed means that it is tried again.",
            Kind.STATES,
            COUNT,
            (Query(state("storaged_balloon_state", BALLOON), "balloon"),),
            width=8,
            height=5,
            names=BALLOON,
            runbook="StoragedBalloonOffTarget",
        ),
        Panel(
            "Resize job over time",
            "The job, or the last one when none runs.",
            Kind.STATES,
            COUNT,
            (Query(state("storaged_resize_state", JOB), "job"),),
            width=8,
            height=5,
            names=JOB,
            runbook="StoragedResizeFailed",
        ),
        lines(
            "Age of the host's report",
            "Time since the host told something. Hosts with much room are silent for long.",
            SECONDS,
            (f"time() - {only('storaged_host_update_timestamp_seconds')}", "age"),
            width=8,
            runbook="StoragedHostReportStale",
        ),
        lines(
            "Balloon churn",
            "Bytes a second that the balloon takes and gives.",
            RATE,
            (
                f"sum by (direction) (rate({only('storaged_balloon_adjusted_bytes_total')}[$__rate_interval]))",
                "{{direction}}",
            ),
            width=8,
        ),
        lines(
            "Trimmed",
            "Bytes a second trimmed, as the kernel counts: free space that is trimmed again counts again.",
            RATE,
            (f"rate({only('storaged_reclaimed_bytes_total')}[$__rate_interval])", "trimmed"),
            width=8,
            runbook="StoragedDiscardUnavailable",
        ),
    ),
)
RESIZE = Row(
    "Resize",
    (
        lines(
            "Progress of the running job",
            "0 while none runs.",
            SHARE,
            (
                (
                    f"sum by ({BY}) ({only('storaged_resize_progress_ratio')}"
                    f" or 0 * {only('storaged_filesystem_size_bytes')})"
                ),
                "done",
            ),
            width=8,
            runbook="StoragedResizeStuck",
        ),
        lines(
            "Relocated",
            "Bytes a second that shrinks move.",
            RATE,
            (f"rate({only('storaged_resize_moved_bytes_total')}[$__rate_interval])", "moved"),
            width=8,
            runbook="StoragedResizeStuck",
        ),
        lines(
            "Jobs that ended",
            "In the time between two points, by direction and outcome.",
            COUNT,
            (
                f"sum by (direction, outcome) (increase({only('storaged_resize_jobs_total')}[$__rate_interval]))",
                "{{direction}}, {{outcome}}",
            ),
            width=8,
            runbook="StoragedResizeFailed",
        ),
    ),
)
RPC = Row(
    "Calls",
    (
        lines(
            "Calls by method",
            "Calls a second that ended.",
            CALLS,
            (
                f"sum by (grpc_method) (rate({only('grpc_server_handled_total')}[$__rate_interval]))",
                "{{grpc_method}}",
            ),
            width=8,
        ),
        lines(
            "Calls that did not end in OK",
            "Calls a second by code; 0 when all went well.",
            CALLS,
            (
                "sum by (grpc_code) (rate("
                + only("grpc_server_handled_total", ', grpc_code!="OK"')
                + "[$__rate_interval])) or label_replace(0 * sum(rate("
                + only("grpc_server_handled_total")
                + '[$__rate_interval])), "grpc_code", "none", "", "")',
                "{{grpc_code}}",
            ),
            width=8,
            runbook="StoragedRpcErrors",
        ),
        lines(
            "Slowest hundredth of calls",
            "Within this time 99 of 100 calls were answered; read off the bounds 10 ms, 100 ms, 1 s and 10 s.",
            SECONDS,
            (
                "histogram_quantile(0.99, sum by (grpc_method, le) (rate("
                + only("grpc_server_handling_seconds_bucket", ', grpc_type="unary"')
                + "[$__rate_interval]))) >= 0",
                "{{grpc_method}}",
            ),
            width=8,
            quiet="no call in this time",
            runbook="StoragedRpcErrors",
        ),
        lines(
            "Reaction to host reports",
            "From the call to the balloon at its target: mean, and what 99 of 100 were within (by bounds up to 15 s).",
            SECONDS,
            (
                (
                    f"rate({only('storaged_balloon_reaction_seconds_sum')}[$__rate_interval])"
                    f" / (rate({only('storaged_balloon_reaction_seconds_count')}[$__rate_interval]) > 0)"
                ),
                "mean",
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate("
                + only("storaged_balloon_reaction_seconds_bucket")
                + "[$__rate_interval]))) >= 0",
                "99 of 100",
            ),
            quiet="no report in this time",
            runbook="StoragedBalloonOffTarget",
        ),
        lines(
            "Host reports by result",
            "UpdateStorageBalloon calls that were answered, a second.",
            CALLS,
            (f"sum by (result) (rate({only('storaged_balloon_updates_total')}[$__rate_interval]))", "{{result}}"),
            runbook="StoragedBalloonOffTarget",
        ),
        Panel(
            "Version",
            "What runs, and since when it is scraped.",
            Kind.TABLE,
            COUNT,
            (Query(f"max by (host, vm, version, revision, python) ({only('storaged_build_info')})", "runs"),),
            width=24,
            height=4,
            steps=PLAIN,
        ),
    ),
)

BOARD = Board(
    "storaged-guest",
    "storaged / Guest",
    "One guest: what its host tells it, what its balloon holds, what applications can write, its resize job.",
    (*variables(), Variable("vm", "Guest", 'label_values(storaged_build_info{job=~"$job", host=~"$host"}, vm)')),
    (NOW, SPACE, STATES, RESIZE, RPC),
)
