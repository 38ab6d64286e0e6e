"""Where the kernel's maps differ from what they should hold: rows for `ambient diff`. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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
                "key": key_text(key),
                "drift": word,
                "name": name_of(want if want is not None else have, names),
                "wanted": fields(want),
                "actual": fields(have),
            }
        )
    return rows


def same_enrolled(a: v.EnrolledValue, b: v.EnrolledValue) -> bool:
    """Programs write ``flows`` and ``refused``: those are nobody's wish."""
    return a == dataclasses.replace(b, flows=a.flows, refused=a.refused)


def same_settings(a: v.SettingsValue, b: v.SettingsValue) -> bool:
    return a == dataclasses.replace(b, heartbeat_ns=a.heartbeat_ns)


def key_text(key: Any) -> str:
    """A map's key as the command line shows it."""
    if isinstance(key, v.ServiceKey):
        return socket_text(key.vip, key.port)
    if isinstance(key, v.ListenerKey):
        return f"{key.pod} {LISTENER_KINDS.get(key.kind, key.kind)}"
    if isinstance(key, v.Record):
        return " ".join(str(value) for value in fields(key).values())
    return str(key)


def name_of(value: Any, names: Names) -> str:
    """Who an entry is about, where its value says so."""
    if (number := getattr(value, "workload", None)) is not None:
        return names.workload(number)
    if (number := getattr(value, "service", None)) is not None:
        return names.services.get(number, "")
    return ""


def fields(value: Any) -> Row:
    """An entry's value as JSON values, flags by name; nothing where there is no entry."""
    if value is None:
        return {}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {"value": value}
    row = dataclasses.asdict(value)
    for kind, prefix in _FLAGS.items():
        if isinstance(value, kind):
            row["flags"] = list(flag_names(prefix, row["flags"]))
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
