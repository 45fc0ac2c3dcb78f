"""Two names of one image or one agent are one; an image lies in its pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from lab.agent import agent, serve
from lab.loop import run, workspace
from storaged.addresses import TcpAddress, parse_guest_address
from storaged.errors import ConfigError
from storaged.host.config import Discovery, GuestConfig, HostConfig, PoolConfig
from storaged.host.identity import check, file_id
from storaged.host.service import Host
from storaged.host.settings import Resizing
from storaged.rpc.proto import common_pb2, vm_host_pb2_grpc
from storaged.units import MIB
from tests.host.test_controller import until


def _image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


def _guest(name: str, image: Path | str, address: str = "") -> GuestConfig:
    return GuestConfig(name, parse_guest_address(address or f"unix:/run/{name}.sock"), str(image), "p")


def _check(directory: Path, *guests: GuestConfig) -> None:
    check((PoolConfig("p", str(directory)),), guests)


def _dotted(directory: Path) -> str:
    return f"{directory}/./a.img"


def _symlink(directory: Path) -> str:
    (directory / "b.img").symlink_to("a.img")
    return f"{directory}/b.img"


def _through_a_directory(directory: Path) -> str:
    (directory / "d").symlink_to(directory)
    return f"{directory}/d/a.img"


def _hard_link(directory: Path) -> str:
    os.link(directory / "a.img", directory / "b.img")
    return f"{directory}/b.img"


@pytest.mark.parametrize("second", [_dotted, _symlink, _through_a_directory, _hard_link])
def test_an_image_under_two_names_is_refused_with_both(tmp_path: Path, second: object) -> None:
    image = _image(tmp_path / "a.img")
    assert callable(second)
    other = second(tmp_path)
    with pytest.raises(ConfigError) as refused:
        _check(tmp_path, _guest("a", image), _guest("b", other))
    said = refused.value.message
    assert f"guest.b.image = {other!r} is the same file as guest.a.image = {str(image)!r}" in said
    assert f"inode {image.stat().st_ino}" in said


def test_guests_with_images_and_agents_of_their_own_are_served(tmp_path: Path) -> None:
    one, other = _image(tmp_path / "a.img"), _image(tmp_path / "b.img")
    _check(tmp_path, _guest("a", one), _guest("b", other))
    _check(tmp_path, _guest("a", one, "hybrid:/v:1"), _guest("b", other, "hybrid:/v:2"))
    _check(tmp_path, _guest("a", one, "vsock:3:1"), _guest("b", other, "vsock:4:1"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("unix:{}/s", "unix:{}/./s"),
        ("unix:{}/s", "unix:{}/link"),
        ("unix:{}/not-yet", "unix:{}/d/not-yet"),
        ("hybrid:{}/s:8888", "hybrid:{}/link:8888"),
        ("vsock:3:8888", "vsock:03:8888"),
        ("tcp:localhost:8888", "tcp:127.0.0.1:8888"),
    ],
)
def test_an_agent_that_is_given_twice_is_refused_with_both(tmp_path: Path, one: str, other: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/s")
        (tmp_path / "link").symlink_to("s")
        (tmp_path / "d").symlink_to(tmp_path)
        guests = [
            _guest(name, _image(tmp_path / f"{name}.img"), address.format(tmp_path))
            for name, address in (("a", one), ("b", other))
        ]
        with pytest.raises(ConfigError) as refused:
            _check(tmp_path, *guests)
    assert f"guest.b.address = '{guests[1].address}' is the same agent" in refused.value.message
    assert f"guest.a.address = '{guests[0].address}'" in refused.value.message


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "f")
    for image, says in (("d", "is a directory"), ("f", "is not a regular file"), ("none", "No such file")):
        with pytest.raises(ConfigError, match=rf"guest\.a\.image = .*/{image}'.*{says}"):
            _check(tmp_path, _guest("a", tmp_path / image))


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A directory with another filesystem mounted at `other`."""
    with workspace() as directory:
        (directory / "other").mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=1M", "none", directory / "other")
        yield directory


@pytest.mark.btrfs
def test_an_image_outside_its_pool_is_refused(mounted: Path) -> None:
    inside, outside = _image(mounted / "a.img"), _image(mounted / "other/b.img")
    _check(mounted, _guest("a", inside))
    with pytest.raises(ConfigError, match=r"guest\.b\.image = .*/b\.img' is not on the filesystem of pool\.p\.path"):
        _check(mounted, _guest("a", inside), _guest("b", outside))
    (mounted / "link.img").symlink_to(outside)
    with pytest.raises(ConfigError, match="is not on the filesystem"):
        _check(mounted, _guest("b", mounted / "link.img"))


@pytest.mark.btrfs
def test_a_subvolume_is_in_the_pool() -> None:
    with workspace() as directory:
        disk = directory / "disk"
        disk.mkdir()
        with (directory / "disk.img").open("wb") as file:
            file.truncate(256 * MIB)
        run("mkfs.btrfs", "-q", directory / "disk.img")
        run("mount", "-o", "loop", directory / "disk.img", disk)
        run("btrfs", "subvolume", "create", disk / "v")
        image = _image(disk / "v/a.img")
        assert image.stat().st_dev != disk.stat().st_dev
        _check(disk, _guest("a", image))


