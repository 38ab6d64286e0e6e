"""Addresses and node ports of Services. What is taken is read from the stored Services, so nothing can leak."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from ambient.lab.apiserver.status import Cause, JsonObject, forbidden_field, invalid_value, not_supported

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NODE_PORT_FIRST, NODE_PORT_LAST = 30000, 32767
_SEARCH_MAX = 65_536
"""Addresses of a range that are considered; a larger range is used only so far."""


def _family(network: Network) -> str:
    return "IPv4" if network.version == 4 else "IPv6"


class ServiceAllocator:
    """Fills in clusterIP(s), ipFamilies, ipFamilyPolicy and nodePorts. ``ranges`` has one network per family.

    The first is the default family. Each range's first address belongs to the API server's own Service.
    Addresses go out in rotation, not lowest first, so that a freed one is not at once somebody else's; the
    low end is left to those who ask for an address by number.
    """

    def __init__(self, ranges: Sequence[str]) -> None:
        self._ranges: dict[str, Network] = {}
        for text in ranges:
            network = ipaddress.ip_network(text)
            self._ranges[_family(network)] = network
        if not self._ranges:
            raise ValueError("at least one service range is needed")
        self._next = dict.fromkeys(self._ranges, 0)
        self._next_port = 0

    def first_address(self) -> str:
        """The first address of the default family's range."""
        return str(next(iter(self._ranges.values()))[1])

    def complete(self, service: JsonObject, old: JsonObject | None, others: Iterable[JsonObject]) -> list[Cause]:
        """Complete a Service about to be stored, in place; ``old`` is its present form, ``others`` the other ones."""
        spec = service["spec"]
        others = list(others)
        if old is not None:
            _carry_over(spec, old["spec"])
        if spec["type"] == "ExternalName":
            for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                spec.pop(key, None)
            return []
        causes = self._families(spec, old)
        if causes:
            return causes
        if spec.get("clusterIP") == "None" or spec.get("clusterIPs", [])[:1] == ["None"]:
            spec["clusterIP"], spec["clusterIPs"] = "None", ["None"]
        else:
            causes = self._addresses(spec, old, others)
        return causes or self._node_ports(spec, others)

    def _families(self, spec: JsonObject, old: JsonObject | None) -> list[Cause]:
        families: list[str] = list(spec.get("ipFamilies", []))
        policy = spec.get("ipFamilyPolicy")
        policies = ("SingleStack", "PreferDualStack", "RequireDualStack")
        if policy is not None and policy not in policies:
            return [not_supported("spec.ipFamilyPolicy", policy, policies)]
        asked = [ip for ip in (spec.get("clusterIPs") or [spec.get("clusterIP")]) if ip and ip != "None"]
        for address in asked:
            try:
                family = "IPv4" if ipaddress.ip_address(address).version == 4 else "IPv6"
            except ValueError:
                return [invalid_value("spec.clusterIPs", address, "must be a valid IP address")]
            if family not in families:
                families.append(family)
        for family in families:
            if family not in ("IPv4", "IPv6"):
                return [not_supported("spec.ipFamilies", family, ("IPv4", "IPv6"))]
            if family not in self._ranges:
                return [invalid_value("spec.ipFamilies", family, "not configured on this cluster")]
        if len(families) > 2 or len(set(families)) != len(families):
            return [invalid_value("spec.ipFamilies", families, "must be one or two different families")]
        if policy is None:
            policy = "RequireDualStack" if len(families) == 2 else "SingleStack"
        if policy == "RequireDualStack" and len(self._ranges) < 2:
            return [invalid_value("spec.ipFamilyPolicy", policy, "this cluster is not configured for dual-stack")]
        if policy == "SingleStack" and len(families) == 2:
            if old is None:
                rule = "must be RequireDualStack or PreferDualStack when multiple ipFamilies are specified"
                return [invalid_value("spec.ipFamilyPolicy", policy, rule)]
            families = families[:1]
        if not families:
            families = [next(iter(self._ranges))]
        if policy != "SingleStack":
            families += [family for family in self._ranges if family not in families]
        spec["ipFamilies"], spec["ipFamilyPolicy"] = families, policy
        return []

    def _addresses(self, spec: JsonObject, old: JsonObject | None, others: list[JsonObject]) -> list[Cause]:
        taken = {ip for other in others for ip in other["spec"].get("clusterIPs", ())}
        first, asked = spec.get("clusterIP") or "", list(spec.get("clusterIPs") or ())
        if first and asked and asked[0] != first:
            return [invalid_value("spec.clusterIPs", asked, "first value must match `clusterIP`")]
        asked = asked or ([first] if first else [])
        before = (old or {}).get("spec", {}).get("clusterIPs", [])
        if before and before[0] != "None" and asked[:1] != before[:1]:
            return [invalid_value("spec.clusterIPs[0]", asked[:1], "may not change once set")]
        families: list[str] = spec["ipFamilies"]
        addresses: list[str] = []
        for index, family in enumerate(families):
            network = self._ranges[family]
            if index < len(asked):
                address = ipaddress.ip_address(asked[index])
                if address not in network:
                    rule = (
                        f"failed to allocate IP {address}: the provided IP is not in the valid range. "
                        f"The range of valid IPs is {network}"
                    )
                    return [invalid_value("spec.clusterIPs", asked, rule)]
                if str(address) in taken:
                    rule = f"failed to allocate IP {address}: provided IP is already allocated"
                    return [invalid_value("spec.clusterIPs", asked, rule)]
                addresses.append(str(address))
                continue
            free = self._free(family, taken)
            if free is None:
                return [forbidden_field("spec.clusterIPs", f"range {network} is full")]
            addresses.append(free)
        spec["clusterIPs"], spec["clusterIP"] = addresses, addresses[0]
        return []

    def _free(self, family: str, taken: set[str]) -> str | None:
        network = self._ranges[family]
        last = min(network.num_addresses - (1 if network.version == 6 else 2), _SEARCH_MAX)
        band = min(max(16, last // 16), 256) if last > 32 else 2
        usable = last - band + 1
        for step in range(max(usable, 0)):
            address = str(network[band + (self._next[family] + step) % usable])
            if address not in taken:
                self._next[family] = (self._next[family] + step + 1) % usable
                return address
        for offset in range(2, min(band, last + 1)):
            if str(network[offset]) not in taken:
                return str(network[offset])
        return None

    def _node_ports(self, spec: JsonObject, others: list[JsonObject]) -> list[Cause]:
        ports = spec.get("ports", [])
        if spec["type"] not in ("NodePort", "LoadBalancer"):
            for port in ports:
                port.pop("nodePort", None)
            return []
        taken = {
            (port.get("protocol"), port["nodePort"])
            for other in others
            for port in other["spec"].get("ports", ())
            if port.get("nodePort")
        }
        for index, port in enumerate(ports):
            asked = port.get("nodePort")
            if not asked:
                continue
            where = f"spec.ports[{index}].nodePort"
            if not NODE_PORT_FIRST <= asked <= NODE_PORT_LAST:
                rule = f"provided port is not in the valid range. The range of valid ports is {_port_range()}"
                return [invalid_value(where, asked, rule)]
            if (port["protocol"], asked) in taken:
                return [invalid_value(where, asked, "provided port is already allocated")]
            taken.add((port["protocol"], asked))
        for port in ports:
            if port.get("nodePort"):
                continue
            size = NODE_PORT_LAST - NODE_PORT_FIRST + 1
            for step in range(size):
                number = NODE_PORT_FIRST + (self._next_port + step) % size
                if (port["protocol"], number) not in taken:
                    self._next_port = (number - NODE_PORT_FIRST + 1) % size
                    break
            else:
                return [forbidden_field("spec.ports", f"no free node port in {_port_range()}")]
            port["nodePort"] = number
            taken.add((port["protocol"], number))
        return []


def _port_range() -> str:
    return f"{NODE_PORT_FIRST}-{NODE_PORT_LAST}"


def _carry_over(spec: JsonObject, old: JsonObject) -> None:
    """Keep allocated values an update leaves out, so that `kubectl replace` of the original manifest works."""
    if spec["type"] != "ExternalName" and old.get("type") != "ExternalName":
        if not spec.get("clusterIP") and not spec.get("clusterIPs"):
            for key in ("clusterIP", "clusterIPs"):
                if key in old:
                    spec[key] = old[key]
        elif "clusterIPs" not in spec and spec.get("clusterIP") == old.get("clusterIP") and "clusterIPs" in old:
            spec["clusterIPs"] = old["clusterIPs"]
        for key in ("ipFamilies", "ipFamilyPolicy"):
            if key not in spec and key in old:
                spec[key] = old[key]
        if spec.get("ipFamilyPolicy") == "SingleStack" and len(spec.get("clusterIPs", ())) == 2:
            spec["clusterIPs"] = spec["clusterIPs"][:1]
    if spec["type"] in ("NodePort", "LoadBalancer"):
        before = {(port.get("port"), port.get("protocol")): port.get("nodePort") for port in old.get("ports", ())}
        asked = {port.get("nodePort") for port in spec.get("ports", ())}
        for port in spec.get("ports", ()):
            number = before.get((port.get("port"), port["protocol"]))
            if not port.get("nodePort") and number and number not in asked:
                port["nodePort"] = number
