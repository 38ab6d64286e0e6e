"""The agent of one node: ``python -m ambient.node.agent --config FILE``, started by the holder.

Puts the parts together and keeps them running: programs, holder, API watch, discovery, CNI, status. Nothing
it does at its end takes anything away: what it set up goes on without it.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import functools
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from ambient.datapath.layout import LAYOUT
from ambient.errors import AmbientError, ConfigFault
from ambient.io import bpf_drain, bpf_links, logs
from ambient.io.bpf_maps import Maps
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.io.mesh_client import await_acknowledged
from ambient.io.reflector import Reflector
from ambient.io.xds_client import subscribe
from ambient.manifest.acceleration import Acceleration
from ambient.manifest.kinds import NAMESPACE, POD, Changed
from ambient.manifest.objects import Namespace, Pod
from ambient.manifest.pods import uid_on_node
from ambient.model.world import Diff, World
from ambient.node import inherit, programs, servers
from ambient.node.holder_client import HolderClient
from ambient.node.inherit import Inheritance
from ambient.node.kernel import Kernel
from ambient.node.messages import NETNS
from ambient.node.operations import operations
from ambient.node.pods import Pods
from ambient.node.records import Names, Records
from ambient.node.sandboxes import Sandboxes
from ambient.settings import NodeSettings, read_settings

BEAT_S: Final = 1.0
SWEEP_S: Final = 60.0
LOCK_S: Final = 0.2
SILENT_S: Final = LAYOUT["AGENT_SILENT_S"]
RETRY_S: Final = (1.0, 30.0)
CROWDED: Final = "map flows is nearly full: ztunnel takes new connections within the node until there is room again"
CANNOT_CLOSE: Final = (
    "this kernel cannot close established connections (SOCK_DESTROY: CONFIG_INET_DIAG_DESTROY, module tcp_diag): "
    "traffic within the node goes through ztunnel"
)

log = logging.getLogger(__name__)


class KubeApi:
    """`ambient.node.annotations.Api` on a real API server."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client

    async def pod(self, namespace: str, name: str) -> Pod | None:
        try:
            return await self._client.get(POD, name, namespace)
        except ApiStatus as status:
            if status.code == 404:
                return None
            raise

    async def namespace(self, name: str) -> Namespace | None:
        try:
            return await self._client.get(NAMESPACE, name)
        except ApiStatus as status:
            if status.code == 404:
                return None
            raise

    async def annotate(self, namespace: str, name: str, annotations: Mapping[str, str | None]) -> None:
        try:
            await self._client.patch(POD, name, {"metadata": {"annotations": dict(annotations)}}, namespace)
        except ApiStatus as status:
            if status.code != 404:
                raise


