"""The ledger's contract, on the model and on a real Redis: each line of the tables in
``transforms.ledger``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from schemas.errors import Corrupt, Fenced, LedgerRolledBack, MissingLedger
from schemas.pages import delivery_key
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from tests.ledger.backends import LEG, RUN, TENANT, Backend, all_shards
from transforms.ledger import (
    BIT,
    NOTHING,
    Action,
    Ask,
    Claim,
    Claims,
    Closed,
    Held,
    LedgerRef,
    Moved,
    Owner,
    RecipientKey,
    Seen,
    Settled,
    SettledKind,
    Settlement,
    Settlements,
    Verdict,
    VerdictKind,
    recipient_key,
    scope,
    scopes_of,
)

V, S, A = VerdictKind, SettledKind, Action
REF = LedgerRef(TENANT, RUN, LEG, 70)
KEY = delivery_key(70)
SOMEBODY = recipient_key(TENANT, "somebody")
SCOPES = scopes_of("email", "offers")
HOUR = 3_600_000


def now() -> int:
    return time.time_ns() // 1_000_000


class Writer:
    """A delivery process that owns the ledger: follows the sequence as the real one does."""

    def __init__(self, backend: Backend, lane: Lane = Lane.PROMOTIONAL) -> None:
        self.backend = backend
        self.owner = Owner(lane, KEY, backend.acquire_epoch(lane, KEY))
        self.seen = backend.look(REF)

    def ask(
        self,
        ordinal: int = 5,
        generation: int = 1,
        attempt: int = 1,
        provider: str = "sendgrid",
        valid_ms: int = HOUR,
        deadline_ms: int = HOUR,
        recipient: RecipientKey = SOMEBODY,
    ) -> Ask:
        at = now()
        return Ask(
            ordinal, generation, attempt, provider, recipient, at + valid_ms, at + deadline_ms
        )

    def claim_all(self, *asks: Ask) -> Claims:
        answer = self._follow(lambda: self.backend.claim(REF, self.owner, self.seen, SCOPES, asks))
        assert isinstance(answer, Claims)
        return answer

    def claim(self, **fields: Any) -> Verdict:
        return self.claim_all(self.ask(**fields)).verdicts[0]

    def settle_all(self, *settlements: Settlement) -> Settlements:
        answer = self._follow(lambda: self.backend.settle(REF, self.owner, self.seen, settlements))
        assert isinstance(answer, Settlements)
        return answer

    def settle(
        self, action: Action, ordinal: int = 5, generation: int = 1, attempt: int = 1, **how: Any
    ) -> Settled:
        each = Settlement(ordinal, generation, attempt, action, **how)
        return self.settle_all(each).answers[0]

    def _follow(self, call: Callable[[], Claims | Settlements | Moved]) -> Claims | Settlements:
        while True:
            answer = call()
            self.seen = Seen(self.seen.dataset, answer.seq)
            if not isinstance(answer, Moved):
                return answer

    def stands(self, ordinal: int = 5) -> object:
        if ordinal in self.backend.accepted(REF):
            assert ordinal not in self.backend.list_open(REF), "both bit and matter"
            return "bit"
        return self.backend.list_open(REF).get(ordinal)


@pytest.fixture
def ready(backend: Backend) -> Backend:
    backend.create(all_shards(1000), "d1")
    backend.publish(1, RunStatus.RUNNING)
    return backend


@pytest.fixture
def writer(ready: Backend) -> Writer:
    return Writer(ready)


@pytest.fixture
def critical(ready: Backend) -> Writer:
    return Writer(ready, Lane.CRITICAL)


# create, look, drop


def test_created_at_full_length_and_untouched(ready: Backend) -> None:
    view = ready.view(REF)
    assert (view.dataset, view.seq, view.count) == ("d1", 0, 1000)
    assert (view.accepted, view.claims, view.held, view.closed) == (0, 0, 0, 0)


def test_creating_again_changes_nothing(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.ACCEPT)
    writer.claim(ordinal=6)
    before = (writer.backend.view(REF), writer.backend.list_open(REF))
    writer.backend.create(all_shards(1000), "d1")
    assert (writer.backend.view(REF), writer.backend.list_open(REF)) == before
    assert writer.stands(5) == "bit"


@pytest.mark.parametrize(("count", "dataset"), [(1000, "d2"), (999, "d1"), (1001, "d1")])
def test_creating_another_in_its_place_is_refused(ready: Backend, count: int, dataset: str) -> None:
    with pytest.raises(Corrupt, match="exists as dataset d1 of 1000"):
        ready.create(all_shards(count), dataset)
    assert ready.view(REF).count == 1000


def test_empty_shards_have_ledgers_too(backend: Backend) -> None:
    backend.create(all_shards(0), "d1")
    assert backend.view(REF).count == 0
    backend.create(all_shards(0), "d1")


def test_dropped_is_missing(writer: Writer) -> None:
    writer.claim()
    writer.backend.drop()
    with pytest.raises(MissingLedger):
        writer.claim()
    with pytest.raises(MissingLedger):
        writer.backend.look(REF)
    with pytest.raises(MissingLedger):
        writer.backend.view(REF)
    with pytest.raises(MissingLedger):
        writer.backend.list_open(REF)
    with pytest.raises(MissingLedger):
        writer.backend.reconcile(REF, [5])


# who has the message


def test_those_asked_about_who_have_the_message_are_told(writer: Writer) -> None:
    for ordinal in (8, 23, 24, 999):
        writer.claim(ordinal=ordinal)
        writer.settle(A.ACCEPT, ordinal=ordinal)
    writer.claim(ordinal=9)  # nothing is known of it
    writer.claim(ordinal=10)
    writer.settle(A.CLOSE, ordinal=10, outcome=Outcome.FAILED, reason=Reason.ADDRESS_REFUSED)
    accepted = writer.backend.accepted_of
    assert accepted(REF, range(1000)) == {8, 23, 24, 999}
    assert accepted(REF, [10, 9, 24, 8]) == {8, 24}
    assert accepted(REF, [999]) == {999}
    assert accepted(REF, [0, 998]) == set()


def test_of_an_absent_ledger_nobody_is_told(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.ACCEPT)
    writer.backend.drop()
    assert writer.backend.accepted_of(REF, [5]) == set()


# calls refused whole


def test_successor_fences_its_predecessor(writer: Writer) -> None:
    writer.claim()
    successor = Writer(writer.backend)
    before = writer.backend.list_open(REF)
    with pytest.raises(Fenced):
        writer.settle(A.ACCEPT)
    with pytest.raises(Fenced):
        writer.claim(ordinal=6)
    assert writer.backend.list_open(REF) == before
    assert successor.claim(ordinal=6).kind is V.CLAIMED


def test_epochs_of_lanes_are_their_own(writer: Writer) -> None:
    Writer(writer.backend, Lane.CRITICAL)
    assert writer.claim().kind is V.CLAIMED


def test_other_dataset_is_refused(writer: Writer) -> None:
    writer.seen = Seen("d0", writer.seen.seq)
    with pytest.raises(LedgerRolledBack):
        writer.claim()


def test_sequence_behind_is_refused(writer: Writer) -> None:
    writer.seen = Seen("d1", writer.seen.seq + 1)
    with pytest.raises(LedgerRolledBack):
        writer.claim()
    assert writer.stands() is None


def test_epoch_that_redis_never_gave_is_refused(writer: Writer) -> None:
    writer.owner = Owner(Lane.PROMOTIONAL, KEY, writer.owner.epoch + 1)
    with pytest.raises(LedgerRolledBack):
        writer.claim()


def test_a_late_twin_of_an_answered_call_is_void(writer: Writer) -> None:
    late = writer.seen
    writer.claim()
    writer.settle(A.RELEASE)
    backend = writer.backend
    assert backend.claim(REF, writer.owner, late, SCOPES, [writer.ask()]) == Moved(late.seq + 2)
    assert writer.stands() is None
    writer.claim(attempt=2)
    release = Settlement(5, 1, 2, A.RELEASE)
    assert isinstance(backend.settle(REF, writer.owner, late, [release]), Moved)
    assert isinstance(writer.stands(), Claim)


def test_a_refused_twin_does_not_delete_the_claim_of_a_request_that_left(writer: Writer) -> None:
    late = writer.seen
    assert writer.claim().kind is V.CLAIMED
    writer.backend.publish(2, RunStatus.PAUSED)
    twin = writer.backend.claim(REF, writer.owner, late, SCOPES, [writer.ask()])
    assert isinstance(twin, Moved)
    assert isinstance(writer.stands(), Claim)


def test_ordinals_that_the_ledger_does_not_have_are_refused_whole(writer: Writer) -> None:
    with pytest.raises(Corrupt, match="ordinal 1000"):
        writer.claim_all(writer.ask(ordinal=999), writer.ask(ordinal=1000))
    assert writer.stands(999) is None
    assert writer.claim(ordinal=999).kind is V.CLAIMED
    with pytest.raises(Corrupt):
        writer.settle(A.ACCEPT, ordinal=1000)
    with pytest.raises(Corrupt):
        writer.backend.reconcile(REF, [1000])


def test_another_delivery_key_may_not_write(writer: Writer) -> None:
    writer.owner = Owner(Lane.PROMOTIONAL, KEY + 1, 1)
    with pytest.raises(ValueError, match="two keys"):
        writer.claim()


def test_every_call_moves_the_sequence_on(writer: Writer) -> None:
    first = writer.seen.seq
    writer.claim()
    writer.claim()
    writer.settle(A.ACCEPT)
    writer.settle(A.ACCEPT)
    assert writer.backend.look(REF).seq == writer.seen.seq == first + 4


# claim


def test_claim_and_accept(writer: Writer) -> None:
    assert writer.claim() == Verdict(V.CLAIMED)
    claim = writer.stands()
    assert isinstance(claim, Claim)
    assert (claim.epoch, claim.generation, claim.attempt) == (writer.owner.epoch, 1, 1)
    assert claim.provider == "sendgrid"
    assert abs(claim.at_ms - now()) < 10_000
    assert not claim.doubt
    assert writer.settle(A.ACCEPT) == Settled(S.DONE)
    assert writer.stands() == "bit"
    assert writer.claim(generation=2, provider="other") == Verdict(V.ACCEPTED)
    assert writer.backend.view(REF).accepted == 1


def test_equal_claim_is_repeated_safely(writer: Writer) -> None:
    assert writer.claim().kind is V.CLAIMED
    claim = writer.stands()
    assert writer.claim() == Verdict(V.CLAIMED)
    assert writer.stands() == claim


@pytest.mark.parametrize(
    "other", [{"generation": 2}, {"generation": 0}, {"attempt": 2}, {"provider": "sendgridx"}]
)
def test_own_live_claim_that_differs_is_waited_for(writer: Writer, other: dict[str, Any]) -> None:
    writer.claim()
    claim = writer.stands()
    assert writer.claim(**other) == Verdict(V.WAIT, claim)  # type: ignore[arg-type]
    assert writer.stands() == claim


def test_later_items_of_a_call_see_earlier_ones(writer: Writer) -> None:
    first, second = writer.claim_all(writer.ask(), writer.ask(generation=2)).verdicts
    assert (first.kind, second.kind) == (V.CLAIMED, V.WAIT)
    accept, release = Settlement(5, 1, 1, A.ACCEPT), Settlement(5, 1, 1, A.RELEASE)
    answers = writer.settle_all(accept, release).answers
    assert answers == (Settled(S.DONE), Settled(S.ACCEPTED))


def test_claim_of_a_predecessor_is_held(writer: Writer) -> None:
    writer.claim(provider="ses")
    claim = writer.stands()
    assert isinstance(claim, Claim)
    successor = Writer(writer.backend)
    verdict = successor.claim(generation=2)
    held = verdict.matter
    assert verdict.kind is V.HELD
    assert isinstance(held, Held)
    assert (held.epoch, held.generation, held.attempt) == (claim.epoch, 1, 1)
    assert (held.provider, held.reason) == ("ses", Reason.CLAIM_IN_DOUBT)
    assert successor.stands() == held
    assert successor.claim() == verdict, "the answer may be lost: told again"


def test_claim_of_a_predecessor_is_held_even_when_paused(writer: Writer) -> None:
    writer.claim()
    writer.backend.publish(2, RunStatus.PAUSED)
    assert Writer(writer.backend).claim().kind is V.HELD


def test_critical_claim_of_a_predecessor_is_repeated(critical: Writer) -> None:
    critical.claim()
    successor = Writer(critical.backend, Lane.CRITICAL)
    assert successor.claim().kind is V.REPEATED
    claim = successor.stands()
    assert isinstance(claim, Claim)
    assert (claim.epoch, claim.doubt) == (successor.owner.epoch, True)
    assert successor.claim().kind is V.REPEATED, "the flag survives a lost answer"
    assert successor.settle(A.ACCEPT).kind is S.DONE
    assert successor.stands() == "bit"


@pytest.mark.parametrize("status", [RunStatus.PAUSED, RunStatus.SCHEDULED, RunStatus.COMPLETED])
def test_nothing_is_claimed_unless_running(writer: Writer, status: RunStatus) -> None:
    writer.backend.publish(2, status)
    answer = writer.claim_all(writer.ask())
    assert answer.verdicts == (Verdict(V.NOT_RUNNING),)
    assert answer.status is status
    assert writer.stands() is None


def test_unheard_run_is_not_running(backend: Backend) -> None:
    backend.create(all_shards(10), "d1")
    writer = Writer(backend)
    answer = writer.claim_all(writer.ask())
    assert (answer.verdicts[0].kind, answer.status) == (V.NOT_RUNNING, None)


def test_old_versions_of_the_status_undo_nothing(writer: Writer) -> None:
    assert writer.backend.publish(3, RunStatus.PAUSED)
    assert not writer.backend.publish(2, RunStatus.RUNNING)
    assert not writer.backend.publish(3, RunStatus.RUNNING)
    assert writer.claim().kind is V.NOT_RUNNING
    assert writer.backend.publish(10, RunStatus.RUNNING)
    assert not writer.backend.publish(9, RunStatus.PAUSED)
    assert writer.claim().kind is V.CLAIMED


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (RunStatus.CANCELLED, Outcome.CANCELLED, Reason.RUN_CANCELLED),
        (RunStatus.EXPIRED, Outcome.EXPIRED, Reason.RUN_EXPIRED),
    ],
)
def test_ended_run_closes(
    writer: Writer, status: RunStatus, outcome: Outcome, reason: Reason
) -> None:
    writer.claim(ordinal=6)
    writer.settle(A.ACCEPT, ordinal=6)
    writer.backend.publish(2, status)
    verdict = writer.claim(generation=3, attempt=2)
    closed = verdict.matter
    assert isinstance(closed, Closed)
    assert (verdict.kind, closed.generation) == (V.CLOSED, 3)
    assert (closed.outcome, closed.reason) == (outcome, reason)
    assert writer.stands() == closed, "the outcome survives a crash"
    assert writer.claim(generation=2) == verdict
    assert writer.claim(ordinal=6).kind is V.ACCEPTED, "what was sent stays sent"


def test_deadline_closes(writer: Writer) -> None:
    verdict = writer.claim(deadline_ms=-1, valid_ms=-1)
    assert isinstance(verdict.matter, Closed)
    assert (verdict.kind, verdict.matter.outcome) == (V.CLOSED, Outcome.EXPIRED)
    assert verdict.matter.reason is Reason.DEADLINE


def test_stale_keeps_nothing(writer: Writer) -> None:
    assert writer.claim(valid_ms=-1).kind is V.STALE
    assert writer.stands() is None


@pytest.mark.parametrize(
    ("channel", "topic", "refused"),
    [
        ("email", "offers", True),
        ("email", "*", True),
        ("*", "offers", True),
        ("*", "*", True),
        ("sms", "offers", False),
        ("email", "news", False),
        ("sms", "*", False),
    ],
)
def test_recent_opt_out_closes(writer: Writer, channel: str, topic: str, refused: bool) -> None:
    writer.backend.opt_out(REF.shard, SOMEBODY, [scope(channel, topic)])
    verdict = writer.claim()
    if not refused:
        assert verdict.kind is V.CLAIMED
        return
    assert isinstance(verdict.matter, Closed)
    assert verdict.kind is V.CLOSED
    assert (verdict.matter.outcome, verdict.matter.reason) == (Outcome.FAILED, Reason.OPTED_OUT)


def test_opt_out_concerns_one_recipient_and_can_be_taken_back(writer: Writer) -> None:
    writer.backend.opt_out(REF.shard, SOMEBODY, ["email/offers", "*/*"])
    assert writer.claim(recipient=recipient_key(TENANT, "another")).kind is V.CLAIMED
    assert writer.claim(ordinal=6, recipient=recipient_key("other", "somebody")).kind is V.CLAIMED
    writer.backend.opt_in(REF.shard, SOMEBODY, ["email/offers"])
    assert writer.claim(ordinal=7).kind is V.CLOSED
    writer.backend.opt_in(REF.shard, SOMEBODY, ["*/*"])
    assert writer.claim(ordinal=8).kind is V.CLAIMED


@pytest.mark.parametrize("refused", ["paused", "stale", "deadline", "opted_out"])
def test_refusal_deletes_ones_own_claim(writer: Writer, refused: str) -> None:
    writer.claim()
    verdict = refuse(writer, refused)
    if refused in ("paused", "stale"):
        assert writer.stands() is None
    else:
        assert writer.stands() == verdict.matter
    successor = Writer(writer.backend)
    writer.backend.publish(9, RunStatus.RUNNING)
    writer.backend.opt_in(REF.shard, SOMEBODY, ["*/*"])
    assert successor.claim(generation=2).kind is V.CLAIMED, "nothing was in doubt"


def refuse(writer: Writer, how: str) -> Verdict:
    if how == "paused":
        writer.backend.publish(2, RunStatus.PAUSED)
        return writer.claim()
    if how == "stale":
        return writer.claim(valid_ms=-1)
    if how == "deadline":
        return writer.claim(deadline_ms=-1)
    writer.backend.opt_out(REF.shard, SOMEBODY, ["*/*"])
    return writer.claim()


@pytest.mark.parametrize("refused", ["paused", "stale", "deadline", "opted_out"])
@pytest.mark.parametrize("taken", [False, True])
def test_critical_doubt_survives_refusal(critical: Writer, refused: str, taken: bool) -> None:
    critical.claim()
    successor = Writer(critical.backend, Lane.CRITICAL)
    if taken:
        assert successor.claim().kind is V.REPEATED
    verdict = refuse(successor, refused)
    stands = successor.stands()
    if refused in ("deadline", "opted_out"):
        assert verdict.kind is V.HELD
        assert isinstance(stands, Held)
        assert stands.reason is Reason.CLAIM_IN_DOUBT
        return
    assert isinstance(stands, Claim)
    assert (stands.doubt, stands.epoch) == (True, 0)
    critical.backend.publish(9, RunStatus.RUNNING)
    assert successor.claim(generation=2).kind is V.REPEATED


def test_closed_of_an_earlier_generation_is_replaced(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.CLOSE, outcome=Outcome.FAILED, reason=Reason.ADDRESS_REFUSED)
    assert writer.claim().kind is V.CLOSED
    assert writer.claim(generation=2).kind is V.CLAIMED
    assert isinstance(writer.stands(), Claim)
    writer.settle(A.CLOSE, generation=2, reason=Reason.PROVIDER_REFUSED)
    closed = writer.stands()
    assert isinstance(closed, Closed)
    assert closed.generation == 2
    assert writer.claim(generation=1) == Verdict(V.CLOSED, closed)


def test_closed_of_an_earlier_generation_outlasts_a_passing_refusal(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.CLOSE)
    closed = writer.stands()
    assert writer.claim(generation=2, valid_ms=-1).kind is V.STALE
    assert writer.stands() == closed


# settle


def test_release_lets_the_next_attempt_claim(writer: Writer) -> None:
    writer.claim()
    assert writer.settle(A.RELEASE).kind is S.DONE
    assert writer.stands() is None
    assert writer.claim(attempt=2, provider="ses").kind is V.CLAIMED


def test_close_leaves_its_trace(writer: Writer) -> None:
    writer.claim()
    how = {"outcome": Outcome.FAILED, "reason": Reason.RETRIES_EXHAUSTED}
    assert writer.settle(A.CLOSE, **how).kind is S.DONE
    closed = writer.stands()
    assert isinstance(closed, Closed)
    assert (closed.generation, closed.attempt) == (1, 1)
    assert (closed.outcome, closed.reason) == (Outcome.FAILED, Reason.RETRIES_EXHAUSTED)
    assert Writer(writer.backend).claim() == Verdict(V.CLOSED, closed)


def test_hold_stands_for_every_generation(writer: Writer) -> None:
    writer.claim()
    assert writer.settle(A.HOLD).kind is S.DONE
    held = writer.stands()
    assert isinstance(held, Held)
    assert held.reason is Reason.NO_ANSWER
    assert writer.claim(generation=7) == Verdict(V.HELD, held)
    assert writer.backend.view(REF).held == 1


@pytest.mark.parametrize("action", list(Action))
def test_repeated_settle_says_done_and_changes_nothing(writer: Writer, action: Action) -> None:
    writer.claim()
    assert writer.settle(action).kind is S.DONE
    stands = writer.stands()
    assert writer.settle(action).kind is S.DONE
    assert writer.stands() == stands


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("other", [{"generation": 2}, {"attempt": 2}])
def test_settling_what_is_not_ones_own_changes_nothing(
    writer: Writer, action: Action, other: dict[str, int]
) -> None:
    writer.claim()
    claim = writer.stands()
    assert writer.settle(action, **other) == Settled(S.STANDS, claim)  # type: ignore[arg-type]
    assert writer.stands() == claim


@pytest.mark.parametrize("action", list(Action))
def test_settling_a_predecessors_claim_changes_nothing(writer: Writer, action: Action) -> None:
    writer.claim()
    claim = writer.stands()
    assert Writer(writer.backend).settle(action).kind is S.STANDS
    assert writer.stands() == claim


@pytest.mark.parametrize("action", [A.ACCEPT, A.HOLD, A.CLOSE, A.DOUBT])
def test_settling_nothing_says_so(writer: Writer, action: Action) -> None:
    assert writer.settle(action).kind is S.NOTHING
    assert writer.stands() is None


@pytest.mark.parametrize("action", [A.RELEASE, A.CLOSE, A.HOLD, A.DOUBT])
def test_accepted_outranks(writer: Writer, action: Action) -> None:
    writer.claim()
    writer.backend.reconcile(REF, [5])
    assert writer.settle(action).kind is S.ACCEPTED
    assert writer.settle(A.ACCEPT).kind is S.DONE
    assert writer.stands() == "bit"


def test_another_settlement_does_not_replace_closed_or_held(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.CLOSE, reason=Reason.ADDRESS_REFUSED)
    closed = writer.stands()
    assert writer.settle(A.CLOSE, reason=Reason.PROVIDER_REFUSED).matter == closed
    assert writer.settle(A.ACCEPT).matter == closed
    writer.claim(ordinal=6)
    writer.settle(A.HOLD, ordinal=6)
    held = writer.stands(6)
    assert writer.settle(A.RELEASE, ordinal=6).matter == held
    assert writer.settle(A.ACCEPT, ordinal=6).matter == held


def test_critical_doubt_is_sent_again_and_flagged(critical: Writer) -> None:
    critical.claim()
    assert critical.settle(A.DOUBT).kind is S.DONE
    assert critical.claim(attempt=2, provider="ses").kind is V.REPEATED
    assert critical.settle(A.RELEASE, attempt=2).kind is S.DONE
    assert critical.claim(attempt=3).kind is V.REPEATED, "a refusal of the second says nothing"
    answer = critical.settle(A.CLOSE, attempt=3)
    assert answer.kind is S.STANDS
    assert isinstance(answer.matter, Held), "'not sent' would be a guess"
    assert critical.settle(A.CLOSE, attempt=3) == answer
    assert critical.stands() == answer.matter


def test_promotional_doubt_is_held(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.DOUBT)
    assert writer.claim(attempt=2).kind is V.HELD


# webhooks and people


def test_reconcile(writer: Writer) -> None:
    for ordinal in (1, 2, 3, 4):
        writer.claim(ordinal=ordinal)
    writer.settle(A.HOLD, ordinal=2)
    writer.settle(A.CLOSE, ordinal=3)
    writer.settle(A.ACCEPT, ordinal=4)
    closed = writer.stands(3)
    now_ = writer.backend.reconcile(REF, [0, 1, 2, 3, 4])
    assert now_[0] == NOTHING
    assert now_[1] == now_[2] == now_[4] == BIT
    assert now_[3].matter == closed
    assert writer.backend.accepted(REF) == [1, 2, 4]
    assert writer.backend.view(REF).closed == 1
    assert writer.backend.reconcile(REF, [0, 1, 2, 3, 4]) == now_
    assert writer.claim(ordinal=2).kind is V.ACCEPTED, "the writer follows what others did"


@pytest.mark.parametrize("accepted", [True, False])
def test_settle_by_hand(writer: Writer, accepted: bool) -> None:
    writer.claim()
    writer.settle(A.HOLD)
    held = writer.stands()
    assert isinstance(held, Held)
    assert writer.backend.settle_by_hand(REF, 5, held, accepted)
    assert not writer.backend.settle_by_hand(REF, 5, held, accepted)
    assert writer.stands() == ("bit" if accepted else None)
    expected = V.ACCEPTED if accepted else V.CLAIMED
    assert writer.claim(generation=2).kind is expected


def test_settle_by_hand_leaves_another_unknown_alone(writer: Writer) -> None:
    writer.claim()
    writer.settle(A.HOLD)
    seen = writer.stands()
    assert isinstance(seen, Held)
    writer.backend.settle_by_hand(REF, 5, seen, False)
    writer.claim(generation=2)
    assert not writer.backend.settle_by_hand(REF, 5, seen, False), "nor a claim"
    writer.settle(A.HOLD, generation=2)
    newer = writer.stands()
    assert not writer.backend.settle_by_hand(REF, 5, seen, False)
    assert writer.stands() == newer
