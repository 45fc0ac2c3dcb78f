"""What storagectl asks of storaged-host: guests, pool, resize NAME SIZE, cancel NAME, watch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack

from storaged.ctl import encode, host_show
from storaged.ctl.client import CallFailed
from storaged.ctl.feed import Gone, Interrupted, Lost
from storaged.ctl.host_client import HostClient, HostFeed
from storaged.ctl.host_show import RUNNING
from storaged.ctl.progress import display
from storaged.ctl.resize import confirmed
from storaged.ctl.show import exact, layout
from storaged.ctl.terminal import Terminal, complain
from storaged.errors import Kind, StoragedError
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.units import format_duration, sector_floor

_PATIENCE = 2  # the first Ctrl-C cancels the resize, the second stops watching


def guests(client: HostClient, pool: str, *, as_json: bool) -> int:
    """All guests as a table."""
    found = client.guests(pool)
    if as_json:
        print(encode.line({"guests": [encode.as_dict(guest) for guest in found]}), flush=True)
        return 0
    resizes = list(client.report().resizes)
    names = {guest.name for guest in found}
    terminal = Terminal(sys.stdout)
    terminal.text("\n".join(host_show.table(found, terminal.width)))
    if rows := host_show.remarks(found, [each for each in resizes if each.guest in names]):
        terminal.rows(rows)
    return 0


def pool(client: HostClient, name: str, *, as_json: bool) -> int:
    """One pool."""
    found = client.pool(name)
    if as_json:
        print(encode.line(encode.as_dict(found)), flush=True)
    else:
        Terminal(sys.stdout).rows(host_show.pool(found))
    return 0


def console(client: HostClient, *, as_json: bool) -> int:
    """A link that signs a browser in to the console."""
    found = client.console_link()
    if as_json:
        print(encode.line(encode.as_dict(found)), flush=True)
        return 0
    print(found.link, flush=True)
    if found.HasField("expires_in_s"):
        print(f"opens once, within {format_duration(found.expires_in_s)}", file=sys.stderr, flush=True)
    return 0


def resize(
    client: HostClient, name: str, size: int, *, yes: bool, as_json: bool, allow_overcommit: bool = False
) -> int:
    """Say what will happen, ask, begin, follow, end with what is true; the exit code."""
    terminal = Terminal(sys.stderr if as_json else sys.stdout)
    guest = client.guest(name)
    now, size = host_show.size(guest), sector_floor(size)
    if not guest.resizable:
        raise StoragedError(
            f"{name} cannot be resized now: {guest.not_resizable_reason or 'why is not known'}", Kind.PRECONDITION
        )
    if guest.minimum_bytes and size < min(guest.minimum_bytes, now):
        why = f"; {guest.minimum_reason}" if guest.minimum_reason else ""
        raise StoragedError(
            f"{name} cannot shrink to {exact(size)}: the minimum is {exact(guest.minimum_bytes)}{why}",
            Kind.OUT_OF_RANGE,
        )
    shrinks = size < now
    if not as_json or (shrinks and not yes):
        terminal.rows(host_show.plan(guest, size))
    if shrinks and not yes and not confirmed(terminal):
        raise StoragedError("not confirmed; nothing was changed", Kind.PRECONDITION)
    with HostFeed(client, patience=_PATIENCE) as feed:
        begun = client.resize(name, size, allow_overcommit=allow_overcommit)
        ended = _follow(client, feed, begun, terminal, quiet=as_json)
    text = host_show.outcome(ended)
    if ended.state == pb.RESIZE_DONE and size == now == ended.from_bytes and size == guest.logical_bytes:
        text = f"nothing to do: {name} has {exact(now)}"  # only the host knows for certain: it was asked
    return _end(ended, ended.filesystem_bytes, text, as_json=as_json)


def _follow(client: HostClient, feed: HostFeed, begun: pb.Resize, terminal: Terminal, *, quiet: bool) -> pb.Resize:
    """Take events until the resize's end is known. Raises StoragedError when it cannot be."""
    asked = known = False
    with display(terminal, quiet=quiet) as shown:
        while True:
            event = feed.next()
            if isinstance(event, Interrupted):
                if asked:
                    raise StoragedError("no longer watching; storaged-host was asked to cancel and goes on with that")
                asked = True
                shown.say("asking storaged-host to cancel; once more Ctrl-C only stops watching")
                try:
                    client.cancel(begun.guest, begun.id)
                except CallFailed as error:
                    shown.say(f"could not ask for the cancel: {error.message}")
            elif isinstance(event, Lost):
                shown.say("no news of storaged-host, looking for it; the resize itself survives that")
            elif isinstance(event, Gone):
                raise StoragedError(f"how the resize goes on is not known: {event.reason}", Kind.UNAVAILABLE)
            else:
                job = next((each for each in event.resizes if each.id == begun.id), None)
                if job is not None and job.state not in RUNNING:
                    return job
                if job is not None:
                    known = True
                    shown.update(host_show.as_job(job))
                elif known:
                    raise StoragedError("how the resize ended is not known: storaged-host has forgotten it")


