"""Manifest files: YAML with several documents to objects, reporting every bad one and keeping the rest.

A file is untrusted: its size, the growth by aliases and the depth are bounded, and nothing but plain values
is constructed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from ambient.errors import ConfigFault
from ambient.manifest import peer_authentication, policies, services
from ambient.manifest.kinds import KINDS, Kind
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import AuthorizationPolicy, EndpointSlice, Object, PeerAuthentication, Service
from ambient.manifest.problems import Problem, problem_of, reference

FILE_BYTES_MAX = 1024 * 1024
DOCUMENTS_MAX = 10_000
VALUES_MAX = 200_000  # of one document, with aliases written out
DEPTH_MAX = 100

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SEPARATOR = re.compile(r"^---(?=\s|$)", re.MULTILINE)
_ALSO_SERVED = {
    "AuthorizationPolicy": ("security.istio.io/v1", "security.istio.io/v1beta1"),
    "PeerAuthentication": ("security.istio.io/v1", "security.istio.io/v1beta1"),
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One good object: its kind, its slim form, and the plain values it was written as (defaults not filled in)."""

    kind: Kind[Any]
    object: Object
    value: dict[str, Any]


def read_documents(text: str, where: str, mesh: Mesh | None = None) -> tuple[list[Manifest], list[Problem]]:
    """All good objects of a file in order, and what is wrong with the others. Never raises for bad input.

    ``where`` is the file's name, for messages. Objects of namespaced kinds without a namespace are in
    ``default``, as kubectl does.
    """
    found: list[Manifest] = []
    problems: list[Problem] = []
    try:
        for line, document in _documents(text, where):
            content = document.lstrip()
            at = f"{where}:{line + document.count(chr(10), 0, len(document) - len(content))}"
            try:
                for value in _objects(_plain(document, at, line), at):
                    try:
                        found.append(_manifest(value, at, mesh or Mesh()))
                    except ConfigFault as fault:
                        problems.append(_at(at, fault))
            except ConfigFault as fault:
                problems.append(_at(at, fault))
    except ConfigFault as fault:
        problems.append(_at(where, fault))
    return found, problems


def _at(at: str, fault: ConfigFault) -> Problem:
    problem = problem_of(fault)
    return problem if problem.where.startswith(at) else Problem(f"{at}: {problem.where}", problem.field, problem.rule)


def _documents(text: str, where: str) -> Iterator[tuple[int, str]]:
    """Split at ``---`` lines (which YAML never allows inside a value), so that one bad document costs only itself."""
    if len(text) > FILE_BYTES_MAX:
        raise ConfigFault(where, len(text), f"must be at most {FILE_BYTES_MAX} characters")
    starts = [0, *(match.end() for match in _SEPARATOR.finditer(text))]
    ends = [*(match.start() for match in _SEPARATOR.finditer(text)), len(text)]
    if len(starts) > DOCUMENTS_MAX:
        raise ConfigFault(where, len(starts), f"must be at most {DOCUMENTS_MAX} documents")
    line, counted = 1, 0
    for start, end in zip(starts, ends, strict=True):
        line += text.count("\n", counted, start)
        counted = start
        yield line, text[start:end]


def _plain(text: str, at: str, line: int) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _bounded(node, {}, 0, at)
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigFault(at, "", _said(error, line)) from None
    except (RecursionError, ValueError, OverflowError, TypeError) as error:
        raise ConfigFault(at, "", f"cannot be read: {type(error).__name__}: {str(error)[:200]}") from None


def _said(error: yaml.YAMLError, line: int) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {line + mark.line}, column {mark.column + 1}: " if mark else ""
    return f"is not YAML: {place}{problem or error}"[:300]


def _bounded(node: yaml.Node, sizes: dict[int, int], depth: int, at: str) -> int:
    """How many values the node stands for once aliases are written out. Raises ConfigFault beyond the limits."""
    if depth > DEPTH_MAX:
        raise ConfigFault(at, "", f"is nested deeper than {DEPTH_MAX}")
    known = sizes.get(id(node))
    if known is not None:
        if known < 0:
            raise ConfigFault(at, "", "has an alias that contains itself")
        return known
    sizes[id(node)] = -1
    size = 1
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                size += _bounded(part, sizes, depth + 1, at)
                if size > VALUES_MAX:
                    raise ConfigFault(at, "", f"has more than {VALUES_MAX} values")
    sizes[id(node)] = size
    return size


def _objects(value: Any, at: str) -> Iterator[Any]:
    """The document itself, or the items of a List; nothing for an empty document."""
    if value is None:
        return
    if isinstance(value, dict) and value.get("kind") == "List":
        items = value.get("items") or []
        if not isinstance(items, list):
            raise ConfigFault(f"{at}: List: items", type(items).__name__, "must be a list")
        yield from items
    else:
        yield value


def _manifest(value: Any, at: str, mesh: Mesh) -> Manifest:
    if not isinstance(value, dict):
        raise ConfigFault(at, str(value)[:60], "must be a mapping with apiVersion, kind and metadata")
    name = value.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigFault(f"{at}: kind", str(name)[:60], f"must be one of {', '.join(sorted(KINDS))}")
    versions = _ALSO_SERVED.get(kind.name, (kind.api_version,))
    if value.get("apiVersion") not in versions:
        rule = f"must be {' or '.join(versions)} for {kind.name}"
        raise ConfigFault(f"{at}: apiVersion", str(value.get("apiVersion"))[:60], rule)
    item = kind.convert(value)
    if kind.namespaced and not item.namespace:
        value = value | {"metadata": (value.get("metadata") or {}) | {"namespace": "default"}}
        item = kind.convert(value)
    where = reference(kind.name, item.namespace, item.name or "?")
    pattern = _LABEL_NAME if kind.name in ("Namespace", "Service") else _NAME
    if len(item.name) > 253 or not pattern.fullmatch(item.name):
        raise ConfigFault(f"{where}: metadata.name", item.name[:80], "must be a lower-case DNS name")
    if not kind.namespaced and item.namespace:
        raise ConfigFault(f"{where}: metadata.namespace", item.namespace[:80], f"a {kind.name} has no namespace")
    if item.namespace and not _LABEL_NAME.fullmatch(item.namespace):
        raise ConfigFault(f"{where}: metadata.namespace", item.namespace[:80], "must be a lower-case DNS label")
    _judge(item, mesh)
    return Manifest(kind, item, value)


def _judge(item: Object, mesh: Mesh) -> None:
    """Refuse in a file what would stand closed or be left out in the World. Raises ConfigFault."""
    match item:
        case AuthorizationPolicy():
            policies.convert(item, mesh)
        case PeerAuthentication():
            peer_authentication.read(item, mesh)
        case Service():
            services.service_of(item, mesh)
        case EndpointSlice():
            services.members_of(item)