def test_the_command_refuses_to_start(tmp_path: Path) -> None:
    _image(tmp_path / "a.img")
    lines = [f'[pool.p]\npath = "{tmp_path}"\n[resize]\nstate_dir = "{tmp_path}/state"\n']
    lines += [f'[guest.{name}]\naddress = "unix:/{name}"\nimage = "{tmp_path}/{detour}a.img"\n'
              for name, detour in (("a", ""), ("b", "./"))]  # fmt: skip
    (tmp_path / "host.toml").write_text("".join(lines))
    command = [sys.executable, "-m", "storaged.host", "serve", "--config", str(tmp_path / "host.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "is the same file as guest.a.image" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: os.link(path / "a.img", path / "127.0.0.1.img"), "is the same file as guest.a.image"),
        (lambda path: (path / "127.0.0.1.img").mkdir(), "is a directory"),
        (lambda _: None, "No such file"),
        (lambda path: (_image(path / "127.0.0.1.img"), (path / "127.0.0.1.sock").symlink_to("a.sock")),
         "is the same agent as guest.a.address"),
    ],
)  # fmt: skip
async def test_a_discovered_guest_is_refused_once_and_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: object, says: str
) -> None:
    _image(tmp_path / "a.img")
    assert callable(spoil)
    member = agent()
    server = await serve(member, tmp_path / "a.sock")
    spoil(tmp_path)
    discovery = Discovery(f"unix:{tmp_path}/{{host}}.sock", f"{tmp_path}/{{host}}.img", "p")
    configured = _guest("a", tmp_path / "a.img", f"unix:{tmp_path}/a.sock")
    host = Host(
        HostConfig(
            (PoolConfig("p", str(tmp_path)),),
            (configured,),
            (TcpAddress("127.0.0.1", 0),),
            discovery=discovery,
            resize=Resizing(state_dir=f"{tmp_path}/state"),
        )
    )
    task = asyncio.create_task(host.run())
    try:
        await until(lambda: bool(host.listening))
        address = host.listening[0]
        assert isinstance(address, TcpAddress)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{address.port}") as channel:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await vm_host_pb2_grpc.StartupListenerStub(channel).VmReady(common_pb2.EmptyMessage())
        lines = [record.getMessage() for record in caplog.records if says in record.getMessage()]
        assert len(lines) == 1
        assert "127.0.0.1" in lines[0]
        await until(lambda: member.allowed is not None)
        assert list(host.controllers[0].members) == ["a"]
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await server.stop(None)


async def test_a_discovered_guest_cannot_have_the_name_of_a_configured_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configured = _guest("10.0.0.5", _image(tmp_path / "a.img"))
    _image(tmp_path / "10.0.0.5.img")
    discovery = Discovery("vsock:3:8888", f"{tmp_path}/{{host}}.img", "p")
    host = Host(
        HostConfig(
            (PoolConfig("p", str(tmp_path)),),
            (configured,),
            discovery=discovery,
            resize=Resizing(state_dir=f"{tmp_path}/state"),
        )
    )
    assert not host._ready("ipv4:10.0.0.5")
    assert "guest at ipv4:10.0.0.5 refused: guest.10.0.0.5 is configured" in caplog.text
    assert host._ready("ipv4:10.0.0.6") is False, "there is no image"


@pytest.mark.btrfs
def test_a_file_with_the_inode_of_a_deleted_one_is_another() -> None:
    with workspace() as directory:
        disk = directory / "disk"
        disk.mkdir()
        with (directory / "disk.img").open("wb") as file:
            file.truncate(32 * MIB)
        run("mkfs.ext4", "-q", directory / "disk.img")
        run("mount", "-o", "loop", directory / "disk.img", disk)
        path = _image(disk / "a.img")
        before = file_id(str(path))
        assert file_id(f"{disk}/./a.img") == before
        path.unlink()
        after = file_id(str(_image(path)))
        assert after.inode == before.inode, "ext4 gives the number away at once"
        assert after != before


def test_two_pools_on_one_filesystem_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pools = [PoolConfig(name, str(tmp_path / name)) for name in ("a", "b")]
    with pytest.raises(ConfigError, match=r"pool\.b\.path = .* is on the filesystem of pool\.a\.path"):
        check(pools, ())
    check(pools[:1], ())


def test_a_pool_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no directory"):
        check([PoolConfig("p", str(tmp_path / "file"))], ())


def test_two_pools_of_one_thin_pool_are_refused(tmp_path: Path) -> None:
    pools = [PoolConfig("a", str(tmp_path), "vg-thin"), PoolConfig("b", "/proc", "vg-thin")]
    with pytest.raises(ConfigError, match=r"pool\.b\.thin_pool = 'vg-thin' is that of pool\.a"):
        check(pools, ())


def test_two_spellings_of_one_address_are_one_agent(tmp_path: Path) -> None:
    one, other = _image(tmp_path / "a.img"), _image(tmp_path / "b.img")
    with pytest.raises(ConfigError, match="is the same agent as"):
        _check(tmp_path, _guest("a", one, "tcp:[::1]:5"), _guest("b", other, "tcp:[0:0:0:0:0:0:0:1]:5"))
