"""From messages to text: pure functions, in plain ASCII, for terminals of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import format_duration, format_size

WIDEST = 80
NARROW = 34
"""Below this many columns a label stands on a line of its own."""
INDENT = 12
MOST_NOTES = 5

LEVEL = {
    pb.LEVEL_UNKNOWN: "unknown",
    pb.LEVEL_NORMAL: "NORMAL",
    pb.LEVEL_LOW: "LOW",
    pb.LEVEL_CRITICAL: "CRITICAL",
}
BALLOON = {
    pb.BALLOON_IDLE: "idle",
    pb.BALLOON_INFLATING: "inflating",
    pb.BALLOON_DEFLATING: "deflating",
    pb.BALLOON_FAILED: "FAILED",
}
JOB = {
    pb.JOB_WAITING_FOR_CAPACITY: "waiting for capacity",
    pb.JOB_PREPARING: "preparing",
    pb.JOB_RUNNING: "running",
    pb.JOB_CANCELLING: "cancelling",
    pb.JOB_DONE: "done",
    pb.JOB_FAILED: "FAILED",
    pb.JOB_CANCELLED: "cancelled",
}
ENDED = (pb.JOB_DONE, pb.JOB_FAILED, pb.JOB_CANCELLED)
_TONE = {"good": "32", "warn": "33", "bad": "1;31", "label": "1"}
_LEVEL_TONE = {pb.LEVEL_NORMAL: "good", pb.LEVEL_LOW: "warn", pb.LEVEL_CRITICAL: "bad"}
_JOB_TONE = {pb.JOB_DONE: "good", pb.JOB_FAILED: "bad", pb.JOB_CANCELLED: "warn"}


class Row(NamedTuple):
    """A label, and a text beside it. An empty label continues the row above; `bar` texts are made to measure."""

    label: str
    text: str
    tone: str = ""
    bar: tuple[tuple[str, int], ...] = ()


def printable(text: str) -> str:
    """`text` without anything that could move a cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def exact(size: int) -> str:
    """A size for a person, and to the byte."""
    return f"{format_size(size)} ({size} bytes)"


def layout(rows: Iterable[Row], width: int, *, color: bool = False) -> list[str]:
    """Lines of at most `width` columns."""
    indent = INDENT if width >= NARROW else 2
    room = max(width - indent, 1)
    lines = []
    for row in rows:
        if row.label and indent < INDENT:
            lines.append(_paint(row.label[:width], "label", color))
        pieces = [bar(row.bar, room)] if row.bar else textwrap.wrap(printable(row.text), room, break_on_hyphens=False)
        for number, piece in enumerate(pieces or [""]):
            label = row.label if number == 0 and indent == INDENT else ""
            head = _paint(label, "label", color) + " " * (indent - len(label))
            lines.append((head + _paint(piece, row.tone, color)).rstrip())
    return lines


def _paint(text: str, tone: str, color: bool) -> str:
    return f"\033[{_TONE[tone]}m{text}\033[0m" if color and tone and text else text


