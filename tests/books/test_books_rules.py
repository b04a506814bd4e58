"""The rules of the books, whatever is said, however often and in whatever order."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from schemas.tables import FINAL_KINDS, StepKind
from transforms.books import PENDING, Coordinator, Counts, Step, check, class_of, comparable, count

LEGS = ("email", "sms")
SHARDS = [3, 0, 2]

steps = st.builds(
    Step,
    leg=st.sampled_from(LEGS),
    shard=st.sampled_from([0, 2]),
    ordinal=st.integers(0, 1),
    generation=st.integers(0, 3),
    kind=st.sampled_from(StepKind),
    reason=st.just(""),
    rank=st.just(0),
).flatmap(
    lambda one: st.sampled_from([("a", 1), ("b", 2)]).map(
        lambda why: replace(one, reason=why[0], rank=why[1])
    )
)


def step(generation: int, kind: StepKind, reason: str = "r") -> Step:
    return Step("email", 0, 0, generation, kind, reason)


@given(st.lists(steps, max_size=40))
def test_books_balance_for_any_sequence(said: list[Step]) -> None:
    counts = count(said, SHARDS, LEGS)
    assert counts.audience == 10
    assert sum(counts.classes.values()) + counts.pending == counts.audience
    assert check(counts, None, must_agree=False).balanced == (counts.conflicts == 0)


@given(st.lists(steps, max_size=30), st.randoms(use_true_random=False))
def test_duplicates_and_order_change_nothing(said: list[Step], random: object) -> None:
    again = said + said[::2]
    random.shuffle(again)  # type: ignore[attr-defined]
    assert count(again, SHARDS, LEGS) == count(said, SHARDS, LEGS)


@given(st.lists(steps, max_size=30), steps)
def test_accepted_is_for_ever(said: list[Step], last: Step) -> None:
    accepted = step(0, StepKind.ACCEPTED)
    about = [one for one in said if (one.leg, one.shard, one.ordinal) == ("email", 0, 0)]
    assert class_of([accepted, *about, last])[0] == "accepted"


@given(st.integers(0, 5), st.sampled_from(sorted(set(StepKind) - FINAL_KINDS)))
def test_a_later_decision_makes_pending(generation: int, kind: StepKind) -> None:
    said = [step(generation, StepKind.FAILED), step(generation + 1, kind)]
    assert class_of(said) == (PENDING, "")
    assert class_of([step(generation, kind), step(generation, StepKind.FAILED)]) == ("failed", "r")


def test_unknown_outranks_later_generations_and_yields_to_accepted() -> None:
    held = [step(0, StepKind.UNKNOWN, "no_answer"), step(1, StepKind.SEND)]
    assert class_of(held) == ("unknown", "no_answer")
    settled = count([*held, step(0, StepKind.ACCEPTED)], [1], ["email"])
    assert settled.of(StepKind.ACCEPTED) == 1
    assert settled.conflicts == 0


def test_what_contradicts_is_shown() -> None:
    said = [
        step(1, StepKind.ACCEPTED),
        step(1, StepKind.FAILED),
        Step("email", 0, 7, 0, StepKind.SKIPPED, "holdout"),
    ]
    verdict = check(count(said, [2], ["email"]), None, must_agree=False)
    assert not verdict.balanced
    assert [error.split(" ")[0] for error in verdict.errors] == ["the", "1", "1"]
    assert "accepted and failed" in verdict.errors[2]


def test_the_coordinator_must_agree_once_it_can() -> None:
    counts = Counts(audience=2, classes={}, pending=2, strangers=0, conflicts=0)
    other = Coordinator("running", datetime(2026, 1, 1, tzinfo=UTC), pending=1, audience=2, open=1)
    assert check(counts, other, must_agree=False).balanced
    assert "2 by rows and 1 by the coordinator" in check(counts, other, must_agree=True).errors[0]


def test_counts_of_different_moments_are_not_compared() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    counted = Coordinator("running", at, pending=1, audience=2, open=1)
    assert not comparable(counted, at - timedelta(seconds=59), caught_up=True)
    assert comparable(counted, at - timedelta(seconds=60), caught_up=True)
    assert not comparable(counted, at - timedelta(days=1), caught_up=False)
    assert not comparable(counted, at - timedelta(days=1), caught_up=None)
    # Between two windows nothing is open either, and clocks of two machines differ.
    assert not comparable(replace(counted, open=0), at, caught_up=True)
    paused = replace(counted, status="paused", open=0)
    assert comparable(paused, at, caught_up=True)
    assert not comparable(paused, at + timedelta(milliseconds=1), caught_up=True)
    done = replace(counted, pending=0)
    assert comparable(done, at + timedelta(days=1), caught_up=True)
