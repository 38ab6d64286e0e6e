"""The server's side of delta discovery as a state machine per client: requests in, responses out.

A client is sent *rounds*. A round is everything in which the client differs from the World of one
generation, cut into responses in this order:

    1. policies that are new or changed
    2. addresses: removed, then new and changed
    3. policies that are gone

so a client that applies responses as they come never has a workload that lists a policy it was not given,
and never loses a policy that a workload still lists: a policy listed by any workload of the new World is
in the new World (step 1 came before) and one listed by a workload of the old World goes only after that
workload's new form came (step 3 after 2).

That order alone does not close every gap: if one change both weakens a policy and moves a workload to
another policy, there is an instant in which the workload has the weak one and not yet the other. No order
can close that for all pairs of changes; only applying the round as a whole does. Therefore
``system_version_info`` is the generation, with a ``+`` behind it in every response of the round but the
last, and our own client (`ambient.xds.client`) applies a round as one change: each World it acts by is one
that this server had, so whoever is denied before and after a change is denied throughout. For a foreign
client, to whom the field is an opaque string, the instant is the time between two messages of one stream.

Nothing is queued: while a client is slow, changes pile up in the World only, and its next round has the
sum of them. At most `ROUNDS_IN_FLIGHT_MAX` rounds wait for its acknowledgement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ambient.errors import PeerFault
from ambient.proto import discovery_pb2
from ambient.xds.client import MORE_FOLLOWS, rejected_names
from ambient.xds.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, NAME_BYTES_MAX, Resource, field_bytes
from ambient.xds.store import Store

ROUNDS_IN_FLIGHT_MAX: Final = 4
ROUNDS_ASKED_MAX: Final = 64
"""The same when the client asked for something besides: it has to acknowledge before it is answered again."""
RESPONSE_BYTES: Final = 1024 * 1024
"""A response is closed when its resources reach this size."""
TYPES_MAX: Final = 16
NAMES_MAX: Final = 1_000_000
NAME_CHARS_MAX: Final = 64 * 1024 * 1024
"""Of all names and versions that a client makes us remember."""
NACKS_KEPT: Final = 16

_SYSTEM_VERSION_TAG, _TYPE_URL_TAG, _NONCE_TAG, _REMOVED_TAG = 0x0A, 0x22, 0x2A, 0x32


@dataclass(frozen=True, slots=True)
class Nack:
    """A refusal by a client. ``names`` are the resources it refused."""

    type_url: str
    names: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class ClientState:
    """A connected client, for status pages. ``versions`` is type -> number of resources it was sent."""

    node: str
    role: str
    id: str
    versions: dict[str, int]
    generation_sent: int
    generation_acknowledged: int
    in_flight: int
    nack_count: int
    nacks: tuple[Nack, ...]


@dataclass(frozen=True, slots=True)
class Response:
    """A DeltaDiscoveryResponse as bytes, and what is in it."""

    nonce: str
    type_url: str
    payload: bytes
    resources: int
    removed: int


@dataclass(slots=True)
class _Subscription:
    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    """Names to be answered in the next round whatever is known of the client, also if they do not exist."""
    sent: dict[str, str] = field(default_factory=dict)
    """name -> version, as the client has it once it took everything that was sent."""
    seen: int = -1
    """The generation ``sent`` is right for; -1: the first answer is owed."""


@dataclass(slots=True)
class _Planned:
    type_url: str
    resources: list[Resource] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True, slots=True)
class _Sent:
    round: int
    generation: int
    type_url: str
    names: dict[str, bool]
    """Resource name -> hbone, removed ones too (False)."""
    removed: frozenset[str]


class Session:
    """One stream of one client. Made by `Server.open`, ended by `Server.close`."""

    def __init__(self, store: Store, node: str, acknowledged: Callable[[], None]) -> None:
        self.node = self.proved_node = node
        self.role = ""
        self.id = ""
        self.nack_count = 0
        self.stale_count = 0
        self.generation_sent = 0
        self.generation_acknowledged = 0
        self._store = store
        self._tell = acknowledged
        self._subscriptions: dict[str, _Subscription] = {}
        self._planned: deque[_Planned] = deque()
        self._pending: dict[str, _Sent] = {}
        self._round = 0
        self._nonce = 0
        self._name_chars = 0
        self._acknowledged: dict[str, bool | None] = {}
        """Address resources the client has: name -> hbone, None if it has some version we do not know."""
        self._nacks: deque[Nack] = deque(maxlen=NACKS_KEPT)

    # ---- requests ----

    def receive(self, request: discovery_pb2.DeltaDiscoveryRequest) -> Nack | None:
        """Take a request; the Nack if it is one. Raises PeerFault if the stream must be closed."""
        if request.HasField("node") and not self.id:
            self._introduce(request.node)
        subscription = self._subscriptions.get(request.type_url)
        if subscription is None:
            subscription = self._subscribe_first(request)
        self._change_names(request, subscription)
        return self._take_answer(request) if request.response_nonce else None

    def _introduce(self, node: discovery_pb2.Node) -> None:
        self.id = node.id[:NAME_BYTES_MAX]
        fields = node.metadata.fields
        self.role = fields["ROLE"].string_value[:64] if "ROLE" in fields else ""
        if not self.node and "NODE_NAME" in fields:
            self.node = fields["NODE_NAME"].string_value[:253]

    def _subscribe_first(self, request: discovery_pb2.DeltaDiscoveryRequest) -> _Subscription:
        if len(self._subscriptions) >= TYPES_MAX:
            raise PeerFault(f"more than {TYPES_MAX} resource types on one stream")
        if len(request.initial_resource_versions) > NAMES_MAX:
            raise PeerFault(f"more than {NAMES_MAX} initial_resource_versions")
        self._remember(sum(len(name) + len(version) for name, version in request.initial_resource_versions.items()))
        subscription = _Subscription(sent=dict(request.initial_resource_versions))
        # a first request without names is a wildcard one (delta xDS)
        subscription.wildcard = not request.resource_names_subscribe
        self._subscriptions[request.type_url] = subscription
        if request.type_url == ADDRESS_TYPE:
            self._acknowledged = dict.fromkeys(subscription.sent)
        return subscription

    def _remember(self, chars: int) -> None:
        self._name_chars += chars
        if self._name_chars > NAME_CHARS_MAX:
            raise PeerFault(f"names of more than {NAME_CHARS_MAX} characters")

    def _change_names(self, request: discovery_pb2.DeltaDiscoveryRequest, subscription: _Subscription) -> None:
        for name in request.resource_names_subscribe:
            if len(name) > NAME_BYTES_MAX:
                raise PeerFault(f"resource name of more than {NAME_BYTES_MAX} characters")
            if name == "*":
                if not subscription.wildcard:
                    subscription.wildcard, subscription.seen = True, -1
                continue
            if name not in subscription.names:
                self._remember(len(name))
                subscription.names.add(name)
            subscription.asked.add(name)
        if len(subscription.names) > NAMES_MAX:
            raise PeerFault(f"more than {NAMES_MAX} names subscribed")
        for name in request.resource_names_unsubscribe:
            if name == "*":
                subscription.wildcard = False
            if name in subscription.names:
                self._remember(-len(name))
                subscription.names.discard(name)
            subscription.asked.discard(name)

    def _take_answer(self, request: discovery_pb2.DeltaDiscoveryRequest) -> Nack | None:
        sent = self._pending.pop(request.response_nonce, None)
        if sent is None or sent.type_url != request.type_url:
            if sent is not None:
                self._pending[request.response_nonce] = sent
            self.stale_count += 1
            return None
        nack, refused = None, frozenset[str]()
        if request.HasField("error_detail"):
            listed = rejected_names(request.error_detail)
            # who names nothing that it was sent has refused all of it
            refused = frozenset(sent.names.keys() & set(listed or ())) or frozenset(sent.names)
            nack = Nack(request.type_url, tuple(sorted(refused)), request.error_detail.message[:4096])
            self.nack_count += 1
            self._nacks.append(nack)
        if request.type_url == ADDRESS_TYPE:
            for name, hbone in sent.names.items():
                if name in refused:
                    continue
                if name in sent.removed:
                    self._acknowledged.pop(name, None)  # or pods that are long gone would be remembered for ever
                else:
                    self._acknowledged[name] = hbone
        if not any(other.generation <= sent.generation for other in self._pending.values()):
            self.generation_acknowledged = max(self.generation_acknowledged, sent.generation)
        self._tell()
        return nack

    # ---- responses ----

    def next(self) -> Response | None:
        """The next response to send, None if the client has to be waited for or is up to date."""
        if not self._planned:
            self._plan_round()
        if not self._planned:
            return None
        planned = self._planned.popleft()
        self._nonce += 1
        nonce = f"{self._round}.{self._nonce}"
        more = MORE_FOLLOWS if self._planned else ""
        payload = b"".join(
            (
                field_bytes(_SYSTEM_VERSION_TAG, f"{self.generation_sent}{more}".encode()),
                *(resource.wire for resource in planned.resources),
                field_bytes(_TYPE_URL_TAG, planned.type_url.encode()),
                field_bytes(_NONCE_TAG, nonce.encode()),
                *(field_bytes(_REMOVED_TAG, name.encode()) for name in planned.removed),
            )
        )
        names = dict.fromkeys(planned.removed, False)
        names.update({resource.name: resource.hbone for resource in planned.resources})
        removed = frozenset(planned.removed)
        self._pending[nonce] = _Sent(self._round, self.generation_sent, planned.type_url, names, removed)
        return Response(nonce, planned.type_url, payload, len(planned.resources), len(planned.removed))

    def _plan_round(self) -> None:
        if self._store.generation == 0:
            return  # no World yet: an empty answer would tell the client that the mesh is empty
        owed = any(s.seen < 0 or s.asked for s in self._subscriptions.values())
        in_flight = len({sent.round for sent in self._pending.values()})
        if in_flight >= (ROUNDS_ASKED_MAX if owed else ROUNDS_IN_FLIGHT_MAX):
            return
        policies_gone: list[str] = []
        parts: list[_Planned] = []
        for type_url in sorted(self._subscriptions, key=lambda name: name != AUTHORIZATION_TYPE):
            subscription = self._subscriptions[type_url]
            first = subscription.seen < 0
            changed, removed = self._compare(type_url, subscription)
            if type_url == AUTHORIZATION_TYPE:
                policies_gone, removed = removed, []
            _cut(parts, type_url, changed, removed, answer_owed=first)
        if policies_gone:
            _cut(parts, AUTHORIZATION_TYPE, [], policies_gone, answer_owed=False)
        if parts:
            self._round += 1
            self._planned.extend(parts)
        self.generation_sent = self._store.generation
        if not parts and not self._pending:
            self.generation_acknowledged = self.generation_sent

    def _compare(self, type_url: str, subscription: _Subscription) -> tuple[list[Resource], list[str]]:
        """What the client lacks and what it has too much; ``sent`` then says that it was told."""
        store, sent = self._store, subscription.sent
        current = store.resources(type_url)
        wanted = current
        if not subscription.wildcard:
            wanted = {r.name: r for name in subscription.names for r in store.resolve(type_url, name)}
        names = store.changed_since(type_url, subscription.seen) if subscription.seen >= 0 else None
        if names is None or not subscription.wildcard:
            names = frozenset(sent) | frozenset(wanted)
        changed: list[Resource] = []
        removed: dict[str, None] = {}  # in order
        again: set[str] = set()
        for name in subscription.asked:
            found = store.resolve(type_url, name)
            again.update(resource.name for resource in found)
            if not found:
                removed[name] = None  # tells the client that there is no such thing
        subscription.asked.clear()
        for name in sorted(names | again):
            resource = wanted.get(name)
            if resource is None:
                if sent.pop(name, None) is not None:
                    removed[name] = None
            elif name in again or sent.get(name) != resource.version:
                sent[name] = resource.version
                changed.append(resource)
            elif subscription.seen < 0 and type_url == ADDRESS_TYPE and name in self._acknowledged:
                self._acknowledged[name] = resource.hbone  # it said that it has this very version
        subscription.seen = store.generation
        return changed, list(removed)

    # ---- status ----

    def waiting(self, uid: str, hbone: bool) -> bool:
        """Whether the client may still have the workload with another protocol than this."""
        subscription = self._subscriptions.get(ADDRESS_TYPE)
        if subscription is None:
            # said nothing yet, or is about to say more: it may remember anything
            return not self._subscriptions or AUTHORIZATION_TYPE in self._subscriptions
        if not subscription.wildcard and uid not in subscription.sent and uid not in self._acknowledged:
            return False
        if hbone:
            return self._acknowledged.get(uid, False) is not True
        if self._acknowledged.get(uid, False) is not False:
            return True
        # a form with HBONE that is on its way may be in use already or soon, whatever was acknowledged before
        return any(
            sent.type_url == ADDRESS_TYPE and sent.names.get(uid, False) for sent in self._pending.values()
        ) or any(resource.name == uid and resource.hbone for planned in self._planned for resource in planned.resources)

    def lags(self, uid: str) -> bool:
        """Whether the client may not have the present form of the workload."""
        subscription = self._subscriptions.get(ADDRESS_TYPE)
        if subscription is None:
            return not self._subscriptions or AUTHORIZATION_TYPE in self._subscriptions
        if not subscription.wildcard and uid not in subscription.sent:
            return False
        under_way = any(sent.type_url == ADDRESS_TYPE and uid in sent.names for sent in self._pending.values())
        planned = any(resource.name == uid for part in self._planned for resource in part.resources)
        return under_way or planned or subscription.seen < self._store.generation

    @property
    def follows_addresses(self) -> bool:
        return ADDRESS_TYPE in self._subscriptions

    def state(self) -> ClientState:
        return ClientState(
            self.node,
            self.role,
            self.id,
            {type_url: len(subscription.sent) for type_url, subscription in self._subscriptions.items()},
            self.generation_sent,
            self.generation_acknowledged,
            len(self._pending),
            self.nack_count,
            tuple(self._nacks),
        )


def _cut(parts: list[_Planned], type_url: str, changed: list[Resource], removed: list[str], answer_owed: bool) -> None:
    """Append responses of at most about `RESPONSE_BYTES`."""
    if not (changed or removed or answer_owed):
        return
    part = _Planned(type_url)
    parts.append(part)
    for name in removed:
        if part.size >= RESPONSE_BYTES:
            part = _Planned(type_url)
            parts.append(part)
        part.removed.append(name)
        part.size += len(name) + 4
    for resource in changed:
        if part.size and part.size + len(resource.wire) > RESPONSE_BYTES:
            part = _Planned(type_url)
            parts.append(part)
        part.resources.append(resource)
        part.size += len(resource.wire)
