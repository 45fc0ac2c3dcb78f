"""The daemon as a service: a real process, the manager's socket, signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import pytest

from storaged import cmdline
from storaged.app import daemon
from storaged.config import ServeConfig, Settings
from storaged.notify import Notifier
from storaged.rpc import ready
from storaged.rpc.proto import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc, vm_host_pb2_grpc
from storaged.units import GIB

EMPTY = common_pb2.EmptyMessage()


class Manager:
    """A service manager's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def hear(self) -> list[str]:
        """All that was said until now."""
        while True:
            try:
                self.said += self._socket.recv(1 << 16).decode().split("\n")
            except BlockingIOError:
                return self.said

    def wait(self, pattern: str, within_s: float = 20.0) -> None:
        """Until something that matches `pattern` was said."""
        until(lambda: any(re.fullmatch(pattern, line) for line in self.hear()), within_s, lambda: str(self.said))


def until(condition: Callable[[], bool], within_s: float = 20.0, why: Callable[[], str] = str) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.01)


class Daemon:
    """`storaged serve --sim` in a process of its own."""

    def __init__(self, directory: Path, manager: Manager | None, *arguments: str, watchdog_s: float = 0) -> None:
        self.socket = directory / "s"
        self.log = directory / "log"
        environment = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}
        if manager is not None:
            environment["NOTIFY_SOCKET"] = manager.path
        if watchdog_s:
            environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "storaged", "serve", "--sim", "--listen", f"unix:{self.socket}", *arguments],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def says(self, text: str) -> None:
        until(lambda: text in self.text(), why=self.text)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix:{self.socket}")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path / "notify")
    yield one
    one.close()


def test_it_is_ready_when_it_serves_and_says_what_it_does(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager, "--sim-speed", "64MiB") as daemon:
        manager.wait("READY=1")
        with daemon.channel() as channel:
            stub = vm_guest_pb2_grpc.MaitredStub(channel)
            assert stub.GetResizeStatus(EMPTY, timeout=5).current_size == 8 * GIB
            manager.wait("STATUS=no report from the host yet; balloon 0 B")
            request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_LOW, free_space_bytes=2 * GIB)
            stub.UpdateStorageBalloon(request, timeout=5)
            manager.wait(r"STATUS=LOW; balloon \d\.\d\d GiB")
            stub.ResizeFilesystem(vm_guest_pb2.ResizeFilesystemRequest(size=40 * GIB), timeout=5)
            manager.wait("STATUS=LOW; balloon .*; grow to 40.0 GiB: waits for its device")
        assert daemon.end() == 0
        manager.wait("STOPPING=1")
        assert manager.said.index("READY=1") < manager.said.index("STOPPING=1")
        assert not daemon.socket.exists()


def test_it_is_alive_until_it_hangs(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager, watchdog_s=0.6) as daemon:
        manager.wait("READY=1")
        until(lambda: manager.hear().count("WATCHDOG=1") >= 3)
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        before = manager.hear().count("WATCHDOG=1")
        time.sleep(0.6)
        assert manager.hear().count("WATCHDOG=1") == before
        daemon.process.send_signal(signal.SIGCONT)
        until(lambda: manager.hear().count("WATCHDOG=1") > before)
        assert daemon.end() == 0


def test_no_watchdog_no_sign_of_life(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager) as daemon:
        manager.wait("READY=1")
        time.sleep(0.3)
        assert daemon.end() == 0
        assert "WATCHDOG=1" not in manager.hear()


def test_without_a_manager_it_serves_all_the_same(tmp_path: Path) -> None:
    with Daemon(tmp_path, None) as daemon:
        daemon.says("serves a simulated filesystem")
        assert daemon.end(signal.SIGINT) == 0


