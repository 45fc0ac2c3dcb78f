"""The console's pages and what they call, as an ASGI application."""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storaged.errors import InvalidRequest, Kind, StoragedError
from storaged.host.console import view
from storaged.host.console.backend import Backend
from storaged.host.console.guard import SESSION_S, Door, Refusal, Sessions
from storaged.host.console.hub import Hub
from storaged.units import MAX_SIZE

STATIC = Path(__file__).resolve().parent / "static"
MOST_BODY = 4096
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

    def __init__(self, app: ASGIApp, door: Door, sessions: Sessions, *, tls: bool) -> None:
        self._app = app
        self._door = door
        self._sessions = sessions
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
        app = self._app if refusal is None else _refused(refusal)
        await app(scope, receive, dressed)

    def _refuses(self, request: Request) -> Refusal | None:
        headers, path = request.headers, request.url.path
        refusal = self._door.stranger(headers.get("host", "")) or self._door.foreign(request.method, headers)
        if refusal is not None or not path.startswith("/api/"):
            return refusal
        if path not in ("/api/session", "/api/login") and not self.known(request):
            return Refusal(HTTPStatus.UNAUTHORIZED, "sign in with the console's token")
        if request.method not in ("GET", "HEAD"):
            return self._door.unproven(headers)
        return None

    def known(self, request: Request) -> bool:
        """May whoever asks see and do everything?"""
        if not self._door.token or self._door.bears(request.headers):
            return True
        return self._sessions.lasts(request.cookies.get(cookie_name(tls=self._tls), ""), time.monotonic())


def cookie_name(*, tls: bool) -> str:
    """With TLS the browser itself sees to it that no other host can have set it."""
    return "__Host-storaged" if tls else "storaged"


def _refused(refusal: Refusal) -> Response:
    return JSONResponse({"error": refusal.why}, refusal.status)


def application(hub: Hub, backend: Backend, door: Door, *, tls: bool) -> ASGIApp:
    """Everything that a browser can ask."""
    sessions = Sessions()
    cookie = cookie_name(tls=tls)

    async def page(_: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def session(request: Request) -> Response:
        return JSONResponse(
            {"token": door.page_token, "login": not guarded.known(request), "logout": bool(door.token)},
            headers={"cache-control": "no-store"},
        )

    async def login(request: Request) -> Response:
        if not door.opens(str((await _body(request)).get("token", ""))):
            return JSONResponse({"error": "that is not the console's token"}, HTTPStatus.UNAUTHORIZED)
        answer = JSONResponse({})
        answer.set_cookie(
            cookie,
            sessions.begin(time.monotonic()),
            int(SESSION_S),
            path="/",
            secure=tls,
            httponly=True,
            samesite="strict",
        )
        return answer

    async def logout(request: Request) -> Response:
        sessions.end(request.cookies.get(cookie, ""))
        answer = JSONResponse({})
        answer.delete_cookie(cookie, path="/", secure=tls, httponly=True, samesite="strict")
        return answer

    async def state(_: Request) -> Response:
        return JSONResponse(hub.state(), headers={"cache-control": "no-store"})

    async def events(_: Request) -> Response:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(hub.events(), media_type="text/event-stream", headers=headers)

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
            Route("/api/session", session),
            Route("/api/login", login, methods=["POST"]),
            Route("/api/logout", logout, methods=["POST"]),
            Route("/api/state", state),
            Route("/api/events", events),
            Route("/api/guests/{name}/resize", resize, methods=["POST"]),
            Route("/api/guests/{name}/cancel", cancel, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={StoragedError: _failed},
    )
    guarded = Guarded(app, door, sessions, tls=tls)
    return guarded


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, StoragedError)
    return JSONResponse({"error": error.message}, _STATUS.get(error.kind, HTTPStatus.INTERNAL_SERVER_ERROR))


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
