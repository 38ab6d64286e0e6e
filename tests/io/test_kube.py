"""The Kubernetes client against a scripted API server that speaks real HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web

from ambient.io import kube
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus, ApiUnreachable
from ambient.io.kube_auth import Credentials
from ambient.manifest.kinds import NAMESPACE, POD
from tests.io.kube_api import Api, pod, status


async def test_patches_carry_their_type_and_field_manager(api: Api, client: KubeClient) -> None:
    await client.patch(POD, "a", {"metadata": {}}, "shop", subresource="status")
    await client.patch(POD, "a", {"metadata": {"name": "a"}}, "shop", how="apply")
    (method, path, query, content_type, _), applied = api.requests
    assert (method, path) == ("PATCH", "/api/v1/namespaces/shop/pods/a/status")
    assert content_type == "application/merge-patch+json" and query["fieldManager"] == "ambient"
    assert applied[3] == "application/apply-patch+yaml" and applied[2]["force"] == "true"
    assert json.loads(applied[4])["kind"] == "Pod"


async def test_writes_name_kind_and_version_and_the_token_is_sent(api: Api, client: KubeClient) -> None:
    tokens: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        tokens.append(request.headers["Authorization"])
        return web.json_response({"metadata": {"name": "x"}}, status=201)

    api.answers.append(answer)
    made = await client.create(NAMESPACE, {"metadata": {"name": "x"}})
    assert made.name == "x" and tokens == ["Bearer secret"]
    assert json.loads(api.requests[0][4]) == {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}


async def test_a_refusal_says_code_and_reason(api: Api, client: KubeClient) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(status(409, "AlreadyExists"), status=409)

    api.answers.append(answer)
    with pytest.raises(ApiStatus) as refused:
        await client.create(NAMESPACE, {"metadata": {"name": "x"}})
    assert (refused.value.code, refused.value.reason) == (409, "AlreadyExists")


async def test_a_refused_token_is_read_again_once(api: Api, client: KubeClient, tmp_path: Any) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    client.credentials = Credentials(client.credentials.server, token_file=str(token))
    tokens: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        tokens.append(request.headers["Authorization"])
        token.write_text("new")
        if len(tokens) == 1:
            return web.json_response(status(401), status=401)
        return web.json_response(pod("a", 1))

    api.answers += [answer, answer]
    await client.get(POD, "a", "shop")
    assert tokens == ["Bearer old", "Bearer new"]


async def test_an_answer_that_is_no_list_is_refused(api: Api, client: KubeClient) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="<html>login</html>")

    api.lists.append(answer)
    with pytest.raises(ApiUnreachable, match="not a Kubernetes list"):
        await client.list(POD)


async def test_a_page_larger_than_the_limit_is_refused(
    api: Api, client: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "LIST_BYTES_MAX", 1000)
    api.list(*(pod(f"p{n}", n) for n in range(100)), version=7)
    with pytest.raises(ApiUnreachable, match="exceeds 1000 bytes"):
        await client.list(POD)
