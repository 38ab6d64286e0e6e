"""The pinned kernel maps, typed: what agent, ztunnel and command line read and write.

`Maps.open` opens the pins of this program's layout and refuses any other (LayoutMismatch): a wrong guess
about a map's bytes would authorize the wrong connection. Nothing is compiled here. Not for several threads;
a process that forks opens its own.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Generic, Protocol, Self, TypeVar

from ambient.datapath import values as v
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import reason_name
from ambient.errors import LayoutMismatch, PlatformFault
from ambient.io import bpf_sys

SPEC: Final[dict[str, tuple[int, int, int]]] = {
    "enrolled": (8, v.EnrolledValue.size(), LAYOUT["ENROLLED_MAX"]),
    "workloads": (16, v.WorkloadValue.size(), LAYOUT["WORKLOADS_MAX"]),
    "services": (v.ServiceKey.size(), v.ServiceValue.size(), LAYOUT["SERVICES_MAX"]),
    "redirects": (v.RedirectKey.size(), v.RedirectValue.size(), LAYOUT["REDIRECTS_MAX"]),
    "authorized": (v.TupleKey.size(), v.AuthorizedValue.size(), LAYOUT["AUTHORIZED_MAX"]),
    "origins": (v.TupleKey.size(), v.OriginValue.size(), LAYOUT["ORIGINS_MAX"]),
    "endpoints": (v.EndpointKey.size(), v.EndpointValue.size(), LAYOUT["ENDPOINTS_MAX"]),
    "verdicts": (v.VerdictKey.size(), v.VerdictValue.size(), LAYOUT["VERDICTS_MAX"]),
    "flows": (v.TupleKey.size(), v.FlowValue.size(), LAYOUT["FLOWS_MAX"]),
    "sockets": (v.TupleKey.size(), 8, LAYOUT["SOCKETS_MAX"]),
    "events": (0, 0, LAYOUT["EVENTS_BYTES"]),
    "listeners": (v.ListenerKey.size(), 8, LAYOUT["LISTENERS_MAX"]),
    "counters": (4, 8, LAYOUT["COUNTERS_MAX"]),
    "settings": (4, v.SettingsValue.size(), LAYOUT["SETTINGS_MAX"]),
    "pending": (4, LAYOUT.structs["pending_value"].size, 0),
    "hashed": (4, LAYOUT.structs["hashed_value"].size, 0),
}
"""Map -> bytes of key, bytes of value, limit. Those of `IN_SOCKETS` can be seen only from programs; `events` is a ring
buffer, whose limit is in bytes."""

IN_SOCKETS: Final = frozenset({"pending", "hashed"})
"""Maps that live in sockets."""

K = TypeVar("K")
V = TypeVar("V")


class _Codec(Protocol[K]):
    def encode(self, value: K) -> bytes: ...

    def decode(self, raw: bytes) -> K: ...


class _Number:
    """Integers of 4 or 8 bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def encode(self, value: int) -> bytes:
        return value.to_bytes(self._size, "little")

    def decode(self, raw: bytes) -> int:
        return int.from_bytes(raw, "little")


class _Address:
    """Addresses as text."""

    def encode(self, value: str) -> bytes:
        return v.address_bytes(value)

    def decode(self, raw: bytes) -> str:
        return v.address_text(raw)


R = TypeVar("R", bound=v.Record)


class _Record(Generic[R]):
    """One of the dataclasses of ambient.datapath.values."""

    def __init__(self, kind: type[R]) -> None:
        self._kind = kind

    def encode(self, value: R) -> bytes:
        return value.encode()

    def decode(self, raw: bytes) -> R:
        return self._kind.decode(raw)


class _Settings:
    def encode(self, value: v.SettingsValue) -> bytes:
        return value.encode()

    def decode(self, raw: bytes) -> v.SettingsValue:
        return v.SettingsValue.decode(raw)


