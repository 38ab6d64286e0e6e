"""The parent's packet socket to the holder: tried again until there is one, and never waited for."""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ambient.errors import AmbientError
from ambient.io import seqpacket
from ambient.io.seqpacket import PacketSocket
from ambient.node import messages as m
from ztunnel.io.descriptors import Descriptor
from ztunnel.io.outbox import Outbox

RECONNECT_S: Final = 0.2
HOLDS_MAX: Final = 380
"""Pod UIDs that fit one Hello."""

FromHolder = m.PodPut | m.PodRemove | m.SnapshotSent | m.ReturnPods | m.Ack
_log = logging.getLogger("ztunnel")


class HolderLink:
    """What ``selector`` finds of its socket is for `ready`. ``forget`` is called with each holder that comes or goes:
    nothing is owed to an earlier one."""

    def __init__(self, path: Path, selector: selectors.BaseSelector, forget: Callable[[], None]) -> None:
        self._path = path
        self._selector = selector
        self._forget = forget
        self.socket: PacketSocket[Any] | None = None
        self.connect_at = 0.0
        """When to try again, if there is no socket."""
        self.outbox = Outbox()
        self._complained = False

    def connect(self, now: float, pods: tuple[str, ...]) -> None:
        """Try once. ``pods`` are the UIDs of those held here."""
        try:
            sock = seqpacket.connect(self._path)
        except OSError as error:
            if not self._complained:
                self._complained = True
                _log.warning("%s: %s; trying on", self._path, error.strerror)
            self.connect_at = now + RECONNECT_S
            return
        self._complained = False
        sock.setblocking(False)
        self.socket = PacketSocket(sock, FromHolder)
        self._selector.register(self.socket, selectors.EVENT_READ, self)
        self.outbox.clear()
        self._forget()
        self.tell(m.Hello(role="ztunnel", pid=os.getpid(), holds=pods[:HOLDS_MAX]))
        _log.info("connected to the holder, holding %d pods", len(pods))

    def ready(self, events: int) -> tuple[Any, list[Descriptor]] | None:
        """What the selector found: one message with its descriptors, if there is one."""
        if events & selectors.EVENT_WRITE:
            self._flush()
        if not events & selectors.EVENT_READ or self.socket is None:
            return None
        try:
            packet = self.socket.receive()
        except BlockingIOError:
            return None
        except (AmbientError, OSError) as error:
            self._lose(str(error))
            return None
        if packet is None:
            self._lose("it is gone")
            return None
        message, fds = packet
        return message, [Descriptor(fd) for fd in fds]

    def tell(self, message: m.Message, descriptors: tuple[Descriptor, ...] = ()) -> None:
        """Queue; nothing happens without a holder."""
        if self.socket is not None:
            self.outbox.put(message, descriptors)
            self._flush()

    def _flush(self) -> None:
        if self.socket is not None and not self.outbox.flush(self.socket):
            self._lose("it does not read its messages")

    def _lose(self, why: str) -> None:
        """Serve on with what is here, and look for the next holder."""
        _log.warning("holder: %s; trying to reach the next one", why)
        if self.socket is not None:
            self._selector.unregister(self.socket)
            self.socket.close()
            self.socket = None
        self.outbox.clear()
        self._forget()
        self.connect_at = time.monotonic()
