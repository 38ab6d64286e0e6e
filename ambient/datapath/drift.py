"""Where the kernel's maps differ from what they should hold: rows for `ambient diff`. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ambient.datapath import render
from ambient.datapath import values as v
from ambient.datapath.render import LISTENER_KINDS, Names, flag_names, socket_text

K = TypeVar("K")
V = TypeVar("V")
Row = dict[str, Any]

_FLAGS = {v.EnrolledValue: "ENROLLED_", v.WorkloadValue: "WORKLOAD_", v.ServiceValue: "WORKLOAD_"}


def compare(
    name: str,
    wanted: Mapping[K, V],
    actual: Mapping[K, V],
    names: Names,
    same: Callable[[V, V], bool] = lambda a, b: a == b,
) -> list[Row]:
    """One row per entry that is missing, extra or different; ``same`` decides what counts as equal."""
    rows: list[Row] = []
    for key in [*wanted, *(k for k in actual if k not in wanted)]:
        want, have = wanted.get(key), actual.get(key)
        if want is not None and have is not None:
            if same(want, have):
                continue
            word = "differs"
        else:
            word = "missing" if have is None else "extra"
        rows.append(
            {
                "map": name,
                "key": key_text(key, names),
                "drift": word,
                "name": name_of(key, want if want is not None else have, names),
                "wanted": fields(want, names),
                "actual": fields(have, names),
            }
        )
    return rows


def same_enrolled(a: v.EnrolledValue, b: v.EnrolledValue) -> bool:
    """Programs write ``flows`` and ``refused``: those are nobody's wish."""
    return a == dataclasses.replace(b, flows=a.flows, refused=a.refused)


def same_settings(a: v.SettingsValue, b: v.SettingsValue) -> bool:
    return a == dataclasses.replace(b, heartbeat_ns=a.heartbeat_ns)


def unrightful(key: v.TupleKey, flow: v.FlowValue, reason: str, names: Names) -> Row:
    """A row for a flow that stands although nobody would be let in now."""
    (shown,) = render.flows([(key, flow)], names, flow.created_ns)
    actual = {name: shown[name] for name in ("source", "destination", "identity", "policy", "state")}
    ends = f"{shown['client']} -> {shown['server']}"
    row = {"map": "flows", "key": ends, "drift": "extra", "name": str(shown["destination"]), "wanted": {}}
    return row | {"actual": actual | {"why": reason}}


def key_text(key: Any, names: Names) -> str:
    """A map's key as the command line shows it."""
    match key:
        case v.ServiceKey():
            return socket_text(key.vip, key.port)
        case v.ListenerKey():
            return f"{key.pod} {LISTENER_KINDS.get(key.kind, key.kind)}"
        case v.VerdictKey():
            source = names.identities.get(key.identity) or key.identity
            return f"{source} -> {names.workload(key.workload) or key.workload}:{key.port or '*'}"
        case v.EndpointKey():
            return f"{names.services.get(key.service, '') or key.service}:{key.port} slot {key.slot}"
        case _:
            return str(key)


def name_of(key: Any, value: Any, names: Names) -> str:
    """Who an entry is about, where it says so."""
    for about in (value, key):
        if (number := getattr(about, "workload", None)) is not None:
            return names.workload(number)
        if (number := getattr(about, "service", None)) is not None:
            return names.services.get(number, "")
    return names.at(key.pod) if isinstance(key, v.ListenerKey) else ""


def fields(value: Any, names: Names) -> Row:
    """An entry's value as JSON values, numbers and flags by name; nothing where there is no entry."""
    match value:
        case None:
            return {}
        case v.SettingsValue():
            rows = render.settings(value, value.heartbeat_ns)
            return {row["setting"]: row["value"] for row in rows if row["setting"] != "heartbeat_age_s"}
        case v.VerdictValue():
            policy = names.policies.get(value.policy) or value.policy or ""
            return {"verdict": "allow" if value.allow else "deny", "policy": policy, "generation": value.generation}
        case v.Record():
            row: Row = {name.name: getattr(value, name.name) for name in dataclasses.fields(value)}  # type: ignore[arg-type]
        case _:
            return {"socket_cookie": value}
    for kind, prefix in _FLAGS.items():
        if isinstance(value, kind):
            row["flags"] = list(flag_names(prefix, row["flags"]))
    for column, known in (("workload", names.workloads), ("service", names.services), ("identity", names.identities)):
        if column in row:
            row[column] = known.get(row[column]) or row[column]
    return row


def differing(row: Row) -> tuple[str, str]:
    """The fields in which wanted and actual differ, as text: what the table shows."""
    wanted, actual = row["wanted"], row["actual"]
    if wanted and actual:
        changed = [name for name in wanted if wanted[name] != actual.get(name)]
        return _text(wanted, changed), _text(actual, changed)
    return _text(wanted, wanted), _text(actual, actual)


def _text(row: Row, names: Any) -> str:
    def one(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return " ".join(f"{name}={one(row[name])}" for name in names if row[name] not in ("", 0, [], ()))
