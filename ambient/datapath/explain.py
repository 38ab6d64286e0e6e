"""What `ambient why` says: from facts about a connection to steps with reasons, and the path at the end. Pure.

The decisions are made by `ambient.datapath.decide` (twins of the hooks') over entries read from the kernel, and by
ztunnel itself over its World; here they are only put in order and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ambient.datapath import decide
from ambient.datapath.layout import LAYOUT
from ambient.datapath.render import flag_names, socket_text
from ambient.datapath.values import EnrolledValue, ServiceKey, ServiceValue, SettingsValue, WorkloadValue, reason_name

Row = dict[str, Any]
LEFT_ALONE = ("bypass", "not_mesh", "loopback", "exempt", "none")
_MEANING = {
    "captured": "sent to ztunnel",
    "not_synced": "sent to ztunnel: the kernel does not hold the whole World, so nothing counts as outside",
    "not_mesh": "left alone: the destination is known not to be in the mesh",
    "bypass": "left alone: bypassed by the operator, or open on failure and the agent is silent",
    "loopback": "left alone: loopback",
    "exempt": "left alone: a socket of the mesh itself",
    "recursion": "refused (EPERM): a port of the mesh itself",
    "dns": "sent to the DNS proxy",
    "share_exceeded": "refused (EPERM): the workload has used up its share of connections",
}


@dataclass(frozen=True, slots=True)
class Source:
    """The client's pod as its node's agent knows it."""

    node: str
    name: str
    uid: str
    state: str
    reason: str
    detail: str
    cookie: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """Entries of one node's maps that a connection touches; None is no such entry."""

    settings: SettingsValue
    now_ns: int
    enrolled: EnrolledValue | None = None
    workload: WorkloadValue | None = None
    service: ServiceValue | None = None
    candidates: tuple[decide.Candidate, ...] = ()
    """What the connect hook could choose: the usable slots of the service, or the pod that was dialled."""
    policies: Mapping[int, str] = field(default_factory=dict)
    """Names of the node-local numbers of policies."""
    services: Mapping[int, str] = field(default_factory=dict)
    """Likewise."""
    entries: tuple[tuple[str, str], ...] = ()
    """Map and key, as /diff names them, of the slots and verdicts the connect hook would look at."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What plaintext meets at one address: ztunnel's word (None if no ztunnel answers), and what the node that it is on
    holds, if that node is known here."""

    endpoint: str
    verdict: Mapping[str, Any] | None
    there: Kernel | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """``answer`` is ztunnel's /why, None if it does not answer; ``drift`` rows of /diff that touch the connection;
    ``listening`` says of destination addresses on known nodes whether their HBONE listener is in the kernel."""

    source: Source
    address: str
    port: int
    kernel: Kernel
    answer: Mapping[str, Any] | None = None
    plain: Arrival | None = None
    """What the same connection meets without an identity."""
    drift: Sequence[Row] = ()
    listening: Mapping[str, bool] = field(default_factory=dict)
    behind: Sequence[Arrival] | None = None
    """The endpoints between which the cluster's own service rules choose; None: the address is of no service."""
    deaf: Mapping[str, str] = field(default_factory=dict)
    """Endpoints on known nodes whose pod has nobody listen on that port -> node."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """``path``: plain, direct, redirect, ztunnel, dns or refused. ``allowed`` None: it depends on the endpoint, or
    (``known`` is false) on what nobody answered."""

    path: str
    allowed: bool | None
    detail: str
    steps: tuple[Row, ...]
    known: bool = True


class _Steps:
    def __init__(self, facts: Facts) -> None:
        self.rows: list[Row] = []
        self._deaf = facts.deaf

    def add(self, step: str, where: str, result: str, why: str = "") -> None:
        self.rows.append({"step": step, "where": where, "result": result, "why": why})

    def outcome(self, path: str, allowed: bool | None, detail: str, *, known: bool = True) -> Outcome:
        for end, node in self._deaf.items() if allowed is not False else ():
            self.add(
                "listen", f"{node} kernel", f"{end}: nobody listens", "the mesh lets it pass and the pod refuses it"
            )
        word = {True: "allowed", False: "refused", None: "depends on the endpoint" if known else "unknown"}[allowed]
        self.add("path", "", path if path != "refused" else "none", f"{word}: {detail}")
        return Outcome(path, allowed, detail, tuple(self.rows), known)


def explain(facts: Facts) -> Outcome:
    """All steps of one connection, in the order in which they happen."""
    steps = _Steps(facts)
    source = facts.source
    said = source.state + (f" ({source.reason})" if source.reason else "")
    unasked = "nothing asks for it: the label istio.io/dataplane-mode=ambient of its namespace, or its own"
    why = source.detail or (unasked if said == "not_enrolled" else "")
    steps.add("source", f"{source.node} agent", f"{source.name}: {said}", why)
    for row in facts.drift:
        steps.add("drift", f"{row['node']} kernel", f"{row['map']} {row['key']}: {row['drift']}", drift_text(row))
    if facts.kernel.enrolled is None:
        steps.add(
            "connect", f"{source.node} kernel", "not captured", "the pod's network namespace is not in `enrolled`"
        )
        return _plaintext(steps, facts)
    reason = _connect(steps, facts)
    if reason == "dns":
        return steps.outcome("dns", True, "port 53 goes to the DNS proxy of this node")
    if reason == "loopback":
        return steps.outcome("plain", True, f"stays within the pod: {socket_text(facts.address, facts.port)}")
    if reason in LEFT_ALONE:
        return _plaintext(steps, facts)
    if reason not in ("captured", "not_synced"):
        return steps.outcome("refused", False, f"{reason}: {_MEANING.get(reason, reason)}")
    chosen = _same_node(steps, facts) if reason == "captured" else {}
    if not chosen or "ztunnel" in chosen:
        end = _through_ztunnel(steps, facts)
        if len(chosen) > 1 and end.allowed is not False:
            end = replace(end, detail=_mixed(chosen))
        return steps.outcome(end.path, end.allowed, end.detail, known=end.known)
    path = min(chosen, key=("direct", "redirect").index)
    ends = ", ".join(chosen[path][:5])
    detail = f"authorized in the kernel, straight to {ends}"
    return steps.outcome(path, True, detail if len(chosen) == 1 else _mixed(chosen))


def _connect(steps: _Steps, facts: Facts) -> str:
    """The connect hook's decision, over what the kernel holds now."""
    kernel, enrolled = facts.kernel, facts.kernel.enrolled
    assert enrolled is not None
    out = decide.Outbound(
        target=facts.address,
        port=facts.port,
        workload_known=kernel.workload is not None,
        service_known=kernel.service is not None,
        in_cluster=decide.address_in_cluster(facts.address, kernel.settings),
        workload_flags=kernel.workload.flags if kernel.workload else 0,
        enrolled_flags=enrolled.flags,
        now_ns=kernel.now_ns,
    )
    reason = reason_name(decide.decide_outbound(out, kernel.settings))
    if reason in ("captured", "not_synced") and enrolled.flows_max <= enrolled.flows < 2**31:
        reason = "share_exceeded"
    known = []
    if kernel.service:
        known.append(f"service {kernel.services.get(kernel.service.service, kernel.service.service)}")
    if kernel.workload:
        known.append("workload " + (",".join(flag_names("WORKLOAD_", kernel.workload.flags)) or "without flags"))
    what = " and ".join(known) or ("unknown address inside the cluster" if out.in_cluster else "unknown address")
    meaning = _MEANING.get(reason, "")
    if reason == "captured" and kernel.candidates:
        meaning = "the mesh's: straight to an endpoint on this node where it may, else to ztunnel"
    steps.add("connect", f"{facts.source.node} kernel", reason, f"{what}; {meaning}".strip("; "))
    return reason


