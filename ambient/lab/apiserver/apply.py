"""Server-side apply: merging what a manager applies, with the fields each manager owns.

The rules are those of Kubernetes: a field applied by two managers with different values is a conflict unless
forced, a field a manager no longer applies is removed unless somebody else owns it. Simplified where schemas
would be needed: lists of the built-in kinds merge by the single keys of `patch.merge_key`, all lists of custom
kinds are atomic; and writes that are no apply take part only once an object has been applied (until then one
manager, ``before-first-apply``, owns all there is, as in Kubernetes).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from ambient.lab.apiserver.patch import PRIMITIVE_MERGE, json_equal, merge_key
from ambient.lab.apiserver.status import ApiError, JsonObject, bad_request

Path = tuple[str, ...]
"""Steps in the notation of fieldsV1: ``f:name``, ``k:{"name":"x"}``, ``v:"value"``."""

BEFORE = "before-first-apply"
MANAGERS_MAX = 50
_SERVER_FIELDS = frozenset(
    {
        "name",
        "generateName",
        "namespace",
        "uid",
        "resourceVersion",
        "generation",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "managedFields",
        "selfLink",
    }
)


def _names(path: Path) -> tuple[str, ...]:
    return tuple(step[2:] for step in path if step.startswith("f:"))


def _key_of(path: Path, value: Any, custom: bool) -> str | None:
    """The merge key of a list whose items all carry it; None for an atomic list."""
    key = None if custom else merge_key(_names(path))
    if key is None or not all(isinstance(item, dict) and key in item for item in value):
        return None
    return key


def _item_step(key: str, item: JsonObject) -> str:
    return "k:" + json.dumps({key: item[key]}, separators=(",", ":"))


def _is_set(path: Path, custom: bool) -> bool:
    return not custom and bool(path) and path[-1][2:] in PRIMITIVE_MERGE


def leaves(value: Any, custom: bool, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every owned field of an object: scalars, atomic lists, empty objects, and items of keyed lists (whole)."""
    if isinstance(value, dict) and (value or not path):
        for name, inner in value.items():
            if path == () and name in ("apiVersion", "kind"):
                continue
            if path == ("f:metadata",) and name in _SERVER_FIELDS:
                continue
            yield from leaves(inner, custom, (*path, f"f:{name}"))
    elif isinstance(value, list) and _is_set(path, custom):
        for item in value:
            yield (*path, "v:" + json.dumps(item)), item
    elif isinstance(value, list) and value and (key := _key_of(path, value, custom)):
        for item in value:
            step = (*path, _item_step(key, item))
            yield step, None
            for name, inner in item.items():
                yield from leaves(inner, custom, (*step, f"f:{name}"))
    elif path != ("f:metadata",):
        yield path, value


