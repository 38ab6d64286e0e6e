"""The pure parts between frames and sockets: pool, decisions, capture, drain."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ztunnel.core import capture
from ztunnel.core.decisions import SOURCES_MAX, WAITING_MAX, WAITING_OF_POD, Decisions, Waiting
from ztunnel.core.drain import Drain, Phase
from ztunnel.core.floods import Shares
from ztunnel.core.messages import AskRoute, AskVerdict, Hop, Route, Verdict
from ztunnel.core.pool import IDLE_S, STREAMS_MAX, Pool, PoolKey
from ztunnel.io.ledger import BATCH_MAX, Account, Ledger
from ztunnel.io.link import Link
from ztunnel.io.server_tunnel import HANDSHAKES_OF_PEER, Places

KEY = PoolKey("spiffe://a", ("spiffe://b",), "10.0.0.2", 15008, "uid-a")


def test_streams_share_a_tunnel_up_to_a_hundred_and_then_take_another():
    pool: Pool[str] = Pool()
    assert pool.checkout(KEY) is None
    first = pool.add(KEY, "first", 0)
    waiting = pool.checkout(KEY)
    assert waiting is first and first.connecting  # nobody creates a second one meanwhile
    pool.opened(first, 1000)
    for _ in range(STREAMS_MAX - 2):
        assert pool.checkout(KEY) is first
    assert pool.checkout(KEY) is None
    second = pool.add(KEY, "second", 0)
    pool.opened(second, 1)  # the peer allows one
    assert pool.checkout(KEY) is None
    pool.release(first, 0)
    assert pool.checkout(KEY) is first


@pytest.mark.parametrize("field", range(5))
def test_connections_that_differ_in_any_part_of_the_key_never_share(field: int):
    pool: Pool[str] = Pool()
    pool.opened(pool.add(KEY, "first", 0), 100)
    other = KEY._replace(**{KEY._fields[field]: [("x",), 1][field == 3] if field in (1, 3) else "x"})
    assert pool.checkout(other) is None and pool.checkout(KEY) is not None


def test_idle_tunnels_are_released_after_five_minutes_and_used_ones_are_not():
    pool: Pool[str] = Pool()
    slot = pool.add(KEY, "tunnel", 0)
    pool.opened(slot, 100)
    assert pool.take_idle(10_000) == []
    pool.release(slot, 100)
    assert pool.take_idle(100 + IDLE_S - 1) == []
    assert pool.take_idle(100 + IDLE_S) == ["tunnel"]
    assert pool.checkout(KEY) is None and len(pool) == 0


def test_a_retired_tunnel_takes_no_more():
    pool: Pool[str] = Pool()
    slot = pool.add(KEY, "tunnel", 0)
    pool.opened(slot, 100)
    pool.retire(slot)
    pool.retire(slot)
    assert pool.checkout(KEY) is None


@given(st.lists(st.sampled_from(["out", "in", "open", "retire"]), max_size=300), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_no_slot_that_is_open_ever_has_more_than_its_limit(steps: list[str], seed: int):
    choose, pool = random.Random(seed), Pool[int]()
    held: list[object] = []
    for number, step in enumerate(steps):
        if step == "out":
            slot = pool.checkout(KEY) or pool.add(KEY, number, 0)
            before = slot.connecting
            held.append(slot)
            assert before or slot.streams <= slot.limit
        elif step == "in" and held:
            pool.release(held.pop(choose.randrange(len(held))), 0)  # type: ignore[arg-type]
        elif step == "open" and held:
            slot = choose.choice(held)  # type: ignore[assignment]
            if slot.connecting:
                pool.opened(slot, choose.randrange(1, 5))
        elif held:
            pool.retire(choose.choice(held))  # type: ignore[arg-type]
    assert all(slot.streams >= 0 for slot in held)  # type: ignore[attr-defined]


class Holder:
    def __init__(self) -> None:
        self.lost: list[Verdict] = []
        self.done = False

    def lost_right(self, verdict: Verdict) -> None:
        self.lost.append(verdict)


def verdict(allow: bool, generation: int = 1, source_ip: str = "", port: int = 80) -> Verdict:
    return Verdict(
        destination="uid",
        destination_ip="10.0.0.2",
        port=port,
        identity="spiffe://a",
        source_ip=source_ip,
        generation=generation,
        allow=allow,
    )


VERDICT_KEY = ("uid", "10.0.0.2", 80, "spiffe://a")


def test_a_revoked_verdict_reaches_exactly_those_who_rely_on_it():
    decisions, mine, other = Decisions(), Holder(), Holder()
    decisions.put_verdict(verdict(True))
    decisions.put_verdict(verdict(True, port=81))
    assert decisions.hold(VERDICT_KEY, "10.1.1.1", mine)
    assert decisions.hold(("uid", "10.0.0.2", 81, "spiffe://a"), "10.1.1.1", other)
    decisions.put_verdict(verdict(True, 2))
    assert not mine.lost
    decisions.put_verdict(verdict(False, 3))
    assert len(mine.lost) == 1 and not other.lost
    assert not decisions.hold(VERDICT_KEY, "10.1.1.1", mine)
    decisions.put_verdict(verdict(True, 2))  # late and old
    assert not decisions.hold(VERDICT_KEY, "10.1.1.1", mine)


def test_a_verdict_for_one_address_says_nothing_about_another():
    decisions, near, far = Decisions(), Holder(), Holder()
    decisions.put_verdict(verdict(True))
    assert decisions.hold(VERDICT_KEY, "10.1.1.1", near) and decisions.hold(VERDICT_KEY, "10.2.2.2", far)
    _, orphans = decisions.put_verdict(verdict(True, 2, "10.1.1.1"))
    assert orphans == [(far, "10.2.2.2")]
    assert decisions.verdict(VERDICT_KEY, "10.2.2.2") is None and not decisions.hold(VERDICT_KEY, "10.2.2.2", far)
    decisions.put_verdict(verdict(False, 3, "10.1.1.1"))
    assert len(near.lost) == 1 and not far.lost
    decisions.put_verdict(verdict(True, 4, "10.1.1.1"))
    assert decisions.hold(VERDICT_KEY, "10.1.1.1", near)
    decisions.put_verdict(verdict(False, 5))  # does not depend on it any more
    assert len(near.lost) == 2


def route(generation: int, ip: str = "10.9.9.9") -> Route:
    return Route(source="uid", ip=ip, port=80, generation=generation, kind="tcp", hops=(Hop(ip=ip, port=80),))


def test_an_older_route_never_replaces_a_newer_one_until_the_control_process_is_another():
    decisions = Decisions()
    decisions.put_route(route(5))
    assert decisions.put_route(route(4)).generation == 5
    questions = decisions.start_again()
    assert questions == [AskRoute(source="uid", ip="10.9.9.9", port=80)]
    assert decisions.route(("uid", "10.9.9.9", 80)) is not None
    assert decisions.put_route(route(1)).generation == 1


def test_a_control_process_that_knows_nothing_undoes_nothing_and_is_not_remembered():
    decisions, mine = Decisions(), Holder()
    decisions.put_route(route(5))
    decisions.put_verdict(verdict(True, 5))
    assert decisions.hold(VERDICT_KEY, "10.1.1.1", mine)
    decisions.start_again()
    lost = Route(source="uid", ip="10.9.9.9", port=80, generation=9, kind="refused", reason="not_synced")
    assert decisions.put_route(lost).kind == "tcp"
    empty = replace(verdict(False, 9), reason="not_synced")
    assert decisions.put_verdict(empty)[0].verdict.allow and not mine.lost
    # whoever asks for the first time is refused, and the next one asks again
    assert decisions.put_route(replace(lost, ip="10.8.8.8")).kind == "refused"
    assert decisions.route(("uid", "10.8.8.8", 80)) is None
    other = replace(empty, port=81)
    assert not decisions.put_verdict(other)[0].verdict.allow
    assert decisions.verdict(("uid", "10.0.0.2", 81, "spiffe://a"), "10.1.1.1") is None
    # what is decided when the World is back counts
    decisions.put_verdict(verdict(False, 10))
    assert len(mine.lost) == 1


def test_a_new_control_process_is_asked_about_verdicts_with_an_address_that_was_asked_before():
    decisions = Decisions()
    decisions.put_verdict(verdict(True, 9), "10.1.1.1")
    decisions.put_verdict(verdict(True, 9, "10.3.3.3", port=81))
    asked = [(q.port, q.source_ip) for q in decisions.start_again() if isinstance(q, AskVerdict)]
    assert asked == [(80, "10.1.1.1"), (81, "10.3.3.3")]


def test_the_cache_is_bounded_and_a_verdict_somebody_relies_on_stays():
    decisions, holder = Decisions(kept_max=10), Holder()
    decisions.put_verdict(verdict(True))
    decisions.hold(VERDICT_KEY, "10.1.1.1", holder)
    for port in range(1000, 1100):
        decisions.put_verdict(verdict(True, port=port))
        decisions.put_route(route(1, f"10.0.0.{port - 1000}"))
    assert decisions.verdict(VERDICT_KEY, "10.1.1.1") is not None
    assert len(decisions.forgotten_verdicts) == 91 and len(decisions.forgotten_routes) == 90
    decisions.forget_pod("uid")
    assert decisions.verdict(VERDICT_KEY, "10.1.1.1") is None


def test_a_question_is_asked_once_and_everybody_gets_the_answer_or_none_in_time():
    waiting: Waiting[str] = Waiting()
    got: list[str | None] = []
    assert waiting.join(("k",), 10, got.append) and not waiting.join(("k",), 20, got.append)
    waiting.answer(("other",), "x")
    waiting.answer(("k",), "x")
    assert got == ["x", "x"]
    assert waiting.join(("k",), 10, got.append)
    waiting.expire(9)
    assert len(got) == 2
    waiting.expire(10)
    assert got[2:] == [None]


def test_a_pod_whose_questions_stay_open_leaves_room_for_those_of_others():
    waiting: Waiting[str] = Waiting()
    got: dict[str, list[str | None]] = {"greedy": [], "other": []}
    for port in range(WAITING_MAX + 100):
        waiting.join(("greedy", "10.0.0.1", port), 10, got["greedy"].append)
    assert len(waiting) == WAITING_OF_POD and got["greedy"] == [None] * (WAITING_MAX + 100 - WAITING_OF_POD)
    assert waiting.join(("other", "10.0.0.1", 1), 10, got["other"].append) and not got["other"]
    waiting.expire(10)
    assert len(waiting) == 0 and got["other"] == [None]
    assert waiting.join(("greedy", "10.0.0.1", 1), 20, got["greedy"].append)


def test_a_captured_connection_needs_a_record_and_a_port_that_is_not_the_mesh_s():
    client, none = ("10.0.0.1", 4000), ("", 0)
    good = capture.outbound(("10.9.9.9", 80), ("10.0.0.2", 8080), client, ())
    assert isinstance(good, capture.Captured) and good.endpoint == "10.0.0.2:8080"
    assert capture.outbound(("fd00::9", 80), ("fd00::2", 1), client, ()).endpoint == "[fd00::2]:1"  # type: ignore[union-attr]
    assert capture.outbound(None, none, client, ()) == capture.Closed("no_redirect")
    for port in (15001, 15006, 15008):
        assert capture.outbound(("10.9.9.9", port), none, client, ()) == capture.Closed("recursion")
        assert capture.plaintext(("10.0.0.2", port), client, ("10.0.0.2",)) == capture.Closed("recursion")
    assert isinstance(capture.plaintext(("10.0.0.2", 80), client, ("10.0.0.2",)), capture.Captured)
    assert capture.plaintext(("127.0.0.1", 80), client, ("10.0.0.2",)) == capture.Closed("not_local")


def test_a_drain_ends_when_nothing_is_open_or_at_the_earliest_deadline():
    drain = Drain()
    assert drain.phase(0, 0) is Phase.SERVING
    drain.begin(0, 10)
    assert drain.phase(1, 0) is Phase.ENDED and drain.phase(1, 1) is Phase.DRAINING
    drain.begin(1, 100)
    assert drain.phase(10, 1) is Phase.ENDED
    drain.begin(2, 0)
    assert drain.phase(2, 5) is Phase.ENDED


def test_what_is_kept_or_asked_for_again_is_not_forgotten_on_the_other_side() -> None:
    """A pod left and came back before the control process was told to forget its decisions."""
    decisions = Decisions()
    for port in (1, 2, 3):
        decisions.put_route(Route(source="uid", ip="10.0.0.1", port=port, generation=1, kind="tcp"))
    decisions.forget_pod("uid")
    decisions.put_route(Route(source="uid", ip="10.0.0.1", port=1, generation=2, kind="tcp"))
    routes, verdicts = decisions.take_forgotten([("uid", "10.0.0.1", 2)], [])
    assert routes == (("uid", "10.0.0.1", 3),) and verdicts == ()
    assert decisions.take_forgotten([], []) == ((), ())


def test_connections_that_stay_open_do_not_make_every_later_verdict_immortal():
    """A peer that keeps a few connections open and then tries every port must not fill the memory."""
    decisions = Decisions(kept_max=100)
    for port in range(1, 71):
        decisions.put_verdict(verdict(True, port=port))
        assert decisions.hold((*VERDICT_KEY[:2], port, VERDICT_KEY[3]), "10.1.1.1", Holder())
    for port in range(1000, 3000):
        decisions.put_verdict(verdict(False, port=port))
    kept = sum(
        decisions.verdict((*VERDICT_KEY[:2], port, VERDICT_KEY[3]), "10.1.1.1") is not None for port in range(1, 3000)
    )
    assert kept <= 103
    for port in range(1, 71):
        assert decisions.verdict((*VERDICT_KEY[:2], port, VERDICT_KEY[3]), "10.1.1.1") is not None


def test_source_addresses_of_one_verdict_are_bounded_and_those_relied_on_stay():
    decisions, holder = Decisions(), Holder()
    decisions.put_verdict(verdict(True, source_ip="fd00::"))
    decisions.hold(VERDICT_KEY, "fd00::", holder)
    for number in range(1, 3 * SOURCES_MAX):
        decisions.put_verdict(verdict(True, source_ip=f"fd00::{number:x}"))
    kept = [n for n in range(3 * SOURCES_MAX) if decisions.verdict(VERDICT_KEY, f"fd00::{n:x}" if n else "fd00::")]
    assert len(kept) == SOURCES_MAX and kept[0] == 0
    assert len(decisions.forgotten_verdicts) == 2 * SOURCES_MAX


def test_verdicts_of_many_ports_for_many_source_addresses_are_bounded_together():
    """Anybody may try every port from every address of an IPv6 network."""
    decisions, holder = Decisions(kept_max=100), Holder()
    decisions.put_verdict(verdict(True, source_ip="10.1.1.1"))
    decisions.hold(VERDICT_KEY, "10.1.1.1", holder)
    tried = [(1000 + number % 60, f"fd00::{number // 60:x}") for number in range(60 * 50)]
    for port, source_ip in tried:
        decisions.put_verdict(verdict(False, port=port, source_ip=source_ip))
        assert decisions.verdict((*VERDICT_KEY[:2], port, VERDICT_KEY[3]), source_ip) is not None
    kept = sum(decisions.verdict((*VERDICT_KEY[:2], port, VERDICT_KEY[3]), ip) is not None for port, ip in tried)
    assert kept < 100 and len(decisions.forgotten_verdicts) == len(tried) - kept
    assert decisions.verdict(VERDICT_KEY, "10.1.1.1") is not None
    decisions.put_verdict(verdict(False, 2, source_ip="10.1.1.1"))
    assert len(holder.lost) == 1


def test_an_answer_that_was_under_way_when_its_key_was_evicted_is_not_taken_up():
    """The other side forgets the key with the eviction and would never change such an answer."""
    decisions = Decisions()
    assert not decisions.keeps(route(1)) and not decisions.keeps(verdict(True))
    decisions.put_route(route(1))
    decisions.put_verdict(verdict(True, source_ip="10.1.1.1"))
    assert decisions.keeps(route(2)) and not decisions.keeps(route(2, "10.9.9.8"))
    assert decisions.keeps(verdict(True, source_ip="10.1.1.1")) and decisions.keeps(verdict(True))
    assert not decisions.keeps(verdict(True, source_ip="10.1.1.2"))
    decisions.put_verdict(verdict(True))
    assert decisions.keeps(verdict(True, source_ip="10.1.1.2"))  # asked again when it came to depend on the address


def test_an_owner_that_fills_its_share_leaves_room_for_others_up_to_the_total():
    shares = Shares(5, 3)
    assert [shares.enter("a") for _ in range(4)] == [True, True, True, False]
    assert [shares.enter("b") for _ in range(3)] == [True, True, False]
    shares.leave("a")
    assert shares.enter("b") and not shares.enter("a")


def test_the_place_of_a_tunnel_is_given_back_once():
    places = Places()
    taken = [places.take("uid-b", "10.0.0.1") for _ in range(HANDSHAKES_OF_PEER)]
    assert all(taken) and places.take("uid-b", "10.0.0.1") is None
    other = places.take("uid-b", "10.0.0.2")
    assert other is not None
    for place in taken:
        assert place is not None
        place.shaken()
        place.shaken()
    more = [places.take("uid-b", "10.0.0.1") for _ in range(HANDSHAKES_OF_PEER)]
    assert all(more)
    for place in (*taken, *more, other):
        assert place is not None
        place.give_back()
        place.give_back()
    assert not places.tunnels._held and not places.of_pods._held and not places.of_peers._held


class NoWorker:
    """What a link needs of a worker, without a stream to a control process."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0.0


