"""The configuration: every key checked, nothing silently ignored."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged import tables
from storaged.config import Settings, load, parse, restart_needed, table_types
from storaged.core.model import Config
from storaged.errors import ConfigError, InvalidRequest
from storaged.units import GIB, MAX_SIZE, MIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "storaged.toml"


def test_nothing_said_is_the_default(file: Path) -> None:
    file.write_text("")
    assert load(str(file)) == Settings()
    assert parse({"storage": {}}).storage == Config()


def test_all_that_can_be_said(file: Path) -> None:
    file.write_text("""
[serve]
listen = ["unix:/run/a", "tcp:127.0.0.1:1"]
stateful = "/mnt/x"
state_dir = "/var/x"
metrics = "127.0.0.1:9"
[storage]
reserve = "2GiB"
low_enter = "6G"
low_leave = 8589934592
critical_enter = "2G"
critical_leave = "3GiB"
settle_s = 5
retry_first_s = 0.5
retry_most_s = 60
guard_every_s = 1
trim_again_s = 0
capacity_wait_s = 10
capacity_poll_s = 0.1
low_dirty = "32MiB"
critical_dirty = "1MiB"
""")
    loaded = load(str(file))
    found = loaded.serve
    assert (found.listen, found.stateful, found.state_dir, found.metrics) == (
        ("unix:/run/a", "tcp:127.0.0.1:1"),
        "/mnt/x",
        "/var/x",
        "127.0.0.1:9",
    )
    storage = loaded.storage
    assert (storage.reserve, storage.low_enter, storage.low_leave) == (2 * GIB, 6 * GIB, 8 * GIB)
    assert (storage.settle_s, storage.trim_again_s, storage.low_dirty) == (5.0, 0.0, 32 * MIB)
    assert isinstance(storage.settle_s, float)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("reserve = 1", "reserve"),
        ("[other]", "other"),
        ("[serve]\nlisten = []", "listen"),
        ("[serve]\nlisten = 'unix:/x'", "listen"),
        ("[serve]\nlisten = [1]", "listen"),
        ("[serve]\nstateful = 1", "stateful"),
        ('[serve]\nstateful = "a\\u0000b"', "stateful"),
        ("[serve]\nport = 1", "port"),
        ("serve = 1", "serve"),
        ("storage = 1", "storage"),
        ("[storage]\nspeed = 1", "speed"),
        ("[storage]\nminimum_filesystem = 1", "minimum_filesystem"),
        ("[serve]\nlisten = ['udp:1']", "udp"),
        ("[serve]\nmetrics = 'nowhere'", "nowhere"),
        ("[serve]\nnotify_host = 'tcp:192.0.2.1:7777'", "loopback"),
        ("[serve]\nlog_level = 'loud'", "log_level"),
        ("[serve]\nrelease = 1", "release"),
        ("[tls]\ncertificate = '/x'", "belong together"),
        ("[limits]\ncalls = 7", "from 8 to 65536"),
        ("[limits]\ncalls = 3584", "one peer must not"),
        ("[limits]\ncalls = 8.5", "calls"),
        ("[limits]\nmessage_bytes = '1GiB'", "from 16.0 KiB to 64.0 MiB"),
        ("[limits]\nkeepalive_s = 200", "idle_s"),
        ("[vsock]\ncids = 2", "a list of"),
        ("[vsock]\ncids = [-1]", r"cids\[0\]"),
        ("[vsock]\ncids = [4294967295]", "4294967294"),
        ("[vsock]\nidle_s = 0", "idle_s"),
        ("[notify]\nfirst_s = 0", "first_s"),
        ("[storage]\nreserve = '1 GiB - 1'", "reserve"),
        ("[storage]\nreserve = '512MiB'", "reserve"),
        ("[storage]\nreserve = -1", "reserve"),
        ("[storage]\nreserve = true", "reserve"),
        ("[storage]\nreserve = 1.5", "reserve"),
        ("[storage]\nlow_enter = '5GiB'", "low_leave"),
        ("[storage]\ncritical_enter = '3GiB'", "critical_leave"),
        ("[storage]\ncritical_leave = '3GiB'", "low_enter"),
        ("[storage]\nlow_dirty = '512KiB'", "low_dirty"),
        ("[storage]\nsettle_s = -1", "settle_s"),
        ("[storage]\nsettle_s = '10'", "settle_s"),
        ("[storage]\nsettle_s = true", "settle_s"),
        ("[storage]\nsettle_s = nan", "settle_s"),
        ("[storage]\nsettle_s = inf", "settle_s"),
        ("[storage]\nretry_first_s = 0", "retry_first_s"),
        ("[storage]\ncapacity_wait_s = 100000", "capacity_wait_s"),
        ("not toml", "storaged.toml"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(file: Path, text: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load(str(file))


def test_files_that_are_not_there_or_not_text(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="directory"):
        load(str(tmp_path))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="configuration"):
        load(str(file))


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers())


@given(table=st.dictionaries(st.sampled_from([*Config.__slots__, "other"]), values, max_size=4))
def test_any_table_is_a_sound_configuration_or_a_refusal(table: dict[str, Any]) -> None:
    try:
        config = parse({"storage": table}).storage
    except ConfigError:
        return
    assert config.reserve >= GIB
    assert config.critical_enter <= config.critical_leave <= config.low_enter <= config.low_leave
    assert config.low_dirty >= MIB
    assert config.critical_dirty >= MIB
    assert config.retry_first_s > 0
    assert config.settle_s >= 0


@given(data=st.data())
def test_no_key_takes_a_value_of_another_kind(data: st.DataObject) -> None:
    name, table = data.draw(st.sampled_from(sorted(table_types().items())))
    key = data.draw(st.sampled_from(list(tables.keys(table))))
    value = data.draw(values)
    try:
        found = getattr(tables.read(table, {key.name: value}, name), key.name)
    except ConfigError:
        return
    one = found if key.many else (found,)
    assert all(type(item) is key.kind for item in one)
    if key.kind in (int, float):
        assert key.least is not None
        assert all(item >= key.least for item in one)
        assert all(item <= (MAX_SIZE if key.most is None else key.most) for item in one)


def test_every_key_is_explained() -> None:
    for name, table in table_types().items():
        for key in tables.keys(table):
            assert key.help.endswith("."), f"{name}.{key.name} says nothing of itself"
            assert key.accepts


def test_every_default_can_be_written_and_read_again() -> None:
    lines = []
    for name, table in table_types().items():
        lines.append(f"[{name}]")
        lines += [f"{key.name} = {tables.toml(key, key.default)}" for key in tables.keys(table)]
    assert parse(tomllib.loads("\n".join(lines))) == Settings()


@dataclass(frozen=True, slots=True)
class _Part:
    name: str = field(metadata={"help": "A name."})
    argv: tuple[str, ...] = field(default=(), metadata={"help": "Words."})


@dataclass(frozen=True, slots=True)
class _Module:
    """A guest module's own settings, as its author writes them."""

    parts: tuple[_Part, ...] = field(default=(_Part("a", ("b", "c")),), metadata={"help": "Parts."})
    wait_s: float = field(default=2.0, metadata={"help": "A time."})
    room_bytes: int = field(default=MIB, metadata={"help": "A size."})
    way: str = field(default="x", metadata={"help": "One of two.", "choices": ("x", "y")})
    limit: int | None = field(default=None, metadata={"help": "Perhaps a number."})

    def __post_init__(self) -> None:
        if self.way == "y" and self.limit is None:
            raise InvalidRequest("way y needs a limit")