class Agent:
    """Construct, then `run` until cancelled."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._run_dir = run_dir = Path(settings.run_dir)
        self._records = Records(run_dir / "agent.json")
        self._names = Names(run_dir / "names.json")
        self._client: KubeClient | None = None
        self._kernel: Kernel | None = None
        self._world: World | None = None
        self._connected, self._connection = False, "not connected yet"
        self._doubted = asyncio.Event()
        self._asked_at = 0
        """`Kernel.doubts` when the World was last asked for."""
        self._problems: dict[str, str] = {}
        self._draining: list[str] = []
        """Earlier layouts that are still pinned."""
        for name, problem in (("agent.json", self._records.problem), ("names.json", self._names.problem)):
            if problem:
                log.error("%s", problem)
                self._problems[name] = problem
        self._pods = Pods(settings, self._records, self, self._acknowledged, lambda: programs.cgroups_of(settings)[1])
        self._holder = HolderClient(run_dir / "holder.sock", self._pods.late)

    async def run(self) -> None:
        servers_up = [await servers.serve_cni(self._run_dir / "cni.sock", Sandboxes(self._pods).answer)]
        status = await servers.serve_status(
            self._run_dir / "agent.sock", self.status, self.not_ready, operations(self._pods)
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._again("api", self._watch))
                tasks.create_task(self._again("kernel", self._operate))
        finally:
            await self._pods.close()
            for server in servers_up:
                server.close()
            await status.cleanup()
            if self._client is not None:
                await self._client.close()

    async def _again(self, name: str, part: Callable[[], Awaitable[None]]) -> None:
        """Run a part for ever; a fault becomes a problem on status and another try."""
        delay = RETRY_S[0]
        while True:
            began = time.monotonic()
            try:
                await part()
            except* (AmbientError, OSError) as group:
                text = "; ".join(str(e) for e in _leaves(group))
                self._problems[name] = text
                log.error("%s: %s", name, text)
            if time.monotonic() - began > 60:
                delay = RETRY_S[0]
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))
            delay = min(RETRY_S[1], delay * 2)

    # --- API

    async def _watch(self) -> None:
        if self._client is None:
            self._client = KubeClient.from_settings(self._settings.kubeconfig)
        namespaces = Reflector(self._client, NAMESPACE, self._namespace_event)
        field = f"spec.nodeName={self._settings.node_name}"
        pods = Reflector(self._client, POD, self._pod_event, field_selector=field)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(namespaces.run())
            tasks.create_task(pods.run())
            await namespaces.synced.wait()
            await pods.synced.wait()
            self._problems.pop("api", None)
            there = {uid_on_node(pod) for pod in pods.objects.values()}
            self._pods.api_synced(there, pods.unreadable, {*namespaces.objects, *namespaces.unreadable})

    def _namespace_event(self, changed: Changed[Namespace]) -> None:
        self._pods.namespace_changed(changed.key, changed.new)

    def _pod_event(self, changed: Changed[Pod]) -> None:
        self._pods.pod_changed(changed.old, changed.new)

    def _api(self) -> KubeApi:
        if self._client is None:
            self._client = KubeClient.from_settings(self._settings.kubeconfig)
        return KubeApi(self._client)

    async def pod(self, namespace: str, name: str) -> Pod | None:
        return await self._api().pod(namespace, name)

    async def namespace(self, name: str) -> Namespace | None:
        return await self._api().namespace(name)

    async def annotate(self, namespace: str, name: str, annotations: Mapping[str, str | None]) -> None:
        await self._api().annotate(namespace, name, annotations)

    async def _acknowledged(self, workload_uid: str, timeout_s: float) -> bool:
        return await await_acknowledged(self._settings, workload_uid, False, timeout_s)

    # --- kernel, holder, discovery

    async def _operate(self) -> None:
        """Load what is not loaded, take up what is there, then keep maps and World in step."""
        if not programs.loaded(self._settings):
            log.info("%s", await programs.load(self._settings))
            if self._kernel is not None:  # other maps now: everything is written again
                self._kernel.close()
                self._kernel = None
        async with asyncio.TaskGroup() as tasks:
            if self._kernel is None:
                maps = Maps.open(self._settings.bpffs_dir)
                try:
                    self._kernel = Kernel(self._settings, self._names, maps)
                except BaseException:
                    maps.close()
                    raise
            snapshot = await self._holder.connect()
            tasks.create_task(self._holder.run())
            tasks.create_task(self._beat(self._kernel))
            await self._pods.restore(self._kernel, self._holder, snapshot)
            if old := bpf_links.other_versions(self._settings.bpffs_dir):
                log.info("removing the programs of earlier versions: %s", ", ".join(old))
                self._draining = bpf_drain.drain_others(self._settings.bpffs_dir, taken_over=False)
                inheritance = Inheritance(self._settings.bpffs_dir, self._kernel.maps)
                tasks.create_task(self._drain(self._kernel, inheritance))
            self._problems.pop("kernel", None)
            tasks.create_task(self._pods.audit())
            tasks.create_task(self._follow(self._kernel))

    async def _beat(self, kernel: Kernel) -> None:
        swept = time.monotonic()
        while True:
            kernel.beat()
            if kernel.doubts != self._asked_at:
                self._doubted.set()
            kernel.same_node.revoke()  # what failed when it was to be done
            self._redirect(kernel)
            if time.monotonic() - swept > SWEEP_S:
                swept = time.monotonic()
                if removed := kernel.maps.sweep():
                    log.info("removed %d entries of connections that were never made", removed)
            await asyncio.sleep(BEAT_S)

    async def _drain(self, kernel: Kernel, inheritance: Inheritance) -> None:
        """Take over what earlier layouts let in, and see them off."""
        members = self._pods.members
        began = time.monotonic()
        if inheritance.problem:
            self._problems["flows"] = inheritance.problem
        while self._draining:
            if not inheritance.done:
                awaited = any(m.state != "enrolled" for m in members.values() if m.record.in_mesh)
                places = {
                    address: (member.cookie, member.handle.fds[NETNS])
                    for member in members.values()
                    if member.state == "enrolled" and member.handle is not None
                    for address in member.record.addresses
                }
                settled = not awaited or time.monotonic() - began > inherit.WAIT_S
                kernel.same_node.look_again(inheritance.step(places, settled))
            self._draining = bpf_drain.drain_others(self._settings.bpffs_dir, taken_over=inheritance.done)
            await asyncio.sleep(BEAT_S)
        self._problems.pop("flows", None)
        log.info("earlier versions are gone")

    def _redirect(self, kernel: Kernel) -> None:
        """Keep redirection where it is wanted, and out of sockets it must not be in."""
        held = [member for member in self._pods.members.values() if member.handle is not None]
        spaces = {member.cookie: member.handle.fds[NETNS] for member in held if member.handle}
        kernel.redirection.follow(
            {
                member.record.uid: spaces[member.cookie]
                for member in held
                if member.state in ("enrolling", "enrolled") and member.acceleration is Acceleration.REDIRECT
            }
        )
        if taken := kernel.redirection.take_out(spaces):
            log.info("took %d sockets that turned blocking out of redirection", taken)

    async def _follow(self, kernel: Kernel) -> None:
        """Keep maps and World in step. In doubt everything is asked for anew: the stream of before may be behind, or
        over without our knowing."""
        while True:
            doubts = self._asked_at = kernel.doubts
            self._doubted.clear()
            async with asyncio.TaskGroup() as tasks:
                changed = functools.partial(self._world_changed, kernel, doubts)
                following = tasks.create_task(subscribe(self._settings, "agent", changed, on_state=self._state))
                await self._doubted.wait()
                following.cancel()
            log.warning("was silent for more than %d s: asking the control plane for everything anew", SILENT_S)

    async def _world_changed(self, kernel: Kernel, doubts: int, world: World, _: Diff) -> None:
        self._world = world
        kernel.put_world(world, self._pods.local_pods())
        kernel.believe(doubts)

    def _state(self, connected: bool, reason: str) -> None:
        self._connected, self._connection = connected, reason

    # --- status

    def not_ready(self) -> str:
        """Why not, or the empty string."""
        if not self._pods.operating.is_set():
            return self._problems.get("kernel") or "the kernel programs are being loaded"
        if not self._pods.wishes.synced:
            return self._problems.get("api") or "the API server has not told of the pods yet"
        return ""

    def status(self) -> dict[str, Any]:
        kernel = self._kernel
        problems = [f"{name}: {text}" for name, text in self._problems.items()]
        body: dict[str, Any] = {
            "node": self._settings.node_name,
            "pid": os.getpid(),
            "ready": not self.not_ready(),
            "reason": self.not_ready(),
            "layout": LAYOUT.version,
            "draining": self._draining,
            "control": {"connected": self._connected, "reason": self._connection, "world": self._world is not None},
            "holder": {"connected": self._holder.connected.is_set()},
            "api": {"synced": self._pods.wishes.synced},
            "complete": kernel is not None and bool(kernel.settings.complete),
            "pods": self._pods.status(),
            "bypass": msgspec.to_builtins(self._pods.wishes.bypass()),
            "counters": self._pods.counters
            | {"entries_refused": kernel.refused if kernel else 0}
            | (kernel.same_node.counters if kernel else {}),
            "programs": [],
            "maps": {},
            "problems": problems,
        }
        problems += [f"{p['namespace']}/{p['name']}: {p['problem']}" for p in body["pods"] if p["problem"]]
        if kernel is not None:
            body["acceleration"] = {"kernel": kernel.capabilities, "taken_out": kernel.redirection.taken_out}
            problems += [f"pod {uid}: redirection: {text}" for uid, text in kernel.redirection.problems.items()]
            if kernel.cannot_close:
                problems.append(CANNOT_CLOSE)
            if kernel.crowded:
                problems.append(CROWDED)
            if kernel.same_node.problem:
                problems.append(kernel.same_node.problem)
            if kernel.problem:
                problems.append(kernel.problem)
            try:
                body["programs"], body["maps"] = kernel.programs(), kernel.fill()
                problems += [f"hook {p['hook']} is not attached" for p in body["programs"] if not p["target"]]
            except AmbientError as error:
                problems.append(str(error))
        return body


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _alone(run_dir: Path) -> None:
    """Wait until no other agent works in this directory: two would give the same numbers to different names. The lock
    is ours until this process ends. Raises OSError."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir / "agent.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    said = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                log.warning("%s: another agent works here; waiting for its end", path)
            said = True
        await asyncio.sleep(LOCK_S)


async def _main(settings: NodeSettings) -> None:
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await _alone(Path(settings.run_dir))
        await Agent(settings).run()
    except asyncio.CancelledError:
        log.info("ended; what is enrolled stays so")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ambient.node.agent")
    parser.add_argument("--config", required=True)
    config = parser.parse_args(arguments).config
    try:
        settings = read_settings(NodeSettings, Path(config).read_text(), config)
    except (OSError, ConfigFault) as error:
        sys.stderr.write(f"agent: {error}\n")
        return 1
    logs.set_up(settings.log_format, settings.log_level)
    asyncio.run(_main(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
