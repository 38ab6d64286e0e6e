"""Packet sockets: messages and descriptors arrive whole, and a refused packet leaks nothing."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ambient.errors import OurFault, PeerFault
from ambient.io import seqpacket
from ambient.io.seqpacket import AsyncPacketSocket, PacketSocket, close_all, connect, listen, pair
from ambient.node.messages import FDS_MAX, MESSAGE_BYTES_MAX, Ack, Message, Pod, PodPut, SnapshotSent

POD = Pod(
    uid="u1",
    workload_uid="Kubernetes//Pod/shop/cart-1",
    name="cart-1",
    namespace="shop",
    service_account="cart",
    trust_domain="cluster.local",
    addresses=("10.0.0.1",),
    netns_cookie=7,
    workload=1,
)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = pair()
    a.settimeout(5)
    b.settimeout(5)
    yield a, b
    a.close()
    b.close()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_message_and_its_descriptors_arrive_in_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    a, b = (PacketSocket(s, Message) for s in sockets)
    with open("/dev/null") as null, open("/dev/zero") as zero:
        a.send(PodPut(pod=POD, fds=("netns", "hbone4")), [null.fileno(), zero.fileno()])
        got = b.receive()
        assert got is not None
        message, fds = got
        assert message == PodPut(pod=POD, fds=("netns", "hbone4"))
        assert [os.fstat(f).st_rdev for f in fds] == [os.fstat(f.fileno()).st_rdev for f in (null, zero)]
        assert not any(os.get_inheritable(f) for f in fds)
        close_all(fds)


def test_a_closed_peer_is_none(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[0].close()
    assert PacketSocket(sockets[1], Message).receive() is None


def test_a_message_that_names_other_descriptors_is_refused_on_both_sides(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    a, b = (PacketSocket(s, Message) for s in sockets)
    with pytest.raises(OurFault, match="names 1 descriptors and 0"):
        a.send(PodPut(pod=POD, fds=("netns",)))
    import msgspec

    with open("/dev/null") as null:
        raw = msgspec.msgpack.encode(PodPut(pod=POD, fds=("netns", "hbone4")))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()]).tobytes())
        sockets[0].sendmsg([raw], [rights])
        before = open_fds()
        with pytest.raises(PeerFault, match="names 2 descriptors and carries 1"):
            b.receive()
        assert open_fds() == before


def test_too_many_descriptors_are_closed_and_refused(sockets: tuple[socket.socket, socket.socket]) -> None:
    with open("/dev/null") as null:
        rights = array.array("i", [null.fileno()] * (FDS_MAX + 1))
        sockets[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())])
        before = open_fds()
        with pytest.raises(PeerFault, match="descriptors"):
            PacketSocket(sockets[1], Message).receive()
        assert open_fds() == before


def test_a_packet_over_the_limit_is_refused_on_both_sides(sockets: tuple[socket.socket, socket.socket]) -> None:
    a, b = (PacketSocket(s, Message) for s in sockets)
    with pytest.raises(OurFault, match="bytes"):
        a.send(Ack(uid="u", error="x" * MESSAGE_BYTES_MAX))
    sockets[0].send(b"x" * (MESSAGE_BYTES_MAX + 1))
    with pytest.raises(PeerFault, match="longer"):
        b.receive()


@given(raw=st.binary(min_size=1, max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_garbage_is_a_peer_fault_or_a_message(sockets: tuple[socket.socket, socket.socket], raw: bytes) -> None:
    sockets[0].send(raw)
    try:
        got = PacketSocket(sockets[1], Message).receive()
    except PeerFault:
        return
    assert got is not None


def test_text_that_is_no_utf8_is_a_peer_fault(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[0].send(msgspec.msgpack.encode(Ack(uid="BROKEN")).replace(b"BROKEN", b"\xff" * 6))
    with pytest.raises(PeerFault, match="no message"):
        PacketSocket(sockets[1], Message).receive()


async def test_the_asynchronous_side_waits_to_send_and_to_receive() -> None:
    a, b = pair()
    left: AsyncPacketSocket[Ack | SnapshotSent] = AsyncPacketSocket(a, Ack | SnapshotSent)
    right: AsyncPacketSocket[Ack | SnapshotSent] = AsyncPacketSocket(b, Ack | SnapshotSent)
    count = 2000  # more than the socket's buffer holds

    async def send() -> None:
        for number in range(count):
            await left.send(Ack(uid=str(number), error="x" * 1000))
        left.close()

    sender = asyncio.create_task(send())
    seen = []
    while (got := await right.receive()) is not None:
        assert isinstance(got[0], Ack)
        seen.append(got[0].uid)
    await sender
    assert seen == [str(n) for n in range(count)]
    right.close()


def test_a_listener_is_private_and_replaces_a_stale_socket_but_no_file(tmp_path: Path) -> None:
    path = tmp_path / "holder.sock"
    listen(path).close()
    server = listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client = connect(path)
    accepted, _ = server.accept()
    PacketSocket(client, Message).send(SnapshotSent())
    assert PacketSocket(accepted, Message).receive() == (SnapshotSent(), ())
    for s in (client, accepted, server):
        s.close()
    other = tmp_path / "file"
    other.write_text("kept")
    with pytest.raises(OSError):
        listen(other)
    assert other.read_text() == "kept"


def test_the_limits_are_those_of_the_protocol() -> None:
    assert (seqpacket.MESSAGE_BYTES_MAX, seqpacket.FDS_MAX) == (MESSAGE_BYTES_MAX, FDS_MAX)
