"""What an administrator may set in a TOML file; every key checked, unknown ones refused."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from typing import Any

from storaged.core.model import Config
from storaged.errors import ConfigError, InvalidRequest
from storaged.units import format_size, parse_size

_LEAST: dict[str, float] = {
    "settle_s": 0.0,
    "retry_first_s": 0.01,
    "retry_most_s": 0.01,
    "guard_every_s": 0.1,
    "guard_soon_s": 0.01,
    "guard_calm_s": 0.1,
    "trim_again_s": 0.0,
    "capacity_wait_s": 0.0,
    "capacity_poll_s": 0.01,
}


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The daemon's own settings; the command line overrides them."""

    listen: tuple[str, ...] = ("unix:/run/storaged.sock",)
    stateful: str = "/mnt/stateful"
    state_dir: str = "/var/lib/storaged"
    metrics: str = ""
    storage: Config = field(default_factory=Config)


def load(path: str) -> ServeConfig:
    """The settings in the file at `path`. Raises ConfigError that names the key."""
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: {error}") from error
    storage = document.pop("storage", {})
    serve = document.pop("serve", {})
    if document:
        raise ConfigError(f"configuration {path}: unknown section or key {next(iter(document))!r}")
    return ServeConfig(**_serve(serve), storage=parse_storage(storage))


def _serve(table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError("[serve] must be a table")
    known: dict[str, Any] = {}
    for key, value in table.items():
        if key == "listen":
            if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"serve.listen = {value!r}: a list of addresses is accepted")
            known[key] = tuple(value)
        elif key in ("stateful", "state_dir", "metrics"):
            if not isinstance(value, str) or "\0" in value:
                raise ConfigError(f"serve.{key} = {value!r}: a string is accepted")
            known[key] = value
        else:
            raise ConfigError(f"unknown key serve.{key}; known: listen, stateful, state_dir, metrics")
    return known


def parse_storage(table: Any) -> Config:
    """The [storage] table: sizes as `"2GiB"` or bytes, times in seconds. Raises ConfigError."""
    if not isinstance(table, dict):
        raise ConfigError("[storage] must be a table")
    names = {item.name for item in fields(Config)} - {"minimum_filesystem"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in names:
            raise ConfigError(f"unknown key storage.{key}; known: {', '.join(sorted(names))}")
        values[key] = _seconds(key, value) if key.endswith("_s") else _bytes(key, value)
    config = Config(**values)
    for worse, better in (("critical_enter", "critical_leave"), ("low_enter", "low_leave")):
        if getattr(config, worse) > getattr(config, better):
            raise ConfigError(f"storage.{better} must not be below storage.{worse}")
    if config.critical_leave > config.low_enter:
        raise ConfigError("storage.low_enter must not be below storage.critical_leave")
    if config.reserve < Config().reserve:
        raise ConfigError(f"storage.reserve must be at least {format_size(Config().reserve)}: hosts count on that much")
    return config


def _seconds(key: str, value: object) -> float:
    least = _LEAST[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 86400:
        raise ConfigError(f"storage.{key} = {value!r}: seconds between {least:g} and 86400 are accepted")
    return float(value)


def _bytes(key: str, value: object) -> int:
    try:
        size = value if isinstance(value, int) and not isinstance(value, bool) else parse_size(str(value))
    except InvalidRequest as error:
        raise ConfigError(f"storage.{key}: {error.message}") from error
    if size < 0 or (key.endswith("dirty") and size < 1 << 20):
        raise ConfigError(
            f"storage.{key} = {value!r}: at least {'1 MiB' if key.endswith('dirty') else '0'} is accepted"
        )
    return size
