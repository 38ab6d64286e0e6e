"""What ztunnel's parent sends to one that does not read: kept in order, bounded, its descriptors open until sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from ambient.io import seqpacket
from ambient.io.seqpacket import PacketSocket
from ambient.node.messages import Ack
from ztunnel.io import outbox as outbox_module
from ztunnel.io.descriptors import Descriptor
from ztunnel.io.outbox import Outbox

Ends = tuple[PacketSocket[Any], PacketSocket[Any]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = seqpacket.pair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with closing(ours), closing(theirs):
        yield PacketSocket(ours, Ack), PacketSocket(theirs, Ack)


def uids(sock: PacketSocket[Any]) -> list[str]:
    found = []
    while True:
        try:
            packet = sock.receive()
        except BlockingIOError:
            return found
        assert packet is not None
        seqpacket.close_all(packet[1])
        found.append(packet[0].uid)


def test_what_is_not_read_waits_in_order_and_is_sent_when_it_is(ends: Ends) -> None:
    ours, theirs = ends
    outbox = Outbox()
    sent = [str(number) for number in range(2000)]
    for uid in sent:
        outbox.put(Ack(uid=uid))
    assert outbox.flush(ours)
    assert 0 < len(outbox) < len(sent)  # the kernel took some and refused the next
    got: list[str] = []
    while len(outbox):
        got += uids(theirs)
        assert outbox.flush(ours)
    assert got + uids(theirs) == sent


def test_one_that_reads_nothing_is_told_of_when_too_much_waits(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = ends
    outbox = Outbox()
    for number in range(2000):
        outbox.put(Ack(uid=str(number)))
    assert outbox.flush(ours)
    monkeypatch.setattr(outbox_module, "OUTBOX_MAX", len(outbox))
    assert outbox.flush(ours)
    outbox.put(Ack(uid="one more"))
    assert not outbox.flush(ours)
    uids(theirs)
    assert outbox.flush(ours)  # it reads again


def test_an_end_of_the_connection_is_left_to_its_read_side(ends: Ends) -> None:
    ours, theirs = ends
    theirs.close()
    outbox = Outbox()
    outbox.put(Ack(uid="late"))
    assert outbox.flush(ours)
    assert len(outbox) == 1


def test_a_descriptor_stays_open_until_it_is_sent(ends: Ends) -> None:
    ours, theirs = ends
    outbox = Outbox()
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe:
        outbox.put(Ack(uid="pipe"), [Descriptor(writer)])
        os.fstat(writer)
        assert outbox.flush(ours)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(writer)
        assert uids(theirs) == ["pipe"]  # and closed what came
        assert pipe.read() == b""
