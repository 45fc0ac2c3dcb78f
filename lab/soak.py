"""A soak: mixed calls for some minutes, and what the daemon holds meanwhile.

    python -m lab.soak [--seconds N] [--clients N] [--stateful DIR]

Flat means: from the second quarter to the last, memory grows by no more than a few megabytes, open files and threads
not at all, and no dead process is left. Without --stateful everything is simulated, and needs no root.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from lab.daemon import Daemon
from lab.requests import SEEDS
from storaged.rpc.proto import common_pb2, storaged_v1_pb2, storaged_v1_pb2_grpc, vm_guest_pb2_grpc
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.units import GIB, MIB

EMPTY = common_pb2.EmptyMessage()
SAMPLE_EVERY_S = 0.5
GROWTH = 3 * MIB
HANDLES = 4
"""Connections and threads of the moment in which a sample is taken."""
WRONG = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
HARMLESS = {"GetKernelVersion", "GetResizeStatus", "GetAvailableSpace", "GetResizeBounds"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon and its children hold. Bytes and counts."""

    at: float
    resident: int
    files: int
    threads: int
    zombies: int


@dataclass(slots=True)
class Outcome:
    """What was called, and what it cost."""

    calls: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    def faults(self) -> list[str]:
        """Why it was not flat; empty when it was."""
        quarter = len(self.samples) // 4
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        if not early:
            return ["too short to tell"]
        found = []
        for name, slack in (("resident", GROWTH), ("files", HANDLES), ("threads", HANDLES)):
            before = statistics.median(getattr(sample, name) for sample in early)
            after = statistics.median(getattr(sample, name) for sample in late)
            if after > before + slack:
                found.append(f"{name} grew from {before:g} to {after:g}")
        if self.samples[-1].zombies:
            found.append(f"{self.samples[-1].zombies} dead processes are left")
        if self.wrong:
            found.append(f"internal errors: {dict(self.wrong)}")
        return found

    def table(self) -> str:
        """A few lines for people."""
        step = max(len(self.samples) // 8, 1)
        lines = ["   s    resident  files  threads  dead"]
        lines += [
            f"{one.at:5.0f}  {one.resident / 1e6:7.1f} MB  {one.files:5}  {one.threads:7}  {one.zombies:4}"
            for one in [*self.samples[::step], self.samples[-1]]
        ]
        total = sum(self.calls.values())
        lines.append(f"{total} calls of {len(self.calls)} methods; answers: {dict(self.answers.most_common())}")
        return "\n".join(lines)


def sample(pid: int, began: float) -> Sample:
    """Now."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    values = dict(line.split(":", 1) for line in status.splitlines())
    zombies = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{name}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        zombies += state == "Z" and int(parent) == pid
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(
        time.monotonic() - began, int(values["VmRSS"].split()[0]) * 1024, files, int(values["Threads"]), zombies
    )


async def client(address: str, dice: random.Random, until: float, outcome: Outcome) -> None:
    """One host: connects anew now and then, calls whatever there is."""
    while time.monotonic() < until:
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            maitred: Any = vm_guest_pb2_grpc.MaitredStub(channel)
            storage: Any = storaged_v1_pb2_grpc.StorageStub(channel)
            for _ in range(dice.randrange(20, 200)):
                if time.monotonic() >= until:
                    return
                name, call = _call(maitred, storage, dice)
                outcome.calls[name] += 1
                try:
                    await call
                    outcome.answers["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    outcome.answers[error.code().name] += 1
                    if error.code() in WRONG and name != "Mount9P":  # there is no host with a 9P server
                        outcome.wrong[f"{name}: {error.details()}"] += 1
                await asyncio.sleep(dice.random() * 0.005)


def _call(maitred: Any, storage: Any, dice: random.Random) -> tuple[str, Any]:
    """A method and its call."""
    kind = dice.randrange(10)
    if kind < 4:
        name = dice.choice(sorted(HARMLESS))
        return name, getattr(maitred, name)(EMPTY, timeout=20)
    if kind == 4:
        return "GetReport", storage.GetReport(storaged_v1_pb2.GetReportRequest(), timeout=20)
    if kind == 5:
        return "Watch", _watched(storage)
    if kind == 6:
        free = dice.choice([0, GIB, 2 * GIB, 3 * GIB, 100 * GIB])
        request = vm.UpdateStorageBalloonRequest(state=dice.choice([0, 1, 1, 1, 2, 9]), free_space_bytes=free)  # type: ignore[arg-type]
        return "UpdateStorageBalloon", maitred.UpdateStorageBalloon(request, timeout=20)
    if kind == 7:
        size = dice.choice([4, 6, 8, 10, 100]) * GIB
        return "ResizeFilesystem", maitred.ResizeFilesystem(vm.ResizeFilesystemRequest(size=size), timeout=20)
    if kind == 8:
        return "CancelResize", storage.CancelResize(storaged_v1_pb2.CancelResizeRequest(), timeout=20)
    seed = dice.choice(
        [s for s in SEEDS if not isinstance(s, vm.ResizeFilesystemRequest | vm.UpdateStorageBalloonRequest)]
    )
    name = type(seed).__name__.removesuffix("Request").replace("NetworkConfig", "ConfigureNetwork")
    return name, getattr(maitred, name)(seed, timeout=dice.choice([0.01, 20]))


async def _watched(storage: Any) -> None:
    call = storage.Watch(storaged_v1_pb2.WatchRequest(min_interval_s=0.2), timeout=20)
    await call.read()
    call.cancel()


async def soak(daemon: Daemon, seconds: float, clients: int) -> Outcome:
    """Call for `seconds`, look all the time."""
    outcome = Outcome()
    began = time.monotonic()
    until = began + seconds
    hosts = [
        asyncio.create_task(client(daemon.address, random.Random(seed), until, outcome)) for seed in range(clients)
    ]
    while time.monotonic() < until:
        await asyncio.sleep(SAMPLE_EVERY_S)
        outcome.samples.append(await asyncio.to_thread(sample, daemon.pid, began))
    await asyncio.gather(*hosts)
    await asyncio.sleep(1)
    outcome.samples.append(sample(daemon.pid, began))
    return outcome


def main() -> int:
    """Soak, print, and fail unless it was flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--stateful", type=Path, help="a mounted btrfs that nobody needs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mode = () if arguments.stateful else ("--sim",)
        with Daemon(Path(directory), *mode, stateful=arguments.stateful) as daemon:
            outcome = asyncio.run(soak(daemon, arguments.seconds, arguments.clients))
    print(outcome.table())
    faults = outcome.faults()
    print("soak: " + ("flat" if not faults else "; ".join(faults)))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
