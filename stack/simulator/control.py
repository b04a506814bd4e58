"""The control server: what was accepted, what is open, and the settings.

==================================  =========================================================
``GET /healthz``                    200 while the record can be written
``GET /stats[?run=]``               counts, refusals by reason, rates, first and last acceptance
``GET /starts[?run=][&after_ms=]``  request starts after a time, per second, last by run
``GET /messages[?since=&limit=&run=]``  NDJSON page; header ``X-Next-Since`` is the next cursor
``GET /message/{send_id}``          every acceptance of an id
``GET /duplicates``                 ids accepted more than once
``GET /open``                       requests that have begun and have no answer
``GET /faults``                     faults by kind, ids accepted but not answered
``GET /config``, ``PUT /config``    settings; PUT changes only the fields that it names
``GET /webhooks``                   events scheduled, pending, sent, acknowledged, given up
``POST /webhooks/drain[?timeout=]`` waits (seconds) until none is pending: 200, else 504
``POST /reset``                     forget everything but the settings
``GET /metrics``                    Prometheus text
==================================  =========================================================
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote

import orjson

from schemas.errors import InvalidInput
from stack.simulator.config import ConfigError, updated
from stack.simulator.connection import now_ms
from stack.simulator.http_wire import Head, HttpConnection, json_response, response
from stack.simulator.provider import Simulator
from stack.simulator.record import RunCounts, id_of

MAX_PAGE = 100_000


class BadQuery(InvalidInput):
    """A query parameter is unknown or can't be read; the message names it."""


def _integer(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError as error:
        raise BadQuery(f"{name}={text!r} is not an integer") from error
    if not low <= value <= high:
        raise BadQuery(f"{name}={value} is not between {low} and {high}")
    return value


class ControlConnection(HttpConnection):
    """One client's connection to the control server."""

    provider = "control"

    def __init__(self, simulator: Simulator) -> None:
        super().__init__(simulator, 1024 * 1024)
        self._simulator = simulator

    @property
    def is_open(self) -> bool:
        """Never: questions about open requests are none themselves."""
        return False

    def on_request(self, head: Head, body: bytes, started_ms: int) -> None:
        """Answer one question, or begin to wait for its answer."""
        target, _, raw = head.target.partition("?")
        path = unquote(target)
        query = dict(parse_qsl(raw, keep_blank_values=True))
        try:
            answer = self._route(head.method, path, query, body)
        except BadQuery as error:
            answer = json_response(400, {"error": str(error)})
        except ConfigError as error:
            fields = [{"field": field, "message": text} for field, text in error.problems]
            answer = json_response(400, {"error": str(error), "errors": fields})
        if answer is not None:
            self.answer(answer)

    def _route(self, method: str, path: str, query: dict[str, str], body: bytes) -> bytes | None:
        match method, path:
            case "GET", "/healthz":
                return self._healthz()
            case "GET", "/stats":
                return json_response(200, stats(self._simulator, query.get("run")))
            case "GET", "/starts":
                return self._starts(query)
            case "GET", "/messages":
                return self._messages(query)
            case "GET", "/duplicates":
                return self._duplicates()
            case "GET", "/open":
                return self._open()
            case "GET", "/faults":
                return self._faults()
            case "GET", "/config":
                return json_response(200, self._simulator.config.model_dump(mode="json"))
            case "PUT", "/config":
                return self._configure(body)
            case "GET", "/webhooks":
                return json_response(200, self._simulator.webhooks.counts())
            case "POST", "/webhooks/drain":
                seconds = _integer(query, "timeout", 30, 0, 86_400)
                self._simulator.spawn(self._drain(seconds))
                return None
            case "POST", "/reset":
                self._simulator.spawn(self._reset())
                return None
            case "GET", "/metrics":
                text = metrics(self._simulator)
                return response(200, text, content_type=b"text/plain; version=0.0.4")
            case "GET", _ if path.startswith("/message/"):
                return self._message(path.removeprefix("/message/"))
            case _:
                return json_response(404, {"error": f"no {method} {path}; see --help"})

    def _healthz(self) -> bytes:
        failure = self._simulator.failure
        if failure is not None:
            return json_response(503, {"status": "failed", "error": failure})
        return json_response(200, {"status": "ok"})

    def _starts(self, query: dict[str, str]) -> bytes:
        starts = self._simulator.starts
        run = query.get("run")
        after = _integer(query, "after_ms", 0, 0, 2**62)
        found = starts.after(run, after)
        answer: dict[str, Any] = {
            "count": found.count,
            "last_start_ms": found.last_ms,
            "complete": found.complete,
            "now_ms": now_ms(),
            "last_start_ms_by_run": starts.last_by_run(),
            "per_second": {
                str(second): count
                for second, count in sorted(starts.per_second(run).items())
                if second >= after // 1000
            },
        }
        return json_response(200, answer)

    def _messages(self, query: dict[str, str]) -> bytes:
        since = _integer(query, "since", 0, 0, 2**62)
        limit = _integer(query, "limit", 10_000, 1, MAX_PAGE)
        try:
            rows, cursor = self._simulator.record.read(since, limit, query.get("run"))
        except ValueError as error:
            raise BadQuery(str(error)) from error
        body = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
        headers = b"\r\nX-Next-Since: %d\r\nX-Count: %d" % (cursor, len(rows))
        return response(200, body, headers, b"application/x-ndjson")

    def _message(self, send_id: str) -> bytes:
        record = self._simulator.record
        found = record.find(send_id)
        if not found:
            return json_response(404, {"error": f"no message {send_id} was accepted"})
        return json_response(
            200, {"send_id": send_id, "accepted": len(found), "acceptances": found}
        )

    def _duplicates(self) -> bytes:
        record = self._simulator.record
        found = [{"send_id": send_id, "accepted": count} for send_id, count in record.repeated()]
        return json_response(200, {"count": record.duplicates, "messages": found})

    def _open(self) -> bytes:
        found = [
            {
                "provider": connection.provider,
                "state": "hung"
                if connection.hung
                else "answering"
                if connection.busy
                else "receiving",
                "send_ids": connection.open_ids or connection.hung_ids,
            }
            for connection in self._simulator.open
        ]
        ids = [send_id for request in found for send_id in request["send_ids"]]
        return json_response(200, {"count": len(found), "send_ids": ids, "requests": found})

    def _faults(self) -> bytes:
        simulator = self._simulator
        lists = {
            fault: [id_of(key) for key in keys.elements()]
            for fault, keys in simulator.record.unanswered.items()
        }
        everyone = {send_id for ids in lists.values() for send_id in ids}
        return json_response(
            200,
            {
                "counts": simulator.fault_counts,
                "unanswered": lists,
                "unanswered_unique": len(everyone),
            },
        )

    def _configure(self, body: bytes) -> bytes:
        try:
            changes = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ConfigError([("", f"the body is not JSON: {error}")]) from error
        self._simulator.configure(updated(self._simulator.config, changes))
        return json_response(200, self._simulator.config.model_dump(mode="json"))

    async def _drain(self, seconds: int) -> None:
        webhooks = self._simulator.webhooks
        drained = await webhooks.drain(float(seconds))
        if not self.closing:
            status = 200 if drained else 504
            self.answer(json_response(status, {"drained": drained, **webhooks.counts()}))

    async def _reset(self) -> None:
        await self._simulator.reset()
        if not self.closing:
            self.answer(json_response(200, {"status": "reset"}))


def stats(simulator: Simulator, run: str | None) -> dict[str, Any]:
    """Counts of one run, or of all when ``run`` is None."""
    record, starts = simulator.record, simulator.starts
    if run is None:
        counts = record.total.as_dict()
        refused: dict[str, int] = {}
        for reasons in simulator.refused.values():
            for reason, count in reasons.items():
                refused[reason] = refused.get(reason, 0) + count
    else:
        of_run = record.runs.get(run)
        counts = (of_run or RunCounts()).as_dict()
        refused = dict(simulator.refused.get(run, {}))
    seconds = starts.per_second(run)
    second = now_ms() // 1000
    answer: dict[str, Any] = {
        **counts,
        "requests": sum(seconds.values()),
        "refused": refused,
        "last_start_ms": starts.last_by_run().get(run, 0)
        if run is not None
        else max(starts.last_by_run().values(), default=0),
        "requests_last_second": seconds.get(second - 1, 0),
        "requests_max_second": max(seconds.values(), default=0),
        "open_requests": len(simulator.open),
        "open_connections": sum(
            1 for connection in simulator.connections if connection.provider != "control"
        ),
    }
    if run is None:
        answer["accepted_last_second"] = record.per_second.get(second - 1, 0)
        answer["accepted_max_second"] = max(record.per_second.values(), default=0)
        answer["without_id"] = record.without_id
        answer["torn_bytes"] = record.torn_bytes
        answer["begun_at_ms"] = simulator.begun_ms
        answer["runs"] = {name: of.as_dict() for name, of in record.runs.items()}
    return answer


def metrics(simulator: Simulator) -> bytes:
    """The counts as Prometheus text."""
    record, webhooks = simulator.record, simulator.webhooks
    lines: list[str] = []

    def add(name: str, kind: str, samples: list[tuple[str, int]]) -> None:
        lines.append(f"# TYPE fanfare_simulator_{name} {kind}")
        lines.extend(f"fanfare_simulator_{name}{labels} {value}" for labels, value in samples)

    add("requests_total", "counter", [("", simulator.starts.total)])
    add("accepted_total", "counter", [("", record.accepted)])
    add("duplicates_total", "counter", [("", record.duplicates)])
    reasons: dict[str, int] = stats(simulator, None)["refused"]
    add(
        "refused_total",
        "counter",
        [(f'{{reason="{name}"}}', count) for name, count in reasons.items()],
    )
    add(
        "faults_total",
        "counter",
        [(f'{{kind="{name}"}}', count) for name, count in simulator.fault_counts.items()],
    )
    add("open_requests", "gauge", [("", len(simulator.open))])
    add("open_connections", "gauge", [("", len(simulator.connections))])
    add("events_pending", "gauge", [("", webhooks.pending)])
    add("events_acked_total", "counter", [("", webhooks.acked_events)])
    add("posts_total", "counter", [("", webhooks.posts)])
    return ("\n".join(lines) + "\n").encode()
