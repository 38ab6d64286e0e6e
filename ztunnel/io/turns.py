"""The event loop of a worker: one epoll, a few timers, and a fixed end to every turn.

A turn is one pass over every descriptor that is ready, after which ``after_turn`` is called: that is where
tunnels write, once for all that became readable. A general loop costs a handle and four system calls for each
descriptor that is watched, which a connection that lives for a millisecond notices; here it is one.
"""

from __future__ import annotations

import ctypes
import heapq
import math
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

_PER_TURN: Final = 1024
_READ: Final = select.EPOLLIN | select.EPOLLRDHUP
_WRITE: Final = select.EPOLLOUT
_ONLY_READABLE: Final = select.EPOLLIN
_READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_ENDED: Final = select.EPOLLRDHUP
_PAUSED: Final = select.EPOLLET
_BROKEN: Final = select.EPOLLHUP | select.EPOLLERR

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


class Alarm:
    """A timerfd of the monotonic clock. A timeout of epoll_wait instead would have the kernel set up and take down
    a timer in every turn."""

    __slots__ = ("fd",)

    _CLOEXEC_NONBLOCK: Final = os.O_CLOEXEC | os.O_NONBLOCK
    _ABSOLUTE: Final = 1
    _WHEN: Final = struct.Struct("=qqqq")
    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self) -> None:
        self.fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, self._CLOEXEC_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def ring_at(self, at: float) -> None:
        """Be readable from then on; what was asked before is forgotten. ``at`` as of `time.monotonic`."""
        part, whole = math.modf(max(at, 0.001))
        self._libc.timerfd_settime(self.fd, self._ABSOLUTE, self._WHEN.pack(0, 0, int(whole), int(part * 1e9)), None)

    def quiet(self) -> None:
        """It has rung: not readable any more until it rings again."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            pass  # it was set again in the same turn


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
        self._paused: dict[int, Callback] = {}
        self._new: set[int] = set()
        """Registered during this turn: what the turn reports of the same number is about an earlier socket."""
        self._timers: list[Timer] = []
        self._alarm = Alarm()
        self._ring_at = math.inf
        """When the alarm rings next."""
        self.ended = False
        """Of the reader being called: its peer sends no more, so what can be read ends with the end. The reader may go
        on reading up to it at once."""
        self._soon: list[Callback] = []
        self._now = time.monotonic()
        self._status: int | None = None
        self.add_reader(self._alarm.fd, self._rung)

    def now(self) -> float:
        """Seconds of a clock that never goes back, as of the beginning of the turn."""
        return self._now

    def add_reader(self, fd: int, callback: Callback, /) -> None:
        """Replaces the callback if there is one."""
        if fd not in self._readers:
            paused = self._paused.pop(fd, None) is not None
            if fd in self._writers:
                self._epoll.modify(fd, _READ | _WRITE)
            elif paused:
                self._epoll.modify(fd, _READ)
            else:
                self._epoll.register(fd, _READ)
                self._new.add(fd)
        self._readers[fd] = callback

    def add_writer(self, fd: int, callback: Callback, /) -> None:
        """Replaces the callback if there is one."""
        if fd not in self._writers:
            if fd in self._readers:
                self._epoll.modify(fd, _READ | _WRITE)
            elif fd in self._paused:
                self._epoll.modify(fd, _WRITE)
            else:
                self._epoll.register(fd, _WRITE)
                self._new.add(fd)
        self._writers[fd] = callback

    def pause_reader(self, fd: int, broken: Callback, /) -> None:
        """Instead of removing one that comes back: ``broken`` is called if the connection is reset meanwhile, and now
        and then when it is not."""
        if self._readers.pop(fd, None) is not None:
            self._paused[fd] = broken
            # by edges: what ended at both ends and is not read yet hangs up in every turn
            self._epoll.modify(fd, _WRITE if fd in self._writers else _PAUSED)

    def remove_reader(self, fd: int, /) -> None:
        """Before the descriptor is closed. Nothing happens if there is none."""
        if self._readers.pop(fd, None) is not None or self._paused.pop(fd, None) is not None:
            if fd in self._writers:
                self._epoll.modify(fd, _WRITE)
            else:
                self._epoll.unregister(fd)

    def remove_writer(self, fd: int, /) -> None:
        """Before the descriptor is closed. Nothing happens if there is none."""
        if self._writers.pop(fd, None) is not None:
            if fd in self._readers:
                self._epoll.modify(fd, _READ)
            elif fd in self._paused:
                self._epoll.modify(fd, _PAUSED)
            else:
                self._epoll.unregister(fd)

    def forget(self, fd: int, /) -> None:
        """Instead of removing what is about to be closed: the close removes it from the epoll. Only for a socket of
        which there is no second descriptor anywhere, and only if the close follows at once."""
        self._readers.pop(fd, None)
        self._writers.pop(fd, None)
        self._paused.pop(fd, None)

    def later(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(time.monotonic() + delay_s, callback)
        heapq.heappush(self._timers, timer)
        if timer.at < self._ring_at:
            self._ring_at = timer.at
            self._alarm.ring_at(timer.at)
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
        poll, readers, writers, paused = self._epoll.poll, self._readers, self._writers, self._paused
        new = self._new
        clock, after_turn = time.monotonic, self._after_turn
        while self._status is None:
            events = poll(0 if self._soon else None, _PER_TURN)
            self._now = clock()
            if new:
                new.clear()
            try:
                for fd, mask in events:
                    if new and fd in new:
                        continue
                    if mask == _ONLY_READABLE:
                        if (callback := readers.get(fd)) is not None:
                            callback()
                        continue
                    if mask & _READABLE and (callback := readers.get(fd)) is not None:
                        self.ended = bool(mask & _ENDED)
                        callback()
                        self.ended = False
                        if new and fd in new:
                            continue
                    if mask & _WRITABLE and (callback := writers.get(fd)) is not None:
                        callback()
                    if mask & _BROKEN and (callback := paused.get(fd)) is not None:
                        callback()
                if self._soon:
                    self._run_soon()
            except Exception as error:  # a bug; what else is ready is reported again in the next turn
                self.ended = False
                self._fault(error)
            after_turn()
        return self._status

    def _rung(self) -> None:
        self._alarm.quiet()
        self._ring_at = math.inf
        timers = self._timers
        try:
            while timers and timers[0].at <= self._now:
                callback = heapq.heappop(timers).callback
                if callback is not None:
                    callback()
        finally:  # one that faults must not take the others with it
            if timers and timers[0].at < self._ring_at:
                self._ring_at = timers[0].at
                self._alarm.ring_at(self._ring_at)

    def _run_soon(self) -> None:
        for _ in range(len(self._soon)):
            self._soon.pop(0)()  # one that faults must not take the others with it: SIGTERM may be among them


def drain(sock: socket.socket) -> None:
    """Throw away what is there to be read."""
    try:
        while sock.recv(4096):
            pass
    except OSError:
        pass
