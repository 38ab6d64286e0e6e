"""`ambient lab`: nodes and pods on this machine, with an API server that kubectl can talk to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ambient.cli.output import Group, emit, output_option
from ambient.errors import ConfigFault
from ambient.lab import lifecycle, record
from ambient.lab.topology import Lab

_name = click.option("--name", help="Name of the lab; needed only if several run.")
_namespace = click.option("-n", "--namespace", default="default", show_default=True, help="Namespace of the pod.")


@click.group(cls=Group)
def lab() -> None:
    """Nodes and pods on this machine: no cluster, no container runtime, the real mesh.

    \b
    Example:
      ambient lab up -f examples/shop.yaml --nodes 2
      export KUBECONFIG=$(ambient lab kubeconfig)
      kubectl get pods -A
      ambient lab down
    """


@lab.command()
@click.option(
    "-f", "--file", "files", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Kubernetes objects to create (YAML); may be given several times.",
)  # fmt: skip
@click.option("--nodes", default=2, show_default=True, help="How many nodes.")
@click.option("--name", default=record.DEFAULT_NAME, show_default=True, help="Name of the lab.")
@click.option("--ipv6/--no-ipv6", default=True, show_default=True, help="Dual stack, or IPv4 only.")
@click.option("--no-mesh", is_flag=True, help="Without control plane, agents and ztunnels.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait until all pods are ready.")
def up(files: tuple[Path, ...], nodes: int, name: str, ipv6: bool, no_mesh: bool, timeout: float) -> None:
    """Build a lab, create the objects of the files, wait until all pods are ready.

    \b
    Example:
      ambient lab up -f examples/shop.yaml --nodes 2
    """
    _root()
    plan = Lab(name, nodes, ipv6)
    from ambient.lab import start as starting

    lacking = starting.up(plan, files, mesh=not no_mesh, timeout_s=timeout, say=_talk)
    if lacking:
        for what, why in lacking.items():
            click.echo(f"not ready: {what}: {why}", err=True)
        click.echo(f"the lab stays, to look at: ambient lab status --name {name}; logs in {plan.directory}", err=True)
        sys.exit(1)
    click.echo(f"lab {name} is up; export KUBECONFIG={plan.kubeconfig}")


@lab.command()
@_name
@output_option
def down(name: str | None, output: str) -> None:
    """Remove a lab and everything of it, also after a crash. Nothing is left, and doing it again is no error.

    \b
    Example:
      ambient lab down
    """
    _root()
    chosen = record.choose(name)
    removed = lifecycle.down(chosen)
    row = {
        "lab": chosen,
        "processes": removed.processes,
        "namespaces": removed.namespaces,
        "mounts": removed.mounts,
        "directory": removed.directory,
    }
    if output == "table":
        click.echo(f"lab {chosen} removed" if removed.anything() else f"there is no lab {chosen}", err=True)
    else:
        emit([row], output, list(row))


@lab.command()
@_name
@output_option
def status(name: str | None, output: str) -> None:
    """What runs: the processes of the lab and its pods. Exit code 1 if something of the lab does not run.

    \b
    Example:
      ambient lab status -o json
    """
    rows, well = lifecycle.status(record.read(record.choose(name)))
    emit(rows, output, ["kind", "namespace", "name", "node", "state", "pid", "addresses"])
    sys.exit(0 if well else 1)


@lab.command(name="list")
@output_option
def list_labs(output: str) -> None:
    """All labs of this machine.

    \b
    Example:
      ambient lab list
    """
    emit(lifecycle.labs(), output, ["name", "nodes", "mesh", "state", "kubeconfig"], empty="no lab runs here")


@lab.command(name="exec", context_settings={"ignore_unknown_options": True})
@_name
@_namespace
@click.option("-c", "--container", default="", help="Container whose cgroup to enter; the first by default.")
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_in(name: str | None, namespace: str, container: str, pod: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in a pod: its network, mounts, host name and cgroup. The exit code is the command's.

    POD is a name, or deploy/NAME for one of a Deployment's pods.

    \b
    Example:
      ambient lab exec -n shop deploy/frontend -- python3 get.py http://catalog/items
    """
    _root()
    argv, env = lifecycle.exec_line(record.read(record.choose(name)), namespace, pod, container, command)
    sys.stdout.flush()
    os.execvpe(argv[0], argv, env)


@lab.command()
@_name
@_namespace
@click.option("-c", "--container", help="Container; the first by default.")
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.option("--path", is_flag=True, help="Print only where the log is.")
@click.argument("pod")
def logs(name: str | None, namespace: str, container: str | None, follow: bool, path: bool, pod: str) -> None:
    """Print what a container wrote. POD may also be `control`, `supervisor` or the name of a node.

    \b
    Example:
      ambient lab logs -n shop deploy/frontend
    """
    lab_record = record.read(record.choose(name))
    own = lab_record.directory / "logs" / f"{pod}.log"
    known = pod in ("control", "supervisor", *(node.name for node in lab_record.plan().plans()))
    file = own if known else record.log_path(lab_record, record.find_pod(lab_record, namespace, pod), container)
    if path:
        click.echo(file)
        return
    if follow:
        sys.stdout.flush()
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(file)])
    with file.open("rb") as log:
        while block := log.read(1 << 16):
            sys.stdout.buffer.write(block)


@lab.command()
@_name
@click.argument("process")
def stop(name: str | None, process: str) -> None:
    """Stop `control`, or the mesh's processes of a node, to see what goes on without them. Pods are not touched.

    \b
    Example:
      ambient lab stop control
      ambient lab start control
    """
    _root()
    lifecycle.stop(record.read(record.choose(name)), process)


@lab.command()
@_name
@click.argument("process")
def start(name: str | None, process: str) -> None:
    """Start again what `stop` stopped.

    \b
    Example:
      ambient lab start control
    """
    _root()
    lifecycle.start(record.read(record.choose(name)), process)


@lab.command()
@_name
@click.option("--content", is_flag=True, help="Print the file itself, not where it is.")
def kubeconfig(name: str | None, content: bool) -> None:
    """Where the kubeconfig of a lab is.

    \b
    Example:
      export KUBECONFIG=$(ambient lab kubeconfig)
    """
    chosen = record.read(record.choose(name))
    path = Path(chosen.plan().kubeconfig)
    click.echo(path.read_text() if content else path, nl=not content)


def _talk(line: str) -> None:
    click.echo(line, err=True)


def _root() -> None:
    if os.geteuid() != 0:
        raise ConfigFault("user", os.geteuid(), "a lab makes namespaces and cgroups: run as root")
