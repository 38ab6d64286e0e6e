"""The reflector against a scripted API server that speaks real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from ambient.io import kube
from ambient.io.kube import KubeClient
from ambient.io.kube_auth import Credentials
from ambient.io.reflector import Reflector
from ambient.manifest.kinds import AUTHORIZATION_POLICY, POD, Changed
from ambient.manifest.objects import Pod
from tests.io.kube_api import Api, Handler, bookmark, event, pod, status


class Seen:
    """What a reflector reported."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.problems: dict[str, Any] = {}
        self.changed = asyncio.Condition()

    def event(self, change: Changed[Pod]) -> None:
        kind = "deleted" if change.new is None else "added" if change.old is None else "changed"
        item = change.new or change.old
        assert item is not None
        self.events.append((kind, item.name, item.metadata.resource_version))

    def problem(self, key: str, problem: Any) -> None:
        self.problems[key] = problem


@pytest.fixture
async def seen() -> AsyncIterator[Seen]:
    yield Seen()


class Running:
    """A reflector in a task."""

    def __init__(self, client: KubeClient, seen: Seen, **options: Any) -> None:
        options = {"backoff": lambda _attempt: 0.0} | options
        self.reflector = Reflector(client, POD, seen.event, on_problem=seen.problem, **options)

    async def __aenter__(self) -> Reflector[Pod]:
        self.task = asyncio.create_task(self.reflector.run())
        return self.reflector

    async def __aexit__(self, *_: object) -> None:
        assert not self.task.done(), self.task
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_a_list_is_read_page_by_page_and_watched_from_its_version(
    api: Api, client: KubeClient, seen: Seen
) -> None:
    api.list(pod("a", 1), version=7, token="next").list(pod("b", 2), version=7)
    async with Running(client, seen, field_selector="spec.nodeName=n1", label_selector="app=x") as reflector:
        await api.watched(1)
        assert reflector.synced.is_set()
        assert set(reflector.objects) == {"shop/a", "shop/b"}
    assert seen.events == [("added", "a", "1"), ("added", "b", "2")]
    assert api.list_queries[0] == {"limit": "500", "fieldSelector": "spec.nodeName=n1", "labelSelector": "app=x"}
    assert api.list_queries[1]["continue"] == "next"
    watch = api.watch_queries[0]
    assert watch["resourceVersion"] == "7" and watch["allowWatchBookmarks"] == "true"
    assert 300 <= int(watch["timeoutSeconds"]) <= 600
    assert watch["fieldSelector"] == "spec.nodeName=n1"


async def test_every_event_moves_the_version_and_the_copy(api: Api, client: KubeClient, seen: Seen) -> None:
    api.list(pod("a", 1), version=7)
    api.watch(event("ADDED", pod("b", 8)), event("MODIFIED", pod("a", 9, app="x")), event("DELETED", pod("b", 10)))
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert reflector.objects["shop/a"].labels == {"app": "x"}
        assert set(reflector.objects) == {"shop/a"}
    assert seen.events[1:] == [("added", "b", "8"), ("changed", "a", "9"), ("deleted", "b", "8")]
    assert api.watch_queries[1]["resourceVersion"] == "10"


@pytest.mark.parametrize("answer", [{}, {"metadata": {}, "items": []}, {"kind": "Status", "code": 200}])
async def test_an_answer_that_is_no_list_empties_nothing(
    api: Api, client: KubeClient, seen: Seen, answer: dict[str, Any]
) -> None:
    api.list(pod("a", 1), version=7).watch_fails(410)

    async def no_list(_: web.Request) -> web.Response:
        return web.json_response(answer)

    api.lists.append(no_list)
    api.list(pod("a", 1), version=8)
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert set(reflector.objects) == {"shop/a"}
    assert seen.events == [("added", "a", "1")]


@pytest.mark.parametrize("first", [bookmark(5), event("MODIFIED", pod("a", 6, app="x"))])
async def test_a_server_that_went_back_in_time_is_listed_again(
    api: Api, client: KubeClient, seen: Seen, first: bytes
) -> None:
    api.list(pod("a", 3), pod("b", 4), version=7).watch(first, hang=True)
    api.list(pod("a", 3, app="restored"), version=6)
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert reflector.objects["shop/a"].labels == {"app": "restored"}
    assert seen.events[2:] == [("changed", "a", "3"), ("deleted", "b", "4")]
    assert api.watch_queries[1]["resourceVersion"] == "6"