def _same_node(steps: _Steps, facts: Facts) -> dict[str, list[str]]:
    """The connect hook's second decision, for each endpoint it may choose: path -> endpoints. Empty: nothing to choose
    from, ztunnel does."""
    kernel, enrolled = facts.kernel, facts.kernel.enrolled
    assert enrolled is not None
    names = {LAYOUT["ACCELERATION_DIRECT"]: "direct", LAYOUT["ACCELERATION_REDIRECT"]: "redirect"}
    chosen: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(kernel.candidates):
        number, agreed = decide.same_node(enrolled, candidate, kernel.settings, kernel.now_ns)
        reason = reason_name(number)
        end = socket_text(candidate.address, candidate.port)
        path = names[agreed] if reason == "kernel" else "ztunnel"
        chosen.setdefault(path, []).append(end)
        why = _SAME_NODE.get(reason, reason)
        if reason == "kernel" and candidate.workload is not None:
            anybody = candidate.workload.flags & LAYOUT["WORKLOAD_ALLOW_ANY"]
            why += "no policy selects the destination" if anybody else "its verdict allows the connection"
        if candidate.verdict is not None and candidate.verdict.policy:
            why += f"; policy {kernel.policies.get(candidate.verdict.policy, candidate.verdict.policy)}"
        if reason == "acceleration_off" and kernel.settings.acceleration & LAYOUT["NO_DESTROY"]:
            why = "this kernel cannot close connections (SOCK_DESTROY): ztunnel decides, which can"
        if reason == "acceleration_off" and kernel.settings.acceleration & LAYOUT["CROWDED"]:
            why = "map flows is nearly full: ztunnel takes what is new"
        if reason == "captured":
            why = _not_here(candidate, kernel)
        steps.add("same node", f"{facts.source.node} kernel", f"{end}: {reason}, {path}", why)
    return chosen


