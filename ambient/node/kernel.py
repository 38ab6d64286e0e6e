"""What the agent has in the kernel: entries of the maps, and the filters in pods. The one writer of them.

Keeps a mirror of what it wrote to `workloads` and `services` and applies only differences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from ambient.datapath import entries, render
from ambient.datapath.decide import agent_is_silent
from ambient.datapath.endpoints import counts
from ambient.datapath.entries import LocalPod
from ambient.datapath.layout import LAYOUT
from ambient.datapath.plan import Plan, plan
from ambient.datapath.values import (
    EnrolledValue,
    SettingsValue,
    WorkloadValue,
    network_range,
)
from ambient.errors import AmbientError, PlatformFault
from ambient.io import bpf_links, cgroup
from ambient.io.bpf_maps import Maps, TypedMap
from ambient.model.world import World
from ambient.node import taken
from ambient.node.crowd import Crowd
from ambient.node.programs import cgroups_of
from ambient.node.records import Names
from ambient.node.redirection import Redirection
from ambient.node.same_node import SameNode
from ambient.settings import NodeSettings

_KINDS: Final = (
    ("outbound", LAYOUT["LISTENER_OUTBOUND"]),
    ("plaintext", LAYOUT["LISTENER_INBOUND_PLAINTEXT"]),
    ("hbone", LAYOUT["LISTENER_HBONE"]),
)

log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")


def _settings_value(settings: NodeSettings, before: SettingsValue) -> SettingsValue:
    """What this process tells the programs; an operator's bypass and the loader's findings stay."""
    own = cgroup.of_pid(os.getpid())
    _, pods = cgroups_of(settings)
    exempt: set[int] = set()
    for field, path in (("ztunnel_cgroup", settings.ztunnel_cgroup), ("agent_cgroup", settings.agent_cgroup)):
        # A cgroup is exempt with all below it: one that holds the pods would switch the mesh off.
        if pods.resolve().is_relative_to(Path(path or own).resolve()):
            raise PlatformFault(f"{field}: {path or own} holds the pods too ({pods}): name a cgroup beside them")
        exempt.add(cgroup.cgroup_id(path or own))
    for path in settings.kubelet_cgroups:
        if pods.resolve().is_relative_to(Path(path).resolve()):
            raise PlatformFault(f"kubelet_cgroups: {path} holds the pods too ({pods}): their connections are no probes")
    return SettingsValue(
        generation=before.generation + 1,
        heartbeat_ns=time.monotonic_ns(),
        exempt_cgroups=tuple(sorted(exempt)),
        kubelet_cgroups=tuple(cgroup.cgroup_id(path) for path in settings.kubelet_cgroups),
        cluster_ranges=tuple(network_range(text) for text in settings.cluster_ranges),
        mode=before.mode,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        acceleration=before.acceleration & ~(LAYOUT["DRAINING"] | LAYOUT["CROWDED"]),
        high_bytes=before.high_bytes,
    )


def listener_fds(address: str, fds: dict[str, int]) -> list[tuple[int, int]]:
    """Kind and descriptor of the listeners for a pod's address. Raises PlatformFault if one is not there."""
    family = "6" if ":" in address else "4"
    found = []
    for name, kind in _KINDS:
        if name + family in fds:
            found.append((kind, fds[name + family]))
        elif name != "outbound":
            raise PlatformFault(f"the pod has address {address} but no listener {name}{family}")
    return found


