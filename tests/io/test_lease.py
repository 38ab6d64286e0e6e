"""Leader election, against the lab's API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiUnreachable
from ambient.io.lease import Election
from tests.support.control_plane import Cluster, running_cluster

DURATION_S, DEADLINE_S = 1.5, 1.0


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as made:
        yield made


def election(client: KubeClient, identity: str) -> Election:
    return Election(
        client, "shop", "ambient-control", identity, duration_s=DURATION_S, retry_s=0.05, renew_deadline_s=DEADLINE_S
    )


async def test_the_next_leads_when_the_first_gives_the_lease_back(cluster: Cluster) -> None:
    one, two = election(cluster.client, "one"), election(cluster.client, "two")
    async with asyncio.timeout(10):
        await one.acquire()
        waiting = asyncio.create_task(two.acquire())
        holding = asyncio.create_task(one.hold())
        await asyncio.wait((waiting, holding), timeout=2 * DURATION_S)
        assert one.leading and not waiting.done() and not holding.done(), "it renews"
        holding.cancel()
        await one.release()
        await waiting
    assert two.leading and not one.leading


async def test_who_cannot_renew_stops_before_others_start_however_slowly_it_fails(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = election(cluster.client, "one")
    await one.acquire()
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def get(*_: Any, **__: Any) -> Any:
        if loop.time() - started < 0.8 * DEADLINE_S:
            raise ApiUnreachable("refused")
        await asyncio.Event().wait()  # and now no answer at all

    monkeypatch.setattr(cluster.client, "get", get)
    async with asyncio.timeout(10):
        await one.hold()
    assert not one.leading
    assert loop.time() - started < DURATION_S
