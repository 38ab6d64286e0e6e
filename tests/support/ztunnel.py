"""ztunnel's real parent and control process beside a holder that the test plays."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from ambient.io import seqpacket
from ambient.io.seqpacket import AsyncPacketSocket
from ambient.node import messages as node
from ambient.settings import NodeSettings
from tests.support.control import until
from tests.support.relay_worker import FromWorker, Given
from ztunnel.core import messages

T = TypeVar("T")


class Listeners:
    """Stand-ins for a pod's descriptors: a namespace, and listeners on loopback ports the kernel chose."""

    def __init__(self) -> None:
        self.sockets: dict[str, socket.socket] = {}
        self.netns = os.open("/proc/self/ns/net", os.O_RDONLY)
        for name in node.LISTENERS:
            family = socket.AF_INET6 if name.endswith("6") else socket.AF_INET
            kind = socket.SOCK_DGRAM if "udp" in name else socket.SOCK_STREAM
            sock = socket.socket(family, kind)
            sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            self.sockets[name] = sock

    def address(self, name: str) -> tuple[str, int]:
        host, port = self.sockets[name].getsockname()[:2]
        return host, port

    @property
    def names(self) -> tuple[str, ...]:
        return (node.NETNS, *self.sockets)

    @property
    def fds(self) -> list[int]:
        return [self.netns, *(s.fileno() for s in self.sockets.values())]

    def close(self) -> None:
        os.close(self.netns)
        for sock in self.sockets.values():
            sock.close()


class Holder:
    """The node's holder, one client. ``inbox`` are its messages other than those waited for."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "holder.sock"
        self._server = seqpacket.listen(self.path)
        self._server.setblocking(False)
        self.client: AsyncPacketSocket[Any] | None = None
        self.hello: node.Hello | None = None

    async def accept(self) -> node.Hello:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            sock, _ = await loop.sock_accept(self._server)
            self.client = AsyncPacketSocket(sock, node.Message)
            hello, _ = await self.receive()
        assert isinstance(hello, node.Hello)
        self.hello = hello
        return hello

    async def receive(self) -> tuple[Any, tuple[int, ...]]:
        assert self.client is not None
        async with asyncio.timeout(20):
            packet = await self.client.receive()
        assert packet is not None, "ztunnel is gone"
        return packet

    async def put(self, pod: node.Pod, listeners: Listeners) -> node.Ack:
        assert self.client is not None
        await self.client.send(node.PodPut(pod=pod, fds=listeners.names), listeners.fds)
        return await self.ack()

    async def send(self, message: node.Message) -> None:
        assert self.client is not None
        await self.client.send(message)

    async def ack(self) -> node.Ack:
        message, _ = await self.receive()
        assert isinstance(message, node.Ack)
        return message

    def die(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
        self._server.close()


class TestWorker:
    """The test's end of a relay worker."""

    __test__ = False

    def __init__(self, run_dir: Path, number: int = 0) -> None:
        self._path = run_dir / f"worker-{number}.sock"
        self._sock: AsyncPacketSocket[Any] | None = None
        self.given: Given | None = None

    async def connect(self) -> Self:
        async with asyncio.timeout(20):
            while True:
                try:
                    self._sock = AsyncPacketSocket(seqpacket.connect(self._path), FromWorker)
                    return self
                except OSError:
                    await asyncio.sleep(0.02)

    async def send(self, message: messages.Message) -> None:
        assert self._sock is not None
        await self._sock.send(message)

    async def receive(self, kind: type[T], **wanted: Any) -> T:
        """The next message of a kind with these fields; others are passed over."""
        assert self._sock is not None
        async with asyncio.timeout(20):
            while True:
                packet = await self._sock.receive()
                assert packet is not None, "the worker is gone"
                message = packet[0]
                if isinstance(message, Given):
                    self.given = message
                if isinstance(message, kind) and all(getattr(message, k) == v for k, v in wanted.items()):
                    return message

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


class Ztunnel:
    """The process tree. ``async with``; output is kept in ``log``."""

    def __init__(self, directory: Path, settings: NodeSettings, module: str = "tests.support.relay_worker") -> None:
        self.directory = directory
        self.settings = settings
        self.log = directory / "ztunnel.log"
        self._module = module
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = self.directory / "node.json"  # JSON is YAML
        config.write_bytes(msgspec.json.encode(self.settings))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self._module, "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> dict[str, int]:
        """Process by its short name."""
        found: dict[str, int] = {}
        for text in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            try:
                found[Path(f"/proc/{text}/comm").read_text().strip()] = int(text)
            except OSError:
                continue
        return found

    async def child(self, name: str, other_than: int = 0) -> int:
        await until(lambda: self.children().get(name, 0) not in (0, other_than), f"{name} runs")
        return self.children()[name]

    def http(self) -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(str(Path(self.settings.run_dir) / "ztunnel.sock"))
        return aiohttp.ClientSession("http://ztunnel", connector=connector)

    async def get(self, path: str) -> tuple[int, str]:
        async with self.http() as session, session.get(path) as response:
            return response.status, await response.text()

    async def until(self, path: str, status: int = 200, contains: str = "") -> str:
        text = ""
        try:
            async with asyncio.timeout(20):
                while True:
                    try:
                        found, text = await self.get(path)
                        if found == status and contains in text:
                            return text
                    except (OSError, aiohttp.ClientError) as error:
                        text = str(error)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{path}: {text}\n{self.log.read_text()[-3000:]}") from None

    async def stop(self) -> int:
        """SIGTERM and the exit code; killed with its children if it does not end."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.to_thread(process.wait, 20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: only what this test started
            process.wait()
            raise AssertionError(f"ztunnel did not end\n{self.log.read_text()[-3000:]}") from None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
