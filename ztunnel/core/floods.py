"""How much unpaid work a peer may cause: token buckets for frames that cost us more than the peer.

PING, SETTINGS, empty DATA, RST_STREAM before we answered (rapid reset) and our own RST_STREAM for a peer's
mistakes each have a bucket. An honest peer never empties one. And how much of a common limit one owner may have:
whoever fills its share is refused, and nobody else.
"""

from __future__ import annotations


class Bucket:
    """``burst`` at once, ``rate`` per second on average."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = burst
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Whether there was one left. ``now`` in seconds of a clock that never goes back."""
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Shares:
    """Room for ``total`` things, of which one owner has at most ``each``."""

    __slots__ = ("_each", "_held", "_room")

    def __init__(self, total: int, each: int) -> None:
        self._room = total
        self._each = each
        self._held: dict[str, int] = {}

    def enter(self, owner: str) -> bool:
        """Take one place, unless there is none. `leave` once for each."""
        held = self._held.get(owner, 0)
        if not self._room or held >= self._each:
            return False
        self._room -= 1
        self._held[owner] = held + 1
        return True

    def leave(self, owner: str) -> None:
        self._room += 1
        held = self._held[owner] - 1
        if held:
            self._held[owner] = held
        else:
            del self._held[owner]
