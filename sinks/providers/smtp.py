"""SMTP as a provider: a relay or a provider's submission server.

The reply after the final dot accepts; everything refused before or by it was not accepted.
Enhanced status codes (RFC 3463) say whom a refusal concerns: x.1.x and x.2.1 the address, x.7.x
policy. Without one, a refusal of RCPT is about the address, one of the text about the text.
"""

from __future__ import annotations

import ssl
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from schemas.message import Answer, Message, Verdict
from sinks.connections import InDoubt, NotSent
from sinks.providers import Adapter, defects_told, in_doubt, not_sent, scrub
from sinks.smtp_client import (
    DEFAULT_TIMEOUTS,
    Envelope,
    Extensions,
    SmtpClient,
    SmtpOutcome,
    SmtpRefused,
    SmtpTimeouts,
    SmtpTls,
)
from transforms.mime import (
    Skeleton,
    Unsendable,
    assemble,
    build_skeleton,
    dot_stuffed,
    envelope_address,
)

_SKELETONS = 64


def _now() -> datetime:
    return datetime.now(UTC)


class Smtp(Adapter):
    """A `Provider`. One instance belongs to one event loop.

    Args:
        hostname: our name in EHLO.
        default_pause: how long to hold back after a refusal for sending too much.
        clock: the present, for the Date header.

    The other arguments are `SmtpClient`'s.
    """

    name = "smtp"

    def __init__(
        self,
        host: str,
        port: int,
        *,
        hostname: str,
        security: SmtpTls = SmtpTls.STARTTLS,
        credentials: tuple[str, str] | None = None,
        insecure_auth: bool = False,
        connections: int = 16,
        messages_per_connection: int = 1000,
        tls: ssl.SSLContext | None = None,
        timeouts: SmtpTimeouts = DEFAULT_TIMEOUTS,
        allow_private: bool = False,
        default_pause: timedelta = timedelta(seconds=10),
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._client = SmtpClient(
            host,
            port,
            hostname=hostname,
            security=security,
            credentials=credentials,
            insecure_auth=insecure_auth,
            connections=connections,
            messages_per_connection=messages_per_connection,
            tls=tls,
            timeouts=timeouts,
            allow_private=allow_private,
        )
        self._password = credentials[1] if credentials is not None else None
        self._default_pause = default_pause
        self._clock = clock
        self._date = ""
        self._date_of = 0
        self._skeletons: OrderedDict[tuple[Any, ...], Skeleton] = OrderedDict()

    @property
    def connections(self) -> int:
        """The most messages in flight at once."""
        return self._client.connections

    async def open(self) -> None:
        """Sessions are opened on demand: nothing to do."""

    async def close(self) -> None:
        """Leave all sessions."""
        await self._client.close()

    def attempt(
        self, message: Message, deadline: timedelta, done: Callable[[Answer | Exception], None]
    ) -> Callable[[], None]:
        """See `Provider.attempt`."""
        return self._client.submit(
            lambda offered: self._envelope(message, offered),
            deadline,
            lambda result: done(defects_told(self._answer, message, result)),
        )

    def _answer(self, message: Message, result: SmtpOutcome | Exception) -> Answer | Exception:
        """What an outcome means."""
        if isinstance(result, SmtpRefused):
            result = result.outcome
        if isinstance(result, SmtpOutcome):
            if result.accepted:
                return Answer(Verdict.ACCEPTED, "accepted", _queue_id(result.reply.text))
            return self._refusal(result, message)
        if isinstance(result, NotSent):
            return not_sent(result)
        if isinstance(result, InDoubt):
            return in_doubt(result)
        if isinstance(result, Unsendable):
            return Answer(Verdict.REFUSED, result.reason, detail=scrub(str(result)))
        return result

    def _envelope(self, message: Message, offered: Extensions) -> Envelope:
        skeleton = self._skeleton(message)
        to_address = envelope_address(message.to_address)
        smtputf8 = skeleton.needs_smtputf8 or not to_address.isascii()
        if smtputf8 and not offered.smtputf8:
            raise Unsendable(
                "smtputf8-not-offered", "an address is not ASCII and the server takes only ASCII"
            )
        raw = assemble(
            skeleton, message, to_address, self._date_header(), eight_bit=offered.eight_bit_mime
        )
        data = dot_stuffed(raw)
        if offered.size and len(data) > offered.size:
            raise Unsendable(
                "message-too-large",
                f"the message has {len(data)} bytes, the server takes {offered.size}",
            )
        return Envelope(skeleton.sender, to_address, data, smtputf8)

    def _skeleton(self, message: Message) -> Skeleton:
        key = (
            message.tenant,
            message.run,
            message.leg,
            message.sender,
            tuple(message.headers.items()),
        )
        found = self._skeletons.get(key)
        if found is None:
            found = self._skeletons[key] = build_skeleton(
                message.tenant, message.run, message.leg, message.sender, message.headers
            )
            if len(self._skeletons) > _SKELETONS:
                self._skeletons.popitem(last=False)
        return found

    def _date_header(self) -> str:
        now = self._clock()
        second = int(now.timestamp())
        if second != self._date_of:
            self._date, self._date_of = format_datetime(now.replace(microsecond=0)), second
        return self._date

    def _refusal(self, outcome: SmtpOutcome, message: Message) -> Answer:
        verdict, reason = classify(outcome)
        reply = outcome.reply
        detail = scrub(
            f"{outcome.step}: {reply.code} {reply.text}",
            message.to_address, message.to_name, self._password, message.unsubscribe_url,
        )  # fmt: skip
        pause = self._default_pause if verdict is Verdict.THROTTLED else None
        return Answer(verdict, reason, retry_after=pause, detail=detail)


def classify(outcome: SmtpOutcome) -> tuple[Verdict, str]:
    """What a refusing reply means, and a stable reason (RFC 5321, 4.2; RFC 3463)."""
    step, code = outcome.step, outcome.reply.code
    enhanced = outcome.reply.enhanced or ""
    subject = enhanced.partition(".")[2]
    if code in (530, 534, 535, 538) or (step == "auth" and code >= 500):
        return Verdict.ACCOUNT, "credentials-refused"
    if 400 <= code < 500:
        if subject.startswith(("1.", "2.")) and code != 421:
            return Verdict.RETRYABLE, "mailbox-unavailable-for-now"
        if code in (421, 450, 451, 454):
            return Verdict.THROTTLED, "too-much-for-now"
        return Verdict.RETRYABLE, "refused-for-now"
    if 200 <= code < 400 or step == "rset":
        return Verdict.RETRYABLE, "unexpected-reply"
    if step == "connect":
        return Verdict.ACCOUNT, "session-refused"
    if step == "mail" and code not in (552, 554):
        return Verdict.ACCOUNT, "sender-refused"
    if subject in ("1.7", "1.8"):
        return Verdict.ACCOUNT, "sender-refused"
    if subject.startswith("1.") or subject == "2.1":
        return Verdict.ADDRESS_DEAD, "address-refused"
    if step == "rcpt" and code in (550, 551, 553) and not subject.startswith(("7.", "2.")):
        return Verdict.ADDRESS_DEAD, "address-refused"
    if subject.startswith("7."):
        return Verdict.REFUSED, "policy-refused"
    if subject == "2.2":
        return Verdict.REFUSED, "mailbox-full"
    return Verdict.REFUSED, "message-refused"


def _queue_id(text: str) -> str | None:
    """The server's own id, where its last reply names one ('queued as', 'id=')."""
    words = text.replace("=", " ").split()
    for mark in ("as", "id"):
        if mark in words[:-1]:
            found = words[words.index(mark) + 1].strip("<>.,;()")
            if 3 <= len(found) <= 128 and found.isascii() and "@" not in found:
                return found
    return None
