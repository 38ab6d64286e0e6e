"""A primary CNI plugin: a link from the pod to the node's bridge, and addresses out of the node's range.

Run as a program with CNI_* in its environment and its configuration on stdin, in the node's network namespace.
It uses the standard library only and is started with `python -I -S`, because it runs once for each pod.

Configuration: ``bridge``; ``subnets`` and ``gateways``, one of each family in the same order; ``dataDir`` where
reserved addresses are kept, a file each. CNI_ARGS may hold ``IP=`` to ask for a certain free address.
Addresses are given out round robin, so that one is not used again at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

VERSIONS = ("0.4.0", "1.0.0", "1.1.0")
_NETWORK = {"accept_dad": 0, "accept_ra": 0, "accept_redirects": 0}


class Refused(Exception):
    """The plugin's answer is an error: a code of the CNI specification and a message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    try:
        answer = run(dict(os.environ), sys.stdin.read())
    except Refused as refusal:
        json.dump({"cniVersion": "1.0.0", "code": refusal.code, "msg": str(refusal)}, sys.stdout)
        return 1
    if answer is not None:
        json.dump(answer, sys.stdout)
    return 0


def run(env: Mapping[str, str], stdin: str) -> dict[str, Any] | None:
    """One invocation: the result to print, or None. Raises Refused."""
    command = env.get("CNI_COMMAND", "")
    if command == "VERSION":
        return {"cniVersion": "1.0.0", "supportedVersions": list(VERSIONS)}
    config, subnets, gateways = _configuration(stdin)
    container, interface = env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", "")
    if not container.isalnum() or not interface:
        raise Refused(4, "CNI_CONTAINERID and CNI_IFNAME must be set")
    link = f"v{container[:14]}"
    if command == "ADD":
        wanted = dict(part.split("=", 1) for part in env.get("CNI_ARGS", "").split(";") if "=" in part).get("IP", "")
        netns = env.get("CNI_NETNS", "")
        if not os.path.exists(netns):
            raise Refused(4, f"CNI_NETNS {netns!r} does not exist")
        return _add(config, subnets, gateways, container, interface, link, netns, wanted)
    if command == "DEL":
        _ip("", [f"link del {link}"], check=False)
        with _locked(config["dataDir"]) as directory:
            _release(directory, container)
        return None
    if command == "CHECK":
        if not os.path.exists(f"/proc/sys/net/ipv4/conf/{link}"):
            raise Refused(7, f"link {link} is missing")
        return None
    raise Refused(4, f"CNI_COMMAND {command!r}: ADD, DEL, CHECK or VERSION")


def _configuration(stdin: str) -> tuple[dict[str, Any], list[Any], list[Any]]:
    try:
        config = json.loads(stdin)
        subnets = [ipaddress.ip_network(text) for text in config["subnets"]]
        gateways = [ipaddress.ip_address(text) for text in config["gateways"]]
        if not (config["dataDir"] and config["bridge"]) or len(subnets) != len(gateways):
            raise ValueError("bridge, dataDir and one gateway for each subnet")
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(7, f"configuration: {error}: bridge, subnets, gateways and dataDir are required") from None
    return config, subnets, gateways


def _add(
    config: dict[str, Any],
    subnets: list[Any],
    gateways: list[Any],
    container: str,
    interface: str,
    link: str,
    netns: str,
    wanted: str,
) -> dict[str, Any]:
    with _locked(config["dataDir"]) as directory:
        addresses = [
            _reserve(directory, subnet, gateway, container, wanted)
            for subnet, gateway in zip(subnets, gateways, strict=True)
        ]
    try:
        _ip("", [
            f"link add {link} type veth peer name {interface} netns {netns}",
            f"link set {link} master {config['bridge']} up",
        ])  # fmt: skip
        lines = ["link set lo up", f"link set {interface} up"]
        for address, gateway in zip(addresses, gateways, strict=True):
            six = address.version == 6
            lines += [
                f"addr add {address}/{address.max_prefixlen} dev {interface}" + (" nodad" if six else ""),
                f"route add {gateway}/{gateway.max_prefixlen} dev {interface}",
                f"route add default via {gateway} dev {interface} src {address}",
            ]
        _ip(netns, lines)
    except Refused:
        _ip("", [f"link del {link}"], check=False)
        with _locked(config["dataDir"]) as directory:
            _release(directory, container)
        raise
    return {
        "cniVersion": config.get("cniVersion", "1.0.0"),
        "interfaces": [{"name": link}, {"name": interface, "sandbox": netns}],
        "ips": [
            {"address": f"{address}/{address.max_prefixlen}", "gateway": str(gateway), "interface": 1}
            for address, gateway in zip(addresses, gateways, strict=True)
        ],
        "routes": [{"dst": "0.0.0.0/0" if g.version == 4 else "::/0", "gw": str(g)} for g in gateways],
        "dns": {},
    }


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[str]:
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def _reserve(directory: str, subnet: Any, gateway: Any, container: str, wanted: str) -> Any:
    """A free address of the subnet, kept under the container's name."""
    asked = ipaddress.ip_address(wanted) if wanted else None
    if asked is not None and asked in subnet:
        candidates = [asked]
    else:
        marker = os.path.join(directory, f"last.{subnet.version}")
        last = int(_read(marker) or 1)
        size = min(subnet.num_addresses - 2, 65534)  # without network and broadcast address
        candidates = [subnet[1 + (last + step) % size] for step in range(size)]
    for address in candidates:
        if address == gateway or address not in subnet:
            continue
        try:
            with open(os.path.join(directory, str(address)), "x") as file:
                file.write(container)
        except FileExistsError:
            continue
        if asked is None:
            with open(marker, "w") as file:
                file.write(str(int(address) - int(subnet.network_address)))
        return address
    _release(directory, container)
    raise Refused(11, f"no free address in {subnet}" if asked is None else f"{asked} is in use")


def _release(directory: str, container: str) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name != "lock" and not name.startswith("last.") and _read(path) == container:
            os.unlink(path)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _ip(netns: str, lines: list[str], check: bool = True) -> None:
    argv = ["ip", "-batch", "-"]
    script = "\n".join(lines) + "\n"
    if netns:
        settings = "".join(
            f"for f in /proc/sys/net/ipv*/conf/*/{key}; do echo {value} > $f; done 2>/dev/null\n"
            for key, value in _NETWORK.items()
        )
        settings += "echo 0 > /proc/sys/net/ipv4/ip_forward\n"  # inherited from the host otherwise
        argv = ["nsenter", f"--net={netns}", "sh", "-c", settings + "exec ip -batch -"]
    done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise Refused(11, f"ip: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
