"""What a CustomResourceDefinition's status says once it is served."""

from __future__ import annotations

import copy

from ambient.lab.apiserver.status import JsonObject


def established(definition: JsonObject, moment: str) -> JsonObject:
    """The definition with the status the real server gives it; ``moment`` is a timestamp."""
    names = definition["spec"]["names"]
    conditions = [
        {"type": "NamesAccepted", "status": "True", "reason": "NoConflicts", "message": "no conflicts found"},
        {
            "type": "Established",
            "status": "True",
            "reason": "InitialNamesAccepted",
            "message": "the initial names have been accepted",
        },
    ]
    mine = copy.deepcopy(definition)
    mine["status"] = {
        "acceptedNames": {"listKind": names["kind"] + "List", "singular": names["kind"].lower(), **names},
        "conditions": [{**condition, "lastTransitionTime": moment} for condition in conditions],
        "storedVersions": [v["name"] for v in definition["spec"]["versions"] if v.get("storage")],
    }
    return mine
