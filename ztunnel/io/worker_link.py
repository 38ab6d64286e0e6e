"""The control process's end of the stream to one worker: length-prefixed msgpack messages, bounded both ways."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Final

import msgspec

from ambient.errors import OurFault, PeerFault
from ztunnel.core.messages import MESSAGE_BYTES_MAX, Message

UNSENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""A worker that leaves so much unread does not work any more."""
_LENGTH = struct.Struct(">I")


class WorkerLink:
    """Construct with `open`. ``number`` is the worker's, ``serial`` is unique in this process."""

    def __init__(
        self, number: int, pid: int, serial: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.pid = pid
        self.serial = serial
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)

    @staticmethod
    async def open(number: int, pid: int, serial: int, fd: int) -> WorkerLink:
        """Takes the descriptor over."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 20)
        return WorkerLink(number, pid, serial, reader, writer)

    def send(self, message: Message) -> None:
        """Queue a message; dropped if the worker is gone. Raises OurFault if the worker reads nothing."""
        if self._writer.is_closing():
            return
        raw = self._encoder.encode(message)
        if len(raw) > MESSAGE_BYTES_MAX:
            raise OurFault(f"{type(message).__name__} for worker {self.number} has {len(raw)} bytes")
        self._writer.write(_LENGTH.pack(len(raw)) + raw)
        if self._writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            raise OurFault(f"worker {self.number} (process {self.pid}) does not read its answers")

    async def flush(self) -> None:
        """Until (nearly) everything is with the worker's kernel buffer, or the worker is gone."""
        try:
            await self._writer.drain()
        except (ConnectionError, OSError):
            pass  # `receive` tells

    async def receive(self) -> Message | None:
        """The next message; None when the worker is gone. Raises PeerFault for what is no message."""
        try:
            head = await self._reader.readexactly(_LENGTH.size)
            (length,) = _LENGTH.unpack(head)
            if length > MESSAGE_BYTES_MAX:
                raise PeerFault(f"worker {self.number}: a message of {length} bytes")
            raw = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError, OSError):
            return None
        try:
            message: Message = self._decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PeerFault(f"worker {self.number}: not a message: {error}") from None
        return message

    def close(self) -> None:
        self._writer.close()
