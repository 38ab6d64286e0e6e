"""The patch kinds: the examples of their RFCs, Kubernetes' merge keys, and laws that hold for any document."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.lab.apiserver.patch import json_equal, json_patch, merge, strategic
from ambient.lab.apiserver.status import ApiError
from tests.lab_api.objects import lawful

names = st.sampled_from(["a", "b", "c", "~", "x/y"])
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=12
)
objects = st.dictionaries(names, values, max_size=4)


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return value


def merge_difference(old: Any, new: Any) -> Any:
    """A merge patch from ``old`` to ``new`` (neither holds null members)."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    patch = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key not in old or not json_equal(old[key], value):
            patch[key] = merge_difference(old[key], value) if key in old else value
    return patch


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "foo"}, None, None),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_merge_patch_does_what_the_rfc_shows(target: Any, patch: Any, result: Any) -> None:
    assert merge(target, patch) == result


@lawful
@given(objects, objects)
def test_a_merge_patch_applied_twice_is_applied_once(target: Any, patch: Any) -> None:
    once = merge(target, patch)
    assert json_equal(merge(once, patch), once)


@lawful
@given(objects.map(without_null), objects.map(without_null))
def test_a_merge_patch_made_of_a_difference_leads_to_the_other_document(old: Any, new: Any) -> None:
    before = copy.deepcopy(old)
    assert json_equal(merge(old, merge_difference(old, new)), new)
    assert json_equal(old, before)


@pytest.mark.parametrize(
    ("target", "operations", "result"),
    [
        ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": "qux"}], {"baz": "qux", "foo": "bar"}),
        ({"foo": ["bar", "baz"]}, [{"op": "add", "path": "/foo/1", "value": "qux"}], {"foo": ["bar", "qux", "baz"]}),
        ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/-", "value": ["abc"]}], {"foo": ["bar", ["abc"]]}),
        ({"baz": "qux", "foo": "bar"}, [{"op": "remove", "path": "/baz"}], {"foo": "bar"}),
        ({"foo": ["bar", "qux", "baz"]}, [{"op": "remove", "path": "/foo/1"}], {"foo": ["bar", "baz"]}),
        ({"baz": "qux"}, [{"op": "replace", "path": "/baz", "value": "boo"}], {"baz": "boo"}),
        (
            {"foo": {"bar": "baz", "waldo": "fred"}, "qux": {"corge": "grault"}},
            [{"op": "move", "from": "/foo/waldo", "path": "/qux/thud"}],
            {"foo": {"bar": "baz"}, "qux": {"corge": "grault", "thud": "fred"}},
        ),
        (
            {"foo": ["all", "grass", "cows", "eat"]},
            [{"op": "move", "from": "/foo/1", "path": "/foo/3"}],
            {"foo": ["all", "cows", "eat", "grass"]},
        ),
        ({"a": {"b": 1}}, [{"op": "copy", "from": "/a", "path": "/c"}], {"a": {"b": 1}, "c": {"b": 1}}),
        ({"/": 9, "~1": 10}, [{"op": "test", "path": "/~01", "value": 10}], {"/": 9, "~1": 10}),
        ({"foo": None}, [{"op": "replace", "path": "/foo", "value": "x"}], {"foo": "x"}),
    ],
)
def test_a_json_patch_does_what_the_rfc_shows(target: Any, operations: Any, result: Any) -> None:
    assert json_patch(target, operations) == result


@pytest.mark.parametrize(
    ("target", "operation", "code"),
    [
        ({"foo": "bar"}, {"op": "add", "path": "/baz/bat", "value": "qux"}, 422),
        ({"foo": "bar"}, {"op": "remove", "path": "/baz"}, 422),
        ({"foo": "bar"}, {"op": "replace", "path": "/baz", "value": 1}, 422),
        ({"foo": "bar"}, {"op": "test", "path": "/foo", "value": "qux"}, 422),
        ({"foo": True}, {"op": "test", "path": "/foo", "value": 1}, 422),
        ({"foo": [1]}, {"op": "add", "path": "/foo/2", "value": 1}, 422),
        ({"foo": [1]}, {"op": "add", "path": "/foo/01", "value": 1}, 422),
        ({"foo": [1]}, {"op": "remove", "path": "/foo/-"}, 422),
        ({"foo": {"bar": 1}}, {"op": "move", "from": "/foo", "path": "/foo/bar"}, 422),
        ({"foo": 1}, {"op": "replace", "path": "", "value": [1]}, 422),
        ({"foo": 1}, {"op": "add", "path": "foo", "value": 1}, 400),
        ({"foo": 1}, {"op": "add", "path": "/foo"}, 400),
        ({"foo": 1}, {"op": "shout", "path": "/foo"}, 400),
        ({"foo": 1}, {"op": "add", "value": 1}, 400),
        ({"foo": 1}, "nonsense", 400),
    ],
)
def test_a_json_patch_that_does_not_fit_is_refused_and_changes_nothing(target: Any, operation: Any, code: int) -> None:
    before = copy.deepcopy(target)
    with pytest.raises(ApiError) as refused:
        json_patch(target, [{"op": "add", "path": "/first", "value": 1}, operation])
    assert refused.value.code == code
    assert target == before


