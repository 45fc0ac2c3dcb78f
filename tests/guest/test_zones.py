"""The local time zone: in memory, in a folder, and mounted in a namespace of its own (marked `root`)."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from zoneinfo import available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.guest.clock import Clock, ClockSettings, ZonePort, check_zone
from storaged.guest.zones import ZoneFiles, is_zone
from storaged.sim.clock import SimWallClock, SimZones
from tests.guest.mountns import MountNamespace

ZONEINFO = "/usr/share/zoneinfo"
BERLIN, TOKYO = "Europe/Berlin", "Asia/Tokyo"


def zone_file(name: str, hours: int, version: bytes = b"2") -> bytes:
    """A zone of one offset without end (RFC 9636)."""
    abbreviation = name.encode() + b"\0"
    header = b"TZif" + version + bytes(15) + struct.pack("!6L", 0, 0, 0, 0, 1, len(abbreviation))
    block = header + struct.pack("!lBB", hours * 3600, 0, 0) + abbreviation
    return block if version == b"\0" else block + block + f"\n{name}{-hours}\n".encode()


class Folder:
    """A root of the test's own, with a few zones and things that are none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.zones = root / ZONEINFO[1:]
        self.etc = root / "etc"
        self.localtime = self.etc / "localtime"
        self.port: ZonePort = ZoneFiles(root=str(root))
        self.etc.mkdir()
        for name, text in {
            BERLIN: zone_file("CET", 1),
            TOKYO: zone_file("JST", 9),
            "UTC": zone_file("UTC", 0),
            "leapseconds": b"# a text\n",
            "Broken/Cut": zone_file("CET", 1)[:50],
            "Broken/Empty": b"",
            "Broken/Short": b"TZif2",
        }.items():
            path = self.zones / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        (self.zones / "Japan").symlink_to(TOKYO)
        (self.zones / "posix").symlink_to(".")
        (self.zones / "localtime").symlink_to("/etc/localtime")
        (self.zones / "Climb").symlink_to("../../../etc/localtime")
        (self.zones / "Loop").symlink_to("Loop")
        (self.zones / "Outside").symlink_to(root.parent / "outside")
        (root.parent / "outside").write_bytes(zone_file("OUT", 5))
        os.mkfifo(self.zones / "Pipe")

    def local(self) -> str | None:
        """The name that the link says."""
        if not self.localtime.is_symlink():
            return None
        target = os.readlink(self.localtime)
        assert target.startswith(ZONEINFO + "/")
        return target.removeprefix(ZONEINFO + "/")


class Memory:
    """The simulation."""

    def __init__(self) -> None:
        self._sim = SimZones((BERLIN, TOKYO, "UTC"))
        self.port: ZonePort = self._sim

    def local(self) -> str | None:
        return self._sim.local


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "root").mkdir()
    return Folder(tmp_path / "root")


