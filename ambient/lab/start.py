"""The beginning of a lab: its supervisor, the objects of the files given, and the wait for its pods."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from ambient.errors import ConfigFault, PlatformFault
from ambient.io.kube import KubeClient
from ambient.lab import apply, record, teardown
from ambient.lab.lifecycle import locked
from ambient.lab.process import child_environment, python_module
from ambient.lab.readiness import wait_ready
from ambient.lab.topology import Lab

Say = Callable[[str], None]
_LOG_LINES = 25
_START_S = 60.0


def up(plan: Lab, files: Sequence[Path], *, mesh: bool, timeout_s: float, say: Say) -> dict[str, str]:
    """Start a lab and create the files' objects. Returns what is not ready in time, with reasons.

    Raises ConfigFault for a name in use or a bad file (nothing is started then), PlatformFault if the lab cannot
    start (nothing is left then).
    """
    documents = apply.read(files)
    directory = Path(plan.directory)
    with locked():
        if directory.exists():
            raise ConfigFault("lab", plan.name, f"is there already: ambient lab down --name {plan.name}")
        teardown.remove(plan)  # of a crashed lab the directory may be gone and the rest not
        (directory / "logs").mkdir(parents=True, mode=0o755)
        images = apply.images(documents)
        record.write(record.LabRecord(name=plan.name, nodes=plan.nodes, ipv6=plan.ipv6, mesh=mesh, images=images))
    try:
        _start_supervisor(plan, say)
    except BaseException:
        teardown.remove(plan)
        raise
    return asyncio.run(_populate(plan, documents, timeout_s, say))


def _start_supervisor(plan: Lab, say: Say) -> None:
    """Start it and pass on what it says, until it is ready. PlatformFault with the end of its log if it fails."""
    log_path = Path(plan.directory) / "logs" / "supervisor.log"
    read_end, write_end = os.pipe()
    with log_path.open("ab") as log, os.fdopen(read_end, "rb") as progress:
        process = subprocess.Popen(
            python_module("ambient.lab.supervisor", plan.name, "--progress", str(write_end)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(write_end,),
            start_new_session=True,
            cwd="/",
            env=child_environment(),
        )
        os.close(write_end)
        for line in progress:
            told = json.loads(line)
            if told.get("ready"):
                return
            if "error" in told:
                raise PlatformFault(f"the lab cannot start: {told['error']}\n{_tail(log_path)}")
            say(f"- {told['step']}")
        code = process.wait(_START_S)
    raise PlatformFault(f"the lab cannot start: its supervisor ended with {code}\n{_tail(log_path)}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_LOG_LINES:])


async def _populate(plan: Lab, documents: Sequence[apply.Document], timeout_s: float, say: Say) -> dict[str, str]:
    async with KubeClient.from_settings(str(plan.kubeconfig)) as client:
        applier = apply.Applier(client)
        for document in documents:
            await applier.apply(document)
        if documents:
            say(f"- {len(documents)} objects created")
        return await wait_ready(client, timeout_s, lambda line: say(f"- {line}"))
