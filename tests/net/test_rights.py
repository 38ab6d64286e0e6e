"""Every change of what a pod grants, through the agent's own order of writes into the real maps.

From that moment on new connections do not take the kernel's path, and what has lost its right is closed.
"""

from __future__ import annotations

import dataclasses

import pytest

from ambient.datapath.entries import LocalPod, local_workloads, rights
from ambient.datapath.layout import LAYOUT
from ambient.manifest.acceleration import Acceleration
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Action, Group, Match, MatchKind, Policy, Rule, Scope, StringMatch
from ambient.model.workload import GatewayAddress, TunnelProtocol, Workload
from ambient.model.world import World
from ambient.node.records import Names
from ambient.node.same_node import SameNode
from tests.support.netlab import until
from tests.support.redirect import Held

pytestmark = [pytest.mark.net, pytest.mark.bpf]

CALLER, OWNER, OTHER = (Identity("cluster.local", "shop", name) for name in ("caller", "owner", "other"))


class Agent:
    """The agent's part for two pods: what it knows of them, and `write` in the order of `Kernel.put_pods`."""

    def __init__(self, node, client, server, names: Names) -> None:
        self.node, self.client, self.server, self.names = node, client, server, names
        self.same_node = SameNode("n1", names, node.maps)
        self.same_node.netns_of = {pod.cookie: pod.fd for pod in (client, server)}.get
        self.pods = [local(client, CALLER), local(server, OWNER)]
        self.workloads = [known(pod) for pod in self.pods]
        self.policies: tuple[Policy, ...] = ()
        for pod, found in zip((client, server), self.pods, strict=True):
            pod.workload = names.workloads.of(found.workload_uid)
            number = self.same_node.identity(found.identity)
            pod.enrol(flags=LAYOUT["ENROLLED_DIRECT"], workload_flags=LAYOUT["WORKLOAD_DIRECT"], identity=number)

    def change(self, index: int, **changes: object) -> None:
        """Of what the World knows of a pod."""
        self.workloads[index] = dataclasses.replace(self.workloads[index], **changes)

    def write(self) -> int:
        """Returns how many connections were closed."""
        world = World.of(self.workloads, policies=self.policies)
        self.same_node.grant(rights(world, self.pods))
        entries = local_workloads(self.same_node.granted, self.same_node.generation_of, self.names.workloads)
        for address, value in entries.items():
            self.node.maps.workloads[address] = value
        self.same_node.put_verdicts()
        return self.same_node.revoke()


def local(pod, identity: Identity) -> LocalPod:
    uid = f"c//Pod/shop/{identity.service_account}"
    return LocalPod(uid, tuple(pod.addresses), 1, True, identity=identity, acceleration=Acceleration.DIRECT)


def known(pod: LocalPod) -> Workload:
    assert pod.identity is not None
    name = pod.identity.service_account
    addresses = tuple(parse_ip(address) for address in pod.addresses)
    return Workload(
        pod.workload_uid, name, "shop", addresses, "n1", service_account=name, protocol=TunnelProtocol.HBONE
    )


def policy(action: Action, who: Identity, name: str = "p") -> Policy:
    match = Match(principals=(StringMatch(MatchKind.EXACT, who.principal),))
    return Policy(name, "shop", Scope.WORKLOAD_SELECTOR, action, (Group((Rule((match,)),)),))


@pytest.fixture
def agent(node, make_pod, tmp_path):
    found = Agent(node, make_pod(), make_pod(), Names(tmp_path / "names.json"))
    yield found
    for key in node.maps.verdicts:
        node.maps.verdicts.delete(key)


def waypoint(agent: Agent) -> None:
    agent.change(1, waypoint=GatewayAddress(parse_ip("10.96.0.99")))


def denial(agent: Agent) -> None:
    agent.policies += (policy(Action.DENY, CALLER, "no"),)
    agent.change(1, policies=("shop/p", "shop/no"))


def narrower_allow(agent: Agent) -> None:
    agent.policies = (policy(Action.ALLOW, OTHER),)


def label(agent: Agent) -> None:
    """The policy that selects it now was there before."""
    agent.policies += (policy(Action.DENY, CALLER, "no"),)
    agent.write()
    agent.change(1, policies=("shop/no",))


def identity(agent: Agent) -> None:
    """The World knows another pod of this name, so nobody knows what this one grants."""
    agent.change(1, service_account="other")


def off(agent: Agent) -> None:
    agent.pods[1] = dataclasses.replace(agent.pods[1], acceleration=Acceleration.OFF)


def gone(agent: Agent) -> None:
    """The World does not know it any more."""
    agent.workloads.pop(1)


@pytest.mark.parametrize(
    ("change", "closes"),
    [
        (waypoint, True),
        (denial, True),
        (narrower_allow, True),
        (label, True),
        (identity, False),
        (off, False),
        (gone, False),
    ],
)
def test_no_change_leaves_a_stale_allow(node, agent, change, closes):
    client, server = agent.client, agent.server
    agent.policies = (policy(Action.ALLOW, CALLER),)
    agent.change(1, policies=("shop/p",))
    assert agent.write() == 0
    counted = node.counted()
    open_before = Held(node, client, server)
    assert (counted("kernel"), counted("captured")) == (2, 0)
    change(agent)
    assert agent.write() == int(closes)
    counted = node.counted()
    app = client.puppet()
    app.connect(server.ip4, 6000)
    client.ztunnel_accept()[0].close()
    assert (counted("kernel"), counted("captured")) == (0, 1)
    if closes:
        with pytest.raises(ConnectionError):
            open_before.client.send(b"x")
        until(lambda: not len(node.maps.flows), "the flow is closed")
    else:
        open_before.ping()
    assert agent.write() == 0, "once"
    open_before.close()
