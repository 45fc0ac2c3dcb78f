"""The commands that ask once and answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from storaged.ctl import encode, show
from storaged.ctl.client import Client
from storaged.ctl.show import Row, exact
from storaged.ctl.terminal import Terminal
from storaged.errors import Kind, StoragedError
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2
from storaged.units import GIB, format_size

STATES = {
    "none": vm_guest_pb2.DISK_NONE,
    "normal": vm_guest_pb2.DISK_NORMAL,
    "low": vm_guest_pb2.DISK_LOW,
    "critical": vm_guest_pb2.DISK_CRITICAL,
}


def status(client: Client, *, as_json: bool) -> int:
    """Everything, on one screen."""
    report = client.report()
    _answer(encode.as_dict(report), show.status(report), as_json=as_json)
    return 0


def bounds(client: Client, *, as_json: bool) -> int:
    """How small the filesystem can get."""
    least, report = client.minimum(), client.report()
    found = pb.Bounds(minimum_size=least)
    if report.bounds.minimum_size == least:  # else the report is of another moment
        found = report.bounds
    size = report.filesystem.size_bytes
    _answer(
        {"size_bytes": size, **encode.as_dict(found)}, [Row("Size", exact(size)), *show.bounds(found)], as_json=as_json
    )
    if not least:
        raise StoragedError(f"the minimum is not known{': ' if found.why else ''}{found.why}", Kind.PRECONDITION)
    return 0


def cancel(client: Client, *, as_json: bool) -> int:
    """Cancel the running job; the exit code is 1 when it ended in another way first."""
    with _waiting("waiting for the job to stop", as_json=as_json):
        job = client.cancel()
    _answer(encode.as_dict(job), [*show.job_rows(job), Row("Size", exact(job.current_size))], as_json=as_json)
    if job.state != pb.JOB_CANCELLED:
        ended = show.JOB.get(job.state, "?")
        raise StoragedError(f"nothing was cancelled: the job ended first ({ended})", Kind.PRECONDITION)
    return 0


def balloon(client: Client, free: int, state: str | None, *, as_json: bool) -> int:
    """Tell storaged how much the host has left, as a host does."""
    told = STATES[state or told_by(free)]
    held = client.balloon(free, told)
    report = client.report()
    answer = {
        "result": vm_guest_pb2.UpdateStorageBalloonResult.Name(
            vm_guest_pb2.SUCCESS if held else vm_guest_pb2.BALLOON_INFLATE_FAILED
        ),
        "pressure": encode.as_dict(report.pressure),
        "balloon": encode.as_dict(report.balloon),
    }
    _answer(answer, [*show.pressure(report), *show.balloon(report)], as_json=as_json)
    if not held:
        reason = report.balloon.failure_reason or "storaged does not say why"
        raise StoragedError(f"the balloon is not where it should be: {reason}")
    return 0


def told_by(free: int) -> str:
    """What a host says beside this number."""
    if free < 0:
        return "none"
    return "normal" if free > 2 * GIB else "low" if free > GIB else "critical"


def trim(client: Client, *, reclaim: bool, as_json: bool) -> int:
    """Hand unused blocks back to the host now."""
    with _waiting("handing blocks back", as_json=as_json):
        trimmed = client.trim(reclaim=reclaim)
    text = f"{format_size(trimmed)} discarded, as the kernel counts: the host gained at most that"
    _answer({"trimmed_bytes": trimmed}, [Row("Trimmed", text)], as_json=as_json)
    return 0


def _answer(value: dict[str, Any], rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        print(encode.line(value), flush=True)
    else:
        Terminal(sys.stdout).rows(rows)


@contextlib.contextmanager
def _waiting(text: str, *, as_json: bool) -> Iterator[None]:
    """Show on a terminal that something goes on, and since when."""
    terminal = Terminal(sys.stderr)
    if as_json or not terminal.interactive:
        yield
        return
    from rich.console import Console  # rich takes as long to import as all of the rest
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(file=terminal.stream, width=terminal.width)
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield
