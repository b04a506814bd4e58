"""What an operator does with what it can't process, and when it gives up."""

from __future__ import annotations

import hashlib
from datetime import datetime

from schemas.codec import encode, leading_strings, name_of
from schemas.errors import FanfareError, MalformedRecord, UnknownSchema
from schemas.ids import derive
from schemas.reasons import Reason
from schemas.records import DeadLetter
from schemas.topics import LARGEST_VALUE

LARGEST_ORIGINAL = LARGEST_VALUE - 64 * 1024
"""Bytes of a record that a letter holds. Larger ones exist compressed: Kafka limits batches."""


class DeadLetterRatioPassed(FanfareError):
    """So many records are dead letters that something is wrong with a deployment, not with data."""


class DeadLetterGate:
    """Makes dead letters of an operator and raises once their share passes a limit.

    Shares are counted over the last ``window`` to twice ``window`` records of this subtask since it
    started, so one bad record never stops a job and a bad deployment does.
    """

    def __init__(self, operator: str, ratio: float, window: int) -> None:
        self._operator = operator
        self._ratio = ratio
        self._window = window
        self._seen = [0, 0]
        self._bad = [0, 0]

    def good(self, count: int = 1) -> None:
        """Count records that were processed."""
        self._seen[0] += count
        if self._seen[0] >= self._window:
            self._seen = [0, self._seen[0]]
            self._bad = [0, self._bad[0]]

    def letter(
        self, data: bytes, error: Exception, now: datetime, *, step: str, source: str
    ) -> bytes:
        """The dead letter of a record, whole up to ``LARGEST_ORIGINAL``.

        Raises:
            DeadLetterRatioPassed: with this one the share passes the limit.
        """
        reason = Reason.UNKNOWN_SCHEMA if isinstance(error, UnknownSchema) else Reason.MALFORMED
        self.bad(error, step)
        tenant, run = _whose(data)
        detail = str(error)[:500]
        kept = data[:LARGEST_ORIGINAL]
        if len(kept) < len(data):
            digest = hashlib.sha256(data).hexdigest()
            detail += f" [the first {len(kept)} of {len(data)} bytes; SHA-256 {digest}]"
        return encode(
            DeadLetter(
                letter_id=derive("dead-letter", (self._operator, step, data.hex())),
                tenant=tenant,
                run=run,
                step=f"{self._operator}/{step}",
                reason=reason,
                detail=detail,
                source=source,
                original=kept,
                first_at=now,
                last_at=now,
            )
        )

    def bad(self, error: Exception, step: str) -> None:
        """Count a record that could not be processed.

        Raises:
            DeadLetterRatioPassed: with this one the share passes the limit.
        """
        self._bad[0] += 1
        self.good()
        bad, seen = sum(self._bad), sum(self._seen)
        if seen >= self._window and bad > self._ratio * seen:
            raise DeadLetterRatioPassed(
                f"{self._operator}: {bad} of the last {seen} records are dead letters, more than "
                f"{self._ratio:.0%}. The newest, at {step}: {error}. See `fanfare dead-letters`; "
                "deploy what reads them or stop what writes them, then start the job with "
                "FANFARE_DEAD_LETTER_RATIO=1, which takes it past those that are there."
            )


def _whose(data: bytes) -> tuple[str, str]:
    """Tenant and run of a record that does not decode, where its first fields still tell."""
    name = name_of(data)
    try:
        if name == "Command":
            _, tenant, run = leading_strings(data, 3)
            return tenant, run
        if name in ("PageResult", "Outcomes", "Send", "PageOrder"):
            tenant, run = leading_strings(data, 2)
            return tenant, run
    except MalformedRecord:
        return "", ""
    return "", ""
