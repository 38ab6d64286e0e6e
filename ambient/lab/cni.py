"""The CNI chain as a kubelet's runtime runs it: every plugin of the list, by executing its binary.

ADD goes through the list in order, each plugin seeing the result of the one before; DEL goes back in reverse
order through all of them, also those whose ADD failed or was never run, and goes on after a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ambient.errors import PlatformFault
from ambient.lab import commands

INTERFACE = "eth0"
TIMEOUT_S = 30.0


class CniFault(PlatformFault):
    """A plugin refused; the message is the plugin's."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a runtime tells plugins of a pod."""

    container_id: str
    netns: str
    """Path; empty in a DEL after the namespace is gone."""
    pod_name: str
    pod_namespace: str
    pod_uid: str
    address: str = ""
    """A wished address; most plugins ignore it."""

    def arguments(self) -> str:
        known = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": self.pod_namespace,
            "K8S_POD_NAME": self.pod_name,
            "K8S_POD_INFRA_CONTAINER_ID": self.container_id,
            "K8S_POD_UID": self.pod_uid,
        }
        if self.address:
            known["IP"] = self.address
        return ";".join(f"{key}={value}" for key, value in known.items())


class _Address(msgspec.Struct):
    address: str


class _Result(msgspec.Struct):
    ips: list[_Address] = []


@dataclass(frozen=True, slots=True)
class Added:
    """The last plugin's result."""

    addresses: tuple[str, ...]
    raw: dict[str, Any] = field(compare=False)


class Chain:
    """One node's plugins. ``node_netns`` is where they run; ``binaries`` where they are looked up at each call."""

    def __init__(self, node_netns: str, configuration: Path, binaries: Path, environment: Mapping[str, str]) -> None:
        self._netns = node_netns
        self._configuration = configuration
        self._binaries = binaries
        self._environment = dict(environment)

    def _plugins(self) -> list[dict[str, Any]]:
        """Read afresh each time, because agents edit the file."""
        try:
            conf = json.loads(self._configuration.read_text())
            shared = {"cniVersion": conf["cniVersion"], "name": conf["name"]}
            return [plugin | shared for plugin in conf["plugins"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CniFault(f"CNI configuration {self._configuration}: {error}") from None

    async def add(self, sandbox: Sandbox) -> Added:
        """Raises CniFault with the plugin's name and message; the caller then calls `delete`."""
        result: dict[str, Any] = {}
        for plugin in self._plugins():
            config = plugin | ({"prevResult": result} if result else {})
            raw = await self._execute("ADD", plugin["type"], config, sandbox)
            try:
                result = json.loads(raw)
                addresses = msgspec.convert(result, _Result).ips
            except (ValueError, msgspec.ValidationError) as error:
                raise CniFault(f"plugin {plugin['type']}: its result cannot be read: {error}") from None
        return Added(tuple(item.address.partition("/")[0] for item in addresses), result)

    async def check(self, sandbox: Sandbox, added: Added) -> None:
        for plugin in self._plugins():
            await self._execute("CHECK", plugin["type"], plugin | {"prevResult": added.raw}, sandbox)

    async def delete(self, sandbox: Sandbox, added: Added | None) -> None:
        """All plugins, last first. Raises the first CniFault after all were asked."""
        first: CniFault | None = None
        for plugin in reversed(self._plugins()):
            config = plugin | ({"prevResult": added.raw} if added else {})
            try:
                await self._execute("DEL", plugin["type"], config, sandbox)
            except CniFault as fault:
                first = first or fault
        if first:
            raise first

    async def _execute(self, command: str, plugin: str, config: Mapping[str, Any], sandbox: Sandbox) -> bytes:
        binary = self._binaries / plugin
        if "/" in plugin or not os.access(binary, os.X_OK):
            raise CniFault(f"failed to find plugin {plugin!r} in path [{self._binaries}]")
        env = self._environment | {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": sandbox.container_id,
            "CNI_NETNS": sandbox.netns,
            "CNI_IFNAME": INTERFACE,
            "CNI_ARGS": sandbox.arguments(),
            "CNI_PATH": str(self._binaries),
        }
        try:
            answer = await commands.run_async(
                commands.in_netns(self._netns, str(binary)), json.dumps(config).encode(), env=env, timeout_s=TIMEOUT_S
            )
        except PlatformFault as fault:
            raise CniFault(f"plugin {plugin} {command}: {fault}") from None
        if answer.code:
            raise CniFault(f"plugin {plugin} {command}: {_message(answer)}")
        return answer.stdout


def _message(answer: commands.Answer) -> str:
    """The `msg` of a CNI error on stdout, or whatever the plugin left."""
    try:
        return str(json.loads(answer.stdout)["msg"])[:1000]
    except (ValueError, KeyError, TypeError):
        return answer.talk() or f"exit code {answer.code}"
