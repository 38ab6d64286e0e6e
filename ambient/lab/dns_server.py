"""The cluster's DNS server: one on each node, all at the same service address. It knows nothing of the mesh."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

from ambient.lab.cluster import Cluster
from ambient.lab.dns import TCP_BYTES_MAX, UDP_BYTES_MAX, Names, answer
from ambient.lab.sockets import open_in_netns

PORT = 53
_CONNECTION_IDLE_S = 10.0
_CONNECTIONS_MAX = 64


class DnsServer:
    """``open`` binds the addresses inside a network namespace; `run` serves until cancelled."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._sockets: list[socket.socket] = []
        self._names: tuple[int, Names] | None = None
        self._connections = asyncio.Semaphore(_CONNECTIONS_MAX)

    def open(self, netns: str, addresses: tuple[str, ...]) -> None:
        """Bind UDP and TCP 53. PlatformFault if an address is taken."""
        for address in addresses:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                self._sockets.append(open_in_netns(netns, address, PORT, kind))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        transports: list[asyncio.DatagramTransport] = []
        servers: list[asyncio.Server] = []
        try:
            for sock in self._sockets:
                if sock.type == socket.SOCK_DGRAM:
                    transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=sock)
                    transports.append(transport)
                else:
                    servers.append(await asyncio.start_server(self._serve, sock=sock))
            await asyncio.get_running_loop().create_future()
        finally:
            for transport in transports:
                transport.close()
            for server in servers:
                server.close()

    def respond(self, message: bytes, limit: int) -> bytes | None:
        version = self._cluster.version
        if self._names is None or self._names[0] != version:
            self._names = (version, Names(self._cluster.services, tuple(self._cluster.slices.values())))
        return answer(message, self._names[1], limit)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._connections:
                while True:
                    async with asyncio.timeout(_CONNECTION_IDLE_S):
                        (length,) = struct.unpack("!H", await reader.readexactly(2))
                        reply = self.respond(await reader.readexactly(length), TCP_BYTES_MAX)
                        if reply is None:
                            return
                        writer.write(struct.pack("!H", len(reply)) + reply)
                        await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # the client is done or gone
        finally:
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = self._server.respond(data, UDP_BYTES_MAX)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply, addr)
