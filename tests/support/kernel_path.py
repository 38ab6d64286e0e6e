"""Whether connections between pods of node1 take the kernel's path, by the kernel's own counters and flows."""

from __future__ import annotations

from typing import Any

from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from tests.support.mesh import Mesh


class Counted:
    """How often reasons were counted on node1 inside the block."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._before = maps.counters()

    def __getitem__(self, reason: str) -> int:
        return self._maps.counters().get(reason, 0) - self._before.get(reason, 0)


def takes_the_kernel_path(
    mesh: Mesh, maps: Maps, namespace: str, host: str, port: int, client: str = "a"
) -> dict[str, Any] | None:
    counted = Counted(maps)
    found = mesh.call(namespace, client, host, port)
    return found if found.get("echoed") == "hello" and counted["kernel"] >= 2 and not counted["captured"] else None


def await_kernel_path(mesh: Mesh, maps: Maps, namespace: str, host: str, port: int, client: str = "a") -> None:
    """The World has to know both pods before a verdict can be written."""
    eventually(
        lambda: takes_the_kernel_path(mesh, maps, namespace, host, port, client) is not None, 20, "the kernel path"
    )


def into(maps: Maps, address: str) -> list[Any]:
    """Flows to the pod at an address: others of the session's lab are nobody's business here."""
    return [(key, flow) for key, flow in maps.flows.items() if key.local == address]
