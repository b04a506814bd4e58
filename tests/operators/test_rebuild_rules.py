"""A ledger told again never lets a message leave that may have been sent."""

from __future__ import annotations

import random
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import from_millis
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.pages import PAGE_SIZE, bitmap_bytes, bitmap_of, delivery_key
from schemas.reasons import Channel, Lane, Outcome, Reason, RunStatus
from schemas.records import OutcomeGroup, Outcomes, Send
from transforms.ledger import (
    Action,
    Ask,
    Claim,
    Claims,
    Closed,
    Held,
    LedgerModel,
    LedgerRef,
    Owner,
    RecipientKey,
    Settlement,
    Settlements,
    VerdictKind,
)
from transforms.rebuild import History, Told

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
T, RUN, EMAIL, SNAPSHOT = Tenant("acme"), RunId("spring"), LegId("email"), SnapshotId("5" * 32)


def send(generation: int, *indexes: int, page: int = 0) -> Send:
    return Send(
        T, RUN, EMAIL, Lane.PROMOTIONAL, Channel.EMAIL, ObjectId("a" * 64), SNAPSHOT, 3, page,
        generation, bitmap_bytes(bitmap_of(indexes)), NOW, NOW, NOW,
    )  # fmt: skip


def outcome(
    which: Outcome, reason: Reason, generation: int, *indexes: int, page: int = 0
) -> Outcomes:
    provider = "" if reason in (Reason.RUN_CANCELLED, Reason.DECISION_TOO_OLD) else "smtp:main"
    group = OutcomeGroup(which, reason, provider, generation, indexes, (), 2)
    return Outcomes(T, RUN, EMAIL, SNAPSHOT, 3, page, NOW, (group,))


def told(count: int, *records: Send | Outcomes, all_sent: bool = False) -> Told:
    history = History()
    for one in records:
        if isinstance(one, Send):
            history.add_send(one)
        else:
            history.add_outcomes(one)
    return history.ledger(EMAIL, 3, count, NOW, all_sent)


