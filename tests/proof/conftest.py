"""One lab with the mesh for all proof tests; its logs are shown when a test fails."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ambient.errors import AmbientError
from tests.support.mesh import Mesh
from tests.support.require import require


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    require("lab", "kubectl", "tcpdump")
    found = Mesh(f"p{os.getpid()}", nodes=2)
    try:
        found.up([])
        yield found
    finally:
        found.down()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed and call.when == "call" and "mesh" in getattr(item, "fixturenames", ()):
        found = item.funcargs["mesh"]  # type: ignore[attr-defined]
        for process in ("control", "node1", "node2"):
            try:
                text = "\n".join(found.log(process).splitlines()[-25:])
            except AmbientError as error:
                text = str(error)
            report.sections.append((f"log of {process}", text))
    return report
