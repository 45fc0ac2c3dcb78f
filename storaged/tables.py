"""TOML tables from frozen dataclasses: what a key means and accepts stands beside its field, nowhere else.

A field's metadata: `help` (one sentence), `unit` (`"bytes"`, `"seconds"` or words; names that end in `_s` are seconds,
in `_bytes` are bytes), `least`, `most`, `choices`, `some` (a list that must not be empty), `fixed` (no setting),
`reload` (taken by a running daemon).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from storaged.errors import ConfigError, InvalidRequest, StoragedError
from storaged.units import KIB, MAX_SIZE, format_size, parse_size

MOST_SECONDS = 86400.0
Table = TypeVar("Table")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table: what is said of it, and the type of its value (of its items when it is a list)."""

    name: str
    help: str
    unit: str
    kind: Any
    default: Any
    many: bool = False
    some: bool = False
    optional: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    reload: bool = False

    @property
    def accepts(self) -> str:
        """What may be written, in words."""
        if is_dataclass(self.kind):
            return "tables"
        one = self._one()
        return f"a list of {one}" + (", not empty" if self.some else "") if self.many else one

    def _one(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return " or ".join(f'"{choice}"' for choice in self.choices)
        if self.kind is str:
            return "strings" if self.many else "a string"
        show = format_size if self.unit == "bytes" else _plain
        noun = self.unit or ("whole numbers" if self.many else "a whole number" if self.kind is int else "a number")
        if self.least is not None and self.most is not None:
            return f"{noun} from {show(self.least)} to {show(self.most)}"
        return noun if self.least is None else f"{noun} from {show(self.least)} on"


def keys(table: type) -> Iterator[Key]:
    """The keys of a table, in the order of its fields."""
    hints = typing.get_type_hints(table)
    for item in fields(table):
        if not item.metadata.get("fixed"):
            yield _key(item, hints[item.name])


def _key(item: Field[Any], hint: Any) -> Key:
    said = item.metadata
    unit = said.get("unit", "seconds" if item.name.endswith("_s") else "bytes" if item.name.endswith("_bytes") else "")
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    least, most = said.get("least"), said.get("most")
    if kind in (int, float) and least is None:
        least = 0
    if unit == "seconds" and most is None:
        most = MOST_SECONDS
    default = item.default if item.default is not MISSING else None
    if item.default_factory is not MISSING:
        default = item.default_factory()
    return Key(
        name=item.name,
        help=_sentence(said.get("help", "")),
        unit=unit,
        kind=kind,
        default=default,
        many=many,
        some=bool(said.get("some")),
        optional=optional,
        least=least,
        most=most,
        choices=tuple(said.get("choices", ())),
        reload=bool(said.get("reload")),
    )


def _sentence(text: str) -> str:
    return text and f"{text[0].upper()}{text[1:].rstrip('.')}."


def read(table: type[Table], document: object, name: str) -> Table:
    """The table `name` of a file as an object. Raises ConfigError that names the key and what is accepted."""
    if not isinstance(document, dict):
        raise ConfigError(f"{name} = {document!r}: a table is accepted")
    known = {key.name: key for key in keys(table)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            raise ConfigError(f"unknown key {name}.{key}; known: {', '.join(known)}")
        values[key] = _value(known[key], value, f"{name}.{key}")
    try:
        return table(**values)
    except TypeError as error:  # a key without a default is missing
        raise ConfigError(f"{name}: {error}") from error
    except ConfigError:
        raise
    except StoragedError as error:  # the table's own check
        raise ConfigError(f"{name}: {error.message}") from error


def _value(key: Key, value: object, name: str) -> Any:
    if not key.many:
        return _single(key, value, name)
    if not isinstance(value, list) or (key.some and not value):
        raise ConfigError(f"{name} = {value!r}: {key.accepts} is accepted")
    return tuple(_single(key, item, f"{name}[{index}]") for index, item in enumerate(value))


def _single(key: Key, value: object, name: str) -> Any:
    if is_dataclass(key.kind):
        return read(typing.cast("type[Any]", key.kind), value, name)
    if key.kind is bool and isinstance(value, bool):
        return value
    if key.kind is str and isinstance(value, str) and "\0" not in value and value in (key.choices or (value,)):
        return value
    number = _number(key, value, name)
    if number is not None and not (key.least is not None and number < key.least):
        most = MAX_SIZE if key.most is None else key.most
        if number <= most:
            return number
    raise ConfigError(f"{name} = {value!r}: {key.accepts} is accepted")


def _number(key: Key, value: object, name: str) -> float | None:
    """`value` as a number of the key's kind; None when it is none."""
    if key.kind is int and key.unit == "bytes" and isinstance(value, str):
        try:
            return parse_size(value)
        except InvalidRequest as error:
            raise ConfigError(f"{name}: {error.message}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if key.kind is int:
        return value if isinstance(value, int) else None
    return float(value) if key.kind is float and math.isfinite(value) else None


def toml(key: Key, value: Any) -> str:
    """`value` as it would be written in a file."""
    if key.many:
        return "[" + ", ".join(_toml_one(key, item) for item in value) + "]"
    return _toml_one(key, value)


def _toml_one(key: Key, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{one.name} = {toml(one, getattr(value, one.name))}" for one in keys(type(value)))
        return f"{{ {inside} }}"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return _size(value) if key.unit == "bytes" else _plain(value)


def _size(value: int) -> str:
    """`"1GiB"` where it is exact."""
    for power, prefix in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value and value % KIB**power == 0:
            return f'"{value // KIB**power}{prefix}"'
    return str(value)


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