@pytest.fixture(params=["sim", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder | Memory:
    return Memory() if request.param == "sim" else Folder(tmp_path)


# --- what a zone's file is -----------------------------------------------------------------------------------


def real_zone() -> bytes:
    """One with transitions, leap seconds and all (skips where there is no database)."""
    path = Path(f"{ZONEINFO}/right/Europe/Berlin")
    path = path if path.exists() else Path(f"{ZONEINFO}/Europe/Berlin")
    if not path.exists():
        pytest.skip("needs the time zone database")
    return path.read_bytes()


@pytest.mark.parametrize("make", [real_zone, lambda: zone_file("CET", 1), lambda: zone_file("CET", 1, b"\0")])
def test_a_file_that_was_cut_short_anywhere_is_no_zone(make: Callable[[], bytes]) -> None:
    data = make()
    assert is_zone(data)
    assert not [length for length in range(len(data)) if is_zone(data[:length])]


@given(st.binary(max_size=200))
def test_noise_is_no_zone(noise: bytes) -> None:
    assert not is_zone(noise)
    assert not is_zone(b"TZif2" + noise)


# --- one contract ---------------------------------------------------------------------------------------------


async def test_the_last_zone_is_the_local_one_and_a_wrong_one_changes_nothing(place: Folder | Memory) -> None:
    clock = Clock(SimWallClock(), place.port)
    assert place.local() is None
    for name in (BERLIN, TOKYO, TOKYO, "UTC"):
        await clock.set_zone(name, bind=False)
        assert place.local() == name
    for name in ("", "/UTC", "../zoneinfo/UTC", "UTC\n"):
        with pytest.raises(InvalidRequest):
            await clock.set_zone(name, bind=False)
    for name in ("Mars/Olympus_Mons", "UTC/Nothing", "Europe"):
        with pytest.raises(StoragedError, match=rf"timezone_name '{name}'") as caught:
            await clock.set_zone(name, bind=False)
        assert caught.value.kind is Kind.INTERNAL
    assert place.local() == "UTC"


# --- the link -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Nowhere", "no such time zone"),
        ("localtime", "no such time zone"),  # it would then be a link to itself
        ("Climb", "no such time zone"),
        ("Outside", "no such time zone"),
        ("Loop", "no such time zone"),
        ("Europe", "not a time zone"),
        ("leapseconds", "not a time zone"),
        ("Broken/Cut", "not a time zone"),
        ("Broken/Empty", "not a time zone"),
        ("Broken/Short", "not a time zone"),
        ("Pipe", "not a time zone"),
    ],
)
def test_what_is_no_zone_changes_nothing(folder: Folder, name: str, reason: str) -> None:
    folder.port.set_zone(BERLIN, bind=False)
    for bind in (False, True):
        with pytest.raises(StoragedError, match=reason):
            folder.port.set_zone(name, bind=bind)
    assert folder.local() == BERLIN
    assert os.listdir(folder.etc) == ["localtime"]


def test_another_name_of_a_zone_is_kept_as_it_is(folder: Folder) -> None:
    for name in ("Japan", "posix/Asia/Tokyo"):
        folder.port.set_zone(name, bind=False)
        assert folder.local() == name


def test_nothing_stale_is_in_the_way(folder: Folder) -> None:
    (folder.etc / ".localtime.storaged-0123456789abcdef").symlink_to("/nowhere")
    folder.localtime.write_text("a file, not a link")
    folder.port.set_zone(BERLIN, bind=False)
    assert folder.local() == BERLIN
    assert os.listdir(folder.etc) == ["localtime"]


def test_no_link_leads_out_of_the_root(folder: Folder) -> None:
    outside = folder.root.parent / "etc"
    outside.mkdir()
    folder.etc.rmdir()
    folder.etc.symlink_to("../../../etc" if outside.parent == Path("/") else "../etc")
    with pytest.raises(StoragedError, match=r"setting /etc/localtime to Europe/Berlin"):
        folder.port.set_zone(BERLIN, bind=False)
    assert not os.listdir(outside)


def test_without_a_database_there_is_no_zone(tmp_path: Path) -> None:
    with pytest.raises(StoragedError, match="time zone UTC: No such file"):
        ZoneFiles(root=str(tmp_path)).set_zone("UTC", bind=False)


def test_other_places_may_be_set(folder: Folder) -> None:
    (folder.root / "var").mkdir()
    settings = ClockSettings(zoneinfo=f"{ZONEINFO}/posix", localtime="/var/zone")
    ZoneFiles(settings, str(folder.root)).set_zone(BERLIN, bind=False)
    assert os.readlink(folder.root / "var/zone") == f"{ZONEINFO}/posix/{BERLIN}"


# --- the mount ------------------------------------------------------------------------------------------------


@pytest.fixture
def space() -> Iterator[MountNamespace]:
    one = MountNamespace()
    try:
        yield one
    finally:
        one.close()


def local_time(space: MountNamespace, path: Path) -> str:
    """What the C library says the zone at `path` is."""
    environment = {**os.environ, "TZ": f":{path}"}
    return space.run(
        lambda: subprocess.run(["date", "+%Z %z"], env=environment, check=True, capture_output=True, text=True).stdout
    ).strip()


def bind(space: MountNamespace, folder: Folder, name: str, *, by_mount: bool = True) -> None:
    space.run(lambda: folder.port.set_zone(name, bind=by_mount))


