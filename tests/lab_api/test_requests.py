"""Requests over HTTPS: the forms of answers, patches, paging, deletion, refusals and who may do what."""

from __future__ import annotations

import json
import ssl
from typing import Any

import aiohttp
import pytest
import yaml

from ambient.io.kube_auth import from_kubeconfig
from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import CONFIG_MAP, POD, SERVICE_ACCOUNT
from tests.lab_api.conftest import Cluster
from tests.lab_api.objects import deployment, pod, running

MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"


async def test_an_object_is_created_read_replaced_and_deleted(cluster: Cluster) -> None:
    code, made = await cluster.call("POST", MAPS, {"metadata": {"name": "m"}, "data": {"a": "1"}})
    assert (code, made["kind"], made["apiVersion"]) == (201, "ConfigMap", "v1")
    assert await cluster.call("GET", f"{MAPS}/m") == (200, made)
    code, changed = await cluster.call("PUT", f"{MAPS}/m", {**made, "data": {"a": "2"}})
    assert code == 200 and changed["metadata"]["resourceVersion"] > made["metadata"]["resourceVersion"]
    code, status = await cluster.call("PUT", f"{MAPS}/m", made)
    assert (code, status["kind"], status["reason"]) == (409, "Status", "Conflict")
    code, status = await cluster.call("DELETE", f"{MAPS}/m")
    assert (code, status["status"], status["details"]["name"]) == (200, "Success", "m")
    code, status = await cluster.call("GET", f"{MAPS}/m")
    assert (code, status["message"]) == (404, 'configmaps "m" not found')


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "/api/v1/nonsense", None, 404),
        ("GET", "/apis/none/v1/things", None, 404),
        ("GET", "/api/v1/pods/one", None, 404),
        ("GET", f"{PODS}/one/nonsense", None, 404),
        ("POST", f"{MAPS}/m", {}, 405),
        ("PUT", MAPS, {}, 405),
        ("POST", MAPS, b"{", 400),
        ("POST", MAPS, [1], 400),
        ("POST", MAPS, {"kind": "Pod"}, 400),
        ("POST", MAPS, {"apiVersion": "v2"}, 400),
        ("POST", MAPS, {"metadata": {"name": "m", "namespace": "other"}}, 400),
        ("POST", MAPS, {"metadata": {"name": "m", "resourceVersion": "5"}}, 400),
        ("POST", MAPS, b"[" * 100_000, 400),
        ("POST", MAPS, b" " * (3 * 1024 * 1024 + 1), 413),
        ("GET", f"{MAPS}?labelSelector=a%3D%3D%3Db", None, 400),
        ("GET", f"{MAPS}?fieldSelector=spec.secret%3Dx", None, 400),
        ("GET", f"{MAPS}?limit=many", None, 400),
        ("GET", f"{MAPS}?resourceVersion=new", None, 400),
        ("GET", f"{MAPS}?continue=nonsense", None, 410),
        ("DELETE", f"{MAPS}?propagationPolicy=Sideways", None, 400),
        ("DELETE", f"{MAPS}/m?gracePeriodSeconds=-1", None, 400),
        ("DELETE", f"{MAPS}/m?dryRun=some", None, 400),
        ("DELETE", "/api/v1/namespaces/default", None, 403),
        ("GET", "/apis/authentication.k8s.io/v1/tokenreviews", None, 405),
    ],
)
async def test_a_request_that_makes_no_sense_gets_its_code_and_a_status(
    cluster: Cluster, method: str, path: str, body: Any, code: int
) -> None:
    found, status = await cluster.call(method, path, body)
    assert (found, status["kind"], status["status"], status["code"]) == (code, "Status", "Failure", code)
    assert status["message"]
    assert (await cluster.call("GET", "/api/v1/namespaces/default"))[0] == 200


async def test_an_unknown_patch_type_and_a_strategic_patch_of_a_custom_kind_are_refused(cluster: Cluster) -> None:
    await cluster.call("POST", MAPS, {"metadata": {"name": "m"}})
    code, _ = await cluster.call("PATCH", f"{MAPS}/m", {}, headers={"Content-Type": "application/json"})
    assert code == 415
    policies = "/apis/security.istio.io/v1/namespaces/default/authorizationpolicies"
    await cluster.call("POST", policies, {"metadata": {"name": "p"}, "spec": {}})
    strategic = {"Content-Type": "application/strategic-merge-patch+json"}
    assert (await cluster.call("PATCH", f"{policies}/p", {}, headers=strategic))[0] == 415
    merge = {"Content-Type": "application/merge-patch+json"}
    code, patched = await cluster.call("PATCH", f"{policies}/p", {"spec": {"action": "DENY"}}, headers=merge)
    assert (code, patched["spec"]) == (200, {"action": "DENY"})


