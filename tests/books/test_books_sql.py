"""The books in SQL are the books of the pure rules, on a real ClickHouse endpoint."""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from clickhouse_connect.driver.client import Client

from schemas.codec import to_millis
from schemas.errors import MalformedRecord, Missing
from schemas.ids import LegId, ObjectId, RunId, SnapshotId, Tenant
from schemas.pages import PAGE_SIZE, bitmap_bytes, bitmap_of
from schemas.reasons import Outcome, Reason, RunStatus
from schemas.records import (
    CommandKind,
    DeferGroup,
    OutcomeGroup,
    Outcomes,
    PageResult,
    RunEvent,
    SkipGroup,
)
from schemas.tables import StepKind, step_rank
from sinks.books import count as count_in_sql
from sinks.books import read_books, run_facts
from sinks.clickhouse import Batch, connect, create_tables
from transforms.books import Step, count

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
T, SNAPSHOT = Tenant("acme"), SnapshotId("5" * 32)


def run_event(run: str, counts: tuple[int, ...], legs: tuple[str, ...], pending: int) -> RunEvent:
    return RunEvent(
        event_id=f"{run}-1", tenant=T, run=RunId(run), campaign="spring", version=1,
        status=RunStatus.RUNNING, at=NOW + timedelta(hours=1), command_id="c",
        command=CommandKind.LAUNCH, by="me", accepted=True, note="", spec=ObjectId("a" * 64),
        snapshot=SNAPSHOT, audience=sum(counts), legs=legs, pending=pending, ordered=0, open=0,
        deferred=0, shard_counts=counts,
    )  # fmt: skip


_NOBODY: frozenset[int] = frozenset()


def page_result(
    run: str,
    shard: int,
    generation: int,
    send: Set[int] = _NOBODY,
    skip: Set[int] = _NOBODY,
    expire: Set[int] = _NOBODY,
    defer: Set[int] = _NOBODY,
    page: int = 0,
    why: Reason = Reason.NO_CONSENT,
) -> PageResult:
    def bits(indexes: Set[int]) -> bytes:
        return bitmap_bytes(bitmap_of(indexes))

    return PageResult(
        T, RunId(run), LegId("email"), SNAPSHOT, shard, page, generation, NOW, NOW, bits(send),
        (SkipGroup(why, bits(skip)), SkipGroup(Reason.DEADLINE, bits(expire), True)),
        (DeferGroup(Reason.QUIET_HOURS, NOW + timedelta(hours=8), bits(defer)),),
    )  # fmt: skip


def outcomes(
    run: str, shard: int, page: int, *groups: OutcomeGroup, at: datetime = NOW
) -> Outcomes:
    return Outcomes(T, RunId(run), LegId("email"), SNAPSHOT, shard, page, at, groups)


def group(
    outcome: Outcome, generation: int, *indexes: int, ids: tuple[str, ...] = ()
) -> OutcomeGroup:
    reason = Reason.PROVIDER_ACCEPTED if ids else Reason.PROVIDER_REFUSED
    return OutcomeGroup(outcome, reason, "sendgrid", generation, indexes, ids, 1)


def write(client: Client, *records: PageResult | Outcomes | RunEvent) -> None:
    batch = Batch()
    for record in records:
        if isinstance(record, PageResult):
            batch.add_page_result(record)
        elif isinstance(record, Outcomes):
            batch.add_outcomes(record)
        else:
            batch.add_run_event(record)
    assert batch.write(client) == batch.rows > 0


_REASONS = (Reason.PROVIDER_REFUSED, Reason.ADDRESS_REFUSED)
_SKIPS = (Reason.HOLDOUT, Reason.NO_CONSENT)


def _said(random: random.Random, run: str) -> tuple[Step, PageResult | Outcomes]:
    """Anything that may be said of one of seven recipients, and the record that says it."""
    shard, ordinal, generation = random.choice([0, 2]), random.randrange(4), random.randrange(3)
    kind, which = random.choice(list(StepKind)), random.randrange(2)
    one = {ordinal}
    if kind is StepKind.SEND:
        record: PageResult | Outcomes = page_result(run, shard, generation, send=one)
        reason = ""
    elif kind is StepKind.DEFER:
        record = page_result(run, shard, generation, defer=one)
        reason = "quiet_hours"
    elif kind is StepKind.SKIPPED:
        record = page_result(run, shard, generation, skip=one, why=_SKIPS[which])
        reason = _SKIPS[which].value
    else:
        outcome = Outcome(kind.name.lower())
        made = OutcomeGroup(outcome, _REASONS[which], "smtp", generation, (ordinal,))
        record = outcomes(run, shard, 0, made)
        reason = _REASONS[which].value
    rank = step_rank("", to_millis(NOW), reason)
    return Step("email", shard, ordinal, generation, kind, reason, rank), record


def test_sql_counts_as_the_rules_do(clickhouse: Client) -> None:
    chance = random.Random(20260301)
    counts = (3, 0, 4)
    runs: dict[str, list[Step]] = {}
    records: list[PageResult | Outcomes | RunEvent] = []
    for number in range(30):
        run = f"generated-{number}"
        pairs = [_said(chance, run) for _ in range(chance.randrange(25))]
        runs[run] = [step for step, _ in pairs]
        records.append(run_event(run, counts, ("email",), 0))
        records += [record for _, record in pairs for _ in range(chance.choice([1, 1, 2]))]
    chance.shuffle(records)
    for part in range(5):
        write(clickhouse, *records[part::5])

    def check_all() -> None:
        for run, steps in runs.items():
            found = count_in_sql(clickhouse, "acme", run, run_facts(clickhouse, "acme", run))
            assert found == count(steps, counts, ["email"]), run

    check_all()
    clickhouse.command("OPTIMIZE TABLE fanfare_steps FINAL")
    check_all()


