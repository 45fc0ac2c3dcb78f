"""The wire, word for word: what is generated from the .proto files against a table written down by hand.

The hosts that call this service were compiled long ago. A field that changes its number, a method that is
renamed, and also one that is merely added, breaks a promise that nobody can renegotiate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import timestamp_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from storaged.rpc.proto import (
    common_pb2,
    vm_crash_pb2,
    vm_crash_pb2_grpc,
    vm_guest_pb2,
    vm_guest_pb2_grpc,
    vm_host_pb2,
    vm_host_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

Fields = dict[str, tuple[int, str]]

# Each message with its fields, each field with its number and type.
MESSAGES: dict[str, Fields] = {
    "vm_tools.EmptyMessage": {},
    "vm_tools.IPv4Config": {
        "address": (1, "fixed32"),
        "netmask": (2, "fixed32"),
        "gateway": (3, "fixed32"),
    },
    "vm_tools.ResolvConfig": {
        "nameservers": (1, "repeated string"),
        "search_domains": (2, "repeated string"),
    },
    "vm_tools.NetworkConfigRequest": {
        "ipv4_config": (1, "vm_tools.IPv4Config"),
        "resolv_config": (2, "vm_tools.ResolvConfig"),
    },
    "vm_tools.UpdateStorageBalloonRequest": {
        "state": (1, "vm_tools.StatefulDiskSpaceState"),
        "free_space_bytes": (2, "int64"),
    },
    "vm_tools.UpdateStorageBalloonResponse": {
        "result": (1, "vm_tools.UpdateStorageBalloonResult"),
    },
    "vm_tools.ConfigureContainerGuestRequest": {
        "container_token": (1, "string"),
        "vm_username": (2, "string"),
    },
    "vm_tools.LaunchProcessRequest": {
        "argv": (1, "repeated string"),
        "env": (2, "map<string, string>"),
        "respawn": (3, "bool"),
        "use_console": (4, "bool"),
        "wait_for_exit": (5, "bool"),
    },
    "vm_tools.LaunchProcessResponse": {
        "status": (1, "vm_tools.ProcessStatus"),
        "code": (2, "sint32"),
    },
    "vm_tools.MountRequest": {
        "source": (1, "string"),
        "target": (2, "string"),
        "fstype": (3, "string"),
        "mountflags": (4, "uint64"),
        "options": (5, "string"),
        "create_target": (6, "bool"),
        "permissions": (7, "uint32"),
        "mkfs_if_needed": (8, "bool"),
    },
    "vm_tools.Mount9PRequest": {
        "port": (1, "uint32"),
        "target": (2, "string"),
    },
    "vm_tools.MountResponse": {
        "error": (1, "sint32"),
    },
    "vm_tools.StartTerminaRequest": {
        "tremplin_ipv4_address": (1, "uint32"),
        "lxd_ipv4_subnet": (2, "string"),
        "stateful_device": (3, "string"),
        "allow_privileged_containers": (4, "bool"),
        "feature": (5, "repeated vm_tools.StartTerminaRequest.Feature"),
    },
    "vm_tools.StartTerminaResponse": {
        "mount_result": (1, "vm_tools.StartTerminaResponse.MountResult"),
        "free_bytes": (2, "int64"),
        "free_bytes_has_value": (3, "bool"),
    },
    "vm_tools.SetResolvConfigRequest": {
        "resolv_config": (1, "vm_tools.ResolvConfig"),
    },
    "vm_tools.SetTimeRequest": {
        "time": (1, "google.protobuf.Timestamp"),
    },
    "vm_tools.SetTimezoneRequest": {
        "timezone_name": (1, "string"),
        "use_bind_mount": (2, "bool"),
    },
    "vm_tools.GetKernelVersionResponse": {
        "kernel_release": (1, "string"),
        "kernel_version": (2, "string"),
    },
    "vm_tools.ResizeFilesystemRequest": {
        "size": (1, "uint64"),
    },
    "vm_tools.ResizeFilesystemResponse": {
        "status": (1, "vm_tools.ResizeFilesystemResponse.ResizeStatus"),
    },
    "vm_tools.GetResizeStatusResponse": {
        "resize_in_progress": (1, "bool"),
        "current_size": (2, "uint64"),
        "target_size": (3, "uint64"),
    },
    "vm_tools.GetResizeBoundsResponse": {
        "minimum_size": (1, "uint64"),
    },
    "vm_tools.GetAvailableSpaceResponse": {
        "available_space": (1, "uint64"),
    },
    "vm_tools.SetUpUserRequest": {
        "username": (1, "string"),
        "uid": (2, "optional uint32"),
        "group_names": (3, "repeated string"),
    },
    "vm_tools.SetUpUserResponse": {
        "success": (1, "bool"),
        "failure_reason": (2, "string"),
        "username": (3, "string"),
    },
    "vm_tools.VmInstallState": {},
    "vm_tools.cicerone.FailureReport": {
        "failed_process": (1, "string"),
    },
}

ENUMS: dict[str, dict[str, int]] = {
    "vm_tools.StatefulDiskSpaceState": {
        "DISK_NONE": 0,
        "DISK_NORMAL": 1,
        "DISK_LOW": 2,
        "DISK_CRITICAL": 3,
    },
    "vm_tools.UpdateStorageBalloonResult": {
        "SUCCESS": 0,
        "BALLOON_INFLATE_FAILED": 1,
    },
    "vm_tools.ProcessStatus": {
        "UNKNOWN": 0,
        "EXITED": 1,
        "SIGNALED": 2,
        "LAUNCHED": 3,
        "FAILED": 4,
    },
    "vm_tools.StartTerminaRequest.Feature": {
        "UNKNOWN": 0,
        "USED_BY_TESTS": 1,
        "START_LXD": 2,
        "RESET_LXD_ON_LAUNCH": 3,
        "LXD_4_LTS": 4,
        "LXD_5_LTS": 5,
    },
    "vm_tools.StartTerminaResponse.MountResult": {
        "UNKNOWN": 0,
        "SUCCESS": 1,
        "PARTIAL_DATA_LOSS": 2,
        "FAILURE": 3,
    },
    "vm_tools.ResizeFilesystemResponse.ResizeStatus": {
        "FAILED": 0,
        "ALREADY_IN_PROGRESS": 1,
        "STARTED": 2,
    },
}

# Each method with its request and response; all are unary.
METHODS: dict[str, tuple[str, str]] = {
    "/vm_tools.Maitred/ConfigureNetwork": ("vm_tools.NetworkConfigRequest", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/ConfigureContainerGuest": (
        "vm_tools.ConfigureContainerGuestRequest",
        "vm_tools.EmptyMessage",
    ),
    "/vm_tools.Maitred/ResetIPv6": ("vm_tools.EmptyMessage", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/OnHostNetworkChanged": ("vm_tools.EmptyMessage", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/Shutdown": ("vm_tools.EmptyMessage", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/PrepareToSuspend": ("vm_tools.EmptyMessage", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/LaunchProcess": ("vm_tools.LaunchProcessRequest", "vm_tools.LaunchProcessResponse"),
    "/vm_tools.Maitred/Mount": ("vm_tools.MountRequest", "vm_tools.MountResponse"),
    "/vm_tools.Maitred/Mount9P": ("vm_tools.Mount9PRequest", "vm_tools.MountResponse"),
    "/vm_tools.Maitred/StartTermina": ("vm_tools.StartTerminaRequest", "vm_tools.StartTerminaResponse"),
    "/vm_tools.Maitred/SetTime": ("vm_tools.SetTimeRequest", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/SetTimezone": ("vm_tools.SetTimezoneRequest", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/SetResolvConfig": ("vm_tools.SetResolvConfigRequest", "vm_tools.EmptyMessage"),
    "/vm_tools.Maitred/GetKernelVersion": ("vm_tools.EmptyMessage", "vm_tools.GetKernelVersionResponse"),
    "/vm_tools.Maitred/GetResizeStatus": ("vm_tools.EmptyMessage", "vm_tools.GetResizeStatusResponse"),
    "/vm_tools.Maitred/GetResizeBounds": ("vm_tools.EmptyMessage", "vm_tools.GetResizeBoundsResponse"),
    "/vm_tools.Maitred/GetAvailableSpace": ("vm_tools.EmptyMessage", "vm_tools.GetAvailableSpaceResponse"),
    "/vm_tools.Maitred/ResizeFilesystem": (
        "vm_tools.ResizeFilesystemRequest",
        "vm_tools.ResizeFilesystemResponse",
    ),
    "/vm_tools.Maitred/UpdateStorageBalloon": (
        "vm_tools.UpdateStorageBalloonRequest",
        "vm_tools.UpdateStorageBalloonResponse",
    ),
    "/vm_tools.Maitred/SetUpUser": ("vm_tools.SetUpUserRequest", "vm_tools.SetUpUserResponse"),
    "/vm_tools.StartupListener/VmReady": ("vm_tools.EmptyMessage", "vm_tools.EmptyMessage"),
    "/vm_tools.StartupListener/VmInstallStatus": ("vm_tools.VmInstallState", "vm_tools.EmptyMessage"),
    "/vm_tools.cicerone.CrashListener/SendFailureReport": (
        "vm_tools.cicerone.FailureReport",
        "vm_tools.EmptyMessage",
    ),
}

DEPRECATED_METHODS = {"/vm_tools.Maitred/ResetIPv6"}
DEPRECATED_VALUES = {"START_LXD", "RESET_LXD_ON_LAUNCH", "LXD_4_LTS", "LXD_5_LTS"}


def _file(module: Any) -> FileDescriptorProto:
    file = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return file


FILES = {module.__name__: _file(module) for module in (common_pb2, vm_crash_pb2, vm_guest_pb2, vm_host_pb2)}

SCALARS = {
    getattr(FieldDescriptorProto, f"TYPE_{name.upper()}"): name
    for name in ("bool", "string", "int64", "uint64", "uint32", "sint32", "fixed32")
}


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    name = field.type_name.lstrip(".") or SCALARS.get(field.type, f"type {field.type}")
    for nested in message.nested_type:
        if nested.options.map_entry and name.endswith(f"{message.name}.{nested.name}"):
            key, value = nested.field
            return f"map<{_type(key, nested)}, {_type(value, nested)}>"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _found_messages() -> dict[str, Fields]:
    return {
        f"{file.package}.{message.name}": {f.name: (f.number, _type(f, message)) for f in message.field}
        for file in FILES.values()
        for message in file.message_type
    }


def _found_enums() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for file in FILES.values():
        scopes = [(file.package, file.enum_type)]
        scopes += [(f"{file.package}.{message.name}", message.enum_type) for message in file.message_type]
        for scope, enums in scopes:
            found |= {f"{scope}.{enum.name}": {v.name: v.number for v in enum.value} for enum in enums}
    return found


def _found_methods() -> dict[str, tuple[str, str]]:
    return {
        f"/{file.package}.{service.name}/{method.name}": (
            method.input_type.lstrip("."),
            method.output_type.lstrip("."),
        )
        for file in FILES.values()
        for service in file.service
        for method in service.method
    }


def test_every_message_is_in_the_table_and_no_other() -> None:
    assert set(_found_messages()) == set(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_fields(name: str) -> None:
    assert _found_messages()[name] == MESSAGES[name]


def test_every_enum_is_in_the_table_and_no_other() -> None:
    assert set(_found_enums()) == set(ENUMS)


@pytest.mark.parametrize("name", ENUMS)
def test_enum_values(name: str) -> None:
    assert _found_enums()[name] == ENUMS[name]


def test_methods() -> None:
    assert _found_methods() == METHODS


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_nothing_that_the_table_cannot_say(file: FileDescriptorProto) -> None:
    assert file.syntax == "proto3"
    assert not file.extension
    for message in file.message_type:
        assert not message.reserved_range
        assert not message.reserved_name
        assert not message.extension
        # The only oneofs are those that an `optional` field brings along.
        synthetic = {f.oneof_index for f in message.field if f.proto3_optional}
        assert all(f.proto3_optional for f in message.field if f.HasField("oneof_index"))
        assert len(message.oneof_decl) == len(synthetic)
        # The only nested messages are those that a map brings along.
        assert all(nested.options.map_entry for nested in message.nested_type)
        assert not any(f.options.HasField("packed") for f in message.field)
    for service in file.service:
        for method in service.method:
            assert not method.client_streaming
            assert not method.server_streaming


def test_what_is_deprecated() -> None:
    methods = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in FILES.values()
        for service in file.service
        for method in service.method
        if method.options.deprecated
    }
    assert methods == DEPRECATED_METHODS
    feature = vm_guest_pb2.StartTerminaRequest.DESCRIPTOR.enum_types_by_name["Feature"]
    assert {v.name for v in feature.values if v.GetOptions().deprecated} == DEPRECATED_VALUES


class _Recorder:
    """A channel that only writes down what a stub asks of it."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def unary_unary(self, path: str, *_args: object, **_options: object) -> None:
        self.paths.append(path)