class TypedMap(Generic[K, V]):
    """A hash map with Python keys and values. A full map is a BpfFault that names the map and its limit."""

    def __init__(self, table: bpf_sys.Table, key: _Codec[K], value: _Codec[V]) -> None:
        self.table = table
        self._key = key
        self._value = value

    @property
    def limit(self) -> int:
        return self.table.info.max_entries

    def get(self, key: K) -> V | None:
        raw = self.table.lookup(self._key.encode(key))
        return None if raw is None else self._value.decode(raw)

    def __getitem__(self, key: K) -> V:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __contains__(self, key: K) -> bool:
        return self.table.lookup(self._key.encode(key)) is not None

    def __setitem__(self, key: K, value: V) -> None:
        self.table.update(self._key.encode(key), self._value.encode(value))

    def insert(self, key: K, value: V) -> None:
        """Like item assignment, but a BpfFault with EEXIST if there is such an entry."""
        self.table.update(self._key.encode(key), self._value.encode(value), bpf_sys.NOEXIST)

    def replace(self, key: K, value: V) -> bool:
        """Like item assignment where there is such an entry; whether there was."""
        try:
            self.table.update(self._key.encode(key), self._value.encode(value), bpf_sys.EXIST)
        except bpf_sys.BpfFault as fault:
            if fault.errno == errno.ENOENT:
                return False
            raise
        return True

    def delete(self, key: K) -> bool:
        """Whether there was such an entry."""
        return self.table.delete(self._key.encode(key))

    def take(self, key: K) -> V | None:
        raw = self.table.take(self._key.encode(key))
        return None if raw is None else self._value.decode(raw)

    def keys(self) -> list[K]:
        return [self._key.decode(raw) for raw in self.table.list_keys()]

    def items(self) -> list[tuple[K, V]]:
        return [(self._key.decode(key), self._value.decode(value)) for key, value in self.table.items()]

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.table.list_keys())

    def clear(self) -> None:
        self.table.delete_many(self.table.list_keys())


class ListenerMap:
    """ztunnel's listening sockets by pod address and kind. The kernel forgets a socket that is closed."""

    def __init__(self, table: bpf_sys.Table) -> None:
        self.table = table

    @property
    def limit(self) -> int:
        return self.table.info.max_entries

    def put(self, pod: str, kind: int, fd: int) -> None:
        """``fd`` is a listening TCP socket of the pod's namespace and of the address's family (or dual-stack)."""
        self.table.update(v.ListenerKey(pod, kind).encode(), fd.to_bytes(8, "little"))

    def get(self, pod: str, kind: int) -> int | None:
        """The listening socket's cookie (SO_COOKIE)."""
        raw = self.table.lookup(v.ListenerKey(pod, kind).encode())
        return None if raw is None else int.from_bytes(raw, "little")

    def delete(self, pod: str, kind: int) -> bool:
        return self.table.delete(v.ListenerKey(pod, kind).encode())

    def items(self) -> list[tuple[v.ListenerKey, int]]:
        """Keys and socket cookies."""
        return [
            (v.ListenerKey.decode(key), int.from_bytes(value, "little"))
            for key in self.table.list_keys()
            if (value := self.table.lookup(key)) is not None
        ]

    def __len__(self) -> int:
        return len(self.table.list_keys())


