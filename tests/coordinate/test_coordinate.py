"""The state machine of a run: the window, the counts, replays, commands, time. Pages of two."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.ids import LegId
from schemas.pages import bitmap_from, indexes_of
from schemas.reasons import Outcome, RunStatus
from schemas.records import CommandKind, Outcomes, PageOrder, PageResult
from tests.coordinate.field import FINAL, Field, members, one_leg
from tests.decide.people import EMAIL, NOON, SMS, campaign
from tests.simulation.world import PAGE, small_pages
from transforms.coordinate import CoordinatePolicy, RunMemory, problems_of

MINUTE = timedelta(minutes=1)
SILENCE = timedelta(minutes=20)


@pytest.fixture(autouse=True, scope="module")
def pages() -> Iterator[None]:
    with small_pages():
        yield


def places(orders: list[PageOrder]) -> list[tuple[int, int, int]]:
    return [(one.shard, one.page, one.generation) for one in orders]


# launch


def test_a_launch_orders_first_pages_of_all_shards_before_second_ones() -> None:
    field = Field((3, 0, 2), window=100)
    field.launch()
    assert places(field.orders) == [(0, 0, 0), (2, 0, 0), (0, 1, 0)]
    assert [members(one) for one in field.orders] == [[0, 1], [0, 1], [0]]
    assert (field.memory.unordered, field.memory.open, field.memory.deferred) == (0, 5, 0)


def test_nothing_is_ordered_before_the_ledger_is_there() -> None:
    field = Field((3,))
    field.launch(ready=False)
    assert field.last.create_ledger and field.last.publish
    assert field.orders == []
    field.step(field.coordinator.on_ledger_created(field.now))
    assert places(field.orders) == [(0, 0, 0), (0, 1, 0)]


def test_a_launch_with_problems_is_refused_with_all_of_them() -> None:
    field = Field((3,), one_leg(deadline=NOON - MINUTE))
    field.launch(problems=("no such zone", "no such attribute"))
    assert field.status is RunStatus.REFUSED
    assert field.orders == [] and not field.last.publish and not field.last.create_ledger
    assert "no such zone; no such attribute; deadline" in field.note
    assert not field.events[-1].accepted


def test_a_refused_launch_uses_up_no_name() -> None:
    field = Field((3,))
    field.launch(problems=("no such zone",))
    assert field.status is RunStatus.REFUSED
    version = field.events[-1].version
    field.launch()
    assert field.status is RunStatus.RUNNING
    assert field.events[-1].accepted and field.events[-1].version > version
    assert places(field.orders) == [(0, 0, 0), (0, 1, 0)]


def test_a_note_fits_into_a_record_whatever_was_wrong() -> None:
    field = Field((3,))
    field.launch(problems=tuple(f"template variable {n} is missing" for n in range(50_000)))
    assert len(field.note) < 5_000


def test_a_launch_of_nobody_is_completed_at_once() -> None:
    field = Field((0, 0))
    field.launch()
    assert field.status is RunStatus.COMPLETED


def test_a_run_of_the_same_name_is_not_launched_again() -> None:
    field = Field((3,))
    field.launch()
    before = field.state()
    orders = len(field.orders)
    field.launch()
    assert field.note.startswith("this run exists already")
    assert len(field.orders) == orders
    assert field.state() == before


def test_a_scheduled_run_begins_at_its_time() -> None:
    field = Field((2,), one_leg(start_at=NOON + timedelta(hours=1)))
    field.launch()
    assert field.status is RunStatus.SCHEDULED and field.orders == []
    field.tick(timedelta(minutes=59))
    assert field.orders == []
    field.tick(MINUTE)
    assert field.status is RunStatus.RUNNING and len(field.orders) == 1


def test_a_run_that_has_not_begun_can_begin_at_another_time() -> None:
    field = Field((2,), one_leg(start_at=NOON + timedelta(hours=1)))
    field.launch()
    field.tell(CommandKind.SCHEDULE, start_at=field.run.deadline)
    assert "is not before the run's deadline" in field.note
    field.tell(CommandKind.SCHEDULE, start_at=NOON + timedelta(hours=2))
    assert field.events[-1].accepted and field.status is RunStatus.SCHEDULED
    field.tick(timedelta(hours=1))
    assert field.orders == []
    field.tell(CommandKind.PAUSE)
    field.tell(CommandKind.SCHEDULE, start_at=field.now + MINUTE)
    assert field.events[-1].accepted and field.status is RunStatus.PAUSED
    field.tell(CommandKind.RESUME)
    assert field.status is RunStatus.SCHEDULED
    field.tell(CommandKind.SCHEDULE)
    assert field.status is RunStatus.RUNNING and len(field.orders) == 1
    # Whoever decides must not wait for the start that the definition names.
    assert field.orders[0].start_at == field.now
    field.tell(CommandKind.SCHEDULE, start_at=field.now + MINUTE)
    assert field.note == "the run has begun: it is running; pause and resume it instead"


def test_a_command_that_may_have_been_forgotten_is_refused_as_stale() -> None:
    field = Field((2,), remembered_commands=3)
    field.launch()
    old = field.command(CommandKind.PAUSE)
    field.step(field.coordinator.on_command(old, field.now, None))
    for kind in (CommandKind.RESUME, CommandKind.PAUSE, CommandKind.RESUME):
        field.tick(timedelta(seconds=1))
        field.tell(kind)
    assert old.command_id not in field.run.commands
    field.step(field.coordinator.on_command(old, field.now, None))
    assert field.status is RunStatus.RUNNING
    assert not field.events[-1].accepted and "the command is stale" in field.note
    field.tick(timedelta(seconds=1))
    field.tell(CommandKind.PAUSE)
    assert field.status is RunStatus.PAUSED


def test_legs_must_be_there_once() -> None:
    assert problems_of(campaign()) == ()
    assert problems_of(campaign(legs=())) == ("legs: at least one channel is needed",)
    twice = campaign().legs[:1] * 2
    assert problems_of(campaign(legs=twice)) == ("legs: each channel once, got email, email",)


# window


def test_room_comes_back_with_skips_deferrals_and_outcomes() -> None:
    field = Field((8,), window=2)
    field.launch()
    assert len(field.orders) == 1
    field.hear(field.result(field.orders[0], skips=(0, 1)))
    assert len(field.orders) == 2
    field.hear(field.result(field.orders[1], deferrals={NOON + MINUTE: (0, 1)}))
    assert len(field.orders) == 3
    field.hear(field.outcomes(field.orders[2], Outcome.ACCEPTED, 0))
    assert len(field.orders) == 3
    field.hear(field.outcomes(field.orders[2], Outcome.FAILED, 1))
    assert len(field.orders) == 4


def test_a_page_larger_than_the_window_goes_alone() -> None:
    field = Field((4,), window=1)
    field.launch()
    assert len(field.orders) == 1
    field.hear(field.outcomes(field.orders[0], Outcome.ACCEPTED, 0))
    assert len(field.orders) == 1
    field.hear(field.outcomes(field.orders[0], Outcome.ACCEPTED, 1))
    assert len(field.orders) == 2


def test_decide_is_never_given_more_orders_than_it_may_have_before_it() -> None:
    field = Field((20,), campaign(), window=1000, unanswered=3)
    field.launch()
    assert [(one.leg, one.page) for one in field.orders] == [
        *((EMAIL, page) for page in range(3)),
        *((SMS, page) for page in range(3)),
    ]
    # An outcome that comes before its result answers nobody but whom it tells of.
    field.hear(field.outcomes(field.orders[0], Outcome.ACCEPTED, 0))
    assert len(field.orders) == 6
    later = NOON + MINUTE
    field.hear(field.result(field.orders[1], deferrals={later: (0, 1)}))
    assert [(one.leg, one.page) for one in field.orders[6:]] == [(EMAIL, 3)]
    # What is due waits likewise, and goes before pages that were never ordered.
    field.tick(MINUTE)
    assert len(field.orders) == 7
    field.hear(field.result(field.orders[0]))
    assert places(field.orders[7:]) == [(0, 1, 1)]
    field.restart()
    field.tick()
    assert len(field.orders) == 8
    field.accept_all()
    assert field.status is RunStatus.COMPLETED


def test_who_is_due_first_goes_first_and_nobody_overtakes() -> None:
    field = Field((6,), window=6)
    field.launch()
    hour = timedelta(hours=1)
    for order, wake in zip(tuple(field.orders), (3, 1, 2), strict=True):
        field.hear(field.result(order, deferrals={NOON + wake * hour: (0, 1)}))
    field.coordinator.policy = CoordinatePolicy(window=2)
    field.tick(3 * hour)
    assert places(field.orders[3:]) == [(0, 1, 1)]
    field.hear(field.outcomes(field.orders[3], Outcome.ACCEPTED, 0))
    assert len(field.orders) == 4
    field.hear(field.outcomes(field.orders[3], Outcome.ACCEPTED, 1))
    assert places(field.orders[4:]) == [(0, 2, 1)]
    field.hear(field.outcomes(field.orders[4], Outcome.ACCEPTED, 0, 1))
    assert places(field.orders[5:]) == [(0, 0, 1)]
    field.hear(field.outcomes(field.orders[5], Outcome.ACCEPTED, 0, 1))
    assert field.status is RunStatus.COMPLETED


def test_pages_never_ordered_take_no_room_that_who_is_due_waits_for() -> None:
    field = Field((2, 1, 1, 1, 1, 1), window=3)
    field.launch()
    field.hear(field.result(field.orders[0], deferrals={NOON + MINUTE: (0, 1)}))
    assert places(field.orders) == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)]
    field.tick(MINUTE)
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0))
    assert len(field.orders) == 4
    field.hear(field.outcomes(field.orders[2], Outcome.ACCEPTED, 0))
    assert places(field.orders[4:]) == [(0, 0, 1)]
    field.hear(field.outcomes(field.orders[3], Outcome.ACCEPTED, 0))
    assert places(field.orders[5:]) == [(4, 0, 0)]


def test_one_result_may_put_people_off_to_several_moments() -> None:
    field = Field((2, 2), one_leg())
    field.launch()
    field.hear(
        field.result(field.orders[0], deferrals={NOON + 3 * MINUTE: (0,), NOON + MINUTE: (1,)})
    )
    field.hear(field.result(field.orders[1], deferrals={NOON + 2 * MINUTE: (0, 1)}))
    for expected in ((0, [1]), (1, [0, 1]), (0, [0])):
        before = len(field.orders)
        field.tick(MINUTE)
        assert [(one.shard, members(one)) for one in field.orders[before:]] == [expected]


def test_what_is_given_again_is_looked_for_among_the_unanswered_alone() -> None:
    """Steps of a run must not cost more the more pages it has."""
    field = Field((200,), window=1000)
    field.launch()
    for order in field.orders[:-1]:
        field.hear(field.result(order, deferrals={NOON + timedelta(hours=1): (0, 1)}))
    assert len(field.memory.given) == 1
    assert len(field.memory.wakes[EMAIL]) == 99
    field.tell(CommandKind.CANCEL)
    assert field.memory.wakes[EMAIL] == []
    assert len(field.closings) == 99
    for closing in field.closings:
        field.hear(closing)
    field.tick(SILENCE)
    assert len(field.memory.given) == 1 and field.memory.pending == 2


def test_an_order_that_was_lost_keeps_no_others_in_memory() -> None:
    field = Field((8_000,), window=4)
    field.launch()
    for order in iter(lambda: field.orders[-1], None):
        field.hear(field.result(order))
        field.hear(field.outcomes(order, Outcome.ACCEPTED, *members(order)))
        assert len(field.memory.given) <= 1_010
        if field.memory.unordered == 0 and field.orders[-1] is order:
            break
    assert field.memory.pending == 2 and len(field.memory.pages) == 1
    field.tick(SILENCE)
    assert places(field.orders[-1:]) == [(0, 0, 1)] and field.last.silent == 1


def test_a_rate_makes_the_window() -> None:
    field = Field((100,), one_leg(rate_per_second=1.0), window=1000)
    field.launch()
    assert field.memory.open == 12
    field.tell(CommandKind.SET_RATE, rate_per_second=2.0)
    assert field.memory.open == 24
    field.tell(CommandKind.SET_RATE, rate_per_second=None)
    assert field.memory.open == 100


def test_longer_transactions_make_a_larger_window() -> None:
    short = CoordinatePolicy(commit=timedelta(seconds=2)).room(1_000.0)
    long = CoordinatePolicy(commit=timedelta(seconds=10)).room(1_000.0)
    assert (short, long) == (12_000, 36_000)
    assert CoordinatePolicy(commit=timedelta(minutes=5)).room(1_000.0) == CoordinatePolicy().window


def test_legs_have_windows_of_their_own() -> None:
    field = Field((6,), campaign(), window=2)
    field.launch()
    assert [(one.leg, one.page) for one in field.orders] == [(EMAIL, 0), (SMS, 0)]
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0, 1))
    assert [(one.leg, one.page) for one in field.orders[2:]] == [(SMS, 1)]
    field.accept_all()
    assert field.status is RunStatus.COMPLETED


# generations


def test_a_deferral_is_ordered_again_when_it_is_due_and_the_run_runs() -> None:
    field = Field((2,))
    field.launch()
    field.hear(field.result(field.orders[0], deferrals={NOON + timedelta(hours=1): (1,)}))
    field.hear(field.outcomes(field.orders[0], Outcome.ACCEPTED, 0))
    assert field.status is RunStatus.RUNNING and field.memory.pending == 1
    field.tick(timedelta(minutes=59))
    assert len(field.orders) == 1
    field.tell(CommandKind.PAUSE)
    field.tick(timedelta(hours=1))
    assert len(field.orders) == 1
    field.tell(CommandKind.RESUME)
    assert places(field.orders) == [(0, 0, 0), (0, 0, 1)]
    assert members(field.orders[1]) == [1]


def test_a_deferral_waits_for_room() -> None:
    field = Field((4,), window=2)
    field.launch()
    field.hear(field.result(field.orders[0], deferrals={NOON + MINUTE: (0, 1)}))
    assert places(field.orders[1:]) == [(0, 1, 0)]
    field.tick(MINUTE)
    assert len(field.orders) == 2
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0, 1))
    field.tick(timedelta(seconds=1))
    assert places(field.orders[2:]) == [(0, 0, 1)]


def test_orders_of_a_page_that_are_open_at_once_are_disjoint() -> None:
    field = Field((2,))
    field.launch()
    field.hear(field.result(field.orders[0], deferrals={NOON + MINUTE: (1,)}))
    field.tick(MINUTE)
    assert field.open_of((EMAIL, 0, 0)) == [(0, [0]), (1, [1])]
    # An outcome of one generation says nothing of the other's.
    field.hear(field.outcomes(field.orders[0], Outcome.FAILED, 0, 1))
    assert field.open_of((EMAIL, 0, 0)) == [(1, [1])]


def test_stale_is_decided_afresh() -> None:
    field = Field((2,))
    field.launch()
    field.hear(field.result(field.orders[0]))
    field.hear(field.outcomes(field.orders[0], Outcome.STALE, 0))
    assert places(field.orders) == [(0, 0, 0), (0, 0, 1)]
    assert members(field.orders[1]) == [0]
    field.hear(field.outcomes(field.orders[0], Outcome.STALE, 0))
    assert len(field.orders) == 2
    assert field.memory.pending == 2


def test_accepted_and_unknown_count_in_whatever_generation() -> None:
    for outcome in (Outcome.ACCEPTED, Outcome.UNKNOWN):
        field = Field((2,))
        field.launch()
        field.hear(field.outcomes(field.orders[0], Outcome.STALE, 0, 1))
        assert field.open_of((EMAIL, 0, 0)) == [(1, [0, 1])]
        field.hear(field.outcomes(field.orders[0], outcome, 0, generation=0))
        field.hear(field.outcomes(field.orders[0], outcome, 1, generation=7))
        assert field.memory.pending == 0 and field.status is RunStatus.COMPLETED


def test_other_outcomes_count_in_their_own_generation_alone() -> None:
    for outcome in (Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED, Outcome.STALE):
        field = Field((2,))
        field.launch()
        field.hear(field.outcomes(field.orders[0], Outcome.STALE, 0, 1))
        before = field.state()
        field.hear(field.outcomes(field.orders[0], outcome, 0, 1, generation=0))
        field.hear(field.outcomes(field.orders[0], outcome, 0, 1, generation=2))
        assert field.state() == before


def test_an_outcome_before_its_result_leaves_the_rest_to_the_result() -> None:
    field = Field((2,))
    field.launch()
    order = field.orders[0]
    field.hear(field.outcomes(order, Outcome.STALE, 0))
    field.hear(field.result(order, skips=(1,)))
    assert field.memory.pending == 1
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0))
    assert field.status is RunStatus.COMPLETED


# silence


def test_a_silent_order_is_given_again_under_the_next_generation() -> None:
    field = Field((2,))
    field.launch()
    field.tick(SILENCE - MINUTE)
    assert len(field.orders) == 1
    field.tick(MINUTE)
    assert places(field.orders) == [(0, 0, 0), (0, 0, 1)]
    assert field.last.silent == 1
    assert field.open_of((EMAIL, 0, 0)) == [(1, [0, 1])]
    # The lost result was only late: it says nothing any more.
    field.hear(field.result(field.orders[0], skips=(0, 1)))
    assert field.memory.open == 2


def test_a_silent_order_is_given_again_after_a_restart() -> None:
    field = Field((4,))
    field.launch()
    field.hear(field.result(field.orders[0]))
    field.restart()
    field.tick(SILENCE)
    assert places(field.orders[2:]) == [(0, 1, 1)]


def test_a_clock_that_was_ahead_keeps_no_silent_order_waiting() -> None:
    field = Field((6,), window=4)
    field.now += timedelta(hours=6)
    field.launch()
    field.now -= timedelta(hours=6)
    field.hear(field.result(field.orders[1]))
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0, 1))
    assert places(field.orders) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    field.tick(SILENCE)
    assert places(field.orders[3:]) == [(0, 2, 1)]


def test_a_heard_order_is_never_repeated_by_time() -> None:
    field = Field((2,), one_leg(deadline=NOON + timedelta(days=9)))
    field.launch()
    field.hear(field.result(field.orders[0]))
    for _ in range(10):
        field.tick(SILENCE)
    assert len(field.orders) == 1 and field.memory.open == 2


def test_a_silent_order_of_a_paused_run_waits_for_the_resume() -> None:
    field = Field((2,))
    field.launch()
    field.tell(CommandKind.PAUSE)
    field.tick(SILENCE)
    assert len(field.orders) == 1
    field.tell(CommandKind.RESUME)
    assert places(field.orders) == [(0, 0, 0), (0, 0, 1)]


# the end


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_closed_run_closes_what_is_unordered_or_deferred_at_once(how: str) -> None:
    field = Field((6,), window=4)
    field.launch()
    field.hear(field.result(field.orders[0], deferrals={NOON + timedelta(hours=1): (1,)}))
    field.hear(field.result(field.orders[1]))
    if how == "cancel":
        field.tell(CommandKind.CANCEL)
        assert field.status is RunStatus.CANCELLED
        expected = Outcome.CANCELLED
    else:
        field.tick(timedelta(days=3))
        assert field.status is RunStatus.EXPIRED
        expected = Outcome.EXPIRED
    closed = {
        (one.page, group.generation, group.indexes, group.outcome)
        for one in field.closings
        for group in one.groups
    }
    assert closed == {(0, 1, (1,), expected), (2, 0, (0, 1), expected)}
    for one in field.closings:
        field.hear(one)
    assert field.memory.pending == 3
    # What is open closes by delivery's outcome.
    field.hear(field.outcomes(field.orders[0], expected, 0))
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0, 1))
    assert field.memory.pending == 0
    assert field.events[-1].pending == 0


def test_what_is_put_off_after_a_cancel_is_closed_at_once() -> None:
    field = Field((2,))
    field.launch()
    field.tell(CommandKind.CANCEL)
    field.hear(field.result(field.orders[0], deferrals={NOON + timedelta(hours=1): (0,)}))
    assert [group.indexes for one in field.closings for group in one.groups] == [(0,)]
    field.hear(field.outcomes(field.orders[0], Outcome.STALE, 1))
    assert [group.indexes for one in field.closings for group in one.groups] == [(0,), (1,)]
    for one in field.closings:
        field.hear(one)
    assert field.memory.pending == 0
    assert field.events[-1].pending == 0


def test_a_closing_that_is_not_heard_back_is_said_again() -> None:
    field = Field((2,), one_leg(start_at=NOON + timedelta(hours=1)))
    field.launch()
    field.tell(CommandKind.CANCEL)
    assert len(field.closings) == 1 and field.memory.pending == 2
    field.tick(SILENCE)
    assert [one.groups[0].generation for one in field.closings] == [0, 1]
    field.hear(field.closings[0])
    assert field.memory.pending == 2
    field.hear(field.closings[1])
    assert field.memory.pending == 0


def test_many_who_were_put_off_are_closed_in_several_steps() -> None:
    field = Field((20,), window=20, closings_per_step=3)
    field.launch()
    for order in field.orders:
        field.hear(field.result(order, deferrals={NOON + MINUTE: (0,), NOON + 2 * MINUTE: (1,)}))
    assert len(field.orders) == 10
    field.tell(CommandKind.CANCEL)
    closed = [len(field.closings)]
    while field.coordinator.closing:
        before = len(field.closings)
        field.tick(timedelta(milliseconds=200))
        closed.append(len(field.closings) - before)
    assert closed == [3, 3, 3, 1]


def test_many_pages_are_closed_in_several_steps() -> None:
    field = Field((20,), window=2, closings_per_step=3)
    field.launch()
    field.tell(CommandKind.CANCEL)
    steps = 1
    while field.coordinator.closing:
        field.tick(timedelta(seconds=1))
        steps += 1
    assert steps == 3 and len(field.closings) == 9
    assert len(field.last.closings) == 3
    for one in field.closings:
        field.hear(one)
    assert field.memory.pending == 2 == field.memory.open


# commands


def test_commands_that_the_state_does_not_allow_are_refused_with_a_reason() -> None:
    field = Field((4,), window=2)
    field.tell(CommandKind.PAUSE)
    assert field.note == "there is no run 'spring-1' of tenant 'acme'"
    field.launch()
    field.tell(CommandKind.RESUME)
    assert field.note == "the run is running, not paused"
    field.tell(CommandKind.PAUSE)
    field.tell(CommandKind.PAUSE)
    assert field.note == "the run is paused already"
    field.tell(CommandKind.SET_RATE, rate_per_second=0.0)
    assert field.note.startswith("a rate must be")
    assert field.note.endswith("got 0; use pause to stop")
    field.reorder(1, 0)
    assert field.note == "page 1 of shard 0 was not ordered yet"
    field.reorder(9, 0)
    assert field.note == "page 9 of shard 0 has 0 recipients, not these"
    field.reorder(0, 2)
    assert field.note == "page 0 of shard 0 has 2 recipients, not these"
    field.reorder(0, 0, leg=LegId("fax"))
    assert field.note == "the run has no leg 'fax'; it has email"
    field.tell(CommandKind.CANCEL)
    for kind in (CommandKind.PAUSE, CommandKind.RESUME, CommandKind.CANCEL, CommandKind.SET_RATE):
        field.tell(kind)
        assert field.note == "the run is cancelled: nothing of it can be changed"
        assert not field.events[-1].accepted
    field.reorder(0, 0)
    assert field.note == "the run is cancelled: nothing is ordered again"


def test_versions_grow_and_are_published_until_redis_has_them() -> None:
    field = Field((4,), window=2)
    field.launch()
    first = field.run.version
    field.coordinator.on_published(first, field.now)
    field.tick()
    assert not field.last.publish
    field.tell(CommandKind.PAUSE)
    assert field.last.publish and field.run.version > first
    field.tick()
    assert field.last.publish
    field.coordinator.on_published(first, field.now)
    field.tick()
    assert field.last.publish
    field.coordinator.on_published(field.run.version, field.now)
    field.tick()
    assert not field.last.publish


def test_a_status_is_published_again_and_again_as_long_as_something_may_be_sent() -> None:
    """An older copy of Redis, in which the run runs still, must not undo its pause for long."""
    field = Field((4,), window=2)
    field.launch()
    field.tell(CommandKind.PAUSE)
    field.coordinator.on_published(field.run.version, field.now)
    version, kept = field.run.version, field.run
    for _ in range(3):
        field.tick(timedelta(seconds=4.9))
        assert not field.last.publish
        field.tick(timedelta(seconds=0.1))
        assert field.last.publish and field.run.version == version
        field.coordinator.on_published(version, field.now)
    assert field.run is kept, "nothing of it is state"
    field.tell(CommandKind.CANCEL)
    field.coordinator.on_published(field.run.version, field.now)
    assert field.memory.pending == 4, "two are on their way, two closings were not heard back"
    field.tick(timedelta(seconds=5))
    assert field.last.publish
    field.hear(field.outcomes(field.orders[0], Outcome.CANCELLED, *members(field.orders[0])))
    for closing in field.closings:
        field.hear(closing)
    field.coordinator.on_published(field.run.version, field.now)
    field.tick(timedelta(minutes=1))
    assert not field.memory.pending and not field.last.publish


def test_a_restored_run_is_published_at_once_unless_it_is_over() -> None:
    field = Field((4,))
    field.launch()
    field.coordinator.on_published(field.run.version, field.now)
    field.restart()
    field.tick()
    assert field.last.publish
    field.accept_all()
    assert field.status is RunStatus.COMPLETED
    field.coordinator.on_published(field.run.version, field.now)
    field.restart()
    field.tick(timedelta(minutes=1))
    assert not field.last.publish


def test_a_reorder_is_above_what_a_predecessor_may_have_published() -> None:
    """A predecessor heard the last outcomes and published the end, then its checkpoint failed."""
    predecessor, field = Field((2,)), Field((2,))
    for one in (predecessor, field):
        one.launch()
        one.hear(one.result(one.orders[0]))
        one.hear(one.outcomes(one.orders[0], Outcome.FAILED, 0))
        one.now += timedelta(seconds=1)
    predecessor.hear(predecessor.outcomes(predecessor.orders[0], Outcome.FAILED, 1))
    assert predecessor.status is RunStatus.COMPLETED
    # The successor reads the command before it reads the outcome again.
    field.now += timedelta(seconds=1)
    field.reorder(0, 0)
    assert field.status is RunStatus.RUNNING and field.last.publish
    assert field.run.version > predecessor.run.version


def test_a_replayed_old_command_undoes_nothing() -> None:
    field = Field((4,), window=2)
    field.launch()
    pause = field.command(CommandKind.PAUSE)
    field.step(field.coordinator.on_command(pause, field.now, None))
    field.tell(CommandKind.RESUME)
    events = len(field.events)
    field.step(field.coordinator.on_command(pause, field.now, None))
    assert field.status is RunStatus.RUNNING and len(field.events) == events


def test_a_dead_letter_opens_a_completed_run_again() -> None:
    field = Field((2,))
    field.launch()
    field.hear(field.result(field.orders[0]))
    field.hear(field.outcomes(field.orders[0], Outcome.FAILED, 0))
    field.hear(field.outcomes(field.orders[0], Outcome.ACCEPTED, 1))
    assert field.status is RunStatus.COMPLETED
    version = field.run.version
    field.reorder(0, 0)
    assert field.status is RunStatus.RUNNING and field.run.version > version
    assert places(field.orders) == [(0, 0, 0), (0, 0, 1)] and members(field.orders[1]) == [0]
    # Old outcomes change nothing of the new order.
    field.hear(field.outcomes(field.orders[0], Outcome.FAILED, 0))
    assert field.memory.pending == 1
    field.hear(field.outcomes(field.orders[1], Outcome.ACCEPTED, 0))
    assert field.status is RunStatus.COMPLETED
    field.tick(timedelta(days=4))
    field.reorder(0, 0)
    assert "deadline" in field.note


def test_a_replay_of_who_is_on_the_way_orders_nobody_twice() -> None:
    field = Field((2,))
    field.launch()
    field.reorder(0, 0, 1)
    assert len(field.orders) == 1
    assert field.memory.pending == 2


# properties

_STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 255)), max_size=40)
_COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


class _Driver:
    """Feeds a run with what may come, in any order, and keeps its own books of it."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.sent: list[PageResult | Outcomes] = []
        field.launch()
        # Only who is out of coordinate's hands: rows, by place of a recipient.
        self.final: set[tuple[str, int, int, int]] = set()

    def do(self, kind: int, number: int) -> None:
        field = self.field
        order = field.orders[number % len(field.orders)] if field.orders else None
        if kind == 0:
            field.tick(timedelta(seconds=number))
        elif kind == 1:
            field.tick(timedelta(minutes=number % 40 - 3))
        elif kind == 2:
            kinds = (CommandKind.PAUSE, CommandKind.RESUME, CommandKind.RESUME)
            field.tell(kinds[number % 3])
        elif kind == 3 and number < 20:
            field.tell(CommandKind.CANCEL)
        elif kind == 4 and field.closings:
            self.hear(field.closings[number % len(field.closings)])
        elif kind == 5 and self.sent:
            self.hear(self.sent[number % len(self.sent)])
        elif order is not None and kind in (6, 7):
            until = field.now + timedelta(minutes=number % 90)
            everyone = members(order)
            skips = tuple(i for i in everyone if (number >> i) % 3 == 0)
            later = tuple(i for i in everyone if (number >> i) % 3 == 1)
            moments = [until + n * timedelta(minutes=number // 90 % 3) for n in range(len(later))]
            put_off: dict[datetime, tuple[int, ...]] = {}
            for index, moment in zip(later, moments, strict=True):
                put_off[moment] = (*put_off.get(moment, ()), index)
            self.hear(field.result(order, skips, put_off))
        elif order is not None and kind in (8, 9):
            outcome = (*FINAL[:3], Outcome.STALE)[number // 8 % 4]
            everyone = members(order)
            some = everyone if number & 4 else everyone[:1]
            self.hear(field.outcomes(order, outcome, *some))

    def hear(self, record: PageResult | Outcomes) -> None:
        if record not in self.sent:
            self.sent.append(record)
        self._note(record)
        self.field.hear(record)

    def _note(self, record: PageResult | Outcomes) -> None:
        """Who has a final row now, by the rule of the module: own generation, or accepted."""
        key = (record.leg, record.shard, record.page)
        page = self.field.memory.pages.get(key)
        orders = {one.generation: one for one in page.orders} if page else {}
        if isinstance(record, PageResult):
            order = orders.get(record.generation)
            if order is None or order.heard:
                return
            held = bitmap_from(order.unresolved)
            done = [
                i for skip in record.skips for i in indexes_of(bitmap_from(skip.ordinals) & held)
            ]
            self.final |= {(*key, i) for i in done}
            return
        for group in record.groups:
            if group.outcome in (Outcome.ACCEPTED, Outcome.UNKNOWN):
                self.final |= {(*key, i) for i in group.indexes}
            elif group.outcome is not Outcome.STALE and group.generation in orders:
                held = bitmap_from(orders[group.generation].unresolved)
                self.final |= {(*key, i) for i in group.indexes if held >> i & 1}

    def check(self) -> None:
        field, memory = self.field, self.field.memory
        audience = sum(field.counts) * len(field.run.legs)
        assert memory.pending == memory.unordered + memory.open + memory.deferred
        assert memory.pending == audience - len(self.final)
        assert field.run.status is not RunStatus.COMPLETED or memory.pending == 0
        if field.status is RunStatus.RUNNING:
            assert memory.pending > 0
        for page in memory.pages.values():
            held = 0
            for bits in (
                *(bitmap_from(one.unresolved) for one in page.orders),
                *(bitmap_from(one.ordinals) for one in page.deferrals),
            ):
                assert bits and not held & bits
                held |= bits
        again = RunMemory(memory.run, dict(memory.pages))
        again.recount()
        assert (again.open, again.deferred) == (memory.open, memory.deferred)
        assert again.unanswered_by_leg.items() <= memory.unanswered_by_leg.items()
        # Each that may be silent, and each deferral, will be looked at, after a restart too.
        unheard = {
            (one.ordered_at, key, one.generation)
            for key, page in memory.pages.items()
            for one in page.orders
            if not one.heard
        }
        put_off = {
            (key[0], one.wake, key[2], key[1])
            for key, page in memory.pages.items()
            for one in page.deferrals
        }
        for one in (memory, again):
            assert unheard <= set(one.given)
            assert one.given == [] or one.given[0] == min(one.given)
            assert put_off <= {(leg, *wake) for leg, heap in one.wakes.items() for wake in heap}
            assert all(heap == [] or heap[0] == min(heap) for heap in one.wakes.values())


@settings(max_examples=150, deadline=None)
@given(_COUNTS, st.integers(1, 6), st.booleans(), _STEPS)
def test_pending_is_counted_for_itself_and_the_window_is_kept(
    counts: tuple[int, ...], window: int, both: bool, steps: list[tuple[int, int]]
) -> None:
    unanswered = 1 + window // 2
    spec = campaign() if both else one_leg()
    field = Field(counts, spec, window=window, unanswered=unanswered)
    driver = _Driver(field)
    driver.check()
    for kind, number in steps:
        driver.do(kind, number)
        driver.check()
        if not field.status.terminal:
            for leg, opened in field.memory.open_by_leg.items():
                assert opened <= max(window, PAGE), leg
                assert field.memory.unanswered_by_leg[leg] <= unanswered
    ordered = {
        (one.leg, one.shard, one.page, index) for one in field.orders for index in members(one)
    }
    told = {
        (one.leg, one.shard, one.page, index)
        for one in field.closings
        for group in one.groups
        for index in group.indexes
    }
    if field.memory.unordered == 0 and field.status is not RunStatus.REFUSED:
        assert len(ordered | told) == sum(counts) * len(field.run.legs)


@settings(max_examples=80, deadline=None)
@given(_COUNTS, st.integers(1, 6), _STEPS)
def test_what_was_heard_before_changes_nothing(
    counts: tuple[int, ...], window: int, steps: list[tuple[int, int]]
) -> None:
    field = Field(counts, window=window)
    driver = _Driver(field)
    for kind, number in steps:
        driver.do(kind, number)
    field.tick()
    before, orders, closings = field.state(), len(field.orders), len(field.closings)
    for record in (*driver.sent, *reversed(driver.sent)):
        if isinstance(record, Outcomes) or _is_old(field, record):
            page = field.memory.pages.get((record.leg, record.shard, record.page))
            if page is None or isinstance(record, PageResult):
                field.hear(record)
    assert field.state() == before
    assert (len(field.orders), len(field.closings)) == (orders, closings)


def _is_old(field: Field, result: PageResult) -> bool:
    page = field.memory.pages.get((result.leg, result.shard, result.page))
    return page is None or all(
        one.heard for one in page.orders if one.generation == result.generation
    )


@settings(max_examples=80, deadline=None)
@given(_COUNTS, st.integers(1, 6), st.booleans(), _STEPS)
def test_everybody_is_ordered_and_every_run_ends(
    counts: tuple[int, ...], window: int, both: bool, steps: list[tuple[int, int]]
) -> None:
    field = Field(counts, campaign() if both else one_leg(), window=window)
    driver = _Driver(field)
    for kind, number in steps:
        driver.do(kind, number)
    if field.status is RunStatus.PAUSED:
        field.tell(CommandKind.RESUME)
    for _ in range(100):
        for order in tuple(field.orders):
            driver.hear(field.outcomes(order, Outcome.ACCEPTED, *members(order)))
        for closing in tuple(field.closings):
            driver.hear(closing)
        if field.status.terminal and not field.memory.pending:
            break
        field.tick(timedelta(minutes=30))
    driver.check()
    assert field.status.terminal and field.memory.pending == 0
    assert len(driver.final) == sum(counts) * len(field.run.legs)
    assert field.events[-1].pending == 0


@settings(max_examples=60, deadline=None)
@given(_COUNTS, st.integers(1, 6), _STEPS, st.integers(0, 40))
def test_a_restart_forgets_nothing(
    counts: tuple[int, ...], window: int, steps: list[tuple[int, int]], at: int
) -> None:
    """What is loaded from the kept pages goes on as what was never ended."""
    whole, restarted = Field(counts, window=window), Field(counts, window=window)
    one, other = _Driver(whole), _Driver(restarted)
    for number, step in enumerate(steps):
        if number == at:
            restarted.restart()
        one.do(*step)
        other.do(*step)
    whole.tick()
    restarted.tick()
    assert places(whole.orders) == places(restarted.orders)
    assert whole.memory.pending == restarted.memory.pending
    assert whole.memory.run == restarted.memory.run
