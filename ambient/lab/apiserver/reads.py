"""Reading: get, list and watch."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from aiohttp import web

from ambient.lab.apiserver.answers import one, partial, respond, scale, served, shaped
from ambient.lab.apiserver.requests import LIMIT_MAX, Answer, Target, flag, number, version_of
from ambient.lab.apiserver.selectors import matcher
from ambient.lab.apiserver.settings import ApiSettings
from ambient.lab.apiserver.status import ApiError, JsonObject, method_not_allowed, too_many
from ambient.lab.apiserver.store import Store
from ambient.lab.apiserver.tables import table
from ambient.lab.apiserver.watch import WatchOptions, serve

_WATCH_S_DEFAULT = (1800, 3600)


class Reads:
    """Answers requests that change nothing."""

    def __init__(self, store: Store, settings: ApiSettings) -> None:
        self.store = store
        self._settings = settings
        self._watches: set[asyncio.Task[Any]] = set()

    @property
    def watches(self) -> int:
        return len(self._watches)

    def stop(self) -> None:
        """End every watch."""
        for task in tuple(self._watches):
            task.cancel()

    def get(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        obj = self.store.get(target.kind, target.namespace, target.name)
        if target.subresource == "scale":
            return respond(scale(obj), encoding=answer.encoding)
        if target.subresource not in ("", "status"):
            raise method_not_allowed("GET")
        return one(request, target, answer, obj, self.store.now)

    def list(self, request: web.Request, target: Target, answer: Answer) -> web.Response:
        query, kind = request.query, target.kind
        matches = matcher(kind, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        version = version_of(query) if query.get("resourceVersionMatch") == "Exact" else None
        seen = version_of(query)
        if seen is not None and seen > self.store.history.version:
            cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
            message = f"Too large resource version: {seen}, current: {self.store.history.version}"
            raise ApiError(504, "Timeout", message, details={"causes": [cause]}, retry_after_s=1)
        limit = number(query, "limit", LIMIT_MAX)
        page = self.store.page(
            kind,
            target.namespace,
            matches=matches,
            limit=limit,
            token=query.get("continue", ""),
            version=version,
        )
        metadata: JsonObject = {"resourceVersion": str(page.version)}
        if page.next:
            metadata["continue"] = page.next
        if page.remaining is not None:
            metadata["remainingItemCount"] = page.remaining
        items = [served(obj, target) for obj in page.items]
        if answer.shape == "Table":
            include = query.get("includeObject", "Metadata")
            document = table(
                kind,
                items,
                self.store.now,
                metadata=metadata,
                include_object=include,
                version=answer.meta_version,
            )
        elif answer.shape == "Metadata":
            document = {
                "kind": "PartialObjectMetadataList",
                "apiVersion": f"meta.k8s.io/{answer.meta_version}",
                "metadata": metadata,
                "items": [partial(obj, answer) for obj in items],
            }
        else:
            document = {
                "kind": kind.kind + "List",
                "apiVersion": kind.api_version(target.version),
                "metadata": metadata,
                "items": items,
            }
        return respond(document, encoding=answer.encoding)

    async def watch(self, request: web.Request, target: Target, answer: Answer) -> web.StreamResponse:
        if len(self._watches) >= self._settings.watches_max:
            raise too_many(f"more than {self._settings.watches_max} watches; close some")
        query = request.query
        initial = flag(query, "sendInitialEvents")
        timeout_s = number(query, "timeoutSeconds", 86_400) or random.uniform(*_WATCH_S_DEFAULT)
        options = WatchOptions(
            namespace=target.namespace,
            matches=matcher(target.kind, query.get("labelSelector", ""), query.get("fieldSelector", "")),
            version=version_of(query),
            bookmarks=flag(query, "allowWatchBookmarks"),
            initial_events=initial,
            timeout_s=timeout_s,
            bookmark_interval_s=self._settings.bookmark_interval_s,
            write_timeout_s=self._settings.write_timeout_s,
        )
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await response.prepare(request)
            await serve(
                self.store.history,
                target.kind,
                options,
                lambda obj, first: shaped(query, target, answer, obj, self.store.now, headers=first),
                response.write,
                target.kind.api_version(target.version),
            )
            await response.write_eof()
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._watches.discard(task)
        return response
