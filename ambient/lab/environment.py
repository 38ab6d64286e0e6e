"""The environment and command line of a container: field references and $(NAME), as Kubernetes resolves them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ambient.errors import ConfigFault
from ambient.lab.objects import Container, KubeletPod

BASE_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
"""What every container has."""

_REFERENCE = re.compile(r"\$(?:\$|\(([A-Za-z_.-][A-Za-z0-9_.-]*)\))")
_KEYED = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $(NAME); unknown names stay as they are and $$ is a dollar sign."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return "$" if name is None else values.get(name, match.group(0))

    return _REFERENCE.sub(replace, text)


def field(pod: KubeletPod, path: str, addresses: Sequence[str], host_addresses: Sequence[str]) -> str:
    """The value of a downward field. ConfigFault for one that Kubernetes does not offer to environments."""
    known = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.metadata.uid,
        "spec.nodeName": pod.spec.node_name,
        "spec.serviceAccountName": pod.spec.service_account_name,
        "status.podIP": addresses[0] if addresses else "",
        "status.podIPs": ",".join(addresses),
        "status.hostIP": host_addresses[0] if host_addresses else "",
        "status.hostIPs": ",".join(host_addresses),
    }
    if path in known:
        return known[path]
    if match := _KEYED.fullmatch(path):
        return (pod.labels if match.group(1) == "labels" else pod.annotations).get(match.group(2), "")
    raise ConfigFault(f"Pod {pod.key}: env.valueFrom.fieldRef.fieldPath", path, f"one of {', '.join(known)}")


def environment(
    pod: KubeletPod,
    container: Container,
    addresses: Sequence[str],
    host_addresses: Sequence[str],
    base: Mapping[str, str],
) -> dict[str, str]:
    """All variables of a container. ConfigFault for sources that the lab does not have."""
    values = dict(base)
    if container.env_from:
        raise ConfigFault(f"Pod {pod.key}: {container.name}.envFrom", "", "is not supported by the lab; use env")
    for entry in container.env or ():
        source = entry.value_from
        if source is None:
            values[entry.name] = expand(entry.value, values)
        elif source.field_ref is not None:
            values[entry.name] = field(pod, source.field_ref.field_path, addresses, host_addresses)
        else:
            where = f"Pod {pod.key}: {container.name}.env {entry.name}.valueFrom"
            raise ConfigFault(where, entry.name, "only fieldRef is supported by the lab; write the value")
    return values


def command_line(pod: KubeletPod, container: Container, values: Mapping[str, str]) -> list[str]:
    """Command and arguments. ConfigFault if there is no command: the lab has no images that could hold one."""
    if not container.command:
        where = f"Pod {pod.key}: {container.name}.command"
        raise ConfigFault(where, container.image, "must be given: the lab runs commands of this machine, not images")
    return [expand(part, values) for part in [*container.command, *(container.args or ())]]
