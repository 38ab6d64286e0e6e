"""Server and client state machines in dialogue, with no sockets between them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient.errors import PeerFault
from ambient.model.policy import Action, Group
from ambient.model.workload import Port, Workload
from ambient.model.world import Diff, World
from ambient.proto import authorization_pb2
from ambient.xds import session as session_module
from ambient.xds.client import Backoff, Change, Client, describe_node
from ambient.xds.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ambient.xds.server import Server
from ambient.xds.session import ROUNDS_IN_FLIGHT_MAX, Session
from tests.support.worlds import small_worlds
from tests.xds.pair import DeltaRequest, DeltaResponse, Pair, names, policy, server_of, service, workload, world_of

# ---- the whole ----


@settings(max_examples=200)
@given(st.lists(st.tuples(small_worlds, st.sampled_from(("run", "wait", "reconnect", "restart"))), max_size=8))
def test_any_sequence_of_worlds_ends_with_the_client_knowing_the_servers_and_only_changes_sent(
    steps: list[tuple[World, str]],
) -> None:
    server = Server()
    pair = Pair(server)
    known = World()  # what the client has committed
    for world, then in steps:
        server.set_world(world)
        if then == "wait":
            continue
        if then == "reconnect":
            pair.disconnect()
            pair = Pair(server, pair.client)
        if then == "restart":  # of the server: it remembers no client
            server = Server()
            server.set_world(world)
            pair = Pair(server, pair.client)
        before = {**known.workloads, **known.services, **known.policies}
        responses, _ = pair.run()
        after = {**world.workloads, **world.services, **world.policies}
        assert pair.client.world == world
        sent = names(responses)
        assert sorted(sent) == sorted(set(sent)), "a resource was sent twice in one round"
        assert set(sent) == {name for name, item in after.items() if before.get(name) != item}
        removed = {name for response in responses for name in response.removed_resources}
        assert removed == before.keys() - after.keys()
        known = world


@settings(max_examples=200)
@given(small_worlds, small_worlds)
def test_a_client_that_applies_each_response_as_it_comes_never_lacks_a_listed_policy(a: World, b: World) -> None:
    server = Server()
    pair = Pair(server)
    eager = Client(describe_node("ztunnel", "n1"))  # a foreign client: every response is a change of its own
    eager.connect()
    for world in (a, b):
        server.set_world(world)
        missing_before = {key for w in a.workloads.values() for key in w.policies if key not in a.policies}
        missing_after = {key for w in b.workloads.values() for key in w.policies if key not in b.policies}
        for message in pair.responses_now():
            message.system_version_info = ""
            change = eager.receive(message)
            if change is None:
                continue
            eager.commit(change)
            listed = {key for w in eager.world.workloads.values() for key in w.policies}
            assert listed - eager.world.policies.keys() <= missing_before | missing_after


@settings(max_examples=200)
@given(small_worlds, small_worlds, st.integers(1, 200))
def test_every_world_the_client_acts_by_is_one_the_server_had_however_small_the_responses(
    a: World, b: World, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "RESPONSE_BYTES", size)
        server = Server()
        server.set_world(a)
        pair = Pair(server)
        _, changes = pair.run()
        assert [change.world for change in changes] == [a]
        server.set_world(b)
        _, changes = pair.run()
        assert [change.world for change in changes] == ([b] if a != b else [])


# ---- the first answers ----


def test_nobody_is_answered_before_there_is_a_world() -> None:
    pair = Pair(Server())
    assert pair.run() == ([], [])
    pair.server.set_world(World())
    responses, changes = pair.run()
    assert [r.type_url for r in responses] == [AUTHORIZATION_TYPE, ADDRESS_TYPE]
    assert [(change.first, change.world) for change in changes] == [(True, World())]


def test_the_first_world_waits_for_both_types() -> None:
    server = server_of(workload("a"))
    client = Client(describe_node("agent", "n1"))
    session = server.open("n1")
    policies, addresses = client.connect()
    session.receive(policies)
    response = session.next()
    assert response is not None
    assert client.receive(DeltaResponse.FromString(response.payload)) is None
    session.receive(addresses)
    response = session.next()
    assert response is not None
    change = client.receive(DeltaResponse.FromString(response.payload))
    assert change is not None
    assert change.first
    assert len(client.commit(change)) == 2


def test_a_reconnected_client_that_knows_everything_is_sent_no_resource() -> None:
    server = server_of(workload("a"), service("s"), policy("p"))
    first = Pair(server)
    first.run()
    first.disconnect()
    again = Pair(server, first.client)
    responses, changes = again.run()
    assert names(responses) == []
    assert not any(change.diff or change.first for change in changes)
    assert server.acknowledged("c//Pod/ns/a", False) == ()


def test_what_was_removed_while_away_is_removed_on_return() -> None:
    server = server_of(workload("a"), workload("b", ip=2), policy("p"))
    pair = Pair(server)
    pair.run()
    pair.disconnect()
    server.set_world(world_of(workload("b", ip=2)))
    pair = Pair(server, pair.client)
    _, changes = pair.run()
    assert changes[-1].diff == Diff(removed_workloads=("c//Pod/ns/a",), removed_policies=("ns/p",))


def test_an_unknown_type_is_answered_empty() -> None:
    server = server_of(workload("a"))
    session = server.open("n1")
    session.receive(DeltaRequest(type_url="type.googleapis.com/other.Type"))
    response = session.next()
    assert response is not None
    assert (response.type_url, response.resources) == ("type.googleapis.com/other.Type", 0)
    assert session.next() is None


# ---- order ----


def test_policies_come_before_the_workloads_that_list_them_and_go_after() -> None:
    server = server_of(workload("a", policies=("ns/old",)), policy("old"))
    pair = Pair(server)
    pair.run()
    server.set_world(world_of(workload("a", policies=("ns/new",)), policy("new")))
    responses, changes = pair.run()
    steps = [(r.type_url, [x.name for x in r.resources], list(r.removed_resources)) for r in responses]
    assert steps == [
        (AUTHORIZATION_TYPE, ["ns/new"], []),
        (ADDRESS_TYPE, ["c//Pod/ns/a"], []),
        (AUTHORIZATION_TYPE, [], ["ns/old"]),
    ]
    assert [r.system_version_info for r in responses] == ["2+", "2+", "2"]
    assert len(changes) == 1


def test_a_round_that_is_cut_off_is_forgotten_whole() -> None:
    server = server_of(workload("a", policies=("ns/old",)), policy("old"))
    pair = Pair(server)
    pair.run()
    server.set_world(world_of(workload("a", policies=("ns/new",)), policy("new")))
    for message in list(pair.responses_now())[:2]:
        assert pair.client.receive(message) is None
    pair.disconnect()
    assert set(pair.client.world.policies) == {"ns/old"}
    pair = Pair(server, pair.client)
    pair.run()
    assert pair.client.world == server.store.world


# ---- slow clients ----


def test_a_client_that_does_not_acknowledge_is_sent_a_few_rounds_and_then_the_sum_of_the_rest() -> None:
    server = server_of()
    pair = Pair(server)
    unread = list(pair.responses_now())
    for n in range(1, 50):
        server.set_world(world_of(*(workload(f"w{i}", ip=i) for i in range(n))))
        unread.extend(pair.responses_now())
    assert len({m.nonce.split(".")[0] for m in unread}) == ROUNDS_IN_FLIGHT_MAX
    for message in unread:
        change = pair.client.receive(message)
        for ack in pair.client.commit(change) if change else ():
            pair.session.receive(ack)
    responses, _ = pair.run()
    assert len(responses) == 1
    assert len(responses[0].resources) == 49 - (ROUNDS_IN_FLIGHT_MAX - 1)
    assert pair.client.world == server.store.world


def test_a_client_that_fell_behind_the_log_still_ends_right(monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_of(workload("gone", ip=9), workload("kept", ip=8))
    pair = Pair(server)
    pair.run()
    for n in range(2000):
        server.set_world(world_of(workload("kept", ip=8), workload("a", ip=n % 7)))
    responses, _ = pair.run()
    assert names(responses) == ["c//Pod/ns/a"]
    assert [list(r.removed_resources) for r in responses] == [["c//Pod/ns/gone"]]


# ---- bad resources ----


def test_a_bad_resource_is_refused_by_name_and_the_rest_still_applies() -> None:
    good, bad = workload("good"), workload("bad", ip=2)
    server = server_of(good, bad)
    pair = Pair(server)
    for message in pair.responses_now():
        for resource in message.resources:
            if resource.name == bad.uid:
                resource.resource.value = b"\xff\xff"
        change = pair.client.receive(message)
        for ack in pair.client.commit(change) if change else ():
            nack = pair.session.receive(ack)
            if ack.type_url == ADDRESS_TYPE:
                assert nack is not None
                assert nack.names == (bad.uid,)
                assert bad.uid in nack.message
            else:
                assert nack is None
    assert set(pair.client.world.workloads) == {good.uid}
    (state,) = server.connected()
    assert (state.nack_count, state.nacks[0].names) == (1, (bad.uid,))
    assert server.acknowledged(good.uid, False) == ()
    assert pair.run()[0] == [], "what was refused is not sent again unchanged"
    server.set_world(world_of(good, workload("bad", ip=3)))
    pair.run()
    assert pair.client.world == server.store.world


def spoiled(pair: Pair, name: str) -> Change:
    change = None
    for message in pair.responses_now():
        for resource in message.resources:
            if resource.name == name:
                broken = authorization_pb2.Authorization.FromString(resource.resource.value)
                broken.groups.add().rules.add().matches.add().principals.add()
                resource.resource.value = broken.SerializeToString()
        change = pair.client.receive(message) or change
    assert change is not None
    for ack in pair.client.commit(change):
        pair.session.receive(ack)
    return change


def test_a_policy_that_never_was_good_is_replaced_by_one_that_denies() -> None:
    server = server_of(policy("p", Action.DENY), policy("q", Action.ALLOW))
    pair = Pair(server)
    change = spoiled(pair, "ns/p")
    assert [r.name for r in change.rejected] == ["ns/p"]
    assert pair.client.world.policies["ns/p"].groups == (Group(),)
    server.set_world(world_of(policy("q", Action.ALLOW)))
    pair.run()
    assert set(pair.client.world.policies) == {"ns/q"}


@pytest.mark.parametrize("then", [world_of(workload("a")), world_of(workload("a"), policy("p", Action.ALLOW))])
def test_what_stands_in_for_a_policy_goes_with_it_also_while_away(then: World) -> None:
    server = server_of(workload("a"), policy("p"))
    pair = Pair(server)
    spoiled(pair, "ns/p")
    pair.disconnect()
    server.set_world(then)
    pair = Pair(server, pair.client)
    pair.run()
    assert pair.client.world == then


def test_a_policy_whose_update_is_bad_keeps_its_last_good_form() -> None:
    server = server_of(policy("p", Action.ALLOW))
    pair = Pair(server)
    pair.run()
    server.set_world(world_of(policy("p", Action.DENY)))
    spoiled(pair, "ns/p")
    assert pair.client.world.policies["ns/p"] == policy("p", Action.ALLOW)
    pair.disconnect()
    pair = Pair(server, pair.client)
    assert names(pair.run()[0]) == ["ns/p"], "the refused version is offered again on a new connection"
    assert pair.client.world == server.store.world


def test_a_refusal_that_names_nothing_refuses_the_whole_response() -> None:
    server = server_of(workload("a", hbone=True))
    pair = Pair(server)
    for message in pair.responses_now():
        request = DeltaRequest(type_url=message.type_url, response_nonce=message.nonce)
        request.error_detail.message = "no"
        nack = pair.session.receive(request)
        assert nack is not None
        assert nack.names == tuple(r.name for r in message.resources)
    assert server.acknowledged("c//Pod/ns/a", True) == ("n1",)


@given(st.binary(max_size=300))
def test_the_client_survives_garbage(garbage: bytes) -> None:
    client = Client(describe_node("ztunnel", "n1"))
    client.connect()
    response = DeltaResponse(type_url=ADDRESS_TYPE, nonce="1")
    resource = response.resources.add(name="x", version="1")
    resource.resource.type_url, resource.resource.value = ADDRESS_TYPE, garbage
    client.receive(response)
    client.receive(DeltaResponse(type_url=AUTHORIZATION_TYPE, nonce="2"))
    try:
        client.receive(DeltaResponse.FromString(garbage))
    except PeerFault:
        pass
    except Exception as error:
        assert type(error).__name__ == "DecodeError"


@pytest.mark.parametrize("response", [DeltaResponse(type_url="other", nonce="1"), DeltaResponse(type_url=ADDRESS_TYPE)])
def test_a_response_that_was_not_asked_for_ends_the_stream(response: DeltaResponse) -> None:
    client = Client(describe_node("ztunnel", "n1"))
    client.connect()
    with pytest.raises(PeerFault):
        client.receive(response)


def test_a_request_with_absurd_names_ends_the_stream() -> None:
    session = server_of().open("n1")
    with pytest.raises(PeerFault, match="characters"):
        session.receive(DeltaRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["x" * 2000]))
    with pytest.raises(PeerFault, match="types"):
        for n in range(20):
            session.receive(DeltaRequest(type_url=f"t{n}"))


def test_a_stale_nonce_is_counted_and_ignored() -> None:
    server = server_of(workload("a"))
    pair = Pair(server)
    pair.run()
    assert pair.session.receive(DeltaRequest(type_url=ADDRESS_TYPE, response_nonce="99.99")) is None
    assert pair.session.stale_count == 1
    assert server.acknowledged("c//Pod/ns/a", False) == ()


# ---- on demand ----


def on_demand(server: Server, *wanted: str) -> Session:
    session = server.open("n1")
    session.receive(
        DeltaRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["*"], resource_names_unsubscribe=["*"])
    )
    session.receive(DeltaRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=wanted))
    return session


def take(session: Session) -> tuple[list[str], list[str]]:
    got: list[str] = []
    removed: list[str] = []
    while (response := session.next()) is not None:
        message = DeltaResponse.FromString(response.payload)
        got.extend(r.name for r in message.resources)
        removed.extend(message.removed_resources)
        session.receive(DeltaRequest(type_url=message.type_url, response_nonce=message.nonce))
    return got, removed


def test_names_on_demand_are_uid_address_or_hostname() -> None:
    serving = Workload(
        "c//Pod/ns/b",
        "b",
        "ns",
        addresses=(ipaddress.ip_address("fd00::2"),),
        services=(("ns/s.ns.svc", (Port(80, 8080),)),),
    )
    server = server_of(workload("a"), serving, workload("c", ip=3), service("s"))
    assert take(on_demand(server)) == ([], [])
    assert take(on_demand(server, "c//Pod/ns/a")) == (["c//Pod/ns/a"], [])
    assert take(on_demand(server, "/10.0.0.3")) == (["c//Pod/ns/c"], [])
    assert take(on_demand(server, "/fd00::2")) == (["c//Pod/ns/b"], [])
    # a service comes with the workloads behind it
    assert take(on_demand(server, "ns/s.ns.svc")) == (["c//Pod/ns/b", "ns/s.ns.svc"], [])
    assert take(on_demand(server, "/10.96.0.1")) == (["c//Pod/ns/b", "ns/s.ns.svc"], [])
    assert take(on_demand(server, "other/10.0.0.3")) == ([], ["other/10.0.0.3"])
    assert take(on_demand(server, "nothing")) == ([], ["nothing"])


def test_a_subscribed_address_follows_its_owner() -> None:
    server = server_of(workload("a"), workload("b", ip=2))
    session = on_demand(server, "/10.0.0.1")
    assert take(session) == (["c//Pod/ns/a"], [])
    server.set_world(world_of(workload("b", ip=2)))
    assert take(session) == ([], ["c//Pod/ns/a"])
    server.set_world(world_of(workload("b", ip=2), workload("c", ip=1)))
    assert take(session) == (["c//Pod/ns/c"], [])
    server.set_world(world_of(workload("b", ip=5), workload("c", ip=1)))
    assert take(session) == ([], []), "what is not subscribed is not sent"
    session.receive(DeltaRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["/10.0.0.1"]))
    assert take(session) == (["c//Pod/ns/c"], []), "asking again gets an answer again"


def test_a_policy_can_be_asked_for_by_name() -> None:
    server = server_of(policy("p"), policy("q"))
    session = server.open("n1")
    session.receive(DeltaRequest(type_url=AUTHORIZATION_TYPE, resource_names_subscribe=["ns/p"]))
    assert take(session) == (["ns/p"], [])


# ---- views ----


def test_clients_are_shown_with_node_role_and_versions() -> None:
    server = server_of(workload("a"), service("s"), policy("p"))
    pair = Pair(server)
    pair.run()
    (state,) = server.connected()
    assert (state.node, state.role) == ("n1", "ztunnel")
    assert state.versions == {ADDRESS_TYPE: 2, AUTHORIZATION_TYPE: 1}
    assert (state.generation_sent, state.generation_acknowledged, state.in_flight) == (1, 1, 0)


# ---- waiting between connections ----


def test_waits_double_from_10_ms_to_15_s_and_begin_again_after_success() -> None:
    backoff = Backoff()
    waits = [backoff.next(0.0) for _ in range(14)]
    assert waits[:4] == [0.010, 0.020, 0.040, 0.080]
    assert waits[-1] == 15.0
    assert 7.5 <= backoff.next(0.999) < 15.0
    backoff.reset()
    assert backoff.next(0.0) == 0.010
