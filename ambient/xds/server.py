"""All clients of the control plane: a World to serve, who has it, and who is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ambient.errors import PeerFault
from ambient.model.world import World
from ambient.xds.session import ClientState, Session
from ambient.xds.store import Store

CLIENTS_MAX: Final = 20_000
CLIENTS_OF_NODE_MAX: Final = 32
"""Those that just left included: one node cannot take the room of all others."""
CONTROL: Final = "(control plane)"
"""Stands for ourselves among the nodes waited for: the World does not say it yet."""


class Server:
    """All clients of one control plane, over one store."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self.nacks_total = 0
        self._sessions: set[Session] = set()
        self._departed: set[Session] = set()
        self._of_node: dict[str, list[Session]] = {}
        self._listeners: set[Callable[[], None]] = set()

    def set_world(self, world: World) -> bool:
        """The World to serve from now on; whether anything changed. See `Store.set_world`."""
        changed = self.store.set_world(world)
        if changed:
            self._tell()
        return changed

    def open(self, node: str) -> Session:
        """A stream begins. ``node`` is what its token proved; empty: what the client says. Raises PeerFault when
        there are too many."""
        if len(self._sessions) + len(self._departed) >= CLIENTS_MAX:
            raise PeerFault(f"more than {CLIENTS_MAX} discovery clients")
        same = self._of_node.get(node, [])
        if node and len(same) >= CLIENTS_OF_NODE_MAX:
            left = next((session for session in same if session in self._departed), None)
            if left is None:
                raise PeerFault(f"more than {CLIENTS_OF_NODE_MAX} discovery clients on node {node}")
            self.bury(left)
        session = Session(self.store, node, self._tell)
        self._of_node.setdefault(node, []).append(session)
        self._sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        """The stream is gone. Until `bury`, the client is waited for as if it were still there: it goes on by what
        it knew, and most come back at once."""
        if session in self._sessions:
            self._sessions.discard(session)
            self._departed.add(session)
            self.nacks_total += session.nack_count
            self._tell()

    def bury(self, session: Session) -> None:
        """The client had its time to come back (`ControlSettings.acknowledge_timeout_s`)."""
        if session in self._departed:
            self._departed.discard(session)
            same = self._of_node[session.proved_node]
            same.remove(session)
            if not same:
                del self._of_node[session.proved_node]
            self._tell()

    def connected(self) -> tuple[ClientState, ...]:
        return tuple(sorted((s.state() for s in self._sessions), key=lambda c: (c.node, c.role, c.id)))

    def acknowledged(self, workload_uid: str, hbone: bool) -> tuple[str, ...]:
        """The nodes that may not know yet how the workload is reached; empty: all connected ones do.

        `CONTROL` is among them while the World itself does not say it.
        """
        workload = self.store.world.workloads.get(workload_uid)
        back = {(s.node, s.role) for s in self._sessions if s.follows_addresses}
        counted = (*self._sessions, *(s for s in self._departed if (s.node, s.role) not in back))
        waiting = {s.node or s.id or "?" for s in counted if s.waiting(workload_uid, hbone)}
        if self.store.generation == 0 or (workload is not None and workload.enrolled) != hbone:
            waiting.add(CONTROL)
        return tuple(sorted(waiting))

    def behind(self, workload_uid: str) -> tuple[str, ...]:
        """The nodes that may not have acknowledged the workload as the World has it now."""
        return tuple(sorted({s.node or s.id or "?" for s in self._sessions if s.lags(workload_uid)}))

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever the answer of `acknowledged` may have changed."""
        self._listeners.add(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        self._listeners.discard(listener)

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()
