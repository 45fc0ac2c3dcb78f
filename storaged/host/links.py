"""Links that sign a browser in to the console, as the host's service hands them out."""

from __future__ import annotations

from typing import Protocol

from storaged.errors import Kind, StoragedError
from storaged.rpc.proto import storaged_host_v1_pb2 as pb


class ConsoleLinks(Protocol):
    """The console, as far as signing in goes."""

    @property
    def expires_s(self) -> float | None: ...
    def link(self) -> str: ...


def console_link(console: ConsoleLinks | None) -> pb.GetConsoleLinkResponse:
    """A new link. Raises StoragedError when there is no console."""
    if console is None:
        raise StoragedError("there is no console: set console.listen, and start storaged-host again", Kind.PRECONDITION)
    return pb.GetConsoleLinkResponse(link=console.link(), expires_in_s=console.expires_s)
