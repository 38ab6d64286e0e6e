"""The patch kinds as pure functions: JSON patch, merge patch and strategic merge patch.

None of them changes its arguments. A patch that cannot be applied is an ApiError: 400 when it is no patch at
all, 422 when it does not fit this object.
"""

from __future__ import annotations

import copy
from typing import Any

from ambient.lab.apiserver.status import ApiError, JsonObject, bad_request

JSON_PATCH_OPERATIONS_MAX = 10_000


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes, objects merge, anything else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


# --- JSON patch, RFC 6902 -------------------------------------------------------------------------------


def _unprocessable(message: str) -> ApiError:
    return ApiError(422, "Invalid", f"the server rejected our request due to an error in our request: {message}")


def _pointer(text: Any) -> list[str]:
    if not isinstance(text, str) or (text and not text.startswith("/")):
        raise bad_request(f"json patch: {text!r} is not a JSON pointer")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _index(part: str, length: int) -> int:
    if not part.isascii() or not part.isdigit() or (len(part) > 1 and part[0] == "0"):
        raise _unprocessable(f"array index {part!r} is not a number")
    index = int(part) if len(part) < 10 else length + 1
    if index > length:
        raise _unprocessable(f"array index {part} is out of bounds")
    return index


def _step(node: Any, part: str, path: str) -> Any:
    if isinstance(node, dict) and part in node:
        return node[part]
    if isinstance(node, list):
        index = _index(part, len(node))
        if index < len(node):
            return node[index]
    raise _unprocessable(f"path {path!r} does not exist")


def _walk(doc: Any, parts: list[str], path: str) -> Any:
    for part in parts:
        doc = _step(doc, part, path)
    return doc


def _add(doc: Any, path: str, value: Any) -> Any:
    parts = _pointer(path)
    if not parts:
        return value
    parent = _walk(doc, parts[:-1], path)
    if isinstance(parent, dict):
        parent[parts[-1]] = value
    elif isinstance(parent, list):
        parent.insert(len(parent) if parts[-1] == "-" else _index(parts[-1], len(parent)), value)
    else:
        raise _unprocessable(f"path {path!r} is inside a value that is neither object nor array")
    return doc


def _remove(doc: Any, path: str) -> Any:
    parts = _pointer(path)
    if not parts:
        raise _unprocessable("the whole document cannot be removed")
    parent = _walk(doc, parts[:-1], path)
    _step(parent, parts[-1], path)
    if isinstance(parent, dict):
        del parent[parts[-1]]
    else:
        del parent[int(parts[-1])]
    return doc


def _replace(doc: Any, path: str, value: Any) -> Any:
    parts = _pointer(path)
    if not parts:
        return value
    parent = _walk(doc, parts[:-1], path)
    _step(parent, parts[-1], path)
    if isinstance(parent, dict):
        parent[parts[-1]] = value
    else:
        parent[int(parts[-1])] = value
    return doc


def json_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: unlike Python's, true is not 1; numbers compare by value."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(json_equal, left, right))
    return bool(left == right)


def json_patch(target: JsonObject, operations: Any) -> JsonObject:
    """RFC 6902, all or nothing. A failed ``test`` is a 422 like any path that does not exist."""
    if not isinstance(operations, list) or len(operations) > JSON_PATCH_OPERATIONS_MAX:
        raise bad_request(f"json patch: a list of at most {JSON_PATCH_OPERATIONS_MAX} operations is expected")
    doc: Any = copy.deepcopy(target)
    for operation in operations:
        if not isinstance(operation, dict):
            raise bad_request(f"json patch: operation {operation!r} is not an object")
        name, path = operation.get("op"), operation.get("path")
        if name in ("add", "replace", "test") and "value" not in operation:
            raise bad_request(f"json patch: operation {name} of {path!r} lacks a value")
        value = copy.deepcopy(operation.get("value"))
        _pointer(path)
        assert isinstance(path, str)
        match name:
            case "add":
                doc = _add(doc, path, value)
            case "remove":
                doc = _remove(doc, path)
            case "replace":
                doc = _replace(doc, path, value)
            case "test":
                if not json_equal(_walk(doc, _pointer(path), path), value):
                    raise _unprocessable(f"testing path {path!r} value failed")
            case "move" | "copy":
                source = operation.get("from")
                value = copy.deepcopy(_walk(doc, _pointer(source), str(source)))
                if name == "move":
                    if path.startswith(f"{source}/"):
                        raise _unprocessable(f"{source!r} cannot be moved into its own child {path!r}")
                    doc = value if not _pointer(source) else _remove(doc, str(source))
                doc = _add(doc, path, value)
            case _:
                raise bad_request(f"json patch: unknown operation {name!r}")
    if not isinstance(doc, dict):
        raise _unprocessable("the result is not an object")
    return dict(doc)


# --- strategic merge patch ------------------------------------------------------------------------------

MERGE_KEYS: dict[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "secrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
    "ownerReferences": "uid",
    "conditions": "type",
    "podIPs": "ip",
    "hostIPs": "ip",
    "taints": "key",
}
"""Lists merged by key, wherever the field occurs in the built-in kinds (patchMergeKey tags of k8s.io/api)."""

