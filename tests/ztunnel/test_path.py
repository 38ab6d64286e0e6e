"""From one pod to another through two real worker processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.require import require
from tests.ztunnel.harness import Mesh, mesh, wait_until

pytestmark = pytest.mark.net


@pytest.fixture(params=["ipv4", "ipv6"])
def path(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    require("net")
    with mesh(ipv6=request.param == "ipv6") as it:
        yield it


def test_bytes_and_both_ends_arrive_and_are_accounted(path: Mesh):
    listener = path.b.listen(path.ip, path.port)
    near = path.connect()
    near.sendall(b"hello")
    far, address = listener.accept()
    assert address[0] == path.ip  # without eBPF the delivery's own address is seen
    far.settimeout(10)
    assert far.recv(100) == b"hello"
    near.shutdown(socket.SHUT_WR)
    assert far.recv(100) == b""
    far.sendall(b"after the client's end")
    far.close()
    assert near.recv(100) == b"after the client's end" and near.recv(100) == b""
    near.close()
    for worker, reporter in ((path.client, "source"), (path.server, "destination")):
        events = wait_until(
            lambda worker=worker: (
                worker.control.events and worker.control.events[-1].event == "closed" and worker.control.events
            ),
            f"events of the {reporter}",
        )
        assert [event.event for event in events] in (["closed"], ["opened", "closed"], ["opened", "progress", "closed"])
        assert {event.reporter for event in events} == {reporter}
        assert (sum(event.sent for event in events), sum(event.received for event in events)) == (5, 22)
        assert events[-1].error == "" and events[-1].source_identity.endswith("/sa/a")
        assert events[-1].destination_identity.endswith("/sa/b")
