"""The command `storaged`."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
from dataclasses import replace
from typing import Any

from storaged import lean  # noqa: F401  # before all others

# isort: split

from storaged import __version__, check, logs
from storaged.config import ServeConfig, Settings, load
from storaged.errors import ConfigError, StoragedError
from storaged.units import parse_size

FAILED, MISUSED = 1, 2
LISTEN = "unix:/path, vsock::PORT or tcp:HOST:PORT; may be repeated"
DEFAULTS = ServeConfig()
SERVE = (
    "stateful",
    "state_dir",
    "metrics",
    "notify_host",
    "only_storage",
    "release",
    "log_level",
    "crash_host",
    "wait_for_stateful",
    "allow_unsupported",
)
TLS = {"certificate": "tls_cert", "key": "tls_key", "client_authority": "tls_client_ca", "insecure": "insecure"}
"""Settings that an option of the command line overrides, and its name."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="storaged", description="Keeps a virtual machine's btrfs within what its host can still give."
    )
    parser.add_argument("--version", action="version", version=f"storaged {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    serve.add_argument("--config", metavar="FILE", help="settings in TOML; the command line overrides them")
    serve.add_argument("--listen", metavar="ADDR", action="append", help=LISTEN)
    serve.add_argument("--stateful", metavar="PATH", help="where the btrfs to manage is mounted")
    serve.add_argument("--state-dir", metavar="DIR", help="where the journal is kept")
    serve.add_argument("--metrics", metavar="ADDR", help="serve Prometheus metrics on HOST:PORT or unix:/path")
    serve.add_argument("--notify-host", metavar="ADDR", help="who is told that we serve; `host` for the usual one")
    serve.add_argument("--crash-host", metavar="ADDR", help="who is told of programs that ended; `host` likewise")
    serve.add_argument(
        "--wait-for-stateful", action="store_true", default=None, help="serve before the filesystem is mounted"
    )
    serve.add_argument(
        "--allow-unsupported", action="store_true", default=None, help="start on a kernel or mount that `check` fails"
    )
    serve.add_argument("--only-storage", action="store_true", default=None, help="serve the storage calls alone")
    serve.add_argument(
        "--release", action="store_true", default=None, help="give the balloon back when the daemon stops"
    )
    serve.add_argument(
        "--insecure", action="store_true", default=None, help="allow tcp: without TLS on a loopback address"
    )
    serve.add_argument("--tls-cert", metavar="FILE", help="our certificate, PEM")
    serve.add_argument("--tls-key", metavar="FILE", help="its key, PEM")
    serve.add_argument("--tls-client-ca", metavar="FILE", help="who must have signed the clients', PEM")
    serve.add_argument("--sim", action="store_true", help="manage a simulated filesystem; needs no root")
    serve.add_argument("--sim-size", metavar="SIZE", default="8G", help="its size (default 8G)")
    serve.add_argument("--sim-speed", metavar="SIZE", default="0", help="bytes a second its shrinks move")
    serve.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="least to be logged")

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
    from storaged import app

    def settings() -> Settings:
        return _override(load(arguments.config) if arguments.config else Settings(), arguments)

    found = settings()
    logging.getLogger().setLevel(found.serve.log_level.upper())
    faulthandler.enable()  # a watchdog's SIGABRT then says where every thread was
    app.run(
        app.Options(
            settings=found,
            reread=settings if arguments.config else None,
            sim=arguments.sim,
            sim_size=parse_size(arguments.sim_size),
            sim_speed=parse_size(arguments.sim_speed),
        )
    )
    return 0


def _override(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """`settings` with what the command line says instead."""
    given: dict[str, Any] = {key: value for key in SERVE if (value := getattr(arguments, key)) is not None}
    if arguments.listen:
        given["listen"] = tuple(arguments.listen)
    tls: dict[str, Any] = {key: value for key, name in TLS.items() if (value := getattr(arguments, name)) is not None}
    return replace(settings, serve=replace(settings.serve, **given), tls=replace(settings.tls, **tls))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0 done, 1 failed (reason on stderr), 2 wrong use."""
    arguments = _parser().parse_args(argv)
    logs.setup(getattr(arguments, "log_level", None) or DEFAULTS.log_level)
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
