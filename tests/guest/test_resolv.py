"""The resolver's configuration: what gets into it, how it gets to the disk, and that a resolver reads it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ConfigError, InvalidRequest, Kind, StoragedError
from storaged.guest.kernel_network import KernelNetwork
from storaged.guest.resolv import (
    MOST_ENTRIES,
    Resolv,
    ResolvConfig,
    ResolvFile,
    ResolvPort,
    ResolvSettings,
    check,
    render,
)
from storaged.sim.network import SimResolv
from tests.guest.netns import Lab
from tests.guest.test_network_contract import FIRST

SETTINGS = ResolvSettings()
OPTIONS = "options single-request timeout:1 attempts:5\n"

# --- what may stand in it -------------------------------------------------------------------------------------

labels = st.from_regex(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,20}[a-zA-Z0-9_])?", fullmatch=True)
domains = st.lists(labels, min_size=1, max_size=5).map(".".join)
servers = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).filter(
    lambda ip: not ip.is_multicast and not (ip.version == 4 and ip.is_reserved)
)


@given(st.lists(servers, max_size=8), st.lists(domains, max_size=8))
def test_addresses_and_names_come_out_as_they_went_in(addresses: list[object], names: list[str]) -> None:
    text = render(check([str(one) for one in addresses], names), SETTINGS)
    expected = [f"nameserver {one}" for one in addresses or map(ip_address, SETTINGS.fallback)]
    expected += [f"search {' '.join(names)}"] * bool(names)
    assert text == "\n".join([*expected, OPTIONS])


@given(st.lists(st.text(max_size=40), max_size=4), st.lists(st.text(max_size=40), max_size=4))
def test_no_text_adds_a_line_or_a_word(addresses: list[str], names: list[str]) -> None:
    try:
        config = check(addresses, names)
    except InvalidRequest:
        return
    lines = render(config, SETTINGS).splitlines()
    assert len(lines) == (len(addresses) or 4) + bool(names) + 1
    for line in lines[: len(addresses)]:
        keyword, address = line.split(" ")
        assert keyword == "nameserver"
        ip_address(address)
    if names:
        assert lines[-2].split(" ") == ["search", *names]


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "dns.google",
        "8.8.8.8\nnameserver 6.6.6.6",
        "8.8.8.8\n",
        "8.8.8.8 ",
        "8.8.8.8\0",
        "8.8.8",
        "08.8.8.8",
        "8.8.8.8/24",
        "224.0.0.251",
        "255.255.255.255",
        "ff02::fb",
        "::1::",
        "fe80::1%",
        "fe80::1%eth0\noptions debug",
        "fe80::1%eth0 x",
        "fe80::1%../x",
        "٨.٨.٨.٨",
    ],
)
def test_what_is_no_nameserver_is_named(value: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^resolv_config\.nameservers\[1\] "):
        check(["1.1.1.1", value], [])


@pytest.mark.parametrize(
    "value",
    [
        "",
        "..",
        ".example",
        "a..b",
        "a b",
        "a\n",
        "a\nnameserver 6.6.6.6",
        "a\tb",
        "a\0",
        "-a",
        "a-",
        "bücher.example",
        "a" * 64,
        ".".join(["a" * 50] * 6),
        "a;b",
        "#",
    ],
)
def test_what_is_no_domain_is_named(value: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^resolv_config\.search_domains\[1\] ") as caught:
        check([], ["example.com", value])
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("value", ["fe80::1%eth0", "::1", "127.0.0.53", "0.0.0.0", "2001:db8::1"])
def test_other_addresses_that_resolvers_take_are_taken(value: str) -> None:
    assert check([value], []).nameservers == (value,)


def test_the_root_and_a_full_name_are_domains() -> None:
    assert check([], [".", "example.com.", "_tcp.example"]).search_domains == (".", "example.com.", "_tcp.example")


def test_a_list_without_end_is_refused() -> None:
    check(["1.1.1.1"] * MOST_ENTRIES, ["a"] * MOST_ENTRIES)
    with pytest.raises(InvalidRequest, match=r"^resolv_config\.nameservers has 65 entries"):
        check(["1.1.1.1"] * (MOST_ENTRIES + 1), [])
    with pytest.raises(InvalidRequest, match=r"^resolv_config\.search_domains has 65 entries"):
        check([], ["a"] * (MOST_ENTRIES + 1))


def test_without_nameservers_public_ones_are_used() -> None:
    assert render(ResolvConfig((), ()), SETTINGS) == (
        "nameserver 8.8.8.8\nnameserver 8.8.4.4\n"
        "nameserver 2001:4860:4860::8888\nnameserver 2001:4860:4860::8844\n" + OPTIONS
    )
    mine = ResolvSettings(fallback=("9.9.9.9",), options="")
    assert render(ResolvConfig((), ("a", "b")), mine) == "nameserver 9.9.9.9\nsearch a b\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", "run/resolv.conf"),
        ("path", "/run/../etc/resolv.conf"),
        ("path", "/run/\0"),
        ("path", "/"),
        ("path", ""),
        ("options", "debug\nnameserver 6.6.6.6"),
        ("fallback", ("nonsense",)),
    ],
)
def test_settings_that_make_no_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^resolv\.{key}"):
        ResolvSettings(**{key: value})  # type: ignore[arg-type]


# --- one contract, in memory and in a folder ------------------------------------------------------------------


class Folder:
    """A root of the test's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "run").mkdir()
        self.file = path / "run/resolv.conf"
        self.port = ResolvFile(root=str(path))

    def read(self) -> str | None:
        return self.file.read_text() if self.file.exists() else None


