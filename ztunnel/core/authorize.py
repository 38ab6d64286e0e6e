"""May a peer reach a port of a local workload: a pure decision from the World to a `Verdict`.

Policies are evaluated by `ambient.model.policy`. PeerAuthentication arrives already converted to DENY policies
(``istio_converted_static_strict`` and the like). Everything that is not known is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Allowed, Connection, Policy, evaluate
from ambient.model.world import World
from ambient.ports import GUARDED
from ztunnel.core.local import Local, is_same
from ztunnel.core.messages import AskVerdict, Verdict
from ztunnel.core.route import Touched

STRICT_POLICY: Final = "istio_converted_static_strict"
STRICT_PREFIX: Final = "converted_peer_authentication_"
_ANY = ipaddress.IPv4Address(0)


def decide_verdict(
    world: World | None, local: Local, ask: AskVerdict, generation: int, touched: Touched | None = None
) -> Verdict:
    """Decide; never raises. ``touched`` is filled with what the answer rests on.

    The answer's ``source_ip`` is empty where no policy in force looks at the source address: then it holds
    for every one. A question without it that needs one is refused (``source_address_needed``).
    """
    touched = touched if touched is not None else Touched()

    def answer(allow: bool, reason: str, policy: str = "", *, for_every_source: bool = True) -> Verdict:
        return Verdict(
            destination=ask.destination,
            destination_ip=ask.destination_ip,
            port=ask.port,
            identity=ask.identity,
            source_ip="" if for_every_source else ask.source_ip,
            generation=generation,
            allow=allow,
            policy=policy,
            reason=reason,
        )

    touched.pod(ask.destination)
    if world is None:
        return answer(False, "not_synced")
    pod = local.pods.get(ask.destination)
    if pod is None:
        return answer(False, "unknown_destination")
    touched.workload(pod.workload_uid)
    try:
        destination_ip = parse_ip(ask.destination_ip)
        source_ip = parse_ip(ask.source_ip) if ask.source_ip else None
        identity = Identity.parse(ask.identity) if ask.identity else None
    except ValueError:
        return answer(False, "malformed", for_every_source=False)
    touched.address(destination_ip)
    if local.owner(destination_ip) is not pod:
        return answer(False, "wrong_address")
    if not 0 < ask.port <= 65535:
        return answer(False, "malformed")
    if ask.port in GUARDED:
        return answer(False, "recursion")
    if identity is not None and identity.trust_domain != pod.trust_domain:
        return answer(False, "trust_domain")
    workload = world.workloads.get(pod.workload_uid)
    # A World that has another identity or address under this name knows an earlier pod of the name, and which
    # policies select this one cannot be told.
    if workload is None or not is_same(pod, workload) or destination_ip not in workload.addresses:
        return answer(False, "unknown_destination")
    touched.policies_of(workload.namespace)
    for key in workload.policies:
        touched.policy(key)
    policies = world.policies_for(workload)
    by_source = looks_at_source_address(policies)
    if by_source and source_ip is None:
        return answer(False, "source_address_needed")
    decided = evaluate(Connection(identity, source_ip or _ANY, destination_ip, ask.port), policies)
    if isinstance(decided, Allowed):
        return answer(
            True, "policy" if decided.policy else "no_policy", decided.policy or "", for_every_source=not by_source
        )
    reason = denial(decided.policy)
    return answer(False, reason, decided.policy or "", for_every_source=not by_source)


def denial(policy: str | None) -> str:
    """The reason that names a denial by this policy (``namespace/name``), or by none."""
    if policy is None:
        return "default_deny"
    name = policy.rpartition("/")[2]
    return "strict" if name == STRICT_POLICY or name.startswith(STRICT_PREFIX) else "policy"


def looks_at_source_address(policies: Iterable[Policy]) -> bool:
    """Whether any policy in force has a clause on the source's IP address."""
    return any(
        match.source_ips or match.not_source_ips
        for policy in policies
        if not policy.dry_run
        for group in policy.groups
        for rule in group.rules
        for match in rule.matches
    )
