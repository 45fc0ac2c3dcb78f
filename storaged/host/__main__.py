"""The command `storaged-host`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from storaged import __version__
from storaged.errors import ConfigError, StoragedError
from storaged.host.config import load

FAILED, MISUSED = 1, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="storaged-host", description="Shares what is left of a host's disk among its virtual machines."
    )
    parser.add_argument("--version", action="version", version=f"storaged-host {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the controller")
    serve.add_argument("--config", metavar="FILE", required=True, help="pools, guests and settings in TOML")
    serve.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    try:
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


if __name__ == "__main__":
    sys.exit(main())