def test_a_run_end_to_end(clickhouse: Client) -> None:
    run = "a-run"
    page = set(range(PAGE_SIZE))
    write(
        clickhouse,
        run_event(run, (PAGE_SIZE + 2, 3), ("email",), 2),
        page_result(run, 0, 0, page - {0, 1, 2}, skip={0}, expire={1}, defer={2}),
        page_result(run, 0, 0, send={0, 1}, page=1),
        outcomes(run, 0, 0, group(Outcome.ACCEPTED, 0, *range(3, 400), ids=("x",) * 397)),
        outcomes(run, 0, 0, group(Outcome.FAILED, 0, *range(400, 500))),
        outcomes(run, 0, 1, group(Outcome.UNKNOWN, 0, 0), group(Outcome.STALE, 0, 1)),
        page_result(run, 0, 1, skip={2}),
        outcomes(run, 1, 0, group(Outcome.CANCELLED, 0, 0, 1)),
    )
    books = read_books(clickhouse, "acme", run, NOW, behind=0)
    assert books.as_json() | {"lag": None} == {
        "tenant": "acme", "run": run, "campaign": "spring", "status": "running",
        "snapshot": SNAPSHOT, "legs": ["email"], "audience": 505, "accepted": 397,
        "skipped": {"no_consent": 2}, "skipped_total": 2, "failed": 100,
        "failed_by_reason": {"provider_refused": 100}, "expired": 1, "cancelled": 2, "unknown": 1,
        "pending": 2, "delivered": 0, "engagement": {}, "dead_letters": {},
        "coordinator": {"pending": 2, "at": (NOW + timedelta(hours=1)).isoformat()},
        "lag": None, "balanced": True, "errors": [],
    }  # fmt: skip


def test_a_known_provider_id_survives_in_any_order(clickhouse: Client) -> None:
    with_id = outcomes("ids", 0, 0, group(Outcome.ACCEPTED, 0, 0, 1, ids=("id-0", "")))
    without = outcomes("ids", 0, 0, group(Outcome.ACCEPTED, 0, 0, 1), at=NOW - timedelta(minutes=5))
    for records in ((with_id, without), (without, with_id)):
        clickhouse.command("TRUNCATE TABLE fanfare_steps")
        for record in records:
            write(clickhouse, record)
        found = clickhouse.query(
            "SELECT ordinal, provider_id FROM fanfare_steps FINAL WHERE run = 'ids' "
            "ORDER BY ordinal"
        ).result_rows
        assert found == [(0, "id-0"), (1, "")]


def test_strangers_and_contradictions_are_shown(clickhouse: Client) -> None:
    run = "wrong"
    write(
        clickhouse,
        run_event(run, (2,), ("email",), 0),
        outcomes(run, 0, 0, group(Outcome.ACCEPTED, 0, 0, 1, 2)),
        outcomes(run, 0, 0, group(Outcome.FAILED, 0, 1)),
    )
    books = read_books(clickhouse, "acme", run, NOW, behind=0)
    assert not books.verdict.balanced
    assert (books.counts.strangers, books.counts.conflicts) == (1, 1)
    assert books.counts.conflict_examples[0].kinds == ("accepted", "failed")


def test_the_coordinators_count_is_compared_once_caught_up(clickhouse: Client) -> None:
    write(clickhouse, run_event("lonely", (2,), ("email", "sms"), 3))
    assert read_books(clickhouse, "acme", "lonely", NOW, behind=7).verdict.balanced
    verdict = read_books(clickhouse, "acme", "lonely", NOW, behind=0).verdict
    assert verdict.errors == ("pending is 4 by rows and 3 by the coordinator",)


def test_an_unknown_run_is_named_with_those_that_exist(clickhouse: Client) -> None:
    newest = replace(run_event("known", (1,), ("email",), 1), at=NOW + timedelta(days=1))
    write(clickhouse, newest)
    with pytest.raises(Missing, match=r"no run 'nowhere'.*known"):
        run_facts(clickhouse, "acme", "nowhere")


def test_values_that_no_table_holds_are_malformed_and_harm_nothing(clickhouse: Client) -> None:
    batch = Batch()
    for record in (
        outcomes("bad", 256, 0, group(Outcome.ACCEPTED, 0, 0)),
        outcomes("bad", 0, 0, group(Outcome.ACCEPTED, 0, 500)),
        outcomes("bad", 0, 0, group(Outcome.ACCEPTED, 0, 0, 1, ids=("x",))),
        outcomes("bad", 0, -1, group(Outcome.ACCEPTED, 0, 0)),
    ):
        with pytest.raises(MalformedRecord):
            batch.add_outcomes(record)
    with pytest.raises(MalformedRecord):
        batch.add_page_result(page_result("bad", 0, 0, send={600}))
    assert batch.rows == 0


def test_tables_are_made_any_number_of_times(clickhouse: Client, clickhouse_url: str) -> None:
    create_tables(clickhouse)
    create_tables(connect(clickhouse_url))
    assert clickhouse.query("SELECT max(version) FROM fanfare_schema").result_rows == [(1,)]