async def test_an_object_is_served_in_each_version_of_its_kind(cluster: Cluster) -> None:
    base = "/apis/security.istio.io/{}/namespaces/default/authorizationpolicies"
    body = {"apiVersion": "security.istio.io/v1beta1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"}}
    code, made = await cluster.call("POST", base.format("v1beta1"), body)
    assert (code, made["apiVersion"]) == (201, "security.istio.io/v1beta1")
    assert (await cluster.call("GET", base.format("v1") + "/p"))[1]["apiVersion"] == "security.istio.io/v1"
    _, listed = await cluster.call("GET", base.format("v1beta1"))
    assert {item["apiVersion"] for item in listed["items"]} == {"security.istio.io/v1beta1"}
    assert (await cluster.call("POST", base.format("v1"), body))[0] == 400


async def test_a_table_has_the_columns_and_words_of_kubectl(cluster: Cluster) -> None:
    store = cluster.store
    store.create(POD, "default", pod("one"))
    store.bind("default", "one", "n1")
    store.modify(POD, "default", "one", lambda o: o.update(status=running("10.0.0.9")), subresource="status")
    cluster.clock.advance(125)
    code, table = await cluster.call("GET", PODS, headers={"Accept": TABLE})
    assert (code, table["kind"]) == (200, "Table")
    shown = [column["name"] for column in table["columnDefinitions"] if column["priority"] == 0]
    assert shown == ["Name", "Ready", "Status", "Restarts", "Age"]
    assert table["rows"][0]["cells"][:7] == ["one", "1/1", "Running", "0", "2m5s", "10.0.0.9", "n1"]
    assert table["rows"][0]["object"]["kind"] == "PartialObjectMetadata"


async def test_answers_come_as_metadata_or_yaml_when_asked_and_nothing_else_is_promised(cluster: Cluster) -> None:
    partial = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
    _, listed = await cluster.call("GET", "/api/v1/namespaces", headers={"Accept": partial})
    assert listed["kind"] == "PartialObjectMetadataList" and "spec" not in listed["items"][0]
    url = cluster.url + "/api/v1/namespaces/default"
    async with cluster.session.get(url, headers={"Accept": "application/yaml"}) as response:
        assert yaml.safe_load(await response.text())["kind"] == "Namespace"
    assert (await cluster.call("GET", "/api/v1/namespaces", headers={"Accept": "text/html"}))[0] == 406


async def test_a_list_is_paged_and_selected(cluster: Cluster) -> None:
    for number in range(5):
        labels = {"odd": str(number % 2)}
        cluster.store.create(CONFIG_MAP, "default", {"metadata": {"name": f"m{number}", "labels": labels}})
    names, token = [], ""
    while True:
        _, page = await cluster.call("GET", f"{MAPS}?limit=2&continue={token}")
        names += [item["metadata"]["name"] for item in page["items"]]
        token = page["metadata"].get("continue", "")
        if not token:
            break
    assert names == [f"m{number}" for number in range(5)]
    _, odd = await cluster.call("GET", f"{MAPS}?labelSelector=odd%3D1")
    assert [item["metadata"]["name"] for item in odd["items"]] == ["m1", "m3"]
    _, one = await cluster.call("GET", f"{MAPS}?fieldSelector=metadata.name%3Dm2")
    assert [item["metadata"]["name"] for item in one["items"]] == ["m2"]


async def test_a_collection_is_deleted_by_its_selection(cluster: Cluster) -> None:
    for name, labels in (("a", {"x": "1"}), ("b", {"x": "2"})):
        cluster.store.create(CONFIG_MAP, "default", {"metadata": {"name": name, "labels": labels}})
    code, deleted = await cluster.call("DELETE", f"{MAPS}?labelSelector=x%3D1")
    assert code == 200 and [item["metadata"]["name"] for item in deleted["items"]] == ["a"]
    assert cluster.store.find(CONFIG_MAP, "default", "b") is not None


