"""The command `storagectl`: arguments, dispatch, exit codes (0 done, 1 failed with a reason on stderr, 2 wrong use)."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from storaged import __version__
from storaged.errors import ConfigError, InvalidRequest, StoragedError
from storaged.units import parse_size

if TYPE_CHECKING:
    from storaged.ctl.client import Client

FAILED, MISUSED = 1, 2
DEFAULT_GUEST = "unix:/run/storaged.sock"
MOST_INTERVAL_S = 3600.0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail_to_encode(stream)
    try:
        arguments = _parser().parse_args(argv)
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
    from storaged.addresses import parse_address  # --help and wrong use need not wait for gRPC
    from storaged.ctl import commands, resize
    from storaged.ctl.client import Client, Tls

    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    if any(files) and not all(files):
        raise ConfigError("--tls-ca, --tls-cert and --tls-key belong together")
    address, as_json = parse_address(arguments.guest), arguments.json
    tls = Tls(*files) if all(files) else None
    with Client(address, tls=tls, insecure=arguments.insecure, timeout_s=arguments.timeout) as client:
        match arguments.command:
            case "status":
                return commands.status(client, as_json=as_json)
            case "bounds":
                return commands.bounds(client, as_json=as_json)
            case "resize":
                return resize.run(client, arguments.size, yes=arguments.yes, as_json=as_json)
            case "cancel":
                return commands.cancel(client, as_json=as_json)
            case "balloon":
                return commands.balloon(client, arguments.free, arguments.state, as_json=as_json)
            case "trim":
                return commands.trim(client, reclaim=arguments.reclaim, as_json=as_json)
            case _:
                return _watch(client, arguments.interval, as_json=as_json)


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
        description="Ask a guest's storaged, and tell it what to do.",
        epilog="Sizes: 20G, 512MiB, or bytes. Exit codes: 0 done, 1 failed, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"storagectl {__version__}")
    parser.add_argument(
        "--guest",
        metavar="ADDR",
        default=os.environ.get("STORAGED_GUEST") or DEFAULT_GUEST,
        help=f"unix:/path or tcp:HOST:PORT (default: $STORAGED_GUEST, or {DEFAULT_GUEST})",
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

    resize = commands.add_parser("resize", help="grow or shrink the filesystem and follow it; Ctrl-C cancels it")
    resize.add_argument("size", metavar="SIZE", type=_size, help="what the filesystem shall have")
    resize.add_argument("--yes", "-y", action="store_true", help="do not ask before a shrink")

    commands.add_parser("cancel", help="cancel the running resize and wait until it has stopped")

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

    watch = commands.add_parser("watch", help="show every change until Ctrl-C")
    watch.add_argument(
        "--interval",
        metavar="S",
        type=_seconds(most=MOST_INTERVAL_S),
        default=1.0,
        help="shortest time between two reports, in seconds (default 1)",
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="as JSON")
    return parser


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
