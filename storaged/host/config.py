"""The host side's TOML file: pools, guests, how to share; every key checked, unknown ones refused.

[serve]            listen = ["tcp:127.0.0.1:7777"], metrics = "127.0.0.1:9848"
[sharing]          low = "4GiB"
[console]          listen = "tcp:127.0.0.1:8800"
[pool.vms]         path = "/var/lib/vms"
[guest.web]        address = "unix:/run/web.sock", image = "/var/lib/vms/web.img", weight = 2.0
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from typing import Any

from storaged.addresses import (
    ANY_CID,
    HYBRID,
    LONGEST_UNIX_PATH,
    Address,
    GuestAddress,
    TcpAddress,
    VsockAddress,
    parse_address,
    parse_guest_address,
)
from storaged.errors import ConfigError, InvalidRequest
from storaged.host.console import settings as console
from storaged.host.console.settings import ConsoleSettings
from storaged.host.settings import Resizing, Sharing
from storaged.units import parse_size

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_CONTROL = re.compile(r"loop|(qmp|crosvm):/.+")
_GUEST = ("address", "image", "pool", "weight", "size", "pid_file", "peer", "control", "disk", "trust_balloon")
_PEERS = ("ipv4:", "ipv6:", "vsock:", "unix:")
_NUMBERS = ("looks", "overcommit_limit")
_SHARES = ("kept_share", "idle_share", "band", "band_roomy", "reserve_share")


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """One guest. `size` 0: as large as its image is now. `pid_file`: of its machine; `peer`: where VmReady comes from.

    `control`: who resizes the image, `loop`, `qmp:/socket` or `crosvm:/socket`; `disk`: which one it is there.
    `trust_balloon`: the answers of an agent that is not storaged cover what is preallocated in the guest.
    """

    name: str
    address: GuestAddress
    image: str
    pool: str
    weight: float = 1.0
    size: int = 0
    pid_file: str = ""
    peer: str = ""
    control: str = "loop"
    disk: str = ""
    trust_balloon: bool = False


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """A mounted filesystem, perhaps on a dm-thin pool."""

    name: str
    path: str
    thin_pool: str = ""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What becomes of guests that announce themselves and are not configured; `{host}` is the caller's address."""

    address: str
    image: str
    pool: str
    trust_balloon: bool = False

    def guest(self, peer: str) -> GuestConfig | None:
        """The guest that calls from `peer`, as in `ipv4:10.0.0.5`; None when that is no place of its own."""
        kind, _, host = peer.partition(":")
        if kind == "vsock":
            if not host.isascii() or not host.isdigit():
                return None
        elif kind in {"ipv4", "ipv6"}:
            try:
                host = str(ipaddress.ip_address(host))
            except ValueError:
                return None
        else:
            return None
        within = f"[{host}]" if kind == "ipv6" else host
        try:
            address = parse_guest_address(self.address.replace("{host}", within))
        except ConfigError:
            return None  # an address of another kind than `address` is made for
        image = self.image.replace("{host}", host)
        return GuestConfig(host, address, image, self.pool, peer=peer, trust_balloon=self.trust_balloon)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: who must have signed the guests' certificates, our certificate, its key. Empty: none."""

    authority: str = ""
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class HostConfig:
    """All that an administrator says about a host."""

    pools: tuple[PoolConfig, ...]
    guests: tuple[GuestConfig, ...] = ()
    listen: tuple[Address, ...] = ()
    sharing: Sharing = field(default_factory=Sharing)
    tls: Tls = field(default_factory=Tls)
    discovery: Discovery | None = None
    resize: Resizing = field(default_factory=Resizing)
    console: ConsoleSettings = field(default_factory=ConsoleSettings)
    metrics: str = ""
    """HOST:PORT or unix:/path; empty: none."""


def load(path: str) -> HostConfig:
    """The settings in the file at `path`. Raises ConfigError that names the key."""
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror}") from error
    except RecursionError:
        raise ConfigError(f"configuration {path}: tables or lists lie too deep in each other") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: {error}") from error
    return parse(document)