def pointer(name: str) -> str:
    return "/" + name.replace("~", "~0").replace("/", "~1")


@lawful
@given(objects, names, values)
def test_what_a_json_patch_adds_it_can_test_and_remove(target: Any, name: str, value: Any) -> None:
    path = pointer(name)
    added = json_patch(target, [{"op": "add", "path": path, "value": value}])
    assert json_equal(added[name], value)
    json_patch(added, [{"op": "test", "path": path, "value": value}])
    removed = json_patch(added, [{"op": "remove", "path": path}])
    assert json_equal(removed, {key: inner for key, inner in target.items() if key != name})


CONTAINERS = {"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]}}


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        pytest.param(
            CONTAINERS,
            {"spec": {"containers": [{"name": "b", "image": "2"}]}},
            {"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]}},
            id="a keyed list merges by its key",
        ),
        pytest.param(
            CONTAINERS,
            {"spec": {"containers": [{"name": "a", "$patch": "delete"}]}},
            {"spec": {"containers": [{"name": "b", "image": "1"}]}},
            id="an item is deleted by its key",
        ),
        pytest.param(
            CONTAINERS,
            {"spec": {"containers": [{"$patch": "replace"}, {"name": "c"}]}},
            {"spec": {"containers": [{"name": "c"}]}},
            id="a list is replaced",
        ),
        pytest.param(
            CONTAINERS,
            {"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}},
            {"spec": {"containers": [{"name": "b", "image": "1"}, {"name": "a", "image": "1"}]}},
            id="the order is set",
        ),
        pytest.param(
            {"spec": {"ports": [{"port": 80, "name": "x"}]}},
            {"spec": {"ports": [{"port": 80, "name": "y"}, {"port": 81}]}},
            {"spec": {"ports": [{"port": 80, "name": "y"}, {"port": 81}]}},
            id="service ports merge by port",
        ),
        pytest.param(
            {"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 1}]}]}},
            {"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 2}]}]}},
            {"spec": {"containers": [{"name": "a", "ports": [{"containerPort": 1}, {"containerPort": 2}]}]}},
            id="container ports merge by containerPort",
        ),
        pytest.param(
            {"spec": {"containers": [{"name": "a", "command": ["x", "y"]}]}},
            {"spec": {"containers": [{"name": "a", "command": ["z"]}]}},
            {"spec": {"containers": [{"name": "a", "command": ["z"]}]}},
            id="other lists are replaced",
        ),
        pytest.param(
            {"metadata": {"finalizers": ["a", "b"]}},
            {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}},
            {"metadata": {"finalizers": ["b", "c"]}},
            id="finalizers are a set",
        ),
        pytest.param(
            {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}},
            {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}},
            {"spec": {"strategy": {"type": "Recreate"}}},
            id="retainKeys drops the others",
        ),
        pytest.param(
            {"metadata": {"labels": {"a": "1", "b": "2"}}},
            {"metadata": {"labels": {"a": None, "c": "3"}}},
            {"metadata": {"labels": {"b": "2", "c": "3"}}},
            id="maps merge and null removes",
        ),
        pytest.param({"a": {"b": 1}}, {"a": {"$patch": "replace", "c": 1}}, {"a": {"c": 1}}, id="a map is replaced"),
        pytest.param({"a": {"b": 1}}, {"a": {"$patch": "delete"}}, {}, id="a map is deleted"),
        pytest.param(
            {"status": {"conditions": [{"type": "Ready", "status": "False"}]}},
            {"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "True"}]}},
            {"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "True"}]}},
            id="conditions merge by type",
        ),
    ],
)
def test_a_strategic_merge_patch_knows_the_merge_keys(target: Any, patch: Any, result: Any) -> None:
    before = copy.deepcopy(target)
    assert strategic(target, patch) == result
    assert target == before


@pytest.mark.parametrize(
    "patch",
    [
        {"spec": {"$patch": "explode"}},
        {"spec": {"containers": [{"image": "without a name"}]}},
        {"spec": {"containers": ["text"]}},
        {"spec": {"$retainKeys": "type"}},
        {"spec": {"$nonsense": 1}},
    ],
)
def test_a_malformed_strategic_merge_patch_is_refused(patch: Any) -> None:
    with pytest.raises(ApiError) as refused:
        strategic(CONTAINERS, patch)
    assert refused.value.code == 400


items = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("abcd")}, optional={"image": st.sampled_from("12"), "x": scalars}),
    max_size=4,
    unique_by=lambda item: item["name"],
)


@lawful
@given(items, items)
def test_a_keyed_list_patched_twice_is_patched_once_and_keeps_every_name(old: Any, new: Any) -> None:
    target, patch = {"spec": {"containers": old}}, {"spec": {"containers": new}}
    once = strategic(target, patch)
    assert json_equal(strategic(once, patch), once)
    found = {item["name"] for item in once["spec"]["containers"]}
    assert found == {item["name"] for item in old} | {item["name"] for item in new}
