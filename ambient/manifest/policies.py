"""AuthorizationPolicy to the L4 policy ztunnels enforce, with Istio's conversion.

What a ztunnel cannot see (HTTP attributes, request principals) and what cannot be read (a bad CIDR, an unknown
field) must never open anything: an ALLOW rule with such a part is dropped, so it matches nothing; a DENY rule
loses only that part, so it matches more. If it would then match everything, it denies what its readable
alternatives and values say, and is dropped when there are none. A policy object that cannot be judged at all is a
ConfigFault; `closed` is what stands in its place when there is no older form.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ambient.errors import ConfigFault
from ambient.manifest import mesh as words
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import AuthorizationPolicy, PolicyObject
from ambient.manifest.problems import Problem, reference
from ambient.model.address import IPNetwork, fold
from ambient.model.policy import Action, Group, Match, MatchKind, Policy, Rule, Scope, ServiceAccountMatch, StringMatch

RULES_MAX = 512
VALUES_MAX = 4096

_T = TypeVar("_T")
Selector = tuple[tuple[str, str], ...]

_L7_SOURCE = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks")
_L7_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")


@dataclass(frozen=True, slots=True)
class Converted:
    """``policy`` is None if the object is not for ztunnels. ``problems`` say what is not enforced as written.

    ``selector`` are the labels a workload must have to list the policy; empty unless it selects workloads.
    """

    policy: Policy | None
    selector: Selector = ()
    problems: tuple[Problem, ...] = ()


def convert(item: AuthorizationPolicy, mesh: Mesh) -> Converted:
    """Judge one object. Raises ConfigFault naming object, field path and rule."""
    where = reference("AuthorizationPolicy", item.namespace, item.name)
    spec = _mapping(f"{where}: spec", item.spec)
    unknown = sorted(set(spec) - {"selector", "targetRef", "targetRefs", "rules", "action", "provider"}, key=str)
    if unknown:
        raise ConfigFault(f"{where}: spec.{str(unknown[0])[:60]}", spec[unknown[0]], "is not a field of the policy")
    action = spec.get("action") or "ALLOW"
    if action not in ("ALLOW", "DENY", "AUDIT", "CUSTOM"):
        raise ConfigFault(f"{where}: spec.action", action, "must be ALLOW, DENY, AUDIT or CUSTOM")
    if spec.get("targetRef") or spec.get("targetRefs"):  # for waypoints
        return Converted(None)
    if action in ("AUDIT", "CUSTOM"):
        problem = Problem(where, "spec.action", f"{action} is not enforced by ztunnel: use a waypoint (targetRefs)")
        return Converted(None, (), (problem,))
    selector = selector_of(f"{where}: spec.selector", spec.get("selector"))
    rules = _sequence(f"{where}: spec.rules", spec.get("rules"))
    if len(rules) > RULES_MAX:
        raise ConfigFault(f"{where}: spec.rules", len(rules), f"must be at most {RULES_MAX}")

    problems: list[Problem] = []
    groups: list[Group] = []
    for index, value in enumerate(rules):
        reader = _RuleReader(where, Action[action], item.namespace, problems)
        group = reader.group(f"spec.rules[{index}]", value)
        if group is not None:
            groups.append(group)
    policy = Policy(
        name=item.name,
        namespace=item.namespace,
        scope=_scope(item, mesh, selector),
        action=Action[action],
        groups=tuple(groups),
        dry_run=item.annotations.get(words.DRY_RUN) == "true",
    )
    return Converted(policy, selector, tuple(problems))


def closed(item: PolicyObject, mesh: Mesh) -> Converted:
    """In place of an object that cannot be judged: allow nothing to whatever it (as far as readable) selects."""
    selector: Selector = ()
    if isinstance(item.spec, dict):
        try:
            selector = selector_of("", item.spec.get("selector"))
        except ConfigFault:
            selector = ()
    return Converted(Policy(item.name, item.namespace, _scope(item, mesh, selector), Action.ALLOW), selector)


def _scope(item: PolicyObject, mesh: Mesh, selector: Selector) -> Scope:
    if selector:
        return Scope.WORKLOAD_SELECTOR
    return Scope.GLOBAL if item.namespace == mesh.root_namespace else Scope.NAMESPACE


def selector_of(where: str, value: Any) -> Selector:
    """``{matchLabels: {...}}`` as sorted pairs; empty for none. Raises ConfigFault."""
    selector = _mapping(where, value)
    for key in selector:
        if key != "matchLabels":
            raise ConfigFault(f"{where}.{str(key)[:60]}", selector[key], "is not supported: only matchLabels is")
    labels = _mapping(f"{where}.matchLabels", selector.get("matchLabels"))
    for key, wanted in labels.items():
        if not isinstance(key, str) or not isinstance(wanted, str) or not key or "*" in key or "*" in wanted:
            raise ConfigFault(f"{where}.matchLabels[{str(key)[:60]}]", wanted, "must be a label and its exact value")
    return tuple(sorted(labels.items()))


def selects(selector: Selector, labels: Any) -> bool:
    return all(labels.get(key) == value for key, value in selector)


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigFault(where, _short(value), "must be a mapping")
    return value


def _sequence(where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigFault(where, _short(value), "must be a list")
    return value


def _short(value: Any) -> str:
    return str(value)[:80]


class _Unreadable(Exception):
    """A part of a rule that constrains nothing here; carries the problem's field and rule."""

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(field, rule)
        self.field = field
        self.rule = rule


