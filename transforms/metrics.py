"""Names and meanings of the counters that the jobs keep in Flink's metrics."""

from __future__ import annotations

from collections.abc import Mapping

from schemas.message import Verdict
from schemas.reasons import Outcome

DELIVERY_GROUP = "fanfare_delivery"
DECIDE_GROUP = "fanfare_decide"
COORDINATE_GROUP = "fanfare_coordinate"
_ANSWERS = {
    Verdict.ACCEPTED: "took the message",
    Verdict.THROTTLED: "refused it because too much was sent",
    Verdict.RETRYABLE: "refused it for now, or was not reached",
    Verdict.REFUSED: "refused it for good",
    Verdict.ADDRESS_DEAD: "refused it for good, for its address",
    Verdict.ACCOUNT: "refused our account or sender",
    Verdict.IN_DOUBT: "gave no answer that says whether it took the message",
}
_OUTCOMES = {
    Outcome.ACCEPTED: "accepted, replays of earlier acceptances included",
    Outcome.UNKNOWN: "in doubt and held",
    Outcome.FAILED: "refused for good, by the provider or by us",
    Outcome.EXPIRED: "past their deadline, or of an expired run",
    Outcome.CANCELLED: "of a cancelled run",
    Outcome.STALE: "to be decided afresh",
}


def answer_counter(verdict: Verdict) -> str:
    """The counter of a provider's answers of this kind."""
    return f"answers_{verdict.value.replace('-', '_')}"


def outcome_counter(outcome: Outcome) -> str:
    """The counter of messages with this outcome."""
    return f"outcomes_{outcome.value}"


DELIVERY: Mapping[str, str] = {
    "malformed": "records that are no sends; they become dead letters, whole",
    "sends": "sends taken up, those of a restart included",
    "recalled": "recipients of whom a restarted loop read in the ledger that they have the message",
    "requests": "requests that left for a provider",
    **{answer_counter(each): f"answers: the provider {text}" for each, text in _ANSWERS.items()},
    **{outcome_counter(each): f"outcomes: messages {text}" for each, text in _OUTCOMES.items()},
    "repeated": "requests that left although an earlier one may have arrived (critical lane)",
    "dead_letters": "messages that failed in a way that somebody can mend and replay",
    "waits_for_tokens": "batches that found no token in the shared buckets",
    "waits_for_redis": "batches that could not ask the shared buckets: Redis did not answer",
    "parked": "looks at runs that are not running",
    "ledger_refusals": "batches handed back because their ledger is absent or rolled back",
    "fenced": "delivery keys that another process took over while we still had them",
}
"""Counters of delivery and what they count, since the subtask started."""

DECIDE: Mapping[str, str] = {
    "malformed": "records that could not be read; they become dead letters, whole",
    "orders": "pages that were decided",
    "sent": "recipients admitted",
    "skipped": "recipients refused for good, those of damaged pages included",
    "deferred": "recipients put off, those of missing snapshots included",
    "damaged_pages": "orders whose page or definition is damaged: skipped, and dead letters",
    "missing_snapshots": "orders whose snapshot or definition was not there: put off",
    "consent_changes": "consent changes that changed what is known of a person",
    "consent_untold": "consent changes that Redis did not take; they are told it again",
}
"""Counters of decide and what they count, since the subtask started."""
COORDINATE: Mapping[str, str] = {
    "malformed": "records that could not be read; they become dead letters, whole",
    "commands": "commands taken",
    "commands_refused": "commands refused, with their reason in the audit trail",
    "orders": "pages ordered, repeated ones included",
    "reorders_of_silent_pages": "pages ordered again because no result came",
    "status_unpublished": "tries to publish a run's status that Redis did not take",
}
"""Counters of coordinate and what they count, since the subtask started."""
