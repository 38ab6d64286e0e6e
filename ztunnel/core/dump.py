"""The configuration dump of the admin endpoint: the World, policies and answers as plain JSON values.

Keys are those of Istio's ztunnel, so that tools which read its dump read ours.
"""

from __future__ import annotations

from ambient.model.address import fold
from ambient.model.policy import Match, Policy, StringMatch
from ambient.model.workload import GatewayAddress, Service, Workload
from ambient.model.world import World
from ztunnel.core.local import Local
from ztunnel.core.messages import Route, Verdict

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


def camel(name: str) -> str:
    """SOME_NAME -> SomeName."""
    return "".join(part.capitalize() for part in name.split("_"))


def workload(value: Workload) -> Json:
    found: dict[str, Json] = {
        "uid": value.uid,
        "workloadIps": [str(fold(a)) for a in value.addresses],
        "protocol": "HBONE" if value.enrolled else "TCP",
        "name": value.name,
        "namespace": value.namespace,
        "trustDomain": value.trust_domain,
        "serviceAccount": value.service_account,
        "workloadName": value.workload_name,
        "workloadType": value.workload_type.name.lower(),
        "canonicalName": value.canonical_name,
        "canonicalRevision": value.canonical_revision,
        "node": value.node,
        "network": value.network,
        "networkMode": "HostNetwork" if value.host_network else "Standard",
        "nativeTunnel": value.native_tunnel,
        "status": camel(value.status.name),
        "clusterId": value.cluster_id,
        "hostname": value.hostname,
        "capacity": value.capacity,
        "services": [key for key, _ in value.services],
        "authorizationPolicies": list(value.policies),
        "locality": {
            "region": value.locality.region,
            "zone": value.locality.zone,
            "subzone": value.locality.subzone,
        },
    }
    if value.waypoint is not None:
        found["waypoint"] = _waypoint(value.waypoint)
    return found


def _waypoint(value: GatewayAddress) -> Json:
    return {"destination": str(value.destination), "hboneMtlsPort": value.hbone_port}


def service(world: World, value: Service) -> Json:
    endpoints: dict[str, Json] = {}
    for uid, candidate in world.workloads.items():
        for key, ports in candidate.services:
            if key == value.key:
                endpoints[uid] = {
                    "workloadUid": uid,
                    "service": key,
                    "port": {str(p.service_port): p.target_port for p in ports},
                    "status": camel(candidate.status.name),
                }
    found: dict[str, Json] = {
        "name": value.name,
        "namespace": value.namespace,
        "hostname": value.hostname,
        "vips": [f"{value.network}/{fold(vip)}" for vip in value.vips],
        "ports": {str(p.service_port): p.target_port for p in value.ports},
        "appProtocols": {str(p.service_port): p.app_protocol.name for p in value.ports},
        "endpoints": endpoints,
        "subjectAltNames": list(value.subject_alt_names),
        "loadBalancer": {
            "mode": camel(value.load_balancing.mode.name),
            "routingPreferences": [camel(s.name) for s in value.load_balancing.preference],
            "healthPolicy": "AllowAll" if value.load_balancing.allow_unhealthy else "OnlyHealthy",
        },
    }
    if value.waypoint is not None:
        found["waypoint"] = _waypoint(value.waypoint)
    return found


def policy(value: Policy) -> Json:
    return {
        "name": value.name,
        "namespace": value.namespace,
        "scope": camel(value.scope.name),
        "action": camel(value.action.name),
        "dryRun": value.dry_run,
        "groups": [[[_match(m) for m in rule.matches] for rule in group.rules] for group in value.groups],
    }


def _match(value: Match) -> Json:
    found: dict[str, Json] = {}
    for name in Match.__dataclass_fields__:
        items = getattr(value, name)
        if not items:
            continue
        head, *rest = name.split("_")
        key = head + "".join(part.capitalize() for part in rest)
        found[key] = [
            {camel(i.kind.value): i.value}
            if isinstance(i, StringMatch)
            else i
            if isinstance(i, int)
            else {"namespace": i.namespace, "serviceAccount": i.service_account}
            if hasattr(i, "service_account")
            else str(i)
            for i in items
        ]
    return found


def pods(local: Local) -> Json:
    """``workloadState`` by pod UID: what this ztunnel serves."""
    return {
        pod.uid: {
            "state": "Up",
            "info": {"name": pod.name, "namespace": pod.namespace, "serviceAccount": pod.service_account},
            "workloadUid": pod.workload_uid,
            "addresses": list(pod.addresses),
        }
        for pod in local.pods.values()
    }


def answers(found: list[Route | Verdict]) -> Json:
    """What workers were told, for a person who asks why."""
    routes: list[Json] = []
    verdicts: list[Json] = []
    for answer in found:
        if isinstance(answer, Route):
            routes.append(
                {
                    "source": answer.source,
                    "destination": f"{answer.ip} {answer.port}",
                    "kind": answer.kind,
                    "service": answer.service,
                    "hops": [{"endpoint": h.endpoint, "hbone": bool(h.authority)} for h in answer.hops],
                    "reason": answer.reason,
                    "message": answer.message,
                }
            )
        else:
            verdicts.append(
                {
                    "destination": answer.destination,
                    "address": f"{answer.destination_ip} {answer.port}",
                    "identity": answer.identity,
                    "sourceIp": answer.source_ip,
                    "allow": answer.allow,
                    "policy": answer.policy,
                    "reason": answer.reason,
                }
            )
    return {"routes": routes, "verdicts": verdicts}


def world(value: World | None) -> dict[str, Json]:
    known = value or World()
    return {
        "workloads": [workload(w) for _, w in sorted(known.workloads.items())],
        "services": [service(known, s) for _, s in sorted(known.services.items())],
        "policies": [policy(p) for _, p in sorted(known.policies.items())],
    }
