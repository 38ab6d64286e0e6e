"""Keys and values of the kernel maps as Python values, and their bytes.

One dataclass per struct of layout.h, same field names. Addresses are canonical text (``10.0.0.1``,
``fd00::1``), the empty string standing for ``::``, "none". Integers are host order. Encoding checks every
range (ValueError names the field); decoding needs exactly the struct's size. The byte formats are derived
from `LAYOUT`, never written down here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Any, ClassVar, Final, NamedTuple, Self

from ambient.datapath.layout import LAYOUT
from ambient.model.address import packed16, parse_ip

_NO_ADDRESS: Final = bytes(16)
_MAPPED: Final = bytes(10) + b"\xff\xff"
_CODES: Final = {"__u8": "B", "__u16": "H", "__u32": "I", "__u64": "Q"}


class Admission(NamedTuple):
    """One connection of ztunnel's that is to be let into a pod, and the client that the application shall see.

    ``local`` is the pod's side (where the application listens), ``remote`` the address and port ztunnel's socket is
    bound to, ``netns`` the cookie of the pod's namespace. ``client`` empty shows ``remote`` itself.
    """

    local: str
    local_port: int
    remote: str
    remote_port: int
    workload: int = 0
    generation: int = 0
    client: str = ""
    client_port: int = 0
    netns: int = 0


@lru_cache(maxsize=4096)
def address_text(raw: bytes) -> str:
    """16 bytes of a map -> canonical text; ``::`` -> the empty string."""
    if raw[:12] == _MAPPED:
        return f"{raw[12]}.{raw[13]}.{raw[14]}.{raw[15]}"
    return "" if raw == _NO_ADDRESS else str(IPv6Address(raw))


@lru_cache(maxsize=4096)
def address_bytes(text: str) -> bytes:
    """Inverse of `address_text`. Raises ValueError naming the text."""
    return packed16(parse_ip(text)) if text else _NO_ADDRESS


def _format(struct_name: str, whole: frozenset[str] = frozenset()) -> str:
    """Fields of the structs in ``whole`` stay bytes, to be read by their own class."""
    out = ""
    for field in LAYOUT.structs[struct_name].fields:
        if field.is_padding:
            out += f"{field.size}x"
        elif field.kind == "address":
            out += "16s" * (field.count or 1)
        elif field.kind in _CODES:
            out += _CODES[field.kind] * (field.count or 1)
        elif field.kind in whole:
            out += f"{LAYOUT.structs[field.kind].size}s" * (field.count or 1)
        else:
            out += _format(field.kind) * (field.count or 1)
    return out


def offset_of(struct_name: str, path: str) -> int:
    """Where a field is, ``value.client.cookie`` in nested structs. Raises KeyError if there is none."""
    name, _, rest = path.partition(".")
    field = {field.name: field for field in LAYOUT.structs[struct_name].fields}[name]
    return field.offset + (offset_of(field.kind, rest) if rest else 0)


def picker(struct_name: str, *paths: str) -> struct.Struct:
    """Reads just these scalars, given in the order they lie in, and is quicker than whole records."""
    out, at = "<", 0
    for path in paths:
        offset, kind = offset_of(struct_name, path), _kind_of(struct_name, path)
        out += f"{offset - at}x{_CODES[kind]}"
        at = offset + struct.calcsize(_CODES[kind])
    return struct.Struct(f"{out}{LAYOUT.structs[struct_name].size - at}x")


def _kind_of(struct_name: str, path: str) -> str:
    name, _, rest = path.partition(".")
    field = {field.name: field for field in LAYOUT.structs[struct_name].fields}[name]
    return _kind_of(field.kind, rest) if rest else field.kind


class Record:
    """Base of the dataclasses below. ``_struct`` names the struct of layout.h."""

    __slots__ = ()
    _struct: ClassVar[str]
    _codec: ClassVar[struct.Struct]
    _addresses: ClassVar[tuple[int, ...]]
    _nested: ClassVar[tuple[tuple[int, type[Record]], ...]] = ()

    @classmethod
    def _bind(cls) -> None:
        """Check the class against the layout, once, at import."""
        wanted = [field.name for field in LAYOUT.structs[cls._struct].fields if not field.is_padding]
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if names != wanted:
            raise TypeError(f"{cls.__name__} has {names}, struct {cls._struct} has {wanted}")
        kept = [field for field in LAYOUT.structs[cls._struct].fields if not field.is_padding]
        cls._codec = struct.Struct("<" + _format(cls._struct, frozenset(record._struct for record in RECORDS)))
        cls._addresses = tuple(index for index, field in enumerate(kept) if field.kind == "address")
        kinds = {record._struct: record for record in RECORDS}
        cls._nested = tuple((index, kinds[field.kind]) for index, field in enumerate(kept) if field.kind in kinds)
        if cls._codec.size != LAYOUT.structs[cls._struct].size:
            raise TypeError(f"{cls.__name__}: {cls._codec.size} bytes, not {LAYOUT.structs[cls._struct].size}")

    @classmethod
    def size(cls) -> int:
        return cls._codec.size

    def encode(self) -> bytes:
        """The struct's bytes. Raises ValueError naming class, field and rule."""
        names: tuple[str, ...] = self.__slots__
        values = [getattr(self, name) for name in names]
        try:
            for index in self._addresses:
                values[index] = address_bytes(values[index])
            for index, _ in self._nested:
                values[index] = values[index].encode()
            return self._codec.pack(*values)
        except (struct.error, ValueError, TypeError) as error:
            raise ValueError(f"{type(self).__name__}: {error}: {self!r}") from None

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Raises ValueError unless there are exactly `size` bytes."""
        try:
            values: list[Any] = list(cls._codec.unpack(raw))
        except struct.error as error:
            raise ValueError(f"{cls.__name__}: {error}, not {len(raw)}") from None
        for index in cls._addresses:
            values[index] = address_text(values[index])
        for index, kind in cls._nested:
            values[index] = kind.decode(values[index])
        return cls(*values)


@dataclass(frozen=True, slots=True)
class EnrolledValue(Record):
    """`flows` and `refused` are written by programs."""

    _struct: ClassVar[str] = "enrolled_value"
    address4: str
    address6: str
    workload: int
    flows_max: int = LAYOUT["FLOWS_SHARE_DEFAULT"]
    flows: int = 0
    flags: int = 0
    refused: int = 0
    identity: int = 0


@dataclass(frozen=True, slots=True)
class WorkloadValue(Record):
    _struct: ClassVar[str] = "workload_value"
    workload: int
    flags: int
    generation: int


@dataclass(frozen=True, slots=True)
class ServiceKey(Record):
    _struct: ClassVar[str] = "service_key"
    vip: str
    port: int


@dataclass(frozen=True, slots=True)
class ServiceValue(Record):
    """``endpoints`` is the number of usable slots; 0 leaves the choice to ztunnel."""

    _struct: ClassVar[str] = "service_value"
    service: int
    flags: int
    endpoints: int = 0


@dataclass(frozen=True, slots=True)
class EndpointKey(Record):
    """``port`` is the service's."""

    _struct: ClassVar[str] = "endpoint_key"
    service: int
    port: int
    slot: int