def fields_v1(paths: frozenset[Path]) -> JsonObject:
    """The nested form of metadata.managedFields."""
    root: JsonObject = {}
    for path in sorted(paths):
        node = root
        for step in path:
            node = node.setdefault(step, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    return root


def paths_of(fields: Any, path: Path = ()) -> frozenset[Path]:
    """The inverse of `fields_v1`; what is not understood is ignored."""
    if not isinstance(fields, dict) or not fields:
        return frozenset({path} if path else ())
    found: set[Path] = set()
    for step, inner in fields.items():
        if step == ".":
            found.add(path)
        elif step.startswith(("f:", "k:", "v:")) and len(path) < 64:
            found |= paths_of(inner, (*path, step))
    return frozenset(found)


def _merge(live: Any, config: Any, custom: bool, path: Path = ()) -> Any:
    if isinstance(config, dict):
        result = dict(live) if isinstance(live, dict) else {}
        for name, inner in config.items():
            result[name] = _merge(result.get(name), inner, custom, (*path, f"f:{name}"))
        return result
    if isinstance(config, list) and isinstance(live, list):
        if _is_set(path, custom):
            return live + [item for item in config if item not in live]
        key = _key_of(path, config, custom)
        if key is not None and _key_of(path, live, custom) == key:
            items = {item[key]: item for item in live}
            for item in config:
                items[item[key]] = _merge(items.get(item[key]), item, custom, (*path, _item_step(key, item)))
            return list(items.values())
    return copy.deepcopy(config)


def _remove(value: Any, path: Path) -> Any:
    """``value`` without the field at ``path``; objects left empty by it go too."""
    step, rest = path[0], path[1:]
    if step.startswith("f:"):
        name = step[2:]
        if not isinstance(value, dict) or name not in value:
            return value
        inner = _remove(value[name], rest) if rest else None
        result = {key: item for key, item in value.items() if key != name or rest}
        if rest:
            if inner in ({}, []) and value[name] not in ({}, []):
                del result[name]
            else:
                result[name] = inner
        return result
    if not isinstance(value, list):
        return value
    wanted = json.loads(step[2:])

    def same(item: Any) -> bool:
        if step.startswith("v:"):
            return bool(item == wanted)
        return isinstance(item, dict) and all(item.get(key) == text for key, text in wanted.items())

    if rest:
        return [_remove(item, rest) if same(item) else item for item in value]
    return [item for item in value if not same(item)]


class _Managers:
    """The managers of an object: (name, operation) -> owned paths."""

    def __init__(self, obj: JsonObject) -> None:
        self.owned: dict[tuple[str, str], frozenset[Path]] = {}
        self.entries: dict[tuple[str, str], JsonObject] = {}
        for entry in obj["metadata"].get("managedFields") or ():
            if isinstance(entry, dict):
                key = (str(entry.get("manager", "")), str(entry.get("operation", "Update")))
                self.owned[key] = paths_of(entry.get("fieldsV1"))
                self.entries[key] = entry

    def document(self, changed: tuple[str, str], api_version: str, now: str) -> list[JsonObject]:
        entries = []
        for key, paths in self.owned.items():
            if not paths:
                continue
            entry = self.entries.get(key) or {}
            if key == changed or not entry or paths != paths_of(entry.get("fieldsV1")):
                entry = {
                    "manager": key[0],
                    "operation": key[1],
                    "apiVersion": api_version,
                    "time": now if key == changed else entry.get("time", now),
                    "fieldsType": "FieldsV1",
                    "fieldsV1": fields_v1(paths),
                }
            entries.append(entry)
        return entries[-MANAGERS_MAX:]


def _shown(path: Path) -> str:
    text = ""
    for step in path:
        text += "." + step[2:] if step.startswith("f:") else f"[{step[2:]}]"
    return text


def server_side_apply(
    live: JsonObject | None, config: JsonObject, *, manager: str, force: bool, custom: bool, now: str
) -> JsonObject:
    """The object after ``manager`` applied ``config``. Raises ApiError 409 naming each conflicting field."""
    metadata = config.get("metadata")
    if not isinstance(metadata, dict):
        raise bad_request("metadata: must be an object")
    if metadata.get("managedFields"):
        raise bad_request("metadata.managedFields must be nil")
    api_version = str(config.get("apiVersion", ""))
    wanted = dict(leaves(config, custom))
    me = (manager, "Apply")
    base: JsonObject = live if live is not None else {"metadata": {}}
    managers = _Managers(base)
    current = dict(leaves(base, custom))
    if live is not None and not managers.owned:
        managers.owned[BEFORE, "Update"] = frozenset(current)
    conflicts: list[tuple[tuple[str, str], Path]] = []
    for other, paths in managers.owned.items():
        if other == me:
            continue
        for path in sorted(paths & wanted.keys()):
            if not path[-1].startswith("k:") and not json_equal(current.get(path), wanted[path]):
                conflicts.append((other, path))
    if conflicts and not force:
        raise _conflict(conflicts)
    for other, path in conflicts:
        managers.owned[other] -= {path}
    result = _merge(base, config, custom)
    before = managers.owned.get(me, frozenset())
    kept = frozenset(wanted).union(*(paths for other, paths in managers.owned.items() if other != me))
    for path in sorted(before - kept, key=len):  # a list item before its fields: its key is one of them
        below = any(owned[: len(path)] == path for owned in kept)
        if not below:
            result = _remove(result, path)
    result = _merge(result, config, custom)  # an object emptied by the removals may be one that is applied empty
    managers.owned[me] = frozenset(wanted)
    same = live is not None and all(
        json_equal(result.get(key), live.get(key)) for key in (*result, *live) if key != "metadata"
    )
    if same and live is not None and managers.owned == _Managers(live).owned:
        unchanged = {k: v for k, v in result["metadata"].items() if k != "managedFields"}
        if json_equal(unchanged, {k: v for k, v in live["metadata"].items() if k != "managedFields"}):
            return live
    result["metadata"] = {**result["metadata"], "managedFields": managers.document(me, api_version, now)}
    return dict(result)


def _conflict(conflicts: list[tuple[tuple[str, str], Path]]) -> ApiError:
    causes = [
        {
            "reason": "FieldManagerConflict",
            "message": f'conflict with "{other[0]}"',
            "field": _shown(path),
        }
        for other, path in conflicts
    ]
    shown = "\n".join(f"- {cause['message']}: {cause['field']}" for cause in causes)
    many = "conflict" if len(causes) == 1 else "conflicts"
    message = f"Apply failed with {len(causes)} {many}: {shown}"
    return ApiError(409, "Conflict", message, details={"causes": causes})


def track_update(
    manager: str, now: str, custom: bool, change: Callable[[JsonObject], JsonObject]
) -> Callable[[JsonObject], JsonObject]:
    """``change`` for a write that is no apply: what it changed becomes ``manager``'s, if ownership is tracked."""

    def changed(old: JsonObject) -> JsonObject:
        before = copy.deepcopy(old)
        new = change(old)
        if not before["metadata"].get("managedFields") or not isinstance(new.get("metadata"), dict):
            return new
        managers = _Managers(before)
        was, now_is = dict(leaves(before, custom)), dict(leaves(new, custom))
        touched = {p for p, value in now_is.items() if p not in was or not json_equal(was[p], value)}
        lost = touched | (was.keys() - now_is.keys())
        me = (manager, "Update")
        for key in managers.owned:
            if key != me:
                managers.owned[key] -= lost
        mine = (managers.owned.get(me, frozenset()) & now_is.keys()) | touched
        managers.owned[me] = frozenset(mine)
        new["metadata"] = {
            **new["metadata"],
            "managedFields": managers.document(me if touched else ("", ""), str(new.get("apiVersion", "")), now),
        }
        return new

    return changed