def bar(parts: Sequence[tuple[str, int]], width: int) -> str:
    """`parts`, pairs of a character and an amount, drawn to scale; what is there at all gets a column if it can."""
    room = max(width - 2, 1)
    total = sum(amount for _, amount in parts)
    if total <= 0:
        return f"[{'.' * room}]"[:width]
    columns = [max(amount * room // total, 1 if amount > 0 else 0) for _, amount in parts]
    order = sorted(range(len(parts)), key=lambda index: parts[index][1])
    for index in reversed(order):  # the largest absorbs what rounding left over, or gives what it took
        columns[index] = max(columns[index] + room - sum(columns), 0)
    drawn = "".join(character * count for (character, _), count in zip(parts, columns, strict=True))
    return f"[{drawn[:room]}]"[:width]


# --- one screen ---------------------------------------------------------------------------------------------------


def status(report: pb.Report) -> list[Row]:
    """Everything that matters, in one screen."""
    simulated = ", simulated" if report.simulated else ""
    rows = [Row("storaged", f"{report.version}{simulated}, {_clock(report.time)}")]
    rows += pressure(report)
    rows += filesystem(report.filesystem)
    rows += balloon(report)
    rows += job_rows(report.job) if report.HasField("job") else [Row("Job", "none since storaged was started")]
    if report.HasField("bounds"):
        rows += bounds(report.bounds)
    rows.append(
        Row("Given back", f"{format_size(report.reclaimed_bytes_total)} discarded in total, as the kernel counts")
    )
    rows += _notes(report.notes)
    return rows


def pressure(report: pb.Report) -> list[Row]:
    """How full the host is, and who said so."""
    told = report.pressure
    text = LEVEL.get(told.level, f"level {told.level}")
    if told.HasField("host_free_bytes"):
        text += f", the host has {format_size(told.host_free_bytes)} free"
        if told.HasField("reported_at"):
            age = max(_seconds(report.time) - _seconds(told.reported_at), 0.0)
            text += f", told {format_duration(age)} ago"
    else:
        text += ", no host has reported yet"
    if told.HasField("pending_level"):
        text += f"; {LEVEL.get(told.pending_level, '?')} once it has lasted"
    if told.ignored_reports:
        text += f"; {told.ignored_reports} reports without a number"
    return [Row("Pressure", text, _LEVEL_TONE.get(told.level, ""))]


def filesystem(fs: pb.Filesystem) -> list[Row]:
    """Where it is, how large, how full."""
    device = "" if fs.device_bytes == fs.size_bytes else f" on a device of {format_size(fs.device_bytes)}"
    rows = [
        Row("Filesystem", f"{fs.mountpoint}, {format_size(fs.size_bytes)}{device}"),
        Row(
            "",
            f"applications can write {format_size(fs.available_bytes)},"
            f" {format_size(fs.unallocated_bytes)} is not allocated",
        ),
        Row(
            "",
            f"data {format_size(fs.data_used_bytes)} of {format_size(fs.data_total_bytes)},"
            f" metadata {format_size(fs.metadata_used_bytes)} of {format_size(fs.metadata_total_bytes)}",
        ),
    ]
    if fs.read_only:
        rows.append(Row("", "READ-ONLY: nothing can be resized or held back", "bad"))
    if not fs.discard_supported:
        rows.append(Row("", "this disk cannot discard: freed blocks never go back", "warn"))
    if fs.exclusive_operation not in ("", "none"):
        rows.append(Row("", f"the kernel is busy with: {fs.exclusive_operation}"))
    return rows


def balloon(report: pb.Report) -> list[Row]:
    """What is held back, as a bar over the whole filesystem."""
    held, fs = report.balloon, report.filesystem
    text = f"{format_size(held.size_bytes)}, {BALLOON.get(held.state, f'state {held.state}')}"
    if held.size_bytes != held.target_bytes:
        text += f", target {format_size(held.target_bytes)}"
    limit = (
        f"; applications may write {format_size(held.limit_bytes)}" if held.HasField("limit_bytes") else "; no limit"
    )
    free = min(fs.available_bytes, max(fs.size_bytes - held.size_bytes, 0))
    used = max(fs.size_bytes - held.size_bytes - free, 0)
    rows = [
        Row("Balloon", text + limit, "bad" if held.state == pb.BALLOON_FAILED else ""),
        Row("", "", bar=(("#", used), ("o", held.size_bytes), (".", free))),
        Row("", f"# in use {format_size(used)}  o balloon {format_size(held.size_bytes)}  . free {format_size(free)}"),
    ]
    if held.failure_reason:
        retry = f"; next try in {format_duration(held.retry_in_s)}" if held.HasField("retry_in_s") else ""
        rows.append(Row("", held.failure_reason + retry, "bad"))
    if held.warning:
        rows.append(Row("", held.warning, "warn"))
    if held.unwritten_bytes:
        text = f"{format_size(held.unwritten_bytes)} preallocated by applications and not written yet"
        rows.append(Row("", f"{text}; at most {format_size(held.may_write_bytes)} can still reach the host"))
    if held.metadata_relief_bytes:
        rows.append(Row("", f"gave up {format_size(held.metadata_relief_bytes)} so that metadata can grow", "warn"))
    return rows


def job_rows(job: pb.Job) -> list[Row]:
    """The active job, or how the last one ended."""
    verb = {pb.DIRECTION_GROW: "grow", pb.DIRECTION_SHRINK: "shrink"}.get(job.direction, "resize")
    text = f"{verb} {format_size(job.start_size)} -> {format_size(job.requested_size)}: {_state(job)}"
    rows = [Row("Job", text, _JOB_TONE.get(job.state, ""))]
    if job.state in ENDED:
        took = _seconds(job.ended_at) - _seconds(job.started_at)
        moved = f", {format_size(job.moved_bytes)} moved" if job.moved_bytes else ""
        rows.append(Row("", f"{_clock(job.ended_at)}, after {format_duration(max(took, 0.0))}{moved}"))
    else:
        done = round(min(max(job.progress, 0.0), 1.0) * 1000)
        rows.append(Row("", "", bar=(("#", done), (".", 1000 - done))))
        rows.append(Row("", ", ".join(progress(job))))
    if job.reason:
        rows.append(Row("", job.reason))
    return rows


def progress(job: pb.Job, word: str = " moved") -> list[str]:
    """Percent, bytes moved, rate and time left, as far as known; the first matter most."""
    pieces = [f"{percent(job)} %"]
    if job.total_to_move_bytes:
        pieces.append(f"{format_size(job.moved_bytes)} of {format_size(job.total_to_move_bytes)}{word}")
    elif job.current_size != job.start_size:
        pieces.append(f"at {format_size(job.current_size)}")
    if job.HasField("rate_bytes_per_s"):
        pieces.append(f"{format_size(job.rate_bytes_per_s)}/s")
    if job.HasField("eta_s"):
        pieces.append(f"{format_duration(job.eta_s)} left")
    return pieces


def percent(job: pb.Job) -> int:
    """Whole percents; 100 only at the end."""
    return int(min(max(job.progress, 0.0), 1.0) * 100)


def bounds(found: pb.Bounds) -> list[Row]:
    """How small the filesystem can get, and what stands in the way of less."""
    if not found.minimum_size:
        return [Row("Minimum", f"not known: {found.why}" if found.why else "not known", "warn")]
    rows = [Row("Minimum", exact(found.minimum_size))]
    if found.guaranteed_size and found.guaranteed_size != found.minimum_size:
        rows.append(Row("", f"{format_size(found.guaranteed_size)} without moving anything"))
    if found.why:
        rows.append(Row("", found.why))
    return rows


def _notes(notes: Sequence[str]) -> list[Row]:
    shown = list(notes[-MOST_NOTES:])
    rows = [Row("", text) for text in shown]
    if len(notes) > len(shown):
        rows.append(Row("", f"({len(notes) - len(shown)} older ones: --json)"))
    return [Row("Notes", rows[0].text), *rows[1:]] if rows else []


# --- one line -----------------------------------------------------------------------------------------------------


def summary(report: pb.Report, width: int) -> str:
    """One report as one line, the least important cut off when it does not fit."""
    told, held, job = report.pressure, report.balloon, report.job
    pieces = [_clock(report.time)[11:19], LEVEL.get(told.level, "?")]
    if report.HasField("job") and job.state not in ENDED:
        verb = "grow" if job.direction == pb.DIRECTION_GROW else "shrink"
        pieces.append(f"{verb} {percent(job)} %")
    state = "" if held.state == pb.BALLOON_IDLE else f" {BALLOON.get(held.state, '?')}"
    pieces.append(f"balloon {format_size(held.size_bytes)}{state}")
    pieces.append(f"free {format_size(report.filesystem.available_bytes)}")
    if told.HasField("host_free_bytes"):
        pieces.append(f"host {format_size(told.host_free_bytes)}")
    pieces.append(f"size {format_size(report.filesystem.size_bytes)}")
    return fit(pieces, width, "  ")


def fit(pieces: Sequence[str], width: int, separator: str = ", ") -> str:
    """As many of `pieces` as fit into `width`, the first ones first."""
    text = printable(pieces[0])[:width]
    for piece in pieces[1:]:
        longer = text + separator + printable(piece)
        if len(longer) > width:
            break
        text = longer
    return text


def plan(report: pb.Report, size: int, least: int) -> list[Row]:
    """What a resize to `size` will do, with `least` the smallest size that can be."""
    fs = report.filesystem
    difference = size - fs.size_bytes
    rows = [Row("From", exact(fs.size_bytes)), Row("To", exact(size))]
    if difference < 0:
        rows.append(Row("Gives back", f"{format_size(-difference)} of {fs.mountpoint}"))
        rows.append(Row("Minimum", exact(least) if least else "not known"))
    else:
        rows.append(Row("Takes", f"{format_size(difference)} more for {fs.mountpoint}"))
        if size > fs.device_bytes:
            rows.append(Row("Device", f"has {exact(fs.device_bytes)}; the job waits for it to grow", "warn"))
    return rows


def _state(job: pb.Job) -> str:
    return JOB.get(job.state, f"state {job.state}")


def _seconds(time: Timestamp) -> float:
    return float(time.seconds + time.nanos / 1e9)


def _clock(time: Timestamp) -> str:
    return time.ToJsonString()[:19].replace("T", " ") + " UTC"