async def test_another_object_of_the_same_name_is_not_a_change_of_the_first(
    api: Api, client: KubeClient, seen: Seen
) -> None:
    first, second = pod("a", 3), pod("a", 9)
    first["metadata"]["uid"], second["metadata"]["uid"] = "one", "two"
    api.list(first, version=7).watch_fails(410).list(second, version=10)
    async with Running(client, seen):
        await api.watched(2)
    assert seen.events == [("added", "a", "3"), ("deleted", "a", "3"), ("added", "a", "9")]


async def test_a_bookmark_moves_the_version_and_reports_nothing(api: Api, client: KubeClient, seen: Seen) -> None:
    api.list(version=7).watch(bookmark(4711))
    async with Running(client, seen):
        await api.watched(2)
    assert api.watch_queries[1]["resourceVersion"] == "4711"
    assert seen.events == []
    assert len(api.list_queries) == 1


@pytest.mark.parametrize("how", ["in the stream", "as HTTP status", "in the stream by reason only"])
async def test_an_expired_version_lists_again_and_reports_the_difference(
    api: Api, client: KubeClient, seen: Seen, how: str
) -> None:
    api.list(pod("gone", 1), pod("same", 2), pod("old", 3), version=7)
    if how == "as HTTP status":
        api.watch_fails(410)
    elif how == "in the stream":
        api.watch(event("ERROR", status(410, "Expired")))
    else:
        api.watch(event("ERROR", {"reason": "Expired", "message": "too old"}))
    api.list(pod("same", 2), pod("old", 9), pod("new", 8), version=20)
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert set(reflector.objects) == {"shop/same", "shop/old", "shop/new"}
    assert sorted(seen.events[3:]) == [("added", "new", "8"), ("changed", "old", "9"), ("deleted", "gone", "1")]
    assert api.watch_queries[1]["resourceVersion"] == "20"


async def test_the_old_copy_serves_until_the_new_list_is_complete(api: Api, client: KubeClient, seen: Seen) -> None:
    api.list(pod("a", 1), version=7).watch_fails(410)
    copies: list[set[str]] = []
    running = Running(client, seen)

    async def look(_: web.Request) -> web.Response:
        copies.append(set(running.reflector.objects))
        return web.json_response({"metadata": {"resourceVersion": "9", "continue": ""}, "items": []})

    api.lists.append(look)
    async with running:
        await api.watched(2)
    assert copies == [{"shop/a"}]
    assert running.reflector.objects == {}


async def test_a_version_that_stays_expired_is_asked_for_with_pauses(api: Api, client: KubeClient, seen: Seen) -> None:
    pauses: list[int] = []

    def backoff(attempt: int) -> float:
        pauses.append(attempt)
        return 0.0

    for _ in range(4):
        api.list(version=7).watch_fails(410)
    api.list(version=8)
    async with Running(client, seen, backoff=backoff):
        await api.watched(5)
    assert pauses == [2, 3, 4]


async def test_a_dropped_connection_goes_on_from_the_last_version(api: Api, client: KubeClient, seen: Seen) -> None:
    api.list(version=7).watch_drops(event("ADDED", pod("a", 8)))
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert set(reflector.objects) == {"shop/a"}
    assert api.watch_queries[1]["resourceVersion"] == "8"
    assert len(api.list_queries) == 1


async def test_half_an_event_at_the_end_is_not_believed(api: Api, client: KubeClient, seen: Seen) -> None:
    whole = event("ADDED", pod("a", 8))
    api.list(version=7).watch(whole, event("ADDED", pod("b", 9))[:-20])
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert set(reflector.objects) == {"shop/a"}
    assert api.watch_queries[1]["resourceVersion"] == "8"


async def test_a_silent_watch_is_given_up_and_asked_again(api: Api, client: KubeClient, seen: Seen) -> None:
    api.list(version=7).watch(bookmark(9), hang=True)
    async with Running(client, seen, stall_timeout_s=0.05):
        await api.watched(2)
    assert api.watch_queries[1]["resourceVersion"] == "9"


async def test_a_server_that_ends_every_watch_at_once_is_not_hammered(api: Api, client: KubeClient, seen: Seen) -> None:
    pauses: list[int] = []

    def backoff(attempt: int) -> float:
        pauses.append(attempt)
        return 0.0

    api.list(version=7).watch().watch().watch()
    async with Running(client, seen, backoff=backoff):
        await api.watched(4)
    assert pauses == [0, 1, 2]


