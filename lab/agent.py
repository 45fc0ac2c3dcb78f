"""A guest's agent that speaks only `vm_tools.Maitred`, with moods: for what must bear any guest."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio

from storaged.rpc.proto import vm_guest_pb2, vm_guest_pb2_grpc
from storaged.units import GIB


class Agent(vm_guest_pb2_grpc.MaitredServicer):
    """Obeys at once, unless `hangs` or `refuses`. `allowed` is what applications in the guest may still write."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []  # state, free_space_bytes
        self.allowed: int | None = None
        self._awake = asyncio.Event()
        self._awake.set()
        self.refuses = False
        self.running = 0
        self.most_running = 0

    @property
    def hangs(self) -> bool:
        """While it does, calls wait, and are obeyed late."""
        return not self._awake.is_set()

    @hangs.setter
    def hangs(self, hangs: bool) -> None:
        if hangs:
            self._awake.clear()
        else:
            self._awake.set()

    async def UpdateStorageBalloon(  # noqa: N802  # named as in the contract
        self,
        request: vm_guest_pb2.UpdateStorageBalloonRequest,
        context: Any,  # noqa: ARG002  # every method has one
    ) -> vm_guest_pb2.UpdateStorageBalloonResponse:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._awake.wait()
            self.told.append((request.state, request.free_space_bytes))
            if self.refuses:
                return vm_guest_pb2.UpdateStorageBalloonResponse(result=vm_guest_pb2.BALLOON_INFLATE_FAILED)
            self.allowed = max(request.free_space_bytes - GIB, 0)
            return vm_guest_pb2.UpdateStorageBalloonResponse()
        finally:
            self.running -= 1


def agent() -> Agent:
    """An agent that has not been told anything."""
    return Agent()  # type: ignore[abstract]  # what is not there answers UNIMPLEMENTED


async def serve(agent: Agent, socket: Path) -> grpc.aio.Server:
    """The agent on a unix socket; the caller stops it."""
    server = grpc.aio.server()
    vm_guest_pb2_grpc.add_MaitredServicer_to_server(agent, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    return server