_SAME_NODE = {
    "kernel": "both ends are enrolled on this node, and ",
    "no_verdict": "policies select the destination and no verdict is written for this identity: ztunnel decides",
    "stale_verdict": "the verdict is of an earlier generation of the destination: ztunnel decides",
    "verdict_denies": "the verdict denies: ztunnel refuses and logs it",
    "acceleration_off": "one of the two ends wants ztunnel (ambient.mesh/acceleration: off)",
}


def _not_here(candidate: decide.Candidate, kernel: Kernel) -> str:
    workload, settings = candidate.workload, kernel.settings
    if workload is None:
        return "the kernel knows no workload there"
    if not settings.complete:
        return "the kernel does not hold the whole World"
    if workload.flags & decide.WAYPOINT:
        return "the destination has a waypoint"
    if not workload.flags & decide.LOCAL:
        return "the destination runs on another node"
    if not workload.flags & decide.ENROLLED:
        return "the destination is not enrolled"
    if decide.agent_is_silent(settings, kernel.now_ns):
        silent_s = (kernel.now_ns - settings.heartbeat_ns) / 1e9
        return f"the agent was last heard of {silent_s:.0f} s ago, so verdicts do not count: ztunnel decides"
    return (
        "the address has another owner by now, the port belongs to the mesh, or the source has no address of its family"
    )


def _mixed(chosen: Mapping[str, Sequence[str]]) -> str:
    return "by the endpoint chosen: " + "; ".join(f"{path} to {', '.join(ends[:5])}" for path, ends in chosen.items())


def _plaintext(steps: _Steps, facts: Facts) -> Outcome:
    """Not captured at the source: what becomes of it depends on the destination."""
    target = socket_text(facts.address, facts.port)
    if facts.behind is None:
        end = _arrives(steps, facts.plain or Arrival(target, None))
        return steps.outcome(end.path, end.allowed, end.detail)
    service = f"{target} is resolved by the cluster's own service rules"
    if not facts.behind:
        return steps.outcome("refused", False, f"no_endpoint: {service}, and has no healthy endpoint")
    chosen: dict[str, list[str]] = {}
    ends = []
    for arrival in facts.behind:
        ends.append(_arrives(steps, arrival))
        chosen.setdefault(ends[-1].path, []).append(arrival.endpoint)
    if len(chosen) == 1:
        return steps.outcome(ends[0].path, ends[0].allowed, f"{service}; {ends[0].detail}")
    allowed = {end.allowed for end in ends}
    path = "ztunnel" if "ztunnel" in chosen else "plain"
    return steps.outcome(path, allowed.pop() if len(allowed) == 1 else None, f"{service}; {_mixed(chosen)}")


def _arrives(steps: _Steps, arrival: Arrival) -> Outcome:
    """What becomes of plaintext at one address; without the last step."""
    verdict, target, there = arrival.verdict, arrival.endpoint, arrival.there
    if verdict is None:
        return Outcome("plain", True, f"plain TCP to {target}, as without a mesh (no ztunnel said anything)", ())
    if not verdict.get("enrolled"):
        return Outcome("plain", True, f"plain TCP to {target}, which is not in the mesh", ())
    if there is not None and decide.inbound_bypassed(there.workload, there.settings, there.now_ns):
        return Outcome("plain", True, f"plain TCP to {target}, whose capture is bypassed", ())
    _policies(steps, verdict)
    allowed = bool(verdict["allow"])
    where = f"plaintext taken by the ztunnel of {verdict.get('node') or 'the destination'}"
    return Outcome("ztunnel" if allowed else "refused", allowed, f"{where}: {reason_text(verdict)}", ())


