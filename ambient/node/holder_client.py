"""The agent's side of holder.sock: hand listeners over, take them back after a restart of either."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ambient.errors import AmbientError, PeerFault, PlatformFault
from ambient.io import seqpacket
from ambient.node import messages as m

RECONNECT_S: Final = 0.2
HOLDS_MAX: Final = 380
"""Pod UIDs that fit one Hello."""
ANSWER_S: Final = 20.0
"""Longer than any drain the holder waits for: an answer always comes, or the connection ends."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Handle:
    """A pod's descriptors as they went to the holder: open as long as the agent has this."""

    pod: m.Pod
    fds: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        seqpacket.close_all(self.fds.values())
        self.fds.clear()


class HolderClient:
    """Construct, `connect` once, then keep `run` running. ``held`` is what both sides should have.

    ``on_late`` is called with pods that arrive after the first snapshot, from a ztunnel that a new holder
    adopted; whoever takes the handle owns it.
    """

    def __init__(self, path: Path, on_late: Callable[[Handle], None]) -> None:
        self._path = path
        self._on_late = on_late
        self.held: dict[str, Handle] = {}
        self._packets: seqpacket.AsyncPacketSocket[m.Message] | None = None
        self._waiting: dict[str, deque[asyncio.Future[None] | None]] = {}
        self.connected = asyncio.Event()

    async def connect(self) -> dict[str, Handle]:
        """Wait for the holder, say hello, take its snapshot. The caller decides what of it to keep."""
        while True:
            try:
                return await self._greet()
            except (OSError, PeerFault) as error:
                log.debug("holder: %s", error)
                self._disconnect()
                await asyncio.sleep(RECONNECT_S)

    async def _greet(self) -> dict[str, Handle]:
        sock = seqpacket.connect(self._path)
        packets: seqpacket.AsyncPacketSocket[m.Message] = seqpacket.AsyncPacketSocket(sock, m.Message)
        self._packets = packets
        await packets.send(m.Hello(role="agent", pid=os.getpid(), holds=tuple(self.held)[:HOLDS_MAX]))
        snapshot: dict[str, Handle] = {}
        while True:
            got = await packets.receive()
            if got is None:
                raise PeerFault("the holder closed the connection")
            message, fds = got
            if isinstance(message, m.SnapshotSent):
                self.connected.set()
                return snapshot
            if isinstance(message, m.PodPut):
                snapshot[message.pod.uid] = Handle(message.pod, dict(zip(message.fds, fds, strict=True)))
            else:
                await self._handle(message)

    async def run(self) -> None:
        """Receive until cancelled; a new holder is given what is held and asked for nothing."""
        while True:
            try:
                if self._packets is not None:
                    await self._receive()
            except (OSError, AmbientError) as error:
                log.warning("holder: %s", error)
            self._disconnect()
            for handle in (await self.connect()).values():
                self._late(handle)

    async def _receive(self) -> None:
        assert self._packets is not None
        while (got := await self._packets.receive()) is not None:
            message, fds = got
            if isinstance(message, m.PodPut):
                self._late(Handle(message.pod, dict(zip(message.fds, fds, strict=True))))
            else:
                await self._handle(message)

    def _late(self, handle: Handle) -> None:
        if handle.pod.uid in self.held:
            handle.close()
        else:
            self._on_late(handle)

    async def _handle(self, message: m.Message) -> None:
        assert self._packets is not None
        match message:
            case m.Ack(uid=uid, error=error):
                queue = self._waiting.get(uid)
                waiter = queue.popleft() if queue else None
                if queue is not None and not queue:
                    del self._waiting[uid]
                if waiter is not None and not waiter.done():
                    if error:
                        waiter.set_exception(PlatformFault(f"the holder or ztunnel refused: {error}"))
                    else:
                        waiter.set_result(None)
            case m.ReturnPods(uids=uids):
                for uid in uids:
                    if uid in self.held:
                        self._waiting.setdefault(uid, deque()).append(None)
                        handle = self.held[uid]
                        await self._packets.send(
                            m.PodPut(pod=handle.pod, fds=tuple(handle.fds)), list(handle.fds.values())
                        )
            case _:
                raise PeerFault(f"unexpected {type(message).__name__}")

    def _disconnect(self) -> None:
        self.connected.clear()
        if self._packets is not None:
            self._packets.close()
            self._packets = None
        waiting, self._waiting = self._waiting, {}
        for waiter in (w for queue in waiting.values() for w in queue):
            if waiter is not None and not waiter.done():
                waiter.set_exception(PlatformFault("the connection to the holder ended"))

    async def put(self, handle: Handle) -> None:
        """Returns when a ztunnel has the listeners. Raises PlatformFault naming why it has not."""
        self.held[handle.pod.uid] = handle
        fds = list(handle.fds.values())
        await self._ask(handle.pod.uid, m.PodPut(pod=handle.pod, fds=tuple(handle.fds)), fds)

    async def remove(self, uid: str, drain_s: float) -> None:
        """Returns when no ztunnel listens any more. The caller closes its own handle."""
        self.held.pop(uid, None)
        await self._ask(uid, m.PodRemove(uid=uid, drain_s=drain_s), [])

    async def _ask(self, uid: str, message: m.PodPut | m.PodRemove, fds: list[int]) -> None:
        if self._packets is None:
            raise PlatformFault("the holder is not connected; it is being restarted")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(waiter)
        try:
            await self._packets.send(message, fds)
            async with asyncio.timeout(ANSWER_S):
                await waiter
        except TimeoutError:
            raise PlatformFault("the holder did not answer in time") from None
        except OSError as error:
            raise PlatformFault(f"the holder: {error}") from None
