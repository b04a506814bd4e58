"""Adapters: how each provider is spoken to, and what its answers mean.

All satisfy `schemas.message.Provider` and pass `tests/providers/test_contract.py`. SDKs are not
used: most retry silently, which makes duplicates.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from schemas.message import Answer, Message, Verdict
from sinks.connections import InDoubt, NotSent, awaited

R = TypeVar("R")
_ADDRESS = re.compile(r"[^\s<>\"'(),:;\[\]]+@[^\s<>\"'(),:;\[\]]+")
_SECRET = re.compile(r"(?i)(?:bearer|basic)\s+\S+|SG\.[\w\-.]+|[A-Za-z0-9_\-+/=]{40,}")
_DETAIL_CHARS = 200

# Trouble that the operator must end: no attempt succeeds before.
_CONFIGURATION = frozenset({"certificate-refused", "address-not-allowed", "starttls-not-offered"})


def scrub(text: str, *private: str | None) -> str:
    """A line for people: no addresses, no secrets, no control characters, 200 characters.

    `private` are strings that must not be in it in any case (a key, a name, the address).
    """
    text = text[:2000]
    for value in private:
        if value and len(value) > 2:
            text = re.sub(re.escape(value), "…", text, flags=re.IGNORECASE)
    text = _ADDRESS.sub("<address>", _SECRET.sub("…", text))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _DETAIL_CHARS else text[: _DETAIL_CHARS - 1] + "…"


def not_sent(error: NotSent) -> Answer:
    """The answer for a request that did not leave whole."""
    verdict = Verdict.ACCOUNT if error.reason in _CONFIGURATION else Verdict.RETRYABLE
    return Answer(verdict, error.reason, detail=scrub(str(error)))


def in_doubt(error: InDoubt) -> Answer:
    """The answer for a request that left and was not answered."""
    return Answer(Verdict.IN_DOUBT, error.reason, detail=scrub(str(error)))


class Adapter(ABC):
    """What adapters have in common: an attempt can be awaited."""

    @abstractmethod
    def attempt(
        self, message: Message, deadline: timedelta, done: Callable[[Answer | Exception], None]
    ) -> Callable[[], None]:
        """See `Provider.attempt`."""

    async def send(self, message: Message, deadline: timedelta) -> Answer:
        """Make one attempt. Whoever is cancelled meanwhile gives it up."""
        return await awaited(lambda done: self.attempt(message, deadline, done))


def defects_told(
    answer: Callable[[Message, R], Answer | Exception], message: Message, result: R
) -> Answer | Exception:
    """What a result means. A defect in finding that out must reach the loop, not the connection."""
    try:
        return answer(message, result)
    except Exception as error:
        return error