def parse(document: dict[str, Any]) -> HostConfig:
    """The settings in a document that was read. Raises ConfigError that names the key."""
    _known("", document, ("serve", "sharing", "tls", "pool", "guest", "discovery", "resize", "console"))
    pools = tuple(_pool(name, table) for name, table in _named("pool", document.get("pool", {})))
    if not pools:
        raise ConfigError("no pool: write [pool.NAME] with its path")
    guests = tuple(_guest(name, table, pools) for name, table in _named("guest", document.get("guest", {})))
    for what in ("image", "peer"):
        seen: dict[str, str] = {}
        for guest in guests:
            value = getattr(guest, what)
            if value and seen.setdefault(value, guest.name) != guest.name:
                raise ConfigError(f"guest.{guest.name}.{what} = {value!r} is that of guest {seen[value]}, too")
    serve = _table("serve", document.get("serve", {}), ("listen", "metrics"))
    listen = serve.get("listen", [])
    if not isinstance(listen, list):
        raise ConfigError(f"serve.listen = {listen!r}: a list of addresses is accepted")
    for guest in guests:
        if str(guest.address) in listen:
            raise ConfigError(f"guest.{guest.name}.address = '{guest.address}' is where storaged-host itself listens")
    tls = _table("tls", document.get("tls", {}), ("authority", "certificate", "key"))
    if tls and len(tls) < 3:
        raise ConfigError("[tls] needs authority, certificate and key")
    discovery = _discovery(document["discovery"], pools) if "discovery" in document else None
    if not tls:
        for guest in guests:
            _within_reach(f"guest.{guest.name}.address", str(guest.address), guest.address)
        if discovery is not None:
            _within_reach("discovery.address", discovery.address, _example(discovery.address))
    return HostConfig(
        pools,
        guests,
        tuple(_address("serve.listen", item) for item in listen),
        _sharing(document.get("sharing", {})),
        Tls(**{key: _text(f"tls.{key}", value) for key, value in tls.items()}),
        discovery,
        _resize(document.get("resize", {})),
        console.parse(document.get("console", {})),
        metrics=_text("serve.metrics", serve["metrics"]) if "metrics" in serve else "",
    )


def _known(where: str, table: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            raise ConfigError(f"unknown key {where}{key}; known: {', '.join(keys)}")


def _table(name: str, table: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"[{name}] must be a table")
    _known(f"{name}.", table, keys)
    return table


def _named(kind: str, tables: Any) -> list[tuple[str, Any]]:
    if not isinstance(tables, dict):
        raise ConfigError(f"[{kind}] must be a table of tables: [{kind}.NAME]")
    for name in tables:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{kind} {name!r}: a name has letters, digits, '.', '_' and '-', at most 64")
    return list(tables.items())


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{key} = {value!r}: a text is accepted")
    return value


def _path(key: str, value: Any) -> str:
    path = _text(key, value)
    if not path.startswith("/"):
        raise ConfigError(f"{key} = {value!r}: a path from the root is accepted")
    return path


def _address(key: str, value: Any) -> Address:
    return parse_address(_text(key, value))


def _guest_address(key: str, value: Any) -> GuestAddress:
    address = parse_guest_address(_text(key, value))
    if isinstance(address, VsockAddress) and address.cid == ANY_CID:
        raise ConfigError(f"{key} = {value!r}: a guest has a context id, vsock:CID:PORT")
    return address


def _peer(key: str, value: Any) -> str:
    """Whence a guest calls; a `hybrid:` path must be one that a socket can have."""
    peer = _text(key, value)
    if peer.startswith(HYBRID):
        path = peer.removeprefix(HYBRID)
        if not path.startswith("/") or len(os.fsencode(path)) > LONGEST_UNIX_PATH:
            raise ConfigError(f"{key} = {value!r}: hybrid:/path of at most {LONGEST_UNIX_PATH} bytes is accepted")
        return HYBRID + os.path.normpath(path)
    if not peer.startswith(_PEERS):
        raise ConfigError(f"{key} = {value!r}: {', '.join(_PEERS)} and what follows, or hybrid:/path, is accepted")
    return peer


def _pool(name: str, table: Any) -> PoolConfig:
    where = f"pool.{name}"
    table = _table(where, table, ("path", "thin_pool"))
    thin = table.get("thin_pool", "")
    if thin and (not isinstance(thin, str) or not re.fullmatch(r"[A-Za-z0-9#+.:=@_][A-Za-z0-9#+.:=@_-]*", thin)):
        raise ConfigError(f"{where}.thin_pool = {thin!r}: the name of a device-mapper device is accepted")
    return PoolConfig(name, _path(f"{where}.path", table.get("path")), thin)


def _of(where: str, table: dict[str, Any], pools: tuple[PoolConfig, ...]) -> str:
    """The pool that a table names; the only one needs no name."""
    pool = table.get("pool", pools[0].name if len(pools) == 1 else "")
    if pool not in {each.name for each in pools}:
        raise ConfigError(f"{where}.pool = {pool!r}; known: {', '.join(each.name for each in pools)}")
    return str(pool)


def _discovery(table: Any, pools: tuple[PoolConfig, ...]) -> Discovery:
    table = _table("discovery", table, ("address", "image", "pool", "trust_balloon"))
    address = _text("discovery.address", table.get("address"))
    image = _path("discovery.image", table.get("image"))
    for key, value in (("address", address), ("image", image)):
        if "{host}" not in value:
            raise ConfigError(f"discovery.{key} = {value!r} must contain {{host}}: every guest has its own")
    _example(address)
    trust = _flag("discovery.trust_balloon", table.get("trust_balloon", False))
    return Discovery(address, image, _of("discovery", table, pools), trust)


def _example(address: str) -> GuestAddress:
    """An address as `discovery.address` makes them. Any number will do: as a context id and as a host's name."""
    return _guest_address("discovery.address", address.replace("{host}", "3"))


def _within_reach(key: str, written: str, address: GuestAddress) -> None:
    """Without certificates a guest is called on this machine alone."""
    if isinstance(address, TcpAddress) and not address.loopback:
        raise ConfigError(f"{key} = {written!r} needs [tls]: it is not a loopback address")


def _guest(name: str, table: Any, pools: tuple[PoolConfig, ...]) -> GuestConfig:
    where = f"guest.{name}"
    table = _table(where, table, _GUEST)
    weight = table.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.01 <= weight <= 100:
        raise ConfigError(f"{where}.weight = {weight!r}: a number between 0.01 and 100 is accepted")
    return GuestConfig(
        name,
        _guest_address(f"{where}.address", table.get("address")),
        _path(f"{where}.image", table.get("image")),
        _of(where, table, pools),
        float(weight),
        _size(f"{where}.size", table["size"]) if "size" in table else 0,
        _path(f"{where}.pid_file", table["pid_file"]) if "pid_file" in table else "",
        _peer(f"{where}.peer", table["peer"]) if "peer" in table else "",
        *_control(where, table),
        trust_balloon=_flag(f"{where}.trust_balloon", table.get("trust_balloon", False)),
    )


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r}: true or false is accepted")
    return value