def test_the_stubs_call_these_paths() -> None:
    channel: Any = _Recorder()
    vm_guest_pb2_grpc.MaitredStub(channel)
    vm_host_pb2_grpc.StartupListenerStub(channel)
    vm_crash_pb2_grpc.CrashListenerStub(channel)
    assert sorted(channel.paths) == sorted(METHODS)


# What a host's bytes look like, worked out by hand from the table and the encoding.
BYTES: dict[str, tuple[Callable[[], Message], str]] = {
    "fixed32 in network byte order: 100.115.92.26/30, gateway .25": (
        lambda: vm_guest_pb2.NetworkConfigRequest(
            ipv4_config=vm_guest_pb2.IPv4Config(address=442266468, netmask=0xFCFFFFFF, gateway=0x195C7364)
        ),
        "0a 0f  0d 64735c1a  15 fffffffc  1d 64735c19",
    ),
    "a host that does not know: -1 as ten bytes": (
        lambda: vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_NONE, free_space_bytes=-1),
        "10 ffffffffffffffffff01",
    ),
    "critical, 1 GiB": (
        lambda: vm_guest_pb2.UpdateStorageBalloonRequest(state=vm_guest_pb2.DISK_CRITICAL, free_space_bytes=1 << 30),
        "08 03  10 8080808004",
    ),
    "success is no bytes at all": (
        lambda: vm_guest_pb2.UpdateStorageBalloonResponse(result=vm_guest_pb2.SUCCESS),
        "",
    ),
    "sint32 is zigzag: errno 22": (lambda: vm_guest_pb2.MountResponse(error=22), "08 2c"),
    "sint32 is zigzag: -1": (
        lambda: vm_guest_pb2.LaunchProcessResponse(status=vm_guest_pb2.FAILED, code=-1),
        "08 04  10 01",
    ),
    "a map": (
        lambda: vm_guest_pb2.LaunchProcessRequest(argv=["a", "b"], env={"K": "v"}, wait_for_exit=True),
        "0a 01 61  0a 01 62  12 06 0a 01 4b 12 01 76  28 01",
    ),
    "features are packed": (
        lambda: vm_guest_pb2.StartTerminaRequest(
            tremplin_ipv4_address=1, feature=[vm_guest_pb2.StartTerminaRequest.USED_BY_TESTS]
        ),
        "08 01  2a 01 01",
    ),
    "a size of 20 GiB": (lambda: vm_guest_pb2.ResizeFilesystemRequest(size=20 << 30), "08 8080808050"),
    "a job under way": (
        lambda: vm_guest_pb2.GetResizeStatusResponse(resize_in_progress=True, current_size=1, target_size=2),
        "08 01  10 01  18 02",
    ),
    "a time": (
        lambda: vm_guest_pb2.SetTimeRequest(time=timestamp_pb2.Timestamp(seconds=5, nanos=6)),
        "0a 04 08 05 10 06",
    ),
    "uid 0 is not the same as no uid": (
        lambda: vm_guest_pb2.SetUpUserRequest(username="u", uid=0),
        "0a 01 75  10 00",
    ),
}


@pytest.mark.parametrize(("make", "expected"), BYTES.values(), ids=BYTES)
def test_bytes(make: Callable[[], Message], expected: str) -> None:
    message = make()
    encoded = bytes.fromhex(expected)
    assert message.SerializeToString(deterministic=True) == encoded
    assert type(message).FromString(encoded) == message


def test_what_a_newer_host_says_is_kept() -> None:
    unknown = bytes.fromhex("f8 07 01")  # field 127, 1
    assert vm_host_pb2.VmInstallState.FromString(unknown).SerializeToString() == unknown
    assert common_pb2.EmptyMessage.FromString(unknown).SerializeToString() == unknown
