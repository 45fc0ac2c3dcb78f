"""Who may be set up; and users in memory and in a tree of files, changed by the real tools."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import InvalidRequest, StoragedError
from storaged.guest.containers import Containers, ContainerSettings, TokenFile, check_guest
from storaged.guest.local_users import LocalUsers
from storaged.guest.users import (
    NAME,
    Add,
    Conflict,
    Group,
    Join,
    User,
    UserRequest,
    Users,
    UserSystem,
    check_name,
    check_user,
    plan,
)
from storaged.sim.users import SimUsers

GROUPS = [Group("audio", 29, ("anna",)), Group("video", 44), Group("anna", 1000)]
USERS = [User("root", 0, 0), User("anna", 1000, 1000)]


@given(st.text(st.sampled_from("az09-_$A.:/\n\0é "), max_size=40))
def test_names(name: str) -> None:
    sound = bool(name) and name[0] in "az" and NAME.fullmatch(name) is not None and len(name) <= 32
    if sound:
        check_name("username", name)
        assert set(name[:-1]) <= set("az09-_")
    else:
        with pytest.raises(InvalidRequest, match="username"):
            check_name("username", name)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (UserRequest(""), "username"),
        (UserRequest("-x"), "username"),
        (UserRequest("Anna"), "username"),
        (UserRequest("a" * 33), "username"),
        (UserRequest("a\n"), "username"),
        (UserRequest("a$b"), "username"),
        (UserRequest("anna", 0), "uid"),
        (UserRequest("anna", 0xFFFFFFFF), "uid"),
        (UserRequest("anna", 1000, ("audio", "nogroup")), "nogroup"),
        (UserRequest("anna", 1000, ("audio,video",)), "audio,video"),
        (UserRequest("anna", 1000, ("",)), "group_names"),
    ],
)
def test_what_can_never_be_right(request_: UserRequest, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        check_user(request_, GROUPS)


def test_what_is_to_be_done() -> None:
    assert plan(UserRequest("bert"), USERS, GROUPS) == Add(UserRequest("bert"))
    assert plan(UserRequest("bert", 1001), USERS, GROUPS) == Add(UserRequest("bert", 1001))
    assert plan(UserRequest("anna"), USERS, GROUPS) == Join(())
    assert plan(UserRequest("anna", 1000, ("audio", "anna")), USERS, GROUPS) == Join(())
    assert plan(UserRequest("anna", 1000, ("video", "audio")), USERS, GROUPS) == Join(("video",))
    for conflict in (UserRequest("bert", 1000), UserRequest("anna", 1001), UserRequest("root")):
        assert isinstance(plan(conflict, USERS, GROUPS), Conflict)


MISSING = [tool for tool in ("useradd", "usermod") if shutil.which(tool) is None]
REAL = pytest.mark.skipif(os.geteuid() != 0 or bool(MISSING), reason="users: needs root, useradd and usermod")


@pytest.fixture(params=["sim", pytest.param("real", marks=REAL)])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UserSystem]:
    """Both worlds, with the same users."""
    if request.param == "sim":
        yield SimUsers()
        return
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    (etc / "group").write_text("root:x:0:\naudio:x:29:\nvideo:x:44:\nkvm:x:105:\n")
    (etc / "gshadow").write_text("root:*::\naudio:!::\nvideo:!::\nkvm:!::\n")
    (etc / "login.defs").write_text("UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\nUSERGROUPS_ENAB yes\n")
    (tmp_path / "home").mkdir()
    yield LocalUsers(str(tmp_path))


def members(system: UserSystem, group: str) -> tuple[str, ...]:
    """Who is in it."""
    return next(one.members for one in system.groups() if one.name == group)


async def test_a_user_is_made_once_and_then_joins_more_groups(system: UserSystem) -> None:
    users = Users(system)
    request = UserRequest("anna", 1234, ("audio",))
    for _ in range(2):
        assert await users.set_up(request) == ""
        assert [(user.name, user.uid) for user in system.users()] == [("root", 0), ("anna", 1234)]
        assert members(system, "audio") == ("anna",)
        assert members(system, "video") == ()
    assert await users.set_up(UserRequest("anna", None, ("video", "kvm"))) == ""
    assert [members(system, name) for name in ("audio", "video", "kvm")] == [("anna",)] * 3
    if isinstance(system, LocalUsers):
        root = Path(system._root)
        assert (root / "var/lib/systemd/linger/anna").is_file()
        home = (root / "home/anna").stat()
        assert home.st_uid == 1234
    else:
        assert isinstance(system, SimUsers)
        assert system.lingers == {"anna"}


async def test_without_a_uid_the_guest_chooses(system: UserSystem) -> None:
    users = Users(system)
    assert await users.set_up(UserRequest("anna")) == ""
    assert await users.set_up(UserRequest("bert")) == ""
    chosen = [user.uid for user in system.users()][1:]
    assert len(set(chosen)) == 2
    assert min(chosen) >= 1000


async def test_conflicts_are_reasons_and_change_nothing(system: UserSystem) -> None:
    users = Users(system)
    assert await users.set_up(UserRequest("anna", 1234)) == ""
    before = system.users(), system.groups()
    assert "1234 belongs to anna" in await users.set_up(UserRequest("bert", 1234, ("audio",)))
    assert "exists with uid 1234" in await users.set_up(UserRequest("anna", 1235, ("audio",)))
    assert "uid 0" in await users.set_up(UserRequest("root", None, ("audio",)))
    with pytest.raises(InvalidRequest, match="nogroup"):
        await users.set_up(UserRequest("carl", 1236, ("nogroup",)))
    assert (system.users(), system.groups()) == before


async def test_the_same_call_many_times_at_once(system: UserSystem) -> None:
    users = Users(system)
    answers = await asyncio.gather(*(users.set_up(UserRequest("anna", 1234, ("audio",))) for _ in range(5)))
    assert set(answers) == {""}
    assert len(system.users()) == 2
    assert members(system, "audio") == ("anna",)


async def test_what_a_tool_refuses_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("")
    (tmp_path / "etc/group").write_text("audio:x:29:\n")
    users = Users(LocalUsers(str(tmp_path)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await users.set_up(UserRequest("anna", 1234)) == "useradd: No such file or directory"
    tool = tmp_path / "useradd"
    tool.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho 'useradd: cannot lock' >&2\nexit 10\n")
    tool.chmod(0o755)
    assert await users.set_up(UserRequest("anna", 1234, ("audio",))) == "useradd: cannot lock"
    assert (tmp_path / "asked").read_text().endswith("--uid 1234 --groups audio -- anna\n")
    assert not (tmp_path / "var").exists(), "no lingering for a user that is not there"


async def test_no_user_database_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoragedError, match="etc/group: No such file"):
        await Users(LocalUsers(str(tmp_path))).set_up(UserRequest("anna"))
    with pytest.raises(InvalidRequest):
        await Users(LocalUsers(str(tmp_path))).set_up(UserRequest("-x"))


# --- the token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "name"), [("", ""), ("a\n", ""), ("a\0", ""), ("x" * 4097, ""), ("good", "Bad"), ("good", "a\nb")]
)
def test_a_token_that_is_none(token: str, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_guest(token, name)
    assert "good" not in caught.value.message


async def test_the_token_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / ".container_token"
    containers = Containers(TokenFile(ContainerSettings(token=str(path))))
    before = os.umask(0)
    try:
        await containers.configure("a longer first token", "anna")
        with path.open() as old:
            await containers.configure("second", "")
            assert old.read() == "a longer first token", "who reads it meanwhile sees one or the other"
        assert path.read_text() == "second"
        assert path.stat().st_mode & 0o7777 == 0o600
        open_to_all = ContainerSettings(token=str(path), token_mode=0o644)
        os.umask(0o077)
        await Containers(TokenFile(open_to_all)).configure("third", "")
        assert path.stat().st_mode & 0o7777 == 0o644
        assert os.listdir(tmp_path) == [path.name], "nothing is left beside it"
    finally:
        os.umask(before)


async def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    path = tmp_path / "token"
    path.symlink_to("elsewhere")
    await Containers(TokenFile(ContainerSettings(token=str(path)))).configure("token", "")
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert not path.is_symlink()