class Memory:
    """The simulation."""

    def __init__(self) -> None:
        self.port: ResolvPort = SimResolv()
        self._sim = self.port

    def read(self) -> str | None:
        assert isinstance(self._sim, SimResolv)
        return self._sim.text


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(params=["sim", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder | Memory:
    return Memory() if request.param == "sim" else Folder(tmp_path)


async def test_the_last_configuration_is_the_whole_of_it(place: Folder | Memory) -> None:
    resolv = Resolv(place.port)
    assert place.read() is None
    await resolv.set(["192.0.2.1", "2001:DB8:0::1"], ["corp.example", "example.com"])
    assert place.read() == "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch corp.example example.com\n" + OPTIONS
    await resolv.set(["192.0.2.2"], [])
    assert place.read() == "nameserver 192.0.2.2\n" + OPTIONS
    for wrong in ((["192.0.2.3", "x"], []), (["192.0.2.3"], ["a b"])):
        with pytest.raises(InvalidRequest):
            await resolv.set(*wrong)
        assert place.read() == "nameserver 192.0.2.2\n" + OPTIONS


# --- the file -------------------------------------------------------------------------------------------------


def test_everybody_may_read_it_whatever_the_umask(folder: Folder) -> None:
    before = os.umask(0o077)
    try:
        folder.port.write("one\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.file.stat().st_mode) == 0o644
    assert os.listdir(folder.file.parent) == ["resolv.conf"]


def test_nothing_stale_is_in_the_way(folder: Folder) -> None:
    run = folder.file.parent
    (run / ".resolv.conf.storaged-0123456789abcdef").write_text("of a run that was killed")
    (run / ".resolv.conf.storaged-link").symlink_to("/nowhere")
    (run / ".resolv.conf.storaged-directory").mkdir()
    (run / "resolv.conf.tmp").write_text("not ours")
    folder.port.write("new\n")
    assert folder.read() == "new\n"
    assert sorted(os.listdir(run)) == [".resolv.conf.storaged-directory", "resolv.conf", "resolv.conf.tmp"]


def test_a_link_in_its_place_is_replaced_not_followed(folder: Folder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    folder.file.symlink_to(victim)
    folder.port.write("new\n")
    assert victim.read_text() == "untouched"
    assert not folder.file.is_symlink()
    assert folder.read() == "new\n"


@pytest.mark.parametrize("target", ["{outside}", "../../../../../../../../../{outside}"])
def test_no_link_on_the_way_leads_out_of_the_root(tmp_path: Path, target: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "run").symlink_to(target.format(outside=outside))
    with pytest.raises(StoragedError, match=r"resolver configuration /run/resolv\.conf: No such file"):
        ResolvFile(root=str(root)).write("new\n")
    assert not os.listdir(outside)
    # In the root that the link belongs to, it leads to where it says.
    inside = root / str(outside).lstrip("/")
    inside.mkdir(parents=True)
    ResolvFile(root=str(root)).write("new\n")
    assert (inside / "resolv.conf").read_text() == "new\n"
    assert not os.listdir(outside)


def test_what_cannot_be_replaced_stays_and_leaves_nothing_behind(folder: Folder) -> None:
    folder.file.mkdir()
    with pytest.raises(StoragedError, match="directory") as caught:
        folder.port.write("new\n")
    assert caught.value.kind is Kind.INTERNAL
    assert os.listdir(folder.file.parent) == ["resolv.conf"]


def test_who_reads_meanwhile_sees_one_whole_file(folder: Folder) -> None:
    texts = ["a" * 70_000 + "\n", "b" * 70_000 + "\n"]
    folder.port.write(texts[0])
    over, torn = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            found = folder.read()
            if found not in texts:
                torn.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(100):
            folder.port.write(texts[number % 2])
    finally:
        over.set()
        reader.join()
    assert not torn


# --- a resolver reads it --------------------------------------------------------------------------------------


@pytest.fixture
def lab() -> Iterator[Lab]:
    one = Lab()
    try:
        yield one
    finally:
        one.close()


def answer(query: bytes) -> tuple[str, bytes]:
    """The name that is asked for, and the answer: 192.0.2.7 for web.corp.example, no such name for all else."""
    parts, at = [], 12
    while query[at]:
        parts.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    name, question = ".".join(parts), query[12 : at + 5]
    known = name == "web.corp.example" and question[-4:] == struct.pack("!HH", 1, 1)
    head = query[:2] + struct.pack("!HHHHH", 0x8180 if known else 0x8183, 1, int(known), 0, 0)
    record = struct.pack("!HHHIH4s", 0xC00C, 1, 1, 60, 4, socket.inet_aton("192.0.2.7")) if known else b""
    return name, head + question + record


@pytest.mark.root
async def test_a_name_of_the_hosts_network_is_found_through_the_gateway(lab: Lab, folder: Folder) -> None:
    KernelNetwork(namespace=lab.guest.path).configure("eth0", FIRST)
    await Resolv(folder.port).set([Lab.FAR], ["corp.example"])
    server = lab.far.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind((Lab.FAR, 53))
    server.settimeout(0.1)
    asked, over = [], threading.Event()

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                query, peer = server.recvfrom(512)
                name, reply = answer(query)
                asked.append((name, peer[0]))
                server.sendto(reply, peer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        script = 'mount --bind "$1" /etc/resolv.conf && exec getent ahostsv4 web'
        found = lab.guest.run("unshare", "--mount", "sh", "-c", script, "sh", str(folder.file))
    finally:
        over.set()
        thread.join()
        server.close()
    assert found.split()[0] == "192.0.2.7"
    assert ("web.corp.example", Lab.GUEST) in asked
