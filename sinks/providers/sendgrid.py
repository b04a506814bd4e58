"""SendGrid's v3 mail/send, one recipient a request.

Facts: twilio.com/docs/sendgrid/api-reference/mail-send. There is no idempotency key, so what
left and was not answered is in doubt. 202 means accepted for processing. 429 names its end in
X-RateLimit-Reset (epoch seconds), often not at all on this endpoint. Custom arguments come back
in every event of the webhook, flattened into its top level, hence our prefix.
"""

from __future__ import annotations

import ssl
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from schemas.errors import InvalidInput
from schemas.message import Answer, Message, Verdict
from sinks.connections import InDoubt, NotSent
from sinks.http1 import DEFAULT_TIMEOUTS, HttpAnswer, HttpClient, HttpTimeouts, PreparedRequest
from sinks.providers import Adapter, defects_told, in_doubt, not_sent, scrub
from transforms.mime import Unsendable, checked_headers, checked_unsubscribe_url, envelope_address
from transforms.rendering import clean_header_text

_LONGEST_PAUSE = timedelta(hours=1)
_SHORTEST_PAUSE = timedelta(milliseconds=100)
_CUSTOM_ARGS_BYTES = 10_000
_SKELETONS = 64
_RESERVED = frozenset({
    "x-sg-id", "x-sg-eid", "received", "dkim-signature", "content-type",
    "content-transfer-encoding", "to", "from", "subject", "reply-to", "cc", "bcc",
})  # fmt: skip


def _nothing() -> None:
    """There is nothing to give up."""


def _now() -> datetime:
    return datetime.now(UTC)


class SendGrid(Adapter):
    """A `Provider`. One instance belongs to one event loop.

    Args:
        api_key: sent as a bearer token, never shown.
        base_url: `https://api.eu.sendgrid.com` for EU accounts; a simulator's in tests.
        default_pause: how long to hold back after a 429 that names no time.
        clock: the present, to read X-RateLimit-Reset against.
    """

    name = "sendgrid"

    def __init__(
        self,
        api_key: str,
        *,
        base_url: str = "https://api.sendgrid.com",
        connections: int = 64,
        tls: ssl.SSLContext | None = None,
        timeouts: HttpTimeouts = DEFAULT_TIMEOUTS,
        allow_private: bool = False,
        default_pause: timedelta = timedelta(seconds=1),
        clock: Callable[[], datetime] = _now,
    ) -> None:
        if not api_key or not api_key.isascii() or not api_key.isprintable():
            raise InvalidInput("the SendGrid API key is empty or holds impossible characters")
        self._api_key = api_key
        self._default_pause = default_pause
        self._clock = clock
        self._http = HttpClient(
            base_url,
            connections=connections,
            tls=tls,
            timeouts=timeouts,
            allow_private=allow_private,
        )
        self._request: PreparedRequest = self._http.prepare(
            "POST",
            "/v3/mail/send",
            {
                "Authorization": f"Bearer {api_key}",
                "Content-Type": "application/json",
                "Accept": "application/json",
                "User-Agent": "fanfare",
            },
        )
        self._skeletons: OrderedDict[tuple[Any, ...], tuple[bytes, bytes]] = OrderedDict()

    @property
    def connections(self) -> int:
        """The most requests in flight at once."""
        return self._http.connections

    async def open(self) -> None:
        """Connections are made on demand: nothing to do."""

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    def attempt(
        self, message: Message, deadline: timedelta, done: Callable[[Answer | Exception], None]
    ) -> Callable[[], None]:
        """See `Provider.attempt`."""
        try:
            body = self._body(message)
        except Unsendable as error:
            done(Answer(Verdict.REFUSED, error.reason, detail=scrub(str(error))))
            return _nothing
        except (TypeError, UnicodeError):
            done(Answer(Verdict.REFUSED, "invalid-text", detail="the text is no valid Unicode"))
            return _nothing
        return self._http.submit(
            self._request,
            body,
            deadline,
            lambda result: done(defects_told(self._answer, message, result)),
        )

    def _answer(self, message: Message, result: HttpAnswer | Exception) -> Answer | Exception:
        """What an answer means."""
        if isinstance(result, NotSent):
            return not_sent(result)
        if isinstance(result, InDoubt):
            return in_doubt(result)
        if isinstance(result, Exception):
            return result
        if result.status == 202:
            return Answer(Verdict.ACCEPTED, "accepted", result.header("x-message-id"))
        return self._refusal(result, message)

    def _body(self, message: Message) -> bytes:
        head, tail = self._skeleton(message)
        content = message.content
        dumps = orjson.dumps
        to: dict[str, str] = {"email": envelope_address(message.to_address)}
        if message.to_name:
            to["name"] = clean_header_text(message.to_name)
        parts = [b'{"personalizations":[{"to":[', dumps(to), b'],"custom_args":{"ff_send_id":',
                 dumps(message.send_id), _reference(message), head,
                 dumps(content.subject), b',"content":[']  # fmt: skip
        if content.text is not None:
            parts += (b'{"type":"text/plain","value":', dumps(content.text), b"}")
            if content.html is not None:
                parts.append(b",")
        if content.html is not None:
            parts += (b'{"type":"text/html","value":', dumps(content.html), b"}")
        parts.append(tail)
        if message.unsubscribe_url is not None:
            url = checked_unsubscribe_url(message.unsubscribe_url)
            parts += (b',"List-Unsubscribe":', dumps(f"<{url}>"),
                      b',"List-Unsubscribe-Post":"List-Unsubscribe=One-Click"')  # fmt: skip
        parts.append(b"}}")
        return b"".join(parts)

    def _skeleton(self, message: Message) -> tuple[bytes, bytes]:
        """What all messages of a leg share: between send id and subject, and after content."""
        key = (
            message.tenant,
            message.run,
            message.leg,
            message.sender,
            tuple(message.headers.items()),
        )
        found = self._skeletons.get(key)
        if found is None:
            found = self._skeletons[key] = _build(message)
            if len(self._skeletons) > _SKELETONS:
                self._skeletons.popitem(last=False)
        return found

    def _refusal(self, answer: HttpAnswer, message: Message) -> Answer:
        status = answer.status
        errors = _errors(answer.body)
        described = "; ".join(text for _, text in errors)
        detail = scrub(
            f"HTTP {status}: {described}" if described else f"HTTP {status}",
            self._api_key, message.to_address, message.to_name, message.unsubscribe_url,
        )  # fmt: skip

        def result(verdict: Verdict, reason: str, pause: timedelta | None = None) -> Answer:
            return Answer(verdict, reason, retry_after=pause, detail=detail)

        if status == 429:
            pause = self._pause(answer) or self._default_pause
            return result(Verdict.THROTTLED, "rate-limited", pause)
        if status in (401, 403):
            return result(Verdict.ACCOUNT, "credentials-or-sender-refused")
        if status in (404, 405) or 300 <= status < 400:
            return result(Verdict.ACCOUNT, "wrong-endpoint")
        if status == 400:
            if any(_is_recipient(field) for field, _ in errors):
                return result(Verdict.ADDRESS_DEAD, "address-refused")
            return result(Verdict.REFUSED, "payload-refused")
        if status == 413:
            return result(Verdict.REFUSED, "payload-too-large")
        if status == 408:
            return result(Verdict.RETRYABLE, "request-timeout")
        if 400 <= status < 500:
            return result(Verdict.REFUSED, "payload-refused")
        if status == 200:
            # The documented answer of sandbox mode: valid, and not queued.
            return result(Verdict.ACCOUNT, "sandbox-mode")
        return result(Verdict.IN_DOUBT, "server-error" if status >= 500 else "unknown-answer",
                      self._pause(answer))  # fmt: skip

    def _pause(self, answer: HttpAnswer) -> timedelta | None:
        """How long the provider wants us to wait: Retry-After, else X-RateLimit-Reset."""
        after = answer.header("retry-after")
        reset = answer.header("x-ratelimit-reset")
        pause: timedelta | None = None
        try:
            if after is not None and after.isdigit():
                pause = timedelta(seconds=int(after[:9]))
            elif after is not None:
                pause = parsedate_to_datetime(after).astimezone(UTC) - self._clock()
            elif reset is not None and reset.isdigit():
                pause = datetime.fromtimestamp(int(reset[:12]), UTC) - self._clock()
        except (ValueError, OverflowError, OSError, TypeError):
            return None
        return None if pause is None else max(_SHORTEST_PAUSE, min(pause, _LONGEST_PAUSE))


