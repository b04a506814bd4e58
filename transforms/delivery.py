"""Delivery's rules: what follows from a ledger's verdict and from a provider's answer.

Pure functions over small values; the loop in ``sinks.engine`` and the simulation in the tests run
the same ones. The order that they serve: shape, claim, render, request, settle, outcome.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import NamedTuple

from schemas.message import Answer, Verdict
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from schemas.records import ConsentChange, DeadLetter, Outcomes, Send
from transforms.ledger import Action, Closed, Held, Settled, SettledKind, Settlement, VerdictKind
from transforms.ledger import Verdict as LedgerVerdict
from transforms.shaping import Circuit, Grant


class SettleAction(Enum):
    """What the ledger is told after an attempt."""

    ACCEPTED = "accepted"
    """Set the bit, delete the claim."""
    RELEASE = "release"
    """Delete the claim: nothing was accepted and it will be tried again."""
    CLOSE = "close"
    """Replace the claim by a final outcome: nothing was accepted and nothing will be."""
    HOLD = "hold"
    """Turn the claim into a held unknown."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How known refusals are retried.

    Waits are 1, 2, 4, 8 … times ``base`` up to ``longest``, each drawn between half and whole
    (the jitter keeps a crowd from returning together). ``attempts`` are made at each route.
    """

    base: timedelta = timedelta(seconds=1)
    longest: timedelta = timedelta(seconds=60)
    attempts: int = 5

    def wait(self, attempt: int, draw: float) -> timedelta:
        """The wait after the ``attempt``-th refusal (from 1); ``draw`` is uniform in [0, 1)."""
        doublings: int = 1 << min(attempt - 1, 16)
        whole = min(self.longest, self.base * doublings)
        return whole * (0.5 + draw / 2)


class Tries(NamedTuple):
    """How often one message was refused: on its present route, and in all."""

    route: int = 0
    on_route: int = 0
    total: int = 0


class Next(NamedTuple):
    """What follows from an answer.

    ``action`` is told to the ledger; only when that succeeded, ``outcome`` is emitted, or, where
    ``wait`` is set, the message goes back to wait for so long with ``tries``.
    """

    action: SettleAction
    outcome: Outcome | None = None
    reason: Reason | None = None
    wait: timedelta | None = None
    tries: Tries = Tries()


class Turn(Enum):
    """What a batch that asked for tokens does now."""

    SEND = "send"
    """Claim and send as many as were granted."""
    ASK = "ask"
    """Ask the ledger without a token: it refuses, and records why."""
    NEXT_ROUTE = "next_route"
    """The circuit is open: try the leg's next provider."""
    WAIT = "wait"
    """For tokens, as long as the grant says."""
    PARK = "park"
    """The run does not run: look again later."""


def after_grant(
    grant: Grant,
    now: datetime,
    valid_until: datetime,
    deadline: datetime,
    route: int,
    routes: int,
) -> Turn:
    """What follows from the shared buckets' answer; ``route`` of ``routes`` was asked for."""
    if grant.status is not RunStatus.RUNNING:
        ended = grant.status in (RunStatus.CANCELLED, RunStatus.EXPIRED)
        return Turn.ASK if ended or now >= valid_until else Turn.PARK
    if grant.granted:
        return Turn.SEND
    if grant.circuit is Circuit.OPEN and route + 1 < routes:
        return Turn.NEXT_ROUTE
    return Turn.ASK if now >= min(valid_until, deadline) else Turn.WAIT


class Told(NamedTuple):
    """The ledger has it, so the books may be told.

    ``generation`` is that of the refusal that stands; None is the send's own.
    """

    outcome: Outcome
    reason: Reason
    provider: str = ""
    generation: int | None = None


class Again(NamedTuple):
    """Nothing is known to the books: ask for a claim again after ``wait``, with ``tries``."""

    wait: timedelta
    tries: Tries


LOOK_AGAIN = timedelta(milliseconds=200)
"""How soon the ledger is asked again where it said 'not now'."""


def after_verdict(
    verdict: LedgerVerdict, tries: Tries, now: datetime, valid_until: datetime
) -> Told | Again | None:
    """What follows from the ledger's word on a claim.

    None: the claim is ours. Only then may the request leave, and it must be settled.
    """
    matter = verdict.matter
    match verdict.kind:
        case VerdictKind.CLAIMED | VerdictKind.REPEATED:
            return None
        case VerdictKind.ACCEPTED:
            return Told(Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED)
        case VerdictKind.HELD if isinstance(matter, Held):
            return Told(Outcome.UNKNOWN, matter.reason, matter.provider)
        case VerdictKind.CLOSED if isinstance(matter, Closed):
            return Told(matter.outcome, matter.reason, generation=matter.generation)
        case VerdictKind.STALE:
            return Told(Outcome.STALE, Reason.DECISION_TOO_OLD)
        case VerdictKind.NOT_RUNNING if now >= valid_until:
            return Told(Outcome.STALE, Reason.DECISION_TOO_OLD)
        case _:
            return Again(LOOK_AGAIN, tries)


def unsent(tries: Tries) -> Next:
    """Claimed though a refusal was expected, and no token is there: give back, look again soon."""
    return Next(SettleAction.RELEASE, wait=LOOK_AGAIN, tries=tries)


