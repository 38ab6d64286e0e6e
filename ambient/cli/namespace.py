"""`ambient namespace`: which namespaces are in the mesh; put one in, take one out (by the label kubectl would set)."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ambient.cli.output import Group, emit, output_option
from ambient.cli.target import LABS, find_lab
from ambient.errors import ConfigFault
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.manifest.kinds import NAMESPACE, POD
from ambient.manifest.objects import Pod

LABEL = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
POLL_S = 0.1

_F = TypeVar("_F", bound=Callable[..., Any])


def kube_options(function: _F) -> _F:
    """``--kubeconfig`` and ``--lab``: which API server."""
    function = click.option("--lab", help="The API server of this lab.")(function)
    return click.option("--kubeconfig", help="Default: $KUBECONFIG, the only lab here, ~/.kube/config.")(function)


def find_kubeconfig(kubeconfig: str | None, lab: str | None, labs: Path = LABS) -> str:
    """The kubeconfig to use; an explicit choice wins, then the environment, a lab on this machine, the home."""
    if kubeconfig:
        return kubeconfig
    if lab is None and os.environ.get("KUBECONFIG"):
        return os.environ["KUBECONFIG"].split(":")[0]
    if lab is not None or any(labs.glob("*/kubeconfig")):
        return str(labs / find_lab(lab, labs) / "kubeconfig")
    home = Path.home() / ".kube" / "config"
    if home.exists():
        return str(home)
    raise ConfigFault("--kubeconfig", "", "no API server known: give --kubeconfig or start a lab")


def is_enrolled(pod: Pod) -> bool:
    return pod.annotations.get(REDIRECTION) == "enabled"


@click.group(cls=Group)
def namespace() -> None:
    """List, enrol and unenrol namespaces.

    \b
    Example:
      ambient namespace list
    """


@namespace.command("list")
@kube_options
@output_option
def list_(kubeconfig: str | None, lab: str | None, output: str) -> None:
    """Show every namespace, whether it is labelled, and how many of its pods are in the mesh.

    \b
    Example:
      ambient namespace list -o json
    """

    async def run() -> list[dict[str, Any]]:
        async with KubeClient.from_settings(find_kubeconfig(kubeconfig, lab)) as client:
            namespaces = (await client.list(NAMESPACE)).items
            pods = (await client.list(POD)).items
        rows = []
        for item in sorted(namespaces, key=lambda n: n.name):
            own = [p for p in pods if p.namespace == item.name]
            rows.append(
                {
                    "namespace": item.name,
                    "mode": item.labels.get(LABEL, ""),
                    "pods": len(own),
                    "enrolled": sum(map(is_enrolled, own)),
                }
            )
        return rows

    emit(asyncio.run(run()), output, ("namespace", "mode", "pods", "enrolled"))


async def set_mode(client: KubeClient, name: str, enrol: bool, wait_s: float) -> tuple[int, int, float]:
    """Label the namespace and wait until its running pods have followed. -> pods done, pods wanted, seconds.

    A pod that is excluded from the mesh says so in its own status and is not waited for.
    """
    began = time.monotonic()
    await client.patch(NAMESPACE, name, {"metadata": {"labels": {LABEL: "ambient" if enrol else None}}})
    while True:
        pods = [p for p in (await client.list(POD, name)).items if _counts(p)]
        done = sum(is_enrolled(p) is enrol for p in pods)
        if done == len(pods) or time.monotonic() - began > wait_s:
            return done, len(pods), time.monotonic() - began
        await asyncio.sleep(POLL_S)


def _counts(pod: Pod) -> bool:
    return pod.status.phase == "Running" and not pod.spec.host_network and not pod.metadata.deletion_timestamp


def _change(name: str, enrol: bool, kubeconfig: str | None, lab: str | None, wait_s: float, output: str) -> None:
    async def run() -> tuple[int, int, float]:
        async with KubeClient.from_settings(find_kubeconfig(kubeconfig, lab)) as client:
            try:
                return await set_mode(client, name, enrol, wait_s)
            except ApiStatus as status:
                if status.code == 404:
                    raise ConfigFault("namespace", name, "does not exist") from None
                raise

    done, wanted, seconds = asyncio.run(run())
    word = "enrolled" if enrol else "unenrolled"
    if output != "table":
        emit([{"namespace": name, word: done, "pods": wanted, "seconds": round(seconds, 3)}], output, ())
    else:
        click.echo(f"namespace/{name}: {done} of {wanted} pods {word} in {seconds:.2f} s")
    if done < wanted:
        click.echo(f"the others say why: ambient status, or kubectl describe pods -n {name}", err=True)
        sys.exit(1)


_wait = click.option("--wait", "wait_s", default=30.0, show_default=True, help="Seconds to wait for the pods.")


@namespace.command()
@click.argument("name")
@_wait
@kube_options
@output_option
def enrol(name: str, wait_s: float, kubeconfig: str | None, lab: str | None, output: str) -> None:
    """Label a namespace so that its pods join the mesh, and wait until they have.

    \b
    Example:
      ambient namespace enrol shop
    """
    _change(name, True, kubeconfig, lab, wait_s, output)


@namespace.command()
@click.argument("name")
@_wait
@kube_options
@output_option
def unenrol(name: str, wait_s: float, kubeconfig: str | None, lab: str | None, output: str) -> None:
    """Remove the label so that its pods leave the mesh, and wait until they have.

    \b
    Example:
      ambient namespace unenrol shop
    """
    _change(name, False, kubeconfig, lab, wait_s, output)
