"""A short soak: mixed calls leave no file, no thread and no dead process behind. `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

from lab.daemon import Daemon
from lab.soak import Outcome, Sample, soak


async def test_mixed_calls_leave_nothing_behind(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        outcome = await soak(daemon, 8, 4)
    assert len(outcome.calls) >= 12
    assert sum(outcome.calls.values()) > 200
    assert not [fault for fault in outcome.faults() if not fault.startswith("resident")], outcome.table()


def test_what_grows_is_not_flat() -> None:
    growing = Outcome(samples=[Sample(n, 40_000_000 + n * 200_000, 20 + n, 20, 0) for n in range(80)])
    assert [fault.split()[0] for fault in growing.faults()] == ["resident", "files"]
    assert Outcome(samples=[Sample(n, 40_000_000, 20, 20, 1) for n in range(80)]).faults() == [
        "1 dead processes are left"
    ]