def _control(where: str, table: dict[str, Any]) -> tuple[str, str]:
    control = _text(f"{where}.control", table.get("control", "loop"))
    if not _CONTROL.fullmatch(control):
        raise ConfigError(f"{where}.control = {control!r}: loop, qmp:/socket or crosvm:/socket is accepted")
    socket = control.partition(":")[2]
    if len(os.fsencode(socket)) > LONGEST_UNIX_PATH:
        raise ConfigError(f"{where}.control = {control!r}: a socket's path has at most {LONGEST_UNIX_PATH} bytes")
    disk = _text(f"{where}.disk", table["disk"]) if "disk" in table else ""
    if control.startswith("crosvm:") and disk and not (disk.isascii() and disk.isdigit() and len(disk) < 4):
        raise ConfigError(f"{where}.disk = {disk!r}: crosvm counts its disks, from 0")
    return control, disk


def _resize(table: Any) -> Resizing:
    values = dict(_table("resize", table, tuple(item.name for item in fields(Resizing))))
    for key, value in values.items():
        where = f"resize.{key}"
        if key == "state_dir":
            values[key] = _path(where, value)
        elif key == "keep":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1000:
                raise ConfigError(f"{where} = {value!r}: between 0 and 1000 is accepted")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= 86400:
            raise ConfigError(f"{where} = {value!r}: between 0.01 and 86400 is accepted")
    return Resizing(**values)


def _size(key: str, value: Any) -> int:
    try:
        size = value if isinstance(value, int) and not isinstance(value, bool) else parse_size(str(value))
    except InvalidRequest as error:
        raise ConfigError(f"{key}: {error.message}") from error
    if size < 0:
        raise ConfigError(f"{key} = {value!r}: at least 0 is accepted")
    return size


def _sharing(table: Any) -> Sharing:
    names = tuple(item.name for item in fields(Sharing))
    values: dict[str, Any] = {}
    for key, value in _table("sharing", table, names).items():
        where = f"sharing.{key}"
        if key.endswith("_s") or key in _NUMBERS or key in _SHARES:
            most = 0.9 if key in _SHARES else 86400
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not 0 <= value <= most or (value < 0.01 and key not in _SHARES):
                raise ConfigError(
                    f"{where} = {value!r}: between {0 if key in _SHARES else 0.01} and {most} is accepted"
                )
            values[key] = float(value)
        else:
            values[key] = _size(where, value)
    sharing = Sharing(**values)
    for less, more in (
        ("critical", "low"), ("reserve_least", "reserve_most"), ("poll_least_s", "poll_most_s"),
        ("retry_first_s", "retry_most_s"),
    ):  # fmt: skip
        if getattr(sharing, less) > getattr(sharing, more):
            raise ConfigError(f"sharing.{more} must not be below sharing.{less}")
    return sharing
