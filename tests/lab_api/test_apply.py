"""Server-side apply: who owns which field, what conflicts, what goes when it is no longer applied."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab.apiserver.apply import BEFORE, fields_v1, leaves, paths_of, server_side_apply, track_update
from ambient.lab.apiserver.patch import json_equal
from ambient.lab.apiserver.status import ApiError
from tests.lab_api.objects import lawful

NOW = "2026-01-02T03:04:05Z"


def config(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": "x"}
    if labels is not None:
        metadata["labels"] = labels
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def apply(live: Any, body: Any, manager: str = "me", *, force: bool = False, custom: bool = False) -> dict[str, Any]:
    return server_side_apply(live, body, manager=manager, force=force, custom=custom, now=NOW)


def managers(obj: dict[str, Any]) -> dict[str, frozenset[Any]]:
    return {entry["manager"]: paths_of(entry["fieldsV1"]) for entry in obj["metadata"].get("managedFields", ())}


def test_a_field_no_longer_applied_is_removed() -> None:
    live = apply(None, config({"a": "1", "b": "2"}, x=1))
    after = apply(live, config({"a": "1"}))
    assert after["metadata"]["labels"] == {"a": "1"}
    assert "x" not in after.get("spec", {})


def test_a_field_no_longer_applied_stays_while_another_manager_owns_it() -> None:
    live = apply(apply(None, config({"a": "1"}), "one"), config({"a": "1"}), "two")
    after = apply(live, config(), "one")
    assert after["metadata"]["labels"] == {"a": "1"}
    assert ("f:metadata", "f:labels", "f:a") not in managers(after).get("one", frozenset())


def test_another_value_for_a_field_of_another_manager_is_a_conflict_that_names_both() -> None:
    live = apply(None, config({"a": "1"}), "one")
    with pytest.raises(ApiError) as refused:
        apply(live, config({"a": "2"}), "two")
    assert refused.value.code == 409
    assert 'conflict with "one"' in refused.value.message
    assert ".metadata.labels.a" in refused.value.message


def test_force_takes_the_field_over() -> None:
    live = apply(None, config({"a": "1"}), "one")
    after = apply(live, config({"a": "2"}), "two", force=True)
    assert after["metadata"]["labels"] == {"a": "2"}
    assert managers(after) == {
        "two": frozenset({("f:metadata", "f:labels", "f:a"), ("f:spec",)}),
        "one": frozenset({("f:spec",)}),
    }


def test_applying_the_same_again_returns_the_very_object() -> None:
    live = apply(None, config({"a": "1"}, containers=[{"name": "c", "image": "i"}]))
    assert apply(live, config({"a": "1"}, containers=[{"name": "c", "image": "i"}])) is live


def test_items_of_a_keyed_list_belong_to_who_applied_them() -> None:
    live = apply(None, config(containers=[{"name": "a", "image": "1"}]), "one")
    live = apply(live, config(containers=[{"name": "b", "image": "2"}]), "two")
    assert live["spec"]["containers"] == [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]
    after = apply(live, config(containers=[]), "two")
    assert after["spec"]["containers"] == [{"name": "a", "image": "1"}]


def test_lists_of_a_custom_kind_are_atomic() -> None:
    live = apply(None, config(containers=[{"name": "a"}]), "one", custom=True)
    with pytest.raises(ApiError):
        apply(live, config(containers=[{"name": "b"}]), "two", custom=True)
    after = apply(live, config(containers=[{"name": "b"}]), "two", custom=True, force=True)
    assert after["spec"]["containers"] == [{"name": "b"}]


def test_an_object_never_applied_belongs_to_one_manager_before() -> None:
    live = config({"a": "1"})
    with pytest.raises(ApiError) as refused:
        apply(live, config({"a": "2"}))
    assert BEFORE in refused.value.message
    assert apply(live, config({"b": "2"}))["metadata"]["labels"] == {"a": "1", "b": "2"}


def test_a_plain_write_takes_over_what_it_changes() -> None:
    live = apply(None, config({"a": "1", "b": "1"}), "one")

    def relabel(obj: dict[str, Any]) -> dict[str, Any]:
        return {**obj, "metadata": {**obj["metadata"], "labels": {"a": "2", "b": "1"}}}

    after = track_update("editor", NOW, False, relabel)(live)
    assert managers(after)["editor"] == {("f:metadata", "f:labels", "f:a")}
    assert ("f:metadata", "f:labels", "f:a") not in managers(after)["one"]
    with pytest.raises(ApiError):
        apply(after, config({"a": "1", "b": "1"}), "one")


def test_a_plain_write_to_an_object_never_applied_records_nothing() -> None:
    after = track_update("editor", NOW, False, lambda obj: {**obj, "spec": {"x": 1}})(config())
    assert "managedFields" not in after["metadata"]


def test_managed_fields_in_an_apply_are_refused() -> None:
    body = config()
    body["metadata"]["managedFields"] = [{"manager": "x"}]
    with pytest.raises(ApiError) as refused:
        apply(None, body)
    assert refused.value.code == 400


scalars = st.integers(0, 2) | st.sampled_from(["", "x"])
names = st.sampled_from(["a", "b", "c.d/e"])
specs = st.dictionaries(
    names, st.recursive(scalars, lambda i: st.dictionaries(names, i, max_size=3) | st.lists(i, max_size=2)), max_size=3
)


@lawful
@given(specs)
def test_owned_paths_survive_their_written_form(spec: Any) -> None:
    paths = frozenset(path for path, _ in leaves(config({"l": "1"}, **spec), False))
    assert paths_of(fields_v1(paths)) == paths


@lawful
@given(specs, specs)
def test_one_manager_always_gets_what_it_applied(first: Any, second: Any) -> None:
    after = apply(apply(None, config(**first)), config(**second))
    wanted = dict(leaves(config(**second), False))
    have = dict(leaves(after, False))
    assert all(json_equal(have.get(path), value) for path, value in wanted.items())
