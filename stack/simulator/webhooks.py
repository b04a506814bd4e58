"""SendGrid's event webhook, sent back for what was accepted: batched, signed, repeated.

The body is a JSON array that ends in CRLF; the signature is ECDSA P-256 with SHA-256 over the
timestamp and the raw body, as in SendGrid's "Event Webhook Security Features". An event's
``sg_event_id`` is a hash of seed, send id, kind and the number of the acceptance, so that a
repeated event is recognisable and a second acceptance makes events of its own.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import PyreqwestError

from stack.simulator.config import Rule, SimulatorConfig, is_loopback
from stack.simulator.fate import EventKind, draw

SIGNATURE_HEADER = "X-Twilio-Email-Event-Webhook-Signature"
TIMESTAMP_HEADER = "X-Twilio-Email-Event-Webhook-Timestamp"
_USER_AGENT = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36"


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key at ``path`` (PEM, P-256), made if absent; writes ``path``.pub beside it.

    The public key is base64 of its DER SubjectPublicKeyInfo, as SendGrid's settings show it.
    Raises ValueError for a key of another kind.
    """
    if path.exists():
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise ValueError(f"{path} does not hold an EC P-256 private key")
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(pem)
    path.with_name(path.name + ".pub").write_text(public_key(key) + "\n")
    return key


def public_key(key: ec.EllipticCurvePrivateKey) -> str:
    """Base64 of the DER SubjectPublicKeyInfo."""
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return base64.b64encode(der).decode()


def sign(key: ec.EllipticCurvePrivateKey, timestamp: str, body: bytes) -> str:
    """Base64 of the DER signature over timestamp and body."""
    signature = key.sign(timestamp.encode() + body, ec.ECDSA(hashes.SHA256()))
    return base64.b64encode(signature).decode()


def event_id(seed: int, send_id: str, kind: EventKind, acceptance: int) -> str:
    """The ``sg_event_id``; ``acceptance`` counts from 0."""
    text = f"{seed}:{send_id}:{acceptance}:{kind.value}".encode()
    return base64.urlsafe_b64encode(blake2b(text, digest_size=16).digest())[:22].decode()


@dataclass(frozen=True, slots=True)
class _Message:
    send_id: str
    address: str
    arguments: dict[str, Any]
    accepted_ms: int
    message_id: str
    smtp_id: str
    acceptance: int
    blocked: bool


def _render(seed: int, message: _Message, kind: EventKind, at_ms: float) -> bytes:
    event: dict[str, Any] = {
        **message.arguments,
        "email": message.address,
        "timestamp": int(at_ms) // 1000,
        "smtp-id": message.smtp_id,
        "event": kind.value,
        "sg_event_id": event_id(seed, message.send_id, kind, message.acceptance),
        "sg_message_id": message.message_id,
    }
    match kind:
        case EventKind.DELIVERED:
            event["response"] = "250 2.0.0 OK"
            event["tls"] = 1
        case EventKind.DEFERRED:
            event["response"] = "451 4.3.0 try again later"
            event["attempt"] = "1"
        case EventKind.BOUNCE if message.blocked:
            event["type"] = "blocked"
            event["reason"] = "550 5.7.1 the message was refused by the receiver's policy"
            event["status"] = "5.7.1"
            event["bounce_classification"] = "Reputation"
        case EventKind.BOUNCE:
            event["type"] = "bounce"
            event["reason"] = "550 5.1.1 the account that you tried to reach does not exist"
            event["status"] = "5.1.1"
            event["bounce_classification"] = "Invalid Address"
        case EventKind.DROPPED:
            event["reason"] = "Bounced Address"
            event["status"] = "5.0.0"
        case EventKind.OPEN:
            event["useragent"] = _USER_AGENT
            event["ip"] = "192.0.2.1"
            event["sg_content_type"] = "html"
            event["sg_machine_open"] = False
        case EventKind.CLICK:
            event["useragent"] = _USER_AGENT
            event["ip"] = "192.0.2.1"
            event["url"] = "https://example.com/"
            event["url_offset"] = {"index": 0, "type": "html"}
        case _:
            pass
    return orjson.dumps(event)


