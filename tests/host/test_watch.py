"""What a look at a real filesystem and at device-mapper's words says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.loop import Guest
from storaged.errors import ConfigError
from storaged.host.config import load, parse
from storaged.host.machines import Machine
from storaged.host.watch import (
    BLOCK,
    BtrfsSource,
    FilesystemSource,
    PoolError,
    Watcher,
    allocated,
    filesystem_source,
    thin_pool_block,
    thin_pool_free,
)
from storaged.units import GIB, MIB

TABLE = "0 409600 thin-pool 253:0 253:1 128 32768 1 skip_block_zeroing"


def test_an_image_costs_what_is_written(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    with image.open("wb") as file:
        file.truncate(GIB)
    before = allocated(str(image))
    assert before is not None
    assert before < MIB
    with image.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)
    after = allocated(str(image))
    assert after is not None
    assert 8 * MIB <= after < 9 * MIB


def test_a_look_takes_the_smaller_free_and_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    class Falls:
        values = [7, 5]  # noqa: RUF012  # used up by the one test

        def free(self) -> int:
            return self.values.pop(0)

        def total(self) -> int:
            return 9

    image = tmp_path / "a.img"
    image.write_bytes(b"x" * 4096)
    sampled = Watcher(Falls(), lambda: 3.0).take({"a": str(image), "b": str(tmp_path / "none")})
    assert (sampled.free, sampled.at, set(sampled.images)) == (5, 3.0, {"a"})


def test_free_is_what_an_unprivileged_writer_has(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)
    free = FilesystemSource(str(tmp_path)).free()
    assert abs(free - stats.f_bavail * stats.f_frsize) < GIB
    with pytest.raises(PoolError, match="No such file"):
        FilesystemSource(str(tmp_path / "none")).free()


@pytest.mark.parametrize(
    ("status", "free"),
    [
        ("0 409600 thin-pool 1 20/1024 1200/3200 - rw no_discard_passdown queue_if_no_space - 1024", 2000 * 65536),
        ("0 409600 thin-pool 1 20/1024 3200/3200 - out_of_data_space discard_passdown queue_if_no_space - 1024", 0),
        ("0 409600 thin-pool 1 20/1024 1200/3200 - ro discard_passdown queue_if_no_space - 1024", 0),
        ("0 409600 thin-pool 1 20/1024 1200/3200 - rw discard_passdown error_if_no_space needs_check 1024", 0),
        ("0 409600 thin-pool 1 900/1024 1200/3200 - rw discard_passdown queue_if_no_space - 256", 22 * 64 * 65536),
        ("0 409600 thin-pool 1 1000/1024 1200/3200 - rw discard_passdown queue_if_no_space - 256", 0),
        ("0 409600 thin-pool Fail", 0),
    ],
)
def test_a_thin_pool(status: str, free: int) -> None:
    assert thin_pool_free(status, thin_pool_block(TABLE)) == free


@pytest.mark.parametrize("status", ["", "0 8 linear 1", "0 8 thin-pool 1 x y", "0 8 thin-pool 1 1/2 a/b - rw"])
def test_words_that_are_not_understood_are_no_number(status: str) -> None:
    with pytest.raises(PoolError):
        thin_pool_free(status, 65536)


@pytest.mark.parametrize("table", ["", "0 8 linear 8:0 0", "0 8 thin-pool 253:0 253:1", "0 8 thin-pool 253:0 253:1 x"])
def test_a_table_that_is_not_understood_is_no_block(table: str) -> None:
    with pytest.raises(PoolError):
        thin_pool_block(table)


def test_a_machine_by_its_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    machine = Machine(str(path))
    assert not machine.runs()
    path.write_text(f"{os.getpid()}\n")
    assert machine.runs()
    path.write_text("nonsense")
    assert machine.runs(), "what cannot be known counts as running"
    assert Machine("").runs()


GOOD = """
[serve]
listen = ["tcp:127.0.0.1:7777"]
[sharing]
low = "4GiB"
dwell_s = 3
[pool.vms]
path = "/vms"
[guest.web]
address = "unix:/run/web.sock"
image = "/vms/web.img"
weight = 2
size = "20G"
"""


def test_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "host.toml"
    path.write_text(GOOD)
    config = load(str(path))
    assert config.sharing.low == 4 * GIB
    assert config.sharing.dwell_s == 3.0
    assert config.guests[0].pool == "vms"
    assert config.guests[0].size == 20 * GIB
    assert str(config.listen[0]) == "tcp:127.0.0.1:7777"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pool": {}}, "no pool"),
        ({"pools": {}}, "unknown key pools"),
        ({"pool": {"p": {"path": "vms"}}}, "a path from the root"),
        ({"pool": {"p": {"path": "/v", "thin_pool": "-x"}}}, "device-mapper"),
        ({"guest": {"a/b": {}}}, "a name has letters"),
        ({"guest": {"a": {"address": "unix:/a", "image": "/a", "weight": 0}}}, "weight = 0"),
        ({"guest": {"a": {"address": "unix:/a", "image": "/a", "pool": "q"}}}, "pool = 'q'"),
        ({"guest": {"a": {"address": "vsock::8888", "image": "/a"}}}, "a guest has a context id"),
        ({"guest": {"a": {"address": "hybrid:8888", "image": "/a"}}}, "hybrid:/path:PORT"),
        ({"guest": {"a": {"address": "unix:/a", "image": "/a", "peer": "hybrid:"}}}, "guest.a.peer"),
        ({"guest": {"a": {"address": "unix:/a", "image": "/i"}, "b": {"address": "unix:/b", "image": "/i"}}}, "a, too"),
        ({"sharing": {"low": "1M"}}, "low must not be below sharing.critical"),
        ({"sharing": {"band": 2}}, "sharing.band"),
        ({"sharing": {"answer_s": float("nan")}}, "sharing.answer_s"),
        ({"sharing": {"answer_s": 0}}, "sharing.answer_s"),
        ({"tls": {"key": "k"}}, "needs authority"),
    ],
)
def test_a_mistake_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse({"pool": {"p": {"path": "/v"}}, **change})


@pytest.mark.btrfs
def test_what_waits_to_be_written_back_is_not_free_on_btrfs(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 3 * GIB)
    try:
        source = filesystem_source(str(guest.mountpoint))
        assert isinstance(source, BtrfsSource)
        image = guest.mountpoint / "image"
        with image.open("wb", buffering=0) as file:
            sums = []
            for _ in range(60):
                file.write(os.urandom(8 * MIB))
                sums.append(source.free() + os.fstat(file.fileno()).st_blocks * BLOCK)
        assert max(sums) <= sums[0] + 16 * MIB, "what an image takes is not free too"
    finally:
        guest.close()