@pytest.mark.root
@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_a_zone_is_mounted_over_whatever_is_there(folder: Folder, space: MountNamespace, kind: str) -> None:
    if kind == "file":
        folder.localtime.write_bytes(zone_file("OLD", 3))
    else:
        folder.localtime.symlink_to("../usr/share/zoneinfo/UTC" if kind == "link" else "/nowhere")
    for name, expected in ((BERLIN, "CET +0100"), (TOKYO, "JST +0900"), (TOKYO, "JST +0900")):
        bind(space, folder, name)
        assert local_time(space, folder.localtime) == expected
        assert space.mounts(str(folder.root)) == [str(folder.localtime)], "one mount, however many calls"
    assert local_time(space, folder.zones / "UTC") == "UTC +0000", "the zone behind the old link is what it was"


@pytest.mark.root
def test_a_root_that_cannot_be_written_to_gets_its_zone(folder: Folder, space: MountNamespace) -> None:
    folder.localtime.write_bytes(zone_file("OLD", 3))
    space.read_only(str(folder.root))
    with pytest.raises(StoragedError, match=r"setting /etc/localtime to Europe/Berlin: Read-only file system"):
        bind(space, folder, BERLIN, by_mount=False)
    bind(space, folder, BERLIN)
    assert local_time(space, folder.localtime) == "CET +0100"
    with pytest.raises(StoragedError, match="Read-only file system"):
        bind(space, folder, TOKYO, by_mount=False)
    assert local_time(space, folder.localtime) == "CET +0100"


@pytest.mark.root
def test_a_link_takes_the_place_of_a_mount(folder: Folder, space: MountNamespace) -> None:
    folder.localtime.write_bytes(zone_file("OLD", 3))
    bind(space, folder, BERLIN)
    bind(space, folder, TOKYO, by_mount=False)
    assert folder.local() == TOKYO
    assert not space.mounts(str(folder.root))
    assert os.listdir(folder.etc) == ["localtime"]


@pytest.mark.root
def test_there_must_be_something_to_mount_on(folder: Folder, space: MountNamespace) -> None:
    with pytest.raises(StoragedError, match=r"setting /etc/localtime to Europe/Berlin: No such file"):
        bind(space, folder, BERLIN)
    assert not os.listdir(folder.etc)


@pytest.mark.root
@pytest.mark.skipif(not os.path.exists(f"{ZONEINFO}/Asia/Kolkata"), reason="needs the time zone database")
@pytest.mark.parametrize("by_mount", [False, True])
def test_every_program_then_tells_the_time_of_the_zone(tmp_path: Path, space: MountNamespace, by_mount: bool) -> None:
    """The real places, with an /etc of the test's own over this machine's."""
    (tmp_path / "localtime").symlink_to(f"{ZONEINFO}/UTC")
    space.bind(str(tmp_path), "/etc")
    assert space.run(lambda: os.listdir("/etc")) == ["localtime"]
    clock = ZoneFiles()
    space.run(lambda: clock.set_zone("Asia/Kolkata", bind=by_mount))
    environment = {key: value for key, value in os.environ.items() if key != "TZ"}
    told = space.run(
        lambda: subprocess.run(["date", "+%Z %z"], env=environment, check=True, capture_output=True, text=True).stdout
    )
    assert told == "IST +0530\n"


@pytest.mark.skipif(not os.path.exists(f"{ZONEINFO}/Europe/Berlin"), reason="needs the time zone database")
def test_every_zone_of_the_real_database_is_taken(tmp_path: Path) -> None:
    (tmp_path / "usr/share").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    subprocess.run(["cp", "-a", ZONEINFO, str(tmp_path / "usr/share")], check=True)
    port = ZoneFiles(root=str(tmp_path))
    for name in available_timezones():
        if os.path.exists(f"{ZONEINFO}/{name}") and name != "localtime":
            port.set_zone(check_zone(name), bind=False)
            assert os.readlink(tmp_path / "etc/localtime") == f"{ZONEINFO}/{name}"
