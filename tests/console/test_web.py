"""The console as browsers and scripts meet it, over a real socket: who comes in, what is refused, what is said."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ConfigError, Kind, StoragedError
from storaged.host.console.guard import CODE_S, CODES_MOST, Codes
from storaged.host.console.limits import Limits
from storaged.host.console.server import Console
from storaged.host.console.settings import ConsoleSettings, parse
from storaged.units import GIB
from tests.console.told import Served, ToldHost, guest

RESIZE = "/api/guests/web/resize"
TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(ToldHost()) as served:
        yield served


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Served]:
    """A console that asks for a token."""
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    with Served(ToldHost(), ConsoleSettings("tcp:127.0.0.1:0", token_file=str(file))) as served:
        yield served


def events(served: Served, count: int) -> list[dict[str, Any]]:
    """The first events of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("GET", "/api/events", headers={"cookie": served.cookie})
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    found: list[dict[str, Any]] = []
    while len(found) < count:
        line = answer.readline()
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))
    connection.close()
    return found


def test_a_page_of_ours_resizes_and_cancels(served: Served) -> None:
    token = served.token()
    status, _, job = served.ask("POST", RESIZE, {"size": 20 * GIB}, x_storaged_token=token)
    assert (status, job["to"], job["state"]) == (202, 20 * GIB, "running")
    assert served.ask("POST", "/api/guests/web/cancel", {"id": "r-web"}, x_storaged_token=token)[0] == 202
    assert served.host.calls == [("resize", "web", 20 * GIB), ("cancel", "web", "r-web")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x_storaged_token": "wrong"},
        {"x_storaged_token": "ours", "origin": "http://evil.example"},
        {"x_storaged_token": "ours", "origin": "null"},
        {"x_storaged_token": "ours", "origin": "http://127.0.0.1:1"},
        {"x_storaged_token": "ours", "sec_fetch_site": "cross-site"},
        {"x_storaged_token": "ours", "sec_fetch_site": "same-site"},
        {"x_storaged_token": "ours", "sec_fetch_site": "none"},
    ],
)
def test_a_page_that_is_not_ours_changes_nothing(served: Served, headers: dict[str, str]) -> None:
    if headers.get("x_storaged_token") == "ours":
        headers = headers | {"x_storaged_token": served.token()}
    status, _, said = served.ask("POST", RESIZE, {"size": 20 * GIB}, **headers)
    assert status == 403
    assert said["error"]
    assert served.host.calls == []


def test_overcommit_is_allowed_in_so_many_words(served: Served) -> None:
    token = served.token()
    for allow, status in ((True, 202), (False, 202), ("yes", 400), (1, 400)):
        body = {"size": GIB, "allow_overcommit": allow}
        assert served.ask("POST", RESIZE, body, x_storaged_token=token)[0] == status
    assert served.host.calls == [("overcommit", "web", GIB), ("resize", "web", GIB)]


def test_our_own_origin_is_welcome(served: Served) -> None:
    own = {"origin": f"http://127.0.0.1:{served.port}", "sec_fetch_site": "same-origin"}
    assert served.ask("POST", RESIZE, {"size": GIB}, x_storaged_token=served.token(), **own)[0] == 202


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "", "127.0.0.2", "[::1", "a b"])
def test_a_name_that_somebody_points_at_us_is_not_ours(served: Served, name: str) -> None:
    status, _, said = served.ask("GET", "/api/state", host=name)
    assert status == 421
    assert "console.names" in said["error"]


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:8800", "[::1]:8800", "127.0.0.1:1"])
def test_names_of_this_machine_are_ours(served: Served, name: str) -> None:
    assert served.ask("GET", "/", host=name)[0] == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [({}, "size"), ({"size": "20G"}, "size"), ({"size": True}, "size"), ({"size": 0}, "size"), ([], "object")],
)
def test_what_can_never_be_right_is_refused_here(served: Served, body: object, says: str) -> None:
    status, _, said = served.ask("POST", RESIZE, body, x_storaged_token=served.token())
    assert status == 400
    assert says in said["error"]
    assert served.host.calls == []