PRIMITIVE_MERGE = frozenset({"finalizers", "podCIDRs"})
"""Lists of scalars that are merged as sets (patchStrategy=merge without a key)."""

RETAIN_KEYS = frozenset({"strategy"})
"""Objects whose union members exclude each other; clients send $retainKeys themselves."""


def merge_key(path: tuple[str, ...]) -> str | None:
    """The merge key of the list at ``path`` (field names only), or None for an atomic list."""
    name = path[-1] if path else ""
    if name == "ports":
        if len(path) >= 2 and path[-2] in ("containers", "initContainers", "ephemeralContainers"):
            return "containerPort"
        return "port" if path == ("spec", "ports") else None
    if name == "addresses":
        return "type" if path == ("status", "addresses") else None
    if name == "conditions":
        return "type" if path == ("status", "conditions") else None
    if name == "secrets":
        return "name" if path == ("secrets",) else None
    return MERGE_KEYS.get(name)


def strategic(target: JsonObject, patch: JsonObject) -> JsonObject:
    """Strategic merge of a patch to a built-in kind. Raises ApiError 400 for a malformed directive."""
    if not isinstance(patch, dict):
        raise bad_request("strategic merge patch: an object is expected")
    return _merge_object(target, patch, ())


def _merge_object(target: Any, patch: JsonObject, path: tuple[str, ...]) -> JsonObject:
    directive = patch.get("$patch")
    body = {key: value for key, value in patch.items() if key != "$patch"}
    if directive == "replace":
        return {key: _without_directives(value) for key, value in body.items() if value is not None}
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise bad_request(f"strategic merge patch: unknown directive $patch: {directive!r}")
    result = dict(target) if isinstance(target, dict) else {}
    retain = body.pop("$retainKeys", None)
    if retain is not None:
        if not isinstance(retain, list):
            raise bad_request("strategic merge patch: $retainKeys must be a list")
        result = {key: value for key, value in result.items() if key in retain}
    orders = {k.removeprefix("$setElementOrder/"): v for k, v in body.items() if k.startswith("$setElementOrder/")}
    for key, value in body.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            if not isinstance(value, list):
                raise bad_request(f"strategic merge patch: {key} must be a list")
            result[name] = [item for item in result.get(name) or [] if item not in value]
    for key, value in body.items():
        if key.startswith("$"):
            if not key.startswith(("$setElementOrder/", "$deleteFromPrimitiveList/")):
                raise bad_request(f"strategic merge patch: unknown directive {key}")
            continue
        where = (*path, key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            if value.get("$patch") == "delete":
                result.pop(key, None)
            else:
                result[key] = _merge_object(result.get(key), value, where)
        elif isinstance(value, list):
            result[key] = _merge_list(result.get(key), value, where)
        else:
            result[key] = value
    for name, order in orders.items():
        if isinstance(result.get(name), list) and isinstance(order, list):
            result[name] = _ordered(result[name], order, (*path, name))
    return result


def _without_directives(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_directives(v) for k, v in value.items() if not k.startswith("$") and v is not None}
    if isinstance(value, list):
        return [_without_directives(item) for item in value]
    return value


def _merge_list(target: Any, patch: list[Any], path: tuple[str, ...]) -> list[Any]:
    current: list[Any] = list(target) if isinstance(target, list) else []
    if path[-1] in PRIMITIVE_MERGE:
        return current + [item for index, item in enumerate(patch) if item not in current + patch[:index]]
    key = merge_key(path)
    if key is None:
        return [_without_directives(item) for item in patch]
    if any(isinstance(item, dict) and set(item) == {"$patch"} and item["$patch"] == "replace" for item in patch):
        current = []
    for item in patch:
        if not isinstance(item, dict):
            raise bad_request(f"strategic merge patch: {'.'.join(path)} must hold objects")
        if set(item) == {"$patch"}:
            if item["$patch"] not in ("replace", "merge"):
                raise bad_request(f"strategic merge patch: {'.'.join(path)}: $patch {item['$patch']!r} without a key")
            continue
        if key not in item:
            raise bad_request(f"strategic merge patch: map: {item} does not contain declared merge key: {key}")
        same = [i for i, old in enumerate(current) if isinstance(old, dict) and old.get(key) == item[key]]
        if item.get("$patch") == "delete":
            current = [old for i, old in enumerate(current) if i not in same]
        elif same:
            current[same[0]] = _merge_object(current[same[0]], item, path)
        else:
            current.append(_merge_object({}, item, path))
    return current


def _ordered(items: list[Any], order: list[Any], path: tuple[str, ...]) -> list[Any]:
    """Put the named items in the given relative order; the others keep their place before what followed them."""
    key = merge_key(path)

    def name(item: Any) -> Any:
        return item.get(key) if isinstance(item, dict) else item

    wanted = [entry.get(key) if isinstance(entry, dict) else entry for entry in order]
    named = iter(sorted((i for i in items if name(i) in wanted), key=lambda item: wanted.index(name(item))))
    return [next(named) if name(item) in wanted else item for item in items]