async def test_a_very_long_line_is_one_event(api: Api, client: KubeClient, seen: Seen) -> None:
    long = pod("long", 8, note="x" * 3_000_000)
    raw = event("ADDED", long)
    api.list(version=7).watch(raw[:1_000_000], raw[1_000_000:], event("ADDED", pod("b", 9)))
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert len(reflector.objects["shop/long"].labels["note"]) == 3_000_000
        assert "shop/b" in reflector.objects


async def test_a_line_without_end_is_refused(
    api: Api, client: KubeClient, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "LINE_BYTES_MAX", 100_000)
    api.list(version=7).watch(bookmark(8), b'{"type": "' + b"x" * 200_000, hang=True)
    async with Running(client, seen):
        await api.watched(2)
    assert api.watch_queries[1]["resourceVersion"] == "8"


async def test_too_many_requests_waits_as_long_as_told(
    api: Api, client: KubeClient, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(delay: float) -> None:
        slept.append(delay)
        await real(0)

    monkeypatch.setattr("ambient.io.kube.asyncio.sleep", sleep)
    api.list_fails(429, {"Retry-After": "3"}).list(pod("a", 1), version=7).watch_fails(429, {"Retry-After": "5"})
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert set(reflector.objects) == {"shop/a"}
    assert slept[:2] == [3.0, 5.0]
    assert api.watch_queries[1]["resourceVersion"] == "7"


@pytest.mark.parametrize("header", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "soon", "-1", "\u00b2"])
async def test_a_time_to_wait_that_is_none_is_left_to_the_backoff(
    api: Api, client: KubeClient, seen: Seen, header: str
) -> None:
    api.list(pod("a", 1), version=7).watch_fails(429, {"Retry-After": header})
    async with Running(client, seen):
        await api.watched(2)


async def test_a_kind_that_is_not_installed_counts_as_empty_and_is_asked_for_again(
    api: Api, client: KubeClient
) -> None:
    api.list_fails(404).list({"metadata": {"name": "p", "namespace": "shop", "resourceVersion": "3"}}, version=7)
    reflector = Reflector(client, AUTHORIZATION_POLICY, lambda _: None, absent_retry_s=0.01)
    task = asyncio.create_task(reflector.run())
    async with asyncio.timeout(5):
        await reflector.synced.wait()
        assert reflector.objects == {}
        await api.watched(1)
    assert set(reflector.objects) == {"shop/p"}
    task.cancel()


async def test_one_404_takes_no_policy_away_but_a_second_does(api: Api, client: KubeClient) -> None:
    policy = {"metadata": {"name": "p", "namespace": "shop", "resourceVersion": "3"}}
    api.list(policy, version=7).watch_fails(404)
    copies: list[set[str]] = []
    reflector = Reflector(client, AUTHORIZATION_POLICY, lambda _: None, absent_retry_s=0.01)

    def failing(code: int) -> Handler:
        async def answer(_: web.Request) -> web.Response:
            copies.append(set(reflector.objects))
            return web.json_response(status(code), status=code)

        return answer

    api.lists += [failing(404), failing(404)]
    api.list(version=9)
    task = asyncio.create_task(reflector.run())
    await api.watched(2)
    assert copies == [{"shop/p"}, set()]
    task.cancel()


async def test_a_404_of_a_core_kind_is_a_failure_not_an_empty_cluster(api: Api, client: KubeClient, seen: Seen) -> None:
    api.list(pod("a", 1), version=7).watch_fails(404).watch_fails(404)
    async with Running(client, seen) as reflector:
        await api.watched(3)
        assert set(reflector.objects) == {"shop/a"}


async def test_an_object_that_does_not_decode_is_reported_and_the_rest_stays(
    api: Api, client: KubeClient, seen: Seen
) -> None:
    bad = pod("bad", 2) | {"spec": {"hostNetwork": "yes"}}
    api.list(pod("a", 1), bad, version=7)
    api.watch(event("MODIFIED", pod("a", 8) | {"spec": 5}), event("MODIFIED", pod("bad", 9)))
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert seen.problems["shop/bad"] is None  # it was repaired
        assert reflector.objects["shop/a"].metadata.resource_version == "1"  # the last good form
        assert "shop/bad" in reflector.objects
        assert str(seen.problems["shop/a"]).startswith("Pod shop/a: spec: Expected `object`")
    assert api.watch_queries[1]["resourceVersion"] == "9"


