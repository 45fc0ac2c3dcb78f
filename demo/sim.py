"""The same engine on a simulated filesystem, for machines without root or btrfs."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from demo.screen import Screen, gib
from demo.world import free_port, watched
from lab.daemon import Daemon
from storaged.rpc.proto import storaged_v1_pb2, vm_guest_pb2
from storaged.units import GIB


def play(screen: Screen, directory: Path) -> list[str]:
    """Reports, a balloon, a resize; what did not hold."""
    failed: list[str] = []

    def check(claim: str, held: bool) -> None:
        screen.say(("✓ " if held else "✗ ") + claim, "green" if held else "bold red")
        if not held:
            failed.append(claim)

    rows: list[tuple[str, ...]] = []
    metrics = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as cleanup:
        daemon = cleanup.enter_context(Daemon(directory, "--sim-size", "8G", "--metrics", metrics))
        prometheus = watched(directory, [("sim", metrics)])
        if prometheus is not None:
            cleanup.callback(prometheus.stop)
            screen.say(f"Prometheus with storaged's rules and alerts, while this runs: {prometheus.url}")
        screen.say(f"metrics, while this runs: curl http://{metrics}/metrics")
        screen.scene("1. The filesystem is made smaller, then larger")
        for size in (max(daemon.minimum(), GIB), 12 * GIB):
            daemon.resize(size)
            status = daemon.wait_resized()
            job = daemon.report().job
            check(f"resized to {gib(size)}", status.current_size == size and job.state == storaged_v1_pb2.JOB_DONE)
        screen.scene("2. The host's disk fills up; the guest is told")
        for free in (8 * GIB, 4 * GIB, 2 * GIB, GIB):
            result = daemon.report_free(free)
            held = daemon.report().balloon.size_bytes
            check(
                f"host has {gib(free)}: balloon holds {gib(held)}, applications may write {gib(daemon.available())}",
                result == vm_guest_pb2.SUCCESS and daemon.available() <= max(free - GIB, 0) + GIB,
            )
            rows.append((gib(free), gib(held), gib(daemon.available())))
        screen.scene("3. The pressure goes; the balloon goes")
        daemon.report_free(64 * GIB)
        time.sleep(0.1)
        check("nothing is held back any more", daemon.report().balloon.size_bytes == 0)
    screen.table("What happened (simulated)", ("host free", "balloon", "may write"), rows)
    return failed
