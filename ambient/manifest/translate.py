"""All objects to one World, kept up to date object by object.

`Translator.change` notes which workloads, services and policies an object touches; `Translator.take` computes
those anew and says what differs from before. Nothing here knows where objects come from or who is told. A bad
object never stops the others: a service keeps its last good form, a policy too or else stands closed (it
allows nothing), a pod that cannot have an identity is left out; `problems` names each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ambient.errors import ConfigFault
from ambient.manifest import objects, peer_authentication, pods, policies, services
from ambient.manifest.kinds import Changed, Kind
from ambient.manifest.mesh import Mesh
from ambient.manifest.peer_authentication import PeerMode, PeerModes
from ambient.manifest.policies import Converted, selects
from ambient.manifest.problems import Problem, problem_of, reference
from ambient.manifest.services import Member
from ambient.manifest.standing import Standing
from ambient.model.address import IPAddress
from ambient.model.policy import Policy, Scope
from ambient.model.workload import Port, Service, Workload
from ambient.model.world import Diff, World

_POLICIES = ("AuthorizationPolicy", "PeerAuthentication")
_NOT_DECODED = "does not decode"  # a spec that no policy has


class Translator:
    """One writer's working state. ``world`` is what has been taken so far."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.world = World()
        self._policies = Standing[objects.AuthorizationPolicy, Converted](
            lambda item: _with_problems(policies.convert(item, mesh)),
            lambda item: policies.closed(item, mesh),
            "it allows nothing",
        )
        self._peer = Standing[objects.PeerAuthentication, PeerMode](
            lambda item: peer_authentication.read(item, mesh), peer_authentication.closed, "it means STRICT"
        )
        self._problems: dict[tuple[str, str], tuple[Problem, ...]] = {}
        self._pods: dict[str, objects.Pod] = {}
        self._addresses: dict[str, tuple[IPAddress, ...]] = {}
        self._pods_in: dict[str, set[str]] = {}
        self._pods_on: dict[str, set[str]] = {}
        self._claims: dict[IPAddress, set[str]] = {}
        self._nodes: dict[str, objects.Node] = {}
        self._services: dict[str, objects.Service] = {}
        self._members: dict[str, tuple[Member, ...]] = {}  # by slice
        self._slices_of: dict[str, set[str]] = {}  # service -> slices
        self._slices_naming: dict[str, set[str]] = {}  # pod -> slices
        self._selecting: dict[str, dict[str, policies.Selector]] = {}  # namespace -> policy -> selector
        self._peers = PeerModes.of((), mesh)
        self._undecoded: set[tuple[str, str]] = set()  # kind and key of policies that never decoded
        self._dirty_pods: set[str] = set()
        self._dirty_services: set[str] = set()
        self._dirty_slices: set[str] = set()
        self._dirty_policies: set[str] = set()
        self._dirty_peers = True  # the static policy is there from the start
        self._orphans: dict[str, tuple[str, ...]] = {}  # slice -> uids of its addresses without a pod
        self._handlers: dict[str, Callable[[str, Any, Any], None]] = {
            "Pod": self._pod,
            "Node": self._node,
            "Service": self._service,
            "EndpointSlice": self._slice,
            "AuthorizationPolicy": self._policy,
            "PeerAuthentication": self._peer_authentication,
        }

    @property
    def converted(self) -> Mapping[str, Converted]:
        """AuthorizationPolicies by key, as judged last; the status writer reads it."""
        return self._policies.forms

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(sorted(p for found in self._problems.values() for p in found))

    def change(self, event: Changed[Any]) -> None:
        """Note one change; kinds that no World depends on do nothing."""
        handler = self._handlers.get(event.kind.name)
        if handler is not None:
            self._undecoded.discard((event.kind.name, event.key))
            if event.new is None:
                self._problems.pop((event.kind.name, event.key), None)
            handler(event.key, event.old, event.new)

    def unreadable(self, kind: Kind[Any], key: str) -> None:
        """A policy exists and does not decode. Without a good form it stands closed for its whole namespace, until
        `change` is told of it."""
        known: Mapping[str, Any] = self._peer.forms if kind.name == "PeerAuthentication" else self.converted
        namespace, _, name = key.partition("/")
        if kind.name in _POLICIES and name and key not in known:
            meta = objects.Metadata(name=name, namespace=namespace)
            self._handlers[kind.name](key, None, kind.struct(metadata=meta, spec=_NOT_DECODED))
            self._problems.pop((kind.name, key), None)  # who decodes says why
            self._undecoded.add((kind.name, key))

    def readable(self, kind: Kind[Any], key: str) -> None:
        """It decodes again, which `change` tells, or is gone."""
        if (kind.name, key) in self._undecoded:
            self.change(Changed(kind, key, None, None))

    def take(self) -> Diff:
        """Compute what was touched, replace ``world``, and say what differs."""
        new_policies, removed_policies = self._take_policies()
        new_services, removed_services = self._take_services()
        workloads, removed_workloads = self._take_pods()
        orphans, removed_orphans = self._take_orphans()
        change = Diff(
            workloads=(*workloads, *orphans),
            services=new_services,
            policies=new_policies,
            removed_workloads=(*removed_workloads, *removed_orphans),
            removed_services=removed_services,
            removed_policies=removed_policies,
        )
        if change:
            self.world = self.world.apply(change)
        return change

    # -- what a change touches

    def _pod(self, key: str, _old: Any, new: objects.Pod | None) -> None:
        old = self._pods.pop(key, None)
        if old is not None:
            _discard(self._pods_in, old.namespace, key)
            _discard(self._pods_on, old.spec.node_name, key)
        for address in self._addresses.pop(key, ()):
            self._dirty_pods |= self._claims.get(address, set())
            _discard(self._claims, address, key)
        self._dirty_pods.add(key)
        if new is None:
            return
        self._pods[key] = new
        self._pods_in.setdefault(new.namespace, set()).add(key)
        self._pods_on.setdefault(new.spec.node_name, set()).add(key)
        if not pods.in_world(new):
            self._problems.pop(("Pod", key), None)
            return
        try:
            addresses = pods.addresses_of(new)
        except ConfigFault as fault:
            self._problems["Pod", key] = (problem_of(fault),)
            return
        self._addresses[key] = addresses
        if not new.spec.host_network:
            for address in addresses:
                claimants = self._claims.setdefault(address, set())
                self._dirty_pods |= claimants
                claimants.add(key)

    def _node(self, key: str, _old: Any, new: objects.Node | None) -> None:
        old = self._nodes.get(key)
        if new is None:
            self._nodes.pop(key, None)
        else:
            self._nodes[key] = new
        if pods.locality_of(old) != pods.locality_of(new):
            self._dirty_pods |= self._pods_on.get(key, set())

    def _service(self, key: str, _old: Any, new: objects.Service | None) -> None:
        if new is None:
            self._services.pop(key, None)
        else:
            self._services[key] = new
        self._dirty_services.add(key)
        for name in self._slices_of.get(key, ()):
            self._dirty_slices.add(name)
            self._dirty_pods.update(member.pod for member in self._members[name] if member.pod)

    def _slice(self, key: str, _old: Any, new: objects.EndpointSlice | None) -> None:
        before = self._members.get(key, ())
        after: tuple[Member, ...] = ()
        if new is not None:
            try:
                after = services.members_of(new)
                self._problems.pop(("EndpointSlice", key), None)
            except ConfigFault as fault:
                self._problems["EndpointSlice", key] = (problem_of(fault),)
                after = before  # the last good form
        for member in before:
            _discard(self._slices_of, member.service, key)
            _discard(self._slices_naming, member.pod, key)
        self._members.pop(key, None)
        if after:
            self._members[key] = after
            for member in after:
                self._slices_of.setdefault(member.service, set()).add(key)
                if member.pod:
                    self._slices_naming.setdefault(member.pod, set()).add(key)
        touched = set(before) ^ set(after)
        self._dirty_pods.update(member.pod for member in touched if member.pod)
        self._dirty_slices.add(key)

    def _policy(self, key: str, _old: Any, new: objects.AuthorizationPolicy | None) -> None:
        before = self.converted.get(key)
        problems = self._policies.change(key, new)
        after = self.converted.get(key)
        if after is not None:
            self._problems["AuthorizationPolicy", key] = problems
            after = self._policies.forms[key] = replace(after, problems=problems)
        self._dirty_policies.add(key)
        namespace = key.partition("/")[0]
        for converted in (before, after):
            if converted is not None and converted.selector:
                self._touch_selected(namespace, converted.selector)
        chosen = self._selecting.setdefault(namespace, {})
        chosen.pop(key, None)
        if after is not None and after.policy is not None and after.policy.scope is Scope.WORKLOAD_SELECTOR:
            chosen[key] = after.selector

    def _touch_selected(self, namespace: str, selector: policies.Selector) -> None:
        everywhere = namespace == self.mesh.root_namespace
        for key in self._pods if everywhere else self._pods_in.get(namespace, ()):
            if selects(selector, self._pods[key].labels):
                self._dirty_pods.add(key)

    def _peer_authentication(self, key: str, _old: Any, new: objects.PeerAuthentication | None) -> None:
        problems = self._peer.change(key, new)
        if new is not None:
            self._problems["PeerAuthentication", key] = problems
        self._dirty_peers = True
        namespace = key.partition("/")[0]
        if namespace == self.mesh.root_namespace:
            self._dirty_pods.update(self._pods)
        else:
            self._dirty_pods |= self._pods_in.get(namespace, set())

    # -- what it becomes

    def _take_policies(self) -> tuple[tuple[Policy, ...], tuple[str, ...]]:
        wanted: dict[str, Policy | None] = {}
        for key in self._dirty_policies:
            converted = self.converted.get(key)
            wanted[key] = converted.policy if converted is not None else None
        self._dirty_policies.clear()
        if self._dirty_peers:
            self._peers = PeerModes.of(self._peer.forms.values(), self.mesh)
            self._problems["PeerAuthentication", ""] = tuple(
                Problem(
                    reference("PeerAuthentication", item.namespace, item.name),
                    "spec.selector",
                    f"has no effect: {older.name}, which is older, says the mode of the same workloads",
                )
                for item, older in self._peers.shadowed
            )
            derived = {p.key: p for p in (peer_authentication.static_strict(self.mesh), *self._peers.port_policies())}
            gone = [k for k in self.world.policies if peer_authentication.is_strict(k) and k not in derived]
            wanted |= derived | dict.fromkeys(gone)
            self._dirty_peers = False
        return _difference(self.world.policies, wanted)

    def _take_services(self) -> tuple[tuple[Service, ...], tuple[str, ...]]:
        wanted: dict[str, Service | None] = {}
        for key in self._dirty_services:
            item = self._services.get(key)
            if item is None:
                wanted[services.service_key(key, self.mesh)] = None
                continue
            try:
                service, problems = services.service_of(item, self.mesh)
            except ConfigFault as fault:
                self._problems["Service", key] = (problem_of(fault),)
                continue
            self._problems["Service", key] = problems
            wanted[services.service_key(key, self.mesh)] = service
        self._dirty_services.clear()
        return _difference(self.world.services, wanted)

    def _take_pods(self) -> tuple[tuple[Workload, ...], tuple[str, ...]]:
        wanted: dict[str, Workload | None] = {}
        for key in self._dirty_pods:
            namespace, _, name = key.partition("/")
            wanted[pods.workload_uid(self.mesh, namespace, name)] = self._workload(key)
        self._dirty_pods.clear()
        return _difference(self.world.workloads, wanted)

    def _workload(self, key: str) -> Workload | None:
        pod, addresses = self._pods.get(key), self._addresses.get(key)
        if pod is None or addresses is None:
            return None
        problems: list[Problem] = []
        if not pod.spec.host_network:
            owned = tuple(a for a in addresses if self._owner(a) == key)
            if owned != addresses:
                lost = next(a for a in addresses if a not in owned)
                rule = f"{lost} belongs to {self._owner(lost)}, which is newer or not ending"
                ending = pod.metadata.deletion_timestamp is not None  # then it is the usual course of things
                problems.append(Problem(reference("Pod", pod.namespace, pod.name), "status.podIPs", rule, ending))
                addresses = owned
        try:
            workload: Workload | None = pods.workload_of(
                pod,
                self._nodes.get(pod.spec.node_name),
                self.mesh,
                addresses=addresses,
                services=self._served_by(key, pod, addresses),
                policies=self._policies_of(pod),
            )
        except ConfigFault as fault:
            problems.append(problem_of(fault))
            workload = None
        if problems:
            self._problems["Pod", key] = tuple(problems)
        else:
            self._problems.pop(("Pod", key), None)
        return workload

    def _owner(self, address: IPAddress) -> str:
        """Of pods that claim one address: one that is not ending, then the newest, then by name."""
        claimants = self._claims.get(address, set())
        if len(claimants) == 1:
            return next(iter(claimants))

        def rank(key: str) -> tuple[bool, str, str]:
            meta = self._pods[key].metadata
            return (meta.deletion_timestamp is None, meta.creation_timestamp or "", key)

        return max(claimants, key=rank, default="")

    def _served_by(
        self, key: str, pod: objects.Pod, addresses: tuple[IPAddress, ...]
    ) -> tuple[tuple[str, tuple[Port, ...]], ...]:
        naming = self._slices_naming.get(key)
        if not naming:
            return ()
        found: dict[str, list[Member]] = {}
        for name in sorted(naming):
            for member in self._members[name]:
                if member.pod != key or (member.pod_uid and member.pod_uid != pod.metadata.uid):
                    continue  # the slice still speaks of an earlier pod of this name
                if any(address in addresses for address in member.addresses):
                    found.setdefault(member.service, []).append(member)
        served = []
        for service, members in found.items():
            item = self._services.get(service)
            if item is not None and item.spec.type != "ExternalName":
                served.append((services.service_key(service, self.mesh), services.ports_served(item, members)))
        return tuple(sorted(served, key=lambda pair: pair[0]))

    def _policies_of(self, pod: objects.Pod) -> tuple[str, ...]:
        labels = pod.labels
        found = list(self._peers.policies_of(pod.namespace, labels))
        for namespace in {pod.namespace, self.mesh.root_namespace}:
            for key, selector in self._selecting.get(namespace, {}).items():
                if selects(selector, labels):
                    found.append(key)
        return tuple(sorted(found))

    def _take_orphans(self) -> tuple[tuple[Workload, ...], tuple[str, ...]]:
        """Addresses of slices without a pod: endpoints outside the mesh, which own no address of it."""
        wanted: dict[str, Workload | None] = {}
        for key in self._dirty_slices:
            wanted |= dict.fromkeys(self._orphans.pop(key, ()))
            members = [(m, self._services.get(m.service)) for m in self._members.get(key, ()) if not m.pod]
            outside = (services.outside(key, m, item, self.mesh) for m, item in members if item is not None)
            fresh = {workload.uid: workload for found in outside for workload in found}
            if fresh:
                self._orphans[key] = tuple(fresh)
                wanted |= fresh
        self._dirty_slices.clear()
        return _difference(self.world.workloads, wanted)


def _with_problems(converted: Converted) -> tuple[Converted, tuple[Problem, ...]]:
    return converted, converted.problems


def _discard(index: dict[Any, set[str]], key: Any, value: str) -> None:
    found = index.get(key)
    if found is not None:
        found.discard(value)
        if not found:
            del index[key]


def _difference(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    changed = tuple(value for key, value in wanted.items() if value is not None and have.get(key) != value)
    return changed, tuple(key for key, value in wanted.items() if value is None and key in have)


def translate(items: Iterable[Changed[Any]], mesh: Mesh) -> tuple[World, tuple[Problem, ...]]:
    """The World of a fixed set of objects, and what is wrong with them."""
    translator = Translator(mesh)
    for item in items:
        translator.change(item)
    translator.take()
    return translator.world, translator.problems
