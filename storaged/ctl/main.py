"""The command `storagectl`: arguments, dispatch, exit codes (0 done, 1 failed with a reason on stderr, 2 wrong use)."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from storaged import __version__
from storaged.errors import ConfigError, InvalidRequest, StoragedError
from storaged.units import parse_size

if TYPE_CHECKING:
    from storaged.ctl.client import Client

FAILED, MISUSED = 1, 2
DEFAULT_GUEST = "unix:/run/storaged.sock"
DEFAULT_HOST = "unix:/run/storaged-host.sock"
MOST_INTERVAL_S = 3600.0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail_to_encode(stream)
    try:
        parser = _parser()
        if "_ARGCOMPLETE" in os.environ:
            from storaged.ctl.completion import complete

            complete(parser)
        arguments = parser.parse_args(argv)
        code = _run(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        return _complain(error.message, MISUSED)
    except StoragedError as error:
        return _complain(error.message, FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", FAILED)
    except BrokenPipeError:
        _discard(sys.stdout)
        return FAILED
    except OSError as error:
        _discard(sys.stdout)
        return _complain(f"cannot write: {error.strerror}", FAILED)
    return code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "completion":
        from storaged.ctl.completion import script

        print(script(arguments.shell))
        return 0
    from storaged.addresses import parse_address  # --help and wrong use need not wait for gRPC

    if _of_host(arguments):
        return _ask_host(arguments)
    from storaged.ctl import commands, resize
    from storaged.ctl.client import Client, Tls

    if getattr(arguments, "allow_overcommit", False):
        raise ConfigError("--allow-overcommit is for storaged-host: with NAME")
    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    if any(files) and not all(files):
        raise ConfigError("--tls-ca, --tls-cert and --tls-key belong together")
    address, as_json = parse_address(_guest(arguments)), arguments.json
    tls = Tls(*files) if all(files) else None
    with Client(address, tls=tls, insecure=arguments.insecure, timeout_s=arguments.timeout) as client:
        match arguments.command:
            case "status":
                return commands.status(client, as_json=as_json)
            case "bounds":
                return commands.bounds(client, as_json=as_json)
            case "resize":
                return resize.run(
                    *(client, arguments.what[0]), yes=arguments.yes, as_json=as_json,
                    best_effort=arguments.best_effort, retarget=arguments.retarget,
                )  # fmt: skip
            case "cancel":
                return commands.cancel(client, as_json=as_json)
            case "balloon":
                return commands.balloon(client, arguments.free, arguments.state, as_json=as_json)
            case "trim":
                return commands.trim(client, reclaim=arguments.reclaim, as_json=as_json)
            case _:
                return _watch(client, arguments.interval, as_json=as_json)


def _of_host(arguments: argparse.Namespace) -> bool:
    """Is storaged-host meant, rather than one guest?"""
    match arguments.command:
        case "guests" | "pool" | "unfence" | "console":
            return True
        case "resize":
            return len(arguments.what) == 2
        case "cancel":
            return bool(arguments.name)
        case "watch":
            if arguments.guest or arguments.host:
                return bool(arguments.host)
            if os.environ.get("STORAGED_GUEST") or os.environ.get("STORAGED_HOST"):
                return not os.environ.get("STORAGED_GUEST")
            return os.path.exists(DEFAULT_HOST.partition(":")[2])
        case _:
            return False


def _guest(arguments: argparse.Namespace) -> str:
    return arguments.guest or os.environ.get("STORAGED_GUEST") or DEFAULT_GUEST


def host_address(arguments: argparse.Namespace) -> str:
    """Where storaged-host is."""
    return arguments.host or os.environ.get("STORAGED_HOST") or DEFAULT_HOST


def _ask_host(arguments: argparse.Namespace) -> int:
    from storaged.addresses import parse_address
    from storaged.ctl import host
    from storaged.ctl.host_client import HostClient

    as_json = arguments.json
    with HostClient(parse_address(host_address(arguments)), arguments.timeout) as client:
        match arguments.command:
            case "guests":
                return host.guests(client, arguments.pool, as_json=as_json)
            case "pool":
                return host.pool(client, arguments.name, as_json=as_json)
            case "resize":
                name, size = arguments.what
                if arguments.best_effort or arguments.retarget:
                    raise ConfigError("--best-effort and --retarget are for one guest: without NAME")
                allow = arguments.allow_overcommit
                return host.resize(client, name, size, yes=arguments.yes, as_json=as_json, allow_overcommit=allow)
            case "console":
                return host.console(client, as_json=as_json)
            case "cancel":
                return host.cancel(client, arguments.name, as_json=as_json)
            case "unfence":
                return host.unfence(client, arguments.name, as_json=as_json)
            case _:
                try:
                    return host.watch(client, arguments.interval, as_json=as_json)
                except BrokenPipeError:  # whoever read it has seen enough
                    _discard(sys.stdout)
                    return 0


def _watch(client: Client, interval_s: float, *, as_json: bool) -> int:
    from storaged.ctl import watch

    try:
        return watch.run(client, interval_s, as_json=as_json)
    except BrokenPipeError:  # whoever read it has seen enough
        _discard(sys.stdout)
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="storagectl",
        description="Ask a guest's storaged, or storaged-host about all guests, and tell them what to do.",
        epilog="Sizes: 20G, 512MiB, or bytes. Exit codes: 0 done, 1 failed, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"storagectl {__version__}")
    parser.add_argument(
        "--guest",
        metavar="ADDR",
        help=f"one guest: unix:/path or tcp:HOST:PORT (default: $STORAGED_GUEST, or {DEFAULT_GUEST})",
    )
    parser.add_argument(
        "--host",
        metavar="ADDR",
        help=f"storaged-host: unix:/path or a loopback tcp: (default: $STORAGED_HOST, or {DEFAULT_HOST})",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds(least=0.1),
        help="seconds to wait for an answer, and for a daemon that went away (default 20; 600 for long work)",
    )
    parser.add_argument("--insecure", action="store_true", help="allow tcp: without TLS to a loopback address")
    parser.add_argument("--tls-ca", metavar="FILE", help="who must have signed the guest's certificate, PEM")
    parser.add_argument("--tls-cert", metavar="FILE", help="our certificate, PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its key, PEM")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("status", help="pressure, filesystem, balloon, job and notes on one screen")
    commands.add_parser("bounds", help="how small the filesystem can get, and why not smaller")

    resize = commands.add_parser(
        "resize",
        usage="%(prog)s [-h] [--yes] [--json] [--best-effort] [--retarget] [--allow-overcommit] [NAME] SIZE",
        help="grow or shrink a filesystem and follow it; Ctrl-C cancels it",
        description="With NAME, storaged-host resizes that guest's image and filesystem.",
    )
    resize.add_argument("what", metavar="[NAME] SIZE", nargs="+", action=_NameAndSize, help="whom, and to what")
    resize.add_argument("--yes", "-y", action="store_true", help="do not ask before a shrink")
    resize.add_argument(
        "--best-effort", action="store_true", help="shrink towards SIZE as far as it goes, also below the minimum"
    )
    resize.add_argument("--retarget", action="store_true", help="cancel the resize that runs, and go to SIZE instead")
    resize.add_argument(
        "--allow-overcommit",
        action="store_true",
        help="grow also where the pool's guests are then promised more than sharing.overcommit_limit",
    )

    cancel = commands.add_parser("cancel", help="cancel a running resize and wait until it has stopped")
    cancel.add_argument("name", metavar="NAME", nargs="?", default="", help="the guest, where storaged-host resizes it")

    balloon = commands.add_parser("balloon", help="say what the host has left, as a host does")
    balloon.add_argument("free", metavar="FREE", type=_free, help="a size, or `unknown`")
    balloon.add_argument(
        "state",
        metavar="STATE",
        nargs="?",
        choices=["none", "normal", "low", "critical"],
        help="none, normal, low or critical (default: what a host would say at FREE)",
    )

    trim = commands.add_parser("trim", help="hand unused blocks back to the host now")
    trim.add_argument("--reclaim", action="store_true", help="empty chunks too")

    guests = commands.add_parser("guests", help="all guests of the host as a table")
    guests.add_argument("--pool", metavar="POOL", default="", help="of this pool alone")
    unfence = commands.add_parser("unfence", help="give a guest that exceeded its grant its share again")
    unfence.add_argument("name", metavar="NAME", help="the guest")
    pool = commands.add_parser("pool", help="a pool of the host, what is promised of it, and its pressure")
    pool.add_argument("name", metavar="POOL", nargs="?", default="", help="which one; the only one needs no name")

    commands.add_parser("console", help="print a link that signs a browser in to storaged-host's console, once")

    watch = commands.add_parser(
        "watch",
        help="show every change until Ctrl-C",
        description="Shows the host with --host (or where its socket is), one guest with --guest.",
    )
    watch.add_argument(
        "--interval",
        metavar="S",
        type=_seconds(most=MOST_INTERVAL_S),
        default=1.0,
        help="shortest time between two reports, in seconds (default 1)",
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="as JSON")
    completion = commands.add_parser("completion", help="print what makes the shell complete storagectl's arguments")
    completion.add_argument("shell", choices=["bash", "zsh"])
    return parser


class _NameAndSize(argparse.Action):
    """SIZE, or NAME SIZE."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002  # argparse gives it
    ) -> None:
        if len(values) > 2:
            parser.error(f"NAME and SIZE are accepted, not {len(values)} words")
        try:
            setattr(namespace, self.dest, [*values[:-1], _size(values[-1])])
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument SIZE: {error}")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _free(text: str) -> int:
    return -1 if text in ("unknown", "-1") else _size(text)


def _seconds(least: float = 0.0, most: float = 86400.0) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: seconds between {least:g} and {most:g} are accepted")
        return value

    return parse


def _complain(message: str, code: int) -> int:
    from storaged.ctl.terminal import complain

    try:
        sys.stdout.flush()
        complain(message)
    except OSError:
        _discard(sys.stdout)
        _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that Python does not try again at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _never_fail_to_encode(stream: TextIO) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