class Webhooks:
    """The events on their way back. Nothing is dropped without a counter saying so."""

    def __init__(
        self,
        config: Callable[[], SimulatorConfig],
        key: ec.EllipticCurvePrivateKey,
        saved: Path,
    ) -> None:
        self._config = config
        self._key = key
        self.public_key = public_key(key)
        self._saved = saved
        self._wheel: dict[int, list[tuple[_Message, EventKind, float] | bytes]] = {}
        self._tick_ms = config().webhooks.batch_ms
        self._runner: asyncio.Task[None] | None = None
        self._posts: set[asyncio.Task[None]] = set()
        self._batches: dict[int, list[bytes]] = {}
        self._next_batch = 0
        self._client: Client | None = None
        self._slots: asyncio.Semaphore | None = None
        self._slots_size = 0
        self._idle = asyncio.Event()
        self._clear()

    def _clear(self) -> None:
        self.scheduled = 0
        self.pending = 0
        self._idle.set()
        self.posts = 0
        self.events_sent = 0
        self.acked_posts = 0
        self.acked_events = 0
        self.retried_posts = 0
        self.failed_posts = 0
        self.gave_up_events = 0
        self.dropped_events = 0
        self.repeated_events = 0
        self.by_kind: dict[str, int] = {}
        self.last_error: str | None = None

    def counts(self) -> dict[str, Any]:
        """For GET /webhooks."""
        return {
            "url": self._config().webhooks.url,
            "public_key": self.public_key,
            "scheduled_events": self.scheduled,
            "pending_events": self.pending,
            "posts": self.posts,
            "sent_events": self.events_sent,
            "acked_posts": self.acked_posts,
            "acked_events": self.acked_events,
            "failed_posts": self.failed_posts,
            "retried_posts": self.retried_posts,
            "gave_up_events": self.gave_up_events,
            "dropped_events": self.dropped_events,
            "repeated_events": self.repeated_events,
            "scheduled_by_event": dict(self.by_kind),
            "last_error": self.last_error,
        }

    def schedule(
        self,
        *,
        send_id: str,
        address: str,
        arguments: dict[str, Any],
        accepted_ms: int,
        message_id: str,
        smtp_id: str,
        acceptance: int,
        rule: Rule | None,
    ) -> None:
        """Plan the events of an accepted message."""
        config = self._config()
        blocked, events = draw(config.seed, send_id, config, rule)
        message = _Message(
            send_id, address, arguments, accepted_ms, message_id, smtp_id, acceptance, blocked
        )
        for kind, after, sent, again in events:
            name = kind.value
            self.by_kind[name] = self.by_kind.get(name, 0) + 1
            self._put(accepted_ms + sent, (message, kind, accepted_ms + after))
            if again >= 0:
                self.repeated_events += 1
                self._put(accepted_ms + again, (message, kind, accepted_ms + after))
        if self._runner is None:
            self._start()

    def _put(self, due_ms: float, entry: tuple[_Message, EventKind, float] | bytes) -> None:
        self.scheduled += 1
        settings = self._config().webhooks
        if self.pending >= settings.max_pending_events:
            self.dropped_events += 1
            return
        self.pending += 1
        self._idle.clear()
        if not self._wheel:
            self._tick_ms = settings.batch_ms
        tick = int(due_ms // self._tick_ms) + 1
        slot = self._wheel.get(tick)
        if slot is None:
            self._wheel[tick] = [entry]
        else:
            slot.append(entry)

    def _start(self) -> None:
        if self._wheel:
            self._runner = asyncio.get_running_loop().create_task(self._turn())

    async def _turn(self) -> None:
        """Send each slot of the wheel when its time has come; ends when the wheel is empty."""
        try:
            while self._wheel:
                settings = self._config().webhooks
                tick = min(self._wheel)
                wait = tick * self._tick_ms / 1000.0 - time.time()
                if wait > 0:
                    # An earlier slot can appear meanwhile, at most one delay ahead.
                    await asyncio.sleep(min(wait, self._tick_ms / 1000.0))
                    continue
                entries = self._wheel[tick]
                while entries:
                    # Out of the wheel only when in a batch: a stop in between saves the rest.
                    self._dispatch(entries[: settings.batch_events])
                    del entries[: settings.batch_events]
                    await asyncio.sleep(0)
                del self._wheel[tick]
                if settings.batch_ms != self._tick_ms:
                    self._retick(settings.batch_ms)
        finally:
            self._runner = None

    def _retick(self, tick_ms: float) -> None:
        old, self._wheel = self._wheel, {}
        for tick, entries in old.items():
            new = int(tick * self._tick_ms // tick_ms) + 1
            self._wheel.setdefault(new, []).extend(entries)
        self._tick_ms = tick_ms

    def _dispatch(self, entries: list[tuple[_Message, EventKind, float] | bytes]) -> None:
        seed = self._config().seed
        events = [entry if isinstance(entry, bytes) else _render(seed, *entry) for entry in entries]
        number = self._next_batch
        self._next_batch += 1
        self._batches[number] = events
        task = asyncio.get_running_loop().create_task(self._deliver(number, events))
        self._posts.add(task)
        task.add_done_callback(self._posts.discard)

    async def _deliver(self, number: int, events: list[bytes]) -> None:
        body = b"[" + b",".join(events) + b"]\r\n"
        begun = time.monotonic()
        attempt = 0
        while True:
            settings = self._config().webhooks
            if self._slots is None or self._slots_size != settings.max_posts:
                self._slots = asyncio.Semaphore(settings.max_posts)
                self._slots_size = settings.max_posts
            async with self._slots:
                acked = await self._post(body, len(events))
            if acked:
                self.acked_posts += 1
                self.acked_events += len(events)
                break
            self.failed_posts += 1
            wait = min(settings.retry_max_ms, settings.retry_first_ms * 2.0 ** min(attempt, 30))
            if time.monotonic() - begun + wait / 1000.0 > settings.give_up_s:
                self.gave_up_events += len(events)
                break
            await asyncio.sleep(wait / 1000.0)
            attempt += 1
            self.retried_posts += 1
        del self._batches[number]
        self.pending -= len(events)
        if not self.pending:
            self._idle.set()

    async def _post(self, body: bytes, count: int) -> bool:
        settings = self._config().webhooks
        if settings.url is None:
            self.last_error = "webhooks.url is not set"
            return False
        if self._client is None:
            self._client = (
                ClientBuilder()
                .follow_redirects(False)
                .no_proxy()
                .user_agent("SendGrid Event API")
                .build()
            )
        timestamp = str(int(time.time()))
        headers = {"Content-Type": "application/json"}
        if settings.signed:
            headers[SIGNATURE_HEADER] = sign(self._key, timestamp, body)
            headers[TIMESTAMP_HEADER] = timestamp
        self.posts += 1
        self.events_sent += count
        try:
            response = await (
                self._client.post(settings.url)
                .headers(headers)
                .body_bytes(body)
                .timeout(timedelta(milliseconds=settings.post_timeout_ms))
                .build()
                .send()
            )
        except PyreqwestError as error:
            self.last_error = f"{type(error).__name__}: {error}"[:500]
            return False
        if 200 <= response.status < 300:
            return True
        self.last_error = f"{settings.url} answered {response.status}"
        return False

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is pending; False if the time ran out."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def check_url(self, allow_remote: bool) -> str | None:
        """Why the configured URL is not allowed, if it isn't."""
        url = self._config().webhooks.url
        if url is not None and not allow_remote and not is_loopback(url):
            return f"{url!r} is not on this machine; start with --allow-remote to permit it"
        return None

    async def _stop_tasks(self) -> None:
        tasks = [*self._posts, *([self._runner] if self._runner is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reset(self) -> None:
        """Forget what is pending and all counts."""
        await self._stop_tasks()
        self._wheel.clear()
        self._batches.clear()
        self._clear()

    def restore(self) -> None:
        """Take up what an earlier process could not send."""
        if not self._saved.exists():
            return
        with self._saved.open("rb") as lines:
            for line in lines:
                due, _, event = line.rstrip(b"\n").partition(b" ")
                self._put(float(due), event)
        self._saved.unlink()
        self._start()

    async def close(self) -> int:
        """Stop sending; saves what is pending for :meth:`restore` and returns how much it is."""
        await self._stop_tasks()
        if self._client is not None:
            await self._client.close()
        return self._save()

    def _save(self) -> int:
        if not self.pending:
            return 0
        seed = self._config().seed
        count = 0
        with self._saved.open("wb") as file:
            for events in self._batches.values():
                for event in events:
                    file.write(b"0 %b\n" % event)
                    count += 1
            for tick, entries in self._wheel.items():
                for entry in entries:
                    event = entry if isinstance(entry, bytes) else _render(seed, *entry)
                    file.write(b"%d %b\n" % (int((tick - 1) * self._tick_ms), event))
                    count += 1
        return count
