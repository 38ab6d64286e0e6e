"""What the other end of a packet socket has not taken yet: the parent never waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from ambient.io.seqpacket import PacketSocket
from ztunnel.io.descriptors import Descriptor

OUTBOX_MAX: Final = 8192
"""Messages that may wait for one that takes none."""


class Outbox:
    """Messages with their descriptors, in order; the descriptors stay open until they are sent."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Any, tuple[Descriptor, ...]]] = deque()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Any, descriptors: Iterable[Descriptor] = ()) -> None:
        self._messages.append((message, tuple(descriptors)))

    def clear(self) -> None:
        self._messages.clear()

    def flush(self, sock: PacketSocket[Any]) -> bool:
        """Send what is taken. False if nothing is and more than OUTBOX_MAX messages wait.

        An end of the connection is not told here: its read side tells of it.
        """
        while self._messages:
            message, descriptors = self._messages[0]
            try:
                sock.send(message, [d.fd for d in descriptors])
            except BlockingIOError:
                return len(self._messages) <= OUTBOX_MAX
            except OSError:
                return True
            self._messages.popleft()
        return True
