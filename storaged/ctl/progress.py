"""How a running job is shown: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from storaged.ctl import show
from storaged.ctl.terminal import Terminal
from storaged.rpc.proto import storaged_v1_pb2 as pb

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress

EVERY_S = 10.0
"""A plain line comes at least this often while anything moves, and with every step of STEP percent."""
STEP = 5
_DOING = {
    pb.JOB_WAITING_FOR_CAPACITY: "waiting for capacity",
    pb.JOB_PREPARING: "preparing",
    pb.JOB_CANCELLING: "cancelling",
}
_INDEFINITE = (pb.JOB_WAITING_FOR_CAPACITY, pb.JOB_PREPARING)


class Display(Protocol):
    """Shows a job as it goes."""

    def update(self, job: pb.Job) -> None:
        """There is news of the job."""

    def say(self, text: str) -> None:
        """Say something in between."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display(terminal: Terminal, *, quiet: bool = False) -> Display:
    """What suits `terminal`; `quiet` says no more than what somebody has to know."""
    if quiet:
        return Quiet(terminal)
    return Bar(terminal) if terminal.interactive else Lines(terminal)


def doing(job: pb.Job) -> str:
    """A word for what the job does now."""
    if job.total_to_move_bytes:
        return _DOING.get(job.state, "moving")
    return _DOING.get(job.state, "shrinking" if job.direction == pb.DIRECTION_SHRINK else "growing")


class Quiet:
    """Shows nothing of the job."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def update(self, job: pb.Job) -> None:
        """Nothing to see."""

    def say(self, text: str) -> None:
        """Print it."""
        self._terminal.text(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Lines(Quiet):
    """A line for each state and for every few percent."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self._last: tuple[str, int] | None = None
        self._last_text = ""
        self._at = 0.0

    def update(self, job: pb.Job) -> None:
        """Print a line if it is worth one."""
        now, key = time.monotonic(), (doing(job), show.percent(job) // STEP)
        text = show.fit([doing(job), *show.progress(job)], self._terminal.width)
        if key == self._last and (text == self._last_text or now - self._at < EVERY_S):
            return
        self._last, self._last_text, self._at = key, text, now
        self._terminal.text(text)


class Bar(Quiet):
    """A bar that moves, with percent, bytes moved, time left and rate as far as they fit."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self._progress: Progress | None = None

    def update(self, job: pb.Job) -> None:
        """Redraw."""
        assert self._progress is not None
        pieces = [] if job.state in _INDEFINITE else show.progress(job, "")
        self._progress.update(
            self._progress.task_ids[0],
            total=None if job.state in _INDEFINITE else 1.0,
            completed=job.progress,
            description=doing(job),
            detail=show.fit(pieces, self._room(doing(job))) if pieces else "",
        )

    def say(self, text: str) -> None:
        """Print it above the bar."""
        assert self._progress is not None
        self._progress.console.print(text, markup=False, highlight=False)

    def _room(self, words: str) -> int:
        """Columns for the details, once the words and a bar have theirs."""
        return max(self._terminal.width - len(words) - self._bar_width() - 2, 4)

    def _bar_width(self) -> int:
        return 16 if self._terminal.width >= 70 else 8

    def __enter__(self) -> Self:
        from rich.console import Console  # rich takes as long to import as all of the rest
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._terminal.stream, width=self._terminal.width, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=self._bar_width()),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
        )
        self._progress.add_task("starting", total=None, detail="")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._progress is not None
        self._progress.stop()
