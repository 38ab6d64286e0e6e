"""Pods of a node by what its agent wrote down (agent.json): there also while the agent does not answer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ambient.errors import PlatformFault
from ambient.io import netns
from ambient.settings import NodeSettings

Row = dict[str, Any]


def remembered(node: NodeSettings) -> list[Row]:
    """The pods in agent.json; none if it cannot be read."""
    try:
        pods = json.loads((Path(node.run_dir) / "agent.json").read_text())["pods"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [pod for pod in pods if isinstance(pod, dict)] if isinstance(pods, list) else []


def namespaces(node: NodeSettings, stack: ExitStack) -> dict[int, int]:
    """Cookie -> descriptor of the namespaces of this node's pods, closed with the stack."""
    found: dict[int, int] = {}
    for pod in remembered(node):
        fd = _open(pod)
        if fd >= 0:
            stack.callback(os.close, fd)
            try:
                found[netns.netns_cookie(fd)] = fd
            except PlatformFault:
                continue
    return found


def status_of(pod: Mapping[str, Any]) -> Row:
    """A remembered pod as a row of the agent's status."""
    fd = _open(pod)
    cookie = 0
    if fd >= 0:
        try:
            cookie = netns.netns_cookie(fd)
        finally:
            os.close(fd)
    return {
        "namespace": pod.get("namespace", ""),
        "name": pod.get("name", ""),
        "uid": pod.get("uid", ""),
        "state": "enrolled" if cookie else "not enrolled",
        "reason": "",
        "detail": "as the agent last wrote it down: it does not answer",
        "netns_cookie": cookie,
        "addresses": pod.get("addresses", ()),
    }


def _open(pod: Mapping[str, Any]) -> int:
    """-1: it is not in the mesh, or gone meanwhile."""
    if not pod.get("in_mesh") or not pod.get("netns_path"):
        return -1
    try:
        return netns.open_netns(str(pod["netns_path"]))
    except PlatformFault:
        return -1
