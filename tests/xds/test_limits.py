"""What a client can make the server remember, and for how long, has a bound."""

from __future__ import annotations

import time

import pytest

from ambient.errors import PeerFault
from ambient.xds import session as session_module
from ambient.xds.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ambient.xds.server import CLIENTS_OF_NODE_MAX, Server
from ambient.xds.session import ROUNDS_ASKED_MAX, Session
from tests.xds.pair import DeltaRequest, DeltaResponse, Pair, server_of, workload, world_of


def responses(session: Session) -> list[DeltaResponse]:
    found = []
    while (response := session.next()) is not None:
        found.append(DeltaResponse.FromString(response.payload))
    return found


def ask(session: Session, *wanted: str, but: tuple[str, ...] = ()) -> None:
    session.receive(
        DeltaRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=wanted, resource_names_unsubscribe=but)
    )


@pytest.mark.parametrize("again", [("nothing",), ("*",)])
def test_who_asks_for_ever_and_never_acknowledges_is_answered_no_more_until_it_does(again: tuple[str, ...]) -> None:
    session = server_of(workload("a")).open("n1")
    unread = []
    for _ in range(10 * ROUNDS_ASKED_MAX):
        ask(session, but=again)
        ask(session, *again)
        unread += responses(session)
    assert len(unread) == session.state().in_flight == ROUNDS_ASKED_MAX
    session.receive(DeltaRequest(type_url=ADDRESS_TYPE, response_nonce=unread[0].nonce))
    assert len(responses(session)) == 1, "and then it gets the answer to all of it"


def test_pods_that_are_gone_are_not_remembered() -> None:
    server = server_of()
    pair = Pair(server)
    for n in range(200):
        server.set_world(world_of(workload(f"w{n}", ip=n % 250, hbone=bool(n % 2))))
        pair.run()
    assert list(pair.session._acknowledged) == ["c//Pod/ns/w199"]
    assert server.acknowledged("c//Pod/ns/w199", True) == () == server.acknowledged("c//Pod/ns/w198", False)


def test_names_that_a_client_says_are_bounded_in_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "NAME_CHARS_MAX", 10_000)
    session = server_of().open("n1")
    for n in range(100):
        ask(session, f"{n:0100}")
        ask(session, f"{n:0100}")  # known already
    with pytest.raises(PeerFault, match="names of more than"):
        ask(session, "one more")
    ask(session, but=(f"{0:0100}",))
    with pytest.raises(PeerFault, match="names of more than"):
        versions = {"a": "v" * 5000, "b": "v" * 5000}
        session.receive(DeltaRequest(type_url=AUTHORIZATION_TYPE, initial_resource_versions=versions))


def test_names_nobody_has_cost_as_much_as_they_are() -> None:
    session = server_of(workload("a")).open("n1")
    absent = [f"gone-{n}" for n in range(50_000)]
    request = DeltaRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=absent)
    request.initial_resource_versions.update(dict.fromkeys(absent, "v"))
    session.receive(request)
    started = time.process_time()
    removed = [name for response in responses(session) for name in response.removed_resources]
    assert time.process_time() - started < 5, "a minute, where each is looked for among all"
    assert sorted(removed) == sorted(absent)


def test_one_node_does_not_take_the_room_of_the_others() -> None:
    server = Server()
    sessions = [server.open("n1") for _ in range(CLIENTS_OF_NODE_MAX)]
    with pytest.raises(PeerFault, match="on node n1"):
        server.open("n1")
    server.open("n2")
    server.close(sessions[0])
    again = server.open("n1")  # who just left makes room
    server.bury(sessions[0])
    for session in (*sessions[1:], again):
        server.close(session)
        server.bury(session)
    for _ in range(10 * CLIENTS_OF_NODE_MAX):  # a storm of reconnects
        server.close(server.open("n1"))
    assert len(server._departed) == CLIENTS_OF_NODE_MAX
    assert len(server.connected()) == 1


def test_a_refusal_names_only_what_was_sent_and_garbage_in_it_refuses_everything() -> None:
    server = server_of(workload("a"), workload("b", ip=2))
    pair = Pair(server)
    [_, message] = pair.responses_now()
    nack = DeltaRequest(type_url=ADDRESS_TYPE, response_nonce=message.nonce)
    nack.error_detail.message = "no"
    detail = nack.error_detail.details.add()
    detail.type_url, detail.value = "type.googleapis.com/google.protobuf.ListValue", b"\xff"
    refused = pair.session.receive(nack)
    assert refused is not None and refused.names == ("c//Pod/ns/a", "c//Pod/ns/b")
