"""Which tunnel a new stream takes, and which tunnels have been idle for too long.

One group of tunnels per `PoolKey`; at most one of a group is being created; a tunnel carries at most 100
streams, or what its peer allows. The pool holds handles of the caller's and never touches them.
"""

from __future__ import annotations

from typing import Final, Generic, NamedTuple, TypeVar

STREAMS_MAX: Final = 100
IDLE_S: Final = 300.0

T = TypeVar("T")


class PoolKey(NamedTuple):
    """What must be equal for two connections to share a tunnel."""

    source: str
    """SPIFFE ID the tunnel proves."""
    identities: tuple[str, ...]
    """SPIFFE IDs of which the peer must prove one."""
    ip: str
    port: int
    pod: str
    """UID of the pod the tunnel comes from. Not the connection's source address: an application chooses that among
    all of 127.0.0.0/8 and would have a tunnel of its own for each; and a later pod may have an earlier one's."""


class Slot(Generic[T]):
    """One tunnel of the pool. ``streams`` counts those waiting for it to open, too."""

    __slots__ = ("connecting", "handle", "idle_since", "key", "limit", "retired", "streams")

    def __init__(self, key: PoolKey, handle: T, now: float) -> None:
        self.key = key
        self.handle = handle
        self.limit = STREAMS_MAX
        self.streams = 0
        self.connecting = True
        self.retired = False
        self.idle_since = now


class Pool(Generic[T]):
    """Tunnels by key. ``checkout``, then ``release`` once for each."""

    def __init__(self) -> None:
        self._groups: dict[PoolKey, list[Slot[T]]] = {}

    def checkout(self, key: PoolKey) -> Slot[T] | None:
        """A slot with one stream more: open and with room, else the one being created. None: create one (`add`)."""
        connecting = None
        for slot in self._groups.get(key, ()):
            if slot.retired:
                continue
            if slot.connecting:
                connecting = slot
            elif slot.streams < slot.limit:
                slot.streams += 1
                return slot
        if connecting is not None:
            connecting.streams += 1
        return connecting

    def add(self, key: PoolKey, handle: T, now: float) -> Slot[T]:
        """A tunnel that is being created, with the first stream waiting for it."""
        slot = Slot(key, handle, now)
        slot.streams = 1
        self._groups.setdefault(key, []).append(slot)
        return slot

    def opened(self, slot: Slot[T], peer_limit: int) -> None:
        """The tunnel is open and its peer allows so many streams."""
        slot.connecting = False
        slot.limit = max(1, min(STREAMS_MAX, peer_limit))

    def release(self, slot: Slot[T], now: float) -> None:
        """One stream less."""
        slot.streams -= 1
        if slot.streams == 0:
            slot.idle_since = now

    def retire(self, slot: Slot[T]) -> None:
        """No new streams: its peer is going away, or it is closed. Takes it out; repeated calls are fine."""
        if slot.retired:
            return
        slot.retired = True
        group = self._groups[slot.key]
        group.remove(slot)
        if not group:
            del self._groups[slot.key]

    def take_idle(self, now: float, idle_s: float = IDLE_S) -> list[T]:
        """Retire and return the tunnels that carried nothing for ``idle_s``."""
        idle = [
            slot
            for group in self._groups.values()
            for slot in group
            if slot.streams == 0 and not slot.connecting and now - slot.idle_since >= idle_s
        ]
        for slot in idle:
            self.retire(slot)
        return [slot.handle for slot in idle]

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())