async def test_scale_reads_and_writes_replicas(cluster: Cluster) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments"
    await cluster.call("POST", path, deployment())
    _, scale = await cluster.call("GET", f"{path}/web/scale")
    assert (scale["kind"], scale["spec"]["replicas"], scale["status"]["selector"]) == ("Scale", 2, "app=web")
    code, _ = await cluster.call("PUT", f"{path}/web/scale", {**scale, "spec": {"replicas": 4}})
    assert code == 200
    assert cluster.store.get(schema.DEPLOYMENT, "default", "web")["spec"]["replicas"] == 4
    assert (await cluster.call("PUT", f"{path}/web/scale", {**scale, "spec": {"replicas": 5}}))[0] == 409
    assert (await cluster.call("PUT", f"{path}/web/scale", {"spec": {"replicas": -1}}))[0] == 400


async def test_server_side_apply_creates_then_merges_then_conflicts(cluster: Cluster) -> None:
    kind = {"Content-Type": "application/apply-patch+yaml"}

    def body(**data: str) -> bytes:
        manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": data}
        return yaml.safe_dump(manifest).encode()

    code, _ = await cluster.call("PATCH", f"{MAPS}/m?fieldManager=one", body(a="1"), headers=dict(kind))
    assert code == 201
    code, both = await cluster.call("PATCH", f"{MAPS}/m?fieldManager=two", body(b="2"), headers=dict(kind))
    assert (code, both["data"]) == (200, {"a": "1", "b": "2"})
    code, status = await cluster.call("PATCH", f"{MAPS}/m?fieldManager=two", body(a="3"), headers=dict(kind))
    assert (code, status["details"]["causes"][0]["field"]) == (409, ".data.a")
    code, forced = await cluster.call("PATCH", f"{MAPS}/m?fieldManager=two&force=true", body(a="3"), headers=dict(kind))
    assert (code, forced["data"]) == (200, {"a": "3"})
    assert (await cluster.call("PATCH", f"{MAPS}/m", body(a="3"), headers=dict(kind)))[0] == 400


async def test_yaml_aliases_are_refused_and_dates_stay_text(cluster: Cluster) -> None:
    kind = {"Content-Type": "application/yaml"}
    bomb = b"metadata: {name: m}\ndata: &a {x: y}\nbinaryData: *a\n"
    code, status = await cluster.call("POST", MAPS, bomb, headers=dict(kind))
    assert code == 400 and "aliases" in status["message"]
    code, made = await cluster.call("POST", MAPS, b"metadata: {name: m}\ndata: {day: 2026-01-02}", headers=dict(kind))
    assert (code, made["data"]["day"]) == (201, "2026-01-02")


# --- who may do what ------------------------------------------------------------------------------------


async def token(cluster: Cluster, namespace: str, account: str, **spec: Any) -> str:
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    code, answer = await cluster.call("POST", path, {"spec": spec})
    assert code == 201, answer
    return str(answer["status"]["token"])


async def as_bearer(cluster: Cluster, credential: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """A request with a bearer token and no client certificate."""
    plain = ssl.create_default_context(cadata=cluster.server.ca_pem.decode())
    headers = {"Content-Type": "application/json"}
    if credential:
        headers["Authorization"] = f"Bearer {credential}"
    data = None if body is None else json.dumps(body)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=plain)) as session,
        session.request(method, cluster.url + path, data=data, headers=headers) as response,
    ):
        text = await response.read()
        return response.status, json.loads(text) if text.startswith(b"{") else text


@pytest.mark.parametrize("credential", ["", "nonsense", "a.b.c", "eyJhbGciOiJub25lIn0.e30."])
async def test_no_credentials_or_wrong_ones_are_401_except_for_version_and_health(
    cluster: Cluster, credential: str
) -> None:
    assert (await as_bearer(cluster, credential, "GET", "/api/v1/pods"))[0] == 401
    assert (await as_bearer(cluster, credential, "GET", "/apis"))[0] == 401
    assert (await as_bearer(cluster, credential, "GET", "/version"))[0] == 200
    assert (await as_bearer(cluster, credential, "GET", "/readyz"))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", PODS, 200),
        ("GET", "/api/v1/namespaces", 200),
        ("GET", "/api", 200),
        ("GET", "/api/v1/namespaces/default/secrets", 403),
        ("GET", "/api/v1/secrets", 403),
        ("GET", "/api/v1/namespaces/default/secrets/s", 403),
        ("POST", MAPS, 403),
        ("PUT", f"{MAPS}/m", 403),
        ("PATCH", f"{MAPS}/m", 403),
        ("DELETE", f"{MAPS}/m", 403),
        ("DELETE", MAPS, 403),
        ("POST", "/api/v1/namespaces/default/serviceaccounts/default/token", 403),
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", 403),
        ("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", 201),
    ],
)
async def test_a_plain_service_account_may_read_all_but_secrets_and_write_nothing(
    cluster: Cluster, method: str, path: str, code: int
) -> None:
    credential = await token(cluster, "default", "default")
    found, answer = await as_bearer(cluster, credential, method, path, {} if method in ("POST", "PUT") else None)
    assert found == code, answer
    if code == 403:
        assert 'User "system:serviceaccount:default:default" cannot' in answer["message"]