@dataclass(frozen=True, slots=True)
class EndpointValue(Record):
    """What clients of a VIP of either family are sent to; ``port`` is the endpoint's."""

    _struct: ClassVar[str] = "endpoint_value"
    address4: str
    address6: str
    workload: int
    port: int


@dataclass(frozen=True, slots=True)
class VerdictKey(Record):
    """``port`` 0 stands for every port without an entry of its own."""

    _struct: ClassVar[str] = "verdict_key"
    identity: int
    workload: int
    port: int


@dataclass(frozen=True, slots=True)
class VerdictValue(Record):
    _struct: ClassVar[str] = "verdict_value"
    generation: int
    allow: int
    policy: int = 0


@dataclass(frozen=True, slots=True)
class RedirectKey(Record):
    _struct: ClassVar[str] = "redirect_key"
    cookie: int
    netns: int = 0
    client: str = ""
    client_port: int = 0
    listener_port: int = 0


@dataclass(frozen=True, slots=True)
class RedirectValue(Record):
    """What the client dialled (`original`), the hook's choice (`endpoint`, empty if none), who it is."""

    _struct: ClassVar[str] = "redirect_value"
    original: str
    endpoint: str
    client: str
    netns: int
    created_ns: int
    source: int
    original_port: int
    endpoint_port: int
    client_port: int


