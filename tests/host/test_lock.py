"""Two controllers never share one state directory."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storaged.errors import ConfigError
from storaged.host.lock import locked

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    config = tmp_path / "host.toml"
    config.write_text(f'[pool.p]\npath = "{tmp_path}"\n[resize]\nstate_dir = "{tmp_path}/state"\n')
    processes = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(config)]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def _holds(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 20
    path = tmp_path / "state" / "lock"
    while not path.exists() or path.read_text() != f"{process.pid}\n":
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_controller_is_refused_until_the_first_has_ended(
    tmp_path: Path, start: Start, end: signal.Signals
) -> None:
    first = start()
    _holds(tmp_path, first)
    second = start()
    _, said = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"{tmp_path}/state' is in use by another storaged-host (process {first.pid})" in said
    assert said.count("\n") == 1
    assert first.poll() is None
    first.send_signal(end)
    first.wait(20)
    _holds(tmp_path, start())


def test_the_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(f"{tmp_path}/s"):
            with pytest.raises(ConfigError, match="in use"), locked(f"{tmp_path}/s"):
                pass
            with locked(f"{tmp_path}/other"):
                pass


def test_a_state_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"), locked(f"{tmp_path}/file/state"):
        pass


def test_one_that_cannot_be_written_is_locked_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = os.open

    def full(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opens(path, flags, mode)

    with locked(f"{tmp_path}/s"), monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(ConfigError, match="in use"), locked(f"{tmp_path}/s"):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with locked(f"{tmp_path}/s"):
            assert "no resize can be started" in caplog.text
            patch.undo()
            with pytest.raises(ConfigError, match="in use"), locked(f"{tmp_path}/s"):
                pass
