"""Where the fields of the running kernel's structures are, from its BTF.

The kernel describes its own types in /sys/kernel/btf/vmlinux. Only what is needed of that format is read: structs,
unions, enums, and the names they lead to; anything out of bounds or unknown is a PlatformFault, because a wrong offset
would make programs read, and believe, the wrong memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ambient.errors import PlatformFault

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
PROC_CGROUPS: Final = Path("/proc/cgroups")
_HEADER: Final = struct.Struct("=HBBIIIII")
_MAGIC: Final = 0xEB9F
_INT, _POINTER, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC_PROTO, _VAR, _DATASEC = 8, 9, 10, 11, 13, 14, 15
_FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = 16, 17, 18, 19
_EXTRA: Final = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
"""Bytes behind a type's own 12, by kind; none for the kinds not named."""
_EACH: Final = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
"""Bytes for each of its elements."""
_LAST_KIND: Final = 19
_DEPTH: Final = 8
_NAMED: Final = {
    "OFF_SOCK_COOKIE": ("sock", "__sk_common.skc_cookie", 8),
    "OFF_SOCK_FLAGS": ("sock", "__sk_common.skc_flags", 8),
    "OFF_SOCK_PROT": ("sock", "__sk_common.skc_prot", 8),
    "OFF_SOCK_RMEM": ("sock", "sk_backlog.rmem_alloc", 4),
    "OFF_SOCK_RCVBUF": ("sock", "sk_rcvbuf", 4),
    "OFF_SOCK_FORWARD": ("sock", "sk_forward_alloc", 4),
    "OFF_SOCK_OWNED": ("sock", "sk_lock.owned", 4),
    "OFF_SOCK_SOCKET": ("sock", "sk_socket", 8),
    "OFF_SOCKET_FILE": ("socket", "file", 8),
    "OFF_FILE_FLAGS": ("file", "f_flags", 4),
    "OFF_TCP_SND_UNA": ("tcp_sock", "snd_una", 4),
    "OFF_TCP_WRITE_SEQ": ("tcp_sock", "write_seq", 4),
    "OFF_TCP_COPIED_SEQ": ("tcp_sock", "copied_seq", 4),
    "OFF_TCP_RCV_NXT": ("tcp_sock", "rcv_nxt", 4),
    "OFF_PROTO_PRESSURE": ("proto", "memory_pressure", 8),
    "OFF_SOCK_WQ": ("sock", "sk_wq", 8),
    "OFF_WQ_HEAD": ("socket_wq", "wait.head.next", 8),
    "OFF_WQ_ASYNC": ("socket_wq", "fasync_list", 8),
    "OFF_EPOLL_ENTRY": ("eppoll_entry", "wait.entry.next", 8),
    "OFF_EPOLL_BASE": ("eppoll_entry", "base", 8),
    "OFF_EPITEM_EVENTS": ("epitem", "event.events", 4),
    "OFF_EPITEM_FILE": ("epitem", "ffd.file", 8),
}
"""Macro of bpf/include/redirect.h -> structure, field, bytes read. All are needed."""
_MEMCG: Final = {
    "OFF_SOCK_MEMCG": ("sock", "sk_memcg", 8),
    "OFF_MEMCG_PRESSURE": ("mem_cgroup", "socket_pressure", 8),
}
"""All are needed where sockets belong to memory cgroups, and of the next two those of the version in use."""
_MEMCG_V2: Final = {
    "OFF_MEMCG_MEMORY": ("mem_cgroup", "memory.usage", 8),
    "OFF_COUNTER_USAGE": ("page_counter", "usage", 8),
    "OFF_COUNTER_MAX": ("page_counter", "max", 8),
    "OFF_COUNTER_PARENT": ("page_counter", "parent", 8),
}
_MEMCG_V1: Final = {
    "OFF_MEMCG_TCP_PRESSURE": ("mem_cgroup", "tcpmem_pressure", 4),
    "OFF_MEMCG_TCP_ACTIVE": ("mem_cgroup", "tcpmem_active", 1),
    "OFF_MEMCG_TCP_USAGE": ("mem_cgroup", "tcpmem.usage", 8),
    "OFF_MEMCG_TCP_MAX": ("mem_cgroup", "tcpmem.max", 8),
}


@dataclass(frozen=True, slots=True)
class _Type:
    kind: int
    name: int
    flag: bool
    length: int
    size: int
    """Bytes, or the type it refers to."""
    body: int
    """Offset of its elements."""


