"""The configuration: every key checked, nothing silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.config import ServeConfig, load, parse_storage
from storaged.core.model import Config
from storaged.errors import ConfigError
from storaged.units import GIB, MIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "storaged.toml"


def test_nothing_said_is_the_default(file: Path) -> None:
    file.write_text("")
    assert load(str(file)) == ServeConfig()
    assert parse_storage({}) == Config()


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
    found = load(str(file))
    assert (found.listen, found.stateful, found.state_dir, found.metrics) == (
        ("unix:/run/a", "tcp:127.0.0.1:1"),
        "/mnt/x",
        "/var/x",
        "127.0.0.1:9",
    )
    storage = found.storage
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
        config = parse_storage(table)
    except ConfigError:
        return
    assert config.reserve >= GIB
    assert config.critical_enter <= config.critical_leave <= config.low_enter <= config.low_leave
    assert config.low_dirty >= MIB
    assert config.critical_dirty >= MIB
    assert config.retry_first_s > 0
    assert config.settle_s >= 0
