"""The resolver's configuration: what may stand in it (pure), and the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Protocol

from storaged.errors import ConfigError, InvalidRequest
from storaged.guest.files import directory_of, is_plain_path, replace_file, told
from storaged.guest.serial import OneByOne

MOST_ENTRIES = 64
LONGEST_DOMAIN = 253
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
_OPTIONS = re.compile(r"[a-z0-9:. -]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ResolvSettings:
    """What an administrator may set."""

    path: str = field(default="/run/resolv.conf", metadata={"help": "the file that is replaced"})
    options: str = field(
        default="single-request timeout:1 attempts:5", metadata={"help": "the resolver options; empty: none"}
    )
    fallback: tuple[str, ...] = field(
        default=("8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"),
        metadata={"help": "the nameservers when the host names none"},
    )

    def __post_init__(self) -> None:
        if not is_plain_path(self.path):
            raise ConfigError(f"resolv.path = {self.path!r}: an absolute path without . and .. is accepted")
        if not _OPTIONS.fullmatch(self.options):
            raise ConfigError(f"resolv.options = {self.options!r}: options as in resolv.conf(5) are accepted")
        try:
            check_nameservers(self.fallback)
        except InvalidRequest as error:
            raise ConfigError(f"resolv.fallback: {error.message}") from error


@dataclass(frozen=True, slots=True)
class ResolvConfig:
    """What has been checked."""

    nameservers: tuple[str, ...]
    search_domains: tuple[str, ...]


def check(nameservers: Sequence[str], search_domains: Sequence[str]) -> ResolvConfig:
    """The two lists of `resolv_config`. Raises InvalidRequest that names the first entry that is wrong."""
    return ResolvConfig(check_nameservers(nameservers), _check_domains(search_domains))


def check_nameservers(values: Sequence[str]) -> tuple[str, ...]:
    """The addresses in their shortest spelling. Raises InvalidRequest."""
    _check_length("nameservers", values)
    return tuple(_check_nameserver(index, value) for index, value in enumerate(values))


def _check_length(name: str, values: Sequence[str]) -> None:
    if len(values) > MOST_ENTRIES:
        raise InvalidRequest(f"resolv_config.{name} has {len(values)} entries: at most {MOST_ENTRIES} are accepted")


def _check_nameserver(index: int, value: str) -> str:
    try:
        address: IPv4Address | IPv6Address = ip_address(value)
    except ValueError:
        address = IPv4Address("224.0.0.0")  # refused below, as every group is
    scope = getattr(address, "scope_id", None)
    broadcast = isinstance(address, IPv4Address) and address.is_reserved
    if address.is_multicast or broadcast or (scope is not None and not _SCOPE.fullmatch(scope)):
        raise InvalidRequest(
            f"resolv_config.nameservers[{index}] {value!r} is no IPv4 or IPv6 address: a unicast address is accepted"
        )
    return str(address)


def _check_domains(values: Sequence[str]) -> tuple[str, ...]:
    _check_length("search_domains", values)
    for index, value in enumerate(values):
        name = value.removesuffix(".")
        root = value == "."
        if not root and (len(name) > LONGEST_DOMAIN or not all(map(_LABEL.fullmatch, name.split(".")))):
            raise InvalidRequest(
                f"resolv_config.search_domains[{index}] {value[: LONGEST_DOMAIN + 1]!r} is no domain name:"
                " letters, digits, hyphens and underscores between dots are accepted"
            )
    return tuple(values)


def render(config: ResolvConfig, settings: ResolvSettings) -> str:
    """The file's text (resolv.conf(5))."""
    lines = [f"nameserver {server}" for server in config.nameservers or settings.fallback]
    if config.search_domains:
        lines.append(f"search {' '.join(config.search_domains)}")
    if settings.options:
        lines.append(f"options {settings.options}")
    return "".join(f"{line}\n" for line in lines)


class ResolvPort(Protocol):
    """Where the configuration is kept."""

    def write(self, text: str) -> None:
        """Replace it as a whole. Blocks; raises StoragedError, and then the old one is still there."""


class ResolvFile:
    """The file `path` beneath `root`. A link that stands in its place is replaced, not followed."""

    def __init__(self, path: str = ResolvSettings().path, root: str = "/") -> None:
        self._path = path
        self._root = root

    def write(self, text: str) -> None:
        with told(f"resolver configuration {self._path}"), directory_of(self._root, self._path) as (directory, name):
            replace_file(directory, name, text.encode("ascii"), 0o644)


class Resolv:
    """What a host may ask of the resolver; its calls take effect in the order in which they came."""

    def __init__(self, port: ResolvPort, settings: ResolvSettings | None = None) -> None:
        self._port = port
        self._settings = settings or ResolvSettings()
        self._calls = OneByOne("resolv")

    async def set(self, nameservers: Sequence[str], search_domains: Sequence[str]) -> None:
        """Replace the resolver's configuration. All is checked before anything is changed."""
        text = render(check(nameservers, search_domains), self._settings)
        await self._calls.run(self._port.write, text)
