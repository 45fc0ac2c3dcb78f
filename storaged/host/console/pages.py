"""What a browser can ask of the console: its pages, signing in, and the calls that the page makes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from storaged.errors import InvalidRequest
from storaged.host.console import view
from storaged.host.console.backend import Backend
from storaged.host.console.connections import details
from storaged.host.console.guard import SESSION_S, Codes, Door, Sessions
from storaged.host.console.hub import Hub
from storaged.host.console.limits import Streams
from storaged.quiet import BoundedLog
from storaged.units import MAX_SIZE

STATIC = Path(__file__).resolve().parent / "static"
MOST_BODY = 4096
_SECRET = {"cache-control": "no-store"}


class _Stream(StreamingResponse):
    """Events, if the peer may have one more stream of them."""

    def __init__(self, hub: Hub, streams: Streams) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(hub.events(), media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer, _ = details(scope)
        if why := self._streams.full(peer):
            await JSONResponse({"error": why}, HTTPStatus.TOO_MANY_REQUESTS)(scope, receive, send)
            return
        self._streams.begin(peer)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.end(peer)


@dataclass(frozen=True, slots=True)
class Pages:
    """`known`: may the client see and do everything? Before `/api/` is reached `Guarded` has asked that, and more."""

    hub: Hub
    backend: Backend
    door: Door
    codes: Codes
    streams: Streams
    refusals: BoundedLog
    sessions: Sessions
    known: Callable[[Request], bool]

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        return [
            Route("/", self.page),
            Route("/login", self.link),
            Route("/api/session", self.session),
            Route("/api/login", self.login, methods=["POST"]),
            Route("/api/logout", self.logout, methods=["POST"]),
            Route("/api/state", self.state),
            Route("/api/events", self.events),
            Route("/api/guests/{name}/resize", self.resize, methods=["POST"]),
            Route("/api/guests/{name}/cancel", self.cancel, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    # --- signing in

    async def page(self, request: Request) -> Response:
        if self.door.token or self.known(request):  # with a token the page itself asks for it
            return FileResponse(STATIC / "index.html")
        return _how({"www-authenticate": 'Cookie realm="storaged"'})

    async def session(self, request: Request) -> Response:
        known, (peer, _) = self.known(request), details(request.scope)
        said = {"token": self.door.page_token, "full": self.streams.full(peer)} if known else {}
        ways = {"login": not known, "by_token": bool(self.door.token), "logout": not self.door.trusts_user}
        return JSONResponse(ways | said, headers=_SECRET)

    async def link(self, request: Request) -> Response:
        if request.method != "GET" or not self.codes.take(request.query_params.get("code", ""), time.monotonic()):
            self._refuse(request, "the link was used already or is too old; `storagectl console` prints a new one")
            return _how({})
        return self._begin(request, RedirectResponse("/", HTTPStatus.SEE_OTHER, _SECRET))

    async def login(self, request: Request) -> Response:
        if not self.door.opens(str((await _body(request)).get("token", ""))):
            self._refuse(request, "that is not the console's token")
            return JSONResponse({"error": "that is not the console's token"}, HTTPStatus.UNAUTHORIZED)
        return self._begin(request, JSONResponse({}))

    async def logout(self, request: Request) -> Response:
        cookie = cookie_name(request.scope)
        self.sessions.end(request.cookies.get(cookie, ""))
        answer = JSONResponse({})
        answer.delete_cookie(cookie, path="/", secure=_tls(request.scope), httponly=True, samesite="strict")
        return answer

    def _refuse(self, request: Request, why: str) -> None:
        peer, _ = details(request.scope)
        self.refusals.note(peer, "sign-in", f"console: {peer}: sign-in refused: {why}")

    def _begin(self, request: Request, answer: Response) -> Response:
        """`answer`, with which a session begins."""
        answer.set_cookie(
            cookie_name(request.scope),
            self.sessions.begin(time.monotonic()),
            int(SESSION_S),
            path="/",
            secure=_tls(request.scope),
            httponly=True,
            samesite="strict",
        )
        return answer

    # --- the page's calls

    async def state(self, _: Request) -> Response:
        return JSONResponse(self.hub.state(), headers=_SECRET)

    async def events(self, _: Request) -> Response:
        return _Stream(self.hub, self.streams)

    async def resize(self, request: Request) -> Response:
        body = await _body(request)
        size, allow = body.get("size"), body.get("allow_overcommit", False)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MAX_SIZE:
            raise InvalidRequest("size: a whole number of bytes above 0 is accepted")
        if not isinstance(allow, bool):
            raise InvalidRequest("allow_overcommit: true or false is accepted")
        begun = await self.backend.resize(request.path_params["name"], size, allow_overcommit=allow)
        return JSONResponse(view.resize(begun), HTTPStatus.ACCEPTED)

    async def cancel(self, request: Request) -> Response:
        which = (await _body(request)).get("id", "")
        if not isinstance(which, str):
            raise InvalidRequest("id: a resize's id is accepted")
        asked = await self.backend.cancel(request.path_params["name"], which)
        return JSONResponse(view.resize(asked), HTTPStatus.ACCEPTED)


def cookie_name(scope: Scope) -> str:
    """With TLS the browser itself sees to it that no other host can have set it; two ports have two names."""
    _, port = scope.get("server") or ("", None)
    return f"{'__Host-' if _tls(scope) else ''}storaged-{port or 'unix'}"


def _tls(scope: Scope) -> bool:
    return bool(scope["scheme"] == "https")


def _how(headers: dict[str, str]) -> Response:
    """The page that says how to sign in."""
    return FileResponse(STATIC / "signin.html", HTTPStatus.UNAUTHORIZED, _SECRET | headers)


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidRequest."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise InvalidRequest("content-type: application/json is accepted")
    text = b""
    async for chunk in request.stream():
        text += chunk
        if len(text) > MOST_BODY:
            raise InvalidRequest(f"body: at most {MOST_BODY} bytes are accepted")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body: a JSON object is accepted") from error
    if not isinstance(value, dict):
        raise InvalidRequest("body: a JSON object is accepted")
    return value
