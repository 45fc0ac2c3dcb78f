"""`storaged-host` killed with -9 at every step of a resize, on a btrfs behind a loop device with a real storaged."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from lab.daemon import Daemon
from lab.loop import Guest, fill, workspace
from storaged.host import superblock
from storaged.rpc.proto import storaged_host_v1_pb2 as pb
from storaged.rpc.proto import storaged_host_v1_pb2_grpc
from storaged.units import GIB, MIB
from tests.btrfs import support
from tests.btrfs.support import hashes, until

pytestmark = pytest.mark.btrfs
SMALL, MIDDLE, LARGE = 1 * GIB, 3 * GIB // 2, 2 * GIB
KILLED = "tests.host.killed"
WITHIN_S = 60.0
"""A host is up, an answer there: on a machine that has much else to do."""
DEAD = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
"""What a call to a process says that ends meanwhile."""
ENDED = {pb.RESIZE_DONE, pb.RESIZE_FAILED, pb.RESIZE_CANCELLED}


@dataclass
class Bench:
    """A guest with its daemon, and what starts a host beside it."""

    directory: Path
    guest: Guest
    daemon: Daemon

    @property
    def socket(self) -> Path:
        return self.directory / "host.sock"

    @property
    def config(self) -> Path:
        return self.directory / "host.toml"

    def configure(self) -> None:
        """Write the host's settings."""
        self.config.write_text(f"""
[serve]
listen = ["unix:{self.directory}/host.sock"]
[resize]
state_dir = "{self.directory}/state"
poll_s = 0.02
patience_s = 60
[sharing]
reserve_least = "16MiB"
base = "64MiB"
[pool.p]
path = "{self.directory}"
[guest.g]
address = "unix:{self.directory}/g/storaged.sock"
image = "{self.guest.image}"
""")

    def sizes(self) -> tuple[int, int]:
        """Image and filesystem, as they are on the disk; the one thing that must always hold is checked."""
        image, filesystem = os.stat(self.guest.image).st_size, superblock.read(str(self.guest.image)).size
        assert image >= filesystem
        return image, filesystem


@pytest.fixture
def bench() -> Iterator[Bench]:
    with workspace() as directory:
        guest = Guest(directory / "g", SMALL)
        with Daemon(directory / "g", stateful=guest.mountpoint) as daemon:
            fill(guest.mountpoint / "data", 200 * MIB)
            bench = Bench(directory, guest, daemon)
            bench.configure()
            yield bench
        guest.close()


