"""What is watched of unknowns, when it is looked after, and what is told of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import decode, encode
from schemas.ids import LegId, RunId, SnapshotId, Tenant
from schemas.pages import PAGE_SIZE
from schemas.reasons import Outcome, Reason
from schemas.records import EngagementEvent, EngagementKind, OutcomeGroup, Outcomes
from transforms.reconcile import (
    Proof,
    ReconcilePolicy,
    Watch,
    accepted,
    indexes_of,
    merged,
    name_of,
    unknowns_of,
    without,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
REASONS = (Reason.NO_ANSWER, Reason.CLAIM_IN_DOUBT)

indexes = st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).map(tuple)
unknown_groups = st.builds(
    lambda generation, which, provider, reason: OutcomeGroup(
        Outcome.UNKNOWN, reason, provider, generation, which
    ),
    st.integers(0, 3),
    indexes,
    st.sampled_from(["sendgrid:main", "smtp:main"]),
    st.sampled_from(REASONS),
)


def page(*groups: OutcomeGroup, at: datetime = NOW) -> Outcomes:
    return Outcomes(
        Tenant("acme"), RunId("spring"), LegId("email"), SnapshotId("5" * 32), 7, 2, at, groups
    )


unknown_pages = st.lists(unknown_groups, min_size=1, max_size=3).map(lambda some: page(*some))


def event(ordinal: int, run: str = "spring", ref: str | None = None) -> EngagementEvent:
    return EngagementEvent(
        "e1", Tenant("acme"), RunId(run), LegId("email"), "s", ref or f"7.{ordinal}.0",
        EngagementKind.DELIVERED, NOW, "sendgrid", "id", "", "",
    )  # fmt: skip


def test_only_unknown_groups_are_watched() -> None:
    mixed = page(
        OutcomeGroup(Outcome.ACCEPTED, Reason.PROVIDER_ACCEPTED, "p", 0, (1, 2)),
        OutcomeGroup(Outcome.UNKNOWN, Reason.NO_ANSWER, "p", 0, (3,)),
        OutcomeGroup(Outcome.FAILED, Reason.PROVIDER_REFUSED, "p", 0, (4,)),
    )
    found = unknowns_of(mixed)
    assert found is not None
    assert indexes_of(found) == (3,)
    assert unknowns_of(page(mixed.groups[0], mixed.groups[2])) is None


@given(st.lists(unknown_pages, min_size=1, max_size=5), st.randoms())
def test_watching_forgets_nobody_whatever_the_order_and_the_repetitions(
    pages: list[Outcomes], random: object
) -> None:
    def folded(some: list[Outcomes]) -> Outcomes:
        kept = None
        for one in some:
            kept = merged(kept, one)
        assert kept is not None
        return kept

    shuffled = [*pages, *pages]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    kept = folded(pages)
    assert folded(shuffled) == kept
    assert decode(encode(kept), Outcomes) == kept
    wanted = {index for one in pages for group in one.groups for index in group.indexes}
    assert set(indexes_of(kept)) == wanted
    assert sum(len(group.indexes) for group in kept.groups) == len(wanted), "each once"
    for group in kept.groups:
        for index in group.indexes:
            told = [g.generation for one in pages for g in one.groups if index in g.indexes]
            assert group.generation == max(told)


@given(unknown_pages, st.sets(st.integers(0, 30)))
def test_what_is_settled_is_told_and_no_longer_watched(watched: Outcomes, proven: set[int]) -> None:
    watched = merged(None, watched)
    proofs = {
        index: Proof(Reason.SETTLED_BY_WEBHOOK, "sendgrid", f"id-{index}", None)
        for index in proven & set(indexes_of(watched))
    }
    told = accepted(watched, proofs, NOW)
    assert indexes_of(told) == tuple(sorted(proofs))
    for group in told.groups:
        assert group.outcome is Outcome.ACCEPTED
        assert group.provider_ids == tuple(f"id-{index}" for index in group.indexes)
        assert group.provider in ("sendgrid:main", "smtp:main")
    left = without(watched, proofs)
    rest = set(indexes_of(watched)) - set(proofs)
    assert (set() if left is None else set(indexes_of(left))) == rest


def test_the_generation_is_that_of_the_request_which_arrived() -> None:
    watched = page(OutcomeGroup(Outcome.UNKNOWN, Reason.NO_ANSWER, "sendgrid:main", 3, (5, 6)))
    proofs = {
        5: Proof(Reason.SETTLED_BY_WEBHOOK, "sendgrid", "x", 1),
        6: Proof(Reason.LEDGER_ACCEPTED),
    }
    told = {group.generation: group for group in accepted(watched, proofs, NOW).groups}
    assert (told[1].indexes, told[1].provider_ids) == ((5,), ("x",))
    assert (told[3].indexes, told[3].provider_ids, told[3].reason) == (
        (6,), (), Reason.LEDGER_ACCEPTED,
    )  # fmt: skip


def test_looks_become_rarer_and_an_event_makes_one_due() -> None:
    policy = ReconcilePolicy(grace=timedelta(seconds=2), longest=timedelta(seconds=60))
    watch = Watch(policy)
    assert watch.soonest is None
    watched = page(OutcomeGroup(Outcome.UNKNOWN, Reason.NO_ANSWER, "p", 0, (5,)))
    name = name_of(watched)
    watch.put(name, (5,), NOW)
    assert watch.due(NOW) == []
    now, waits = NOW, []
    for _ in range(8):
        due = watch.soonest
        assert due is not None
        waits.append((due - now).total_seconds())
        now = due
        assert watch.due(now) == [name]
        watch.looked(name, (5,), now)
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    first = 2 * PAGE_SIZE
    for other in (
        event(first + 6),
        event(first + 5, run="other"),
        event(first + 5, ref="nonsense"),
        event(5),
    ):
        watch.heard(other, PAGE_SIZE, now)
        assert watch.due(now) == []
    watch.heard(event(first + 5), PAGE_SIZE, now)
    assert watch.due(now) == [name]
    watch.postpone([name], now + timedelta(seconds=15))
    assert watch.due(now) == []
    watch.drop(name)
    assert (watch.soonest, len(watch)) == (None, 0)


def test_a_look_is_bounded_and_takes_the_oldest() -> None:
    watch = Watch(ReconcilePolicy(messages=10))
    for number in range(20):
        watch.put(f"page-{number:02}", range(4), NOW + timedelta(seconds=number))
    assert watch.due(NOW + timedelta(hours=1)) == ["page-00", "page-01", "page-02"]