@dataclass(frozen=True, slots=True)
class TupleKey(Record):
    """A connection into a pod, seen from the pod."""

    _struct: ClassVar[str] = "tuple_key"
    local: str
    remote: str
    local_port: int
    remote_port: int


@dataclass(frozen=True, slots=True)
class AuthorizedValue(Record):
    _struct: ClassVar[str] = "authorized_value"
    generation: int
    created_ns: int
    workload: int
    reason: int
    netns: int = 0


@dataclass(frozen=True, slots=True)
class OriginValue(Record):
    _struct: ClassVar[str] = "origin_value"
    client: str
    created_ns: int
    accepted: int
    client_port: int
    netns: int = 0


@dataclass(frozen=True, slots=True)
class FlowEnd(Record):
    """One end of a kernel flow; its counters are of what this end sent."""

    _struct: ClassVar[str] = "flow_end"
    sock: int = 0
    cookie: int = 0
    native_bytes: int = 0
    redirect_bytes: int = 0
    redirect_messages: int = 0
    switches: int = 0
    last_native_ns: int = 0
    seen_ns: int = 0
    queued_messages: int = 0
    state: int = 0
    flags: int = 0
    sighting: int = 0
    seen_seq: int = 0
    lookups: int = 0


@dataclass(frozen=True, slots=True)
class FlowValue(Record):
    """A connection authorized in the kernel, with both its ends."""

    _struct: ClassVar[str] = "flow_value"
    client: FlowEnd
    server: FlowEnd
    created_ns: int
    generation: int
    netns_client: int
    netns_server: int
    original: str
    source: int
    destination: int
    identity: int
    policy: int
    original_port: int
    reason: int
    acceleration: int
    flags: int


@dataclass(frozen=True, slots=True)
class FlowEvent(Record):
    """What the ring buffer carries when the last end of a flow closed."""

    _struct: ClassVar[str] = "flow_event"
    key: TupleKey
    value: FlowValue
    closed_ns: int


@dataclass(frozen=True, slots=True)
class ListenerKey(Record):
    """`kind` is LISTENER_OUTBOUND, LISTENER_INBOUND_PLAINTEXT or LISTENER_HBONE."""

    _struct: ClassVar[str] = "listener_key"
    pod: str
    kind: int


@dataclass(frozen=True, slots=True)
class Range:
    """An address range; ``prefix`` counts bits of the 128-bit address (an IPv4 /8 is 104)."""

    base: str
    prefix: int


