"""The bpf(2) system call, by hand: the few commands that a user of pinned objects needs.

No library and no compiler is involved, so every process can afford it. Descriptors are plain ints, close on
exec, closed by the caller. Every refusal by the kernel is a `BpfFault` (a PlatformFault) that says what was
asked, of which object, and carries the errno; "not there" is a value where that is an ordinary answer.

Layouts and numbers: include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ambient.errors import PlatformFault

_NUMBERS: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}

MAP_LOOKUP_ELEM: Final = 1
MAP_UPDATE_ELEM: Final = 2
MAP_DELETE_ELEM: Final = 3
MAP_GET_NEXT_KEY: Final = 4
OBJ_PIN: Final = 6
OBJ_GET: Final = 7
PROG_ATTACH: Final = 8
PROG_GET_FD_BY_ID: Final = 13
OBJ_GET_INFO_BY_FD: Final = 15
PROG_QUERY: Final = 16
MAP_LOOKUP_AND_DELETE_ELEM: Final = 21
MAP_LOOKUP_BATCH: Final = 24
MAP_UPDATE_BATCH: Final = 26
MAP_DELETE_BATCH: Final = 27
LINK_CREATE: Final = 28
LINK_UPDATE: Final = 29
LINK_DETACH: Final = 34

ANY: Final = 0
NOEXIST: Final = 1
EXIST: Final = 2

MAP_TYPE_SOCKHASH: Final = 18
PROG_TYPE_SCHED_CLS: Final = 3
PROG_TYPE_SOCK_OPS: Final = 13
PROG_TYPE_CGROUP_SOCK_ADDR: Final = 18
PROG_TYPE_SK_MSG: Final = 16
PROG_TYPE_CGROUP_SOCKOPT: Final = 25
PROG_TYPE_SK_LOOKUP: Final = 30

ATTACH_SOCK_OPS: Final = 3
ATTACH_CONNECT4: Final = 10
ATTACH_CONNECT6: Final = 11
ATTACH_SENDMSG4: Final = 14
ATTACH_SENDMSG6: Final = 15
ATTACH_RECVMSG4: Final = 19
ATTACH_RECVMSG6: Final = 20
ATTACH_GETPEERNAME4: Final = 29
ATTACH_GETPEERNAME6: Final = 30
ATTACH_SK_LOOKUP: Final = 36
ATTACH_SK_MSG: Final = 7
ATTACH_SETSOCKOPT: Final = 22
ATTACH_TCX_INGRESS: Final = 46

LINK_TYPE_CGROUP: Final = 3
LINK_TYPE_NETNS: Final = 5
LINK_TYPE_TCX: Final = 11
LINK_TYPE_SOCKMAP: Final = 14

ATTACH_FLAGS: Final = {0: "exclusive", 1: "override", 2: "multi"}


class BpfFault(PlatformFault):
    """The kernel refused a bpf command; ``errno`` says why in the kernel's words."""

    def __init__(self, what: str, number: int) -> None:
        hint = ""
        if number == errno.EPERM:
            hint = ": CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN are needed, or a foreign program is in the way"
        super().__init__(f"{what}: {os.strerror(number)}{hint}")
        self.errno = number


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_number = ctypes.c_long(_NUMBERS.get(platform.machine(), 0))
_ATTR_BYTES: Final = 128


def call(command: int, attr: Any, size: int) -> int:
    """One bpf(2) with a ctypes buffer. Returns the result, or minus errno; never raises for a refusal."""
    result = int(_syscall(_number, ctypes.c_int(command), ctypes.byref(attr), ctypes.c_uint(size)))
    return result if result >= 0 else -ctypes.get_errno()


def _command(command: int, packed: bytes) -> tuple[int, bytes]:
    attr = ctypes.create_string_buffer(packed.ljust(_ATTR_BYTES, b"\0"), _ATTR_BYTES)
    return call(command, attr, _ATTR_BYTES), attr.raw


def _check(what: str, result: int) -> int:
    if result < 0:
        raise BpfFault(what, -result)
    return result


