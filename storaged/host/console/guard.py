"""Who may come in, and whose browser may change something. Pure decisions over a request's headers and its peer.

On a unix socket the kernel says which user connects, and that decides. On TCP, loopback too, a client has signed in:
with the token from a file, or by a link that works once and that only the host's own service gives out.

A browser sends what a foreign page asks it to, with our cookies and from our machine. So whatever changes anything
needs three things that a foreign page cannot give: Sec-Fetch-Site and Origin that say it comes from this console, and
a header with a token that only a page of this console can have read. Host names that are not ours are refused for
everything, or a name that somebody points at 127.0.0.1 would make his page one of ours.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlsplit

from storaged.addresses import TcpAddress, UnixAddress
from storaged.host.console.settings import ConsoleSettings

TOKEN_HEADER = "x-storaged-token"  # noqa: S105  # its name, not a token
SESSIONS_MOST = 64
SESSION_S = 12 * 3600.0
CODES_MOST = 16
CODE_S = 600.0
"""Seconds for which a sign-in link is good."""
_HERE = ("localhost", "127.0.0.1", "::1")
_SAFE = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, as an HTTP status, a sentence, and a word under which the log counts it."""

    status: HTTPStatus
    why: str
    reason: str


@dataclass(frozen=True, slots=True)
class Door:
    """What is asked of a client.

    `token`: lets in who knows it; empty: there is none. `uids`: the users who may come in, on a unix socket; None on
    TCP, where the kernel does not say who connects.
    """

    names: frozenset[str]
    token: str
    page_token: str
    uids: frozenset[int] | None = None

    @property
    def trusts_user(self) -> bool:
        """True where the user at the other end is enough, and nobody has to sign in."""
        return self.uids is not None and not self.token

    def other_user(self, uid: int | None) -> Refusal | None:
        """Is it a user who may not come in?"""
        if self.uids is None or uid in self.uids:
            return None
        return Refusal(
            HTTPStatus.FORBIDDEN,
            f"user id {uid} may not use this console; if it should, add it to console.users",
            "user",
        )

    def stranger(self, host: str) -> Refusal | None:
        """Is the Host header one of our names?"""
        name = _hostname(host)
        if name in self.names:
            return None
        return Refusal(
            HTTPStatus.MISDIRECTED_REQUEST,
            f"this console does not answer to the name {name[:80]!r}; if it should, add it to console.names",
            "host name",
        )

    def foreign(self, method: str, headers: Mapping[str, str]) -> Refusal | None:
        """Does the request come from a page that is not ours?"""
        site, origin = headers.get("sec-fetch-site", ""), headers.get("origin", "")
        if method in _SAFE:
            return None
        if site not in ("", "same-origin"):
            return Refusal(
                HTTPStatus.FORBIDDEN, f"refused: the request comes from another page ({site[:20]!r})", "other page"
            )
        if origin and _origin_host(origin) != headers.get("host", "").lower():
            return Refusal(HTTPStatus.FORBIDDEN, f"refused: the request comes from {origin[:80]!r}", "other page")
        return None

    def unproven(self, headers: Mapping[str, str]) -> Refusal | None:
        """Does it lack the token that only our own page can have read, or the one that lets people in?"""
        if _same(headers.get(TOKEN_HEADER, ""), self.page_token) or self.bears(headers):
            return None
        return Refusal(
            HTTPStatus.FORBIDDEN,
            "this page is older than storaged-host, which has been restarted: load it again",
            "page token",
        )

    def bears(self, headers: Mapping[str, str]) -> bool:
        """True when the request carries the token itself, as scripts do."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        return bool(self.token) and kind.lower() == "bearer" and _same(value.strip(), self.token)

    def opens(self, token: str) -> bool:
        """True for the token that lets people in."""
        return bool(self.token) and _same(token.strip(), self.token)


def door(settings: ConsoleSettings, token: str, uids: frozenset[int]) -> Door:
    """The door that belongs to `settings`; `uids` may come in on a unix socket."""
    names = {*_HERE, *settings.names}
    if isinstance(settings.address, TcpAddress):
        names.add(settings.address.host.strip("[]").lower())
    return Door(
        frozenset(names),
        token,
        secrets.token_urlsafe(32),
        uids if isinstance(settings.address, UnixAddress) else None,
    )


@dataclass(slots=True)
class Sessions:
    """Who has signed in, until `SESSION_S` later. In memory: a restart asks again."""

    until: dict[str, float] = field(default_factory=dict)

    def begin(self, now: float) -> str:
        """A new one; the oldest makes room."""
        self.until = {key: until for key, until in self.until.items() if until > now}
        while len(self.until) >= SESSIONS_MOST:
            del self.until[min(self.until, key=self.until.__getitem__)]
        key = secrets.token_urlsafe(32)
        self.until[key] = now + SESSION_S
        return key

    def lasts(self, key: str, now: float) -> bool:
        """True while `key` is good."""
        return self.until.get(key, 0.0) > now

    def end(self, key: str) -> None:
        """Forget it."""
        self.until.pop(key, None)


@dataclass(slots=True)
class Codes:
    """What sign-in links contain: good once, and for `CODE_S`. Only hashes are kept."""

    until: dict[bytes, float] = field(default_factory=dict)

    def issue(self, now: float) -> str:
        """A new one; the oldest makes room."""
        self.until = {key: until for key, until in self.until.items() if until > now}
        while len(self.until) >= CODES_MOST:
            del self.until[min(self.until, key=self.until.__getitem__)]
        code = secrets.token_urlsafe(32)
        self.until[_hash(code)] = now + CODE_S
        return code

    def take(self, code: str, now: float) -> bool:
        """True when `code` is good; it is not any more."""
        return self.until.pop(_hash(code), 0.0) > now


def _hash(code: str) -> bytes:
    return hashlib.sha256(code.encode("utf-8", "surrogatepass")).digest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _hostname(host: str) -> str:
    """Without port and brackets, in lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _origin_host(origin: str) -> str:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc.lower() if parts.scheme in ("http", "https") else ""