def settlement_of(
    ordinal: int, generation: int, tries: Tries, following: Next, answer: Verdict
) -> Settlement:
    """What the ledger is told of a claimed message; ``tries`` are those of its claim."""
    action = _ACTIONS[following.action]
    if action is Action.RELEASE and answer is Verdict.IN_DOUBT:
        action = Action.DOUBT
    return Settlement(
        ordinal=ordinal,
        generation=generation,
        attempt=tries.total,
        action=action,
        outcome=following.outcome or Outcome.FAILED,
        reason=following.reason or Reason.PROVIDER_REFUSED,
    )


_ACTIONS = {
    SettleAction.ACCEPTED: Action.ACCEPT,
    SettleAction.RELEASE: Action.RELEASE,
    SettleAction.CLOSE: Action.CLOSE,
    SettleAction.HOLD: Action.HOLD,
}


def after_settled(result: Settled, following: Next, tries: Tries, provider: str) -> Told | Again:
    """What follows from the ledger's word on a settlement: its word counts, not one's own."""
    matter = result.matter
    match result.kind:
        case SettledKind.DONE if following.outcome is not None:
            reason = following.reason or Reason.PROVIDER_REFUSED
            return Told(following.outcome, reason, provider)
        case SettledKind.DONE:
            return Again(following.wait or timedelta(0), following.tries)
        case SettledKind.ACCEPTED:
            return Told(Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED, provider)
        case SettledKind.NOTHING:
            return Again(LOOK_AGAIN, tries)
    if isinstance(matter, Held):
        return Told(Outcome.UNKNOWN, matter.reason, provider)
    if isinstance(matter, Closed):
        return Told(matter.outcome, matter.reason, generation=matter.generation)
    return Again(LOOK_AGAIN, tries)


def after_answer(
    answer: Answer,
    tries: Tries,
    routes: int,
    lane: Lane,
    policy: RetryPolicy,
    random_source: random.Random,
) -> Next:
    """What a provider's answer means for the ledger, the books and the message.

    A known refusal is retried at the same route, then at the next; a final one closes; an answer
    that is neither holds the message as unknown: on the promotional lane it is never retried and
    never failed over. The critical lane prefers a duplicate to a loss and tries again.
    """
    match answer.verdict:
        case Verdict.ACCEPTED:
            return Next(SettleAction.ACCEPTED, Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED)
        case Verdict.REFUSED:
            return Next(SettleAction.CLOSE, Outcome.FAILED, Reason.PROVIDER_REFUSED)
        case Verdict.ADDRESS_DEAD:
            return Next(SettleAction.CLOSE, Outcome.FAILED, Reason.ADDRESS_REFUSED)
        case Verdict.IN_DOUBT if lane is Lane.PROMOTIONAL:
            return Next(SettleAction.HOLD, Outcome.UNKNOWN, Reason.NO_ANSWER)
        case Verdict.THROTTLED:
            wait = answer.retry_after or policy.wait(1, random_source.random())
            return Next(
                SettleAction.RELEASE,
                wait=wait * (1 + random_source.random() / 4),
                tries=Tries(tries.route, tries.on_route, tries.total + 1),
            )
        case _:
            return _again(answer, tries, routes, policy, random_source)


def _again(
    answer: Answer, tries: Tries, routes: int, policy: RetryPolicy, random_source: random.Random
) -> Next:
    total = tries.total + 1
    on_route = tries.on_route + 1
    # A route whose account is refused will not take the next attempt either.
    spent = on_route >= policy.attempts or answer.verdict is Verdict.ACCOUNT
    if spent and tries.route + 1 < routes:
        return Next(SettleAction.RELEASE, wait=timedelta(0), tries=Tries(tries.route + 1, 0, total))
    if on_route >= policy.attempts and answer.verdict is Verdict.IN_DOUBT:
        return Next(SettleAction.HOLD, Outcome.UNKNOWN, Reason.NO_ANSWER)
    if on_route >= policy.attempts:
        account = answer.verdict is Verdict.ACCOUNT
        reason = Reason.ACCOUNT_REFUSED if account else Reason.RETRIES_EXHAUSTED
        return Next(SettleAction.CLOSE, Outcome.FAILED, reason)
    wait = policy.wait(on_route, random_source.random())
    if answer.retry_after is not None and answer.retry_after > wait:
        wait = answer.retry_after
    return Next(SettleAction.RELEASE, wait=wait, tries=Tries(tries.route, on_route, total))


REPLAYABLE = frozenset(
    {
        Reason.PROVIDER_REFUSED,
        Reason.ACCOUNT_REFUSED,
        Reason.RETRIES_EXHAUSTED,
        Reason.RENDERING_FAILED,
        Reason.NO_ROUTE,
        Reason.CORRUPT_PAGE,
        Reason.MISSING_SNAPSHOT,
    }
)
"""Failures that somebody can mend and replay: they become dead letters beside their outcome."""


REPEATED = "repeated: an earlier request may have arrived as well"
"""How the outcome of a message begins its detail that left again although one was in doubt."""


def ledger_name(send: Send) -> str:
    """The name of a send's ledger in Flink's state."""
    return f"{send.tenant}/{send.run}/{send.leg}/{send.shard}"


@dataclass(frozen=True, slots=True)
class Collected:
    """What became of a delivery key's work since the last look."""

    records: tuple[Outcomes | DeadLetter | ConsentChange, ...]
    finished: tuple[str, ...]
    """Names of sends of which nothing is owed any more."""
    marks: Mapping[str, str]
    """How far ledgers were seen, by ledger, where that changed."""
    owed: int
    """Sends of the key that are not finished."""
    moving: bool
    """Whether anything is under way, rather than parked."""
