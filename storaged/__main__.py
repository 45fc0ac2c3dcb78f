"""The command `storaged`."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from typing import Any

from storaged import __version__, check
from storaged.config import ServeConfig, load
from storaged.errors import ConfigError, StoragedError
from storaged.units import parse_size

FAILED, MISUSED = 1, 2
DEFAULTS = ServeConfig()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="storaged", description="Keeps a virtual machine's btrfs within what its host can still give."
    )
    parser.add_argument("--version", action="version", version=f"storaged {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    serve.add_argument("--config", metavar="FILE", help="settings in TOML; the command line overrides them")
    serve.add_argument("--listen", metavar="ADDR", action="append", help="unix:/path or tcp:HOST:PORT; may be repeated")
    serve.add_argument("--stateful", metavar="PATH", help="where the btrfs to manage is mounted")
    serve.add_argument("--state-dir", metavar="DIR", help="where the journal is kept")
    serve.add_argument("--metrics", metavar="ADDR", help="serve Prometheus metrics on HOST:PORT or unix:/path")
    serve.add_argument("--release", action="store_true", help="give the balloon back when the daemon stops")
    serve.add_argument("--insecure", action="store_true", help="allow tcp: without TLS on a loopback address")
    serve.add_argument("--tls-cert", metavar="FILE", help="our certificate, PEM")
    serve.add_argument("--tls-key", metavar="FILE", help="its key, PEM")
    serve.add_argument("--tls-client-ca", metavar="FILE", help="who must have signed the clients', PEM")
    serve.add_argument("--sim", action="store_true", help="manage a simulated filesystem; needs no root")
    serve.add_argument("--sim-size", metavar="SIZE", default="8G", help="its size (default 8G)")
    serve.add_argument("--sim-speed", metavar="SIZE", default="0", help="bytes a second its shrinks move")
    serve.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])

    check = commands.add_parser("check", help="say what would work on this machine, what not, and why")
    check.add_argument("--stateful", metavar="PATH", default=DEFAULTS.stateful)
    check.add_argument("--json", action="store_true", help="as JSON")

    for name, text in (
        ("release", "give the balloon and the write-back limits back; the daemon must be stopped"),
        ("uninstall", "the same: nothing of storaged is left on the filesystem"),
    ):
        release = commands.add_parser(name, help=text)
        release.add_argument("--stateful", metavar="PATH", default=DEFAULTS.stateful)
        release.add_argument("--state-dir", metavar="DIR", default=DEFAULTS.state_dir)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    # asyncio imports ssl if it can and works without it: 4 MB resident that a daemon with gRPC's own TLS never uses.
    sys.modules["ssl"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    import asyncio  # noqa: F401

    del sys.modules["ssl"]
    from storaged import app
    from storaged.rpc.server import Tls

    settings = load(arguments.config) if arguments.config else DEFAULTS
    given: dict[str, Any] = {
        key: value for key in ("stateful", "state_dir", "metrics") if (value := getattr(arguments, key)) is not None
    }
    if arguments.listen:
        given["listen"] = tuple(arguments.listen)
    files = (arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    if any(files) and not all(files):
        raise ConfigError("--tls-cert, --tls-key and --tls-client-ca belong together")
    app.run(
        app.Options(
            config=replace(settings, **given),
            sim=arguments.sim,
            sim_size=parse_size(arguments.sim_size),
            sim_speed=parse_size(arguments.sim_speed),
            insecure=arguments.insecure,
            tls=Tls(*files) if all(files) else None,
            release=arguments.release,
        )
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0 done, 1 failed (reason on stderr), 2 wrong use."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=getattr(arguments, "log_level", "info").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        if arguments.command == "serve":
            return _serve(arguments)
        if arguments.command == "check":
            return check.main(arguments.stateful, as_json=arguments.json)
        from storaged import app

        for line in app.uninstall(arguments.stateful, arguments.state_dir):
            print(line)
    except StoragedError as error:
        print(f"storaged: {error.message}", file=sys.stderr)
        return MISUSED if isinstance(error, ConfigError) else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
