"""What counts as acknowledged, by whom, and who is waited for."""

from __future__ import annotations

from ambient.model.world import World
from ambient.xds.server import CONTROL
from tests.xds.pair import Pair, server_of, workload, world_of


def test_a_workload_is_acknowledged_when_every_client_committed_its_protocol() -> None:
    uid = "c//Pod/ns/a"
    server = server_of(workload("a"))
    one, two = Pair(server, node="n1"), Pair(server, node="n2")
    assert server.acknowledged(uid, True) == (CONTROL, "n1", "n2")
    one.run(), two.run()
    assert server.acknowledged(uid, True) == (CONTROL, "n1", "n2")
    assert server.acknowledged(uid, False) == ()
    server.set_world(world_of(workload("a", hbone=True)))
    assert server.acknowledged(uid, True) == ("n1", "n2")
    one.run()
    assert server.acknowledged(uid, True) == ("n2",)
    for message in two.responses_now():
        change = two.client.receive(message)
        assert change is not None
        assert server.acknowledged(uid, True) == ("n2",), "received is not acknowledged"
        for ack in two.client.commit(change):
            two.session.receive(ack)
    assert server.acknowledged(uid, True) == ()
    assert server.acknowledged(uid, False) == (CONTROL, "n1", "n2")


def test_a_removed_workload_is_acknowledged_as_not_hbone_once_its_removal_is() -> None:
    uid = "c//Pod/ns/a"
    server = server_of(workload("a", hbone=True))
    pair = Pair(server)
    pair.run()
    server.set_world(World())
    assert server.acknowledged(uid, False) == ("n1",)
    pair.run()
    assert server.acknowledged(uid, False) == ()


def test_an_hbone_form_still_on_its_way_is_not_acknowledged_as_gone() -> None:
    uid = "c//Pod/ns/a"
    server = server_of(workload("a"))
    pair = Pair(server)
    pair.run()
    server.set_world(world_of(workload("a", hbone=True)))
    in_flight = list(pair.responses_now())
    server.set_world(world_of(workload("a")))
    assert server.acknowledged(uid, False) == ("n1",)
    for message in in_flight:
        change = pair.client.receive(message)
        for ack in pair.client.commit(change) if change else ():
            pair.session.receive(ack)
    assert server.acknowledged(uid, False) == ("n1",)
    pair.run()
    assert server.acknowledged(uid, False) == ()


def test_a_client_that_comes_back_with_an_old_form_is_waited_for() -> None:
    uid = "c//Pod/ns/a"
    server = server_of(workload("a", hbone=True))
    pair = Pair(server)
    pair.run()
    pair.disconnect()
    server.set_world(world_of(workload("a")))
    assert server.acknowledged(uid, False) == ()
    pair = Pair(server, pair.client)
    assert server.acknowledged(uid, False) == ("n1",)
    pair.run()
    assert server.acknowledged(uid, False) == ()


def test_a_stream_that_said_nothing_yet_is_waited_for_and_a_closed_one_is_not() -> None:
    server = server_of(workload("a"))
    session = server.open("n7")
    assert server.acknowledged("c//Pod/ns/a", False) == ("n7",)
    server.close(session)
    server.bury(session)
    assert server.acknowledged("c//Pod/ns/a", False) == ()


def test_a_client_that_just_left_is_waited_for_until_it_is_back_or_its_time_is_over() -> None:
    uid = "c//Pod/ns/a"
    server = server_of(workload("a"))
    pair = Pair(server)
    pair.run()
    server.close(pair.session)
    assert server.acknowledged(uid, False) == (), "what it acknowledged before holds"
    server.set_world(world_of(workload("a", hbone=True)))
    assert server.acknowledged(uid, True) == ("n1",)
    again = server.open("n1")
    requests = pair.client.connect()
    for request in requests:
        assert server.acknowledged(uid, True) == ("n1",)
        again.receive(request)
    assert server.acknowledged(uid, True) == ("n1",), "it is back and has the old form"
    server.close(again)
    server.bury(again)
    assert server.acknowledged(uid, True) == ("n1",), "the first stream is still remembered"
    server.bury(pair.session)
    assert server.acknowledged(uid, True) == ()


def test_who_listens_is_told_of_every_acknowledgement() -> None:
    server = server_of(workload("a"))
    calls: list[int] = []
    server.listen(lambda: calls.append(1))
    pair = Pair(server)
    pair.run()
    assert len(calls) == 2
    server.set_world(World())
    assert len(calls) == 3
