"""Pools and guests as text: pure functions, in plain ASCII, for terminals of any width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storaged.ctl.show import Row, bar, exact, fit, printable
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_v1_pb2 as guest_pb
from storaged.units import format_duration, format_size

LEVEL = {
    pb.LEVEL_UNKNOWN: ("not known yet", ""),
    pb.LEVEL_NORMAL: ("NORMAL", "good"),
    pb.LEVEL_LOW: ("LOW", "warn"),
    pb.LEVEL_CRITICAL: ("CRITICAL", "bad"),
}
STATE = {
    pb.GUEST_UNKNOWN: "unknown",
    pb.GUEST_CONFIGURED: "off",
    pb.GUEST_DISCOVERED: "starting",
    pb.GUEST_UP: "up",
    pb.GUEST_HANGING: "HANGING",
    pb.GUEST_SUSPENDED: "suspended",
    pb.GUEST_GONE: "ended",
}
STAGE = {
    pb.STAGE_PREPARING: "preparing",
    pb.STAGE_IMAGE: "changing the image",
    pb.STAGE_CAPACITY: "waiting for the guest to see its disk",
    pb.STAGE_BALLOON: "the balloon makes way",
    pb.STAGE_FILESYSTEM: "resizing the filesystem",
    pb.STAGE_VERIFYING: "checking",
    pb.STAGE_RESTORING: "taking back what was begun",
}
RUNNING = (pb.RESIZE_RUNNING, pb.RESIZE_CANCELLING)
NAME_MOST = 14
BAR_LEAST = 8
LEGEND = "# in use  o balloon  . available"


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int
    text: Callable[[pb.Guest], str]
    right: bool = True


def _size(value: int, *, known: bool) -> str:
    return format_size(value) if known else "-"


_COLUMNS = (
    _Column("STATE", 9, lambda guest: STATE.get(guest.state, "?"), right=False),
    _Column("SIZE", 8, lambda guest: format_size(size(guest))),
    _Column("COST", 8, lambda guest: format_size(guest.allocated_bytes)),
    _Column("AVAIL", 8, lambda guest: _size(guest.available_bytes, known=guest.HasField("available_bytes"))),
    _Column("BALLOON", 8, lambda guest: _size(guest.balloon_bytes, known=guest.HasField("balloon_bytes"))),
    _Column("LEAST", 8, lambda guest: _size(guest.minimum_bytes, known=guest.minimum_bytes > 0)),
)


def size(guest: pb.Guest) -> int:
    """The filesystem's size, or the disk's where that is not known."""
    return guest.filesystem_bytes if guest.HasField("filesystem_bytes") else guest.logical_bytes


def parts(guest: pb.Guest) -> tuple[tuple[str, int], ...]:
    """In use, balloon, available: as a bar takes them."""
    whole, held, free = size(guest), guest.balloon_bytes, guest.available_bytes
    used = max(whole - held - free, 0) if guest.HasField("available_bytes") else guest.allocated_bytes
    return ("#", used), ("o", held), (".", free if guest.HasField("available_bytes") else max(whole - used, 0))


def table(guests: Sequence[pb.Guest], width: int) -> list[str]:
    """A line for each guest, with a bar if there is room; columns are left out from the right until it fits."""
    if not guests:
        return ["no guests are known"]
    name = min(
        max(len("NAME"), *(len(printable(guest.name)) + bool(guest.stale_reason) for guest in guests)), NAME_MOST
    )
    columns = list(_COLUMNS)
    while columns and name + sum(1 + column.width for column in columns) > width:
        columns.pop()
    room = width - name - sum(1 + column.width for column in columns) - 1
    head = _line("NAME", [(column, column.title) for column in columns], name)
    lines = [f"{head} {'USE':<{room}}".rstrip() if room >= BAR_LEAST else head.rstrip()]
    for guest in guests:
        mark = "*" if guest.stale_reason else ""
        text = _line(_cut(guest.name, name - len(mark)) + mark, [(each, each.text(guest)) for each in columns], name)
        lines.append(f"{text} {bar(parts(guest), room)}" if room >= BAR_LEAST else text.rstrip()[:width])
    if room >= BAR_LEAST:
        lines.append(fit([f"{'':<{name}} {LEGEND}"], width))
    return lines


def _cut(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: max(most - 1, 0)] + "~"


def _line(name: str, cells: Sequence[tuple[_Column, str]], width: int) -> str:
    pieces = [f"{name:<{width}}"]
    pieces += [f"{text:>{column.width}}" if column.right else f"{text:<{column.width}}" for column, text in cells]
    return " ".join(pieces)


def remarks(guests: Sequence[pb.Guest], resizes: Sequence[pb.Resize]) -> list[Row]:
    """What a table has no room for: old numbers, and resizes."""
    rows = []
    for guest in guests:
        if guest.stale_reason:
            age = f" for {format_duration(guest.report_age_s)}" if guest.HasField("report_age_s") else ""
            rows.append(Row(f"* {guest.name}"[:11], f"its numbers are old{age}: {guest.stale_reason}", "warn"))
        if guest.HasField("fenced_for_s"):
            text = (
                f"granted nothing for {format_duration(guest.fenced_for_s)}: it exceeded its grant; `unfence` ends it"
            )
            rows.append(Row(f"{guest.name}"[:11], text, "bad"))
        if guest.unproven_reason and guest.state == pb.GUEST_UP:
            text = f"it may write more than is known: {guest.unproven_reason}"
            rows.append(Row(f"{guest.name}"[:11], text, "warn"))
    running = (each for each in resizes if each.state in RUNNING)
    rows += [Row(each.guest[:11], f"{direction(each)}: {', '.join(progress(each))}") for each in running]
    return rows


def direction(resize: pb.Resize) -> str:
    """From what to what."""
    verb = "shrinking" if resize.to_bytes < resize.from_bytes else "growing"
    return f"{verb} {format_size(resize.from_bytes)} -> {format_size(resize.to_bytes)}"


def progress(resize: pb.Resize) -> list[str]:
    """Percent, stage, rate, time left; the first matter most."""
    cancelling = resize.state == pb.RESIZE_CANCELLING
    pieces = [f"{int(resize.progress * 100)} %", "cancelling" if cancelling else STAGE.get(resize.stage, "starting")]
    if resize.HasField("rate_bytes_per_s"):
        pieces.append(f"{format_size(resize.rate_bytes_per_s)}/s")
    if resize.HasField("eta_s"):
        pieces.append(f"{format_duration(resize.eta_s)} left")
    if resize.reason:
        pieces.append(resize.reason)
    return pieces


def pool(found: pb.Pool) -> list[Row]:
    """A pool on one screen."""
    level, tone = LEVEL.get(found.level, ("?", ""))
    rows = [Row("Pool", f"{found.name}, {found.path}, {found.guest_count} guests"), Row("Pressure", level, tone)]
    if found.unreadable_reason:
        rows.append(Row("", f"cannot be used: {found.unreadable_reason}", "bad"))
    if found.HasField("free_bytes"):
        total = f" of {format_size(found.total_bytes)}" if found.HasField("total_bytes") else ""
        age = f", seen {format_duration(found.age_s)} ago" if found.HasField("age_s") else ""
        rows.append(Row("Free", f"{format_size(found.free_bytes)}{total}{age}"))
        promised = found.promised_bytes + found.unbound_bytes
        over = max(found.free_bytes - found.reserve_bytes - promised, 0)
        if found.HasField("total_bytes"):
            taken = max(found.total_bytes - found.free_bytes, 0)
            rows.append(Row("", "", bar=(("#", taken), ("o", found.free_bytes - over), (".", over))))
            rows.append(Row("", "# taken  o promised and reserve  . promised to nobody"))
    rows.append(Row("Promised", f"{format_size(found.promised_bytes)}, and {format_size(found.reserve_bytes)} reserve"))
    if found.unbound_bytes:
        rows.append(Row("", f"{format_size(found.unbound_bytes)} set aside for guests that know no limit yet"))
    if found.HasField("sizes_bytes"):
        limit = f", of at most {format_size(found.sizes_limit_bytes)}" if found.HasField("sizes_limit_bytes") else ""
        rows.append(Row("Sizes", f"{format_size(found.sizes_bytes)}, all guests' disks together{limit}"))
    if found.HasField("promise_holds") and (found.promise_holds or not found.unbound_bytes):
        holds = found.promise_holds
        text = "what guests may still write fits" if holds else "more is promised than there is: guests are told less"
        rows.append(Row("", text, "good" if holds else "bad"))
    if found.fall_bytes_per_s > 0:
        left = f", {format_duration(found.exhausted_in_s)} left" if found.HasField("exhausted_in_s") else ""
        rows.append(Row("Falls", f"{format_size(found.fall_bytes_per_s)}/s{left}"))
    return rows


def summary(report: pb.Report, width: int) -> str:
    """One report as one line."""
    pieces = [report.time.ToJsonString()[11:19]]
    pieces += [
        f"{each.name} {LEVEL.get(each.level, ('?', ''))[0]} {format_size(each.free_bytes)} free"
        for each in report.pools
    ]
    pieces += [
        f"{each.guest} {direction(each)} {int(each.progress * 100)} %"
        for each in report.resizes
        if each.state in RUNNING
    ]
    up = sum(guest.state == pb.GUEST_UP for guest in report.guests)
    return fit([*pieces, f"{up} of {len(report.guests)} guests up"], width, "  ")


def plan(guest: pb.Guest, to: int) -> list[Row]:
    """What a resize to `to` will do."""
    now = size(guest)
    rows = [Row("Guest", guest.name), Row("From", exact(now)), Row("To", exact(to))]
    if to < now:
        rows.append(Row("Returns", f"{format_size(now - to)} to the host"))
        if guest.guaranteed_bytes and to < guest.guaranteed_bytes:
            rows.append(Row("", f"data has to be moved; down to {format_size(guest.guaranteed_bytes)} none would be"))
        rows.append(Row("Minimum", exact(guest.minimum_bytes) if guest.minimum_bytes else "not known"))
    else:
        rows.append(Row("Takes", f"up to {format_size(to - now)} more from the host, as the guest writes"))
    return rows


def as_job(resize: pb.Resize) -> guest_pb.Job:
    """A resize in the words of a guest's job, for the displays that know those."""
    states = {pb.STAGE_PREPARING: guest_pb.JOB_PREPARING, pb.STAGE_CAPACITY: guest_pb.JOB_WAITING_FOR_CAPACITY}
    cancelling = resize.state == pb.RESIZE_CANCELLING
    job = guest_pb.Job(
        id=resize.id,
        state=guest_pb.JOB_CANCELLING if cancelling else states.get(resize.stage, guest_pb.JOB_RUNNING),
        direction=guest_pb.DIRECTION_SHRINK if resize.to_bytes < resize.from_bytes else guest_pb.DIRECTION_GROW,
        start_size=resize.from_bytes,
        requested_size=resize.to_bytes,
        current_size=resize.filesystem_bytes or resize.from_bytes,
        moved_bytes=resize.moved_bytes,
        progress=resize.progress,
    )
    if resize.HasField("rate_bytes_per_s"):
        job.rate_bytes_per_s = resize.rate_bytes_per_s
    if resize.HasField("eta_s"):
        job.eta_s = resize.eta_s
    return job


def outcome(resize: pb.Resize) -> str:
    """How it ended, as a sentence."""
    has = f"; its filesystem has {exact(resize.filesystem_bytes)}" if resize.HasField("filesystem_bytes") else ""
    why = f": {resize.reason}" if resize.reason else ""
    match resize.state:
        case pb.RESIZE_DONE:
            took = (resize.ended_at.ToNanoseconds() - resize.started_at.ToNanoseconds()) / 1e9
            return f"done: {resize.guest} has {exact(resize.to_bytes)}, in {format_duration(max(took, 0.0))}"
        case pb.RESIZE_CANCELLED:
            return f"the resize of {resize.guest} was cancelled{why}{has}"
        case pb.RESIZE_FAILED:
            return f"the resize of {resize.guest} failed{why}{has}"
        case _:
            return f"the resize of {resize.guest} runs"
