"""One container: its process, its probes, its restarts. Runs until it ends for good or is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ambient.errors import AmbientError, ConfigFault
from ambient.lab import cgroups, commands, environment
from ambient.lab.objects import Container, KubeletPod, Probe
from ambient.lab.pod_status import ContainerState, restarts_again
from ambient.lab.probes import UNPROVEN_PERIOD_S, Prober, Tally, request_of
from ambient.lab.sandbox import PodSandbox

BACKOFF_FIRST_S, BACKOFF_LONGEST_S, BACKOFF_FORGET_S = 0.5, 30.0, 60.0


def now_text() -> str:
    """RFC 3339, UTC, whole seconds, as Kubernetes writes times."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all containers of a pod share."""

    pod: KubeletPod
    sandbox: PodSandbox
    host_addresses: tuple[str, ...]
    prober: Prober
    images: Mapping[str, str]
    """Name of an image (without registry and tag) -> directory that its commands run in."""
    changed: Callable[[], None]


def image_name(image: str) -> str:
    """``registry/shop:1`` -> ``shop``."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


class RunningContainer:
    """Make it, `run` it in a task, `stop` it from another."""

    def __init__(self, around: Surroundings, container: Container, state: ContainerState, policy: str) -> None:
        self._around = around
        self._container = container
        self._state = state
        self._policy = policy
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._cgroup = around.sandbox.cgroup / container.name

    async def run(self) -> None:
        """Returns when the container has ended and its policy does not start it again, or after `stop`."""
        backoff_s = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                code = await self._once()
            except (AmbientError, LookupError, OSError) as fault:
                self._say("CreateContainerConfigError", str(fault))
            else:
                if not restarts_again(self._policy, code) or self._stopping.is_set():
                    return
                self._state.restarts += 1
                self._say("CrashLoopBackOff", f"back-off {backoff_s:g}s restarting failed container")
            if time.monotonic() - started > BACKOFF_FORGET_S:
                backoff_s = BACKOFF_FIRST_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._stopping.wait()
            backoff_s = min(backoff_s * 2, BACKOFF_LONGEST_S)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for all of the container after ``grace_s``. Returns when nothing of it runs."""
        self._stopping.set()
        await self._end(grace_s)

    async def _end(self, grace_s: float) -> None:
        process = self._process
        if process is None:
            return
        if grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await process.wait()
        await self._kill_rest()
        await process.wait()

    async def _kill_rest(self) -> None:
        """What a dead container leaves behind dies with it, as children of PID 1 do elsewhere."""
        if cgroups.populated(self._cgroup):
            await asyncio.get_running_loop().run_in_executor(None, cgroups.kill, self._cgroup)

    def _say(self, reason: str, message: str) -> None:
        self._state.reason, self._state.message = reason, message
        self._around.changed()

    async def _once(self) -> int:
        """One life of the process. Returns its exit code (negative: the signal)."""
        argv, env, directory = self._prepare()
        self._cgroup.mkdir(exist_ok=True)
        line = commands.enter_argv(
            argv,
            cgroup=str(self._cgroup),
            netns=self._around.sandbox.netns,
            pid=self._around.sandbox.keeper_pid,
            directory=directory,
        )
        with self.log_path.open("ab") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *line, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        state = self._state
        state.pid, state.started_at, state.reason, state.message = process.pid, now_text(), "", ""
        state.started = self._container.startup_probe is None
        state.ready = state.started and self._container.readiness_probe is None
        self._around.changed()
        probing = asyncio.create_task(self._probe(), name=f"probes of {self._around.pod.key}")
        try:
            code = await process.wait()
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
        await self._kill_rest()
        self._process = None
        state.pid, state.exit_code, state.finished_at = 0, code, now_text()
        state.ready = state.started = False
        self._around.changed()
        return code

    @property
    def log_path(self) -> Path:
        return self._around.sandbox.directory / f"{self._container.name}.log"

    def _prepare(self) -> tuple[list[str], dict[str, str], str]:
        """Command line, environment and directory. ConfigFault for what the lab cannot do."""
        around, container = self._around, self._container
        if container.volume_mounts:
            where = f"Pod {around.pod.key}: {container.name}.volumeMounts"
            raise ConfigFault(where, container.volume_mounts[0].get("name", ""), "the lab has no volumes")
        for probe in (container.startup_probe, container.readiness_probe, container.liveness_probe):
            if probe is not None and probe.grpc is not None:
                raise ConfigFault(
                    f"Pod {around.pod.key}: {container.name}", "grpc", "probes: httpGet, tcpSocket or exec"
                )
        base = environment.BASE_ENVIRONMENT | {"HOSTNAME": around.pod.spec.hostname or around.pod.name}
        env = environment.environment(around.pod, container, around.sandbox.addresses, around.host_addresses, base)
        argv = environment.command_line(around.pod, container, env)
        image = around.images.get(image_name(container.image), "/")
        directory = os.path.join(image, container.working_dir) if container.working_dir else image
        if not os.path.isdir(directory):
            raise ConfigFault(
                f"Pod {around.pod.key}: {container.name}.workingDir", directory, "is not a directory here"
            )
        return argv, env, directory

    async def _probe(self) -> None:
        container = self._container
        first = container.startup_probe
        if first is not None and not await self._follow(first, self._set_started, until=True):
            return
        await asyncio.gather(
            self._follow(container.readiness_probe, self._set_ready) if container.readiness_probe else asyncio.sleep(0),
            self._follow(container.liveness_probe, _nothing) if container.liveness_probe else asyncio.sleep(0),
        )

    def _set_started(self, ok: bool) -> None:
        self._state.started = ok
        self._state.ready = ok and self._container.readiness_probe is None
        self._around.changed()

    def _set_ready(self, ok: bool) -> None:
        if self._state.ready != ok:
            self._state.ready = ok
            self._around.changed()

    async def _follow(self, probe: Probe, verdict: Callable[[bool], None], until: bool = False) -> bool:
        """Ask again and again. Readiness goes on for ever; the others kill the container when they fail.

        With ``until`` returns True at the first success.
        """
        tally = Tally(probe)
        period_s = float(max(1, probe.period_seconds))
        readiness = probe is self._container.readiness_probe
        await asyncio.sleep(probe.initial_delay_seconds)
        proven = False
        while True:
            began = time.monotonic()
            failure = await self._ask(probe)
            proven = proven or not failure
            before = tally.verdict
            # before the first success a probe is asked more often, and then only once a period counts as a failure
            quick = not proven and (readiness or until)
            result = before if quick else tally.count(not failure)
            if result is True:
                verdict(True)
                if until:
                    return True
            elif result is False:
                verdict(False)
                if not readiness:
                    self._state.message = f"probe failed: {failure}"
                    await self._end(float(self._around.pod.spec.termination_grace_period_seconds))
                    return False
            pause_s = min(period_s, UNPROVEN_PERIOD_S) if quick else period_s
            await asyncio.sleep(max(0.0, pause_s - (time.monotonic() - began)))

    async def _ask(self, probe: Probe) -> str:
        around = self._around
        if probe.exec is not None:
            argv = commands.enter_argv(
                probe.exec.command or ["false"],
                cgroup=str(self._cgroup),
                netns=around.sandbox.netns,
                pid=around.sandbox.keeper_pid,
            )
            try:
                answer = await commands.run_async(argv, timeout_s=max(1, probe.timeout_seconds))
            except AmbientError as fault:
                return str(fault)
            return answer.talk() or f"exit code {answer.code}" if answer.code else ""
        address = around.sandbox.addresses[0] if around.sandbox.addresses else ""
        request = request_of(probe, self._container, address)
        return "no action" if request is None else await around.prober.ask(request)


def _nothing(_: bool) -> None:
    pass
