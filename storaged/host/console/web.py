"""The console's pages and what they call, as an ASGI application."""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.host.console import view
from storaged.host.console.backend import Backend
from storaged.host.console.connections import details
from storaged.host.console.guard import SESSION_S, Codes, Door, Refusal, Sessions
from storaged.host.console.hub import Hub
from storaged.host.console.limits import Streams
from storaged.quiet import RefusalLog
from storaged.units import MAX_SIZE

STATIC = Path(__file__).resolve().parent / "static"
MOST_BODY = 4096
HOW = "sign in: `storagectl console`, on the host, prints a link; scripts send the token of console.token_file"
_STATUS = {
    Kind.INVALID: HTTPStatus.BAD_REQUEST,
    Kind.OUT_OF_RANGE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Kind.PRECONDITION: HTTPStatus.CONFLICT,
    Kind.BUSY: HTTPStatus.CONFLICT,
    Kind.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Kind.UNSUPPORTED: HTTPStatus.NOT_IMPLEMENTED,
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Guarded:
    """Before anything else: is it our name, our page, somebody who may? After: headers that keep the page ours."""

    def __init__(self, app: ASGIApp, door: Door, sessions: Sessions, refusals: RefusalLog, *, tls: bool) -> None:
        self._app = app
        self._door = door
        self._sessions = sessions
        self._refusals = refusals
        self._tls = tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if self._tls:
                    headers.setdefault("strict-transport-security", "max-age=31536000")
            await send(message)

        refusal = self._refuses(Request(scope))
        app = self._app
        if refusal is not None:
            peer, _ = details(scope)
            self._refusals.note(peer, refusal.reason, f"console: {peer}: {refusal.why}")
            app = _refused(refusal)
        await app(scope, receive, dressed)

    def _refuses(self, request: Request) -> Refusal | None:
        headers, path = request.headers, request.url.path
        _, uid = details(request.scope)
        refusal = (
            self._door.other_user(uid)
            or self._door.stranger(headers.get("host", ""))
            or self._door.foreign(request.method, headers)
        )
        if refusal is not None or not path.startswith("/api/") or path in ("/api/session", "/api/login"):
            return refusal
        if not self.known(request):
            return Refusal(HTTPStatus.UNAUTHORIZED, HOW, "not signed in")
        if request.method not in ("GET", "HEAD"):
            return self._door.unproven(headers)
        return None

    def known(self, request: Request) -> bool:
        """May whoever asks see and do everything?"""
        if self._door.trusts_user or self._door.bears(request.headers):
            return True
        return self._sessions.lasts(request.cookies.get(cookie_name(request.scope), ""), time.monotonic())


def cookie_name(scope: Scope) -> str:
    """With TLS the browser itself sees to it that no other host can have set it; two ports have two names."""
    _, port = scope.get("server") or ("", None)
    prefix = "__Host-" if scope["scheme"] == "https" else ""
    return f"{prefix}storaged-{port or 'unix'}"


def _refused(refusal: Refusal) -> Response:
    return JSONResponse({"error": refusal.why}, refusal.status)


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


def application(
    hub: Hub, backend: Backend, door: Door, codes: Codes, streams: Streams, refusals: RefusalLog, *, tls: bool
) -> ASGIApp:
    """Everything that a browser can ask."""
    sessions = Sessions()

    async def page(request: Request) -> Response:
        if door.token or guarded.known(request):  # with a token the page itself asks for it
            return FileResponse(STATIC / "index.html")
        headers = {"www-authenticate": 'Cookie realm="storaged"', "cache-control": "no-store"}
        return FileResponse(STATIC / "signin.html", HTTPStatus.UNAUTHORIZED, headers)

    async def session(request: Request) -> Response:
        known, (peer, _) = guarded.known(request), details(request.scope)
        said = {"token": door.page_token, "full": streams.full(peer)} if known else {}
        return JSONResponse(
            {"login": not known, "by_token": bool(door.token), "logout": not door.trusts_user} | said,
            headers={"cache-control": "no-store"},
        )

    async def link(request: Request) -> Response:
        if request.method != "GET" or not codes.take(request.query_params.get("code", ""), time.monotonic()):
            _refuse(request, "that link was used already, or is too old: get a new one with `storagectl console`")
            return FileResponse(STATIC / "signin.html", HTTPStatus.UNAUTHORIZED, {"cache-control": "no-store"})
        return begin(request, RedirectResponse("/", HTTPStatus.SEE_OTHER, {"cache-control": "no-store"}))

    async def login(request: Request) -> Response:
        if not door.opens(str((await _body(request)).get("token", ""))):
            _refuse(request, "that is not the console's token")
            return JSONResponse({"error": "that is not the console's token"}, HTTPStatus.UNAUTHORIZED)
        return begin(request, JSONResponse({}))

    def _refuse(request: Request, why: str) -> None:
        peer, _ = details(request.scope)
        refusals.note(peer, "sign-in", f"console: {peer}: sign-in refused: {why}")

    def begin(request: Request, answer: Response) -> Response:
        answer.set_cookie(
            cookie_name(request.scope),
            sessions.begin(time.monotonic()),
            int(SESSION_S),
            path="/",
            secure=tls,
            httponly=True,
            samesite="strict",
        )
        return answer

    async def logout(request: Request) -> Response:
        cookie = cookie_name(request.scope)
        sessions.end(request.cookies.get(cookie, ""))
        answer = JSONResponse({})
        answer.delete_cookie(cookie, path="/", secure=tls, httponly=True, samesite="strict")
        return answer

    async def state(_: Request) -> Response:
        return JSONResponse(hub.state(), headers={"cache-control": "no-store"})

    async def events(_: Request) -> Response:
        return _Stream(hub, streams)

    async def resize(request: Request) -> Response:
        size = (await _body(request)).get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MAX_SIZE:
            raise InvalidRequest("size: a whole number of bytes above 0 is accepted")
        begun = await backend.resize(request.path_params["name"], size)
        return JSONResponse(view.resize(begun), HTTPStatus.ACCEPTED)

    async def cancel(request: Request) -> Response:
        which = (await _body(request)).get("id", "")
        if not isinstance(which, str):
            raise InvalidRequest("id: a resize's id is accepted")
        return JSONResponse(view.resize(await backend.cancel(request.path_params["name"], which)), HTTPStatus.ACCEPTED)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/login", link),
            Route("/api/session", session),
            Route("/api/login", login, methods=["POST"]),
            Route("/api/logout", logout, methods=["POST"]),
            Route("/api/state", state),
            Route("/api/events", events),
            Route("/api/guests/{name}/resize", resize, methods=["POST"]),
            Route("/api/guests/{name}/cancel", cancel, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={StoragedError: _failed, ClientDisconnect: _left},
    )
    guarded = Guarded(app, door, sessions, refusals, tls=tls)
    return guarded


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, StoragedError)
    return JSONResponse({"error": error.message}, _STATUS.get(error.kind, HTTPStatus.INTERNAL_SERVER_ERROR))


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # which nobody reads


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
