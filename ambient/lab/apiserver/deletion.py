"""How an object goes: at once, or marked first, and then when nothing keeps it any more."""

from __future__ import annotations

import copy
from datetime import datetime, timedelta

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.moments import timestamp
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import JsonObject


def is_ending(obj: JsonObject) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def is_awaited(obj: JsonObject) -> bool:
    """Whether something else than finalizers keeps an ending object: its kubelet or the namespace controller."""
    return obj["kind"] == "Namespace" or bool(obj["metadata"].get("deletionGracePeriodSeconds"))


def begun(
    kind: Kind, obj: JsonObject, now: datetime, grace_s: int | None, *, foreground: bool
) -> tuple[JsonObject, bool]:
    """A copy of the object as a deletion leaves it, and whether it is gone at once.

    ``grace_s``: as asked, None for the object's own. ``foreground``: it stays until its dependents are gone.
    """
    metadata = obj["metadata"]
    ending = copy.deepcopy(obj)
    meta = ending["metadata"]
    finalizers = list(meta.get("finalizers", ()))
    if foreground and "foregroundDeletion" not in finalizers:
        finalizers.append("foregroundDeletion")
        meta["finalizers"] = finalizers
    grace = _grace(kind, obj, grace_s)
    if kind is schema.NAMESPACE:
        ending["status"] = {**ending.get("status", {}), "phase": "Terminating"}
    elif not finalizers and grace == 0:
        return ending, True
    if "deletionTimestamp" in meta and meta.get("deletionGracePeriodSeconds", 0) <= grace:
        grace = meta.get("deletionGracePeriodSeconds", 0)
    else:
        meta["deletionTimestamp"] = timestamp(now + timedelta(seconds=grace))
    meta["deletionGracePeriodSeconds"] = grace
    if kind is not schema.POD:
        meta.setdefault("generation", 1)
        if "deletionTimestamp" not in metadata and kind.generation:
            meta["generation"] += 1
        if not kind.generation:
            del meta["generation"]
        meta["deletionGracePeriodSeconds"] = 0
    if kind is schema.NAMESPACE:
        del meta["deletionGracePeriodSeconds"]
    return ending, False


def _grace(kind: Kind, obj: JsonObject, asked: int | None) -> int:
    if kind is not schema.POD:
        return 0
    if not obj["spec"].get("nodeName") or obj["status"].get("phase") in ("Succeeded", "Failed"):
        return 0
    if asked is not None:
        return max(asked, 0)
    return int(obj["spec"].get("terminationGracePeriodSeconds", 30))