def test_on_sigterm_running_calls_finish_and_a_resize_is_left_safe(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager, "--log-level", "debug") as daemon:
        manager.wait("READY=1")
        with daemon.channel() as channel:
            stub = vm_guest_pb2_grpc.MaitredStub(channel)
            stub.ResizeFilesystem(vm_guest_pb2.ResizeFilesystemRequest(size=40 * GIB), timeout=5)
            running = [stub.GetResizeBounds.future(EMPTY, timeout=10) for _ in range(50)]
            time.sleep(0.005)
            code = daemon.end()
            answers = [call.exception() or call.result() for call in running]
        assert code == 0
        for answer in answers:
            # Each was answered, or never begun: none was cut off.
            if isinstance(answer, Exception):
                assert code_of(answer) is grpc.StatusCode.UNAVAILABLE, answer
            else:
                assert answer.minimum_size
        assert "storaged was stopped" in daemon.text()


def code_of(error: Any) -> grpc.StatusCode:
    """The code in what a client's call raises."""
    code: grpc.StatusCode = error.code()
    return code


def write(file: Path, *tables: str) -> None:
    file.write_text("\n".join(tables), encoding="utf-8")


def test_on_sighup_new_settings_are_in_force_and_broken_ones_change_nothing(tmp_path: Path, manager: Manager) -> None:
    file = tmp_path / "storaged.toml"
    write(file, "[storage]\nlow_enter = '2GiB'")
    with Daemon(tmp_path, manager, "--config", str(file)) as daemon, daemon.channel() as channel:
        stub = vm_guest_pb2_grpc.MaitredStub(channel)

        def level(free: int) -> str:
            request = vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NORMAL, free_space_bytes=free)
            stub.UpdateStorageBalloon(request, timeout=5)
            until(lambda: any(line.startswith("STATUS=") and "no report" not in line for line in manager.hear()))
            return [line for line in manager.hear() if line.startswith("STATUS=")][-1].split(";")[0]

        def reload() -> None:
            count = manager.hear().count("READY=1")
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda: manager.hear().count("READY=1") > count)

        manager.wait("READY=1")
        assert level(5 * GIB) == "STATUS=NORMAL"
        write(
            file,
            "[storage]\nlow_enter = '6GiB'\nlow_leave = '8GiB'\n[limits]\ncalls = 5000\n[serve]\nlog_level = 'debug'",
        )
        reload()
        manager.wait("RELOADING=1")
        manager.wait(r"MONOTONIC_USEC=\d+")
        daemon.says("only a restart brings limits.calls")
        assert level(5 * GIB) == "STATUS=LOW"
        daemon.says("DEBUG storaged.rpc.calls")
        write(file, "[storage]\nlow_enter = '1PiB'")
        reload()
        daemon.says("the settings stay as they were: configuration")
        assert level(5 * GIB + 1) == "STATUS=LOW"
        os.unlink(file)
        reload()
        daemon.says("No such file")
        assert daemon.end() == 0


def test_a_daemon_carries_no_ssl() -> None:
    code = "import sys, storaged.__main__, storaged.app; sys.exit('ssl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sighup_without_a_file_ends_nothing(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager) as daemon:
        manager.wait("READY=1")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.says("no configuration file to read again")
        assert daemon.end() == 0


class Listener(vm_host_pb2_grpc.StartupListenerServicer):
    """A host that asks the guest something as soon as it hears of it."""

    def __init__(self, guest: Path) -> None:
        self.guest = guest
        self.sizes: list[int] = []

    def VmReady(self, request: common_pb2.EmptyMessage, context: Any) -> common_pb2.EmptyMessage:  # noqa: N802
        with grpc.insecure_channel(f"unix:{self.guest}") as channel:
            self.sizes.append(vm_guest_pb2_grpc.MaitredStub(channel).GetResizeStatus(EMPTY, timeout=5).current_size)
        return EMPTY