def test_a_body_that_is_not_json_or_too_long_is_refused(served: Served) -> None:
    token = served.token()
    for body, kind in (({"size": 1}, "text/plain"), ({"size": 1, "x": "y" * 5000}, "application/json")):
        assert served.ask("POST", RESIZE, body, content_type=kind, x_storaged_token=token)[0] == 400
    assert served.host.calls == []


@pytest.mark.parametrize(
    ("kind", "status"),
    [(Kind.BUSY, 409), (Kind.OUT_OF_RANGE, 422), (Kind.UNAVAILABLE, 503), (Kind.INTERNAL, 500)],
)
def test_the_hosts_words_reach_the_page(served: Served, kind: Kind, status: int) -> None:
    served.host.refuses = StoragedError("web is being resized already", kind)
    found, _, said = served.ask("POST", RESIZE, {"size": GIB}, x_storaged_token=served.token())
    assert (found, said) == (status, {"error": "web is being resized already"})


def test_nothing_but_our_own_files_may_run_in_the_page(served: Served) -> None:
    for path in ("/", "/static/app.js", "/api/state", "/none"):
        _, headers, _ = served.ask("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert served.ask("GET", "/static/../server.py")[0] == 404
    assert served.ask("GET", "/static/%2e%2e/server.py")[0] == 404


def test_a_stream_begins_with_everything_and_goes_on_with_what_changed(served: Served) -> None:
    served.host.guests = [guest("db"), guest("web")]
    time.sleep(0.5)
    first, second, *rest = events(served, 4)
    assert first["whole"]
    assert [each["name"] for each in first["guests"]] == ["db", "web"]
    assert len(first["history"]["vms"]) >= 60
    assert not second["whole"]
    assert any(each["guests"] == [] for each in (second, *rest))  # nothing about them has changed
    assert second["time"] > first["time"]


def test_a_guest_that_left_is_said_to_have_left(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request("GET", "/api/events", headers={"cookie": served.cookie})
    answer = connection.getresponse()
    gone: list[str] = []
    until = time.monotonic() + 20
    while not gone and time.monotonic() < until:
        line = answer.readline()
        if line.startswith(b"data: "):
            gone = json.loads(line[6:]).get("gone", [])
            served.host.guests = []
    connection.close()
    assert gone == ["web"]


def test_a_host_that_is_lost_is_said_to_be_lost(served: Served) -> None:
    served.host.down = "storaged-host cannot be reached; is it running?"
    until = time.monotonic() + 20
    while True:
        _, _, state = served.ask("GET", "/api/state")
        if state["lost"]:
            break
        assert time.monotonic() < until
        time.sleep(0.05)
    assert state["lost"] == served.host.down
    assert state["guests"]  # old, and said to be
    served.host.down = ""
    while served.ask("GET", "/api/state")[2]["lost"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_without_the_token_there_is_nothing_to_see(locked: Served) -> None:
    for path in ("/api/state", "/api/events"):
        assert locked.ask("GET", path)[0] == 401
    assert locked.ask("POST", RESIZE, {"size": GIB})[0] == 401
    session = locked.ask("GET", "/api/session")[2]
    assert session["login"] is True
    assert "token" not in session
    assert locked.ask("POST", "/api/login", {"token": "wrong"})[0] == 401


def test_the_token_lets_a_browser_in_until_it_leaves(locked: Served) -> None:
    status, headers, _ = locked.ask("POST", "/api/login", {"token": TOKEN})
    assert status == 200
    set_cookie = headers["set-cookie"].lower()
    assert "httponly" in set_cookie
    assert "samesite=strict" in set_cookie
    cookie = headers["set-cookie"].partition(";")[0]
    assert locked.ask("GET", "/api/state", cookie=cookie)[0] == 200
    token = locked.ask("GET", "/api/session", cookie=cookie)[2]["token"]
    # A cookie alone, which a browser sends whoever asked it to, changes nothing.
    assert locked.ask("POST", RESIZE, {"size": GIB}, cookie=cookie)[0] == 403
    assert locked.ask("POST", RESIZE, {"size": GIB}, cookie=cookie, x_storaged_token=token)[0] == 202
    assert locked.ask("POST", "/api/logout", {}, cookie=cookie, x_storaged_token=token)[0] == 200
    assert locked.ask("GET", "/api/state", cookie=cookie)[0] == 401


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"sec_fetch_site": "cross-site"}])
def test_another_page_cannot_sign_a_browser_in(locked: Served, headers: dict[str, str]) -> None:
    assert locked.ask("POST", "/api/login", {"token": TOKEN}, **headers)[0] == 403


