"""Directories of our own: nobody else's, gone at the end, and cleared at the next start after a kill -9."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.host import HostDaemon
from storaged.rpc.private import PrivateDirectory, sweep


def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left(parent: Path, owner: int) -> Path:
    """What a killed process leaves."""
    path = parent / f"storaged-{owner}-a1b2c3_4"
    path.mkdir(0o700)
    (path / "out").touch()
    return path


def test_it_is_ours_alone(tmp_path: Path) -> None:
    one, other = PrivateDirectory(str(tmp_path)), PrivateDirectory(str(tmp_path))
    assert one.path != other.path
    assert stat.S_IMODE(os.stat(one.path).st_mode) == 0o700
    Path(one.socket("s")).touch()
    one.remove()
    other.remove()
    assert not list(tmp_path.iterdir())


def test_what_the_dead_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    alive = PrivateDirectory(str(tmp_path))
    gone = left(tmp_path, dead())
    kept = [tmp_path / name for name in ("storaged-host", "storaged-lab-1-abcdefgh", f"storaged-{dead()}-short")]
    for path in kept:
        path.mkdir()
    (kept[0] / "host.sock").touch()
    link = tmp_path / f"storaged-{dead()}-linked00"
    link.symlink_to(kept[0])
    assert sweep(str(tmp_path)) == [str(gone)]
    assert sorted(tmp_path.iterdir()) == sorted([Path(alive.path), link, *kept])
    assert (kept[0] / "host.sock").exists()
    alive.remove()


def test_an_owner_that_is_not_seen_by_its_id_keeps_its_directory(tmp_path: Path) -> None:
    """As one in another container: its lock says that it lives."""
    private = PrivateDirectory(str(tmp_path))
    unseen = tmp_path / f"storaged-{dead()}-a1b2c3_4"
    os.rename(private.path, unseen)
    assert sweep(str(tmp_path)) == []
    private.remove()  # lets go of the lock
    assert sweep(str(tmp_path)) == [str(unseen)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's directory")
def test_another_users_directory_is_left_alone(tmp_path: Path) -> None:
    path = left(tmp_path, dead())
    os.chown(path, 12345, 12345)
    assert sweep(str(tmp_path)) == []
    assert path.exists()


def test_nothing_to_look_through(tmp_path: Path) -> None:
    assert sweep(str(tmp_path / "none")) == []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostDaemon]:
    """A host with a guest on vsock, whose sockets lie in `run`."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    (tmp_path / "web.img").write_bytes(bytes(4096))
    config = tmp_path / "host.toml"
    config.write_text(f"""
[serve]
listen = ["unix:{tmp_path}/host.sock"]
[resize]
state_dir = "{tmp_path}/state"
[pool.p]
path = "{tmp_path}"
[guest.web]
address = "vsock:7:9999"
image = "{tmp_path}/web.img"
""")
    daemon = HostDaemon(config, tmp_path / "host.log", tmp_path / "host.sock")
    yield daemon
    daemon.end()


def test_a_killed_host_leaves_nothing_once_it_runs_again(tmp_path: Path, host: HostDaemon) -> None:
    run = tmp_path / "run"
    for _ in range(3):
        host.start()
        until = time.monotonic() + 10
        while (owners := [path.name.split("-")[1] for path in run.iterdir()]) != [str(host.pid)]:
            assert time.monotonic() < until, owners
            time.sleep(0.05)
        host.end()
    assert len(list(run.iterdir())) == 1
    host.start()
    assert host.stop() == 0
    assert list(run.iterdir()) == []