def bits(one: Told) -> set[int]:
    return {at for at in range(len(one.accepted) * 8) if one.accepted[at // 8] << at % 8 & 128}


def test_each_row_of_the_table() -> None:
    accepted = outcome(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, 0, 0)
    one = told(
        10,
        send(0, 0, 1, 2, 3, 4, 5, 6, 7),
        accepted,
        outcome(Outcome.UNKNOWN, Reason.NO_ANSWER, 0, 1),
        outcome(Outcome.FAILED, Reason.PROVIDER_REFUSED, 0, 2, 5),
        outcome(Outcome.STALE, Reason.DECISION_TOO_OLD, 0, 3),
        send(1, 5),
        outcome(Outcome.CANCELLED, Reason.RUN_CANCELLED, 1, 4, 6),
        outcome(Outcome.CANCELLED, Reason.RUN_CANCELLED, 0, 7),
    )
    assert bits(one) == {0}
    matters = one.matters
    assert matters[1] == Held(0, 0, 1, "smtp:main", 1772366400000, Reason.NO_ANSWER)
    assert matters[2] == Closed(
        0, 0, 0, Outcome.FAILED, Reason.PROVIDER_REFUSED, 1772366400000
    )  # fmt: skip
    assert 3 not in matters, "its claim was refused"
    doubt = matters[5]
    assert isinstance(doubt, Held)
    assert (doubt.generation, doubt.reason) == (1, Reason.CLAIM_IN_DOUBT), "sent again, unheard"
    # Coordinate closes what was deferred: it says nothing of a send of an earlier generation.
    for index in (4, 6):
        assert isinstance(matters[index], Held)
    assert isinstance(matters[7], Closed), "delivery closed it by the ledger: a send has it"
    assert set(matters) == {1, 2, 4, 5, 6, 7}


def test_a_refusal_of_a_later_generation_answers_earlier_sends() -> None:
    one = told(3, send(0, 1), send(2, 1), outcome(Outcome.FAILED, Reason.PROVIDER_REFUSED, 2, 1))
    closed = one.matters[1]
    assert isinstance(closed, Closed)
    assert closed.generation == 2


def test_bits_lie_as_redis_has_them_across_pages() -> None:
    count = 2 * PAGE_SIZE + 3
    one = told(
        count,
        outcome(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, 0, 0, 9),
        outcome(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, 0, 1, 499, page=1),
        outcome(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, 0, 2, 3, 400, page=2),
    )
    assert len(one.accepted) == (count + 7) // 8
    assert bits(one) == {0, 9, 501, 999, 1002}, "ordinals that the snapshot lacks are left out"


def test_where_records_are_gone_everybody_without_an_outcome_is_held() -> None:
    accepted = outcome(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, 0, 0)
    one = told(PAGE_SIZE + 2, accepted, all_sent=True)
    assert set(one.matters) == set(range(1, PAGE_SIZE + 2))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_what_may_have_been_sent_is_never_free_again(seed: int) -> None:
    """A real ledger, real claims, crashes that lose outcomes or answers; then told again."""
    draw = random.Random(seed)
    model = LedgerModel()
    people = 6
    counts = [0] * 256
    counts[3] = people
    ref = LedgerRef(T, RUN, EMAIL, 3)
    model.create(T, RUN, EMAIL, counts, "d")
    model.publish(T, RUN, 1, RunStatus.RUNNING)
    key = delivery_key(3)
    owner = Owner(Lane.PROMOTIONAL, key, model.acquire_epoch(Lane.PROMOTIONAL, key))
    records: list[Send | Outcomes] = []
    valid: dict[tuple[int, int], int] = {}
    generation = [0] * people
    clock = 1000
    for _ in range(draw.randrange(1, 25)):
        clock += 1
        if draw.random() < 0.1:
            owner = Owner(Lane.PROMOTIONAL, key, model.acquire_epoch(Lane.PROMOTIONAL, key))
        ordinal = draw.randrange(people)
        if not any(isinstance(r, Send) and r.ordinals == bit(ordinal) for r in records):
            records.append(send(0, ordinal))
        elif draw.random() < 0.3:
            generation[ordinal] += 1
            records.append(send(generation[ordinal], ordinal))
        sent = draw.choice(
            [r for r in records if isinstance(r, Send) and r.ordinals == bit(ordinal)]
        )
        valid_until = valid.setdefault((ordinal, sent.generation), clock + draw.randrange(8))
        ask = Ask(
            ordinal, sent.generation, 0, "smtp:main", RecipientKey(b"r" * 8), valid_until, 10**12
        )
        answer = model.claim(ref, owner, model.look(ref), (), [ask], clock)
        assert isinstance(answer, Claims)
        (verdict,) = answer.verdicts
        if verdict.kind is VerdictKind.STALE and draw.random() < 0.9:
            records.append(
                outcome(Outcome.STALE, Reason.DECISION_TOO_OLD, sent.generation, ordinal)
            )
        if verdict.kind is not VerdictKind.CLAIMED:
            continue
        if draw.random() < 0.2:
            continue  # killed between request and answer
        action = draw.choice([Action.ACCEPT, Action.CLOSE, Action.HOLD])
        settlement = Settlement(ordinal, sent.generation, 0, action)
        done = model.settle(ref, owner, model.look(ref), [settlement], clock)
        assert isinstance(done, Settlements)
        if draw.random() < 0.2:
            continue  # killed before the outcome was emitted
        records.append(
            {
                Action.ACCEPT: outcome(
                    Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, sent.generation, ordinal
                ),
                Action.CLOSE: outcome(
                    Outcome.FAILED, Reason.PROVIDER_REFUSED, sent.generation, ordinal
                ),
                Action.HOLD: outcome(Outcome.UNKNOWN, Reason.NO_ANSWER, sent.generation, ordinal),
            }[action]
        )
    draw.shuffle(records)
    again = told(people, *records, *records)
    accepted = bits(again)
    entries = model.shards[ref].entries
    for ordinal in range(people):
        entry = entries.get(ordinal)
        matter = again.matters.get(ordinal)
        in_doubt = entry is not None and (entry.accepted or isinstance(entry.matter, Claim | Held))
        if in_doubt:
            assert ordinal in accepted or isinstance(matter, Held), (entry, matter)
        if ordinal in accepted:
            assert entry is not None
            assert entry.accepted, "nobody is called accepted who was not"
            assert matter is None
        if isinstance(matter, Closed):
            # It refuses nothing but what was told: a later generation may begin in both.
            assert any(
                isinstance(one, Outcomes)
                and one.groups[0].outcome is Outcome.FAILED
                and one.groups[0].indexes == (ordinal,)
                and one.groups[0].generation == matter.generation
                for one in records
            )


def bit(ordinal: int) -> bytes:
    return bitmap_bytes(1 << ordinal)


def test_times_are_of_the_records() -> None:
    held = told(2, outcome(Outcome.UNKNOWN, Reason.NO_ANSWER, 0, 1)).matters[1]
    assert from_millis(held.at_ms) == NOW
