"""What bash and zsh ask for while somebody presses Tab: commands, options, and the names that the host knows."""

from __future__ import annotations

import argparse
from typing import Any

import argcomplete
from argcomplete.shell_integration import shellcode

from storaged.errors import StoragedError

ANSWER_WITHIN_S = 1.0


def script(shell: str) -> str:
    """What the shell has to run once, as in `eval "$(storagectl completion bash)"`."""
    return shellcode(["storagectl"], shell=shell)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit."""
    for action in parser._actions:  # noqa: SLF001  # argparse has no other way to its subcommands
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001  # as above
            _attach(action.choices)
    argcomplete.autocomplete(parser)


def _attach(commands: dict[str, argparse.ArgumentParser]) -> None:
    for command, destination, completer in (
        ("resize", "what", _guests),
        ("cancel", "name", _guests),
        ("unfence", "name", _guests),
        ("pool", "name", _pools),
        ("guests", "pool", _pools),
    ):
        for action in commands[command]._actions:  # noqa: SLF001  # as above
            if action.dest == destination:
                action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks


def _guests(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of guests; nothing when the host does not answer at once."""
    return _names(prefix, parsed_args, "guests")


def _pools(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    return _names(prefix, parsed_args, "pools")


def _names(prefix: str, arguments: argparse.Namespace, what: str) -> list[str]:
    from storaged.addresses import parse_address
    from storaged.ctl.host_client import HostClient
    from storaged.ctl.main import host_address

    try:
        with HostClient(parse_address(host_address(arguments)), ANSWER_WITHIN_S) as client:
            report = client.report()
    except StoragedError:
        return []
    found = report.guests if what == "guests" else report.pools
    return [each.name for each in found if each.name.startswith(prefix)]
