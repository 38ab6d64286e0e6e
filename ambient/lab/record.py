"""What a lab leaves on disk for other processes to find it: its plan, its supervisor, its pods.

``lab.json`` is written before anything else is made, so that `lab down` finds also what was only half built.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from ambient.errors import ConfigFault, OurFault, PlatformFault
from ambient.lab.topology import RUN, Lab

DEFAULT_NAME = "default"


class LabRecord(msgspec.Struct, frozen=True, kw_only=True):
    """lab.json."""

    name: str
    nodes: int
    ipv6: bool = True
    mesh: bool = True
    images: dict[str, str] = {}
    """Image name -> directory its commands run in."""
    api_port: int = 0
    """Of the API server on the host's loopback; 0 until it listens."""
    supervisor_pid: int = 0
    ready: bool = False
    """All of the lab's own parts run."""

    def plan(self) -> Lab:
        return Lab(self.name, self.nodes, self.ipv6)

    @property
    def directory(self) -> Path:
        return Path(RUN) / self.name


class PodRecord(msgspec.Struct, frozen=True, kw_only=True):
    """pod.json of a running pod, in its node's directory."""

    uid: str
    name: str
    namespace: str
    node: str
    netns: str
    cgroup: str
    pid: int
    addresses: list[str] = []


def write(record: LabRecord) -> None:
    """Replace lab.json at once."""
    path = record.directory / "lab.json"
    aside = path.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(record))
    os.replace(aside, path)


def read(name: str) -> LabRecord:
    """ConfigFault if there is no such lab."""
    Lab(name)  # the name becomes a path: check it first
    try:
        return msgspec.json.decode((Path(RUN) / name / "lab.json").read_bytes(), type=LabRecord)
    except FileNotFoundError:
        known = ", ".join(names()) or "there is none"
        raise ConfigFault("lab", name, f"no such lab ({known}): ambient lab up -f FILE") from None
    except msgspec.DecodeError as error:
        raise OurFault(f"{RUN}/{name}/lab.json: {error}: ambient lab down --name {name}") from None


def names() -> tuple[str, ...]:
    """All labs of this machine, also broken ones."""
    found: list[str] = []
    if Path(RUN).is_dir():
        for entry in sorted(Path(RUN).iterdir()):
            with contextlib.suppress(ConfigFault):
                found.append(Lab(entry.name).name)
    return tuple(found)


def choose(name: str | None) -> str:
    """The lab meant: the one named, or the only one there is. ConfigFault if that is not clear."""
    if name is not None:
        return name
    known = names()
    if len(known) == 1:
        return known[0]
    if not known or DEFAULT_NAME in known:
        return DEFAULT_NAME
    raise ConfigFault("--name", "", f"there are several labs, choose one: {', '.join(known)}")


def alive(record: LabRecord) -> bool:
    """Whether the supervisor runs: its process is there and is the one (not another with its number)."""
    try:
        command = Path(f"/proc/{record.supervisor_pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return bool(record.supervisor_pid) and b"ambient.lab.supervisor" in command and record.name.encode() in command


def pods(record: LabRecord) -> tuple[PodRecord, ...]:
    """All pods that have a sandbox now."""
    found = []
    for path in sorted(record.directory.glob("nodes/*/pods/*/pod.json")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=PodRecord))
    return tuple(sorted(found, key=lambda pod: (pod.namespace, pod.name)))


def find_pod(record: LabRecord, namespace: str, name: str) -> PodRecord:
    """The pod, by name, or by ``deployment/NAME`` or ``deploy/NAME`` its first one. ConfigFault if it does not run."""
    kind, slash, short = name.rpartition("/")
    for pod in pods(record):
        if pod.namespace != namespace:
            continue
        if pod.name == name or (kind == "pod" and pod.name == short):
            return pod
        if slash and kind in ("deploy", "deployment") and pod.name.rsplit("-", 2)[0] == short:
            return pod
    here = [pod.name for pod in pods(record) if pod.namespace == namespace] or ["nothing"]
    raise ConfigFault(f"pod {namespace}/{name}", name, f"does not run here; running in {namespace}: {', '.join(here)}")


def log_path(record: LabRecord, pod: PodRecord, container: str | None) -> Path:
    """The log of a container; the first one if none is named."""
    directory = record.directory / "nodes" / pod.node / "pods" / pod.uid
    found = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_ctime)
    for path in found:
        if container is None or path.stem == container:
            return path
    raise PlatformFault(
        f"pod {pod.namespace}/{pod.name} has no log of {container or 'any container'}: it has not started yet"
    )
