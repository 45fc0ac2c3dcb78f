"""The console as an ASGI application: who may ask at all, the headers of every answer, errors as statuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storaged.errors import Kind, StoragedError
from storaged.host.console.backend import Backend
from storaged.host.console.connections import details
from storaged.host.console.guard import Codes, Door, Refusal, Sessions
from storaged.host.console.hub import Hub
from storaged.host.console.limits import Streams
from storaged.host.console.pages import Pages, cookie_name
from storaged.quiet import BoundedLog

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

    def __init__(
        self, app: ASGIApp, door: Door, known: Callable[[Request], bool], refusals: BoundedLog, *, tls: bool
    ) -> None:
        self._app = app
        self._door = door
        self._known = known
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
        if not self._known(request):
            return Refusal(HTTPStatus.UNAUTHORIZED, HOW, "not signed in")
        if request.method not in ("GET", "HEAD"):
            return self._door.unproven(headers)
        return None


def _refused(refusal: Refusal) -> Response:
    return JSONResponse({"error": refusal.why}, refusal.status)


def application(
    hub: Hub, backend: Backend, door: Door, codes: Codes, streams: Streams, refusals: BoundedLog, *, tls: bool
) -> ASGIApp:
    """Everything that a browser can ask."""
    sessions = Sessions()

    def known(request: Request) -> bool:
        if door.trusts_user or door.bears(request.headers):
            return True
        return sessions.lasts(request.cookies.get(cookie_name(request.scope), ""), time.monotonic())

    pages = Pages(hub, backend, door, codes, streams, refusals, sessions, known)
    app = Starlette(routes=pages.routes(), exception_handlers={StoragedError: _failed, ClientDisconnect: _left})
    return Guarded(app, door, known, refusals, tls=tls)


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, StoragedError)
    return JSONResponse({"error": error.message}, _STATUS.get(error.kind, HTTPStatus.INTERNAL_SERVER_ERROR))


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # which nobody reads