def _end(ended: pb.Resize, size: int, text: str, *, as_json: bool) -> int:
    done = ended.state == pb.RESIZE_DONE
    if as_json:
        name = "done" if done else pb.ResizeState.Name(ended.state).partition("_")[2].lower()
        print(encode.line({"outcome": name, "size_bytes": size, "resize": encode.as_dict(ended)}), flush=True)
    elif done:
        print(text, flush=True)
    if not done:
        complain(text)
    return 0 if done else 1


def cancel(client: HostClient, name: str, *, as_json: bool) -> int:
    """Cancel a guest's resize and wait for its end; 1 when it ended in another way first."""
    terminal = Terminal(sys.stderr if as_json else sys.stdout)
    with HostFeed(client, patience=0) as feed:
        asked = client.cancel(name)
        ended = _follow(client, feed, asked, terminal, quiet=True)
    text = host_show.outcome(ended)
    if as_json:
        print(encode.line(encode.as_dict(ended)), flush=True)
    elif ended.state == pb.RESIZE_CANCELLED:
        print(text, flush=True)
    if ended.state != pb.RESIZE_CANCELLED:
        raise StoragedError(f"nothing was cancelled: {text}", Kind.PRECONDITION)
    return 0


def unfence(client: HostClient, name: str, *, as_json: bool) -> int:
    """Give a guest that exceeded its grant its share again."""
    guest = client.unfence(name)
    print(encode.line(encode.as_dict(guest)) if as_json else f"{name} gets a share again", flush=True)
    return 0


def watch(client: HostClient, interval_s: float, *, as_json: bool) -> int:
    """Everything, live, until Ctrl-C."""
    client.report()  # a host that is not there is found out at once, not looked for
    terminal = Terminal(sys.stdout)
    with ExitStack() as stack:
        draw = _json if as_json else _screen(terminal, stack) if terminal.interactive else _lines(terminal)
        feed = stack.enter_context(HostFeed(client, interval_s=interval_s))
        while True:
            event = feed.next()
            if isinstance(event, Interrupted):
                return 0
            if isinstance(event, Gone):
                raise StoragedError(event.reason, Kind.UNAVAILABLE)
            if isinstance(event, Lost):
                complain("no news of storaged-host, looking for it: what is shown is old")
            else:
                draw(event)


def _json(report: pb.Report) -> None:
    print(encode.line(encode.as_dict(report)), flush=True)


def _lines(terminal: Terminal) -> Callable[[pb.Report], None]:
    return lambda report: terminal.text(host_show.summary(report, terminal.width))


def _screen(terminal: Terminal, stack: ExitStack) -> Callable[[pb.Report], None]:
    from rich.console import Console  # rich takes as long to import as all of the rest
    from rich.live import Live
    from rich.text import Text

    console = Console(file=terminal.stream, highlight=False)
    live = stack.enter_context(Live(console=console, auto_refresh=False, redirect_stdout=False))

    def draw(report: pb.Report) -> None:
        width, lines = terminal.width, []
        for each in report.pools:
            lines += layout(host_show.pool(each), width, color=terminal.color)
        lines += ["", *host_show.table(report.guests, width)]
        lines += layout(host_show.remarks(report.guests, report.resizes), width, color=terminal.color)
        live.update(Text.from_ansi("\n".join(lines)), refresh=True)

    return draw
