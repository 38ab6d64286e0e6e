"""The event loop of a worker: one epoll, a few timers, and a fixed end to every turn.

A turn is one pass over every descriptor that is ready, after which ``after_turn`` is called: that is where
tunnels write, once for all that became readable. A general loop costs a handle and four system calls for each
descriptor that is watched, which a connection that lives for a millisecond notices; here it is one.
"""

from __future__ import annotations

import heapq
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Final

_PER_TURN: Final = 1024
_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
_READABLE: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR

Callback = Callable[[], None]


class Timer:
    """A callback that is due at ``at``."""

    __slots__ = ("at", "callback")

    def __init__(self, at: float, callback: Callback) -> None:
        self.at = at
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.at < other.at


class Turns:
    """Level-triggered. A callback may add and remove any descriptor, its own too, and close it.

    ``after_turn`` ends every turn; ``fault`` is told of what a callback raised, and the loop goes on.
    """

    def __init__(self, after_turn: Callback, fault: Callable[[BaseException], None]) -> None:
        self._after_turn = after_turn
        self._fault = fault
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._new: set[int] = set()
        """Registered during this turn: what the turn reports of the same number is about an earlier socket."""
        self._timers: list[Timer] = []
        self._soon: list[Callback] = []
        self._now = time.monotonic()
        self._status: int | None = None

    def now(self) -> float:
        """Seconds of a clock that never goes back, as of the beginning of the turn."""
        return self._now

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

    def later(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(time.monotonic() + delay_s, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def soon(self, callback: Callback) -> None:
        """At the end of this turn, before ``after_turn``."""
        self._soon.append(callback)

    def on_signal(self, number: int, callback: Callback) -> None:
        """Call ``callback`` in a turn of its own when the signal comes. Main thread only."""
        if signal.set_wakeup_fd(-1) == -1:
            reading, writing = socket.socketpair()
            reading.setblocking(False)
            writing.setblocking(False)
            self._wakeup = (reading, writing)
            self.add_reader(reading.fileno(), lambda: drain(reading))
        signal.set_wakeup_fd(self._wakeup[1].fileno())
        signal.signal(number, lambda *_: self._soon.append(callback))

    def stop(self, status: int) -> None:
        """`run` returns ``status`` at the end of this turn."""
        self._status = status

    def run(self) -> int:
        """Turn until `stop`."""
        poll, readers, writers, new = self._epoll.poll, self._readers, self._writers, self._new
        timers = self._timers
        while self._status is None:
            if self._soon:
                timeout = 0.0
            elif timers:
                timeout = max(0.0, timers[0].at - time.monotonic())
            else:
                timeout = -1.0
            events = poll(timeout, _PER_TURN)
            self._now = time.monotonic()
            new.clear()
            try:
                for fd, mask in events:
                    if new and fd in new:
                        continue
                    if mask & _READABLE and (callback := readers.get(fd)) is not None:
                        callback()
                        if new and fd in new:
                            continue
                    if mask & _WRITABLE and (callback := writers.get(fd)) is not None:
                        callback()
                self._run_timers()
            except Exception as error:  # a bug; what else is ready is reported again in the next turn
                self._fault(error)
            self._after_turn()
        return self._status

    def _run_timers(self) -> None:
        timers = self._timers
        while timers and timers[0].at <= self._now:
            callback = heapq.heappop(timers).callback
            if callback is not None:
                callback()
        if self._soon:
            soon = self._soon[:]
            del self._soon[:]
            for callback in soon:
                callback()


def drain(sock: socket.socket) -> None:
    """Throw away what is there to be read."""
    try:
        while sock.recv(4096):
            pass
    except OSError:
        pass
