"""A real host disk that is promised more than twice: two storageds on btrfs, and the controller between them."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill, run
from storaged.host.watch import FilesystemSource
from storaged.units import GIB, MIB

RESERVE = 512 * MIB


@pytest.mark.slow
@pytest.mark.btrfs
def test_a_guest_that_writes_all_it_can_leaves_the_reserve_alone(pool: Path) -> None:
    guests = {name: Guest(pool / name, 4 * GIB) for name in ("a", "b")}
    try:
        lines = [f'[resize]\nstate_dir = "{pool.parent}/host-state"\n']
        lines += [f'[pool.p]\npath = "{pool}"\n[sharing]\nreserve_least = "{RESERVE}"\nbase = "128MiB"\n']
        for name, guest in guests.items():
            lines.append(f'[guest.{name}]\naddress = "unix:{pool}/{name}/storaged.sock"\nimage = "{guest.image}"\n')
        config = pool / "host.toml"
        config.write_text("".join(lines))
        with (
            Daemon(pool / "a", stateful=guests["a"].mountpoint) as a,
            Daemon(pool / "b", stateful=guests["b"].mountpoint) as b,
            (pool / "host.log").open("w") as log,
            subprocess.Popen(
                [sys.executable, "-m", "storaged.host", "serve", "--config", str(config)], stderr=log
            ) as host,
        ):
            try:
                ends = time.monotonic() + 20
                while not (a.report().pressure.host_free_bytes and b.report().pressure.host_free_bytes):
                    assert time.monotonic() < ends, (pool / "host.log").read_text()
                    time.sleep(0.2)
                time.sleep(2)
                assert a.available() + b.available() <= FilesystemSource(str(pool)).free() - RESERVE + 16 * MIB
                written = 0
                for turn in range(40):  # as an application that tries again a little later
                    wrote, number = fill(guests["a"].mountpoint / f"data{turn}")
                    assert number == errno.ENOSPC
                    written += wrote
                    if turn > 3 and wrote < 8 * MIB:
                        break
                    time.sleep(1)
                free = FilesystemSource(str(pool)).free()
                try:
                    run("sync", "-f", guests["a"].mountpoint)
                except RuntimeError as error:
                    stats = run("btrfs", "device", "stats", guests["a"].mountpoint)
                    pytest.fail(f"{error}; the host had {free // MIB} MiB; {stats}; {(pool / 'host.log').read_text()}")
                left = FilesystemSource(str(pool)).free()
                assert left >= RESERVE // 2, "half of it may go while guests are told"
                assert written > GIB, "most of what there was could be had"
                allowed = a.available() + b.available()
                assert allowed <= max(left - RESERVE, 0) + 16 * MIB, "and nothing of the reserve is anybody's"
            finally:
                host.send_signal(signal.SIGTERM)
                assert host.wait(10) == 0
        assert "Traceback" not in (pool / "host.log").read_text()
    finally:
        for guest in guests.values():
            guest.close()
