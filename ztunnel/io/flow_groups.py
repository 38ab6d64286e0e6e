"""Flows of the kernel that opened and ended between two looks, in groups of those alike.

Such a flow costs two lines of the access log and four metrics. One by one that took as long as making the connection
takes; alike in all but the client's port, bytes and times, they share everything but a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from ambient.datapath.values import offset_of, picker
from ambient.io.flow_reader import Which
from ztunnel.core.attributes import Ends
from ztunnel.core.messages import ConnectionEvent

GROUPS_MAX: Final = 2048
"""Groups remembered; with more, all are made again."""
_NUMBERS: Final = picker(
    "flow_event",
    "key.remote_port",
    "value.client.cookie",
    "value.client.native_bytes",
    "value.client.redirect_bytes",
    "value.server.cookie",
    "value.server.native_bytes",
    "value.server.redirect_bytes",
    "value.created_ns",
    "closed_ns",
)
_PAIR_TO: Final = offset_of("flow_event", "key.remote_port")
"""Addresses and the server's port."""
_WHO: Final = slice(offset_of("flow_event", "value.netns_client"), offset_of("flow_event", "value.reason"))
"""Namespaces, what was dialled, workloads, identity, policy."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one reporter says of a flow of the group."""

    event: ConnectionEvent
    ends: Ends
    line: str
    """`access_log.template`; empty if it is not to be logged."""


@dataclass(slots=True)
class Group:
    """``flows`` is what ended since the last look: client's port, bytes sent, bytes received, milliseconds."""

    told: tuple[Told, ...]
    flows: list[tuple[int, int, int, int]] = field(default_factory=list)


class Groups:
    """``make`` gives a new group from the first of its flows, or raises ValueError."""

    def __init__(self, make: Callable[[bytes], Group]) -> None:
        self._make = make
        self._groups: dict[bytes, Group] = {}

    def clear(self) -> None:
        """Forget everything: names or identities may have changed."""
        self._groups.clear()

    def sort(
        self, records: list[bytes], known: Container[Which], before: Container[Which]
    ) -> tuple[list[Group], list[bytes]]:
        """Groups with what ended in these flow_events, and the events that must be told one by one: of flows in
        ``known`` or ``before``, those nobody accepted, and those no group can be made of."""
        touched: dict[bytes, Group] = {}
        single: list[bytes] = []
        for raw in records:
            port, client, native, moved, server, answered, answer_moved, created_ns, closed_ns = _NUMBERS.unpack(raw)
            sent, received, which = native + moved, answered + answer_moved, (client, created_ns)
            if which in known or which in before or not (server or sent or received):
                single.append(raw)
                continue
            key = raw[:_PAIR_TO] + raw[_WHO]
            group = touched.get(key)
            if group is None:
                try:
                    group = touched[key] = self._group(key, raw)
                except ValueError:
                    single.append(raw)
                    continue
            group.flows.append((port, sent, received, (closed_ns - created_ns + 500_000) // 1_000_000))
        return list(touched.values()), single

    def _group(self, key: bytes, raw: bytes) -> Group:
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= GROUPS_MAX:
                self._groups.clear()
            group = self._groups[key] = self._make(raw)
        return group
