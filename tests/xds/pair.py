"""A server and a client that talk with no sockets between them, and small Worlds for them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from ambient.model.policy import Action, Group, Policy, Scope
from ambient.model.workload import Port, Service, TunnelProtocol, Workload
from ambient.model.world import World
from ambient.proto import discovery_pb2
from ambient.xds.client import Change, Client, describe_node
from ambient.xds.server import Server
from ambient.xds.session import Session

DeltaRequest = discovery_pb2.DeltaDiscoveryRequest
DeltaResponse = discovery_pb2.DeltaDiscoveryResponse


def workload(name: str, *, ip: int = 1, hbone: bool = False, policies: tuple[str, ...] = ()) -> Workload:
    return Workload(
        f"c//Pod/ns/{name}",
        name,
        "ns",
        addresses=(ipaddress.ip_address(f"10.0.0.{ip}"),),
        protocol=TunnelProtocol.HBONE if hbone else TunnelProtocol.NONE,
        policies=policies,
    )


def policy(name: str, action: Action = Action.DENY) -> Policy:
    return Policy(name, "ns", Scope.WORKLOAD_SELECTOR, action, (Group(),))


def service(name: str, ip: int = 1) -> Service:
    return Service(name, "ns", f"{name}.ns.svc", (ipaddress.ip_address(f"10.96.0.{ip}"),), (Port(80, 8080),))


class Pair:
    """One client connected to a server; `run` carries messages until nobody has anything to say."""

    def __init__(self, server: Server, client: Client | None = None, node: str = "n1") -> None:
        self.server = server
        self.client = client or Client(describe_node("ztunnel", node))
        self.session: Session = server.open(node)
        self.responses: list[DeltaResponse] = []
        self.changes: list[Change] = []
        for request in self.client.connect():
            self.session.receive(request)

    def responses_now(self) -> Iterator[DeltaResponse]:
        while (response := self.session.next()) is not None:
            message = DeltaResponse.FromString(response.payload)
            assert (message.nonce, message.type_url) == (response.nonce, response.type_url)
            assert len(message.resources) == response.resources
            self.responses.append(message)
            yield message

    def run(self) -> tuple[list[DeltaResponse], list[Change]]:
        self.responses, self.changes = [], []
        for message in self.responses_now():
            change = self.client.receive(message)
            if change is not None:
                self.changes.append(change)
                for ack in self.client.commit(change):
                    self.session.receive(DeltaRequest.FromString(ack.SerializeToString()))
        return self.responses, self.changes

    def disconnect(self) -> None:
        self.server.close(self.session)
        self.server.bury(self.session)


def server_of(*items: Workload | Service | Policy) -> Server:
    server = Server()
    server.set_world(world_of(*items))
    return server


def world_of(*items: Workload | Service | Policy) -> World:
    return World.of(
        [i for i in items if isinstance(i, Workload)],
        [i for i in items if isinstance(i, Service)],
        [i for i in items if isinstance(i, Policy)],
    )


def names(responses: list[DeltaResponse]) -> list[str]:
    return [resource.name for response in responses for resource in response.resources]
