"""Pure parts of the API server: selectors, tables, durations and the protobuf decoder."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.protobuf import decode_protobuf
from ambient.lab.apiserver.requests import parse_accept, parse_path
from ambient.lab.apiserver.schema import Registry
from ambient.lab.apiserver.selectors import matcher, parse_labels, selector_requirements, selector_text
from ambient.lab.apiserver.status import ApiError
from ambient.lab.apiserver.tables import human_duration, json_path, pod_status, table
from tests.lab_api.objects import lawful

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def labelled(**labels: str) -> dict[str, Any]:
    return {"metadata": {"name": "x", "namespace": "n", "labels": labels}, "spec": {"nodeName": "n1"}}


@pytest.mark.parametrize(
    ("selector", "labels", "matches"),
    [
        ("a=1", {"a": "1"}, True),
        ("a==1,b!=2", {"a": "1", "b": "2"}, False),
        ("b!=2", {}, True),
        ("a in (1, 2),c", {"a": "2", "c": ""}, True),
        ("a in (1,2)", {}, False),
        ("a notin (1,2)", {"a": "3"}, True),
        ("a notin (1,2)", {}, True),
        ("!a", {"a": "1"}, False),
        ("!a", {}, True),
        ("a>5", {"a": "6"}, True),
        ("a>5", {"a": "text"}, False),
        ("a<5", {"a": "4"}, True),
        ("istio.io/dataplane-mode=ambient", {"istio.io/dataplane-mode": "ambient"}, True),
        (" ", {"a": "1"}, True),
    ],
)
def test_a_label_selector_selects(selector: str, labels: dict[str, str], matches: bool) -> None:
    found = matcher(schema.POD, selector, "")
    assert (found is None or found(labelled(**labels))) is matches


@pytest.mark.parametrize("selector", ["a=b c", "=b", "a in 1", "a in (1", "a,,b", "-a", "a=-", "a=" + "x" * 64])
def test_a_malformed_label_selector_is_refused(selector: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_labels(selector)
    assert refused.value.code == 400


@lawful
@given(st.text(alphabet="ab=!,()<> in/.-", max_size=30))
def test_any_text_is_a_selector_or_refused(text: str) -> None:
    try:
        found = matcher(schema.POD, text, "")
    except ApiError:
        return
    assert found is None or found(labelled(a="b")) in (True, False)


def test_a_selector_object_says_the_same_as_its_text() -> None:
    selector = {
        "matchLabels": {"a": "1"},
        "matchExpressions": [
            {"key": "b", "operator": "In", "values": ["2", "3"]},
            {"key": "c", "operator": "DoesNotExist"},
            {"key": "d", "operator": "Exists"},
        ],
    }
    assert set(parse_labels(selector_text(selector))) == set(selector_requirements(selector))


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("spec.nodeName=n1", True),
        ("spec.nodeName!=n1", False),
        ("metadata.name=x,metadata.namespace=n", True),
        ("status.phase=", True),
        ("spec.hostNetwork=false", True),
    ],
)
def test_a_field_selector_selects(selector: str, matches: bool) -> None:
    found = matcher(schema.POD, "", selector)
    assert found is not None and found(labelled()) is matches


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (600, "10m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 60, "3h1m"),
        (8 * 3600 + 60, "8h"),
        (48 * 3600, "2d"),
        (50 * 3600, "2d2h"),
        (8 * 86400, "8d"),
        (731 * 86400, "2y1d"),
        (9 * 365 * 86400, "9y"),
    ],
)
def test_durations_are_short(seconds: int, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ({"phase": "Pending"}, "Pending"),
        ({}, "Unknown"),
        ({"phase": "Failed", "reason": "Evicted"}, "Evicted"),
        (
            {"phase": "Running", "containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]},
            "CrashLoopBackOff",
        ),
        ({"phase": "Running", "containerStatuses": [{"state": {"terminated": {"exitCode": 3}}}]}, "ExitCode:3"),
        ({"phase": "Pending", "initContainerStatuses": [{"state": {"running": {}}}]}, "Init:0/1"),
        ({"phase": "Pending", "initContainerStatuses": [{"state": {"terminated": {"exitCode": 0}}}]}, "Pending"),
    ],
)
def test_the_status_column_tells_what_matters_most(status: Any, shown: str) -> None:
    pod = {"metadata": {"name": "x"}, "spec": {"initContainers": [{}], "containers": [{}]}, "status": status}
    assert pod_status(pod) == shown
    assert pod_status({**pod, "metadata": {"name": "x", "deletionTimestamp": "2026-01-01T00:00:00Z"}}) == "Terminating"


def test_every_kind_has_a_table_with_a_cell_for_each_column() -> None:
    for kind in schema.BUILT_IN:
        obj: dict[str, Any] = {"metadata": {"name": "x"}, "spec": {"template": {"spec": {}}}}
        made = table(kind, [obj], NOW, metadata={})
        assert len(made["rows"][0]["cells"]) == len(made["columnDefinitions"]), kind.kind


def test_columns_of_custom_kinds_read_json_paths() -> None:
    obj = {
        "a": {"b": [{"c": 1, "type": "x"}, {"c": 2, "type": "Ready"}]},
        "metadata": {"annotations": {"x.y/z": "v"}},
    }
    assert json_path(obj, ".a.b[*].c") == [1, 2]
    assert json_path(obj, ".a.b[1].c") == [2]
    assert json_path(obj, '.a.b[?(@.type=="Ready")].c') == [2]
    assert json_path(obj, ".metadata.annotations['x.y/z']") == ["v"]
    assert json_path(obj, ".a.none") == json_path(obj, ".a[?(broken") == []


@pytest.mark.parametrize(
    ("path", "meaning"),
    [
        ("/api/v1/namespaces", ("namespaces", "", "", "")),
        ("/api/v1/namespaces/shop", ("namespaces", "", "shop", "")),
        ("/api/v1/namespaces/shop/status", ("namespaces", "", "shop", "status")),
        ("/api/v1/namespaces/shop/pods", ("pods", "shop", "", "")),
        ("/api/v1/namespaces/shop/pods/a/status", ("pods", "shop", "a", "status")),
        ("/api/v1/pods", ("pods", "", "", "")),
        ("/api/v1/nodes/n1", ("nodes", "", "n1", "")),
        ("/apis/apps/v1/namespaces/x/deployments/d/scale", ("deployments", "x", "d", "scale")),
    ],
)
def test_a_path_means_one_thing(path: str, meaning: tuple[str, str, str, str]) -> None:
    target = parse_path(path, Registry())
    assert (target.kind.plural, target.namespace, target.name, target.subresource) == meaning


@pytest.mark.parametrize(
    "path",
    [
        "/api",
        "/api/v2/pods",
        "/api/v1/pods/x",
        "/api/v1/namespaces/a/nodes",
        "/api/v1/namespaces//pods",
        "/api/v1/nodes/a/b/c",
        "/api/v1/nodes/a/scale",
    ],
)
def test_a_path_that_means_nothing_is_404(path: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_path(path, Registry())
    assert refused.value.code == 404


def test_the_first_known_form_of_an_accept_header_wins() -> None:
    assert parse_accept("application/vnd.kubernetes.protobuf,application/json").shape == ""
    assert parse_accept("application/json;as=Table;v=v1;g=meta.k8s.io,application/json").shape == "Table"
    assert parse_accept("application/json;as=Unheard;v=v1,application/json").shape == ""
    assert parse_accept("").encoding == "json"


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return bytes((number << 3, value))
    return bytes((number << 3 | 2, len(value))) + value


def envelope(kind: str, raw: bytes) -> bytes:
    return b"k8s\x00" + field(1, field(1, b"v1") + field(2, kind.encode())) + field(2, raw)


def test_a_protobuf_object_becomes_its_json_form() -> None:
    entry = field(1, b"k") + field(2, b"v")
    metadata = field(1, b"m") + field(8, b"") + field(11, entry)
    obj = decode_protobuf(envelope("Secret", field(1, metadata) + field(2, entry) + field(3, b"")))
    assert obj == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "m", "labels": {"k": "v"}},
        "data": {"k": "dg=="},
    }


def test_a_protobuf_field_that_is_not_known_is_refused_and_never_dropped() -> None:
    for body in (envelope("ConfigMap", field(15, b"x")), envelope("Widget", b"")):
        with pytest.raises(ApiError) as refused:
            decode_protobuf(body)
        assert refused.value.code == 415


@lawful
@given(st.binary(max_size=60), st.sampled_from(["Service", "Deployment", "TokenRequest", "Secret"]), st.booleans())
def test_any_protobuf_bytes_are_decoded_or_refused(raw: bytes, kind: str, whole: bool) -> None:
    try:
        assert isinstance(decode_protobuf(b"k8s\x00" + raw if whole else envelope(kind, raw)), dict)
    except ApiError as error:
        assert error.code in (400, 415)
