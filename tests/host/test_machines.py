"""A machine is gone when its process is gone, whatever becomes of its PID file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storaged.host.machines import Machine
from storaged.host.model import Presence
from storaged.units import GIB
from tests.host.test_controller import running

Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that stand for machines; they end with the test."""
    processes = []

    def begin() -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(["sleep", "120"]))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.pid"


def _delete(path: Path) -> None:
    path.unlink()


def _garbage(path: Path) -> None:
    path.write_text("nonsense")


def _empty(path: Path) -> None:
    path.write_text("")


def _another(path: Path) -> None:
    path.write_text("1")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


LOST = [_delete, _garbage, _empty, _another, _directory]


@pytest.mark.parametrize("lose", LOST)
def test_a_process_that_lives_is_a_machine_that_runs(path: Path, start: Start, lose: Callable[[Path], None]) -> None:
    process = start()
    path.write_text(f"{process.pid}\n")
    machine = Machine(str(path))
    assert machine.runs()
    lose(path)
    assert machine.runs()
    process.kill()  # and not waited for: a zombie has ended as well
    ends = time.monotonic() + 1
    while machine.runs():
        assert time.monotonic() < ends
    assert machine.reason == f"pid {process.pid} exited"
    if lose is not _another:
        assert not machine.runs(), "what ended has ended, though its file says nothing"


def test_the_next_machine_is_found_after_the_last_has_ended(path: Path, start: Start) -> None:
    first, second = start(), start()
    path.write_text(f"{first.pid}\n")
    machine = Machine(str(path))
    assert machine.runs()
    path.write_text(f"{second.pid}\n")
    first.kill()
    first.wait()
    assert not machine.runs(), "one left"
    assert machine.reason == f"pid {first.pid} exited"
    assert machine.runs(), "another came"
    assert machine.reason == f"pid {second.pid}"


def test_a_stale_file_names_no_machine(path: Path, start: Start) -> None:
    process = start()
    process.kill()
    process.wait()
    path.write_text(f"{process.pid}\n")
    assert not Machine(str(path)).runs()


def test_a_process_that_has_the_number_of_an_ended_one_is_another(
    path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(f"{start().pid}\n")
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    machine = Machine(str(path))
    assert not machine.runs()
    assert not machine.runs()
    assert len(caplog.records) == 1
    assert f"{path} is stale" in caplog.text
    path.touch()
    assert machine.runs(), "written again: that is the machine"


def test_a_file_that_still_names_the_ended_process_names_no_other(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, other = start(), start()
    path.write_text(f"{process.pid}\n")
    machine = Machine(str(path))
    assert machine.runs()
    process.kill()
    process.wait()
    assert not machine.runs()
    opened = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", lambda _: opened(other.pid))  # the number is in use again
    assert not machine.runs()


@pytest.mark.parametrize("text", ["", "nonsense", "0", "-1", str(1 << 40), "\0"])
def test_a_file_that_names_no_process_leaves_its_machine_running(
    path: Path, start: Start, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(text)
    machine = Machine(str(path))
    assert machine.runs()
    assert machine.runs()
    assert len(caplog.records) == 1
    path.unlink()
    assert machine.runs(), "whatever it was, it was not seen to end"
    process = start()
    path.write_text(f"{process.pid}\n")
    assert machine.runs()
    process.kill()
    process.wait()
    assert not machine.runs()


def test_descriptors_are_given_back(path: Path, start: Start) -> None:
    before = len(os.listdir("/proc/self/fd"))
    process = start()
    path.write_text(f"{process.pid}\n")
    machine = Machine(str(path))
    for _ in range(3):
        assert machine.runs()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    process.kill()
    process.wait()
    for _ in range(3):
        machine.runs()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_guest_whose_pid_file_is_deleted_keeps_its_lease(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "storaged.host.members")
    pid_file, process = tmp_path / "b.pid", start()
    pid_file.write_text(f"{process.pid}\n")
    async with running(tmp_path, 20 * GIB, "a", "b", pid_files={"b": pid_file}) as bench:
        await bench.until(lambda: bench.bound("a") and bench.bound("b"))
        await bench.until(lambda: bench.allowed() > 8 * GIB)
        assert f"b: its machine runs (pid {process.pid})" in caplog.text
        pid_file.unlink()
        for _ in range(30):
            assert bench.controller.state.guests["b"].runs
            await asyncio.sleep(0.1)
        process.kill()
        took_s = await bench.until(lambda: bench.controller.state.guests["b"].presence is Presence.GONE)
        assert took_s < 1
        assert f"b: its machine has ended (pid {process.pid} exited)" in caplog.text


def test_a_machine_whose_agent_has_called_runs_whatever_the_file_says(path: Path, start: Start) -> None:
    machine = Machine(str(path))
    assert not machine.runs()
    machine.announced()
    assert [machine.runs() for _ in range(3)] == [True] * 3
    process = start()
    path.write_text(str(process.pid))
    assert machine.runs()
    process.kill()
    process.wait()
    assert [machine.runs() for _ in range(3)] == [False] * 3, "its process was known, and has ended"
    machine.announced()
    assert machine.runs(), "another one, whose file is not there yet"
    machine.close()


def test_a_fifo_for_a_pid_file_keeps_nobody_waiting(path: Path) -> None:
    os.mkfifo(path)
    machine = Machine(str(path))
    assert machine.runs(), "that cannot be known"
    assert "is not a regular file" in machine.reason


async def test_a_guest_that_announces_itself_without_a_pid_file_does_not_come_and_go(
    tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with running(tmp_path, 40 * GIB, "a", pid_files={"a": path}) as bench:
        for _ in range(8):
            bench.controller.ready("a")
            await asyncio.sleep(0.4)
        said = [record.message for record in caplog.records]
        assert len([text for text in said if "its machine runs" in text]) == 1
        assert not [text for text in said if "its machine has ended" in text]
        assert bench.bound("a")