def obj_get(path: str) -> int:
    """Open a pinned map, program or link."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    result, _ = _command(OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))
    return _check(f"open pin {path}", result)


def obj_pin(fd: int, path: str) -> None:
    """Pin an object at a path in a bpf file system that must not exist yet."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    result, _ = _command(OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0))
    _check(f"pin at {path}", result)


@dataclass(frozen=True, slots=True)
class MapInfo:
    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgInfo:
    type: int
    id: int
    tag: str
    name: str


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """``target`` is the cgroup id or the namespace inode; ``detached`` when the target is gone."""

    type: int
    id: int
    prog_id: int
    target: int
    attach_type: int

    @property
    def detached(self) -> bool:
        return self.target == 0


def _info(what: str, fd: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    result, _ = _command(OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(buffer)))
    _check(f"information on {what} (descriptor {fd})", result)
    return buffer.raw


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii", "replace")


def map_info(fd: int) -> MapInfo:
    raw = _info("map", fd, 80)
    kind, ident, key, value, entries, flags = struct.unpack_from("=6I", raw)
    return MapInfo(kind, ident, key, value, entries, flags, _text(raw[24:40]))


def prog_info(fd: int) -> ProgInfo:
    raw = _info("program", fd, 80)
    kind, ident = struct.unpack_from("=2I", raw)
    return ProgInfo(kind, ident, raw[8:16].hex(), _text(raw[64:80]))


def link_info(fd: int) -> LinkInfo:
    raw = _info("link", fd, 64)
    kind, ident, prog = struct.unpack_from("=3I", raw)
    if kind == LINK_TYPE_CGROUP:
        target, attach = struct.unpack_from("=QI", raw, 16)
    else:
        target, attach = struct.unpack_from("=II", raw, 16)
    return LinkInfo(kind, ident, prog, target, attach)


def link_create(prog_fd: int, target_fd: int, attach_type: int, what: str) -> int:
    """Attach a program to a cgroup directory or network namespace; returns the link's descriptor.

    ``what`` names program and target for the error message.
    """
    result, _ = _command(LINK_CREATE, struct.pack("=IIII", prog_fd, target_fd, attach_type, 0))
    return _check(f"attach {what}", result)


def prog_attach(prog_fd: int, target_fd: int, attach_type: int, what: str) -> None:
    """Attach without a link: a sockhash keeps its program as long as it lives."""
    result, _ = _command(PROG_ATTACH, struct.pack("=IIII", target_fd, prog_fd, attach_type, 0))
    _check(f"attach {what}", result)


def link_update(link_fd: int, prog_fd: int) -> None:
    """Swap the program of a link at once, with no moment without one."""
    result, _ = _command(LINK_UPDATE, struct.pack("=IIII", link_fd, prog_fd, 0, 0))
    _check(f"update link (descriptor {link_fd})", result)


def link_detach(link_fd: int) -> None:
    """Detach now, whoever else holds the link. A link already detached is fine."""
    result, _ = _command(LINK_DETACH, struct.pack("=I", link_fd))
    if result != -errno.ENOLINK:
        _check(f"detach link (descriptor {link_fd})", result)


def prog_fd_by_id(ident: int) -> int:
    result, _ = _command(PROG_GET_FD_BY_ID, struct.pack("=I", ident))
    return _check(f"open program {ident}", result)


def prog_query(target_fd: int, attach_type: int) -> tuple[tuple[int, ...], int]:
    """(ids of the programs attached to exactly this cgroup or namespace, attach flags)."""
    count = 64
    ids = (ctypes.c_uint32 * count)()
    packed = struct.pack("=IIIIQI", target_fd, attach_type, 0, 0, ctypes.addressof(ids), count)
    result, raw = _command(PROG_QUERY, packed)
    _check(f"list programs of attach type {attach_type}", result)
    flags = struct.unpack_from("=I", raw, 12)[0]
    used = struct.unpack_from("=I", raw, 24)[0]
    return tuple(ids[:used]), flags