def test_a_table_may_hold_tables_and_check_itself() -> None:
    text = """
    parts = [{ name = "p" }, { name = "q", argv = ["r"] }]
    wait_s = 3
    room_bytes = "2MiB"
    way = "y"
    limit = 4
    """
    found = tables.read(_Module, tomllib.loads(text), "module")
    assert found == _Module((_Part("p"), _Part("q", ("r",))), 3.0, 2 * MIB, "y", 4)
    key = next(tables.keys(_Module))
    assert key.accepts == "tables"
    written = tables.toml(key, key.default)
    assert tables.read(_Module, tomllib.loads(f"parts = {written}"), "module") == _Module()
    for wrong, named in (
        ({"parts": [{}]}, "name"),
        ({"parts": [{"name": 1}]}, r"module.parts\[0\].name"),
        ({"parts": [{"name": "x", "nome": "y"}]}, "nome"),
        ({"parts": "x"}, "module.parts"),
        ({"way": "z"}, "module.way"),
        ({"way": "y"}, "module: way y needs a limit"),
    ):
        with pytest.raises(ConfigError, match=named):
            tables.read(_Module, wrong, "module")


def test_what_a_running_daemon_does_not_take_is_named() -> None:
    old = Settings()
    new = parse({"serve": {"stateful": "/x", "log_level": "debug"}, "vsock": {"cids": [3]}, "limits": {"calls": 5000}})
    assert restart_needed(old, new) == ["serve.stateful", "limits.calls"]
    assert restart_needed(old, old) == []


def test_the_page_of_settings_is_made_from_the_code() -> None:
    root = Path(__file__).resolve().parent.parent
    made = subprocess.run([sys.executable, root / "tools" / "configuration.py", "--check"], check=False)
    assert made.returncode == 0
    page = (root / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert parse(tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])) == Settings()
