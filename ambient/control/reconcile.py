"""The control plane's decisions: changes of objects in, Worlds to serve and statuses to write out.

    change(event)*  ->  publish(now)  ->  serve it  ->  release(now, who has not acknowledged)  ->  serve it

No clock and no I/O: ``now`` is handed in, in seconds of any clock that only goes forward.
"""

from __future__ import annotations

from typing import Any

from ambient.control.statuses import ROOT_CONFIG_MAP, RootWrite, StatusPatch, root_writes, status_patch
from ambient.control.strict_delay import StrictDelay, Waiting, without_strict
from ambient.manifest.kinds import KINDS, Changed
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import AuthorizationPolicy, ConfigMap, Namespace, Pod
from ambient.manifest.problems import Problem
from ambient.manifest.translate import Translator
from ambient.model.workload import Workload
from ambient.model.world import Diff, World


class Reconciler:
    """The one writer of the World. ``world`` is what to serve; None until the first `publish`."""

    def __init__(self, mesh: Mesh, acknowledge_timeout_s: float, settle_s: float = 0.0) -> None:
        self.world: World | None = None
        self.delay = StrictDelay(acknowledge_timeout_s, settle_s)
        self._translator = Translator(mesh)
        self._unreadable: dict[tuple[str, str], Problem] = {}
        self._policies: dict[str, AuthorizationPolicy] = {}
        self._unwritten: set[str] = set()
        self._namespaces: dict[str, Namespace] = {}
        self._roots: dict[str, ConfigMap] = {}
        self._pods_on: dict[str, dict[str, Pod]] = {}

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with objects now, sorted."""
        return tuple(sorted((*self._translator.problems, *self._unreadable.values())))

    def pods_on(self, node: str) -> tuple[Pod, ...]:
        """The pods bound to a node, finished ones too."""
        return tuple(self._pods_on.get(node, {}).values())

    def change(self, event: Changed[Any]) -> None:
        """Take note of one change of an object."""
        self._translator.change(event)
        match event.kind.name:
            case "AuthorizationPolicy":
                _replace(self._policies, event.key, event.new)
                self._unwritten.add(event.key)
            case "Namespace":
                _replace(self._namespaces, event.key, event.new)
            case "ConfigMap":
                namespace, _, name = event.key.partition("/")
                if name == ROOT_CONFIG_MAP:
                    _replace(self._roots, namespace, event.new)
            case "Pod":
                if event.old is not None:
                    on_node = self._pods_on.get(event.old.spec.node_name, {})
                    on_node.pop(event.key, None)
                    if not on_node:
                        self._pods_on.pop(event.old.spec.node_name, None)
                if event.new is not None and event.new.spec.node_name:
                    self._pods_on.setdefault(event.new.spec.node_name, {})[event.key] = event.new

    def unreadable(self, kind: str, key: str, problem: Problem | None) -> None:
        """An object does not decode (its last good form stays; a policy without one stands closed), or does so again
        or is gone (None)."""
        if problem is None:
            self._unreadable.pop((kind, key), None)
            self._translator.readable(KINDS[kind], key)
        else:
            self._unreadable[kind, key] = problem
            self._translator.unreadable(KINDS[kind], key)

    def publish(self, now: float) -> World:
        """The World to serve after the changes so far."""
        change = self._translator.take()
        if not change and self.world is not None:
            return self.world
        before, first = self.world or World(), self.world is None
        workloads = tuple(self.delay.admit(w, before.workloads.get(w.uid), now, first=first) for w in change.workloads)
        for uid in change.removed_workloads:
            self.delay.forget(uid)
        return self._apply(before, workloads, change)

    def release(self, now: float, ignorant: Waiting, behind: Waiting) -> World | None:
        """Publish those whose wait is over as they shall be: the new World, or None if nothing changes.

        Call after the World of `publish` was handed to the server; the arguments are those of `StrictDelay.release`.
        """
        released = self.delay.release(now, ignorant, behind)
        if not released or self.world is None:
            return None
        wanted = self._translator.world.workloads
        over = (wanted[uid] for uid in released if uid in wanted)
        workloads = tuple(w if w.enrolled else without_strict(w) for w in over)
        changed = tuple(w for w in workloads if self.world.workloads.get(w.uid) != w)
        return self._apply(self.world, changed, Diff()) if changed else None

    def _apply(self, before: World, workloads: tuple[Workload, ...], change: Diff) -> World:
        self.world = before.apply(
            Diff(
                workloads,
                change.services,
                change.policies,
                change.removed_workloads,
                change.removed_services,
                change.removed_policies,
            )
        )
        return self.world

    def status_patches(self, now_text: str) -> tuple[StatusPatch, ...]:
        """Statuses that do not say yet what was judged, of policies changed since the last call."""
        patches = []
        for key in sorted(self._unwritten):
            item, converted = self._policies.get(key), self._translator.converted.get(key)
            if item is not None and converted is not None:
                patch = status_patch(item, converted, now_text)
                if patch is not None:
                    patches.append(patch)
        self._unwritten.clear()
        return tuple(patches)

    def retry_status(self, namespace: str, name: str) -> None:
        """The patch was not written: offer it again."""
        self._unwritten.add(f"{namespace}/{name}")

    def root_writes(self, bundle: str) -> tuple[RootWrite, ...]:
        return root_writes(self._namespaces.values(), self._roots, bundle)


def _replace(index: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        index.pop(key, None)
    else:
        index[key] = value
