"""What an administrator may choose about the console: the table [console]."""

from __future__ import annotations

import os
import pwd
import re
import stat
from dataclasses import dataclass, field, fields
from typing import Any

from storaged.addresses import Address, TcpAddress, UnixAddress, VsockAddress, parse_address
from storaged.errors import ConfigError

LEAST_TOKEN = 20
"""Characters below which a token could be guessed."""
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ConsoleSettings:
    """Where the console is, and who may come in. Without `listen` there is none."""

    listen: str = field(default="", metadata={"help": "unix:/path or tcp:HOST:PORT; empty: no console."})
    names: tuple[str, ...] = field(
        default=(), metadata={"help": "Host names by which browsers come, besides localhost and where it listens."}
    )
    token_file: str = field(default="", metadata={"help": "File with the token that lets people in, mode 0600."})
    users: tuple[str, ...] = field(
        default=(), metadata={"help": "Users, by name or number, let in on a unix socket besides root and our own."}
    )
    certificate: str = field(default="", metadata={"help": "Our certificate, PEM."})
    key: str = field(default="", metadata={"help": "Its key, PEM."})

    @property
    def address(self) -> Address | None:
        """Where it listens."""
        return parse_address(self.listen) if self.listen else None

    @property
    def tls(self) -> bool:
        """True when browsers come by https."""
        return bool(self.certificate)


def parse(table: Any) -> ConsoleSettings:
    """The settings in [console]. Raises ConfigError that names the key."""
    if not isinstance(table, dict):
        raise ConfigError("[console] must be a table")
    known = [item.name for item in fields(ConsoleSettings)]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"unknown key console.{key}; known: {', '.join(known)}")
        values[key] = _LISTS[key](value) if key in _LISTS else _text(key, value)
    settings = ConsoleSettings(**values)
    for key in ("token_file", "certificate", "key"):
        path = getattr(settings, key)
        if path and not path.startswith("/"):
            raise ConfigError(f"console.{key} = {path!r}: a path from the root is accepted")
    if settings.users and not isinstance(settings.address, UnixAddress):
        raise ConfigError("console.users needs console.listen = unix:/path: only there the kernel says who connects")
    if bool(settings.certificate) != bool(settings.key):
        raise ConfigError("console.certificate and console.key belong together")
    _guarded(settings)
    return settings


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"console.{key} = {value!r}: a text is accepted")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and _HOST.fullmatch(name) for name in value):
        raise ConfigError(f"console.names = {value!r}: a list of host names is accepted")
    return tuple(name.lower() for name in value)


def _users(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(user, str | int) and _USER.fullmatch(str(user)) for user in value
    ):
        raise ConfigError(f"console.users = {value!r}: a list of users' names or numbers is accepted")
    return tuple(str(user) for user in value)


_LISTS = {"names": _names, "users": _users}


def read_users(users: tuple[str, ...]) -> list[int]:
    """Their numbers. Raises ConfigError for a name that this machine does not know."""
    found = []
    for user in users:
        try:
            found.append(int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid)
        except KeyError as error:
            raise ConfigError(f"console.users: no user is called {user!r}") from error
    return found


def _guarded(settings: ConsoleSettings) -> None:
    """Beyond this machine there is no console without TLS and a token."""
    address = settings.address
    if isinstance(address, VsockAddress):
        raise ConfigError(f"console.listen = {settings.listen!r}: use unix: or tcp:")
    if isinstance(address, TcpAddress) and not address.loopback and not (settings.tls and settings.token_file):
        raise ConfigError(
            f"console.listen = {settings.listen!r} can be reached from other machines:"
            " it needs console.certificate, console.key and console.token_file"
        )


def read_token(path: str) -> str:
    """The token in the file at `path`; empty when there is no path. Raises ConfigError."""
    if not path:
        return ""
    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigError(f"console.token_file {path}: {why}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"console.token_file {path} can be read by others: chmod 600 it")
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"console.token_file {path}: one word of at least {LEAST_TOKEN} characters is accepted,"
            " as `openssl rand -hex 32` prints"
        )
    return token
