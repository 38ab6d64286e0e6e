"""Flows that an earlier layout let in, taken over into this one, so that a right which is lost still ends them.

Of an earlier layout only the key of `flows` is read: the 4-tuple, which has had this form in every layout; a map with
another size of key is left alone and said so. Everything else is asked of the sockets and of this layout's own maps.
What cannot be known any more is the address the client dialled, the policy, and bytes that were redirected. A flow
taken over is native: its sockets may still be in the earlier sockhash.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowEnd, FlowValue, TupleKey
from ambient.errors import AmbientError
from ambient.io import bpf_drain, sock_diag
from ambient.io.bpf_maps import Maps

WAIT_S: Final = 60.0
"""So long pods may take to be enrolled again; flows of others are then nobody's."""
ROUNDS_MAX: Final = 8
_GONE: Final = FlowEnd(flags=LAYOUT["END_CLOSED"])

Tuple = tuple[str, int, str, int]
log = logging.getLogger(__name__)


class Inheritance:
    """One per start of the agent, after the earlier layouts were detached. Call `step` until ``done``."""

    def __init__(self, bpffs_dir: str, maps: Maps) -> None:
        self._maps = maps
        self._waiting, said = bpf_drain.inherited(bpffs_dir)
        self.problem = said
        if said:
            log.error("%s", said)

    @property
    def done(self) -> bool:
        return not self._waiting

    def step(self, places: Mapping[str, tuple[int, int]], settled: bool) -> set[int]:
        """Take over the flows between ``places``: address of an enrolled pod -> cookie and descriptor of its namespace.

        ``settled``: nobody else will come. Returns the numbers of the destinations, whose rights are to be looked at.
        """
        ready = [key for key in self._waiting if settled or (key.local in places and key.remote in places)]
        self._waiting = [key for key in self._waiting if key not in set(ready)]
        ready = [key for key in ready if key.local in places and key.remote in places and key not in self._maps.flows]
        if not ready:
            return set()
        spaces = {cookie: fd for key in ready for cookie, fd in (places[key.local], places[key.remote])}
        written: dict[TupleKey, FlowValue] = {}
        # Who closes before its entry is there does not end it: so it is looked again until nothing changed.
        for _ in range(ROUNDS_MAX):
            sockets = _sockets(spaces)
            before = _ends(written)
            for key in ready:
                value = self._flow(key, places[key.remote][0], places[key.local][0], sockets)
                if value is None:
                    if written.pop(key, None) is not None:
                        self._maps.flows.delete(key)
                elif _cookies(value) != before.get(key):
                    self._maps.flows[key] = written[key] = value
            if _ends(written) == before:
                break
        log.info("took over %d flows of an earlier layout", len(written))
        return {value.destination for value in written.values()}

    def _flow(
        self, key: TupleKey, client_netns: int, server_netns: int, sockets: Mapping[int, Mapping[Tuple, int]]
    ) -> FlowValue | None:
        """None if it is over, or no pod of ours any more."""
        client = sockets[client_netns].get(_seen_by_client(key), 0)
        server = sockets[server_netns].get(_seen_by_server(key), 0)
        source, destination = self._maps.enrolled.get(client_netns), self._maps.enrolled.get(server_netns)
        workload = self._maps.workloads.get(key.local)
        if not (client or server) or source is None or destination is None or workload is None:
            return None
        return FlowValue(
            client=FlowEnd(cookie=client) if client else _GONE,
            server=FlowEnd(cookie=server),
            created_ns=time.monotonic_ns(),
            generation=workload.generation,
            netns_client=client_netns,
            netns_server=server_netns,
            original=key.local,
            source=source.workload,
            destination=destination.workload,
            identity=source.identity,
            policy=0,
            original_port=key.local_port,
            reason=LAYOUT["REASON_KERNEL"],
            acceleration=LAYOUT["ACCELERATION_DIRECT"],
            flags=0,
        )


def _seen_by_client(key: TupleKey) -> Tuple:
    return key.remote, key.remote_port, key.local, key.local_port


def _seen_by_server(key: TupleKey) -> Tuple:
    return key.local, key.local_port, key.remote, key.remote_port


def _cookies(value: FlowValue) -> tuple[int, int]:
    return value.client.cookie, value.server.cookie


def _ends(written: Mapping[TupleKey, FlowValue]) -> dict[TupleKey, tuple[int, int]]:
    return {key: _cookies(value) for key, value in written.items()}


def _sockets(spaces: Mapping[int, int]) -> dict[int, dict[Tuple, int]]:
    """By the cookie of the namespace: the connected sockets' cookies. What only stands for a socket that is closed
    already (in FIN_WAIT2) has no memory to tell of."""
    found: dict[int, dict[Tuple, int]] = {}
    for cookie, fd in spaces.items():
        found[cookie] = {}
        try:
            with sock_diag.open_diag(fd) as diag:
                for s in (s for s in sock_diag.dump(diag) if s.held >= 0):
                    found[cookie][s.local, s.local_port, s.remote, s.remote_port] = s.cookie
        except (OSError, AmbientError) as error:
            log.error("flows of a pod cannot be taken over: %s", error)
    return found
