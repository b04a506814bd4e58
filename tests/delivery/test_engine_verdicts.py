"""What becomes of each message, by what the provider answers; in memory and on a real Redis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from schemas.message import Answer, Message, Verdict
from schemas.pages import PAGE_SIZE
from schemas.reasons import Lane, Outcome, Reason, RunStatus
from schemas.records import ConsentStatus
from sinks.engine import DeliveryEngine
from sinks.providers.fake import FakeProvider, accept
from sinks.shaping import Limits
from tests.delivery.world import (
    BIG,
    MAIN,
    OTHER,
    OTHER_KEY,
    SAME_KEY,
    Operator,
    Shop,
    accepted,
)
from transforms.delivery import RetryPolicy
from transforms.ledger import Closed, Held
from transforms.shaping import Limit

MakeShop = Callable[..., Shop]
Running = Callable[[DeliveryEngine], DeliveryEngine]
SECOND = timedelta(seconds=1)


def answering(*verdicts: Answer) -> Callable[[Message], Answer]:
    """Each message gets these answers in turn, then is accepted."""
    tries: Counter[str] = Counter()

    def script(message: Message) -> Answer:
        at = tries[message.send_id]
        tries[message.send_id] += 1
        return verdicts[at] if at < len(verdicts) else accept(message)

    return script


def test_all_accepted_once_with_the_providers_ids(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider()
    engine = running(one.engine((MAIN, provider, 16)))
    operator.submit(
        one.send(BIG, range(PAGE_SIZE)),
        one.send(BIG, range(40), page=1),
        one.send(SAME_KEY),
        one.send(OTHER_KEY),
    )
    operator.finish()
    assert operator.tally() == accepted(600)
    assert len(provider.attempts) == len({each.send_id for each in provider.accepted}) == 600
    assert [one.server.accepted(one.ledger(shard)) for shard in (BIG, SAME_KEY)] == [540, 30]
    assert not one.matters(BIG)
    ids = {name for _, group in operator.groups for name in group.provider_ids}
    assert ids == {f"fake-{each.send_id}" for each in provider.accepted}
    assert {group.provider for _, group in operator.groups} == {"fake:main"}
    message = provider.accepted[0]
    assert message.content.subject.startswith("Hello N")
    assert message.to_address == message.content.subject.replace("Hello N", "p") + "@mail.example"
    assert engine.counts()["requests"] == engine.counts()["outcomes_accepted"] == 600
    assert engine.counts()["answers_accepted"] == 600
    assert set(operator.marks) == {
        f"acme/{one.run}/email/{at}" for at in (BIG, SAME_KEY, OTHER_KEY)
    }


def test_a_successor_needs_no_tokens_for_what_is_done(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider()
    done = [*range(3, 150), *range(152, 300)]
    first = running(one.engine((MAIN, provider, 64)))
    operator.submit(one.send(BIG, done), one.send(OTHER_KEY))
    operator.finish()
    first.stop()
    after = Operator()
    slow = {MAIN: Limits((Limit(2.0),))}
    second = one.engine((MAIN, FakeProvider(), 64), limits=slow)
    after.start(second)
    try:
        after.submit(one.send(BIG, range(300)))
        after.until(lambda: len(after.by_ordinal(BIG)) >= len(done), 5)
        after.finish(30)
        assert after.tally() == {
            (Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED): len(done),
            (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 5,
        }
        assert set(after.by_ordinal(BIG)) == set(range(300))
        assert second.counts()["recalled"] == len(done)
        assert second.counts()["requests"] == 5
    finally:
        second.stop()


def test_a_send_that_comes_twice_is_one(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider(latency=timedelta(milliseconds=50))
    running(one.engine((MAIN, provider, 8)))
    send = one.send()
    operator.submit(send, send)
    operator.finish()
    operator.submit(send)  # a replay after the end: the ledger knows
    operator.finish()
    assert len(provider.attempts) == 30
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 30,
        (Outcome.ACCEPTED, Reason.LEDGER_ACCEPTED): 30,
    }


def test_a_send_to_nobody_ends(shop: MakeShop, operator: Operator, running: Running) -> None:
    one = shop()
    running(one.engine((MAIN, FakeProvider(), 8)))
    operator.submit(one.send(indexes=()))
    operator.finish()
    assert not operator.groups


def test_throttled_waits_as_long_as_it_was_told(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    pause = Answer(Verdict.THROTTLED, "too-much", retry_after=timedelta(milliseconds=300))
    provider = FakeProvider(answering(pause))
    running(one.engine((MAIN, provider, 8)))
    began = datetime.now(UTC)
    operator.submit(one.send(indexes=range(3)))
    operator.finish()
    assert operator.tally() == accepted(3)
    assert datetime.now(UTC) - began >= timedelta(milliseconds=300)
    assert {group.attempts for _, group in operator.groups} == {2}


def test_retryable_is_tried_again(shop: MakeShop, operator: Operator, running: Running) -> None:
    one = shop()
    provider = FakeProvider(answering(*[Answer(Verdict.RETRYABLE, "busy")] * 2))
    running(one.engine((MAIN, provider, 8)))
    operator.submit(one.send(indexes=range(5)))
    operator.finish()
    assert operator.tally() == accepted(5)
    assert len(provider.attempts) == 15
    assert {group.attempts for _, group in operator.groups} == {3}


def test_retries_exhausted_go_the_next_route_then_fail_with_a_dead_letter(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop(leg={"routes": (MAIN, OTHER)})
    busy = Answer(Verdict.RETRYABLE, "busy", detail="450 busy")
    first = FakeProvider(lambda _: busy)
    lucky = {f"{name}@mail.example" for name in one.recipients(OTHER_KEY)[:2]}
    second = FakeProvider(lambda each: accept(each) if each.to_address in lucky else busy)
    running(one.engine((MAIN, first, 64), (OTHER, second, 64)))
    # Few enough failures to keep the circuit closed.
    operator.submit(one.send(indexes=range(5)))
    operator.finish()
    assert (len(first.attempts), len(second.attempts)) == (15, 11)
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 2,
        (Outcome.FAILED, Reason.RETRIES_EXHAUSTED): 3,
    }
    assert {group.provider for _, group in operator.groups} == {"fake:other"}
    assert operator.letters
    for letter in operator.letters:
        assert (letter.reason, letter.step) == (Reason.RETRIES_EXHAUSTED, "delivery/request")
        assert (letter.shard, letter.page, letter.generation) == (OTHER_KEY, 0, 1)
        assert letter.detail == "450 busy"
    assert all(isinstance(each, Closed) for each in one.matters().values())
    assert len(one.matters()) == 3


@pytest.mark.parametrize(
    ("verdict", "reason", "letters", "suppressed"),
    [
        (Verdict.REFUSED, Reason.PROVIDER_REFUSED, 3, 0),
        (Verdict.ADDRESS_DEAD, Reason.ADDRESS_REFUSED, 0, 3),
        (Verdict.ACCOUNT, Reason.ACCOUNT_REFUSED, 3, 0),
    ],
)
def test_final_refusals(
    shop: MakeShop,
    operator: Operator,
    running: Running,
    verdict: Verdict,
    reason: Reason,
    letters: int,
    suppressed: int,
) -> None:
    one = shop()
    provider = FakeProvider(lambda _: Answer(verdict, "no", detail="550 no"))
    running(one.engine((MAIN, provider, 8)))
    operator.submit(one.send(indexes=range(3)))
    operator.finish()
    assert operator.tally() == {(Outcome.FAILED, reason): 3}
    assert len(provider.attempts) == (9 if verdict is Verdict.ACCOUNT else 3)
    told = sum(int.from_bytes(each.ordinals, "little").bit_count() for each in operator.letters)
    assert told == letters
    assert len(operator.consent) == suppressed
    for change in operator.consent:
        assert (change.status, change.channel) == (ConsentStatus.SUPPRESSED, "email")
        assert change.recipient_id in one.recipients(OTHER_KEY)[:3]
    assert {type(each) for each in one.matters().values()} == {Closed}


def test_an_account_that_is_refused_leaves_its_route_at_once(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop(leg={"routes": (MAIN, OTHER)})
    first = FakeProvider(lambda _: Answer(Verdict.ACCOUNT, "credentials-refused"))
    second = FakeProvider()
    running(one.engine((MAIN, first, 8), (OTHER, second, 8)))
    operator.submit(one.send(indexes=range(6)))
    operator.finish()
    assert operator.tally() == accepted(6)
    assert len(first.attempts) == len(second.accepted) == 6


def test_in_doubt_is_unknown_and_never_sent_again(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop(leg={"routes": (MAIN, OTHER)})
    provider = FakeProvider(lambda _: Answer(Verdict.IN_DOUBT, "timeout", detail="no answer"))
    running(one.engine((MAIN, provider, 8), (OTHER, FakeProvider(), 8)))
    send = one.send(indexes=range(4))
    operator.submit(send)
    operator.finish()
    operator.submit(send, one.send(indexes=range(4), generation=2))
    operator.finish()
    assert operator.tally() == {(Outcome.UNKNOWN, Reason.NO_ANSWER): 12}
    assert len(provider.attempts) == 4
    assert {type(each) for each in one.matters().values()} == {Held}


def test_a_critical_message_in_doubt_is_sent_again_and_flagged(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    provider = FakeProvider(answering(Answer(Verdict.IN_DOUBT, "timeout")))
    engine = running(one.engine((MAIN, provider, 8), lane=Lane.CRITICAL))
    operator.submit(one.send(indexes=range(4), lane=Lane.CRITICAL))
    operator.finish()
    assert operator.tally() == accepted(4)
    assert len(provider.attempts) == 8
    assert len({each.send_id for each in provider.attempts}) == 4
    assert all(group.detail.startswith("repeated: ") for _, group in operator.groups)
    assert engine.counts()["repeated"] == 4


def test_a_critical_message_always_in_doubt_ends_unknown(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    provider = FakeProvider(
        answering(Answer(Verdict.RETRYABLE, "busy"), *[Answer(Verdict.IN_DOUBT, "timeout")] * 9)
    )
    running(one.engine((MAIN, provider, 8), lane=Lane.CRITICAL))
    operator.submit(one.send(indexes=range(2), lane=Lane.CRITICAL))
    operator.finish()
    assert [outcome for outcome, _ in operator.tally()] == [Outcome.UNKNOWN]
    assert len(provider.attempts) == 6


def test_the_last_attempt_in_doubt_is_not_called_failed(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop()
    busy = Answer(Verdict.RETRYABLE, "busy")
    provider = FakeProvider(answering(busy, busy, Answer(Verdict.IN_DOUBT, "timeout")))
    running(one.engine((MAIN, provider, 8), lane=Lane.CRITICAL))
    operator.submit(one.send(indexes=range(2), lane=Lane.CRITICAL))
    operator.finish()
    assert operator.tally() == {(Outcome.UNKNOWN, Reason.NO_ANSWER): 2}


def test_an_open_circuit_goes_the_next_route(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one = shop(leg={"routes": (MAIN, OTHER)})
    first = FakeProvider(lambda _: Answer(Verdict.RETRYABLE, "down"))
    second = FakeProvider()
    # Answers are reported each 100 ms: a second try comes when the circuit has heard of the first.
    patient = RetryPolicy(timedelta(milliseconds=800), timedelta(seconds=2), 3)
    running(one.engine((MAIN, first, 32), (OTHER, second, 32), retry=patient))
    operator.submit(one.send(BIG, range(PAGE_SIZE)), one.send(BIG, range(40), page=1))
    operator.finish()
    assert operator.tally() == accepted(540)
    assert len(second.accepted) == 540
    assert len(first.attempts) < 2 * 540, "of three tries each, the circuit kept most from two"


def test_a_rate_is_a_limit(shop: MakeShop, operator: Operator, running: Running) -> None:
    times: list[datetime] = []

    def script(message: Message) -> Answer:
        times.append(datetime.now(UTC))
        return accept(message)

    one = shop()
    route_limits = {OTHER: Limits((Limit(60.0),))}
    one = shop(leg={"routes": (OTHER,)})
    running(one.engine((OTHER, FakeProvider(script), 64), limits=route_limits))
    operator.submit(one.send(BIG, range(150)))
    operator.finish()
    assert operator.tally() == accepted(150)
    for start in times:
        # What a token waits for its request differs with the machine's load: half as much again.
        within = sum(start <= each < start + SECOND for each in times)
        assert within <= 90, f"{within} within a second"
    assert times[-1] - times[0] >= timedelta(seconds=1.5)


def test_two_runs_take_turns(shop: MakeShop, operator: Operator, running: Running) -> None:
    big, small = shop(), shop()
    provider = FakeProvider(latency=timedelta(milliseconds=5))
    running(big.engine((MAIN, provider, 4)))
    operator.submit(big.send(BIG, range(PAGE_SIZE)))
    operator.submit(small.send())
    operator.finish()
    runs = [each.run for each in provider.attempts]
    assert runs.count(small.run) == 30
    last = len(runs) - runs[::-1].index(small.run)
    assert last < 300, "the small run did not wait for the end of the big one"


def test_paused_parks_and_resumes_at_the_exact_recipient(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider(latency=timedelta(milliseconds=10))
    engine = running(one.engine((MAIN, provider, 4)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: len(provider.attempts) >= 40)
    one.publish(RunStatus.PAUSED)
    operator.until(lambda: not operator.collect() and engine.counts()["parked"] > 2)
    sent = len(provider.attempts)
    assert sent < 300
    operator.until(lambda: engine.counts()["parked"] > 4)
    assert len(provider.attempts) == sent
    one.publish(RunStatus.RUNNING)
    operator.finish()
    assert operator.tally() == accepted(500)
    assert len(provider.attempts) == 500


def test_cancelled_closes_what_has_not_left(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider(latency=timedelta(milliseconds=10))
    running(one.engine((MAIN, provider, 4)))
    operator.submit(one.send(BIG, range(PAGE_SIZE)))
    operator.until(lambda: len(provider.attempts) >= 40)
    one.publish(RunStatus.CANCELLED)
    operator.finish()
    tally = operator.tally()
    sent = tally[Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED]
    assert sent == len(provider.accepted) < 400
    assert tally[Outcome.CANCELLED, Reason.RUN_CANCELLED] == 500 - sent


def test_a_run_that_nobody_published_stands_still(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider()
    unknown = shop()
    engine = running(one.engine((MAIN, provider, 4)))
    unknown.server.create(type(one.run)(f"{one.run}-x"), [30] * 256)
    soon = datetime.now(UTC) + timedelta(seconds=1.5)
    operator.submit(one.send(run=f"{one.run}-x", valid_until=soon))
    operator.until(lambda: engine.counts()["parked"] > 1)
    assert not provider.attempts
    operator.finish()
    assert operator.tally() == {(Outcome.STALE, Reason.DECISION_TOO_OLD): 30}
    assert not provider.attempts


def test_too_old_while_paused_is_stale(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider()
    running(one.engine((MAIN, provider, 4)))
    one.publish(RunStatus.PAUSED)
    operator.submit(one.send(valid_until=datetime.now(UTC) + timedelta(seconds=1)))
    operator.finish()
    assert operator.tally() == {(Outcome.STALE, Reason.DECISION_TOO_OLD): 30}


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("valid_until", (Outcome.STALE, Reason.DECISION_TOO_OLD)),
        ("deadline", (Outcome.EXPIRED, Reason.DEADLINE)),
    ],
)
def test_time_passes_while_a_retry_waits(
    shop: MakeShop,
    operator: Operator,
    running: Running,
    field: str,
    expected: tuple[Outcome, Reason],
) -> None:
    one = shop()
    later = Answer(Verdict.THROTTLED, "too-much", retry_after=timedelta(minutes=3))
    provider = FakeProvider(lambda _: later)
    running(one.engine((OTHER, FakeProvider(), 4), (MAIN, provider, 8)))
    soon: dict[str, Any] = {field: datetime.now(UTC) + timedelta(seconds=1.5)}
    operator.submit(one.send(indexes=range(3), **soon))
    operator.finish()
    assert operator.tally() == {expected: 3}
    assert len(provider.attempts) == 3


def test_an_opt_out_between_decision_and_claim(
    shop: MakeShop, operator: Operator, running: Running
) -> None:
    one, provider = shop(), FakeProvider()
    gone = one.recipients(OTHER_KEY)[4]
    one.server.opt_out(gone)
    running(one.engine((MAIN, provider, 8)))
    operator.submit(one.send())
    operator.finish()
    assert operator.tally() == {
        (Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED): 29,
        (Outcome.FAILED, Reason.OPTED_OUT): 1,
    }
    assert f"{gone}@mail.example" not in {each.to_address for each in provider.attempts}
    assert not operator.letters, "nobody can mend that"
