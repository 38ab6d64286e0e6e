"""A reader of a BPF ring buffer, by mmap and without a library.

Layout (kernel/bpf/ringbuf.c): one page with the consumer's position, one with the producers', then the data, mapped
twice in a row so that a record that wraps is in one piece. A record has a header of eight bytes: its length with a
busy and a discard bit, and an offset that is none of ours. The descriptor is readable (epoll) when there is
something new.

The position is the map's, not the process's: whoever reads next goes on where the last one stopped. One reader at
a time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Final

from ambient.io import bpf_sys

_BUSY: Final = 1 << 31
_DISCARD: Final = 1 << 30
_HEADER: Final = 8
_WORD: Final = struct.Struct("<I")


class RingReader:
    """``fd`` is the map's descriptor, which stays the caller's. Raises OSError if it cannot be mapped."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        page = mmap.PAGESIZE
        self._size = bpf_sys.map_info(self._fd).max_entries
        try:
            self._consumer = mmap.mmap(self._fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
            self._producer = mmap.mmap(self._fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except BaseException:
            os.close(self._fd)
            raise
        # Aligned words, so that a position is read and written whole.
        self._position = ctypes.c_uint64.from_buffer(self._consumer)
        self._data = page

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        del self._position
        self._consumer.close()
        self._producer.close()
        os.close(self._fd)

    def peek(self, limit: int = 1024) -> tuple[list[bytes], int]:
        """Records, oldest first, and the position behind them, for `consume` once they are used."""
        found: list[bytes] = []
        produced = int.from_bytes(self._producer[:8], "little")
        at = int(self._position.value)
        while at < produced and len(found) < limit:
            offset = self._data + at % self._size
            (header,) = _WORD.unpack_from(self._producer, offset)
            if header & _BUSY:
                break  # reserved and not yet submitted; those behind it have to wait
            length = header & ~_DISCARD
            if not header & _DISCARD:
                found.append(self._producer[offset + _HEADER : offset + _HEADER + length])
            at += (length + _HEADER + 7) & ~7
        return found, at

    def consume(self, position: int) -> None:
        """Give the room of what was read up to there back to the programs."""
        self._position.value = position
