"""What the kernel needs to authorize connections within this node, written so that no right outlives its loss.

The order of every change is the argument. A destination whose rights may have changed gets another generation first, in
one write of its `workloads` entry: from then on every verdict and every authorization on its way is void, and what the
connect hook meets is ztunnel. Then verdicts of the new generation are written. Then the flows that stand are
evaluated, and those without a right are closed. A flow that was let in by an old verdict had its entry in `flows`
before its first packet, so it is seen there; unless a client that makes its own packets closed the socket it had it
for, or an older layout let it in. So the sockets of the destination are looked at too (`strays`).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Final

from ambient.datapath import endpoints as slots
from ambient.datapath import verdicts
from ambient.datapath.entries import LocalPod, Rights
from ambient.datapath.layout import LAYOUT
from ambient.datapath.plan import plan
from ambient.datapath.render import short_workload, socket_text
from ambient.datapath.values import (
    EndpointKey,
    EndpointValue,
    FlowEnd,
    FlowValue,
    SettingsValue,
    TupleKey,
    VerdictKey,
    VerdictValue,
)
from ambient.errors import AmbientError
from ambient.io import sock_diag
from ambient.io.bpf_maps import Maps
from ambient.io.flow_reader import is_over
from ambient.model.identity import Identity
from ambient.model.world import World
from ambient.node import strays
from ambient.node.records import Names

NUMBERS_MAX: Final = 10_000
"""Names of identities and policies that are kept although nothing uses them now."""
ENROLLED: Final = LAYOUT["WORKLOAD_ENROLLED"]
WAYPOINT: Final = LAYOUT["WORKLOAD_WAYPOINT"]

log = logging.getLogger(__name__)


class SameNode:
    """One per `Kernel`. ``netns_of`` gives the descriptor of a pod's namespace by its cookie, None if not held."""

    def __init__(self, node: str, names: Names, maps: Maps) -> None:
        self._node = node
        self._names = names
        self._maps = maps
        self._verdicts = dict(maps.verdicts.items())
        self._endpoints = dict(maps.endpoints.items())
        self._granted: dict[LocalPod, Rights] = {}
        self._generations: dict[tuple[str, int], int] = {}
        self._last = max((value.generation for _, value in maps.workloads.items()), default=0)
        self._computed: dict[int, tuple[int, dict[Identity, int], dict[VerdictKey, VerdictValue]]] = {}
        """By destination: the verdicts of a generation and a set of identities."""
        self._changed: set[int] = set()
        """Numbers of destinations whose generation moved and whose flows were not looked at since."""
        self._judged: dict[int, Rights] = {}
        """By the number of a destination: the rights by which it was last looked at."""
        self.netns_of: Callable[[int], int | None] = lambda cookie: None
        self.counters: dict[str, int] = {"flows_revoked": 0, "flows_not_closed": 0, "verdicts_refused": 0}
        self.problem = ""

    @property
    def granted(self) -> Mapping[LocalPod, Rights]:
        return self._granted

    def forget(self) -> None:
        """Look at what is in the kernel again."""
        self._verdicts = dict(self._maps.verdicts.items())
        self._endpoints = dict(self._maps.endpoints.items())

    def distrust(self) -> None:
        """What the kernel held was not what was written, so nobody knows who was let in by it. With the next `grant`
        every destination has another generation, which makes void what is on its way, and its flows are looked at."""
        self._granted = {}

    # --- generations

    def generation_of(self, pod: LocalPod) -> int:
        return self._generations.get((pod.workload_uid, pod.generation), pod.generation)

    def grant(self, granted: Mapping[LocalPod, Rights]) -> None:
        """Take note of rights; whoever's changed has another generation from now on. Write `workloads` next."""
        before = {(p.workload_uid, p.generation): r for p, r in self._granted.items()}
        now: dict[tuple[str, int], int] = {}
        for pod, rights in granted.items():
            key = (pod.workload_uid, pod.generation)
            if before.get(key) == rights:
                now[key] = self._generations[key]
                continue
            self._last = now[key] = max(self._last + 1, pod.generation, time.time_ns())
            self._changed.add(self._names.workloads.of(pod.workload_uid))
        self._granted, self._generations = dict(granted), now

    # --- verdicts

    def wanted_verdicts(self) -> dict[VerdictKey, VerdictValue]:
        """Destination by destination, port 0 of each after its other ports."""
        known = {p.identity for p in self._granted if p.identity is not None}
        identities = {identity: self.identity(identity) for identity in sorted(known)}
        found: dict[VerdictKey, VerdictValue] = {}
        for pod, rights in self._granted.items():
            if rights.policies and rights.flags & ENROLLED and not rights.flags & WAYPOINT:
                number = self._names.workloads.of(pod.workload_uid)
                generation = self.generation_of(pod)
                done = self._computed.get(number)
                if done is None or done[0] != generation or done[1] != identities:
                    entries = verdicts.verdicts_for(
                        rights.policies, number, generation, identities, self._names.policies
                    )
                    done = self._computed[number] = (generation, identities, entries)
                found |= done[2]
        for number in self._computed.keys() - {key.workload for key in found}:
            del self._computed[number]
        return found

    def put_verdicts(self) -> None:
        wanted = self.wanted_verdicts()
        self._names.save()  # a number that was used must never come to mean somebody else
        table, mirror = self._maps.verdicts, self._verdicts
        for key in verdicts.remove_first([k for k in mirror if k not in wanted]):
            table.delete(key)
            del mirror[key]
        incomplete: set[tuple[int, int]] = set()
        self.problem = ""
        for key, value in wanted.items():
            pair = (key.identity, key.workload)
            if key.port == 0 and pair in incomplete:
                table.delete(key)  # it would stand for the ports that found no room
                mirror.pop(key, None)
                continue
            if mirror.get(key) == value:
                continue
            try:
                table[key] = value
            except AmbientError as error:
                incomplete.add(pair)
                self.counters["verdicts_refused"] += 1
                self.problem = f"map verdicts: {error}: what is not in it goes to ztunnel"
                continue
            mirror[key] = value

    def identity(self, identity: Identity) -> int:
        return self._names.identities.of(str(identity))

    # --- endpoints

    def wanted_endpoints(self, world: World) -> dict[EndpointKey, EndpointValue]:
        local = [p.workload_uid for p, r in self._granted.items() if r.flags & ENROLLED]
        return slots.endpoints(world, self._node, local, self._names.workloads, self._names.services)

    def put_endpoints(self, wanted: Mapping[EndpointKey, EndpointValue]) -> dict[tuple[int, int], int]:
        """Write slots; returns how many of each service port may be used now. Call `drop_endpoints` when that is known
        to the kernel: a slot goes only after nobody counts on it."""
        lacking: set[tuple[int, int]] = set()
        for key, value in plan(self._endpoints, wanted).puts:
            try:
                self._maps.endpoints[key] = value
            except AmbientError as error:
                lacking.add((key.service, key.port))
                self.problem = f"map endpoints: {error}: ztunnel chooses instead"
                continue
            self._endpoints[key] = value
        counted = slots.counts(wanted.keys())
        return {port: count for port, count in counted.items() if port not in lacking}

    def drop_endpoints(self, wanted: Mapping[EndpointKey, EndpointValue]) -> None:
        for key in plan(self._endpoints, wanted).deletes:
            self._maps.endpoints.delete(key)
            del self._endpoints[key]

    # --- flows

    def look_again(self, destinations: Iterable[int]) -> int:
        """Look at the flows to these numbers now, as if their rights had changed; how many were closed."""
        self._changed.update(destinations)
        return self.revoke()

    def revoke(self) -> int:
        """Close the flows to destinations that changed for which nobody would be let in now; how many. Where something
        fails the next call does it again."""
        changed = self._changed
        if not changed:
            return 0
        lost = self.unrightful(changed)
        for key, flow, reason in lost:
            source, destination = (
                short_workload(self._names.workloads.names().get(n, str(n))) for n in (flow.source, flow.destination)
            )
            log.warning(
                "flow from %s (%s) to %s (%s) closed: %s",
                source,
                socket_text(key.remote, key.remote_port),
                destination,
                socket_text(key.local, key.local_port),
                reason,
            )
        with _Diags(self.netns_of) as diags:
            self._close(diags, ((key, flow) for key, flow, _ in lost))
            closed = len(lost) + self._close_strays(diags, changed)
        if not diags.failed:
            self._changed = set()
        self.counters["flows_revoked"] += closed
        return closed

    def unrightful(self, destinations: Container[int] | None = None) -> list[tuple[TupleKey, FlowValue, str]]:
        """Flows (to these destinations, or all) for which nobody would be let in now, and why not."""
        by_number = {self._names.workloads.of(p.workload_uid): r for p, r in self._granted.items()}
        by_address = {a: self._names.workloads.of(p.workload_uid) for p in self._granted for a in p.addresses}
        known, identities = self._names.workloads.names(), self._names.identities.names()
        found: list[tuple[TupleKey, FlowValue, str]] = []
        for key, flow in self._maps.flows.items():
            # Where names.json was lost nobody knows the number; the address is still the pod's, or the flow was closed.
            number = flow.destination if flow.destination in known else by_address.get(key.local, 0)
            if is_over(flow) or not (destinations is None or number in destinations):
                continue
            if reason := self._lost(key, flow, by_number.get(number), identities):
                found.append((key, flow, reason))
        return found

    def _lost(self, key: TupleKey, flow: FlowValue, rights: Rights | None, identities: Mapping[int, str]) -> str:
        """Why the flow has no right any more; empty if it has. A pod that left the mesh keeps what stands."""
        name = identities.get(flow.identity)
        if name is None and (client := self._maps.enrolled.get(flow.netns_client)) is not None:
            name = identities.get(client.identity)
        try:
            source = Identity.parse(name or "")
        except ValueError:
            source = None
        return strays.why_lost(rights, source, key)

    def _close_strays(self, diags: _Diags, changed: Container[int]) -> int:
        """Close what is in no flow and had a right that is gone; how many. After the flows that lost theirs."""
        before, now = self._judged, {self._names.workloads.of(p.workload_uid): r for p, r in self._granted.items()}
        judged = {n: before.get(n, r) if r.policies is None else r for n, r in now.items() if r.flags & ENROLLED}
        narrowed = {n: (before[n], r) for n, r in judged.items() if n in changed and before.get(n, r) != r}
        settings = self._maps.settings if narrowed else None
        closed = 0
        if settings is not None and settings.mode != LAYOUT["MODE_BYPASS"]:
            closed = self._close_found(diags, narrowed, settings)
        if not diags.failed:
            self._judged = judged
        return closed

    def _close_found(
        self, diags: _Diags, narrowed: Mapping[int, tuple[Rights, Rights]], settings: SettingsValue
    ) -> int:
        closed = 0
        for cookie, value in self._maps.enrolled.items():
            if value.workload not in narrowed:
                continue
            own, others = self._addresses(value.workload)
            for stray in diags.find_strays(cookie, own, others, *narrowed[value.workload], settings.exempt_cgroups):
                flow = self._maps.flows.get(stray.key)
                if flow is not None and flow.server.cookie == stray.cookie:
                    continue  # judged by the identity it was let in with
                own_end, peer = (stray.key.local, stray.key.local_port), (stray.key.remote, stray.key.remote_port)
                log.warning(
                    "connection from %s to %s, in no flow, closed: %s",
                    socket_text(*peer),
                    socket_text(*own_end),
                    stray.reason,
                )
                closed += diags.destroy(cookie, own_end, peer, stray.cookie)
        return closed

    def _addresses(self, workload: int) -> tuple[set[str], dict[str, Identity | None]]:
        """Those of a destination, and those of the other pods in the mesh with who they are."""
        own: set[str] = set()
        others: dict[str, Identity | None] = {}
        for pod, rights in self._granted.items():
            if self._names.workloads.of(pod.workload_uid) == workload:
                own.update(pod.addresses)
            elif rights.flags & ENROLLED:
                others.update(dict.fromkeys(pod.addresses, pod.identity))
        return own, others

    def remove(self, addresses: Iterable[str]) -> None:
        """The addresses end: close their flows. What does not close is told to telemetry as it stands."""
        gone = set(addresses)

        def theirs() -> Iterator[tuple[TupleKey, FlowValue]]:
            for key, flow in self._maps.flows.items():
                if (key.local in gone or key.remote in gone) and not is_over(flow):
                    yield key, flow

        with _Diags(self.netns_of) as diags:
            self._close(diags, theirs())
        for key, flow in theirs():
            client, server = (_closed(end) for end in (flow.client, flow.server))
            self._maps.flows.replace(key, _with_ends(flow, client, server))  # who was told of meanwhile is not again

    def _close(self, diags: _Diags, flows: Iterable[tuple[TupleKey, FlowValue]]) -> None:
        for key, flow in flows:
            own, peer = (key.local, key.local_port), (key.remote, key.remote_port)
            # The server's end first: its reset reaches the client, which sees what ztunnel would have shown it.
            closed = diags.destroy(flow.netns_server, own, peer, flow.server.cookie)
            closed |= diags.destroy(flow.netns_client, peer, own, flow.client.cookie)
            if not closed:
                self.counters["flows_not_closed"] += 1

    def tidy(self) -> None:
        """Forget names that nothing uses, once there are many."""
        for numbers, used in (
            (self._names.identities, {str(p.identity) for p in self._granted}),
            (self._names.policies, {p.key for r in self._granted.values() for p in r.policies or ()}),
        ):
            if len(numbers.names()) > NUMBERS_MAX:
                numbers.retain(used)


