"""PeerAuthentication: which plaintext each workload refuses."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.errors import ConfigFault
from ambient.manifest.kinds import PEER_AUTHENTICATION
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import PeerAuthentication
from ambient.manifest.peer_authentication import Mode, PeerModes, closed, is_strict, read, static_strict
from ambient.model.identity import Identity
from ambient.model.policy import Connection, Denied, evaluate

MESH = Mesh()
STATIC = "istio-system/istio_converted_static_strict"


def peer(
    mode: str | None, namespace: str = "shop", name: str = "p", created: str = "2026-01-01T00:00:00Z", **spec: Any
) -> PeerAuthentication:
    if "labels" in spec:
        spec["selector"] = {"matchLabels": spec.pop("labels")}
    if "ports" in spec:
        spec["portLevelMtls"] = {str(port): {"mode": value} for port, value in spec.pop("ports").items()}
    if mode is not None:
        spec["mtls"] = {"mode": mode}
    meta = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return PEER_AUTHENTICATION.convert({"metadata": meta, "spec": spec})


def refuses_plaintext(items: list[PeerAuthentication], port: int, namespace: str = "shop", **labels: str) -> bool:
    """The decision at a workload with these labels, reached through the policies it lists."""
    modes = PeerModes.of([read(item, MESH)[0] for item in items], MESH)
    known = {p.key: p for p in (static_strict(MESH), *modes.port_policies())}
    listed = [known[key] for key in modes.policies_of(namespace, labels)]
    here = ipaddress.ip_address("10.1.0.4")
    assert not isinstance(
        evaluate(Connection(Identity("cluster.local", "a", "b"), here, here, port), listed), Denied
    ), "a peer with an identity is never refused"
    return isinstance(evaluate(Connection(None, here, here, port), listed), Denied)


ROOT = "istio-system"


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], False),
        ([peer("STRICT")], True),
        ([peer("PERMISSIVE")], False),
        ([peer("DISABLE")], False),
        ([peer("UNSET")], False),
        ([peer(None)], False),
        ([peer("STRICT", ROOT)], True),
        ([peer("STRICT", "elsewhere")], False),
        # the nearer level wins; an unset one inherits
        ([peer("STRICT", ROOT), peer("PERMISSIVE")], False),
        ([peer("STRICT", ROOT), peer("DISABLE")], False),
        ([peer("STRICT", ROOT), peer("UNSET")], True),
        ([peer("PERMISSIVE", ROOT), peer("STRICT")], True),
        ([peer("STRICT"), peer("PERMISSIVE", name="w", labels={"app": "x"})], False),
        ([peer("STRICT"), peer(None, name="w", labels={"app": "x"})], True),
        ([peer("STRICT"), peer("PERMISSIVE", name="w", labels={"app": "other"})], True),
        ([peer("STRICT", name="w", labels={"app": "x"})], True),
        # the oldest of one level wins, then the name
        ([peer("STRICT", name="b", created="2026-01-02T00:00:00Z"), peer("PERMISSIVE", name="a")], False),
        ([peer("STRICT", name="b"), peer("PERMISSIVE", name="a", created="2026-01-02T00:00:00Z")], True),
        ([peer("STRICT", name="a"), peer("PERMISSIVE", name="b")], True),
        (
            [
                peer("STRICT", name="w1", labels={"app": "x"}),
                peer("PERMISSIVE", name="w0", labels={"app": "x"}, created="2026-02-01T00:00:00Z"),
            ],
            True,
        ),
        # a selector in the root namespace selects nothing
        ([peer("STRICT", ROOT, labels={"app": "x"})], False),
    ],
)
def test_mesh_namespace_and_workload_override_each_other(items: list[PeerAuthentication], expected: bool) -> None:
    assert refuses_plaintext(items, 80, app="x") is expected


@pytest.mark.parametrize(
    ("items", "on_80", "on_81"),
    [
        ([peer("PERMISSIVE", labels={"app": "x"}, ports={80: "STRICT"})], True, False),
        ([peer("STRICT", labels={"app": "x"}, ports={80: "PERMISSIVE"})], False, True),
        ([peer("STRICT", labels={"app": "x"}, ports={80: "DISABLE"})], False, True),
        ([peer("STRICT", labels={"app": "x"}, ports={80: "STRICT"})], True, True),
        ([peer("PERMISSIVE", labels={"app": "x"}, ports={80: "PERMISSIVE"})], False, False),
        ([peer("STRICT", labels={"app": "x"}, ports={80: "UNSET"})], True, True),
        ([peer(None, labels={"app": "x"}, ports={80: "STRICT"})], True, False),
        ([peer("STRICT", name="ns"), peer(None, labels={"app": "x"}, ports={80: "PERMISSIVE"})], False, True),
        ([peer("STRICT", ROOT), peer(None, labels={"app": "x"}, ports={80: "PERMISSIVE"})], False, True),
        ([peer(None, labels={"app": "x"}, ports={80: "STRICT", 81: "STRICT"})], True, True),
        ([peer("STRICT", labels={"app": "x"}, ports={80: "DISABLE", 81: "PERMISSIVE"})], False, False),
        # without a selector the ports are ignored
        ([peer("PERMISSIVE", ports={80: "STRICT"})], False, False),
    ],
)
def test_ports_differ_from_their_workload(items: list[PeerAuthentication], on_80: bool, on_81: bool) -> None:
    assert refuses_plaintext(items, 80, app="x") is on_80
    assert refuses_plaintext(items, 81, app="x") is on_81


def test_the_policies_have_istios_names() -> None:
    items = (peer("STRICT"), peer("STRICT", name="w", labels={"a": "b"}, ports={1: "DISABLE"}))
    modes = PeerModes.of([read(item, MESH)[0] for item in items], MESH)
    assert modes.policies_of("shop", {}) == (STATIC,)
    assert modes.policies_of("shop", {"a": "b"}) == ("shop/converted_peer_authentication_w",)
    assert is_strict(STATIC) and is_strict("shop/converted_peer_authentication_w") and not is_strict("shop/w")


def test_ignored_parts_are_reported() -> None:
    _, problems = read(peer("STRICT", ports={80: "STRICT"}), MESH)
    assert [p.field for p in problems] == ["spec.portLevelMtls"]
    _, problems = read(peer("STRICT", ROOT, labels={"a": "b"}), MESH)
    assert [p.field for p in problems] == ["spec.selector"]


def test_an_object_shadowed_by_an_older_one_is_known() -> None:
    items = [peer("STRICT", name="old"), peer("PERMISSIVE", name="new", created="2026-05-01T00:00:00Z")]
    modes = PeerModes.of([read(item, MESH)[0] for item in items], MESH)
    assert [(young.name, old.name) for young, old in modes.shadowed] == [("new", "old")]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"mtls": {"mode": "STRCT"}}, "spec.mtls.mode"),
        ({"mtls": {"mode": 5}}, "spec.mtls.mode"),
        ({"mtls": {"mode": ["STRICT"]}}, "spec.mtls.mode"),
        ({"mtls": "STRICT"}, "spec.mtls"),
        ({"mtls": {"mod": "STRICT"}}, "spec.mtls"),
        ({"mTLS": {"mode": "STRICT"}}, "spec.mTLS"),
        ({"portLevelMtls": [1]}, "spec.portLevelMtls"),
        ({"portLevelMtls": {"0": {"mode": "STRICT"}}}, r"spec.portLevelMtls\[0\]"),
        ({"portLevelMtls": {"http": {"mode": "STRICT"}}}, r"spec.portLevelMtls\[http\]"),
        (
            {"portLevelMtls": {"80": {"mode": "STRICT"}, "080": {"mode": "PERMISSIVE"}}},
            r"spec.portLevelMtls\[080\]",
        ),
        ({"portLevelMtls": {"80": {"mode": "NO"}}}, r"spec.portLevelMtls\[80\].mode"),
        ({"selector": {"matchLabels": {"a": 1}}}, r"spec.selector.matchLabels\[a\]"),
        ([], "spec"),
    ],
)
def test_what_cannot_be_read_is_a_fault_and_stands_strict(spec: Any, field: str) -> None:
    item = PEER_AUTHENTICATION.convert({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
    with pytest.raises(ConfigFault, match=f"PeerAuthentication shop/p: {field}"):
        read(item, MESH)
    assert closed(item).mode is Mode.STRICT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["STRICT", "mode", "80", "a"]) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["mtls", "mode", "selector", "matchLabels", "portLevelMtls", "80"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_garbage_is_a_fault_and_nothing_else(spec: Any) -> None:
    item = PEER_AUTHENTICATION.convert({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec})
    try:
        mode, _ = read(item, MESH)
    except ConfigFault:
        mode = closed(item)
    modes = PeerModes.of([mode], MESH)
    assert all(is_strict(key) for key in modes.policies_of("shop", {"a": "b"}))
