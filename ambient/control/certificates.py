"""May this caller have a certificate of this identity, and for how long?

Pure decisions. The caller was authenticated before (a token review by the Kubernetes API); what a node may
impersonate is decided by where pods are scheduled, never by what the request says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from ambient.model.identity import Identity

LIFETIME_MIN_S: Final = 5
BACKDATE_S: Final = 120
"""Certificates begin this long before now, for clocks that are behind; see `validity`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a reviewed token belongs to. The pod and node fields are empty for a token bound to no pod."""

    namespace: str
    service_account: str
    pod_name: str = ""
    pod_uid: str = ""
    node_name: str = ""

    @property
    def account(self) -> str:
        return f"{self.namespace}/{self.service_account}"


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What the decision needs to know of a pod. ``finished``: its phase is Succeeded or Failed."""

    uid: str
    name: str
    namespace: str
    service_account: str
    finished: bool = False
    host_network: bool = False


PodsOnNode = Callable[[str], Iterable[PodFacts]]
"""The pods bound to a node, by the node's name; all of them, in any order."""


@dataclass(frozen=True, slots=True)
class Granted:
    identity: Identity
    impersonated: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """``reason`` is a counter's name, ``message`` is for the operator of the caller."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings the decision depends on."""

    trust_domain: str
    node_accounts: tuple[str, ...]


def authorize(caller: Caller, requested: str, pods_on_node: PodsOnNode, rules: Rules) -> Granted | Refused:
    """Decide on a request for the SPIFFE ID ``requested``; empty: the caller's own identity.

    Anyone may have its own identity as long as its token is bound to a running pod. A node account may
    besides have that of every running pod on the node it runs on itself, hostNetwork pods excepted (they
    are not enrolled, and share an address with everything on the node).
    """
    own = _identity(rules.trust_domain, caller.namespace, caller.service_account)
    if own is None:
        return Refused("bad_caller", f"{caller.account} cannot form a SPIFFE ID in {rules.trust_domain}")
    if not caller.pod_uid or not caller.node_name:
        return Refused(
            "token_not_bound",
            f"the token of {caller.account} is not bound to a pod on a node: use a projected service account token"
            " (Kubernetes 1.30 or newer says the node in it)",
        )
    pods = tuple(pods_on_node(caller.node_name))
    pod = next((pod for pod in pods if pod.uid == caller.pod_uid), None)
    if (
        pod is None
        or pod.finished
        or (pod.namespace, pod.service_account) != (caller.namespace, caller.service_account)
    ):
        return Refused(
            "caller_pod_gone",
            f"pod {caller.namespace}/{caller.pod_name} ({caller.pod_uid}) of the token does not run on node"
            f" {caller.node_name} with service account {caller.service_account}",
        )
    if not requested:
        return Granted(own, impersonated=False)
    try:
        identity = Identity.parse(requested)
    except ValueError as error:
        return Refused("bad_identity", str(error))
    if identity == own:
        return Granted(own, impersonated=False)
    if identity.trust_domain != rules.trust_domain:
        return Refused("foreign_trust_domain", f"{identity}: this CA signs for {rules.trust_domain} only")
    if caller.account not in rules.node_accounts:
        return Refused(
            "not_a_node_account",
            f"{caller.account} may have its own identity only: node_accounts are {', '.join(rules.node_accounts)}",
        )
    wanted = (identity.namespace, identity.service_account)
    candidates = [pod for pod in pods if (pod.namespace, pod.service_account) == wanted]
    if any(not pod.finished and not pod.host_network for pod in candidates):
        return Granted(identity, impersonated=True)
    if any(not pod.finished for pod in candidates):
        return Refused("host_network", f"{identity}: its pods on node {caller.node_name} all use the host's network")
    return Refused("no_pod_on_node", f"{identity}: no running pod of it on node {caller.node_name}")


def _identity(trust_domain: str, namespace: str, service_account: str) -> Identity | None:
    try:
        return Identity(trust_domain, namespace, service_account)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Validity:
    """Whole seconds since the epoch."""

    not_before: int
    not_after: int


def validity(now: float, requested_s: int, limit_s: int, issuer: Validity) -> Validity | None:
    """The life of a certificate: what was asked for within the limit (0 or less: the limit), never outside the
    issuer's. None if the issuer has no `LIFETIME_MIN_S` left.

    The beginning is put back by `BACKDATE_S`, but never by more than a tenth of the life: holders renew
    halfway between beginning and end, which must not already be past.
    """
    start = int(now)
    life = max(LIFETIME_MIN_S, min(requested_s if requested_s > 0 else limit_s, limit_s))
    end = min(start + life, issuer.not_after)
    if start < issuer.not_before or end - start < LIFETIME_MIN_S:
        return None
    return Validity(max(start - min(BACKDATE_S, (end - start) // 10), issuer.not_before), end)


def renew_at(life: Validity) -> float:
    """When a holder should ask for the next one: at half life."""
    return life.not_before + (life.not_after - life.not_before) / 2