async def test_only_a_system_user_may_act_as_another(cluster: Cluster) -> None:
    path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    headers = {"Impersonate-User": "eve", "Impersonate-Group": "crew"}
    code, answer = await cluster.call("POST", path, {}, headers=dict(headers))
    assert (code, answer["status"]["userInfo"]["username"]) == (201, "eve")
    assert (await cluster.call("GET", "/api/v1/secrets", headers=dict(headers)))[0] == 403
    plain = await token(cluster, "default", "default")
    masters = {"Authorization": f"Bearer {plain}", "Impersonate-User": "x", "Impersonate-Group": "system:masters"}
    context = ssl.create_default_context(cadata=cluster.server.ca_pem.decode())
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.get(cluster.url + "/api/v1/secrets", headers=masters) as response,
    ):
        assert response.status == 403


async def test_a_service_account_of_a_system_namespace_may_write(cluster: Cluster) -> None:
    credential = await token(cluster, "kube-system", "default")
    assert (await as_bearer(cluster, credential, "POST", MAPS, {"metadata": {"name": "m"}}))[0] == 201
    assert (await as_bearer(cluster, credential, "GET", "/api/v1/secrets"))[0] == 200


async def test_a_token_for_another_audience_is_no_credential_here(cluster: Cluster) -> None:
    credential = await token(cluster, "default", "default", audiences=["istio-ca"])
    assert (await as_bearer(cluster, credential, "GET", PODS))[0] == 401


async def test_a_kubeconfig_of_a_user_without_rights_may_only_read(cluster: Cluster, tmp_path: Any) -> None:
    path = tmp_path / "viewer"
    path.write_text(cluster.server.kubeconfig(cluster.url, user="viewer", groups=()))
    context = from_kubeconfig(str(path)).tls
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        async with session.get(cluster.url + PODS) as response:
            assert response.status == 200
        async with session.delete(f"{cluster.url}{PODS}/one") as response:
            assert response.status == 403


async def test_a_client_certificate_of_another_authority_is_refused_in_the_handshake(
    cluster: Cluster, new_cluster: Any, tmp_path: Any
) -> None:
    other = await new_cluster()
    document = yaml.safe_load(other.server.kubeconfig(cluster.url))
    ours = yaml.safe_load(cluster.kubeconfig.read_text())
    document["clusters"] = ours["clusters"]
    path = tmp_path / "foreign"
    path.write_text(yaml.safe_dump(document))
    context = from_kubeconfig(str(path)).tls
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(cluster.url + PODS)


# --- tokens ---------------------------------------------------------------------------------------------

REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"


async def review(cluster: Cluster, credential: str, *audiences: str) -> dict[str, Any]:
    body = {"spec": {"token": credential, "audiences": list(audiences)}}
    code, answer = await cluster.call("POST", REVIEWS, body)
    assert code == 201
    return dict(answer["status"])


@pytest.fixture
async def bound(cluster: Cluster) -> str:
    """A token for audience istio-ca of service account web, bound to pod one on node n1."""
    cluster.store.create(SERVICE_ACCOUNT, "default", {"metadata": {"name": "web"}})
    cluster.store.create(POD, "default", pod("one", serviceAccountName="web"))
    cluster.store.bind("default", "one", "n1")
    reference = {"kind": "Pod", "apiVersion": "v1", "name": "one"}
    return await token(cluster, "default", "web", audiences=["istio-ca"], boundObjectRef=reference)