class Host:
    """The daemon as a process; `dies_at`: it kills itself before its n-th step, `dies_after`: behind it."""

    def __init__(self, bench: Bench, dies_at: int | None = None) -> None:
        self._bench = bench
        self._dies = dies_at is not None
        environment = {**os.environ, "DIES_AT": str(dies_at if dies_at is not None else -1)}
        self._log = (bench.directory / "host.log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", KILLED, "serve", "--config", str(bench.config)], stderr=self._log, env=environment
        )
        self._channel = grpc.insecure_channel(f"unix:{bench.socket}", options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = storaged_host_v1_pb2_grpc.HostStub(self._channel)

    def resizable(self) -> None:
        """Wait until it knows its guest."""
        ends = time.monotonic() + WITHIN_S
        while True:
            try:
                if self.stub.ListGuests(pb.ListGuestsRequest(), timeout=5).guests[0].HasField("filesystem_bytes"):
                    return
            except grpc.RpcError:
                assert self.process.poll() is None, (self._bench.directory / "host.log").read_text()
            assert time.monotonic() < ends
            time.sleep(0.02)

    def free(self) -> int:
        return self.stub.GetPool(pb.GetPoolRequest(name="p"), timeout=5).free_bytes

    def resize(self, size: int) -> pb.Resize:
        return self.stub.Resize(pb.ResizeRequest(guest="g", size_bytes=size), timeout=20).resize

    def ends(self, wanted: str, within_s: float = 2 * WITHIN_S) -> pb.Resize:
        """Follow it to its end; the image is looked at all the time."""
        ends = time.monotonic() + within_s
        for report in self.stub.Watch(pb.WatchRequest(), timeout=within_s):
            self._bench.sizes()
            found = next((each for each in report.resizes if each.id == wanted), None)
            if found is not None and found.state in ENDED:
                if found.state == pb.RESIZE_DONE:  # who asks next must not be told what was
                    guest = report.guests[0]
                    told = guest.logical_bytes, guest.filesystem_bytes
                    assert told == (found.image_bytes, found.filesystem_bytes), report
                return found
            assert time.monotonic() < ends, found
        raise AssertionError(wanted)

    def resizes(self) -> list[pb.Resize]:
        """All it knows, ended ones too."""
        return list(next(iter(self.stub.Watch(pb.WatchRequest(), timeout=WITHIN_S))).resizes)

    def killed(self) -> bool:
        """Wait for its end: whether it killed itself."""
        return self.process.wait(WITHIN_S) == -signal.SIGKILL

    def close(self) -> None:
        self._channel.close()
        self._log.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            # The last steps come after the end was told, and while it stops: it may die in those as well.
            assert self.process.wait(WITHIN_S) in ((0, -signal.SIGKILL) if self._dies else (0,))


def _ask(host: Host, size: int) -> str | None:
    """The resize's id; None when the host died before it said that it would do it."""
    try:
        host.resizable()
        return host.resize(size).id
    except (grpc.RpcError, AssertionError) as error:
        if isinstance(error, grpc.RpcError) and error.code() not in DEAD:
            raise  # it lives, and refuses
        assert host.killed()
        return None


def test_there_and_back(bench: Bench) -> None:
    host = Host(bench)
    try:
        host.resizable()
        cost = bench.guest.host_bytes()
        begun = host.resize(LARGE)
        assert (begun.from_bytes, begun.to_bytes) == (SMALL, LARGE)
        grown = host.ends(begun.id)
        assert (grown.state, grown.from_bytes, grown.progress) == (pb.RESIZE_DONE, SMALL, 1.0), grown
        assert bench.sizes() == (LARGE, LARGE)
        assert bench.guest.host_bytes() < cost + 64 * MIB, "the image stays sparse"
        shrunk = host.ends(host.resize(SMALL).id)
        assert shrunk.state == pb.RESIZE_DONE, shrunk
        assert bench.sizes() == (SMALL, SMALL)
        for size, code in ((SMALL // 8, grpc.StatusCode.OUT_OF_RANGE), (5, grpc.StatusCode.INVALID_ARGUMENT)):
            with pytest.raises(grpc.RpcError) as refused:
                host.resize(size)
            assert refused.value.code() is code
        pool = host.stub.GetPool(pb.GetPoolRequest())
        assert pool.free_bytes > 0
        assert pool.history
        assert pool.total_bytes >= pool.free_bytes
    finally:
        host.close()


def _high(bench: Bench) -> None:
    """Bring the guest to `LARGE` with data at its far end, which a shrink has to move."""
    _bring(bench, LARGE)
    fill(bench.guest.mountpoint / "near", 1000 * MIB)
    fill(bench.guest.mountpoint / "far", 500 * MIB)
    (bench.guest.mountpoint / "near").unlink()
    os.sync()


def test_a_cancel_takes_it_all_back(bench: Bench) -> None:
    _high(bench)
    content = hashes(bench.guest.mountpoint)
    host = Host(bench)
    try:
        host.resizable()
        wanted = host.resize(MIDDLE).id
        told = host.stub.CancelResize(pb.CancelResizeRequest(guest="g"), timeout=20).resize
        assert (told.id, told.state) == (wanted, pb.RESIZE_CANCELLING)
        ended = host.ends(wanted)
        assert ended.state == pb.RESIZE_CANCELLED, ended
        assert (ended.image_bytes, ended.filesystem_bytes) == bench.sizes() == (LARGE, LARGE)
        with pytest.raises(grpc.RpcError) as late:
            host.stub.CancelResize(pb.CancelResizeRequest(id=wanted), timeout=20)
        assert late.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    finally:
        host.close()
    assert hashes(bench.guest.mountpoint) == content


def test_a_guests_agent_that_dies_at_work_costs_nothing(bench: Bench) -> None:
    _high(bench)
    content = hashes(bench.guest.mountpoint)
    host = Host(bench)
    try:
        host.resizable()
        wanted = host.resize(MIDDLE).id
        ends = time.monotonic() + 20
        while not bench.daemon.status().resize_in_progress:
            assert time.monotonic() < ends
        bench.daemon.kill()
        bench.sizes()
        bench.daemon.start()
        ended = host.ends(wanted)
        image, filesystem = bench.sizes()
        if ended.state == pb.RESIZE_DONE:  # the kernel had gone on without the agent
            assert (image, filesystem) == (MIDDLE, MIDDLE)
        else:
            assert ended.state == pb.RESIZE_FAILED
            assert image == LARGE, "never cut while it is not known"
            assert (ended.image_bytes, ended.filesystem_bytes) == (image, filesystem)
        # What was moved until then may lie otherwise now.
        again = max(MIDDLE, bench.daemon.minimum())
        assert host.ends(host.resize(again).id).state == pb.RESIZE_DONE
        assert bench.sizes() == (again, again)
    finally:
        host.close()
    assert hashes(bench.guest.mountpoint) == content


def test_a_balloon_makes_way_on_a_host_that_is_nearly_full(pool: Path) -> None:
    guest = Guest(pool / "g", 6 * GIB)
    try:
        with Daemon(pool / "g", stateful=guest.mountpoint) as daemon:
            bench = Bench(pool, guest, daemon)
            bench.configure()
            fill(guest.mountpoint / "data", 300 * MIB)
            content = hashes(guest.mountpoint)
            host = Host(bench)
            try:
                host.resizable()
                until(lambda: daemon.report().balloon.size_bytes > 2 * GIB)
                before = daemon.available()
                ended = host.ends(host.resize(2 * GIB).id)
                assert ended.state == pb.RESIZE_DONE, ended
                assert bench.sizes() == (2 * GIB, 2 * GIB)
                assert daemon.available() <= before + 64 * MIB, "no room that the host has not"
                ended = host.ends(host.resize(8 * GIB).id)
                assert ended.state == pb.RESIZE_DONE, ended
                assert bench.sizes() == (8 * GIB, 8 * GIB)
                until(lambda: daemon.report().balloon.size_bytes > 4 * GIB)
                assert daemon.available() <= before + 64 * MIB
            finally:
                host.close()
            assert hashes(guest.mountpoint) == content
    finally:
        guest.close()


def test_a_host_that_cannot_carry_a_shrink_begins_none(pool: Path) -> None:
    guest = Guest(pool / "g", 2 * GIB)
    try:
        with Daemon(pool / "g", stateful=guest.mountpoint) as daemon:
            bench = Bench(pool, guest, daemon)
            bench.configure()
            fill(guest.mountpoint / "data", 300 * MIB)
            support.sync(guest)
            # Before the host looks: who writes that much meanwhile makes its reserve larger, for a while.
            stats = os.statvfs(pool)
            with (pool / "others").open("wb") as others:
                os.posix_fallocate(others.fileno(), 0, stats.f_bavail * stats.f_frsize - 350 * MIB)
            host = Host(bench)
            try:
                host.resizable()
                with pytest.raises(grpc.RpcError) as refused:
                    host.resize(GIB)
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert "the pool cannot carry it" in str(refused.value.details())
                assert not daemon.report().HasField("job"), "the guest was not asked"
                (pool / "others").unlink()
                until(lambda: host.free() > 500 * MIB)
                assert host.ends(host.resize(GIB).id).state == pb.RESIZE_DONE
                assert bench.sizes() == (GIB, GIB)
            finally:
                host.close()
    finally:
        guest.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("start", "to"),
    [
        pytest.param(SMALL, LARGE, id="grow", marks=pytest.mark.slow),
        pytest.param(LARGE, SMALL, id="shrink"),
    ],
)
def test_killed_at_every_step(bench: Bench, start: int, to: int) -> None:
    died = resumed = 0
    seen = {each.id for each in _bring(bench, LARGE)} if start == LARGE else set()
    for step in itertools.count():
        host = Host(bench, step)
        try:
            wanted = _ask(host, to)
            if wanted is not None:
                try:
                    host.ends(wanted)
                except (grpc.RpcError, AssertionError):
                    assert host.killed()
        finally:
            host.close()
        bench.sizes()
        if host.process.returncode == 0:
            break
        died += 1
        host = Host(bench)
        try:
            host.resizable()
            # Whether or not it came to say so: what it had begun may have ended since.
            begun = [each.id for each in host.resizes() if each.id not in seen]
            assert begun == [wanted] or (wanted is None and len(begun) <= 1), (begun, wanted)
            if begun:
                ended = host.ends(begun[0])
                assert ended.state == pb.RESIZE_DONE, ended
                resumed += ended.resumed
                assert bench.sizes() == (to, to)
            if bench.sizes() != (start, start):
                assert host.ends(host.resize(start).id).state == pb.RESIZE_DONE
            assert bench.sizes() == (start, start)
            seen |= {each.id for each in host.resizes()}
        finally:
            host.close()
    assert died >= 10, "it died at every one of them"
    assert resumed >= 8, "and most times it had begun"
    assert bench.sizes() == (to, to)
    bench.daemon.stop()
    bench.guest.unmount()
    bench.guest.check()


def _bring(bench: Bench, size: int) -> list[pb.Resize]:
    """Bring the guest to `size`, undisturbed; all resizes that are known then."""
    if bench.sizes() == (size, size):
        return []
    host = Host(bench)
    try:
        host.resizable()
        assert host.ends(host.resize(size).id).state == pb.RESIZE_DONE
        assert bench.sizes() == (size, size)
        return host.resizes()
    finally:
        host.close()
