"""The World as resources ready to be sent, shared by all clients of the server.

Every object is encoded once per change, not once per client. A short log says which names changed in which
generation, so that a client that keeps up costs only what changed; one that fell behind the log is compared
in full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from ambient.model.address import parse_ip
from ambient.model.world import World, diff
from ambient.xds.policies import encode_policy
from ambient.xds.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, encode_service, encode_workload

LOG_GENERATIONS_MAX: Final = 1024

_Item = TypeVar("_Item")


class Store:
    """Written by `set_world` alone. ``generation`` 0 means: no World yet, and nobody is answered."""

    def __init__(self) -> None:
        self.world = World()
        self.generation = 0
        self.faults: dict[str, str] = {}
        """Objects that could not be encoded (their last good form is served), name -> problem."""
        self._resources: dict[str, dict[str, Resource]] = {ADDRESS_TYPE: {}, AUTHORIZATION_TYPE: {}}
        self._log: deque[tuple[int, dict[str, frozenset[str]]]] = deque(maxlen=LOG_GENERATIONS_MAX)
        self._listeners: set[Callable[[], None]] = set()

    def set_world(self, world: World) -> bool:
        """Replace the World; whether anything changed. The first one must be complete: clients take it for all
        there is. Every listener is called, in this call."""
        change = diff(self.world, world)
        if self.generation and not change:
            self.world = world
            return False
        addresses, policies = self._resources[ADDRESS_TYPE], self._resources[AUTHORIZATION_TYPE]
        touched: dict[str, set[str]] = {ADDRESS_TYPE: set(), AUTHORIZATION_TYPE: set()}
        for names, resources, type_url in (
            (change.removed_workloads, addresses, ADDRESS_TYPE),
            (change.removed_services, addresses, ADDRESS_TYPE),
            (change.removed_policies, policies, AUTHORIZATION_TYPE),
        ):
            for name in names:
                self.faults.pop(name, None)
                if resources.pop(name, None) is not None:
                    touched[type_url].add(name)
        for workload in change.workloads:
            touched[ADDRESS_TYPE] |= self._put(addresses, workload.uid, encode_workload, workload)
        for service in change.services:
            touched[ADDRESS_TYPE] |= self._put(addresses, service.key, encode_service, service)
        for policy in change.policies:
            touched[AUTHORIZATION_TYPE] |= self._put(policies, policy.key, encode_policy, policy)
        self.world = world
        self.generation += 1
        self._log.append((self.generation, {type_url: frozenset(names) for type_url, names in touched.items()}))
        for listener in tuple(self._listeners):
            listener()
        return True

    def _put(
        self, resources: dict[str, Resource], name: str, encode: Callable[[_Item], Resource], item: _Item
    ) -> set[str]:
        try:
            resource = encode(item)
        except (ValueError, TypeError, UnicodeError) as error:
            self.faults[name] = f"{name}: cannot be encoded: {error}"
            return set()
        self.faults.pop(name, None)
        old = resources.get(name)
        resources[name] = resource
        return {name} if old is None or old.version != resource.version else set()

    def resources(self, type_url: str) -> Mapping[str, Resource]:
        """By name; empty for a type that is not served."""
        return self._resources.get(type_url, {})

    def changed_since(self, type_url: str, generation: int) -> frozenset[str] | None:
        """Names that may differ from what they were then; None if the log does not reach back so far."""
        if generation == self.generation:
            return frozenset()
        if not self._log or self._log[0][0] > generation + 1:
            return None
        names: set[str] = set()
        for at, touched in reversed(self._log):
            if at <= generation:
                break
            names |= touched.get(type_url, frozenset())
        return frozenset(names)

    def resolve(self, type_url: str, name: str) -> tuple[Resource, ...]:
        """What an on-demand name stands for: a resource's own name or ``<network>/<address>``.

        A service brings the workloads behind it, for a client that knows a service must know its endpoints.
        """
        resources = self.resources(type_url)
        found = resources.get(name)
        if type_url != ADDRESS_TYPE:
            return (found,) if found else ()
        key = name
        if found is None:
            network, _, text = name.rpartition("/")
            try:
                address = parse_ip(text)
            except ValueError:
                return ()
            if workload := self.world.workload_at(address, network):
                key = workload.uid
            elif service := self.world.service_at(address, network):
                key = service.key
            found = resources.get(key)
        if found is None:
            return ()
        asked = self.world.services.get(key)
        serving = (resources.get(w.uid) for w in self.world.serving(asked)) if asked else ()
        return (found, *(resource for resource in serving if resource is not None))

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change of the World; it must be quick and must not raise."""
        self._listeners.add(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        self._listeners.discard(listener)
