"""The agent's memory across restarts: agent.json (this node's pods) and names.json (numbers -> names).

Both are rewritten whole and renamed into place, so a reader never sees half a file. What cannot be read is
set aside and counts as empty: everything in it can be learnt again from the API, the kernel and the holder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ambient.datapath.numbers import Numbers
from ambient.manifest.acceleration import Acceleration

T = TypeVar("T")


class Record(msgspec.Struct, kw_only=True):
    """A pod of this node. Remembered from CNI ADD or from its enrolment until DEL."""

    uid: str
    namespace: str
    name: str
    service_account: str = "default"
    container_id: str = ""
    ifname: str = ""
    netns_path: str = ""
    netns_inode: int = 0
    addresses: tuple[str, ...] = ()
    generation: int = 0
    in_mesh: bool = False
    """Enrolled, or on the way in or out: there may be listeners, entries and attachments."""
    open_on_failure: bool = False
    """Its namespace asks for `ambient.mesh/on-failure: open`."""
    bypass: bool = False
    """An operator switched its namespace's capture off."""
    acceleration: str = Acceleration.OFF.value
    """What it and its namespace ask for; off until that is known."""
    gone: bool = False
    """DEL came; kept until the API says so too, so that its address is not believed to be the pod's."""


class Bypass(msgspec.Struct, kw_only=True, frozen=True):
    """Where an operator switched capture off: on the whole node, or for pods of some namespaces."""

    node: bool = False
    namespaces: tuple[str, ...] = ()

    def switched(self, on: bool, namespace: str) -> Bypass:
        """``namespace`` empty: the node. Switching the node back does not touch namespaces."""
        if not namespace:
            return Bypass(node=on, namespaces=self.namespaces)
        others = {n for n in self.namespaces if n != namespace}
        return Bypass(node=self.node, namespaces=tuple(sorted(others | {namespace} if on else others)))


class _State(msgspec.Struct, kw_only=True):
    pods: list[Record] = []
    last_generation: int = 0
    bypass: Bypass | None = None


class _Names(msgspec.Struct, kw_only=True):
    workloads: dict[str, str] = {}
    services: dict[str, str] = {}
    identities: dict[str, str] = {}
    policies: dict[str, str] = {}
    next_workload: int = 1
    next_service: int = 1
    next_identity: int = 1
    next_policy: int = 1


def write_atomically(path: Path, value: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
        file.write(msgspec.json.encode(value))
    aside.replace(path)


def _read(path: Path, kind: type[T]) -> tuple[T, str]:
    """The content and, if it cannot be used, why not."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind), ""
    except FileNotFoundError:
        return kind(), ""
    except (msgspec.DecodeError, OSError, UnicodeDecodeError, RecursionError) as error:
        try:
            path.replace(path.with_name(path.name + ".unreadable"))
        except OSError:
            pass
        return kind(), f"{path} cannot be read and was set aside: {error}"


class Records:
    """Pods by UID. Change a `Record`, then `save`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        state, self.problem = _read(path, _State)
        self.pods = {record.uid: record for record in state.pods}
        self.bypass = state.bypass
        """None: nobody ever said, what the kernel holds stands."""
        self._last_generation = state.last_generation

    def next_generation(self, now_ns: int) -> int:
        """Larger than any before, so an address that is used again never has an old one."""
        self._last_generation = max(self._last_generation + 1, now_ns)
        return self._last_generation

    def save(self) -> None:
        state = _State(pods=list(self.pods.values()), last_generation=self._last_generation, bypass=self.bypass)
        write_atomically(self._path, state)


class Names:
    """The numbers of workloads, services, identities and policies, written whenever they changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        names, self.problem = _read(path, _Names)
        self.workloads = Numbers(_inverse(names.workloads), names.next_workload)
        self.services = Numbers(_inverse(names.services), names.next_service)
        self.identities = Numbers(_inverse(names.identities), names.next_identity)
        self.policies = Numbers(_inverse(names.policies), names.next_policy)
        self._written: tuple[int, ...] = ()

    def save(self) -> None:
        kinds = (self.workloads, self.services, self.identities, self.policies)
        versions = tuple(numbers.version for numbers in kinds)
        if versions == self._written:
            return
        content = _Names(
            workloads=_texts(self.workloads),
            services=_texts(self.services),
            identities=_texts(self.identities),
            policies=_texts(self.policies),
            next_workload=self.workloads.next,
            next_service=self.services.next,
            next_identity=self.identities.next,
            next_policy=self.policies.next,
        )
        write_atomically(self._path, content)
        self._written = versions


def _texts(numbers: Numbers) -> dict[str, str]:
    return {str(number): name for number, name in numbers.names().items()}


def _inverse(names: dict[str, str]) -> dict[str, int]:
    return {name: int(number) for number, name in names.items() if number.isascii() and number.isdigit()}