async def test_a_review_tells_user_pod_and_node(cluster: Cluster, bound: str) -> None:
    status = await review(cluster, bound, "istio-ca", "other")
    assert status["authenticated"] is True
    assert status["audiences"] == ["istio-ca"]
    assert status["user"]["username"] == "system:serviceaccount:default:web"
    assert "system:serviceaccounts:default" in status["user"]["groups"]
    uid = cluster.store.get(POD, "default", "one")["metadata"]["uid"]
    extra = status["user"]["extra"]
    assert extra["authentication.kubernetes.io/pod-name"] == ["one"]
    assert extra["authentication.kubernetes.io/pod-uid"] == [uid]
    assert extra["authentication.kubernetes.io/node-name"] == ["n1"]


async def test_a_token_is_refused_after_its_time(cluster: Cluster, bound: str) -> None:
    cluster.clock.advance(3599)
    assert (await review(cluster, bound, "istio-ca")).get("authenticated") is True
    cluster.clock.advance(2)
    status = await review(cluster, bound, "istio-ca")
    assert "authenticated" not in status and "expired" in status["error"]


async def test_a_token_is_refused_for_another_audience(cluster: Cluster, bound: str) -> None:
    for audiences in (("vault",), ()):
        status = await review(cluster, bound, *audiences)
        assert "authenticated" not in status and "audiences" in status["error"]


async def test_a_token_is_refused_when_its_pod_is_another_of_the_same_name(cluster: Cluster, bound: str) -> None:
    _delete_now(cluster)
    assert "gone" in (await review(cluster, bound, "istio-ca"))["error"]
    cluster.store.create(POD, "default", pod("one", serviceAccountName="web"))
    assert "gone" in (await review(cluster, bound, "istio-ca"))["error"]


def _delete_now(cluster: Cluster) -> None:
    from ambient.lab.apiserver.store import DeleteOptions

    cluster.store.delete(POD, "default", "one", DeleteOptions(grace_period_s=0))


async def test_a_token_is_refused_when_its_service_account_was_made_anew(cluster: Cluster, bound: str) -> None:
    cluster.store.delete(SERVICE_ACCOUNT, "default", "web")
    cluster.store.create(SERVICE_ACCOUNT, "default", {"metadata": {"name": "web"}})
    assert "deleted" in (await review(cluster, bound, "istio-ca"))["error"]


async def test_a_changed_token_or_one_of_another_server_is_refused(
    cluster: Cluster, bound: str, new_cluster: Any
) -> None:
    head, payload, signature = bound.split(".")
    changed = payload[:-2] + ("A" if payload[-2] != "A" else "B") + payload[-1]
    for forged in (
        f"{head}.{changed}.{signature}",
        f"{head}.{payload}.{signature[::-1]}",
        bound + "x",
        "..",
        "x" * 9000,
    ):
        assert (await review(cluster, forged, "istio-ca"))["error"] == "invalid bearer token"
    other = await new_cluster()
    assert (await review(other, bound, "istio-ca"))["error"] == "invalid bearer token"


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"expirationSeconds": 599}, 422),
        ({"expirationSeconds": "soon"}, 422),
        ({"audiences": "istio-ca"}, 422),
        ({"boundObjectRef": {"kind": "Secret", "name": "s"}}, 422),
        ({"boundObjectRef": {"kind": "Pod", "name": "ghost"}}, 404),
        ({"boundObjectRef": {"kind": "Pod", "name": "one", "uid": "other"}}, 409),
        ({"expirationSeconds": 600}, 201),
    ],
)
async def test_a_token_request_is_checked(cluster: Cluster, bound: str, spec: Any, code: int) -> None:
    path = "/api/v1/namespaces/default/serviceaccounts/web/token"
    assert (await cluster.call("POST", path, {"spec": spec}))[0] == code


async def test_a_token_is_not_bound_to_a_pod_of_another_account(cluster: Cluster, bound: str) -> None:
    body = {"spec": {"boundObjectRef": {"kind": "Pod", "name": "one"}}}
    path = "/api/v1/namespaces/default/serviceaccounts/default/token"
    assert (await cluster.call("POST", path, body))[0] == 422


# --- protobuf -------------------------------------------------------------------------------------------


async def test_garbage_in_protobuf_is_refused(cluster: Cluster) -> None:
    kind = {"Content-Type": "application/vnd.kubernetes.protobuf"}
    for body in (b"", b"nonsense", b"k8s\x00", b"k8s\x00\xff\xff", b"k8s\x00\x0a\x07\x0a\x02v1\x12\x01X"):
        code, status = await cluster.call("POST", MAPS, body, headers=dict(kind))
        assert code in (400, 415), status