class Maps:
    """Every map of one node. Use `open`; close with `close` or ``with``."""

    def __init__(self, directory: Path, tables: dict[str, bpf_sys.Table]) -> None:
        self.directory = directory
        self.tables = tables
        tuples = _Record(v.TupleKey)
        self.enrolled = TypedMap(tables["enrolled"], _Number(8), _Record(v.EnrolledValue))
        self.workloads = TypedMap(tables["workloads"], _Address(), _Record(v.WorkloadValue))
        self.services = TypedMap(tables["services"], _Record(v.ServiceKey), _Record(v.ServiceValue))
        self.redirects = TypedMap(tables["redirects"], _Record(v.RedirectKey), _Record(v.RedirectValue))
        self.authorized = TypedMap(tables["authorized"], tuples, _Record(v.AuthorizedValue))
        self.origins = TypedMap(tables["origins"], tuples, _Record(v.OriginValue))
        self.endpoints = TypedMap(tables["endpoints"], _Record(v.EndpointKey), _Record(v.EndpointValue))
        self.verdicts = TypedMap(tables["verdicts"], _Record(v.VerdictKey), _Record(v.VerdictValue))
        self.flows = TypedMap(tables["flows"], tuples, _Record(v.FlowValue))
        self.sockets = TypedMap(tables["sockets"], tuples, _Number(8))
        """Leaves are cookies of the sockets."""
        self.listeners = ListenerMap(tables["listeners"])
        self._settings = TypedMap(tables["settings"], _Number(4), _Settings())
        self._redirects = tables["redirects"]
        self._cpus = bpf_sys.possible_cpus()

    @classmethod
    def open(cls, bpffs_dir: str | Path) -> Self:
        """Open the maps under ``bpffs_dir``/LAYOUT VERSION/maps.

        Raises LayoutMismatch if they are not there or have other sizes than this program's layout, PlatformFault if
        they may not be looked at.
        """
        directory = Path(bpffs_dir) / LAYOUT.version
        try:
            there = (directory / "maps").is_dir()
        except OSError as error:
            raise PlatformFault(f"{directory}/maps: {error.strerror}: run as root") from None
        if not there:
            found = sorted(path.name for path in Path(bpffs_dir).glob("v*-*")) if Path(bpffs_dir).is_dir() else []
            step = (
                f"{', '.join(found)} are there, of another version of ambient: use its program, or restart the node"
                if found
                else "is `ambient node` running on this machine, with this bpffs_dir?"
            )
            raise LayoutMismatch(f"{directory}/maps: no pinned maps of layout {LAYOUT.version}: {step}")
        tables: dict[str, bpf_sys.Table] = {}
        try:
            for name, (key, value, entries) in SPEC.items():
                if name in IN_SOCKETS:
                    continue
                table = bpf_sys.Table(bpf_sys.obj_get(str(directory / "maps" / name)), name)
                tables[name] = table
                check_map(name, table.info, key, value, entries)
            return cls(directory, tables)
        except BaseException:
            for table in tables.values():
                table.close()
            raise

    def close(self) -> None:
        for table in self.tables.values():
            table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def settings(self) -> v.SettingsValue | None:
        """The agent's. Before it wrote them only what the loader found: then programs capture everything unknown.
        None: this layout drains."""
        return self._settings.get(0)

    @settings.setter
    def settings(self, value: v.SettingsValue) -> None:
        self._settings[0] = value

    def put_enrolled(self, netns_cookie: int, value: v.EnrolledValue) -> None:
        """Enrol or change a namespace, keeping what programs count in its entry (flows, refused)."""
        have = self.enrolled.get(netns_cookie)
        if have is not None:
            value = v.EnrolledValue(
                value.address4,
                value.address6,
                value.workload,
                value.flows_max,
                have.flows,
                value.flags,
                have.refused,
                value.identity,
            )
            if value == have:
                return
        self.enrolled[netns_cookie] = value

    def redirect_of(self, cookie: int) -> v.RedirectValue | None:
        """The record of an accepted connection, by its SO_COOKIE. It stays as long as the socket: sock_ops deletes it
        at the close, so the map shows what is captured right now. None: it was not captured, close it."""
        raw = self._redirects.lookup(cookie.to_bytes(8, "little") + bytes(32))
        return None if raw is None else v.RedirectValue.decode(raw)

    def take_redirect(self, cookie: int) -> v.RedirectValue | None:
        """The record of an accepted connection, by its SO_COOKIE; once. None: it was not captured, close it."""
        raw = self._redirects.take(cookie.to_bytes(8, "little") + bytes(32))
        return None if raw is None else v.RedirectValue.decode(raw)

    def authorize_delivery(self, admission: v.Admission) -> None:
        """Let one connection of ztunnel's into a pod, and show the application another client.

        Both entries or none; BpfFault if full, or with EEXIST if the application still has a connection with these
        ports: take another port. Call `withdraw_delivery` if the connection does not come about, and only if this
        succeeded.
        """
        local, local_port, remote, remote_port, workload, generation, client, client_port, netns = admission
        key = v.TupleKey(local, remote, local_port, remote_port).encode()
        now = time.monotonic_ns()
        if client:
            shown = v.OriginValue(client, now, 0, client_port, netns).encode()
            self.tables["origins"].update(key, shown, bpf_sys.NOEXIST)
        try:
            value = v.AuthorizedValue(generation, now, workload, LAYOUT["REASON_ZTUNNEL"], netns)
            self.tables["authorized"].update(key, value.encode(), bpf_sys.NOEXIST)
        except BaseException:
            if client:
                self.tables["origins"].delete(key)
            raise

    def withdraw_delivery(self, admission: v.Admission) -> None:
        """Take back what `authorize_delivery` wrote. Entries that are gone already are fine."""
        local, local_port, remote, remote_port = admission[:4]
        key = v.TupleKey(local, remote, local_port, remote_port).encode()
        self.tables["authorized"].delete(key)
        self.tables["origins"].delete(key)

    def sweep(self, older_than_s: float = 150.0) -> int:
        """Remove entries written for connections that were never made (their writer died in between).

        A connection is made or fails within the kernel's SYN retries (127 s); returns how many were removed.
        """
        limit = time.monotonic_ns() - int(older_than_s * 1e9)
        removed = 0
        for key, authorized in self.authorized.items():
            if authorized.created_ns < limit:
                removed += self.authorized.delete(key)
        for key, origin in self.origins.items():
            if origin.accepted == 0 and origin.created_ns < limit:
                removed += self.origins.delete(key)
        return removed

    def counters(self) -> dict[str, int]:
        """Events since loading, by reason: the names of enum reason without REASON_, in lower case."""
        sums = bpf_sys.percpu_sums(self.tables["counters"].fd, LAYOUT["REASON_MAX"], self._cpus)
        return {reason_name(index): count for index, count in enumerate(sums) if index}


def check_map(name: str, info: bpf_sys.MapInfo, key: int, value: int, entries: int) -> None:
    """Raises LayoutMismatch unless the map has these sizes and this limit."""
    have = (info.key_size, info.value_size, info.max_entries)
    if have != (key, value, entries):
        raise LayoutMismatch(
            f"map {name}: key, value and limit are {have}, layout {LAYOUT.version} says {(key, value, entries)}: "
            "these pins were not made by this version; unload them"
        )
