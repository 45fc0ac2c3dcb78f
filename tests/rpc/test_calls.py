"""What every call has: counts for each end it can take, limits, a deadline, an identity; and a gate that can shut."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from storaged.config import LimitsConfig
from storaged.errors import Kind, StoragedError
from storaged.logs import REQUEST_ID, RPC_METHOD
from storaged.metrics.calls import CallsCollector
from storaged.metrics.collector import StorageCollector
from storaged.rpc import vsock
from storaged.rpc.calls import BUCKETS
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.rpc.vsock import Relay
from storaged.units import GIB
from tests.metrics.support import written
from tests.rpc.conftest import EMPTY, Guest, refused, until

CODE = grpc.StatusCode
Call = Callable[..., Awaitable[Any]]


def scraped(guest: Guest) -> dict[str, float]:
    """What Prometheus would read, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(written(CallsCollector(guest.server))):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = float(sample.value)
    return found


def handled(guest: Guest, method: str, service: str = "vm_tools.Maitred") -> dict[str, float]:
    """Ends of `method` by code, without those that never were."""
    pattern = re.compile(rf"grpc_server_handled_total\{{grpc_code=(\w+),grpc_method={method},grpc_service={service},")
    return {m[1]: value for name, value in scraped(guest).items() if (m := pattern.match(name)) and value}


