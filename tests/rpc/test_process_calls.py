"""LaunchProcess as a host calls it, with real children; the startup folder; failure reports."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from storaged.errors import Kind, StoragedError
from storaged.guest.processes import Processes, ProcessSettings
from storaged.guest.reaper import dead_children
from storaged.guest.spawn import RealSpawner
from storaged.rpc.crash import CrashReports
from storaged.rpc.proto import common_pb2, vm_crash_pb2, vm_crash_pb2_grpc
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.rpc.startup import run_startup
from storaged.sim.processes import SimSpawner
from tests.rpc.conftest import EMPTY, Guest, refused, until

Launch = vm.LaunchProcessRequest
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
async def launcher(guest: Guest) -> AsyncIterator[Guest]:
    """A guest that starts real programs; what it started is gone afterwards."""
    await guest.stop()
    guest.processes = Processes(RealSpawner(ProcessSettings()), ProcessSettings(startup="/nonexistent"))
    await guest.start()
    yield guest
    await guest.processes.close()


async def test_without_the_module_the_method_is_not_there(guest: Guest) -> None:
    code, _ = await refused(guest.maitred.LaunchProcess(Launch(argv=["true"])))
    assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (Launch(argv=["true"], wait_for_exit=True), vm.EXITED, 0),
        (Launch(argv=["sh", "-c", "exit 42"], wait_for_exit=True), vm.EXITED, 42),
        (Launch(argv=["sh", "-c", 'exit "$N"'], env={"N": "43"}, wait_for_exit=True), vm.EXITED, 43),
        (Launch(argv=["sh", "-c", "kill -TERM $$"], wait_for_exit=True), vm.SIGNALED, signal.SIGTERM),
        (Launch(argv=["true"]), vm.LAUNCHED, 0),
        (Launch(argv=["no-such-program"]), vm.FAILED, 0),
        (Launch(argv=["no-such-program"], wait_for_exit=True), vm.FAILED, 0),
        (Launch(argv=["no-such-program"], respawn=True), vm.FAILED, 0),
    ],
)
async def test_answers(launcher: Guest, request_: vm.LaunchProcessRequest, status: int, code: int) -> None:
    answer = await launcher.maitred.LaunchProcess(request_)
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Launch(), "argv"),
        (Launch(argv=["true"], respawn=True, wait_for_exit=True), "respawn"),
        (Launch(argv=["tr\0ue"]), "argv[0]"),
        (Launch(argv=["true"], env={"A=": ""}), "env name"),
        (Launch(argv=["true"], env={"A": "\0"}), "env A"),
    ],
)
async def test_refusals_name_the_field_and_start_nothing(
    launcher: Guest, request_: vm.LaunchProcessRequest, field: str
) -> None:
    code, text = await refused(launcher.maitred.LaunchProcess(request_))
    assert code is INVALID
    assert field in text
    assert launcher.processes is not None
    assert launcher.processes.running == 0


async def test_200_waits_at_once_stall_no_other_call(launcher: Guest) -> None:
    processes = launcher.processes
    assert processes is not None
    waits = [
        asyncio.ensure_future(launcher.maitred.LaunchProcess(Launch(argv=["sleep", "1000"], wait_for_exit=True)))
        for _ in range(200)
    ]

    async def all_run() -> bool:
        return processes.running == 200

    await until(all_run, 30)
    began = time.monotonic()
    for _ in range(20):
        assert not (await launcher.status()).resize_in_progress
        assert (await launcher.maitred.LaunchProcess(Launch(argv=["true"], wait_for_exit=True))).status == vm.EXITED
    assert (await launcher.report()).sequence
    assert time.monotonic() - began < 10, "nothing waits for the waits"
    assert not any(wait.done() for wait in waits)
    sleeping = set(children())
    assert len(sleeping) == 200
    for pid in sleeping:
        os.kill(pid, signal.SIGTERM)
    answers = await asyncio.wait_for(asyncio.gather(*waits), 30)
    assert {(answer.status, answer.code) for answer in answers} == {(vm.SIGNALED, signal.SIGTERM)}
    assert not dead_children() & sleeping


def children() -> list[int]:
    """Our `sleep`s."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8")
        except OSError:
            continue
        if "(sleep)" in stat and int(stat.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(int(name))
    return found


def there(pid: int) -> bool:
    """True while there is such a process, dead or alive."""
    return Path(f"/proc/{pid}").exists()


async def test_a_call_whose_deadline_passes_leaves_a_child_that_runs_and_is_reaped(launcher: Guest) -> None:
    request = Launch(argv=["sleep", "1000"], wait_for_exit=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await launcher.maitred.LaunchProcess(request, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.2)
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)

    async def gone() -> bool:
        return not there(pid) and launcher.processes is not None and not launcher.processes.running

    await until(gone)


# --- failure reports --------------------------------------------------------------------------------------------------


class Listener(vm_crash_pb2_grpc.CrashListenerServicer):
    """A host's crash listener."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def SendFailureReport(  # noqa: N802  # named as in the contract
        self, request: vm_crash_pb2.FailureReport, context: object
    ) -> common_pb2.EmptyMessage:
        self.names.append(request.failed_process)
        return EMPTY


async def test_the_host_hears_of_a_service_that_ended(launcher: Guest, tmp_path: Path) -> None:
    listener = Listener()
    server = grpc.aio.server()
    vm_crash_pb2_grpc.add_CrashListenerServicer_to_server(listener, server)
    server.add_insecure_port(f"unix:{tmp_path}/host")
    await server.start()
    processes = launcher.processes
    assert processes is not None
    processes._report = CrashReports(f"unix:{tmp_path}/host")
    try:
        answer = await launcher.maitred.LaunchProcess(Launch(argv=["/bin/false", "x"], respawn=True))
        assert answer.status == vm.LAUNCHED

        async def stays_down() -> bool:
            return not processes.running

        await until(stays_down, 30)
        assert listener.names == ["false"] * 10
    finally:
        await server.stop(0)


async def test_a_host_that_does_not_listen_is_said_to_be_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoragedError, match="UNAVAILABLE") as caught:
        await CrashReports(f"unix:{tmp_path}/nobody")("name")
    assert caught.value.kind is Kind.UNAVAILABLE


# --- the startup folder -----------------------------------------------------------------------------------------------


def folder(directory: Path, **files: str) -> ProcessSettings:
    """A startup folder with these requests."""
    for name, text in files.items():
        path = directory / name
        path.write_text(text)
        path.chmod(0o644)
    return ProcessSettings(startup=str(directory), startup_wait_s=0.3)


async def test_requests_are_carried_out_in_the_order_of_their_names(tmp_path: Path) -> None:
    requests, log = tmp_path / "requests", tmp_path / "log"
    requests.mkdir()
    text = 'argv: ["sh", "-c", "echo $NAME >> {log}"] env {{ key: "NAME" value: "{name}" }} wait_for_exit: true # why'
    names = ["20-b", "10-a", "30-c"]
    settings = folder(requests, **{name: text.format(log=log, name=name) for name in names})
    processes = Processes(RealSpawner(settings), settings)
    assert await run_startup(processes) == []
    assert log.read_text().split() == ["10-a", "20-b", "30-c"]
    await processes.close()


async def test_a_broken_file_is_told_of_and_keeps_no_other_back(tmp_path: Path) -> None:
    settings = folder(
        tmp_path,
        a_text="this is no request {",
        b_field='argv: "true" unknown: 3',
        c_empty="",
        d_both='argv: "true" respawn: true wait_for_exit: true',
        e_missing='argv: "no-such-program"',
        f_slow='argv: ["sleep", "100"] wait_for_exit: true',
        g_open='argv: "true"',
        z_good='argv: "true"',
    )
    (tmp_path / "g_open").chmod(0o666)
    (tmp_path / "h_binary").write_bytes(b"\xff\xfe")
    (tmp_path / "i_directory").mkdir()
    (tmp_path / "j_nowhere").symlink_to("nowhere")
    os.mkfifo(tmp_path / "k_pipe")
    spawner = SimSpawner()
    processes = Processes(spawner, settings)
    told = await asyncio.wait_for(run_startup(processes), 10)
    assert [sentence.split("/")[-1][:1] for sentence in told] == list("abcdefghijk"), told
    assert [launch.name for launch in spawner.started] == ["sleep", "true"]
    await processes.close()


async def test_no_folder_is_no_error(tmp_path: Path) -> None:
    settings = ProcessSettings(startup=str(tmp_path / "none"))
    assert await run_startup(Processes(SimSpawner(), settings)) == []
