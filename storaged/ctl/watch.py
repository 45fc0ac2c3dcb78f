"""`storagectl watch`: a screen that stays true on a terminal, a line for each report elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack

from storaged.ctl import encode, show
from storaged.ctl.client import Client
from storaged.ctl.feed import Feed, Gone, Interrupted, Lost
from storaged.ctl.terminal import Terminal, complain
from storaged.errors import Kind, StoragedError
from storaged.rpc.proto import storaged_v1_pb2 as pb

Draw = Callable[[pb.Report], None]


def run(client: Client, interval_s: float, *, as_json: bool) -> int:
    """Show reports until Ctrl-C; the exit code. Raises StoragedError when the daemon stays away."""
    client.report()  # a daemon that is not there is found out at once, not looked for
    terminal = Terminal(sys.stdout)
    with ExitStack() as stack:
        feed = stack.enter_context(Feed(client, interval_s=interval_s))
        draw = _json if as_json else _screen(terminal, stack) if terminal.interactive else _lines(terminal)
        feed.start()
        while True:
            event = feed.next()
            if isinstance(event, Interrupted):
                return 0
            if isinstance(event, Gone):
                raise StoragedError(event.reason, Kind.UNAVAILABLE)
            if isinstance(event, Lost):
                complain("lost storaged, looking for it")
            elif isinstance(event, pb.Report):
                draw(event)


def _json(report: pb.Report) -> None:
    print(encode.line(encode.as_dict(report)), flush=True)


def _lines(terminal: Terminal) -> Draw:
    return lambda report: terminal.text(show.summary(report, terminal.width))


def _screen(terminal: Terminal, stack: ExitStack) -> Draw:
    from rich.console import Console  # rich takes as long to import as all of the rest
    from rich.live import Live
    from rich.text import Text

    console = Console(file=terminal.stream, highlight=False)
    live = stack.enter_context(Live(console=console, auto_refresh=False, redirect_stdout=False))

    def draw(report: pb.Report) -> None:
        lines = show.layout(show.status(report), terminal.width, color=terminal.color)
        live.update(Text.from_ansi("\n".join(lines)), refresh=True)

    return draw