def instead(guest: Guest, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    """Have GetAvailableSpace do `call`."""
    monkeypatch.setattr(guest.service, "available", call)


async def ask(guest: Guest, **options: Any) -> int:
    return int((await guest.maitred.GetAvailableSpace(EMPTY, **options)).available_space)


# --- counts ---------------------------------------------------------------------------------------------------


async def test_every_end_of_a_call_is_counted_by_its_code(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    await ask(guest)
    ends: list[Exception] = [StoragedError("no", kind) for kind in Kind] + [RuntimeError("broken"), TimeoutError()]
    for end in ends:

        async def fail(end: Exception = end) -> int:
            raise end

        instead(guest, monkeypatch, fail)
        await refused(ask(guest))
    wanted = {
        "OK": 1,
        "INVALID_ARGUMENT": 1,
        "OUT_OF_RANGE": 1,
        "NOT_FOUND": 1,
        "FAILED_PRECONDITION": 1,
        "ABORTED": 1,
        "UNAVAILABLE": 2,
        "UNIMPLEMENTED": 1,
        "INTERNAL": 2,
    }
    await until(lambda: _true(handled(guest, "GetAvailableSpace") == wanted))


async def test_the_cancelled_and_those_past_their_deadline_are_told_apart(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = asyncio.Event()

    async def hang() -> int:
        running.set()
        await asyncio.sleep(60)
        return 0

    instead(guest, monkeypatch, hang)
    code, _ = await refused(ask(guest, timeout=0.1))
    assert code is CODE.DEADLINE_EXCEEDED
    await until(lambda: _true(handled(guest, "GetAvailableSpace") == {"DEADLINE_EXCEEDED": 1}))
    running.clear()
    call = guest.maitred.GetAvailableSpace(EMPTY, timeout=30)
    await running.wait()
    call.cancel()
    await until(lambda: _true(handled(guest, "GetAvailableSpace") == {"DEADLINE_EXCEEDED": 1, "CANCELLED": 1}))
    assert guest.server._gate.running == {"unary": 0, "stream": 0}


async def _true(value: bool) -> bool:
    return value


async def test_streams_are_counted_when_they_end(guest: Guest) -> None:
    watch = guest.storage.Watch(pb.WatchRequest())
    await watch.read()
    assert handled(guest, "Watch", "storaged.v1.Storage") == {}
    watch.cancel()
    await until(lambda: _true(handled(guest, "Watch", "storaged.v1.Storage") == {"CANCELLED": 1}))
    bad = guest.storage.Watch(pb.WatchRequest(min_interval_s=math.inf))
    code, _ = await refused(bad.read())
    assert code is CODE.INVALID_ARGUMENT
    assert handled(guest, "Watch", "storaged.v1.Storage") == {"CANCELLED": 1, "INVALID_ARGUMENT": 1}


async def test_health_and_reflection_are_counted_too(guest: Guest) -> None:
    stub: Any = health_pb2_grpc.HealthStub(guest.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await refused(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    await until(lambda: _true(handled(guest, "Check", "grpc.health.v1.Health") == {"OK": 1, "NOT_FOUND": 1}))
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    await until(lambda: _true(handled(guest, "Watch", "grpc.health.v1.Health") == {"CANCELLED": 1}))
    channel: Any = guest.channel
    reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = reflect.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = [one.name async for answer in call for one in answer.list_services_response.service]
    assert "vm_tools.Maitred" in names
    service = "grpc.reflection.v1alpha.ServerReflection"
    await until(lambda: _true(handled(guest, "ServerReflectionInfo", service) == {"OK": 1}))


async def test_what_is_not_served_is_counted_without_names_of_the_callers_making(guest: Guest) -> None:
    guest.server._gate.limits = LimitsConfig()
    code, text = await refused(guest.maitred.SetUpUser(vm.SetUpUserRequest(username="u")))
    assert code is CODE.UNIMPLEMENTED
    assert "does not serve" in text
    await until(lambda: _true(handled(guest, "SetUpUser") == {"UNIMPLEMENTED": 1}))
    for number in range(20):
        call: Any = guest.channel.unary_unary(f"/vm_tools.Maitred/Made{number}")
        assert (await refused(call(b"")))[0] is CODE.UNIMPLEMENTED
    await until(lambda: _true(handled(guest, "unknown", "unknown") == {"UNIMPLEMENTED": 20}))
    assert not [name for name in scraped(guest) if "Made" in name]


async def test_durations_fall_into_their_buckets(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> int:
        await asyncio.sleep(BUCKETS[1])
        return 1

    await ask(guest)
    instead(guest, monkeypatch, slow)
    await ask(guest)
    found = scraped(guest)
    labels = "grpc_method=GetAvailableSpace,grpc_service=vm_tools.Maitred,grpc_type=unary"
    name = "grpc_server_handling_seconds"
    assert [found[f"{name}_bucket{{{labels},le={le}}}"] for le in ("0.1", "1.0", "10.0", "+Inf")] == [1, 2, 2, 2]
    assert found[f"{name}_count{{{labels}}}"] == 2
    assert BUCKETS[1] < found[f"{name}_sum{{{labels}}}"] < 2
    assert found[f"grpc_server_started_total{{{labels}}}"] == 2


async def test_the_calls_of_a_host_are_there_before_they_are_made(guest: Guest) -> None:
    found = scraped(guest)
    for method in ("UpdateStorageBalloon", "ResizeFilesystem", "GetResizeStatus"):
        labels = f"grpc_code=OK,grpc_method={method},grpc_service=vm_tools.Maitred,grpc_type=unary"
        assert found[f"grpc_server_handled_total{{{labels}}}"] == 0


async def test_a_guest_has_few_series(guest: Guest) -> None:
    sequence = (
        *("ConfigureNetwork", "SetResolvConfig", "SetTimezone", "Mount", "Mount9P", "StartTermina", "SetTime"),
        *("LaunchProcess", "GetKernelVersion", "UpdateStorageBalloon", "GetResizeStatus", "GetAvailableSpace"),
        *("GetResizeBounds", "ResizeFilesystem"),
    )
    for method in sequence:
        call: Any = guest.channel.unary_unary(f"/vm_tools.Maitred/{method}")
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call(b"")
    both = (StorageCollector(guest.service), CallsCollector(guest.server))
    lines = [line for line in written(*both).splitlines() if not line.startswith("#")]
    assert 60 < len(lines) <= 110, len(lines)


async def test_what_came_over_vsock_is_counted_when_there_is_a_relay(guest: Guest) -> None:
    assert not [name for name in scraped(guest) if "vsock" in name]
    guest.server.relay = Relay(guest.path)
    guest.server.relay.count("cid", 9)
    found = scraped(guest)
    assert found["storaged_vsock_dropped_total{reason=cid}"] == 1
    assert {f"storaged_vsock_dropped_total{{reason={reason}}}" for reason in vsock.REASONS} <= set(found)


# --- limits ---------------------------------------------------------------------------------------------------


async def test_calls_beyond_the_limit_are_refused_and_the_rest_lives_on(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def hang() -> int:
        await release.wait()
        return 7

    instead(guest, monkeypatch, hang)
    guest.server._gate.limits = LimitsConfig(calls=8, streams=2)
    calls = [asyncio.ensure_future(ask(guest)) for _ in range(40)]
    await until(lambda: _true(sum(call.done() for call in calls) == 32))
    watches = [guest.storage.Watch(pb.WatchRequest()) for _ in range(2)]
    for watch in watches:
        await watch.read()  # unary calls take no place from streams
    code, text = await refused(guest.storage.Watch(pb.WatchRequest()).read())
    assert (code, "2 calls" in text) == (CODE.RESOURCE_EXHAUSTED, True)
    release.set()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(end == 7 for end in ends) == 8
    codes = Counter(end.code() for end in ends if isinstance(end, grpc.aio.AioRpcError))
    # What a connection has too many of, HTTP/2 itself refuses: those never were calls.
    assert set(codes) <= {CODE.RESOURCE_EXHAUSTED, CODE.UNAVAILABLE}
    assert codes[CODE.RESOURCE_EXHAUSTED] >= 8
    counted = {"OK": 8, "RESOURCE_EXHAUSTED": codes[CODE.RESOURCE_EXHAUSTED]}
    await until(lambda: _true(handled(guest, "GetAvailableSpace") == counted))
    for watch in watches:
        watch.cancel()


async def test_a_call_without_a_deadline_gets_one(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = asyncio.Event()

    async def hang() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 0

    instead(guest, monkeypatch, hang)
    guest.server._gate.limits = LimitsConfig(call_s=0.1)
    code, text = await refused(ask(guest))
    assert code is CODE.DEADLINE_EXCEEDED
    assert "0.1 s" in text
    assert cancelled.is_set()
    assert handled(guest, "GetAvailableSpace") == {"DEADLINE_EXCEEDED": 1}


async def test_a_caller_s_own_deadline_may_be_longer(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> int:
        await asyncio.sleep(0.2)
        return 5

    instead(guest, monkeypatch, slow)
    guest.server._gate.limits = LimitsConfig(call_s=0.05)
    assert await ask(guest, timeout=30) == 5


async def test_a_request_that_is_too_large_is_refused_and_the_next_is_served(guest: Guest) -> None:
    most = LimitsConfig().message_bytes
    call: Any = guest.channel.unary_unary("/vm_tools.Maitred/GetResizeStatus")
    padding = bytes.fromhex("fa07")  # field 127, as bytes: unknown to the message, and kept
    code, _ = await refused(call(padding + b"\x80\x80\x04" + bytes(most)))
    assert code is CODE.RESOURCE_EXHAUSTED
    assert await call(padding + b"\x80\x80\x03" + bytes(3 << 14))
    assert (await guest.status()).current_size == 8 * GIB


# --- the gate -------------------------------------------------------------------------------------------------


async def test_while_the_gate_is_shut_nothing_new_begins_and_what_runs_ends(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def wait() -> int:
        await release.wait()
        return 3

    instead(guest, monkeypatch, wait)
    running = asyncio.ensure_future(ask(guest))
    await until(lambda: _true(guest.server._gate.running["unary"] == 1))
    guest.server.refuse("closed for today")
    for call in (
        guest.status(),
        guest.report_free(GIB),
        guest.resize(10 * GIB),
        guest.report(),
        guest.storage.Watch(pb.WatchRequest()).read(),
    ):
        assert await refused(call) == (CODE.UNAVAILABLE, "closed for today")
    stub: Any = health_pb2_grpc.HealthStub(guest.channel)
    await stub.Check(health_pb2.HealthCheckRequest())
    release.set()
    assert await running == 3
    assert guest.disk.size == 8 * GIB
    guest.server.refuse("")
    assert (await guest.status()).current_size == 8 * GIB


# --- identity -------------------------------------------------------------------------------------------------


async def _with_id(call: Any) -> str:
    await call
    return str(dict(await call.trailing_metadata())["x-request-id"])


async def test_a_call_has_an_identity_in_the_log_and_in_the_answer(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, str]] = []

    async def note() -> int:
        seen.append((REQUEST_ID.get(), RPC_METHOD.get()))
        return 0

    instead(guest, monkeypatch, note)
    assert await _with_id(guest.maitred.GetAvailableSpace(EMPTY, metadata=(("x-request-id", "host-1"),))) == "host-1"
    made = await _with_id(guest.maitred.GetAvailableSpace(EMPTY))
    other = await _with_id(guest.maitred.GetAvailableSpace(EMPTY))
    assert len({made, other, "host-1"}) == 3
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert seen == [(one, "/vm_tools.Maitred/GetAvailableSpace") for one in ("host-1", made, other)]
    for unfit in ("a b", "x" * 65, "new%0Aline"):
        kept = await _with_id(guest.maitred.GetAvailableSpace(EMPTY, metadata=(("x-request-id", unfit),)))
        assert re.fullmatch("[0-9a-f]{16}", kept)
    with caplog.at_level(logging.DEBUG, "storaged.rpc.calls"):
        await ask(guest)
    assert "GetAvailableSpace: OK after" in caplog.text


async def test_a_refused_call_has_an_identity_too(guest: Guest) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await guest.maitred.ResizeFilesystem(vm.ResizeFilesystemRequest(size=1), metadata=(("x-request-id", "host-2"),))
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "host-2"


# --- what is broken ends alone --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [RuntimeError("x"), RecursionError(), MemoryError(), SystemExit(3), AssertionError(), GeneratorExit(), OSError(5)],
)
async def test_whatever_a_call_ends_in_the_daemon_serves_on(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    async def fail() -> int:
        raise end

    instead(guest, monkeypatch, fail)
    code, text = await refused(ask(guest))
    assert code in (CODE.INTERNAL, CODE.UNKNOWN, CODE.CANCELLED)
    assert "Traceback" not in text
    assert await guest.report_free(3 * GIB) == vm.SUCCESS
    assert (await guest.status()).current_size == 8 * GIB


async def test_an_answer_that_cannot_be_sent_is_an_internal_error(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def many() -> int:
        return 1 << 70

    instead(guest, monkeypatch, many)
    assert (await refused(ask(guest)))[0] is CODE.INTERNAL
    await until(lambda: _true(handled(guest, "GetAvailableSpace") == {"INTERNAL": 1}))


async def test_a_message_that_quotes_too_much_is_cut(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> int:
        raise StoragedError("x" * 100_000, Kind.INVALID)

    instead(guest, monkeypatch, fail)
    code, text = await refused(ask(guest))
    assert code is CODE.INVALID_ARGUMENT
    assert len(text) < 2100
