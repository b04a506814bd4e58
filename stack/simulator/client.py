"""A client of the simulator's control server: what tests, the demo and the nemesis ask it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from schemas.errors import Unavailable

_PAGE = 100_000


class Control:
    """Questions to one simulator. All raise ``Unavailable`` where it does not answer in time."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, method: str = "GET", body: Any = None, timeout_s: float = 30.0) -> Any:
        """One question; the answer's JSON."""
        data = None if body is None else json.dumps(body).encode()
        return json.loads(self._open(path, method, data, timeout_s)[0])

    def settings(self) -> dict[str, Any]:
        """All settings."""
        found: dict[str, Any] = self.ask("/config")
        return found

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change the settings that are named."""
        self.ask("/config", "PUT", dict(changes))

    @contextmanager
    def configured(self, changes: Mapping[str, Any]) -> Iterator[None]:
        """Other settings for the length of the block."""
        before = self.settings()
        self.configure(changes)
        try:
            yield
        finally:
            self.configure(before)

    def messages(self, run: str) -> Iterator[dict[str, Any]]:
        """Every acceptance of a run's messages, repeated ones too, oldest first."""
        since = "0"
        while True:
            path = f"/messages?run={run}&limit={_PAGE}&since={since}"
            content, headers = self._open(path, "GET", None, 60.0)
            lines = content.splitlines()
            if not lines:
                return
            since = headers["X-Next-Since"]
            yield from map(json.loads, lines)

    def stats(self, run: str) -> dict[str, Any]:
        """Counts of one run."""
        found: dict[str, Any] = self.ask(f"/stats?run={run}")
        return found

    def faults(self) -> dict[str, Any]:
        """Faults by kind since its start, and the ids that were accepted and not answered."""
        found: dict[str, Any] = self.ask("/faults")
        return found

    def open_requests(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Requests that have begun and have no answer."""
        found: dict[str, Any] = self.ask("/open", timeout_s=timeout_s)
        return found

    def starts_after(self, run: str, after_ms: int) -> int:
        """Requests of a run that started after a moment."""
        return int(self.ask(f"/starts?run={run}&after_ms={after_ms}")["count"])

    def drain_webhooks(self, seconds: int = 60) -> bool:
        """Wait until all webhooks are sent; false where some remain."""
        try:
            self.ask(f"/webhooks/drain?timeout={seconds}", "POST", timeout_s=seconds + 10)
        except Unavailable:
            return False
        return True

    def _open(
        self, path: str, method: str, data: bytes | None, timeout_s: float
    ) -> tuple[bytes, Mapping[str, str]]:
        request = urllib.request.Request(self.url + path, data, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
                return answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read()[:500].decode("utf-8", "replace")
            raise Unavailable(
                f"the simulator answered {method} {path} with {error.code}: {detail}"
            ) from error
        except OSError as error:
            raise Unavailable(
                f"the simulator at {self.url} does not answer {method} {path}: {error}"
            ) from error