def test_the_host_is_told_when_it_can_be_answered(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "s")  # type: ignore[abstract]  # the other method answers UNIMPLEMENTED
    host = grpc.server(ThreadPoolExecutor(2))
    vm_host_pb2_grpc.add_StartupListenerServicer_to_server(listener, host)
    host.add_insecure_port(f"unix:{tmp_path}/host")
    host.start()
    try:
        with Daemon(tmp_path, None, "--notify-host", f"unix:{tmp_path}/host") as daemon:
            daemon.says("knows that we serve (attempt 1)")
            assert listener.sizes == [8 * GIB]
            assert daemon.end() == 0
    finally:
        host.stop(None).wait()


@pytest.mark.parametrize(
    ("notify_host", "port", "told"),
    [("host", 7777, "vsock:2:7777"), ("host", 1234, "vsock:2:1234"), ("vsock:2:9", 1234, "vsock:2:9")],
)
async def test_the_kernel_s_command_line_names_the_host_s_port(
    monkeypatch: pytest.MonkeyPatch, notify_host: str, port: int, told: str
) -> None:
    asked: list[str] = []

    async def tell(address: object, _config: object) -> bool:
        asked.append(str(address))
        return True

    monkeypatch.setattr(ready, "tell_host", tell)
    monkeypatch.setattr(cmdline, "read", lambda: cmdline.KernelOptions(listen_port=port))
    await daemon._tell_host(Settings(serve=ServeConfig(notify_host=notify_host)))
    assert asked == [told]


def test_shutdown_of_a_simulated_guest_ends_the_daemon_and_leaves_the_machine(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager) as daemon:
        manager.wait("READY=1")
        with daemon.channel() as channel:
            vm_guest_pb2_grpc.MaitredStub(channel).Shutdown(EMPTY, timeout=10)
        assert daemon.process.wait(10) == 0


def test_only_storage_has_no_shutdown(tmp_path: Path, manager: Manager) -> None:
    with Daemon(tmp_path, manager, "--only-storage") as daemon:
        manager.wait("READY=1")
        with daemon.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            vm_guest_pb2_grpc.MaitredStub(channel).Shutdown(EMPTY, timeout=10)
        assert code_of(caught.value) is grpc.StatusCode.UNIMPLEMENTED
        assert daemon.end() == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", "/nowhere.toml"], "/nowhere.toml: No such file"),
        (["--tls-cert", "/x"], "belong together"),
        (["--notify-host", "tcp:192.0.2.1:1"], "loopback"),
        (["--listen", "tcp:127.0.0.1:0"], "needs TLS"),
        (["--log-level", "loud"], "invalid choice"),
    ],
)
def test_what_makes_no_sense_ends_it_before_it_starts(tmp_path: Path, arguments: list[str], named: str) -> None:
    with Daemon(tmp_path, None, *arguments) as daemon:
        assert daemon.process.wait(20) == 2
        assert named in daemon.text()


def test_the_notifier_speaks_to_abstract_sockets_and_to_nobody_without_one(tmp_path: Path) -> None:
    name = f"storaged-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(f"\0{name}")
        one.settimeout(5)
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert one.recv(99) == b"READY=1"
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "/nowhere"}):
        notifier = Notifier(environment)
        notifier.ready()
        notifier.status("x")


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000"}, 3.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "x"}, 0.0),
        ({"WATCHDOG_USEC": "3000000"}, 0.0),
        ({}, 0.0),
    ],
)
def test_a_watchdog_is_ours_or_not(environment: dict[str, str], seconds: float) -> None:
    assert Notifier(environment).watchdog_s == seconds


def test_the_same_status_is_said_once(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "n")
    notifier = Notifier({"NOTIFY_SOCKET": manager.path})
    for text in ("a", "a", "b", "a"):
        notifier.status(text)
    assert manager.hear() == ["STATUS=a", "STATUS=b", "STATUS=a"]
    manager.close()


async def test_background_work_that_fails_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ZeroDivisionError("a fault of ours")

    task = daemon._watched(work())
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert "work ended by a fault of storaged: ZeroDivisionError" in caplog.text