def _build(message: Message) -> tuple[bytes, bytes]:
    sender = message.sender
    arguments = _inner({"ff_tenant": message.tenant, "ff_run": message.run, "ff_leg": message.leg})
    if len(arguments) + 128 > _CUSTOM_ARGS_BYTES:
        raise Unsendable("custom-args-too-large", "tenant, run and leg exceed 10,000 bytes")
    source = {"email": envelope_address(sender.address), "name": clean_header_text(sender.name)}
    head = b"," + arguments + b'}}],"from":' + orjson.dumps(source)
    if sender.reply_to is not None:
        head += b',"reply_to":' + orjson.dumps({"email": envelope_address(sender.reply_to)})
    headers = {"X-Fanfare-Run": clean_header_text(message.run)}
    headers.update(checked_headers(message.headers))
    for name in headers:
        if name.lower() in _RESERVED:
            raise Unsendable("invalid-header", f"SendGrid reserves the header {name[:40]}")
    return head + b',"subject":', b'],"headers":{' + _inner(headers)


def _reference(message: Message) -> bytes:
    return b',"ff_ref":' + orjson.dumps(message.reference) if message.reference else b""


def _inner(values: Mapping[str, str]) -> bytes:
    return orjson.dumps(dict(values))[1:-1]


def _errors(body: bytes) -> list[tuple[str, str]]:
    """(field, message) of each error in an answer's body; empty when it is something else."""
    try:
        errors = orjson.loads(body)["errors"]
        return [(str(e.get("field") or ""), str(e.get("message") or "")) for e in errors]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []


def _is_recipient(field: str) -> bool:
    path = field.split(".")
    return path[0] == "personalizations" and "to" in path and path[-1] in ("to", "email")