class _RuleReader:
    """Reads one rule. ``dropped`` parts are reported in ``problems``; in ALLOW any such part drops the rule.

    What cannot be read among alternatives or values is taken to match everything, or with ``narrow`` nothing.
    """

    def __init__(
        self, where: str, action: Action, namespace: str, problems: list[Problem], *, narrow: bool = False
    ) -> None:
        self.where = where
        self.action = action
        self.namespace = namespace
        self.problems = problems
        self.narrow = narrow
        self.incomplete = False

    def group(self, path: str, value: Any) -> Group | None:
        """None: the rule matches nothing."""
        rules = self._rules(path, value)
        if self.incomplete and self.action is Action.DENY and not rules:
            rules = _RuleReader(self.where, self.action, self.namespace, [], narrow=True)._rules(path, value)
        if self.incomplete and (self.action is Action.ALLOW or not rules):
            return None
        return Group(tuple(rules))

    def _rules(self, path: str, value: Any) -> list[Rule]:
        rules: list[Rule] = []
        try:
            if value is None:  # an empty line; matching everything is written {}
                raise _Unreadable(path, "must be a mapping")
            rule = self._fields(path, value, {"from", "to", "when"})
            for name, inner, read in (("from", "source", self._source), ("to", "operation", self._operation)):
                if name in rule:
                    rules += self._alternatives(f"{path}.{name}", rule[name], inner, read)
            conditions = self._list(f"{path}.when", rule.get("when"))
            if "when" in rule and not conditions:
                self._report(_Unreadable(f"{path}.when", "must not be empty"))
            for index, condition in enumerate(conditions):
                rules += self._one_of([self._condition(f"{path}.when[{index}]", condition)])
        except _Unreadable as part:
            self._report(part)
        return rules

    def _alternatives(
        self, path: str, value: Any, inner: str, read: Callable[[str, dict[str, Any]], Match]
    ) -> list[Rule]:
        """``from`` or ``to``: matches OR-ed. One alternative without any constraint left frees the whole part."""
        entries = self._list(path, value)
        if not entries:
            self._report(_Unreadable(path, "must not be empty"))
        matches = []
        for index, entry in enumerate(entries):
            try:
                fields = self._fields(f"{path}[{index}]", entry, {inner})
                body = fields.get(inner)
                at = f"{path}[{index}].{inner}"
                if not isinstance(body, dict) or not body:
                    raise _Unreadable(at, "must be a mapping that is not empty")
                reported = len(self.problems)
                matches.append(read(at, body))
                if matches[-1] == _ANYTHING and len(self.problems) == reported:
                    self._report(_Unreadable(at, "has no values"))
            except _Unreadable as part:
                self._report(part)
                matches.append(_ANYTHING)
        return self._one_of(matches)

    def _one_of(self, matches: list[Match]) -> list[Rule]:
        if self.narrow:
            matches = [match for match in matches if match != _ANYTHING]
        return [] if not matches or _ANYTHING in matches else [Rule(tuple(matches))]

    def _source(self, path: str, source: dict[str, Any]) -> Match:
        self._refuse_others(path, source, _SOURCE, _L7_SOURCE)
        values = {field: self._values(path, source, name, read) for name, (field, read) in _SOURCE.items()}
        for name, field in (("serviceAccounts", "service_accounts"), ("notServiceAccounts", "not_service_accounts")):
            values[field] = self._values(path, source, name, self._service_account)
        return Match(**values)

    def _operation(self, path: str, operation: dict[str, Any]) -> Match:
        self._refuse_others(path, operation, _OPERATION, _L7_OPERATION)
        return Match(**{field: self._values(path, operation, name, read) for name, (field, read) in _OPERATION.items()})

    def _condition(self, path: str, condition: Any) -> Match:
        try:
            fields = self._fields(path, condition, {"key", "values", "notValues"})
            key = fields.get("key")
            known = _WHEN.get(key) if isinstance(key, str) else None
            if known is None:
                raise _Unreadable(f"{path}.key", f"{_short(key)!r} is not an attribute ztunnel can see")
            if not fields.get("values") and not fields.get("notValues"):
                raise _Unreadable(path, "needs values or notValues")
        except _Unreadable as part:
            self._report(part)
            return _ANYTHING
        field, read = known
        values = {field: self._values(path, fields, "values", read)}
        values[f"not_{field}"] = self._values(path, fields, "notValues", read)
        return Match(**values)

    def _service_account(self, text: str) -> ServiceAccountMatch:
        namespace, separator, name = text.partition("/")
        if not separator:
            namespace, name = self.namespace, text
        if not namespace or not name or "/" in name or "*" in text:
            raise ValueError("must be namespace/serviceaccount or serviceaccount")
        return ServiceAccountMatch(namespace, name)

    def _refuse_others(self, path: str, body: dict[str, Any], known: Any, l7: tuple[str, ...]) -> None:
        for name in body:
            if name in l7:
                if body[name]:
                    self._report(_Unreadable(f"{path}.{name}", "is not visible at L4: use a waypoint (targetRefs)"))
            elif name not in known and name not in ("serviceAccounts", "notServiceAccounts"):
                self._report(_Unreadable(f"{path}.{_short(name)}", "is not a field known here"))

    def _values(self, path: str, body: dict[str, Any], name: str, read: Callable[[str], _T]) -> tuple[_T, ...]:
        """The values of one field, or nothing (no constraint) if any cannot be read; ``narrow``: those that can."""
        try:
            values = self._list(f"{path}.{name}", body.get(name))
            found: list[_T] = []
            for index, text in enumerate(values):
                at = f"{path}.{name}[{index}]"
                try:
                    if not isinstance(text, str) or not text:
                        raise _Unreadable(at, f"{_short(text)!r} must be a string that is not empty")
                    try:
                        found.append(read(text))
                    except ValueError as error:
                        raise _Unreadable(at, f"{text[:80]!r}: {error}") from None
                except _Unreadable as part:
                    if not self.narrow:
                        raise
                    self._report(part)
            return tuple(found)
        except _Unreadable as part:
            self._report(part)
            return ()

    def _list(self, path: str, value: Any) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > VALUES_MAX:
            raise _Unreadable(path, f"must be a list of at most {VALUES_MAX}")
        return value

    def _fields(self, path: str, value: Any, known: set[str]) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _Unreadable(path, f"{_short(value)!r} must be a mapping")
        for name in value:
            if name not in known:
                self._report(_Unreadable(f"{path}.{_short(name)}", "is not a field known here"))
        return value

    def _report(self, part: _Unreadable) -> None:
        self.incomplete = True
        effect = "this ALLOW rule matches nothing" if self.action is Action.ALLOW else "this DENY rule ignores it"
        self.problems.append(Problem(self.where, part.field, f"{part.rule}; {effect}"))


