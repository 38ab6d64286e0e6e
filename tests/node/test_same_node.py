"""The order in which rights reach the kernel: no write lets anybody in who is not allowed at that moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from ambient.datapath.entries import LocalPod, rights
from ambient.datapath.values import FlowEnd, FlowValue, SettingsValue, TupleKey, VerdictKey, WorkloadValue
from ambient.errors import PlatformFault
from ambient.manifest.acceleration import Acceleration
from ambient.model.address import parse_ip
from ambient.model.identity import Identity
from ambient.model.policy import Action, Group, Match, MatchKind, Policy, Rule, Scope, StringMatch
from ambient.model.workload import TunnelProtocol, Workload
from ambient.model.world import World
from ambient.node.records import Names
from ambient.node.same_node import SameNode

A, B = (Identity("cluster.local", "shop", name) for name in ("a", "b"))


class Table(dict[Any, Any]):
    """A map that has no room for some keys and remembers the order of writes."""

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self.refuses: set[Any] = set()
        self.log: list[tuple[str, Any]] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        if key in self.refuses:
            raise PlatformFault("no room")
        self.log.append(("put", key))
        super().__setitem__(key, value)

    def delete(self, key: Any) -> bool:
        self.log.append(("delete", key))
        return self.pop(key, None) is not None


def pod(identity: Identity, number: int) -> LocalPod:
    name = identity.service_account
    address = f"10.1.0.{number}"
    return LocalPod(
        f"c//Pod/shop/{name}", (address,), number, True, identity=identity, acceleration=Acceleration.DIRECT
    )


PODS = [pod(A, 1), pod(B, 2)]


def world(*policies: Policy) -> World:
    return World.of(
        (
            Workload(
                p.workload_uid,
                p.identity.service_account,
                "shop",
                (parse_ip(p.addresses[0]),),
                service_account=p.identity.service_account,
                protocol=TunnelProtocol.HBONE,
                policies=tuple(x.key for x in policies) if p.identity == B else (),
            )
            for p in PODS
            if p.identity
        ),
        policies=policies,
    )


def policy(action: Action, port: int, who: Identity = A) -> Policy:
    match = Match(principals=(StringMatch(MatchKind.EXACT, who.principal),), destination_ports=(port,))
    return Policy(f"p{port}", "shop", Scope.WORKLOAD_SELECTOR, action, (Group((Rule((match,)),)),))


@pytest.fixture
def maps() -> Any:
    return SimpleNamespace(verdicts=Table(), endpoints=Table(), workloads=Table(), flows=Table())


@pytest.fixture
def names(tmp_path: Path) -> Names:
    return Names(tmp_path / "names.json")


def give(node: SameNode, world: World) -> None:
    node.grant(rights(world, PODS))
    node.put_verdicts()


def test_a_change_of_rights_is_another_generation_and_no_change_is_none(maps: Any, names: Names) -> None:
    node = SameNode("n1", names, maps)
    give(node, world(policy(Action.DENY, 80)))
    first = [node.generation_of(p) for p in PODS]
    give(node, world(policy(Action.DENY, 80)))
    assert [node.generation_of(p) for p in PODS] == first
    give(node, world(policy(Action.DENY, 81)))
    second = [node.generation_of(p) for p in PODS]
    assert second[0] == first[0] and second[1] > first[1]
    assert {v.generation for v in maps.verdicts.values()} == {second[1]}


def test_a_restarted_agent_never_goes_back_to_a_generation(maps: Any, names: Names) -> None:
    ahead = 2**62
    maps.workloads["10.1.0.2"] = WorkloadValue(1, 0, ahead)
    node = SameNode("n1", names, maps)
    give(node, world())
    assert all(node.generation_of(p) > ahead for p in PODS)


def flow_from_a_to_b(names: Names) -> tuple[TupleKey, FlowValue]:
    numbers = [names.workloads.of(p.workload_uid) for p in PODS]
    flow = FlowValue(
        client=FlowEnd(cookie=7),
        server=FlowEnd(cookie=8),
        netns_client=1,
        netns_server=2,
        source=numbers[0],
        destination=numbers[1],
        identity=names.identities.of(str(A)),
        original="10.1.0.2",
        original_port=80,
        **dict.fromkeys(("created_ns", "generation", "policy", "reason", "acceleration", "flags"), 0),
    )
    return TupleKey("10.1.0.2", "10.1.0.1", 80, 40000), flow


def test_what_could_not_be_closed_is_tried_again(maps: Any, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    node = SameNode("n1", names, maps)
    node.netns_of = lambda cookie: 0
    maps.enrolled, maps.settings = Table(), SettingsValue()
    give(node, world())
    assert node.revoke() == 0
    key, flow = flow_from_a_to_b(names)
    maps.flows[key] = flow
    asked: list[int] = []

    def destroy(_: Any, *ends: Any) -> bool:
        asked.append(ends[-1])
        if len(asked) <= 2:
            raise PlatformFault("no memory")
        return True

    monkeypatch.setattr("ambient.node.same_node.sock_diag.open_diag", lambda fd: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr("ambient.node.same_node.sock_diag.destroy", destroy)
    with monkeypatch.context() as broken:
        broken.setattr(maps.flows, "items", Mock(side_effect=PlatformFault("map flows: read")))
        give(node, world(policy(Action.DENY, 80)))
        with pytest.raises(PlatformFault):
            node.revoke()
    node.revoke()
    assert asked == [8, 7]
    node.revoke()
    assert asked == [8, 7, 8, 7]
    node.revoke()
    assert asked == [8, 7, 8, 7]


def test_a_flow_whose_names_were_lost_is_closed_with_its_right(
    maps: Any, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, flow = flow_from_a_to_b(names)
    lost = 1000
    maps.flows[key] = replace(flow, source=lost, destination=lost, identity=lost)
    maps.enrolled = Table({flow.netns_client: SimpleNamespace(identity=names.identities.of(str(A)), workload=1)})
    maps.settings = SettingsValue()
    node = SameNode("n1", names, maps)
    give(node, world())
    assert node.revoke() == 0
    give(node, world(policy(Action.DENY, 80, B)))
    assert node.revoke() == 0
    give(node, world(policy(Action.DENY, 80, A)))
    assert node.revoke() == 1


def test_port_0_is_written_last_and_removed_first(maps: Any, names: Names) -> None:
    node = SameNode("n1", names, maps)
    give(node, world(policy(Action.DENY, 80)))
    ports = [key.port for word, key in maps.verdicts.log if word == "put"]
    assert ports == sorted(ports, key=lambda port: port == 0)
    maps.verdicts.log.clear()
    give(node, world())
    ports = [key.port for word, key in maps.verdicts.log if word == "delete"]
    assert ports == sorted(ports, key=lambda port: port != 0)
    assert not maps.verdicts


def test_where_a_port_finds_no_room_port_0_does_not_stand_for_it(maps: Any, names: Names) -> None:
    node = SameNode("n1", names, maps)
    give(node, world(policy(Action.DENY, 80)))
    number, source = names.workloads.of(PODS[1].workload_uid), names.identities.of(str(A))
    assert VerdictKey(source, number, 0) in maps.verdicts
    maps.verdicts.refuses = {VerdictKey(source, number, 443)}
    give(node, world(policy(Action.DENY, 443)))
    assert VerdictKey(source, number, 0) not in maps.verdicts
    assert VerdictKey(names.identities.of(str(B)), number, 0) in maps.verdicts
    assert node.counters["verdicts_refused"] == 1 and "no room" in node.problem


def test_numbers_are_saved_before_they_are_used(maps: Any, names: Names, tmp_path: Path) -> None:
    node = SameNode("n1", names, maps)
    give(node, world(policy(Action.ALLOW, 80)))
    again = Names(tmp_path / "names.json")
    assert again.identities.names() == names.identities.names() != {}
    assert again.policies.names() == names.policies.names() != {}
