"""`kubectl apply` in small, for the files given to `lab up`: create what is not there, merge into what is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ambient.errors import ConfigFault
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.lab.container import image_name

DOCUMENTS_MAX = 10_000
_FIRST = {"Namespace": 0, "CustomResourceDefinition": 1, "ServiceAccount": 2}


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a file."""

    file: Path
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.body["metadata"].get("namespace") or "default")

    def __str__(self) -> str:
        return f"{self.file}: {self.kind} {self.name}"


def read(files: Iterable[Path]) -> list[Document]:
    """All objects, Lists taken apart, in an order in which they can be created. ConfigFault names the file."""
    found: list[Document] = []
    for file in files:
        try:
            documents = list(yaml.safe_load_all(file.read_text()))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigFault(str(file), "", f"cannot be read: {error}") from None
        for body in _flat(documents):
            found.append(_checked(file, body))
            if len(found) > DOCUMENTS_MAX:
                raise ConfigFault(str(file), len(found), f"at most {DOCUMENTS_MAX} objects")
    return sorted(found, key=lambda document: _FIRST.get(document.kind, 9))


def _flat(documents: Iterable[Any]) -> Iterator[Any]:
    for body in documents:
        if isinstance(body, dict) and body.get("kind") == "List" and isinstance(body.get("items"), list):
            yield from _flat(body["items"])
        elif body is not None:
            yield body


def _checked(file: Path, body: Any) -> Document:
    metadata = body.get("metadata") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(metadata, dict):
        raise ConfigFault(str(file), str(body)[:80], "every document is an object with apiVersion, kind and metadata")
    for where, value in (
        ("apiVersion", body.get("apiVersion")),
        ("kind", body.get("kind")),
        ("metadata.name", metadata.get("name")),
    ):
        if not isinstance(value, str) or not value:
            raise ConfigFault(f"{file}: {where}", value, "is required")
    return Document(file, body)


def images(documents: Iterable[Document]) -> dict[str, str]:
    """Image name -> directory of that name beside the file that uses it, where there is one.

    A lab has no images: a container runs in the directory that an image would have been built from.
    """
    found: dict[str, str] = {}
    for document in documents:
        for image in _images(document.body):
            directory = document.file.resolve().parent / image_name(image)
            if image_name(image) and directory.is_dir():
                found[image_name(image)] = str(directory)
    return found


def _images(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "image" and isinstance(inner, str):
                yield inner
            else:
                yield from _images(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _images(inner)


class Applier:
    """Creates or merges documents; asks the API server once for each group which resources it has."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._resources: dict[str, dict[str, tuple[str, bool]]] = {}

    async def apply(self, document: Document) -> str:
        """``created`` or ``configured``. ConfigFault naming file and object if the API server refuses."""
        try:
            plural, namespaced = await self._resource(document)
            api = str(document.body["apiVersion"])
            root = f"/apis/{api}" if "/" in api else f"/api/{api}"
            path = f"{root}/namespaces/{document.namespace}/{plural}" if namespaced else f"{root}/{plural}"
            try:
                await self._client.request("POST", path, body=document.body)
                return "created"
            except ApiStatus as refusal:
                if refusal.reason != "AlreadyExists":
                    raise
            await self._client.request(
                "PATCH", f"{path}/{document.name}", body=document.body, content_type="application/merge-patch+json"
            )
            return "configured"
        except ApiStatus as refusal:
            raise ConfigFault(str(document), document.name, str(refusal)) from None

    async def _resource(self, document: Document) -> tuple[str, bool]:
        api = str(document.body["apiVersion"])
        if api not in self._resources:
            path = f"/apis/{api}" if "/" in api else f"/api/{api}"
            listing = json.loads(await self._client.request("GET", path))
            self._resources[api] = {
                item["kind"]: (item["name"], bool(item["namespaced"]))
                for item in listing["resources"]
                if "/" not in item["name"]
            }
        try:
            return self._resources[api][document.kind]
        except KeyError:
            raise ConfigFault(str(document), api, f"the API server knows no kind {document.kind} of {api}") from None