class Btf:
    """Parsed types of one kernel. Raises PlatformFault on anything not understood."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        if len(raw) < _HEADER.size:
            raise PlatformFault(f"BTF of {len(raw)} bytes has no header")
        magic, version, _, header, types, types_bytes, strings, strings_bytes = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != 1 or header < _HEADER.size:
            raise PlatformFault(f"BTF magic {magic:#x}, version {version}: not this machine's format")
        self._types_at = header + types
        self._types_end = self._types_at + types_bytes
        self._strings = header + strings
        self._strings_end = self._strings + strings_bytes
        if max(self._types_end, self._strings_end) > len(raw):
            raise PlatformFault(f"BTF is cut short: {len(raw)} bytes")
        self._at = [0]
        self._named: dict[tuple[int, bytes], int] = {}
        self._index()

    def _index(self) -> None:
        """Where each type begins, and the named structs and enums."""
        raw, position, unpack = self._raw, self._types_at, struct.Struct("=III").unpack_from
        wanted = {b"sock_flags"}
        wanted |= {where[0].encode() for where in (_NAMED | _MEMCG | _MEMCG_V2 | _MEMCG_V1).values()}
        while position < self._types_end:
            if position + 12 > self._types_end:
                raise PlatformFault(f"BTF type {len(self._at)} is cut short")
            name, info, _ = unpack(raw, position)
            kind, length = info >> 24 & 31, info & 0xFFFF
            if not 1 <= kind <= _LAST_KIND:
                raise PlatformFault(f"BTF type {len(self._at)} is of kind {kind}, which is not known")
            self._at.append(position)
            if kind in (_STRUCT, _ENUM) and (text := self._text(name)) in wanted:
                self._named.setdefault((kind, text), len(self._at) - 1)
            position += 12 + _EXTRA.get(kind, 0) + _EACH.get(kind, 0) * length

    def _text(self, offset: int) -> bytes:
        start = self._strings + offset
        if not self._strings <= start < self._strings_end:
            raise PlatformFault(f"BTF name {offset} is out of bounds")
        return self._raw[start : self._raw.index(b"\0", start)]

    def _type(self, ident: int) -> _Type:
        if not 1 <= ident < len(self._at):
            raise PlatformFault(f"BTF type {ident} does not exist")
        position = self._at[ident]
        name, info, size = struct.unpack_from("=III", self._raw, position)
        return _Type(info >> 24 & 31, name, bool(info >> 31), info & 0xFFFF, size, position + 12)

    def _resolve(self, ident: int) -> _Type:
        """Through typedefs and qualifiers."""
        for _ in range(32):
            found = self._type(ident)
            if found.kind not in (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG):
                return found
            ident = found.size
        raise PlatformFault(f"BTF type {ident} refers to itself")

    def _bytes(self, ident: int) -> int:
        found = self._resolve(ident)
        if found.kind == _POINTER:
            return 8
        if found.kind in (_INT, _STRUCT, _UNION, _ENUM, _ENUM64, _FLOAT):
            return found.size
        return 0

    def _member(self, owner: _Type, name: bytes, depth: int = 0) -> tuple[int, int] | None:
        """(offset in bits, type) of a member, also inside members without a name."""
        if depth > _DEPTH or owner.kind not in (_STRUCT, _UNION):
            return None
        for index in range(owner.length):
            text, ident, where = struct.unpack_from("=III", self._raw, owner.body + 12 * index)
            bits, width = (where & 0xFFFFFF, where >> 24) if owner.flag else (where, 0)
            if text and self._text(text) == name:
                if width or bits % 8:
                    raise PlatformFault(f"{name.decode()} is a bit field")
                return bits, ident
            if not text and (inner := self._member(self._resolve(ident), name, depth + 1)):
                return bits + inner[0], inner[1]
        return None

    def offset(self, structure: str, path: str, size: int) -> int:
        """Bytes from the start of ``struct structure`` to a field (``a.b.c``) of exactly ``size`` bytes."""
        ident = self._named.get((_STRUCT, structure.encode()))
        if ident is None:
            raise PlatformFault(f"this kernel has no struct {structure}")
        owner, total = self._type(ident), 0
        for part in path.split("."):
            found = self._member(owner, part.encode())
            if found is None:
                raise PlatformFault(f"this kernel's struct {structure} has no {path}")
            total += found[0] // 8
            ident = found[1]
            owner = self._resolve(ident)
        if (actual := self._bytes(ident)) != size:
            raise PlatformFault(f"this kernel's struct {structure}: {path} has {actual} bytes, not {size}")
        return total

    def has(self, structure: str, member: str) -> bool:
        ident = self._named.get((_STRUCT, structure.encode()))
        return ident is not None and self._member(self._type(ident), member.encode()) is not None

    def enumerator(self, enum: str, name: str) -> int:
        ident = self._named.get((_ENUM, enum.encode()))
        if ident is not None:
            found = self._type(ident)
            for index in range(found.length):
                text, value = struct.unpack_from("=Ii", self._raw, found.body + 8 * index)
                if self._text(text) == name.encode():
                    return int(value)
        raise PlatformFault(f"this kernel's enum {enum} has no {name}")


def memory_is_v1(cgroups: str | None = None) -> bool:
    """Whether the memory controller is in a hierarchy of cgroup v1, which counts TCP's memory apart (/proc/cgroups)."""
    lines = (PROC_CGROUPS.read_text() if cgroups is None else cgroups).splitlines()
    return any(fields[0] == "memory" and fields[1] != "0" for fields in map(str.split, lines) if len(fields) > 1)


def redirect_macros(raw: bytes | None = None, v1: bool | None = None) -> tuple[dict[str, int], str]:
    """(macros for bpf/include/redirect.h, why redirection must stay off or the empty string).

    ``v1``: `memory_is_v1` of this machine if None.
    """
    zeroes = dict.fromkeys(_NAMED, 0) | {"SOCK_FLAG_ZEROCOPY": 0, "REDIRECT_OFFSETS": 0}
    try:
        btf = Btf(VMLINUX.read_bytes() if raw is None else raw)
        macros = {name: btf.offset(*where) for name, where in _NAMED.items()}
        macros["SOCK_FLAG_ZEROCOPY"] = btf.enumerator("sock_flags", "SOCK_ZEROCOPY")
        if btf.has("sock", "sk_memcg"):
            v1 = memory_is_v1() if v1 is None else v1
            macros |= {name: btf.offset(*where) for name, where in (_MEMCG | (_MEMCG_V1 if v1 else _MEMCG_V2)).items()}
            if not v1:
                macros["OFF_MEMCG_MEMORY"] -= macros["OFF_COUNTER_USAGE"]
    except (OSError, PlatformFault, ValueError, struct.error) as error:
        return zeroes, f"no usable BTF: {error}"
    return macros | {"REDIRECT_OFFSETS": 1}, ""
