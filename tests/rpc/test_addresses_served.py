"""Who gets in where: the unix socket is its owner's alone, tcp asks for a certificate, and VmReady goes out."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from storaged.addresses import TcpAddress, UnixAddress, VsockAddress
from storaged.config import NotifyConfig, TlsConfig
from storaged.errors import ConfigError
from storaged.rpc import outward
from storaged.rpc.proto import common_pb2, vm_guest_pb2_grpc, vm_host_pb2_grpc
from storaged.rpc.ready import tell_host
from storaged.rpc.server import Server
from tests.rpc.conftest import EMPTY, Guest

ANYWHERE = TcpAddress("0.0.0.0", 0)
HERE = TcpAddress("127.0.0.1", 0)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> TlsConfig:
    """The daemon's certificate, in files."""
    leaf = authority.issue_cert("127.0.0.1")
    files = {"certificate": leaf.cert_chain_pems[0], "key": leaf.private_key_pem, "ca": authority.cert_pem}
    for name, blob in files.items():
        blob.write_to_path(str(tmp_path / name))
    certificate, key, ca = (str(tmp_path / name) for name in files)
    return TlsConfig(certificate, key, ca)


async def _answer(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    channel = grpc.aio.insecure_channel(target) if credentials is None else grpc.aio.secure_channel(target, credentials)
    async with channel:
        stub: vm_guest_pb2_grpc.MaitredAsyncStub = vm_guest_pb2_grpc.MaitredStub(channel)
        try:
            await stub.GetResizeStatus(EMPTY, timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _client(authority: trustme.CA, leaf: trustme.LeafCert | None) -> grpc.ChannelCredentials:
    if leaf is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    return grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), leaf.private_key_pem.bytes(), leaf.cert_chain_pems[0].bytes()
    )


async def test_over_tcp_only_clients_with_a_certificate_of_ours_are_served(
    guest: Guest, authority: trustme.CA, tls: TlsConfig
) -> None:
    server = Server(guest.service)
    (bound,) = await server.start([ANYWHERE], tls)
    assert isinstance(bound, TcpAddress)
    assert bound.port
    target = f"127.0.0.1:{bound.port}"
    long_ago = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    wanted = {
        "ours": (_client(authority, authority.issue_cert("client")), grpc.StatusCode.OK),
        "none": (_client(authority, None), grpc.StatusCode.UNAVAILABLE),
        "a stranger's": (_client(authority, trustme.CA().issue_cert("client")), grpc.StatusCode.UNAVAILABLE),
        "too old": (_client(authority, authority.issue_cert("c", not_after=long_ago)), grpc.StatusCode.UNAVAILABLE),
        "no TLS": (None, grpc.StatusCode.UNAVAILABLE),
    }
    try:
        found = {name: await _answer(target, credentials) for name, (credentials, _) in wanted.items()}
    finally:
        await server.stop(0.1)
    assert found == {name: code for name, (_, code) in wanted.items()}


async def test_tcp_without_tls_is_for_loopback_and_on_request(guest: Guest, tmp_path: Path) -> None:
    for address, insecure in ((HERE, False), (ANYWHERE, False), (ANYWHERE, True), (TcpAddress("::", 0), True)):
        with pytest.raises(ConfigError, match="needs TLS"):
            await Server(guest.service).start([address], TlsConfig(insecure=insecure))
    server = Server(guest.service)
    (bound,) = await server.start([HERE], TlsConfig(insecure=True))
    assert isinstance(bound, TcpAddress)
    try:
        assert await _answer(f"127.0.0.1:{bound.port}", None) is grpc.StatusCode.OK
    finally:
        await server.stop(0.1)


async def test_tls_files_that_are_not_there_are_named(guest: Guest, tls: TlsConfig, tmp_path: Path) -> None:
    os.unlink(tmp_path / "key")
    with pytest.raises(ConfigError, match="key: No such file"):
        await Server(guest.service).start([HERE], tls)


