"""Orphans: all are reaped, as process 1 and as a subreaper, and nobody else's child is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storaged.guest.reaper import dead_children

PYTHON = sys.executable

ORPHANS = """
import asyncio, os, subprocess, sys
from storaged.guest.processes import Processes, ProcessSettings, parse_launch
from storaged.guest.reaper import Reaper, become_subreaper, dead_children
from storaged.guest.spawn import RealSpawner

async def main():
    if os.getpid() != 1:
        become_subreaper()
    reaper = Reaper()
    processes = Processes(RealSpawner(ProcessSettings()))
    # Children whose statuses somebody will ask for, much later than they end.
    theirs = [subprocess.Popen(["sh", "-c", f"exit {n}"]) for n in (3, 4, 5)]
    through_asyncio = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0.3; exit 6")
    orphans = "for i in 1 2 3 4 5 6 7 8; do (sleep 0.2; exit 9) & done; exit 7"
    outcome = await processes.launch(parse_launch(["sh", "-c", orphans], wait=True))
    assert outcome.code == 7, outcome
    for _ in range(100):
        await asyncio.sleep(0.1)
        if reaper.reaped == 8 and through_asyncio.returncode is not None:
            break
    await asyncio.sleep(1.5)
    assert reaper.reaped == 8, reaper.reaped
    assert dead_children() == {p.pid for p in theirs}, "theirs are left to them"
    assert [p.wait() for p in theirs] == [3, 4, 5]
    assert await through_asyncio.wait() == 6
    assert dead_children() == set()
    reaper.close()
    await processes.close()
    print("fine as", os.getpid())

asyncio.run(main())
"""


@pytest.mark.parametrize("as_init", [False, True])
def test_orphans_are_reaped_and_no_status_is_stolen(as_init: bool) -> None:
    prefix: list[str] = []
    if as_init:
        if os.geteuid():
            pytest.skip("needs root for a process id namespace")
        prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*prefix, PYTHON, "-c", ORPHANS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "fine as" in done.stdout
    assert ("fine as 1\n" in done.stdout) == as_init


YOUNG = """
import asyncio, os
from storaged.guest.reaper import Reaper

async def main():
    reaper = Reaper()
    # As between a fork and the moment when somebody knows the number of the child.
    child = os.fork()
    if not child:
        os._exit(3)
    await asyncio.sleep(0.6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, os.WNOHANG)[1]) == 3
    if not (never := os.fork()):
        os._exit(4)
    await asyncio.sleep(2.5)
    assert reaper.reaped == 1
    assert not os.path.exists(f"/proc/{never}")

asyncio.run(main())
"""


def test_a_dead_child_is_nobodys_for_a_second() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([PYTHON, "-c", YOUNG], capture_output=True, text=True, timeout=60, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_a_dead_child_is_seen_until_somebody_waits() -> None:
    child = subprocess.Popen(["true"])
    until = time.monotonic() + 10
    while child.pid not in dead_children():
        assert time.monotonic() < until
        time.sleep(0.01)
    child.wait()
    assert child.pid not in dead_children()