class Kernel:
    """Open after `load`. ``refused`` counts entries that found no room."""

    def __init__(self, settings: NodeSettings, names: Names, maps: Maps) -> None:
        self._node = settings.node_name
        self._bpffs = settings.bpffs_dir
        self._names = names
        self.maps = maps
        self.refused = 0
        self.complete = False
        """Whether the maps hold the whole World; that it is the present one is `doubts`' affair."""
        self.doubts = 0
        """How often this process found that it had been silent for so long that its verdicts did not count any more."""
        self._believed = 0
        self.problem = ""
        self._world: World | None = None
        self._remote: dict[str, WorkloadValue] = {}
        self._workloads = dict(maps.workloads.items())
        self._services = dict(maps.services.items())
        self._failed: set[str] = set()
        self._strict_means_off = settings.strict_means_off
        taken.begin_beyond(names, maps)
        self.same_node = SameNode(settings.node_name, names, maps)
        before = maps.settings
        # An operator's bypass stays; everything unknown is captured until this process has the World.
        self._settings = _settings_value(settings, before or SettingsValue())
        maps.settings = self._settings
        self.redirection = Redirection(settings.bpffs_dir, maps)
        self._crowd = Crowd(maps)

    def close(self) -> None:
        self.maps.close()

    def beat(self) -> None:
        """A sign of life, and whatever changed of the settings. Who was silent for long may have missed the loss of any
        right, so its word does not count again until a World was asked for anew (`believe`)."""
        now_ns = time.monotonic_ns()
        if agent_is_silent(self._settings, now_ns):
            self.doubts += 1
        found = self._settings.acceleration & ~LAYOUT["CROWDED"]
        self._settings = dataclasses.replace(
            self._settings,
            heartbeat_ns=now_ns,
            complete=int(self.complete and self.doubts == self._believed),
            acceleration=found | (LAYOUT["CROWDED"] if self._crowd.look(time.monotonic()) else 0),
        )
        self.maps.settings = self._settings

    def believe(self, doubts: int) -> None:
        """The World in the maps was asked for when there had been so many ``doubts``."""
        if self._believed != doubts:
            self._believed = doubts
            self.beat()

    @property
    def settings(self) -> SettingsValue:
        """What `settings` shall hold, but for the heartbeat."""
        return self._settings

    def names(self) -> render.Names:
        """The numbers' names, as the command line shows them."""
        return render.Names(
            {n: render.short_workload(uid) for n, uid in self._names.workloads.names().items()},
            {n: render.short_service(key) for n, key in self._names.services.names().items()},
            identities=self._names.identities.names(),
            policies=self._names.policies.names(),
        )

    @property
    def auto_redirect(self) -> bool:
        """Whether `auto` means `redirect` on this kernel."""
        return bool(self._settings.acceleration & LAYOUT["AUTO_REDIRECT"])

    @property
    def cannot_close(self) -> bool:
        """Whether this kernel cannot end a connection, so that it authorizes none within the node."""
        return bool(self._settings.acceleration & LAYOUT["NO_DESTROY"])

    @property
    def crowded(self) -> bool:
        """Whether `flows` is nearly full, so that ztunnel takes what is new."""
        return bool(self._settings.acceleration & LAYOUT["CROWDED"])

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the loader found this kernel able to do with same-node connections, in words."""
        return render.capability_names(self._settings.acceleration)

    def wanted(self, pods: Iterable[LocalPod]) -> dict[str, dict[Any, Any]]:
        """What the maps that follow the World shall hold, computed anew, by the name of the map."""
        world = self._world or World()
        granted = entries.rights(world, pods, strict_means_off=self._strict_means_off)
        local = entries.local_workloads(granted, self.same_node.generation_of, self._names.workloads)
        wanted: dict[str, dict[Any, Any]] = {"verdicts": dict(self.same_node.wanted_verdicts())}
        if self._world is None:
            kept = {a: v for a, v in self._workloads.items() if not v.flags & entries.LOCAL}
            return wanted | {"workloads": kept | local, "services": dict(self._services)}
        slots = self.same_node.wanted_endpoints(world)
        return wanted | {
            "workloads": entries.remote_workloads(self._world, self._node, self._names.workloads) | local,
            "endpoints": slots,
            "services": entries.services(self._world, self._names.services, counts(slots)),
        }

    def resync(self, pods: Collection[LocalPod], *, distrust: bool = False) -> None:
        """Forget what was written, look at what is there, and write what differs. ``distrust``: who was let in until
        now may have had no right."""
        self._workloads = dict(self.maps.workloads.items())
        self._services = dict(self.maps.services.items())
        self.same_node.forget()
        if distrust:
            self.same_node.distrust()
        if self._world is None:
            self.put_pods(pods)
        else:
            self.put_world(self._world, pods)
        self.beat()

    @property
    def bypassed(self) -> bool:
        """Whether nothing on this node is captured."""
        return self._settings.mode == LAYOUT["MODE_BYPASS"]

    def set_bypass(self, on: bool) -> None:
        """Capture nothing on this node, or capture again. Connections that are open stay as they are."""
        self._settings = dataclasses.replace(self._settings, mode=LAYOUT["MODE_BYPASS" if on else "MODE_CAPTURE"])
        self.beat()

    # --- the World and the addresses of this node's pods

    def put_world(self, world: World, pods: Collection[LocalPod]) -> None:
        """Write a World. `complete` afterwards says whether all of it found room. Raises as `put_pods`."""
        self._failed.clear()
        with self._or_incomplete("world"):
            self._world = world
            self._remote = entries.remote_workloads(world, self._node, self._names.workloads)
            self.put_pods(pods)
            used = {*world.workloads, *(p.workload_uid for p in pods)}
            self._names.workloads.retain(used)
            self._names.services.retain(world.services)
            self.same_node.tidy()
            self._names.save()

    def put_pods(self, pods: Iterable[LocalPod]) -> None:
        """Write the addresses of this node's pods and who may reach them; all others stay as the World has them.

        What it raises (a map or a disk that fails) leaves the maps incomplete, so that nobody goes by what is in them,
        and closes what has no right any more nevertheless.
        """
        with self._or_incomplete("pods"):
            try:
                self._write(pods)
            finally:
                self.same_node.revoke()
            self._names.save()

    @contextlib.contextmanager
    def _or_incomplete(self, what: str) -> Iterator[None]:
        self._failed.discard(what)
        try:
            yield
        except Exception as error:
            self._failed.add(what)
            self.problem = f"the maps were not written to the end: {error}"
            raise
        finally:
            complete = self._world is not None and not self._failed
            if complete != self.complete:
                self.complete = complete
                self.beat()

    def _write(self, pods: Iterable[LocalPod]) -> None:
        world = self._world or World()
        same_node = self.same_node
        same_node.grant(entries.rights(world, pods, strict_means_off=self._strict_means_off))
        local = entries.local_workloads(same_node.granted, same_node.generation_of, self._names.workloads)
        self._names.save()
        # Before the first World the entries of an earlier agent serve on; only our own addresses are ours to change.
        if self._world is None:
            wanted = {a: v for a, v in self._workloads.items() if not v.flags & entries.LOCAL} | local
        else:
            wanted = self._remote | local
        self._failed.discard("workloads")
        self._apply("workloads", self.maps.workloads, self._workloads, plan(self._workloads, wanted))
        same_node.put_verdicts()
        if self._world is not None:
            slots = same_node.wanted_endpoints(world)
            services = entries.services(world, self._names.services, same_node.put_endpoints(slots))
            self._failed.discard("services")
            self._apply("services", self.maps.services, self._services, plan(self._services, services))
            same_node.drop_endpoints(slots)

    def _apply(self, name: str, table: TypedMap[K, V], mirror: dict[K, V], steps: Plan[K, V]) -> None:
        for key in steps.deletes:
            table.delete(key)
            mirror.pop(key, None)
        for key, value in steps.puts:
            try:
                table[key] = value
            except (AmbientError, ValueError) as error:
                self.refused += 1
                if name not in self._failed:
                    log.error("map %s: %s; what is not in it goes to ztunnel", name, error)
                self._failed.add(name)
                self.problem = f"map {name}: {error}"
                continue
            mirror[key] = value
        if not self._failed:
            self.problem = ""

    # --- one pod

    def put_listeners(self, addresses: Iterable[str], fds: dict[str, int]) -> None:
        """Tell sk_lookup the pod's listeners. Raises PlatformFault or BpfFault."""
        for address in addresses:
            for kind, fd in listener_fds(address, fds):
                self.maps.listeners.put(address, kind, fd)

    def remove_listeners(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            for _, kind in _KINDS:
                self.maps.listeners.delete(address, kind)

    def enrolled_value(self, pod: LocalPod) -> EnrolledValue:
        """What the hooks know of the pod as a source of connections."""
        open_flag = LAYOUT["ENROLLED_OPEN"] if pod.open else 0
        bypass_flag = LAYOUT["ENROLLED_BYPASS"] if pod.bypass else 0
        return EnrolledValue(
            next((a for a in pod.addresses if ":" not in a), ""),
            next((a for a in pod.addresses if ":" in a), ""),
            self.number(pod.workload_uid),
            flags=open_flag | bypass_flag | entries.enrolled_flags(pod.acceleration),
            identity=self.same_node.identity(pod.identity) if pod.identity is not None else 0,
        )

    def put_enrolled(self, netns_cookie: int, pod: LocalPod) -> None:
        """Raises BpfFault: no room."""
        value = self.enrolled_value(pod)
        self._names.save()
        self.maps.put_enrolled(netns_cookie, value)

    def remove_enrolled(self, cookie: int) -> None:
        self.maps.enrolled.delete(cookie)

    def number(self, workload_uid: str) -> int:
        number = self._names.workloads.of(workload_uid)
        self._names.save()
        return number

    def attach(self, netns_fd: int, uid: str) -> None:
        bpf_links.attach_sk_lookup(self._bpffs, netns_fd, uid)

    def detach(self, uid: str) -> None:
        bpf_links.detach_sk_lookup(self._bpffs, uid)
        self.redirection.forget(uid)

    def attached(self) -> dict[str, int]:
        return bpf_links.attached_pods(self._bpffs)

    def remove_flows(self, addresses: Iterable[str], cookie: int) -> None:
        """Everything that programs and ztunnel wrote for connections of these addresses or this namespace."""
        gone = set(addresses)
        self.same_node.remove(gone)
        for table in (self.maps.authorized, self.maps.origins):
            for key in table:
                if key.local in gone or key.remote in gone:
                    table.delete(key)
        if cookie:
            for redirect, value in self.maps.redirects.items():
                if value.netns == cookie:
                    self.maps.redirects.delete(redirect)

    # --- for status

    def fill(self) -> dict[str, dict[str, int]]:
        """Entries and limit of each map that is small or mirrored here."""
        counted: dict[str, Callable[[], int]] = {
            "workloads": lambda: len(self._workloads),
            "services": lambda: len(self._services),
            "enrolled": lambda: len(self.maps.enrolled),
            "listeners": lambda: len(self.maps.listeners),
            "authorized": lambda: len(self.maps.authorized),
            "endpoints": lambda: len(self.maps.endpoints),
            "verdicts": lambda: len(self.maps.verdicts),
            "flows": lambda: len(self.maps.flows),
            "origins": lambda: len(self.maps.origins),
            "redirects": lambda: len(self.maps.redirects),
        }
        return {name: {"entries": count(), "limit": LAYOUT[f"{name.upper()}_MAX"]} for name, count in counted.items()}

    def programs(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(a) for a in bpf_links.attachments(self._bpffs)]
