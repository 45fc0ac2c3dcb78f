"""The server itself: health, reflection, errors nobody foresaw, a restart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from storaged.errors import Kind
from storaged.rpc.extension import Storage as StorageServicer
from storaged.rpc.maitred import Maitred
from storaged.rpc.proto import storaged_v1_pb2 as pb
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.rpc.status import CODES
from storaged.sim.system import FOUND
from storaged.units import GIB
from tests.rpc.conftest import EMPTY, Guest, refused, until

LOW = vm.DISK_LOW


def test_every_kind_of_error_has_a_status_of_its_own() -> None:
    assert set(CODES) == set(Kind)
    assert len(set(CODES.values())) == len(Kind)
    assert grpc.StatusCode.OK not in CODES.values()


@pytest.mark.parametrize("name", ["", "vm_tools.Maitred", "storaged.v1.Storage"])
async def test_health(guest: Guest, name: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(guest.channel)  # described for blocking channels
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    code, _ = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_reflection(guest: Guest) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", guest.channel))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in answer.list_services_response.service}
        assert {"vm_tools.Maitred", "storaged.v1.Storage", "grpc.health.v1.Health"} <= names


def test_every_method_of_the_contract_is_there() -> None:
    assert {method.name for method in vm.DESCRIPTOR.services_by_name["Maitred"].methods} <= set(vars(Maitred))


async def test_bytes_that_are_no_message_harm_nobody(guest: Guest) -> None:
    for method in ("ResizeFilesystem", "UpdateStorageBalloon", "GetResizeStatus"):
        call: Any = guest.channel.unary_unary(f"/vm_tools.Maitred/{method}")
        code, _ = await refused(call(b"\xff\xff\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await guest.status()).current_size == 8 * GIB


async def test_an_error_nobody_foresaw_is_internal_and_the_daemon_lives(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(guest.service, "bounds", broken)
    code, text = await refused(guest.maitred.GetResizeBounds(EMPTY))
    assert code is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in text
    assert "secret detail" not in text
    assert (await guest.status()).current_size == 8 * GIB


async def test_a_broken_step_is_told_to_whoever_waits_and_ends_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("storaged.writer.machine.step", broken)
        code, _ = await refused(guest.report_free(3 * GIB))
        assert code is grpc.StatusCode.INTERNAL
    assert await guest.report_free(3 * GIB) == vm.SUCCESS


def test_every_method_of_the_extension_is_served() -> None:
    for method in pb.DESCRIPTOR.services_by_name["Storage"].methods:
        assert method.name in vars(StorageServicer)


async def test_the_kernel_names_itself(guest: Guest) -> None:
    answer = await guest.maitred.GetKernelVersion(EMPTY)
    assert answer.kernel_release
    assert answer.kernel_version


async def test_a_restart_finds_limit_level_and_write_back_limits_again(guest: Guest) -> None:
    await guest.report_free(2 * GIB, LOW)
    held = guest.world.balloon.size()
    await guest.stop()
    guest.config = replace(guest.config, settle_s=0.05)
    await guest.start()
    report = await guest.report()
    assert report.pressure.level == pb.LEVEL_LOW
    assert report.pressure.host_free_bytes == 2 * GIB
    assert report.balloon.limit_bytes == GIB
    assert guest.world.balloon.size() == held
    await guest.report_free(9 * GIB)

    async def normal() -> bool:
        return guest.sysctl.limits == FOUND

    await until(normal)