@pytest.mark.parametrize("over", [False, True])
def test_a_connection_that_ended_while_it_was_asked_for_again_is_not_held(over: bool):
    link, holders = Link(NoWorker()), (Holder(), Holder())
    sources = ("10.1.1.1", "10.1.1.2")
    link.verdict(VERDICT_KEY, sources[0], lambda decision: None)
    link._put_verdict(verdict(True))
    for holder, source_ip in zip(holders, sources, strict=True):
        assert link.decisions.hold(VERDICT_KEY, source_ip, holder)
    link._put_verdict(verdict(True, 2, sources[0]))  # it depends on the address now: the second is asked for
    holders[1].done = over
    link._put_verdict(verdict(True, 2, sources[1]))
    decision = link.decisions.verdict(VERDICT_KEY, sources[1])
    assert decision is not None and bool(decision.holders) is not over
    assert not holders[0].lost and not holders[1].lost


def test_a_connection_that_is_over_within_the_second_is_told_of_once_and_others_when_they_open():
    told: list[tuple[int, str, int]] = []
    ledger = Ledger(lambda batch: told.extend((e.connection, e.event, e.sent) for e in batch.events), lambda: None)

    def account() -> Account:
        return Account("source", "uid-a", "10.0.0.1:40000", "10.0.0.2:80", 0.0)

    short, denied, long, logged = (account() for _ in range(4))
    for opened in (short, denied, long):
        ledger.opened(opened)
        opened.sent = 7
    ledger.closed(short, 0.5)
    ledger.closed(denied, 0.5, event="denied")
    ledger.flush()
    assert told == [(1, "closed", 7), (2, "opened", 0), (2, "denied", 7)]
    ledger.tick(1.0)
    ledger.tell_openings = True
    ledger.opened(logged)
    ledger.closed(long, 1.1)
    ledger.closed(logged, 1.2)
    ledger.flush()
    assert told[3:] == [(3, "opened", 0), (3, "progress", 7), (4, "opened", 0), (3, "closed", 0), (4, "closed", 0)]
    ledger.tell_openings = False
    many = [account() for _ in range(BATCH_MAX + 1)]
    for opened in many:
        ledger.opened(opened)
    assert len(told) == 8 + BATCH_MAX, "openings do not pile up until the second is over"