@dataclass(frozen=True, slots=True)
class SettingsValue:
    """What the agent tells the programs. Its arrays make it the one value with a codec of its own."""

    generation: int = 0
    heartbeat_ns: int = 0
    exempt_cgroups: tuple[int, ...] = ()
    kubelet_cgroups: tuple[int, ...] = ()
    cluster_ranges: tuple[Range, ...] = ()
    mode: int = LAYOUT["MODE_CAPTURE"]
    complete: int = 0
    heartbeat_timeout_s: int = 0
    acceleration: int = 0
    high_bytes: int = 0

    _codec: ClassVar[struct.Struct] = struct.Struct("<" + _format("settings_value"))

    @classmethod
    def size(cls) -> int:
        return cls._codec.size

    def encode(self) -> bytes:
        """Raises ValueError if there is more of something than the layout has room for."""
        ranges: list[bytes | int] = []
        for index in range(LAYOUT["CLUSTER_RANGES_MAX"]):
            entry = self.cluster_ranges[index] if index < len(self.cluster_ranges) else Range("", 0)
            ranges += [address_bytes(entry.base), entry.prefix]
        if len(self.cluster_ranges) > LAYOUT["CLUSTER_RANGES_MAX"]:
            raise ValueError(f"cluster_ranges: at most {LAYOUT['CLUSTER_RANGES_MAX']}")
        try:
            return self._codec.pack(
                self.generation,
                self.heartbeat_ns,
                *_padded("exempt_cgroups", self.exempt_cgroups, LAYOUT["EXEMPT_CGROUPS_MAX"]),
                *_padded("kubelet_cgroups", self.kubelet_cgroups, LAYOUT["KUBELET_CGROUPS_MAX"]),
                *ranges,
                self.mode,
                self.complete,
                len(self.cluster_ranges),
                self.heartbeat_timeout_s,
                self.acceleration,
                self.high_bytes,
            )
        except struct.error as error:
            raise ValueError(f"SettingsValue: {error}: {self!r}") from None

    @classmethod
    def decode(cls, raw: bytes) -> SettingsValue:
        try:
            values: list[Any] = list(cls._codec.unpack(raw))
        except struct.error as error:
            raise ValueError(f"SettingsValue: {error}, not {len(raw)}") from None
        generation, heartbeat_ns = values[:2]
        rest = values[2:]
        exempt, rest = rest[: LAYOUT["EXEMPT_CGROUPS_MAX"]], rest[LAYOUT["EXEMPT_CGROUPS_MAX"] :]
        kubelet, rest = rest[: LAYOUT["KUBELET_CGROUPS_MAX"]], rest[LAYOUT["KUBELET_CGROUPS_MAX"] :]
        ranges, rest = rest[: 2 * LAYOUT["CLUSTER_RANGES_MAX"]], rest[2 * LAYOUT["CLUSTER_RANGES_MAX"] :]
        mode, complete, used, timeout, acceleration, high_bytes = rest
        pairs = [Range(address_text(ranges[2 * index]), ranges[2 * index + 1]) for index in range(len(ranges) // 2)]
        return cls(
            generation=generation,
            heartbeat_ns=heartbeat_ns,
            exempt_cgroups=tuple(entry for entry in exempt if entry),
            kubelet_cgroups=tuple(entry for entry in kubelet if entry),
            cluster_ranges=tuple(pairs[:used]),
            mode=mode,
            complete=complete,
            heartbeat_timeout_s=timeout,
            acceleration=acceleration,
            high_bytes=high_bytes,
        )


def _padded(name: str, values: tuple[int, ...], count: int) -> tuple[int, ...]:
    if len(values) > count or 0 in values:
        raise ValueError(f"{name}: at most {count} and none 0: {values!r}")
    return values + (0,) * (count - len(values))


def network_range(network: str) -> Range:
    """``10.0.0.0/8`` -> a `Range`. Raises ValueError naming the text."""
    base, _, bits = network.partition("/")
    address = parse_ip(base)
    width = 32 if address.version == 4 else 128
    prefix = int(bits) if bits else width
    if not 0 <= prefix <= width:
        raise ValueError(f"{network!r}: prefix 0 to {width}")
    return Range(address_text(packed16(address)), prefix + 128 - width)


def reason_name(number: int) -> str:
    """``REASON_NOT_MESH`` -> ``not_mesh``: the word of the CLI and the metrics."""
    name = LAYOUT.names("reason").get(number)
    return name.removeprefix("REASON_").lower() if name else f"unknown_{number}"


RECORDS: Final[tuple[type[Record], ...]] = (
    EnrolledValue,
    WorkloadValue,
    ServiceKey,
    ServiceValue,
    RedirectKey,
    RedirectValue,
    TupleKey,
    AuthorizedValue,
    OriginValue,
    EndpointKey,
    EndpointValue,
    VerdictKey,
    VerdictValue,
    FlowEnd,
    FlowValue,
    FlowEvent,
    ListenerKey,
)
for _record in RECORDS:
    _record._bind()