def test_any_process_on_loopback_gets_nothing_without_signing_in(served: Served) -> None:
    served.cookie = ""
    status, _, page = served.ask("GET", "/")
    assert status == 401
    assert "storagectl console" in page["text"]
    assert "<script" not in page["text"]
    session = served.ask("GET", "/api/session")[2]
    assert session == {"login": True, "by_token": False, "logout": True}
    for path in ("/api/state", "/api/events"):
        status, _, said = served.ask("GET", path)
        assert status == 401
        assert "storagectl console" in said["error"]
    assert served.ask("POST", RESIZE, {"size": GIB})[0] == 401
    assert served.ask("POST", "/api/login", {"token": ""})[0] == 401
    assert served.ask("GET", "/login?code=")[0] == 401
    assert served.host.calls == []


def test_a_link_signs_in_once(served: Served) -> None:
    path = "/" + served.console.link().removeprefix(served.url)
    assert served.ask("HEAD", path)[0] == 401, "a look ahead does not spend it"
    status, headers, _ = served.ask("GET", path, cookie="")
    assert (status, headers["location"]) == (303, "/")
    attributes = headers["set-cookie"].lower()
    assert "httponly" in attributes
    assert "samesite=strict" in attributes
    cookie = headers["set-cookie"].partition(";")[0]
    assert served.ask("GET", "/", cookie=cookie)[0] == 200
    token = served.ask("GET", "/api/session", cookie=cookie)[2]["token"]
    assert served.ask("POST", RESIZE, {"size": GIB}, cookie=cookie)[0] == 403
    assert served.ask("POST", RESIZE, {"size": GIB}, cookie=cookie, x_storaged_token=token)[0] == 202
    assert served.ask("GET", path, cookie="")[0] == 401
    assert served.ask("POST", "/api/logout", {}, cookie=cookie, x_storaged_token=token)[0] == 200
    assert served.ask("GET", "/", cookie=cookie)[0] == 401


def test_a_link_grows_old() -> None:
    codes = Codes()
    early, late = codes.issue(0.0), codes.issue(2.0)
    assert not codes.take(early, CODE_S + 1)
    assert codes.take(late, CODE_S + 1)
    assert not codes.take(late, CODE_S + 1)
    kept = [codes.issue(0.0) for _ in range(CODES_MOST + 1)]
    assert len(codes.until) == CODES_MOST
    assert not codes.take(kept[0], 1.0)
    assert codes.take(kept[-1], 1.0)


def test_scripts_bear_the_token(locked: Served) -> None:
    assert locked.ask("GET", "/api/state", authorization=f"Bearer {TOKEN}")[0] == 200
    assert locked.ask("POST", RESIZE, {"size": GIB}, authorization=f"Bearer {TOKEN}")[0] == 202
    assert locked.ask("POST", RESIZE, {"size": GIB}, authorization="Bearer wrong")[0] == 401


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"listen": "tcp:0.0.0.0:8800"}, "needs console.certificate"),
        ({"listen": "tcp:0.0.0.0:8800", "certificate": "/c", "key": "/k"}, "token_file"),
        ({"listen": "tcp:[::]:8800", "token_file": "/t"}, "needs console.certificate"),
        ({"listen": "vsock::8800"}, "unix: or tcp:"),
        ({"listen": "tcp:127.0.0.1:8800", "certificate": "/c"}, "belong together"),
        ({"listen": "tcp:127.0.0.1:8800", "names": ["a/b"]}, "host names"),
        ({"listen": 8800}, "a text is accepted"),
        ({"token_file": "token"}, "from the root"),
        ({"lisen": "x"}, "unknown key console.lisen"),
        ({"listen": "tcp:127.0.0.1:8800", "users": ["root"]}, "console.users needs"),
        ({"listen": "unix:/c", "users": "root"}, "list of users"),
        ({"listen": "unix:/c", "users": ["a b"]}, "list of users"),
    ],
)
def test_settings_that_would_open_the_console_are_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(table)


