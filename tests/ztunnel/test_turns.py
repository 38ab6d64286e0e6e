"""The worker's event loop: timers by one alarm, ends reported with what can be read, descriptors that are closed."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from ztunnel.io.turns import Turns


def turns() -> Turns:
    """A loop that ends at the first fault, and after five seconds whatever happens."""
    faults: list[BaseException] = []
    it = Turns(lambda: None, lambda error: (faults.append(error), it.stop(1)))  # type: ignore[arg-type, func-returns-value]
    it.later(5.0, lambda: it.stop(2))
    return it


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def test_timers_run_in_their_order_and_never_early() -> None:
    it = turns()
    ran: list[tuple[str, float]] = []

    def note(name: str, due: float) -> None:
        ran.append((name, it.now() - due))
        if name == "last":
            it.stop(0)

    start = time.monotonic()
    for name, delay in (("last", 0.06), ("first", 0.0), ("middle", 0.03)):
        it.later(delay, lambda name=name, delay=delay: note(name, start + delay))
    assert it.run() == 0
    assert [name for name, _ in ran] == ["first", "middle", "last"]
    assert all(late >= 0 for _, late in ran)


def test_a_timer_set_by_a_timer_runs_and_a_cancelled_one_does_not() -> None:
    it = turns()
    ran: list[str] = []
    cancelled = it.later(0.0, lambda: ran.append("cancelled"))
    cancelled.cancel()
    it.later(0.01, lambda: it.later(0.01, lambda: it.stop(0)))
    assert it.run() == 0
    assert not ran


def test_a_timer_that_faults_takes_no_other_with_it() -> None:
    faults: list[BaseException] = []
    it = Turns(lambda: None, faults.append)
    it.later(0.0, lambda: 1 // 0)
    it.later(0.001, lambda: it.stop(0))
    it.later(5.0, lambda: it.stop(2))
    assert it.run() == 0
    assert [type(fault) for fault in faults] == [ZeroDivisionError]


def test_what_is_to_be_done_soon_is_done_though_something_before_it_faults() -> None:
    faults: list[BaseException] = []
    it = Turns(lambda: None, faults.append)
    it.later(5.0, lambda: it.stop(2))
    it.soon(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    it.soon(lambda: it.stop(0))
    assert it.run() == 0
    assert [type(fault) for fault in faults] == [ZeroDivisionError]


def test_a_reader_is_told_that_the_end_follows(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    it = turns()
    seen: list[tuple[bytes, bool]] = []

    def read() -> None:
        seen.append((ours.recv(100), it.ended))
        if not it.ended:
            theirs.sendall(b"the rest")
            theirs.shutdown(socket.SHUT_WR)
        elif not seen[-1][0]:
            it.stop(0)

    it.add_reader(ours.fileno(), read)
    theirs.sendall(b"some")
    assert it.run() == 0
    assert seen == [(b"some", False), (b"the rest", True), (b"", True)]
    assert not it.ended


def test_a_reset_is_an_error_of_the_read(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    it = turns()

    def read() -> None:
        with pytest.raises(ConnectionResetError):
            ours.recv(100)
        it.stop(0)

    it.add_reader(ours.fileno(), read)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    assert it.run() == 0


def test_a_paused_reader_is_told_of_a_reset_and_goes_on_where_it_was(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    it = turns()
    read: list[bytes] = []
    number = ours.fileno()

    def reset() -> None:
        assert read == [b"1"]
        it.pause_reader(number, lambda: it.stop(0))
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()

    it.add_reader(number, lambda: read.append(ours.recv(1)))
    it.pause_reader(number, lambda: it.stop(3))
    theirs.sendall(b"1")
    it.later(0.01, lambda: it.add_reader(number, lambda: (read.append(ours.recv(1)), it.later(0.01, reset))))  # type: ignore[arg-type, func-returns-value]
    assert it.run() == 0 and read == [b"1"]


def test_a_paused_reader_that_ended_at_both_ends_costs_no_turns(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    it = turns()
    told: list[int] = []
    it.add_reader(ours.fileno(), lambda: None)
    it.pause_reader(ours.fileno(), lambda: told.append(1))
    theirs.sendall(b"not read")
    theirs.shutdown(socket.SHUT_WR)
    ours.shutdown(socket.SHUT_WR)
    it.later(0.1, lambda: it.stop(0))
    assert it.run() == 0
    assert 1 <= len(told) <= 5


def test_a_forgotten_and_closed_socket_is_not_called_and_its_number_serves_another() -> None:
    it = turns()
    old, old_peer = socket.socketpair()
    number = old.fileno()
    called: list[str] = []
    trigger, pull = socket.socketpair()

    def replace() -> None:
        trigger.recv(1)
        it.remove_reader(trigger.fileno())
        it.forget(number)
        old.close()
        new, new_peer = socket.socketpair()
        kept.extend((new, new_peer))
        assert new.fileno() == number
        it.add_reader(number, lambda: (called.append("new"), it.stop(0)))  # type: ignore[arg-type, func-returns-value]
        it.later(0.01, lambda: called.append("later"))
        it.later(0.02, lambda: new_peer.sendall(b"x"))

    kept: list[socket.socket] = []
    it.add_reader(trigger.fileno(), replace)
    it.add_reader(number, lambda: called.append("old"))
    pull.sendall(b"x")
    old_peer.sendall(b"x")  # reported in the same turn, after it was replaced
    assert it.run() == 0
    assert called == ["later", "new"]
    for sock in (old_peer, trigger, pull, *kept):
        sock.close()
