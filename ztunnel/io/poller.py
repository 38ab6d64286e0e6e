"""Readiness of raw descriptors: an epoll of our own inside the event loop's.

The loop's own add_reader costs four system calls and a handle for each descriptor, which a connection that
lives for a millisecond notices. Here it is one, and a turn is one pass over everything that is ready, after
which ``after_turn`` is called: that is where tunnels write. The loop keeps timers, signals and little else.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Final

_PER_TURN: Final = 1024
_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
_READABLE: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR

Callback = Callable[[], None]


class Poller:
    """Level-triggered. A callback may add and remove any descriptor, its own too, and close it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, after_turn: Callback) -> None:
        self._loop = loop
        self._after_turn = after_turn
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self.turning = False
        """A turn is going on: ``after_turn`` will be called."""
        self._new: set[int] = set()
        """Registered during this turn: what the turn reports of the same number is about an earlier socket."""
        loop.add_reader(self._epoll.fileno(), self._turn)

    def add_reader(self, fd: int, callback: Callback, /) -> None:
        """Replaces the callback if there is one."""
        if fd not in self._readers:
            if fd in self._writers:
                self._epoll.modify(fd, _READ | _WRITE)
            else:
                self._epoll.register(fd, _READ)
                self._new.add(fd)
        self._readers[fd] = callback

    def add_writer(self, fd: int, callback: Callback, /) -> None:
        """Replaces the callback if there is one."""
        if fd not in self._writers:
            if fd in self._readers:
                self._epoll.modify(fd, _READ | _WRITE)
            else:
                self._epoll.register(fd, _WRITE)
                self._new.add(fd)
        self._writers[fd] = callback

    def remove_reader(self, fd: int, /) -> None:
        """Before the descriptor is closed. Nothing happens if there is none."""
        if self._readers.pop(fd, None) is not None:
            if fd in self._writers:
                self._epoll.modify(fd, _WRITE)
            else:
                self._epoll.unregister(fd)

    def remove_writer(self, fd: int, /) -> None:
        """Before the descriptor is closed. Nothing happens if there is none."""
        if self._writers.pop(fd, None) is not None:
            if fd in self._readers:
                self._epoll.modify(fd, _READ)
            else:
                self._epoll.unregister(fd)

    def _turn(self) -> None:
        readers, writers, new = self._readers, self._writers, self._new
        new.clear()
        self.turning = True
        try:
            for fd, mask in self._epoll.poll(0, _PER_TURN):
                if new and fd in new:
                    continue
                if mask & _READABLE and (callback := readers.get(fd)) is not None:
                    callback()
                    if new and fd in new:
                        continue
                if mask & _WRITABLE and (callback := writers.get(fd)) is not None:
                    callback()
        except Exception as error:  # a bug in one callback; what else is ready is reported again in the next turn
            self._loop.call_exception_handler({"message": "exception in a callback", "exception": error})
        self.turning = False
        self._after_turn()

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