@pytest.mark.parametrize(
    ("token", "mode", "says"), [("short", 0o600, "20 characters"), (TOKEN, 0o644, "chmod 600"), ("", 0o600, "one word")]
)
def test_a_token_that_others_know_is_refused(tmp_path: Path, token: str, mode: int, says: str) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=says):
        Served(ToldHost(), ConsoleSettings("tcp:127.0.0.1:0", token_file=str(file)))


def test_beyond_this_machine_it_speaks_tls(tmp_path: Path) -> None:
    import ssl

    import trustme

    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    settings = ConsoleSettings(
        "tcp:127.0.0.1:0",
        token_file=str(tmp_path / "token"),
        certificate=str(tmp_path / "cert.pem"),
        key=str(tmp_path / "key.pem"),
    )
    served = Served(ToldHost(), settings, Limits(handshake_s=0.5))
    context = ssl.create_default_context()
    authority.configure_trust(context)

    def ask(path: str) -> tuple[int, str]:
        connection = http.client.HTTPSConnection("localhost", served.port, timeout=20, context=context)
        connection.request("GET", path, headers={"authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.headers.get("strict-transport-security", "")

    served.ask = lambda *_, **__: (ask("/api/state")[0], {}, {})  # type: ignore[method-assign]
    with served:
        status, transport = ask("/api/state")
        assert status == 200
        assert transport
        with socket.create_connection(("127.0.0.1", served.port), 5) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert not plain.recv(4096).startswith(b"HTTP")
        with socket.create_connection(("127.0.0.1", served.port), 10) as silent:
            begun = time.monotonic()
            with contextlib.suppress(ConnectionError):
                assert silent.recv(4096) == b""
            assert time.monotonic() - begun < 5, "a handshake has its time, too"


def test_a_user_that_this_machine_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no user is called 'nosuch'"):
        Console(ConsoleSettings(f"unix:{tmp_path}/s", users=("nosuch",)), ToldHost())


ASK = """
import http.client, os, socket, sys
os.setuid(int(sys.argv[3]))
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request("GET", sys.argv[2])
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users")
async def test_on_a_unix_socket_the_user_decides() -> None:
    """Nobody shows a cookie or a token here: who is let in is seen by the kernel's word alone."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        path = f"{directory}/console.sock"
        console = Console(ConsoleSettings(f"unix:{path}", users=("4711",)), ToldHost())
        console.bind()
        task = asyncio.create_task(console.run())

        async def ask(uid: int, what: str) -> str:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", ASK, path, what, str(uid), stdout=subprocess.PIPE
            )
            return (await process.communicate())[0].decode()

        try:
            for uid in (0, 4711):
                assert (await ask(uid, "/api/state")).startswith("200")
                assert '"token"' in await ask(uid, "/api/session")
            for what in ("/", "/api/state", "/api/session", "/static/app.js"):
                refused = await ask(4712, what)
                assert refused.startswith("403")
                assert "user id 4712" in refused
                assert "console.users" in refused
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_unix_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    console = Console(ConsoleSettings(f"unix:{path}"), ToldHost())
    console.bind()
    assert path.stat().st_mode & 0o777 == 0o600
    task = asyncio.create_task(console.run())
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"GET /api/state HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert path not in set(tmp_path.iterdir())  # noqa: ASYNC240  # nobody waits


def test_an_address_that_is_taken_is_said_to_be(served: Served) -> None:
    with pytest.raises(StoragedError, match="cannot listen"):
        Served(ToldHost(), ConsoleSettings(f"tcp:127.0.0.1:{served.port}"))
