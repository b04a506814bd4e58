"""One message on its way to a provider, and what the provider said about it.

Records are plain values: they are never written to Kafka or to state, because they hold an
address and a rendered body. What is kept of them is the send id and the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, Protocol

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Verdict(Enum):
    """What is known about a message after one attempt.

    Everything but ACCEPTED and IN_DOUBT is knowledge that nothing was accepted.
    """

    ACCEPTED = "accepted"
    """The provider has taken the message."""
    THROTTLED = "throttled"
    """Refused because too much was sent; `Answer.retry_after` says how long to wait."""
    RETRYABLE = "retryable"
    """Refused or never left; another attempt may succeed."""
    REFUSED = "refused"
    """Final for this message: its payload is not acceptable."""
    ADDRESS_DEAD = "address-dead"
    """Final, and the address must be suppressed."""
    ACCOUNT = "account"
    """Our credentials or sender are not accepted: pause the route, keep the message."""
    IN_DOUBT = "in-doubt"
    """The request left and no usable answer came: it may have been accepted."""


class Answer(NamedTuple):
    """The outcome of one attempt.

    `reason` is a stable kebab-case word for counters, `detail` a line for people: at most 200
    characters, without secrets and without addresses. `provider_message_id` is set only when
    the verdict is ACCEPTED, and may be absent even then. `retry_after` is always set when
    THROTTLED, otherwise only when the provider named a time.
    """

    verdict: Verdict
    reason: str
    provider_message_id: str | None = None
    retry_after: timedelta | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who a campaign writes as; `address` and `reply_to` are bare e-mail addresses."""

    address: str
    name: str
    reply_to: str | None = None


class Content(NamedTuple):
    """A rendered message. At least one of `html` and `text` is present."""

    subject: str
    html: str | None
    text: str | None


class Message(NamedTuple):
    """What a provider adapter needs to make exactly one attempt.

    `send_id` is the derived UUID in its usual text form; the same recipient of the same leg
    always has the same one. `unsubscribe_url` is an https URL (RFC 8058). `headers` are extra
    message headers; they may not replace a header that Fanfare writes itself. `reference` is
    `shard.ordinal.generation`: it travels beside the send id and comes back in webhooks.
    """

    send_id: str
    tenant: str
    run: str
    leg: str
    to_address: str
    to_name: str | None
    sender: Sender
    content: Content
    unsubscribe_url: str | None = None
    headers: Mapping[str, str] = _NO_HEADERS
    reference: str = ""


class Provider(Protocol):
    """A route to people. Adapters live in `sinks.providers`; all pass one contract suite."""

    @property
    def name(self) -> str:
        """Stable name, used in counters, ledger claims and outcomes."""

    @property
    def connections(self) -> int:
        """How many attempts can be in flight at once; more wait inside."""

    async def open(self) -> None:
        """Prepare to send. Connections are made on demand; a server that is down is no error.

        Raises:
            InvalidInput: the settings can't work (an address of our own, a URL).
        """

    def attempt(
        self, message: Message, deadline: timedelta, done: Callable[[Answer | Exception], None]
    ) -> Callable[[], None]:
        """Make one attempt within `deadline` (connect, write and answer together).

        `done` is called once with what came of it, perhaps at once, on the same event loop.
        Trouble with the network or the provider is an `Answer`; an exception is a defect. There is
        never a second attempt. Returns what gives the attempt up: it is in doubt then, and `done`
        is not called any more.
        """

    async def close(self) -> None:
        """Close all connections. Idempotent. Attempts in flight are answered IN_DOUBT."""
