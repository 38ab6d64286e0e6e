"""Manifest files: every bad document is named, the rest still loads, and nothing a file says can hurt."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ambient.errors import ConfigFault
from ambient.manifest import documents
from ambient.manifest.documents import read_documents
from ambient.manifest.kinds import KINDS

GOOD = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}
---
# nothing here
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  replicas: 2
  template:
    metadata: {labels: {app: cart}}
    spec:
      serviceAccountName: cart
      containers:
      - name: cart
        command: [python3, cart.py]
        env: [{name: A, value: b}]
        ports: [{containerPort: 8080, name: http}]
"""


def test_a_file_of_several_documents_loads_in_order() -> None:
    found, problems = read_documents(GOOD, "shop.yaml")
    assert problems == []
    assert [(m.kind.name, m.object.key) for m in found] == [
        ("Namespace", "shop"),
        ("Service", "shop/cart"),
        ("Deployment", "shop/cart"),
    ]
    deployment = found[2].object
    assert deployment.spec.template.spec.containers[0].command == ["python3", "cart.py"]  # type: ignore[attr-defined]
    assert found[2].value["spec"]["replicas"] == 2


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("a: [", "f.yaml:5: is not YAML: line 6, column 1"),
        ("just text", "f.yaml:5: 'just text': must be a mapping with apiVersion, kind and metadata"),
        ("kind: Widget\napiVersion: v1", "f.yaml:5: kind: 'Widget': must be one of AuthorizationPolicy"),
        ("kind: [Pod]", "f.yaml:5: kind"),
        ("apiVersion: v2\nkind: Pod\nmetadata: {name: x}", "f.yaml:5: apiVersion: 'v2': must be v1 for Pod"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}", "f.yaml:5: Pod default/?: metadata.name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: Big}", "f.yaml:5: Pod default/Big: metadata.name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x, namespace: a/b}", "Pod a/b/x: metadata.namespace"),
        ("apiVersion: v1\nkind: Node\nmetadata: {name: x, namespace: a}", "a Node has no namespace"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: x, labels: {version: 1}}",
            "Pod x: metadata.labels[...]: Expected `str`, got `int`",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 80}, {port: 99999}]}",
            "Service default/x: spec.ports[1].port: 99999: must be a port",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {action: ALOW}",
            "AuthorizationPolicy default/p: spec.action: 'ALOW': must be ALLOW",
        ),
        (
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec: {mtls: {mode: X}}",
            "PeerAuthentication default/p: spec.mtls.mode: 'X': must be STRICT",
        ),
        ("a: &a [*a]", "f.yaml:5: has an alias that contains itself"),
        ("? {a: b}\n: c", "f.yaml:5: "),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:5: "),
        ("[" * 500, "f.yaml:5: "),
        ("n: " + "9" * 5000, "f.yaml:5: "),
    ],
)
def test_a_bad_document_is_named_and_its_neighbours_load(document: str, said: str) -> None:
    before = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: before}\n---\n"  # four lines
    after = "\n---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: after}\n"
    found, problems = read_documents(before + document + after, "f.yaml")
    assert [m.object.name for m in found] == ["before", "after"]
    assert len(problems) == 1
    assert said in str(problems[0])


def test_an_unsupported_rule_is_no_fault_of_the_file() -> None:
    text = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\n"
        "spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}"
    )
    found, problems = read_documents(text, "f.yaml")
    assert len(found) == 1 and problems == []


def test_a_list_is_its_items_and_a_missing_namespace_is_default() -> None:
    text = "kind: List\nitems:\n- {apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}\n- 5\n"
    found, problems = read_documents(text, "f.yaml")
    assert [m.object.key for m in found] == ["default/a"]
    assert found[0].value["metadata"] == {"name": "a", "namespace": "default"}
    assert len(problems) == 1


def test_a_separator_inside_a_block_of_text_is_indented_and_splits_nothing() -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  x: |\n    ---\n    y\n"
    found, problems = read_documents(text, "f.yaml")
    assert problems == [] and found[0].object.data == {"x": "---\ny\n"}  # type: ignore[attr-defined]


def test_aliases_that_multiply_are_refused_quickly() -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for n in range(1, 12):
        laughs += f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n"
    found, problems = read_documents(laughs, "f.yaml")
    assert found == [] and "more than 200000 values" in str(problems[0])
    modest = "apiVersion: v1\nkind: Pod\nmetadata: {name: &n x, labels: {app: *n}}"
    assert read_documents(modest, "f.yaml")[0][0].object.labels == {"app": "x"}


def test_a_file_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "FILE_BYTES_MAX", len(GOOD) - 1)
    found, problems = read_documents(GOOD, "shop.yaml")
    assert found == [] and "at most" in str(problems[0])


@given(st.text(alphabet=st.sampled_from("abk:{}[]-&*!?|>'\"\n ,#%@`0129~<"), max_size=80))
@example("kind: List\nitems: 5")
@example("--- --- ---\n...\n%YAML 9.9\n---")
@example("<<: *x")
@example("apiVersion: v1\nkind: Pod\nmetadata: 5")
@example("2001-99-99")
def test_no_text_raises(text: str) -> None:
    read_documents(text, "f.yaml")


fragments = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("spec", "status", "data", "endpoints", "ports", "addressType", "metadata"), fragments),
)


@given(st.sampled_from(sorted(KINDS)), objects)
def test_every_kind_takes_or_refuses_any_value(kind: str, value: dict[str, object]) -> None:
    try:
        KINDS[kind].convert(value)
    except ConfigFault as fault:
        assert fault.where.startswith(kind)


@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=40))
@example("Pod", b"[" * 5000)
@example("AuthorizationPolicy", b'{"spec":' * 3000)
@example("Pod", b'{"metadata": {"name": 5}}')
@example("Pod", b"\xff\xfe")
def test_every_kind_takes_or_refuses_any_bytes(kind: str, raw: bytes) -> None:
    try:
        KINDS[kind].decode(raw)
    except ConfigFault as fault:
        assert fault.where.startswith(kind)