def _through_ztunnel(steps: _Steps, facts: Facts) -> Outcome:
    """What ztunnel makes of it; without the last step."""
    answer = facts.answer
    who = f"{facts.source.node} ztunnel"
    if answer is None:
        steps.add("route", who, "no answer", "connections wait in ztunnel's listener until it is back")
        return Outcome("ztunnel", None, "ztunnel does not answer: is it running?", (), known=False)
    route = answer["route"]
    if route["kind"] == "refused":
        steps.add("route", who, f"refused: {route['reason']}", route["message"])
        return Outcome("refused", False, f"{route['reason']}: {route['message']}", ())
    hops = route["hops"]
    ends = ", ".join(h["endpoint"] for h in hops[:5]) + (f" and {len(hops) - 5} more" if len(hops) > 5 else "")
    of = f"service {route['service']}" if route.get("service") else "the address itself"
    steps.add("route", who, f"{route['kind']} to {ends}", f"{of}; one of {len(hops)} by weight")
    if route["kind"] == "tcp":
        return Outcome("ztunnel", True, f"plain TCP from ztunnel to {ends}: the destination is not in the mesh", ())
    verdicts = answer["verdicts"]
    closed: dict[str, str] = {}
    for verdict in verdicts:
        _policies(steps, verdict)
        ip = verdict["endpoint"].rpartition(":")[0].strip("[]")
        if facts.listening.get(ip) is False:
            node = verdict.get("node", "")
            closed[verdict["endpoint"]] = f"nothing takes tunnels to {ip}: does ztunnel run on {node}?"
            steps.add("admit", f"{node} kernel", "no HBONE listener", closed[verdict["endpoint"]])
    plain = [h["endpoint"] for h in hops if not h["authority"]]
    allowed = {bool(v["allow"]) and v["endpoint"] not in closed for v in verdicts} | ({True} if plain else set())
    first = verdicts[0] if verdicts else {}
    if allowed == {True}:
        return Outcome("ztunnel", True, f"HBONE to {ends}: {reason_text(first)}", ())
    if allowed == {False}:
        reason = f"{reason_text(first)}, at {first['endpoint']}" if not first["allow"] else closed[first["endpoint"]]
        return Outcome("refused", False, reason, ())
    return Outcome("ztunnel", None, "some endpoints take it and some do not", ())


def _policies(steps: _Steps, verdict: Mapping[str, Any]) -> None:
    where = f"{verdict.get('node') or '?'} ztunnel"
    for policy in verdict.get("policies", ()):
        does = "matches" if policy["matches"] else "does not match"
        note = "dry run, takes no part" if policy["dry_run"] else f"scope {policy['scope']}"
        steps.add("policy", where, f"{policy['action']} {policy['policy']} {does}", note)
    word = "allow" if verdict["allow"] else "deny"
    who = verdict["identity"] or "a peer without identity"
    steps.add("authorize", where, f"{word} {verdict['endpoint']}", f"{reason_text(verdict)}; for {who}")


def reason_text(verdict: Mapping[str, Any]) -> str:
    """Why a verdict is as it is, in words."""
    policy = verdict.get("policy", "")
    asked = "of the policies that select the destination none denies it, and none allows others only"
    return {
        "no_policy": asked if verdict.get("policies") else "no policy selects the destination",
        "policy": f"policy {policy}",
        "default_deny": "ALLOW policies select the destination and none matches",
        "strict": f"STRICT: {policy} takes no plaintext",
    }.get(str(verdict.get("reason", "")), str(verdict.get("reason", "")))


def drift_text(row: Row) -> str:
    """ "the kernel holds X while the control plane says Y", for one row of /diff."""
    from_kernel, wanted = row["actual"], row["wanted"]
    if not from_kernel:
        return "the kernel holds nothing while the control plane says there is an entry"
    if not wanted:
        return "the kernel holds an entry while the control plane says there is none"
    changed = [name for name in wanted if wanted[name] != from_kernel.get(name)]
    holds, says = (" ".join(f"{n}={values.get(n)}" for n in changed) for values in (from_kernel, wanted))
    return f"the kernel holds {holds} while the control plane says {says}"


def touching(
    drift: Sequence[Row], cookie: int, address: str, port: int, endpoints: Sequence[str], entries: Collection[Any] = ()
) -> list[Row]:
    """Rows of /diff about the entries a connection touches; ``entries`` are further ones, as map and key."""
    keys = {
        ("enrolled", str(cookie)),
        ("workloads", address),
        ("services", socket_text(address, port)),
        ("settings", "0"),
        *(("workloads", ip) for ip in endpoints),
        *(("listeners", f"{ip} {kind}") for ip in endpoints for kind in ("hbone", "plaintext")),
        *entries,
    }
    return [row for row in drift if (row["map"], row["key"]) in keys]


def service_at(services: Mapping[ServiceKey, ServiceValue], address: str, port: int) -> ServiceValue | None:
    return services.get(ServiceKey(address, port))


SETTINGS_MISSING = SettingsValue(mode=LAYOUT["MODE_CAPTURE"], complete=0)
"""What programs act by when there are no settings: everything is captured."""
