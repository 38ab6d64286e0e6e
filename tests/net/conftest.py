"""A client and a server on one node, whose connections the kernel may decide."""

from __future__ import annotations

import pytest

from ambient.datapath.values import FlowEvent
from ambient.io.flow_reader import FlowReader
from tests.support.flows import closed
from tests.support.netlab import until
from tests.support.same_node import DIRECT, ME


@pytest.fixture
def client(node, make_pod):
    pod = make_pod()
    pod.enrol(identity=ME, **DIRECT)
    return pod


@pytest.fixture
def server(node, make_pod):
    """Listens on port 80 of both families."""
    pod = make_pod()
    pod.enrol(identity=502, **DIRECT)
    pod.app = pod.puppet()
    pod.listening = {address: pod.app.listen(address, 80) for address in pod.addresses}
    yield pod
    for key in node.maps.verdicts:
        node.maps.verdicts.delete(key)


@pytest.fixture
def events(node):
    """Call it for the flows that closed since the last call."""
    reader = FlowReader(node.maps)
    closed(reader)

    def read(count: int = 1) -> list[FlowEvent]:
        found: list[FlowEvent] = []

        def enough() -> bool:
            found.extend(closed(reader))
            return len(found) >= count

        until(enough, f"{count} flows are reported")
        return found

    yield read
    reader.close()