async def test_the_socket_is_its_owner_s_alone_from_the_first_moment(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.stat(guest.path).st_mode & 0o777 == 0o600
    old = os.umask(0)
    try:
        server = Server(guest.service)
        await server.start([UnixAddress(str(tmp_path / "open"))])
        assert os.umask(0) == 0, "the process's umask is as it was"
        assert os.stat(tmp_path / "open").st_mode & 0o777 == 0o600
        await server.stop(0.1)
    finally:
        os.umask(old)


# --- VmReady --------------------------------------------------------------------------------------------------


class Listener(vm_host_pb2_grpc.StartupListenerServicer):
    """A host's; `refusals` calls fail first."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.calls = 0

    async def VmReady(self, request: common_pb2.EmptyMessage, context: Any) -> common_pb2.EmptyMessage:  # noqa: N802
        self.calls += 1
        if self.calls <= self.refusals:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return common_pb2.EmptyMessage()


QUICK = NotifyConfig(call_s=2, first_s=0.01, most_s=0.05, give_up_s=5)


class Host:
    """A host's startup listener on a unix socket."""

    def __init__(self, path: Path) -> None:
        self.address = UnixAddress(str(path))
        self.listener = Listener()  # type: ignore[abstract]  # the other method answers UNIMPLEMENTED
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        vm_host_pb2_grpc.add_StartupListenerServicer_to_server(self.listener, self._server)
        self._server.add_insecure_port(str(self.address))
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    one = Host(tmp_path / "h")
    yield one
    await one.stop()


async def test_the_host_is_told_once(host: Host) -> None:
    await host.start()
    assert await tell_host(host.address, QUICK)
    assert host.listener.calls == 1


async def test_it_is_told_again_until_it_answers(host: Host) -> None:
    host.listener.refusals = 3
    await host.start()
    assert await tell_host(host.address, QUICK)
    assert host.listener.calls == 4


async def test_a_host_that_comes_later_is_found(host: Host) -> None:
    telling = asyncio.create_task(tell_host(host.address, QUICK))
    await asyncio.sleep(0.2)
    await host.start()
    assert await telling
    assert host.listener.calls == 1


async def test_a_host_that_never_comes_costs_nothing_but_a_line(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert not await tell_host(host.address, NotifyConfig(call_s=1, first_s=0.01, most_s=0.02, give_up_s=0.2))
    assert "was not told that we serve" in caplog.text
    assert len(caplog.records) == 2, "not one for each attempt"


async def test_a_host_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        deaf.listen()
        async with asyncio.timeout(5):
            config = NotifyConfig(call_s=0.1, first_s=0.01, most_s=0.02, give_up_s=0.2)
            assert not await tell_host(UnixAddress(str(tmp_path / "deaf")), config)


async def test_over_vsock_it_goes_the_way_out_of_the_relay(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[VsockAddress] = []

    def instead(address: VsockAddress) -> Callable[[], Any]:
        async def connect() -> socket.socket:
            asked.append(address)
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            await asyncio.get_running_loop().sock_connect(one, host.address.path)
            return one

        return connect

    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(outward, "to_vsock", instead)
    await host.start()
    assert await tell_host(VsockAddress(2, 7777), QUICK)
    assert host.listener.calls == 1
    assert asked == [VsockAddress(2, 7777)]
    assert os.listdir(tmp_path) == ["h"], "nothing is left behind"


async def test_without_a_host_on_vsock_it_gives_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        pytest.skip(f"vsock: {error.strerror}")
    config = NotifyConfig(call_s=0.3, first_s=0.01, most_s=0.05, give_up_s=0.3)
    nobody = 0xFFFFFFF0  # not 2: this machine may have a host
    assert not await tell_host(VsockAddress(nobody, 1), config)
    assert os.listdir(tmp_path) == []


def test_a_wildcard_is_not_loopback() -> None:
    assert not TcpAddress("0.0.0.0", 1).loopback
    assert TcpAddress(str(ipaddress.ip_address("127.9.9.9")), 1).loopback
