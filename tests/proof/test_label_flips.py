"""A namespace or a pod joins and leaves the mesh again and again under load, and no request fails.

node1: a -> node2: b, by tests/proof/clients/load.c: new connections, and kept ones that ask again and again. Where the
server is STRICT its caller is enrolled throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from ambient.lab.driver import eventually
from tests.support.clients import Load, load, load_server
from tests.support.mesh import IDLE, LABEL, PORT, STRICT, Mesh, is_enrolled, pod, service

pytestmark = [pytest.mark.lab, pytest.mark.net]

PROBE = {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 3}
RATE = 50
KEPT = 4


def client() -> dict[str, Any]:
    return pod("a", "node1", command=IDLE)


def server() -> list[dict[str, Any]]:
    return [pod("b", "node2", command=load_server(), probe=PROBE), service("b")]


def await_enrolled(mesh: Mesh, namespace: str, enrolled: bool) -> None:
    """Until all pods are in the mesh, or all are out of it and their agents have forgotten them."""

    def settled() -> bool:
        pods = mesh.get("pods", "-n", namespace)["items"]
        if any(is_enrolled(found) is not enrolled for found in pods):
            return False
        states = {p["state"] for n in ("node1", "node2") for p in mesh.agent(n)["pods"] if p["namespace"] == namespace}
        return states == {"enrolled" if enrolled else "not_enrolled"}

    eventually(settled, 40, f"{namespace} to be {'enrolled' if enrolled else 'not enrolled'}", pause_s=0.2)


def label_pod(mesh: Mesh, namespace: str, name: str, value: str) -> None:
    word = f"{LABEL}={value}" if value else f"{LABEL}-"
    mesh.kubectl("label", "pod", name, "-n", namespace, word, "--overwrite")


class Flipped:
    """The namespaces of the test, and a load on each pair."""

    def __init__(self, mesh: Mesh, stack: ExitStack) -> None:
        self.mesh = mesh
        self.both = stack.enter_context(mesh.namespace(client(), *server()))
        """Client and server flip together."""
        self.callers = stack.enter_context(mesh.namespace(client()))
        """Always enrolled; calls the STRICT namespace."""
        self.strict = stack.enter_context(mesh.namespace(*server()))
        self.pods = stack.enter_context(mesh.namespace(client(), *server(), enrolled=False))
        """The pods' own labels flip."""
        for name in ("a", "b"):
            label_pod(mesh, self.pods, name, "ambient")
        mesh.apply(self.strict, STRICT)
        mesh.await_policy("node2", "istio-system/istio_converted_static_strict")
        await_enrolled(mesh, self.pods, True)
        self.loads: dict[str, Load] = {
            name: stack.enter_context(load(mesh, caller, "a", mesh.vip(namespace, "b"), rate=RATE, kept=KEPT))
            for name, caller, namespace in (
                ("namespace", self.both, self.both),
                ("strict", self.callers, self.strict),
                ("pod", self.pods, self.pods),
            )
        }

    def flip(self, enrolled: bool) -> None:
        """All three at once, each by its label."""
        self.mesh.label(self.both, enrolled)
        self.mesh.label(self.strict, enrolled)
        for name in ("a", "b"):
            label_pod(self.mesh, self.pods, name, "ambient" if enrolled else "")
        for namespace in (self.both, self.strict, self.pods):
            await_enrolled(self.mesh, namespace, enrolled)


@pytest.fixture(scope="module")
def flipped(mesh: Mesh) -> Iterator[dict[str, dict[str, Any]]]:
    """Out and in twice, and twice more before the last has ended; what each load counted."""
    with ExitStack() as stack:
        world = Flipped(mesh, stack)
        for enrolled in (False, True, False, True):
            world.flip(enrolled)
        for enrolled in (False, True, False, True):  # faster than a drain
            mesh.label(world.both, enrolled)
            mesh.label(world.strict, enrolled)
            for name in ("a", "b"):
                label_pod(mesh, world.pods, name, "ambient" if enrolled else "")
        for namespace in (world.both, world.strict, world.pods):
            await_enrolled(mesh, namespace, True)
        yield {name: running.finish() for name, running in world.loads.items()}


@pytest.mark.parametrize("way", ["namespace", "strict", "pod"])
def test_no_request_fails_while_labels_flip(flipped: dict[str, dict[str, Any]], way: str) -> None:
    found = flipped[way]
    print(f"{way}: {found['ok']} connections, slowest {found['slowest']:.0f} ms, kept {found['kept']}")
    assert found["failed"] == 0, found
    assert found["ok"] == found["started"] > RATE * 10


@pytest.mark.parametrize("way", ["namespace", "strict", "pod"])
def test_a_flip_leaves_open_connections_alone(flipped: dict[str, dict[str, Any]], way: str) -> None:
    kept = flipped[way]["kept"]
    assert (kept["lost"], kept["opened"]) == (0, KEPT), flipped[way]
    assert kept["requests"] > KEPT * 10 * 5
