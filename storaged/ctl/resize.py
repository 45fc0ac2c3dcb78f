"""`storagectl resize`: says what will happen, asks, starts the job, follows it, ends with what is true."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from storaged.ctl import encode, show
from storaged.ctl.client import Client
from storaged.ctl.feed import CancelFailed, Cancelled, Event, Feed, Gone, Interrupted, Lost
from storaged.ctl.progress import Display, display
from storaged.ctl.show import ENDED, exact
from storaged.ctl.terminal import Terminal, complain
from storaged.errors import ConfigError, Kind, StoragedError
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.units import format_duration, format_size, sector_floor

_PATIENCE = 2  # the first Ctrl-C cancels the job, the second stops watching


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. `text` is a sentence; `job` is the last that was seen of it, if anything was."""

    name: str  # done, failed, cancelled or unknown
    text: str
    size: int
    job: pb.Job | None = None


class Follower:
    """Finds one job in the reports and recognizes its end, whatever happens to the daemon meanwhile.

    ResizeFilesystem names no job: ours is the first that differs from the one before, and asks for our size.
    """

    def __init__(self, before: str, requested: int) -> None:
        self._before = before
        self._requested = requested
        self.job: pb.Job | None = None

    def saw(self, report: pb.Report) -> Outcome | None:
        """The outcome, once a report tells it."""
        job = report.job if report.HasField("job") and report.job.id != self._before else None
        if job is None:
            return self._by_size(report.filesystem.size_bytes, "storaged was restarted and does not know the job")
        if self.job is None and job.requested_size != self._requested:
            return self._by_size(job.start_size, "another resize has begun since")
        if self.job is not None and job.id != self.job.id:
            return self._by_size(job.start_size, "another resize has begun since")
        return self.ended(job)

    def ended(self, job: pb.Job) -> Outcome | None:
        """The outcome if the job has ended."""
        self.job = job
        if job.state not in ENDED:
            return None
        name = {pb.JOB_DONE: "done", pb.JOB_CANCELLED: "cancelled"}.get(job.state, "failed")
        if name == "done":
            took = (job.ended_at.ToNanoseconds() - job.started_at.ToNanoseconds()) / 1e9
            moved = f", {format_size(job.moved_bytes)} moved" if job.moved_bytes else ""
            text = f"done: the filesystem has {exact(job.current_size)}{moved}, in {format_duration(max(took, 0.0))}"
            if job.reason and job.current_size > job.requested_size:  # a best effort
                text += f"; it went no further because: {job.reason}"
            elif job.reason:
                text += f"; {job.reason}"
        else:
            verb = "was cancelled" if name == "cancelled" else "failed"
            reason = f": {job.reason}" if job.reason else ""
            text = f"the resize {verb}{reason}; the filesystem has {exact(job.current_size)}"
        return Outcome(name, text, job.current_size, job)

    def _by_size(self, size: int, why: str) -> Outcome:
        """Nobody knows the job any more: what the filesystem has is all there is to go by."""
        if size == sector_floor(self._requested):
            return Outcome("done", f"done: the filesystem has {exact(size)} ({why})", size, self.job)
        text = f"how the resize ended is not known ({why}); the filesystem has {exact(size)}"
        return Outcome("unknown", text, size, self.job)


def run(
    client: Client, size: int, *, yes: bool, as_json: bool, best_effort: bool = False, retarget: bool = False
) -> int:
    """The whole command; its exit code."""
    terminal = Terminal(sys.stderr if as_json else sys.stdout)
    before = client.report()
    fs, job = before.filesystem, before.job
    if before.HasField("job") and job.state not in ENDED and not retarget:
        raise StoragedError(f"{_running(job)} is running already; wait for it, or use: storagectl cancel", Kind.BUSY)
    if sector_floor(size) == fs.size_bytes and not (before.HasField("job") and job.state not in ENDED):
        return _end(
            Outcome("done", f"nothing to do: the filesystem has {exact(fs.size_bytes)}", fs.size_bytes), as_json
        )
    shrinks = sector_floor(size) < fs.size_bytes
    least = client.minimum() if shrinks else 0
    if size < least and not best_effort:
        _refuse(before, size, least)
    if not as_json or (shrinks and not yes):
        terminal.rows(show.plan(before, size, least))
    if shrinks and not yes and not confirmed(terminal):
        raise StoragedError("not confirmed; nothing was changed", Kind.PRECONDITION)
    follower = Follower(job.id if before.HasField("job") else "", size)
    with Feed(client, patience=_PATIENCE) as feed:
        if best_effort or retarget:
            client.start(size, best_effort=best_effort, retarget=retarget)
        elif not client.resize(size):
            raise StoragedError("another resize has begun just now; nothing was changed", Kind.BUSY)
        feed.start()
        with display(terminal, quiet=as_json) as shown:
            outcome = follow(feed, follower, shown)
    return _end(outcome, as_json)


def follow(feed: Feed, follower: Follower, shown: Display) -> Outcome:
    """Take events until the job's end is known. Raises StoragedError when it cannot be."""
    asked = False
    while True:
        event = feed.next()
        if isinstance(event, Interrupted):
            if asked:
                raise StoragedError("no longer watching; storaged was asked to cancel the job and goes on with that")
            asked = True
            shown.say("asking storaged to cancel; once more Ctrl-C only stops watching")
            feed.cancel()
        elif (outcome := _news(event, follower, shown)) is not None:
            return outcome


def _news(event: Event, follower: Follower, shown: Display) -> Outcome | None:
    match event:
        case pb.Report():
            outcome = follower.saw(event)
            if outcome is None:
                shown.update(event.job)
            return outcome
        case Cancelled(job):
            return follower.ended(job)
        case CancelFailed(reason, lost):
            if lost:  # else there was nothing left to cancel, and the next report says how it ended
                shown.say(f"could not ask for the cancel: {reason}")
        case Lost():
            shown.say("lost storaged, looking for it")
        case Gone(reason):
            raise StoragedError(f"how the resize goes on is not known: {reason}", Kind.UNAVAILABLE)
    return None


def _refuse(report: pb.Report, size: int, least: int) -> None:
    """Nobody is asked for a yes to what storaged would refuse."""
    now = format_size(report.filesystem.size_bytes)
    why = f"; {report.bounds.why}" if report.bounds.minimum_size == least and report.bounds.why else ""
    raise StoragedError(
        f"cannot shrink to {exact(size)}: the minimum is {exact(least)}, the filesystem has {now}{why}",
        Kind.OUT_OF_RANGE,
    )


def _running(job: pb.Job) -> str:
    to = format_size(job.requested_size)
    return f"a resize to {to} ({show.JOB.get(job.state, '?')}, {show.percent(job)} %)"


def confirmed(terminal: Terminal) -> bool:
    """Ask; true for a yes. Raises ConfigError where nobody can be asked."""
    if not (sys.stdin.isatty() and terminal.interactive):
        raise ConfigError("a shrink needs a yes: run it on a terminal, or give --yes")
    print("Shrink it? [y/N] ", end="", file=terminal.stream, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _end(outcome: Outcome, as_json: bool) -> int:
    if as_json:
        job = encode.as_dict(outcome.job) if outcome.job is not None else None
        print(encode.line({"outcome": outcome.name, "size_bytes": outcome.size, "job": job}))
    elif outcome.name == "done":
        print(outcome.text)
    if outcome.name != "done":
        sys.stdout.flush()
        complain(outcome.text)
        return 1
    return 0
