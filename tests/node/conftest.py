"""A node that is loaded and started as a host's is, once for each file of tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.node.real_node import RealNode, real_node
from tests.support.require import require


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node() -> AsyncIterator[RealNode]:
    """Namespaces `shop` and `other` are in the mesh, `plain` is not."""
    require("bpf")
    async with real_node() as node:
        await node.namespace("shop", "ambient")
        await node.namespace("other", "ambient")
        await node.namespace("plain")
        yield node