def _closed(end: FlowEnd) -> FlowEnd:
    values = {name: getattr(end, name) for name in FlowEnd.__slots__}
    return FlowEnd(**(values | {"flags": end.flags | LAYOUT["END_CLOSED"]}))


def _with_ends(flow: FlowValue, client: FlowEnd, server: FlowEnd) -> FlowValue:
    values = {name: getattr(flow, name) for name in FlowValue.__slots__}
    return FlowValue(**(values | {"client": client, "server": server}))


class _Diags:
    """inet_diag sockets of the namespaces a pass needs, each opened once. ``failed``: not everything could be done."""

    def __init__(self, netns_of: Callable[[int], int | None]) -> None:
        self._netns_of = netns_of
        self._open: dict[int, socket.socket | None] = {}
        self.failed = 0
        self._why = ""

    def __enter__(self) -> _Diags:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self._open.values():
            if sock is not None:
                sock.close()
        if self.failed:
            log.error("%d times connections of pods could not be listed or closed: %s", self.failed, self._why)

    def _fail(self, error: Exception) -> None:
        self.failed, self._why = self.failed + 1, str(error)

    def of(self, cookie: int) -> socket.socket | None:
        """The socket of a namespace; None if that is not held."""
        if cookie not in self._open:
            fd = self._netns_of(cookie)
            try:
                self._open[cookie] = None if fd is None else sock_diag.open_diag(fd)
            except OSError as error:
                self._fail(error)
                self._open[cookie] = None
        return self._open[cookie]

    def find_strays(self, cookie: int, *wanted: Any) -> list[strays.Stray]:
        """`strays.find` in a namespace."""
        try:
            return list(strays.find(self.of(cookie), *wanted))
        except (OSError, AmbientError) as error:
            self._fail(error)
            if (half_read := self._open.pop(cookie)) is not None:
                half_read.close()
            return []

    def destroy(self, cookie: int, own: tuple[str, int], peer: tuple[str, int], sock_cookie: int) -> bool:
        sock = self.of(cookie)
        if sock is None or not sock_cookie:
            return False
        try:
            return sock_diag.destroy(sock, *own, *peer, sock_cookie)
        except (OSError, AmbientError) as error:
            self._fail(error)
            return False
