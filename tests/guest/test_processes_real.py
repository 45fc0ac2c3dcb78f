"""Real children: what they see when they start, what is known of their end, and that none is ever left dead."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storaged.guest.processes import Child, Outcome, Processes, ProcessSettings, Spawner, Status, parse_launch
from storaged.guest.reaper import dead_children
from storaged.guest.spawn import RealSpawner, hand_down_default_signals
from storaged.sim.processes import SimSpawner

SETTINGS = ProcessSettings(console="/dev/null")


@pytest.fixture(params=["sim", "real"])
async def spawner(request: pytest.FixtureRequest) -> AsyncIterator[Spawner]:
    """Both worlds."""
    one: Spawner = SimSpawner() if request.param == "sim" else RealSpawner(SETTINGS)
    yield one
    one.close()


def kill(spawner: Spawner, child: Child, number: int) -> None:
    """As kill(2), in either world."""
    if isinstance(spawner, SimSpawner):
        spawner.kill(child.pid, number)
    else:
        os.kill(child.pid, number)


# --- the contract of both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "code"), [("true", 0), ("/bin/true", 0), ("false", 1)])
async def test_an_exit_status(spawner: Spawner, program: str, code: int) -> None:
    child = await spawner.start(parse_launch([program]))
    assert await asyncio.wait_for(child.ended, 10) == Outcome(Status.EXITED, code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGRTMIN + 3])
async def test_a_signal(spawner: Spawner, number: int) -> None:
    child = await spawner.start(parse_launch(["sleep", "100"]))
    assert not child.ended.done()
    kill(spawner, child, number)
    assert await asyncio.wait_for(child.ended, 10) == Outcome(Status.SIGNALED, number)
    with pytest.raises(ProcessLookupError):
        kill(spawner, child, number)


async def test_a_program_that_is_not_there(spawner: Spawner) -> None:
    with pytest.raises(FileNotFoundError):
        await spawner.start(parse_launch(["no-such-program-anywhere"]))


async def test_closing_lets_them_run(spawner: Spawner) -> None:
    child = await spawner.start(parse_launch(["sleep", "100"]))
    spawner.close()
    assert not child.ended.done()
    if isinstance(spawner, RealSpawner):
        os.kill(child.pid, 0)
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)  # noqa: ASYNC222  # it is dead already


# --- what a child sees --------------------------------------------------------------------------------------------


async def run(*argv: str, env: dict[str, str] | None = None, found: dict[bytes, bytes] | None = None) -> Outcome:
    """Launch it for real, wait for its end."""
    processes = Processes(RealSpawner(SETTINGS, found))
    try:
        return await asyncio.wait_for(processes.launch(parse_launch(argv, env, wait=True)), 20)
    finally:
        await processes.close()


PYTHON = sys.executable


async def seen(tmp_path: Path, expression: str, env: dict[str, str] | None = None) -> str:
    """What a child finds `expression` to be."""
    out = tmp_path / "out"
    code = f"import os, signal, sys; open({str(out)!r}, 'w').write(str({expression}))"
    assert await run(PYTHON, "-I", "-S", "-c", code, env=env) == Outcome(Status.EXITED, 0)
    return out.read_text()


async def test_its_own_session(tmp_path: Path) -> None:
    assert await seen(tmp_path, "os.getsid(0) == os.getpid() == os.getpgrp()") == "True"


async def test_umask_directory_and_streams(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert await seen(tmp_path, "oct(os.umask(0))") == "0o22"
    finally:
        os.umask(before)
    assert await seen(tmp_path, "os.getcwd()") == "/"
    streams = await seen(tmp_path, "[os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)]")
    assert streams == str(["/dev/null"] * 3)


async def test_no_descriptor_of_ours(tmp_path: Path) -> None:
    leak = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        found = await seen(tmp_path, "[os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')[:-1]]")
    finally:
        os.close(leak)
    assert "/dev/zero" not in found


async def test_default_signals_though_we_ignore_and_block(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGUSR2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        hand_down_default_signals()
        os.kill(os.getpid(), signal.SIGHUP)  # is still ignored here
        out = tmp_path / "out"
        # cat, not Python, which ignores SIGPIPE itself.
        script = f"exec cat /proc/self/status > {out}"
        assert (await run("/bin/sh", "-c", script)).code == 0
        masks = dict(line.split(maxsplit=1) for line in out.read_text().splitlines() if line.startswith("Sig"))
        # But for 32 and 33: glibc keeps them to itself, and whoever started us may have ignored them.
        assert int(masks["SigIgn:"], 16) & ~(0b11 << 31) == 0
        assert int(masks["SigBlk:"], 16) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        for number, handler in zip((signal.SIGHUP, signal.SIGUSR2), before, strict=True):
            signal.signal(number, handler)


async def test_environment_is_ours_with_what_was_asked_for_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGED_TEST_KEPT", "kept")
    monkeypatch.setenv("STORAGED_TEST_OVER", "old")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/ours")
    names = ("STORAGED_TEST_KEPT", "STORAGED_TEST_OVER", "STORAGED_TEST_NEW", "NOTIFY_SOCKET")
    found = await seen(
        tmp_path,
        f"[os.environ.get(n) for n in {names}]",
        {"STORAGED_TEST_OVER": "new", "STORAGED_TEST_NEW": "ä b=c\nd"},
    )
    assert found == str(["kept", "new", "ä b=c\nd", None])


async def test_the_program_is_found_on_the_path_it_gets(tmp_path: Path) -> None:
    program = tmp_path / "only-here"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    assert await run("only-here", env={"PATH": str(tmp_path)}) == Outcome(Status.EXITED, 7)
    assert await run("only-here") == Outcome(Status.FAILED)


@pytest.mark.parametrize("word", ["$(touch X)", "; touch X", "`touch X`", "| touch X", "a\nb", "*", "~", "$HOME", ""])
async def test_no_shell_reads_an_argument(tmp_path: Path, word: str) -> None:
    mark = tmp_path / "mark"
    out = tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write(sys.argv[1])"
    asked = word.replace("X", str(mark))
    assert (await run(PYTHON, "-I", "-S", "-c", code, asked)).code == 0
    assert out.read_text() == asked
    assert not mark.exists()
    assert await run(f"true {asked}") == Outcome(Status.FAILED), "one word is one program"


@pytest.mark.parametrize("kind", ["missing", "directory", "not executable", "no program", "empty", "too long"])
async def test_what_the_kernel_does_not_start_has_failed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "p"
    match kind:
        case "directory":
            path.mkdir()
        case "not executable":
            path.write_text("#!/bin/sh\n")
        case "no program":
            path.write_text(f"touch {tmp_path}/mark\n")
            path.chmod(0o755)
    argv = [""] if kind == "empty" else ["true", "x" * (1 << 21)] if kind == "too long" else [str(path)]
    assert await run(*argv) == Outcome(Status.FAILED)
    assert not (tmp_path / "mark").exists(), "a shell ran it"
    assert dead_children() == set()


async def test_the_console(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        for console, text in ((os.ttyname(theirs), b"hello"), (str(tmp_path / "none"), b"")):
            processes = Processes(RealSpawner(ProcessSettings(console=console)))
            outcome = await processes.launch(parse_launch(["echo", "hello"], console=True, wait=True))
            assert outcome == Outcome(Status.EXITED, 0), "without a console it still runs"
            await processes.close()
            assert bool(select.select([ours], [], [], 0)[0]) == bool(text)
            if text:
                assert os.read(ours, 100).strip() == text
    finally:
        os.close(ours)
        os.close(theirs)


# --- how it ends --------------------------------------------------------------------------------------------------


async def gone(pid: int) -> None:
    """Wait until there is no such process, dead or alive."""
    async with asyncio.timeout(10):
        while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC110, ASYNC240  # nothing tells of it
            await asyncio.sleep(0.01)


async def test_a_wait_that_is_given_up_leaves_the_child_running_and_then_reaped(tmp_path: Path) -> None:
    processes = Processes(RealSpawner(SETTINGS))
    mark = tmp_path / "pid"
    script = f"echo $$ > {mark}.new; mv {mark}.new {mark}; exec sleep 100"
    call = asyncio.create_task(processes.launch(parse_launch(["/bin/sh", "-c", script], wait=True)))
    async with asyncio.timeout(10):
        while not mark.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    pid = int(mark.read_text())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0.1)
    os.kill(pid, 0)
    assert processes.running == 1
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    assert processes.running == 0
    await processes.close()


async def test_nobody_waits_and_still_there_is_no_zombie() -> None:
    processes = Processes(RealSpawner(SETTINGS))
    for _ in range(50):
        assert (await processes.launch(parse_launch(["true"]))).status is Status.LAUNCHED
    async with asyncio.timeout(10):
        while processes.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert dead_children() == set()
    await processes.close()


async def test_a_broken_service_is_started_ten_times(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reports: list[int] = []

    async def report(name: str) -> None:
        assert name == "sh"
        reports.append(len(log.read_text().splitlines()))

    processes = Processes(RealSpawner(SETTINGS), report=report)
    await processes.launch(parse_launch(["/bin/sh", "-c", f"echo start >> {log}; kill -9 $$"], respawn=True))
    async with asyncio.timeout(20):
        while processes.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert log.read_text() == "start\n" * 10
    assert reports == list(range(1, 11))
    await processes.close()


async def test_descriptors_and_threads_do_not_pile_up() -> None:
    processes = Processes(RealSpawner(SETTINGS))
    await processes.launch(parse_launch(["true"], wait=True))
    before = len(os.listdir("/proc/self/fd"))
    await asyncio.gather(*(processes.launch(parse_launch(["true"], wait=True)) for _ in range(60)))
    assert len(os.listdir("/proc/self/fd")) == before
    await processes.close()
