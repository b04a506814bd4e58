"""Every reason that Fanfare gives, in one place, and the classes of the books.

A recipient of a run is in exactly one class of the books at any moment:
accepted, skipped (by reason), failed, expired, cancelled, unknown or pending.
"""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """What became of one recipient in one generation, as delivery says."""

    ACCEPTED = "accepted"
    """The provider took the message. Final; outranks all else."""
    UNKNOWN = "unknown"
    """The request left and no answer came. Held; never retried on the promotional lane."""
    FAILED = "failed"
    """Refused for good; the message was not sent."""
    EXPIRED = "expired"
    """The deadline passed before the request left."""
    CANCELLED = "cancelled"
    """The run was cancelled before the request left."""
    STALE = "stale"
    """The decision grew too old before the request left: it is taken afresh. Not final."""


class Reason(Enum):
    """Why. Values are stable: they stand in ClickHouse, in dead letters and in books."""

    # decide: skipped
    ERASED = "erased"
    NO_CONSENT = "no_consent"
    CONSENT_WITHDRAWN = "consent_withdrawn"
    SUPPRESSED = "suppressed"
    HOLDOUT = "holdout"
    FREQUENCY_CAP = "frequency_cap"
    NO_ADDRESS = "no_address"
    UNKNOWN_ZONE = "unknown_zone"
    # decide: skipped as a page, because what is needed to decide is damaged or gone
    CORRUPT_PAGE = "corrupt_page"
    MISSING_SNAPSHOT = "missing_snapshot"
    # decide: deferred
    QUIET_HOURS = "quiet_hours"
    SCHEDULE = "schedule"
    # expired and cancelled
    DEADLINE = "deadline"
    RUN_EXPIRED = "run_expired"
    RUN_CANCELLED = "run_cancelled"
    # delivery: stale
    DECISION_TOO_OLD = "decision_too_old"
    # delivery: failed
    PROVIDER_REFUSED = "provider_refused"
    ADDRESS_REFUSED = "address_refused"
    ACCOUNT_REFUSED = "account_refused"
    RETRIES_EXHAUSTED = "retries_exhausted"
    RENDERING_FAILED = "rendering_failed"
    NO_ROUTE = "no_route"
    OPTED_OUT = "opted_out"
    MISSING_LEDGER = "missing_ledger"
    # delivery: unknown
    NO_ANSWER = "no_answer"
    CLAIM_IN_DOUBT = "claim_in_doubt"
    # delivery: accepted
    PROVIDER_ACCEPTED = "provider_accepted"
    LEDGER_ACCEPTED = "ledger_accepted"
    """A replay found the accepted bit; the provider's own id is not known here."""
    SETTLED_BY_HAND = "settled_by_hand"
    SETTLED_BY_WEBHOOK = "settled_by_webhook"
    # records that could not be read or processed: dead letters
    MALFORMED = "malformed"
    UNKNOWN_SCHEMA = "unknown_schema"
    UNKNOWN_RUN = "unknown_run"
    INVALID_SIGNATURE = "invalid_signature"
    OVERSIZED = "oversized"


SKIP_REASONS = frozenset(
    {
        Reason.ERASED,
        Reason.NO_CONSENT,
        Reason.CONSENT_WITHDRAWN,
        Reason.SUPPRESSED,
        Reason.HOLDOUT,
        Reason.FREQUENCY_CAP,
        Reason.NO_ADDRESS,
        Reason.UNKNOWN_ZONE,
        Reason.CORRUPT_PAGE,
    }
)
"""Reasons that a page result may give for a recipient in the class 'skipped'."""
DEFER_REASONS = frozenset(
    {Reason.QUIET_HOURS, Reason.SCHEDULE, Reason.FREQUENCY_CAP, Reason.MISSING_SNAPSHOT}
)


class RunStatus(Enum):
    """States of a run. Terminal: completed, cancelled, expired."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REFUSED = "refused"
    """A launch that can't be carried out (snapshot missing, wrong definition)."""

    @property
    def terminal(self) -> bool:
        """Whether nothing is ordered any more, unless a dead letter re-opens the run."""
        return self in _TERMINAL


_TERMINAL = frozenset(
    {RunStatus.COMPLETED, RunStatus.CANCELLED, RunStatus.EXPIRED, RunStatus.REFUSED}
)


class Lane(Enum):
    """Whose traffic: each has its own topics, jobs and provider tokens."""

    CRITICAL = "critical"
    PROMOTIONAL = "promotional"


class Channel(Enum):
    """How a person is reached."""

    EMAIL = "email"
    SMS = "sms"
    PUSH = "push"
