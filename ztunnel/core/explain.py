"""What would be decided about a connection, and every policy that was asked: for `ambient why`. Pure."""

from __future__ import annotations

import msgspec

from ambient.model.address import SocketAddress, fold, parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Allowed, Connection, evaluate
from ambient.model.workload import Workload
from ambient.model.world import World
from ztunnel.core.authorize import decide_verdict, denial
from ztunnel.core.dump import Json
from ztunnel.core.local import Local
from ztunnel.core.messages import AskRoute, AskVerdict
from ztunnel.core.route import decide_route

HOPS_SHOWN = 64


def explain(world: World | None, local: Local, query: dict[str, str]) -> Json:
    """``query``: ip and port, and source (a pod's UID; left out for a client outside the mesh, whose address may be
    given as source_ip). Raises ValueError naming what cannot be understood."""
    ip, port = str(parse_ip(query.get("ip", ""))), int(query.get("port", "0"))
    if not 0 < port <= 65535:
        raise ValueError(f"port {port}: 1 to 65535")
    source_ip = str(parse_ip(query["source_ip"])) if query.get("source_ip") else ""
    if not (source := query.get("source", "")):
        return {
            "synced": world is not None,
            "route": None,
            "verdicts": [_verdict(world, local, ip, port, "", source_ip)],
        }
    route = decide_route(world, local, AskRoute(source=source, ip=ip, port=port), 0)
    pod = local.pods.get(source)
    if not source_ip and pod is not None and pod.addresses:
        source_ip = next((a for a in pod.addresses if (":" in a) is (":" in ip)), pod.addresses[0])
    verdicts: list[Json] = []
    for hop in route.hops[:HOPS_SHOWN]:
        if hop.authority:
            end = SocketAddress.parse(hop.endpoint)
            verdicts.append(_verdict(world, local, str(end.ip), end.port, route.identity, source_ip, hop.destination))
    answer: Json = msgspec.to_builtins(route)
    return {"synced": world is not None, "route": answer, "verdicts": verdicts}


def _verdict(
    world: World | None, local: Local, ip: str, port: int, identity: str, source_ip: str, uid: str = ""
) -> Json:
    """What the destination's ztunnel would say; by its own function where the destination is served here."""
    address = parse_ip(ip)
    workload = None
    if world is not None:
        workload = world.workloads.get(uid) if uid else world.workload_at(address)
    found: dict[str, Json] = {"endpoint": str(SocketAddress(address, port)), "identity": identity}
    if world is None or workload is None:
        return {**found, "workload": "", "allow": None, "reason": "not_synced" if world is None else "not_mesh"}
    connection = _connection(identity, ip, port, source_ip)
    found |= {"workload": workload.uid, "node": workload.node, "policies": _policies(world, workload, connection)}
    pod = local.owner(address)
    if pod is not None:
        ask = AskVerdict(destination=pod.uid, destination_ip=ip, port=port, identity=identity, source_ip=source_ip)
        said = decide_verdict(world, local, ask, 0)
        return {**found, "allow": said.allow, "policy": said.policy, "reason": said.reason, "enrolled": True}
    decided = evaluate(connection, world.policies_for(workload))
    allow = isinstance(decided, Allowed)
    reason = ("policy" if decided.policy else "no_policy") if allow else denial(decided.policy)
    return {**found, "allow": allow, "policy": decided.policy or "", "reason": reason, "enrolled": workload.enrolled}


def _connection(identity: str, ip: str, port: int, source_ip: str) -> Connection:
    source = Identity.parse(identity) if identity else None
    return Connection(source, fold(parse_ip(source_ip or "0.0.0.0")), fold(parse_ip(ip)), port)


def _policies(world: World, workload: Workload, connection: Connection) -> list[Json]:
    """Every policy in force at the destination, and whether it matches this connection."""
    return [
        {
            "policy": policy.key,
            "action": policy.action.name.lower(),
            "scope": policy.scope.name.lower(),
            "dry_run": policy.dry_run,
            "matches": policy.matches(connection),
        }
        for policy in world.policies_for(workload)
    ]
