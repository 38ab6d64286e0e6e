"""One lab with the mesh for all proof tests; its logs are shown when a test fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator

import pytest

from ambient.errors import AmbientError
from tests.support.flows import Witness
from tests.support.mesh import Mesh, pod, service
from tests.support.require import require
from tests.support.upgrade import CopiedMesh


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    require("lab", "kubectl", "tcpdump")
    found = Mesh(f"p{os.getpid()}", nodes=2)
    try:
        found.up([])
        yield found
    finally:
        found.down()


@pytest.fixture(scope="session")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CopiedMesh]:
    """Another lab of one node on the same kernel, with the same addresses, from a copy of the programs."""
    require("lab", "kubectl")
    found = CopiedMesh(f"q{os.getpid()}", tmp_path_factory.mktemp("copy"))
    try:
        found.up([])
        yield found
    finally:
        found.down()


@pytest.fixture(scope="module")
def shop(mesh: Mesh) -> Iterator[str]:
    """a and c on node1, b on node2, in the mesh; a module may have another of the name."""
    with mesh.namespace(pod("a", "node1"), pod("b", "node2"), pod("c", "node1"), service("b"), service("c")) as name:
        yield name


@pytest.fixture(scope="module")
def outside(mesh: Mesh) -> Iterator[str]:
    """x on node1, not in the mesh."""
    with mesh.namespace(pod("x", "node1"), enrolled=False) as name:
        yield name


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str, Witness], None]:
    """Say how bytes went, on the test's output and in its report."""

    def telling(what: str, seen: Witness) -> None:
        print(f"{what}, {seen}")
        for direction in ("to_server", "to_client"):
            record_property(f"{what} {seen.acceleration} {direction}", str(getattr(seen, direction)))

    return telling


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    labs = [name for name in ("mesh", "neighbour") if name in getattr(item, "fixturenames", ())]
    for name in labs if report.failed and call.when == "call" else ():
        found = item.funcargs[name]  # type: ignore[attr-defined]
        for process in ("control", *(node.name for node in found.lab.plans())):
            try:
                text = "\n".join(found.log(process).splitlines()[-25:])
            except AmbientError as error:
                text = str(error)
            report.sections.append((f"log of {process} of {name}", text))
    return report
