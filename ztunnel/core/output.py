"""The output of one tunnel, and the buffers lent to it.

A turn's frames of all streams are put one behind the other into one buffer, which is lent for that turn only:
an idle tunnel owns none. Data is received by the caller straight into the place where it will be sent from,
behind a gap for the frame header, so that no byte is copied and no object made for a message.
"""

from __future__ import annotations

from typing import Final

BUFFER_BYTES: Final = 256 * 1024
"""About what one system call moves well while the buffer still fits in the L2 cache."""
KEPT_BUFFERS: Final = 4


class BufferPool:
    """Buffers of one process. ``take`` and ``give`` never fail; what exceeds ``kept`` is freed."""

    __slots__ = ("_free", "_kept", "size")

    def __init__(self, size: int = BUFFER_BYTES, kept: int = KEPT_BUFFERS) -> None:
        self.size = size
        self._kept = kept
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        return self._free.pop() if self._free else memoryview(bytearray(self.size))

    def give(self, buffer: memoryview) -> None:
        if len(self._free) < self._kept:
            self._free.append(buffer)


class Output:
    """Frames to send: ``view[:end]`` first, then ``late``, which is what found no room. ``last``: the stream of
    the last DATA frame among them, whose header is at ``last_at``; 0 if there is none."""

    __slots__ = ("_pool", "end", "last", "last_at", "late", "size", "view")

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self.size = pool.size
        self.view: memoryview | None = None
        self.end = 0
        self.last = self.last_at = 0
        self.late = bytearray()

    def borrow(self) -> memoryview:
        """The buffer, borrowed if there is none yet."""
        if self.view is None:
            self.view = self._pool.take()
        return self.view

    def put(self, frames: bytes) -> None:
        """Append whole frames."""
        end = self.end + len(frames)
        if self.late or end > self.size:
            self.late += frames
            return
        view = self.view if self.view is not None else self.borrow()
        view[self.end : end] = frames
        self.end = end

    def written(self) -> None:
        """``view[:end]`` was taken over by the caller: bring up what is late, else give the buffer back."""
        self.end = self.last = 0
        if self.late:
            view = self.borrow()
            count = min(len(self.late), self.size)
            view[:count] = self.late[:count]
            del self.late[:count]
            self.end = count
        elif self.view is not None:
            self._pool.give(self.view)
            self.view = None

    @property
    def waiting(self) -> int:
        """Bytes not yet taken over."""
        return self.end + len(self.late)

    def drain(self) -> bytes:
        """Everything that is waiting, as one copy."""
        out = bytearray()
        while self.end and self.view is not None:
            out += self.view[: self.end]
            self.written()
        return bytes(out)
