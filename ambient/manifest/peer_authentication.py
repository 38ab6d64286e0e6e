"""PeerAuthentication: which workloads refuse plaintext, expressed as DENY policies that they list.

STRICT is one static policy of the root namespace: deny every peer without a principal. Port-level modes become
a policy of their own. PERMISSIVE and DISABLE mean nothing (DISABLE cannot turn tunnels off). Of several objects
at one level the oldest wins; mesh, namespace and workload level override each other in that order, and an unset
mode inherits. Port-level modes need a selector, as in Istio.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ambient.errors import ConfigFault
from ambient.manifest.mesh import PORT_LEVEL_PREFIX, STATIC_STRICT, Mesh
from ambient.manifest.objects import PeerAuthentication
from ambient.manifest.policies import Selector, selector_of, selects
from ambient.manifest.problems import Problem, reference
from ambient.model.policy import Action, Group, Match, MatchKind, Policy, Rule, Scope, StringMatch

PORTS_MAX = 128
_NO_PRINCIPAL = (StringMatch(MatchKind.PRESENCE),)


class Mode(enum.Enum):
    UNSET = "UNSET"
    STRICT = "STRICT"
    PERMISSIVE = "PERMISSIVE"
    """Also what DISABLE is read as."""


@dataclass(frozen=True, slots=True)
class PeerMode:
    """One object, read. ``created`` is its RFC 3339 time, which sorts as text."""

    namespace: str
    name: str
    created: str
    selector: Selector
    mode: Mode
    ports: tuple[tuple[int, Mode], ...] = ()

    @property
    def age(self) -> tuple[str, str]:
        """The oldest sorts first; an object without a time is the youngest."""
        return (self.created or "~", self.name)


def read(item: PeerAuthentication, mesh: Mesh) -> tuple[PeerMode, tuple[Problem, ...]]:
    """Judge one object. Raises ConfigFault naming object, field path and rule."""
    where = reference("PeerAuthentication", item.namespace, item.name)
    spec = {} if item.spec is None else item.spec
    if not isinstance(spec, dict):
        raise ConfigFault(f"{where}: spec", str(spec)[:80], "must be a mapping")
    for field in spec:
        if field not in ("selector", "mtls", "portLevelMtls"):
            raise ConfigFault(f"{where}: spec.{str(field)[:60]}", str(spec[field])[:80], "is not a field of the object")
    selector = selector_of(f"{where}: spec.selector", spec.get("selector"))
    mode = _mode(f"{where}: spec.mtls", spec.get("mtls"))
    levels = spec.get("portLevelMtls") or {}
    if not isinstance(levels, dict) or len(levels) > PORTS_MAX:
        rule = f"must be a mapping of at most {PORTS_MAX} ports"
        raise ConfigFault(f"{where}: spec.portLevelMtls", str(levels)[:80], rule)
    ports: dict[int, Mode] = {}
    for port, value in levels.items():
        at, text = f"{where}: spec.portLevelMtls[{str(port)[:20]}]", str(port)
        if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
            raise ConfigFault(at, text[:20], "must be a port, 1 to 65535")
        if int(text) in ports:  # as 80 and 080
            raise ConfigFault(at, text, "is the same port as another")
        ports[int(text)] = _mode(at, value)
    problems: list[Problem] = []
    if ports and not selector:
        problems.append(Problem(where, "spec.portLevelMtls", "needs a selector: the ports are ignored"))
        ports = {}
    if selector and item.namespace == mesh.root_namespace:
        rule = "a selector in the root namespace selects nothing: the object is ignored"
        problems.append(Problem(where, "spec.selector", rule))
    created = item.metadata.creation_timestamp or ""
    by_number = tuple(sorted(ports.items(), key=lambda pair: pair[0]))
    return PeerMode(item.namespace, item.name, created, selector, mode, by_number), tuple(problems)


def closed(item: PeerAuthentication) -> PeerMode:
    """In place of an object that cannot be judged: STRICT for whatever it (as far as readable) selects."""
    selector: Selector = ()
    if isinstance(item.spec, dict):
        try:
            selector = selector_of("", item.spec.get("selector"))
        except ConfigFault:
            selector = ()
    return PeerMode(item.namespace, item.name, item.metadata.creation_timestamp or "", selector, Mode.STRICT)


def _mode(where: str, value: object) -> Mode:
    if value is None:
        return Mode.UNSET
    if not isinstance(value, dict) or any(key != "mode" for key in value):
        raise ConfigFault(where, str(value)[:80], "must be a mapping with the field mode")
    mode = value.get("mode")
    if mode == "DISABLE":
        return Mode.PERMISSIVE
    if mode is None:
        return Mode.UNSET
    try:
        return Mode(mode)
    except ValueError:
        raise ConfigFault(f"{where}.mode", str(mode)[:80], "must be STRICT, PERMISSIVE, DISABLE or UNSET") from None


def static_strict(mesh: Mesh) -> Policy:
    """Deny every peer that proved no identity. Always sent, so that no workload lists it before it is known."""
    match = Match(not_principals=_NO_PRINCIPAL)
    return Policy(STATIC_STRICT, mesh.root_namespace, Scope.WORKLOAD_SELECTOR, Action.DENY, (_deny(match),))


def _deny(match: Match) -> Group:
    return Group((Rule((match,)),))


@dataclass(frozen=True, slots=True)
class PeerModes:
    """All objects, ordered for asking. Build with `PeerModes.of`."""

    mesh: Mesh
    mesh_strict: bool
    by_namespace: Mapping[str, bool]
    """Whether the namespace as a whole is strict, where it says so itself."""
    selecting: Mapping[str, tuple[PeerMode, ...]]
    """Objects with a selector per namespace, oldest first."""
    shadowed: tuple[tuple[PeerMode, PeerMode], ...] = ()
    """Objects without effect, each with the older one of the same reach that is in force."""

    @staticmethod
    def of(modes: Iterable[PeerMode], mesh: Mesh) -> PeerModes:
        whole: dict[str, PeerMode] = {}
        selecting: dict[str, list[PeerMode]] = {}
        shadowed: list[tuple[PeerMode, PeerMode]] = []
        for item in sorted(modes, key=lambda m: (m.age, m.namespace)):
            if not item.selector:
                older = whole.setdefault(item.namespace, item)
            elif item.namespace == mesh.root_namespace:
                continue
            else:
                others = selecting.setdefault(item.namespace, [])
                older = next((other for other in others if other.selector == item.selector), item)
                others.append(item)
            if older is not item:
                shadowed.append((item, older))
        mesh_wide = whole.pop(mesh.root_namespace, None)
        return PeerModes(
            mesh,
            mesh_wide is not None and mesh_wide.mode is Mode.STRICT,
            {ns: item.mode is Mode.STRICT for ns, item in whole.items() if item.mode is not Mode.UNSET},
            {ns: tuple(items) for ns, items in selecting.items()},
            tuple(shadowed),
        )

    def _strict(self, namespace: str) -> bool:
        return self.by_namespace.get(namespace, self.mesh_strict)

    def policies_of(self, namespace: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Keys of the policies a workload with these labels lists."""
        chosen = next((m for m in self.selecting.get(namespace, ()) if selects(m.selector, labels)), None)
        if chosen is not None and self.port_level(chosen) is not None:
            return (f"{namespace}/{PORT_LEVEL_PREFIX}{chosen.name}",)
        strict = self._strict(namespace) if chosen is None or chosen.mode is Mode.UNSET else chosen.mode is Mode.STRICT
        return (f"{self.mesh.root_namespace}/{STATIC_STRICT}",) if strict else ()

    def port_level(self, item: PeerMode) -> Policy | None:
        """The policy of an object whose ports differ from its own or inherited mode, else None."""
        strict = self._strict(item.namespace) if item.mode is Mode.UNSET else item.mode is Mode.STRICT
        differing = Mode.PERMISSIVE if strict else Mode.STRICT
        ports = tuple(port for port, mode in item.ports if mode is differing)
        if not ports:
            return None
        if strict:
            match = Match(not_principals=_NO_PRINCIPAL, not_destination_ports=ports)
        else:
            match = Match(not_principals=_NO_PRINCIPAL, destination_ports=ports)
        name = f"{PORT_LEVEL_PREFIX}{item.name}"
        return Policy(name, item.namespace, Scope.WORKLOAD_SELECTOR, Action.DENY, (_deny(match),))

    def port_policies(self) -> tuple[Policy, ...]:
        found = (self.port_level(item) for items in self.selecting.values() for item in items)
        return tuple(policy for policy in found if policy is not None)


def is_strict(key: str) -> bool:
    """Whether a policy key comes from PeerAuthentication, hence refuses plaintext."""
    name = key.partition("/")[2]
    return name == STATIC_STRICT or name.startswith(PORT_LEVEL_PREFIX)