class Table:
    """One map by descriptor, in bytes: fixed buffers, one system call per operation. Not for several threads."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.info = map_info(fd)
        self._key = ctypes.create_string_buffer(self.info.key_size)
        self._next = ctypes.create_string_buffer(self.info.key_size)
        self._value = ctypes.create_string_buffer(self.info.value_size)
        # struct { __u32 map_fd; __u64 key; __u64 value_or_next_key; __u64 flags; }, packed once.
        self._attr = self._element(self._value)
        self._attr_next = self._element(self._next)
        self._attr_delete = self._element(None)  # the kernel wants what a command does not use to be 0

    def _element(self, second: Any) -> Any:
        place = 0 if second is None else ctypes.addressof(second)
        packed = struct.pack("=IIQQQ", self.fd, 0, ctypes.addressof(self._key), place, 0)
        return ctypes.create_string_buffer(packed, len(packed))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _set_key(self, key: bytes) -> None:
        if len(key) != self.info.key_size or self.fd < 0:
            raise ValueError(f"map {self.name}: a key of {self.info.key_size} bytes, not {len(key)} (fd {self.fd})")
        self._key.raw = key

    def lookup(self, key: bytes) -> bytes | None:
        self._set_key(key)
        return self._read(MAP_LOOKUP_ELEM)

    def take(self, key: bytes) -> bytes | None:
        """Look up and delete in one step: of several takers exactly one gets the value."""
        self._set_key(key)
        return self._read(MAP_LOOKUP_AND_DELETE_ELEM)

    def _read(self, command: int) -> bytes | None:
        result = call(command, self._attr, 32)
        if result == 0:
            return self._value.raw
        if result == -errno.ENOENT:
            return None
        raise BpfFault(f"map {self.name}: read", -result)

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Raises BpfFault: E2BIG or ENOMEM when full, EEXIST and ENOENT by ``flags``."""
        self._set_key(key)
        if len(value) != self.info.value_size:
            raise ValueError(f"map {self.name}: a value of {self.info.value_size} bytes, not {len(value)}")
        self._value.raw = value
        struct.pack_into("=Q", self._attr, 24, flags)
        result = call(MAP_UPDATE_ELEM, self._attr, 32)
        struct.pack_into("=Q", self._attr, 24, 0)
        if result < 0:
            full = " (full)" if -result in (errno.E2BIG, errno.ENOMEM) else ""
            raise BpfFault(f"map {self.name}{full}: write, limit {self.info.max_entries} entries", -result)

    def delete(self, key: bytes) -> bool:
        """Whether there was such an entry."""
        self._set_key(key)
        result = call(MAP_DELETE_ELEM, self._attr_delete, 32)
        if result in (0, -errno.ENOENT):
            return result == 0
        raise BpfFault(f"map {self.name}: delete", -result)

    def update_many(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Write many entries of a hash map in one call. A BpfFault says how many were written before it failed."""
        keys, values = b"".join(key for key, _ in entries), b"".join(value for _, value in entries)
        if len(keys) != len(entries) * self.info.key_size or len(values) != len(entries) * self.info.value_size:
            raise ValueError(
                f"map {self.name}: keys and values of {self.info.key_size} and {self.info.value_size} bytes"
            )
        self._many(MAP_UPDATE_BATCH, keys, values, len(entries))

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Delete many entries of a hash map; those that are gone already are fine."""
        for start in range(0, len(keys), 4096):
            part = keys[start : start + 4096]
            try:
                self._many(MAP_DELETE_BATCH, b"".join(part), b"", len(part))
            except BpfFault:
                for key in part:
                    self.delete(key)

    def _many(self, command: int, keys: bytes, values: bytes, count: int) -> None:
        key_buffer = ctypes.create_string_buffer(keys, max(1, len(keys)))
        value_buffer = ctypes.create_string_buffer(values, max(1, len(values)))
        places = (ctypes.addressof(key_buffer), ctypes.addressof(value_buffer) if values else 0)
        result, raw = _command(command, struct.pack("=QQQQIIQQ", 0, 0, *places, count, self.fd, 0, 0))
        if result < 0:
            done = struct.unpack_from("=I", raw, 32)[0]
            raise BpfFault(f"map {self.name}: {done} of {count} entries done, limit {self.info.max_entries}", -result)

    def holds_any(self) -> bool:
        """Whether there is any entry."""
        attr = ctypes.create_string_buffer(self._attr_next.raw, 32)
        struct.pack_into("=Q", attr, 8, 0)
        result = call(MAP_GET_NEXT_KEY, attr, 32)
        if result in (0, -errno.ENOENT):
            return result == 0
        raise BpfFault(f"map {self.name}: list", -result)

    def list_keys(self) -> list[bytes]:
        """All keys, as of about now: entries that come and go meanwhile may be missed or listed."""
        keys: dict[bytes, None] = {}
        attr = ctypes.create_string_buffer(self._attr_next.raw, 32)
        struct.pack_into("=Q", attr, 8, 0)  # no key: the first one
        # A key that vanished makes the kernel start again at the first: bounded by the map's own size.
        for _ in range(2 * self.info.max_entries + 2):
            result = call(MAP_GET_NEXT_KEY, attr, 32)
            if result == -errno.ENOENT:
                break
            if result < 0:
                raise BpfFault(f"map {self.name}: list", -result)
            keys[self._next.raw] = None
            self._key.raw = self._next.raw
            struct.pack_into("=Q", attr, 8, ctypes.addressof(self._key))
        return list(keys)

    def items(self) -> list[tuple[bytes, bytes]]:
        """All entries, by batches where the kernel can (hash and array maps, 5.6), else one by one."""
        entries = self._batches()
        if entries is not None:
            return entries
        return [(key, value) for key in self.list_keys() if (value := self.lookup(key)) is not None]

    def _batches(self) -> list[tuple[bytes, bytes]] | None:
        if self.info.type != 1:  # BPF_MAP_TYPE_HASH
            return None
        size = 1024
        keys = ctypes.create_string_buffer(size * self.info.key_size)
        values = ctypes.create_string_buffer(size * self.info.value_size)
        token = ctypes.create_string_buffer(max(8, self.info.key_size))
        entries: dict[bytes, bytes] = {}
        first = True
        while True:
            packed = struct.pack(
                "=QQQQIIQQ",
                0 if first else ctypes.addressof(token),
                ctypes.addressof(token),
                ctypes.addressof(keys),
                ctypes.addressof(values),
                size,
                self.fd,
                0,
                0,
            )
            result, raw = _command(MAP_LOOKUP_BATCH, packed)
            if result == -errno.ENOSPC and first:
                return None  # one bucket holds more than a batch: walk instead
            if result not in (0, -errno.ENOENT):
                return None
            count = struct.unpack_from("=I", raw, 32)[0]
            for index in range(count):
                key = ctypes.string_at(ctypes.addressof(keys) + index * self.info.key_size, self.info.key_size)
                place = ctypes.addressof(values) + index * self.info.value_size
                entries[key] = ctypes.string_at(place, self.info.value_size)
            first = False
            if result == -errno.ENOENT:
                return list(entries.items())


def possible_cpus() -> int:
    """How many values an entry of a per-CPU map has."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        last = file.read().strip().rpartition(",")[2]
    return int(last.rpartition("-")[2]) + 1


def percpu_sums(table_fd: int, count: int, cpus: int) -> Sequence[int]:
    """Sums over CPUs of a per-CPU array of one u64 per entry."""
    key = ctypes.c_uint32(0)
    values = (ctypes.c_uint64 * cpus)()
    attr = ctypes.create_string_buffer(
        struct.pack("=IIQQQ", table_fd, 0, ctypes.addressof(key), ctypes.addressof(values), 0), 32
    )
    sums = []
    for index in range(count):
        key.value = index
        _check("read counters", call(MAP_LOOKUP_ELEM, attr, 32))
        sums.append(sum(values))
    return sums
