"""Watches over HTTPS: order, resuming without loss, bookmarks, selections, 410 and watchers that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ambient.io.kube import KubeClient
from ambient.io.kube_auth import from_kubeconfig
from ambient.io.reflector import Reflector
from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import CONFIG_MAP, POD
from ambient.lab.apiserver.store import DeleteOptions
from ambient.manifest.kinds import POD as POD_OBJECTS
from tests.lab_api.conftest import Cluster, until
from tests.lab_api.objects import pod, running

MAPS = "/api/v1/namespaces/default/configmaps"


def write(cluster: Cluster, name: str, **data: str) -> int:
    """Create or change a config map; the version of this write."""
    if cluster.store.find(CONFIG_MAP, "default", name) is None:
        obj = cluster.store.create(CONFIG_MAP, "default", {"metadata": {"name": name}, "data": data})
    else:
        obj = cluster.store.modify(CONFIG_MAP, "default", name, lambda o: o.update(data=data))
    return int(obj["metadata"]["resourceVersion"])


@asynccontextmanager
async def watching(cluster: Cluster, path: str = MAPS, **query: Any) -> AsyncIterator[Callable[[], Any]]:
    """The next event of a watch, by a function to await; None at its end."""
    parameters = {"watch": "1", **{key: str(value) for key, value in query.items()}}
    async with cluster.session.get(cluster.url + path, params=parameters) as response:
        assert response.status == 200, await response.text()

        async def event() -> Any:
            line = await asyncio.wait_for(response.content.readline(), 10)
            return json.loads(line) if line else None

        yield event


async def test_events_come_in_order_with_the_versions_of_the_writes(cluster: Cluster) -> None:
    start = cluster.store.history.version
    async with watching(cluster, resourceVersion=start) as event:
        versions = [write(cluster, "a"), write(cluster, "a", x="1")]
        cluster.store.delete(CONFIG_MAP, "default", "a")
        events = [await event() for _ in range(3)]
    assert [e["type"] for e in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [int(e["object"]["metadata"]["resourceVersion"]) for e in events] == [*versions, versions[-1] + 1]
    assert events[2]["object"]["data"] == {"x": "1"}


async def test_without_a_version_the_present_objects_come_first(cluster: Cluster) -> None:
    write(cluster, "a")
    async with watching(cluster) as event:
        assert (await event())["object"]["metadata"]["name"] == "a"
        write(cluster, "b")
        assert (await event())["object"]["metadata"]["name"] == "b"


async def test_initial_events_end_with_a_marked_bookmark(cluster: Cluster) -> None:
    write(cluster, "a")
    async with watching(
        cluster, sendInitialEvents="true", allowWatchBookmarks="true", resourceVersionMatch="NotOlderThan"
    ) as event:
        assert (await event())["type"] == "ADDED"
        bookmark = await event()
    assert bookmark["type"] == "BOOKMARK"
    assert bookmark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert int(bookmark["object"]["metadata"]["resourceVersion"]) == cluster.store.history.version


async def test_a_forgotten_version_ends_the_watch_with_410_and_a_known_one_does_not(
    new_cluster: Callable[..., Any],
) -> None:
    cluster = await new_cluster(changes_max=3)
    first = write(cluster, "a")
    for number in range(5):
        last = write(cluster, "a", n=str(number))
    async with watching(cluster, resourceVersion=first) as event:
        error = await event()
        assert (error["type"], error["object"]["code"], error["object"]["reason"]) == ("ERROR", 410, "Expired")
        assert await event() is None
    async with watching(cluster, resourceVersion=last - 1) as event:
        assert (await event())["object"]["data"] == {"n": "4"}


async def test_a_version_of_the_future_is_refused_with_410(cluster: Cluster) -> None:
    async with watching(cluster, resourceVersion=cluster.store.history.version + 5) as event:
        assert (await event())["object"]["code"] == 410


async def test_bookmarks_carry_versions_of_other_kinds_and_the_watch_ends_on_time(
    new_cluster: Callable[..., Any],
) -> None:
    cluster = await new_cluster(bookmark_interval_s=0.05)
    start = cluster.store.history.version
    async with watching(cluster, resourceVersion=start, allowWatchBookmarks="true", timeoutSeconds=1) as event:
        cluster.store.create(schema.SECRET, "default", {"metadata": {"name": "s"}})
        seen = []
        while (bookmark := await event()) is not None:
            seen.append(bookmark)
    assert {e["type"] for e in seen} == {"BOOKMARK"}
    assert int(seen[-1]["object"]["metadata"]["resourceVersion"]) == cluster.store.history.version > start
    assert seen[0]["object"]["kind"] == "ConfigMap"


async def test_no_bookmarks_come_unasked(new_cluster: Callable[..., Any]) -> None:
    cluster = await new_cluster(bookmark_interval_s=0.01)
    async with watching(cluster, resourceVersion=cluster.store.history.version, timeoutSeconds=1) as event:
        assert await event() is None


async def test_a_watch_resumed_at_its_last_version_loses_nothing_under_concurrent_writes(cluster: Cluster) -> None:
    total, seen = 400, []
    version = start = cluster.store.history.version

    async def writer() -> None:
        for number in range(total):
            write(cluster, f"m{number % 7}", n=str(number))
            if number % 5 == 0:
                await asyncio.sleep(0)

    task = asyncio.create_task(writer())
    while len(seen) < total:
        async with watching(cluster, resourceVersion=version) as event:
            for _ in range(min(37, total - len(seen))):  # then hang up and come back
                found = await event()
                version = int(found["object"]["metadata"]["resourceVersion"])
                seen.append(version)
    await task
    assert seen == list(range(start + 1, start + total + 1))


async def test_a_selection_shows_objects_entering_and_leaving_it(cluster: Cluster) -> None:
    store = cluster.store
    async with watching(
        cluster, "/api/v1/pods", resourceVersion=store.history.version, fieldSelector="spec.nodeName=n1"
    ) as event:
        store.create(POD, "default", pod("one"))
        store.create(POD, "default", pod("two", nodeName="n2"))
        store.bind("default", "one", "n1")
        store.modify(POD, "default", "one", lambda o: o.update(status=running("10.0.0.1")), subresource="status")
        events = [await event(), await event()]
    assert [(e["type"], e["object"]["metadata"]["name"]) for e in events] == [("ADDED", "one"), ("MODIFIED", "one")]
    labelled = lambda value: lambda o: o["metadata"].update(labels={"app": value})  # noqa: E731
    async with watching(
        cluster, "/api/v1/pods", resourceVersion=store.history.version, labelSelector="app in (x)"
    ) as event:
        for value in ("x", "y", "z", "x"):
            store.modify(POD, "default", "one", labelled(value))
        assert [(await event())["type"] for _ in range(3)] == ["ADDED", "DELETED", "ADDED"]


async def test_a_watch_of_one_namespace_does_not_show_another(cluster: Cluster) -> None:
    async with watching(cluster, resourceVersion=cluster.store.history.version) as event:
        cluster.store.create(CONFIG_MAP, "kube-system", {"metadata": {"name": "elsewhere"}})
        write(cluster, "here")
        assert (await event())["object"]["metadata"]["name"] == "here"


async def test_a_watcher_that_does_not_read_is_dropped_and_others_are_served(new_cluster: Callable[..., Any]) -> None:
    cluster = await new_cluster(write_timeout_s=2.0, changes_max=10_000)
    host, port = cluster.url.removeprefix("https://").split(":")
    raw = socket.create_connection((host, int(port)))
    raw.settimeout(10)
    version = cluster.store.history.version

    def begin() -> ssl.SSLSocket:
        lazy = cluster.tls.wrap_socket(raw, server_hostname=host)
        lazy.sendall(f"GET {MAPS}?watch=1&resourceVersion={version} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        lazy.recv(1)
        return lazy

    lazy = await asyncio.to_thread(begin)
    async with watching(cluster, resourceVersion=version) as event:
        for number in range(100):
            write(cluster, "big", n=str(number) + "x" * 500_000)
        for _ in range(100):
            assert (await event())["type"] in ("ADDED", "MODIFIED")

        await until(lambda: cluster.server.watches == 1)
        write(cluster, "small")
        assert (await event())["object"]["metadata"]["name"] == "small"
    lazy.close()


async def test_too_many_watches_are_refused_with_429(new_cluster: Callable[..., Any]) -> None:
    cluster = await new_cluster(watches_max=1)
    async with watching(cluster):
        code, status = await cluster.call("GET", f"{MAPS}?watch=1")
        assert (code, status["reason"]) == (429, "TooManyRequests")


async def test_stopping_the_server_ends_watches(new_cluster: Callable[..., Any]) -> None:
    cluster = await new_cluster()
    async with watching(cluster) as event:
        await asyncio.wait_for(cluster.server.stop(), 5)
        with pytest.raises(Exception):  # noqa: B017 - the connection ends one way or another
            assert await event() is not None


async def test_our_reflector_follows_through_writes_and_a_forgotten_version(new_cluster: Callable[..., Any]) -> None:
    cluster = await new_cluster(changes_max=50)
    for number in range(5):
        cluster.store.create(POD, "default", pod(f"p{number}", nodeName="n1" if number % 2 else "n2"))
    async with KubeClient(from_kubeconfig(str(cluster.kubeconfig))) as client:
        reflector = Reflector(
            client, POD_OBJECTS, lambda _: None, field_selector="spec.nodeName=n1", backoff=lambda _: 0.01
        )
        task = asyncio.create_task(reflector.run())
        async with asyncio.timeout(10):
            await reflector.synced.wait()
            assert sorted(reflector.objects) == ["default/p1", "default/p3"]
            for number in range(200):  # more than the history holds, at one go: the watcher falls behind
                name = f"q{number}"
                cluster.store.create(POD, "default", pod(name, nodeName="n1"))
                if number < 190:
                    cluster.store.modify(POD, "default", name, lambda o: o["metadata"].update(labels={"a": "b"}))
            await until(lambda: len(reflector.objects) == 202)
            for number in range(200):
                cluster.store.delete(POD, "default", f"q{number}", DeleteOptions(grace_period_s=0))
            await until(lambda: len(reflector.objects) == 2)
        assert reflector.relists >= 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_client_that_hangs_up_frees_its_watch(cluster: Cluster) -> None:
    async with watching(cluster):
        assert cluster.server.watches == 1
    await until(lambda: cluster.server.watches == 0)
