"""Mounts, containers and users as a host calls them, on the simulation: answers, statuses, what a refusal changes."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from storaged.guest.containers import Containers
from storaged.guest.mounts import Mounts
from storaged.guest.processes import Processes
from storaged.guest.termina import Termina
from storaged.guest.users import Users
from storaged.rpc.proto import vm_guest_pb2 as vm
from storaged.sim.mounts import SimMounts
from storaged.sim.processes import SimSpawner
from storaged.sim.users import SimToken, SimUsers
from tests.rpc.conftest import Guest, refused

INVALID, INTERNAL = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL
HOST = 0x015C7364  # 100.115.92.1: its four bytes, read as a little-endian number


@dataclass
class Whole:
    """A guest with every module of this kind, in memory."""

    guest: Guest
    kernel: SimMounts
    spawner: SimSpawner
    token: SimToken
    users: SimUsers


@pytest.fixture
async def whole(guest: Guest) -> AsyncIterator[Whole]:
    """Such a guest."""
    await guest.stop()
    one = Whole(guest, SimMounts(), SimSpawner(), SimToken(), SimUsers())
    guest.processes = Processes(one.spawner)
    guest.mounts = Mounts(one.kernel)
    guest.termina = Termina(guest.mounts, guest.processes)
    guest.containers = Containers(one.token)
    guest.users = Users(one.users)
    await guest.start()
    yield one
    await guest.processes.close()


async def test_mount(whole: Whole) -> None:
    maitred = whole.guest.maitred
    request = vm.MountRequest(
        source="s",
        target="/mnt/a/b",
        fstype="tmpfs",
        mountflags=6,
        options="size=1m",
        create_target=True,
        permissions=0o711,
    )
    assert (await maitred.Mount(request)).error == 0
    assert whole.kernel.table == [("s", "/mnt/a/b", "tmpfs", "size=1m")]
    assert whole.kernel.directories["/mnt/a/b"] == 0o711
    for changed, number in (
        (vm.MountRequest(source="s", target="/none", fstype="tmpfs"), errno.ENOENT),
        (vm.MountRequest(source="s", target="/mnt", fstype="odd"), errno.ENODEV),
        (vm.MountRequest(source="/dev/vdb", target="/mnt", fstype="btrfs"), errno.EINVAL),
    ):
        assert (await maitred.Mount(changed)).error == number
    disk = vm.MountRequest(
        source="/dev/vdb", target="/mnt/disk", fstype="btrfs", create_target=True, mkfs_if_needed=True
    )
    assert (await maitred.Mount(disk)).error == 0
    assert whole.kernel.devices["/dev/vdb"] == "btrfs"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (vm.MountRequest(source="s", fstype="tmpfs", create_target=True), "target"),
        (vm.MountRequest(source="s", target="mnt", fstype="tmpfs", create_target=True), "target"),
        (vm.MountRequest(source="s", target="/mnt/../x", fstype="tmpfs", create_target=True), "target"),
        (vm.MountRequest(source="s", target="/mnt/\0", fstype="tmpfs", create_target=True), "target"),
        (vm.MountRequest(source="s", target="/x", fstype="tmpfs", permissions=1 << 16), "permissions"),
    ],
)
async def test_a_mount_that_makes_no_sense(whole: Whole, request_: vm.MountRequest, field: str) -> None:
    before = dict(whole.kernel.directories)
    code, text = await refused(whole.guest.maitred.Mount(request_))
    assert code is INVALID
    assert field in text
    assert whole.kernel.table == []
    assert whole.kernel.directories == before


async def test_permissions_that_cannot_be_given(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(whole.kernel, "chmod", refuse)
    request = vm.MountRequest(source="s", target="/mnt", fstype="tmpfs", permissions=0o700)
    code, text = await refused(whole.guest.maitred.Mount(request))
    assert code is INTERNAL
    assert "Operation not permitted" in text
    assert whole.kernel.table == []


async def test_mount_9p(whole: Whole) -> None:
    whole.kernel.ports.add(9999)
    maitred = whole.guest.maitred
    assert (await maitred.Mount9P(vm.Mount9PRequest(port=9999, target="/mnt/shared"))).error == 0
    assert whole.kernel.mounted("/mnt/shared") == "none"
    code, text = await refused(maitred.Mount9P(vm.Mount9PRequest(port=9998, target="/mnt/other")))
    assert code is INTERNAL
    assert "9998" in text
    for wrong in (vm.Mount9PRequest(target="/mnt/other"), vm.Mount9PRequest(port=9999, target="other")):
        code, _ = await refused(maitred.Mount9P(wrong))
        assert code is INVALID


async def test_start_termina(whole: Whole) -> None:
    maitred = whole.guest.maitred
    request = vm.StartTerminaRequest(
        tremplin_ipv4_address=HOST, lxd_ipv4_subnet="100.115.92.192/28", allow_privileged_containers=True
    )
    for _ in range(2):
        answer = await maitred.StartTermina(request)
        assert answer.mount_result == vm.StartTerminaResponse.SUCCESS
        assert answer.free_bytes_has_value
        assert answer.free_bytes == 8 << 30
    assert whole.kernel.mounted("/mnt/stateful") == "/dev/vdb"
    assert [launch.name for launch in whole.spawner.started] == ["lxcfs", "tremplin", "ndproxyd", "mcastd"]


async def test_start_termina_with_a_loss(whole: Whole) -> None:
    whole.kernel.devices["/dev/vdc"] = "damaged btrfs"
    request = vm.StartTerminaRequest(lxd_ipv4_subnet="100.115.92.192/28", stateful_device="/dev/vdc")
    answer = await whole.guest.maitred.StartTermina(request)
    assert answer.mount_result == vm.StartTerminaResponse.PARTIAL_DATA_LOSS


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (vm.StartTerminaRequest(), INVALID),
        (vm.StartTerminaRequest(lxd_ipv4_subnet="no subnet"), INVALID),
        (vm.StartTerminaRequest(lxd_ipv4_subnet="1.2.3.4/28", stateful_device="vdb"), INVALID),
        (vm.StartTerminaRequest(lxd_ipv4_subnet="1.2.3.4/28", stateful_device="/dev/none"), INTERNAL),
        (vm.StartTerminaRequest(lxd_ipv4_subnet="1.2.3.4/28", stateful_device="/dev/vde"), INTERNAL),
    ],
)
async def test_a_container_guest_that_cannot_start(
    whole: Whole, request_: vm.StartTerminaRequest, code: grpc.StatusCode
) -> None:
    whole.kernel.devices["/dev/vde"] = "ext4"
    found, _ = await refused(whole.guest.maitred.StartTermina(request_))
    assert found is code
    assert whole.kernel.table == []
    assert whole.kernel.devices["/dev/vde"] == "ext4"
    assert whole.spawner.started == []


async def test_configure_container_guest(whole: Whole) -> None:
    maitred = whole.guest.maitred
    await maitred.ConfigureContainerGuest(vm.ConfigureContainerGuestRequest(container_token="6a7b", vm_username="anna"))
    assert whole.token.content == b"6a7b"
    for wrong in (
        vm.ConfigureContainerGuestRequest(),
        vm.ConfigureContainerGuestRequest(container_token="secret\n"),
        vm.ConfigureContainerGuestRequest(container_token="secret", vm_username="no name"),
    ):
        code, text = await refused(maitred.ConfigureContainerGuest(wrong))
        assert code is INVALID
        assert "secret" not in text
    assert whole.token.content == b"6a7b"


async def test_set_up_user(whole: Whole) -> None:
    maitred = whole.guest.maitred
    answer = await maitred.SetUpUser(vm.SetUpUserRequest(username="anna", uid=1234, group_names=["audio", "audio"]))
    assert (answer.success, answer.failure_reason, answer.username) == (True, "", "anna")
    answer = await maitred.SetUpUser(vm.SetUpUserRequest(username="anna", uid=1235))
    assert (answer.success, answer.username) == (False, "anna")
    assert "1234" in answer.failure_reason
    for wrong in (
        vm.SetUpUserRequest(username="Anna"),
        vm.SetUpUserRequest(username="anna", uid=0),
        vm.SetUpUserRequest(username="anna", group_names=["nogroup"]),
        vm.SetUpUserRequest(),
    ):
        code, _ = await refused(maitred.SetUpUser(wrong))
        assert code is INVALID
    assert [user.name for user in whole.users.passwd] == ["root", "anna"]


@pytest.mark.parametrize("method", ["Mount", "Mount9P", "StartTermina", "ConfigureContainerGuest", "SetUpUser"])
async def test_without_its_module_a_method_is_not_there(guest: Guest, method: str) -> None:
    call: Any = guest.channel.unary_unary(f"/vm_tools.Maitred/{method}")
    code, _ = await refused(call(b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED
