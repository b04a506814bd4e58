"""The webhook receiver: verify, append, answer. ``python -m gateway.receiver --host H --port P``.

    POST /webhooks/sendgrid[/{tenant}]   a signed body: 202 once Kafka has it
    GET, POST /u/{token}                 one-click unsubscribe (RFC 8058): a page; the act
    GET /healthz, /metrics               alive; counters in Prometheus's text format

A provider repeats what was not answered 2xx, so nothing is acknowledged before every replica has
it, and nothing is parsed here: the signature is checked on the raw bytes and the job reads them.
What is refused is counted by reason and leaves nothing else, so a flood of rubbish costs no disk.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from html import escape

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from gateway.appender import Appender
from gateway.settings import DEFAULT_TENANT, GatewaySettings, load
from schemas import topics
from schemas.codec import encode, to_millis
from schemas.errors import FanfareError, InvalidInput, Unavailable
from schemas.ids import RecipientId, Tenant, derive
from schemas.records import ConsentChange, ConsentStatus, RawWebhook
from transforms.signatures import SIGNATURE_HEADER, TIMESTAMP_HEADER, Key, verify
from transforms.unsubscribe import InvalidToken, Unsubscription, read_token

_log = logging.getLogger(__name__)

_RETRY_AFTER = timedelta(seconds=15)
_LINGER = 4
_FORM_LIMIT = 16_384
_FORM_TIMEOUT = timedelta(seconds=10)
_KEPT_HEADERS = ("content-type", "user-agent", TIMESTAMP_HEADER)

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Unsubscribe</title>
<meta name="viewport" content="width=device-width"><meta name="robots" content="noindex">
<body style="font-family:sans-serif;max-width:30em;margin:4em auto;padding:0 1em">{body}"""

_METRICS: Mapping[str, str] = {
    "fanfare_receiver_webhooks_total": "Webhook posts by what became of them.",
    "fanfare_receiver_webhook_bytes_total": "Bytes of accepted webhook bodies.",
    "fanfare_receiver_unsubscribes_total": "One-click unsubscribes by what became of them.",
}


class _TooLarge(Exception):
    """The body is larger than the limit."""


class Receiver:
    """The handlers and their counters. ``now`` is the clock."""

    def __init__(
        self,
        settings: GatewaySettings,
        appender: Appender,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._keys: Mapping[str, tuple[Key, ...]] = settings.keys()
        self._secret = settings.unsubscribe_secret.get_secret_value().encode()
        self._settings = settings
        self._appender = appender
        self._now = now
        self.counters: Counter[tuple[str, str]] = Counter()

    def routes(self) -> list[Route]:
        """What is served."""
        return [
            Route("/webhooks/sendgrid", self.sendgrid, methods=["POST"]),
            Route("/webhooks/sendgrid/{tenant}", self.sendgrid, methods=["POST"]),
            Route("/u/{token}", self.unsubscribe, methods=["POST"]),
            Route("/u/{token}", self.confirm, methods=["GET"]),
            Route("/healthz", self.healthz),
            Route("/metrics", self.metrics),
        ]

    async def sendgrid(self, request: Request) -> Response:
        """SendGrid's event webhook: 202, 403 (signature), 408, 413 (size), 503 (no broker)."""
        tenant = request.path_params.get("tenant", DEFAULT_TENANT)
        keys = self._keys.get(tenant, ())
        signature = request.headers.get(SIGNATURE_HEADER, "")
        timestamp = request.headers.get(TIMESTAMP_HEADER, "")
        if not keys or not signature or not timestamp:
            return self._webhook_refused("unsigned" if keys else "unknown_tenant", 403)
        try:
            body = await _read(
                request, self._settings.webhook_body_limit, self._settings.webhook_body_timeout
            )
        except _TooLarge:
            return self._webhook_refused("oversized", 413)
        except (TimeoutError, ClientDisconnect):
            return self._webhook_refused("incomplete", 408)
        if not verify(keys, timestamp, body, signature):
            return self._webhook_refused("invalid_signature", 403)
        webhook_id = derive(
            "webhook", ("sendgrid", tenant, timestamp, hashlib.sha256(body).hexdigest())
        )
        record = RawWebhook(
            webhook_id=webhook_id,
            provider="sendgrid",
            tenant=Tenant(tenant),
            received_at=self._now(),
            headers={name: request.headers.get(name, "")[:200] for name in _KEPT_HEADERS},
            body=body,
        )
        try:
            await self._appender.append(
                self._settings.topic_prefix + topics.WEBHOOKS_RAW, webhook_id, encode(record)
            )
        except Unavailable as error:
            _log.warning("%s", error)
            return self._webhook_refused("unavailable", 503)
        except InvalidInput as error:
            _log.warning("%s", error)
            return self._webhook_refused("oversized", 413)
        self.counters["fanfare_receiver_webhooks_total", "accepted"] += 1
        self.counters["fanfare_receiver_webhook_bytes_total", ""] += len(body)
        return PlainTextResponse("accepted", 202)

    def _webhook_refused(self, why: str, status: int) -> Response:
        self.counters["fanfare_receiver_webhooks_total", why] += 1
        return _refusal(why, status)

    async def confirm(self, request: Request) -> Response:
        """A page that asks. It never acts: mail scanners and prefetchers follow links."""
        try:
            said = read_token(self._secret, request.path_params["token"])
        except InvalidToken:
            return _page("<h1>This link is damaged</h1><p>Please use the link in the message.", 404)
        what = escape(said.topic) if said.topic else "all messages"
        return _page(
            f"<h1>Unsubscribe</h1><p>No more {what} by {escape(said.channel)}?"
            '<form method="post"><input type="hidden" name="List-Unsubscribe" value="One-Click">'
            "<button>Unsubscribe</button></form>"
        )

    async def unsubscribe(self, request: Request) -> Response:
        """Withdraw consent. The link alone says whose and from what; the body, form-encoded or
        multipart, adds nothing and is only read to its end. Repeating it changes nothing."""
        try:
            said = read_token(self._secret, request.path_params["token"])
        except InvalidToken:
            return self._unsubscribe_refused("invalid_token", 404)
        try:
            await _read(request, _FORM_LIMIT, _FORM_TIMEOUT)
        except _TooLarge:
            return self._unsubscribe_refused("oversized", 413)
        except (TimeoutError, ClientDisconnect):
            return self._unsubscribe_refused("incomplete", 408)
        change = _withdrawal(said, self._now())
        try:
            await self._appender.append(
                self._settings.topic_prefix + topics.CONSENT,
                f"{change.tenant}/{change.recipient_id}",
                encode(change),
            )
        except Unavailable as error:
            _log.warning("%s", error)
            return self._unsubscribe_refused("unavailable", 503)
        self.counters["fanfare_receiver_unsubscribes_total", "accepted"] += 1
        return _page("<h1>You are unsubscribed</h1><p>It takes effect at once.")

    def _unsubscribe_refused(self, why: str, status: int) -> Response:
        self.counters["fanfare_receiver_unsubscribes_total", why] += 1
        return _refusal(why, status)

    async def healthz(self, _: Request) -> Response:
        """200 while the process serves; the broker's absence is no reason to restart it."""
        return PlainTextResponse("ok")

    async def metrics(self, _: Request) -> Response:
        """The counters."""
        lines: list[str] = []
        for name, meaning in _METRICS.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} counter"]
            for (counter, result), value in sorted(self.counters.items()):
                if counter == name:
                    label = f'{{result="{result}"}}' if result else ""
                    lines.append(f"{name}{label} {value}")
        return PlainTextResponse(
            "\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _refusal(why: str, status: int) -> Response:
    headers = {}
    if status == 503:
        headers["Retry-After"] = str(int(_RETRY_AFTER.total_seconds()))
    if status in (408, 413):
        # What the client still sends is not read.
        headers["Connection"] = "close"
    return PlainTextResponse(why, status, headers=headers)


def _page(body: str, status: int = 200) -> Response:
    return HTMLResponse(_PAGE.format(body=body), status, headers={"Referrer-Policy": "no-referrer"})


def _withdrawal(said: Unsubscription, now: datetime) -> ConsentChange:
    fields = (said.tenant, said.recipient_id, said.topic, said.channel)
    return ConsentChange(
        change_id=derive("unsubscribe", (*fields, to_millis(now))),
        tenant=Tenant(said.tenant),
        recipient_id=RecipientId(said.recipient_id),
        channel=said.channel,
        topic=said.topic or "*",
        status=ConsentStatus.WITHDRAWN,
        at=now,
        source="one-click",
    )


async def _read(request: Request, limit: int, within: timedelta) -> bytes:
    """The body, of which never more than ``limit`` and one chunk are held.

    A larger one is read on, up to `_LINGER` times ``limit``, and thrown away: a client that is
    still writing when the connection closes sees a reset instead of the answer (RFC 9112,
    section 9.6).
    """
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit * _LINGER:
        raise _TooLarge
    parts: list[bytes] = []
    size = 0
    async with asyncio.timeout(within.total_seconds()):
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
            if size > limit * _LINGER:
                break
    if size > limit:
        raise _TooLarge
    return b"".join(parts)


def app(settings: GatewaySettings) -> Starlette:
    """The ASGI application. Raises InvalidInput for keys that are none."""
    appender = Appender(settings.kafka, settings.kafka_timeout, settings.webhook_in_flight)
    receiver = Receiver(settings, appender)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await appender.close()

    return Starlette(routes=receiver.routes(), lifespan=lifespan)


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser("gateway.receiver", description="Receive signed webhooks")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kafka").setLevel(logging.ERROR)
    try:
        application = app(load())
    except FanfareError as error:
        print(f"receiver: {error}", file=sys.stderr)
        sys.exit(1)
    uvicorn.run(
        application,
        host=options.host,
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
