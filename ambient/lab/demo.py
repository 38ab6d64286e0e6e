"""The demonstration: a shop on two nodes joins the mesh and leaves it, and every claim is checked from outside.

Each step is a method that says what it shows, looks, and raises StepFailed if the mesh did not do as said.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.x509 import UniformResourceIdentifier

import ambient
from ambient import ports
from ambient.errors import AmbientError
from ambient.lab.driver import CommandFailed, Driver, eventually
from ambient.lab.wire import TLS_1_3, tls_summary

SHOP = Path(ambient.__file__).resolve().parent.parent / "examples" / "shop.yaml"
APPS = ("frontend", "catalog", "cart", "payments")
REQUESTS = 5

ONLY_FRONTEND = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-frontend-asks-prices, namespace: shop}
spec:
  selector: {matchLabels: {app: catalog}}
  action: DENY
  rules:
  - from: [{source: {notPrincipals: [cluster.local/ns/shop/sa/frontend]}}]
"""
STRICT = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""


class StepFailed(AmbientError):
    """A step was not as said."""


def expect(condition: object, failure: str) -> None:
    if not condition:
        raise StepFailed(failure)


class Demo:
    """One run. `all` does every step in order; `down` removes the lab."""

    def __init__(self, name: str) -> None:
        self.driver = Driver(name, nodes=2)
        self._began = time.monotonic()
        self._pids: dict[str, str] = {}

    def all(self) -> None:
        for step in (
            self.start,
            self.before,
            self.enrol,
            self.encrypted,
            self.identities,
            self.client_address,
            self.kernel,
            self.same_node,
            self.policy,
            self.strict,
            self.leave,
        ):
            self._run(step)
        click.secho(f"\nAll as said, in {time.monotonic() - self._began:.0f} s.", bold=True)

    def _run(self, step: Callable[[], None]) -> None:
        title = (step.__doc__ or "").strip()
        click.secho(f"\n[{time.monotonic() - self._began:5.1f} s] {title}", bold=True)
        try:
            step()
        except StepFailed:
            raise
        except AmbientError as error:
            raise StepFailed(f"{title}: {error}") from None

    def down(self) -> None:
        try:
            self.driver.down()
        except AmbientError as error:
            click.echo(f"the lab could not be removed: {error}", err=True)

    def explain(self) -> None:
        """After a failure: where to look, and the ends of the logs that usually tell."""
        for process in ("control", "node1", "node2"):
            try:
                text = self.driver.ambient("lab", "logs", "--name", self.driver.lab.name, process)
            except AmbientError:
                continue
            click.echo(f"--- end of the log of {process}", err=True)
            click.echo("\n".join(text.splitlines()[-12:]), err=True)

    # -- the steps ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Two nodes out of network namespaces, an API server, and a shop of four services on them."""
        self.driver.down()
        self.driver.up([SHOP], echo=True)
        self._pids = self._app_pids()
        for app, pod in sorted(self.driver.pods("shop").items()):
            self._say(f"{app:10} {pod['status']['podIP']:14} {pod['spec']['nodeName']}  pid {self._pids[app]}")

    def before(self) -> None:
        """Before enrolling: requests work, and anybody on the wire can read them."""
        marker, capture = self._shop_and_capture()
        found = capture.contains(marker)
        self._say(f"marker {marker} in the capture of the underlay: {'yes' if found else 'no'}")
        expect(found, "the marker is not readable on the wire although nothing is enrolled")
        expect(capture.to_port(ports.HBONE) == 0, f"there are packets on {ports.HBONE} before anything is enrolled")

    def enrol(self) -> None:
        """kubectl label namespace shop istio.io/dataplane-mode=ambient"""
        began = time.monotonic()
        self.driver.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
        eventually(
            lambda: self._enrolled("shop") == len(self.driver.pods("shop")), 30, "all pods of shop to be enrolled"
        )
        seconds = time.monotonic() - began
        self._say(f"every pod of shop is in the mesh after {seconds:.2f} s")
        now = self._app_pids()
        expect(now == self._pids, f"process IDs changed: {self._pids} before, {now} after")
        self._say(f"process IDs before and after: {sorted(now.values())}, the same")

    def encrypted(self) -> None:
        """The same requests still work, and the wire shows TLS 1.3 on 15008 and nothing else of them."""
        marker, capture = self._shop_and_capture()
        expect(not capture.contains(marker), "the marker is readable on the wire although shop is enrolled")
        packets = capture.to_port(ports.HBONE)
        expect(packets > 0, f"no packet on {ports.HBONE}: the traffic did not go through a tunnel")
        summary = tls_summary(capture.segments, ports.HBONE)
        self._say(
            f"marker {marker} in the capture: no; packets on {ports.HBONE}: {packets}, TLS records: {summary.records}"
        )
        expect(summary.foreign == 0, f"{summary.foreign} streams on {ports.HBONE} are not TLS")
        expect(summary.versions <= {TLS_1_3}, f"another TLS version than 1.3: {sorted(map(hex, summary.versions))}")
        pods = {address for p in self.driver.pods("shop").values() for address in self._addresses(p)}
        plain = [
            s
            for s in capture.segments
            if s.payload and ports.HBONE not in s.ports and {str(s.source), str(s.destination)} <= pods
        ]
        expect(not plain, f"{len(plain)} segments between the shop's pods are not in a tunnel, e.g. {plain[:1]}")
        self._say("segments between the shop's pods outside a tunnel: 0")

    def identities(self) -> None:
        """Both sides hold a certificate for a SPIFFE identity."""
        rows = [r for r in self.driver.rows("certificates") if r["type"] == "Leaf" and r.get("pem")]
        seen = set()
        for row in rows:
            identity = uri_of(base64.b64decode(row["pem"]))
            seen.add(identity)
            self._say(f"{row['node']}: {identity}  (until {row['not_after']}, serial {row['serial_number'][:12]}...)")
        for app in APPS:
            expect(f"spiffe://cluster.local/ns/shop/sa/{app}" in seen, f"no certificate of {app} was found")

    def client_address(self) -> None:
        """The application still sees its client's own address."""
        client = self.driver.get("pod", "client", "-n", "shop")["status"]["podIP"]
        answer = self._get("shop", "client", "http://catalog/whoami")["answer"]
        self._say(f"client is {client}; catalog sees {answer['client']}")
        expect(answer["client"] == client, f"catalog sees {answer['client']} instead of {client}")

    def kernel(self) -> None:
        """ambient maps redirects: what the kernel holds while connections are open."""
        program = (
            "import socket,sys; held=[socket.create_connection((h,80),5) for h in ('catalog','payments')];"
            "print('open', flush=True); sys.stdin.read()"
        )
        with self.driver.background("shop", "client", "python3", "-c", program) as held:
            held.await_output("open")
            rows = eventually(lambda: self._redirects("shop/client"), 5, "redirect entries of the client")
            for line in self.driver.ambient("maps", "redirects", "--lab", self.driver.lab.name).splitlines():
                self._say(line)
        services = {self._vip("catalog"), self._vip("payments")}
        expect({row["original"] for row in rows} >= {f"{vip}:80" for vip in services}, f"not both are listed: {rows}")

    def same_node(self) -> None:
        """ambient flows: within a node the kernel authorizes, and moves the bytes of the pair that opted in."""
        urls = [f"http://{service}/whoami" for service in ("frontend", "cart", "catalog")]
        with self.driver.background("shop", "client", "python3", "browse.py", *urls) as held:
            held.await_output("open", 30)
            paths = eventually(lambda: self._paths("shop/client", len(urls)), 5, "the client's connections")
            words = "flows", "--pod", "shop/client", "--node", paths["frontend"]["node"]
            for line in self.driver.ambient(*words, "--lab", self.driver.lab.name).splitlines():
                self._say(line)
        found = self._capabilities(paths["frontend"]["node"])
        auto, opted_in = ("redirect" if word in found else "direct" for word in ("auto_redirect", "can_redirect"))
        self._say(f"client and cart opted in (ambient.mesh/acceleration: redirect); auto means {auto} on this kernel")
        if opted_in == "direct":
            self._say(
                f"redirection is off on this kernel ({', '.join(found) or 'not tested'}): such a pair is direct too"
            )
        else:
            redirected, sent = paths["cart"]["redirected"], paths["cart"]["sent"] + paths["cart"]["received"]
            self._say(f"client -> cart: {redirected} of {sent} bytes went from socket to socket")
            expect(redirected > 0, "no byte between client and cart was redirected")
        expected = {"frontend": auto, "cart": opted_in, "catalog": "ztunnel"}
        taken = {app: row["path"] for app, row in paths.items()}
        expect(taken == expected, f"the paths are {taken} instead of {expected}")

    def policy(self) -> None:
        """An AuthorizationPolicy lets frontend ask the catalog, and nobody else."""
        self.driver.kubectl("apply", "-f", "-", stdin=ONLY_FRONTEND)
        eventually(
            lambda: self._get("shop", "client", "http://catalog/items").get("error"), 10, "the client to be denied"
        )
        denied = self._get("shop", "client", "http://catalog/items")
        self._say(f"client   -> catalog: {denied['error']}")
        allowed = self._get("shop", "client", "http://frontend/")
        self._say(f"frontend -> catalog: {allowed.get('status')}")
        expect(allowed.get("status") == 200, f"frontend was denied as well: {allowed}")
        line = eventually(self._denial_line, 5, "the denial in the access log")
        self._say(line)
        self.driver.kubectl("delete", "-f", "-", stdin=ONLY_FRONTEND)
        eventually(
            lambda: self._get("shop", "client", "http://catalog/items").get("status") == 200, 10, "the policy to go"
        )

    def strict(self) -> None:
        """STRICT refuses a client that is not in the mesh, and only that one."""
        before = self._get("outside", "stranger", "http://catalog.shop/items")
        expect(before.get("status") == 200, f"the stranger was refused before STRICT: {before}")
        self.driver.kubectl("apply", "-f", "-", stdin=STRICT)
        eventually(
            lambda: self._get("outside", "stranger", "http://catalog.shop/items").get("error"),
            10,
            "the stranger's refusal",
        )
        refused = self._get("outside", "stranger", "http://catalog.shop/items")
        self._say(f"outside/stranger -> catalog: {refused['error']}")
        inside = self._get("shop", "client", "http://catalog/items")
        self._say(f"shop/client      -> catalog: {inside.get('status')}")
        expect(inside.get("status") == 200, f"a client inside the mesh was refused: {inside}")
        self.driver.kubectl("delete", "-f", "-", stdin=STRICT)

    def leave(self) -> None:
        """kubectl label namespace shop istio.io/dataplane-mode-  puts everything back."""
        began = time.monotonic()
        self.driver.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode-")
        eventually(lambda: self._enrolled("shop") == 0, 30, "all pods of shop to leave")
        eventually(lambda: not self.driver.rows("maps", "enrolled"), 30, "the kernel to forget the pods")
        self._say(f"every pod of shop is out of the mesh after {time.monotonic() - began:.2f} s")
        marker, capture = self._shop_and_capture()
        expect(capture.contains(marker), "the requests are not back on the plain wire")
        expect(self._app_pids() == self._pids, "process IDs changed")
        self._say(f"requests work and marker {marker} is readable again; process IDs are the same")

    # -- looking ------------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        click.echo(f"          {line}")

    def _get(self, namespace: str, pod: str, url: str, *options: str) -> dict[str, Any]:
        """The last result of the shop's get.py: an answer, or its error."""
        text = self.driver.exec(namespace, pod, "python3", "get.py", *options, "--timeout", "5", url, check=False)
        found: dict[str, Any] = json.loads(text.strip().splitlines()[-1]) if text.strip() else {"error": "no answer"}
        return found

    def _shop_and_capture(self) -> tuple[str, Any]:
        """Buy a few times with a marker that cannot occur by chance, capturing the underlay."""
        marker = f"marker-{secrets.token_hex(8)}"
        with self.driver.capture() as capture:
            try:
                options = ["--marker", marker, "--count", str(REQUESTS)]
                self.driver.exec("shop", "client", "python3", "get.py", *options, "http://frontend/buy")
            except CommandFailed as error:
                raise StepFailed(f"the shop does not work: {error}") from None
        self._say(f"{REQUESTS} purchases through frontend, catalog, cart and payments: all answered")
        return marker, capture

    def _app_pids(self) -> dict[str, str]:
        """The process of each pod's container, as the kubelet tells it."""
        return {
            app: pod["status"]["containerStatuses"][0]["containerID"].removeprefix("lab://")
            for app, pod in self.driver.pods("shop").items()
        }

    def _enrolled(self, namespace: str) -> int:
        pods = self.driver.pods(namespace).values()
        return sum(p["metadata"].get("annotations", {}).get("ambient.istio.io/redirection") == "enabled" for p in pods)

    @staticmethod
    def _addresses(pod: dict[str, Any]) -> list[str]:
        return [entry["ip"] for entry in pod["status"].get("podIPs", [])]

    def _vip(self, service: str) -> str:
        return str(self.driver.get("service", service, "-n", "shop")["spec"]["clusterIP"])

    def _redirects(self, source: str) -> list[dict[str, Any]]:
        return [row for row in self.driver.rows("maps", "redirects") if row["source"] == source]

    def _paths(self, source: str, count: int) -> dict[str, dict[str, Any]]:
        """The kernel's or ztunnel's row of each connection from a pod, by the app it goes to; empty until all show."""
        pods = {pod["metadata"]["name"]: app for app, pod in self.driver.pods("shop").items()}
        rows = [r for r in self.driver.rows("flows") if r["source"] == source and r["direction"] != "inbound"]
        found = {pods[r["destination"].rpartition("/")[2]]: r for r in rows}
        return found if len(found) == count else {}

    def _capabilities(self, node: str) -> list[str]:
        """What the loader found a node's kernel able to do with connections within it."""
        rows = self.driver.rows("maps", "settings", "--node", node)
        return next((list(row["value"]) for row in rows if row["setting"] == "acceleration"), [])

    def _denial_line(self) -> str:
        for node in ("node1", "node2"):
            text = self.driver.ambient("lab", "logs", "--name", self.driver.lab.name, node)
            for line in reversed(text.splitlines()):
                if "shop/only-frontend-asks-prices" in line and "ns/shop/sa/client" in line:
                    return line.strip()
        return ""


def uri_of(pem: bytes) -> str:
    """The SPIFFE ID in a certificate."""
    extension = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return str(extension.value.get_values_for_type(UniformResourceIdentifier)[0])
