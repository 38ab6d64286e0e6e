"""What is told of the connections inside a node: every byte, once, however they end."""

from __future__ import annotations

import socket
import struct

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import FlowEvent
from ambient.io import netns, sock_diag
from ambient.io.flow_reader import FlowReader, bytes_received, bytes_sent
from tests.support.flows import closed, swept
from tests.support.netlab import until
from tests.support.same_node import allow

pytestmark = [pytest.mark.net, pytest.mark.bpf]


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_bytes_are_exact_whoever_closes_first_and_however(node, client, server, events, first, how):
    allow(node, server)
    app = client.puppet()
    slot = app.connect(server.ip4, 80)
    accepted, _ = server.app.accept(server.listening[server.ip4])
    app.call("send", slot, "abc")
    assert server.app.call("recv", accepted)[2] == "abc"
    server.app.call("send", accepted, "defgh")
    assert app.call("recv", slot)[2] == "defgh"
    ends = [(app, slot), (server.app, accepted)]
    for puppet, which in ends if first == "client" else reversed(ends):
        puppet.call(how, which)
    (event,) = events()
    assert (bytes_sent(event.value), bytes_received(event.value)) == (3, 5)


def test_a_flow_that_is_never_answered_is_reported_with_nothing(node, client, server, events):
    """Nobody listens on that port: the server's kernel resets."""
    allow(node, server)
    app = client.puppet()
    with pytest.raises(ConnectionRefusedError):
        app.connect(server.ip4, 81)
    (event,) = events()
    assert (bytes_sent(event.value), bytes_received(event.value), event.value.server.cookie) == (0, 0, 0)


def test_a_full_ring_buffer_loses_no_flow(node, client, server):
    """More closes than fit without anybody reading: the rest wait in `flows` and the sweep takes each once."""
    allow(node, server)
    reader = FlowReader(node.maps)
    closed(reader)
    counted = node.counted()
    room = LAYOUT["EVENTS_BYTES"] // (8 + FlowEvent.size())
    many = room + 40
    with node.member("kubepods/" + client.name):
        sockets = netns.run_in_netns(client.fd, lambda: _open_and_reset(server.ip4, many))
    assert sockets == many
    until(lambda: counted("flow_unreported") >= 40, "the ring buffer is full")
    until(lambda: node.maps.enrolled[client.cookie].flows == 0, "all are closed")
    reported = [event.key for event in closed(reader)]
    late = [event.key for event in swept(reader)]
    assert len(reported) + len(late) == many
    assert not swept(reader)
    reader.close()


def _open_and_reset(address: str, count: int) -> int:
    for _ in range(count):
        with socket.socket() as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                sock.connect((address, 81))  # nobody listens there
            except ConnectionRefusedError:
                continue
            raise AssertionError("somebody listens")
    return count


@pytest.mark.parametrize("family", [4, 6])
def test_a_living_flow_shows_its_bytes_and_can_be_closed(node, client, server, events, family):
    allow(node, server)
    target = server.ip4 if family == 4 else server.ip6
    app = client.puppet()
    slot = app.connect(target, 80)
    accepted, _ = server.app.accept(server.listening[target])
    app.call("send", slot, "hello")
    assert server.app.call("recv", accepted)[2] == "hello"
    reader = FlowReader(node.maps)
    until(
        lambda: [(f.sent, f.received) for f in reader.live({client.cookie: client.fd}.get)] == [(5, 0)],
        "the bytes of the living flow",
    )
    ((key, flow),) = node.maps.flows.items()
    with sock_diag.open_diag(client.fd) as diag:
        wrong = sock_diag.destroy(diag, key.remote, key.remote_port, key.local, key.local_port, flow.client.cookie + 1)
        assert not wrong
        assert sock_diag.destroy(diag, key.remote, key.remote_port, key.local, key.local_port, flow.client.cookie)
    with pytest.raises(OSError):
        server.app.call("recv", accepted)
    (event,) = events()
    assert (bytes_sent(event.value), bytes_received(event.value)) == (5, 0)