_ANYTHING = Match()  # a match without fields: here, an alternative that constrains nothing


def string_match(text: str) -> StringMatch:
    """``*`` any value, ``*x`` suffix, ``x*`` prefix, else exact; a star elsewhere is itself."""
    if text == "*":
        return StringMatch(MatchKind.PRESENCE)
    if text.startswith("*"):
        return StringMatch(MatchKind.SUFFIX, text[1:])
    if text.endswith("*"):
        return StringMatch(MatchKind.PREFIX, text[:-1])
    return StringMatch(MatchKind.EXACT, text)


def ip_block(text: str) -> IPNetwork:
    """CIDR or single address, host bits cleared, IPv4-mapped folded. Raises ValueError."""
    _, slash, length = text.partition("/")
    if slash and not (length.isascii() and length.isdigit()):
        raise ValueError("must have a prefix length in decimal, not a mask")
    network = ipaddress.ip_network(text, strict=False)
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        return ipaddress.IPv4Network((int(fold(network.network_address)), network.prefixlen - 96))
    return network


def port_number(text: str) -> int:
    """1 to 65535 in decimal. Raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError("must be a port, 1 to 65535")
    return int(text)


_SOURCE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "principals": ("principals", string_match),
    "notPrincipals": ("not_principals", string_match),
    "namespaces": ("namespaces", string_match),
    "notNamespaces": ("not_namespaces", string_match),
    "ipBlocks": ("source_ips", ip_block),
    "notIpBlocks": ("not_source_ips", ip_block),
}
_OPERATION: dict[str, tuple[str, Callable[[str], Any]]] = {
    "ports": ("destination_ports", port_number),
    "notPorts": ("not_destination_ports", port_number),
}
_WHEN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "source.ip": ("source_ips", ip_block),
    "source.namespace": ("namespaces", string_match),
    "source.principal": ("principals", string_match),
    "destination.ip": ("destination_ips", ip_block),
    "destination.port": ("destination_ports", port_number),
}