async def test_text_that_is_no_utf8_is_a_problem_of_its_object_and_of_nobody_else(
    api: Api, client: KubeClient, seen: Seen
) -> None:
    def broken(raw: bytes) -> bytes:
        assert b"BROKEN" in raw
        return raw.replace(b"BROKEN", b"\xff\xfe")

    async def again(_: web.Request) -> web.Response:
        items = [pod("a", 10, app="BROKEN"), pod("b", 3)]
        body = json.dumps({"metadata": {"resourceVersion": "10"}, "items": items}).encode()
        return web.Response(body=broken(body), content_type="application/json")

    api.list(pod("a", 1), pod("b", 3), version=7)
    api.watch(broken(event("MODIFIED", pod("a", 8, app="BROKEN"))), event("MODIFIED", pod("b", 9)))
    api.watch_fails(410).lists.append(again)
    async with Running(client, seen) as reflector:
        await api.watched(3)
        assert reflector.objects["shop/a"].metadata.resource_version == "1"  # the last good form
        assert "shop/a" in seen.problems and set(reflector.objects) == {"shop/a", "shop/b"}
    assert api.watch_queries[1]["resourceVersion"] == "9"


async def test_an_object_that_is_bad_in_a_new_list_is_not_taken_for_deleted(
    api: Api, client: KubeClient, seen: Seen
) -> None:
    api.list(pod("a", 1), version=7).watch_fails(410).list(pod("a", 2) | {"spec": 5}, version=9)
    async with Running(client, seen) as reflector:
        await api.watched(2)
        assert set(reflector.objects) == {"shop/a"}
    assert seen.events == [("added", "a", "1")]


async def test_a_reflector_survives_an_api_server_that_is_away(seen: Seen) -> None:
    tries = 0
    enough = asyncio.Event()

    def backoff(_attempt: int) -> float:
        nonlocal tries
        tries += 1
        if tries == 2:
            enough.set()
        return 0.0

    client = KubeClient(Credentials("http://127.0.0.1:1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ambient.io.kube.RETRIES_MAX", 0)
        async with asyncio.timeout(10), Running(client, seen, backoff=backoff) as reflector:
            await enough.wait()
            assert not reflector.synced.is_set()
    await client.close()


# -- the client alone


@pytest.mark.parametrize("where", ["spec", "status"])
@pytest.mark.parametrize("depth", [200, 800, 3000, 9000])
async def test_an_object_that_is_nested_without_end_hides_no_other(
    api: Api, client: KubeClient, where: str, depth: int
) -> None:
    def policy(name: str, version: int, **more: str) -> str:
        meta = json.dumps({"name": name, "namespace": "shop", "resourceVersion": str(version)})
        fields = {"spec": '{"action": "DENY"}'} | more
        return f'{{"metadata": {meta}, {", ".join(f"{json.dumps(k)}: {v}" for k, v in fields.items())}}}'

    deep = {where: '{"a":' * depth + "1" + "}" * depth}
    page = f'{{"metadata": {{"resourceVersion": "9"}}, "items": [{policy("a", 1)}, {policy("b", 2, **deep)}]}}'

    async def listed(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="application/json")

    api.lists.append(listed)
    events = [("ADDED", policy("c", 10)), ("MODIFIED", policy("b", 11, **deep)), ("MODIFIED", policy("a", 12))]
    api.watch(*(f'{{"type": "{kind}", "object": {item}}}\n'.encode() for kind, item in events))
    told: dict[str, Any] = {}
    reflector = Reflector(
        client,
        AUTHORIZATION_POLICY,
        lambda _: None,
        on_problem=lambda key, problem: told.update({key: problem}),
        backoff=lambda _: 0.0,
    )
    task = asyncio.create_task(reflector.run())
    await api.watched(2)
    assert not task.done()
    task.cancel()
    assert {"shop/a", "shop/c"} <= set(reflector.objects)
    assert reflector.objects["shop/a"].metadata.resource_version == "12"
    found = reflector.objects.get("shop/b")
    if where == "status" and found is not None:
        assert found.status is None and told == {}
    else:
        assert found is None and "nested" in str(told["shop/b"])
