"""The client's side of delta discovery as a state machine: responses in, Worlds and acknowledgements out.

What it promises its user:

* nothing before the first complete World (both types answered), then every World it hands out is one the
  server had: the responses of one round (`ambient.xds.session`) are applied together or not at all;
* a response is acknowledged by `commit` only, that is after its user has acted on it;
* a bad resource is refused by name and the rest of its response still applies; its last good version
  serves on. A policy that never was good is replaced by one that fails closed (`policies.stand_in`).

A user that could not act does not commit: the next connection then starts from what was committed before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError

from ambient.errors import PeerFault
from ambient.model.policy import Policy
from ambient.model.workload import Service, Workload
from ambient.model.world import Diff, World
from ambient.proto import discovery_pb2
from ambient.xds.policies import decode_policy, stand_in
from ambient.xds.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, NAME_BYTES_MAX, decode_address, fault

TYPES: Final = (AUTHORIZATION_TYPE, ADDRESS_TYPE)
MORE_FOLLOWS: Final = "+"
"""Ends system_version_info of each response of a round but the last."""

ROUND_RESOURCES_MAX: Final = 1_000_000
ROUND_RESPONSES_MAX: Final = 10_000
_NACK_MESSAGE_CHARS = 4096
_INVALID_ARGUMENT = 3


@dataclass(frozen=True, slots=True)
class Rejected:
    name: str
    problem: str


@dataclass(slots=True)
class _Part:
    """One response, read but not acted upon."""

    type_url: str
    nonce: str
    good: dict[str, tuple[str, Workload | Service | Policy]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    rejected: list[Rejected] = field(default_factory=list)
    stand_ins: dict[str, Policy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """What a finished round asks for. ``diff`` may be empty; ``first`` is the first complete World."""

    world: World
    diff: Diff
    first: bool
    rejected: tuple[Rejected, ...]
    parts: tuple[_Part, ...]


class Client:
    """One subscription to everything (wildcard), over any number of connections."""

    def __init__(self, node: discovery_pb2.Node) -> None:
        self.world = World()
        self.complete = False
        self._node = node
        self._versions: dict[str, dict[str, str]] = {type_url: {} for type_url in TYPES}
        self._round: list[_Part] = []
        self._round_resources = 0
        self._answered: set[str] = set()

    def connect(self) -> tuple[discovery_pb2.DeltaDiscoveryRequest, ...]:
        """The first requests of a new stream; what an earlier stream left unfinished is forgotten."""
        self._reset_round()
        self._answered.clear()
        requests = []
        for type_url in TYPES:
            request = discovery_pb2.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=["*"])
            request.node.CopyFrom(self._node)
            if type_url == AUTHORIZATION_TYPE:  # stand-ins too, or nobody would say that they are not needed any more
                request.initial_resource_versions.update(dict.fromkeys(self.world.policies, ""))
            request.initial_resource_versions.update(self._versions[type_url])
            requests.append(request)
        return tuple(requests)

    def receive(self, response: discovery_pb2.DeltaDiscoveryResponse) -> Change | None:
        """Take a response; the Change if it finishes a round. Raises PeerFault if the stream must be given up."""
        if response.type_url not in TYPES:
            raise PeerFault(f"discovery response of type {response.type_url[:200]!r}, which was not asked for")
        if not response.nonce:
            raise PeerFault(f"discovery response of type {response.type_url} without a nonce")
        self._round_resources += len(response.resources) + len(response.removed_resources)
        if self._round_resources > ROUND_RESOURCES_MAX or len(self._round) >= ROUND_RESPONSES_MAX:
            raise PeerFault(
                f"more than {ROUND_RESOURCES_MAX} resources or {ROUND_RESPONSES_MAX} responses in one round"
            )
        self._round.append(self._read(response))
        self._answered.add(response.type_url)
        if response.system_version_info.endswith(MORE_FOLLOWS):
            return None
        if not self.complete and not self._answered.issuperset(TYPES):
            return None
        return self._change()

    def commit(self, change: Change) -> tuple[discovery_pb2.DeltaDiscoveryRequest, ...]:
        """The change has taken effect: remember it, and give the acknowledgements to send."""
        self.world = change.world
        self.complete = True
        acks = []
        for part in change.parts:
            versions = self._versions[part.type_url]
            for name in part.removed:
                versions.pop(name, None)
            versions.update({name: version for name, (version, _) in part.good.items()})
            acks.append(_acknowledge(part))
        return tuple(acks)

    def _read(self, response: discovery_pb2.DeltaDiscoveryResponse) -> _Part:
        part = _Part(response.type_url, response.nonce, removed=tuple(response.removed_resources))
        is_policy = response.type_url == AUTHORIZATION_TYPE
        for resource in response.resources:
            name, body = resource.name, resource.resource.value
            try:
                if not name or len(name) > NAME_BYTES_MAX:
                    raise fault(name, "name", f"has 1 to {NAME_BYTES_MAX} characters")
                if resource.resource.type_url != response.type_url:
                    raise fault(name, "type_url", f"{resource.resource.type_url[:200]!r} in a response of another type")
                decode = decode_policy if is_policy else decode_address
                part.good[name] = (resource.version, decode(name, body))
            except PeerFault as error:
                part.rejected.append(Rejected(name[:NAME_BYTES_MAX], str(error)))
                if is_policy and (substitute := stand_in(name[:NAME_BYTES_MAX], body)) is not None:
                    part.stand_ins[name] = substitute
        return part

    def _change(self) -> Change:
        parts = tuple(self._round)
        self._reset_round()
        workloads: dict[str, Workload | None] = {}
        services: dict[str, Service | None] = {}
        policies: dict[str, Policy | None] = {}
        known = set(self._versions[AUTHORIZATION_TYPE])
        for part in parts:
            if part.type_url == AUTHORIZATION_TYPE:
                policies.update(dict.fromkeys(part.removed))
                known.difference_update(part.removed)
                for name, (_, item) in part.good.items():
                    if isinstance(item, Policy):
                        policies[name] = item
                        known.add(name)
                policies.update({name: policy for name, policy in part.stand_ins.items() if name not in known})
                continue
            for name in part.removed:
                workloads[name] = services[name] = None
            for name, (_, item) in part.good.items():
                # a name that changes its kind leaves nothing of the other kind behind
                workloads[name] = item if isinstance(item, Workload) else None
                services[name] = item if isinstance(item, Service) else None
        world = self.world
        change = Diff(
            workloads=tuple(w for k, w in workloads.items() if w is not None and world.workloads.get(k) != w),
            services=tuple(s for k, s in services.items() if s is not None and world.services.get(k) != s),
            policies=tuple(p for k, p in policies.items() if p is not None and world.policies.get(k) != p),
            removed_workloads=tuple(k for k, w in workloads.items() if w is None and k in world.workloads),
            removed_services=tuple(k for k, s in services.items() if s is None and k in world.services),
            removed_policies=tuple(k for k, p in policies.items() if p is None and k in world.policies),
        )
        return Change(
            world.apply(change) if change else world,
            change,
            not self.complete,
            tuple(rejected for part in parts for rejected in part.rejected),
            parts,
        )

    def _reset_round(self) -> None:
        self._round, self._round_resources = [], 0


def _acknowledge(part: _Part) -> discovery_pb2.DeltaDiscoveryRequest:
    request = discovery_pb2.DeltaDiscoveryRequest(type_url=part.type_url, response_nonce=part.nonce)
    if part.rejected:
        request.error_detail.code = _INVALID_ARGUMENT
        request.error_detail.message = "; ".join(r.problem for r in part.rejected)[:_NACK_MESSAGE_CHARS]
        names = struct_pb2.ListValue()
        names.extend(r.name for r in part.rejected)
        request.error_detail.details.add().Pack(names)
    return request


def rejected_names(error: discovery_pb2.ErrorDetail) -> tuple[str, ...] | None:
    """Names a NACK lists, None if it lists none (then the whole response was refused)."""
    for detail in error.details:
        names = struct_pb2.ListValue()
        try:
            if detail.Is(struct_pb2.ListValue.DESCRIPTOR) and detail.Unpack(names):
                return tuple(value.string_value for value in names.values)
        except DecodeError:
            continue
    return None


def describe_node(role: str, node: str, address: str = "", pod: str = "", namespace: str = "") -> discovery_pb2.Node:
    """The node message: ``ztunnel~<ip>~<pod>.<ns>~<ns>.svc.cluster.local``, as Istio's control plane reads it."""
    namespace = namespace or "ambient-system"
    message = discovery_pb2.Node(
        id=f"ztunnel~{address or '0.0.0.0'}~{pod or f'{role}-{node}'}.{namespace}~{namespace}.svc.cluster.local",
        user_agent_name="ambient",
    )
    message.metadata.update({"NODE_NAME": node, "ROLE": role, "NAMESPACE": namespace})
    return message


@dataclass(slots=True)
class Backoff:
    """Waits between connections: 10 ms doubling to 15 s, each shortened by up to half at random."""

    first_s: float = 0.010
    limit_s: float = 15.0
    _failures: int = 0

    def next(self, random: float) -> float:
        """``random`` in [0, 1)."""
        delay = min(self.limit_s, self.first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return delay * (1.0 - random / 2)

    def reset(self) -> None:
        self._failures = 0


def summarize(rejected: Iterable[Rejected], limit: int = 5) -> str:
    """For one log line."""
    items = tuple(rejected)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(item.problem for item in items[:limit]) + more
