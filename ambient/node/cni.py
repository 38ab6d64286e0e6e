"""What the container runtime asks of the CNI plugin and what it is answered (CNI specification 1.1.0).

Pure: bytes from the stub in, a `Request` or an `Answer` out; the agent decides in between. The plugin is
chained behind the one that made the interface, so ADD passes the previous result on untouched and never
raises its cniVersion: runtimes change their behaviour with it. Whatever arrives, an answer goes back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from ambient.model.address import IPAddress, parse_ip

VERSIONS: Final = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
REQUEST_BYTES_MAX: Final = 4 * 1024 * 1024
"""The stub takes 1 MiB of configuration; escaping can make it longer."""

# Error codes of the specification.
INCOMPATIBLE_VERSION: Final = 1
INVALID_ENVIRONMENT: Final = 4
UNDECODABLE: Final = 6
INVALID_CONFIG: Final = 7
TRY_AGAIN_LATER: Final = 11
NOT_ENROLLED: Final = 101
"""100 and above are the plugin's own: enrolling the pod failed."""

_COMMANDS: Final = frozenset({"ADD", "DEL", "CHECK", "VERSION", "STATUS", "GC"})
_TEXT_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """Exit code and standard output of the plugin."""

    code: int
    stdout: str = ""

    def encode(self) -> bytes:
        return msgspec.json.encode({"code": self.code, "stdout": self.stdout})


@dataclass(frozen=True, slots=True)
class Attachment:
    container_id: str
    ifname: str


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request. ``netns`` may be empty for DEL; the pod's fields are empty outside Kubernetes."""

    command: str
    version: str
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    pod_uid: str = ""
    addresses: tuple[IPAddress, ...] = ()
    previous: str = ""
    """The previous result as JSON text."""
    valid: tuple[Attachment, ...] | None = None
    """GC: the attachments that still exist; None if the runtime did not say."""

    @property
    def of_a_pod(self) -> bool:
        return bool(self.pod_namespace and self.pod_name)


class _Wire(msgspec.Struct):
    env: dict[str, str]
    stdin: str


def error(version: str, code: int, message: str, details: str = "") -> Answer:
    """An error result; ``message`` is what the user reads in the pod's events."""
    body = {"cniVersion": version, "code": code, "msg": message[:_TEXT_MAX]}
    if details:
        body["details"] = details[:_TEXT_MAX]
    return Answer(1, msgspec.json.encode(body).decode())


def done(request: Request) -> Answer:
    """Success: ADD passes the previous result on, everything else says nothing."""
    return Answer(0, request.previous if request.command == "ADD" else "")


def read_request(raw: bytes) -> Request | Answer:
    """Parse what the stub sent. An Answer is returned for what needs no decision: VERSION, STATUS, refusals."""
    try:
        wire = msgspec.json.decode(raw, type=_Wire)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        return error("1.1.0", UNDECODABLE, "the request of ambient-cni cannot be read", str(fault))
    command = wire.env.get("CNI_COMMAND", "")
    try:
        config = msgspec.json.decode(wire.stdin.encode()) if wire.stdin.strip() else {}
    except (msgspec.DecodeError, UnicodeError, RecursionError) as fault:
        if command == "DEL":
            config = {}  # deleting must succeed whatever became of the configuration
        else:
            return error("1.1.0", UNDECODABLE, "the network configuration is not JSON", str(fault))
    if not isinstance(config, dict):
        if command != "DEL":
            return error("1.1.0", UNDECODABLE, "the network configuration is not a JSON object")
        config = {}
    version = config.get("cniVersion", "1.1.0" if command in ("VERSION", "DEL") else "")
    if not isinstance(version, str):
        version = ""
    if command == "VERSION":
        body = {"cniVersion": version if version in VERSIONS else VERSIONS[-1], "supportedVersions": VERSIONS}
        return Answer(0, msgspec.json.encode(body).decode())
    if command not in _COMMANDS:
        return error(version or "1.1.0", INVALID_ENVIRONMENT, f"CNI_COMMAND {command[:40]!r} is not known")
    if command == "STATUS":
        return Answer(0)  # failing it would make the whole node NotReady, the mesh's own pods included
    if version not in VERSIONS and command != "DEL":
        return error(
            "1.1.0",
            INCOMPATIBLE_VERSION,
            f"cniVersion {version[:40]!r} is not supported; ambient-cni speaks {', '.join(VERSIONS)}",
        )
    return _judge(command, version, wire.env, config)


def _judge(command: str, version: str, env: dict[str, str], config: dict[str, Any]) -> Request | Answer:
    arguments = _arguments(env.get("CNI_ARGS", ""))
    request = Request(
        command=command,
        version=version,
        container_id=env.get("CNI_CONTAINERID", ""),
        netns=env.get("CNI_NETNS", ""),
        ifname=env.get("CNI_IFNAME", ""),
        pod_namespace=arguments.get("K8S_POD_NAMESPACE", ""),
        pod_name=arguments.get("K8S_POD_NAME", ""),
        pod_uid=arguments.get("K8S_POD_UID", ""),
        valid=_valid(config.get("cni.dev/valid-attachments")) if command == "GC" else None,
    )
    if any(len(text) > _TEXT_MAX for text in (*env.values(), version)):
        return error("1.1.0", INVALID_ENVIRONMENT, f"a CNI_* variable exceeds {_TEXT_MAX} bytes")
    if command in ("DEL", "GC"):
        return request
    if not request.container_id or not request.netns:
        return error(version, INVALID_ENVIRONMENT, f"{command} needs CNI_CONTAINERID and CNI_NETNS")
    previous = config.get("prevResult")
    if not isinstance(previous, dict):
        return error(
            version, INVALID_CONFIG, "ambient-cni must come after another plugin in the list: prevResult is missing"
        )
    addresses = _addresses(previous)
    if isinstance(addresses, str):
        return error(version, INVALID_CONFIG, f"prevResult: {addresses}")
    previous.setdefault("cniVersion", version)
    return replace(request, addresses=addresses, previous=msgspec.json.encode(previous).decode())


def _arguments(text: str) -> dict[str, str]:
    """CNI_ARGS: ``KEY=VALUE;KEY=VALUE``. What is not of this form is skipped, as libcni does with IgnoreUnknown."""
    pairs = (part.partition("=") for part in text.split(";"))
    return {key: value for key, separator, value in pairs if separator}


def _addresses(previous: dict[str, Any]) -> tuple[IPAddress, ...] | str:
    """The pod's addresses in the previous result, or what is wrong with them."""
    entries = previous.get("ips", [])
    if not isinstance(entries, list):
        return "ips is not a list"
    found: list[IPAddress] = []
    for entry in entries[:64]:
        text = entry.get("address") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            return "an entry of ips has no address"
        try:
            found.append(parse_ip(text.partition("/")[0]))
        except ValueError as fault:
            return str(fault)
    return tuple(dict.fromkeys(found))


def _valid(value: object) -> tuple[Attachment, ...] | None:
    if not isinstance(value, list):
        return None
    found: list[Attachment] = []
    for entry in value:
        if not isinstance(entry, dict):
            return None  # collecting by a list that cannot be read would end living pods
        container, ifname = entry.get("containerID"), entry.get("ifname")
        if not isinstance(container, str) or not isinstance(ifname, str):
            return None
        found.append(Attachment(container, ifname))
    return tuple(found)
