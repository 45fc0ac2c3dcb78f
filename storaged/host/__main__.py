"""The command `storaged-host`."""

from __future__ import annotations

import argparse
import asyncio
import sys

from storaged import __version__, logs
from storaged.errors import ConfigError, StoragedError
from storaged.host.config import load

FAILED, MISUSED = 1, 2
CONTROL = "unix:/run/storaged-host.sock"
CONSOLE = "tcp:127.0.0.1:8800"
MOST_SIMULATED = 1000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="storaged-host", description="Shares what is left of a host's disk among its virtual machines."
    )
    parser.add_argument("--version", action="version", version=f"storaged-host {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the controller")
    what = serve.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="pools, guests and settings in TOML")
    what.add_argument("--sim", metavar="N", type=_count, help="share a made-up pool among N made-up guests")
    serve.add_argument(
        "--control", metavar="ADDR", default=CONTROL, help=f"with --sim: the socket for storagectl (default {CONTROL})"
    )
    serve.add_argument(
        "--console", metavar="ADDR", default=CONSOLE, help=f"with --sim: where browsers come (default {CONSOLE})"
    )
    serve.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = _parser().parse_args(arguments)
    logs.setup(options.log_level)
    try:
        if options.sim is not None:
            return _simulate(options)
        config = load(options.config)
        from storaged.host.service import serve

        asyncio.run(serve(config))
    except ConfigError as error:
        print(f"storaged-host: {error.message}", file=sys.stderr)
        return MISUSED
    except StoragedError as error:
        print(f"storaged-host: {error.message}", file=sys.stderr)
        return FAILED
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from storaged.addresses import UnixAddress, parse_address
    from storaged.host.console.settings import parse
    from storaged.host.simulated_service import serve

    control = parse_address(options.control)
    if not isinstance(control, UnixAddress):
        raise ConfigError(f"--control {options.control}: unix:/path is accepted")
    asyncio.run(serve(options.sim, control, parse({"listen": options.console})))
    return 0


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_SIMULATED:
        raise argparse.ArgumentTypeError(f"{text!r}: between 1 and {MOST_SIMULATED} is accepted")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
