"""A small shop as values: pods of this node, workloads and services of the World."""

from __future__ import annotations

import ipaddress
from typing import Any

from ambient.model.address import IPAddress, parse_ip
from ambient.model.policy import (
    Action,
    Group,
    Match,
    MatchKind,
    Policy,
    Rule,
    Scope,
    StringMatch,
)
from ambient.model.workload import Port, Service, TunnelProtocol, Workload
from ambient.node.messages import Pod

NODE = "node-a"


def ips(*texts: str) -> tuple[IPAddress, ...]:
    return tuple(parse_ip(t) for t in texts)


def pod(name: str, *addresses: str, account: str = "", namespace: str = "shop", **more: Any) -> Pod:
    """A pod whose UID is ``uid-NAME`` and whose account is its name up to the first dash."""
    values: dict[str, Any] = {
        "uid": f"uid-{name}",
        "workload_uid": f"Kubernetes//Pod/{namespace}/{name}",
        "name": name,
        "namespace": namespace,
        "service_account": account or name.partition("-")[0],
        "trust_domain": "cluster.local",
        "addresses": addresses,
        "netns_cookie": 1,
        "workload": 1,
    }
    return Pod(**{**values, **more})


def workload(name: str, *addresses: str, namespace: str = "shop", enrolled: bool = True, **more: Any) -> Workload:
    """The World's view of such a pod."""
    values: dict[str, Any] = {
        "uid": f"Kubernetes//Pod/{namespace}/{name}",
        "name": name,
        "namespace": namespace,
        "addresses": ips(*addresses),
        "node": NODE,
        "service_account": name.partition("-")[0],
        "protocol": TunnelProtocol.HBONE if enrolled else TunnelProtocol.NONE,
        "canonical_name": name.partition("-")[0],
        "workload_name": name.partition("-")[0],
    }
    return Workload(**{**values, **more})


def service(name: str, *vips: str, namespace: str = "shop", **more: Any) -> Service:
    values: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "hostname": f"{name}.{namespace}.svc.cluster.local",
        "vips": ips(*vips),
        "ports": (Port(80, 8080),),
    }
    return Service(**{**values, **more})


def serves(name: str, *ports: Port, namespace: str = "shop") -> tuple[tuple[str, tuple[Port, ...]], ...]:
    """For Workload.services: this workload is behind the service of that name."""
    return ((f"{namespace}/{name}.{namespace}.svc.cluster.local", ports or (Port(80, 8080),)),)


def principal(account: str, namespace: str = "shop") -> str:
    return f"cluster.local/ns/{namespace}/sa/{account}"


def spiffe(account: str, namespace: str = "shop") -> str:
    return f"spiffe://{principal(account, namespace)}"


def policy(
    name: str,
    action: Action,
    *matches: Match,
    scope: Scope = Scope.NAMESPACE,
    namespace: str = "shop",
    dry_run: bool = False,
) -> Policy:
    """One group with one rule of these matches; no groups if there are none."""
    groups = (Group((Rule(matches),)),) if matches else ()
    return Policy(name, namespace, scope, action, groups, dry_run)


def from_account(account: str, **more: Any) -> Match:
    return Match(principals=(StringMatch(MatchKind.EXACT, principal(account)),), **more)


def from_net(network: str) -> Match:
    return Match(source_ips=(ipaddress.ip_network(network),))


STRICT = policy(
    "istio_converted_static_strict",
    Action.DENY,
    Match(not_principals=(StringMatch(MatchKind.PRESENCE),)),
    scope=Scope.WORKLOAD_SELECTOR,
    namespace="istio-system",
)
