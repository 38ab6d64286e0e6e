"""What each process of a node leaves out: heavy packages it has no use for cost megabytes on every node."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORKER = "ztunnel.io.run, ztunnel.io.worker"
"""What the parent has when it forks; the control process adds its own."""
TOOLS = {"bcc", "pyroute2", "click", "rich"}
LIBRARIES = {"grpc", "google.protobuf", "aiohttp", "cryptography", "prometheus_client"}
LEFT_OUT = {
    "ambient.node.holder": {"asyncio", "ssl", *TOOLS, *LIBRARIES},
    "ambient.node.agent": {"cryptography", "prometheus_client", *TOOLS},
    WORKER: {*TOOLS, *LIBRARIES},
    f"{WORKER}, ztunnel.io.control": {"aiohttp", *TOOLS},
}
"""Modules of a process -> what they must not bring in."""


@pytest.mark.parametrize("modules", LEFT_OUT)
def test_a_process_of_the_node_imports_nothing_heavy_that_it_has_no_use_for(modules: str) -> None:
    code = f"import {modules}, sys; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert set(modules.split(", ")) <= loaded
    assert not LEFT_OUT[modules] & loaded
